"""Result paths that are built from untrusted names."""

from __future__ import annotations

import unicodedata
from pathlib import PurePosixPath, PureWindowsPath

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from jobledger.workers.processors.session.result_layout import ResultLayout, build_layout, sanitize_path_component
from tests.processors.session.fixtures import load_samples, without_deadline

ANY_TEXT = st.text(alphabet=st.characters())
UNSAFE_TEXT = st.text(alphabet=st.sampled_from(list('./\\ :*?"<>|-\x00\n\u202e\u00a0aCON1ü\u0308💌')))
NAMES = ANY_TEXT | UNSAFE_TEXT
LETTERS = st.characters(categories=["L"])
LONG = st.text(alphabet=st.characters(categories=("L", "N")), min_size=81, max_size=300)


def make_layout(name: str = "x", *, job_id: str = "job-1") -> ResultLayout:
    return build_layout(event=name, track=name, session=name, filename=name, job_id=job_id)


@without_deadline
@given(NAMES)
@example("..")
@example("con.txt")
@example("COM¹")
@example("\ud800")
@example("-" * 90)
def test_component_is_one_valid_name_on_every_system(name: str) -> None:
    component = sanitize_path_component(name)
    assert PurePosixPath(component).parts == (component,)
    assert PureWindowsPath(component).parts == (component,)
    assert not PureWindowsPath(component).is_reserved()
    assert not set(component) & set('/\\<>:"|?*')
    assert component not in ("", ".", "..")
    assert component == component.strip(" .")
    assert all(unicodedata.category(character) not in ("Cc", "Cs", "Zs", "Zl", "Zp") for character in component)


@without_deadline
@given(NAMES)
def test_component_length_is_limited(name: str) -> None:
    component = sanitize_path_component(name)
    assert len(component) <= 80
    assert len(component.encode()) <= 200


@without_deadline
@given(NAMES | LONG)
def test_sanitize_path_component_is_idempotent(name: str) -> None:
    assert sanitize_path_component(sanitize_path_component(name)) == sanitize_path_component(name)


@without_deadline
@given(LONG, LETTERS, LETTERS)
def test_long_names_that_differ_at_the_end_stay_different(name: str, first: str, second: str) -> None:
    assume(unicodedata.normalize("NFC", name + first) != unicodedata.normalize("NFC", name + second))
    assert sanitize_path_component(name + first) != sanitize_path_component(name + second)


@without_deadline
@given(LONG)
def test_shortened_name_keeps_its_extension(name: str) -> None:
    assert sanitize_path_component(f"{name}.md").endswith(".md")


@without_deadline
@given(NAMES)
def test_result_paths_never_leave_the_folder(name: str) -> None:
    layout = make_layout(name)
    for result_path in (layout.markdown_path, layout.build_asset_path("slide-001.jpg")):
        parts = PurePosixPath(result_path).parts
        assert not result_path.startswith("/")
        assert ".." not in parts
        assert PurePosixPath(layout.folder).parts == parts[:3]


@without_deadline
@given(NAMES)
def test_two_jobs_never_share_a_folder(name: str) -> None:
    assert make_layout(name, job_id="job-1").folder.casefold() != make_layout(name, job_id="job-2").folder.casefold()


@without_deadline
@given(NAMES)
def test_layout_of_a_job_is_deterministic(name: str) -> None:
    assert make_layout(name) == make_layout(name)


@without_deadline
@given(NAMES)
def test_every_component_of_a_path_is_sanitized(name: str) -> None:
    assert all(
        sanitize_path_component(component) == component
        for component in PurePosixPath(make_layout(name).markdown_path).parts
    )


def test_markdown_path_never_collides_with_assets_directory() -> None:
    for name in ("assets", "Assets", "ASSETS."):
        assert make_layout(name).markdown_path.casefold().endswith("/assets.md")


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("Closing-FOSDEM-2025.md", "Closing-FOSDEM-2025.md"),
        ("FOSDEM 2025", "FOSDEM-2025"),
        ("Größer – als 💌 gedacht", "Größer-–-als-💌-gedacht"),
        ("Gro\u0308ße", "Größe"),
        ("a/b : c", "a-b-c"),
        ("../../etc/passwd", "etc-passwd"),
        ("AUX", "_AUX"),
        ("nul.md", "_nul.md"),
        ("console.md", "console.md"),
        ("...", "untitled"),
    ],
)
def test_sanitize_path_component_keeps_safe_characters(name: str, component: str) -> None:
    assert sanitize_path_component(name) == component


def test_samples_have_unique_paths_and_keep_file_names() -> None:
    paths = set()
    samples = load_samples()
    for number, sample in enumerate(samples):
        names = {field: sample[field] for field in ("event", "track", "session", "filename")}
        layout = build_layout(**names, job_id=f"job-{number}")
        paths.add(layout.markdown_path.casefold())
        if len(sample["filename"]) <= 80:
            assert layout.markdown_path.endswith("/" + sample["filename"])
    assert len(paths) == len(samples)


def test_layout_contains_names_of_the_session() -> None:
    layout = build_layout(event="FOSDEM 2025", track="Main-7", session="My Talk", filename="My-Talk.md", job_id="j")
    assert layout.markdown_path.startswith("FOSDEM-2025/Main-7/My-Talk-")
    assert layout.markdown_path.endswith("/My-Talk.md")
    assert layout.build_asset_path("slide-001.jpg") == f"{layout.folder}/assets/slide-001.jpg"

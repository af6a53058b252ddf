"""tests: paths made of names from outside."""

from __future__ import annotations

import unicodedata
from pathlib import PurePosixPath, PureWindowsPath

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from jobledger.workers.processors.session.result_layout import ResultLayout, build_layout, sanitize_path_component
from tests.processors.session.fixtures import without_deadline
from tests.processors.session.test_parameters import samples

ANY_TEXT = st.text(alphabet=st.characters())
AWKWARD = st.text(alphabet=st.sampled_from(list('./\\ :*?"<>|-\x00\n\u202e\u00a0aCON1ü\u0308💌')))
NAMES = ANY_TEXT | AWKWARD
LETTERS = st.characters(categories=["L"])
LONG = st.text(alphabet=st.characters(categories=("L", "N")), min_size=81, max_size=300)


def path(name: str = "x", *, job_id: str = "job-1") -> ResultLayout:
    return build_layout(event=name, track=name, session=name, filename=name, job_id=job_id)


@without_deadline
@given(NAMES)
@example("..")
@example("con.txt")
@example("COM¹")
@example("\ud800")
@example("-" * 90)
def test_a_part_is_one_plain_name_on_every_system(name: str) -> None:
    part = sanitize_path_component(name)
    assert PurePosixPath(part).parts == (part,)
    assert PureWindowsPath(part).parts == (part,)
    assert not PureWindowsPath(part).is_reserved()
    assert not set(part) & set('/\\<>:"|?*')
    assert part not in ("", ".", "..")
    assert part == part.strip(" .")
    assert all(unicodedata.category(character) not in ("Cc", "Cs", "Zs", "Zl", "Zp") for character in part)


@without_deadline
@given(NAMES)
def test_a_part_is_never_long(name: str) -> None:
    part = sanitize_path_component(name)
    assert len(part) <= 80
    assert len(part.encode()) <= 200


@without_deadline
@given(NAMES | LONG)
def test_making_a_safe_part_safe_changes_nothing(name: str) -> None:
    assert sanitize_path_component(sanitize_path_component(name)) == sanitize_path_component(name)


@without_deadline
@given(LONG, LETTERS, LETTERS)
def test_long_names_that_differ_only_at_their_end_stay_different(name: str, one: str, other: str) -> None:
    assume(unicodedata.normalize("NFC", name + one) != unicodedata.normalize("NFC", name + other))
    assert sanitize_path_component(name + one) != sanitize_path_component(name + other)


@without_deadline
@given(LONG)
def test_a_shortened_name_keeps_its_extension(name: str) -> None:
    assert sanitize_path_component(f"{name}.md").endswith(".md")


@without_deadline
@given(NAMES)
def test_nothing_escapes_its_folder(name: str) -> None:
    where = path(name)
    for one in (where.markdown_path, where.asset_path("slide-001.jpg")):
        parts = PurePosixPath(one).parts
        assert not one.startswith("/")
        assert ".." not in parts
        assert PurePosixPath(where.folder).parts == parts[:3]


@without_deadline
@given(NAMES)
def test_two_jobs_never_share_a_path(name: str) -> None:
    assert path(name, job_id="job-1").folder.casefold() != path(name, job_id="job-2").folder.casefold()


@without_deadline
@given(NAMES)
def test_the_paths_of_a_job_are_the_same_on_every_attempt(name: str) -> None:
    assert path(name) == path(name)


@without_deadline
@given(NAMES)
def test_every_part_of_a_path_is_a_safe_part(name: str) -> None:
    assert all(sanitize_path_component(part) == part for part in PurePosixPath(path(name).markdown_path).parts)


def test_a_file_is_never_in_the_place_of_the_assets() -> None:
    for name in ("assets", "Assets", "ASSETS."):
        assert path(name).markdown_path.casefold().endswith("/assets.md")


@pytest.mark.parametrize(
    ("name", "part"),
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
def test_names_stay_as_close_to_the_original_as_is_safe(name: str, part: str) -> None:
    assert sanitize_path_component(name) == part


def test_all_samples_have_their_own_path_and_keep_their_file_name() -> None:
    paths = set()
    for number, sample in enumerate(samples()):
        names = {name: sample[name] for name in ("event", "track", "session", "filename")}
        where = build_layout(**names, job_id=f"job-{number}")
        paths.add(where.markdown_path.casefold())
        if len(sample["filename"]) <= 80:
            assert where.markdown_path.endswith("/" + sample["filename"])
    assert len(paths) == len(samples())


def test_a_path_reads_like_the_session_it_is_of() -> None:
    where = build_layout(event="FOSDEM 2025", track="Main-7", session="My Talk", filename="My-Talk.md", job_id="j")
    assert where.markdown_path.startswith("FOSDEM-2025/Main-7/My-Talk-")
    assert where.markdown_path.endswith("/My-Talk.md")
    assert where.asset_path("slide-001.jpg") == f"{where.folder}/assets/slide-001.jpg"

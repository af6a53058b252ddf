"""tests: paths made of names from outside."""

from __future__ import annotations

import unicodedata
from pathlib import PurePosixPath, PureWindowsPath

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from jobledger.workers.processors.session.result_names import Layout, layout, safe_part
from tests.processors.session.support import unhurried
from tests.processors.session.test_parameters import samples

ANY_TEXT = st.text(alphabet=st.characters())
AWKWARD = st.text(alphabet=st.sampled_from(list('./\\ :*?"<>|-\x00\n\u202e\u00a0aCON1ü\u0308💌')))
NAMES = ANY_TEXT | AWKWARD
LETTERS = st.characters(categories=["L"])
LONG = st.text(alphabet=st.characters(categories=("L", "N")), min_size=81, max_size=300)


def path(name: str = "x", *, job_id: str = "job-1") -> Layout:
    return layout(event=name, track=name, session=name, filename=name, job_id=job_id)


@unhurried
@given(NAMES)
@example("..")
@example("con.txt")
@example("COM¹")
@example("\ud800")
@example("-" * 90)
def test_a_part_is_one_plain_name_on_every_system(name: str) -> None:
    part = safe_part(name)
    assert PurePosixPath(part).parts == (part,)
    assert PureWindowsPath(part).parts == (part,)
    assert not PureWindowsPath(part).is_reserved()
    assert not set(part) & set('/\\<>:"|?*')
    assert part not in ("", ".", "..")
    assert part == part.strip(" .")
    assert all(unicodedata.category(character) not in ("Cc", "Cs", "Zs", "Zl", "Zp") for character in part)


@unhurried
@given(NAMES)
def test_a_part_is_never_long(name: str) -> None:
    part = safe_part(name)
    assert len(part) <= 80
    assert len(part.encode()) <= 200


@unhurried
@given(NAMES | LONG)
def test_making_a_safe_part_safe_changes_nothing(name: str) -> None:
    assert safe_part(safe_part(name)) == safe_part(name)


@unhurried
@given(LONG, LETTERS, LETTERS)
def test_long_names_that_differ_only_at_their_end_stay_different(name: str, one: str, other: str) -> None:
    assume(unicodedata.normalize("NFC", name + one) != unicodedata.normalize("NFC", name + other))
    assert safe_part(name + one) != safe_part(name + other)


@unhurried
@given(LONG)
def test_a_shortened_name_keeps_its_extension(name: str) -> None:
    assert safe_part(f"{name}.md").endswith(".md")


@unhurried
@given(NAMES)
def test_nothing_escapes_its_folder(name: str) -> None:
    where = path(name)
    for one in (where.markdown, where.asset("slide-001.jpg")):
        parts = PurePosixPath(one).parts
        assert not one.startswith("/")
        assert ".." not in parts
        assert PurePosixPath(where.folder).parts == parts[:3]


@unhurried
@given(NAMES)
def test_two_jobs_never_share_a_path(name: str) -> None:
    assert path(name, job_id="job-1").folder.casefold() != path(name, job_id="job-2").folder.casefold()


@unhurried
@given(NAMES)
def test_the_paths_of_a_job_are_the_same_on_every_attempt(name: str) -> None:
    assert path(name) == path(name)


@unhurried
@given(NAMES)
def test_every_part_of_a_path_is_a_safe_part(name: str) -> None:
    assert all(safe_part(part) == part for part in PurePosixPath(path(name).markdown).parts)


def test_a_file_is_never_in_the_place_of_the_assets() -> None:
    for name in ("assets", "Assets", "ASSETS."):
        assert path(name).markdown.casefold().endswith("/assets.md")


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
    assert safe_part(name) == part


def test_all_samples_have_their_own_path_and_keep_their_file_name() -> None:
    paths = set()
    for number, sample in enumerate(samples()):
        names = {name: sample[name] for name in ("event", "track", "session", "filename")}
        where = layout(**names, job_id=f"job-{number}")
        paths.add(where.markdown.casefold())
        if len(sample["filename"]) <= 80:
            assert where.markdown.endswith("/" + sample["filename"])
    assert len(paths) == len(samples())


def test_a_path_reads_like_the_session_it_is_of() -> None:
    where = layout(event="FOSDEM 2025", track="Main-7", session="My Talk", filename="My-Talk.md", job_id="j")
    assert where.markdown.startswith("FOSDEM-2025/Main-7/My-Talk-")
    assert where.markdown.endswith("/My-Talk.md")
    assert where.asset("slide-001.jpg") == f"{where.folder}/assets/slide-001.jpg"

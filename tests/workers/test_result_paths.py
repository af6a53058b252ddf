"""Tests of result paths: paths that `save` accepts can be fetched, and no job gets the path of another job."""

from __future__ import annotations

import asyncio
import posixpath
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jobledger.api.routes.zip_archives import sanitize_path
from jobledger.ledger.domain.commands import Delete, RestartJob
from jobledger.ledger.domain.events import JobCompleted
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.projections.views import files
from jobledger.workers.processor import JobContext, ProcessorError, Results
from jobledger.workers.processors.session.result_layout import build_layout
from jobledger.workers.results.paths import MAX_PART_BYTES, generate_candidates, normalize_path
from tests.support.role_runner import RunningRoles, WorkerOptions, run_roles_in_process
from tests.workers.inline_processor import install_processor

INVALID = {
    "": "empty part",
    "/etc/passwd": "absolute",
    "//host/a": "absolute",
    "a//b": "empty part",
    "a/": "empty part",
    "./a": "part '.'",
    "a/./b": "part '.'",
    "../a": "part '..'",
    "a/../../b": "part '..'",
    "a/..": "part '..'",
    "...": "dot",
    "a.": "dot",
    "a./b": "dot",
    "a ": "space",
    " a": "space",
    "a /b": "space",
    "a/ b": "space",
    "a\u00a0": "space",
    "a\nb": "U+000A",
    "a\n": "U+000A",
    "a\r\nX-Header: 1": "U+000D",
    "a\x00": "U+0000",
    "a\x7f": "U+007F",
    "a\x85b": "U+0085",
    "a\u2028b": "U+2028",
    "a\u202egpj.md": "U+202E",
    "a\u2066b": "U+2066",
    "a\u061cb": "U+061C",
    "a\ufeff": "U+FEFF",
    "a\u200bb": "U+200B",
    "a\ud800": "U+D800",
    "\udcff.md": "U+DCFF",
    "a\\b": "backslash",
    "..\\a": "backslash",
    "a%2eb": "percent",
    "%2E%2e/a": "percent",
    "a%2Fb": "percent",
    "a%00": "percent",
    "link": "'link'",
    "a/link": "'link'",
    "a" * (MAX_PART_BYTES + 1): "longer",
    "\u00e4" * (MAX_PART_BYTES // 2 + 1): "longer",
    "a/" * 500 + "ab": "longer",
}
VALID = [
    "a.md",
    "a b/c d.md",
    "100%.md",
    "a%zz",
    ".hidden",
    "a..b",
    "link.md",
    "link/a",
    "Link",
    "a?b#c&d=e;f+g",
    'a:b*c"d<e>f|g',
    "\u00dcbersicht.md",
    "\u05e9\u05dc\u05d5\u05dd.md",
    "\u0645\u06cc\u200c\u062e.md",
    "\U0001f469\u200d\U0001f680.md",
    "con.md",
    "a" * MAX_PART_BYTES,
    "/".join(["a" * 199] * 5),
]


@pytest.mark.parametrize(("path", "rule"), INVALID.items(), ids=[ascii(path)[:40] for path in INVALID])
def test_invalid_path_is_rejected_with_path_and_rule(path: str, rule: str) -> None:
    with pytest.raises(ProcessorError) as rejection:
        normalize_path(path)
    assert (rejection.value.code, rejection.value.transient) == ("INVALID_PATH", False)
    assert rule in rejection.value.message
    assert ascii(path[:300]) in rejection.value.message
    rejection.value.message.encode()


@pytest.mark.parametrize("path", VALID)
def test_valid_path_is_accepted_unchanged(path: str) -> None:
    assert normalize_path(path) == path


def test_path_is_normalized_to_form_c() -> None:
    assert normalize_path("a\u0308.md") == normalize_path("\u00e4.md") == "\u00e4.md"


PATHS = st.lists(
    st.text(st.characters(), max_size=12)
    | st.sampled_from(
        ["..", ".", "", "link", "%2e", "a", "con", "e\u0301", "?x=1", "#y", ";z", "a b", "+", "~", "x" * 199]
    ),
    min_size=1,
    max_size=6,
).map("/".join)


def normalize_or_none(path: str) -> str | None:
    try:
        return normalize_path(path)
    except ProcessorError:
        return None


@given(PATHS)
@example("a%2e")
def test_accepted_path_has_only_one_spelling(path: str) -> None:
    if (normal := normalize_or_none(path)) is None:
        return
    assert normalize_path(normal) == normal == unicodedata.normalize("NFC", normal)
    assert posixpath.normpath(normal) == normal
    assert Path("/root", normal).resolve(strict=False) == Path("/root") / normal
    assert not Path(normal).is_absolute()
    assert sanitize_path(normal).count("/") == normal.count("/"), "the archive keeps the folders"
    assert re.sub(r'[<>:"|?*]', "_", normal).casefold() in sanitize_path(normal).casefold().replace("_con", "con")


@given(PATHS, st.sampled_from(["job-1", "job-2"]))
def test_candidates_for_a_taken_path_are_valid_and_distinct(path: str, job_id: str) -> None:
    if (normal := normalize_or_none(path)) is None:
        return
    candidates = list(generate_candidates(normal, job_id))
    assert candidates[0] == normal
    assert len(set(candidates)) == len(candidates)
    for alternative in candidates:
        assert normalize_path(alternative) == alternative
    assert not set(candidates[1:]) & set(list(generate_candidates(normal, "job-3"))[1:])


@settings(max_examples=50)
@given(st.text(), st.text(), st.text(), st.text())
@example("a%2e", "\u061c", "\u00ad", "link")
@example("\u4e2d" * 300, "\U0001f469" * 300, "x" * 999, "y" * 999)
def test_every_path_of_a_session_is_valid(event: str, track: str, session: str, filename: str) -> None:
    layout = build_layout(event=event, track=track, session=session, filename=filename, job_id="job-1")
    for path in (layout.markdown_path, layout.build_asset_path("slide-001.jpg")):
        assert normalize_path(path) == path


# In a running worker --------------------------------------------------------------------------------------------------


async def save_paths(job: JobContext) -> Results:
    """Save the files of the parameters. `bare` replaces the paths in the results, as a wrong processor would."""
    parameters = job.parameters.model_dump()
    saved = [
        await job.save(path, (parameters["word"] + path).encode("utf-8", "surrogatepass"), "text/markdown")
        for path in parameters["paths"]
    ]
    if path := parameters.get("bare"):
        saved = [file.model_copy(update={"path": path}) for file in saved]
    return Results(markdown=saved[0], assets=saved[1:], metadata={"saved_paths": [file.path for file in saved]})


async def run_job(roles: RunningRoles, *paths: str, word: str = "w", **more: Any) -> Document:
    return await roles.wait_until_finished(await roles.submit({"paths": paths, "word": word, **more}, job_type="test"))


def list_paths(job: Document) -> list[str]:
    assert job["results"] is not None, job["error"]
    return [file["path"] for file in job["results"]["files"]]


async def find_owner(roles: RunningRoles, path: str) -> str | None:
    row = await files.get(roles.checkpoint.views, path)
    return row["job_id"] if row else None


async def test_second_job_with_the_same_path_gets_another_path(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_processor(monkeypatch, save_paths)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as roles:
        first = await run_job(roles, "r/a.md", "r/a", word="1")
        second = await run_job(roles, "r/a.md", "r/a", word="2")
        assert list_paths(first) == first["results"]["metadata"]["saved_paths"] == ["r/a.md", "r/a"]
        second_paths = list_paths(second)
        assert second_paths == second["results"]["metadata"]["saved_paths"]
        assert [re.sub("-[0-9a-f]{8}", "", path) for path in second_paths] == ["r/a.md", "r/a"]
        assert not set(second_paths) & {"r/a.md", "r/a"}
        assert second["results"]["markdown_url"].endswith(second_paths[0])

        # A restart keeps the paths, whichever jobs were added since.
        for job in (second, first):
            [restarted] = await roles.handle_commands(job["job_id"], RestartJob("user-1"))
            await roles.wait_for_event(JobCompleted, job["job_id"], after=restarted.position)
            await roles.wait_for_views()
            assert list_paths(await roles.load_job(job["job_id"])) == list_paths(job)

        # Deleting one job keeps the file of the other. Then the path is free.
        await roles.handle_commands(second["job_id"], Delete("user-1"))
        await roles.wait_for_views()
        assert [await find_owner(roles, path) for path in ("r/a.md", second_paths[0])] == [first["job_id"], None]
        await roles.handle_commands(first["job_id"], Delete("user-1"))
        await roles.wait_for_views()
        third = await run_job(roles, "r/a.md")
        assert list_paths(third) == ["r/a.md"]


async def test_concurrent_jobs_with_the_same_path_get_distinct_paths(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_processor(monkeypatch, save_paths)
    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(max_concurrent=10)
    ) as roles:
        jobs = await asyncio.gather(*(run_job(roles, "same.md", word=str(number)) for number in range(10)))
        paths = [list_paths(job)[0] for job in jobs]
        assert paths.count("same.md") == 1
        assert len(set(paths)) == 10


async def test_worker_checks_result_paths_that_were_not_saved(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_processor(monkeypatch, save_paths)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as roles:
        first = await run_job(roles, "b.md")
        conflicting, outside, duplicate, repeated, rejected = await asyncio.gather(
            run_job(roles, "t.md", bare="b.md"),
            run_job(roles, "o.md", bare="../o.md"),
            run_job(roles, "d.md", "e.md", bare="f.md"),
            run_job(roles, "g.md", "g.md"),
            run_job(roles, "x\n.md"),
        )
        assert await find_owner(roles, "b.md") == first["job_id"]
        assert list_paths(conflicting) != ["b.md"]
        assert (outside["status"], outside["error"]["code"]) == ("failed", "INVALID_PATH")
        assert (duplicate["status"], duplicate["error"]["code"]) == ("failed", "DUPLICATE_PATH")
        assert list_paths(repeated) == ["g.md", "g.md"]
        assert (rejected["status"], rejected["error"]["code"]) == ("failed", "INVALID_PATH")
        assert "U+000A" in rejected["error"]["message"]

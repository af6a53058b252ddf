"""Result paths: what `save` accepts can be fetched, and no job gets the path of another."""

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

from jobledger.api.routes.archives import sanitize_path
from jobledger.ledger.domain.commands import Delete, RestartJob
from jobledger.ledger.domain.events import JobCompleted
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.projections.views import files
from jobledger.workers.processor import JobContext, ProcessorError, Results
from jobledger.workers.processors.session.result_layout import build_layout
from jobledger.workers.result_paths import MAX_PART_BYTES, generate_candidates, normalize_path
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
def test_invalid_path_is_refused_with_path_and_rule(path: str, rule: str) -> None:
    with pytest.raises(ProcessorError) as refused:
        normalize_path(path)
    assert (refused.value.code, refused.value.transient) == ("INVALID_PATH", False)
    assert rule in refused.value.message
    assert ascii(path[:300]) in refused.value.message
    refused.value.message.encode()


@pytest.mark.parametrize("path", VALID)
def test_valid_path_is_accepted_unchanged(path: str) -> None:
    assert normalize_path(path) == path


def test_path_is_normalised_to_form_c() -> None:
    assert normalize_path("a\u0308.md") == normalize_path("\u00e4.md") == "\u00e4.md"


PATHS = st.lists(
    st.text(st.characters(), max_size=12)
    | st.sampled_from(
        ["..", ".", "", "link", "%2e", "a", "con", "e\u0301", "?x=1", "#y", ";z", "a b", "+", "~", "x" * 199]
    ),
    min_size=1,
    max_size=6,
).map("/".join)


def accepted(path: str) -> str | None:
    try:
        return normalize_path(path)
    except ProcessorError:
        return None


@given(PATHS)
@example("a%2e")
def test_accepted_path_is_its_only_spelling(path: str) -> None:
    if (normal := accepted(path)) is None:
        return
    assert normalize_path(normal) == normal == unicodedata.normalize("NFC", normal)
    assert posixpath.normpath(normal) == normal
    assert Path("/root", normal).resolve(strict=False) == Path("/root") / normal
    assert not Path(normal).is_absolute()
    assert sanitize_path(normal).count("/") == normal.count("/"), "the archive keeps its folders"
    assert re.sub(r'[<>:"|?*]', "_", normal).casefold() in sanitize_path(normal).casefold().replace("_con", "con")


@given(PATHS, st.sampled_from(["job-1", "job-2"]))
def test_paths_given_instead_of_a_taken_one_are_valid_and_distinct(path: str, job_id: str) -> None:
    if (normal := accepted(path)) is None:
        return
    found = list(generate_candidates(normal, job_id))
    assert found[0] == normal
    assert len(set(found)) == len(found)
    for alternative in found:
        assert normalize_path(alternative) == alternative
    assert not set(found[1:]) & set(list(generate_candidates(normal, "job-3"))[1:])


@settings(max_examples=50)
@given(st.text(), st.text(), st.text(), st.text())
@example("a%2e", "\u061c", "\u00ad", "link")
@example("\u4e2d" * 300, "\U0001f469" * 300, "x" * 999, "y" * 999)
def test_every_path_of_a_session_is_valid(event: str, track: str, session: str, filename: str) -> None:
    where = build_layout(event=event, track=track, session=session, filename=filename, job_id="job-1")
    for path in (where.markdown_path, where.asset_path("slide-001.jpg")):
        assert normalize_path(path) == path


# Through real processes and HTTP ----------------------------------------------------------------------------------


async def work(job: JobContext) -> Results:
    """Save what the parameters say; `bare` puts made-up files into the results."""
    wanted = job.parameters.model_dump()
    saved = [
        await job.save(path, (wanted["word"] + path).encode("utf-8", "surrogatepass"), "text/markdown")
        for path in wanted["paths"]
    ]
    if path := wanted.get("bare"):
        saved = [file.model_copy(update={"path": path}) for file in saved]
    return Results(markdown=saved[0], assets=saved[1:], metadata={"said": [file.path for file in saved]})


async def ran(here: RunningRoles, *paths: str, word: str = "w", **more: Any) -> Document:
    return await here.wait_until_finished(await here.submit({"paths": paths, "word": word, **more}, job_type="test"))


def paths_of(job: Document) -> list[str]:
    assert job["results"] is not None, job["error"]
    return [file["path"] for file in job["results"]["files"]]


async def owner_of(here: RunningRoles, path: str) -> str | None:
    row = await files.get(here.checkpoint.views, path)
    return row["job_id"] if row else None


async def test_second_job_with_a_path_gets_a_distinct_one(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_processor(monkeypatch, work)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as here:
        first = await ran(here, "r/a.md", "r/a", word="1")
        second = await ran(here, "r/a.md", "r/a", word="2")
        assert paths_of(first) == first["results"]["metadata"]["said"] == ["r/a.md", "r/a"]
        marked = paths_of(second)
        assert marked == second["results"]["metadata"]["said"]
        assert [re.sub("-[0-9a-f]{8}", "", path) for path in marked] == ["r/a.md", "r/a"]
        assert not set(marked) & {"r/a.md", "r/a"}
        assert second["results"]["markdown_url"].endswith(marked[0])

        # A restart keeps the paths, whoever else there is by now.
        for job in (second, first):
            [restarted] = await here.handle_commands(job["job_id"], RestartJob("user-1"))
            await here.wait_for_event(JobCompleted, job["job_id"], after=restarted.position)
            await here.wait_for_views()
            assert paths_of(await here.load_job(job["job_id"])) == paths_of(job)

        # Deleting one leaves the file of the other; then the path is free.
        await here.handle_commands(second["job_id"], Delete("user-1"))
        await here.wait_for_views()
        assert [await owner_of(here, path) for path in ("r/a.md", marked[0])] == [first["job_id"], None]
        await here.handle_commands(first["job_id"], Delete("user-1"))
        await here.wait_for_views()
        third = await ran(here, "r/a.md")
        assert paths_of(third) == ["r/a.md"]


async def test_of_jobs_that_save_one_path_at_once_one_gets_it(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_processor(monkeypatch, work)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions(slots=10)) as here:
        jobs = await asyncio.gather(*(ran(here, "same.md", word=str(number)) for number in range(10)))
        found = [paths_of(job)[0] for job in jobs]
        assert found.count("same.md") == 1
        assert len(set(found)) == 10


async def test_worker_checks_paths_that_were_not_saved(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_processor(monkeypatch, work)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as here:
        first = await ran(here, "b.md")
        thief, outside, double, twice, refused = await asyncio.gather(
            ran(here, "t.md", bare="b.md"),
            ran(here, "o.md", bare="../o.md"),
            ran(here, "d.md", "e.md", bare="f.md"),
            ran(here, "g.md", "g.md"),
            ran(here, "x\n.md"),
        )
        assert await owner_of(here, "b.md") == first["job_id"]
        assert paths_of(thief) != ["b.md"]
        assert (outside["status"], outside["error"]["code"]) == ("failed", "INVALID_PATH")
        assert (double["status"], double["error"]["code"]) == ("failed", "DUPLICATE_PATH")
        assert paths_of(twice) == ["g.md", "g.md"]
        assert (refused["status"], refused["error"]["code"]) == ("failed", "INVALID_PATH")
        assert "U+000A" in refused["error"]["message"]

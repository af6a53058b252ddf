"""Tests of misbehaving processors: the attempt ends with the same error in a job process and inline.

Other jobs continue.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from jobledger.ledger.domain.commands import CancelJob, ReportEvent
from jobledger.ledger.domain.events import JobLogged, StepCompleted
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.store.command_handler import CommandResult, handle_command_with_retries
from jobledger.ledger.store.event_store import EventStore
from jobledger.workers.attempts import attempt_timeout as time_limit
from jobledger.workers.attempts import attempt_writer
from jobledger.workers.attempts.executor import JobExecutor
from jobledger.workers.attempts.outcome_recorder import StopReason
from jobledger.workers.results.conversion import to_text
from tests.support import misbehaving
from tests.support.polling import poll_until
from tests.support.role_runner import RunningRoles, WorkerOptions, run_roles_in_process
from tests.workers.misbehaving_processors import misbehaving_processors

__all__ = ["misbehaving_processors"]
pytestmark = pytest.mark.usefixtures("misbehaving_processors")
TYPES = ["misbehaving", "misbehaving-inline"]
OPTIONS = WorkerOptions(max_concurrent=8, confinement="off")
COMPLETED = ("completed", None, "")
FAULT = "PROCESSOR_FAULT"

ENDINGS: dict[str, tuple[str, str | None, str]] = {
    "nothing": COMPLETED,
    "raise SystemExit": ("failed", FAULT, "SystemExit: 3"),
    "raise KeyboardInterrupt": ("failed", FAULT, "KeyboardInterrupt"),
    "raise GeneratorExit": ("failed", FAULT, "GeneratorExit"),
    "raise CancelledError": ("failed", FAULT, "CancelledError"),
    "raise BaseException": ("failed", FAULT, "CustomBaseException: own"),
    "raise StopIteration": ("failed", FAULT, "StopIteration"),
    "raise StopAsyncIteration": ("failed", FAULT, "StopAsyncIteration"),
    "raise MemoryError": ("failed", "OUT_OF_MEMORY", "memory_limit_mb"),
    "raise unprintable": ("failed", FAULT, "UnprintableError whose text cannot be read: SystemExit"),
    "raise surrogate": ("failed", FAULT, "half ? of a pair"),
    "raise long": ("failed", FAULT, "ValueError: xxxx"),
    "raise without attributes": ("failed", "PROCESSOR_ERROR", ""),
    "raise odd code": ("failed", "PROCESSOR_ERROR", "b'bytes'"),
    "raise odd details": ("failed", "ODD", "an odd error"),
    "raise large details": ("failed", "ODD", "an odd error"),
    "raise no details": ("failed", "ODD", "an odd error"),
    "raise group": ("failed", "NO", "no"),
    "raise group of one": ("failed", "NO", "no"),
    "raise mixed group": ("failed", FAULT, "SystemExit"),
    "cancel itself": ("failed", FAULT, "CancelledError"),
    "await cancelled": ("failed", FAULT, "CancelledError"),
    "exit in step": ("failed", FAULT, "SystemExit: 2"),
    "exit in task": COMPLETED,
    "exit in task group": ("failed", FAULT, "SystemExit: 2"),
    "exit in callback": COMPLETED,
    "exit in thread": COMPLETED,
    "leave tasks": COMPLETED,
    "return None": ("failed", "INVALID_RESULT", "returned a NoneType"),
    "return dict": ("failed", "INVALID_RESULT", "returned a dict"),
    "return class": ("failed", "INVALID_RESULT", "returned a ModelMetaclass"),
    "return wrong fields": ("failed", "INVALID_RESULT", "results.markdown"),
    "return invalid": ("failed", "INVALID_RESULT", "results.metadata.1"),
    "return many tokens": ("failed", "INVALID_RESULT", "results.tokens_used"),
    "odd texts": COMPLETED,
    "fill the disk": ("failed", FAULT, "No space left on device"),
}


@pytest.mark.parametrize("job_type", TYPES)
async def test_attempt_ends_with_the_cause_for_any_error_of_a_processor(
    job_type: str, connection: Connection, store: Path
) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=OPTIONS) as roles:
        job_ids = {action: await roles.submit({"action": action}, job_type=job_type) for action in ENDINGS}
        await roles.wait_until_finished(*job_ids.values(), seconds=120)
        jobs = {action: await roles.load_job(job_id) for action, job_id in job_ids.items()}
        assert {action: (job["status"], (job["error"] or {}).get("code")) for action, job in jobs.items()} == {
            action: (status, code) for action, (status, code, _) in ENDINGS.items()
        }
        for action, (_, code, text) in ENDINGS.items():
            if code is not None:
                assert text in jobs[action]["error"]["message"], action
                assert len(jobs[action]["error"]["message"]) < 20_000
                expected = (3, True) if code == FAULT else (1, False)
                assert (jobs[action]["attempt"], jobs[action]["error"]["details"]["retryable"]) == expected, action
        details = jobs["raise odd details"]["error"]["details"]
        assert (details["fine"], details["2"]) == (
            1,
            "<not stored: details cannot be stored: it has the key 2 of type int. Use strings as keys.>",
        )
        assert "details.when cannot be stored: JSON has no type for set" in details["when"]
        assert jobs["raise large details"]["error"]["details"]["fine"] == 1
        assert [error.split(":")[0] for error in jobs["raise mixed group"]["error"]["details"]["errors"]] == [
            "ProcessorError",
            "SystemExit",
        ]
        assert not [task for task in asyncio.all_tasks() if "ignore_canc" in repr(task) or "stubborn" in repr(task)]
        assert "logged after the job ended" not in str(jobs["leave tasks"]["logs"])
        assert (await roles.wait_until_finished(await roles.submit()))["status"] == "completed"


@pytest.mark.parametrize("job_type", TYPES)
async def test_job_that_ignores_cancellation_ends_when_stopped(
    job_type: str, connection: Connection, store: Path
) -> None:
    options = WorkerOptions(max_concurrent=2, confinement="off", shutdown_grace_seconds=0.1)
    async with run_roles_in_process(connection, store, projector=True) as roles:

        async def submit_and_wait_for_start(timeout_s: float = 60) -> str:
            job_id = await roles.submit(
                {"action": "ignore cancellation"}, job_type=job_type, timeout_s=timeout_s, max_attempts=1
            )
            await roles.wait_for_event(JobLogged, job_id)
            return job_id

        async with run_roles_in_process(connection, store, worker=options, is_worker_process=True):
            slow, cancelled = await submit_and_wait_for_start(2.5), await submit_and_wait_for_start()
            await roles.handle_commands(cancelled, CancelJob("user-1"))
            assert (await roles.wait_until_finished(cancelled))["status"] == "cancelled"
            assert (await roles.wait_until_finished(slow))["error"]["code"] == "TIMEOUT"
            assert (await roles.wait_until_finished(await roles.submit()))["status"] == "completed", (
                "the slots must be free again"
            )
            released = await submit_and_wait_for_start()
        assert (await roles.read_event_types(released))[-1] == "JobReleased"


LOCATIONS = {
    "return value": "results.metadata.value",
    "step output": 'step "page" output',
    "step input": 'step "page" inputs.value',
}


@pytest.mark.parametrize("job_type", TYPES)
async def test_value_that_cannot_be_stored_fails_job_with_its_location(
    job_type: str, connection: Connection, store: Path
) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=OPTIONS) as roles:
        job_ids = {
            (action, value): await roles.submit({"action": action, "value": value}, job_type=job_type)
            for value in misbehaving.REJECTED_VALUES
            for action in LOCATIONS
        }
        accepted = await roles.submit({"action": "return accepted values"}, job_type=job_type)
        await roles.wait_until_finished(*job_ids.values(), accepted, seconds=150)
        for (action, value), job_id in job_ids.items():
            job = await roles.load_job(job_id)
            assert (job["status"], job["attempt"]) == ("failed", 1), (action, value)
            assert job["error"]["code"] == "INVALID_RESULT", (action, value, job["error"])
            suffix = misbehaving.REJECTED_VALUES[value][1]
            location = LOCATIONS[action].removesuffix(".value") if suffix is None else LOCATIONS[action] + suffix
            assert job["error"]["message"].startswith(location), (action, value, job["error"])
            assert "cannot be stored: " in job["error"]["message"]
        job = await roles.load_job(accepted)
        expected = {name: stored for name, (_, stored) in misbehaving.ACCEPTED_VALUES.items()}
        assert job["error"] is None
        assert job["results"]["metadata"]["values"] == expected
        assert job["results"]["metadata"]["steps"] == expected


@pytest.mark.parametrize("job_type", TYPES)
async def test_concurrent_calls_get_their_own_results(job_type: str, connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=OPTIONS) as roles:
        job_id = await roles.submit({"action": "everything at once"}, job_type=job_type)
        job = await roles.wait_until_finished(job_id, seconds=120)
        assert (job["status"], job["error"]) == ("completed", None)
        assert job["results"]["metadata"]["mismatches"] == []
        assert job["results"]["metadata"]["tokens_used"] == 180
        assert len(job["results"]["metadata"]["warnings"]) == 18
        events = [event.event for event in await roles.event_store.read_stream(job_id)]
        steps = {event.step: event for event in events if isinstance(event, StepCompleted)}
        assert len(steps) == 180
        for name, step in steps.items():
            number = step.output["number"]
            assert (name, step.tokens_used) == (f"step {number}", 1)
            assert step.warnings == ([f"warning {number}"] if number % 10 == 0 else [])
            content = roles.store.get_path(step.output["file"]["sha256"]).read_bytes()
            assert content == f"file {number}".encode()
        lines = [line.message for event in events if isinstance(event, JobLogged) for line in event.entries]
        numbered_lines = {line for line in lines if line.startswith("line ")}
        assert numbered_lines == {f"line {number} " + "y" * (number % 300) for number in range(180)}


# Logging --------------------------------------------------------------------------------------------------------------


async def read_log_lines(roles: RunningRoles, job_id: str) -> list[str]:
    events = [event.event for event in await roles.event_store.read_stream(job_id)]
    return [line.message for event in events if isinstance(event, JobLogged) for line in event.entries]


@pytest.mark.parametrize("job_type", TYPES)
async def test_steps_with_similar_names_are_kept_apart(job_type: str, connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=OPTIONS) as roles:
        job = await roles.wait_until_finished(
            await roles.submit({"action": "use similar step names"}, job_type=job_type, max_attempts=2)
        )
        assert job["attempt"] == 2
        assert job["results"]["metadata"]["outputs"] == [ascii(name) for name in misbehaving.STEP_NAMES]


@pytest.mark.parametrize("job_type", TYPES)
async def test_deeply_nested_scratch_is_removed_and_job_completes(
    job_type: str, connection: Connection, store: Path
) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=OPTIONS) as roles:
        job = await roles.wait_until_finished(
            await roles.submit({"action": "nest directories"}, job_type=job_type, max_attempts=1)
        )
        assert (job["status"], job["error"]) == ("completed", None)


@pytest.mark.parametrize("job_type", TYPES)
async def test_job_with_inaccessible_scratch_directory_is_released(
    job_type: str, connection: Connection, store: Path, tmp_path: Path
) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=OPTIONS) as roles:
        job_id = await roles.submit({"action": "lock scratch", "file": str(tmp_path / "marker")}, job_type=job_type)
        job = await roles.wait_until_finished(job_id)
        assert (job["status"], job["attempt"]) == ("completed", 2)
        assert [event for event in await roles.read_event_types(job_id) if event != "JobLogged"] == [
            *("JobSubmitted", "JobClaimed", "JobReleased", "JobClaimed", "JobCompleted")
        ]
        assert job["retries"] == 0


@pytest.mark.parametrize("job_type", TYPES)
async def test_excessive_logging_is_truncated_and_job_completes(
    job_type: str, connection: Connection, store: Path
) -> None:
    parameters: dict[str, dict[str, Any]] = {
        "one long line": {"action": "log long line"},
        "many lines": {"action": "log many lines", "lines": 200_000, "width": 10},
        "wide lines": {"action": "log many lines", "lines": 10_000, "width": 9_000},
    }
    async with run_roles_in_process(connection, store, projector=True, worker=OPTIONS) as roles:
        job_ids = {name: await roles.submit(values, job_type=job_type) for name, values in parameters.items()}
        await roles.wait_until_finished(*job_ids.values(), seconds=120)
        for name, job_id in job_ids.items():
            job = await roles.load_job(job_id)
            assert (job["status"], job["error"]) == ("completed", None), name
        long_line, next_line = await read_log_lines(roles, job_ids["one long line"])
        assert long_line.endswith("more characters were cut)")
        assert (len(long_line) < 20_000, next_line) == (True, "after")
        for name in ("many lines", "wide lines"):
            lines = await read_log_lines(roles, job_ids[name])
            assert len(lines) < 20_000
            assert sum(map(len, lines)) < 8 * 2**20
            assert [line for line in lines if "log entries" in line and "were dropped here" in line], (
                "a line must report the dropped lines"
            )
            numbers = [int(line.split()[0]) for line in lines if "were dropped" not in line]
            assert numbers == sorted(numbers)
            assert numbers[-1] == parameters[name]["lines"] - 1, "the last line is always kept"
            job = await roles.load_job(job_ids[name])
            if job_type == "misbehaving":  # inline, it is the memory of the test process
                assert job["results"]["metadata"]["peak"] < 500


@pytest.mark.parametrize("end", ["cancel", "timeout"])
@pytest.mark.parametrize("job_type", TYPES)
async def test_log_lines_survive_cancellation_of_their_request(
    job_type: str, end: str, connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def handle_slowly(event_store: EventStore, stream: str, command: Any, **options: Any) -> CommandResult:
        if isinstance(command, ReportEvent) and isinstance(command.event, JobLogged):
            writing.set()
            await stopping.wait()
        return await handle_command_with_retries(event_store, stream, command, **options)

    def stop_and_notify(executor: JobExecutor, reason: StopReason) -> None:
        stop(executor, reason)
        stopping.set()

    writing, stopping, stop = asyncio.Event(), asyncio.Event(), JobExecutor._stop
    monkeypatch.setattr(JobExecutor, "_stop", stop_and_notify)
    monkeypatch.setattr(attempt_writer, "handle_command_with_retries", handle_slowly)
    if end == "timeout":
        monkeypatch.setattr(time_limit, "PAUSE_AFTER_SECONDS", 60.0)
    async with run_roles_in_process(connection, store, projector=True, worker=OPTIONS) as roles:
        timeout_s = 4.0 if end == "timeout" else 60.0  # enough to write all lines on a busy machine
        job_id = await roles.submit(
            {"action": "log and finish step"}, job_type=job_type, timeout_s=timeout_s, max_attempts=1
        )
        await writing.wait()
        if end == "cancel":
            await roles.handle_commands(job_id, CancelJob("user-1"))
        await roles.wait_until_finished(job_id)
        assert [line.split()[0] for line in await read_log_lines(roles, job_id)] == [
            str(number) for number in range(150)
        ]


async def test_output_of_job_process_is_in_its_log(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=OPTIONS) as roles:
        job_id = await roles.submit({"action": "print many lines", "lines": 300_000}, job_type="misbehaving")
        job = await roles.wait_until_finished(job_id, seconds=120)
        assert (job["status"], job["error"]) == ("completed", None)
        lines = await read_log_lines(roles, job_id)
        assert lines[0] == "the first line"
        assert sum(map(len, lines)) < 100_000
        assert [line for line in lines if "more bytes of output were dropped" in line]
        job_id = await roles.submit({"action": "print endless line", "lines": 30_000}, job_type="misbehaving")
        assert (await roles.wait_until_finished(job_id, seconds=120))["status"] == "completed"
        [text, note] = await read_log_lines(roles, job_id)
        assert text.startswith("xxx")
        assert note == f"… {30_000 * 99 - 64 * 1024:,} more bytes of output were dropped."
        crashed = await roles.wait_until_finished(
            await roles.submit({"action": "crash"}, job_type="misbehaving", max_attempts=1)
        )
        assert (crashed["error"]["code"], crashed["error"]["details"]["signal"]) == ("PROCESS_KILLED", "SIGSEGV")
        assert "output before the crash" in crashed["error"]["details"]["output"]
        assert "Segmentation fault" in crashed["error"]["details"]["output"]


async def test_fork_server_that_cannot_preload_a_module_serves_others(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobledger.workers.child import fork_server_client

    monkeypatch.setattr(fork_server_client, "PRELOAD_MODULES", ["no.such.module", "tests.support.exiting_preload"])
    fork_server_client.fork_server_client.stop()
    async with run_roles_in_process(connection, store, projector=True, worker=OPTIONS) as roles:
        job = await roles.wait_until_finished(await roles.submit({"action": "nothing"}, job_type="misbehaving"))
        assert job["status"] == "completed"
    fork_server_client.fork_server_client.stop()


async def test_tasks_of_a_job_end_with_it(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=OPTIONS) as roles:
        await roles.wait_until_finished(await roles.submit())
        before = len(asyncio.all_tasks())
        for _ in range(3):
            await roles.wait_until_finished(
                await roles.submit({"action": "leave tasks"}, job_type="misbehaving-inline")
            )
        await poll_until(lambda: len(asyncio.all_tasks()) <= before, "all tasks have ended")


IRREGULAR = {
    "FIFO": "is a FIFO (named pipe)",
    "link to a FIFO": "is a FIFO (named pipe)",
    "socket": "is a socket",
    "device": "is a device",
    "directory": "is a directory",
}


async def test_save_of_irregular_file_fails_at_once_and_names_it(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=OPTIONS) as roles:
        for job_type in TYPES:
            # More saves than threads for them: no save blocks a thread.
            kinds = [*IRREGULAR] * 3
            job_ids = [
                await roles.submit({"action": "save irregular file", "kind": kind}, job_type=job_type, max_attempts=1)
                for kind in kinds
            ]
            await roles.wait_until_finished(*job_ids)
            for kind, job_id in zip(kinds, job_ids, strict=True):
                error = (await roles.load_job(job_id))["error"]
                assert error["code"] == "INVALID_RESULT", error
                assert f"{IRREGULAR[kind]}. Give the path of a regular file, or bytes." in error["message"]
                assert ("/dev/zero" if kind == "device" else "/file'") in error["message"]
            for kind in ("link to a file", "custom path"):
                job = await roles.wait_until_finished(
                    await roles.submit({"action": "save irregular file", "kind": kind}, job_type=job_type)
                )
                assert job["status"] == "completed", job["error"]


# The event loop of a job process --------------------------------------------------------------------------------------

LOOP_ACTIONS = {
    "cancel all tasks": "CancelledError",
    "cancel all tasks past containment": "CancelledError",
    "stop the loop": "must not stop the event loop",
    "stop the loop past containment": "must not stop the event loop",
}


async def test_processor_that_stops_its_event_loop_fails_each_attempt(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=OPTIONS) as roles:
        job_ids = {
            action: await roles.submit({"action": action}, job_type="misbehaving", max_attempts=3)
            for action in LOOP_ACTIONS
        }
        await roles.wait_until_finished(*job_ids.values())
        for action, text in LOOP_ACTIONS.items():
            job = await roles.load_job(job_ids[action])
            assert (job["status"], job["attempt"], job["error"]["code"]) == ("failed", 3, FAULT), (action, job["error"])
            assert text in job["error"]["message"], action
            assert "output" not in job["error"]["details"], "the output must not contain our traceback"


# Warnings and files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job_type", TYPES)
async def test_warnings_over_the_limit_are_counted_and_job_completes(
    job_type: str, connection: Connection, store: Path
) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=OPTIONS) as roles:
        job_ids = {
            value: await roles.submit({"action": "warn many times", "value": value, "lines": 500}, job_type=job_type)
            for value in misbehaving.WARNINGS
        }
        await roles.wait_until_finished(*job_ids.values())
        for value, job_id in job_ids.items():
            job = await roles.load_job(job_id)
            assert (job["status"], job["error"]) == ("completed", None), value
            steps = [
                event.event
                for event in await roles.event_store.read_stream(job_id)
                if isinstance(event.event, StepCompleted)
            ]
            step_warnings = [(step.warnings, total) for step, total in zip(steps, (500, 501), strict=True)]
            for warnings, total in [*step_warnings, (job["results"]["metadata"]["warnings"], 502)]:
                assert warnings[:-1] == [to_text(misbehaving.WARNINGS[value], 2000)] * (len(warnings) - 1)
                assert warnings[-1] == f"{total - len(warnings) + 1} more warnings were dropped."


@pytest.mark.parametrize("job_type", TYPES)
async def test_results_with_files_of_other_jobs_or_wrong_sizes_fail(
    job_type: str, connection: Connection, store: Path
) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=OPTIONS) as roles:

        async def run_job(action: str, **parameters: Any) -> dict[str, Any]:
            return await roles.wait_until_finished(
                await roles.submit({"action": action, **parameters}, job_type=job_type, max_attempts=2)
            )

        foreign_file = (await run_job("forge size", code=-1))["results"]["files"][0]
        assert foreign_file["size"] == 10
        forged = [await run_job("forge digest", value=digest) for digest in ("", "no digest", foreign_file["sha256"])]
        step = await run_job("forge step", value="size")
        assert (step["status"], step["attempt"], step["error"]["code"]) == ("failed", 1, "INVALID_RESULT")
        assert "with the size 5. It has 4 bytes." in step["error"]["message"]
        for job in [*forged, await run_job("forge asset"), await run_job("forge step", value="digest")]:
            assert (job["status"], job["attempt"], job["error"]["code"]) == ("failed", 1, "INVALID_RESULT")
            assert f"the file 'misbehaving/{job['job_id']}.md', which this job has not saved" in job["error"]["message"]
        for value in ("", "retry", "share", "share"):
            job = await run_job("save in step", value=value)
            assert (job["status"], job["error"]) == ("completed", None), value
            assert job["results"]["files"][0]["size"] == len(b"of a step")

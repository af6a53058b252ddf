"""`run` runs one attempt of a job in the process of the test."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from jobledger.testing import Outcome, Progress, Runner, arun, run, with_options
from jobledger.testing.outcome import JobNotCompleted
from jobledger.workers.processors.echo import EchoProcessor
from tests.testing import shop


@pytest.fixture(autouse=True)
def clear_calls() -> Iterator[None]:
    shop.calls.clear()
    yield
    shop.calls.clear()


def get_messages(outcome: Outcome[Any]) -> list[str]:
    return [entry.message for entry in outcome.logs]


def test_completed_job_has_typed_result_file_and_step() -> None:
    outcome = run(shop.receipt, "ada", amount=Decimal("2.50"))
    assert outcome.result == shop.Receipt(customer="ADA", amount=Decimal("2.50"))
    assert (outcome.status, outcome.error, outcome.will_retry) == ("completed", None, False)
    assert [(step.step, step.output) for step in outcome.steps] == [("book", "ADA")]
    assert {path: file.text for path, file in outcome.files.items()} == {"receipts/a.md": "ADA 2.50 EUR"}
    assert outcome.files["receipts/a.md"].media_type == "text/markdown"


@pytest.mark.parametrize("settings", [{"currency": "CHF"}, shop.ShopSettings(currency="CHF")])
def test_settings_are_those_of_the_context(settings: Any) -> None:
    outcome = with_options(settings=settings).run(shop.receipt, "ada")
    assert outcome.files["receipts/a.md"].text.endswith("CHF")


def test_retried_job_reuses_its_step_and_completes() -> None:
    first = run(shop.receipt, "ada", failures=1)
    assert first.will_retry
    assert first.retry_in is not None
    assert timedelta(minutes=4) < first.retry_in < timedelta(minutes=6)
    assert first.error is not None
    assert (first.error.code, first.files) == ("PROCESSOR_FAULT", {})
    second = with_options(after=first).run(shop.receipt, "ada", failures=1)
    assert (second.attempt, second.job_id, second.result.customer) == (2, first.job_id, "ADA")
    assert (second.steps, shop.calls) == ([], ["ada"])


def test_last_attempt_fails_the_job_and_a_restart_reuses_steps() -> None:
    second = with_options(attempt=2).run(shop.receipt, "ada", failures=2)
    assert (second.status, second.attempt, second.retry_in) == ("failed", 2, None)
    restarted = with_options(after=second).run(shop.receipt, "ada", failures=2)
    assert (restarted.status, restarted.attempt, shop.calls) == ("completed", 3, ["ada"])


def test_file_of_a_reused_step_is_in_the_results() -> None:
    second = with_options(after=run(shop.saving_step)).run(shop.saving_step)
    assert (second.steps, second.files["page.html"].text) == ([], "<p>")


def test_job_without_retry_fails_at_once() -> None:
    assert run(shop.never_again).status == "failed"


def test_result_of_failed_job_shows_error_and_traceback() -> None:
    with pytest.raises(JobNotCompleted, match=r"(?s)failed after attempt 1.*PROCESSOR_FAULT.*in never_again"):
        _ = run(shop.never_again).result


def test_traceback_begins_with_the_code_of_the_job() -> None:
    error = run(shop.never_again).error
    assert error is not None
    text = error.details["traceback"]
    assert text.count("File ") == 1, text
    assert "During handling" not in text


def test_log_has_output_records_warnings_and_text_of_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run(shop.noisy)
    messages = get_messages(outcome)
    assert messages[:2] == ["printed", "logged"]
    assert "UserWarning: warned" in messages[2]
    assert messages[3:] == ["from a thread", "by ctx", "The result is incomplete.", "no line end"]
    assert [entry.logger for entry in outcome.logs[1:4]] == ["shop", "py.warnings", "thread"]
    assert outcome.warnings == ["The result is incomplete."]
    assert outcome.progress == [Progress(10.0, "begun", "starting"), Progress(10.0, "behind", "starting")]
    assert capsys.readouterr().out == "printed\nno line end"


def test_process_state_is_restored_after_a_run(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    before = (sys.stdout, sys.stderr, logging.root.level, logging.root.handlers[:])
    run(shop.noisy)
    assert (sys.stdout, sys.stderr, logging.root.level, logging.root.handlers[:]) == before
    with pytest.warns(UserWarning, match="by the test"):
        warnings.warn("by the test", stacklevel=1)


@pytest.mark.parametrize("stops", [True, False])
def test_cancelled_job_sees_it_and_its_result_does_not_count(stops: bool) -> None:
    outcome = with_options(cancel_after=0.05).run(shop.waiting, stops=stops)
    assert (outcome.status, outcome.results) == ("cancelled", None)


def test_result_of_a_job_that_exceeds_its_timeout_does_not_count() -> None:
    error = run(shop.overdue).error
    assert error is not None
    assert error.code == "TIMEOUT"


def test_cancelled_inline_job_is_interrupted_and_its_output_not_captured() -> None:
    outcome = with_options(cancel_after=0).run(shop.inline)
    assert (outcome.status, outcome.logs) == ("cancelled", [])


@pytest.mark.parametrize("job", [shop.inline, shop.stubborn])
def test_timeout_of_the_job_type_applies(job: Any) -> None:
    outcome = run(job)
    assert outcome.error is not None
    assert (outcome.error.code, outcome.will_retry) == ("TIMEOUT", True)


@pytest.mark.parametrize("job", [shop.invalid, shop.foreign_file, shop.large])
def test_invalid_results_fail_as_in_a_worker(job: Any) -> None:
    outcome = run(job)
    assert outcome.error is not None
    assert (outcome.status, outcome.error.code) == ("failed", "INVALID_RESULT")


def test_scratch_directory_is_removed(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"12345")
    outcome = run(shop.scratch, path=tmp_path / "in")
    assert (outcome.result, outcome.files["data.bin"].content) == (5, b"12345")


def test_processor_class_runs_with_its_parameters() -> None:
    outcome = run(EchoProcessor, text="hello")
    assert outcome.status == "completed"
    with pytest.raises(ValidationError):
        run(EchoProcessor, seconds="never")


def test_invalid_arguments_and_options_are_rejected() -> None:
    with pytest.raises(ValidationError):
        run(shop.receipt, "ada", amount="much")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="customer"):
        run(shop.receipt)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"use @jobledger\.job"):
        run(shop.book)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="at least 1"):
        with_options(attempt=0)
    with pytest.raises(ValueError, match="either attempt or after"):
        with_options(attempt=2, after=run(shop.noisy))
    with pytest.raises(ValueError, match="'noisy', not 'receipt'"):
        with_options(after=run(shop.noisy)).run(shop.receipt, "ada")


async def test_asynchronous_test_uses_arun() -> None:
    assert (await arun(shop.receipt, "ada")).result.customer == "ADA"
    assert (await with_options(attempt=2).arun(shop.receipt, "ada")).attempt == 2
    with pytest.raises(RuntimeError, match="await arun"):
        Runner().run(shop.receipt, "ada")

"""The fixture `ledger`: a real ledger for a test."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from pymongo import MongoClient

from jobledger import NewJob
from jobledger.testing import Ledger, assert_submitted
from jobledger.testing.ledger import LedgerError
from tests.testing.shop import noisy, receipt

pytestmark = pytest.mark.jobledger(app="tests.testing.shop", settings={"processors": {"receipt": {"currency": "CHF"}}})
databases: list[str] = []
"""The databases of earlier tests."""


def test_job_runs_with_the_settings_of_the_marker(ledger: Ledger) -> None:
    databases.append(ledger.db_name)
    job = ledger.client.submit(receipt, "ada")
    ledger.run_until_idle()
    assert job.result().customer == "ADA"
    file = job.get().results.files[0]  # type: ignore[union-attr]
    assert ledger.client.read_bytes(file).decode() == "ADA 1 CHF"


def test_next_ledger_is_empty_and_the_database_before_is_dropped(ledger: Ledger) -> None:
    assert list(ledger.client.iter_jobs()) == []
    assert ledger.db_name not in databases
    with MongoClient[dict[str, object]](ledger.mongodb_uri) as client:
        assert not set(client.list_database_names()) & set(databases)


def test_retry_and_delayed_job_run_after_advance_in_the_order_of_their_times(ledger: Ledger) -> None:
    failing = ledger.client.submit(receipt, "ada", failures=1)
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    later = ledger.client.with_options(not_before=tomorrow).submit(noisy)
    ledger.run_until_idle()
    assert (failing.get().status, later.get().status) == ("pending", "pending")
    ledger.advance("2h")
    ledger.run_until_idle()
    assert (failing.get().status, later.get().status) == ("completed", "pending")
    ledger.advance(timedelta(hours=23))
    ledger.run_until_idle()
    finished = later.get()
    assert finished.status == "completed"
    assert finished.completed_at is not None
    assert finished.completed_at >= tomorrow
    after = ledger.client.submit(receipt, "grace")  # leases, by the clock of the server, still hold
    ledger.run_until_idle()
    assert after.get().status == "completed"


@pytest.mark.jobledger(app="tests.testing.missing")
def test_missing_application_is_named_and_ends_no_other_ledger(
    request: pytest.FixtureRequest,
) -> None:
    message = r"jobs\.app \(--app\): tests\.testing\.missing cannot be imported"
    with pytest.raises(pytest.fail.Exception, match=message) as failure:
        request.getfixturevalue("ledger")
    assert not failure.value.pytrace


@pytest.mark.jobledger(app="tests.testing.shop")
def test_ledger_whose_process_was_killed_is_replaced_in_the_next_test(ledger: Ledger) -> None:
    ledger._process.kill()
    with pytest.raises(LedgerError, match=r"the process of the ledger has ended|did not respond"):
        ledger.run_until_idle()


def test_batch_is_finished_when_the_ledger_is_idle(ledger: Ledger) -> None:
    batch = ledger.client.submit_many([NewJob.from_function(noisy)] * 3)
    ledger.run_until_idle()
    assert batch.get().status == "completed"


@pytest.mark.jobledger(app="tests.testing.shop", worker=False)
def test_jobs_are_submitted_and_stay_without_worker(ledger: Ledger) -> None:
    ledger.client.submit(receipt, "ada")
    for source in (ledger, ledger.client):
        assert_submitted(source, receipt, parameters={"customer": "ada"}, count=1)
        with pytest.raises(AssertionError, match=r"- receipt\(customer='ada'\)"):
            assert_submitted(source, noisy)
    with pytest.raises(TimeoutError, match=r"(?s)not idle after 0.5 seconds.*\(receipt\) is pending and due"):
        ledger.run_until_idle(timeout=0.5)


def test_invalid_request_names_the_problem(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="duration"):
        ledger.advance("yesterday")
    with pytest.raises(LedgerError, match="unknown request"):
        ledger._process.request("rewind")

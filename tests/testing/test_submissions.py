"""`assert_submitted`, and the client that records submissions."""

from __future__ import annotations

from decimal import Decimal

import pytest
from pydantic import ValidationError

from jobledger import ClientError, NewJob
from jobledger.testing import AsyncRecordingClient, RecordingClient, assert_submitted
from tests.testing.shop import book, noisy, receipt


def test_recorded_jobs_are_found_by_function_and_parameters() -> None:
    client = RecordingClient()
    first = client.submit(receipt, "ada", amount=Decimal("1.5"))
    client.submit("receipt", {"customer": "grace"}, key="k")
    client.submit_many([NewJob.from_function(noisy)], name="batch")
    assert [it.job_id for it in assert_submitted(client, receipt, parameters={"customer": "ada"})] == [first.job_id]
    assert_submitted(client, receipt, parameters={"amount": Decimal("1.5")}, count=1)
    assert_submitted(client, "receipt", count=2)
    assert_submitted(client, noisy, count=1)
    assert client.list_submitted()[1].options == {"key": "k"}
    assert client.list_submitted()[2].options["batch_name"] == "batch"


def test_repeated_key_records_one_job() -> None:
    client = RecordingClient()
    handles = [client.with_options(key="k", priority=5).submit(receipt, "ada") for _ in range(2)]
    assert handles[0].job_id == handles[1].job_id
    [submitted] = assert_submitted(client, receipt, count=1)
    assert submitted.options == {"key": "k", "priority": 5}


def test_defaults_of_a_batch_are_parameters_of_its_jobs() -> None:
    client = RecordingClient()
    batch = client.submit_many([NewJob("receipt", {"customer": "ada"})], parameters={"amount": "2", "customer": "x"})
    [submitted] = assert_submitted(client, "receipt", parameters={"customer": "ada", "amount": Decimal(2)}, count=1)
    assert list(batch.job_ids) == [submitted.job_id]


async def test_asynchronous_client_records_jobs() -> None:
    async with AsyncRecordingClient() as client:
        handle = await client.submit(receipt, "ada")
        await client.submit_many([NewJob.from_function(noisy)])
        [submitted] = assert_submitted(client, receipt, parameters={"customer": "ada"}, count=1)
        assert submitted.job_id == handle.job_id
        assert_submitted(client, noisy, count=1)
        with pytest.raises(ClientError, match="only records submissions"):
            await handle.get()


def test_result_of_a_recorded_job_is_an_error_with_the_fix() -> None:
    with pytest.raises(ClientError, match="only records submissions: use the fixture `ledger`"):
        RecordingClient().submit(receipt, "ada").result()


def test_recording_client_checks_arguments() -> None:
    client = RecordingClient()
    with pytest.raises(ValidationError):
        client.submit(receipt, "ada", amount="much")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="keyy"):
        client.submit("receipt", {"customer": "ada"}, keyy="k")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="expected a job function or the name of a job type"):
        assert_submitted(client, book)  # type: ignore[arg-type]
    assert client.list_submitted() == []


def test_failure_lists_what_was_submitted() -> None:
    client = RecordingClient()
    with pytest.raises(AssertionError, match="No jobs were submitted"):
        assert_submitted(client, receipt)
    client.submit(receipt, "ada")
    with pytest.raises(AssertionError) as failure:
        assert_submitted(client, receipt, parameters={"customer": "grace"}, count=2)
    assert str(failure.value) == (
        "expected 2 submitted jobs of the type 'receipt' with the parameters {'customer': 'grace'}, found 0\n"
        "Submitted:\n- receipt(customer='ada')"
    )
    with pytest.raises(AssertionError, match="expected 0"):
        assert_submitted(client, receipt, count=0)

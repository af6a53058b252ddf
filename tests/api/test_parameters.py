"""ParameterValidator: a slow plug-in does not block other job types, and validation of a batch has a time limit."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import BaseModel, field_validator

from jobledger.api.http.errors import ApiError
from jobledger.api.processes import parameter_validator
from jobledger.api.processes.parameter_validator import ParameterCheck, ParameterValidator
from tests.support.polling import DEADLINE_SECONDS


class SlowParameters(BaseModel):
    """Parameters whose validation never ends."""

    text: str

    @field_validator("text")
    @classmethod
    def _match(cls, text: str) -> str:
        re.match(r"(a+)+$", "a" * 60 + "b")
        return text


class QuickParameters(BaseModel):
    """Parameters whose validation is fast."""

    text: str


def make_check(job_type: str, model: type[BaseModel], content: dict[str, Any]) -> ParameterCheck:
    return ParameterCheck(job_type, model, content, ("parameters",))


SLOW, QUICK = make_check("slow", SlowParameters, {"text": ""}), make_check("quick", QuickParameters, {"text": ""})


@pytest.fixture
async def validator() -> AsyncIterator[ParameterValidator]:
    validator = ParameterValidator(timeout_seconds=60)
    yield validator
    await validator.close()


async def test_slow_validator_does_not_block_other_job_types(validator: ParameterValidator) -> None:
    slow_checks = [asyncio.create_task(validator.check([SLOW])) for _ in range(4)]
    await asyncio.sleep(0.1)
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            await validator.check([QUICK])
        assert not any(task.done() for task in slow_checks)
        with pytest.raises(ApiError, match="text"):
            await validator.check([QUICK, make_check("quick", QuickParameters, {})])
    finally:
        for task in slow_checks:
            task.cancel()
        await asyncio.gather(*slow_checks, return_exceptions=True)


async def test_batch_validation_stops_at_time_limit(
    validator: ParameterValidator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parameter_validator, "_MAX_TIMEOUT_SECONDS", 0.1)
    with pytest.raises(ApiError, match="job type slow took longer") as raised:
        await validator.check([SLOW] * 10_000)
    assert raised.value.status == 503

"""Validators of plug-ins: a slow one holds up no other job type, and a batch has a limit of time."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import BaseModel, field_validator

from jobledger.api.http.errors import ApiError
from jobledger.api.submission import parameters
from jobledger.api.submission.parameters import ParameterCheck, ParameterValidator


class Slow(BaseModel):
    """Takes for ever."""

    text: str

    @field_validator("text")
    @classmethod
    def _match(cls, text: str) -> str:
        re.match(r"(a+)+$", "a" * 60 + "b")
        return text


class Quick(BaseModel):
    """Takes no time."""

    text: str


def check(job_type: str, model: type[BaseModel], content: dict[str, Any]) -> ParameterCheck:
    return ParameterCheck(job_type, model, content, ("parameters",))


SLOW, QUICK = check("slow", Slow, {"text": ""}), check("quick", Quick, {"text": ""})


@pytest.fixture
async def validator() -> AsyncIterator[ParameterValidator]:
    made = ParameterValidator(timeout_seconds=60)
    yield made
    await made.close()


async def test_slow_validators_hold_up_no_other_job_type(validator: ParameterValidator) -> None:
    slow = [asyncio.create_task(validator.check([SLOW])) for _ in range(4)]
    await asyncio.sleep(0.1)
    try:
        async with asyncio.timeout(30):
            await validator.check([QUICK])
        assert not any(it.done() for it in slow)
        with pytest.raises(ApiError, match="text"):
            await validator.check([QUICK, check("quick", Quick, {})])
    finally:
        for it in slow:
            it.cancel()
        await asyncio.gather(*slow, return_exceptions=True)


async def test_no_batch_is_validated_for_longer_than_the_limit(
    validator: ParameterValidator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parameters, "_MAX_TIMEOUT_SECONDS", 0.1)
    with pytest.raises(ApiError, match="job type slow took longer") as raised:
        await validator.check([SLOW] * 10_000)
    assert raised.value.status == 503

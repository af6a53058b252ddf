"""Tests of messages from job processes: their size is checked before decoding, which blocks the event loop."""

from __future__ import annotations

import string
import time
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobledger.ledger.domain.events import JobProgressed, StepCompleted
from jobledger.workers.child import main, messages
from jobledger.workers.child.failures import convert_exception_to_failure
from jobledger.workers.child.messages import (
    FRAME_HEADER,
    MAX_FRAME_BYTES,
    MAX_FRAME_VALUES,
    InvalidMessage,
    LogEntries,
    Message,
    MessageEnvelope,
    StepResult,
    decode_message,
    encode_frame,
)
from jobledger.workers.processor import ProcessorError
from jobledger.workers.results.conversion import MAX_TEXT_LENGTH, MAX_VALUE_BYTES, to_json, to_text


@pytest.mark.parametrize("value", [b"[]", b"{}", b"0", b'""', b'[0,{"a":[]}]'])
def test_decode_message_with_too_many_values_is_rejected_fast(value: bytes) -> None:
    output = b"[" + b",".join([value] * (MAX_FRAME_BYTES // (len(value) + 1))) + b"]"
    step = (
        b'{"request_id":1,"message":{"kind":"step_completed","completed":{"attempt":1,"step":"s","key":"k",'
        b'"duration_s":1,"output":'
    )
    started_at = time.process_time()
    with pytest.raises(InvalidMessage, match=f"{MAX_FRAME_VALUES:,} values"):
        decode_message(step + output + b"}}}")
    assert time.process_time() - started_at < 1


def test_decode_message_with_large_text_is_accepted() -> None:
    message = {"kind": "log", "entries": [[0.0, "info", "a text " * 100_000, ""]]}
    assert decode_message(orjson.dumps({"request_id": 0, "message": message})).request_id == 0


def test_frame_with_value_without_json_is_rejected() -> None:
    pairs = {("key", "value")}
    with pytest.raises(TypeError):
        encode_frame({"value": pairs})
    with pytest.raises(TypeError):
        encode_frame({"value": JobProgressed(attempt=1, step="a", percent=1.0, message="b")})


def send_and_decode(message: Message) -> Message:
    """Return the message that the worker decodes when a job process sends `message`."""
    return decode_message(encode_frame(MessageEnvelope(1, message))[FRAME_HEADER.size :]).message


# All characters with a meaning in JSON, alone and combined, and parts that a wrong count would leave.
TEXTS = [*string.punctuation, "1,", '",', "\\,", '\\",[{', "[{", "\n,", "\x01", "\U0001f600,"]


@pytest.mark.parametrize("text", TEXTS)
def test_largest_texts_of_inline_jobs_are_accepted_from_job_processes(text: str) -> None:
    escaped = len(orjson.dumps(text)) - 2
    output: Any = to_json(text * ((MAX_VALUE_BYTES - 100) // max(escaped, len(text.encode()))), "output")
    step = StepResult(StepCompleted(attempt=1, step="s", key="k", output=output, duration_s=1.0))
    assert send_and_decode(step) == step
    line = to_text(text * MAX_TEXT_LENGTH)
    log = LogEntries([(0.0, "info", line, "")] * main._MAX_ENTRIES_PER_MESSAGE)
    assert send_and_decode(log) == log


def test_largest_values_of_inline_jobs_are_accepted_from_job_processes() -> None:
    output = to_json([1] * (MAX_VALUE_BYTES // 6 - 10), "output")
    step = StepResult(StepCompleted(attempt=1, step="s", key="k", output=output, duration_s=1.0))
    assert send_and_decode(step) == step


def test_largest_error_details_are_accepted_from_job_processes() -> None:
    details = {f"{number}": [0] * 33_000 for number in range(100)}
    failed = convert_exception_to_failure(ProcessorError("ODD", "an odd error", details=details))
    assert failed.details["0"] == details["0"]
    assert "too large" in str(failed.details["99"])
    assert send_and_decode(failed) == failed


VALUES = st.recursive(
    st.none() | st.integers(0, 9) | st.text(alphabet='\\",[{}]:n/', max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(alphabet='\\",[{', max_size=4), inner, max_size=4)
    ),
    max_leaves=30,
)


@given(VALUES)
def test_value_count_ignores_strings(value: Any) -> None:
    def count(value: Any) -> int:
        if not isinstance(value, list | dict):
            return 0
        return max(1, len(value)) + sum(map(count, value.values() if isinstance(value, dict) else value))

    with pytest.MonkeyPatch.context() as patch:
        for limit in (count(value) - 1, count(value)):
            patch.setattr(messages, "MAX_FRAME_VALUES", limit)
            if limit >= 0:
                assert messages._has_too_many_values(orjson.dumps(value)) == (limit < count(value))

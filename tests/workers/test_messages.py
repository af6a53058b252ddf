"""Messages of a job process are bounded before they are read: reading blocks all jobs of the worker."""

from __future__ import annotations

import time

import orjson
import pytest

from workers.messages import MAX_FRAME_BYTES, MAX_FRAME_VALUES, InvalidMessage, decode_from_job


@pytest.mark.parametrize("value", [b"[]", b"{}", b"0", b'""', b'[0,{"a":[]}]'])
def test_decode_frame_with_too_many_values_is_refused_at_once(value: bytes) -> None:
    output = b"[" + b",".join([value] * (MAX_FRAME_BYTES // (len(value) + 1))) + b"]"
    step = (
        b'{"id":1,"message":{"kind":"step","step":"s","key":"k","duration_s":1,"tokens_used":0,"warnings":[],"output":'
    )
    begin = time.process_time()
    with pytest.raises(InvalidMessage, match=f"{MAX_FRAME_VALUES:,} values"):
        decode_from_job(step + output + b"}}")
    assert time.process_time() - begin < 1


def test_decode_frame_with_large_text_is_accepted() -> None:
    message = {"kind": "log", "lines": [[0.0, "info", "a text " * 100_000]]}
    assert decode_from_job(orjson.dumps({"id": 0, "message": message})).id == 0

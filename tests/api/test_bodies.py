"""Test that the cost of any request body is bounded and that it does not block other requests, in a real process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import from_json
from pymongo import MongoClient

from jobledger.api.http.bodies import MAX_CONTAINERS, MAX_VALUES, _check_duplicate_names, estimate_value_count
from jobledger.api.http.errors import ApiError
from jobledger.api.http.memory_budget import MemoryBudget, MemoryReservation
from jobledger.api.http.validation import validate_content
from jobledger.workers.processors.session.parameters import SessionParameters
from tests.api.conftest import NO_TRUSTED_CERTIFICATES
from tests.support.installation import Installation, RunningCommand
from tests.support.soak_only import soak_only

JOBS, BATCHES, REDELIVER = "/api/events/jobs", "/api/events/batches", "/api/monitoring/events/redeliver"
VALIDATE = "/monitoring/events/validate"
MAX_CPU_SECONDS = 3.0
MAX_MEMORY_MB = 400
MAX_LATENCY_SECONDS = 3.0
PLUGIN = """
import os, re, sys
from pydantic import BaseModel, field_validator

class Unprintable(Exception):
    def __str__(self):
        raise SystemExit

def use_memory():
    return bytearray(1 << 32)

ACTIONS = {
    "fine": lambda: None,
    "print": lambda: print("noise"),
    "read": lambda: sys.stdin.read(),
    "environment": lambda: (_ for _ in ()).throw(ValueError("secret" if "JOBLEDGER_SECRET" in os.environ else "none")),
    "runtime": lambda: (_ for _ in ()).throw(RuntimeError("broken plug-in")),
    "exit": lambda: sys.exit(3),
    "unprintable": lambda: (_ for _ in ()).throw(Unprintable()),
    "recursion": lambda: ACTIONS["recursion"](),
    "die": lambda: os._exit(7),
    "memory": use_memory,
    "regex": lambda: re.match(r"(a+)+$", "a" * 60 + "b"),
}

class Misbehaving:
    job_type, isolation, preload = "misbehaving", "process", ()
    class Parameters(BaseModel):
        do: str
        @field_validator("do")
        @classmethod
        def _do(cls, value):
            ACTIONS[value]()
            return value
    class Settings(BaseModel):
        pass
    def __init__(self, settings): pass
    async def run(self, job): ...
"""


def make_session(**fields: Any) -> dict[str, Any]:
    required = {"event": "E", "session": "S", "url": "https://example.org/x", "filename": "a.md", "track": "T"}
    return {"parameters": {**required, **fields}}


def encode_echo_job(parameters: str, other_fields: str = "") -> bytes:
    return f'{{"job_type":"echo","parameters":{parameters}{other_fields}}}'.encode()


def make_fields(number: int, name: str = "unknown") -> dict[str, int]:
    return {f"{name}{index}": 1 for index in range(number)}


LONG_NAMES = [f"{index:03}" + "x" * 197 for index in range(200)]
BODIES: dict[str, tuple[str, int, Callable[[], Any]]] = {
    "500,000 invalid speakers": (JOBS, 422, lambda: make_session(speakers=[1] * 500_000)),
    "500,000 blank speakers": (JOBS, 422, lambda: make_session(speakers=[" "] * 500_000)),
    "invalid speakers after valid ones": (JOBS, 422, lambda: make_session(speakers=["Ada"] * 100 + [" "] * 400_000)),
    "16,000,000 invalid speakers": (JOBS, 413, lambda: b'{"parameters":{"speakers":[' + b"1," * 16_000_000 + b"1]}}"),
    "100,000 unknown parameters": (JOBS, 422, lambda: make_session(**make_fields(100_000))),
    "100,000 unknown fields": (JOBS, 422, lambda: {"parameters": {}, **make_fields(100_000)}),
    "10,000,000 empty lists": (JOBS, 413, lambda: encode_echo_job("[" + "[]," * 10_000_000 + "1]")),
    "3,000,000 objects": (JOBS, 413, lambda: encode_echo_job("[" + '{"a":1},' * 3_000_000 + "1]")),
    "1,000,000 levels": (JOBS, 413, lambda: encode_echo_job("[" * 1_000_000 + "]" * 1_000_000)),
    "300 levels": (JOBS, 400, lambda: encode_echo_job("[" * 300 + "]" * 300)),
    "text of 30 MB": (JOBS, 422, lambda: encode_echo_job(json.dumps({"a": "x" * 30_000_000}))),
    "job name of 30 MB": (JOBS, 422, lambda: encode_echo_job("{}", ',"job_name":"' + "x" * 30_000_000 + '"')),
    "field name of 30 MB": (JOBS, 422, lambda: encode_echo_job("{}", ',"' + "x" * 30_000_000 + '":1')),
    "integer of 30,000,000 digits": (JOBS, 400, lambda: encode_echo_job('{"a":' + "9" * 30_000_000 + "}")),
    "integers of 4,000 digits": (JOBS, 422, lambda: encode_echo_job('{"a":[' + ("9" * 4000 + ",") * 6000 + "1]}")),
    "the same name 2,000,000 times": (JOBS, 413, lambda: encode_echo_job("{" + '"a":1,' * 2_000_000 + '"a":1}')),
    "500,000 invalid readers": (
        JOBS,
        422,
        lambda: {"parameters": {}, "access_control": {"read_access": [1] * 500_000}},
    ),
    "200,000 invalid headers": (
        JOBS,
        422,
        lambda: {"parameters": {}, "webhook": {"url": "https://e.org/", "headers": make_fields(200_000, "x y")}},
    ),
    "500,000 secrets": (
        JOBS,
        422,
        lambda: {"parameters": {}, "webhook": {"url": "https://e.org/", "secrets": ["x"] * 500_000}},
    ),
    "10,000 invalid jobs": (BATCHES, 422, lambda: {"jobs": [{**make_session(), "nope": 1}] * 10_000}),
    "200 long names in read_access of 10,000 jobs": (
        BATCHES,
        413,
        lambda: {
            "jobs": [{"job_type": "echo", "parameters": {}}] * 10_000,
            "access_control": {"read_access": LONG_NAMES},
        },
    ),
    "batch parameters of 100,000 values for 83 jobs": (
        BATCHES,
        413,
        lambda: {
            "jobs": [{"job_type": "echo", "parameters": {}}] * 83,
            "parameters": {"a": [1.0] * 100_000},
        },
    ),
    "validation of batch parameters for 10,000 jobs": (
        VALIDATE,
        413,
        lambda: {
            "jobs": [{"job_type": "echo", "parameters": {}}] * 10_000,
            "parameters": {"a": [[]] * 100_000},
        },
    ),
    "700,000 integral floats": (JOBS, 422, lambda: encode_echo_job(json.dumps({"a": [[1.0] * 3] * 240_000}))),
    "500,000 jobs": (BATCHES, 422, lambda: {"jobs": [1] * 500_000}),
    "batch whose last job has many errors": (
        BATCHES,
        422,
        lambda: {"jobs": [make_session()] * 9_999 + [make_session(speakers=[1] * 100_000)]},
    ),
    "cancel with 100,000 fields": (f"{JOBS}/job-0/cancel", 422, lambda: make_fields(100_000)),
    "redelivery with 100,000 fields": (REDELIVER, 422, lambda: make_fields(100_000)),
}


@pytest.fixture(scope="module")
def role(mongodb_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCommand]:
    """An API process with a plug-in whose validator performs the action in the parameters."""
    name, plugins = f"test_{uuid4().hex[:16]}", tmp_path_factory.mktemp("plugins")
    entry_points = "[jobledger.processors]\nmisbehaving = misbehaving_plugin:Misbehaving\n"
    dist_info = plugins / "misbehaving_plugin-1.dist-info"
    (plugins / "misbehaving_plugin.py").write_text(PLUGIN)
    dist_info.mkdir()
    (dist_info / "METADATA").write_text("Metadata-Version: 2.1\nName: misbehaving-plugin\nVersion: 1\n")
    (dist_info / "entry_points.txt").write_text(entry_points)
    with Installation(
        tmp_path_factory.mktemp("bodies"), mongodb={"uri": mongodb_uri, "db_name": name}, logging={"level": "error"}
    ) as installation:
        yield installation.start("api", PYTHONPATH=str(plugins), JOBLEDGER_SECRET="").wait_until_ready()
    with MongoClient[dict[str, Any]](mongodb_uri) as client:
        client.drop_database(name)


@pytest.fixture
def client(role: RunningCommand) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=role.url, timeout=60, trust_env=False, verify=NO_TRUSTED_CERTIFICATES) as client:
        yield client


def measure_memory_mb(role: RunningCommand) -> int:
    """Return the resident memory of the API process."""
    lines = Path(f"/proc/{role.process.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) // 1024


def measure_cpu_seconds(role: RunningCommand) -> float:
    """Return the CPU time of the API process since its start."""
    fields = Path(f"/proc/{role.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


@contextmanager
def measure_latencies(role: RunningCommand) -> Iterator[list[float]]:
    """Request /healthz repeatedly inside the block. Yield the list of latencies in seconds."""
    seconds, stop = [0.0], False

    def request_repeatedly() -> None:
        with httpx.Client(base_url=role.url, timeout=60, trust_env=False, verify=NO_TRUSTED_CERTIFICATES) as client:
            while not stop:
                start = time.perf_counter()
                assert client.get("/healthz").status_code == 200
                seconds.append(time.perf_counter() - start)
                time.sleep(0.02)

    with ThreadPoolExecutor(1) as pool:
        requests = pool.submit(request_repeatedly)
        try:
            yield seconds
        finally:
            stop = True
            requests.result()


SOAK_ONLY = {
    "integers of 4,000 digits",
    "16,000,000 invalid speakers",
    "3,000,000 objects",
    "text of 30 MB",
    "job name of 30 MB",
    "integer of 30,000,000 digits",
    "the same name 2,000,000 times",
    "200,000 invalid headers",
    "batch whose last job has many errors",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=soak_only) if name in SOAK_ONLY else name for name in BODIES]
)
def test_body_costs_bounded_time_and_memory(role: RunningCommand, client: httpx.Client, name: str) -> None:
    path, status, make_content = BODIES[name]
    content = make_content()
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    memory_before, cpu_before = measure_memory_mb(role), measure_cpu_seconds(role)

    with measure_latencies(role) as latencies:
        response = client.post(path, content=body, headers={"Content-Type": "application/json"})

    assert response.status_code == status, response.text[:300]
    assert len(response.content) < 40_000
    assert len(response.json()["details"].get("errors", ())) <= 100
    assert measure_cpu_seconds(role) - cpu_before < MAX_CPU_SECONDS
    assert measure_memory_mb(role) - memory_before < MAX_MEMORY_MB
    assert max(latencies) < MAX_LATENCY_SECONDS


def test_batch_of_ten_thousand_sessions_does_not_block_other_requests(
    role: RunningCommand, client: httpx.Client
) -> None:
    fields = {"speakers": ["Ada Lovelace", "Grace Hopper"], "day": "Sunday", "extra": {"room": "H.1302, first floor"}}
    jobs = [make_session(**fields, starttime="09:30", endtime="10:00") for _ in range(10_000)]
    with measure_latencies(role) as latencies:
        response = client.post(BATCHES, json={"jobs": jobs})
    assert response.status_code == 202, response.text[:300]
    assert max(latencies) < MAX_LATENCY_SECONDS


# Validators of plug-ins ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "status", "message"),
    [
        ("fine", 202, ""),
        ("print", 202, ""),
        ("read", 202, ""),
        ("environment", 422, "none"),
        ("runtime", 422, "raised RuntimeError: broken plug-in"),
        ("exit", 422, "raised SystemExit: 3"),
        ("unprintable", 422, "raised Unprintable"),
        ("recursion", 422, "raised RecursionError"),
        ("memory", 422, "raised MemoryError"),
        ("die", 422, "ended its process (exit code 7)"),
    ],
)
def test_plugin_validator_affects_only_its_request(
    client: httpx.Client, action: str, status: int, message: str
) -> None:
    response = client.post(JOBS, json={"job_type": "misbehaving", "parameters": {"do": action}})
    assert response.status_code == status, response.text
    assert message in response.text
    if status == 422:
        assert response.json()["details"]["errors"][0]["path"].startswith("parameters")
    assert client.post(JOBS, json={"job_type": "misbehaving", "parameters": {"do": "fine"}}).status_code == 202


def test_endless_plugin_validator_is_stopped_without_blocking_others(
    role: RunningCommand, client: httpx.Client
) -> None:
    endless = {"job_type": "misbehaving", "parameters": {"do": "regex"}}
    with measure_latencies(role) as latencies:
        response = client.post(BATCHES, json={"jobs": [endless, endless]})
    assert (response.status_code, response.json()["code"]) == (503, "validation_timeout")
    assert "misbehaving" in response.json()["message"]
    assert "Retry-After" in response.headers
    assert max(latencies) < MAX_LATENCY_SECONDS
    assert client.post(JOBS, json={"job_type": "misbehaving", "parameters": {"do": "fine"}}).status_code == 202


# Helpers of the route -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [r"a\\", r"\"[{,", "[,{" * 400_000, '\\\\"' * 300_000])
def test_estimate_value_count_ignores_content_of_strings(text: str) -> None:
    body = json.dumps({"a": [text, 1, {"b": []}], text: text}).encode()
    values, containers = estimate_value_count(bytearray(body))
    if values + containers > 20:  # the estimate is below the limits, so it is not refined
        assert body.count(b",") + body.count(b"[") + body.count(b"{") < MAX_VALUES
        assert body.count(b"[") + body.count(b"{") < MAX_CONTAINERS
    else:
        assert (values, containers) == (8, 4)


def test_estimate_value_count_above_limit_ignores_content_of_strings() -> None:
    body = bytearray(json.dumps({"prompt": "[,{" * 400}).encode())
    assert estimate_value_count(body)[0] > 1000
    assert estimate_value_count(body, 1000) == (2, 1)


_JSON_NAMES = st.sampled_from(["a", "b", "é", '"', "\\", '\\"', "\\u0022", "\n", ""])
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**22), 10**22) | _JSON_NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.lists(st.tuples(_JSON_NAMES, inner), max_size=3).map(tuple),
    max_leaves=8,
)
"""Objects are tuples of pairs, because a name may be repeated."""


def encode_json(value: object, escape_quotes: Iterator[bool]) -> str:
    """Return JSON text. Where the next item of `escape_quotes` is true, a quote in a string is an escape sequence."""
    if isinstance(value, str) and next(escape_quotes):
        return json.dumps(value).replace('\\"', "\\u0022") if not value.startswith("\\") else json.dumps(value)
    if isinstance(value, tuple):
        members = (f"{encode_json(name, escape_quotes)}:{encode_json(item, escape_quotes)}" for name, item in value)
        return f"{{{','.join(members)}}}"
    if isinstance(value, list):
        return f"[{','.join(encode_json(item, escape_quotes) for item in value)}]"
    return json.dumps(value)


def has_repeated_name(value: object) -> bool:
    if isinstance(value, tuple):
        return len({name for name, _ in value}) < len(value) or any(has_repeated_name(item) for _, item in value)
    return isinstance(value, list) and any(map(has_repeated_name, value))


@given(_JSON, st.booleans())
def test_check_duplicate_names_rejects_only_repeated_names(value: object, escape_quotes: bool) -> None:
    body = bytearray(encode_json(value, repeat(escape_quotes)).encode())
    with ExitStack() as stack:
        if has_repeated_name(value):
            stack.enter_context(pytest.raises(ApiError, match=r"An object has the name .+ [23] times"))
        _check_duplicate_names(body, from_json(body), MemoryReservation(MemoryBudget(10_000)))


def test_validate_content_reports_only_errors_of_the_whole_content() -> None:
    fields = {f"a{index}": 1 for index in range(150)} | make_session()["parameters"]
    with pytest.raises(ApiError) as rejection:
        validate_content(SessionParameters, fields)
    paths = {error["path"] for error in rejection.value.details["errors"]}
    assert len(paths) > 90
    assert paths <= {f"a{index}" for index in range(100)}  # the required fields after these are not called missing


def test_memory_reservation_is_limited_and_released() -> None:
    budget = MemoryBudget(100)
    with ExitStack() as stack:
        first, second = MemoryReservation(budget), MemoryReservation(budget)
        stack.callback(first.release)
        first.add(60)
        with pytest.raises(ApiError) as rejection:
            second.add(50)
        assert (rejection.value.status, rejection.value.retry_after_seconds) == (503, 2)
        second.add(40)
        second.release()
    assert budget.reserved == 0

"""No request body costs much more than it brings, and none holds up other requests. Measured on a real process."""

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
from tests.support.installation import Installation, RunningCommand
from tests.support.soak_only import soak_only

JOBS, BATCHES, REDELIVER = "/api/events/jobs", "/api/events/batches", "/api/monitoring/events/redeliver"
VALIDATE = "/monitoring/events/validate"
MOST_CPU_SECONDS = 3.0
MOST_MEMORY_MB = 400
LONGEST_STALL_SECONDS = 3.0
PLUGIN = """
import os, re, sys
from pydantic import BaseModel, field_validator

class Unprintable(Exception):
    def __str__(self):
        raise SystemExit

def hoard():
    return bytearray(1 << 32)

DEEDS = {
    "fine": lambda: None,
    "print": lambda: print("noise"),
    "read": lambda: sys.stdin.read(),
    "environment": lambda: (_ for _ in ()).throw(ValueError("secret" if "JOBLEDGER_SECRET" in os.environ else "none")),
    "runtime": lambda: (_ for _ in ()).throw(RuntimeError("broken plug-in")),
    "exit": lambda: sys.exit(3),
    "unprintable": lambda: (_ for _ in ()).throw(Unprintable()),
    "recursion": lambda: DEEDS["recursion"](),
    "die": lambda: os._exit(7),
    "memory": hoard,
    "regex": lambda: re.match(r"(a+)+$", "a" * 60 + "b"),
}

class Odd:
    job_type, isolation, preload = "odd", "process", ()
    class Parameters(BaseModel):
        do: str
        @field_validator("do")
        @classmethod
        def _do(cls, value):
            DEEDS[value]()
            return value
    class Settings(BaseModel):
        pass
    def __init__(self, settings): pass
    async def run(self, job): ...
"""


def session(**fields: Any) -> dict[str, Any]:
    known = {"event": "E", "session": "S", "url": "https://example.org/x", "filename": "a.md", "track": "T"}
    return {"parameters": {**known, **fields}}


def echo(parameters: str, more: str = "") -> bytes:
    return f'{{"job_type":"echo","parameters":{parameters}{more}}}'.encode()


def many(number: int, name: str = "unknown") -> dict[str, int]:
    return {f"{name}{index}": 1 for index in range(number)}


LONG_NAMES = [f"{index:03}" + "x" * 197 for index in range(200)]
BODIES: dict[str, tuple[str, int, Callable[[], Any]]] = {
    "500,000 wrong speakers": (JOBS, 422, lambda: session(speakers=[1] * 500_000)),
    "500,000 blank speakers": (JOBS, 422, lambda: session(speakers=[" "] * 500_000)),
    "wrong speakers behind good ones": (JOBS, 422, lambda: session(speakers=["Ada"] * 100 + [" "] * 400_000)),
    "16,000,000 wrong speakers": (JOBS, 413, lambda: b'{"parameters":{"speakers":[' + b"1," * 16_000_000 + b"1]}}"),
    "100,000 unknown parameters": (JOBS, 422, lambda: session(**many(100_000))),
    "100,000 unknown fields": (JOBS, 422, lambda: {"parameters": {}, **many(100_000)}),
    "10,000,000 empty lists": (JOBS, 413, lambda: echo("[" + "[]," * 10_000_000 + "1]")),
    "3,000,000 objects": (JOBS, 413, lambda: echo("[" + '{"a":1},' * 3_000_000 + "1]")),
    "a million levels": (JOBS, 413, lambda: echo("[" * 1_000_000 + "]" * 1_000_000)),
    "300 levels": (JOBS, 400, lambda: echo("[" * 300 + "]" * 300)),
    "a text of 30 MB": (JOBS, 422, lambda: echo(json.dumps({"a": "x" * 30_000_000}))),
    "a name of 30 MB": (JOBS, 422, lambda: echo("{}", ',"job_name":"' + "x" * 30_000_000 + '"')),
    "a field name of 30 MB": (JOBS, 422, lambda: echo("{}", ',"' + "x" * 30_000_000 + '":1')),
    "an integer of 30,000,000 digits": (JOBS, 400, lambda: echo('{"a":' + "9" * 30_000_000 + "}")),
    "integers of 4,000 digits": (JOBS, 422, lambda: echo('{"a":[' + ("9" * 4000 + ",") * 6000 + "1]}")),
    "2,000,000 times the same name": (JOBS, 413, lambda: echo("{" + '"a":1,' * 2_000_000 + '"a":1}')),
    "500,000 wrong readers": (JOBS, 422, lambda: {"parameters": {}, "access_control": {"read_access": [1] * 500_000}}),
    "200,000 wrong headers": (
        JOBS,
        422,
        lambda: {"parameters": {}, "webhook": {"url": "https://e.org/", "headers": many(200_000, "x y")}},
    ),
    "500,000 secrets": (
        JOBS,
        422,
        lambda: {"parameters": {}, "webhook": {"url": "https://e.org/", "secrets": ["x"] * 500_000}},
    ),
    "10,000 wrong jobs": (BATCHES, 422, lambda: {"jobs": [{**session(), "nope": 1}] * 10_000}),
    "200 long names that may read each of 10,000 jobs": (
        BATCHES,
        413,
        lambda: {
            "jobs": [{"job_type": "echo", "parameters": {}}] * 10_000,
            "access_control": {"read_access": LONG_NAMES},
        },
    ),
    "defaults of 100,000 values for each of 83 jobs": (
        BATCHES,
        413,
        lambda: {"jobs": [{"job_type": "echo", "parameters": {}}] * 83, "parameters": {"a": [1.0] * 100_000}},
    ),
    "a dry run of defaults for each of 10,000 jobs": (
        VALIDATE,
        413,
        lambda: {"jobs": [{"job_type": "echo", "parameters": {}}] * 10_000, "parameters": {"a": [[]] * 100_000}},
    ),
    "700,000 whole numbers with a point": (JOBS, 422, lambda: echo(json.dumps({"a": [[1.0] * 3] * 240_000}))),
    "500,000 jobs": (BATCHES, 422, lambda: {"jobs": [1] * 500_000}),
    "a batch whose last job is very wrong": (
        BATCHES,
        422,
        lambda: {"jobs": [session()] * 9_999 + [session(speakers=[1] * 100_000)]},
    ),
    "a cancellation with 100,000 fields": (f"{JOBS}/job-0/cancel", 422, lambda: many(100_000)),
    "a redelivery with 100,000 fields": (REDELIVER, 422, lambda: many(100_000)),
}


@pytest.fixture(scope="module")
def role(mongodb_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCommand]:
    """An API process with a plug-in whose validator does what it is told."""
    name, plugins = f"test_{uuid4().hex[:16]}", tmp_path_factory.mktemp("plugins")
    (plugins / "oddtype.py").write_text(PLUGIN)
    (plugins / "oddtype-1.dist-info").mkdir()
    (plugins / "oddtype-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: oddtype\nVersion: 1\n")
    (plugins / "oddtype-1.dist-info" / "entry_points.txt").write_text("[jobledger.processors]\nodd = oddtype:Odd\n")
    with Installation(
        tmp_path_factory.mktemp("bodies"), mongodb={"uri": mongodb_uri, "db_name": name}, logging={"level": "error"}
    ) as installation:
        yield installation.start("api", PYTHONPATH=str(plugins), JOBLEDGER_SECRET="").wait_until_ready()
    with MongoClient[dict[str, Any]](mongodb_uri) as client:
        client.drop_database(name)


@pytest.fixture
def client(role: RunningCommand) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=role.url, timeout=60, trust_env=False) as client:
        yield client


def memory_mb(role: RunningCommand, name: str) -> int:
    lines = Path(f"/proc/{role.process.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) // 1024


def cpu_seconds(role: RunningCommand) -> float:
    fields = Path(f"/proc/{role.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


@contextmanager
def longest_stall(role: RunningCommand) -> Iterator[list[float]]:
    """Ask for /healthz all the time; yield the seconds that the responses took."""
    seconds, stop = [0.0], False

    def ask() -> None:
        with httpx.Client(base_url=role.url, timeout=60, trust_env=False) as client:
            while not stop:
                begun = time.perf_counter()
                assert client.get("/healthz").status_code == 200
                seconds.append(time.perf_counter() - begun)
                time.sleep(0.02)

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            yield seconds
        finally:
            stop = True
            asking.result()


HUGE = {
    "integers of 4,000 digits",
    "16,000,000 wrong speakers",
    "3,000,000 objects",
    "a text of 30 MB",
    "a name of 30 MB",
    "an integer of 30,000,000 digits",
    "2,000,000 times the same name",
    "200,000 wrong headers",
    "a batch whose last job is very wrong",
}


@pytest.mark.parametrize("name", [pytest.param(it, marks=soak_only) if it in HUGE else it for it in BODIES])
def test_body_costs_bounded_time_and_memory(role: RunningCommand, client: httpx.Client, name: str) -> None:
    path, status, make = BODIES[name]
    made = make()
    body = made if isinstance(made, bytes) else json.dumps(made).encode()
    before, used = memory_mb(role, "VmRSS"), cpu_seconds(role)

    with longest_stall(role) as stalls:
        response = client.post(path, content=body, headers={"Content-Type": "application/json"})

    assert response.status_code == status, response.text[:300]
    assert len(response.content) < 40_000
    assert len(response.json()["details"].get("errors", ())) <= 100
    assert cpu_seconds(role) - used < MOST_CPU_SECONDS
    assert memory_mb(role, "VmRSS") - before < MOST_MEMORY_MB
    assert max(stalls) < LONGEST_STALL_SECONDS


def test_batch_of_ten_thousand_sessions_does_not_block_other_requests(
    role: RunningCommand, client: httpx.Client
) -> None:
    fields = {"speakers": ["Ada Lovelace", "Grace Hopper"], "day": "Sunday", "extra": {"room": "H.1302, first floor"}}
    jobs = [session(**fields, starttime="09:30", endtime="10:00") for _ in range(10_000)]
    with longest_stall(role) as stalls:
        response = client.post(BATCHES, json={"jobs": jobs})
    assert response.status_code == 202, response.text[:300]
    assert max(stalls) < LONGEST_STALL_SECONDS


# Validators of plug-ins -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deed", "status", "words"),
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
def test_plugin_validator_affects_only_its_request(client: httpx.Client, deed: str, status: int, words: str) -> None:
    response = client.post(JOBS, json={"job_type": "odd", "parameters": {"do": deed}})
    assert response.status_code == status, response.text
    assert words in response.text
    if status == 422:
        assert response.json()["details"]["errors"][0]["path"].startswith("parameters")
    assert client.post(JOBS, json={"job_type": "odd", "parameters": {"do": "fine"}}).status_code == 202


def test_endless_plugin_validator_is_stopped_without_blocking_others(
    role: RunningCommand, client: httpx.Client
) -> None:
    endless = {"job_type": "odd", "parameters": {"do": "regex"}}
    with longest_stall(role) as stalls:
        response = client.post(BATCHES, json={"jobs": [endless, endless]})
    assert (response.status_code, response.json()["code"]) == (503, "validation_timeout")
    assert "odd" in response.json()["message"]
    assert "Retry-After" in response.headers
    assert max(stalls) < LONGEST_STALL_SECONDS
    assert client.post(JOBS, json={"job_type": "odd", "parameters": {"do": "fine"}}).status_code == 202


# Parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [r"a\\", r"\"[{,", "[,{" * 400_000, '\\\\"' * 300_000])
def test_estimate_value_count_ignores_content_of_strings(text: str) -> None:
    body = json.dumps({"a": [text, 1, {"b": []}], text: text}).encode()
    values, containers = estimate_value_count(bytearray(body))
    if values + containers > 20:  # few enough not to be looked at closely
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
"""Objects are tuples of pairs: a name may be there twice."""


def text_of(value: object, spelled: Iterator[bool]) -> str:
    if isinstance(value, str) and next(spelled):
        return json.dumps(value).replace('\\"', "\\u0022") if not value.startswith("\\") else json.dumps(value)
    if isinstance(value, tuple):
        return f"{{{','.join(f'{text_of(name, spelled)}:{text_of(it, spelled)}' for name, it in value)}}}"
    if isinstance(value, list):
        return f"[{','.join(text_of(it, spelled) for it in value)}]"
    return json.dumps(value)


def repeats(value: object) -> bool:
    if isinstance(value, tuple):
        return len({name for name, _ in value}) < len(value) or any(repeats(it) for _, it in value)
    return isinstance(value, list) and any(map(repeats, value))


@given(_JSON, st.booleans())
def test_check_duplicate_names_rejects_only_repeated_names(value: object, spelled: bool) -> None:
    body = bytearray(text_of(value, repeat(spelled)).encode())
    with ExitStack() as stack:
        if repeats(value):
            stack.enter_context(pytest.raises(ApiError, match=r"An object has the name .+ [23] times"))
        _check_duplicate_names(body, from_json(body), MemoryReservation(MemoryBudget(10_000)))


def test_validate_content_reports_only_errors_of_the_whole_content() -> None:
    fields = {f"a{index}": 1 for index in range(150)} | session()["parameters"]
    with pytest.raises(ApiError) as refused:
        validate_content(SessionParameters, fields)
    named = {it["path"] for it in refused.value.details["errors"]}
    assert len(named) > 90
    assert named <= {f"a{index}" for index in range(100)}  # and not the fields behind those, as missing


def test_memory_reservation_is_limited_and_released() -> None:
    budget = MemoryBudget(100)
    with ExitStack() as stack:
        one, other = MemoryReservation(budget), MemoryReservation(budget)
        stack.callback(one.release)
        one.add(60)
        with pytest.raises(ApiError) as refused:
            other.add(50)
        assert (refused.value.status, refused.value.retry_after_seconds) == (503, 2)
        other.add(40)
        other.release()
    assert budget.reserved == 0

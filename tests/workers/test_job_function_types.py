"""The types of job functions under `mypy --strict`, and errors in their declarations."""

from __future__ import annotations

import asyncio
import enum
import functools
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, Field, SecretStr, ValidationError

import jobledger
from jobledger.testing import run

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = """
from __future__ import annotations

from datetime import timedelta
from decimal import Decimal

from pydantic import BaseModel

import jobledger


class Settings(BaseModel):
    currency: str = "EUR"


class Invoice(BaseModel):
    total: Decimal


def render(customer: str, dpi: int = 96) -> Invoice:
    return Invoice(total=Decimal(dpi))


@jobledger.job("invoice", retry=jobledger.Retry(5, on=OSError, backoff="linear"), timeout=timedelta(minutes=1))
async def invoice(ctx: jobledger.Context[Settings], customer: str, amount: Decimal = Decimal(1)) -> Invoice:
    reveal_type(await ctx.step("render", render, customer, dpi=3))
    reveal_type(await ctx.step("render", render, customer, share=timedelta(days=1)))
    reveal_type(ctx.settings.currency)
    reveal_type(await ctx.save("a", b""))
    return render(customer)


@jobledger.job("plain")
def plain(ctx: jobledger.SyncContext, number: int) -> list[int]:
    reveal_type(ctx.step("render", render, "x"))
    return [number]


@jobledger.job("bare", retry=None)
async def bare(number: int) -> str:
    return str(number)


app = jobledger.App(jobs=[invoice, plain, bare])
reveal_type(invoice)
reveal_type(plain)
reveal_type(bare)
invoice.bind("x", amount=Decimal(3))


async def use_clients(client: jobledger.Client, other: jobledger.AsyncClient) -> None:
    reveal_type(client.submit(invoice, customer="x", amount=Decimal(3)).result(timeout=60))
    reveal_type(client.with_options(key="k").submit(plain, 3).result())
    reveal_type(await (await other.submit(bare, number=3)).result())
    reveal_type(client.job("job-1", invoice).result())
"""
REVEALED = [
    "Invoice",
    "Invoice",
    "str",
    "SavedFile",
    "Invoice",
    "JobFunction[[customer: str, amount: Decimal =], Invoice]",
    "JobFunction[[number: int], list[int]]",
    "JobFunction[[number: int], str]",
    "Invoice",
    "list[int]",
    "str",
    "Invoice",
]
WRONG = """
import jobledger


def render(customer: str) -> str:
    return customer


@jobledger.job("invoice")
async def invoice(ctx: jobledger.Context, customer: str) -> str:
    return await ctx.step("render", render, 3)


invoice.bind(customer=3)
invoice.bind(custmer="x")
jobledger.Client().submit(invoice, customer=3)
"""


@pytest.fixture(scope="module")
def mypy_lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The output of `mypy --strict` for both examples."""
    directory = tmp_path_factory.mktemp("examples")
    (directory / "example.py").write_text(EXAMPLE)
    (directory / "wrong.py").write_text(WRONG)
    # An editable installation has a finder of its own, which mypy does not know.
    settings = f"[mypy]\nstrict = True\nmypy_path = {REPOSITORY}\nfollow_imports = silent\n"
    (directory / "mypy.ini").write_text(settings)
    cache = REPOSITORY / ".mypy_cache" / "examples"
    options = ("--no-error-summary", "--hide-error-codes", "--cache-dir", str(cache))
    command = [sys.executable, "-m", "mypy", *options, "example.py", "wrong.py"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False).stdout.splitlines()


@pytest.mark.timeout(300)
def test_mypy_strict_knows_the_types_of_job_functions(mypy_lines: list[str]) -> None:
    errors = [line for line in mypy_lines if line.startswith("example.py") and ": error:" in line]
    assert not errors, errors
    revealed = [line.partition("Revealed type is ")[2].strip('"') for line in mypy_lines if "Revealed type" in line]
    assert [re.sub(r"[a-z_]+\.", "", text).replace(" = ...", " =") for text in revealed] == REVEALED


@pytest.mark.timeout(300)
def test_mypy_strict_rejects_wrong_arguments(mypy_lines: list[str]) -> None:
    errors = [line for line in mypy_lines if line.startswith("wrong.py") and ": error:" in line]
    assert {int(line.split(":")[1]) for line in errors} == {11, 14, 15, 16}, errors


class Color(enum.Enum):
    RED = "red"


class Item(BaseModel):
    name: str
    price: Decimal


def test_bind_validates_and_returns_json() -> None:
    @jobledger.job("order")
    async def order(
        ctx: jobledger.Context,
        items: list[Item],
        color: Color = Color.RED,
        json: int = 3,
        _private: bool = False,
        count: Annotated[int, Field(gt=0)] = 1,
    ) -> None: ...

    assert order.bind([Item(name="tea", price=Decimal("1.5"))], json=4, _private=True) == {
        "items": [{"name": "tea", "price": "1.5"}],
        "json": 4,
        "_private": True,
    }
    assert order.get_arguments(order.Parameters.model_validate({"items": [], "json": 5, "_private": True})) == {
        "items": [],
        "color": Color.RED,
        "json": 5,
        "_private": True,
        "count": 1,
    }
    assert sorted(order.Parameters.model_json_schema()["properties"]) == ["_private", "color", "count", "items", "json"]
    with pytest.raises(ValidationError, match="greater than 0"):
        order.bind([], count=0)
    with pytest.raises(TypeError, match="job 'order': missing a required argument: 'items'"):
        order.bind()  # type: ignore[call-arg]  # the error is the test


async def test_job_function_can_be_called_like_the_function() -> None:
    @jobledger.job("double")
    async def double(number: int) -> int:
        """Double a number."""
        return 2 * number

    assert await double(3) == 6
    assert double.__doc__ == "Double a number."
    assert asyncio.iscoroutinefunction(double.function)


def test_parameter_may_be_named_self() -> None:
    @jobledger.job("mirror")
    async def mirror(self: str) -> str:
        return self

    assert run(mirror, self="me").result == "me"


def returns_number() -> int: ...  # type: ignore[empty-body]  # see `make_job`
def returns_decimals() -> list[Decimal]: ...  # type: ignore[empty-body]
def returns_results() -> jobledger.Results: ...  # type: ignore[empty-body]
def returns_either() -> jobledger.Results | int: ...  # type: ignore[empty-body]


@pytest.mark.parametrize(
    ("declaration", "value", "output"),
    [
        (returns_number, "5", 5),
        (returns_number, 5.0, 5),
        (returns_number, jobledger.Results(output=6), 6),
        (returns_decimals, (1, "2.50"), ["1", "2.50"]),
        (returns_results, jobledger.Results(output={"text": "a"}), {"text": "a"}),
        (returns_either, jobledger.Results(output=7), 7),
        (returns_either, 8, 8),
    ],
)
def test_output_is_json_of_the_declared_type(declaration: Callable[[], Any], value: Any, output: Any) -> None:
    outcome = run(make_job(declaration, value))
    assert outcome.results is not None, outcome.error
    assert outcome.results.output == output
    assert type(outcome.results.output) is type(output)
    assert [outcome.result] == [[Decimal(it) for it in output] if declaration is returns_decimals else output]


@pytest.mark.parametrize("declaration", [returns_number, returns_either])
def test_output_of_another_type_is_invalid(declaration: Callable[[], Any]) -> None:
    error = run(make_job(declaration, jobledger.Results(output={"output": 7}))).error
    assert error is not None
    assert error.code == "INVALID_RESULT"


def make_job(declaration: Callable[[], Any], value: Any) -> Any:
    """Return a job that returns a value, with the declaration of a function."""

    @functools.wraps(declaration)
    def return_value() -> Any:
        return value

    return jobledger.job("return-value")(return_value)


def test_coroutine_of_a_synchronous_wrapper_is_awaited() -> None:
    async def add(number: int) -> int:
        return number + 1

    @functools.wraps(add)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return add(*args, **kwargs)

    assert run(jobledger.job("wrapped")(wrapper), number=1).result == 2


class NoSchema:
    pass


class Login(BaseModel):
    user: str
    password: SecretStr


def declare(function: Any, **options: Any) -> None:
    jobledger.job("test", **options)(function)


def variadic(*values: int) -> None: ...
def named(**values: int) -> None: ...
def untyped(value) -> None: ...  # type: ignore[no-untyped-def]  # the error is the test
def positional(value: int, /) -> None: ...
def unsupported(value: NoSchema) -> None: ...
def unsupported_result() -> NoSchema: ...  # type: ignore[empty-body]  # never called
def undefined(value: Missing) -> None: ...  # type: ignore[name-defined]  # noqa: F821 - the error is the test
def late_context(value: int, ctx: jobledger.Context) -> None: ...
async def wrong_settings(ctx: jobledger.Context[int]) -> None: ...
def synchronous() -> None: ...
def method(self, value: int) -> None: ...  # type: ignore[no-untyped-def]  # the error is the test
def wrong_context(ctx: jobledger.Context) -> None: ...
async def wrong_sync_context(ctx: jobledger.SyncContext) -> None: ...
def secret(keys: list[SecretStr]) -> None: ...
async def secret_result() -> Login: ...  # type: ignore[empty-body]  # never called
def generator() -> Any:
    yield 1


async def valid() -> None: ...


DECLARATIONS: dict[str, tuple[Callable[[], Any], str]] = {
    "*args": (lambda: declare(variadic), "parameter 'values': .*list the parameters one by one"),
    "**kwargs": (lambda: declare(named), "parameter 'values': .*list the parameters one by one"),
    "untyped": (lambda: declare(untyped), "parameter 'value' has no type: annotate it, for example `value: str`"),
    "positional": (lambda: declare(positional), "'value' is positional-only"),
    "unsupported": (lambda: declare(unsupported), "parameter 'value': the type NoSchema cannot be read from JSON"),
    "result": (lambda: declare(unsupported_result), "result: the type NoSchema cannot be converted to JSON"),
    "undefined": (lambda: declare(undefined), "annotation 'Missing' is not defined yet"),
    "late context": (lambda: declare(late_context), "the context must be the first parameter"),
    "settings": (lambda: declare(wrong_settings), "must name a pydantic model of the settings"),
    "method": (lambda: declare(method), "a method cannot be a job: decorate a function at the top of a module"),
    "context": (lambda: declare(wrong_context), "a synchronous function has a SyncContext, not a Context"),
    "sync context": (lambda: declare(wrong_sync_context), "an asynchronous function has a Context, not a SyncContext"),
    "secret": (lambda: declare(secret), "parameter 'keys': a secret cannot be a parameter"),
    "secret result": (lambda: declare(secret_result), "result: the type Login contains a secret"),
    "generator": (lambda: declare(generator), "a generator cannot be a job"),
    "inline": (lambda: declare(synchronous, isolation="inline"), "a synchronous function needs isolation='process'"),
    "isolation": (lambda: declare(valid, isolation="thread"), "isolation must be 'process' or 'inline', got 'thread'"),
    "timeout": (lambda: declare(valid, timeout="soon"), "timeout must be a duration such as .*, got 'soon'"),
    "no time": (lambda: declare(valid, timeout=0), "timeout must be more than 0 and at most 7 days"),
    "version": (lambda: declare(valid, version=None), "version must be text or an integer, not None"),
    "retry": (lambda: declare(valid, retry=3), r"retry must be jobledger.Retry\(…\) or None, not 3"),
    "preload": (lambda: declare(valid, preload="os"), "preload must be a tuple of module names, got 'os'"),
    "name": (lambda: jobledger.job("a job"), "the name of a job must have .*, got 'a job'"),
    "no name": (lambda: jobledger.job(valid), r'Use it with a name: @jobledger.job\("my-job"\)'),  # type: ignore[arg-type]
    "attempts": (lambda: jobledger.Retry(0), "Retry.max_attempts must be between 1 and 100, got 0"),
    "classes": (lambda: jobledger.Retry(on=("OSError",)), "Retry.on must contain exception classes"),  # type: ignore[arg-type]
    "backoff": (lambda: jobledger.Retry(backoff="slow"), "Retry.backoff must be one of exponential, linear, constant"),  # type: ignore[arg-type]
    "delays": (lambda: jobledger.Retry(base_delay="2h", max_delay="1h"), "at most max_delay, got '2h' and '1h'"),
    "delay": (lambda: jobledger.Retry(base_delay=-1), "Retry.base_delay must be a finite duration"),
    "app": (lambda: jobledger.App(jobs=[synchronous]), "is not a job type: decorate the function"),  # type: ignore[list-item]
}


@pytest.mark.parametrize("name", DECLARATIONS)
def test_wrong_declaration_is_rejected_with_the_fix(name: str) -> None:
    declaration, message = DECLARATIONS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        declaration()


@pytest.mark.parametrize(
    ("policy", "attempt", "lowest", "highest"),
    [
        (jobledger.Retry(), 1, 0.1, 5),
        (jobledger.Retry(), 20, 0.1, 600),
        (jobledger.Retry(base_delay="10s", backoff="linear"), 3, 27, 33),
        (jobledger.Retry(base_delay=timedelta(seconds=10), backoff="constant"), 7, 9, 11),
        (jobledger.Retry(base_delay="1h", max_delay="2h", backoff="linear"), 7, 6480, 7920),
        (jobledger.Retry(base_delay="1h", backoff="constant"), 1, 3240, 3960),  # longer than the setting
        (jobledger.Retry(base_delay="5m", backoff="linear"), 9, 540, 660),
    ],
)
def test_retry_delay_follows_the_policy(policy: jobledger.Retry, attempt: int, lowest: float, highest: float) -> None:
    delays = [policy.choose_delay(attempt, base_seconds=5, max_seconds=600) for _ in range(200)]
    assert lowest <= min(delays)
    assert max(delays) <= highest
    assert max(delays) > (lowest + highest) / 2
    requested = policy.choose_delay(attempt, base_seconds=5, max_seconds=600, requested_seconds=100)
    assert requested >= 100 + lowest

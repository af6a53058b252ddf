"""Job types of an application in tests of the test kit."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
import warnings
from decimal import Decimal
from pathlib import Path
from threading import Thread

from pydantic import BaseModel

import jobledger

calls: list[str] = []
"""What steps were called with, in the process of the test."""


class ShopSettings(BaseModel):
    currency: str = "EUR"


class Receipt(BaseModel):
    customer: str
    amount: Decimal


def book(customer: str) -> str:
    calls.append(customer)
    return customer.upper()


@jobledger.job("receipt", retry=jobledger.Retry(max_attempts=2, base_delay="5m", backoff="constant"))
async def receipt(
    ctx: jobledger.Context[ShopSettings], customer: str, amount: Decimal = Decimal(1), failures: int = 0
) -> Receipt:
    name = await ctx.step("book", book, customer)
    await ctx.save("receipts/a.md", f"{name} {amount} {ctx.settings.currency}")
    if ctx.attempt <= failures:
        raise ConnectionError("the bank is down")
    return Receipt(customer=name, amount=amount)


@jobledger.job("noisy")
async def noisy(ctx: jobledger.Context) -> None:
    print("printed")
    logging.getLogger("shop").info("logged")
    warnings.warn("warned", stacklevel=1)
    thread = Thread(target=lambda: logging.getLogger("thread").error("from a thread"))
    thread.start()
    await asyncio.to_thread(thread.join)
    ctx.log.debug("by ctx")
    ctx.warn("The result is incomplete.")
    ctx.progress(10, "begun")
    ctx.progress(5, "behind")
    print("no line end", end="")


@jobledger.job("waiting", retry=None)
def waiting(ctx: jobledger.SyncContext, stops: bool) -> str:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not ctx.cancelled:
        time.sleep(0.01)
    if stops:
        raise RuntimeError("stopped")
    return "saved what there was"


@jobledger.job("overdue", retry=None, timeout=0.1)
def overdue(ctx: jobledger.SyncContext) -> str:
    while not ctx.cancelled:
        time.sleep(0.01)
    return "too late"


@jobledger.job("inline", isolation="inline", timeout=0.2)
async def inline(ctx: jobledger.Context) -> None:
    print("to the worker's output")
    await asyncio.sleep(10)


@jobledger.job("stubborn", isolation="process", timeout=0.1)
async def stubborn(ctx: jobledger.Context) -> None:
    await asyncio.sleep(10)


@jobledger.job("never-again", retry=None)
async def never_again() -> int:
    raise ConnectionError("once")


@jobledger.job("foreign-file")
async def foreign_file(ctx: jobledger.Context) -> jobledger.Results:
    file = jobledger.SavedFile(path="a", sha256="0" * 64, size=1, media_type="text/plain")
    return jobledger.Results(assets=[file])


@jobledger.job("invalid")
async def invalid() -> int:
    return "text"  # type: ignore[return-value]


@jobledger.job("scratch")
async def scratch(ctx: jobledger.Context, path: Path) -> int:
    copy = ctx.scratch_dir / "copy"
    await asyncio.to_thread(shutil.copy, path, copy)
    saved = await ctx.save("data.bin", copy)
    return saved.size


@jobledger.job("large")
async def large() -> str:
    return "x" * 3_000_000


@jobledger.job("saving-step")
async def saving_step(ctx: jobledger.Context) -> None:
    async def save() -> None:
        await ctx.save("page.html", "<p>")

    await ctx.step("save", save)
    if ctx.attempt == 1:
        raise ConnectionError

"""Download a file of a step. Transient errors are retried, and a broken download continues where it ended.

All tries together end within the timeout of the download. The last error is raised if a retry cannot succeed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from jobledger.workers.processor import ProcessorError
from jobledger.workers.processors.session.fetcher import FetchResult, format_bytes
from jobledger.workers.processors.session.partial_file import PartialFile
from jobledger.workers.processors.session.step_context import StepContext

RETRY_DELAYS_SECONDS: Final = (2.0, 8.0, 32.0)
"""Maximum pause after each failed try. A file of which no part arrives is tried four times."""
_MIN_PROGRESS_BYTES: Final = 1024 * 1024
"""If a try adds so much to the file, the pauses begin with the first one again."""
_NETWORK_ERRORS: Final = {
    "dns": "unknown host",
    "refused": "connection refused",
    "reset": "connection closed",
    "unreachable": "host unreachable",
    "tls": "TLS error",
    "protocol": "incomplete response",
}


@dataclass(frozen=True, slots=True)
class ProgressRange:
    """How a download is shown: its name, and its share of the job's progress in percent."""

    message: str
    start: float
    end: float


async def download(
    ctx: StepContext,
    url: str,
    target: Path,
    *,
    progress: ProgressRange,
    max_bytes: int,
    timeout_seconds: float,
    check_media_type: Callable[[str], None] = lambda media_type: None,
) -> FetchResult:
    """Download `url` to the file `target`.

    Args:
        ctx: The context of the step.
        url: An http or https URL.
        target: The file to write.
        progress: How the download is shown.
        max_bytes: Maximum size of the decompressed body.
        timeout_seconds: Timeout for all tries and the pauses between them.
        check_media_type: Called with the media type before the body is read. May raise to reject it.

    Raises:
        ProcessorError: See `Fetcher.fetch`. The message contains the number of tries if there were several.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_seconds
    file = PartialFile(target)
    tries = failed_in_a_row = 0
    await ctx.job.report_progress(progress.start, progress.message)
    while True:
        tries, size_before = tries + 1, file.size
        try:
            fetched = await ctx.fetcher.fetch(
                url,
                max_bytes=max_bytes,
                timeout_seconds=timeout_seconds if tries == 1 else round(deadline - loop.time(), 1),
                target=file,
                check_media_type=check_media_type,
                on_progress=partial(ctx.report_download, progress.message, progress.start, progress.end),
            )
        except ProcessorError as error:
            failed_in_a_row = 1 if file.size - size_before >= _MIN_PROGRESS_BYTES else failed_in_a_row + 1
            can_retry = error.transient or (error.code == "HTTP_ERROR" and size_before > 0)
            delay = choose_retry_delay(failed_in_a_row, error) if can_retry else None
            if delay is None or loop.time() + delay >= deadline:
                raise _add_number_of_tries(error, tries) from error
            if not error.transient:  # the server refuses to send the rest
                file.discard()
            await _announce_retry(ctx, error, delay, progress, file)
            await ctx.sleep(delay)
        else:
            await ctx.log_fetch(fetched)
            return fetched


def choose_retry_delay(failed_in_a_row: int, error: ProcessorError | None = None) -> float | None:
    """Return the pause in seconds, or None after the last try. The server may request a longer pause."""
    if failed_in_a_row > len(RETRY_DELAYS_SECONDS):
        return None
    delay = RETRY_DELAYS_SECONDS[failed_in_a_row - 1] * random.uniform(0.5, 1)  # noqa: S311 - spreads load
    return max(delay, float(error.details.get("retry_after", 0))) if error is not None else delay


async def _announce_retry(
    ctx: StepContext, error: ProcessorError, delay: float, progress: ProgressRange, file: PartialFile
) -> None:
    action = f"continuing after {format_bytes(file.size)}" if file.size else "trying again"
    await ctx.job.log("warning", f"{error.message} {action[0].upper()}{action[1:]} in {delay:.0f} s.")
    message = f"{progress.message}: {_describe_briefly(error)}, {action} in {delay:.0f} s"
    await ctx.job.report_progress(progress.start, message)


def _describe_briefly(error: ProcessorError) -> str:
    if error.code == "HTTP_ERROR":
        return f"HTTP {error.details['status_code']}"
    if error.code == "FETCH_TIMEOUT":
        return "no response in time"
    return _NETWORK_ERRORS.get(error.details.get("reason", ""), "connection failed")


def _add_number_of_tries(error: ProcessorError, tries: int) -> ProcessorError:
    if tries == 1:
        return error
    message, details = f"{error.message} It was tried {tries} times.", {**error.details, "tries": tries}
    return ProcessorError(error.code, message, transient=error.transient, details=details)

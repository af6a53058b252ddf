"""The command `jobledger demo`: generate a small conference website and process its sessions to Markdown."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

import httpx
from rich.text import Text

from jobledger.cli.commands.api_client import open_async_client
from jobledger.cli.commands.submit import follow_batch, submit_batch
from jobledger.cli.composition import ALL_ROLES, start_roles
from jobledger.cli.hosting.shutdown import Shutdown, compute_shutdown_timeout
from jobledger.cli.output.formatting import format_count
from jobledger.cli.output.terminal_text import SafeConsole, escape_line
from jobledger.cli.settings import Settings
from jobledger.cli.settings_file import read_settings
from jobledger.ledger.domain.errors import ConfigurationError, LedgerUnavailable
from jobledger.ledger.mongo.connection import Connection

RESULTS_DIR: Final = Path("demo-data")
_MARKER_FILE: Final = "MADE-BY-JOBLEDGER-DEMO"


def make_demo_settings(directory: Path) -> Settings:
    """Return settings for a temporary installation that may fetch from 127.0.0.1."""
    settings, _ = read_settings(
        None,
        {
            "mongodb": {"uri": "embedded", "data_dir": str(directory / "mongodb")},
            "api": {"port": 0},
            "results": {"store": str(directory / "results")},
            "processors": {"session": {"allowed_private_hosts": ["127.0.0.1"], "keep_audio": True}},
            "logging": {"level": "warning"},
        },
        defaults_only=True,
    )
    return settings


async def run_demo(
    settings: Settings, connection: Connection, directory: Path, console: SafeConsole, *, keep_running: bool
) -> bool:
    """Run the demo and return whether all sessions completed.

    Raises:
        ConfigurationError: The extra `demo` is not installed, or the copies cannot be written.
        LedgerUnavailable: The API does not list the submitted jobs.
    """
    try:
        from jobledger.cli import demo_site  # needs the extra `demo`
    except ImportError as error:
        raise ConfigurationError(
            f"The demo needs additional packages ({error}). Install them with: pip install 'jobledger[demo]'"
        ) from error
    stop = Shutdown(compute_shutdown_timeout(settings, ALL_ROLES))
    stop.install_signal_handlers()
    console.print(Text.from_markup("[bold]1[/] Generating a conference website with pages, PDF slides and videos …"))
    site = directory / "site"
    await asyncio.to_thread(demo_site.write_site, site)
    async with (
        demo_site.serve_directory(site) as site_url,
        start_roles(settings, connection, ALL_ROLES, on_failure=stop.request_after_failure) as running,
        open_async_client(running.url or "") as client,
    ):
        sessions = demo_site.list_sessions(site_url)
        console.print(f"  Serving it at {site_url}")
        console.print(
            Text.assemble(("2", "bold")), f"Submitting {len(sessions)} sessions as one batch to {running.url} …"
        )
        following = asyncio.create_task(_run_batch(client, sessions, console))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({following, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not following.done():
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            return False
        stopped.cancel()
        try:
            succeeded = await _show_results(client, following.result(), console)
        except OSError as error:
            raise ConfigurationError(f"Cannot write result copies to {RESULTS_DIR.absolute()}: {error}") from error
        if keep_running or (sys.stdin is not None and sys.stdin.isatty()):
            await _wait_for_exit(stop, console, keep=keep_running)
    return succeeded


async def _run_batch(client: httpx.AsyncClient, sessions: list[Any], console: SafeConsole) -> list[dict[str, Any]]:
    batch = {"batch_name": "Demo", "jobs": [{"parameters": session} for session in sessions]}
    submitted, before = await submit_batch(client, batch)
    names = dict(zip(submitted["job_ids"], (str(session["session"]) for session in sessions), strict=True))
    await follow_batch(client, submitted, names, after=before, console=console)
    response = await client.get(f"/api/events/jobs?batch_id={submitted['batch_id']}")
    jobs: list[dict[str, Any]] = response.json()["jobs"]
    if len(jobs) != len(sessions):
        raise LedgerUnavailable(f"Submitted {len(sessions)} sessions, but the API lists {len(jobs)} jobs")
    return sorted(jobs, key=lambda job: submitted["job_ids"].index(job["job_id"]))


async def _show_results(client: httpx.AsyncClient, jobs: list[dict[str, Any]], console: SafeConsole) -> bool:
    """Download every result, keep a copy after the demo, and print both locations.

    Returns:
        Whether all jobs completed.
    """
    _prepare_results_directory()
    console.print(Text("3", style="bold"), "Results, downloaded from the API:")
    all_completed = True
    for job in jobs:
        if job["status"] != "completed":
            all_completed = False
            name, message = job["parameters"]["session"], (job["error"] or {}).get("message", "no error message")
            console.print()
            console.print(Text.assemble("  ", (job["status"], "red"), f" {escape_line(name)}: {escape_line(message)}"))
            continue
        results = job["results"]
        for url in [results["markdown_url"], *(asset["url"] for asset in results["assets"])]:
            await _keep_copy(client, url)
        _print_result(client, job, console)
    console.print()
    console.print(
        "The first URL of each session works while the demo runs. The second is a copy that remains.", soft_wrap=True
    )
    return all_completed


def _prepare_results_directory() -> None:
    """Remove the copies of an earlier demo and create an empty directory.

    Raises:
        ConfigurationError: The directory exists and was not created by a demo.
    """
    if RESULTS_DIR.exists() and not (RESULTS_DIR / _MARKER_FILE).exists():
        raise ConfigurationError(
            f"{RESULTS_DIR.absolute()} exists and was not created by the demo. "
            "Move it, or run the demo in another directory"
        )
    shutil.rmtree(RESULTS_DIR, ignore_errors=True)
    RESULTS_DIR.mkdir()
    (RESULTS_DIR / _MARKER_FILE).write_text("Created by `jobledger demo`. The next run deletes this directory.\n")


async def _keep_copy(client: httpx.AsyncClient, url: str) -> None:
    response = await client.get(url)
    response.raise_for_status()
    copy = _copy_path(url)
    if not copy.resolve().is_relative_to(RESULTS_DIR.resolve()):
        raise ConfigurationError(f"The API returned a result URL outside {RESULTS_DIR}: {url}")
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(response.content)


def _copy_path(url: str) -> Path:
    return RESULTS_DIR.absolute() / unquote(url).removeprefix("/api/events/files/")


def _print_result(client: httpx.AsyncClient, job: Mapping[str, Any], console: SafeConsole) -> None:
    url, metadata = job["results"]["markdown_url"], job["results"]["metadata"]
    console.print()
    console.print(Text.assemble("  ", (escape_line(job["parameters"]["session"]), "bold")))
    # Without wrapping: a URL that is broken over lines cannot be clicked.
    console.print(f"  {client.base_url.join(url)}", soft_wrap=True, style="cyan", highlight=False)
    console.print(f"  {_copy_path(url).as_uri()}", soft_wrap=True, style="cyan", highlight=False)
    audio = f", {metadata['audio_seconds']:.0f} s of audio" if metadata["audio_seconds"] else ""
    console.print(
        f"  {format_count(metadata['slides'], 'slide')}{audio}; {metadata['duration']:.1f} s run time", style="dim"
    )
    for warning in metadata["warnings"]:
        console.print(Text.assemble(("  warning ", "yellow"), (escape_line(warning), "dim")), soft_wrap=True)


async def _wait_for_exit(stop: Shutdown, console: SafeConsole, *, keep: bool) -> None:
    stopped = asyncio.create_task(stop.wait())
    if keep:
        console.print("Running until Ctrl-C.")
        await stopped
        return
    console.print("Press Enter to stop the demo.")
    entered = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(sys.stdin.fileno(), entered.set)
    try:
        await asyncio.wait({stopped, asyncio.create_task(entered.wait())}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        loop.remove_reader(sys.stdin.fileno())
        stopped.cancel()

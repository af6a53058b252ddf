"""cli: `jobledger demo`. A small conference, made and served here, goes all the way to Markdown before your eyes."""

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

from jobledger.cli.api_client import open_client
from jobledger.cli.commands.submit import follow_batch, submit_batch
from jobledger.cli.composition import ALL_ROLES, Shutdown, shutdown_timeout, start_roles
from jobledger.cli.settings import Settings, read_settings
from jobledger.cli.terminal_text import SafeConsole, escape_line
from jobledger.ledger.domain.errors import ConfigurationError, LedgerUnavailable
from jobledger.ledger.mongo.connection import Connection

RESULTS_DIR: Final = Path("demo-data")
_MARK: Final = "MADE-BY-JOBLEDGER-DEMO"


def make_demo_settings(directory: Path) -> Settings:
    """Return settings for a throw-away installation that may fetch from this machine."""
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
    """Run the demo; return whether every session was turned into Markdown that opens.

    Raises:
        ConfigurationError: what makes the site is not installed, or the copies cannot be written.
        LedgerUnavailable: the pieces do not find each other.
    """
    try:
        from jobledger.cli import demo_site  # needs the extra `demo`, which the other commands do without
    except ImportError as error:
        raise ConfigurationError(
            f"The demo needs more than is installed ({error}): pip install 'jobledger[demo]'"
        ) from error
    stop = Shutdown(shutdown_timeout(settings, ALL_ROLES))
    stop.install_signal_handlers()
    console.print(Text.from_markup("[bold]1[/] Making a conference site: pages, PDF slides and videos …"))
    site = directory / "site"
    await asyncio.to_thread(demo_site.write_site, site)
    async with (
        demo_site.serve_directory(site) as site_url,
        start_roles(settings, connection, ALL_ROLES, on_failure=stop.request_after_failure) as running,
        open_client(running.url or "") as client,
    ):
        sessions = demo_site.list_sessions(site_url)
        console.print(f"  It is served at {site_url}")
        console.print(
            Text.assemble(("2", "bold")), f"Submitting its {len(sessions)} sessions as one batch to {running.url} …"
        )
        following = asyncio.create_task(_follow(client, sessions, console))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({following, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not following.done():
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            return False
        stopped.cancel()
        try:
            good = await _show_results(client, following.result(), console)
        except OSError as error:
            raise ConfigurationError(f"The copies cannot be written to {RESULTS_DIR.absolute()}: {error}") from error
        if keep_running or (sys.stdin is not None and sys.stdin.isatty()):
            await _stay(stop, console, keep=keep_running)
    return good


async def _follow(client: httpx.AsyncClient, sessions: list[Any], console: SafeConsole) -> list[dict[str, Any]]:
    batch = {"batch_name": "Demo", "jobs": [{"parameters": session} for session in sessions]}
    submitted, before = await submit_batch(client, batch)
    names = dict(zip(submitted["job_ids"], (str(session["session"]) for session in sessions), strict=True))
    await follow_batch(client, submitted, names, after=before, console=console)
    found = await client.get(f"/api/events/jobs?batch_id={submitted['batch_id']}")
    jobs: list[dict[str, Any]] = found.json()["jobs"]
    if len(jobs) != len(sessions):
        raise LedgerUnavailable(f"{len(sessions)} sessions were submitted, but the API lists {len(jobs)}")
    return sorted(jobs, key=lambda job: submitted["job_ids"].index(job["job_id"]))


async def _show_results(client: httpx.AsyncClient, jobs: list[dict[str, Any]], console: SafeConsole) -> bool:
    """Fetch every result over its URL, keep a copy that outlives the demo, and print where it is."""
    _clear()
    console.print(Text("3", style="bold"), "The results, each of them just fetched over its URL:")
    good = True
    for job in jobs:
        if job["status"] != "completed":
            good = False
            name, why = job["parameters"]["session"], (job["error"] or {}).get("message", "no reason given")
            console.print()
            console.print(Text.assemble("  ", (job["status"], "red"), f" {escape_line(name)}: {escape_line(why)}"))
            continue
        results = job["results"]
        for url in [results["markdown_url"], *(asset["url"] for asset in results["assets"])]:
            await _keep_copy(client, url)
        _show(client, job, console)
    console.print()
    console.print(
        "The first address of each opens as long as the demo runs, the second is a copy that stays.", soft_wrap=True
    )
    return good


def _clear() -> None:
    """Remove the copies of an earlier demo, but nothing that somebody else has put there."""
    if RESULTS_DIR.exists() and not (RESULTS_DIR / _MARK).exists():
        raise ConfigurationError(
            f"{RESULTS_DIR.absolute()} is there already, and not from a demo: move it, or run elsewhere"
        )
    shutil.rmtree(RESULTS_DIR, ignore_errors=True)
    RESULTS_DIR.mkdir()
    (RESULTS_DIR / _MARK).write_text("Made by `jobledger demo`, which removes this directory when it runs again.\n")


async def _keep_copy(client: httpx.AsyncClient, url: str) -> None:
    answer = await client.get(url)
    answer.raise_for_status()
    copy = _copy(url)
    if not copy.resolve().is_relative_to(RESULTS_DIR.resolve()):
        raise ConfigurationError(f"The API names a result outside of {RESULTS_DIR}: {url}")
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(answer.content)


def _copy(url: str) -> Path:
    return RESULTS_DIR.absolute() / unquote(url).removeprefix("/api/events/files/")


def _show(client: httpx.AsyncClient, job: Mapping[str, Any], console: SafeConsole) -> None:
    url, metadata = job["results"]["markdown_url"], job["results"]["metadata"]
    console.print()
    console.print(Text.assemble("  ", (escape_line(job["parameters"]["session"]), "bold")))
    # Never wrapped: an address that is broken over lines cannot be clicked.
    console.print(f"  {client.base_url.join(url)}", soft_wrap=True, style="cyan", highlight=False)
    console.print(f"  {_copy(url).as_uri()}", soft_wrap=True, style="cyan", highlight=False)
    audio = f", {metadata['audio_seconds']:.0f} s of audio" if metadata["audio_seconds"] else ""
    console.print(f"  {metadata['slides']} slides{audio}; {metadata['duration']:.1f} s of work", style="dim")
    for warning in metadata["warnings"]:
        console.print(Text.assemble(("  note ", "yellow"), (escape_line(warning), "dim")), soft_wrap=True)


async def _stay(stop: Shutdown, console: SafeConsole, *, keep: bool) -> None:
    ended = asyncio.create_task(stop.wait())
    if keep:
        console.print("It stays up until Ctrl-C.")
        await ended
        return
    console.print("The URLs open until you press Enter.")
    entered = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(sys.stdin.fileno(), entered.set)
    try:
        await asyncio.wait({ended, asyncio.create_task(entered.wait())}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        loop.remove_reader(sys.stdin.fileno())
        ended.cancel()

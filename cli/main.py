"""cli: the command `jobledger`.

Exit codes: 0 done, 1 the thing asked about failed, 2 wrong usage or configuration, 3 a service is unreachable,
4 a port, disk, lock or limit of this machine is not usable now. Only 2 needs a change of settings; after the others,
starting again may help.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer
import yaml

from jobledger.cli.api_client import DEFAULT_URL, UrlOption, open_client
from jobledger.cli.commands import batches, jobs, log, views, webhooks
from jobledger.cli.commands.submit import follow_batch, parse_batch
from jobledger.cli.commands.submit import submit_batch as submit_batch
from jobledger.cli.runtime import ConfigOption, JsonOption, load_settings, open_any_database_server, run_roles
from jobledger.cli.terminal_text import SafeConsole, configure_output_encoding, echo, echo_json, echo_text
from jobledger.ledger.domain.errors import (
    ConfigurationError,
    JobledgerError,
    LedgerUnavailable,
    NotFound,
    ResourceUnavailable,
)

if TYPE_CHECKING:
    from jobledger.cli.commands.doctor import CheckResult
    from jobledger.cli.settings import Settings

EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_UNAVAILABLE = 1, 2, 3, 4
app = typer.Typer(
    name="jobledger",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(log.app, name="log")
app.command()(views.rebuild)
app.add_typer(jobs.app, name="jobs")
app.add_typer(batches.app, name="batches")
app.add_typer(webhooks.app, name="webhooks")
keys_app = typer.Typer(help="API keys, for auth.mode `keys`; directly on the database.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        echo(version("jobledger"))
        raise typer.Exit


VersionOption = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
]


@app.callback()
def options(_version: VersionOption = False) -> None:
    """An event-sourced job ledger: sessions go in, Markdown and images come out, nothing is lost or unexplained."""


@app.command()
def up(config: ConfigOption = None) -> None:
    """Run everything on this machine: MongoDB, API, projector and workers. Ctrl-C stops cleanly."""
    run_roles(config)


@app.command()
def api(config: ConfigOption = None) -> None:
    """Run the API alone."""
    run_roles(config, frozenset({"api"}))


@app.command()
def projector(config: ConfigOption = None) -> None:
    """Run the projector alone, which keeps the views up to date. Of several, one leads and the others stand by."""
    run_roles(config, frozenset({"projector"}))


@app.command()
def worker(config: ConfigOption = None) -> None:
    """Run a worker alone. As many as you like, on as many machines as you like; one of them sends the webhooks."""
    run_roles(config, frozenset({"worker", "webhooks"}))


@app.command()
def submit(
    file: Annotated[
        str, typer.Argument(help="JSON or YAML: a session, a list of sessions, or a batch. - reads standard input.")
    ],
    wait: Annotated[
        bool, typer.Option("--wait", help="Follow until the batch has ended; exit with 1 if a job failed.")
    ] = False,
    job_type: Annotated[str | None, typer.Option(help="Submit every job as this type.")] = None,
    url: UrlOption = DEFAULT_URL,
) -> None:
    """Submit sessions to a running jobledger, all or none. Its key, if it asks for one, is taken from JOBLEDGER_KEY."""
    batch = parse_batch(_read(file))
    if job_type is not None:
        batch["jobs"] = [_with_type(job, job_type) for job in batch["jobs"]]
    raise typer.Exit(asyncio.run(_submit(url, batch, wait=wait)))


@app.command()
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything running afterwards, until Ctrl-C.")] = False,
) -> None:
    """Show the whole way: a small conference is made, served, processed, and its Markdown comes out."""
    from jobledger.cli.commands import demo as demo_command
    from jobledger.cli.composition import configure_logging, open_database_server

    console = SafeConsole()
    with tempfile.TemporaryDirectory(prefix="jobledger-demo-", ignore_cleanup_errors=True) as directory:
        settings = demo_command.make_demo_settings(Path(directory))
        configure_logging(settings.logging)
        with open_database_server(settings, start=True) as (uri, _):
            good = asyncio.run(
                demo_command.run_demo(
                    settings, settings.mongodb.make_connection(uri), Path(directory), console, keep_running=keep
                )
            )
    raise typer.Exit(0 if good else EXIT_FAILED)


@app.command()
def doctor(
    config: ConfigOption = None,
    role: Annotated[
        bool, typer.Option("--role", help="Print what gives a MongoDB user the rights a ledger needs, and no more.")
    ] = False,
    accept_store: Annotated[
        bool,
        typer.Option(
            "--accept-store",
            help="Accept the directory in results.store as it is, after its files were lost for good or moved.",
        ),
    ] = False,
) -> None:
    """Check everything a ledger needs, and say what to do about what is wrong."""
    from jobledger.cli.commands import doctor as doctor_command
    from jobledger.cli.mongo_roles import mongosh_script

    settings = load_settings(config)
    if role:
        echo(*mongosh_script(settings.mongodb.db_name).splitlines())
        return
    if accept_store:
        with open_any_database_server(settings) as uri:
            echo(asyncio.run(doctor_command.accept_result_store(settings, uri)))
        return
    findings = list(doctor_command.check_machine(settings))
    try:
        with open_any_database_server(settings) as uri:
            findings += asyncio.run(_collect(settings, uri))
    except JobledgerError as error:
        findings.append(doctor_command.CheckResult("MongoDB", is_ok=False, detail="not usable", advice=str(error)))
    SafeConsole().print(doctor_command.results_table(findings))
    raise typer.Exit(0 if all(finding.is_ok for finding in findings) else EXIT_FAILED)


@keys_app.command("create")
def keys_create(
    user: Annotated[str, typer.Option("--user", help="Whose key it is.")],
    group: Annotated[
        list[str] | None, typer.Option("--group", help="A group they are in; its name begins with team-. Repeatable.")
    ] = None,
    role: Annotated[
        list[str] | None,
        typer.Option("--role", help="admin: may do everything. monitor: may see all statistics. Repeatable."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What it is for, to tell it from others.")] = None,
    expires_in: Annotated[str | None, typer.Option(help="How long it is good, such as 12h or 90d. Else: ever.")] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make an API key. It is shown this once: only a digest of it is stored."""
    from jobledger.cli.commands import keys

    settings = load_settings(config)
    key, text = keys.new_key(user=user, groups=group or (), roles=role or (), name=name, expires_in=expires_in)
    with open_any_database_server(settings) as uri:
        asyncio.run(keys.store_key(settings.mongodb.make_connection(uri), key))
    if settings.auth.mode != "keys":
        echo(f"note: auth.mode is `{settings.auth.mode}`; keys are asked for with `keys`", err=True)
    if as_json:
        echo_json(_json({**keys.key_to_json(key), "key": str(text)}))
    else:
        echo(str(text))
    echo(f"Keep it: it is not shown again. `jobledger keys revoke {key.key_id}` ends it.", err=True)


@keys_app.command("list")
def keys_list(
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show all API keys: whose they are, and until when."""
    from jobledger.cli.commands import keys

    settings = load_settings(config)
    with open_any_database_server(settings) as uri:
        found, sessions = asyncio.run(keys.list_keys(settings.mongodb.make_connection(uri)))
    if as_json:
        echo_json(_json([{**keys.key_to_json(key), "sessions": sessions[key.key_id]} for key in found]))
    else:
        SafeConsole().print(keys.keys_table(found, sessions) if found else "There are no API keys.")


@keys_app.command("revoke")
def keys_revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="Which one, as `keys list` shows it.")],
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Revoke an API key: from now on it opens nothing."""
    from jobledger.cli.commands import keys

    settings = load_settings(config)
    with open_any_database_server(settings) as uri:
        found = asyncio.run(keys.revoke_key(settings.mongodb.make_connection(uri), keys.parse_key_id(key_id)))
    if not found:  # what was given is not repeated: it may be most of a key
        raise NotFound("There is no API key with this id; `jobledger keys list` shows which there are.")
    if as_json:
        echo_json(_json({"revoked": keys.parse_key_id(key_id)}))
    else:
        echo(f"{keys.parse_key_id(key_id)} is revoked.")


@keys_app.command("sign-out")
def end_key_sessions(
    key_id: Annotated[str | None, typer.Argument(metavar="[ID]", help="ID of the key.")] = None,
    user: Annotated[str | None, typer.Option("--user", help="User, for auth.mode `jwt`.")] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """End the dashboard sessions of an API key or of a user

    The key itself stays valid; `keys revoke` ends both.
    """
    from jobledger.api.auth.browser_sessions import get_session_owner
    from jobledger.cli.commands import keys

    if (key_id is None) == (user is None):
        raise ConfigurationError("Name the ID of a key, or a user with --user.")
    owner = (
        get_session_owner(key_id=keys.parse_key_id(key_id))
        if key_id is not None
        else get_session_owner(user_id=user or "")
    )
    settings = load_settings(config)
    with open_any_database_server(settings) as uri:
        number = asyncio.run(keys.end_sessions(settings.mongodb.make_connection(uri), owner))
    if as_json:
        echo_json(_json({"ended": number}))
    else:
        echo(f"Sessions ended: {number}")


def _json(content: Any) -> str:
    return orjson.dumps(content, option=orjson.OPT_UTC_Z).decode()


async def _collect(settings: Settings, uri: str) -> list[CheckResult]:
    from jobledger.cli.commands.doctor import check_database

    return [finding async for finding in check_database(settings, uri)]


async def _submit(url: str, batch: dict[str, Any], *, wait: bool) -> int:
    console = SafeConsole()
    async with open_client(url) as client:
        submitted, before = await submit_batch(client, batch)
        console.print(f"{submitted['batch_id']}: {len(submitted['job_ids'])} jobs accepted", highlight=False)
        for new in submitted.get("webhook_secrets", ()):
            echo(f"Signing secret of {new['url']}: {new['secret']} (not shown again)", err=True)
        if not wait:
            return 0
        names = dict(zip(submitted["job_ids"], map(_name, batch["jobs"]), strict=True))
        ended = await follow_batch(client, submitted, names, after=before, console=console)
    return 0 if all(status == "completed" for status in ended.values()) else EXIT_FAILED


def _name(job: Any) -> str:
    parameters = job.get("parameters", job)
    return str(job.get("job_name") or parameters.get("session") or "job")


def _with_type(job: Any, job_type: str) -> Any:
    if not isinstance(job, dict):
        return job
    return {**job, "job_type": job_type} if "parameters" in job else {"job_type": job_type, "parameters": job}


def _read(file: str) -> Any:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        return _parsed(text)
    except FileNotFoundError:
        raise ConfigurationError(f"{file}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file} cannot be read: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigurationError(f"{file} is neither JSON nor YAML: {' '.join(str(error).split())}") from error


def _parsed(text: str) -> Any:
    """JSON is YAML only nearly: YAML refuses tabs, and reads an escaped emoji as two broken characters."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return yaml.safe_load(text)


def main() -> None:
    """The entry point: run the command that the arguments name, and end the process."""
    try:
        run()
    except SystemExit as ended:
        _end_without_threads(ended.code)
        raise


def _end_without_threads(code: object) -> None:
    """End the process at once if threads are left. Python would wait for them, and a job may have blocked one."""
    if any(not thread.daemon and thread is not threading.main_thread() for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def run() -> None:
    """Run a command: errors of ours become one sentence and an exit code, never a traceback."""
    configure_output_encoding()
    os.umask(0o077)  # files that a command or its children create are for this user alone
    try:
        app()
    except ResourceUnavailable as error:
        _give_up(error, EXIT_UNAVAILABLE)
    except ConfigurationError as error:
        _give_up(error, EXIT_USAGE)
    except LedgerUnavailable as error:
        _give_up(error, EXIT_UNREACHABLE)
    except JobledgerError as error:
        _give_up(error, EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, RuntimeError, MemoryError) as error:
        from jobledger.workers.machine_health import find_machine_failure

        if (trouble := find_machine_failure(error)) is None:
            raise
        _give_up(trouble, EXIT_UNAVAILABLE)


def _give_up(error: Exception, code: int) -> None:
    echo_text(f"jobledger: {error}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()

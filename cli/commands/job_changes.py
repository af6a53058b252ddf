"""`jobledger jobs edit` and `jobs retry --set`: change the parameters of a job."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import typer

from jobledger.cli.commands.api_client import RequestRejected, open_client, parse_response, remove_none
from jobledger.cli.commands.options import (
    DEFAULT_URL,
    DryRunOption,
    JsonOption,
    UrlOption,
    parse_assignments,
    parse_time_option,
)
from jobledger.cli.output.errors import with_hint
from jobledger.cli.output.terminal_text import echo, print_json
from jobledger.ledger.domain.errors import ConfigurationError

if TYPE_CHECKING:
    from jobledger.cli.command_classes import CommandApp
    from jobledger.cli.commands.resources import Resource
    from jobledger.cli.output.documents import Document


def restart_with_changes(
    jobs: Resource,
    url: str,
    ids: Sequence[str],
    changes: list[str],
    body: Document,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Restart a job with changed parameters, unless others have changed it meanwhile.

    Raises:
        ConfigurationError: There is not exactly one ID.
    """
    if len(ids) != 1:
        error = ConfigurationError("--set changes one job: expected exactly one ID.")
        raise with_hint(error, "To retry many jobs, use filters such as --error CODE, without --set.")
    with open_client(url) as client:
        job, etag = _load(client, jobs, ids[0])
        parameters = parse_assignments(changes, "--set", job["parameters"])
        _print_difference(job["parameters"], parameters)
        if dry_run:
            return
        result = jobs.post_action(client, job["job_id"], "restart", {**body, "parameters": parameters}, etag=etag)
    _print_job(result, as_json=as_json)


def _load(client: httpx.Client, jobs: Resource, text: str) -> tuple[Document, str]:
    """Return a job and its ETag."""
    response = client.get(f"{jobs.path}/{jobs.resolve_id(client, text)}")
    job: Document = parse_response(response, "job")["job"]
    return job, response.headers.get("ETag", "")


def add_edit_command(app: CommandApp, jobs: Resource) -> None:
    """Add the command `edit`."""

    def edit(
        job_id: Annotated[str, typer.Argument(metavar="ID", help="ID, or its unique beginning")],
        changes: Annotated[
            list[str] | None,
            typer.Option("--set", metavar="NAME=VALUE", help="Change a parameter without an editor. Repeatable"),
        ] = None,
        priority: Annotated[
            int | None, typer.Option(min=-1000, max=1000, help="Jobs with a higher priority start first")
        ] = None,
        not_before: Annotated[str | None, typer.Option(metavar="TIME", help="Do not start before this time")] = None,
        retry: Annotated[bool, typer.Option("--retry", help="Retry a finished job with the new parameters")] = False,
        dry_run: DryRunOption = False,
        url: UrlOption = DEFAULT_URL,
        as_json: JsonOption = False,
    ) -> None:
        with open_client(url) as client:
            job, etag = _load(client, jobs, job_id)
            path, other = f"{jobs.path}/{job['job_id']}", _build_other_changes(priority, not_before)
            if job["status"] == "processing" or (job["status"] != "pending" and not retry):
                error = RequestRejected(f"{job['job_id']} is {job['status']}: only pending jobs can be changed.")
                first = "Wait or cancel it. Then" if job["status"] == "processing" else "To start it again,"
                raise with_hint(error, f"{first} use `jobledger jobs edit {job['job_id']} --retry`.")
            parameters = job["parameters"]
            if changes:
                parameters = parse_assignments(changes, "--set", parameters)
            elif not other:
                parameters = _edit_in_editor(job)
            if parameters == job["parameters"] and not other and not retry:
                echo("Nothing changed.", err=True)
                return
            _print_difference(job["parameters"], parameters)
            if dry_run:
                return
            headers = {"If-Match": etag}
            if job["status"] == "pending":
                body = {**other, **({} if parameters == job["parameters"] else {"parameters": parameters})}
                response = client.put(path, json=body, headers=headers)
            else:
                response = client.post(f"{path}/restart", json={"parameters": parameters}, headers=headers)
            _print_job(parse_response(response, "job"), as_json=as_json)

    app.command(
        "edit",
        help="""Change a pending job, or a finished one with --retry

    Opens the parameters in your editor (VISUAL or EDITOR), unless there are other options.

    Examples:
        jobledger jobs edit job-6b0c8f1a
        jobledger jobs edit job-6b0c8f1a --set source_language=fr --dry-run
        jobledger jobs edit job-6b0c8f1a --priority 10
    """,
    )(edit)


def _build_other_changes(priority: int | None, not_before: str | None) -> Document:
    """Return the fields to change besides the parameters."""
    return remove_none({"priority": priority, "not_before": parse_time_option(not_before, "--not-before")})


def _edit_in_editor(job: Document) -> Any:
    """Return the parameters of a job after the user has changed them.

    Raises:
        ConfigurationError: There is no editor, or the file is no object in YAML afterwards.
    """
    import yaml

    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    with tempfile.TemporaryDirectory(prefix="jobledger-edit-") as directory:
        path = Path(directory) / f"{job['job_id']}.yaml"
        path.write_text(yaml.safe_dump(job["parameters"], sort_keys=False, allow_unicode=True), encoding="utf-8")
        try:
            finished = subprocess.run([*shlex.split(editor), path], check=False)  # noqa: S603 - the user configures the editor
        except (OSError, ValueError) as error:
            raise with_hint(
                ConfigurationError(f"The editor {editor!r} cannot be run: {error}"),
                "Set EDITOR, or use --set NAME=VALUE.",
            ) from error
        if finished.returncode:
            raise ConfigurationError(f"The editor {editor!r} exited with {finished.returncode}: nothing changed.")
        try:
            parameters = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigurationError(f"Not valid YAML, nothing changed: {' '.join(str(error).split())}") from error
    if not isinstance(parameters, dict):
        raise ConfigurationError(f"Expected an object with the parameters, got {type(parameters).__name__}.")
    return parameters


def _print_difference(before: Document, after: Document) -> None:
    """Print each changed parameter on standard error."""
    for name in dict.fromkeys((*before, *after)):
        if before.get(name) != after.get(name):
            echo(f"{name}: {_format_value(before, name)} → {_format_value(after, name)}", err=True)


def _format_value(parameters: Document, name: str) -> str:
    """Return a parameter as text, or as JSON if it is no text."""
    value = parameters.get(name, "not set")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _print_job(result: Document, *, as_json: bool) -> None:
    job = result["job"]
    if as_json:
        print_json(job)
    else:
        echo(f"{job['job_id']} is {job['status']}")

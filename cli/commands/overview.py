"""`jobledger errors ls`, `workers ls` and `types ls`: what operators look at first, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import typer

from jobledger.cli.command_classes import CommandApp, use_options
from jobledger.cli.commands import resources
from jobledger.cli.commands.api_client import (
    RequestRejected,
    build_unexpected_response_error,
    open_client,
    parse_response,
)
from jobledger.cli.commands.job_filters import build_job_filters
from jobledger.cli.commands.options import DEFAULT_URL, UrlOption
from jobledger.cli.output.documents import Document, Rows, build_output
from jobledger.cli.output.errors import find_similar, with_hint
from jobledger.cli.output.formatting import format_duration
from jobledger.cli.output.terminal_text import echo

errors_app = CommandApp(help="Show why jobs failed")
workers_app = CommandApp(help="Show workers and their problems")
types_app = CommandApp(help="Show job types and their parameters")
_MAX_FAILED_JOBS: Final = 10_000


@errors_app.command("ls")
@use_options(filters=build_job_filters, output=build_output)
def list_errors(filters: Any, output: Any, url: UrlOption = DEFAULT_URL) -> None:
    """List error codes of failed jobs, the most frequent first

    Each line has the newest job with this error. Filters are combined. Of very many failed jobs, the newest 10,000 are
    counted, and a note says so.

    Examples:
        jobledger errors ls
        jobledger errors ls --since 1d --type session
        jobledger errors ls -o name
    """
    query = {**filters, "status": "failed"}
    jobs, total = resources.fetch_list(url, "/api/events/jobs", "jobs", query, _MAX_FAILED_JOBS)
    groups: dict[str, Document] = {}
    for job in jobs:  # the newest first
        error = job["error"] or {"code": "unknown", "message": ""}
        group = groups.setdefault(
            error["code"],
            {
                "code": error["code"],
                "jobs": 0,
                "last_at": job["completed_at"],
                "job_id": job["job_id"],
                "message": error["message"],
            },
        )
        group["jobs"] += 1
    found = sorted(groups.values(), key=lambda group: -group["jobs"])
    output.print_list(found, build_error_rows, id_field="code", empty_text="No failed jobs match these filters.")
    if total != str(len(jobs)):
        echo(f"note: counted the newest {len(jobs)} of {total} failed jobs", err=True)


def build_error_rows(groups: Sequence[Document]) -> Rows:
    """Yield the header and the rows of the table of errors."""
    yield ("ERROR", "JOBS", "LAST", "NEWEST JOB", "MESSAGE")
    for group in groups:
        last = resources.format_iso_age(group["last_at"]) if group["last_at"] else "-"
        yield (group["code"], str(group["jobs"]), last, group["job_id"], group["message"])


@workers_app.command("ls")
@use_options(output=build_output)
def list_workers(
    output: Any,
    unhealthy: Annotated[bool, typer.Option("--unhealthy", help="Only workers that claim no jobs")] = False,
    url: UrlOption = DEFAULT_URL,
) -> None:
    """List active workers with their slots and problems

    Needs the user role monitor or admin. A worker without heartbeats disappears from the list when its lease
    expires. `jobledger doctor` finds jobs without a worker.

    Examples:
        jobledger workers ls
        jobledger workers ls --unhealthy
        jobledger workers ls --json worker_id,busy_slots,problem
    """
    with open_client(url) as client:
        stats = parse_response(resources.send(client, "GET", "/api/monitoring/events/stats"), "stats")["stats"]
    workers = [worker for worker in stats["workers"] if not unhealthy or worker["problem"]]
    empty_text = "No unhealthy workers." if unhealthy else "No active workers: jobs do not start."
    output.print_list(workers, _build_worker_rows, id_field="worker_id", empty_text=empty_text)
    if not stats["workers"] and stats["jobs"]["pending"]:
        echo(f"hint: {stats['jobs']['pending']} jobs wait. Start a worker with `jobledger worker`.", err=True)


def _build_worker_rows(workers: Sequence[Document]) -> Rows:
    yield ("WORKER", "STATUS", "BUSY", "SLOTS", "HOST", "LEASE", "SINCE", "PROBLEM")
    for worker in workers:
        lease = (datetime.fromisoformat(worker["lease_until"]) - datetime.now(UTC)).total_seconds()
        yield (
            worker["worker_id"],
            "unhealthy" if worker["problem"] else "healthy",
            str(worker["busy_slots"]),
            str(worker["slots"]),
            worker["host"],
            format_duration(lease),
            resources.format_iso_age(worker["unhealthy_since"]) if worker["unhealthy_since"] else "-",
            worker["problem"] or "-",
        )


@types_app.command("ls")
@use_options(output=build_output)
def list_job_types(output: Any, url: UrlOption = DEFAULT_URL) -> None:
    """List job types with their parameters

    These are the types that the API accepts. Required parameters are the first ones, others are in brackets.

    Examples:
        jobledger types ls
        jobledger types ls -o name
    """
    output.print_list(_fetch_job_types(url), _build_type_rows, id_field="job_type", empty_text="No job types.")


@types_app.command("get")
@use_options(output=build_output)
def show_job_type(
    job_type: Annotated[str, typer.Argument(metavar="TYPE", help="Job type, see `types ls`")],
    output: Any,
    url: UrlOption = DEFAULT_URL,
) -> None:
    """Show the parameters of a job type

    Examples:
        jobledger types get echo
    """
    known = {known["job_type"]: known for known in _fetch_job_types(url)}
    if job_type not in known:
        error = RequestRejected(f"Job type {job_type} not found.")
        similar = find_similar(job_type, list(known))
        raise with_hint(error, *([f"Did you mean {similar}?"] if similar else []), "See `jobledger types ls`.")
    if output.is_data:
        output.print_document(known[job_type])
    else:
        rows = build_parameter_rows
        output.print_list(known[job_type]["parameters"], rows, id_field="name", empty_text="No parameters.")


def _build_type_rows(job_types: Sequence[Document]) -> Rows:
    yield ("TYPE", "PARAMETERS")
    for job_type in job_types:
        names = [(it["name"] if it["required"] else f"[{it['name']}]") for it in job_type["parameters"]]
        yield (job_type["job_type"], " ".join(names))


def build_parameter_rows(parameters: Sequence[Document]) -> Rows:
    """Yield the header and the rows of the table of a job type's parameters."""
    yield ("PARAMETER", "TYPE", "REQUIRED", "DEFAULT", "DESCRIPTION")
    for parameter in parameters:
        yield (
            parameter["name"],
            parameter["type"],
            "yes" if parameter["required"] else "no",
            str(parameter["default"]) if parameter["default"] is not None else "-",
            parameter["description"] or "-",
        )


def _fetch_job_types(url: str) -> list[Document]:
    """Return job types and their parameters from the OpenAPI document."""
    with open_client(url) as client:
        response = resources.send(client, "GET", "/api/openapi.json")
        if response.is_error:
            parse_response(response)  # raises
    try:
        job_types = list(_iterate_job_types(response.json()["components"]["schemas"]))
    except (AttributeError, LookupError, TypeError, ValueError):
        raise build_unexpected_response_error(response) from None
    return sorted(job_types, key=lambda job_type: str(job_type["job_type"]))


def _iterate_job_types(schemas: Document) -> Iterator[Document]:
    for variant in _list_variants(schemas["JobBody"], schemas):
        properties = variant.get("properties", {})
        if name := properties.get("job_type", {}).get("const"):
            yield {"job_type": name, "parameters": list(_list_parameters(properties["parameters"], schemas))}


def _list_variants(schema: Document, schemas: Document) -> list[Document]:
    """Return the schemas that a schema combines, or itself."""
    resolved = _resolve(schema, schemas)
    keyword = next((keyword for keyword in ("anyOf", "oneOf", "allOf") if keyword in resolved), None)
    return [resolved] if keyword is None else [_resolve(choice, schemas) for choice in resolved[keyword]]


def _resolve(schema: Document, schemas: Document) -> Document:
    """Return a schema, or the one that it refers to."""
    resolved: Document = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    return resolved


def _list_parameters(schema: Document, schemas: Document) -> Iterator[Document]:
    """Yield the parameters of a job type, the required ones first.

    If there are several forms of parameters, a parameter is required that all forms require.
    """
    variants = _list_variants(schema, schemas)
    required = set.intersection(*(set(variant.get("required", ())) for variant in variants))
    fields = {name: field for variant in variants for name, field in variant.get("properties", {}).items()}
    for name, field in sorted(fields.items(), key=lambda item: item[0] not in required):
        default = field.get("x-default", field.get("default"))
        yield {
            "name": name,
            "type": _format_type(field, schemas),
            "required": name in required,
            "default": default,
            "description": _remove_default(field.get("description"), default),
        }


def _remove_default(description: str | None, default: object) -> str | None:
    """Return a description without the sentence about the default, which has its own column."""
    if description is None or default is None:
        return description
    return description.removesuffix(f"Default: `{json.dumps(default, ensure_ascii=False)}`.").rstrip() or None


def _format_type(field: Document, schemas: Document) -> str:
    for keyword in ("anyOf", "oneOf"):
        if keyword in field:
            return "|".join(_format_type(choice, schemas) for choice in field[keyword])
    if "enum" in field:
        return "|".join(json.dumps(value, ensure_ascii=False) for value in field["enum"])
    if "const" in field:
        return json.dumps(field["const"], ensure_ascii=False)
    if "$ref" in field:
        resolved = _resolve(field, schemas)
        return _format_type(resolved, schemas) if "enum" in resolved else str(field["$ref"]).rpartition("/")[2]
    return str(field.get("type", "any"))

"""cli: `jobledger webhooks …`: send them, look at them, send them again, try one."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Annotated, Any, Final
from urllib.parse import quote

import orjson
import typer
from rich.text import Text

from jobledger.cli.api_client import DEFAULT_URL, UrlOption, open_client, parse_response, without_none
from jobledger.cli.commands.resource_commands import format_iso_timestamp
from jobledger.cli.runtime import ConfigOption, JsonOption, load_settings, run_roles
from jobledger.cli.terminal_text import SafeConsole, SafeTable, echo, echo_json, echo_text
from jobledger.ledger.domain.errors import ConfigurationError

if TYPE_CHECKING:
    from jobledger.workers.webhooks.sender import WebhookRequest, WebhookResponse

app = typer.Typer(help="Webhooks: who was told what.", invoke_without_command=True)
_PATH: Final = "/api/monitoring/events/webhooks"
_ENDPOINTS: Final = "/api/monitoring/events/webhook-endpoints"
_STYLES: Final = {"delivered": "green", "pending": "yellow", "abandoned": "red"}
JobOption = Annotated[str | None, typer.Option("--job", help="Those that tell of this job.")]
BatchOption = Annotated[str | None, typer.Option("--batch", help="Those of this batch and its jobs.")]
HostOption = Annotated[str | None, typer.Option(help="Those to this host and port, such as example.org:443.")]


@app.callback()
def webhook_sender(context: typer.Context, config: ConfigOption = None) -> None:
    """Webhooks: who was told what. Without a command: send them from here, and nothing else."""
    if context.invoked_subcommand is None:
        run_roles(config, frozenset({"webhooks"}))


@app.command("list")
def list_deliveries(
    status: Annotated[str | None, typer.Option(help="pending, delivered or abandoned.")] = None,
    job: JobOption = None,
    batch: BatchOption = None,
    host: HostOption = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many, the newest first.")] = 50,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Show webhooks that were sent or are to be sent, and what became of them."""
    query = {"status": status, "job_id": job, "batch_id": batch, "host": host, "limit": limit}

    async def ask() -> dict[str, Any]:
        async with open_client(url) as client:
            return parse_response(await client.get(_PATH, params=without_none(query)), "deliveries", "total")

    found = asyncio.run(ask())
    if as_json:
        echo_json(orjson.dumps(found["deliveries"]))
    elif found["deliveries"]:
        SafeConsole().print(_table(found["deliveries"]))
        more = "more than " if found.get("total_is_lower_bound") else ""
        echo(f"{len(found['deliveries'])} of {more}{found['total']}")
    else:
        echo("There are none.")


@app.command()
def redeliver(
    ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Which ones.")] = None,
    status: Annotated[str | None, typer.Option(help="Without ids: those with this status.")] = None,
    job: JobOption = None,
    batch: BatchOption = None,
    host: HostOption = None,
    reason: Annotated[str | None, typer.Option(help="Why, for the record.")] = None,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Send webhooks again: those that are named, or, without ids, those that were given up and fit the options."""
    filters = without_none({"status": status, "job_id": job, "batch_id": batch, "host": host})
    if ids and filters:
        raise ConfigurationError("Name ids, or say which ones by options; both at once can be misunderstood.")
    if not ids and not filters:
        raise ConfigurationError("Which ones? Name ids, or for example --status abandoned for all that were given up.")

    async def ask() -> int:
        why = without_none({"reason": reason})
        async with open_client(url) as client:
            if not ids:
                answer = await client.post("/api/monitoring/events/redeliver", json=filters | why)
                return int(parse_response(answer, "redelivered")["redelivered"])
            for delivery_id in ids:
                parse_response(await client.post(f"{_PATH}/{delivery_id}/redeliver", json=why))
            return len(ids)

    number = asyncio.run(ask())
    if as_json:
        echo_json(orjson.dumps({"redelivered": number}))
    else:
        echo(f"{number} to be sent again.")


@app.command("test")
def send_test(
    endpoint_url: Annotated[str, typer.Argument(metavar="URL", help="Where to.")],
    header: Annotated[
        list[str] | None, typer.Option("--header", help="A header to send, such as 'X-Key: 1'. Repeatable.")
    ] = None,
    secret: Annotated[
        str | None,
        typer.Option(envvar="JOBLEDGER_WEBHOOK_SECRET", help="Signing secret. Prefer the environment variable."),
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send a webhook on trial, from here, by the same rules as real ones, and show the answer. Nothing is recorded."""
    from bson import ObjectId

    from jobledger.ledger.domain.webhook_headers import find_header_problem
    from jobledger.ledger.net.webhook_signature import build_signature_headers
    from jobledger.workers.webhooks.sender import WebhookRequest

    settings = load_settings(config).webhooks
    headers = dict(_header(text) for text in header or ())
    if (problem := find_header_problem(headers)) is not None:
        raise ConfigurationError(f"--header {problem[0]}: {problem[1]}")
    webhook_id = f"test-{ObjectId()}"
    body = orjson.dumps({"schema_version": 1, "type": "test", "delivery_id": webhook_id, "sequence": 0})
    try:
        signed = build_signature_headers([] if secret is None else [secret], webhook_id, int(time.time()), body)
    except ValueError as error:
        raise ConfigurationError(f"--secret: {error}") from None
    outgoing = WebhookRequest(endpoint_url, {**headers, "Content-Type": "application/json", **signed}, body)
    answer = asyncio.run(_send(outgoing, settings.allowed_private_hosts, settings.timeout_seconds))
    if as_json:
        told = {"status_code": answer.status_code, "error": answer.error_code, "message": answer.message}
        echo_json(orjson.dumps({**told, "response": answer.body, "duration_s": round(answer.duration_s, 3)}))
    else:
        what = f"{answer.status_code} " if answer.status_code is not None else ""
        echo(f"{what}{answer.message or 'delivered'} ({answer.duration_s:.2f} s)")
        if answer.body:
            echo_text(answer.body)
    raise typer.Exit(0 if answer.error_code is None else 1)


@app.command("endpoints")
def list_endpoints(url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
    """List the endpoints that webhooks go to"""

    async def ask() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        async with open_client(url) as client:
            while True:
                query = without_none({"limit": 1000, "after": found[-1]["endpoint_id"] if found else None})
                part = parse_response(await client.get(_ENDPOINTS, params=query), "endpoints")["endpoints"]
                found += part
                if len(part) < 1000:
                    return found

    found = asyncio.run(ask())
    if as_json:
        echo_json(orjson.dumps(found))
        return
    if not found:
        echo("No webhooks have been submitted.")
        return
    SafeConsole().print(_endpoints_table(found))


def _endpoints_table(found: list[dict[str, Any]]) -> SafeTable:
    table = SafeTable("endpoint_id", "user", "url", "created", "rotated", "old secret until")
    for it in found:
        created, rotated, until = (
            format_iso_timestamp(it[name]) if it[name] else ""
            for name in ("created_at", "rotated_at", "previous_secret_expires_at")
        )
        rotated = "revoked" if it["revoked"] else rotated
        table.add_row(it["endpoint_id"], it["user_id"], it["url"], created, rotated, until)
    return table


@app.command("rotate-secret")
def rotate_secret(
    endpoint_id: Annotated[str, typer.Argument(metavar="RECEIVER", help="As `webhooks endpoints` shows it.")],
    grace: Annotated[int, typer.Option(min=0, help="Seconds for which the old secret signs, too.")] = 86_400,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Give an endpoint a new signing secret and show it this once"""

    async def ask() -> dict[str, Any]:
        async with open_client(url) as client:
            path = f"{_ENDPOINTS}/{quote(endpoint_id, safe='')}/rotate-secret"
            return parse_response(await client.post(path, json={"grace_period_s": grace}), "secret")

    rotated = asyncio.run(ask())
    if as_json:
        echo_json(orjson.dumps({name: rotated[name] for name in ("endpoint_id", "url", "secret")}))
    else:
        echo(rotated["secret"])
        echo(f"Keep it: it is not shown again. The old one signs for {grace} more seconds.", err=True)


@app.command("revoke-secret")
def revoke_secret(
    endpoint_id: Annotated[str, typer.Argument(metavar="RECEIVER", help="As `webhooks endpoints` shows it.")],
    url: UrlOption = DEFAULT_URL,
) -> None:
    """Revoke the signing secrets of an endpoint; nothing is sent to it until its secret is rotated"""

    async def ask() -> None:
        async with open_client(url) as client:
            parse_response(await client.delete(f"{_ENDPOINTS}/{quote(endpoint_id, safe='')}/secret"))

    asyncio.run(ask())
    echo("Revoked. `jobledger webhooks rotate-secret` makes a new one.")


@app.command("secret")
def generate_secret() -> None:
    """Make a signing secret, for the `webhook.secrets` of a submission."""
    from jobledger.ledger.net.webhook_signature import generate_secret

    echo(generate_secret())


async def _send(outgoing: WebhookRequest, allowed_private_hosts: list[str], timeout_seconds: float) -> WebhookResponse:
    from jobledger.workers.webhooks.sender import Sender

    sender = Sender(allowed_private_hosts=allowed_private_hosts, timeout_seconds=timeout_seconds)
    try:
        return await sender.send(outgoing)
    finally:
        await sender.aclose()


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise ConfigurationError("--header: expected a name, a colon and a value, such as 'X-Key: 1'")
    return name.strip(), value.strip()


def _table(found: list[dict[str, Any]]) -> SafeTable:
    table = SafeTable("id", "event_type", "status", "attempts", "to", "what came of it")
    for it in found:
        last = it["attempts"][-1] if it["attempts"] else None
        outcome = "" if last is None else (last["error"]["message"] if last["error"] else str(last["status_code"]))
        if it["status"] == "pending" and it["next_attempt_at"]:
            outcome = f"{outcome}  next at {format_iso_timestamp(it['next_attempt_at'])}".strip()
        style = _STYLES[it["status"]]
        status = Text(it["status"], style=style)
        table.add_row(
            it["delivery_id"],
            it["type"],
            status,
            str(it["attempt"]),
            it["host"],
            outcome,
        )
    return table

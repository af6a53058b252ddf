"""`jobledger webhooks …`: inspect, test and redeliver webhooks, and manage signing secrets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final
from urllib.parse import quote

import orjson
import typer

from jobledger.cli.command_classes import CommandApp, use_options
from jobledger.cli.commands import resources
from jobledger.cli.commands.api_client import open_client, parse_response, remove_none
from jobledger.cli.commands.options import DEFAULT_URL, ConfigOption, JsonOption, UrlOption
from jobledger.cli.commands.resources import format_iso_timestamp
from jobledger.cli.exit_codes import EXIT_FAILED
from jobledger.cli.output.documents import Document, Rows, build_output
from jobledger.cli.output.formatting import format_count
from jobledger.cli.output.terminal_text import echo, echo_text, print_json, print_result
from jobledger.cli.runtime import load_settings
from jobledger.ledger.domain.errors import ConfigurationError
from jobledger.ledger.domain.statuses import DeliveryStatus

if TYPE_CHECKING:
    from jobledger.workers.webhooks.webhook_client import WebhookRequest, WebhookResponse

app = CommandApp(help="Inspect, test and redeliver webhooks, and manage signing secrets")
_DELIVERIES_PATH: Final = "/api/monitoring/events/webhooks"
_REDELIVER_PATH: Final = "/api/monitoring/events/redeliver"
_ENDPOINTS_PATH: Final = "/api/monitoring/events/webhook-endpoints"
_ENDPOINTS_PAGE_SIZE: Final = 1000
JobOption = Annotated[str | None, typer.Option("--job", help="Only deliveries for this job")]
BatchOption = Annotated[str | None, typer.Option("--batch", help="Only deliveries for this batch and its jobs")]
HostOption = Annotated[str | None, typer.Option(help="Only deliveries to this host and port, e.g. example.org:443")]
EndpointArgument = Annotated[str, typer.Argument(metavar="ENDPOINT_ID", help="See `webhooks endpoints`")]


@app.command("ls")
@use_options(output=build_output)
def list_deliveries(
    output: Any,
    status: Annotated[DeliveryStatus | None, typer.Option(help="Only deliveries with this status")] = None,
    job: JobOption = None,
    batch: BatchOption = None,
    host: HostOption = None,
    limit: resources.LimitOption = 50,
    url: UrlOption = DEFAULT_URL,
) -> None:
    """List webhook deliveries with their last result, newest first

    Filters are combined.

    Examples:
        jobledger webhooks ls --status abandoned
        jobledger webhooks ls --job job-6b0c8f1ab6b8bd45b167cb42 -o json
    """
    query = {"status": status, "job_id": job, "batch_id": batch, "host": host}
    deliveries, total = resources.fetch_list(url, _DELIVERIES_PATH, "deliveries", query, limit)
    plural = "webhook deliveries"
    resources.print_list(deliveries, total, build_delivery_rows, output, plural=plural, id_field="delivery_id")


@app.command()
def redeliver(
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID", help="Delivery IDs")] = None,
    status: Annotated[
        DeliveryStatus | None, typer.Option(help="Without IDs: only deliveries with this status. Default: abandoned")
    ] = None,
    job: JobOption = None,
    batch: BatchOption = None,
    host: HostOption = None,
    reason: resources.ReasonOption = None,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Redeliver webhooks

    Specify delivery IDs, or select deliveries with filters (default: abandoned).

    Examples:
        jobledger webhooks redeliver --status abandoned
        jobledger webhooks redeliver --host cms.example.org:443 --reason "the server is back"
    """
    filters = remove_none({"status": status, "job_id": job, "batch_id": batch, "host": host})
    if ids and filters:
        raise ConfigurationError("Delivery IDs and filters cannot be combined: use one of them.")
    if not ids and not filters:
        raise ConfigurationError(
            "Select deliveries by ID or with a filter, for example --status abandoned for all abandoned ones."
        )
    body, count = remove_none({"reason": reason}), len(ids or ())
    with open_client(url) as client:
        if not ids:
            response = client.post(_REDELIVER_PATH, json=filters | body)
            count = parse_response(response, "redelivered")["redelivered"]
        for delivery_id in ids or ():
            parse_response(client.post(f"{_DELIVERIES_PATH}/{delivery_id}/redeliver", json=body))
    text = f"Scheduled {format_count(count, 'delivery', 'deliveries')}."
    print_result({"redelivered": count}, text, as_json=as_json)


@app.command("test")
def send_test(
    endpoint_url: Annotated[str, typer.Argument(metavar="URL", help="URL of the endpoint")],
    header: Annotated[list[str] | None, typer.Option(help="Header to send, e.g. 'X-Key: 1'. Repeatable")] = None,
    secret: Annotated[
        str | None,
        typer.Option(envvar="JOBLEDGER_WEBHOOK_SECRET", help="Signing secret. Prefer the environment variable"),
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send a test webhook from this machine and show the response

    The same rules as for real webhooks apply. Nothing is recorded.

    Examples:
        jobledger webhooks test https://cms.example.org/hooks --header 'X-Key: 1'
    """
    settings = load_settings(config).webhooks
    request = _build_test_request(endpoint_url, header or (), secret)
    response = asyncio.run(_send(request, settings.allowed_private_hosts, settings.timeout_seconds))
    if as_json:
        print_json(
            {
                "status_code": response.status_code,
                "error": response.error_code,
                "message": response.message,
                "response": response.body,
                "duration_s": round(response.duration_s, 3),
            }
        )
    else:
        status = f"{response.status_code} " if response.status_code is not None else ""
        echo(f"{status}{response.message or 'delivered'} ({response.duration_s:.2f} s)")
        if response.body:
            echo_text(response.body)
    raise typer.Exit(0 if response.error_code is None else EXIT_FAILED)


def _build_test_request(url: str, header_options: Sequence[str], secret: str | None) -> WebhookRequest:
    from bson import ObjectId

    from jobledger.ledger.domain.webhook_headers import find_header_problem
    from jobledger.ledger.webhooks.signature import build_signature_headers
    from jobledger.workers.webhooks.webhook_client import WebhookRequest

    headers = dict(_parse_header(text) for text in header_options)
    if (problem := find_header_problem(headers)) is not None:
        raise ConfigurationError(f"--header {problem[0]}: {problem[1]}")
    webhook_id = f"test-{ObjectId()}"
    body = orjson.dumps({"schema_version": 1, "type": "test", "delivery_id": webhook_id, "sequence": 0})
    try:
        signature = build_signature_headers([] if secret is None else [secret], webhook_id, int(time.time()), body)
    except ValueError as error:
        raise ConfigurationError(f"--secret: {error}") from None
    return WebhookRequest(url, {**headers, "Content-Type": "application/json", **signature}, body)


async def _send(request: WebhookRequest, allowed_private_hosts: list[str], timeout_seconds: float) -> WebhookResponse:
    from jobledger.workers.webhooks.webhook_client import WebhookClient

    client = WebhookClient(allowed_private_hosts=allowed_private_hosts, timeout_seconds=timeout_seconds)
    try:
        return await client.send(request)
    finally:
        await client.aclose()


def _parse_header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise ConfigurationError("--header: expected a name, a colon and a value, such as 'X-Key: 1'.")
    return name.strip(), value.strip()


@app.command("endpoints")
@use_options(output=build_output)
def list_endpoints(output: Any, url: UrlOption = DEFAULT_URL) -> None:
    """List webhook endpoints

    Examples:
        jobledger webhooks endpoints
    """
    endpoints: list[Document] = []
    page: list[Document] | None = None
    with open_client(url) as client:
        while page is None or len(page) == _ENDPOINTS_PAGE_SIZE:
            after = page[-1]["endpoint_id"] if page else None
            query = remove_none({"limit": _ENDPOINTS_PAGE_SIZE, "after": after})
            page = parse_response(client.get(_ENDPOINTS_PATH, params=query), "endpoints")["endpoints"]
            endpoints += page
    rows = build_endpoint_rows
    output.print_list(endpoints, rows, id_field="endpoint_id", empty_text="No webhook endpoints.")


@app.command("rotate-secret")
def rotate_secret(
    endpoint_id: EndpointArgument,
    grace_seconds: Annotated[int, typer.Option(min=0, help="Seconds for which the old secret also signs")] = 86_400,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Replace the signing secret of an endpoint and print the new one once

    Examples:
        jobledger webhooks rotate-secret 0f6c1a2b3c4d5e6f70818283
    """
    path = f"{_ENDPOINTS_PATH}/{quote(endpoint_id, safe='')}/rotate-secret"
    with open_client(url) as client:
        rotated = parse_response(client.post(path, json={"grace_period_s": grace_seconds}), "secret")
    if as_json:
        print_json({"endpoint_id": rotated["endpoint_id"], "url": rotated["url"], "secret": rotated["secret"]})
    else:
        echo(rotated["secret"])
        echo(f"Store it: it is not shown again. The old secret also signs for {grace_seconds} seconds.", err=True)


@app.command("revoke-secret")
def revoke_secret(endpoint_id: EndpointArgument, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
    """Revoke the signing secrets of an endpoint immediately

    The endpoint receives no webhooks until its secret is rotated.

    Examples:
        jobledger webhooks revoke-secret 0f6c1a2b3c4d5e6f70818283
    """
    with open_client(url) as client:
        parse_response(client.delete(f"{_ENDPOINTS_PATH}/{quote(endpoint_id, safe='')}/secret"))
    text = "Revoked. `jobledger webhooks rotate-secret` creates a new secret."
    print_result({"revoked": endpoint_id}, text, as_json=as_json)


@app.command("generate-secret")
def generate_secret(as_json: JsonOption = False) -> None:
    """Generate a signing secret for `webhook.secrets` of a submission

    Examples:
        jobledger webhooks generate-secret
    """
    from jobledger.ledger.webhooks.signature import generate_secret as generate

    secret = generate()
    print_result({"secret": secret}, secret, as_json=as_json)


def build_delivery_rows(deliveries: Sequence[Document]) -> Rows:
    """Yield the header and the rows of the table of deliveries."""
    yield ("DELIVERY", "EVENT", "STATUS", "ATTEMPTS", "HOST", "LAST RESULT")
    for delivery in deliveries:
        yield (
            delivery["delivery_id"],
            delivery["type"],
            resources.format_status(delivery),
            str(delivery["attempt"]),
            delivery["host"],
            _format_last_result(delivery),
        )


def _format_last_result(delivery: Document) -> str:
    last: Any = delivery["attempts"][-1] if delivery["attempts"] else None
    result = "" if last is None else (last["error"]["message"] if last["error"] else str(last["status_code"]))
    if delivery["status"] == "pending" and delivery["next_attempt_at"]:
        return f"{result}  next at {format_iso_timestamp(delivery['next_attempt_at'])}".strip()
    return result


def build_endpoint_rows(endpoints: Sequence[Document]) -> Rows:
    """Yield the header and the rows of the table of endpoints."""
    yield ("ENDPOINT ID", "USER", "URL", "CREATED", "ROTATED", "OLD SECRET EXPIRES")
    for endpoint in endpoints:
        created, rotated, expires = (
            format_iso_timestamp(endpoint[name] or "")
            for name in ("created_at", "rotated_at", "previous_secret_expires_at")
        )
        rotated = "revoked" if endpoint["revoked"] else rotated
        yield (endpoint["endpoint_id"], endpoint["user_id"], endpoint["url"], created, rotated, expires)

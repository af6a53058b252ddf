"""Tests of `WebhookClient`: each call returns a clear result in time, and no private address is reached."""

from __future__ import annotations

import asyncio
import gzip
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from jobledger.ledger.net.url_policy import AllowedHosts, find_rejection_reason
from jobledger.workers.safe_http import Resolver
from jobledger.workers.webhooks.webhook_client import MAX_RESPONSE_BYTES, WebhookClient, WebhookRequest, WebhookResponse
from tests.support.polling import DEADLINE_SECONDS

BODY = b'{"type": "job.completed"}'
RESPONSE_TIMEOUT = 10.0  # for endpoints that respond, on a busy machine too
HANG_TIMEOUT = 0.5  # for endpoints that never finish their response
Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serve_connections(behave: Behaviour, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Listen on a port inside the block. All connections are closed after it."""
    connected: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connected.add(task)
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await behave(reader, writer)
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        listening.close()
        for task in connected:
            task.cancel()
        await asyncio.gather(*connected, return_exceptions=True)


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    return head + await reader.readexactly(len(BODY))


def respond(response: bytes, *, reset: bool = False, keep_open: bool = False) -> Behaviour:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(response)
        await writer.drain()
        if reset:
            reset_on_close = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset_on_close)
            writer.transport.abort()
        if keep_open:
            await reader.read()

    return behave


def respond_endlessly(first: bytes, repeated: bytes, pause: float = 0.0) -> Behaviour:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(first)
        while True:
            writer.write(repeated)
            await writer.drain()
            await asyncio.sleep(pause)

    return behave


def build_response(code: int, *lines: str, body: bytes = b"text") -> bytes:
    head = [f"HTTP/1.1 {code} X", f"Content-Length: {len(body)}", *lines, "", ""]
    return "\r\n".join(head).encode() + body


async def send(
    url: str,
    *,
    headers: dict[str, str] | None = None,
    resolver: Resolver | None = None,
    allow: tuple[str, ...] = (),
    timeout_seconds: float = RESPONSE_TIMEOUT,
) -> WebhookResponse:
    options = {} if resolver is None else {"resolver": resolver}
    client = WebhookClient(allowed_private_hosts=allow, timeout_seconds=timeout_seconds, **options)  # type: ignore[arg-type]
    started_at = time.monotonic()
    try:
        response = await client.send(WebhookRequest(url, headers or {}, BODY))
    finally:
        await client.aclose()
    assert response.duration_s <= time.monotonic() - started_at < timeout_seconds + 10
    assert (response.error_code is None) == (response.message is None)
    return response


async def send_to_server(
    behave: Behaviour,
    path: str = "/hook",
    headers: dict[str, str] | None = None,
    timeout_seconds: float = RESPONSE_TIMEOUT,
) -> WebhookResponse:
    async with serve_connections(behave) as port:
        url = f"http://127.0.0.1:{port}{path}"
        return await send(url, allow=("127.0.0.1",), headers=headers, timeout_seconds=timeout_seconds)


# Responses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [200, 201, 202, 204, 299])
async def test_send_with_2xx_response_succeeds(code: int) -> None:
    response = await send_to_server(respond(build_response(code, body=b"" if code == 204 else b"text")))
    assert (response.status_code, response.error_code, response.is_host_responsive, response.is_permanent) == (
        code,
        None,
        True,
        False,
    )
    assert response.body == ("" if code == 204 else "text")


@pytest.mark.parametrize(
    ("code", "error", "permanent"),
    [
        (301, "REDIRECT", False),
        (307, "REDIRECT", False),
        (400, "HTTP_ERROR", False),
        (404, "HTTP_ERROR", False),
        (410, "GONE", True),
        (429, "HTTP_ERROR", False),
        (500, "HTTP_ERROR", False),
        (503, "HTTP_ERROR", False),
    ],
)
async def test_send_with_other_status_fails_with_code_and_message(code: int, error: str, *, permanent: bool) -> None:
    response = await send_to_server(respond(build_response(code, "Location: http://127.0.0.1:1/elsewhere")))
    assert (response.status_code, response.error_code, response.is_permanent, response.is_host_responsive) == (
        code,
        error,
        permanent,
        True,
    )
    assert str(code) in (response.message or "")


async def test_send_reads_retry_after_in_both_forms() -> None:
    now = datetime.now(UTC)
    date, later = format_datetime(now, usegmt=True), format_datetime(now + timedelta(seconds=90), usegmt=True)
    earlier = format_datetime(now - timedelta(seconds=90), usegmt=True)
    for lines, seconds in (
        (["Retry-After: 7"], 7.0),
        ([f"Retry-After: {later}", f"Date: {date}"], 90.0),
        ([f"Retry-After: {earlier}", f"Date: {date}"], 0.0),
        (["Retry-After: soon"], None),
        (["Retry-After: -5"], None),
        ([], None),
    ):
        assert (await send_to_server(respond(build_response(503, *lines)))).retry_after_s == seconds


async def test_send_keeps_request_unchanged_but_sets_connection_headers() -> None:
    requests: list[bytes] = []

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await read_request(reader))
        writer.write(build_response(200))
        await writer.drain()

    headers = {"Authorization": "Bearer ä", "Host": "evil", "Content-Length": "1", "Transfer-Encoding": "chunked"}
    await send_to_server(behave, path="/hook?a=%20b&c=ü", headers=headers)
    [whole] = requests
    head, _, body = whole.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /hook?a=%20b&c=%C3%BC HTTP/1.1"
    assert body == BODY
    assert b"authorization: Bearer \xe4" in lines
    assert b"accept-encoding: identity" in lines
    assert f"content-length: {len(BODY)}".encode() in lines
    assert not any(b"evil" in line or b"chunked" in line for line in lines)


# Failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behave", "error"),
    [
        (respond(b"", keep_open=True), "TIMEOUT"),
        (respond(b"HTTP/1.1 200 OK\r\nX: ", keep_open=True), "TIMEOUT"),
        (respond(b"HTTP/1.1 200 OK\r\nContent-Le", reset=True), "CONNECTION_FAILED"),
        (respond(b"", reset=True), "CONNECTION_FAILED"),
        (respond(b""), "BAD_RESPONSE"),
        (respond(b"HTTP/1.1 200"), "BAD_RESPONSE"),
        (respond(b"220 mail.example.org ESMTP\r\n"), "BAD_RESPONSE"),
        (respond(b"HTTP/1.1 999999 X\r\n\r\n"), "BAD_RESPONSE"),
        (respond_endlessly(b"HTTP/1.1 200 OK\r\n", b"X-Header: " + b"x" * 1000 + b"\r\n"), "BAD_RESPONSE"),
        (respond_endlessly(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n", pause=0.001), "TIMEOUT"),
    ],
    ids=[
        "no response",
        "head unfinished",
        "reset in the head",
        "reset",
        "closed",
        "status line cut",
        "mail server",
        "invalid status",
        "endless head",
        "endless 1xx",
    ],
)
async def test_send_without_status_fails_with_the_cause(behave: Behaviour, error: str) -> None:
    timeout_seconds = HANG_TIMEOUT if error == "TIMEOUT" else RESPONSE_TIMEOUT
    response = await send_to_server(behave, timeout_seconds=timeout_seconds)
    assert (response.status_code, response.error_code, response.is_host_responsive, response.is_permanent) == (
        None,
        error,
        False,
        False,
    )
    assert "127.0.0.1" in (response.message or "")


@pytest.mark.parametrize(
    ("behave", "body"),
    [
        (respond(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\nhalf", reset=True), "half"),
        (respond(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\nhalf", keep_open=True), "half"),
        (respond_endlessly(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65536), "x" * MAX_RESPONSE_BYTES),
        (respond_endlessly(b"HTTP/1.1 200 OK\r\n\r\n", b"x", pause=0.05), "xx"),
    ],
    ids=["reset in the body", "body unfinished", "endless body", "slow body"],
)
async def test_send_with_status_and_broken_body_succeeds(behave: Behaviour, body: str) -> None:
    response = await send_to_server(behave, timeout_seconds=2 * HANG_TIMEOUT)
    assert (response.status_code, response.error_code) == (200, None)
    assert response.body.startswith(body) or body.startswith(response.body)
    assert len(response.body) <= MAX_RESPONSE_BYTES


async def test_response_body_is_not_decompressed_and_has_no_control_characters() -> None:
    packed = gzip.compress(b"\0" * 50_000_000)
    response = await send_to_server(respond(build_response(200, "Content-Encoding: gzip", body=packed)))
    assert response.error_code is None
    assert len(response.body) <= MAX_RESPONSE_BYTES
    response = await send_to_server(respond(build_response(200, body=b"\x1b[31mred\x00\xff\n")))
    assert response.body == "�[31mred��\n"


async def test_send_without_listener_or_address_fails_with_message() -> None:
    async with serve_connections(respond(b"")) as port:
        pass
    response = await send(f"http://127.0.0.1:{port}/", allow=("127.0.0.1",))
    assert (response.error_code, response.message) == ("CONNECTION_FAILED", "127.0.0.1 refused the connection.")

    async def fail_to_resolve(_host: str, _port: int) -> list[str]:
        raise OSError("no such name")

    response = await send("https://nowhere.example/", resolver=fail_to_resolve)
    assert response.error_code == "CONNECTION_FAILED"


async def test_send_to_host_with_untrusted_certificate_fails(tmp_path: Path) -> None:
    certificate, key = write_self_signed_certificate(tmp_path)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)
    async with serve_connections(respond(build_response(200)), tls) as port:
        response = await send(f"https://127.0.0.1:{port}/", allow=("127.0.0.1",))
    assert response.error_code == "CONNECTION_FAILED"
    assert "certificate" in (response.message or "")


def write_self_signed_certificate(directory: Path) -> tuple[Path, Path]:
    """Write a self-signed certificate for this machine, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (directory / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    encoding, key_format, no_encryption = (
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (directory / "key.pem").write_bytes(key.private_bytes(encoding, key_format, no_encryption))
    return directory / "certificate.pem", directory / "key.pem"


@pytest.mark.parametrize("headers", [{"X": "a\r\nY: b"}, {"X Y": "a"}, {"X": "😀"}])
async def test_send_with_invalid_headers_returns_an_error(headers: dict[str, str]) -> None:
    async with serve_connections(respond(build_response(200))) as port:
        response = await send(f"http://127.0.0.1:{port}/", allow=("127.0.0.1",), headers=headers)
    assert response.error_code is not None


# Addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "[::1]", "[::]", "[fe80::1]", "[fc00::1]", "[::ffff:127.0.0.1]", "[::ffff:10.0.0.1]", "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]", "[ff02::1]",
    ],
)  # fmt: skip
async def test_send_to_non_public_address_is_rejected(host: str) -> None:
    response = await send(f"http://{host}:8080/")
    assert response.error_code == "ADDRESS_REJECTED"
    assert "allowed_private_hosts" in (response.message or "")
    assert (response.is_host_responsive, response.is_permanent) == (True, False)


@pytest.mark.parametrize("url", ["http://2130706433/", "http://0x7f.1/", "http://127.1/", "http://localhost:8080/"])
async def test_send_to_other_spelling_of_loopback_is_rejected(url: str) -> None:
    assert (await send(url)).error_code in ("ADDRESS_REJECTED", "CONNECTION_FAILED")


async def test_send_checks_the_address_it_connects_to() -> None:
    """A name may resolve to a public address at submission and to this machine later (DNS rebinding)."""
    reached = asyncio.Event()

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reached.set()
        await read_request(reader)

    resolved_hosts: list[str] = []

    async def resolve_rebinding(host: str, _port: int) -> list[str]:
        resolved_hosts.append(host)
        return ["93.184.216.34"] if len(resolved_hosts) > 1 else ["127.0.0.1"]

    async with serve_connections(behave) as port:
        url = f"http://rebinding.example:{port}/"
        assert find_rejection_reason(url, AllowedHosts(())) is None
        response = await send(url, resolver=resolve_rebinding)
    assert response.error_code == "ADDRESS_REJECTED"
    assert resolved_hosts == ["rebinding.example"], "resolved once: the checked address is the one to connect to"
    assert not reached.is_set()


async def test_send_to_name_with_mixed_addresses_calls_only_public_ones() -> None:
    reached = asyncio.Event()

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reached.set()

    async def resolve_both(_host: str, _port: int) -> list[str]:
        return ["127.0.0.1", "192.0.2.1", "203.0.113.1"]

    async with serve_connections(behave) as port:
        response = await send(f"http://both.example:{port}/", resolver=resolve_both, timeout_seconds=HANG_TIMEOUT)
    assert response.error_code in ("TIMEOUT", "CONNECTION_FAILED", "ADDRESS_REJECTED")
    assert not reached.is_set()


@pytest.mark.parametrize("allow", ["127.0.0.1", "127.0.0.0/8", "hook.internal"])
async def test_send_to_allowed_private_host_succeeds(allow: str) -> None:
    async def resolve_loopback(_host: str, _port: int) -> list[str]:
        return ["127.0.0.1"]

    async with serve_connections(respond(build_response(200))) as port:
        response = await send(f"http://hook.internal:{port}/", resolver=resolve_loopback, allow=(allow,))
    assert response.error_code is None


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("ftp://example.org/", "BAD_URL"),
        ("file:///etc/passwd", "BAD_URL"),
        ("gopher://example.org/", "BAD_URL"),
        ("https://", "BAD_URL"),
        ("nonsense", "BAD_URL"),
        ("https://user:pw@example.org/", "BAD_URL"),
        ("https://example.org:99999/", "BAD_URL"),
        ("https://[::1/", "BAD_URL"),
        ("https://example.org:22/", "PORT_REJECTED"),
        ("https://example.org:25/", "PORT_REJECTED"),
    ],
)
async def test_send_with_bad_url_or_port_is_rejected(url: str, error: str) -> None:
    response = await send(url)
    assert response.error_code == error
    assert "pw" not in (response.message or "")
    assert response.is_permanent == (error == "BAD_URL")


async def test_send_when_cancelled_closes_the_connection() -> None:
    received, closed = asyncio.Event(), asyncio.Event()

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        received.set()
        await reader.read()
        closed.set()

    async with serve_connections(behave) as port:
        client = WebhookClient(allowed_private_hosts=("127.0.0.1",), timeout_seconds=60)
        sending = asyncio.create_task(client.send(WebhookRequest(f"http://127.0.0.1:{port}/", {}, BODY)))
        async with asyncio.timeout(DEADLINE_SECONDS):
            await received.wait()
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        assert sending.cancelled()
        async with asyncio.timeout(DEADLINE_SECONDS):
            await closed.wait()
        await client.aclose()

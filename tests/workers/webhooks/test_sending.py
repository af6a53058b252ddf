"""One call of a receiver: whatever it does, there is a clear answer, in time, and nothing private is reached."""

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

from jobledger.ledger.net.url_policy import AllowedHosts, rejection_reason
from jobledger.workers.safe_http import Resolver
from jobledger.workers.webhooks.sender import MAX_RESPONSE_BYTES, Sender, WebhookRequest, WebhookResponse

BODY = b'{"type": "job.completed"}'
TIMEOUT = 0.5
Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def server(behave: Behaviour, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Listen on a port; behind the block, nobody is left connected."""
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


async def request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    return head + await reader.readexactly(len(BODY))


def says(answer: bytes, *, reset: bool = False, stay: bool = False) -> Behaviour:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(answer)
        await writer.drain()
        if reset:
            at_once = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
            writer.transport.abort()
        if stay:
            await reader.read()

    return behave


def endlessly(first: bytes, again: bytes, pause: float = 0.0) -> Behaviour:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(first)
        while True:
            writer.write(again)
            await writer.drain()
            await asyncio.sleep(pause)

    return behave


def status(code: int, *lines: str, body: bytes = b"said") -> bytes:
    head = [f"HTTP/1.1 {code} X", f"Content-Length: {len(body)}", *lines, "", ""]
    return "\r\n".join(head).encode() + body


async def send(
    url: str, *, headers: dict[str, str] | None = None, resolve: Resolver | None = None, allow: tuple[str, ...] = ()
) -> WebhookResponse:
    options = {} if resolve is None else {"resolver": resolve}
    sender = Sender(allowed_private_hosts=allow, timeout_seconds=TIMEOUT, **options)  # type: ignore[arg-type]
    begun = time.monotonic()
    try:
        answer = await sender.send(WebhookRequest(url, headers or {}, BODY))
    finally:
        await sender.aclose()
    assert time.monotonic() - begun < TIMEOUT + 1.5
    assert answer.duration_s < TIMEOUT + 1.5
    assert (answer.error_code is None) == (answer.message is None)
    return answer


async def from_server(behave: Behaviour, path: str = "/hook", **options: str) -> WebhookResponse:
    async with server(behave) as port:
        return await send(f"http://127.0.0.1:{port}{path}", allow=("127.0.0.1",), headers=dict(options))


# What it says -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [200, 201, 202, 204, 299])
async def test_every_2xx_is_a_success(code: int) -> None:
    answer = await from_server(says(status(code, body=b"" if code == 204 else b"said")))
    assert (answer.status_code, answer.error_code, answer.is_host_responsive, answer.is_permanent) == (
        code,
        None,
        True,
        False,
    )
    assert answer.body == ("" if code == 204 else "said")


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
async def test_everything_else_is_none_and_says_what(code: int, error: str, *, permanent: bool) -> None:
    answer = await from_server(says(status(code, "Location: http://127.0.0.1:1/elsewhere")))
    assert (answer.status_code, answer.error_code, answer.is_permanent, answer.is_host_responsive) == (
        code,
        error,
        permanent,
        True,
    )
    assert str(code) in (answer.message or "")


async def test_when_to_come_again_is_understood_in_both_forms() -> None:
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
        assert (await from_server(says(status(503, *lines)))).retry_after_s == seconds


async def test_what_is_sent_is_what_was_given_and_headers_of_the_connection_are_ours() -> None:
    seen: list[bytes] = []

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await request(reader))
        writer.write(status(200))
        await writer.drain()

    given = {"Authorization": "Bearer ä", "Host": "evil", "Content-Length": "1", "Transfer-Encoding": "chunked"}
    await from_server(behave, path="/hook?a=%20b&c=ü", **given)
    [whole] = seen
    head, _, body = whole.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /hook?a=%20b&c=%C3%BC HTTP/1.1"
    assert body == BODY
    assert b"authorization: Bearer \xe4" in lines
    assert b"accept-encoding: identity" in lines
    assert f"content-length: {len(BODY)}".encode() in lines
    assert not any(b"evil" in line or b"chunked" in line for line in lines)


# What it does -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behave", "error"),
    [
        (says(b"", stay=True), "TIMEOUT"),
        (says(b"HTTP/1.1 200 OK\r\nX: ", stay=True), "TIMEOUT"),
        (says(b"HTTP/1.1 200 OK\r\nContent-Le", reset=True), "CONNECTION_FAILED"),
        (says(b"", reset=True), "CONNECTION_FAILED"),
        (says(b""), "BAD_RESPONSE"),
        (says(b"HTTP/1.1 200"), "BAD_RESPONSE"),
        (says(b"220 mail.example.org ESMTP\r\n"), "BAD_RESPONSE"),
        (says(b"HTTP/1.1 999999 X\r\n\r\n"), "BAD_RESPONSE"),
        (endlessly(b"HTTP/1.1 200 OK\r\n", b"X-Header: " + b"x" * 1000 + b"\r\n"), "BAD_RESPONSE"),
        (endlessly(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n", pause=0.001), "TIMEOUT"),
    ],
    ids=["hangs", "hangs in the head", "reset in the head", "reset", "closed", "half", "mail", "status", "head", "1xx"],
)
async def test_what_gives_no_answer_is_told_as_what_it_is(behave: Behaviour, error: str) -> None:
    answer = await from_server(behave)
    assert (answer.status_code, answer.error_code, answer.is_host_responsive, answer.is_permanent) == (
        None,
        error,
        False,
        False,
    )
    assert "127.0.0.1" in (answer.message or "")


@pytest.mark.parametrize(
    ("behave", "body"),
    [
        (says(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\nhalf", reset=True), "half"),
        (says(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\nhalf", stay=True), "half"),
        (endlessly(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65536), "x" * MAX_RESPONSE_BYTES),
        (endlessly(b"HTTP/1.1 200 OK\r\n\r\n", b"x", pause=0.05), "xx"),
    ],
    ids=["reset in the body", "hangs in the body", "endless", "drips"],
)
async def test_once_the_status_is_there_it_counts_whatever_becomes_of_the_rest(behave: Behaviour, body: str) -> None:
    answer = await from_server(behave)
    assert (answer.status_code, answer.error_code) == (200, None)
    assert answer.body.startswith(body) or body.startswith(answer.body)
    assert len(answer.body) <= MAX_RESPONSE_BYTES


async def test_a_compressed_answer_is_not_unpacked_and_nothing_in_it_steers_a_terminal() -> None:
    packed = gzip.compress(b"\0" * 50_000_000)
    answer = await from_server(says(status(200, "Content-Encoding: gzip", body=packed)))
    assert answer.error_code is None
    assert len(answer.body) <= MAX_RESPONSE_BYTES
    answer = await from_server(says(status(200, body=b"\x1b[31mred\x00\xff\n")))
    assert answer.body == "�[31mred��\n"


async def test_nobody_there_is_told_in_words() -> None:
    async with server(says(b"")) as port:
        pass
    answer = await send(f"http://127.0.0.1:{port}/", allow=("127.0.0.1",))
    assert (answer.error_code, answer.message) == ("CONNECTION_FAILED", "127.0.0.1 refused the connection.")

    async def nowhere(_host: str, _port: int) -> list[str]:
        raise OSError("no such name")

    answer = await send("https://nowhere.example/", resolve=nowhere)
    assert answer.error_code == "CONNECTION_FAILED"


async def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)
    async with server(says(status(200)), tls) as port:
        answer = await send(f"https://127.0.0.1:{port}/", allow=("127.0.0.1",))
    assert answer.error_code == "CONNECTION_FAILED"
    assert "certificate" in (answer.message or "")


def self_signed(directory: Path) -> tuple[Path, Path]:
    """Write a certificate for this machine that only we vouch for, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (directory / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    encoding, form, nothing = (
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (directory / "key.pem").write_bytes(key.private_bytes(encoding, form, nothing))
    return directory / "certificate.pem", directory / "key.pem"


@pytest.mark.parametrize("headers", [{"X": "a\r\nY: b"}, {"X Y": "a"}, {"X": "😀"}])
async def test_headers_that_cannot_be_sent_are_an_answer_too(headers: dict[str, str]) -> None:
    async with server(says(status(200))) as port:
        answer = await send(f"http://127.0.0.1:{port}/", allow=("127.0.0.1",), headers=headers)
    assert answer.error_code is not None


# Where it is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "[::1]", "[::]", "[fe80::1]", "[fc00::1]", "[::ffff:127.0.0.1]", "[::ffff:10.0.0.1]", "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]", "[ff02::1]",
    ],
)  # fmt: skip
async def test_addresses_that_are_not_public_are_refused(host: str) -> None:
    answer = await send(f"http://{host}:8080/")
    assert answer.error_code == "ADDRESS_REJECTED"
    assert "allowed_private_hosts" in (answer.message or "")
    assert (answer.is_host_responsive, answer.is_permanent) == (True, False)


@pytest.mark.parametrize("url", ["http://2130706433/", "http://0x7f.1/", "http://127.1/", "http://localhost:8080/"])
async def test_other_spellings_of_this_machine_are_refused_when_connecting(url: str) -> None:
    assert (await send(url)).error_code in ("ADDRESS_REJECTED", "CONNECTION_FAILED")


async def test_what_counts_is_the_address_that_is_connected_to() -> None:
    """A name that was public when it was submitted, and leads here now: nothing arrives."""
    reached = asyncio.Event()

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reached.set()
        await request(reader)

    asked: list[str] = []

    async def rebound(host: str, _port: int) -> list[str]:
        asked.append(host)
        return ["93.184.216.34"] if len(asked) > 1 else ["127.0.0.1"]

    async with server(behave) as port:
        url = f"http://rebinding.example:{port}/"
        assert rejection_reason(url, AllowedHosts(())) is None
        answer = await send(url, resolve=rebound)
    assert answer.error_code == "ADDRESS_REJECTED"
    assert asked == ["rebinding.example"], "asked once, and what was said is what was checked and would be connected to"
    assert not reached.is_set()


async def test_of_a_name_with_both_only_the_public_address_is_called() -> None:
    reached = asyncio.Event()

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reached.set()

    async def both(_host: str, _port: int) -> list[str]:
        return ["127.0.0.1", "192.0.2.1", "203.0.113.1"]

    async with server(behave) as port:
        answer = await send(f"http://both.example:{port}/", resolve=both)
    assert answer.error_code in ("TIMEOUT", "CONNECTION_FAILED", "ADDRESS_REJECTED")
    assert not reached.is_set()


@pytest.mark.parametrize("allow", ["127.0.0.1", "127.0.0.0/8", "hook.internal"])
async def test_what_the_operator_allows_is_called(allow: str) -> None:
    async def here(_host: str, _port: int) -> list[str]:
        return ["127.0.0.1"]

    async with server(says(status(200))) as port:
        answer = await send(f"http://hook.internal:{port}/", resolve=here, allow=(allow,))
    assert answer.error_code is None


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
async def test_addresses_that_are_none_are_told(url: str, error: str) -> None:
    answer = await send(url)
    assert answer.error_code == error
    assert "pw" not in (answer.message or "")
    assert answer.is_permanent == (error == "BAD_URL")


async def test_giving_up_waiting_closes_the_connection() -> None:
    gone = asyncio.Event()

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        await reader.read()
        gone.set()

    async with server(behave) as port:
        sender = Sender(allowed_private_hosts=("127.0.0.1",), timeout_seconds=20)
        sending = asyncio.create_task(sender.send(WebhookRequest(f"http://127.0.0.1:{port}/", {}, BODY)))
        await asyncio.sleep(0.1)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        assert sending.cancelled()
        async with asyncio.timeout(5):
            await gone.wait()
        await sender.aclose()

"""Downloads of untrusted URLs: address policy, limits, and the error of each failure."""

from __future__ import annotations

import asyncio
import gzip
import socket
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import brotli  # type: ignore[import-untyped]  # it ships no types
import lxml.html  # type: ignore[import-untyped]  # has no types
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from jobledger.ledger.net.url_policy import AllowedHosts
from jobledger.workers.processor import ProcessorError
from jobledger.workers.processors.session.fetcher import Fetcher, FetchResult, format_bytes
from jobledger.workers.processors.session.html_markdown import convert_html_to_markdown
from jobledger.workers.processors.session.partial_file import PartialFile
from jobledger.workers.processors.session.safe_markdown import escape_link_target
from jobledger.workers.safe_http import Endpoint, Resolver, resolve_host
from tests.processors.session.fixtures import (
    Site,
    SiteResponse,
    html,
    make_settings,
    redirect,
    serve_site,
    without_deadline,
)


async def fetch(
    url: str, *, resolve: Resolver = resolve_host, target: Path | None = None, **changes: Any
) -> FetchResult:
    limits = {"max_bytes": changes.pop("max_bytes", 1_000_000), "timeout_seconds": changes.pop("timeout_seconds", 60)}
    limits["allow_partial"] = changes.pop("allow_partial", False)
    return await Fetcher(make_settings(**changes), resolve=resolve).fetch(
        url, target=PartialFile(target) if target else None, **limits
    )


@asynccontextmanager
async def serve_bytes(response: bytes) -> AsyncIterator[str]:
    """Send these bytes to every client, and close the connection."""

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(response)
        writer.close()

    async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"


async def fetch_error(url: str, **changes: Any) -> ProcessorError:
    with pytest.raises(ProcessorError) as caught:
        await fetch(url, **changes)
    return caught.value


async def test_fetch_returns_body_or_writes_target_file(site: Site, tmp_path: Path) -> None:
    url = site.put("/data", SiteResponse(b"x" * 200_000, headers={"Content-Type": "Text/Plain; charset=x"}))
    in_memory = await fetch(url)
    assert (in_memory.body, in_memory.media_type) == (b"x" * 200_000, "text/plain")
    in_file = await fetch(url, target=tmp_path / "data")
    assert (in_file.body, in_file.size) == (b"", 200_000)
    assert (tmp_path / "data").read_bytes() == b"x" * 200_000


@pytest.mark.parametrize(
    ("status", "transient"),
    [
        (400, False),
        (403, False),
        (404, False),
        (410, False),
        (408, True),
        (425, True),
        (429, True),
        (500, True),
        (503, True),
    ],
)
async def test_http_error_is_transient_for_some_status_codes(status: int, transient: bool, site: Site) -> None:
    error = await fetch_error(site.put("/page", html("no", status=status)))
    assert (error.code, error.transient, error.details["status_code"]) == ("HTTP_ERROR", transient, status)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("120", 120), ("Wed, 21 Oct 2015 07:29:00 GMT", 60), ("Wed, 21 Oct 2015 07:27:00 GMT", 0), ("soon", None)],
)
async def test_retry_after_header_is_reported_in_seconds(header: str, seconds: int | None, site: Site) -> None:
    response = SiteResponse(status=503, headers={"Retry-After": header, "Date": "Wed, 21 Oct 2015 07:28:00 GMT"})
    error = await fetch_error(site.put("/busy", response))
    assert error.details.get("retry_after") == seconds


async def test_unknown_host_is_transient_dns_error(site: Site) -> None:
    async def resolve_nothing(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    error = await fetch_error("http://no-such-conference.example/talk", resolve=resolve_nothing)
    assert (error.code, error.transient, error.details["reason"]) == ("NETWORK_ERROR", True, "dns")
    assert "no-such-conference.example could not be found" in error.message


async def test_refused_connection_is_transient_error() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        error = await fetch_error(f"http://127.0.0.1:{unused.getsockname()[1]}/")
    assert (error.code, error.transient, error.details["reason"]) == ("NETWORK_ERROR", True, "refused")


async def test_truncated_body_is_transient_error(site: Site) -> None:
    error = await fetch_error(site.put("/half", SiteResponse(b"half", content_length=8)))
    assert (error.code, error.transient) == ("NETWORK_ERROR", True)


async def test_silent_server_is_transient_timeout(site: Site) -> None:
    url = site.put_hanging("/silent")
    for limits in ({"read_timeout_seconds": 0.1}, {"timeout_seconds": 0.1}):
        error = await fetch_error(url, **limits)
        assert (error.code, error.transient) == ("FETCH_TIMEOUT", True)


async def test_https_to_http_port_is_tls_error(site: Site) -> None:
    error = await fetch_error(f"https://127.0.0.1:{site.port}/")
    assert (error.code, error.details["reason"]) == ("NETWORK_ERROR", "tls")


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/x", "http://[::ffff:127.0.0.1]:{port}/x"])
async def test_private_address_is_rejected_before_any_request(url: str, site: Site) -> None:
    error = await fetch_error(url.format(port=site.port), allowed_private_hosts=[])
    assert (error.code, error.transient) == ("ADDRESS_REJECTED", False)
    assert site.requested_paths == []


async def test_name_of_private_address_is_rejected(site: Site) -> None:
    error = await fetch_error(f"http://localhost:{site.port}/x", allowed_private_hosts=["10.0.0.0/8"])
    assert (error.code, error.details["host"]) == ("ADDRESS_REJECTED", "localhost")
    assert site.requested_paths == []


async def test_private_host_can_be_allowed_by_name(site: Site) -> None:
    site.put("/x", html("<p>hello</p>"))

    async def resolve_to_site(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    url = f"http://intranet.example:{site.port}/x"
    assert (await fetch(url, resolve=resolve_to_site, allowed_private_hosts=["Intranet.example"])).size == 12
    assert (
        await fetch_error(url, resolve=resolve_to_site, allowed_private_hosts=["other.example"])
    ).code == "ADDRESS_REJECTED"


async def test_redirect_to_private_address_is_rejected(site: Site) -> None:
    async def resolve_inside_to_private(host: str, port: int) -> list[str]:
        return {"conference.example": ["127.0.0.1"]}.get(host, ["127.0.0.2"])

    site.put("/start", redirect(f"http://inside.example:{site.port}/secret"))
    error = await fetch_error(
        f"http://conference.example:{site.port}/start",
        resolve=resolve_inside_to_private,
        allowed_private_hosts=["conference.example"],
    )
    assert (error.code, error.details["address"]) == ("ADDRESS_REJECTED", "127.0.0.2")
    assert site.requested_paths == ["/start"]


async def test_restricted_fetcher_reaches_only_the_endpoint_of_the_page(site: Site) -> None:
    """A script must not use other allowed services by a redirect or by a name that changes its address."""
    addresses = {"page.example": "127.0.0.1", "other.example": "127.0.0.1"}

    async def resolve(host: str, port: int) -> list[str]:
        return [addresses.get(host, host)]

    fetcher = Fetcher(make_settings(allowed_private_hosts=["127.0.0.0/8"]), resolve=resolve)
    limits: dict[str, Any] = {"max_bytes": 1000, "timeout_seconds": 10}
    url = f"http://page.example:{site.port}"
    site.put("/page", html("page"))
    page = await fetcher.fetch(f"{url}/page", **limits)
    assert page.endpoint == Endpoint("page.example", site.port, "127.0.0.1")
    restricted = fetcher.restrict_to(page.endpoint)
    assert (await restricted.fetch(f"{url}/page", **limits)).body == b"page"
    with serve_site() as service:
        secret = service.put("/secret", html("secret"))
        for target in (secret, secret.replace("127.0.0.1", "page.example"), f"http://other.example:{site.port}/page"):
            site.put("/redirect", redirect(target))
            for start in (target, f"{url}/redirect"):
                with pytest.raises(ProcessorError) as caught:
                    await restricted.fetch(start, **limits)
                assert caught.value.code == "ADDRESS_REJECTED"
        assert service.requested_paths == []
    addresses["page.example"] = "127.0.0.2"
    with pytest.raises(ProcessorError) as caught:
        await restricted.fetch(f"{url}/page", **limits)
    assert caught.value.details["address"] == "127.0.0.2"
    with pytest.raises(ProcessorError):
        await fetcher.restrict_to(None).fetch(site.url("/page"), **limits)


async def test_redirect_resolves_and_checks_the_name_again(site: Site) -> None:
    addresses = [["127.0.0.1"], ["10.1.2.3"]]

    async def resolve_next(host: str, port: int) -> list[str]:
        return addresses.pop(0)

    site.put("/start", redirect("/again"))
    error = await fetch_error(f"http://rebind.example:{site.port}/start", resolve=resolve_next)
    assert (error.code, error.details["address"]) == ("ADDRESS_REJECTED", "10.1.2.3")
    assert site.requested_paths == ["/start"]


async def test_connection_uses_the_address_that_was_checked(site: Site) -> None:
    resolved_hosts = []

    async def resolve(host: str, port: int) -> list[str]:
        resolved_hosts.append(host)
        return ["127.0.0.1"] if len(resolved_hosts) == 1 else ["10.1.2.3"]

    site.put("/x", html("<p>hello</p>"))
    assert (await fetch(f"http://conference.example:{site.port}/x", resolve=resolve)).size == 12
    assert resolved_hosts == ["conference.example"]


async def test_second_address_is_used_if_first_refuses_connection(site: Site) -> None:
    async def resolve_two(host: str, port: int) -> list[str]:
        return ["127.0.0.9", "127.0.0.1"]

    site.put("/x", html("<p>hello</p>"))
    assert (
        await fetch(f"http://two.example:{site.port}/x", resolve=resolve_two, allowed_private_hosts=["127.0.0.0/8"])
    ).size == 12


async def test_redirects_are_followed_to_the_last_url(site: Site) -> None:
    site.put("/a", redirect("/b"))
    site.put("/b", redirect(site.url("/c")))
    site.put("/c", html("<p>end</p>"))
    assert (await fetch(site.url("/a"))).url == site.url("/c")


async def test_redirect_loop_ends_with_too_many_redirects(site: Site) -> None:
    error = await fetch_error(site.put("/round", redirect("/round")))
    assert (error.code, error.transient) == ("TOO_MANY_REDIRECTS", False)
    assert len(site.requested_paths) == 6


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://conference.example/", "javascript:alert(1)"])
async def test_redirect_to_other_scheme_is_rejected(target: str, site: Site) -> None:
    assert (await fetch_error(site.put("/odd", redirect(target)))).code == "BAD_URL"


@pytest.mark.parametrize(
    "url", ["ftp://conference.example/x", "file:///etc/passwd", "http://", "talk.html", "http://[::1/"]
)
async def test_url_that_is_not_http_is_rejected(url: str) -> None:
    assert (await fetch_error(url)).code == "BAD_URL"


async def test_content_length_over_limit_is_rejected(site: Site) -> None:
    error = await fetch_error(site.put("/big", SiteResponse(b"x", content_length=10**15)), max_bytes=100)
    assert (error.code, error.transient, error.details["max_bytes"]) == ("TOO_LARGE", False, 100)


async def test_body_that_decompresses_over_limit_is_rejected(site: Site) -> None:
    bomb = gzip.compress(b"\0" * 50_000_000)
    assert len(bomb) < 100_000
    error = await fetch_error(
        site.put("/bomb", SiteResponse(bomb, headers={"Content-Encoding": "gzip"})), max_bytes=1_000_000
    )
    assert error.code == "TOO_LARGE"


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(b"hello " * 50_000)),
        ("deflate", zlib.compress(b"hello " * 50_000)),
        ("gzip", gzip.compress(b"hello " * 20_000) + gzip.compress(b"hello " * 30_000)),
        ("br", brotli.compress(b"hello " * 50_000)),
        ("ZSTD", zstandard.compress(b"hello " * 50_000)),
        ("gzip, br", brotli.compress(gzip.compress(b"hello " * 50_000))),
        ("gzip", gzip.compress(b"hello " * 50_000) + b"garbage"),
    ],
    ids=["gzip", "deflate", "members", "br", "zstd", "chain", "garbage"],
)
async def test_compressed_body_is_decompressed_completely(encoding: str, body: bytes, site: Site) -> None:
    url = site.put("/packed", SiteResponse(body, headers={"Content-Encoding": encoding}))
    assert (await fetch(url)).body == b"hello " * 50_000


async def test_truncated_compressed_body_is_transient_error(site: Site) -> None:
    body = gzip.compress(bytes(range(256)) * 100)[:-20]
    error = await fetch_error(site.put("/packed", SiteResponse(body, headers={"Content-Encoding": "gzip"})))
    assert (error.code, error.transient) == ("NETWORK_ERROR", True)


async def test_unsupported_content_encoding_is_rejected(site: Site) -> None:
    error = await fetch_error(site.put("/odd", SiteResponse(b"...", headers={"Content-Encoding": "gzip, compress"})))
    assert (error.code, error.transient, error.details["encoding"]) == ("BAD_RESPONSE", False, "compress")
    assert "the content encoding 'compress'. Supported are gzip, deflate, br, zstd." in error.message


TALK = b"".join(b"<p>Entry %d of the ledger." % (number**5 % 99991) for number in range(1000))


def wrap_http(head: str, body: bytes) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n{head}\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    ("response", "received"),
    [
        (wrap_http("Content-Length: 99999", TALK), TALK),
        (wrap_http("Transfer-Encoding: chunked", b"%x\r\n%b\r\n" % (len(TALK), TALK)), TALK),
        (wrap_http("Transfer-Encoding: chunked", b"%x\r\n%b" % (2 * len(TALK), TALK)), TALK),
        (wrap_http("Transfer-Encoding: chunked", b"%x\r\n%b\r\nno number\r\n" % (len(TALK), TALK)), TALK),
        (wrap_http("Content-Encoding: br", brotli.compress(TALK)[:-2]), TALK),
        (wrap_http("Content-Encoding: gzip", gzip.compress(TALK)[:-8] + bytes(8)), TALK),
    ],
    ids=["length", "last chunk", "chunk", "chunk size", "br", "checksum"],
)
async def test_cut_or_damaged_body_is_error_or_partial_result(response: bytes, received: bytes, tmp_path: Path) -> None:
    async with serve_bytes(response) as url:
        error = await fetch_error(url)
        assert error.code in ("NETWORK_ERROR", "BAD_RESPONSE")
        partial = await fetch(url, allow_partial=True)
        assert (partial.is_complete, str(partial.error)) == (False, str(error))
        assert received.startswith(partial.body)
        assert len(partial.body) > len(received) - 100
        in_file = await fetch(url, allow_partial=True, target=tmp_path / "page")
        assert (in_file.size, in_file.is_complete) == (len(partial.body), False)


@pytest.mark.parametrize(
    "response",
    [
        wrap_http("Content-Length: 100", b""),
        wrap_http("Content-Encoding: gzip", b"<p>not compressed"),
        wrap_http("Content-Encoding: gzip", b"\x1f\x8b"),
    ],
    ids=["nothing received", "not compressed", "header only"],
)
async def test_body_of_which_nothing_is_readable_is_error_even_if_partial_is_allowed(response: bytes) -> None:
    async with serve_bytes(response) as url:
        assert (await fetch_error(url, allow_partial=True)).code in ("NETWORK_ERROR", "BAD_RESPONSE")


async def test_complete_compressed_body_with_wrong_content_length_is_complete() -> None:
    async with serve_bytes(wrap_http("Content-Encoding: gzip\r\nContent-Length: 99999", gzip.compress(TALK))) as url:
        result = await fetch(url)
    assert (result.body, result.is_complete) == (TALK, True)


@pytest.mark.parametrize("header", ["text/html, text/html; charset=utf-8", "Text/HTML charset=utf-8", "text/html;"])
async def test_media_type_of_unusual_header_is_read(header: str, site: Site) -> None:
    result = await fetch(site.put("/page", SiteResponse(b"x", headers={"Content-Type": header})))
    assert (result.media_type, result.is_complete) == ("text/html", True)


async def test_invalid_compressed_body_is_rejected(site: Site) -> None:
    error = await fetch_error(site.put("/odd", SiteResponse(b"no gzip", headers={"Content-Encoding": "gzip"})))
    assert error.code == "BAD_RESPONSE"


async def test_proxy_from_environment_is_not_used(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert (await fetch(site.put("/x", html("<p>hello</p>")))).size == 12


async def test_password_in_url_or_redirect_is_neither_sent_nor_shown(site: Site) -> None:
    with_password = site.url("/there").replace("http://", "http://me:hunter2@")
    site.put("/start", redirect(with_password))
    site.put("/there", html("<p>hello</p>"))
    for url in (site.url("/start"), with_password, site.url("/start").replace("http://", "http://me:hunter2@")):
        assert (await fetch(url)).url == site.url("/there")
    site.put("/odd", redirect("http://me:hunter2@[::1/"))
    site.put("/round", redirect(site.url("/round").replace("http://", "http://me:hunter2@")))
    for path in ("/odd", "/round"):
        error = await fetch_error(site.url(path))
        assert "hunter2" not in f"{error.message} {error.details}"
    assert set(site.credentials) == {None}


def test_password_in_link_is_removed_from_markdown() -> None:
    body = lxml.html.fromstring(
        '<body><a href="https://me:hunter2@example.org/x">there</a> <a href="/y">here</a></body>'
    )
    text, _ = convert_html_to_markdown(body, url="https://me:hunter2@example.org/page", base="")
    assert "hunter2" not in text
    assert "(https://example.org/x)" in text
    assert "(https://example.org/y)" in text
    assert escape_link_target("https://me:hunter2@example.org/") == "https://example.org/"


async def test_password_in_url_is_not_in_error(site: Site) -> None:
    error = await fetch_error(site.url("/nowhere").replace("http://", "http://me:hunter2@"))
    assert "hunter2" not in f"{error.message} {error.details}"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.9.9.9",
        "0.0.0.0",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "192.0.2.1",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fec0::1",
        "ff02::1",
        "2001:db8::1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "::127.0.0.1",
        "2002:7f00:1::",
        "2002:a00:1::1",
        "64:ff9b::127.0.0.1",
        "64:ff9b::10.0.0.1",
        "64:ff9b:1::1",
        "2001:0:4136:e378:8000:63bf:f5ff:fffe",
    ],
)
def test_non_public_address_is_rejected(address: str) -> None:
    assert AllowedHosts([]).find_address_rejection("conference.example", address) is not None


@pytest.mark.parametrize(
    "address", ["93.184.216.34", "2606:2800:220:1::1", "::ffff:93.184.216.34", "64:ff9b::5db8:d822"]
)
def test_public_address_is_allowed(address: str) -> None:
    assert AllowedHosts([]).find_address_rejection("conference.example", address) is None


@without_deadline
@given(st.ip_addresses(v=4))
def test_ipv4_in_ipv6_address_is_checked_like_the_ipv4_address(address: Any) -> None:
    number = int(address)
    allowed = AllowedHosts(["10.1.0.0/16"])
    wrapped = [f"::ffff:{address}", f"64:ff9b::{address}", f"2002:{number >> 16:x}:{number & 0xFFFF:x}::1"]
    unwrapped = allowed.find_address_rejection("h", str(address))
    assert {allowed.find_address_rejection("h", wrapped_address) for wrapped_address in wrapped} == {unwrapped}


def test_format_bytes_uses_decimal_units() -> None:
    assert [format_bytes(size) for size in (12, 1_500, 2_500_000, 3_200_000_000)] == [
        "12 bytes",
        "1.5 kB",
        "2.5 MB",
        "3.2 GB",
    ]

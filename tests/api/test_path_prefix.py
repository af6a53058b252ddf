"""Behind a proxy with a path, kept or stripped, every address that an answer has leads somewhere."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest

from jobledger.projections.views.files import prefix_result_urls
from tests.api.conftest import Api, run_api
from tests.support.path_proxy import run_path_proxy
from tests.support.webhook_endpoint import run_webhook_endpoint

PREFIX = "/tools/jobs"
ECHO = {"job_type": "echo", "parameters": {"text": "hello"}}


@pytest.mark.parametrize("strips", [True, False])
async def test_addresses_in_answers_lead_through_the_proxy(
    mongodb_uri: str, db_name: str, tmp_path: Path, strips: bool
) -> None:
    port: list[int] = []
    async with run_path_proxy(port, PREFIX, strip_prefix=strips) as proxied:
        base = f"http://127.0.0.1:{proxied}{PREFIX}"
        settings = {"public_url": f"{base}/", "port": free_port(port)}
        async for api in run_api(
            mongodb_uri, db_name, tmp_path, api=settings, webhooks={"allowed_private_hosts": ["127.0.0.1"]}
        ):
            async with httpx.AsyncClient(timeout=30, trust_env=False, headers={"Connection": "close"}) as client:
                await _follow_addresses(client, base)
                await _follow_addresses_of_webhooks(client, base)
            assert api.db is not None


def free_port(port: list[int]) -> int:
    """Choose the port of the server: what it says of itself is the proxy's."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port.append(free.getsockname()[1])
    return port[0]


async def _follow_addresses(client: httpx.AsyncClient, base: str) -> None:
    async def leads(answer: httpx.Response, address: str) -> httpx.Response:
        found = await client.get(urljoin(str(answer.request.url), address))
        assert found.status_code == 200, (address, found.text[:200])
        return found

    wait = {"Prefer": "wait=20"}
    submitted = await client.post(f"{base}/api/events/jobs", json=ECHO, headers=wait)
    job = submitted.json()["job"]
    assert (await leads(submitted, submitted.headers["location"])).json()["job"] == job
    await leads(submitted, job["results"]["markdown_url"])
    [file] = job["results"]["files"]
    listed = await client.get(f"{base}/api/events/jobs")
    assert listed.json()["jobs"] == [job]

    linked = await client.post(f"{base}/api/events/files/{file['path']}/link")
    await leads(linked, linked.json()["url"])
    batch = await client.post(f"{base}/api/events/batches", json={"jobs": [ECHO]})
    await leads(batch, batch.headers["location"])

    for path in ("/api/events/jobs/", "/api/events/jobs/?limit=1", f"/api/events/jobs/{job['job_id']}/"):
        moved = await client.get(f"{base}{path}")
        assert moved.status_code == 307
        assert "://" not in moved.headers["location"]
        await leads(moved, moved.headers["location"])
    posted = await client.post(f"{base}/api/events/jobs/", json=ECHO, follow_redirects=True)
    assert posted.status_code == 202
    assert (await client.get(f"{base}/api/nothing/")).status_code == 404

    index = await client.get(f"{base}/")
    for name, address in index.json().items():
        if name not in ("status", "service", "log"):
            await leads(index, address)
    document = (await client.get(f"{base}/api/openapi.json")).json()
    assert (await client.get(document["servers"][0]["url"] + "/api/events/jobs")).status_code == 200
    for page in ("/api/docs", "/monitoring/events", f"/monitoring/events/jobs/{job['job_id']}"):
        shown = await client.get(f"{base}{page}")
        assert shown.status_code == 200
        for address in set(re.findall(r'(?:href|src)="([^"#]+)"', shown.text)):
            await leads(shown, address.replace("&amp;", "&"))


async def _follow_addresses_of_webhooks(client: httpx.AsyncClient, base: str) -> None:
    async with run_webhook_endpoint() as cms:
        job = {**ECHO, "webhook": {"url": cms.url()}}
        batch = {"jobs": [job], "webhook": {"url": cms.url("/batch")}}
        assert (await client.post(f"{base}/api/events/batches", json=batch)).status_code == 202
        await cms.wait_for_requests(2)
        bodies = [request.body.decode() for request in cms.requests]
    found = [
        urljoin(base, address) for body in bodies for address in re.findall(r'"((?:http:/)?/[^"]*/api/[^"]+)"', body)
    ]
    assert len(found) == 3, bodies
    for address in found:
        assert (await client.get(address)).status_code == 200, address
    assert '"/api/' not in "".join(bodies)


def test_results_behind_proxy_have_its_path_in_every_address() -> None:
    results = {"markdown_url": "/api/a.md", "assets": [{"path": "b", "url": "/api/b"}], "files": []}
    assert prefix_result_urls("/p", results) == {
        "markdown_url": "/p/api/a.md",
        "assets": [{"path": "b", "url": "/p/api/b"}],
        "files": [],
    }
    assert prefix_result_urls("", results) == results
    assert prefix_result_urls("/p", {**results, "markdown_url": None})["markdown_url"] is None


async def test_redirects_stay_relative_without_a_public_url(api_without_worker: Api) -> None:
    for method in ("GET", "POST"):
        answer = await api_without_worker.http.request(method, "/api/events/jobs/?a=b")
        assert (answer.status_code, answer.headers["location"]) == (307, "../jobs?a=b")
    assert (await api_without_worker.get("/api//evil.example/")).status_code == 404

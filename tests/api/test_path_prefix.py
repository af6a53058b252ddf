"""Behind a proxy with a path, kept or stripped, every URL in a response works."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest

from jobledger.projections.views.files import prefix_result_urls
from tests.api.conftest import Api, run_api
from tests.support.path_proxy import run_path_proxy
from tests.support.replica_set import free_port
from tests.support.webhook_endpoint import run_webhook_endpoint

PREFIX = "/tools/jobs"
ECHO = {"job_type": "echo", "parameters": {"text": "hello"}}


@pytest.mark.parametrize("strip_prefix", [True, False], ids=["stripped", "kept"])
async def test_urls_in_responses_work_through_the_proxy(
    mongodb_uri: str, db_name: str, tmp_path: Path, strip_prefix: bool
) -> None:
    port = free_port()
    async with run_path_proxy(port, PREFIX, strip_prefix=strip_prefix) as proxy_port:
        base = f"http://127.0.0.1:{proxy_port}{PREFIX}"
        settings = {"public_url": f"{base}/", "port": port}
        async for api in run_api(
            mongodb_uri, db_name, tmp_path, api=settings, webhooks={"allowed_private_hosts": ["127.0.0.1"]}
        ):
            async with httpx.AsyncClient(timeout=30, trust_env=False, headers={"Connection": "close"}) as client:
                await follow_urls(client, base)
                await follow_urls_of_webhooks(client, base)
            assert api.db is not None


async def follow_urls(client: httpx.AsyncClient, base: str) -> None:
    async def follow(response: httpx.Response, url: str) -> httpx.Response:
        target = await client.get(urljoin(str(response.request.url), url))
        assert target.status_code == 200, (url, target.text[:200])
        return target

    wait = {"Prefer": "wait=20"}
    submitted = await client.post(f"{base}/api/events/jobs", json=ECHO, headers=wait)
    job = submitted.json()["job"]
    assert (await follow(submitted, submitted.headers["location"])).json()["job"] == job
    await follow(submitted, job["results"]["markdown_url"])
    [file] = job["results"]["files"]
    listed = await client.get(f"{base}/api/events/jobs")
    assert listed.json()["jobs"] == [job]

    linked = await client.post(f"{base}/api/events/files/{file['path']}/link")
    await follow(linked, linked.json()["url"])
    batch = await client.post(f"{base}/api/events/batches", json={"jobs": [ECHO]})
    await follow(batch, batch.headers["location"])

    for path in ("/api/events/jobs/", "/api/events/jobs/?limit=1", f"/api/events/jobs/{job['job_id']}/"):
        moved = await client.get(f"{base}{path}")
        assert moved.status_code == 307
        assert "://" not in moved.headers["location"]
        await follow(moved, moved.headers["location"])
    posted = await client.post(f"{base}/api/events/jobs/", json=ECHO, follow_redirects=True)
    assert posted.status_code == 202
    assert (await client.get(f"{base}/api/nothing/")).status_code == 404

    index = await client.get(f"{base}/")
    for name, url in index.json().items():
        if name not in ("status", "service", "log"):
            await follow(index, url)
    document = (await client.get(f"{base}/api/openapi.json")).json()
    assert (await client.get(document["servers"][0]["url"] + "/api/events/jobs")).status_code == 200
    for page in ("/api/docs", "/monitoring/events", f"/monitoring/events/jobs/{job['job_id']}"):
        response = await client.get(f"{base}{page}")
        assert response.status_code == 200
        for url in set(re.findall(r'(?:href|src)="([^"#]+)"', response.text)):
            await follow(response, url.replace("&amp;", "&"))


async def follow_urls_of_webhooks(client: httpx.AsyncClient, base: str) -> None:
    async with run_webhook_endpoint() as cms:
        job = {**ECHO, "webhook": {"url": cms.url()}}
        batch = {"jobs": [job], "webhook": {"url": cms.url("/batch")}}
        assert (await client.post(f"{base}/api/events/batches", json=batch)).status_code == 202
        await cms.wait_for_requests(2)
        bodies = [request.body.decode() for request in cms.requests]
    urls = [urljoin(base, url) for body in bodies for url in re.findall(r'"((?:http:/)?/[^"]*/api/[^"]+)"', body)]
    assert len(urls) == 3, bodies
    for url in urls:
        assert (await client.get(url)).status_code == 200, url
    assert '"/api/' not in "".join(bodies)


def test_prefix_result_urls_adds_prefix_to_every_url() -> None:
    results = {"markdown_url": "/api/a.md", "assets": [{"path": "b", "url": "/api/b"}], "files": []}
    assert prefix_result_urls("/p", results) == {
        "markdown_url": "/p/api/a.md",
        "assets": [{"path": "b", "url": "/p/api/b"}],
        "files": [],
    }
    assert prefix_result_urls("", results) == results
    assert prefix_result_urls("/p", {**results, "markdown_url": None})["markdown_url"] is None


async def test_redirects_without_public_url_are_relative(api_without_worker: Api) -> None:
    for method in ("GET", "POST"):
        response = await api_without_worker.http.request(method, "/api/events/jobs/?a=b")
        assert (response.status_code, response.headers["location"]) == (307, "../jobs?a=b")
    assert (await api_without_worker.get("/api//evil.example/")).status_code == 404

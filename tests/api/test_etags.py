"""An ETag covers everything that a job or batch is shown with: two different responses never have the same one."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from tests.api.conftest import Api
from tests.support.header_auth import principal_header

VIEWERS = {
    "owner": principal_header("owner"),
    "writer": principal_header("writer"),
    "reader": principal_header("reader"),
}
ACCESS = {"visibility": "public", "read_access": ["reader"], "write_access": ["writer"]}


async def test_etag_differs_between_different_bodies_of_one_url(header_auth_api: Api) -> None:
    owner = header_auth_api.as_user("owner")
    batch = await owner.submit_batch({}, {}, access_control=ACCESS)
    batch_id, job_id = batch["batch_id"], batch["job_ids"][0]
    job_url, batch_url = f"/api/events/jobs/{job_id}", f"/api/events/batches/{batch_id}"
    bodies: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    position = str(await header_auth_api.event_store.head_position())
    for method, path, content in (
        ("GET", job_url, None),
        ("POST", f"{batch_url}/pause", None),
        ("PUT", job_url, {"priority": 5}),
        ("POST", f"{batch_url}/resume", None),
        ("PUT", batch_url, {"access_control": {**ACCESS, "read_access": []}}),
        ("POST", f"{batch_url}/pause", None),
        ("POST", f"{job_url}/cancel", None),
        ("POST", f"{job_url}/archive", None),
        ("POST", f"{batch_url}/cancel", None),
    ):
        response = await header_auth_api.http.request(method, path, json=content, headers=VIEWERS["owner"])
        assert response.status_code == 200, response.text
        if method != "GET":
            position = response.headers["ledger-position"]
        for url in (job_url, f"{job_url}?as_of={position}", batch_url, f"{batch_url}?as_of={position}"):
            for headers in VIEWERS.values():
                found = await header_auth_api.get(url, position, **headers)
                assert found.status_code == 200, found.text
                etag, body = found.headers["etag"], found.json()
                assert bodies[url].setdefault(etag, body) == body, url
                for known in {etag, next(iter(bodies[url]))}:
                    again = await header_auth_api.get(url, position, **headers, **{"If-None-Match": known})
                    assert again.status_code == (304 if known == etag else 200), url
    assert all(len(found) > 5 for url, found in bodies.items() if "?" not in url)


async def test_job_as_of_position_is_paused_if_its_batch_was(api_without_worker: Api) -> None:
    batch = await api_without_worker.submit_batch({})
    url = f"/api/events/jobs/{batch['job_ids'][0]}"
    seen = [(await api_without_worker.event_store.head_position(), False)]
    for action, paused in (("pause", True), ("resume", False), ("pause", True)):
        response = await api_without_worker.post(f"/api/events/batches/{batch['batch_id']}/{action}")
        seen.append((int(response.headers["ledger-position"]), paused))
    for position, paused in seen:
        assert (await api_without_worker.get(f"{url}?as_of={position}")).json()["job"]["paused"] == paused, position

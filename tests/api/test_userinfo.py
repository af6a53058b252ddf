"""URLs with user name or password (userinfo) are rejected in every field of a job and in every spelling."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobledger.ledger.net.url_policy import has_userinfo, strip_userinfo
from tests.api.conftest import Api

JOBS: Final = "/api/events/jobs"
URLS_WITH_USERINFO: Final = [
    "https://user:hunter2@example.org/talk",
    "http://user@example.org/",
    "https://:hunter2@example.org/",
    "https://@example.org/",
    "https://user:hunter2@[::1]:8080/",
    "HTTPS://User:hunter2@Example.org",
    "https://user:hunter2%40x@example.org/",
    "https://a@b:hunter2@example.org/",
    "https://user:hunter2@example.org?x=/",
    "https:/user:hunter2@example.org/",
    "https:user:hunter2@example.org/",
    "https:\\\\user:hunter2@example.org/",
    " https://user:hunter2@example.org/",
    "ht\ttps://user:hunter2@example.org/",
    "\x01https://user:hunter2@example.org/",
    "ftp://user:hunter2@example.org/",
    "wss://user:hunter2@example.org/",
    "https://user:hun ter hunter2@example.org/x",
    "https://us er:hunter2@example.org/",
    "https://user\\:hunter2@example.org/f",
    "https://user:\\hunter2@example.org/f",
    "https://user:\u00a0hunter2@example.org/",
    "mongodb://user:hunter2@example.org/db",
    "mongodb://us er:\\hunter2@example.org/db",
    "postgres+asyncpg://user:hunter2@example.org/db",
]
TEXTS_WITHOUT_USERINFO: Final = [
    "https://example.org/@user",
    "https://example.org/a?b=c@d",
    "https://example.org#a@b",
    "https://example.org/user:pw@host",
    "user@example.org",
    "mailto:user@example.org",
    "ssh://git@example.org/repository",
    "git@example.org:repository",
    "See https://example.org or ask user:me@example.org",
    "https: ask user@example.org",
    "https://meet.example.org (Fragen an orga@example.org)",
    "http://example.org, mail user@example.org",
    "http://localhost:8080 is down, see user@example.org",
    "https://localhost (mail user@example.org)",
    "",
    "@",
]


@pytest.mark.parametrize("url", URLS_WITH_USERINFO)
def test_userinfo_is_detected_and_removed(url: str) -> None:
    assert has_userinfo(url)
    stripped = strip_userinfo(url)
    assert "hunter2" not in stripped
    assert not has_userinfo(stripped)


@given(
    st.sampled_from(["http", "HTTPS", "ftp", "wss"]),
    st.text(st.sampled_from("ab:@\\\t/?#[]%.\u00a0\u3000\x1f\x7f\uff20"), max_size=12),
)
def test_userinfo_that_a_client_would_send_is_detected(scheme: str, rest: str) -> None:
    """What httpx or urllib reads as userinfo is detected, and removed by strip_userinfo().

    The generated text has no spaces: with spaces it may be prose, which these libraries read in the same way. The
    tables above contain such cases.
    """
    url = f"{scheme}://{rest}"
    if is_read_as_userinfo(url):
        assert has_userinfo(url)
    assert not is_read_as_userinfo(strip_userinfo(url))


@pytest.mark.parametrize("prefix", ["http:", "http://", "x://", ""])
@pytest.mark.parametrize("middle", ["\\", "/", ":", " ", "a.", "a b:", "@", "é"])
@pytest.mark.parametrize("suffix", ["#@", "@", " @x"])
def test_userinfo_check_of_long_text_takes_linear_time(prefix: str, middle: str, suffix: str) -> None:
    text = prefix + middle * 200_000 + suffix
    start = time.thread_time()
    has_userinfo(text)
    strip_userinfo(text)
    assert time.thread_time() - start < 0.5


def is_read_as_userinfo(url: str) -> bool:
    with suppress(httpx.InvalidURL, ValueError):
        if httpx.URL(url).userinfo:
            return True
    with suppress(ValueError):
        return "@" in urlsplit(url).netloc
    return False


@pytest.mark.parametrize("text", TEXTS_WITHOUT_USERINFO)
def test_text_without_userinfo_is_unchanged(text: str) -> None:
    assert not has_userinfo(text)
    assert strip_userinfo(text) == text


def build_session_job(**more: Any) -> dict[str, Any]:
    fields = {"event": "E", "session": "S", "url": "https://example.org/", "filename": "S.md", "track": "T"}
    return {"job_type": "session", "parameters": {**fields, **more}}


async def test_submission_and_update_reject_userinfo_in_every_field(api_without_worker: Api) -> None:
    job_id = await api_without_worker.submit({"url": "https://example.org/"})
    for url in URLS_WITH_USERINFO:
        bodies: list[tuple[str, Any]] = [
            (JOBS, build_session_job(url=url)),
            (JOBS, build_session_job(video_url=url)),
            (JOBS, build_session_job(attachments_url=url)),
            (JOBS, build_session_job(extra={"source": {"more": [url]}})),
            (JOBS, {"job_type": "echo", "parameters": {"any": {"thing": ["x", {"there": url}]}}}),
            (JOBS, {"job_type": "echo", "parameters": {}, "webhook": {"url": url}}),
            ("/api/events/batches", {"jobs": [build_session_job(), build_session_job(url=url)]}),
            ("/api/events/batches", {"parameters": {"from": url}, "jobs": [{"job_type": "echo", "parameters": {}}]}),
            (
                "/api/events/batches",
                {"parameters": {"from": url}, "jobs": [{"job_type": "echo", "parameters": {"from": ""}}]},
            ),
        ]
        for path, body in bodies:
            response = await api_without_worker.post(path, body)
            assert response.status_code == 422, (url, body, response.text)
            assert "hunter2" not in response.text
        response = await api_without_worker.http.put(f"{JOBS}/{job_id}", json={"parameters": {"url": url}})
        assert response.status_code == 422
    assert (await api_without_worker.get(JOBS, await api_without_worker.event_store.read_head_position())).json()[
        "total"
    ] == 1


async def test_userinfo_error_has_field_path_and_advice(shared_api: Api) -> None:
    body = {
        "jobs": [
            build_session_job(),
            {"job_type": "echo", "parameters": {"a": [{"b": "https://u:hunter2@example.org/"}]}},
        ]
    }
    response = (await shared_api.post("/api/events/batches", body)).json()
    [problem] = response["details"]["errors"]
    assert problem["path"] == "jobs[1].parameters.a[0].b"
    assert "use a URL that needs neither" in problem["message"]


@pytest.mark.parametrize("text", TEXTS_WITHOUT_USERINFO)
async def test_submission_accepts_text_without_userinfo(shared_api: Api, text: str) -> None:
    assert await shared_api.submit({"text": text, "more": [text]})

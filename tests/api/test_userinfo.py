"""No user name or password in a URL of a job is accepted, wherever it stands and however it is written."""

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
WITH: Final = [
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
WITHOUT: Final = [
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


@pytest.mark.parametrize("url", WITH)
def test_userinfo_is_found_and_removed(url: str) -> None:
    assert has_userinfo(url)
    plain = strip_userinfo(url)
    assert "hunter2" not in plain
    assert not has_userinfo(plain)


@given(
    st.sampled_from(["http", "HTTPS", "ftp", "wss"]),
    st.text(st.sampled_from("ab:@\\\t/?#[]%.\u00a0\u3000\x1f\x7f\uff20"), max_size=12),
)
def test_userinfo_that_a_client_would_send_is_found(scheme: str, rest: str) -> None:
    """What httpx or urllib reads as a user name or password is found, and gone when it was removed.

    With spaces it may be prose, which they would read in the same way: see the tables.
    """
    url = f"{scheme}://{rest}"
    if _reads_userinfo(url):
        assert has_userinfo(url)
    assert not _reads_userinfo(strip_userinfo(url))


@pytest.mark.parametrize("begin", ["http:", "http://", "x://", ""])
@pytest.mark.parametrize("middle", ["\\", "/", ":", " ", "a.", "a b:", "@", "é"])
@pytest.mark.parametrize("end", ["#@", "@", " @x"])
def test_long_text_takes_no_longer_than_its_length_deserves(begin: str, middle: str, end: str) -> None:
    text = begin + middle * 200_000 + end
    began = time.thread_time()
    has_userinfo(text)
    strip_userinfo(text)
    assert time.thread_time() - began < 0.5


def _reads_userinfo(url: str) -> bool:
    with suppress(httpx.InvalidURL, ValueError):
        if httpx.URL(url).userinfo:
            return True
    with suppress(ValueError):
        return "@" in urlsplit(url).netloc
    return False


@pytest.mark.parametrize("text", WITHOUT)
def test_other_text_stays_as_it_is(text: str) -> None:
    assert not has_userinfo(text)
    assert strip_userinfo(text) == text


def session(**more: Any) -> dict[str, Any]:
    fields = {"event": "E", "session": "S", "url": "https://example.org/", "filename": "S.md", "track": "T"}
    return {"job_type": "session", "parameters": {**fields, **more}}


async def test_submission_and_update_refuse_it_at_every_place(api_without_worker: Api) -> None:
    waiting = await api_without_worker.submit({"url": "https://example.org/"})
    for url in WITH:
        bodies: list[tuple[str, Any]] = [
            (JOBS, session(url=url)),
            (JOBS, session(video_url=url)),
            (JOBS, session(attachments_url=url)),
            (JOBS, session(extra={"source": {"more": [url]}})),
            (JOBS, {"job_type": "echo", "parameters": {"any": {"thing": ["x", {"there": url}]}}}),
            (JOBS, {"job_type": "echo", "parameters": {}, "webhook": {"url": url}}),
            ("/api/events/batches", {"jobs": [session(), session(url=url)]}),
            ("/api/events/batches", {"parameters": {"from": url}, "jobs": [{"job_type": "echo", "parameters": {}}]}),
            (
                "/api/events/batches",
                {"parameters": {"from": url}, "jobs": [{"job_type": "echo", "parameters": {"from": ""}}]},
            ),
        ]
        for path, body in bodies:
            answer = await api_without_worker.post(path, body)
            assert answer.status_code == 422, (url, body, answer.text)
            assert "hunter2" not in answer.text
        answer = await api_without_worker.http.put(f"{JOBS}/{waiting}", json={"parameters": {"url": url}})
        assert answer.status_code == 422
    assert (await api_without_worker.get(JOBS, await api_without_worker.event_store.head_position())).json()[
        "total"
    ] == 1


async def test_refusal_names_the_place_and_what_to_do(api_without_worker: Api) -> None:
    body = {"jobs": [session(), {"job_type": "echo", "parameters": {"a": [{"b": "https://u:hunter2@example.org/"}]}}]}
    answer = (await api_without_worker.post("/api/events/batches", body)).json()
    [problem] = answer["details"]["errors"]
    assert problem["path"] == "jobs[1].parameters.a[0].b"
    assert "without them" in problem["message"]


@pytest.mark.parametrize("text", WITHOUT)
async def test_other_text_is_accepted(api_without_worker: Api, text: str) -> None:
    assert await api_without_worker.submit({"text": text, "more": [text]})

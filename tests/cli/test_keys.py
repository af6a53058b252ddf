"""`jobledger keys …` and the key that `jobledger submit` sends, in real processes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient

from jobledger.api.auth.api_keys import ApiKeyToken
from jobledger.cli.administration.api_key_admin import generate_key
from jobledger.cli.commands.options import parse_duration
from jobledger.ledger.domain.errors import ConfigurationError
from jobledger.ledger.mongo.embedded_files import wait_until
from tests.support.installation import CommandOutcome, Installation, RunningCommand, assert_one_line_error, http_client
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.polling import DEADLINE_SECONDS

JOBS = "/api/events/jobs"
ECHO = json.dumps({"job_type": "echo", "parameters": {"text": "hello"}})


@pytest.fixture
def installation(mongodb_uri: str, db_name: str, tmp_path: Path) -> Iterator[Installation]:
    mongodb = {"uri": mongodb_uri, "db_name": db_name}
    with Installation(tmp_path, mongodb=mongodb, auth={"mode": "keys"}) as installation:
        yield installation


def assert_success(outcome: CommandOutcome) -> str:
    assert outcome.exit_code == 0, outcome.out + outcome.err
    return outcome.out


def list_jobs_status(role: RunningCommand, key: str) -> int:
    with http_client(role) as client:
        return client.get(JOBS, headers={"Authorization": f"Bearer {key}"}).status_code


def test_key_is_created_listed_used_and_revoked(installation: Installation) -> None:
    created = installation.run("keys", "create", "--user", "alice", "--group", "ops", "--name", "her [bold]laptop")
    key = assert_success(created).removesuffix("\n")
    assert re.fullmatch(r"jl_[0-9a-f]{16}_[\w-]{43}", key)
    text = ApiKeyToken.parse(key)
    assert text
    assert text.secret not in created.err, "stderr may be logged"
    assert f"jobledger keys revoke {text.key_id}" in created.err

    listed = installation.run("keys", "ls")
    for expected_text in (text.key_id, "alice", "team-ops", "her [bold]laptop", "never"):
        assert expected_text in assert_success(listed)
    assert text.secret not in listed.out + listed.err

    up = installation.start("api").wait_until_ready()
    assert list_jobs_status(up, key) == 200
    assert text.key_id in assert_success(installation.run("keys", "revoke", text.key_id))
    assert wait_until(lambda: list_jobs_status(up, key) == 401, DEADLINE_SECONDS)
    assert installation.run("keys", "ls").err == "No API keys.\n"
    assert_one_line_error(installation.run("keys", "revoke", text.key_id), 1, "`jobledger keys ls`")
    assert text.secret not in up.stdout + up.stderr


def test_keys_commands_print_json(installation: Installation) -> None:
    before = datetime.now(UTC)
    roles = ("--role", "monitor", "--role", "admin")
    created = json.loads(
        assert_success(installation.run("keys", "create", "--user", "bob", *roles, "--expires-in", "90d", "--json"))
    )
    key = created.pop("key")
    assert ApiKeyToken.parse(key)
    assert created.keys() == {"key_id", "name", "user_id", "groups", "roles", "created_at", "expires_at"}
    assert (created["user_id"], created["groups"], created["roles"]) == ("bob", [], ["monitor", "admin"])
    expires_at = datetime.fromisoformat(created["expires_at"])
    assert timedelta(0) <= expires_at - before - timedelta(days=90) < timedelta(minutes=1)
    assert json.loads(assert_success(installation.run("keys", "ls", "--json"))) == [{**created, "sessions": 0}]
    signed_out = json.loads(assert_success(installation.run("keys", "sign-out", created["key_id"], "--json")))
    assert signed_out == {"ended_sessions": 0}
    # `revoke` also takes the whole key, which is at hand when it has leaked.
    assert json.loads(assert_success(installation.run("keys", "revoke", key, "--json"))) == {
        "revoked": created["key_id"]
    }
    assert json.loads(assert_success(installation.run("keys", "ls", "--json"))) == []


def test_revoke_invalid_id_does_not_repeat_it(installation: Installation) -> None:
    incomplete_key = str(ApiKeyToken.generate())[:-1]
    refused = installation.run("keys", "revoke", incomplete_key)
    assert_one_line_error(refused, 1)
    assert incomplete_key[20:] not in refused.out + refused.err


@pytest.mark.parametrize(
    ("arguments", "expected_texts"),
    [
        (["--user", ""], ["--user", "empty"]),
        (["--user", "team-ops"], ["--user", "`team-`"]),
        (["--user", "x" * 201], ["--user", "200"]),
        (["--user", "a\x1b[31mb"], ["--user", "unprintable"]),
        (["--user", "a", "--group", ""], ["--group", "empty"]),
        (["--user", "a", "--group", "team-"], ["--group", "empty"]),
        (["--user", "a", "--group", "x" * 200], ["--group", "200"]),
        (["--user", "a", "--role", "root"], ["--role", "'admin' or 'monitor'"]),
        (["--user", "a", "--name", "x" * 201], ["--name", "200"]),
        (["--user", "a", "--name", "a\x1b[31mb"], ["--name", "printable"]),
    ],
    ids=str,
)
def test_new_key_invalid_option_is_explained(arguments: list[str], expected_texts: list[str]) -> None:
    options: dict[str, Any] = {"user": "", "groups": [], "roles": [], "name": None, "expires_in": None}
    for option, value in zip(arguments[::2], arguments[1::2], strict=True):
        name = option.removeprefix("--").replace("-", "_")
        options |= {f"{name}s": [value]} if name in ("group", "role") else {name: value}
    with pytest.raises(ConfigurationError) as raised:
        generate_key(**options)
    for expected_text in expected_texts:
        assert expected_text in str(raised.value)


@pytest.mark.parametrize(
    "text", ["", "90", "d", "0d", "-1d", "1.5d", "1y", "1h 30m", "36501d", "999999999w", "9999999w", "٣d", "1d\n"]
)
def test_parse_duration_invalid_text_is_explained(text: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        parse_duration(text, "--expires-in")
    assert "--expires-in" in str(raised.value)
    assert "90d" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("30m", timedelta(minutes=30)),
        ("12h", timedelta(hours=12)),
        ("90d", timedelta(days=90)),
        ("8w", timedelta(weeks=8)),
        ("36500d", timedelta(days=36_500)),
        ("1h30m", timedelta(hours=1, minutes=30)),
    ],
)
def test_parse_duration_reads_numbers_and_units(text: str, duration: timedelta) -> None:
    assert parse_duration(text, "--expires-in") == duration


def test_keys_usage_error_exits_2_and_unreachable_database_3(installation: Installation) -> None:
    assert_one_line_error(installation.run("keys", "create", "--user", "team-x"), 2, "--user")
    for arguments in (["create", "--user", "a", "--role", "root"], ["revoke"]):
        wrong = installation.run("keys", *arguments)
        assert wrong.exit_code == 2
        assert "Traceback" not in wrong.err
    installation.write_config(mongodb={"uri": "mongodb://127.0.0.1:1/", "connect_timeout_ms": 200})
    for arguments in (["create", "--user", "a"], ["ls"]):
        assert_one_line_error(installation.run("keys", *arguments), 3, "MongoDB")


def test_keys_list_expired_key_says_when(installation: Installation, mongodb_uri: str, db_name: str) -> None:
    key, _ = generate_key(user="alice", groups=(), roles=(), name=None, expires_in=None)
    expired_key = key.model_copy(update={"expires_at": datetime(2020, 2, 3, tzinfo=UTC)})
    with MongoClient[dict[str, Any]](mongodb_uri) as client:
        client[db_name].api_keys.insert_one(expired_key.model_dump(by_alias=True))
    assert "expired 2020-02-03 05:30+05:30" in assert_success(installation.run("keys", "ls", TZ="Asia/Kolkata"))


@needs_local_mongod
def test_keys_create_with_embedded_server_works_before_and_during_up(tmp_path: Path) -> None:
    with Installation(tmp_path, auth={"mode": "keys"}) as installation:
        first_key = assert_success(installation.run("keys", "create", "--user", "alice")).strip()
        up = installation.start_up_command()
        second_key = assert_success(installation.run("keys", "create", "--user", "bob")).strip()
        submitted = installation.run("submit", "-", "--wait", "--url", up.url, stdin=ECHO, JOBLEDGER_KEY=first_key)
        assert "completed" in assert_success(submitted)
        assert first_key not in submitted.out + submitted.err + up.stdout + up.stderr
        assert wait_until(lambda: list_jobs_status(up, second_key) == 200, DEADLINE_SECONDS)


def test_keys_create_in_open_mode_prints_note(installation: Installation, mongodb_uri: str, db_name: str) -> None:
    installation.write_config(mongodb={"uri": mongodb_uri, "db_name": db_name})
    created = installation.run("keys", "create", "--user", "alice")
    assert ApiKeyToken.parse(assert_success(created).strip())
    assert "note: auth.mode is `open`" in created.err


def test_submit_missing_or_wrong_key_says_how_to_fix(installation: Installation) -> None:
    up = installation.start("api").wait_until_ready()
    submit = ("submit", "-", "--url", up.url)
    assert_one_line_error(
        installation.run(*submit, stdin=ECHO), 2, "requires authentication", "JOBLEDGER_KEY", "`jobledger keys create`"
    )
    assert_one_line_error(installation.run(*submit, stdin=ECHO, JOBLEDGER_KEY="  "), 2, "requires authentication")
    wrong = str(ApiKeyToken.generate())
    for key in (wrong, f"{wrong}\n", "s3cret key", "s3cr€t", "s3cret\x00"[:-1] + "\x07"):
        refused = installation.run(*submit, stdin=ECHO, JOBLEDGER_KEY=key)
        assert_one_line_error(refused, 2, "JOBLEDGER_KEY")
        assert key.strip() not in refused.out + refused.err

"""Secrets are found in settings, environment variables and files. Ordinary values are no secrets."""

from __future__ import annotations

import json
import os
import threading
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, RootModel, SecretBytes, SecretStr

from jobledger.workers.secrets.secret_finder import (
    MAX_FILE_BYTES,
    MAX_SECRETS,
    FoundSecrets,
    merge_fairly,
    read_secret_file,
)


def find_in(section: Any, model: type[BaseModel] | None = None) -> list[str]:
    found = FoundSecrets()
    found.add_settings(section, model)
    return list(found.texts)


def find_in_environment(**environment: str) -> list[str]:
    found = FoundSecrets(environment)
    found.add_environment()
    return list(found.texts)


def find_in_content(content: str) -> list[str]:
    found = FoundSecrets()
    found.add_content(content)
    return list(found.texts)


def check_found(found: list[str], secrets: list[str]) -> None:
    """Check that the secrets were found, and beside them only their parts and texts that contain one."""
    assert set(secrets) <= set(found)
    assert [text for text in found if not any(secret in text or text in secret for secret in secrets)] == []


VALUE = "correct-horse"


@pytest.mark.parametrize(
    "name",
    [
        "api_key",
        "apiKey",
        "APIKey",
        "X-API-Key",
        "access_token",
        "apiTokens",
        "refreshToken",
        "password",
        "dbPassword",
        "db-passwd",
        "PGPASSWORD",
        "MYSQL_PWD",
        "SMTP_PASS",
        "passphrase",
        "client_secret",
        "clientsecret",
        "AWS_SECRET_ACCESS_KEY",
        "passwort",
        "dbKennwort",
        "basic_auth",
        "private_key",
        "Authorization",
        "API_KEY_1",
        "api_token_value",
        "translation_api_key",
        "GITHUB_PAT",
    ],
)
def test_value_with_the_name_of_a_secret_is_found(name: str) -> None:
    assert find_in({name: VALUE}) == [VALUE]
    assert find_in({"services": [{"nested": {name: VALUE}}]}) == [VALUE]
    assert find_in_environment(**{name: VALUE}) == [VALUE]


@pytest.mark.parametrize(
    "name",
    [
        "model",
        "sort_key",
        "primaryKey",
        "cache_key",
        "eos_token",
        "max_tokens",
        "token_url",
        "token_type",
        "secret_name",
        "key_length",
        "keyboard",
        "monkey",
        "bypass",
        "compass",
        "author",
        "AWS_ACCESS_KEY_ID",
        "public_key",
        "auth_mode",
        "PWD",
        "OLDPWD",
        "SSH_AUTH_SOCK",
        "allowed_private_hosts",
        "openai_key",
        "token",
        "HF_TOKEN",
        "tokens",
        "pass",
        "credentials",
        "shortcut_key",
        "TOKEN_GITHUB",
        "password_hint",
        "secrets_manager",
    ],
)
def test_value_with_another_name_is_not_found(name: str) -> None:
    assert find_in({name: VALUE}) == []


@pytest.mark.parametrize(
    "value",
    [
        "",
        "short",
        "true",
        "disabled",
        "password",
        "changeme",
        "12345678",
        "2026.11.30",
        "********",
        "xxxxxxxxxxxxxxxx",
        "sk-0000000000000000000000",
        "sk-proj-xxxxxxxxxxxxxxxx",
        "sk-12121212121212121212",
        "your-api-key",
        "<your token here>",
        "jobledger",
        "Jobledger",
        "postgres",
        "production",
        17,
        1.5,
        True,
        None,
    ],
)
def test_ordinary_value_is_not_found(value: Any) -> None:
    assert find_in({"password": value, "api_key": value}) == []


@pytest.mark.parametrize(
    "value", ["conference-2026", "created_at", "jobs.high.v1", "gpt-4o-mini-2024-07-18", "session"]
)
def test_ordinary_value_of_a_key_is_not_found(value: str) -> None:
    assert find_in({"key": value, "auth": value, "cookie": value}) == []
    for secret in ("AbCd1234eFgH", "hunter2!"):
        assert find_in({"key": secret, "token": secret, "pass": secret}) == [secret]


def test_values_below_the_name_of_a_secret_are_found() -> None:
    section = {
        "api_keys": {"alice": "key-of-alice", "sk-AbCd1234EfGh": "bob"},
        "credentials": {"user": "admin-of-all", "pin": "AbCd1234XyZ", "url": "https://example.org/login"},
        "secrets": {"first": "https://example.org/first", "second": ["word-of-second"]},
        "passwords": ["first-word", ["second-word"]],
    }
    found = {"key-of-alice", "sk-AbCd1234EfGh", "AbCd1234XyZ", "word-of-second", "first-word", "second-word"}
    assert set(find_in(section)) == found


@pytest.mark.parametrize(
    "section",
    [
        {"env": [{"name": "SERVICE_API_KEY", "value": VALUE}]},
        {"headers": [{"key": "X-API-Key", "value": VALUE}, {"key": "Accept", "value": "text-plain"}]},
        {"headers": [{"Header": "Authorization", "Value": f"Bearer {VALUE}"}]},
        {"headers": [["Authorization", f"Bearer {VALUE}"], ["Accept", "text-plain"]]},
        {"headers": [f"Authorization: Bearer {VALUE}"]},
        {"headers": {"Proxy-Authorization": f"Bearer token={VALUE}"}},
        {"command": ["tool", "--api-key", VALUE, "--verbose", "text-plain"]},
        {"command": ["tool", f"--api-key={VALUE}"]},
        {"command": f"tool --api-key {VALUE} --verbose text-plain"},
        {"json": json.dumps({"client": {"secret": VALUE}})},
    ],
)
def test_value_beside_the_name_of_a_secret_is_found(section: Any) -> None:
    check_found(find_in(section), [VALUE])


class Nested(BaseModel):
    plain: SecretStr
    other: str = ""


class Settings(BaseModel):
    model_config = ConfigDict(extra="allow")
    single: SecretStr | None = None
    raw: SecretBytes = SecretBytes(b"")
    many: dict[str, list[SecretStr]] = {}
    nested: list[Nested] = []
    renamed: SecretStr = Field(SecretStr(""), validation_alias=AliasChoices("chosen", "alias"))
    standard: SecretStr = SecretStr("standard-value")


class Root(RootModel[dict[str, SecretStr]]):
    def __iter__(self) -> Any:
        raise AssertionError("code of a plug-in is not called")


def test_values_of_secret_types_are_found() -> None:
    section = {
        "single": "single-value",
        "raw": "raw-value",
        "many": {"a": ["listed-value"]},
        "nested": [{"plain": "nested-value", "other": "other-value"}],
        "alias": "renamed-value",
        "extra": "extra-value",
    }
    assert set(find_in(section, Settings)) == {
        *("single-value", "raw-value", "listed-value", "nested-value", "renamed-value", "standard-value"),
    }
    assert find_in({"any": "value-of-root"}, Root) == ["value-of-root"]


@pytest.mark.parametrize(
    ("text", "secrets"),
    [
        ("postgres://bob:p%40ss-w0rd@db/x", ["p%40ss-w0rd", "p@ss-w0rd"]),
        ("amqp://guest:guest@host", []),
        ("https://ghp_AbCd1234EfGh@example.org/repository", ["ghp_AbCd1234EfGh"]),
        ("https://example.org/?user=bob&api_key=abc-12345&x=1", ["abc-12345"]),
        ("host=db user=bob password='two words'", ["two words"]),
        ("Server=db;User Id=bob;Password=hunter2;", ["hunter2"]),
        ("X-API-Key: abc-12345", ["abc-12345"]),
        ("Authorization: Bearer abc-12345", ["abc-12345"]),
        ("https://example.org/v1?api_key=abc-12345", ["abc-12345"]),
        ("https://example.org/v1?access_token=a%2Fbc-12345#x", ["a%2Fbc-12345", "a/bc-12345"]),
        ("https://bob:abc-12345@example.org:8080/v1", ["abc-12345"]),
        ("http://a:b@h", []),
        ("mongodb://jobledger:jobledger@db/jobledger", []),
        ("tool --api-key abc-12345 --verbose", ["abc-12345"]),
        ("tool --auth-token='abc-12345'", ["abc-12345"]),
        ("postgres://bob:p@ss@w0rd/#9@db/x", ["p@ss@w0rd/#9"]),
        ("mongodb://bob:hunter2!@h1:1,h2:2/db?email=a@example.org", ["hunter2!"]),
        ("https://unpkg.com/react@18.2.0/index.js", []),
        ("http://host.example:8080/talks/@speaker-1", []),
        ("https://[2001:db8::1]:8080/@speaker-1", []),
        ("https://x.blob.core.windows.net/c?sv=2020&sig=AbCd1234EfGh%3D", ["AbCd1234EfGh%3D", "AbCd1234EfGh="]),
        ("https://hooks.slack.com/services/T00/B00/AbCd1234EfGh5678", ["AbCd1234EfGh5678"]),
        ("DefaultEndpointsProtocol=https;AccountName=x;AccountKey=AbCd1234EfGh==;", ["AbCd1234EfGh=="]),
        ("api-key=abc-12345,x=2", ["abc-12345"]),
        ('module.Login required username="alice" password="swordfish";', ["swordfish"]),
        ("Driver={SQL Server};Uid=bob;Pwd={hunter2!};", ["hunter2!"]),
        ("Bearer abc-12345", ["abc-12345"]),
        ("Authorization=Bearer%20abc-12345", ["abc-12345"]),
        ("Authorization: SSWS abc-12345", ["abc-12345"]),
        ("Authorization: Bearer abc-12345\r\nX-API-Key: def-12345\r\nAccept: text-plain", ["abc-12345", "def-12345"]),
        ("curl -H 'Authorization: Bearer abc-12345' -s https://example.org/x", ["abc-12345"]),
        ("X-API-Key:swordfish", ["swordfish"]),
        ("curl -u bob:swordfish https://example.org/x", ["swordfish"]),
        ("curl -s --user='bob:swordfish' https://example.org/x", ["swordfish"]),
        ("bob:swordfish@proxy.example.org:3128", ["swordfish"]),
        ("use proxy bob:AbCd1234eFgH@proxy for all", ["AbCd1234eFgH"]),
        ("docker run --user speaker:conference-staff image:candidate-version", []),
        ("image:candidate-version@sha256:0123456789abcdef0123456789abcdef", []),
        ("mailto:conference-team@example.org", []),
        ("Write to Contact:conference-team@example.org, or git@example.org:conference-team/pages", []),
        ("well-known:conference-2026", []),
        ("tool --token-file /run/token --password-stdin", []),
        ("https://example.org/talks?page=2&token_type=x", []),
        ("tests/secrets_of_jobs.py::test_name", []),
    ],
)
def test_secrets_in_urls_and_connection_strings_are_found(text: str, secrets: list[str]) -> None:
    check_found(find_in({"address": text}), secrets)
    check_found(find_in_environment(ADDRESS=text), secrets)


def test_token_of_a_header_is_found_without_its_scheme() -> None:
    for value in ("Bearer abc-12345", "DeepL-Auth-Key abc-12345", 'Token token="abc-12345"', "SSWS abc-12345"):
        assert "abc-12345" in find_in({"headers": {"Authorization": value}})
        assert "abc-12345" in find_in_environment(AUTHORIZATION=value)


@pytest.mark.parametrize("user", ["b", "bo", "bob"])
def test_password_in_a_basic_header_is_found(user: str) -> None:
    basic = b64encode(f"{user}:hunter2!".encode()).decode()
    for credentials in (basic, basic.rstrip("=")):
        for section in ({"Authorization": f"Basic {credentials}"}, {"header": f"Authorization: Basic {credentials}"}):
            assert "hunter2!" in find_in(section)


@pytest.mark.parametrize("separator", [",", ";", " ", ", ", "\n", ":", "="])
def test_each_of_several_secrets_in_a_value_is_found(separator: str) -> None:
    secrets = ["sk-q7Vn2LxPz8Rt4KmW", "sk-Zk3Nv8QwE5rTy2Ui", "hunter2!"]
    value = separator.join(secrets)
    for found in (find_in({"api_keys": value}), find_in_environment(API_KEYS=value), find_in_content(value)):
        assert set(secrets) <= set(found)


def test_passwords_beside_users_are_found() -> None:
    secrets = {"hunter2!", "k3y-of-bob"}
    for section in (
        {"credentials": "alice:hunter2!", "basic_auth": "bob:k3y-of-bob"},
        {"api_keys": "alice:hunter2!,bob:k3y-of-bob"},
    ):
        assert secrets <= set(find_in(section))


@pytest.mark.parametrize(
    "section",
    [
        {"first_pass": "whisper-large-v3", "second_pass": "gpt-4o-mini"},
        {"start_token": "<image>", "image_token": "<|startoftext|>", "filler_tokens": ["actually", "basically"]},
        {"glossary": {"token": "Wertmarke", "password": "Losungswort", "secret": "Geheimniskrämerei-1"}},
        {"glossary": [["password", "Losungswort"], ["secret", "top-geheim"]]},
        {"credentials": "same-origin", "password": "Kennwort"},
        {"system_prompt": "Speakers discuss authorization: discussion, token: explained"},
        {"prompt": "Write JSON. Token: summarize-it. password: none-given"},
        {"prompt": "Explain -v and password: none-given, please. Then stop."},
        {"prompt": "Set password = something in the config", "title": "Authorization: an overview"},
        {"args": ["--pass", "second-pass-only"]},
        {"command": "tool --api-key --verbose text-plain"},
    ],
)
def test_ordinary_value_beside_the_name_of_a_secret_is_not_found(section: Any) -> None:
    assert find_in(section) == []


def test_random_value_beside_the_name_of_a_secret_in_a_sentence_is_found() -> None:
    assert "sk-q7Vn2LxPz8Rt4KmW" in find_in({"prompt": "Call the service with the key sk-q7Vn2LxPz8Rt4KmW, please."})


def test_setting_that_names_a_variable_means_its_value() -> None:
    found = FoundSecrets({"SERVICE": "value-of-variable"})
    found.add_settings({"api_key_env": "SERVICE", "token": "${SERVICE}"})
    assert list(found.texts) == ["value-of-variable"]


def test_files_with_secrets_are_found_and_their_paths_are_no_secrets() -> None:
    found = FoundSecrets({"GOOGLE_APPLICATION_CREDENTIALS": "/run/google.json", "SSL_CERT_FILE": "/etc/cert.pem"})
    found.add_settings(
        {"api_key_file": "key.txt", "uri_file": "/run/uri", "template_file": "/x", "tls": {"key": "/k.pem"}}
    )
    found.add_environment()
    assert list(found.texts) == []
    assert {str(file) for file in found.files} == {"key.txt", "/run/uri", "/k.pem", "/run/google.json"}


PEM_LINES = ["MIIBVgIBADANBgkqhkiG9w0BAQEFAASCAUAwggE8AgEAAkEAq7BFUpkGp3", "Yx2eqzDV+xeG8kx/sQFV18S5JhzGeIJNA72"]
PEM = "\n".join(["-----BEGIN PRIVATE KEY-----", *PEM_LINES, "-----END PRIVATE KEY-----"])


@pytest.mark.parametrize(
    ("content", "secrets", "others"),
    [
        ("swordfish\n", ["swordfish"], []),
        ("\ufeff'swordfish'\r\n", ["swordfish"], []),
        ('SERVICE_KEY="swordfish"\n', ["swordfish"], ["SERVICE_KEY"]),
        ("bob-the-user\nswordfish-1\n", ["swordfish-1"], []),
        (PEM, PEM_LINES, ["-----BEGIN PRIVATE KEY-----"]),
        (json.dumps({"type": "service_account", "private_key": PEM, "client_id": "1"}), PEM_LINES, ["service_account"]),
        (
            "[a]\nuser = bob\npassword = swordfish\n[b]\nname = conference\n",
            ["swordfish"],
            ["user = bob", "conference"],
        ),
        ("export API_KEY='swordfish-1'\nREGION=europe-west\nA=b\nC=d", ["swordfish-1"], ["europe-west"]),
        ("machine example.org login bob password swordfish", ["swordfish"], ["machine"]),
        ("mongodb://bob:swordfish@db/x\n", ["swordfish"], ["mongodb"]),
        ("bob:hunter2!\n", ["hunter2!"], ["bob"]),
        ("127.0.0.1:5432:db:bob:hunter2!\ndb.example.org:5432:db:bob:swordfish-1", ["hunter2!", "swordfish-1"], []),
        ("openai:\n  api_key: swordfish # mine\n  region: europe-west\n", ["swordfish"], ["openai:", "europe-west"]),
        ("users:\n  - name: conference-1\n    password: 'two words'\n", ["two words"], ["conference-1"]),
    ],
)
def test_secrets_in_files_are_found(content: str, secrets: list[str], others: list[str]) -> None:
    found = find_in_content(content)
    assert set(secrets) <= set(found)
    assert not set(others) & set(found)


def test_search_is_bounded() -> None:
    nested: Any = {"password": "deep-value"}
    for _ in range(10_000):
        nested = {"x": nested}
    assert find_in({"x": nested, "y": ["z"] * 100_000}) == []
    found = FoundSecrets({"API_KEY": VALUE})
    found.add_settings({"y": ["z"] * 100_000})
    found.add_environment()
    assert list(found.texts) == [VALUE]


def test_secrets_of_each_source_are_known_if_one_has_too_many() -> None:
    many = find_in({"passwords": [f"number-{number}" for number in range(1000)]})
    merged = merge_fairly([many, ["second-1", "second-2", many[0]], []])[:MAX_SECRETS]
    assert {"second-1", "second-2", "number-0", f"number-{MAX_SECRETS - 3}"} <= set(merged)
    assert len(set(merged)) == MAX_SECRETS


def test_only_regular_text_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * (2 * MAX_FILE_BYTES))
    assert read_secret_file(file) == "x" * MAX_FILE_BYTES
    file.write_bytes(b"\xef\xbb\xbfkey")
    assert read_secret_file(file) == "key"
    file.write_bytes(b"\x00binary")
    os.mkfifo(pipe := tmp_path / "pipe")
    contents: list[str | None] = []
    paths = (file, tmp_path, tmp_path / "missing", Path("/dev/zero"), pipe)
    thread = threading.Thread(target=lambda: contents.extend(map(read_secret_file, paths)), daemon=True)
    thread.start()
    thread.join(10)
    assert contents == [None] * len(paths)

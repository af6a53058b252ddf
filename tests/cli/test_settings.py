"""Settings from config.yaml and the environment: their values, and the errors about wrong ones."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, SecretStr

from jobledger.cli.settings import Settings
from jobledger.cli.settings_file import read_settings
from jobledger.ledger.domain.errors import ConfigurationError
from jobledger.workers.registry import load_processors

REPOSITORY = Path(__file__).parents[2]
UNUSED_KEYS = {("event_worker", "poll_interval_sec")}


@pytest.fixture(autouse=True)
def _clear_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("JOBLEDGER_"):
            monkeypatch.delenv(name)


def read_config(tmp_path: Path, text: str | bytes) -> tuple[Settings, list[str]]:
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_settings(path)


def read_invalid_config(tmp_path: Path, text: str | bytes) -> str:
    """Return the error about a wrong config.yaml, which must be one line."""
    with pytest.raises(ConfigurationError) as raised:
        read_config(tmp_path, text)
    message = str(raised.value)
    assert "\n" not in message
    assert "pydantic" not in message
    return message


def to_yaml_value(value: Any) -> Any:
    """Return a default value as config.yaml contains it."""
    match value:
        case BaseModel():
            return {name: to_yaml_value(getattr(value, name)) for name in type(value).model_fields}
        case SecretStr():
            return value.get_secret_value()
        case Path():
            return str(value)
        case _:
            return value


def flatten(content: Mapping[str, Any], *parents: str) -> dict[tuple[str, ...], Any]:
    values: dict[tuple[str, ...], Any] = {}
    for name, value in content.items():
        values |= flatten(value, *parents, name) if isinstance(value, dict) else {(*parents, name): value}
    return values


def test_repository_config_yaml_contains_all_defaults() -> None:
    written = flatten(yaml.safe_load((REPOSITORY / "config.yaml").read_text(encoding="utf-8")))
    defaults = to_yaml_value(Settings())
    defaults["processors"] = {
        name: to_yaml_value(processor.Settings()) for name, processor in load_processors().items()
    }
    expected = {path: value for path, value in flatten(defaults).items() if path not in UNUSED_KEYS}

    assert written.keys() == expected.keys()
    for path, value in expected.items():
        assert written[path] == value, ".".join(path)
        assert type(written[path]) is type(value) or {type(written[path]), type(value)} == {int, float}, path


def test_repository_config_yaml_sections_have_comments() -> None:
    text = (REPOSITORY / "config.yaml").read_text(encoding="utf-8")
    for section in text.split("\n\n")[1:]:
        assert "#" in section, section.splitlines()[0]


def test_settings_without_file_are_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings, notices = read_settings(None)

    assert notices == []
    assert settings.mongodb.is_embedded
    assert settings.mongodb.data_dir == tmp_path / "data"
    assert settings.results.store == tmp_path / "data" / "results"


def test_settings_with_poll_interval_give_notice_and_are_used(tmp_path: Path) -> None:
    settings, notices = read_config(
        tmp_path,
        """
        mongodb:
          uri: "mongodb://localhost:27017/?replicaSet=rs0"
          db_name: event_processing
          max_pool_size: 50
          connect_timeout_ms: 5000
        event_worker:
          max_concurrent: 3
          poll_interval_sec: 5
        """,
    )

    assert settings.event_worker.max_concurrent == 3
    assert settings.api.port == 5001
    [notice] = notices
    assert "event_worker.poll_interval_sec" in notice
    assert "workers do not poll" in notice


@pytest.mark.parametrize("text", ["", "# nothing\n", "mongodb:\n", "processors:\n", "processors:\n  session:\n"])
def test_settings_empty_section_has_defaults(tmp_path: Path, text: str) -> None:
    settings, _ = read_config(tmp_path, text)
    assert settings.api == Settings().api


@pytest.mark.parametrize(
    ("text", "key", "expected_text"),
    [
        ("api:\n  prot: 5\n", "api.prot", "Keys: host, port"),
        ("apis:\n  port: 5\n", "apis", "Sections: mongodb, event_worker, api"),
        ("1: x\n", "1", "Sections: mongodb"),
        ("_env_file: x\n", "_env_file", "Sections: mongodb"),
        ("api:\n  1: x\n", "api", "string"),
        ("api:\n  port: many\n", "api.port", "valid integer"),
        ("api:\n  port: 65536\n", "api.port", "less than or equal to 65535, got 65536"),
        ("api:\n  port: -1\n", "api.port", "greater than or equal to 0, got -1"),
        ("api:\n  port: 1.5\n", "api.port", "valid integer"),
        ("api:\n  port: [5001]\n", "api.port", "valid integer"),
        ("api:\n  host: 0.0.0.0\n", "api.host", "127.0.0.1"),
        ("api:\n  host: example.org\n", "api.host", "127.0.0.1"),
        ("api:\n  public_url: example.org\n", "api.public_url", "https?://"),
        ("api:\n  public_url: https://example.org/api\n", "api.public_url", "must not begin with /api"),
        ("api:\n  public_url: https://example.org/monitoring/jobs/\n", "api.public_url", "must not begin with"),
        ("api: 5\n", "api", "Keys: host, port"),
        ("api: [1, 2]\n", "api", "Keys: host, port"),
        ("api: &a [*a]\n", "api", "Keys: host, port"),
        ("auth:\n  mode: ldap\n", "auth.mode", "'open', 'keys', 'jwt' or 'proxy'"),
        ("mongodb:\n  db_name: 'a.b'\n", "mongodb.db_name", "pattern"),
        ("mongodb:\n  embedded_oplog_mb: 1\n", "mongodb.embedded_oplog_mb", "greater than or equal to"),
        ("mongodb:\n  uri: 5\n", "mongodb.uri", "valid string"),
        ("event_worker:\n  max_concurrent: 0\n", "event_worker.max_concurrent", "greater than or equal to 1"),
        ("event_worker:\n  lease_seconds: .nan\n", "event_worker.lease_seconds", ", got nan"),
        ("event_worker:\n  lease_seconds: .inf\n", "event_worker.lease_seconds", "less than or equal to 3600"),
        ("logging:\n  level: verbose\n", "logging.level", "'debug', 'info', 'warning' or 'error'"),
        ("processors: 5\n", "processors", "Keys: echo, session"),
        ("processors:\n  video: {}\n", "processors", "Installed processors: echo, session"),
        ("processors:\n  session: 5\n", "processors.session", "Keys: connect_timeout_seconds"),
        ("processors:\n  session:\n    pages: 5\n", "processors.session.pages", "max_pdf_pages"),
        ("processors:\n  session:\n    max_pdf_pages: x\n", "processors.session.max_pdf_pages", "valid integer"),
        (
            "processors:\n  session:\n    allowed_private_hosts: ['a b']\n",
            "processors.session.allowed_private_hosts",
            "network such as",
        ),
        (
            "webhooks:\n  allowed_private_hosts: ['intern.example:80']\n",
            "webhooks.allowed_private_hosts",
            "without port",
        ),
        (
            "processors:\n  session:\n    transcription:\n      backend: whisper\n",
            "processors.session.transcription.backend",
            "'none', 'pocketsphinx' or 'openai'",
        ),
        (
            "processors:\n  session:\n    transcription:\n      modell: x\n",
            "processors.session.transcription.modell",
            "Keys: backend, url, model, api_key_file",
        ),
    ],
)
def test_settings_wrong_value_error_names_file_key_and_fix(
    tmp_path: Path, text: str, key: str, expected_text: str
) -> None:
    message = read_invalid_config(tmp_path, text)

    assert message.startswith(f"{tmp_path / 'config.yaml'}: {key}") or key in message.split(": ", 1)[1]
    assert expected_text in message


@pytest.mark.parametrize(
    ("text", "expected_text"),
    [
        ("- api\n- auth\n", "got list"),
        ("just words\n", "got str"),
        ("api: [\n", "is not YAML"),
        ("a: b: c\n", "is not YAML"),
        ("\tapi:\n", "is not YAML"),
        ("!!python/object/apply:os.system ['true']\n", "is not YAML"),
        ("[" * 20_000, "is not YAML"),
        (b"\xff\xfe", "cannot be read"),
        (b"api: \x00\n", "is not YAML"),
    ],
)
def test_settings_invalid_file_error_names_file(tmp_path: Path, text: str | bytes, expected_text: str) -> None:
    message = read_invalid_config(tmp_path, text)
    assert message.startswith(str(tmp_path / "config.yaml"))
    assert expected_text in message


def test_settings_missing_file_is_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.yaml: file not found"):
        read_settings(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_settings(tmp_path)


def test_environment_variable_overrides_one_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOBLEDGER_API__PORT", "8080")
    monkeypatch.setenv("JOBLEDGER_PROCESSORS__SESSION__MAX_PDF_PAGES", "7")
    monkeypatch.setenv("JOBLEDGER_PROCESSORS__SESSION__TRANSCRIPTION__BACKEND", "pocketsphinx")
    settings, _ = read_config(
        tmp_path,
        "api:\n  port: 1\n  max_body_bytes: 2048\n"
        "processors:\n  session:\n    max_pdf_pages: 3\n    keep_audio: true\n",
    )

    assert settings.api.port == 8080
    assert settings.api.max_body_bytes == 2048
    session = load_processors()["session"].Settings.model_validate(settings.processors["session"])
    assert session.model_dump()["max_pdf_pages"] == 7
    assert session.model_dump()["keep_audio"] is True
    assert session.model_dump()["transcription"]["backend"] == "pocketsphinx"


@pytest.mark.parametrize(
    ("variable", "value", "expected_text"),
    [
        ("JOBLEDGER_API__PORT", "many", "valid integer, unable to parse string as an integer, got 'many'"),
        ("JOBLEDGER_API__PORT", "", "valid integer"),
        ("JOBLEDGER_API__PROT", "1", "Keys: host, port"),
        ("JOBLEDGER_APIS__PORT", "1", "Sections: mongodb"),
        ("JOBLEDGER_LOGGING", "debug", "JOBLEDGER_LOGGING__KEY"),
        ("JOBLEDGER_MONGODB", "mongodb://user:s3cret@host", "JOBLEDGER_MONGODB__KEY"),
        ("JOBLEDGER_LOGGING__LEVEL", "loud", "'debug', 'info', 'warning' or 'error'"),
        ("JOBLEDGER_PROCESSORS__SESSION__MAX_PDF_PAGES", "x", "valid integer"),
    ],
)
def test_environment_wrong_value_error_names_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, expected_text: str
) -> None:
    monkeypatch.setenv(variable, value)
    message = read_invalid_config(tmp_path, "")

    assert message.startswith(f"environment variable {variable}: ")
    assert expected_text in message
    assert "s3cret" not in message


def test_environment_other_variables_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOBLEDGER_URL", "http://elsewhere")
    monkeypatch.setenv("JOBLEDGER_API_PORT", "tcp://10.0.0.1:80")  # Kubernetes does this for a service jobledger-api
    settings, _ = read_config(tmp_path, "")
    assert settings.api.port == 5001


def test_settings_relative_path_is_resolved_from_file_directory(tmp_path: Path) -> None:
    settings, _ = read_config(tmp_path, "mongodb:\n  data_dir: here\nresults:\n  store: /there\n")
    assert settings.mongodb.data_dir == tmp_path / "here"
    assert settings.results.store == Path("/there")


@pytest.mark.parametrize("word", ["gridfs", "GridFS", "'gridfs '"])
def test_result_store_gridfs_is_recognized(tmp_path: Path, word: str) -> None:
    assert read_config(tmp_path, f"results:\n  store: {word}\n")[0].results.store == "gridfs"
    assert read_config(tmp_path, "results:\n  store: ./gridfs\n")[0].results.store == tmp_path / "gridfs"


def test_result_store_unknown_scheme_is_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"results\.store: unknown result store: expected a directory, or"):
        read_config(tmp_path, "results:\n  store: s3://bucket/results\n")


def test_mongodb_uri_file_is_read_and_password_hidden(tmp_path: Path) -> None:
    (tmp_path / "uri").write_text("mongodb://user:s3cret@host/\n")
    settings, _ = read_config(tmp_path, "mongodb:\n  uri_file: uri\n")

    assert settings.mongodb.uri.get_secret_value() == "mongodb://user:s3cret@host/"
    assert not settings.mongodb.is_embedded
    for shown in (repr(settings), str(settings), repr(settings.mongodb), settings.model_dump_json()):
        assert "s3cret" not in shown


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_mongodb_uri_file_unreadable_error_names_file(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "uri").write_bytes(content)
    message = read_invalid_config(tmp_path, "mongodb:\n  uri_file: uri\n")
    assert message.startswith(f"mongodb.uri_file: {tmp_path / 'uri'} cannot be read")


@pytest.mark.parametrize(
    "text",
    [
        'mongodb: "mongodb://user:s3cret@host/"\n',
        'mongodb:\n  uri: ["mongodb://user:s3cret@host/"]\n',
        'mongodb:\n  urii: "mongodb://user:s3cret@host/"\n',
        'mongodb:\n  db_name: "mongodb://user:s3cret@host/"\n',
        'mongodb:\n  max_pool_size: "mongodb://user:s3cret@host/"\n',
        'url: "mongodb://user:s3cret@host/"\n',
    ],
)
def test_settings_error_does_not_show_misplaced_password(tmp_path: Path, text: str) -> None:
    assert "s3cret" not in read_invalid_config(tmp_path, text)


@pytest.mark.parametrize(
    "uri",
    [
        "mongodb://user:s3cret@host:70000/",
        "mongodb://user:s3cret@@host/",
        "mongodb://user:s3/cret@host/",
        "mongodb://user:s3cret@host:x/",
        "mongodb://user:s3cret@/",
        "mongo://user:s3cret@host/",
        "mongodb://user:s3cret@host/?replicaSet",
    ],
)
def test_mongodb_uri_unusable_error_hides_password(tmp_path: Path, uri: str) -> None:
    settings, _ = read_config(tmp_path, yaml.safe_dump({"mongodb": {"uri": uri}}))
    with pytest.raises(ConfigurationError) as raised:
        settings.mongodb.make_connection(uri).create_client()
    message = str(raised.value)

    assert message.startswith("mongodb.uri is not valid")
    for part in ("s3cret", "cret@", "s3"):
        assert part not in message


# Authentication -------------------------------------------------------------------------------------------------------

LONG_SECRET = "s3cret" * 6


@pytest.mark.parametrize("mode", ["keys", "jwt", "proxy"])
def test_auth_mode_with_credentials_allows_public_host(tmp_path: Path, mode: str) -> None:
    required_keys: dict[str, Any] = {
        "jwt": {"jwt": {"jwks_url": "https://id.example.org/keys"}},
        "proxy": {"proxy": {"trusted": ["10.0.0.0/8"]}},
    }
    auth = {"mode": mode, **required_keys.get(mode, {})}
    settings, _ = read_config(tmp_path, yaml.safe_dump({"api": {"host": "0.0.0.0"}, "auth": auth}))
    assert settings.auth.mode == mode


@pytest.mark.parametrize(
    ("auth", "expected_texts"),
    [
        ("mode: jwt", ["one of jwt.secret_file", "got: none"]),
        ("mode: jwt\n  jwt: {issuer: us}", ["got: none"]),
        (
            "mode: jwt\n  jwt: {jwks_url: 'https://id.example.org/', public_key_file: key.pem}",
            ["got: jwt.public_key_file, jwt.jwks_url"],
        ),
        ("mode: jwt\n  jwt: {jwks_url: 'http://id.example.org/'}", ["auth.jwt.jwks_url", "https://"]),
        ("mode: jwt\n  jwt: {jwks_url: 'file:///etc/passwd'}", ["auth.jwt.jwks_url", "https://"]),
        ("mode: jwt\n  jwt: {jwks_url: 'https://'}", ["auth.jwt.jwks_url", "https://"]),
        ("mode: jwt\n  jwt: {leeway_seconds: 3601}", ["auth.jwt.leeway_seconds", "600"]),
        ("mode: jwt\n  jwt: {algorithm: none}", ["auth.jwt.algorithm", "Keys: secret, secret_file"]),
        ("mode: proxy", ["proxy.trusted"]),
        ("mode: proxy\n  proxy: {trusted: []}", ["proxy.trusted"]),
        ("mode: proxy\n  proxy: {trusted: [proxy.example.org]}", ["auth.proxy.trusted", "10.1.0.0/16"]),
        ("mode: proxy\n  proxy: {trusted: [10.1.0.1/16]}", ["auth.proxy.trusted", "host bits"]),
        ("mode: proxy\n  proxy: {trusted: [0.0.0.0/0]}", ["auth.proxy.trusted", "contains all addresses"]),
        ("mode: proxy\n  proxy: {trusted: ['::/0']}", ["auth.proxy.trusted", "contains all addresses"]),
        ("mode: proxy\n  proxy: {trusted: [10.0.0.1], user_header: 'X User'}", ["auth.proxy.user_header"]),
        ("mode: keys\n  jwt: {issuer: us}", ["`jwt` has no effect", "mode `keys`", "set mode to `jwt`"]),
        ("mode: jwt\n  proxy: {trusted: [10.0.0.1]}", ["`proxy` has no effect", "mode `jwt`"]),
        ("jwt: {issuer: us}", ["`jwt` has no effect", "mode `open`"]),
        ("mode: keys\n  admins: [ann]", ["`admins` has no effect", "jobledger keys create --role admin"]),
        ("mode: keys\n  monitors: [mona]", ["`monitors` has no effect", "--role monitor"]),
        ("anonymous_read: true", ["`anonymous_read` has no effect", "mode `open`"]),
        ("mode: jwt\n  admins: ann", ["auth.admins", "list"]),
    ],
)
def test_auth_inconsistent_settings_are_refused(tmp_path: Path, auth: str, expected_texts: list[str]) -> None:
    message = read_invalid_config(tmp_path, f"auth:\n  {auth}\n")
    assert message.startswith(f"{tmp_path / 'config.yaml'}: auth")
    for expected_text in expected_texts:
        assert expected_text in message


def test_jwt_secret_in_config_yaml_is_refused(tmp_path: Path) -> None:
    for secret in (LONG_SECRET, "s3cret", 5):
        message = read_invalid_config(tmp_path, yaml.safe_dump({"auth": {"mode": "jwt", "jwt": {"secret": secret}}}))
        assert "auth.jwt.secret_file" in message
        assert "JOBLEDGER_AUTH__JWT__SECRET" in message
        assert "s3cret" not in message


def test_jwt_secret_from_file_or_environment_is_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text(f"{LONG_SECRET}\n")
    from_file, _ = read_config(tmp_path, "auth:\n  mode: jwt\n  jwt:\n    secret_file: secret\n")
    monkeypatch.setenv("JOBLEDGER_AUTH__JWT__SECRET", LONG_SECRET)
    from_environment, _ = read_config(tmp_path, "auth:\n  mode: jwt\n")
    for settings in (from_file, from_environment):
        assert settings.auth.jwt.secret is not None
        assert settings.auth.jwt.secret.get_secret_value() == LONG_SECRET
        for shown in (repr(settings), str(settings), settings.model_dump_json()):
            assert LONG_SECRET not in shown
    message = read_invalid_config(tmp_path, "auth:\n  mode: jwt\n  jwt:\n    secret_file: secret\n")
    assert "got: jwt.secret, jwt.secret_file" in message


def test_jwt_secret_too_short_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text("s3cret\n" + " " * 40)
    message = read_invalid_config(tmp_path, "auth:\n  mode: jwt\n  jwt:\n    secret_file: secret\n")
    assert message.startswith(f"auth.jwt.secret_file: {tmp_path / 'secret'}: a JWT secret must have at least 32 bytes")
    assert "s3cret" not in message
    missing = read_invalid_config(tmp_path, "auth:\n  mode: jwt\n  jwt:\n    secret_file: nowhere\n")
    assert missing.startswith(f"auth.jwt.secret_file: {tmp_path / 'nowhere'} cannot be read")
    monkeypatch.setenv("JOBLEDGER_AUTH__JWT__SECRET", "s3cret")
    message = read_invalid_config(tmp_path, "auth:\n  mode: jwt\n")
    assert message.startswith("environment variable JOBLEDGER_AUTH__JWT__SECRET: a JWT secret must have at least 32")
    assert "s3cret" not in message


def test_environment_lists_are_read_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOBLEDGER_AUTH__MODE", "proxy")
    monkeypatch.setenv("JOBLEDGER_AUTH__PROXY__TRUSTED", '["10.0.0.1"]')
    monkeypatch.setenv("JOBLEDGER_AUTH__ADMINS", '["ann", "team-ops"]')
    settings, _ = read_config(tmp_path, "")
    assert settings.auth.proxy.trusted == ["10.0.0.1"]
    assert settings.auth.admins == ["ann", "team-ops"]

    monkeypatch.setenv("JOBLEDGER_PROCESSORS__SESSION__ALLOWED_PRIVATE_HOSTS", '["10.0.0.2"]')
    settings, _ = read_config(tmp_path, "processors: {session: {max_pdf_pages: 3}}")
    session = load_processors()["session"].Settings.model_validate(settings.processors["session"]).model_dump()
    assert (session["allowed_private_hosts"], session["max_pdf_pages"]) == (["10.0.0.2"], 3)
    for text in ("10.0.0.2", '["10.0.0.2"'):
        monkeypatch.setenv("JOBLEDGER_PROCESSORS__SESSION__ALLOWED_PRIVATE_HOSTS", text)
        message = read_invalid_config(tmp_path, "")
        assert message.startswith("environment variable JOBLEDGER_PROCESSORS__SESSION__ALLOWED_PRIVATE_HOSTS: ")
        assert "a valid list in JSON, for example" in message
    monkeypatch.delenv("JOBLEDGER_PROCESSORS__SESSION__ALLOWED_PRIVATE_HOSTS")

    monkeypatch.setenv("JOBLEDGER_AUTH__ADMINS", "ann")
    message = read_invalid_config(tmp_path, "")
    assert message.startswith("environment variables JOBLEDGER_AUTH__…: lists and sections must be JSON")


def test_processor_relative_paths_are_resolved_from_file_directory(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("processors: {session: {template: own.j2, transcription: {api_key_file: keys/openai}}}")
    section = read_settings(config)[0].processors["session"]
    assert section == {
        "template": str(tmp_path / "own.j2"),
        "transcription": {"api_key_file": str(tmp_path / "keys/openai")},
    }

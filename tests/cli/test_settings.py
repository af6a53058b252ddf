"""config.yaml and the environment: what is in force, and what somebody is told who has made a mistake."""

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
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("JOBLEDGER_"):
            monkeypatch.delenv(name)


def read(tmp_path: Path, text: str | bytes) -> tuple[Settings, list[str]]:
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_settings(path)


def complaint(tmp_path: Path, text: str | bytes) -> str:
    """What is said about a config.yaml that is wrong: one line that names the file."""
    with pytest.raises(ConfigurationError) as raised:
        read(tmp_path, text)
    message = str(raised.value)
    assert "\n" not in message
    assert "pydantic" not in message
    return message


def plain(value: Any) -> Any:
    """Return a default as config.yaml would write it."""
    match value:
        case BaseModel():
            return {name: plain(getattr(value, name)) for name in type(value).model_fields}
        case SecretStr():
            return value.get_secret_value()
        case Path():
            return str(value)
        case _:
            return value


def leaves(content: Mapping[str, Any], *above: str) -> dict[tuple[str, ...], Any]:
    found: dict[tuple[str, ...], Any] = {}
    for name, value in content.items():
        found |= leaves(value, *above, name) if isinstance(value, dict) else {(*above, name): value}
    return found


def test_the_config_yaml_of_the_repository_says_the_defaults_key_by_key() -> None:
    written = leaves(yaml.safe_load((REPOSITORY / "config.yaml").read_text(encoding="utf-8")))
    defaults = plain(Settings())
    defaults["processors"] = {name: plain(processor.Settings()) for name, processor in load_processors().items()}
    wanted = {path: value for path, value in leaves(defaults).items() if path not in UNUSED_KEYS}

    assert written.keys() == wanted.keys()
    for path, value in wanted.items():
        assert written[path] == value, ".".join(path)
        assert type(written[path]) is type(value) or {type(written[path]), type(value)} == {int, float}, path


def test_every_key_of_config_yaml_is_preceded_by_a_comment_in_its_section() -> None:
    text = (REPOSITORY / "config.yaml").read_text(encoding="utf-8")
    for section in text.split("\n\n")[1:]:
        assert "#" in section, section.splitlines()[0]


def test_without_a_file_everything_has_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings, notices = read_settings(None)

    assert notices == []
    assert settings.mongodb.is_embedded
    assert settings.mongodb.data_dir == tmp_path / "data"
    assert settings.results.store == tmp_path / "data" / "results"


def test_a_file_of_only_the_concepts_two_sections_works_and_polling_is_said_to_be_over(tmp_path: Path) -> None:
    settings, notices = read(
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
def test_sections_without_anything_in_them_are_as_good_as_none(tmp_path: Path, text: str) -> None:
    settings, _ = read(tmp_path, text)
    assert settings.api == Settings().api


@pytest.mark.parametrize(
    ("text", "place", "right"),
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
            "processors:\n  session:\n    transcription:\n      backend: whisper\n",
            "processors.session.transcription.backend",
            "'none', 'pocketsphinx' or 'openai'",
        ),
        (
            "processors:\n  session:\n    transcription:\n      modell: x\n",
            "processors.session.transcription.modell",
            "Keys: url, model, api_key_file, backend",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_the_file_the_key_and_what_is_right(
    tmp_path: Path, text: str, place: str, right: str
) -> None:
    message = complaint(tmp_path, text)

    assert message.startswith(f"{tmp_path / 'config.yaml'}: {place}") or place in message.split(": ", 1)[1]
    assert right in message


@pytest.mark.parametrize(
    ("text", "said"),
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
def test_a_file_that_is_no_settings_at_all_is_named(tmp_path: Path, text: str | bytes, said: str) -> None:
    message = complaint(tmp_path, text)
    assert message.startswith(str(tmp_path / "config.yaml"))
    assert said in message


def test_a_file_that_was_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.yaml: file not found"):
        read_settings(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_settings(tmp_path)


def test_the_environment_overrides_the_file_key_by_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOBLEDGER_API__PORT", "8080")
    monkeypatch.setenv("JOBLEDGER_PROCESSORS__SESSION__MAX_PDF_PAGES", "7")
    monkeypatch.setenv("JOBLEDGER_PROCESSORS__SESSION__TRANSCRIPTION__BACKEND", "pocketsphinx")
    settings, _ = read(
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
    ("variable", "value", "right"),
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
def test_a_mistake_in_the_environment_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, right: str
) -> None:
    monkeypatch.setenv(variable, value)
    message = complaint(tmp_path, "")

    assert message.startswith(f"environment variable {variable}: ")
    assert right in message
    assert "s3cret" not in message


def test_variables_that_are_not_settings_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOBLEDGER_URL", "http://elsewhere")
    monkeypatch.setenv("JOBLEDGER_API_PORT", "tcp://10.0.0.1:80")  # Kubernetes does this for a service jobledger-api
    settings, _ = read(tmp_path, "")
    assert settings.api.port == 5001


def test_relative_paths_start_where_the_file_lies(tmp_path: Path) -> None:
    settings, _ = read(tmp_path, "mongodb:\n  data_dir: here\nresults:\n  store: /there\n")
    assert settings.mongodb.data_dir == tmp_path / "here"
    assert settings.results.store == Path("/there")


@pytest.mark.parametrize("word", ["gridfs", "GridFS", "'gridfs '"])
def test_result_files_can_lie_in_the_database(tmp_path: Path, word: str) -> None:
    assert read(tmp_path, f"results:\n  store: {word}\n")[0].results.store == "gridfs"
    assert read(tmp_path, "results:\n  store: ./gridfs\n")[0].results.store == tmp_path / "gridfs"


def test_a_store_that_there_is_not_becomes_no_directory_of_that_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"results\.store: unknown result store: expected a directory, or"):
        read(tmp_path, "results:\n  store: s3://bucket/results\n")


def test_an_address_with_a_password_can_lie_in_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "uri").write_text("mongodb://user:s3cret@host/\n")
    settings, _ = read(tmp_path, "mongodb:\n  uri_file: uri\n")

    assert settings.mongodb.uri.get_secret_value() == "mongodb://user:s3cret@host/"
    assert not settings.mongodb.is_embedded
    for shown in (repr(settings), str(settings), repr(settings.mongodb), settings.model_dump_json()):
        assert "s3cret" not in shown


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_for_the_address_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "uri").write_bytes(content)
    message = complaint(tmp_path, "mongodb:\n  uri_file: uri\n")
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
def test_a_password_in_the_wrong_place_is_not_repeated_in_the_complaint(tmp_path: Path, text: str) -> None:
    assert "s3cret" not in complaint(tmp_path, text)


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
def test_an_address_that_cannot_be_used_is_refused_without_showing_its_password(tmp_path: Path, uri: str) -> None:
    settings, _ = read(tmp_path, yaml.safe_dump({"mongodb": {"uri": uri}}))
    with pytest.raises(ConfigurationError) as raised:
        settings.mongodb.make_connection(uri).client()
    message = str(raised.value)

    assert message.startswith("mongodb.uri is not usable")
    for part in ("s3cret", "cret@", "s3"):
        assert part not in message


# Sign-in ------------------------------------------------------------------------------------------------------------

LONG_SECRET = "s3cret" * 6


@pytest.mark.parametrize("mode", ["keys", "jwt", "proxy"])
def test_with_sign_in_others_may_reach_us(tmp_path: Path, mode: str) -> None:
    needed: dict[str, Any] = {
        "jwt": {"jwt": {"jwks_url": "https://id.example.org/keys"}},
        "proxy": {"proxy": {"trusted": ["10.0.0.0/8"]}},
    }
    auth = {"mode": mode, **needed.get(mode, {})}
    settings, _ = read(tmp_path, yaml.safe_dump({"api": {"host": "0.0.0.0"}, "auth": auth}))
    assert settings.auth.mode == mode


@pytest.mark.parametrize(
    ("auth", "words"),
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
def test_a_way_to_sign_in_that_does_not_fit_together_is_refused(tmp_path: Path, auth: str, words: list[str]) -> None:
    message = complaint(tmp_path, f"auth:\n  {auth}\n")
    assert message.startswith(f"{tmp_path / 'config.yaml'}: auth")
    for word in words:
        assert word in message


def test_a_secret_for_tokens_does_not_stand_in_the_file(tmp_path: Path) -> None:
    for secret in (LONG_SECRET, "s3cret", 5):
        message = complaint(tmp_path, yaml.safe_dump({"auth": {"mode": "jwt", "jwt": {"secret": secret}}}))
        assert "auth.jwt.secret_file" in message
        assert "JOBLEDGER_AUTH__JWT__SECRET" in message
        assert "s3cret" not in message


def test_a_secret_for_tokens_comes_from_a_file_or_the_environment_and_is_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_text(f"{LONG_SECRET}\n")
    by_file, _ = read(tmp_path, "auth:\n  mode: jwt\n  jwt:\n    secret_file: secret\n")
    monkeypatch.setenv("JOBLEDGER_AUTH__JWT__SECRET", LONG_SECRET)
    by_environment, _ = read(tmp_path, "auth:\n  mode: jwt\n")
    for settings in (by_file, by_environment):
        assert settings.auth.jwt.secret is not None
        assert settings.auth.jwt.secret.get_secret_value() == LONG_SECRET
        for shown in (repr(settings), str(settings), settings.model_dump_json()):
            assert LONG_SECRET not in shown
    message = complaint(tmp_path, "auth:\n  mode: jwt\n  jwt:\n    secret_file: secret\n")
    assert "got: jwt.secret, jwt.secret_file" in message


def test_a_secret_for_tokens_that_can_be_guessed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text("s3cret\n" + " " * 40)
    message = complaint(tmp_path, "auth:\n  mode: jwt\n  jwt:\n    secret_file: secret\n")
    assert message.startswith(f"auth.jwt.secret_file: {tmp_path / 'secret'}: a JWT secret must have at least 32 bytes")
    assert "s3cret" not in message
    missing = complaint(tmp_path, "auth:\n  mode: jwt\n  jwt:\n    secret_file: nowhere\n")
    assert missing.startswith(f"auth.jwt.secret_file: {tmp_path / 'nowhere'} cannot be read")
    monkeypatch.setenv("JOBLEDGER_AUTH__JWT__SECRET", "s3cret")
    message = complaint(tmp_path, "auth:\n  mode: jwt\n")
    assert message.startswith("environment variable JOBLEDGER_AUTH__JWT__SECRET: a JWT secret must have at least 32")
    assert "s3cret" not in message


def test_lists_in_the_environment_are_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOBLEDGER_AUTH__MODE", "proxy")
    monkeypatch.setenv("JOBLEDGER_AUTH__PROXY__TRUSTED", '["10.0.0.1"]')
    monkeypatch.setenv("JOBLEDGER_AUTH__ADMINS", '["ann", "team-ops"]')
    settings, _ = read(tmp_path, "")
    assert settings.auth.proxy.trusted == ["10.0.0.1"]
    assert settings.auth.admins == ["ann", "team-ops"]

    monkeypatch.setenv("JOBLEDGER_PROCESSORS__SESSION__ALLOWED_PRIVATE_HOSTS", '["10.0.0.2"]')
    settings, _ = read(tmp_path, "processors: {session: {max_pdf_pages: 3}}")
    session = load_processors()["session"].Settings.model_validate(settings.processors["session"]).model_dump()
    assert (session["allowed_private_hosts"], session["max_pdf_pages"]) == (["10.0.0.2"], 3)
    for text in ("10.0.0.2", '["10.0.0.2"'):
        monkeypatch.setenv("JOBLEDGER_PROCESSORS__SESSION__ALLOWED_PRIVATE_HOSTS", text)
        message = complaint(tmp_path, "")
        assert message.startswith("environment variable JOBLEDGER_PROCESSORS__SESSION__ALLOWED_PRIVATE_HOSTS: ")
        assert "a valid list in JSON, for example" in message
    monkeypatch.delenv("JOBLEDGER_PROCESSORS__SESSION__ALLOWED_PRIVATE_HOSTS")

    monkeypatch.setenv("JOBLEDGER_AUTH__ADMINS", "ann")
    message = complaint(tmp_path, "")
    assert message.startswith("environment variables JOBLEDGER_AUTH__…: lists and sections must be JSON")


def test_paths_of_processors_are_where_the_file_lies(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("processors: {session: {template: own.j2, transcription: {api_key_file: keys/openai}}}")
    section = read_settings(config)[0].processors["session"]
    assert section == {
        "template": str(tmp_path / "own.j2"),
        "transcription": {"api_key_file": str(tmp_path / "keys/openai")},
    }

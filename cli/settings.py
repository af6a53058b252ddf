"""cli: config.yaml and the environment, checked, as one object. Read here only; the rooms below are handed values."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

import orjson
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from jobledger.cli.auth_settings import (
    AuthSettings,
    JwtSettings,
    SettingsSection,
    is_loopback,
    validate_network,
    validate_secret_length,
)
from jobledger.ledger.domain.errors import ConfigurationError, classify_os_error
from jobledger.ledger.mongo.connection import Connection
from jobledger.workers.child.confinement import ConfinementMode
from jobledger.workers.registry import disable_job_type, is_built_in, load_processors, unusable_job_types

EMBEDDED = "embedded"
_PREFIX = "JOBLEDGER_"
IGNORED_KEYS = {("event_worker", "poll_interval_sec"): "nothing polls any more: workers are woken by the change stream"}


class MongodbSettings(SettingsSection):
    uri: SecretStr = SecretStr(EMBEDDED)
    uri_file: Path | None = None
    db_name: str = Field("event_processing", pattern=r"^[A-Za-z0-9_-]{1,60}$")
    max_pool_size: int = Field(50, ge=1, le=10_000)
    connect_timeout_ms: int = Field(5000, ge=100, le=600_000)
    data_dir: Path = Path("data")
    embedded_oplog_mb: int = Field(1024, ge=50, le=1_000_000)

    @property
    def is_embedded(self) -> bool:
        return self.uri_file is None and self.uri.get_secret_value() == EMBEDDED

    def make_connection(self, uri: str) -> Connection:
        """Return how to reach the database at `uri`."""
        return Connection(uri, self.db_name, self.max_pool_size, self.connect_timeout_ms)


def _known_types(limits: dict[str, int]) -> dict[str, int]:
    for name in limits:
        if name not in load_processors() and name not in unusable_job_types():
            raise ValueError(f"there is no job type {name!r}; installed are: {', '.join(sorted(load_processors()))}")
    return limits


class WorkerSettings(SettingsSection):
    max_concurrent: int = Field(5, ge=1, le=1000)
    max_concurrent_per_type: Annotated[dict[str, Annotated[int, Field(ge=1)]], AfterValidator(_known_types)] = Field({})
    lease_seconds: float = Field(10, ge=1, le=3600)
    shutdown_grace_seconds: float = Field(30, ge=0, le=86_400)
    memory_limit_mb: int = Field(4096, ge=256)
    scratch_dir: Path | None = None
    scratch_min_free_mb: float = Field(100, ge=0, le=1_000_000_000)
    retry_base_seconds: float = Field(5, gt=0, le=3600)
    retry_max_seconds: float = Field(600, gt=0, le=86_400)
    confinement: ConfinementMode = "auto"
    pass_environment: list[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]] = Field([])
    readable_paths: list[Path] = Field([])
    writable_paths: list[Path] = Field([])
    protected_paths: list[Path] = Field([])
    poll_interval_sec: float | None = None


def _unambiguous_prefix(url: str | None) -> str | None:
    """Refuse a path that begins as our routes do: with a proxy that removes it, it could not be told from a route."""
    first = urlsplit(url or "").path.strip("/").partition("/")[0]
    if first in _OWN_PATHS:
        raise ValueError(
            f"the path must not begin with /{first}, as the API's own addresses do: take /jobs/{first}, say"
        )
    return url


_OWN_PATHS: Final = frozenset({"api", "monitoring", "metrics", "healthz", "readyz"})


class ApiSettings(SettingsSection):
    host: str = "127.0.0.1"
    port: int = Field(5001, ge=0, le=65_535)
    public_url: Annotated[str | None, AfterValidator(_unambiguous_prefix)] = Field(
        None, pattern=r"^https?://[^/@?#\s]+(/[^?#]*)?$"
    )
    max_body_bytes: int = Field(32 * 1024 * 1024, ge=1024)
    request_memory_mb: int = Field(1024, ge=64, le=1_000_000)
    requests_per_second: float = Field(0, ge=0, le=1_000_000)
    burst: int = Field(50, ge=1, le=1_000_000)
    max_streams_per_user: int = Field(100, ge=0, le=1_000_000)
    max_streams: int = Field(2000, ge=0, le=1_000_000)
    max_connections: int = Field(5000, ge=1, le=1_000_000)
    max_connections_per_address: int = Field(2000, ge=1, le=1_000_000)
    auth_failures_per_minute: int = Field(30, ge=0, le=1_000_000)
    trusted_proxies: list[Annotated[str, AfterValidator(validate_network)]] = Field([])
    cors_origins: list[Annotated[str, Field(pattern=r"^https?://[^/?#*@\s]+$")]] = Field([])


def _host_or_network(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.:/\[\]-]{1,255}", text):
        raise ValueError("expected an address, a network like 10.1.0.0/16, or the name of a host")
    return text


class WebhookSettings(SettingsSection):
    retry_delays_seconds: list[Annotated[float, Field(ge=0, le=7 * 86_400)]] = Field(
        [0, 5, 300, 1800, 7200, 18_000, 36_000, 86_400], min_length=1, max_length=50
    )
    jitter: float = Field(0.1, ge=0, le=1)
    timeout_seconds: float = Field(10, ge=0.1, le=120)
    max_concurrent: int = Field(20, ge=1, le=1000)
    max_concurrent_per_host: int = Field(4, ge=1, le=1000)
    circuit_breaker_failures: int = Field(10, ge=1, le=1000)
    circuit_breaker_cooldown_seconds: float = Field(30, ge=0.1, le=600)
    allowed_private_hosts: list[Annotated[str, AfterValidator(_host_or_network)]] = Field([])
    echo_enabled: bool = False
    lease_seconds: float = Field(10, ge=1, le=3600)


def _known_store(store: Any) -> Any:
    """What looks like an address, or the word misspelt, would become a directory of that name."""
    if isinstance(store, str) and store.strip().lower() == "gridfs":
        return "gridfs"
    if isinstance(store, str) and "://" in store:
        raise ValueError("there is no such store: expected a directory, or the word gridfs")
    return store


class ResultsSettings(SettingsSection):
    store: Annotated[Literal["gridfs"] | Path, BeforeValidator(_known_store)] = Path("data/results")
    min_free_mb: int = Field(256, ge=0, le=1_000_000)


class LoggingSettings(SettingsSection):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["console", "json"] = "console"
    access_log: bool = False


class MetricsSettings(SettingsSection):
    host: str = "127.0.0.1"
    port: int | None = Field(None, ge=0, le=65_535)


def _known_processors(sections: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    for name, section in sections.items():
        if name in unusable_job_types() or (name in load_processors() and not is_built_in(name)):
            continue  # a wrong section of a plug-in must cost its job type only: see `_check_plugins`
        if name not in load_processors():
            raise ValueError(f"there is no processor {name!r}; installed are: {', '.join(sorted(load_processors()))}")
        try:
            load_processors()[name].Settings.model_validate(section)
        except ValidationError as error:
            raise ValidationError.from_exception_data(name, [_within(name, line) for line in error.errors()]) from None
    return sections


def _check_plugins(sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Take processors that are not ours out of use if their section does not fit, or is missing and needed."""
    for name, processor in list(load_processors().items()):
        if is_built_in(name):
            continue
        try:
            processor.Settings.model_validate(sections.get(name, {}))
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(str(part) for part in ("processors", name, *problem["loc"]))
            disable_job_type(name, f"its settings in config.yaml are wrong: {key}: {problem['msg']}")
        except Exception as error:  # noqa: BLE001 - foreign code
            disable_job_type(name, f"its `Settings` failed to read processors.{name}: {error!r}")


def _within(section: str, line: Any) -> InitErrorDetails:
    """Put the section's name before a place in it, which else would not be told."""
    problem = PydanticCustomError(line["type"], line["msg"])
    return InitErrorDetails(type=problem, loc=(section, *line["loc"]), input=line["input"])


def _filled(sections: Any) -> Any:
    """A section whose keys are all commented out is there, but null; lists of the environment are JSON yet."""
    if not isinstance(sections, dict):
        return sections
    filled = {name: {} if section is None else section for name, section in sections.items()}
    return {
        name: _with_lists(section, load_processors()[name].Settings) if name in load_processors() else section
        for name, section in filled.items()
    }


def _with_lists(section: Any, model: Any) -> Any:
    """Read what is written as JSON where no text is expected. In sections of ours pydantic-settings does it."""
    if not isinstance(section, dict):
        return section
    fields = getattr(model, "model_fields", {})
    read = {**section}
    for name, value in section.items():
        wanted = fields[name].annotation if name in fields else str
        if isinstance(value, dict):
            read[name] = _with_lists(value, wanted)
        elif isinstance(value, str) and value.startswith(("[", "{")) and wanted is not str:
            with suppress(orjson.JSONDecodeError):  # then it is refused for what it is
                read[name] = orjson.loads(value)
    return read


class Settings(BaseSettings):
    """Everything that can be set. See config.yaml for what each key means."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True)

    mongodb: MongodbSettings = MongodbSettings()
    event_worker: WorkerSettings = WorkerSettings()
    api: ApiSettings = ApiSettings()
    auth: AuthSettings = AuthSettings()
    results: ResultsSettings = ResultsSettings()
    webhooks: WebhookSettings = WebhookSettings()
    processors: Annotated[dict[str, dict[str, Any]], BeforeValidator(_filled), AfterValidator(_known_processors)] = {}
    logging: LoggingSettings = LoggingSettings()
    metrics: MetricsSettings = MetricsSettings()

    @model_validator(mode="after")
    def _open_means_this_machine(self) -> Settings:
        if self.auth.mode == "open" and not is_loopback(self.api.host):
            raise ValueError(
                f"api.host is {self.api.host}, which others can reach, but auth.mode `open` asks nobody who they are; "
                "use 127.0.0.1, or set auth.mode to keys, jwt or proxy"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings  # the environment overrides the file


def read_settings(
    path: Path | None, overrides: Mapping[str, Any] | None = None, *, defaults_only: bool = False
) -> tuple[Settings, list[str]]:
    """Return the settings, and notices about keys that no longer mean anything.

    `path` is the file named by the user; without one, `config.yaml` in the current directory is read if it is there.
    `overrides` are laid over the file, section by section. With `defaults_only` no file is read.

    Raises:
        ConfigurationError: one line that names the file, the key, and what would be right.
    """
    file = path or Path("config.yaml")
    content: dict[str, Any] = {}
    if path is not None or (file.exists() and not defaults_only):
        content = _read_yaml(file)
        _refuse_secrets(file, content)
    _refuse_unknown_sections(file, content)
    for section, values in (overrides or {}).items():
        content[section] = {**(content.get(section) or {}), **values}
    content = {section: values for section, values in content.items() if values is not None}
    try:
        settings = Settings(**content)
    except SettingsError as error:
        raise ConfigurationError(_not_json(error)) from None  # its cause holds the value
    except ValidationError as error:
        raise ConfigurationError(_explain(error, file)) from error
    return _placed(settings, file.absolute()), [
        f"{section}.{key} is not used: {why}"
        for (section, key), why in IGNORED_KEYS.items()
        if key in (content.get(section) or {})
    ]


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise ConfigurationError(f"{file}: there is no such file")
    try:
        content = yaml.safe_load(_read_text(file))
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigurationError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigurationError(f"{file}: expected sections such as `mongodb:`, found {type(content).__name__}")
    return content


def _read_text(file: Path, key: str = "") -> str:
    """Return the content of a file of settings; `key` names the setting that leads to it."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise classify_os_error(error, f"{key}{file} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{key}{file} cannot be read: {error}") from error


def _refuse_secrets(file: Path, content: Mapping[str, Any]) -> None:
    """Settings are shown to others and kept in repositories; secrets are not."""
    auth = content.get("auth")
    jwt = auth.get("jwt") if isinstance(auth, dict) else None
    if isinstance(jwt, dict) and jwt.get("secret") is not None:
        raise ConfigurationError(
            f"{file}: auth.jwt.secret: a secret does not belong here; put it into a file of its own and name that in "
            f"auth.jwt.secret_file, or set {_PREFIX}AUTH__JWT__SECRET"
        )


def _not_json(error: SettingsError) -> str:
    """A list or a section in the environment that is no JSON."""
    section = next((name for name in Settings.model_fields if f'"{name}"' in str(error)), "")
    place = f"{_PREFIX}{section.upper()}__…"
    return f'environment variables {place}: lists and sections are written as JSON there, for example ["alice", "bob"]'


def _refuse_unknown_sections(file: Path, content: Mapping[Any, Any]) -> None:
    """Name what pydantic-settings passes over in silence, or ends in a fault for."""
    known = Settings.model_fields
    for section in content:
        if section not in known:
            raise ConfigurationError(f"{file}: {section}: there is no such section; known are: {', '.join(known)}")
    for variable in os.environ:
        section, nested, _ = variable.upper().removeprefix(_PREFIX).lower().partition("__")
        if not variable.upper().startswith(_PREFIX) or bool(nested) == (section in known):
            continue
        right = f"known sections are: {', '.join(known)}" if nested else f"name one of its keys: {variable}__KEY"
        what = f"there is no section {section}" if nested else f"{section} is a whole section"
        raise ConfigurationError(f"environment variable {variable}: {what}; {right}")


def _explain(error: ValidationError, file: Path) -> str:
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    variable = _PREFIX + "__".join(location).upper()
    place = f"environment variable {variable}" if variable in os.environ else f"{file}: {key}" if key else str(file)
    if problem["type"] == "extra_forbidden":
        return f"{place}: there is no such key; known here: {', '.join(_known_keys(location[:-1]))}"
    given = problem.get("input")
    if problem["type"] in ("model_type", "dict_type"):
        keys = ", ".join(_known_keys(location)) or "none"
        return f"{place}: expected a section with keys of its own, found {type(given).__name__}; known here: {keys}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "list_type" and variable in os.environ:
        message += ', written as JSON, for example ["alice", "bob"]'
    secret = "uri" in key or "secret" in key or "://" in str(given)  # an address may have a password in it
    shown = f" (found {given!r})" if isinstance(given, str | int | float) and not secret else ""
    return f"{place}: {message[0].lower()}{message[1:]}{shown}"


def _known_keys(location: Sequence[str]) -> Iterable[str]:
    """Return the keys that may stand in a section."""
    section, *below = location or [""]
    model: Any = Settings if not section else Settings.model_fields[section].annotation
    if section == "processors":
        if not below:
            return load_processors()
        model = load_processors()[below.pop(0)].Settings
    for name in below:
        model = model.model_fields[name].annotation
    return getattr(model, "model_fields", ())


def _placed(settings: Settings, config: Path) -> Settings:
    """Make relative paths absolute, from where the file lies, and read what is kept in files of its own."""
    directory = config.parent
    mongodb = settings.mongodb.model_copy(update={"data_dir": directory / settings.mongodb.data_dir})
    if settings.mongodb.uri_file is not None:
        uri_file = directory / settings.mongodb.uri_file
        uri = SecretStr(_read_text(uri_file, "mongodb.uri_file: ").strip())
        mongodb = mongodb.model_copy(update={"uri": uri})
    results = settings.results
    if isinstance(results.store, Path):
        results = results.model_copy(update={"store": directory / results.store})
    worker = settings.event_worker.model_copy(update=_placed_confinement(settings, config))
    if worker.scratch_dir is not None:
        worker = worker.model_copy(update={"scratch_dir": directory / worker.scratch_dir})
    auth = settings.auth.model_copy(update={"jwt": _placed_jwt(settings.auth.jwt, directory)})
    _check_plugins(settings.processors)
    sections = {
        name: _placed_paths(section, load_processors()[name].Settings.model_validate(section), directory)
        for name, section in settings.processors.items()
        if name in load_processors()
    }
    placed = {
        "mongodb": mongodb,
        "event_worker": worker,
        "results": results,
        "auth": auth,
        "processors": sections,
    }
    return settings.model_copy(update=placed)


def _placed_confinement(settings: Settings, config: Path) -> dict[str, list[Path]]:
    """Return the paths that job processes may and may not use. What the ledger keeps is among the latter."""
    worker = settings.event_worker
    secrets = (settings.mongodb.uri_file, settings.auth.jwt.secret_file)
    ours = [config, settings.mongodb.data_dir, settings.results.store, *secrets]
    return {
        "readable_paths": [config.parent / path for path in worker.readable_paths],
        "writable_paths": [config.parent / path for path in worker.writable_paths],
        "protected_paths": [
            config.parent / path for path in (*worker.protected_paths, *ours) if isinstance(path, Path)
        ],
    }


def _placed_paths(section: Mapping[str, Any], read: BaseModel, directory: Path) -> dict[str, Any]:
    """Return a processor's section with its paths made absolute, which `read`, the same as its model, tells apart."""
    placed: dict[str, Any] = {}
    for name, value in section.items():
        found = getattr(read, name, None)
        if isinstance(found, Path):
            placed[name] = str(directory / found)
        elif isinstance(found, BaseModel) and isinstance(value, Mapping):
            placed[name] = _placed_paths(value, found, directory)
        else:
            placed[name] = value
    return placed


def _placed_jwt(jwt: JwtSettings, directory: Path) -> JwtSettings:
    placed: dict[str, Any] = {}
    if jwt.public_key_file is not None:
        placed["public_key_file"] = directory / jwt.public_key_file
    if jwt.secret_file is not None:
        file = directory / jwt.secret_file
        text = _read_text(file, "auth.jwt.secret_file: ").strip()
        try:
            placed["secret"] = validate_secret_length(SecretStr(text))
        except ValueError as error:
            raise ConfigurationError(f"auth.jwt.secret_file: {file}: {error}") from error
    return jwt.model_copy(update=placed)

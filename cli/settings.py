"""Settings: one model per section of config.yaml. Read them with `jobledger.cli.settings_file.read_settings`.

Other packages receive values and never read settings themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

import orjson
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from jobledger.cli.auth_settings import AuthSettings, SettingsSection, is_loopback, validate_network
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.net.url_policy import validate_host_or_network
from jobledger.workers.child.confinement import ConfinementMode
from jobledger.workers.registry import disable_job_type, is_built_in, load_processors, unusable_job_types

EMBEDDED: Final = "embedded"
ENV_PREFIX: Final = "JOBLEDGER_"
IGNORED_KEYS: Final = {
    ("event_worker", "poll_interval_sec"): "workers do not poll; the change stream notifies them",
}
"""Keys of earlier versions that are accepted and have no effect, with the reason."""


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
        """Return the connection parameters for the database at `uri`."""
        return Connection(uri, self.db_name, self.max_pool_size, self.connect_timeout_ms)


def _check_job_types(limits: dict[str, int]) -> dict[str, int]:
    for name in limits:
        if name not in load_processors() and name not in unusable_job_types():
            raise ValueError(f"unknown job type {name!r}. Installed job types: {', '.join(sorted(load_processors()))}")
    return limits


class WorkerSettings(SettingsSection):
    max_concurrent: int = Field(5, ge=1, le=1000)
    max_concurrent_per_type: Annotated[dict[str, Annotated[int, Field(ge=1)]], AfterValidator(_check_job_types)] = (
        Field({})
    )
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


_ROUTE_PREFIXES: Final = frozenset({"api", "monitoring", "metrics", "healthz", "readyz"})


def _check_path_prefix(url: str | None) -> str | None:
    """Reject a path that begins like a route: behind a proxy that strips it, the two could not be distinguished."""
    first = urlsplit(url or "").path.strip("/").partition("/")[0]
    if first in _ROUTE_PREFIXES:
        raise ValueError(f"the path must not begin with /{first}, because routes of the API do: use e.g. /jobs/{first}")
    return url


class ApiSettings(SettingsSection):
    host: str = "127.0.0.1"
    port: int = Field(5001, ge=0, le=65_535)
    public_url: Annotated[str | None, AfterValidator(_check_path_prefix)] = Field(
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
    allowed_private_hosts: list[Annotated[str, AfterValidator(validate_host_or_network)]] = Field([])
    echo_enabled: bool = False
    lease_seconds: float = Field(10, ge=1, le=3600)


def _parse_store(store: Any) -> Any:
    """Recognize `gridfs` in any case, and reject URLs. Either would become a directory of that name."""
    if isinstance(store, str) and store.strip().lower() == "gridfs":
        return "gridfs"
    if isinstance(store, str) and "://" in store:
        raise ValueError("unknown result store: expected a directory, or gridfs")
    return store


class ResultsSettings(SettingsSection):
    store: Annotated[Literal["gridfs"] | Path, BeforeValidator(_parse_store)] = Path("data/results")
    min_free_mb: int = Field(256, ge=0, le=1_000_000)


class LoggingSettings(SettingsSection):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["console", "json"] = "console"
    access_log: bool = False


class MetricsSettings(SettingsSection):
    host: str = "127.0.0.1"
    port: int | None = Field(None, ge=0, le=65_535)


def _check_sections(sections: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Validate the sections of built-in processors. `disable_misconfigured_plugins` validates those of plug-ins."""
    for name, section in sections.items():
        if name in unusable_job_types() or (name in load_processors() and not is_built_in(name)):
            continue  # an invalid section of a plug-in must disable only its own job type
        if name not in load_processors():
            raise ValueError(
                f"unknown processor {name!r}. Installed processors: {', '.join(sorted(load_processors()))}"
            )
        try:
            load_processors()[name].Settings.model_validate(section)
        except ValidationError as error:
            lines = [_with_section(name, line) for line in error.errors()]
            raise ValidationError.from_exception_data(name, lines) from None
    return sections


def _with_section(section: str, line: Any) -> InitErrorDetails:
    """Prefix the location of an error with the section's name, which pydantic does not know."""
    problem = PydanticCustomError(line["type"], line["msg"])
    return InitErrorDetails(type=problem, loc=(section, *line["loc"]), input=line["input"])


def disable_misconfigured_plugins(sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Disable the job types of plug-ins whose section is invalid, or is missing although it is required."""
    for name, processor in list(load_processors().items()):
        if is_built_in(name):
            continue
        try:
            processor.Settings.model_validate(sections.get(name, {}))
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(str(part) for part in ("processors", name, *problem["loc"]))
            disable_job_type(name, f"invalid settings in config.yaml: {key}: {problem['msg']}")
        except Exception as error:  # noqa: BLE001 - code of a plug-in
            disable_job_type(name, f"its `Settings` failed to read processors.{name}: {error!r}")


def _normalize_sections(sections: Any) -> Any:
    """Replace empty sections, which YAML reads as null, and parse lists from environment variables, which are JSON."""
    if not isinstance(sections, dict):
        return sections
    filled = {name: {} if section is None else section for name, section in sections.items()}
    return {
        name: _parse_json_values(section, load_processors()[name].Settings) if name in load_processors() else section
        for name, section in filled.items()
    }


def _parse_json_values(section: Any, model: Any) -> Any:
    """Parse JSON where the model expects no text. For other sections pydantic-settings does that."""
    if not isinstance(section, dict):
        return section
    fields = getattr(model, "model_fields", {})
    parsed = {**section}
    for name, value in section.items():
        expected = fields[name].annotation if name in fields else str
        if isinstance(value, dict):
            parsed[name] = _parse_json_values(value, expected)
        elif isinstance(value, str) and value.startswith(("[", "{")) and expected is not str:
            with suppress(orjson.JSONDecodeError):  # validation rejects the text then
                parsed[name] = orjson.loads(value)
    return parsed


class Settings(BaseSettings):
    """All settings. config.yaml documents each key."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True)

    mongodb: MongodbSettings = MongodbSettings()
    event_worker: WorkerSettings = WorkerSettings()
    api: ApiSettings = ApiSettings()
    auth: AuthSettings = AuthSettings()
    results: ResultsSettings = ResultsSettings()
    webhooks: WebhookSettings = WebhookSettings()
    processors: Annotated[
        dict[str, dict[str, Any]], BeforeValidator(_normalize_sections), AfterValidator(_check_sections)
    ] = {}
    logging: LoggingSettings = LoggingSettings()
    metrics: MetricsSettings = MetricsSettings()

    @model_validator(mode="after")
    def _require_authentication_on_networks(self) -> Settings:
        if self.auth.mode == "open" and not is_loopback(self.api.host):
            raise ValueError(
                f"api.host is {self.api.host}, which other machines can reach, but auth.mode `open` requires no "
                "authentication: use 127.0.0.1, or set auth.mode to keys, jwt or proxy"
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

"""All settings of config.yaml. Read them with `jobledger.cli.settings_file.read_settings`.

The packages that use a section define its model. They receive it and never read settings themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Final, Literal

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

from jobledger.api.settings import ApiSettings, AuthSettings, is_loopback
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.system.settings_section import SettingsSection
from jobledger.workers.job_types.app import check_app_name
from jobledger.workers.registry import (
    disable_job_type,
    get_app_problem,
    get_unusable_job_types,
    is_built_in,
    load_processors,
)
from jobledger.workers.settings import WebhookSettings, WorkerSettings

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


class JobsSettings(SettingsSection):
    """The application whose job types are used, in addition to those of installed packages."""

    app: Annotated[str, AfterValidator(check_app_name)] | None = Field(
        None, description="Module with the job types, or an App in it, such as shop.jobs:app."
    )
    app_dir: Path = Field(Path(), description="Directory from which `app` is imported.")


def _check_sections(sections: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Validate the sections of built-in processors. `disable_misconfigured_plugins` validates those of plug-ins."""
    for name, section in sections.items():
        if (
            get_app_problem() is not None
            or name in get_unusable_job_types()
            or (name in load_processors() and not is_built_in(name))
        ):
            continue  # an invalid section of a plug-in must disable only its own job type
        if name not in load_processors():
            raise ValueError(
                f"unknown processor {name!r}. Installed processors: {', '.join(sorted(load_processors()))}"
            )
        try:
            load_processors()[name].Settings.model_validate(section)
        except ValidationError as error:
            lines = [_add_section(name, line) for line in error.errors()]
            raise ValidationError.from_exception_data(name, lines) from None
    return sections


def _add_section(section: str, line: Any) -> InitErrorDetails:
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
            disable_job_type(name, f"invalid settings in config.yaml: {key}: {problem['msg']}", sections.get(name))
        except Exception as error:  # noqa: BLE001 - code of a plug-in
            reason = f"its `Settings` failed to read processors.{name}: {error!r}"
            disable_job_type(name, reason, sections.get(name))


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
    jobs: JobsSettings = JobsSettings()
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

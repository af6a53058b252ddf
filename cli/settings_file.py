"""Read config.yaml and the environment, and explain what is wrong in them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_settings import SettingsError

from jobledger.api.settings import validate_secret_length
from jobledger.cli.settings import ENV_PREFIX, IGNORED_KEYS, JobsSettings, Settings, disable_misconfigured_plugins
from jobledger.ledger.domain.errors import ConfigurationError, classify_os_error
from jobledger.workers.registry import load_processors, use_app

_JSON_EXAMPLE: Final = '["alice", "bob"]'


def read_settings(
    path: Path | None, overrides: Mapping[str, Any] | None = None, *, defaults_only: bool = False
) -> tuple[Settings, list[str]]:
    """Return the settings, and notices about keys that have no effect.

    Environment variables override the file.

    Args:
        path: The file that the user named. None: `config.yaml` in the current directory, if it exists.
        overrides: Values that replace those of the file, by section.
        defaults_only: Do not read `config.yaml` in the current directory.

    Raises:
        ConfigurationError: One line that names the file, the key, and a correct value.
    """
    file = path or Path("config.yaml")
    content: dict[str, Any] = {}
    if path is not None or (file.exists() and not defaults_only):
        content = _read_yaml(file)
        _reject_secrets(file, content)
    _reject_unknown_sections(file, content)
    for section, values in (overrides or {}).items():
        content[section] = {**(content.get(section) or {}), **values}
    content = {section: values for section, values in content.items() if values is not None}
    _use_app(content.get("jobs"), file.absolute().parent)
    try:
        settings = Settings(**content)
    except SettingsError as error:
        raise ConfigurationError(_explain_invalid_json(error)) from None  # the cause contains the value
    except ValidationError as error:
        raise ConfigurationError(_explain(error, file)) from error
    return _resolve_paths(settings, file.absolute()), [
        f"{section}.{key} has no effect: {reason}"
        for (section, key), reason in IGNORED_KEYS.items()
        if key in (content.get(section) or {})
    ]


def _use_app(section: Any, directory: Path) -> None:
    """Load the job types of the application, which the other sections may name. `Settings` reports invalid values."""
    values = dict(section) if isinstance(section, dict) else {}
    prefix = f"{ENV_PREFIX}JOBS__"
    for variable, value in os.environ.items():
        if variable.upper().startswith(prefix):
            values[variable.upper().removeprefix(prefix).lower()] = value
    with suppress(ValidationError):
        jobs = JobsSettings.model_validate(values)
        use_app(jobs.app, directory / jobs.app_dir)


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise ConfigurationError(f"{file}: file not found.")
    try:
        content = yaml.safe_load(_read_text(file))
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigurationError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigurationError(f"{file}: expected sections such as `mongodb:`, got {type(content).__name__}")
    return content


def _read_text(file: Path, key: str = "") -> str:
    """Return the content of a settings file. `key` is the prefix of error messages."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise classify_os_error(error, f"{key}{file} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{key}{file} cannot be read: {error}") from error


def _reject_secrets(file: Path, content: Mapping[str, Any]) -> None:
    """Reject secrets in config.yaml, which users share and commit to repositories."""
    auth = content.get("auth")
    jwt = auth.get("jwt") if isinstance(auth, dict) else None
    if isinstance(jwt, dict) and jwt.get("secret") is not None:
        raise ConfigurationError(
            f"{file}: auth.jwt.secret: secrets are not allowed here. Write it to a separate file and set "
            f"auth.jwt.secret_file, or set {ENV_PREFIX}AUTH__JWT__SECRET."
        )


def _explain_invalid_json(error: SettingsError) -> str:
    section = next((name for name in Settings.model_fields if f'"{name}"' in str(error)), "")
    variables = f"{ENV_PREFIX}{section.upper()}__…"
    return f"environment variables {variables}: lists and sections must be JSON, for example {_JSON_EXAMPLE}"


def _reject_unknown_sections(file: Path, content: Mapping[Any, Any]) -> None:
    """Reject what pydantic-settings ignores, or fails on with a traceback."""
    sections = Settings.model_fields
    for section in content:
        if section not in sections:
            raise ConfigurationError(f"{file}: {section}: unknown section. Sections: {', '.join(sections)}")
    for variable in os.environ:
        section, nested, _ = variable.upper().removeprefix(ENV_PREFIX).lower().partition("__")
        if not variable.upper().startswith(ENV_PREFIX) or bool(nested) == (section in sections):
            continue
        problem = f"unknown section {section}" if nested else f"{section} is a section"
        fix = f"Sections: {', '.join(sections)}" if nested else f"Append one of its keys: {variable}__KEY"
        raise ConfigurationError(f"environment variable {variable}: {problem}. {fix}")


def _explain(error: ValidationError, file: Path) -> str:
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    variable = ENV_PREFIX + "__".join(location).upper()
    place = f"environment variable {variable}" if variable in os.environ else f"{file}: {key}" if key else str(file)
    if problem["type"] == "extra_forbidden":
        return f"{place}: unknown key. Keys: {', '.join(_list_keys(location[:-1]))}"
    value = problem.get("input")
    if problem["type"] in ("model_type", "dict_type"):
        keys = ", ".join(_list_keys(location)) or "none"
        return f"{place}: expected a section, got {type(value).__name__}. Keys: {keys}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "list_type" and variable in os.environ:
        message += f" in JSON, for example {_JSON_EXAMPLE}"
    is_secret = "uri" in key or "secret" in key or "://" in str(value)  # a URL may contain a password
    shown = f", got {value!r}" if isinstance(value, str | int | float) and not is_secret else ""
    return f"{place}: {message[0].lower()}{message[1:]}{shown}"


def _list_keys(location: Sequence[str]) -> Iterable[str]:
    """Return the allowed keys of a section."""
    section, *nested = location or [""]
    model: Any = Settings if not section else Settings.model_fields[section].annotation
    if section == "processors":
        if not nested:
            return load_processors()
        model = load_processors()[nested.pop(0)].Settings
    for name in nested:
        model = model.model_fields[name].annotation
    return getattr(model, "model_fields", ())


def _resolve_paths(settings: Settings, config: Path) -> Settings:
    """Make relative paths absolute, relative to the settings file, and read the secrets that are in separate files."""
    directory = config.parent
    settings = _make_absolute(settings, directory)
    mongodb, jwt, worker = settings.mongodb, settings.auth.jwt, settings.event_worker
    if mongodb.uri_file is not None:
        uri = SecretStr(_read_text(mongodb.uri_file, "mongodb.uri_file: ").strip())
        mongodb = mongodb.model_copy(update={"uri": uri})
    if jwt.secret_file is not None:
        secret = SecretStr(_read_text(jwt.secret_file, "auth.jwt.secret_file: ").strip())
        try:
            jwt = jwt.model_copy(update={"secret": validate_secret_length(secret)})
        except ValueError as error:
            raise ConfigurationError(f"auth.jwt.secret_file: {jwt.secret_file}: {error}") from error
    # Jobs must never access the files of the ledger.
    ledger_paths = (config, mongodb.data_dir, settings.results.store, mongodb.uri_file, jwt.secret_file)
    protected_paths = [*worker.protected_paths, *(path for path in ledger_paths if isinstance(path, Path))]
    disable_misconfigured_plugins(settings.processors)
    return settings.model_copy(
        update={
            "mongodb": mongodb,
            "auth": settings.auth.model_copy(update={"jwt": jwt}),
            "event_worker": worker.model_copy(update={"protected_paths": protected_paths}),
            "processors": {
                name: _resolve_section_paths(
                    section, load_processors()[name].Settings.model_validate(section), directory
                )
                for name, section in settings.processors.items()
                if name in load_processors()
            },
        }
    )


def _make_absolute(value: Any, directory: Path) -> Any:
    """Return a setting, in which relative paths become paths in `directory`."""
    match value:
        case Path():
            return directory / value
        case list():
            return [_make_absolute(item, directory) for item in value]
        case BaseModel():
            fields = {name: _make_absolute(getattr(value, name), directory) for name in type(value).model_fields}
            return value.model_copy(update=fields)
        case _:
            return value


def _resolve_section_paths(section: Mapping[str, Any], validated: BaseModel, directory: Path) -> dict[str, Any]:
    """Return a processor's section with absolute paths. `validated` is the section as its model: it knows the paths."""
    resolved: dict[str, Any] = {}
    for name, value in section.items():
        field = getattr(validated, name, None)
        if isinstance(field, Path):
            resolved[name] = str(directory / field)
        elif isinstance(field, BaseModel) and isinstance(value, Mapping):
            resolved[name] = _resolve_section_paths(value, field, directory)
        else:
            resolved[name] = value
    return resolved

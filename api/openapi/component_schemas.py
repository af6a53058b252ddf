"""Build the schemas of the OpenAPI document for client generators.

Generators derive names of classes, modules and types from the names of schemas. So names are Latin letters and digits,
begin with a letter, and differ in more than upper and lower case.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any, Final, Literal
from unicodedata import normalize

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from jobledger.api.openapi.operation import Operation
from jobledger.api.schemas.response_models import ErrorResponse
from jobledger.ledger.domain.events import EVENT_TYPES

Json = dict[str, Any]
Mode = Literal["validation", "serialization"]
References = Mapping[tuple[Any, Mode], Json]
_PREFIX: Final = "#/components/schemas/"
_TEMPLATE: Final = _PREFIX + "{model}"
_KEYWORDS_WITH_VALUES: Final = ("const", "default", "enum", "examples")
DEFAULT_KEYWORD: Final = "x-default"
"""Replaces `default`: openapi-typescript requires the properties that have `default`."""


def build_schemas(
    operations: Sequence[Operation], job_types: Mapping[str, type[BaseModel]]
) -> tuple[References, Json, Json]:
    """Return the reference of each model, the schemas of components by name, and those of query parameters."""
    references, definitions = models_json_schema(_list_models(operations), ref_template=_TEMPLATE)
    schemas: Json = definitions["$defs"]
    queries = {references[operation.query_model, "validation"]["$ref"] for operation in operations}
    queries_by_name = {name.removeprefix(_PREFIX): schemas.pop(name.removeprefix(_PREFIX)) for name in queries}
    schemas |= _build_event_schemas(schemas["EventResource"])
    schemas |= _build_batch_schemas(schemas)
    parameters: dict[str, Json] = {}
    for job_type, model in job_types.items():
        parameters[job_type], added = _build_parameter_schemas(job_type, model, schemas)
        schemas |= added
    schemas |= _build_job_schemas(schemas, parameters)
    return references, {name: _adapt(schema) for name, schema in schemas.items()}, queries_by_name


def get_reference(name: str) -> Json:
    """Return the reference to a schema."""
    return {"$ref": _TEMPLATE.format(model=name)}


def _list_models(operations: Sequence[Operation]) -> list[tuple[type[BaseModel], Mode]]:
    requested = [operation.query_model for operation in operations]
    requested += [operation.body for operation in operations if operation.body is not None]
    returned: list[type[BaseModel]] = [ErrorResponse]
    returned += [operation.response for operation in operations if not isinstance(operation.response, str)]
    modes: list[tuple[type[BaseModel], Mode]] = [(model, "validation") for model in requested]
    modes += [(model, "serialization") for model in returned]
    return list(dict.fromkeys(modes))


# Names ------------------------------------------------------------------------------------------------------------


def _to_identifier(name: str) -> str:
    """Return a name in PascalCase, without accents and other characters, that begins with a letter."""
    latin = normalize("NFKD", name).encode("ascii", "ignore").decode()
    words = "".join(word[:1].upper() + word[1:] for word in re.findall(r"[A-Za-z0-9]+", latin))
    return words if words[:1].isalpha() else f"Type{words}"


def _make_unique(name: str, schemas: Mapping[str, Json]) -> str:
    """Return the name, or with a number if it is taken by a schema, or by the name of a property's inline type."""
    taken = {taken.lower() for taken in _iterate_taken_names(schemas)}
    numbered = (name if number == 1 else f"{name}{number}" for number in count(1))
    return next(candidate for candidate in numbered if candidate.lower() not in taken)


def _iterate_taken_names(schemas: Mapping[str, Json]) -> Iterator[str]:
    for name, schema in schemas.items():
        yield name
        yield from (name + _to_identifier(field) for field in schema.get("properties", ()))


def _rename(schemas: Mapping[str, Json], new_names: Mapping[str, str]) -> Json:
    """Return schemas, and the references between them, with other names."""
    references = {_TEMPLATE.format(model=old): _TEMPLATE.format(model=new) for old, new in new_names.items()}
    return {
        new_names[name]: {**_replace_references(schema, references), "title": new_names[name]}
        for name, schema in schemas.items()
    }


def _replace_references(schema: Any, references: Mapping[str, str]) -> Any:
    """Return a schema in which references, also those of discriminators, have other targets."""
    if isinstance(schema, dict):
        return {key: _replace_references(value, references) for key, value in schema.items()}
    if isinstance(schema, list):
        return [_replace_references(value, references) for value in schema]
    return references.get(schema, schema) if isinstance(schema, str) else schema


# Keywords ---------------------------------------------------------------------------------------------------------


def _adapt(schema: Any) -> Any:
    """Return a schema, and those within it, without keywords that generators do not understand as intended."""
    if isinstance(schema, list):
        return [_adapt(value) for value in schema]
    if not isinstance(schema, dict):
        return schema
    return _split_enum({keyword: _adapt_keyword(keyword, value) for keyword, value in schema.items()})


def _adapt_keyword(keyword: str, value: Any) -> Any:
    if keyword in _KEYWORDS_WITH_VALUES:
        return value
    if keyword == "properties":
        return {name: _move_default(_adapt(field)) for name, field in value.items()}
    return _adapt(value)


def _move_default(field: Json) -> Json:
    """Return a property whose default is in its description and in `x-default`. null is no default worth a word."""
    moved = {key: value for key, value in field.items() if key != "default"}
    if (default := field.get("default")) is not None:
        sentence = f"Default: `{json.dumps(default, ensure_ascii=False)}`."
        description = f"{field['description']} {sentence}" if "description" in field else sentence
        moved |= {"description": description, DEFAULT_KEYWORD: default}
    return moved


def _split_enum(schema: Json) -> Json:
    """Return a schema whose `enum` has only texts or only integers. openapi-python-client knows no others."""
    values = schema.get("enum")
    if not isinstance(values, list) or {type(value) for value in values} - {type(None)} in ({str}, {int}):
        return schema
    enums = [{"enum": found} for kind in (str, int) if (found := [value for value in values if type(value) is kind])]
    others = [{"const": value} for value in values if value is not None and type(value) not in (str, int)]
    nulls = [{"type": "null"}] if None in values else []
    without_enum = {keyword: value for keyword, value in schema.items() if keyword not in ("enum", "type")}
    return {**without_enum, "anyOf": [*enums, *others, *nulls]}


# Events -----------------------------------------------------------------------------------------------------------


def _build_event_schemas(plain: Json) -> Json:
    """Return the schemas of events: one for each type, and their union, discriminated by `type`.

    `data` has no required fields. It is as it was stored, perhaps by an older version, callers without full access see
    some fields only, and a damaged event has none.
    """
    events = list(EVENT_TYPES.values())
    _, definitions = models_json_schema([(event, "validation") for event in events], ref_template=_TEMPLATE)
    names = {name: f"{name}Data" if name in EVENT_TYPES else f"Event{name}" for name in definitions["$defs"]}
    data = {
        name: {key: value for key, value in schema.items() if key != "required"}
        for name, schema in _rename(definitions["$defs"], names).items()
    }
    variants = {f"{name}Event": _build_event_variant(plain, name) for name in EVENT_TYPES}
    mapping = {name: _TEMPLATE.format(model=f"{name}Event") for name in EVENT_TYPES}
    union = {
        "title": "EventResource",
        "description": f"{plain['description']} Newer versions of Jobledger may add types.",
        "oneOf": [get_reference(name) for name in variants],
        "discriminator": {"propertyName": "type", "mapping": mapping},
    }
    return {**data, **variants, "EventResource": union}


def _build_event_variant(plain: Json, name: str) -> Json:
    fields = {**plain["properties"], "type": {"type": "string", "const": name}, "data": get_reference(f"{name}Data")}
    return {**plain, "title": f"{name}Event", "description": f"An event of type `{name}`.", "properties": fields}


# Jobs -------------------------------------------------------------------------------------------------------------


def _build_parameter_schemas(job_type: str, model: type[BaseModel], schemas: Mapping[str, Json]) -> tuple[Json, Json]:
    """Return the reference of a job type's parameters, and their schemas by name.

    The names begin with the job type, because the models of two plug-ins may have the same names.
    """
    references, definitions = models_json_schema([(model, "validation")], ref_template=_TEMPLATE)
    root = references[model, "validation"]["$ref"].removeprefix(_PREFIX)
    new_names: dict[str, str] = {}
    for name in sorted(definitions["$defs"], key=lambda name: (name != root, name)):
        suffix = "Parameters" if name == root else _to_identifier(name)
        taken = {**schemas, **{new: definitions["$defs"][old] for old, new in new_names.items()}}
        new_names[name] = _make_unique(_to_identifier(job_type) + suffix, taken)
    return get_reference(new_names[root]), _rename(definitions["$defs"], new_names)


def _build_batch_schemas(schemas: Mapping[str, Json]) -> Json:
    """Return the schemas of batches and their jobs, whose parameters may be incomplete."""
    batch = schemas["BatchBody"]
    jobs = {**batch["properties"]["jobs"], "items": get_reference("JobInBatch")}
    description = "A job of a batch. The parameters of the batch are defaults for its own."
    return {
        "JobInBatch": {**schemas["JobBody"], "title": "JobInBatch", "description": description},
        "BatchBody": {**batch, "properties": {**batch["properties"], "jobs": jobs}},
    }


def _build_job_schemas(schemas: Mapping[str, Json], parameters: Mapping[str, Json]) -> Json:
    """Return the schema of jobs with a variant for each job type and its parameters."""
    plain = schemas["JobBody"]
    variants: Json = {}
    for job_type, reference in parameters.items():
        name = _make_unique(f"{_to_identifier(job_type)}JobBody", {**schemas, **variants})
        variants[name] = {"title": name, **_build_job_variant(plain, job_type, reference)}
    choices = [get_reference(name) for name in variants]
    if "session" in parameters:
        choices.append(parameters["session"])  # a bare session
    return {**variants, "JobBody": {"title": "JobBody", "description": plain["description"], "anyOf": choices}}


def _build_job_variant(plain: Json, name: str, parameters: Json) -> Json:
    fields = plain["properties"]
    is_default = fields["job_type"]["default"] == name
    job_type = {"type": "string", "const": name, **({"default": name} if is_default else {})}
    return {
        **{key: value for key, value in plain.items() if key != "title"},
        "description": f"A job of type `{name}`.",
        "properties": {**fields, "job_type": job_type, "parameters": parameters},
        "required": plain["required"] if is_default else [*plain["required"], "job_type"],
    }

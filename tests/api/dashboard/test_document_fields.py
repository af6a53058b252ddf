"""Fields that templates and scripts of the dashboard read exist in the response models of the API.

Templates use ChainableUndefined, and a script gets `undefined`, so a renamed field would show only as an empty value.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from itertools import product
from typing import Annotated, Any, Final, Literal, get_args, get_origin

import pytest
from jinja2 import nodes
from pydantic import BaseModel

from jobledger.api.dashboard import charts, pages, rendering
from jobledger.api.dashboard.attempt_timeline import TimelineAttempt
from jobledger.api.schemas.batches import BatchAcceptedResponse, BatchListResponse, BatchResource
from jobledger.api.schemas.jobs import JobListResponse, JobResource
from jobledger.api.schemas.log import EventResource
from jobledger.api.schemas.monitoring import StatisticsContent
from jobledger.api.schemas.response_models import ErrorResponse, FieldError, ListResponse, ProjectionError
from jobledger.api.schemas.webhooks import DeliveryResource, NewWebhookSecret
from jobledger.ledger.domain.access import Principal
from jobledger.ledger.domain.events import EVENT_TYPES, Asset
from tests.api.dashboard.test_translations import FOLDER, SCRIPTS, TEMPLATES


@dataclasses.dataclass(frozen=True)
class ListOf:
    """A list; `element` has the types of its elements."""

    element: Types


@dataclasses.dataclass(frozen=True)
class TupleOf:
    """A tuple; `elements` has the types of each element."""

    elements: tuple[Types, ...]


@dataclasses.dataclass(frozen=True)
class MapOf:
    """An object with any keys; `value` has the types of its values."""

    value: Types


@dataclasses.dataclass(frozen=True)
class Fields:
    """An object with known keys."""

    types: tuple[tuple[str, Types], ...]


@dataclasses.dataclass(frozen=True)
class Texts:
    """Strings that are constants in the template."""

    values: tuple[str, ...]


Types = tuple[Any, ...]
"""The possible types of an expression: ANY, classes, or instances of the classes above. Empty for null and `{}`."""
ANY: Final = "any"
UNKNOWN: Final[Types] = (ANY,)


def fields(names: Iterable[str], **more: Types) -> Types:
    return (Fields(tuple({**dict.fromkeys(names, UNKNOWN), **more}.items())),)


def find_types(annotation: Any) -> Types:
    """Return the types of a value with this annotation."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return tuple(type_ for argument in arguments for type_ in find_types(argument))
    if origin is Annotated:
        return find_types(arguments[0])
    if origin is Literal:
        return (str,)
    if origin is tuple and arguments[-1] is not Ellipsis:
        return (TupleOf(tuple(find_types(argument) for argument in arguments)),)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return (MapOf(find_types(arguments[1])),)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return (ListOf(find_types(arguments[0])),)
    if annotation is types.NoneType:
        return ()
    return (annotation,) if isinstance(annotation, type) else UNKNOWN


def find_member_types(type_: Any, name: str) -> Types | None:
    """Return the types of a field, method or key of a type. None if the type does not have it."""
    if type_ is ANY:
        return UNKNOWN
    if isinstance(type_, MapOf):
        return UNKNOWN if hasattr(dict, name) else type_.value
    if isinstance(type_, Fields):
        return dict(type_.types).get(name)
    if isinstance(type_, ListOf | TupleOf | Texts):
        return UNKNOWN if hasattr(str if isinstance(type_, Texts) else list, name) else None
    if type_ is EventResource and name == "data":
        return tuple(EVENT_TYPES.values())
    if issubclass(type_, BaseModel):
        by_alias = {field.alias or field_name: field for field_name, field in type_.model_fields.items()}
        return convert_to_json_types(find_types(by_alias[name].annotation)) if name in by_alias else None
    if isinstance(attribute := inspect.getattr_static(type_, name, None), property):
        return find_types(typing.get_type_hints(attribute.fget).get("return", Any))
    if dataclasses.is_dataclass(type_) and name in (hints := typing.get_type_hints(type_)):
        return find_types(hints[name])
    return UNKNOWN if hasattr(type_, name) else None


def convert_to_json_types(python_types: Types) -> Types:
    """Return the types of a value after it was sent as JSON."""
    return tuple(str if type_ is datetime else type_ for type_ in python_types)


BATCH: Final = fields(
    (),
    **{name: convert_to_json_types(find_types(field.annotation)) for name, field in BatchResource.model_fields.items()},
    eta_minutes=(int,),
)
CHART: Final = find_types(typing.get_type_hints(charts.stack_bars)["return"])
JOBS: Final = (ListOf((JobResource,)),)
MACROS: Final = frozenset(re.findall(r"\{% macro (\w+)\(", TEMPLATES["macros.html.j2"]))

VARIABLES: Final[Mapping[str, Types]] = {
    "job": (JobResource,),
    "jobs": JOBS,
    "oldest_pending_job": (JobResource,),
    "jobs_by_worker": (MapOf(JOBS),),
    "batch": BATCH,
    "active_batches": (ListOf(BATCH),),
    "stats": (StatisticsContent,),
    "events": (ListOf((EventResource,)),),
    "deliveries": (ListOf((DeliveryResource,)),),
    "slides": (ListOf((Asset,)),),
    "error": (ProjectionError,),
    "attempts": (ListOf((TimelineAttempt,)),),
    "throughput_chart": CHART,
    "run_time_chart": CHART,
    "series": CHART,
    "principal": (Principal,),
    **dict.fromkeys(("budget", "self"), UNKNOWN),  # objects of the page, not of the API
    "ui": fields(MACROS),
}
"""Types of template variables and macro parameters, by name. Templates read no fields of those that are not listed."""
LIST_FILTERS: Final = ("cursor", "sort")
VARIABLES_BY_TEMPLATE: Final[Mapping[str, Mapping[str, Types]]] = {
    "jobs.html.j2": {"result_page": (JobListResponse,), "filters": fields((*pages._JOB_FILTERS, *LIST_FILTERS))},
    "batches.html.j2": {"result_page": (BatchListResponse,), "filters": fields((*pages._BATCH_FILTERS, *LIST_FILTERS))},
    "batch.html.j2": {"result_page": (JobListResponse,)},
    "log.html.j2": {"filters": fields(["types", "stream"])},
    "macros.html.j2": {"result_page": (ListResponse,)},
}


class TemplateChecker:
    """Infers the types of the expressions of a template and collects fields that do not exist in `problems`."""

    def __init__(self, template: str) -> None:
        self._variables = {**VARIABLES, **VARIABLES_BY_TEMPLATE.get(template, {})}
        self.problems: list[str] = []
        self.field_count = 0

    def check(self, node: nodes.Node, scope: dict[str, Types]) -> None:
        """Check a statement. Assignments change `scope`."""
        match node:
            case nodes.For():
                inner = {**scope, "loop": UNKNOWN}
                self._assign(node.target, self._element_types(self.infer(node.iter, scope)), inner)
                for child in (*node.body, *node.else_):
                    self.check(child, inner)
            case nodes.Assign():
                self._assign(node.target, self.infer(node.node, scope), scope)
            case nodes.Macro():
                for child in node.body:
                    self.check(child, scope)
            case nodes.Expr():
                self.infer(node, scope)
            case _:
                for child in node.iter_child_nodes():
                    self.check(child, scope)

    def infer(self, node: nodes.Node, scope: Mapping[str, Types]) -> Types:
        """Return the types of an expression."""
        match node:
            case nodes.Name():
                return scope.get(node.name, self._variables.get(node.name, UNKNOWN))
            case nodes.Const():
                return (Texts((node.value,)),) if isinstance(node.value, str) else ()
            case nodes.Getattr(node=nodes.Name(name=variable)) if (
                variable not in scope and variable not in self._variables
            ):
                self.problems.append(f"line {node.lineno}: VARIABLES has no type for {variable}")
                return UNKNOWN
            case nodes.Getattr():
                return self._field_types(self.infer(node.node, scope), [node.attr], node.lineno)
            case nodes.Getitem() if not isinstance(node.arg, nodes.Slice):
                keys = self._texts(self.infer(node.arg, scope))
                container = self.infer(node.node, scope)
                return self._field_types(container, keys, node.lineno) if keys else UNKNOWN
            case nodes.Concat():
                parts = [self._texts(self.infer(part, scope)) for part in node.nodes]
                return (Texts(tuple("".join(text) for text in product(*parts))),) if all(parts) else UNKNOWN
            case nodes.Filter(name="limit_rows"):
                return self.infer(node.node, scope) if node.node is not None else UNKNOWN
            case nodes.Filter(name="map"):
                elements = self._element_types(self.infer(node.node, scope)) if node.node is not None else UNKNOWN
                attributes = [str(keyword.value.as_const()) for keyword in node.kwargs if keyword.key == "attribute"]
                return (ListOf(self._field_types(elements, attributes, node.lineno)),)
            case nodes.Call(node=nodes.Getattr(attr="get", node=container)):
                for argument in node.args:
                    self.infer(argument, scope)
                maps = [type_ for type_ in self.infer(container, scope) if isinstance(type_, MapOf)]
                return tuple(type_ for map_ in maps for type_ in map_.value) or UNKNOWN
            case nodes.Or() | nodes.And():
                return (*self.infer(node.left, scope), *self.infer(node.right, scope))
            case nodes.Dict(items=[]):
                return ()
            case nodes.Tuple():
                return (TupleOf(tuple(self.infer(item, scope) for item in node.items)),)
            case _:
                for child in node.iter_child_nodes():
                    self.infer(child, scope)
                return UNKNOWN

    def _field_types(self, container: Types, names: Iterable[str], line: int) -> Types:
        field_types: list[Any] = []
        for name in names:
            self.field_count += 1
            members = [members for type_ in container if (members := find_member_types(type_, name)) is not None]
            if not members:
                self.problems.append(f"line {line}: {name} is no field of {', '.join(map(describe, container))}")
            field_types += [type_ for types_ in members for type_ in types_]
        return tuple(field_types)

    def _element_types(self, container: Types) -> Types:
        elements: list[Any] = []
        for type_ in container:
            match type_:
                case ListOf():
                    elements += type_.element
                case TupleOf(elements=items) if items and all(isinstance(item[0], TupleOf) for item in items):
                    columns = zip(*(item[0].elements for item in items), strict=True)
                    elements.append(TupleOf(tuple((Texts(self._texts(sum(column, ()))),) for column in columns)))
                case TupleOf(elements=items):
                    elements.append(Texts(self._texts(sum(items, ()))))
                case _:
                    elements.append(ANY)
        return tuple(elements)

    def _assign(self, target: nodes.Node, value: Types, scope: dict[str, Types]) -> None:
        if isinstance(target, nodes.Name):
            scope[target.name] = value
        elif isinstance(target, nodes.Tuple):
            for place, item in enumerate(target.items):
                tuples = [type_ for type_ in value if isinstance(type_, TupleOf)]
                self._assign(item, sum((type_.elements[place] for type_ in tuples), ()) or UNKNOWN, scope)

    @staticmethod
    def _texts(candidates: Types) -> tuple[str, ...]:
        return tuple(text for type_ in candidates if isinstance(type_, Texts) for text in type_.values)


def describe(type_: Any) -> str:
    return type_.__name__ if isinstance(type_, type) else type(type_).__name__


def check_template(name: str, source: str) -> TemplateChecker:
    checker = TemplateChecker(name)
    checker.check(rendering._create_environment().parse(source), {})
    return checker


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_fields_that_templates_read_exist_in_response_models(template: str) -> None:
    checker = check_template(template, TEMPLATES[template])
    assert checker.problems == []
    minimum = {"job.html.j2": 60, "overview.html.j2": 50, "batch.html.j2": 30, "macros.html.j2": 30}.get(template, 0)
    assert checker.field_count >= minimum


@pytest.mark.parametrize(
    "expression",
    [
        "{{ job.renamed }}",
        "{{ job.results.metadata.renamed }}",
        "{{ (job.error or {}).renamed }}",
        "{{ batch['renamed'] }}",
        "{% for status in ('pending', 'renamed') %}{{ batch[status ~ '_jobs'] }}{% endfor %}",
        "{% for event in events | limit_rows %}{{ event.data.renamed }}{% endfor %}",
        "{% for event in events %}{{ event.data.error.renamed }}{% endfor %}",
        "{% for delivery in deliveries %}{{ delivery.attempts }}{{ delivery.renamed }}{% endfor %}",
        "{{ renamed.status }}",
        "{{ events | map(attribute='renamed') | join }}",
        "{% for job in jobs_by_worker.get('w', []) %}{{ job.renamed }}{% endfor %}",
        "{% set bars, max_value = series %}{% for bar in bars %}{{ bar.renamed }}{% endfor %}",
        "{% macro rows(jobs) %}{% for job in jobs %}{{ job.progress.renamed }}{% endfor %}{% endmacro %}",
    ],
)
def test_check_of_template_reports_unknown_field(expression: str) -> None:
    [problem] = check_template("test.html.j2", expression).problems
    assert "renamed" in problem


def test_variables_that_templates_read_are_passed_by_the_pages() -> None:
    calls = [
        call
        for file in FOLDER.glob("*.py")
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and ast.unparse(call.func).rpartition(".")[2] in ("render_page", "render")
    ]
    passed = {keyword.arg for call in calls for keyword in call.keywords} | {"position", "live_source"}
    environment = rendering._create_environment()
    for name, source in TEMPLATES.items():
        read = find_free_variables(environment.parse(source)) - environment.globals.keys()
        assert read <= passed, name


def find_free_variables(template: nodes.Template) -> set[str]:
    """Return the variables that a template reads but does not set. A name that it sets anywhere counts as set."""
    names = list(template.find_all(nodes.Name))
    assigned = {name.name for name in names if name.ctx in ("store", "param")}
    imported = {node.target for node in template.find_all(nodes.Import)}
    macros = {node.name for node in template.find_all(nodes.Macro)}
    return (
        {name.name for name in names if name.ctx == "load"} - assigned - imported - macros - {"loop", "caller", "self"}
    )


# Scripts ----------------------------------------------------------------------------------------------------------

SCRIPT_VARIABLES: Final[Mapping[str, Mapping[str, Types]]] = {
    "past-state.js": {"job": (JobResource,)},
    "actions.js": {"data": (ErrorResponse,)},
    # The route /monitoring/events/validate of the dashboard itself returns `jobs`.
    "submit-form.js": {"result.data": (BatchAcceptedResponse, *fields(["jobs"]))},
}
"""Variables of scripts that hold a response of the API, or a part of it."""
SCRIPT_DESTRUCTURINGS: Final[Mapping[str, type[BaseModel]]] = {
    "{ path, message }": FieldError,
    "{ url, secret }": NewWebhookSecret,
}
"""Parameters of functions that are applied to the elements of a list in a response."""


@pytest.mark.parametrize("script", SCRIPT_VARIABLES)
def test_fields_that_scripts_read_exist_in_response_models(script: str) -> None:
    for variable, variable_types in SCRIPT_VARIABLES[script].items():
        chains = re.findall(rf"(?<![\w.]){re.escape(variable)}((?:\??\.\w+)+)", SCRIPTS[script])
        assert chains, f"{script} no longer reads {variable}"
        for chain in chains:
            current = variable_types
            for name in re.findall(r"\w+", chain):
                members = [members for type_ in current if (members := find_member_types(type_, name)) is not None]
                assert members, f"{script} reads {variable}{chain}, but {name} does not exist"
                current = tuple(type_ for types_ in members for type_ in types_)


def test_scripts_read_responses_only_as_checked() -> None:
    assert {name for name, source in SCRIPTS.items() if ".json()" in source} == {"past-state.js", "actions.js"}
    assert "const { job } = await response.json();" in SCRIPTS["past-state.js"]
    assert "const data = await response.json()" in SCRIPTS["actions.js"]
    assert {name for name, source in SCRIPTS.items() if "postJson(" in source} == {"actions.js", "submit-form.js"}
    destructurings = {text for source in SCRIPTS.values() for text in re.findall(r"\.map\(\((\{[^}]*\})\)", source)}
    assert destructurings == SCRIPT_DESTRUCTURINGS.keys()
    for text, model in SCRIPT_DESTRUCTURINGS.items():
        assert set(re.findall(r"\w+", text)) <= model.model_fields.keys()

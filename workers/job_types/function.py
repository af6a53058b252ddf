"""Job types that are functions: the decorator `job`, and the processor that runs such a function.

    @job("invoice", retry=Retry(max_attempts=5), timeout="10m")
    async def invoice(ctx: Context, customer: str, amount: Decimal) -> Invoice: ...

The parameters and the result of the job are typed by the signature of the function.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import FrameType, UnionType
from typing import (
    Any,
    ClassVar,
    Concatenate,
    Final,
    Generic,
    ParamSpec,
    Protocol,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    overload,
)

from pydantic import BaseModel, ConfigDict, Field, PydanticSchemaGenerationError, TypeAdapter, create_model
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticUserError
from pydantic.fields import FieldInfo

from jobledger.workers.job_types.context import Context, SyncContext, run_in_thread
from jobledger.workers.processor import Isolation, JobContext, Processor, Results, SavedFile
from jobledger.workers.results.conversion import to_json, to_text
from jobledger.workers.results.typed_values import (
    UnsupportedType,
    dump_value,
    get_hints,
    is_write_only,
    make_adapter,
)
from jobledger.workers.retry import Duration, Retry, parse_timeout

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_CONTEXT_CLASSES: Final = (Context, SyncContext)
_MARKDOWN: Final = "text/markdown"


class NoSettings(BaseModel):
    """The settings of a job function whose context declares none."""

    model_config = ConfigDict(extra="forbid")


class JobFunction(Generic[P, R_co]):
    """A job type that is a function. The decorator `job` creates it.

    It can be called like the function, for example in a test. `P` are the parameters without `ctx`, and `R_co` is the
    result.

    Attributes:
        name: Name of the job type.
        function: The decorated function.
        Parameters: Model of the parameters of a job.
        Settings: Model of the section `processors.<name>` of config.yaml.
        result_type: Type of the result. It converts results to JSON and back.
        retry: When failed jobs are retried; None: never.
        timeout: Timeout of a job whose submission has none, in seconds; None: one hour.
        isolation: Where jobs run.
        preload: Modules that are imported before job processes are forked.
        version: Version of the job type for shared steps. An empty text: that of the distribution.
    """

    Parameters: type[BaseModel]
    Settings: type[BaseModel]
    result_type: TypeAdapter[R_co]

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        retry: Retry | None,
        timeout: Duration | None,
        isolation: Isolation,
        version: str | int,
        preload: Sequence[str],
        local_names: Mapping[str, Any] | None = None,
    ) -> None:
        """Initialize the job type. See `job`."""
        self.name = _check_name(name)
        self._subject = f"job {name!r}: "
        self.function = function
        self.retry = retry
        if not (retry is None or isinstance(retry, Retry)):
            raise TypeError(f"{self._subject}retry must be jobledger.Retry(…) or None, not {retry!r}")
        self.timeout = None if timeout is None else parse_timeout(timeout, f"{self._subject}timeout")
        self.is_async = inspect.iscoroutinefunction(function)
        self.isolation = self._check_isolation(isolation)
        if isinstance(version, bool) or not isinstance(version, str | int):
            raise TypeError(f"{self._subject}version must be text or an integer, not {version!r}")
        self.version = str(version)
        if isinstance(preload, str) or not all(isinstance(module, str) for module in preload):
            raise TypeError(f"{self._subject}preload must be a tuple of module names, got {preload!r}")
        self.preload = tuple(preload)
        functools.update_wrapper(self, function)
        self._read_signature(function, local_names)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call the function itself, with `ctx` if it has this parameter."""
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<job {self.name!r}: {self.function.__module__}.{self.function.__qualname__}>"

    def bind(self, /, *args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        """Return the parameters of a job as JSON.

        Args:
            args: Arguments of the function without `ctx`.
            kwargs: Keyword arguments of the function.

        Raises:
            TypeError: An argument is missing or not a parameter.
            pydantic.ValidationError: An argument is not valid for its type.
            ProcessorError: INVALID_RESULT, an argument cannot be stored as JSON.
        """
        try:
            given = self._signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{self._subject}{error}") from None
        parameters = self.Parameters.model_validate(given)
        dumped: dict[str, Any] = to_json(
            parameters.model_dump(mode="json", by_alias=True, exclude_unset=True), "parameters"
        )
        return dumped

    @functools.cached_property
    def processor(self) -> type[Processor]:
        """The class that runs jobs of this type."""
        members = {
            "job_type": self.name,
            "isolation": self.isolation,
            "preload": self.preload,
            "Parameters": self.Parameters,
            "Settings": self.Settings,
            "retry": self.retry,
            "timeout": self.timeout,
            "version": self.version,
            "job_function": self,
            "__module__": self.function.__module__,
            "__qualname__": self.function.__qualname__,
            "__doc__": self.function.__doc__,
        }
        return cast("type[Processor]", type(self.function.__name__, (FunctionProcessor,), members))

    def get_arguments(self, parameters: BaseModel) -> dict[str, Any]:
        """Return the keyword arguments of the function for validated parameters."""
        return {name: getattr(parameters, field) for name, field in self._fields.items()}

    # Reading the declaration --------------------------------------------------------------------------------------

    def _check_isolation(self, isolation: Isolation) -> Isolation:
        if isolation not in get_args(Isolation):
            expected = " or ".join(map(repr, get_args(Isolation)))
            raise ValueError(f"{self._subject}isolation must be {expected}, got {isolation!r}")
        if isolation == "inline" and not self.is_async:
            raise ValueError(
                f"{self._subject}a synchronous function needs isolation='process': inline, nothing could stop it"
            )
        return isolation

    def _read_signature(self, function: Callable[..., Any], local_names: Mapping[str, Any] | None) -> None:
        if not inspect.isfunction(function):
            raise TypeError(f"{self._subject}@job decorates a function, not a {type(function).__name__}")
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"{self._subject}a generator cannot be a job: return the result, and do not use yield")
        try:
            hints = get_hints(function, local_names)
        except UnsupportedType as error:
            raise TypeError(f"{self._subject}{error}") from error
        parameters = list(inspect.signature(function).parameters.values())
        self.takes_context = bool(parameters) and self._is_context(parameters[0], hints)
        self.Settings = NoSettings
        if self.takes_context:
            context = hints.get(parameters.pop(0).name)
            self._check_context(get_origin(context) or context)
            self.Settings = self._find_settings(context)
        for parameter in parameters:
            self._check_parameter(parameter, hints)
        self._fields = {parameter.name: _choose_field_name(parameter.name) for parameter in parameters}
        self._signature = inspect.Signature(parameters)
        self.Parameters = self._create_model(parameters, hints)
        try:
            self.result_type = make_adapter(_find_output_type(hints.get("return", Any)))
        except UnsupportedType as error:
            raise TypeError(f"{self._subject}result: {error}") from error

    def _is_context(self, parameter: inspect.Parameter, hints: Mapping[str, Any]) -> bool:
        if parameter.name not in hints:
            return parameter.name == "ctx"
        return (get_origin(hints[parameter.name]) or hints[parameter.name]) in _CONTEXT_CLASSES

    def _check_context(self, annotation: Any) -> None:
        if annotation is SyncContext and self.is_async:
            raise TypeError(f"{self._subject}an asynchronous function has a Context, not a SyncContext")
        if annotation is Context and not self.is_async:
            raise TypeError(
                f"{self._subject}a synchronous function has a SyncContext, not a Context. If a decorator wraps an "
                "asynchronous function, its wrapper must be asynchronous as well: `async def`"
            )

    def _find_settings(self, annotation: Any) -> type[BaseModel]:
        settings = next(iter(get_args(annotation)), Any)
        if settings is Any or settings is None or settings is type(None):
            return NoSettings
        if not (isinstance(settings, type) and issubclass(settings, BaseModel)):
            raise TypeError(f"{self._subject}Context[…] must name a pydantic model of the settings, not {settings!r}")
        return settings

    def _check_parameter(self, parameter: inspect.Parameter, hints: Mapping[str, Any]) -> None:
        what = f"{self._subject}parameter {parameter.name!r}"
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"{what}: *args and **kwargs have no names and types: list the parameters one by one")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise TypeError(f"{what} is positional-only: parameters of a job are passed by name")
        if parameter.name not in hints and parameter.name in ("self", "cls"):
            raise TypeError(f"{self._subject}a method cannot be a job: decorate a function at the top of a module")
        if parameter.name not in hints:
            raise TypeError(f"{what} has no type: annotate it, for example `{parameter.name}: str`")
        if self._is_context(parameter, hints):
            raise TypeError(f"{what}: the context must be the first parameter")

    def _create_model(self, parameters: Sequence[inspect.Parameter], hints: Mapping[str, Any]) -> type[BaseModel]:
        fields: dict[str, Any] = {}
        for parameter in parameters:
            default = ... if parameter.default is parameter.empty else parameter.default
            field = self._fields[parameter.name]
            if field != parameter.name:
                given = default if isinstance(default, FieldInfo) else Field(default)
                default = FieldInfo.merge_field_infos(
                    given, alias=parameter.name, validation_alias=parameter.name, serialization_alias=parameter.name
                )
            fields[field] = (hints[parameter.name], default)
            self._check_type(parameter.name, hints[parameter.name])
        model = create_model(
            "".join(part.capitalize() for part in re.split(r"[^A-Za-z0-9]+", self.name)) + "Parameters",
            __config__=ConfigDict(extra="forbid", protected_namespaces=(), validate_default=True),
            __module__=self.function.__module__,
            __doc__=inspect.getdoc(self.function),
            **fields,
        )
        # The API finds the model by module and name, in another process.
        model.__qualname__ = f"{self.function.__qualname__}.Parameters"
        return model

    def _check_type(self, name: str, annotation: Any) -> None:
        what = f"{self._subject}parameter {name!r}"
        try:
            schema = TypeAdapter(annotation).json_schema()
        except (PydanticSchemaGenerationError, PydanticInvalidForJsonSchema) as error:
            shown = getattr(annotation, "__qualname__", None) or str(annotation)
            message = f"{what}: the type {shown} cannot be read from JSON: use JSON types or a pydantic model"
            raise TypeError(message) from error
        except PydanticUserError as error:
            raise TypeError(f"{what}: {to_text(error.message, 300)}") from error
        if is_write_only(schema):
            raise TypeError(
                f"{what}: a secret cannot be a parameter, because parameters are stored for good: use the settings of "
                "the job type, Context[MySettings]"
            )


def _check_name(name: object) -> str:
    if not isinstance(name, str):
        hint = ' Use it with a name: @jobledger.job("my-job").' if callable(name) else ""
        raise TypeError(f"the name of a job must be text, not a {type(name).__name__}.{hint}")
    if _NAME.fullmatch(name) is None:
        raise ValueError(
            f"the name of a job must have 1 to 100 letters, digits, dots, underscores or hyphens, and begin with a "
            f"letter or digit, got {to_text(name, 120)!r}"
        )
    return name


def _choose_field_name(name: str) -> str:
    """Return a name that a pydantic field may have. Attributes of models, such as `json`, and `_x` are not allowed."""
    return f"p_{name.lstrip('_')}_" if hasattr(BaseModel, name) or name.startswith("_") else name


# Running ----------------------------------------------------------------------------------------------------------


class FunctionProcessor:
    """Runs a job function. `JobFunction.processor` derives a class for each function."""

    job_function: ClassVar[JobFunction[..., Any]]

    def __init__(self, settings: Any) -> None:
        """Initialize the processor for one attempt."""
        self._settings = settings

    async def run(self, job: JobContext) -> Results:
        """Call the function, and return its result with all files that it saved."""
        job_function = self.job_function
        call = functools.partial(job_function.function, **job_function.get_arguments(job.parameters))
        if job_function.takes_context:
            context_class = Context if job_function.is_async else SyncContext
            settings = None if job_function.Settings is NoSettings else self._settings
            call = functools.partial(call, context_class(job, settings))
        value = await call() if job_function.is_async else await run_in_thread(call)
        if inspect.isawaitable(value):  # a decorator has wrapped an asynchronous function
            value = await value
        return _build_results(job_function, value, job.saved_files)


def _find_output_type(annotation: Any) -> Any:
    """Return the type of `results.output` for the annotation of a result. A function may return `Results` instead."""
    if get_origin(annotation) not in (Union, UnionType):
        return Any if annotation is Results else annotation
    types = tuple(argument for argument in get_args(annotation) if argument is not Results)
    return Union[types] if types else Any  # noqa: UP007 - the types are known at run time only


def _build_results(job_function: JobFunction[..., Any], value: Any, saved: Sequence[SavedFile]) -> Results:
    """Return the results of a job: the value, and the saved files. The only Markdown file is the main one."""
    if isinstance(value, Results):
        output = dump_value(job_function.result_type, value.output, "results.output")
        named = {file.path for file in (value.markdown, *value.assets) if file is not None}
        others = [file for file in saved if file.path not in named]
        return value.model_copy(update={"assets": [*value.assets, *others], "output": output})
    documents = [file for file in saved if file.media_type.partition(";")[0].strip() == _MARKDOWN]
    markdown = documents[0] if len(documents) == 1 else None
    return Results(
        markdown=markdown,
        assets=[file for file in saved if file is not markdown],
        output=dump_value(job_function.result_type, value, "The result"),
    )


# The decorator ----------------------------------------------------------------------------------------------------


class _Decorator(Protocol):
    """Turns a function into a job type. The context is no parameter of a job."""

    @overload
    def __call__(
        self, function: Callable[Concatenate[Context[Any], P], Coroutine[Any, Any, R]], /
    ) -> JobFunction[P, R]: ...

    @overload
    def __call__(self, function: Callable[Concatenate[SyncContext[Any], P], R], /) -> JobFunction[P, R]: ...

    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> JobFunction[P, R]: ...

    @overload
    def __call__(self, function: Callable[P, R], /) -> JobFunction[P, R]: ...


_DEFAULT_RETRY: Final = Retry()


def job(
    name: str,
    *,
    retry: Retry | None = _DEFAULT_RETRY,
    timeout: Duration | None = None,
    isolation: Isolation = "process",
    version: str | int = "",
    preload: Sequence[str] = (),
) -> _Decorator:
    """Make a function a job type.

    The function may have a context as its first parameter: `ctx: Context`, or `ctx: SyncContext` if it is not
    asynchronous. Its other parameters are the parameters of a job. All of them need annotations. What it returns is
    the result of the job, in `results.output`. A synchronous function runs in a thread of its job process.

    Args:
        name: Name of the job type.
        retry: When failed jobs are retried. None: never, not even after a timeout or a lost worker.
        timeout: Timeout of jobs whose submission has none, for example "10m". Default: one hour.
        isolation: `process` runs each attempt in its own process, which contains crashes, leaks and hangs. Use `inline`
            only for cheap asynchronous work.
        version: Version of the job type. Steps are shared only within it. Default: the version of the distribution
            that has an entry point for the function. Without either, steps cannot be shared.
        preload: Modules that take long to import. They are imported once, before job processes are forked.

    Raises:
        TypeError: The declaration or the signature has a part of the wrong type, or without a type.
        ValueError: A value is out of range.
    """
    _check_name(name)
    frame: FrameType | None = sys._getframe(1)
    local_names = frame.f_locals if frame is not None and frame.f_locals is not frame.f_globals else None
    del frame

    def decorate(function: Callable[..., Any], /) -> JobFunction[..., Any]:
        return JobFunction(
            name,
            function,
            retry=retry,
            timeout=timeout,
            isolation=isolation,
            version=version,
            preload=preload,
            local_names=local_names,
        )

    return cast("_Decorator", decorate)

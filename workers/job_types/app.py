"""The job types of an application, for `--app` of the command line, and the submission in transactions of a program."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel

from jobledger.workers.job_types.function import JobFunction
from jobledger.workers.processor import Processor
from jobledger.workers.retry import Retry, parse_duration

if TYPE_CHECKING:
    from pymongo.asynchronous.client_session import AsyncClientSession
    from pymongo.client_session import ClientSession

    from jobledger.ledger.outbox.submitter import TransactionalSubmitter

JobType = JobFunction[..., Any] | type[Processor]
"""A job type: a job function, or a class with the interface `Processor`."""


_DEFAULT_RETRY: Final = Retry()
_APP_NAME: Final = re.compile(r"[^\W\d][\w.]*(:[^\W\d][\w.]*)?")


class App:
    """The job types of an application.

    `jobledger up --app shop.jobs:app` and `jobledger worker --app shop.jobs:app` run them. A program that uses the same
    replica set submits them with `submit`, in its own transactions, from any event loop and thread.
    """

    def __init__(
        self,
        uri: str | None = None,
        *,
        jobs: Iterable[JobType] = (),
        db_name: str = "event_processing",
        user_id: str = "local",
    ) -> None:
        """Initialize the application. It opens no connection.

        Args:
            uri: URI of the database, for programs that use it directly. Commands use that of config.yaml.
            jobs: The job types: job functions and processor classes.
            db_name: The database of the ledger (`mongodb.db_name`). It is on the replica set of the program's data.
            user_id: The owner of jobs without another `user_id`. `local` is the user of an API without authentication.

        Raises:
            TypeError: An item is not a job type.
            ValueError: Two job types have the same name.
        """
        self.uri = uri
        self.db_name = db_name
        self.user_id = user_id
        self.jobs: dict[str, JobType] = {}
        """The job types by name."""
        for item in jobs:
            self._add(item)

    async def submit(
        self, job: JobFunction[..., Any] | str, /, *args: Any, session: AsyncClientSession, **kwargs: Any
    ) -> str:
        """Submit a job in the transaction of a session, and return its ID. The job exists when it is committed.

        Args:
            job: A job function, or the name of a job type.
            args: Arguments of the function, or the parameters of the job type as one mapping or model.
            session: The session. Its transaction must have begun.
            kwargs: Arguments of the function, and the options `name`, `key`, `priority`, `not_before`, `max_attempts`,
                `timeout`, `user_id` and `access_control` (`TransactionOptions`). A name of an argument is never an
                option. Pass an argument with the name `session` by its position.

        Raises:
            ValueError: The parameters or options are not valid, or the key belongs to another job.
            TypeError: An argument is missing or unknown, or the session is none of the asynchronous driver.
            ConfigurationError: The database has no ledger.
            RuntimeError: The session has no transaction.
            PyMongoError: The database failed. `with_transaction` of the driver retries if that may help.
        """
        job_type, parameters, options = self._split_arguments(job, args, kwargs)
        return await self._submitter.submit(job_type, parameters, session=session, **options)

    def submit_blocking(
        self, job: JobFunction[..., Any] | str, /, *args: Any, session: ClientSession, **kwargs: Any
    ) -> str:
        """Submit a job in the transaction of a session of the blocking driver. Otherwise as `submit`."""
        job_type, parameters, options = self._split_arguments(job, args, kwargs)
        return self._submitter.submit_blocking(job_type, parameters, session=session, **options)

    @cached_property
    def _submitter(self) -> TransactionalSubmitter:
        # Job processes import the application, and need no driver.
        from jobledger.ledger.outbox.submitter import TransactionalSubmitter

        return TransactionalSubmitter(db_name=self.db_name, user_id=self.user_id)

    def _split_arguments(
        self, job: JobFunction[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[str, Mapping[str, Any] | BaseModel, dict[str, Any]]:
        """Return the job type, the parameters and the options, with the defaults of the job type."""
        from jobledger.client.submission import split_arguments
        from jobledger.ledger.outbox.submitter import OPTION_NAMES

        parameters: Mapping[str, Any] | BaseModel
        if isinstance(job, str):
            job_type, options = job, kwargs
            parameters = args[0] if args else options.pop("parameters", None)
            if len(args) > 1 or not isinstance(parameters, Mapping | BaseModel):
                raise TypeError("submit() with a job type expects its parameters as one mapping: submit(type, {…})")
            if unknown := options.keys() - OPTION_NAMES:
                raise TypeError(f"submit() has no option {min(unknown)!r}: expected {', '.join(sorted(OPTION_NAMES))}")
        elif not isinstance(job, JobFunction):
            raise TypeError(f"submit() expects a job function or the name of a job type, got a {type(job).__name__}")
        else:
            arguments, options = split_arguments(job, kwargs, OPTION_NAMES)
            job_type, parameters = job.name, job.bind(*args, **arguments)
        return job_type, parameters, self._add_defaults(job, options)

    def _add_defaults(self, job: JobFunction[..., Any] | str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options with `max_attempts` and `timeout` of the job type, as the API has them."""
        given = {name: value for name, value in options.items() if value is not None}
        item = self.jobs.get(job) if isinstance(job, str) else job
        if item is None:  # the job type of another application
            return given
        retry, timeout = getattr(item, "retry", _DEFAULT_RETRY), getattr(item, "timeout", None)
        if retry is None and given.get("max_attempts", 1) != 1:
            raise ValueError(
                f"max_attempts: must be 1, because jobs of type {get_job_type_name(item)!r} are never retried"
            )
        defaults: dict[str, Any] = {"max_attempts": 1 if retry is None else retry.max_attempts}
        if timeout is not None:
            defaults["timeout"] = parse_duration(timeout, "timeout")
        return defaults | given

    def _add(self, item: JobType) -> None:
        name = get_job_type_name(item)
        if name is None:
            raise TypeError(f"App(jobs=…): {item!r} is not a job type: decorate the function with @jobledger.job(…)")
        if self.jobs.get(name, item) is not item:
            raise ValueError(f"App(jobs=…): {self.jobs[name]!r} and {item!r} have the same name {name!r}")
        self.jobs[name] = item


def get_job_type_name(item: object) -> str | None:
    """Return the name of a job type, or None if the object is not one."""
    if isinstance(item, JobFunction):
        return item.name
    name = getattr(item, "job_type", None) if isinstance(item, type) else None
    return name if isinstance(name, str) else None


def check_app_name(name: str) -> str:
    """Return the name of an application, as `--app` and `jobs.app` have it.

    Raises:
        ValueError: It is not the name of a module, or of something in it.
    """
    module, _, attribute = name.partition(":")
    module, ending = (module[:-3], True) if module.endswith(".py") else (module, "/" in module)
    if _APP_NAME.fullmatch(name) and not ending:
        return name
    example = ":".join(filter(None, [module.strip("./").replace("/", "."), attribute]))
    if ending and _APP_NAME.fullmatch(example):
        raise ValueError(f"expected the name of a module and not the path of a file: use {example!r}, got {name!r}")
    raise ValueError(f"expected a module, such as 'shop.jobs', or an App in it, such as 'shop.jobs:app', got {name!r}")


def find_app(target: object) -> App:
    """Return the application that `--app` names: an `App`, or the job functions of a module, or a single one.

    Raises:
        TypeError: It is something else, or has no job types.
        ValueError: Two job functions of the module have the same name.
    """
    if isinstance(target, App):
        if not target.jobs:
            raise TypeError("the App has no job types: App(jobs=[…])")
        return target
    if isinstance(target, JobFunction):
        return App(jobs=[target])
    if not isinstance(target, ModuleType):
        raise TypeError(f"it must be a jobledger.App, a job function or a module, not a {type(target).__name__}")
    apps = [value for value in vars(target).values() if isinstance(value, App)]
    functions = [value for value in vars(target).values() if isinstance(value, JobFunction)]
    if len(apps) == 1 and not functions:
        return find_app(apps[0])
    if not functions and not apps:
        raise TypeError("the module has no job functions: decorate them with @jobledger.job(…)")
    return App(jobs=[*functions, *(item for app in apps for item in app.jobs.values())])

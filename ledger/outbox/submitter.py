"""Submit jobs in a MongoDB transaction of the calling program.

The transaction writes a document of the collection `outbox`. It reserves no position of the log and conflicts with no
other submission. Right after the commit, the leading projector appends the job (ledger/outbox/relay.py). If the
transaction is rolled back, the job was never submitted. The public interface is
`App.submit` (workers/job_types/app.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Final, TypedDict, Unpack
from weakref import WeakKeyDictionary

from pydantic import BaseModel
from pymongo import AsyncMongoClient, MongoClient
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.client_session import ClientSession

from jobledger.ledger.domain.errors import ConfigurationError
from jobledger.ledger.domain.events import AccessControl
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.outbox.submission import COLLECTION, build_document, build_submission, create_job_id

_VIEWS_CHECKPOINT: Final = {"_id": "views"}
"""A document of `checkpoints` that each ledger has since its first start."""


class TransactionOptions(TypedDict, total=False):
    """Options of a job.

    `key`: another submission of the same user with the same key and the same job is the same job. `timeout`: of one
    attempt, in seconds or as a timedelta. `user_id`: the owner. `name`, `priority`, `not_before`, `max_attempts` and
    `access_control` are as in the API.
    """

    key: str | None
    name: str | None
    priority: int | None
    not_before: datetime | None
    max_attempts: int | None
    timeout: float | timedelta | None
    user_id: str | None
    access_control: AccessControl | Mapping[str, Any] | None


OPTION_NAMES: Final[frozenset[str]] = TransactionOptions.__optional_keys__


class TransactionalSubmitter:
    """Submits jobs in transactions of the caller. Usable from any event loop and thread."""

    def __init__(self, *, db_name: str = "event_processing", user_id: str = "local") -> None:
        """Initialize it.

        Args:
            db_name: The database of the ledger (`mongodb.db_name`). It is on the same replica set as the caller's data.
            user_id: The owner of jobs without another `user_id`. `local` is the user of an API without authentication.
        """
        self._db_name = db_name
        self._user_id = user_id
        self._checked: WeakKeyDictionary[AsyncMongoClient[Any] | MongoClient[Any], None] = WeakKeyDictionary()
        """The clients whose server has the ledger."""

    async def submit(
        self,
        job_type: str,
        parameters: Mapping[str, Any] | BaseModel,
        *,
        session: AsyncClientSession,
        **options: Unpack[TransactionOptions],
    ) -> str:
        """Submit a job in the transaction of a session, and return its ID. The job exists when it is committed.

        Raises:
            ValueError: The parameters or options are not valid, or the key belongs to another job.
            TypeError: The session is none of the asynchronous driver.
            ConfigurationError: The database has no ledger.
            RuntimeError: The session has no transaction.
            PyMongoError: The database failed. `with_transaction` of the driver retries if that may help.
        """
        if not isinstance(session, AsyncClientSession):
            raise TypeError(f"submit() needs a session of AsyncMongoClient, got {_describe_session(session)}")
        job_id, document = self._build(job_type, parameters, session, options)
        database = session.client[self._db_name]
        if session.client not in self._checked:
            self._check_ledger(await database.checkpoints.find_one(_VIEWS_CHECKPOINT, {"_id": 1}))
            self._checked[session.client] = None
        found = None
        if options.get("key") is not None:
            found = await database[COLLECTION].find_one({"_id": job_id}, session=session)
        if not _is_submitted(found, document):
            await database[COLLECTION].insert_one(document, session=session)
        return job_id

    def submit_blocking(
        self,
        job_type: str,
        parameters: Mapping[str, Any] | BaseModel,
        *,
        session: ClientSession,
        **options: Unpack[TransactionOptions],
    ) -> str:
        """Submit a job in the transaction of a session of the blocking driver. Otherwise as `submit`."""
        if not isinstance(session, ClientSession):  # one of the other driver would write nothing, without an error
            raise TypeError(f"submit_blocking() needs a session of MongoClient, got {_describe_session(session)}")
        job_id, document = self._build(job_type, parameters, session, options)
        database = session.client[self._db_name]
        if session.client not in self._checked:
            self._check_ledger(database.checkpoints.find_one(_VIEWS_CHECKPOINT, {"_id": 1}))
            self._checked[session.client] = None
        found = None
        if options.get("key") is not None:
            found = database[COLLECTION].find_one({"_id": job_id}, session=session)
        if not _is_submitted(found, document):
            database[COLLECTION].insert_one(document, session=session)
        return job_id

    def _build(
        self,
        job_type: str,
        parameters: Mapping[str, Any] | BaseModel,
        session: AsyncClientSession | ClientSession,
        options: TransactionOptions,
    ) -> tuple[str, Document]:
        """Return the ID of a job and its document."""
        if not session.in_transaction:
            start = f"{'await ' * isinstance(session, AsyncClientSession)}session.start_transaction()"
            raise RuntimeError(f"the session has no transaction: call `{start}` or `session.with_transaction(…)` first")
        given: dict[str, Any] = dict(options)
        key, user_id = given.pop("key", None), given.pop("user_id", None)
        user_id = self._user_id if user_id is None else user_id
        submission = build_submission(job_type, parameters, user_id=user_id, **given)
        job_id = create_job_id(submission.user_id, key)
        return job_id, build_document(job_id, submission)

    def _check_ledger(self, checkpoint: Document | None) -> None:
        """Check that there is a ledger. Otherwise, no process would ever read the outbox.

        Raises:
            ConfigurationError: There is none.
        """
        if checkpoint is None:
            raise ConfigurationError(
                f"The database {self._db_name!r} has no ledger: `db_name` must equal mongodb.db_name of Jobledger, and "
                "Jobledger must have been started once on this replica set."
            )


def _describe_session(session: object) -> str:
    if isinstance(session, ClientSession):
        return "one of the blocking driver: call submit_blocking()"
    if isinstance(session, AsyncClientSession):
        return "one of the asynchronous driver: call `await submit(…)`"
    return f"a {type(session).__name__}"


def _is_submitted(found: Document | None, document: Document) -> bool:
    """Return whether a document of the outbox is already there.

    Raises:
        ValueError: Its key belongs to another job.
    """
    if found is not None and found.get("job") != document["job"]:
        raise ValueError("key: this key was used for another job. Use a new key for a new job")
    return found is not None

"""Connect to MongoDB, check the server, and translate the driver's exceptions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bson.codec_options import CodecOptions, DatetimeConversion
from bson.errors import InvalidBSON
from pymongo import AsyncMongoClient, MongoClient, WriteConcern
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import ConfigurationError as DriverConfigurationError
from pymongo.errors import InvalidURI, OperationFailure, PyMongoError, ServerSelectionTimeoutError, WTimeoutError
from pymongo.monitoring import _EventListener
from pymongo.read_concern import ReadConcern

from jobledger.ledger.domain.errors import ConfigurationError, DatabaseUnsuitable, LedgerUnavailable, UnreadableEvent
from jobledger.ledger.mongo._pymongo_compat import patch_session_support, patch_wait_for
from jobledger.ledger.mongo.server_clock import ServerClock

patch_wait_for()
patch_session_support()
Document = dict[str, Any]
Database = AsyncDatabase[Document]

LENIENT_CODEC: CodecOptions[Document] = CodecOptions(
    tz_aware=True, datetime_conversion=DatetimeConversion.DATETIME_AUTO, unicode_decode_error_handler="replace"
)
"""Also decodes damaged documents, so that one damaged event does not prevent reading others."""

MIN_SERVER_VERSION = (5, 0)  # field names with dots and dollars, and $$NOW in updates, which Jobledger uses
DURABLE = WriteConcern(w="majority", j=True)
MAJORITY = ReadConcern("majority")
LOCAL = ReadConcern("local")


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach the database. Times are in milliseconds, as in config.yaml."""

    uri: str
    db_name: str
    max_pool_size: int = 50
    connect_timeout_ms: int = 5000

    def _build_options(self, *listeners: _EventListener) -> dict[str, Any]:
        return {
            "maxPoolSize": self.max_pool_size,
            "connectTimeoutMS": self.connect_timeout_ms,
            "serverSelectionTimeoutMS": self.connect_timeout_ms,
            "tz_aware": True,
            "readPreference": "primary",  # also if the URI names another one: decisions need current data
            "appname": "jobledger",
            "w": "majority",
            "journal": True,
            "event_listeners": listeners,
        }

    def create_client(self) -> AsyncMongoClient[Document]:
        """Return a client for the event loop. Every write is journaled by a majority before it is acknowledged.

        Raises:
            ConfigurationError: The URI is not valid.
        """
        clock = self._create_clock()
        with _translate_uri_errors(self.uri):
            client: AsyncMongoClient[Document] = AsyncMongoClient(self.uri, **self._build_options(clock))
        clock.attach_client(client)
        return client

    def _create_clock(self) -> ServerClock:
        """Return the clock of a client. `jobledger.testing` replaces it."""
        return ServerClock()

    def create_blocking_client(self, *, response_timeout_seconds: float | None = None) -> MongoClient[Document]:
        """Return a client for a separate thread (heartbeats), which a busy event loop cannot delay.

        Args:
            response_timeout_seconds: How long the server may take for each response, also while a connection is opened.
                The client then retries no write, which would take as long again.
        """
        options = self._build_options()
        if response_timeout_seconds is not None:
            timeout_ms = round(1000 * response_timeout_seconds)
            options |= {"connectTimeoutMS": timeout_ms, "socketTimeoutMS": timeout_ms, "retryWrites": False}
        with _translate_uri_errors(self.uri):
            return MongoClient(self.uri, **options)


@contextmanager
def _translate_uri_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except (InvalidURI, DriverConfigurationError, ValueError) as error:
        # The driver's message quotes parts of the URI, perhaps of the password.
        why = "details are omitted because they may contain the password" if "@" in uri else str(error)
        raise ConfigurationError(
            f"mongodb.uri is not valid: {why}. Expected, for example, "
            "mongodb://user:password@host1,host2/?replicaSet=rs0 (with :, / and @ in user and password written as "
            "%3A, %2F and %40), or the word embedded."
        ) from error


@contextmanager
def translate_errors(operation: str) -> Iterator[None]:
    """Translate the driver's errors into Jobledger's. `operation` completes the message "… failed while …"."""
    try:
        yield
    except PyMongoError as error:
        raise LedgerUnavailable(f"The database failed while {operation}: {summarize_error(error)}") from error
    except InvalidBSON as error:
        raise UnreadableEvent(
            f"A document is damaged: {operation} failed. `jobledger log verify` finds it. {error}"
        ) from error


def get_server_error_code(error: BaseException) -> int | None:
    """Return the server's error code behind an error of `translate_errors`; None if the server reported none."""
    return error.__cause__.code if isinstance(error.__cause__, OperationFailure) else None


def summarize_error(error: PyMongoError) -> str:
    """Return the readable part of a driver error. The rest describes the topology."""
    text = str(error).split(", Timeout:")[0].split(", full error")[0].split(" to execute command")[0]
    # The driver's message when it closes a connection because the server has stopped responding to heartbeats.
    return "the server does not respond" if text == "operation cancelled" else text


UNAUTHORIZED = 13  # the server's error codes
SNAPSHOT_TOO_OLD = 239
INDEX_CONFLICTS = frozenset({85, 86})  # IndexOptionsConflict, IndexKeySpecsConflict
_TRANSIENT_CODES = frozenset(
    {6, 7, 64, 89, 91, 112, 133, 189, 202, 246, 262, 9001, 10107, 11600, 11602, 13435, 13436, 14031}
)
"""Codes for a network failure, a shutdown, an election, an exceeded time limit, or a full disk."""
_PERMANENT_CODES = frozenset({UNAUTHORIZED, 18, 121})  # also AuthenticationFailed, DocumentValidationFailure


def is_transient(error: PyMongoError) -> bool:
    """Return whether a retry may help, such as after a failover or a broken connection. Missing privileges are
    permanent.
    """
    return not (isinstance(error, OperationFailure) and error.code in _PERMANENT_CODES)


async def check_server(db: Database, *, needs_write: bool = True) -> None:
    """Check that the server meets the requirements, and accepts a write if `needs_write`.

    Raises:
        LedgerUnavailable: It is unreachable.
        DatabaseUnsuitable: It is standalone, too old, or rejects an operation. The message says how to fix it.
    """
    try:
        hello = await db.client.admin.command("hello")
        version = (await db.client.admin.command("buildInfo"))["version"]
        if hello.get("msg") == "isdbgrid":
            raise DatabaseUnsuitable(_SHARDED)
        if hello.get("isreplicaset"):
            raise LedgerUnavailable(
                "This MongoDB's replica set is not initiated yet: run rs.initiate() once in mongosh."
            )
        if not hello.get("setName"):
            raise DatabaseUnsuitable(_STANDALONE)
        if tuple(int(part) for part in version.split(".")[:2]) < MIN_SERVER_VERSION:
            raise DatabaseUnsuitable(
                f"MongoDB {version} is too old: Jobledger needs "
                f"{MIN_SERVER_VERSION[0]}.{MIN_SERVER_VERSION[1]} or newer."
            )
        if needs_write:
            checked = db.get_collection("checkpoints", write_concern=WriteConcern(w="majority", j=True, wtimeout=5000))
            await checked.update_one({"_id": "write-check"}, {"$set": {"ok": True}}, upsert=True)
    except ServerSelectionTimeoutError as error:
        raise LedgerUnavailable(
            f"No MongoDB server responds at the address in mongodb.uri: {summarize_error(error)}. Check that it is "
            "running."
        ) from error
    except WTimeoutError as error:
        raise LedgerUnavailable(
            f"No majority of MongoDB's members confirms a write: {summarize_error(error)}. Check that a majority is "
            "running."
        ) from error
    except OperationFailure as error:
        if error.code in _TRANSIENT_CODES:
            raise LedgerUnavailable(f"MongoDB cannot be used now: {summarize_error(error)}") from error
        raise DatabaseUnsuitable(
            f"MongoDB rejects an operation that Jobledger needs: {summarize_error(error)}"
        ) from error
    except PyMongoError as error:
        raise LedgerUnavailable(f"The database failed during the check at startup: {summarize_error(error)}") from error


@dataclass(frozen=True, slots=True)
class OplogWindow:
    """How far the oplog reaches back. Before it `is_full`, the duration is not meaningful."""

    size_mb: float
    hours: float
    is_full: bool

    @property
    def is_too_short(self) -> bool:
        """Whether a member that restarts or resyncs may find that the oplog has rolled over."""
        return self.is_full and self.hours < 1


OPLOG_ADVICE = (
    "No event is lost (readers continue from the collection), but a member that is down for longer must be "
    "resynchronized. Increase the oplog with replSetResizeOplog."
)


async def read_oplog_window(db: Database) -> OplogWindow | None:
    """Read the size and duration of the oplog; None if this user lacks privileges.

    Raises:
        LedgerUnavailable: The database is unreachable.
    """
    local = db.client["local"]
    with translate_errors("reading the oplog"):
        try:
            first = await local["oplog.rs"].find_one({}, {"ts": 1}, sort=[("$natural", 1)])
            last = await local["oplog.rs"].find_one({}, {"ts": 1}, sort=[("$natural", -1)])
            stats = await local.command("collStats", "oplog.rs")
        except OperationFailure as error:
            if error.code == UNAUTHORIZED:
                return None
            raise
    hours = (last["ts"].time - first["ts"].time) / 3600 if first and last else 0.0
    max_size = stats.get("maxSize", 0)
    return OplogWindow(max_size / 2**20, hours, is_full=stats.get("size", 0) > 0.9 * max_size)


async def read_transaction_limit_seconds(db: Database) -> int | None:
    """Return after how many seconds the server aborts an open transaction; None if this user lacks privileges.

    Raises:
        LedgerUnavailable: The database is unreachable.
    """
    with translate_errors("reading parameters of the server"):
        try:
            response = await db.client.admin.command({"getParameter": 1, "transactionLifetimeLimitSeconds": 1})
        except OperationFailure as error:
            if error.code == UNAUTHORIZED:
                return None
            raise
    return int(response["transactionLifetimeLimitSeconds"])


_SHARDED = (
    "This is the router (mongos) of a sharded cluster, which Jobledger does not support: its log is one "
    "collection on one replica set. Set mongodb.uri to the members of a replica set."
)
_STANDALONE = (
    "This MongoDB is a standalone server, but Jobledger needs a replica set (one node is enough): change streams and "
    "transactions do not exist without one. Start mongod with --replSet rs0 (or `replication: {replSetName: rs0}` in "
    "mongod.conf), then run `rs.initiate()` once in mongosh. Or set mongodb.uri to `embedded`."
)

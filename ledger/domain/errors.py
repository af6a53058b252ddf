"""All errors that this system raises on purpose, in one hierarchy.

JobledgerError
├── ConfigurationError          settings or environment are wrong; the message says how to fix it
│   ├── DatabaseUnsuitable      the MongoDB server is unusable (standalone, too old, missing …)
│   │   └── ServerInUse         … because another process uses its data or port (also a ResourceUnavailable)
│   └── UnreadableEvent         an event that is damaged
│       └── UnsupportedEvent    … or that a later version of this program wrote
├── ResourceUnavailable         a port, disk or lock of this machine is unusable now; transient
├── LedgerUnavailable           the database is unreachable or did not respond in time; transient
│   └── FileStoreUnavailable    this machine cannot use the result store now; transient
├── LedgerBusy                  too many events are written now: nothing was written; transient
│   └── StreamBusy              … by other processes to the same stream
├── VersionConflict             another process appended to the stream first; decide again
├── LogTruncated                the log ends before a position that was read from it
├── NotARegularFile             a path to store is not a regular file
├── FileTooLarge                a file to store exceeds the limit
├── FileLost                    a result file is missing from the store, or unreadable
│   └── FileDamaged             its content has changed
├── InvalidEvent                an event cannot be stored or hashed (NaN, too large, …)
└── CommandRejected             the state of the job, batch or delivery does not allow the command
    ├── NotFound                it does not exist
    ├── AlreadyExists           the ID is taken
    └── InvalidState            it is in another state
        └── NotDue              the job is not due yet
"""

from __future__ import annotations

import errno
from typing import Final


class JobledgerError(Exception):
    """The base class. `str(error)` is a message for people."""


class ConfigurationError(JobledgerError):
    """Settings or the environment are wrong. Retrying does not help."""


class DatabaseUnsuitable(ConfigurationError):
    """A MongoDB server is missing or unusable. The message says how to fix it."""


class ResourceUnavailable(JobledgerError):
    """A port, disk or lock of this machine is unusable now. Retrying later may help."""


class ServerInUse(DatabaseUnsuitable, ResourceUnavailable):
    """Another process uses the data directory or port of the embedded server. It may end soon."""


_TRANSIENT: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.EBUSY}
    | {errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENETDOWN}
    | {errno.EADDRINUSE, errno.EADDRNOTAVAIL}
)


def classify_os_error(error: OSError, message: str) -> ResourceUnavailable | ConfigurationError:
    """Return the error for a failed system call: transient, or one that needs a change of settings.

    A full, read-only or broken disk, a lost mount, a taken port or an exhausted limit is transient. A missing file,
    missing permissions or a wrong file type is not.
    """
    return ResourceUnavailable(message) if error.errno in _TRANSIENT else ConfigurationError(message)


class UnreadableEvent(ConfigurationError):
    """The event is damaged, or this version of the program does not know it. The message says which.

    A `ConfigurationError`, because a retry does not help: the operator must upgrade or repair the log.
    """


class UnsupportedEvent(UnreadableEvent):
    """A later version of this program wrote the event. Upgrading helps."""


class LedgerUnavailable(JobledgerError):
    """The database is unreachable or did not respond in time. Whether the operation took effect is unknown."""


class FileStoreUnavailable(LedgerUnavailable):
    """This machine cannot use the result store now. The message contains paths: log it, do not publish it."""


class LedgerBusy(JobledgerError):
    """Too many events are written now, for example more than the appender queues. Nothing was written. Retry later."""


class StreamBusy(LedgerBusy):
    """In each of many tries, another process appended to the stream first."""


class VersionConflict(JobledgerError):
    """Another process appended to the stream first. `found` is its current version."""

    def __init__(self, stream: str, expected: int, found: int) -> None:
        super().__init__(f"{stream} is at version {found}, not {expected}: another process appended first")
        self.stream = stream
        self.expected = expected
        self.found = found


class LogTruncated(JobledgerError):
    """The log ends before a position that a reader has read. Waiting for the missing events would never end."""


class NotARegularFile(JobledgerError):
    """A path to store is a directory, a pipe, a socket or a device."""


class FileTooLarge(JobledgerError):
    """A file to store is larger than `limits.MAX_FILE_BYTES`."""


class FileLost(JobledgerError):
    """A result file is missing from the store, or damaged. The message contains paths: log it, do not publish it."""


class FileDamaged(FileLost):
    """The content of a result file has changed since it was stored."""


class InvalidEvent(JobledgerError):
    """An event cannot be stored or hashed: not JSON, a number outside ±(2^53 - 1), NaN, broken Unicode, or too
    large.
    """


class CommandRejected(JobledgerError):
    """The state does not allow the command. Nothing was written. `code` is for programs."""

    code = "rejected"


class NotFound(CommandRejected):
    """The job, batch or delivery does not exist."""

    code = "not_found"


class AlreadyExists(CommandRejected):
    """The ID is taken."""

    code = "already_exists"


class InvalidState(CommandRejected):
    """The state of the job, batch or delivery does not allow the command."""

    code = "invalid_state"


class NotDue(InvalidState):
    """The job is not due yet."""

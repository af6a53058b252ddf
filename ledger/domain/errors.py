"""ledger: every error this system raises on purpose, in one tree.

JobledgerError
├── ConfigurationError          settings or surroundings are wrong; the message says what would be right
│   ├── DatabaseUnsuitable      the MongoDB server cannot carry a ledger (standalone, too old, missing …)
│   │   └── ServerInUse         … because another process uses its data or port (also a ResourceUnavailable)
│   └── UnreadableEvent         an event that is damaged
│       └── NewerEvent          an event of a later version of this program
├── ResourceUnavailable         a port, disk or lock of this machine is not usable now; may pass
├── LedgerUnavailable           the database cannot be reached or did not answer in time; may pass
│   └── StoreUnavailable        the directory of the result files cannot be used on this machine; may pass
├── LedgerBusy                  too much is waiting to be written; may pass
├── VersionConflict             somebody else appended to the stream first; decide again
├── LogTruncated                the log ends before a position that was read from it
├── NoRegularFile               what is to be stored as a file is none
├── FileTooLarge                what is to be stored is larger than a result file may be
├── FileLost                    a result file is not in the store, or cannot be read
│   └── FileDamaged             its content is not what was stored
├── InvalidEvent                an event that cannot be stored or hashed as it is (NaN, too large, …)
└── CommandRefused              the rules say no
    ├── NotFound                no such job or batch
    ├── AlreadyExists           an id that is taken
    └── WrongState              the job or batch is not in a state that allows it
        └── NotDue              the job is to be started later
"""

from __future__ import annotations

import errno
from typing import Final


class JobledgerError(Exception):
    """The root: whoever catches it may show `str(error)` to a person."""


class ConfigurationError(JobledgerError):
    """Settings or surroundings are wrong; repeating does not help, changing something does."""


class DatabaseUnsuitable(ConfigurationError):
    """A MongoDB server was looked for or found, but cannot be used; the message says what to do."""


class ResourceUnavailable(JobledgerError):
    """A port, disk or lock of this machine cannot be used now. Trying again later may help."""


class ServerInUse(DatabaseUnsuitable, ResourceUnavailable):
    """Another process uses the data directory or port of the embedded server. It may be about to end."""


_TRANSIENT: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.EBUSY}
    | {errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENETDOWN}
    | {errno.EADDRINUSE, errno.EADDRNOTAVAIL}
)


def classify_os_error(error: OSError, message: str) -> ResourceUnavailable | ConfigurationError:
    """Return the error for a failed system call, by whether it may pass without a change of settings.

    A full, read-only or broken disk, a lost mount, a taken port or an exhausted limit may pass. A missing file, missing
    rights or a wrong kind of file may not.
    """
    return ResourceUnavailable(message) if error.errno in _TRANSIENT else ConfigurationError(message)


class UnreadableEvent(ConfigurationError):
    """An event that this version of the program does not know, or whose payload is damaged."""


class UnsupportedEvent(UnreadableEvent):
    """An event of a later version of this program: upgrading helps."""


class LedgerUnavailable(JobledgerError):
    """The database cannot be reached or did not answer in time. What was asked for may or may not have happened."""


class FileStoreUnavailable(LedgerUnavailable):
    """This machine cannot use the directory of the result files now. The message is for the log: it names places."""


class LedgerBusy(JobledgerError):
    """More appends are waiting than the writer accepts; try again in a moment."""


class VersionConflict(JobledgerError):
    """The stream is not at the version the decision was made for. `found` is its version now."""

    def __init__(self, stream: str, expected: int, found: int) -> None:
        super().__init__(f"{stream} is at version {found}, not {expected}: somebody else was first")
        self.stream = stream
        self.expected = expected
        self.found = found


class LogTruncated(JobledgerError):
    """The log ends before a position that a reader has read. Waiting for the missing events would never end."""


class NotARegularFile(JobledgerError):
    """What is to be stored as a file is a directory, a pipe, a socket or a device."""


class FileTooLarge(JobledgerError):
    """What is to be stored as a file is larger than `limits.FILE_BYTES`."""


class FileLost(JobledgerError):
    """A result file that should be in the store is missing or damaged. The message is for the log: it names places."""


class FileDamaged(FileLost):
    """A result file has another content than it was stored with."""


class InvalidEvent(JobledgerError):
    """The event cannot be stored or hashed: not JSON, a number outside ±(2^53 - 1), NaN, broken Unicode, too large."""


class CommandRejected(JobledgerError):
    """The rules say no; nothing was written. `code` is the word that programs compare."""

    code = "rejected"


class NotFound(CommandRejected):
    """No such job or batch."""

    code = "not_found"


class AlreadyExists(CommandRejected):
    """The id is taken."""

    code = "already_exists"


class InvalidState(CommandRejected):
    """The job or batch is not in a state that allows this."""

    code = "invalid_state"


class NotDue(InvalidState):
    """The job is to be started later."""

"""Confine job processes to their own job, and to the parts of the system that running code needs.

`docs/how-to/confinement.md` lists what a job process can access. The system calls are in `sandbox/restrictions.py`,
which helper programs use as well. The network stays available because processors fetch content.

Processors with `isolation = "inline"` run in the worker itself and are not confined: they are trusted code.
"""

from __future__ import annotations

import os
import resource
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

import structlog
from pydantic import BaseModel, Field

from jobledger.ledger.domain.errors import ConfigurationError
from jobledger.ledger.system import process_attributes
from jobledger.ledger.system.settings_section import SettingsSection
from jobledger.workers.sandbox import restrictions
from jobledger.workers.sandbox.restrictions import DEVICE_RULES, LIST_RIGHTS, READ_RIGHTS, WRITE_RIGHTS

_log = structlog.get_logger()
ConfinementMode = Literal["auto", "required", "off"]
LANDLOCK_ADVICE: Final = (
    "Requires Linux 5.13 or later with Landlock enabled (boot option `lsm=`). Full confinement requires 6.12."
)
UNUSABLE_PROCESSORS: Final = "_UNUSABLE_PROCESSORS"
"""Environment variable with the job types that the worker found unusable. Child processes do not load them."""
APP_VARIABLE: Final = "_JOBLEDGER_APP"
"""Environment variable with the application whose job types are used, for child processes."""
_ENVIRONMENT: Final = frozenset(
    {"PATH", "LANG", "LANGUAGE", "TZ", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR", UNUSABLE_PROCESSORS, APP_VARIABLE}
)
_ENVIRONMENT_PREFIXES: Final = ("LC_", "PYTHON")
_SINGLE_THREAD: Final = {"OPENBLAS_NUM_THREADS": "1"}
"""Prevents numpy from starting threads in the fork server when it is imported."""
_PRIVATE_PATHS: Final = (
    *("/root", "/home", "/tmp", "/var/tmp", "/run", "/var/run", "/dev", "/proc", "/lost+found", "/boot"),  # noqa: S108 - denied, not used
    *("/etc/shadow", "/etc/shadow-", "/etc/gshadow", "/etc/gshadow-", "/etc/sudoers", "/etc/sudoers.d", "/etc/ssh"),
    *("/etc/ssl/private", "/etc/krb5.keytab", "/etc/jobledger", "/var/lib/docker", "/var/lib/containerd"),
    *("/var/log", "/var/spool", "/var/backups", "/var/cache/debconf"),
)
"""Not accessible to jobs. The exceptions that running code needs are below, and in the settings."""
_READABLE_PATHS: Final = (
    *("/proc", "/run/systemd/resolve", "/run/resolvconf", "/run/NetworkManager/resolv.conf"),
    "/var/spool/libreoffice",  # Debian's list of shared extensions. LibreOffice ends if it cannot read the list.
)


class ConfinementSettings(SettingsSection):
    """How job processes are confined: keys of the section `event_worker`.

    Attributes:
        confinement: `required`: fail without Landlock. `auto`: use Landlock if available. `off`: do not use Landlock.
        pass_environment: Names of variables that job processes get besides the default ones.
        readable_paths: Readable by all jobs, even if protected.
        writable_paths: Writable by all jobs, even if protected.
        protected_paths: Files and directories of Jobledger itself, which no job may access.
    """

    confinement: ConfinementMode = "auto"
    pass_environment: list[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]] = Field([])
    readable_paths: list[Path] = Field([])
    writable_paths: list[Path] = Field([])
    protected_paths: list[Path] = Field([])


def check_confinement(mode: ConfinementMode) -> None:
    """Warn if job processes cannot be confined. Hide this process's memory and environment from them.

    Raises:
        ConfigurationError: Confinement is required, and the system does not support it.
    """
    if mode == "off":
        return
    restrictions.hide_from_same_user()
    if restrictions.get_landlock_version() >= 1:
        return
    if mode == "required":
        raise ConfigurationError(
            "event_worker.confinement is `required`, but job processes cannot be confined: the kernel does not support "
            f"Landlock. {LANDLOCK_ADVICE} Or set it to auto."
        )
    _log.warning("job processes are not confined: the kernel does not support Landlock", hint=LANDLOCK_ADVICE)


# The environment --------------------------------------------------------------------------------------------------


def build_job_environment(names: Iterable[str] = ()) -> dict[str, str]:
    """Return the environment of the fork server: the default variables, and `names`."""
    allowed_names = {*_ENVIRONMENT, *names}
    return _SINGLE_THREAD | {
        name: value
        for name, value in os.environ.items()
        if name in allowed_names or name.startswith(_ENVIRONMENT_PREFIXES)
    }


# The job process --------------------------------------------------------------------------------------------------


def confine(
    settings: ConfinementSettings,
    *,
    scratch_dir: Path,
    inbox_dir: Path,
    readable_paths: Sequence[Path],
    shared_dirs: Sequence[Path],
) -> None:
    """Confine this process permanently. Call before it has other threads.

    Args:
        scratch_dir: The job's directory for temporary files. It becomes its home directory as well.
        inbox_dir: The directory for result files. It has the same parent, which is the attempt's directory.
        readable_paths: Files and directories in the settings of the processor.
        shared_dirs: Directories that all jobs of the type write to.
    """
    other_dirs = scratch_dir.parents[1:3]  # directories of this worker's other jobs, and of other workers
    allowed = list(_iterate_default_rules((*settings.protected_paths, *other_dirs)))
    os.environ.update(HOME=str(scratch_dir), TMPDIR=str(scratch_dir))
    tempfile.tempdir = None  # makes tempfile read TMPDIR again
    # Some libraries request real-time priority (the AV1 encoder SVT as root), which starves all other processes.
    process_attributes.limit_resource(resource.RLIMIT_RTPRIO, 0)
    process_attributes.limit_resource(resource.RLIMIT_NICE, 0)
    restrictions.set_no_new_privileges()
    if settings.confinement == "off":
        process_attributes.drop_capabilities(keep=process_attributes.FILE_CAPABILITIES)
        return
    has_landlock = restrictions.get_landlock_version() >= 1
    if has_landlock and _can_have_mounts:
        _protect_metadata([scratch_dir.parent, *shared_dirs, *settings.writable_paths])
    # Without Landlock, helper programs run in bubblewrap, which needs this capability.
    process_attributes.drop_capabilities(keep=0 if has_landlock else process_attributes.CAP_SETFCAP)
    restrictions.hide_from_same_user()
    if has_landlock:  # otherwise, the worker has logged a warning or has not started
        rules: list[tuple[str | Path, int]] = [*allowed, *DEVICE_RULES]
        rules += [(path, READ_RIGHTS) for path in _READABLE_PATHS]
        rules += [(path, READ_RIGHTS) for path in (*settings.readable_paths, *readable_paths)]
        rules += [(path, WRITE_RIGHTS) for path in (scratch_dir, inbox_dir, *shared_dirs, *settings.writable_paths)]
        restrictions.apply_landlock(rules)
    if restrictions.is_seccomp_supported():
        # Landlock does not cover local sockets with a path. Through those of the database, a container engine or the
        # fork server, a job could escape.
        restrictions.apply_seccomp_filter(
            restrictions.PRIVILEGED_CALLS if has_landlock else (),  # bubblewrap needs some of them
            socket_families=[socket.AF_UNIX] if has_landlock else [],
            self_only_calls=restrictions.LIMIT_AND_PRIORITY_CALLS,
        )


_can_have_mounts = False


def detect_mount_support() -> None:
    """Detect whether job processes can have their own mounts. Called in the fork server."""
    global _can_have_mounts  # processes that are forked later inherit it
    _can_have_mounts = restrictions.can_make_read_only()


def _protect_metadata(writable: Sequence[Path]) -> None:
    """Prevent changes of modes, owners and times of files outside, which Landlock does not cover."""
    if not restrictions.make_read_only(writable):  # perhaps too many namespaces; the rest of the confinement applies
        print("Cannot protect modes and times of files outside this job.", file=sys.stderr, flush=True)
    with open(os.devnull, "rb") as empty:  # noqa: PTH123 - an older descriptor keeps its writable mount
        os.dup2(empty.fileno(), 0)


def find_paths(settings: BaseModel) -> Iterator[Path]:
    """Yield the files and directories in the settings of a processor."""
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, Path):
                yield item
            elif isinstance(item, BaseModel):
                yield from find_paths(item)


def _iterate_default_rules(protected: Sequence[Path]) -> Iterator[tuple[str, int]]:
    """Yield the default rules: everything except private paths, and the directories of Python code even there.

    Landlock rules only allow access, and only to whole directory trees. Of a directory with private entries, the other
    current entries are allowed one by one.
    """
    own_paths = {os.path.realpath(path) for path in protected}
    home = os.path.realpath(Path.home())
    system_paths = (os.path.realpath(path) for path in _PRIVATE_PATHS if os.path.lexists(path))
    private = (own_paths | {*system_paths, home, os.path.realpath(tempfile.gettempdir())}) - {"/"}
    yield from ((path, READ_RIGHTS) for path in _iterate_public_paths("/", private))
    for path in {
        os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, *sys.path, *_iterate_package_dirs()) if path
    }:
        if path in private or path == "/":  # the worker was started there, so it contains more than code
            continue
        yield path, LIST_RIGHTS  # Python lists directories when it searches modules
        yield from ((allowed, READ_RIGHTS) for allowed in _iterate_public_paths(path, own_paths))


def _iterate_package_dirs() -> Iterator[str]:
    """Yield the directories of loaded packages outside the installation, such as those of an editable install.

    Editable installs have their own finder and no entry in `sys.path`. They may be in a temporary directory, and a
    package in them may be a link to a directory elsewhere.
    """
    installed = (f"{sys.prefix}/", f"{sys.base_prefix}/")
    last = ""
    package_paths = [getattr(module, "__path__", None) for module in list(sys.modules.values())]
    directories = [path for paths in package_paths if isinstance(paths, list) for path in paths]
    for path in sorted(set(map(os.path.realpath, directories))):
        if not path.startswith(installed) and not (last and path.startswith(f"{last}/")):
            yield (last := path)


def _iterate_public_paths(path: str, private: set[str]) -> Iterator[str]:
    """Yield the largest subtrees of `path` without private entries. Omit symbolic links, which access resolves."""
    if path in private:
        return
    inside = path.rstrip("/") + "/"
    if not any(other.startswith(inside) for other in private):
        yield path
        return
    try:
        entries = [entry.path for entry in os.scandir(path) if not entry.is_symlink()]
    except OSError:  # this user cannot open anything in it
        return
    for entry in entries:
        yield from _iterate_public_paths(entry, private)

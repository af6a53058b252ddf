"""workers: what a job process may see and do: its own job, and of the machine only what it takes to run code.

Three things hold everywhere: a job process starts with a minimal environment, is handed the settings of its own
processor only, and has no power over the machine, such as real-time priority, even if the worker runs as root. Where
the kernel offers Landlock, it also cannot read the data of the embedded server, result files, settings and secrets,
home directories or other jobs' files, writes only to its own directories, and cannot signal, trace or read processes
outside. The network stays open, because processors fetch; sockets of this machine do not.

Processors with `isolation = "inline"` run in the worker itself and are not confined: they are trusted code.
"""

from __future__ import annotations

import ctypes
import os
import resource
import socket
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

import structlog
from pydantic import BaseModel

from jobledger.ledger.domain.errors import ConfigurationError
from jobledger.workers.sandbox import restrictions
from jobledger.workers.sandbox.restrictions import LIST_RIGHTS, READ_RIGHTS, WRITE_DEVICE_RIGHTS, WRITE_RIGHTS

_log = structlog.get_logger()
ConfinementMode = Literal["auto", "required", "off"]
LANDLOCK_ADVICE: Final = (
    "It needs Linux 5.13 or later (6.12 or later for all of it) with Landlock enabled (boot option `lsm=`)."
)
UNUSABLE_PROCESSORS: Final = "_UNUSABLE_PROCESSORS"
"""Variable with the job types that the worker found unusable. The processes that it starts do not load them."""
_ENVIRONMENT: Final = frozenset(
    {"PATH", "LANG", "LANGUAGE", "TZ", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR", UNUSABLE_PROCESSORS}
)
_PREFIXES: Final = ("LC_", "PYTHON")
_PRIVATE: Final = (
    *("/root", "/home", "/tmp", "/var/tmp", "/run", "/var/run", "/dev", "/proc", "/lost+found", "/boot"),  # noqa: S108 - denied, not used
    *("/etc/shadow", "/etc/shadow-", "/etc/gshadow", "/etc/gshadow-", "/etc/sudoers", "/etc/sudoers.d", "/etc/ssh"),
    *("/etc/ssl/private", "/etc/krb5.keytab", "/etc/jobledger", "/var/lib/docker", "/var/lib/containerd"),
    *("/var/log", "/var/spool", "/var/backups", "/var/cache/debconf"),
)
"""Not for jobs, whatever the settings. Parts of them that running code needs are allowed below."""
_NEEDED: Final = ("/proc", "/run/systemd/resolve", "/run/resolvconf", "/run/NetworkManager/resolv.conf")
_DEVICES: Final = ("/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


class ConfinementSettings(BaseModel):
    """How job processes are confined.

    `environment` names variables that job processes get besides the usual ones. `protected` are files and directories
    no job may see: those of the ledger itself. `readable` and `writable` are allowed to all jobs, even if protected.
    """

    mode: ConfinementMode = "auto"
    environment_variables: tuple[str, ...] = ()
    protected_paths: tuple[Path, ...] = ()
    readable_paths: tuple[Path, ...] = ()
    writable_paths: tuple[Path, ...] = ()


def check_confinement(mode: ConfinementMode) -> None:
    """Warn if job processes cannot be confined. Hide this process's memory and environment from them.

    Raises:
        ConfigurationError: they must be, and the system does not allow it.
    """
    if mode == "off":
        return
    restrictions.hide_from_same_user()
    if restrictions.landlock_version() >= 1:
        return
    if mode == "required":
        raise ConfigurationError(
            "event_worker.confinement: `required`, but this kernel does not offer Landlock, so job processes cannot be "
            f"confined. {LANDLOCK_ADVICE} Or set it to auto."
        )
    _log.warning("job processes are not confined: this kernel does not offer Landlock", advice=LANDLOCK_ADVICE)


# The environment --------------------------------------------------------------------------------------------------

_environment_lock = threading.Lock()


def build_job_environment(names: Iterable[str] = ()) -> dict[str, str]:
    """Return the variables that the server process of job processes starts with: the usual ones, and `names`."""
    wanted = {*_ENVIRONMENT, *names}
    return {name: value for name, value in os.environ.items() if name in wanted or name.startswith(_PREFIXES)}


@contextmanager
def minimal_environment(names: Iterable[str] = ()) -> Iterator[None]:
    """Start programs inside the block with `environment_for_jobs`.

    `os.environ` stays as it is: only the array that the C library hands to new programs is another one meanwhile.
    """
    lines = [os.fsencode(f"{name}={value}") for name, value in build_job_environment(names).items()]
    array = (ctypes.c_char_p * (len(lines) + 1))(*lines, None)
    with _environment_lock:
        current = ctypes.c_void_p.in_dll(ctypes.CDLL(None), "environ")
        before, current.value = current.value, ctypes.addressof(array)
        try:
            yield
        finally:
            current.value = before


# The job process --------------------------------------------------------------------------------------------------


def confine(
    settings: ConfinementSettings,
    *,
    scratch_dir: Path,
    inbox_dir: Path,
    readable_paths: Sequence[Path],
    shared_dirs: Sequence[Path],
) -> None:
    """Confine this process for good. It must not have other threads yet.

    Args:
        confinement: What the settings say.
        scratch: The job's own directory. It becomes its home and the place of temporary files.
        inbox: Where it puts result files. It has the same parent, which is the attempt's own.
        readable: Files and directories that the settings of its processor name.
        shared: Directories that all jobs of its type write to.
    """
    others = scratch_dir.parents[1:3]  # of this worker's jobs, and of other workers
    allowed = list(_iterate_default_rules((*settings.protected_paths, *others)))
    os.environ.update(HOME=str(scratch_dir), TMPDIR=str(scratch_dir))
    tempfile.tempdir = None  # looked up again, in TMPDIR
    # Libraries ask for real-time priority (the AV1 encoder SVT does, as root), and then all other processes starve.
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_RTPRIO, resource.RLIMIT_NICE):
        resource.setrlimit(kind, (0, 0))
    restrictions.set_no_new_privileges()
    if settings.mode == "off":
        restrictions.drop_capabilities(keep=restrictions.FILE_CAPABILITIES)
        return
    has_landlock = restrictions.landlock_version() >= 1
    if has_landlock and _mounts_allowed:
        _protect_metadata([scratch_dir.parent, *shared_dirs, *settings.writable_paths])
    restrictions.drop_capabilities(keep=0 if has_landlock else restrictions.CAP_SETFCAP)  # bubblewrap needs it
    restrictions.hide_from_same_user()
    if has_landlock:  # else the worker has said so, or has refused to start
        _allow_only(settings, allowed, [scratch_dir, inbox_dir, *shared_dirs], readable_paths)
    if restrictions.is_seccomp_supported():
        # Landlock does not cover local sockets that have a path: through those of the database, of a container engine
        # or of the server process that starts jobs, a job could leave its confinement.
        restrictions.apply_seccomp_filter(
            restrictions.PRIVILEGED_CALLS if has_landlock else (),  # bubblewrap needs some of them
            socket_families=[socket.AF_UNIX] if has_landlock else [],
            self_only_calls=restrictions.LIMIT_AND_PRIORITY_CALLS,
        )


def _allow_only(
    confinement: ConfinementSettings, allowed: list[tuple[str, int]], writable: Sequence[Path], readable: Sequence[Path]
) -> None:
    rules: list[tuple[str | Path, int]] = [*allowed]
    rules += [(path, READ_RIGHTS) for path in (*_NEEDED, *_DEVICES)]
    rules += [(path, READ_RIGHTS) for path in (*confinement.readable_paths, *readable)]
    rules += [(path, WRITE_RIGHTS) for path in (*writable, *confinement.writable_paths)]
    rules.append(("/dev/null", WRITE_DEVICE_RIGHTS))
    restrictions.apply_landlock(rules)


_mounts_allowed = False


def detect_mount_support() -> None:
    """Find out whether this system lets job processes have mounts of their own. Called in the fork server."""
    global _mounts_allowed  # the processes that are forked later inherit it
    _mounts_allowed = restrictions.can_make_read_only()


def _protect_metadata(writable: Sequence[Path]) -> None:
    """Keep this process from changing modes, owners and times of files outside, which Landlock does not cover."""
    if not restrictions.make_read_only(writable):  # too many namespaces, perhaps: the rest of the confinement holds
        print("Modes and times of files outside are not protected.", file=sys.stderr, flush=True)
    with open(os.devnull, "rb") as empty:  # noqa: PTH123 - a descriptor from before keeps its writable mount
        os.dup2(empty.fileno(), 0)


def find_paths(settings: BaseModel) -> Iterator[Path]:
    """Yield the files and directories that a processor's settings name."""
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, Path):
                yield item
            elif isinstance(item, BaseModel):
                yield from find_paths(item)


def _iterate_default_rules(protected: Sequence[Path]) -> Iterator[tuple[str, int]]:
    """Yield what is allowed of the file system: all of it but private places, and in these what Python loads code from.

    Landlock only allows, and whole directories with all that is in them. So a directory in which something is private
    is not allowed itself: the entries it has now are.
    """
    ours = {os.path.realpath(path) for path in protected}
    home = os.path.realpath(Path.home())
    system = (os.path.realpath(path) for path in _PRIVATE if os.path.lexists(path))
    private = (ours | {*system, home, os.path.realpath(tempfile.gettempdir())}) - {"/"}
    yield from ((path, READ_RIGHTS) for path in _iterate_public_paths("/", private))
    for path in {
        os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, *sys.path, *_iterate_package_dirs()) if path
    }:
        if path in private or path == "/":  # it was started there: then it is no place for code alone
            continue
        yield path, LIST_RIGHTS  # where Python looks for modules it lists directories
        yield from ((allowed, READ_RIGHTS) for allowed in _iterate_public_paths(path, ours))


def _iterate_package_dirs() -> Iterator[str]:
    """Yield the directories of loaded packages outside the installation, such as those of an editable install.

    Editable installs have a finder of their own and no entry in `sys.path`. They may lie in a temporary directory,
    and a
    package in them may be a link to a directory elsewhere.
    """
    installed = (f"{sys.prefix}/", f"{sys.base_prefix}/")
    last = ""
    for path in sorted({os.path.realpath(path) for path in _package_paths()}):
        if not path.startswith(installed) and not (last and path.startswith(f"{last}/")):
            yield (last := path)


def _package_paths() -> Iterator[str]:
    for module in list(sys.modules.values()):
        if isinstance(paths := getattr(module, "__path__", None), list):
            yield from paths


def _iterate_public_paths(path: str, private: set[str]) -> Iterator[str]:
    """Yield the largest parts of `path` in which nothing is private, but no symbolic links: access ignores them."""
    if path in private:
        return
    inside = path.rstrip("/") + "/"
    if not any(place.startswith(inside) for place in private):
        yield path
        return
    try:
        entries = [entry.path for entry in os.scandir(path) if not entry.is_symlink()]
    except OSError:  # not for this user: nothing in it could be opened
        return
    for entry in entries:
        yield from _iterate_public_paths(entry, private)

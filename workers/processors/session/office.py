"""session: presentations that are no PDF become one, by LibreOffice where it is installed.

It runs without a window, on a profile of its own that knows no proxy but a dead one, fetches nothing that a
presentation links to, and runs no macros. It ends with the step, and with the job (`workers/child.py`).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from pathlib import Path
from typing import Final

_KINDS: Final = {
    **dict.fromkeys((".ppt", ".pps"), (b"\xd0\xcf\x11\xe0",)),
    **dict.fromkeys((".pptx", ".ppsx", ".odp", ".key"), (b"PK\x03\x04",)),
    ".fodp": (b"<?xml", b"\xef\xbb\xbf<?xml", b"<office:"),
}
"""What such a file begins with."""
MEDIA_TYPES: Final = {
    "application/vnd.ms-powerpoint": ".ppt",
    "application/vnd.openxmlformats-officedocument.presentationml.presentation": ".pptx",
    "application/vnd.openxmlformats-officedocument.presentationml.slideshow": ".ppsx",
    "application/vnd.oasis.opendocument.presentation": ".odp",
    "application/vnd.apple.keynote": ".key",
    "application/x-iwork-keynote-sffkey": ".key",
}
_PROFILE: Final = """<?xml version="1.0" encoding="UTF-8"?>
<oor:items xmlns:oor="http://openoffice.org/2001/registry" xmlns:xs="http://www.w3.org/2001/XMLSchema">
{items}</oor:items>
"""
_ITEM: Final = (
    '<item oor:path="/org.openoffice.{path}">'
    '<prop oor:name="{name}" oor:op="fuse"><value>{value}</value></prop></item>\n'
)
_CHOSEN: Final = (
    ("Office.Common/Security/Scripting", "DisableMacrosExecution", "true"),
    ("Office.Common/Security/Scripting", "BlockUntrustedRefererLinks", "true"),
    ("Office.Common/Security/Scripting", "MacroSecurityLevel", "3"),
    ("Inet/Settings", "ooInetProxyType", "1"),  # by hand: to a port where nobody listens
    ("Inet/Settings", "ooInetHTTPProxyName", "127.0.0.1"),
    ("Inet/Settings", "ooInetHTTPProxyPort", "9"),
    ("Inet/Settings", "ooInetHTTPSProxyName", "127.0.0.1"),
    ("Inet/Settings", "ooInetHTTPSProxyPort", "9"),
    ("Inet/Settings", "ooInetNoProxy", ""),
)


class NotConverted(Exception):
    """Why there is no PDF, as the rest of a sentence that begins with "it"."""


def is_installed(program: str | None) -> bool:
    """Return whether there is such a program."""
    return program is not None and shutil.which(program) is not None


def is_presentation(path: Path, suffix: str) -> bool:
    """Whether the file begins as one of this kind (`.pptx`) does."""
    with path.open("rb") as file:
        return file.read(16).startswith(_KINDS.get(suffix, ()))


def can_be_presentation(suffix: str) -> bool:
    """Return whether files that end so may be presentations that are no PDF."""
    return suffix in _KINDS


async def to_pdf(source: Path, suffix: str, *, program: str, scratch: Path) -> Path:
    """Make a PDF of the presentation `source` in the empty directory `scratch`. Cancelled, it leaves no process behind.

    Raises:
        NotConverted: LibreOffice cannot read it.
    """
    profile, named = scratch / "profile", scratch / f"slides{suffix}"
    await asyncio.to_thread(_prepare, profile, source, named)
    process = await asyncio.create_subprocess_exec(
        *(program, "--headless", "--norestore", "--nologo", "--nolockcheck", "--nodefault"),
        f"-env:UserInstallation={profile.as_uri()}",
        *("--convert-to", "pdf:impress_pdf_Export", "--outdir", str(scratch), str(named)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env={"PATH": os.environ.get("PATH", os.defpath), "HOME": str(profile), "LANG": "C.UTF-8"},
    )
    try:
        await process.wait()
    finally:
        _kill_with_descendants(process.pid)
        await process.wait()
    made = scratch / "slides.pdf"
    if not await asyncio.to_thread(made.is_file):
        raise NotConverted("could not be read by LibreOffice")
    return made


def _prepare(profile: Path, source: Path, named: Path) -> None:
    items = "".join(_ITEM.format(path=path, name=name, value=value) for path, name, value in _CHOSEN)
    (profile / "user").mkdir(parents=True)
    (profile / "user" / "registrymodifications.xcu").write_text(_PROFILE.format(items=items), encoding="utf-8")
    source.rename(named)


def _kill_with_descendants(pid: int) -> None:
    """`soffice` is a script that starts the program proper."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(pid, signal.SIGKILL)
    except (OSError, ProcessLookupError):
        return
    for child in children:
        _kill_with_descendants(int(child))

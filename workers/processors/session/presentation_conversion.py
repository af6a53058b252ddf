"""session: make a PDF of presentations that are none, by LibreOffice where it is installed.

LibreOffice runs in the sandbox (`workers/sandbox/runner.py`), on a copy of the presentation without references to
anything
outside of it (`deck_files.py`), with a profile of its own in which macros are disabled. It ends with the step, and with
the job. Where there is no sandbox that works, it does not run.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Final

from jobledger.workers.processors.session import libreoffice_helper
from jobledger.workers.processors.session.presentation_files import InvalidPresentation, sanitize_presentation
from jobledger.workers.sandbox import runner

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


class ConversionFailed(Exception):
    """Why there is no PDF, as the rest of a sentence that begins with "it"."""


def is_installed(program: str | None) -> bool:
    """Return whether there is such a program."""
    return program is not None and shutil.which(program) is not None


def has_presentation_signature(path: Path, suffix: str) -> bool:
    """Whether the file begins as one of this kind (`.pptx`) does."""
    with path.open("rb") as file:
        return file.read(16).startswith(_KINDS.get(suffix, ()))


def is_presentation_suffix(suffix: str) -> bool:
    """Return whether files that end so may be presentations that are no PDF."""
    return suffix in _KINDS


async def convert_to_pdf(source: Path, suffix: str, *, program: str, scratch: Path) -> Path:
    """Make a PDF of the presentation `source` in the empty directory `scratch`. Cancelled, it leaves no process behind.

    Raises:
        NotConverted: LibreOffice cannot read it, or cannot be run safely here.
    """
    profile, named, made = scratch / "profile", scratch / f"slides{suffix}", scratch / "slides.pdf"
    try:
        await asyncio.to_thread(_prepare, profile, source, named)
        await runner.run_program(
            runner.Program(
                _command(program, profile, named, made),
                scratch,
                readable_paths=_readable(program),
                environment={"HOME": str(profile), "SAL_USE_VCLPLUGIN": "svp"},
            )
        )
    except InvalidPresentation as error:
        raise ConversionFailed(str(error)) from error
    except runner.SandboxUnavailable as error:
        raise ConversionFailed(f"was not converted, because LibreOffice cannot be run safely: {error}") from error
    if not await asyncio.to_thread(made.is_file):
        raise ConversionFailed("could not be read by LibreOffice")
    return made


def _command(program: str, profile: Path, source: Path, target: Path) -> list[str]:
    """Return what converts: LibreOffice's library if it lies with the program, else the program itself."""
    path = shutil.which(program) or program
    if (directory := _library_directory(path)) is not None:
        arguments = (str(directory), profile.as_uri(), source.as_uri(), target.as_uri())
        return runner.python_command(str(Path(libreoffice_helper.__file__).resolve()), *arguments)
    return [
        *(path, "--headless", "--norestore", "--nologo", "--nolockcheck", "--nodefault"),
        f"-env:UserInstallation={profile.as_uri()}",
        *("--convert-to", "pdf:impress_pdf_Export", "--outdir", str(target.parent), str(source)),
    ]


def _library_directory(path: str) -> Path | None:
    """Return where LibreOffice's library lies: beside the program, unless that is a script of a distribution."""
    places = [Path(path).resolve().parent]
    if Path(path).name in ("soffice", "libreoffice"):
        places += [Path("/usr/lib64/libreoffice/program"), Path("/usr/lib/libreoffice/program")]
    return next(
        (place for place in places if any((place / name).exists() for name in libreoffice_helper.LIBRARIES)), None
    )


def _readable(program: str) -> list[Path]:
    """Return what the program needs besides the system's directories: itself, and LibreOffice where it is installed."""
    path = shutil.which(program) or program
    directory = _library_directory(path)
    return [Path(path).resolve(), *([directory.parent] if directory else [])]


def _prepare(profile: Path, source: Path, named: Path) -> None:
    items = "".join(_ITEM.format(path=path, name=name, value=value) for path, name, value in _CHOSEN)
    (profile / "user").mkdir(parents=True)
    (profile / "user" / "registrymodifications.xcu").write_text(_PROFILE.format(items=items), encoding="utf-8")
    sanitize_presentation(source, named)

"""Convert presentations to PDF with LibreOffice if it is installed.

LibreOffice runs in the sandbox (`workers/sandbox/runner.py`) with a separate profile that disables macros. It reads a
copy of the presentation without external references (`presentation_files.py`). It ends with the step and with the job.
Without a working sandbox it does not run.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Final

from jobledger.workers.processors.session import libreoffice_helper
from jobledger.workers.processors.session.presentation_files import InvalidPresentation, sanitize_presentation
from jobledger.workers.sandbox import runner

_SIGNATURES: Final = {
    **dict.fromkeys((".ppt", ".pps"), (b"\xd0\xcf\x11\xe0",)),
    **dict.fromkeys((".pptx", ".ppsx", ".odp", ".key"), (b"PK\x03\x04",)),
    ".fodp": (b"<?xml", b"\xef\xbb\xbf<?xml", b"<office:"),
}
"""First bytes of the files by suffix."""
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
_PROFILE_ITEMS: Final = (
    ("Office.Common/Security/Scripting", "DisableMacrosExecution", "true"),
    ("Office.Common/Security/Scripting", "BlockUntrustedRefererLinks", "true"),
    ("Office.Common/Security/Scripting", "MacroSecurityLevel", "3"),
    ("Inet/Settings", "ooInetProxyType", "1"),  # manual proxy: a port without a listener
    ("Inet/Settings", "ooInetHTTPProxyName", "127.0.0.1"),
    ("Inet/Settings", "ooInetHTTPProxyPort", "9"),
    ("Inet/Settings", "ooInetHTTPSProxyName", "127.0.0.1"),
    ("Inet/Settings", "ooInetHTTPSProxyPort", "9"),
    ("Inet/Settings", "ooInetNoProxy", ""),
)


class ConversionFailed(Exception):
    """The file was not converted. The message continues the sentence "It …"."""


def is_installed(program: str | None) -> bool:
    """Return whether the program is installed."""
    return program is not None and shutil.which(program) is not None


def has_presentation_signature(path: Path, suffix: str) -> bool:
    """Return whether the first bytes of the file match `suffix`, such as `.pptx`."""
    with path.open("rb") as file:
        return file.read(16).startswith(_SIGNATURES.get(suffix, ()))


def is_presentation_suffix(suffix: str) -> bool:
    """Return whether `suffix` is that of a presentation other than PDF."""
    return suffix in _SIGNATURES


async def convert_to_pdf(source: Path, suffix: str, *, program: str, scratch: Path) -> Path:
    """Convert the presentation `source` to a PDF in the empty directory `scratch`.

    If cancelled, it leaves no process behind.

    Raises:
        ConversionFailed: LibreOffice cannot read the file, or no sandbox works on this machine.
    """
    profile, copy, pdf = scratch / "profile", scratch / f"slides{suffix}", scratch / "slides.pdf"
    try:
        await asyncio.to_thread(_prepare, profile, source, copy)
        await runner.run_program(
            runner.Program(
                _build_command(program, profile, copy, pdf),
                scratch,
                readable_paths=_list_readable_paths(program),
                environment={"HOME": str(profile), "SAL_USE_VCLPLUGIN": "svp"},
            )
        )
    except InvalidPresentation as error:
        raise ConversionFailed(str(error)) from error
    except runner.SandboxUnavailable as error:
        raise ConversionFailed(f"was not converted because LibreOffice cannot run in a sandbox: {error}") from error
    if not await asyncio.to_thread(pdf.is_file):
        raise ConversionFailed("could not be read by LibreOffice")
    return pdf


def _build_command(program: str, profile: Path, source: Path, target: Path) -> list[str]:
    """Return the command: the helper if LibreOffice's library is next to the program, or else the program."""
    path = shutil.which(program) or program
    if (directory := _find_library_directory(path)) is not None:
        arguments = (str(directory), profile.as_uri(), source.as_uri(), target.as_uri())
        return runner.python_command(str(Path(libreoffice_helper.__file__).resolve()), *arguments)
    return [
        *(path, "--headless", "--norestore", "--nologo", "--nolockcheck", "--nodefault"),
        f"-env:UserInstallation={profile.as_uri()}",
        *("--convert-to", "pdf:impress_pdf_Export", "--outdir", str(target.parent), str(source)),
    ]


def _find_library_directory(path: str) -> Path | None:
    """Return the directory of LibreOffice's library: next to the program, unless that is a script of a distribution."""
    directories = [Path(path).resolve().parent]
    if Path(path).name in ("soffice", "libreoffice"):
        directories += [Path("/usr/lib64/libreoffice/program"), Path("/usr/lib/libreoffice/program")]
    return next(
        (
            directory
            for directory in directories
            if any((directory / name).exists() for name in libreoffice_helper.LIBRARIES)
        ),
        None,
    )


def _list_readable_paths(program: str) -> list[Path]:
    """Return the paths that the program reads besides the system's directories: itself and LibreOffice."""
    path = shutil.which(program) or program
    directory = _find_library_directory(path)
    return [Path(path).resolve(), *([directory.parent] if directory else [])]


def _prepare(profile: Path, source: Path, copy: Path) -> None:
    items = "".join(_ITEM.format(path=path, name=name, value=value) for path, name, value in _PROFILE_ITEMS)
    (profile / "user").mkdir(parents=True)
    (profile / "user" / "registrymodifications.xcu").write_text(_PROFILE.format(items=items), encoding="utf-8")
    sanitize_presentation(source, copy)

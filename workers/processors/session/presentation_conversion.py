"""Convert presentations to PDF with LibreOffice if it is installed.

LibreOffice runs in the sandbox (`workers/sandbox/runner.py`) with a separate profile that disables macros. It reads a
copy of the presentation without external references (`presentation_files.py`). It ends with the step and with the job.
Without a working sandbox it does not run.
"""

from __future__ import annotations

import asyncio
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from jobledger.workers.processors.session import libreoffice_helper, presentation_files
from jobledger.workers.processors.session.presentation_files import UnusablePresentation, sanitize_presentation
from jobledger.workers.sandbox import runner

SIGNATURES: Final = {
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
_PARTS: Final = {"ppt/presentation.xml": ".pptx", "Index/Presentation.iwa": ".key", "index.apxl": ".key"}
"""Presentations in ZIP files by a part of them."""
_HELPER: Final = str(Path(libreoffice_helper.__file__).resolve())
_PROFILE_FILE: Final = Path(__file__).with_name("libreoffice_profile.xcu")


def has_presentation_signature(path: Path, suffix: str) -> bool:
    """Return whether the first bytes of the file match `suffix`, such as `.pptx`."""
    with path.open("rb") as file:
        return file.read(16).startswith(SIGNATURES.get(suffix, ()))


def detect_presentation(path: Path, suffix: str) -> str:
    """Return the suffix of a presentation, from its content or from `suffix`. Return an empty text for other files."""
    with suppress(*presentation_files.DAMAGE_ERRORS, OSError, RuntimeError), zipfile.ZipFile(path) as package:
        names = set(package.namelist()[: presentation_files.MAX_PARTS])
        if detected := next((detected for part, detected in _PARTS.items() if part in names), None):
            return detected
        if "mimetype" in names:
            with package.open("mimetype") as file:
                if file.read(100).startswith(b"application/vnd.oasis.opendocument.presentation"):
                    return ".odp"
    return suffix if has_presentation_signature(path, suffix) else ""


class ConvertedPresentation(NamedTuple):
    """A PDF, and the same presentation as OpenDocument file if LibreOffice has written one."""

    pdf: Path
    text_source: Path


async def convert_to_pdf(source: Path, suffix: str, *, program: str, scratch: Path) -> ConvertedPresentation:
    """Convert the presentation `source` to a PDF in the empty directory `scratch`.

    If cancelled, it leaves no process behind.

    Raises:
        UnusablePresentation: LibreOffice cannot read the file, or no sandbox works on this machine.
    """
    path = shutil.which(program) or program
    library_directory = _find_library_directory(path)
    readable_paths = [Path(path).resolve()]  # noqa: ASYNC240 - cheaper than a thread
    profile, copy, pdf = scratch / "profile", scratch / f"slides{suffix}", scratch / "slides.pdf"
    text_source = scratch / "slides.fodp"
    await asyncio.to_thread(_prepare, profile, source, copy)
    if library_directory is None:
        command = [
            *(path, "--headless", "--norestore", "--nologo", "--nolockcheck", "--nodefault"),
            f"-env:UserInstallation={profile.as_uri()}",
            *("--convert-to", "pdf:impress_pdf_Export", "--outdir", str(scratch), str(copy)),
        ]
    else:
        readable_paths.append(library_directory.parent)
        arguments = [str(library_directory), profile.as_uri(), copy.as_uri(), pdf.as_uri()]
        if suffix not in presentation_files.TEXT_SUFFIXES:  # its texts and speaker notes cannot be read otherwise
            arguments.append(text_source.as_uri())
        command = runner.build_python_command(_HELPER, *arguments)
    try:
        environment = {"HOME": str(profile), "SAL_USE_VCLPLUGIN": "svp"}
        await runner.run_program(runner.Program(command, scratch, readable_paths, environment))
    except runner.SandboxUnavailable as error:
        raise UnusablePresentation(f"was not converted because LibreOffice cannot run in a sandbox: {error}") from error
    if not await asyncio.to_thread(pdf.is_file):
        raise UnusablePresentation("could not be read by LibreOffice")
    return ConvertedPresentation(pdf, text_source)


def _find_library_directory(path: str) -> Path | None:
    """Return the directory of LibreOffice's library: next to the program, unless that is a script of a distribution."""
    directories = [Path(path).resolve().parent]
    if Path(path).name in ("soffice", "libreoffice"):
        directories += [Path("/usr/lib64/libreoffice/program"), Path("/usr/lib/libreoffice/program")]
    for directory in directories:
        if any((directory / name).exists() for name in libreoffice_helper.LIBRARIES):
            return directory
    return None


def _prepare(profile: Path, source: Path, copy: Path) -> None:
    (profile / "user").mkdir(parents=True)
    shutil.copyfile(_PROFILE_FILE, profile / "user" / "registrymodifications.xcu")
    sanitize_presentation(source, copy)

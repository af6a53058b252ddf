"""Create presentations as flat OpenDocument files, and skip tests where they cannot be converted."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from jobledger.workers.sandbox import runner

needs_sandbox = pytest.mark.skipif(not runner.is_available(), reason="install a sandbox: apt-get install bubblewrap")
needs_libreoffice = pytest.mark.skipif(
    shutil.which("soffice") is None or not runner.is_available(),
    reason="install LibreOffice and a sandbox: apt-get install libreoffice-impress bubblewrap",
)

FLAT_DOCUMENT = """<?xml version="1.0" encoding="UTF-8"?>
<office:document xmlns:office="urn:oasis:names:tc:opendocument:xmlns:office:1.0"
 xmlns:draw="urn:oasis:names:tc:opendocument:xmlns:drawing:1.0"
 xmlns:text="urn:oasis:names:tc:opendocument:xmlns:text:1.0"
 xmlns:svg="urn:oasis:names:tc:opendocument:xmlns:svg-compatible:1.0" xmlns:xlink="http://www.w3.org/1999/xlink"
 office:version="1.2" office:mimetype="application/vnd.oasis.opendocument.presentation">
<office:body><office:presentation>{pages}</office:presentation></office:body></office:document>"""
FLAT_PAGE = """<draw:page draw:name="page{number}">
<draw:frame svg:width="20cm" svg:height="3cm" svg:x="2cm" svg:y="2cm">
<draw:text-box><text:p>{text}</text:p></draw:text-box></draw:frame>{elements}</draw:page>"""
_LINKED_IMAGE = """<draw:frame svg:width="5cm" svg:height="5cm" svg:x="2cm" svg:y="8cm">
<draw:image xlink:href="{url}" xlink:type="simple" xlink:show="embed" xlink:actuate="onLoad"/></draw:frame>"""


def make_flat_presentation(*texts: str, image_url: str | None = None) -> bytes:
    """Return a presentation with a page for each text. With `image_url`, each page links to that image."""
    elements = _LINKED_IMAGE.format(url=image_url) if image_url else ""
    pages = (FLAT_PAGE.format(number=number, text=text, elements=elements) for number, text in enumerate(texts, 1))
    return FLAT_DOCUMENT.format(pages="".join(pages)).encode()


_DOCUMENT_WITH_STYLES = FLAT_DOCUMENT.replace(
    "<office:body>",
    '<office:automatic-styles><style:style style:name="hidden" style:family="drawing-page">'
    '<style:drawing-page-properties presentation:visibility="hidden"/></style:style></office:automatic-styles>'
    "<office:body>",
).replace(
    " office:version",
    ' xmlns:style="urn:oasis:names:tc:opendocument:xmlns:style:1.0"'
    ' xmlns:presentation="urn:oasis:names:tc:opendocument:xmlns:presentation:1.0" office:version',
)
_NOTES = """<presentation:notes><draw:frame presentation:class="notes" svg:width="9cm" svg:height="9cm">
<draw:text-box><text:p>{}</text:p></draw:text-box></draw:frame></presentation:notes>"""


def make_flat_presentation_with_notes() -> bytes:
    """Return a presentation with notes on each of its three pages, of which the second is hidden."""
    pages = [
        FLAT_PAGE.format(number=number, text=text, elements=_NOTES.format(note))
        for number, (text, note) in enumerate(
            [("First", "Note one"), ("Hidden", "Note two"), ("Third", "Note three")], 1
        )
    ]
    pages[1] = pages[1].replace('draw:name="page2"', 'draw:name="page2" draw:style-name="hidden"')
    return _DOCUMENT_WITH_STYLES.format(pages="".join(pages)).encode()


def convert_with_libreoffice(suffix: str, content: bytes, folder: Path) -> bytes:
    """Return the presentation in another file format."""
    source = folder / "deck.fodp"
    source.write_bytes(content)
    home = folder / "home"
    subprocess.run(
        [
            "soffice",
            "--headless",
            f"-env:UserInstallation={home.as_uri()}",
            "--convert-to",
            suffix,
            "--outdir",
            str(folder),
            str(source),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    return (folder / f"deck.{suffix}").read_bytes()


def find_processes(path: Path) -> list[int]:
    """Return the IDs of the running processes that have the path in their command line."""
    pids = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # the process has ended
            if str(path).encode() in file.read_bytes():
                pids.append(int(file.parent.name))
    return pids

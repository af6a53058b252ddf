"""Create presentations as flat OpenDocument files, and skip tests where they cannot be converted."""

from __future__ import annotations

import shutil

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

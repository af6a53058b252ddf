"""Create slide decks: overlays, animations, notes, scans, and pages that PDFium cannot render."""

from __future__ import annotations

import io
from collections.abc import Sequence

from fpdf import FPDF
from PIL import Image, ImageDraw, ImageFont

_PAGE = "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 320 180] /Contents {contents} 0 R /Resources {resources} >>"


def make_deck(*, width: float = 160) -> FPDF:
    """Return an empty deck."""
    deck = FPDF(unit="mm", format=(90, width), orientation="landscape")
    deck.set_auto_page_break(auto=False)
    deck.set_font("Helvetica", size=14)
    return deck


def finish(deck: FPDF) -> bytes:
    return bytes(deck.output())


def make_text_deck(*pages: Sequence[str], footer: str = "") -> bytes:
    """Return a deck with lines of text on each page. `{page}` in the footer is the number of the page."""
    deck = make_deck()
    for number, lines in enumerate(pages, 1):
        deck.add_page()
        for index, line in enumerate(lines):
            deck.text(15, 15 + 12 * index, line)
        deck.text(5, 87, footer.format(page=number))
    return finish(deck)


def make_beamer_deck(*, has_labels: bool) -> bytes:
    """Return four frames on eight pages: 1; 2 to 4; 5 and 6; 7 and 8.

    The overlays of the second frame add lines, and one of the third frame darkens a line. That of the fourth frame
    replaces a picture, so that both pages must be kept.
    """
    deck = make_deck()

    def add_page(frame: int, title: str) -> None:
        if has_labels:
            deck.add_page(label_style="D", label_start=frame)
        else:
            deck.add_page()
        deck.text(10, 15, title)
        deck.text(145, 87, f"{frame}/4")

    add_page(1, "Ledgers")
    for shown in (1, 2, 3):
        add_page(2, "Why a ledger")
        for index, line in enumerate(["State is lost", "History helps", "Audits are easy"][:shown]):
            deck.text(15, 35 + 12 * index, line)
    for shown in (1, 2):
        add_page(3, "Covered text")
        for index, line in enumerate(["First point", "Second point"]):
            deck.set_text_color(0 if index < shown else 210)
            deck.text(15, 35 + 12 * index, line)
        deck.set_text_color(0)
    for picture in (Image.effect_mandelbrot((300, 200), (-2, -1.5, 1, 1.5), 50), Image.effect_noise((300, 200), 60)):
        add_page(4, "Two pictures")
        deck.image(picture, x=40, y=25, w=70)
    return finish(deck)


def make_picture_deck(*pictures: Image.Image) -> bytes:
    """Return a deck of pages that are pictures without text."""
    deck = make_deck()
    for picture in pictures:
        deck.add_page()
        deck.image(picture, x=0, y=0, w=160)
    return finish(deck)


def make_circles(count: int) -> Image.Image:
    """Return a step of an animation that adds circles."""
    picture = Image.new("RGB", (1600, 900), "#204060")
    for index in range(count):
        ImageDraw.Draw(picture).ellipse((200 + 350 * index, 300, 450 + 350 * index, 550), fill="white")
    return picture


def make_text_picture(text: str) -> Image.Image:
    """Return a picture of text, as from a scanner."""
    picture = Image.new("RGB", (1600, 900), "white")
    ImageDraw.Draw(picture).text((100, 200), text, font=ImageFont.load_default(80), fill="black")
    return picture


def make_deck_with_annotations(*notes: str) -> bytes:
    """Return a deck with the pages of one animation. Each has a note as an annotation."""
    deck = make_deck()
    for number, note in enumerate(notes, 1):
        deck.add_page()
        for line in range(number):
            deck.text(10, 20 + 10 * line, f"Line {line + 1}")
        deck.text_annotation(150, 80, note)
    return finish(deck)


def make_deck_with_notes_beside(*notes: str) -> bytes:
    """Return a deck in the form of Beamer's `show notes on second screen`: a small slide and notes on the right."""
    deck = make_deck(width=320)
    deck.set_creator("LaTeX with Beamer class")
    for number, note in enumerate(notes, 1):
        deck.add_page()
        deck.set_fill_color(250, 240, 200)
        deck.rect(0, 0, 160, 90, style="F")
        deck.text(10, 20, f"Topic {number}")
        deck.text(280, 10, f"Topic {number}")
        deck.text(170, 40, note)
    return finish(deck)


def encode_picture(picture: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def make_deck_with_endless_page(levels: int = 12) -> bytes:
    """Return three pages. The second draws 10 ** `levels` rectangles with nested forms."""
    font = "<< /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >>"
    draw_ten = "/F Do " * 10
    first_form = 9
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R 4 0 R 5 0 R] /Count 3 >>",
        _PAGE.format(contents=6, resources=font),
        _PAGE.format(contents=7, resources=f"<< /XObject << /F {first_form} 0 R >> >>"),
        _PAGE.format(contents=8, resources=font),
        _make_stream("", "BT /F1 20 Tf 20 100 Td (Before) Tj ET"),
        _make_stream("", draw_ten),
        _make_stream("", "BT /F1 20 Tf 20 100 Td (After) Tj ET"),
    ]
    for level in range(levels):
        is_last = level == levels - 1
        resources = "" if is_last else f"/Resources << /XObject << /F {first_form + 1 + level} 0 R >> >>"
        form = f"/Type /XObject /Subtype /Form /BBox [0 0 200 200] {resources}"
        objects.append(_make_stream(form, "0 0 50 50 re f" if is_last else draw_ten))
    return make_raw_pdf(objects)


def make_pdf_without_pages() -> bytes:
    return make_raw_pdf(["<< /Type /Catalog /Pages 2 0 R >>", "<< /Type /Pages /Kids [] /Count 0 >>"])


def _make_stream(attributes: str, content: str) -> str:
    return f"<< {attributes} /Length {len(content)} >>\nstream\n{content}\nendstream"


def make_raw_pdf(objects: Sequence[str]) -> bytes:
    """Return a PDF of the given objects. The first is the catalog."""
    body, offsets = "%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(body))
        body += f"{number} 0 obj\n{content}\nendobj\n"
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    trailer = f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(body)}\n%%EOF"
    return f"{body}xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}{trailer}".encode()

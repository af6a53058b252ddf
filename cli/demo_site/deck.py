"""cli: a talk's slides as a PDF with real text and drawn figures. Same talk, same bytes."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import assert_never

from fpdf import FPDF

from jobledger.cli.demo_site.talks import CONFERENCE, VENUE, Chart, Code, Figure, Flow, Slide, Talk

WIDTH, HEIGHT, MARGIN = 254.0, 142.875, 18.0  # mm: 16:9, as projectors like it
INK, PAPER, MUTED = (32, 36, 42), (253, 252, 249), (120, 126, 134)


class Deck(FPDF):
    """Landscape pages in the colour of their talk."""

    def __init__(self, talk: Talk) -> None:
        super().__init__(orientation="landscape", unit="mm", format=(HEIGHT, WIDTH))
        self.talk = talk
        self.core_fonts_encoding = "cp1252"  # Latin-1, the default, has no typographic quotes
        self.set_auto_page_break(False)
        self.set_title(talk.title)
        self.set_author(", ".join(speaker.name for speaker in talk.speakers))
        self.set_lang(talk.language)
        self.set_creation_date(datetime(2026, 10, 1, tzinfo=UTC))

    def write_at(self, x: float, y: float, text: str, *, size: float, bold: bool = False, width: float = 0) -> None:
        """Write `text` from (x, y) in mm downwards, wrapped to `width`; `size` in points. Leaves `y` below the text."""
        self.set_font("Helvetica", "B" if bold else "", size)
        self.set_xy(x, y)
        self.multi_cell(width or WIDTH - x - MARGIN, size * 0.48, text, align="L", new_x="LMARGIN", new_y="NEXT")

    def fill_background(self, colour: tuple[int, int, int]) -> None:
        self.set_fill_color(*colour)
        self.rect(0, 0, WIDTH, HEIGHT, style="F")


def write_deck(talk: Talk, path: Path) -> None:
    """Write the slides of `talk` as a PDF of `talk.pages` pages."""
    deck = Deck(talk)
    _cover(deck, talk)
    for slide in talk.slides:
        _page(deck, slide)
    deck.output(str(path))


def _cover(deck: Deck, talk: Talk) -> None:
    deck.add_page()
    deck.fill_background(talk.colour)
    deck.set_fill_color(255, 255, 255)
    with deck.local_context(fill_opacity=0.08):
        for step in range(7):  # columns of a ledger, behind the title
            deck.rect(WIDTH - 22 * (step + 1), 0, 18, HEIGHT - 14 * step, style="F")
    deck.set_text_color(255, 255, 255)
    deck.write_at(MARGIN, 34, talk.title, size=30, bold=True, width=190)
    deck.write_at(MARGIN, deck.get_y() + 5, talk.subtitle, size=16, width=190)
    names = " · ".join(speaker.name for speaker in talk.speakers)
    deck.write_at(MARGIN, 114, names, size=14, bold=True)
    deck.write_at(MARGIN, 122, f"{CONFERENCE}, {VENUE}", size=11)


def _page(deck: Deck, slide: Slide) -> None:
    deck.add_page()
    deck.fill_background(PAPER)
    deck.set_fill_color(*deck.talk.colour)
    deck.rect(0, 0, 5, HEIGHT, style="F")
    deck.set_text_color(*deck.talk.colour)
    deck.write_at(MARGIN, 15, slide.title, size=26, bold=True)
    deck.set_text_color(*INK)
    deck.set_y(deck.get_y() + 7)
    for point in slide.points:
        _point(deck, point, size=15 if slide.figure else 22)
    if slide.figure is not None:
        _figure(deck, slide.figure, top=deck.get_y() + 6)
    deck.set_text_color(*MUTED)
    deck.write_at(MARGIN, HEIGHT - 11, CONFERENCE, size=9)
    deck.write_at(WIDTH - MARGIN - 12, HEIGHT - 11, f"{deck.page_no()} / {deck.talk.page_count}", size=9, width=30)


def _point(deck: Deck, point: str, *, size: float) -> None:
    y = deck.get_y()
    deck.set_fill_color(*deck.talk.colour)
    deck.rect(MARGIN, y + size * 0.15, 2.4, 2.4, style="F")
    deck.write_at(MARGIN + 8, y, point, size=size)
    deck.set_y(deck.get_y() + size * 0.28)


def _figure(deck: Deck, figure: Figure, *, top: float) -> None:
    match figure:
        case Chart():
            _chart(deck, figure, top)
        case Flow():
            _flow(deck, figure, top)
        case Code():
            _code(deck, figure, top)
        case _:
            assert_never(figure)


def _chart(deck: Deck, chart: Chart, top: float) -> None:
    left, room = MARGIN + 76, WIDTH - 2 * MARGIN - 76 - 24
    pitch = min(18.0, (HEIGHT - 18 - top) / len(chart.bars))
    largest = max(value for _, value in chart.bars)
    for row, (label, value) in enumerate(chart.bars):
        y, length = top + row * pitch, room * value / largest
        deck.write_at(MARGIN, y + 1.5, label, size=13, width=74)
        deck.set_fill_color(*deck.talk.colour)
        deck.rect(left, y, length, pitch * 0.62, style="F")
        deck.write_at(left + length + 2, y + 1.5, f"{value:g}{chart.unit}", size=13, bold=True, width=30)
    deck.set_draw_color(*MUTED)
    deck.line(left, top - 3, left, top + len(chart.bars) * pitch)


def _flow(deck: Deck, flow: Flow, top: float) -> None:
    gap, height = 11.0, 26.0
    width = (WIDTH - 2 * MARGIN - gap * (len(flow.boxes) - 1)) / len(flow.boxes)
    y = top + 10
    deck.set_draw_color(*deck.talk.colour)
    deck.set_line_width(0.8)
    for number, box in enumerate(flow.boxes):
        x = MARGIN + number * (width + gap)
        deck.rect(x, y, width, height, style="D", round_corners=True, corner_radius=3)
        deck.set_font("Helvetica", "B", 14)
        deck.set_xy(x, y)
        deck.cell(width, height, box, align="C")
        if number:
            _arrow(deck, x - gap + 1.5, x - 1.5, y + height / 2)
    deck.set_text_color(*MUTED)
    deck.write_at(MARGIN, y + height + 8, flow.caption, size=13)


def _arrow(deck: Deck, start: float, end: float, y: float) -> None:
    deck.line(start, y, end, y)
    deck.line(end - 2.5, y - 2, end, y)
    deck.line(end - 2.5, y + 2, end, y)


def _code(deck: Deck, code: Code, top: float) -> None:
    lines = code.text.splitlines()
    deck.set_fill_color(238, 240, 243)
    deck.rect(MARGIN, top, WIDTH - 2 * MARGIN, len(lines) * 7.2 + 10, style="F", round_corners=True, corner_radius=2)
    deck.set_font("Courier", "", 15)
    for row, line in enumerate(lines):
        deck.set_xy(MARGIN + 6, top + 5 + row * 7.2)
        deck.cell(0, 7.2, line)

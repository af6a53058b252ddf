"""Render the slides of a talk as a PDF with text and drawn figures. Output is reproducible."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from fpdf import FPDF

from jobledger.cli.demo_site.conference import Chart, Code, Flow, Slide, Talk, load_conference

WIDTH, HEIGHT, MARGIN = 254.0, 142.875, 18.0  # mm, 16:9
TEXT, BACKGROUND, MUTED = (32, 36, 42), (253, 252, 249), (120, 126, 134)


class SlidesPdf(FPDF):
    """Landscape pages in the color of the talk."""

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
        """Write wrapped text and leave the cursor below it.

        Args:
            x: Left edge in mm.
            y: Top edge in mm.
            text: The text.
            size: Font size in points.
            bold: Whether to use the bold font.
            width: Line width in mm. 0 means up to the right margin.
        """
        self.set_font("Helvetica", "B" if bold else "", size)
        self.set_xy(x, y)
        self.multi_cell(width or WIDTH - x - MARGIN, size * 0.48, text, align="L", new_x="LMARGIN", new_y="NEXT")

    def fill_background(self, color: tuple[int, int, int]) -> None:
        self.set_fill_color(*color)
        self.rect(0, 0, WIDTH, HEIGHT, style="F")


def write_slides(talk: Talk, path: Path) -> None:
    """Write the slides of `talk` as a PDF with `talk.page_count` pages."""
    pdf = SlidesPdf(talk)
    _draw_cover(pdf, talk)
    for slide in talk.slides:
        _draw_page(pdf, slide)
    pdf.output(str(path))


def _draw_cover(pdf: SlidesPdf, talk: Talk) -> None:
    conference = load_conference()
    pdf.add_page()
    pdf.fill_background(talk.color)
    pdf.set_fill_color(255, 255, 255)
    with pdf.local_context(fill_opacity=0.08):
        for step in range(7):  # columns behind the title
            pdf.rect(WIDTH - 22 * (step + 1), 0, 18, HEIGHT - 14 * step, style="F")
    pdf.set_text_color(255, 255, 255)
    pdf.write_at(MARGIN, 34, talk.title, size=30, bold=True, width=190)
    pdf.write_at(MARGIN, pdf.get_y() + 5, talk.subtitle, size=16, width=190)
    names = " · ".join(speaker.name for speaker in talk.speakers)
    pdf.write_at(MARGIN, 114, names, size=14, bold=True)
    pdf.write_at(MARGIN, 122, f"{conference.name}, {conference.venue}", size=11)


def _draw_page(pdf: SlidesPdf, slide: Slide) -> None:
    pdf.add_page()
    pdf.fill_background(BACKGROUND)
    pdf.set_fill_color(*pdf.talk.color)
    pdf.rect(0, 0, 5, HEIGHT, style="F")
    pdf.set_text_color(*pdf.talk.color)
    pdf.write_at(MARGIN, 15, slide.title, size=26, bold=True)
    pdf.set_text_color(*TEXT)
    pdf.set_y(pdf.get_y() + 7)
    for point in slide.points:
        _draw_point(pdf, point, size=15 if slide.figure else 22)
    top = pdf.get_y() + 6
    match slide.figure:
        case Chart():
            _draw_chart(pdf, slide.figure, top)
        case Flow():
            _draw_flow(pdf, slide.figure, top)
        case Code():
            _draw_code(pdf, slide.figure, top)
    pdf.set_text_color(*MUTED)
    pdf.write_at(MARGIN, HEIGHT - 11, load_conference().name, size=9)
    pdf.write_at(WIDTH - MARGIN - 12, HEIGHT - 11, f"{pdf.page_no()} / {pdf.talk.page_count}", size=9, width=30)


def _draw_point(pdf: SlidesPdf, point: str, *, size: float) -> None:
    y = pdf.get_y()
    pdf.set_fill_color(*pdf.talk.color)
    pdf.rect(MARGIN, y + size * 0.15, 2.4, 2.4, style="F")
    pdf.write_at(MARGIN + 8, y, point, size=size)
    pdf.set_y(pdf.get_y() + size * 0.28)


def _draw_chart(pdf: SlidesPdf, chart: Chart, top: float) -> None:
    left, max_length = MARGIN + 76, WIDTH - 2 * MARGIN - 76 - 24
    pitch = min(18.0, (HEIGHT - 18 - top) / len(chart.bars))
    largest = max(value for _, value in chart.bars)
    for row, (label, value) in enumerate(chart.bars):
        y, length = top + row * pitch, max_length * value / largest
        pdf.write_at(MARGIN, y + 1.5, label, size=13, width=74)
        pdf.set_fill_color(*pdf.talk.color)
        pdf.rect(left, y, length, pitch * 0.62, style="F")
        pdf.write_at(left + length + 2, y + 1.5, f"{value:g}{chart.unit}", size=13, bold=True, width=30)
    pdf.set_draw_color(*MUTED)
    pdf.line(left, top - 3, left, top + len(chart.bars) * pitch)


def _draw_flow(pdf: SlidesPdf, flow: Flow, top: float) -> None:
    gap, height = 11.0, 26.0
    width = (WIDTH - 2 * MARGIN - gap * (len(flow.boxes) - 1)) / len(flow.boxes)
    y = top + 10
    pdf.set_draw_color(*pdf.talk.color)
    pdf.set_line_width(0.8)
    for number, box in enumerate(flow.boxes):
        x = MARGIN + number * (width + gap)
        pdf.rect(x, y, width, height, style="D", round_corners=True, corner_radius=3)
        pdf.set_font("Helvetica", "B", 14)
        pdf.set_xy(x, y)
        pdf.cell(width, height, box, align="C")
        if number:
            _draw_arrow(pdf, x - gap + 1.5, x - 1.5, y + height / 2)
    pdf.set_text_color(*MUTED)
    pdf.write_at(MARGIN, y + height + 8, flow.caption, size=13)


def _draw_arrow(pdf: SlidesPdf, start: float, end: float, y: float) -> None:
    pdf.line(start, y, end, y)
    pdf.line(end - 2.5, y - 2, end, y)
    pdf.line(end - 2.5, y + 2, end, y)


def _draw_code(pdf: SlidesPdf, code: Code, top: float) -> None:
    lines = code.text.splitlines()
    pdf.set_fill_color(238, 240, 243)
    pdf.rect(MARGIN, top, WIDTH - 2 * MARGIN, len(lines) * 7.2 + 10, style="F", round_corners=True, corner_radius=2)
    pdf.set_font("Courier", "", 15)
    for row, line in enumerate(lines):
        pdf.set_xy(MARGIN + 6, top + 5 + row * 7.2)
        pdf.cell(0, 7.2, line)

"""Prepare the tables of a page for Markdown, whose tables have neither spans nor blocks in cells. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from jobledger.workers.processors.session import code_blocks
from jobledger.workers.processors.session.page_blocks import HEADINGS

_MAX_COLUMNS: Final = 50
_MAX_CELLS: Final = 20_000
_LAYOUT_PARTS: Final = HEADINGS | {"table", "blockquote", "hr"}


def clean_table(table: Any) -> None:
    """Give all rows the same length, with empty cells after spanning ones.

    A table for layout becomes text, and one with a row for each line of code becomes code.
    """
    rows = [row for row in table.iter("tr") if next(row.iterancestors("table")) is table]
    cells = [[cell for cell in row if cell.tag in ("td", "th")] for row in rows]
    numbered = [cell for row in cells for cell in row if code_blocks.has_line_numbers(cell)]
    for cell in numbered:
        cell.drop_tree()
    cells = [[cell for cell in row if cell.getparent() is not None] for row in cells]
    columns = max((len(row) for row in cells), default=0)
    if numbered and columns == 1 and not any(True for _ in table.iter("pre")):
        _make_listing(table, [cell for row in cells for cell in row])
        return
    is_layout = table.get("role") in ("presentation", "none") or any(
        _is_layout_part(part) for row in cells for cell in row for part in cell.iterdescendants()
    )
    is_one_row = len(rows) == 1 and all(cell.tag == "td" for cell in cells[0])
    if is_layout or is_one_row or columns < 2 or len(rows) * columns > _MAX_CELLS:
        parts = list(table.iter("caption", "thead", "tbody", "tfoot", "tr", "td", "th"))
        for element in [table, *(part for part in parts if next(part.iterancestors("table"), None) is table)]:
            element.tag = "div"
        return
    widest, cell_count = 0, 0
    spanned: dict[int, int] = {}
    for row, row_cells in zip(rows, cells, strict=True):
        column = 0
        for cell in row_cells:
            while spanned.get(column, 0) > 0:
                spanned[column] -= 1
                cell.addprevious(cell.makeelement("td"))
                column += 1
            width, height = _pop_span(cell, "colspan"), _pop_span(cell, "rowspan")
            if cell_count + width * height > _MAX_CELLS:
                width = height = 1
            cell_count += width * height
            for offset in range(width):
                spanned[column + offset] = height - 1
            for _ in range(width - 1):
                row.insert(row.index(cell) + 1, cell.makeelement("td"))
            column += width
        widest = max(widest, column)
    if len(rows) * widest > _MAX_CELLS:
        return
    for row in rows:
        for _ in range(min(widest, _MAX_COLUMNS) - sum(cell.tag in ("td", "th") for cell in row)):
            row.append(row.makeelement("td"))


def _is_layout_part(element: Any) -> bool:
    if element.tag == "pre":
        return len(code_blocks.extract_code(element).split("\n")) > 1
    return element.tag in _LAYOUT_PARTS


def _make_listing(table: Any, cells: Sequence[Any]) -> None:
    """Make a table with code beside its line numbers a block of code. Each cell contains one line or all of them."""
    lines = [table.makeelement("div") for _ in cells]
    for line, cell in zip(lines, cells, strict=True):
        line.text = cell.text
        line.extend(list(cell))
    for child in list(table):
        table.remove(child)
    table.tag, table.text = "pre", None
    table.extend(lines)


def _pop_span(cell: Any, attribute: str) -> int:
    value = cell.attrib.pop(attribute, "1").strip()
    return max(1, min(_MAX_COLUMNS, int(value))) if re.fullmatch(r"[0-9]{1,4}", value) else 1

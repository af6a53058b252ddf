"""Compare texts by their words. The order of the words does not count."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass


def count_tokens(text: str) -> Counter[str]:
    """Return the words of a text. Each Chinese, Japanese or Korean character is a word."""
    return Counter(
        re.findall(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+", text.replace("\xad", "").casefold())
    )


@dataclass(frozen=True, slots=True)
class Score:
    """How much of the content was extracted, and how much else, in words."""

    found: int
    missing: int
    extra: int

    @property
    def precision(self) -> float:
        return self.found / (self.found + self.extra) if self.found + self.extra else 0.0

    @property
    def recall(self) -> float:
        return self.found / (self.found + self.missing) if self.found + self.missing else 1.0

    @property
    def f1(self) -> float:
        return 2 * self.found / total if (total := 2 * self.found + self.missing + self.extra) else 1.0


def score_text(text: str, content: Counter[str], optional: Counter[str]) -> Score:
    """Compare an extracted text with the content of the page. Words of optional regions are neither right nor wrong."""
    tokens = count_tokens(text)
    found = (tokens & content).total()
    return Score(found, content.total() - found, (tokens - content - optional).total())

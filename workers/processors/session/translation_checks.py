"""Check that a text is the translation of another one. Pure.

A model may refuse, answer the text, leave it in its language, cut it, or change links and code. Each check names what
is wrong, so that the model can correct it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from markdown_it.token import Token

from jobledger.workers.processors.session.language import detect_language
from jobledger.workers.processors.session.model_output import InvalidModelOutput
from jobledger.workers.processors.session.safe_markdown import COMMONMARK

_MAX_LISTED: Final = 20
_MIN_LANGUAGE_LETTERS: Final = 40
"""The language of a shorter text is not checked."""
_MIN_UNCHANGED_WORDS: Final = 6
"""Fewer words may be the same in two languages."""
_CODE_SIGN: Final = re.compile(r"[{};=<>]|\w\(|\)\.|::|->|&\[")
_MIN_CODE_SIGNS: Final = 5
"""A line with so many signs of code, such as the text of a slide, may stay as it is."""
_LENGTH_FACTORS: Final = (0.4, 2.5)
_PASSAGE_LENGTH_FACTORS: Final = (0.3, 4.0)
_LENGTH_SLACK: Final = 60
_WIDE_LETTER: Final = 3
"""A Chinese, Japanese or Korean character counts as this many letters."""
_MIN_COUNT_FACTOR: Final = 0.75
_MAX_COUNT_FACTOR: Final = 1.34
_MIN_INVARIANTS: Final = 4
_MIN_KEPT_INVARIANTS: Final = 0.4

_URL: Final = re.compile(r"https?://[^\s<>\"'`\])}]+")
_MATH: Final = re.compile(
    r"\$\$(?P<block>[^$]{1,5000})\$\$|(?<![\\$\w])\$(?=\S)(?P<inline>[^$\n]{1,1000}?)(?<=\S)\$(?![\d$])"
)
_FENCE: Final = re.compile(r"^ {0,3}(`{3,}|~{3,})[^\n]*\n.*?(?:^ {0,3}\1[`~]*[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_LINK_TARGET: Final = re.compile(r"(?<=\])\([^()\s]*\)")
_CODE_SPAN: Final = re.compile(r"(`+)(?!`).{1,2000}?(?<!`)\1(?!`)", re.DOTALL)
_WIDE: Final = re.compile(r"[\u1100-\u11ff\u2e80-\u9fff\uac00-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff]")
_LETTER: Final = re.compile(r"[^\W\d_]")
_WORD: Final = re.compile(r"[^\W\d_]{2,}")
_INVARIANT: Final = re.compile(r"\b(?:\d{2,}|[^\W\d_]*[a-z][A-Z]\w*|[A-Z]{3,})\b")
"""Numbers, names such as MongoDB, and abbreviations. Most of them are the same in a translation."""
_REFUSAL: Final = re.compile(
    r"\W*(?:"
    r"i[’']?m (?:very |so |really )?sorry|i am (?:very )?sorry|sorry,|(?:my )?apologies|i apologi[sz]e|"
    r"(?:unfortunately,? )?i (?:can[’']?t|cannot|can not|won[’']?t|am unable|am not able|must decline)|"
    r"as an? (?:ai|large language|language)\b|"
    r"(?:sure|certainly|of course|absolutely)[,!.:]|here(?:[’']s| is| are) (?:the|your|a|my)\b|"
    r"(?:es )?tut mir (?:sehr )?leid|entschuldigung|leider (?:kann|darf|bin) ich|ich kann (?:\w+ ){0,4}nicht|"
    r"als (?:ki|sprachmodell)\b|(?:je suis )?désolée?|je (?:ne peux|suis incapable)|lo siento|no puedo|"
    r"mi dispiace|non posso|(?:me )?desculpe|não posso|het spijt me|ik kan (?:\w+ ){0,4}niet|"
    r"przepraszam|nie mogę|抱歉|对不起|很抱歉|申し訳|죄송"
    r")",
    re.IGNORECASE,
)
_ANSWER_HINT: Final = "it must be a translation of the whole text, without remarks"

_SIMILAR_LANGUAGES: Final = (
    frozenset({"no", "nb", "nn", "da"}),
    frozenset({"hr", "sr", "bs", "sh"}),
    frozenset({"cs", "sk"}),
    frozenset({"id", "ms"}),
    frozenset({"pt", "gl"}),
    frozenset({"bg", "mk"}),
    frozenset({"af", "nl"}),
    frozenset({"be", "uk"}),
    frozenset({"zh", "yue"}),
    frozenset({"fil", "tl"}),
)
"""Languages that cannot be distinguished reliably in a short text."""


@dataclass(slots=True)
class _Structure:
    """What a translation must keep. `words` is the text without code, links and formulas."""

    headings: list[str] = field(default_factory=list)
    list_starts: list[int] = field(default_factory=list)
    links: Counter[str] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)
    code: Counter[str] = field(default_factory=Counter)
    math: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    words: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(self.words)


def extract_words(markdown: str) -> str:
    """Return the text that a reader sees, without code, URLs and formulas: a line per block."""
    return _read_structure(markdown).text


def has_words(markdown: str) -> bool:
    """Return whether there is anything to translate outside of code, URLs and formulas. Does not parse the text."""
    for pattern in (_FENCE, _CODE_SPAN, _LINK_TARGET, _MATH, _URL):
        markdown = pattern.sub(" ", markdown)
    return _WORD.search(markdown) is not None


def is_same_language(first: str, second: str) -> bool:
    """Return whether two primary subtags are the same language, or two that a short text cannot distinguish."""
    return first == second or any({first, second} <= group for group in _SIMILAR_LANGUAGES)


def count_letters(text: str) -> int:
    """Return the number of letters. A Chinese, Japanese or Korean character counts more, because it says more."""
    return len(_LETTER.findall(text)) + (_WIDE_LETTER - 1) * len(_WIDE.findall(text))


def check_markdown(original: str, translation: str, *, target: str | None, names: Sequence[str] = ()) -> None:
    """Check a translation of Markdown.

    Args:
        original: The Markdown that was translated.
        translation: Its translation.
        target: The primary subtag of the language of the translation. None: the language is not checked.
        names: Names that are the same in both languages.

    Raises:
        InvalidModelOutput: It is not a translation, or its structure differs.
    """
    if not translation.strip():
        raise InvalidModelOutput("the translation is empty")
    check_refusal(original, translation)
    before, after = _read_structure(original), _read_structure(translation)
    _check_equal("links", before.links, after.links)
    _check_equal("images", before.images, after.images)
    if before.code != after.code:
        raise InvalidModelOutput("the code differs from the original", _describe_change(before.code, after.code))
    if before.math != after.math:
        raise InvalidModelOutput("the formulas differ from the original", _describe_change(before.math, after.math))
    if before.headings != after.headings:
        expected, got = (_format_headings(headings) for headings in (before.headings, after.headings))
        raise InvalidModelOutput(f"the headings must have the levels {expected}, got {got}")
    if before.list_starts != after.list_starts:
        starts = ", ".join(map(str, before.list_starts[:_MAX_LISTED])) or "none"
        raise InvalidModelOutput(f"the numbered lists must start with the numbers of the original: {starts}")
    for kind in ("list items", "table cells", "paragraphs"):
        _check_count(kind, before.counts[kind], after.counts[kind])
    if len(before.words) == len(after.words):
        for passage, translated in zip(before.words, after.words, strict=True):
            _check_passage(passage, translated)
    check_words(before.text, after.text, target=target, names=names)


def _check_passage(passage: str, translated: str) -> None:
    expected, length = count_letters(passage), count_letters(translated)
    shortest, longest = _PASSAGE_LENGTH_FACTORS
    if not shortest * expected - _LENGTH_SLACK / 4 <= length <= longest * expected + _LENGTH_SLACK:
        problem = "short" if length < expected else "long"
        raise InvalidModelOutput(f'the translation of the passage "{_shorten(passage)}" is too {problem}')


def check_refusal(original: str, translation: str) -> None:
    """Reject a text that speaks to the reader as a model does, such as "I'm sorry, I cannot …".

    Raises:
        InvalidModelOutput: The translation starts like a refusal or an answer, and the original does not.
    """
    start = re.sub(r"^[\s#>*_\-]+", "", translation[:300])
    if _REFUSAL.match(start) and not _REFUSAL.match(re.sub(r"^[\s#>*_\-]+", "", original[:300])):
        raise InvalidModelOutput(
            "the answer is a refusal or remark", f'it starts with "{_shorten(start)}"; {_ANSWER_HINT}'
        )


def check_words(original: str, translation: str, *, target: str | None, names: Sequence[str] = ()) -> None:
    """Check length, language, numbers and names of a translation without markup.

    Raises:
        InvalidModelOutput: It is not a translation.
    """
    _check_length(original, translation)
    if target is None:
        return
    original_words, words = _remove_names(original, names), _remove_names(translation, names)
    _check_unchanged(original_words, words, target)
    check_language(words, target)
    _check_invariants(original, translation)


def check_language(text: str, target: str) -> None:
    """Check the language of a text.

    Raises:
        InvalidModelOutput: The text is written in another language than `target`.
    """
    if count_letters(text) < _MIN_LANGUAGE_LETTERS:
        return
    detected = detect_language(text)
    if detected is None or is_same_language(detected, target):
        return
    raise InvalidModelOutput(f'the language must be "{target}", but it is "{detected}"')


def _check_length(original: str, translation: str) -> None:
    expected, length = count_letters(original), count_letters(translation)
    shortest, longest = _LENGTH_FACTORS
    if length < shortest * expected - _LENGTH_SLACK / 2:
        raise InvalidModelOutput(f"the translation is too short ({length} letters for {expected})", _ANSWER_HINT)
    if length > longest * expected + _LENGTH_SLACK:
        raise InvalidModelOutput(f"the translation is too long ({length} letters for {expected})", _ANSWER_HINT)


def _check_unchanged(original: str, translation: str, target: str) -> None:
    """Reject passages that are the same in both texts, unless they are short or already in the target language."""
    lines = {_normalize(line) for line in original.splitlines()}
    for line in translation.splitlines():
        ordinary = sum(word.islower() for word in _WORD.findall(line))  # capitalized words may be names
        if (
            (ordinary >= _MIN_UNCHANGED_WORDS or len(_WIDE.findall(line)) >= 2 * _MIN_UNCHANGED_WORDS)
            and _normalize(line) in lines
            and len(_CODE_SIGN.findall(line)) < _MIN_CODE_SIGNS
            and detect_language(line) != target
        ):
            raise InvalidModelOutput(f'a passage is not translated: "{_shorten(line)}"')


def _check_invariants(original: str, translation: str) -> None:
    expected = set(_INVARIANT.findall(original))
    if len(expected) < _MIN_INVARIANTS:
        return
    text = re.sub(r"(?<=\d)[.,\u00a0\u202f' ](?=\d)", "", translation)
    missing = [item for item in sorted(expected) if item not in translation and item not in text]
    if len(missing) > (1 - _MIN_KEPT_INVARIANTS) * len(expected):
        raise InvalidModelOutput(f"numbers or names are missing: {', '.join(missing[:_MAX_LISTED])}", _ANSWER_HINT)


def _check_equal(kind: str, before: Counter[str], after: Counter[str]) -> None:
    if before != after:
        expected = ", ".join(list(before)[:_MAX_LISTED]) or "none"
        raise InvalidModelOutput(
            f"the {kind} differ from those of the original: {expected}", _describe_change(before, after)
        )


def _check_count(kind: str, before: int, after: int) -> None:
    """Allow some difference: a model may join or split blocks."""
    if not int(before * _MIN_COUNT_FACTOR) <= after <= before * _MAX_COUNT_FACTOR + 1:
        raise InvalidModelOutput(f"the text must have {before} {kind} like the original, got {after}")


def _describe_change(before: Counter[str], after: Counter[str]) -> str:
    missing, extra = list(before - after)[:3], list(after - before)[:3]
    parts = [f"missing: {', '.join(map(_shorten, missing))}"] if missing else []
    parts += [f"not in the original: {', '.join(map(_shorten, extra))}"] if extra else []
    return "; ".join(parts)


def _format_headings(headings: Sequence[str]) -> str:
    levels = [f"{heading[1]}" for heading in headings[:_MAX_LISTED]]
    return ", ".join(levels) or "none"


def _shorten(text: str, max_characters: int = 80) -> str:
    words = " ".join(text.split())
    return words if len(words) <= max_characters else f"{words[:max_characters]}…"


def _normalize(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip().casefold()


def _remove_names(text: str, names: Sequence[str]) -> str:
    for name in names:
        text = text.replace(name, " ")
    return text


def _read_structure(markdown: str) -> _Structure:
    structure = _Structure()
    for token in COMMONMARK.parse(markdown):
        match token.type:
            case "heading_open":
                structure.headings.append(token.tag)
            case "ordered_list_open":
                structure.list_starts.append(int(token.attrs.get("start", 1)))
            case "list_item_open":
                structure.counts["list items"] += 1
            case "th_open" | "td_open":
                structure.counts["table cells"] += 1
            case "paragraph_open" if not token.level:
                structure.counts["paragraphs"] += 1
            case "fence" | "code_block":
                structure.code[token.content.rstrip()] += 1
            case "inline":
                for match in _MATH.finditer(_CODE_SPAN.sub(" ", token.content)):
                    structure.math[re.sub(r"\s+", "", match["block"] or match["inline"])] += 1
                _read_inline(structure, token.children or [])
    return structure


def _read_inline(structure: _Structure, tokens: Sequence[Token]) -> None:
    parts = list(_iterate_texts(structure, tokens))
    text = _MATH.sub(" ", "".join(parts))
    for url in _URL.findall(text):
        structure.links[url.rstrip(".,;:!?*_")] += 1
    structure.words.append(_URL.sub(" ", text))


def _iterate_texts(structure: _Structure, tokens: Sequence[Token]) -> Iterator[str]:
    """Yield the texts of a block. Count its links, images and code."""
    link: str | None = None
    for token in tokens:
        match token.type:
            case "link_open":
                link = str(token.attrs.get("href", ""))
                structure.links[link] += 1
            case "link_close":
                link = None
            case "image":
                structure.images[str(token.attrs.get("src", ""))] += 1
                yield f" {token.content} "
            case "code_inline":
                structure.code[token.content.strip()] += 1
                yield " "
            case "text":
                # The text of a link may be its URL.
                yield _URL.sub(" ", token.content) if link else token.content
            case "softbreak" | "hardbreak":
                yield "\n"

"""Translate Markdown and lists of texts with a language model, in pieces that are checkpoints.

A piece that the model does not translate correctly is split and tried again. What then remains is kept as it is, and
reported. If the API fails, nothing more is sent, and the piece is not stored, so that the next attempt repeats it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NamedTuple

from pydantic import BaseModel

from jobledger.workers.processor import JSON
from jobledger.workers.processors.session import enrichment
from jobledger.workers.processors.session.enrichment import Glossary
from jobledger.workers.processors.session.language_model import MAX_REPAIRS, LanguageModel, UnusableAnswer
from jobledger.workers.processors.session.markdown_sections import Section, join_sections, split_markdown
from jobledger.workers.processors.session.step_context import StepContext, compute_json_digest

MAX_PIECES: Final = 200
"""The parts of a very long text are larger, so that a job does not have too many steps."""
_MAX_TEXTS: Final = 100
_MIN_SPLIT_CHARACTERS: Final = 200
_MAX_DEPTH: Final = 2
_MAX_DEPTH_TOO_LONG: Final = 6
_MAX_FAILED_PIECES: Final = 3
"""If this many pieces fail and none succeeds, the model cannot translate, and the rest is not sent."""
_WORD: Final = re.compile(r"[^\W\d_]{2,}")


class Text(NamedTuple):
    """A text of a list, and the name of its place for messages, such as `slide 3`."""

    text: str
    place: str


class TranslationAbandoned(Exception):
    """The model translates nothing."""


@dataclass(slots=True)
class PartProgress:
    """How much of a part of the document is translated. `problems` says what is not, and why."""

    pieces: int
    finished: int = 0
    failed: int = 0
    problems: list[str] = field(default_factory=list)
    is_temporary: bool = False
    """Whether a later try may give a better result."""


class _StoredPiece(BaseModel):
    """The output of the checkpoint of a piece. `problems` names the parts that are not translated."""

    texts: list[str]
    problems: list[str] = []
    is_untranslated: bool = False
    is_temporary: bool = False
    terms: dict[str, str] = {}

    def add_problem(self, place: str, problem: UnusableAnswer) -> None:
        self.problems.append(f"{place} ({problem})")
        self.is_temporary = self.is_temporary or problem.is_temporary


class _TemporaryPiece(Exception):
    """A piece must not be stored, because a later try may give a better result."""

    def __init__(self, piece: _StoredPiece) -> None:
        super().__init__()
        self.piece = piece


class Translator:
    """Translates the texts of one document. Earlier translations of terms are part of later requests."""

    def __init__(self, ctx: StepContext, model: LanguageModel, *, target: str, glossary: Glossary) -> None:
        self._ctx = ctx
        self._model = model
        self._target = target
        self._subtag = target.partition("-")[0].lower()
        self._title, self._names = glossary.title, glossary.names
        self._terms: dict[str, str] = {}
        self._max_characters = 1_000_000
        """Longer texts were rejected as too long."""
        self._has_succeeded = False
        self._failed_pieces = 0

    async def translate_section(self, section: Section, progress: PartProgress) -> str:
        """Return a section in the target language, or as it is if the model does not translate it.

        Raises:
            TranslationAbandoned: The model has translated nothing so far, and this section is not the first.
            OpenAiError: The API failed.
        """
        piece = await self._run_step("translate text", [section.text], partial(self._translate_section, section))
        self._terms |= piece.terms
        self._count(piece, progress)
        return piece.texts[0]

    async def translate_batch(self, batch: Sequence[Text], progress: PartProgress) -> dict[str, str]:
        """Return texts in the target language by their originals. See `translate_section`."""
        originals = [text.text for text in batch]
        piece = await self._run_step("translate texts", originals, partial(self._translate_batch, batch))
        self._count(piece, progress)
        return dict(zip(originals, piece.texts, strict=True))

    def _count(self, piece: _StoredPiece, progress: PartProgress) -> None:
        progress.finished += 1
        progress.failed += bool(piece.problems)
        progress.problems += piece.problems
        progress.is_temporary = progress.is_temporary or piece.is_temporary
        self._has_succeeded = self._has_succeeded or not piece.is_untranslated
        self._failed_pieces += piece.is_untranslated
        if not self._has_succeeded and self._failed_pieces >= _MAX_FAILED_PIECES:
            raise TranslationAbandoned

    async def _run_step(
        self, name: str, texts: list[str], translate: Callable[[Glossary], Coroutine[Any, Any, _StoredPiece]]
    ) -> _StoredPiece:
        """Translate a piece, or return its stored translation."""
        self._ctx.raise_if_cancelled()
        glossary = Glossary(self._title, self._names, self._terms).select("\n".join(texts))
        settings = self._ctx.settings.language_model
        # The terms are advice. If they were part of the inputs, one piece more would repeat all that follow.
        inputs: dict[str, JSON] = {
            "prompt_version": enrichment.PROMPT_VERSION,
            "texts": compute_json_digest(list(texts)),
            "title": glossary.title,
            "names": list(glossary.names),
            "language": self._target,
            **settings.model_dump(mode="json", include={"url", "model", "temperature"}),
        }

        async def run(_inputs: object) -> _StoredPiece:
            piece = await translate(glossary)
            if piece.is_temporary:
                raise _TemporaryPiece(piece)
            return piece

        try:
            return await self._ctx.job.step(name, run, inputs)
        except _TemporaryPiece as temporary:
            return temporary.piece

    # Sections --------------------------------------------------------------------------------------------------------

    async def _translate_section(self, section: Section, glossary: Glossary) -> _StoredPiece:
        piece = _StoredPiece(texts=[], is_untranslated=True)
        piece.texts = [await self._try_section(section, glossary, piece, 0)]
        return piece

    async def _try_section(self, section: Section, glossary: Glossary, piece: _StoredPiece, depth: int) -> str:
        """Return the translation. A part that cannot be translated stays, and is a problem of the piece."""
        parts: list[Section] = []
        if len(section.text) > self._max_characters:
            parts = split_markdown(section.text, self._max_characters, section.title)
        if len(parts) < 2:
            try:
                return await self._generate_section(section, glossary, piece, depth)
            except UnusableAnswer as problem:
                parts = self._split_section(section, problem, depth)
                if len(parts) < 2:
                    piece.add_problem(f"“{section.title}”", problem)
                    return section.text
        texts = [
            await self._try_section(part, glossary, piece, depth + 1) if part.needs_model else part.text
            for part in parts
        ]
        return join_sections(parts, texts)

    async def _generate_section(self, section: Section, glossary: Glossary, piece: _StoredPiece, depth: int) -> str:
        prompt = enrichment.build_translation_prompt(self._target, glossary)
        parse = partial(enrichment.parse_translation, original=section.text, target=self._subtag, names=glossary.names)
        translation = await self._model.generate(
            prompt, section.text, "markdown", parse, max_repairs=_get_max_repairs(depth)
        )
        piece.is_untranslated = False
        piece.terms |= translation.terms
        return translation.text

    def _split_section(self, section: Section, problem: UnusableAnswer, depth: int) -> list[Section]:
        if depth >= self._get_max_depth(problem):
            return []
        limit = len(section.text) // 2 if problem.is_too_long else len(section.text) // 3
        if limit < _MIN_SPLIT_CHARACTERS:
            return []
        if problem.is_too_long:
            self._max_characters = min(self._max_characters, limit)
        return split_markdown(section.text, limit, section.title)

    def _get_max_depth(self, problem: UnusableAnswer) -> int:
        if problem.is_too_long:
            return _MAX_DEPTH_TOO_LONG
        return _MAX_DEPTH if self._has_succeeded else 1

    # Lists of texts --------------------------------------------------------------------------------------------------

    async def _translate_batch(self, batch: Sequence[Text], glossary: Glossary) -> _StoredPiece:
        piece = _StoredPiece(texts=[], is_untranslated=True)
        piece.texts = await self._try_batch(batch, glossary, piece, 0)
        return piece

    async def _try_batch(self, batch: Sequence[Text], glossary: Glossary, piece: _StoredPiece, depth: int) -> list[str]:
        """Return the translations. Texts that cannot be translated stay, and are problems of the piece."""
        length = sum(len(text.text) for text in batch)
        if length <= self._max_characters or len(batch) == 1:
            try:
                return await self._generate_batch(batch, glossary, piece, depth)
            except UnusableAnswer as problem:
                if len(batch) == 1 or depth > self._get_max_depth(problem):
                    places = dict.fromkeys([batch[0].place, batch[-1].place])
                    piece.add_problem(" to ".join(places), problem)
                    return [text.text for text in batch]
                if problem.is_too_long:
                    self._max_characters = min(self._max_characters, max(_MIN_SPLIT_CHARACTERS, length // 2))
        middle = len(batch) // 2
        return [
            *await self._try_batch(batch[:middle], glossary, piece, depth + 1),
            *await self._try_batch(batch[middle:], glossary, piece, depth + 1),
        ]

    async def _generate_batch(
        self, batch: Sequence[Text], glossary: Glossary, piece: _StoredPiece, depth: int
    ) -> list[str]:
        originals = [text.text for text in batch]
        prompt = enrichment.build_texts_prompt(self._target, glossary, len(batch))
        message = json.dumps(originals, ensure_ascii=False)
        parse = partial(enrichment.parse_texts, originals=originals, target=self._subtag, names=glossary.names)
        texts = await self._model.generate(prompt, message, "texts", parse, max_repairs=_get_max_repairs(depth))
        piece.is_untranslated = False
        return texts


def _get_max_repairs(depth: int) -> int:
    return MAX_REPAIRS if depth == 0 else 1


def compute_piece_size(length: int, max_characters: int) -> int:
    """Return the size of the pieces of a text of `length` characters."""
    return max(max_characters, length // MAX_PIECES)


def make_batches(texts: Sequence[Text], max_characters: int) -> list[list[Text]]:
    """Return the texts that have words in groups of about `max_characters`. Equal texts are translated once."""
    unique = list({text.text: text for text in reversed(texts) if _WORD.search(text.text)}.values())[::-1]
    size = compute_piece_size(sum(len(text.text) for text in unique), max_characters)
    batches: list[list[Text]] = []
    length = 0
    for text in unique:
        if not batches or len(batches[-1]) >= _MAX_TEXTS or length + len(text.text) > size:
            batches.append([])
            length = 0
        batches[-1].append(text)
        length += len(text.text)
    return batches

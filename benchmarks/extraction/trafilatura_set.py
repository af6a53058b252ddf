"""The evaluation set of trafilatura: mostly news pages, with a few phrases that the main text has and has not.

https://github.com/adbar/trafilatura/tree/master/tests
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from benchmarks.extraction.marked_pages import MarkedPage, fetch_file
from benchmarks.extraction.scores import Score

_REPOSITORY: Final = "https://github.com/adbar/trafilatura"
_COMMIT: Final = "e90b0ef51ab026fdb905fb6c5b3c84dd3d784fd5"
_FOLDERS: Final = ("cache", "eval")


def evaluate_set(
    extractors: Mapping[str, Callable[[bytes, MarkedPage], str]], cache: Path, *, every: int
) -> dict[str, Score]:
    """Return the score of each extractor, in phrases. Only each `every`-th page is used."""
    entries = json.loads(fetch_file(_REPOSITORY, _COMMIT, "tests/evaldata.json", cache))
    found, missing, extra = (dict.fromkeys(extractors, 0) for _ in range(3))
    for url in sorted(entries)[::every]:
        entry = entries[url]
        page = MarkedPage(
            id=entry["file"],
            site=url,
            repository=_REPOSITORY,
            commit=_COMMIT,
            path=entry["file"],
            url=url if url.startswith("http") else "https://conference.example/",
            title="-",
            language="",
            content=[],
        )
        body = _fetch_page(entry["file"], cache)
        for name, extract in extractors.items():
            text = _normalize(extract(body, page))
            hits = sum(_normalize(phrase) in text for phrase in entry["with"])
            found[name] += hits
            missing[name] += len(entry["with"]) - hits
            extra[name] += sum(_normalize(phrase) in text for phrase in entry["without"])
    return {name: Score(found[name], missing[name], extra[name]) for name in extractors}


def _fetch_page(file: str, cache: Path) -> bytes:
    for folder in _FOLDERS:
        try:
            return fetch_file(_REPOSITORY, _COMMIT, f"tests/{folder}/{file}", cache)
        except subprocess.CalledProcessError:
            continue
    raise FileNotFoundError(file)


def _normalize(text: str) -> str:
    return " ".join(text.split())

"""Translate as a correct model does: other words, but the same structure, links, code, numbers and names."""

from __future__ import annotations

import json
import re
from itertools import cycle
from typing import Any

from tests.processors.session.openai_server import chat_completion

_WORDS = {
    "de": "der Vortrag zeigt nun, wie man die wichtigsten Daten sicher und ohne großen Aufwand speichert und liest",
    "fr": "cette présentation montre maintenant comment les données sont toujours enregistrées sans aucune difficulté",
    "en": "this talk shows how the most important data is stored safely and without much effort for the whole team",
}
_UNCHANGED = r"(```.*?```|`[^`]*`|\]\([^)]*\)|https?://[^\s)]+|\$[^$\n]+\$|[^\W\d_]*[a-z][A-Z]\w*)"
SUMMARIES = {
    "de": {
        "subtitle": "Warum Logbücher",
        "intro": "Ein Vortrag über Logbücher. Er erklärt, weshalb man Daten nur anhängt und niemals wieder ändert.",
        "topic": "Datenbanken",
        "tags": ["Log"],
    },
    "fr": {
        "subtitle": "Pourquoi des journaux",
        "intro": "Une présentation sur les journaux. Elle explique pourquoi les données ne sont jamais modifiées.",
        "topic": "Bases de données",
        "tags": ["Journal"],
    },
    "en": {
        "subtitle": "Why ledgers",
        "intro": "A talk about ledgers. It explains why data is only appended and never changed afterwards by anyone.",
        "topic": "Databases",
        "tags": ["Log"],
    },
}


def translate(text: str, language: str = "de") -> str:
    """Return the text with words of another language. "Ledger" becomes "Logbuch"."""
    words = cycle(re.findall(r"\w+", _WORDS[language]))

    def replace(match: re.Match[str]) -> str:
        return "Logbuch" if match[0].lower().startswith("ledger") else next(words)

    parts = re.split(_UNCHANGED, text, flags=re.DOTALL)
    return "".join(part if index % 2 else re.sub(r"[^\W\d_]+", replace, part) for index, part in enumerate(parts))


def find_language(request: dict[str, Any]) -> str:
    """Return the language that a request asks for."""
    match = re.search(r"the language with the code `(\w+)", request["messages"][0]["content"])
    assert match
    return match[1]


def is_summary_request(request: dict[str, Any]) -> bool:
    return str(request["messages"][0]["content"]).startswith("You summarize")


def is_list_request(request: dict[str, Any]) -> bool:
    return "JSON list" in request["messages"][0]["content"]


def make_answer(request: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON that a correct model answers with."""
    language, text = find_language(request), request["messages"][1]["content"]
    if is_summary_request(request):
        return SUMMARIES[language]
    if is_list_request(request):
        return {"texts": [translate(item, language) for item in json.loads(text)]}
    return {"markdown": translate(text, language), "terms": [{"source": "ledgers", "target": "Logbuch"}]}


def answer_correctly(request: dict[str, Any]) -> Any:
    return chat_completion(make_answer(request), tokens=100 if is_summary_request(request) else 7)

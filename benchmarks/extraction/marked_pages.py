"""Real conference pages in public Git repositories, with marks that say which regions are the talk's text.

The pages are not stored here, because they belong to their authors. `pages.yaml` names the repository, commit and path
of each page, and the CSS selectors of its regions. Git fetches the pages once into a cache.
"""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

import soupsieve
import yaml
from bs4 import BeautifulSoup
from bs4.element import Comment, Doctype, PageElement, ProcessingInstruction
from pydantic import BaseModel, ConfigDict

from benchmarks.extraction.scores import count_tokens

PAGES_FILE: Final = Path(__file__).with_name("pages.yaml")
_NOT_VISIBLE: Final = frozenset({"script", "style", "noscript", "template", "head", "svg", "select", "button"})
_Mark = Literal["content", "optional", "exclude"]


class MarkedPage(BaseModel):
    """One page. Selectors list regions. A region inside another one takes precedence over it.

    Attributes:
        site: Pages of one site have the same name here.
        content: Regions with the talk's text. An extractor must return it.
        optional: Regions that do not count, such as date, room and title.
        exclude: Boilerplate inside of these regions. Everything else on the page is boilerplate as well.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    site: str
    repository: str
    commit: str
    path: str
    url: str
    content_type: str = "text/html"
    title: str
    speakers: list[str] = []
    language: str
    content: list[str]
    optional: list[str] = []
    exclude: list[str] = []
    notes: str = ""


def load_pages(file: Path = PAGES_FILE) -> list[MarkedPage]:
    """Return the pages of the file."""
    return [MarkedPage.model_validate(entry) for entry in yaml.safe_load(file.read_text(encoding="utf-8"))]


def fetch_file(repository: str, commit: str, path: str, cache: Path) -> bytes:
    """Return a file of a commit. The repository is fetched into the cache first, without the content of other files.

    Raises:
        subprocess.CalledProcessError: Git cannot fetch the commit, or the commit has no such file.
    """
    clone = cache / "-".join(urlsplit(repository).path.strip("/").split("/"))
    if not clone.exists():
        _run_git("init", "--quiet", "--bare", str(clone))
        _run_git("-C", str(clone), "remote", "add", "origin", repository)
        _run_git("-C", str(clone), "config", "remote.origin.promisor", "true")
        _run_git("-C", str(clone), "config", "remote.origin.partialclonefilter", "blob:none")
    if not (clone / "refs" / "commits" / commit).exists():
        reference = f"{commit}:refs/commits/{commit}"
        _run_git("-C", str(clone), "fetch", "--quiet", "--depth=1", "--filter=blob:none", "origin", reference)
    return _run_git("-C", str(clone), "show", f"{commit}:{path}")


def _run_git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], check=True, stdout=subprocess.PIPE).stdout  # noqa: S603, S607


def count_marked_tokens(html: str, page: MarkedPage) -> tuple[Counter[str], Counter[str]]:
    """Return the tokens of the content and of the optional regions.

    Raises:
        ValueError: A selector of the content matches nothing.
    """
    soup = BeautifulSoup(html, "lxml")
    marks: dict[int, _Mark] = {}
    kinds: Sequence[tuple[_Mark, list[str]]] = (
        ("content", page.content),
        ("optional", page.optional),
        ("exclude", page.exclude),
    )
    for mark, selectors in kinds:
        for selector in selectors:
            found = soupsieve.select(selector, soup)
            if not found and mark == "content":
                raise ValueError(f"{page.id}: the selector {selector!r} matches nothing")
            marks.update((id(element), mark) for element in found)
    texts: dict[_Mark | None, list[str]] = {}
    for node in soup.find_all(string=True):
        if not isinstance(node, Comment | Doctype | ProcessingInstruction):
            texts.setdefault(_find_mark(node, marks), []).append(str(node))
    return count_tokens(" ".join(texts.get("content", []))), count_tokens(" ".join(texts.get("optional", [])))


def _find_mark(node: PageElement, marks: dict[int, _Mark]) -> _Mark | None:
    """Return the mark of the innermost region around the text. Invisible text has the mark `exclude`."""
    found: _Mark | None = None
    for parent in node.parents:
        if parent.name in _NOT_VISIBLE:
            return "exclude"
        found = found or marks.get(id(parent))
    return found

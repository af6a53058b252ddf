"""Recognize pages that are not the page of a talk: bot checks, logins, error pages, empty shells and the like. Pure.

A page is suspected because of its markup, its headings or the phrases of a short text (`page_kinds.yaml`), because its
content needs JavaScript, or because the site redirected to its home page or login. Then the talk's title and speakers
decide:

- If the page contains none of them, it is an error.
- If it contains little besides, or only mentions the title, there is a warning.
- Otherwise it is a talk, perhaps about cookies, logins or error pages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict

from jobledger.workers.processor import ProcessorError
from jobledger.workers.processors.session.page_source import PageSource, split_words

_SHORT_WORDS: Final = 60
"""A talk whose page has fewer words may be only mentioned there."""
_FEW_WORDS: Final = 200
"""Pages that are no talk have fewer words. Only headings and the URL say the same of longer ones."""
_MANY_WORDS: Final = 400
"""A page with more words is not rejected, whatever its heading."""
_LIKELY_WORDS: Final = 150
"""Without the title and the speakers, a page with fewer words is probably not that of the talk."""
_MAX_HEADING: Final = 200
_TITLE_SHARE: Final = 0.6
_MENTION_SHARE: Final = 0.5
_PARTS: Final = re.compile(r"\s+[|–—·•»«:/-]+\s+|\s*[|»«•]\s*|:\s+")
_NEEDS_JAVASCRIPT: Final = re.compile(
    r"java-?\s?script|(enable|activate|turn on) scripts|(browser|site|app).{0,60}\bscripts?\b", re.IGNORECASE
)
_ROOTS: Final = (
    "//body//*[self::div or self::main or self::section][@id='root' or @id='app' or @id='__next' or @id='__nuxt'"
    " or @id='___gatsby' or @id='svelte' or @id='q-app' or @id='react-root' or @id='main-app' or @id='application'"
    " or @data-reactroot or @ng-app or @data-server-rendered]"
    " | //body//app-root | //body//my-app | //body//*[@ng-version] | //body[@id='app' or @ng-app]"
)
_LOGIN_PATH: Final = re.compile(r"/(log-?in|sign-?in|sso|saml2?|oauth2?|auth|authenticate|cas|accounts?)(/|\.|$)")
_HOME_PATH: Final = re.compile(r"/?([a-z]{2}(-[a-z]{2})?/?)?((index|home|default)(\.\w{2,5})?/?)?", re.IGNORECASE)
_FEED: Final = re.compile(
    r"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?<(rss|feed|rdf:rdf|opml|urlset|sitemapindex)\b", re.DOTALL | re.IGNORECASE
)


class PageKind(BaseModel):
    """A kind of page that is no talk. `page_kinds.yaml` explains the fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    code: str
    says: str
    advice: str
    is_transient: bool = False
    markup: list[str] = []
    headings: list[str] = []
    phrases: list[str] = []


JAVASCRIPT_SHELL: Final = PageKind(
    name="JavaScript page",
    code="JAVASCRIPT_REQUIRED",
    says="shows its content only with JavaScript",
    advice="",
)
_HOME_PAGE: Final = PageKind(
    name="home page",
    code="PAGE_NOT_FOUND",
    says="is the home page to which the site redirects",
    advice="Check the URL of the talk.",
)
_REDIRECT_PAGE: Final = PageKind(
    name="redirect page",
    code="NOT_A_TALK_PAGE",
    says="only refers to another page, and the address could not be followed",
    advice="Use the final URL of the talk.",
    headings=[
        r"(redirecting|redirect|moved( permanently| temporarily)?|document moved|weiterleitung|30\d\b.*)\W*.{0,30}"
    ],
    phrases=[
        r"(you are being|you will be|being|automatically) redirected",
        r"if you are not redirected",
        r"(this|the) (page|site|document) has (been )?moved",
        r"redirecting(\.\.\.|…| to)",
        r"sie werden .{0,30}weitergeleitet",
    ],
)


@dataclass(frozen=True, slots=True)
class Suspicion:
    """Why a page may be no talk. `found` is where it was recognized."""

    kind: PageKind
    found: Literal["markup", "heading", "phrase", "URL"]


@dataclass(frozen=True, slots=True)
class Anchors:
    """What of the talk is on the page."""

    in_headings: bool
    in_text: bool
    speaker: bool
    is_mentioned: bool
    """Many words of the title occur somewhere in the text."""

    @property
    def any(self) -> bool:
        return self.in_headings or self.in_text or self.speaker


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do about a page: raise the error, or warn, or neither."""

    error: ProcessorError | None = None
    warning: str | None = None
    suspicion: Suspicion | None = None

    @property
    def needs_javascript(self) -> bool:
        return self.suspicion is not None and self.suspicion.kind is JAVASCRIPT_SHELL


def judge_page(source: PageSource, *, requested_url: str, title: str, speakers: Sequence[str]) -> Verdict:
    """Decide whether a page is that of the talk `title` by `speakers`. See the module's docstring.

    Args:
        source: The page.
        requested_url: The URL before redirects.
        title: Title of the talk.
        speakers: Names of its speakers.
    """
    if name := _find_data_format(source.html):
        message = f"The page {source.url} is not HTML but {name}. Use the URL of the talk's page."
        return Verdict(ProcessorError("NOT_HTML", message, details={"url": source.url}))
    anchors = find_anchors(source, title, speakers)
    suspicion = find_suspicion(source, requested_url)
    if suspicion is None:
        return Verdict(warning=_find_doubt(source, anchors, speakers))
    is_weak = suspicion.found == "phrase" and anchors.is_mentioned
    is_long = suspicion.found == "heading" and len(source.words) >= _MANY_WORDS
    if not (anchors.any or is_weak or is_long):
        return Verdict(error=_make_error(source.url, suspicion.kind), suspicion=suspicion)
    has_much_text = len(source.words) >= (_LIKELY_WORDS if suspicion.found == "markup" else _SHORT_WORDS)
    is_talk = (anchors.in_headings and anchors.speaker) or (
        has_much_text and (anchors.in_headings or anchors.speaker or (anchors.any and suspicion.found == "phrase"))
    )
    return Verdict(warning=None if is_talk else _make_warning(source.url, suspicion.kind), suspicion=suspicion)


def describe_error_page(headers: Mapping[str, str], body: bytes) -> str | None:
    """Return a sentence without a full stop if the body of an HTTP error is a bot check or asks for a login."""
    source = PageSource("", body.decode("utf-8", "replace"))
    suspicion = find_suspicion(source, "")
    if headers.get("cf-mitigated") == "challenge" or "x-datadome" in headers:
        kind = _load_kinds()[0]
    elif suspicion is not None and suspicion.kind.code in ("BOT_CHECK", "LOGIN_REQUIRED"):
        kind = suspicion.kind
    else:
        return None
    return f"The response {kind.says}. {kind.advice.rstrip('.')}"


def find_anchors(source: PageSource, title: str, speakers: Sequence[str]) -> Anchors:
    """Find the title and the speakers on the page."""
    words = source.words
    text = f" {' '.join(words)} "
    title_words = _select_title_words(title)
    phrase = " ".join(split_words(title))
    in_text = f" {phrase} " in text or (len(phrase) >= 4 and not phrase.isascii() and phrase in text)
    present = {*words, *split_words(source.title)}
    return Anchors(
        in_headings=any(_resembles(split_words(heading[:_MAX_HEADING]), title_words) for heading in source.headings),
        in_text=in_text,
        speaker=any(_contains_name(text, speaker) for speaker in speakers),
        is_mentioned=sum(word in present for word in title_words) >= _MENTION_SHARE * len(title_words),
    )


def find_suspicion(source: PageSource, requested_url: str) -> Suspicion | None:
    """Return why the page may be no talk."""
    kinds = [*_load_kinds(), _REDIRECT_PAGE]
    is_short = len(source.words) < _FEW_WORDS
    markup = source.markup.lower() if is_short else ""
    headings = [source.title, *(source.main_headings or (source.headings[:1] if is_short else []))]
    parts = [part for heading in headings for part in _split_heading(heading[:_MAX_HEADING])]
    for kind in kinds:
        if any(part in markup for part in kind.markup):
            return Suspicion(kind, "markup")
        if any(re.fullmatch(pattern, part, re.IGNORECASE) for part in parts for pattern in kind.headings):
            return Suspicion(kind, "heading")
    if suspicion := _find_suspicious_url(source, requested_url):
        return suspicion
    if is_short and source.tree.xpath("//input[@type='password']"):
        return Suspicion(_get_kind("login page"), "phrase")
    if _is_shell(source):
        return Suspicion(JAVASCRIPT_SHELL, "markup")
    text = " ".join(f"{source.text[:20_000]} {source.noscript_text[:2_000]}".split())
    for kind in kinds:
        if is_short and any(re.search(pattern, text, re.IGNORECASE) for pattern in kind.phrases):
            return Suspicion(kind, "phrase")
    return None


def _find_suspicious_url(source: PageSource, requested_url: str) -> Suspicion | None:
    requested, final = urlsplit(requested_url), urlsplit(source.url)
    if not requested_url or (requested.netloc, requested.path) == (final.netloc, final.path):
        return None
    if _LOGIN_PATH.search(final.path.lower()) and not _LOGIN_PATH.search(requested.path.lower()):
        return Suspicion(_get_kind("login page"), "URL")
    if _HOME_PATH.fullmatch(final.path) and not final.query and not _HOME_PATH.fullmatch(requested.path):
        return Suspicion(_HOME_PAGE, "URL")
    return None


def _is_shell(source: PageSource) -> bool:
    """Return whether the page has no content without JavaScript."""
    if len(source.words) >= _FEW_WORDS or not source.tree.xpath("//script"):
        return False
    if _NEEDS_JAVASCRIPT.search(source.noscript_text):
        return True
    roots = source.tree.xpath(_ROOTS)
    if any(len(split_words(" ".join(root.itertext()))) <= 5 for root in roots):
        return True
    text = source.text if len(source.words) < _SHORT_WORDS else ""
    is_loading = re.search(r"\bloading\b|wird geladen|chargement|cargando", text, re.IGNORECASE)
    return bool(not source.words or is_loading or _NEEDS_JAVASCRIPT.search(text))


def _find_doubt(source: PageSource, anchors: Anchors, speakers: Sequence[str]) -> str | None:
    is_long = len(source.words) >= _LIKELY_WORDS
    if anchors.any or anchors.is_mentioned or (is_long and not speakers):
        return None
    problem = "contains neither the title nor a speaker" if speakers else "does not contain the title"
    return f"The page may not be that of the talk: its text {problem}."


def _make_error(url: str, kind: PageKind) -> ProcessorError:
    advice = kind.advice and f" {kind.advice}"
    return ProcessorError(
        kind.code,
        f"The page {url} {kind.says}.{advice}",
        transient=kind.is_transient,
        details={"url": url, "kind": kind.name},
    )


def _make_warning(url: str, kind: PageKind) -> str:
    return f"The page may not be that of the talk, or not all of it: {url} {kind.says}."


@cache
def _load_kinds() -> list[PageKind]:
    text = files(__package__).joinpath("page_kinds.yaml").read_text(encoding="utf-8")
    return [PageKind.model_validate(kind) for kind in yaml.safe_load(text)]


def _get_kind(name: str) -> PageKind:
    return next(kind for kind in _load_kinds() if kind.name == name)


def _find_data_format(html: str) -> str | None:
    """Return the name of a format of data that was sent as HTML."""
    if _FEED.match(html[:2_000]):
        return "a feed or site map in XML"
    start = html.lstrip("\ufeff \t\r\n")[:1]
    if start in ("{", "["):
        try:
            json.loads(html.lstrip("\ufeff"))
        except (ValueError, RecursionError):
            return None
        return "JSON"
    if html.lstrip().startswith("BEGIN:VCALENDAR"):
        return "a calendar file"
    return None


def _split_heading(heading: str) -> list[str]:
    return [part.strip() for part in (heading, *_PARTS.split(heading)) if part.strip()]


def _select_title_words(title: str) -> list[str]:
    """Return the distinct words of the title, without short ones if there are others."""
    words = list(dict.fromkeys(split_words(title)))
    return [word for word in words if len(word) > 3 or word.isdigit()] or words


def _resembles(heading: list[str], title_words: list[str]) -> bool:
    found = sum(word in heading for word in title_words)
    return found >= _TITLE_SHARE * len(title_words) and found >= min(2, len(title_words))


def _contains_name(text: str, name: str) -> bool:
    """Return whether a name is in the text, also in the form `Family, Given` and without quoted nicknames."""
    words = split_words(re.sub(r"[\"“„'(][^\"”'“)]*[\"”'“)]", " ", name)) or split_words(name)
    forms = (words, [*words[-1:], *words[:-1]], split_words(name))
    return any(f" {' '.join(form)} " in text for form in forms if form)

"""Evaluate how well the text of web pages is extracted: `make evaluate`.

    python -m benchmarks.extraction [PAGE …] [--cache DIRECTORY] [--file FILE] [--trafilatura [EVERY]]

Prints precision, recall and F1 for each page and extractor. Extractors that are not installed are omitted; install them
with `pip install readability-lxml markitdown`. Git fetches the pages from their repositories in the first run.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

from benchmarks.extraction.extractors import EXTRACTORS
from benchmarks.extraction.marked_pages import PAGES_FILE, MarkedPage, count_marked_tokens, fetch_file, load_pages
from benchmarks.extraction.scores import Score, score_text
from benchmarks.extraction.trafilatura_set import evaluate_set
from jobledger.workers.processor import ProcessorError
from jobledger.workers.processors.session.charsets import decode_page

_DEFAULT_CACHE = Path.home() / ".cache" / "jobledger" / "evaluation"


def main() -> int:
    """Print a table of the scores."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.extraction", description=__doc__.partition("\n")[0])
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="IDs of pages (default: all)")
    parser.add_argument("--cache", type=Path, default=_DEFAULT_CACHE, help="directory for the fetched repositories")
    parser.add_argument("--file", type=Path, default=PAGES_FILE, help="file with the marked pages")
    parser.add_argument(
        "--trafilatura",
        type=int,
        nargs="?",
        const=1,
        metavar="EVERY",
        help="evaluate every n-th page of trafilatura's own set instead",
    )
    options = parser.parse_args()
    names = [name for name in EXTRACTORS if name == "jobledger" or importlib.util.find_spec(name)]
    if options.trafilatura:
        extractors = {name: partial(_extract, name) for name in names}
        for name, score in evaluate_set(extractors, options.cache, every=options.trafilatura).items():
            print(f"{name:12}", _format_scores([score]), "  precision, recall and F1, of phrases")
        return 0
    pages = [page for page in load_pages(options.file) if not options.pages or page.id in options.pages]
    width = max((len(page.id) for page in pages), default=0)
    print(" " * width, *(f"{name:>20}" for name in names))
    print(" " * width, *(f"{'P':>8}{'R':>6}{'F1':>6}" for _ in names))
    scores: dict[str, list[Score]] = {name: [] for name in names}
    for page in pages:
        try:
            body = fetch_file(page.repository, page.commit, page.path, options.cache)
        except subprocess.CalledProcessError:
            print(f"{page.id:{width}} cannot be fetched from {page.repository}", flush=True)
            continue
        for name, score in evaluate(page, body, names).items():
            scores[name].append(score)
        print(f"{page.id:{width}}", *(_format_scores([scores[name][-1]]) for name in names), flush=True)
    print(f"{'mean':{width}}", *(_format_scores(scores[name]) for name in names))
    print(f"{len(scores['jobledger'])} of {len(pages)} pages. P: precision, R: recall, of words.")
    return 0


def evaluate(page: MarkedPage, body: bytes, names: list[str]) -> dict[str, Score]:
    """Return the score of each extractor for the page."""
    content, optional = count_marked_tokens(decode_page(body, page.content_type).text, page)
    return {name: score_text(_extract(name, body, page), content, optional) for name in names}


def _extract(name: str, body: bytes, page: MarkedPage) -> str:
    try:
        return EXTRACTORS[name](body, page)
    except ProcessorError:
        return ""


def _format_scores(scores: list[Score]) -> str:
    means = (statistics.fmean(getattr(score, name) for score in scores) for name in ("precision", "recall", "f1"))
    return "  " + "".join(f"{mean:6.3f}" for mean in means)


if __name__ == "__main__":
    sys.exit(main())

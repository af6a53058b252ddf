"""Find the formulas of a page, and replace them by elements that contain TeX. Pure.

Formulas are markup of KaTeX, MathJax or MathML, images with TeX as alternative text (Wikipedia, WordPress), or TeX in
the text that a script would render. Each becomes an element with the attribute `data-formula`, which `html_markdown`
writes as `$…$` or `$$…$$`. Its text is TeX.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

from jobledger.workers.processors.session.mathml import convert_mathml_to_tex

ATTRIBUTE: Final = "data-formula"
"""Attribute of a formula: `inline` or `block`."""
_MAX_TEX_CHARACTERS: Final = 5_000
_MAX_LITERALS: Final = 3_000
"""Further formulas in the text of a page stay as they are."""

_TEX_ENCODINGS: Final = re.compile(r"tex", re.IGNORECASE)
_SCRIPT_TYPE: Final = re.compile(r"math/(tex|mml)\b(.*mode\s*=\s*display)?", re.IGNORECASE)
_RENDERED_BY_MATHJAX: Final = re.compile(
    r"MathJax(_Preview|_Display|_SVG(_Display)?|_CHTML|_Error)?|mjx-chtml|MJXc-display"
)
_TEX_IMAGE_CLASSES: Final = frozenset({"latex", "tex", "math", "mathjax", "ql-img-inline-formula", "ee_img", "mwe-tex"})
_TEX_IMAGE_URL: Final = re.compile(
    r"latex\.codecogs\.com/[a-z.]*(?:\.(?:latex|image))?\?|/latex\.php\?|chart\.googleapis\.com/chart\?|/render/math\?"
    r"|/(?:mathtex|mimetex)\.cgi\?|math\.vercel\.app/?\?|zhihu\.com/equation\?",
    re.IGNORECASE,
)
_ENVIRONMENTS: Final = r"(?:equation|align|gather|multline|eqnarray|displaymath|math)\*?"
_LITERAL: Final = re.compile(
    r"\\\((?P<inline>(?:(?!\\[()]).){1,2000})\\\)"
    r"|\\\[(?P<block>(?:(?!\\[\[\]]).){1,5000})\\\]"
    r"|\$\$(?P<dollars>[^$]{1,5000})\$\$"
    rf"|(?P<environment>\\begin\{{(?P<name>{_ENVIRONMENTS})\}}(?:(?!\\begin\{{(?P=name)\}}).){{1,5000}}?\\end\{{(?P=name)\}})"
    r"|(?<![\w\\$])\$(?P<dollar>[^\s$](?:[^$]{0,500}[^\s$\\])?)\$(?![\w$])",
    re.DOTALL,
)
_MATHEMATICAL: Final = re.compile(
    r"\\[A-Za-z]+|[\^_{}]|^[A-Za-z]'*$|^[A-Za-z]\s*\([^()]*\)$|[A-Za-z0-9)\]]\s*[=<>+*/|≤≥≠∈-]\s*[A-Za-z0-9(\\-]|^[\d.,]+$"
)
_WORDS: Final = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3,}\s+[A-Za-z]{3,}")
_NO_FORMULAS_IN: Final = frozenset({"pre", "code", "kbd", "samp", "tt", "script", "style", "textarea", "title", "head"})


def replace_formulas(tree: Any) -> None:
    """Replace all formulas in the tree. Call before scripts and hidden elements are removed."""
    _replace_marked(tree)
    _replace_katex(tree)
    _replace_mathjax(tree)
    for math in list(tree.iter("math")):
        _replace_math(math)
    for image in list(tree.iter("img")):
        if tex := _find_tex_of_image(image):
            _replace(image, tex, is_block=_has_class(image, "mwe-math-fallback-image-display"))
    _replace_literals(tree)


def write_inline(tex: str, *, in_cell: bool = False) -> str:
    """Return a formula between dollar signs on one line. In a table cell, a bar would end the cell."""
    text = " ".join(_make_inert(tex).split("\n"))
    if in_cell:
        text = re.sub(r"\\\||\|", lambda match: r"\Vert " if len(match.group()) > 1 else r"\vert ", text).strip()
    return f"${text}$" if text else ""


def write_block(tex: str) -> str:
    """Return a formula between lines with two dollar signs. No line of it starts a block of Markdown."""
    text = re.sub(r"^(?=[-+*#=~|_\[:]|\d+[.)](?:\s|$))", "{}", _make_inert(tex), flags=re.MULTILINE)
    return f"$$\n{text}\n$$" if text else ""


def _make_inert(tex: str) -> str:
    """Return TeX that is displayed the same way, and has no HTML, code, link, image or dollar sign."""
    lines = [re.sub(r"(?<!\\)((?:\\\\)*)%.*", r"\1", line) for line in tex[:_MAX_TEX_CHARACTERS].splitlines()]
    text = "\n".join(line for line in (" ".join(line.split()) for line in lines) if line)
    text = re.sub(r"^(\{?)\\displaystyle\b\s*", r"\1", text)
    text = _strip_outer_braces(text).strip()
    signs = cycle((r"\(", r"\)"))  # within \text{…}
    text = re.sub(r"(?<!\\)\$+", lambda _: next(signs), text)
    for pattern, replacement in (
        (r"<\s*", r"\\lt "),
        (r">\s*", r"\\gt "),
        ("`", "‘"),
        (r"(?<!\\)&(?=#?\w+;)", "& "),
        (r"\](?=[(\[:])", "] "),
        (r"!(?=\[)", "! "),
        (r"\\+\Z", ""),
        (r"[ \t]+$", ""),
    ):
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text.strip()


def _strip_outer_braces(text: str) -> str:
    """Remove braces around the whole formula, such as those of Wikipedia."""
    if not (text.startswith("{") and text.endswith("}")):
        return text
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return text[1:-1] if match.end() == len(text) else text
    return text


def _replace_marked(tree: Any) -> None:
    """Replace elements that carry their TeX in an attribute, or that are marked as formulas."""
    for element in list(tree.iter()):
        if not isinstance(element.tag, str):
            continue
        tex = element.get("data-tex") or element.get("data-latex") or ""
        if tex and element.tag in ("span", "div", "img", "mjx-container", "math-field"):
            _replace(element, tex, is_block=element.tag == "div" or element.get("display") == "true")
        elif element.get("data-math-style") or (element.tag == "code" and _has_class(element, "language-math")):
            container = next(element.iterancestors("pre"), element)
            is_block = container is not element or element.get("data-math-style") == "display"
            _replace(container, "".join(element.itertext()), is_block=is_block)
        elif element.tag == "math-renderer":
            element.tag = "span"
        elif _is_bare_tex(element):
            _replace(element, _get_text(element), is_block=element.tag == "div" or _has_class(element, "display"))


def _is_bare_tex(element: Any) -> bool:
    """Return whether the element has the class `math`, and its text is TeX without delimiters."""
    if not _has_class(element, "math") or len(element):
        return False
    text = _get_text(element)
    return _looks_like_tex(text) and not _LITERAL.search(text)


def _replace_katex(tree: Any) -> None:
    for katex in [element for element in tree.iter("span") if _has_class(element, "katex")]:
        tex = next((_get_text(math) for math in katex.iter("annotation") if _is_tex(math)), "")
        math = next(katex.iter("math"), None)
        if not tex and math is not None:
            tex = _convert_math(math)
        display = next((above for above in katex.iterancestors("span") if _has_class(above, "katex-display")), None)
        is_block = display is not None or (math is not None and math.get("display") == "block")
        if tex:
            _replace(katex, tex, is_block=is_block)


def _replace_mathjax(tree: Any) -> None:
    for script in list(tree.iter("script")):
        if match := _SCRIPT_TYPE.match(script.get("type") or ""):
            tex = script.text or ""
            if match.group(1).lower() == "mml":
                tex = re.sub(r"<[^>]*>", " ", tex)
            _remove_preceding_rendering(script)
            _replace(script, re.sub(r"^\s*%?\s*<!\[CDATA\[|%?\s*\]\]>\s*$", "", tex), is_block=bool(match.group(2)))
    for container in list(tree.iter("mjx-container")):
        math = next(container.iter("math"), None)
        tex = next((element.get("data-latex") for element in container.iter() if element.get("data-latex")), "")
        if tex or math is not None:
            _replace(container, tex or _convert_math(math), is_block=container.get("display") == "true")
    for element in [element for element in tree.iter("span", "div") if _has_class(element, "MathJax")]:
        math = next(element.iter("math"), None)
        if math is not None:
            _replace(element, _convert_math(math), is_block=math.get("display") == "block")


def _remove_preceding_rendering(script: Any) -> None:
    """Remove the rendered copy of a formula, which MathJax 2 inserts before its script."""
    while (previous := script.getprevious()) is not None and not (previous.tail or "").strip():
        if not _RENDERED_BY_MATHJAX.fullmatch((previous.get("class") or "").split(" ")[0]):
            return
        previous.drop_tree()


def _replace_math(math: Any) -> None:
    display = math.get("display") == "block" or math.get("mode") == "display"
    container = next((above for above in math.iterancestors() if _has_class(above, "mwe-math-element")), math)
    display = display or any(_has_class(child, "mwe-math-mathml-display") for child in container)
    _replace(container, _convert_math(math), is_block=display)


def _convert_math(math: Any) -> str:
    for annotation in math.iter("annotation"):
        if _is_tex(annotation) and (tex := _get_text(annotation)):
            return tex
    return (math.get("alttext") or "").strip() or convert_mathml_to_tex(math)


def _is_tex(annotation: Any) -> bool:
    return bool(_TEX_ENCODINGS.search(annotation.get("encoding") or ""))


def _find_tex_of_image(image: Any) -> str:
    source, alt = image.get("src") or "", (image.get("alt") or "").strip()
    classes = set((image.get("class") or "").lower().split())
    if any(name.startswith("mwe-math-fallback") for name in classes) or (alt and classes & _TEX_IMAGE_CLASSES):
        return alt
    if not _TEX_IMAGE_URL.search(source):
        return ""
    if alt:
        return alt
    query = urlsplit(source).query
    fields = parse_qs(query)
    return next((fields[name][0] for name in ("latex", "math", "tex", "chl", "from") if name in fields), unquote(query))


def _replace_literals(tree: Any) -> None:
    """Replace TeX between `\\(` and `\\)`, `\\[` and `\\]`, or dollar signs in the text."""
    remaining = _MAX_LITERALS
    for element in list(tree.iter()):
        is_text_shown = isinstance(element.tag, str) and not element.get(ATTRIBUTE)
        for part in ("text", "tail") if is_text_shown else ("tail",):
            text = getattr(element, part) or ""
            holder = element if part == "text" else element.getparent()
            if ("$" in text or "\\" in text) and holder is not None and not _is_code(holder):
                remaining -= _split_text(element, part, text, remaining)


def _is_code(element: Any) -> bool:
    return element.tag in _NO_FORMULAS_IN or any(True for _ in element.iterancestors(*_NO_FORMULAS_IN))


def _split_text(element: Any, part: str, text: str, limit: int) -> int:
    """Replace at most `limit` formulas in the text or tail of an element. Return their number."""
    previous, end, count = None, 0, 0
    for start, stop, tex, is_block in islice(_find_literals(text), limit):
        count += 1
        formula = _make_formula(element, tex, is_block=is_block)
        before = text[end:start]
        if previous is None and part == "text":
            element.text = before
            element.insert(0, formula)
        else:
            anchor = element if previous is None else previous
            anchor.tail = ""  # a new sibling is inserted before the tail
            anchor.addnext(formula)
            anchor.tail = before
        previous, end = formula, stop
    if previous is not None:
        previous.tail = text[end:]
    return count


def _find_literals(text: str) -> Iterator[tuple[int, int, str, bool]]:
    for match in _LITERAL.finditer(text):
        tex = match[match.lastgroup or 0] if match.lastgroup != "name" else match["environment"]
        if match["dollar"] is not None and not _looks_like_tex(tex):
            continue
        yield *match.span(), tex, match["inline"] is None and match["dollar"] is None


def _looks_like_tex(text: str) -> bool:
    return bool(_MATHEMATICAL.search(text)) and not _WORDS.search(re.sub(r"\\[a-z]+\{[^{}]*\}", "", text))


def _has_class(element: Any, name: str) -> bool:
    return name in (element.get("class") or "").split()


def _get_text(element: Any) -> str:
    return "".join(element.itertext()).strip()


def _make_formula(element: Any, tex: str, *, is_block: bool) -> Any:
    formula = element.makeelement("span", {ATTRIBUTE: "block" if is_block else "inline"})
    formula.text = tex.strip()[:_MAX_TEX_CHARACTERS]
    return formula


def _replace(element: Any, tex: str, *, is_block: bool) -> None:
    parent = element.getparent()
    if parent is None:
        return
    if not tex.strip():
        element.drop_tree()
        return
    formula = _make_formula(element, tex, is_block=is_block)
    formula.tail = element.tail
    parent.replace(element, formula)

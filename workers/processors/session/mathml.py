"""Convert MathML to TeX. Pure.

Only for formulas without a TeX annotation. KaTeX and MathJax accept mathematical characters such as `∑` and `≤`, so
characters are kept, and only the layout becomes commands.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

_MAX_DEPTH: Final = 40
_INVISIBLE: Final = re.compile("[\u2061-\u2064\u200b\ufeff]")
_SPECIAL: Final = re.compile(r"[\\{}$%#&_^~]")
_REPLACEMENTS: Final = {"\\": r"\backslash ", "^": r"\hat{}", "~": r"\sim "}
_FUNCTION_NAMES: Final = (
    "arccos arcsin arctan arg cos cosh cot csc deg det dim exp gcd hom inf ker lg lim liminf limsup ln log max min Pr "
    "sec sin sinh sup tan tanh"
)
_FUNCTIONS: Final = frozenset(_FUNCTION_NAMES.split())
_ACCENTS: Final = {
    **dict.fromkeys(("^", "ˆ", "\u0302"), "hat"),
    **dict.fromkeys(("¯", "‾", "\u0304", "\u0305", "_"), "overline"),
    **dict.fromkeys(("→", "\u20d7"), "vec"),
    **dict.fromkeys(("~", "˜", "\u0303"), "tilde"),
    **dict.fromkeys(("˙", "\u0307", "."), "dot"),
    **dict.fromkeys(("¨", "\u0308"), "ddot"),
    "⏞": "overbrace",
}
_UNDER_ACCENTS: Final = {"_": "underline", "\u0332": "underline", "⏟": "underbrace"}


def convert_mathml_to_tex(math: Any) -> str:
    """Return the TeX of an lxml element `math`. Elements below 40 levels are replaced by their text."""
    return re.sub(r"\s+", " ", _convert(math, 0)).strip()


def _convert(element: Any, depth: int) -> str:
    if not isinstance(element.tag, str):
        return ""
    name = _get_name(element)
    if depth > _MAX_DEPTH:
        return _escape("".join(element.itertext()))
    if convert_leaf := _LEAVES.get(name):
        return convert_leaf("".join(element.itertext()).strip())
    if name in ("annotation", "annotation-xml", "mphantom", "maligngroup", "malignmark", "none", "mprescripts"):
        return ""
    children = [child for child in element if isinstance(child.tag, str)]
    if name == "semantics":
        children = children[:1]
    if name == "mfenced":
        return _convert_fence(element, [_convert(child, depth + 1) for child in children])
    if name in ("mtable", "mtr", "mlabeledtr"):
        rows = [_convert(child, depth + 1) for child in children]
        return f"\\begin{{matrix}} {_join(rows, ROW_END)} \\end{{matrix}}" if name == "mtable" else " & ".join(rows)
    parts = [_convert(child, depth + 1) for child in children]
    if (layout := _LAYOUTS.get(name)) and len(parts) == layout[0]:
        return layout[1](*parts)
    return _join(parts, " ") if parts else _escape((element.text or "").strip())


ROW_END: Final = r" \\ "


def _join(parts: list[str], separator: str) -> str:
    return separator.join(part for part in parts if part)


def _get_name(element: Any) -> str:
    return str(element.tag).rpartition("}")[2].rpartition(":")[2].lower()


def _escape(text: str) -> str:
    text = _INVISIBLE.sub("", text)
    return _SPECIAL.sub(lambda match: _REPLACEMENTS.get(match.group(), f"\\{match.group()}"), text)


def _convert_identifier(text: str) -> str:
    name = _INVISIBLE.sub("", text)
    if name in _FUNCTIONS:
        return f"\\{name}"
    return f"\\mathrm{{{_escape(name)}}}" if len(name) > 1 and name.isascii() and name.isalpha() else _escape(name)


def _convert_operator(text: str) -> str:
    name = _INVISIBLE.sub("", text)
    if name in _FUNCTIONS or (len(name) > 1 and name.isascii() and name.isalpha()):
        return f"\\{name}" if name in _FUNCTIONS else f"\\operatorname{{{name}}}"
    return _escape({"−": "-", "′": "'", "\u00a0": " "}.get(name, name))


def _convert_text(text: str) -> str:
    return f"\\text{{{_escape(' '.join(text.split()))}}}" if text else ""


def _convert_fence(element: Any, parts: list[str]) -> str:
    separator = (element.get("separators") or ",").strip()[:1]
    left, right = element.get("open", "("), element.get("close", ")")
    return f"{_escape(left)}{f'{separator} '.join(parts)}{_escape(right)}"


def _group(part: str) -> str:
    return f"{{{part}}}"


def _base(part: str) -> str:
    return part if len(part) == 1 or re.fullmatch(r"\\[A-Za-z]+", part) else _group(part)


def _over(base: str, over: str) -> str:
    if accent := _ACCENTS.get(over.replace("\\", "").replace("hat{}", "^").replace("sim ", "~").strip()):
        return f"\\{accent}{_group(base)}"
    return f"{_base(base)}^{_group(over)}"


def _under(base: str, under: str) -> str:
    if accent := _UNDER_ACCENTS.get(under.lstrip("\\")):
        return f"\\{accent}{_group(base)}"
    return f"{_base(base)}_{_group(under)}"


def _scripts(base: str, sub: str, sup: str) -> str:
    return f"{_base(base)}_{_group(sub)}^{_group(sup)}"


_LEAVES: Final[dict[str, Callable[[str], str]]] = {
    "mi": _convert_identifier,
    "mn": _escape,
    "mo": _convert_operator,
    "mtext": _convert_text,
    "ms": _convert_text,
    "mspace": lambda text: " ",
}
_LAYOUTS: Final[dict[str, tuple[int, Callable[..., str]]]] = {
    "mfrac": (2, lambda above, below: f"\\frac{_group(above)}{_group(below)}"),
    "msqrt": (1, lambda part: f"\\sqrt{_group(part)}"),
    "mroot": (2, lambda part, index: f"\\sqrt[{index}]{_group(part)}"),
    "msup": (2, lambda base, sup: f"{_base(base)}^{_group(sup)}"),
    "msub": (2, lambda base, sub: f"{_base(base)}_{_group(sub)}"),
    "msubsup": (3, _scripts),
    "mover": (2, _over),
    "munder": (2, _under),
    "munderover": (3, _scripts),
}

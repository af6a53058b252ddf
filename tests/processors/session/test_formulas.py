"""Formulas of KaTeX, MathJax, MathML and Wikipedia become TeX, once and without effect on the rest of the document."""

from __future__ import annotations

import re

import lxml.html  # type: ignore[import-untyped]  # it ships no types
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from jobledger.workers.processors.session import formulas
from jobledger.workers.processors.session.mathml import convert_mathml_to_tex
from jobledger.workers.processors.session.page import read_page
from jobledger.workers.processors.session.safe_markdown import sanitize_markdown
from tests.processors.session.fixtures import without_deadline
from tests.processors.session.test_html_markdown import convert

MATH = "<math><semantics><mi>x</mi><annotation encoding='application/x-tex'>O(n)</annotation></semantics></math>"


@pytest.mark.parametrize(
    ("html", "markdown"),
    [
        (
            f"<p>Cost <span class=katex><span class=katex-mathml>{MATH}</span>"
            "<span class=katex-html aria-hidden=true>O(n)</span></span>.</p>",
            "Cost $O(n)$.",
        ),
        (f"<span class=katex-display><span class=katex>{MATH}</span></span>", "$$\nO(n)\n$$"),
        (
            "<span class=MathJax_Preview></span><span class=MathJax>O(n)</span>"
            "<script type='math/tex'>O(n)</script> and <script type='math/tex; mode=display'>x^2</script>",
            "$O(n)$ and\n\n$$\nx^2\n$$",
        ),
        (
            f"<p><mjx-container><mjx-math aria-hidden=true>OO</mjx-math><mjx-assistive-mml>{MATH}"
            "</mjx-assistive-mml></mjx-container></p>",
            "$O(n)$",
        ),
        (f"<p>{MATH}</p>", "$O(n)$"),
        ("<math display=block alttext='{\\displaystyle \\int x}'><mi>y</mi></math>", "$$\n\\int x\n$$"),
        (
            "<p>So <span class=mwe-math-element><span style='display: none;'>"
            "<math alttext='{\\displaystyle E=mc^{2}}'></math></span>"
            "<img class=mwe-math-fallback-image-inline alt='{\\displaystyle E=mc^{2}}' src=x></span>.</p>",
            "So $E=mc^{2}$.",
        ),
        ("<img class=latex alt='x_1 < 2' src='/latex.php?latex=x'>", "$x_1 \\lt 2$"),
        ("<img src='https://latex.codecogs.com/svg.image?%5Cfrac%7B1%7D%7B2%7D'>", "$\\frac{1}{2}$"),
        ("<p><span data-tex='a+b'>garbage</span></p>", "$a+b$"),
        ("<p><span class=math>x^2</span> <span class='math inline'>\\(y\\)</span></p>", "$x^2$ $y$"),
        ("<pre><code class=language-math>x = 1</code></pre>", "$$\nx = 1\n$$"),
        ("<p>$O(n)$, \\(a &lt; b\\) and $x_1 * y_2$</p>", "$O(n)$, $a \\lt b$ and $x_1 * y_2$"),
        ("<p>Then \\[\\sum_i i\\] and $$ k $$ end</p>", "Then\n\n$$\n\\sum_i i\n$$\n\nand\n\n$$\nk\n$$\n\nend"),
        ("<p>\\begin{align}a &amp;= b \\\\ c\\end{align}</p>", "$$\n\\begin{align}a &= b \\\\ c\\end{align}\n$$"),
        ("<p>It costs $5 and $10, or $HOME and more$ here.</p>", "It costs $5 and $10, or $HOME and more$ here."),
        ("<p><code>$x_1$</code></p><pre>$y_1$</pre>", "`$x_1$`\n\n```\n$y_1$\n```"),
    ],
)
def test_formula_becomes_tex_once(html: str, markdown: str) -> None:
    assert convert(html) == markdown


@pytest.mark.parametrize(
    ("mathml", "tex"),
    [
        ("<mfrac><mi>a</mi><msqrt><mi>b</mi></msqrt></mfrac>", r"\frac{a}{\sqrt{b}}"),
        ("<munderover><mo>∑</mo><mi>i</mi><mi>n</mi></munderover><msup><mi>x</mi><mn>2</mn></msup>", "∑_{i}^{n} x^{2}"),
        ("<mi>sin</mi><mo>&#8289;</mo><mi>x</mi><mo>≤</mo><mi>max</mi>", r"\sin x ≤ \max"),
        ("<mover><mi>x</mi><mo>^</mo></mover><mover><mi>v</mi><mo>→</mo></mover>", r"\hat{x} \vec{v}"),
        ("<mroot><mi>x</mi><mn>3</mn></mroot><mi>rate</mi>", r"\sqrt[3]{x} \mathrm{rate}"),
        ("<mfenced open='[' close=']'><mi>a</mi><mi>b</mi></mfenced>", "[a, b]"),
        (
            "<mtable><mtr><mtd><mn>1</mn></mtd><mtd><mn>2</mn></mtd></mtr><mtr><mtd><mn>3</mn></mtd></mtr></mtable>",
            r"\begin{matrix} 1 & 2 \\ 3 \end{matrix}",
        ),
        ("<mtext>if 5% </mtext><mo>{</mo>", r"\text{if 5\%} \{"),
        ("<semantics><mi>x</mi><annotation-xml><ci>doubled</ci></annotation-xml></semantics>", "x"),
    ],
)
def test_mathml_without_annotation_becomes_tex(mathml: str, tex: str) -> None:
    assert convert_mathml_to_tex(lxml.html.fragment_fromstring(f"<math>{mathml}</math>")) == tex


def test_deeply_nested_mathml_keeps_its_text() -> None:
    math = lxml.html.fragment_fromstring(f"<math>{'<mrow>' * 200}<mi>x</mi>{'</mrow>' * 200}</math>")
    assert convert_mathml_to_tex(math) == "x"


def test_formula_of_page_is_in_its_text() -> None:
    body = (
        "<html><body><main><h1>T</h1><p>We present a study of event sourced systems, and show how an append only log "
        "makes the recovery of crashed workers simple.</p><p>The second part measures the approach on a small cluster, "
        "and compares it with a well known message broker in common use today.</p>"
        f"<p>The cost is <span class=katex>{MATH}</span> for every append.</p></main></body></html>"
    )
    page = read_page(body.encode(), content_type="text/html", url="https://a.example/", session_title="T")
    assert page.markdown.endswith("The cost is $O(n)$ for every append.")


FRAGMENTS = [
    *"<>`$&%\\{}[]()!|#-=*_~ \n1a.:",
    "](",
    "![",
    "<script>",
    "&lt;",
    "\\begin{x}",
    "$$",
    "```",
    "http://a.example",
]


@without_deadline
@given(st.lists(st.sampled_from(FRAGMENTS)).map("".join))
@example("___")
def test_formula_is_inert_in_markdown(tex: str) -> None:
    for formula in (formulas.write_inline(tex), formulas.write_block(tex), formulas.write_inline(tex, in_cell=True)):
        assert sanitize_markdown(formula).strip() == formula
        tokens = MarkdownIt("commonmark").parse(f"{formula}\n\n# The end\n")
        pieces = {token.type for block in tokens for token in (block, *(block.children or []))}
        assert pieces <= {"paragraph_open", "paragraph_close", "inline", "text", "softbreak", "hardbreak"} | {
            *("em_open", "em_close", "strong_open", "strong_close", "heading_open", "heading_close"),
        }
        assert (tokens[-3].tag, tokens[-3].level) == ("h1", 0)
        assert not re.search(r"(?<!\\)\$", formula.strip("$"))

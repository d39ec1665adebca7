"""Cutting: never over the limit, never inside a formula, nothing lost."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jz3.corpus.cutting import PARAGRAPH, Piece, boundaries, cut, pieces, token_counter
from jz3.corpus.spans import protected_spans

RELAXED = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

UNBREAKABLE = [
    "$a. B + c$",
    "$$\nx = 1. Y\n\n= 2.\n$$",
    "\\(f(x). G\\)",
    "\\[ a \\\\[2pt] b. C \\]",
    "\\begin{align}\na &= b. \\\\\n\n C &= \\begin{cases} 1. \\\\ 2. \\end{cases}\n\\end{align}",
    "```python\nprint(1). X\n\nprint(2)\n```",
    "~~~\na. B\n\nc\n~~~",
    ":math:`\\alpha. Beta`",
    "``x. Y``",
    ">>> f(1)\n2. Three\n>>> g()\nFour. Five",
    ".. math::\n\n    x. Y = 2\n\n    z. W",
    ".. math ::\n\n    u. V",
    "as in::\n\n    one. Two\n\n    three. Four",
    "| a. B | c |\n| --- | --- |\n| d. E | f |",
    "====  ====\na. B  C. D\n====  ====",
]
PROSE = st.lists(
    st.sampled_from("The set of all real numbers is open and has no hole".split()), min_size=2, max_size=12
).map(lambda words: " ".join(words).capitalize() + ".")


@pytest.fixture(scope="module")
def count(tiny_model):
    from jz3.models import load_tokenizer

    return token_counter(load_tokenizer(tiny_model))


def squeezed(text: str) -> str:
    return "".join(text.split())


@RELAXED
@given(text=st.text(max_size=800), limit=st.integers(4, 60))
def test_any_text_is_cut_within_the_limit_and_whole(count, text, limit):
    found = list(pieces(text, count, limit))
    assert squeezed("".join(p.text for p in found)) == squeezed(text)
    for piece in found:
        assert piece.tokens == count([piece.text])[0]
        assert piece.fits == (piece.tokens <= limit)
        assert piece.text.strip()


@RELAXED
@given(
    parts=st.lists(st.one_of(PROSE, st.sampled_from(UNBREAKABLE)), min_size=1, max_size=14),
    limit=st.integers(40, 200),
)
def test_no_block_is_ever_divided(count, parts, limit):
    text = "\n\n".join(parts)
    found = list(pieces(text, count, limit))
    assert squeezed("".join(p.text for p in found)) == squeezed(text)
    assert all(p.tokens <= limit for p in found if p.fits)
    for block in set(parts) & set(UNBREAKABLE):
        whole = sum(squeezed(p.text).count(squeezed(block)) for p in found)
        assert whole == parts.count(block), block


@RELAXED
@given(
    data=st.data(),
    formulas=st.lists(
        st.sampled_from([b for b in UNBREAKABLE if b[0] in "$\\:`" and b[:2] != "``"][:5]), min_size=1
    ),
)
def test_formulas_in_running_text_stay_balanced(count, data, formulas):
    text = "".join(f" {data.draw(PROSE)[:-1]} {formula} holds." for formula in formulas)
    for piece in pieces(text, count, data.draw(st.integers(60, 160))):
        assert piece.text.count("\\begin") == piece.text.count("\\end")
        assert piece.text.count("$") % 2 == 0
        assert piece.text.count("\\(") == piece.text.count("\\)")


@pytest.mark.parametrize("block", UNBREAKABLE)
def test_every_kind_of_block_is_found(block):
    text = f"Before it. See\n{block}\n\nAfter it. The end."
    stretches = [text[s.start : s.end].strip() for s in protected_spans(text)]
    assert any(
        stretch in (block, block[block.find("::") :], block.partition(":math:")[2]) for stretch in stretches
    )


@pytest.mark.parametrize(
    "text",
    [
        "It costs $5. She paid $10. He had $3 left.",
        "It costs $ 5. She paid $ 10. He had 3.",
        "An open \\begin{align} stays open. So it is text.",
        "A \\[ alone. Another \\( alone.",
        "Escaped \\$x. Y\\$ is money. So.",
        "``Quoted. Twice'' he said. And ``again'' too.",
        "\\begin{theorem} All is well. Trust it. \\end{theorem}",
    ],
)
def test_what_only_looks_like_a_formula_may_be_cut(text):
    assert protected_spans(text) == []
    assert len(boundaries(text)) >= 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One is odd. Two is even.", ["One is odd.", "Two is even."]),
        (
            "See Fig. 3 and Eq. 4, e.g. The one by J. Smith.",
            ["See Fig. 3 and Eq. 4, e.g. The one by J. Smith."],
        ),
        ("Is it? Yes! It is... Really.", ["Is it?", "Yes!", "It is...", "Really."]),
        ("For all n. Then x = 3.5 holds.", ["For all n.", "Then x = 3.5 holds."]),
        ("甲是奇数。乙是偶数。", ["甲是奇数。", "乙是偶数。"]),
        ("1. First thing\n2. Second thing", ["1. First thing\n2. Second thing"]),
        ("There are two:\n1. first\n2) second", ["There are two:", "1. first\n2) second"]),
        ("a list\n- first\n- second", ["a list", "- first", "- second"]),
        ('He said "Go. Now." Then left.', ['He said "Go.', 'Now."', "Then left."]),
    ],
)
def test_sentence_ends(text, expected):
    ends = [position for position, _ in boundaries(text)]
    assert [text[a:b].strip() for a, b in zip([0, *ends], ends, strict=False)] == expected


def test_a_paragraph_end_is_preferred_to_a_fuller_piece(count):
    text = "First paragraph of the text. It has two sentences.\n\nSecond one. " + "It goes on and on. " * 6
    limit = count(["First paragraph of the text. It has two sentences. Second one. It goes"])[0]
    assert next(pieces(text, count, limit)).text == "First paragraph of the text. It has two sentences."


def test_a_heading_stays_with_its_text(count):
    body = "The sum of two even numbers is even."
    text = f"{body}\n\nNotes\n-----\n\n{body}"
    limit = max(count([f"{body}\n\nNotes\n-----", f"Notes\n-----\n\n{body}"]))
    assert [p.text for p in pieces(text, count, limit)] == [body, f"Notes\n-----\n\n{body}"]


def test_indentation_goes_but_structure_stays(count):
    text = "Some words here.\n\n    >>> if True:\n    ...     print(1)\n    1\n"
    limit = count([">>> if True:\n...     print(1)\n1"])[0]
    assert [p.text for p in pieces(text, count, limit)][-1] == ">>> if True:\n...     print(1)\n1"


def test_cut_refuses_what_has_no_boundary(tiny_model):
    from jz3.models import load_tokenizer

    tokenizer = load_tokenizer(tiny_model)
    assert cut("The sum is even. The rest is odd.", tokenizer, 20) == ["The sum is even. The rest is odd."]
    with pytest.raises(ValueError, match="raise max_tokens"):
        cut("Fine. $" + "x + " * 50 + "y$ and so on. Fine.", tokenizer, 20)


def test_the_rest_survives_an_unbreakable_formula(count):
    formula = "$$" + "x + " * 80 + "y$$"
    found = list(pieces(f"It starts well.\n\n{formula}\n\nIt ends well.", count, 40))
    assert [p.fits for p in found] == [True, False, True]
    assert found[1].text == formula


def test_pieces_are_made_when_asked_for(count):
    asked = []

    def counting(texts):
        asked.extend(texts)
        return count(texts)

    text = "The sum of two even numbers is even. " * 20_000
    assert isinstance(next(pieces(text, counting, 60)), Piece)
    assert sum(map(len, asked)) < len(text) / 20


@pytest.mark.parametrize(
    "unit",
    [
        "a",
        "$",
        "$a ",
        "\\begin{a}",
        "`a ``b ",
        "\n",
        "```a\n",
        "a::\n\n\n",
        ".",
        "\\(",
        "| a |\n",
        "Aa. ",
        " ",
    ],
)
def test_time_is_linear_in_hostile_input(unit):
    """Quadratic scanning of 300 kB would take minutes, not the second allowed to each."""
    import time

    start = time.process_time()
    boundaries(unit * (300_000 // len(unit)))
    assert time.process_time() - start < 10


def test_the_text_end_is_always_a_boundary():
    assert boundaries("no end")[-1] == (6, PARAGRAPH)
    assert not re.search(r"\S", "".join(p.text for p in pieces("  \n ", lambda texts: [0] * len(texts), 5)))

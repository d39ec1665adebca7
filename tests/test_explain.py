"""Values per token against the full gradients, and how they are shown."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gradients import autograd_gradients, random_model, random_texts

from jz3.cli import main
from jz3.config import shipped_recipe
from jz3.explain import explain, render, token_strings, token_values, write_html
from jz3.files import write_json, write_jsonl
from jz3.gradients import Tokens, linear_layers, tokenize_query, tokenize_text
from jz3.models import load_model, load_tokenizer
from jz3.records import Doc

TEXT = "The sum of 7 and 9 is 16 — naïvely 🙂 done.\n\nNext: 3 * 12 = 36."
QUERY = ("Question: what is 7 plus 9?\n", "The sum of 7 and 9 is 16.")


def cosine(model: torch.nn.Module, one: Tokens, other: Tokens) -> float:
    """By autograd through the weights."""
    first, _ = autograd_gradients(model, one, "mean")  # pyright: ignore[reportArgumentType]
    second, _ = autograd_gradients(model, other, "mean")  # pyright: ignore[reportArgumentType]
    x, y = (torch.cat([g.flatten() for g in gs.values()]) for gs in (first, second))
    return float(x @ y / (x.norm() * y.norm()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_values_sum_to_the_exact_cosine(name: str) -> None:
    model, texts = random_model(name), random_texts(5)
    values = token_values(model, linear_layers(model), texts[0], texts[1:], batch_tokens=30)
    assert values.shape == (4, len(texts[0].ids))
    for row, query in enumerate(texts[1:]):
        assert float(values[row].sum()) == pytest.approx(cosine(model, texts[0], query), abs=1e-6)


def test_a_value_is_its_token_s_part_of_the_gradient() -> None:
    """Against g_t a_t^T formed token by token."""
    from test_gradients import Whole

    from jz3.gradients import make_batches, run_pass

    model, texts = random_model("llama"), random_texts(2)
    layers = linear_layers(model)

    class Factors(Whole):
        def backward(self, name: str, kept: torch.Tensor, g: torch.Tensor) -> None:
            self.gradients[name] = torch.einsum("to,ti->toi", g[0], kept[0])

    parts, query = Factors(), Whole()
    for sink, text in ((parts, texts[0]), (query, texts[1])):
        for _ in run_pass(model, layers, sink, make_batches([text], 100)):
            pass
    target = torch.cat([query.gradients[n].flatten() for n in layers])
    per_token = torch.cat([parts.gradients[n].flatten(1) for n in layers], 1)
    expected = per_token @ target / (per_token.sum(0).norm() * target.norm())
    found = token_values(model, layers, texts[0], [texts[1]])[0]
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-4)


def test_explain_a_text(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model, "float64"), load_tokenizer(tiny_model)
    second = ("", "3 * 12 = 36, so there are 36 rows.")
    values = explain(model, tokenizer, TEXT, [QUERY, second])
    assert "".join(piece for piece, _ in values) == TEXT
    text = tokenize_text(tokenizer, "t", TEXT, 512)
    asked = [tokenize_query(tokenizer, "q", *QUERY, 512), tokenize_text(tokenizer, "r", second[1], 512)]
    expected = sum(cosine(model, text, q) for q in asked) / 2
    assert sum(value for _, value in values) == pytest.approx(expected, abs=1e-6)
    short = explain(model, tokenizer, TEXT, [second], max_tokens=9)
    assert len(short) == 9 and TEXT.startswith("".join(piece for piece, _ in short))


@pytest.mark.parametrize("size", [28, 6])
def test_a_prompt_is_not_scored(tiny_model: Path, size: int) -> None:
    """Also one that ends within what would be a token of the whole text."""
    model, tokenizer = load_model(tiny_model, "float64"), load_tokenizer(tiny_model)
    values = explain(model, tokenizer, TEXT, [QUERY], prompt=TEXT[:size])
    assert "".join(piece for piece, _ in values) == TEXT
    text = tokenize_text(tokenizer, "t", TEXT, 512, prompt=TEXT[:size])
    asked = tokenize_query(tokenizer, "q", *QUERY, 512)
    assert text.start > 1 and len(values) == len(text.ids)
    assert sum(value for _, value in values) == pytest.approx(cosine(model, text, asked), abs=1e-6)
    short = explain(model, tokenizer, TEXT, [("", TEXT)], prompt=TEXT[:size], max_tokens=text.start + 2)
    assert len(short) == text.start + 2


def test_a_text_of_a_run_with_prompts(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--doc` leaves out what the run's features left out, and only then."""
    recipe = shipped_recipe("tiny")
    doc = Doc(id="0" * 16, text=TEXT, source="s", tokens=9, meta={"ask": TEXT[:28]})
    write_jsonl(tmp_path / "corpus" / "docs.jsonl", [doc.to_json()])
    model, tokenizer = load_model(tiny_model, recipe.model.dtype), load_tokenizer(tiny_model)
    query = ("", "3 * 12 = 36, so there are 36 rows.")
    for field, prompt in (("", ""), ("ask", TEXT[:28])):
        features = dataclasses.replace(recipe.features, prompt_field=field)
        write_json(
            tmp_path / "recipe.json", dataclasses.asdict(dataclasses.replace(recipe, features=features))
        )
        assert main(["explain", str(tmp_path), "--doc", doc.id, "--problem", query[1]]) == 0
        total = sum(value for _, value in explain(model, tokenizer, TEXT, [query], prompt=prompt))
        assert f"cosine of gradients {total:+.4f}" in capsys.readouterr().out


def test_strings_of_tokens(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    ids = tokenizer(TEXT).input_ids
    pieces = token_strings(tokenizer, TEXT, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == TEXT and "🙂" in pieces


def test_page_and_terminal(tmp_path: Path) -> None:
    values = [("<b>", 0.2), (" bad", -0.4), ("\n", 0.0)]
    write_html(str(tmp_path / "page.html"), values, "A & B", "what is 1 < 2?")
    page = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;</span>" in page and "A &amp; B" in page and "1 &lt; 2" in page and "-0.2000" in page
    assert "rgba(0,140,60,0.50)" in page and "rgba(210,40,40,1.00)" in page and "http" not in page
    text = render(values)
    assert text.plain == "<b> bad\n"
    assert (
        render([("a\x1b]52;c;eA==\x1b\\\tb\n\x9b2J", 0.1)]).plain == "a\ufffd]52;c;eA==\ufffd\\\tb\n\ufffd2J"
    )
    assert {str(span.style) for span in text.spans} == {"#ffffff on #005000", "#ffffff on #a00000"}


def test_errors(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model, "float32"), load_tokenizer(tiny_model)
    with pytest.raises(ValueError, match="no query"):
        explain(model, tokenizer, TEXT, [])
    with pytest.raises(ValueError, match="empty completion"):
        explain(model, tokenizer, TEXT, [("What?", "")])
    mixture, texts = random_model("mixtral"), random_texts(2)
    with pytest.raises(ValueError, match="mixture of experts"):
        token_values(mixture, linear_layers(mixture), texts[0], texts[1:])
    with torch.no_grad():
        output: Any = model.get_output_embeddings()
        output.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="gradient norm of text 0 is nan"):
        explain(model, tokenizer, TEXT, [QUERY])


def test_a_model_that_is_being_trained_is_left_as_it_was(tiny_model: Path) -> None:
    """Nothing of it was trainable any more."""
    model: Any = load_model(tiny_model, "float32")
    tokenizer = load_tokenizer(tiny_model)
    expected = explain(model, tokenizer, TEXT, [QUERY])
    model.train()
    model.model.embed_tokens.requires_grad_(False)

    def state() -> list[bool]:
        return [*(m.training for m in model.modules()), *(p.requires_grad for p in model.parameters())]

    before = state()
    assert explain(model, tokenizer, TEXT, [QUERY]) == expected and state() == before
    with pytest.raises(ValueError, match="no query"):
        explain(model, tokenizer, TEXT, [])
    assert state() == before


def test_arguments_of_another_kind_are_told(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model, "float32"), load_tokenizer(tiny_model)
    good: list[Any] = [model, tokenizer, TEXT, [QUERY]]
    wrong: tuple[tuple[int, Any, str], ...] = (
        (0, "tiny", "model must be a loaded causal language model, got 'tiny'"),
        (1, "tiny", "tokenizer must be a loaded tokenizer, got 'tiny'"),
        (2, [TEXT], r"text must be a str, got \['"),
        (3, None, "queries must be several pairs .* got None"),
        (3, QUERY, "query 0 must be a pair"),
        (3, ["ab"], "query 0 must be a pair"),
    )
    for place, value, message in wrong:
        arguments = [*good[:place], value, *good[place + 1 :]]
        with pytest.raises(TypeError, match=message):
            explain(*arguments)
    with pytest.raises(TypeError, match="explain: max_tokens must be an int, got float"):
        explain(model, tokenizer, TEXT, [QUERY], max_tokens=8.0)  # pyright: ignore[reportArgumentType]


def test_command(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    arguments = ["explain", "tiny", "--text", TEXT, "--problem", "7 + 9?", "--dtype", "float32"]
    assert main([*arguments, "--solution", "16", "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "cosine of gradients" in out and "helps most" in out and page.is_file()
    assert main([*arguments[:-4], "--problem", "[red]7[/b] + 9?", *arguments[-2:]]) == 0
    assert "[red]7[/b] + 9?" in capsys.readouterr().out
    assert main(["explain", "tiny", "--text", TEXT, "--solution", "16"]) == 2
    assert "--solution needs its --problem" in capsys.readouterr().err
    assert main(["explain", "tiny", "--text", TEXT]) == 2
    assert "needs --problem" in capsys.readouterr().err
    assert main(["explain", "tiny", "--problem", "7 + 9?"]) == 2
    assert "either --text or --doc" in capsys.readouterr().err
    for extra, told in (
        (["--task", "sums"], "--task sums: tiny is no folder of `jz3 run`"),
        (["--queries", "-1"], "--queries must be at least 1, got -1"),
        (["--html", str(tmp_path)], f"--html {tmp_path} is a folder; name a file"),
    ):
        assert main([*arguments, *extra]) == 2
        assert told in capsys.readouterr().err
    assert main(["explain", "tiny", "--doc", "0" * 16, "--problem", "7 + 9?"]) == 2
    assert "tiny is no folder of `jz3 run`" in capsys.readouterr().err
    run = tmp_path / "run"
    write_json(run / "recipe.json", dataclasses.asdict(shipped_recipe("tiny")))
    assert main(["explain", str(run), *arguments[2:], "--task", "sums"]) == 2
    assert "give either --task or --problem" in capsys.readouterr().err

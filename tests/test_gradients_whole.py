"""Products in 8 and 16 bits: against float64 within the bound of their steps, and what a pass does with them."""

import functools
import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from accuracy import normal
from test_gradients_llama import gradients, small_model, small_texts

from jz3 import machine
from jz3.config import settled, shipped_recipe
from jz3.errors import Jz3Error
from jz3.explain import token_values
from jz3.features import FeaturesConfig
from jz3.features.exact import exact_cosines
from jz3.features.extract import extract
from jz3.features.known import fit_known
from jz3.features.sketch import Sketch
from jz3.files import canonical_json, hash_text
from jz3.gradients import Tokens, linear_layers, llama, passes, set_products
from jz3.gradients.products import OutputLayer, WholeProduct
from jz3.ops.ce_hidden_grad import ce_hidden_grad_reference
from jz3.store import StoreInfo

DTYPES = [("int8", torch.bfloat16), ("int8", torch.float32), ("int16", torch.float32)]
kinds = pytest.mark.parametrize("kind, dtype", DTYPES, ids=lambda x: str(x).removeprefix("torch."))


@pytest.fixture(autouse=True)
def available(request: pytest.FixtureRequest) -> None:
    kind = getattr(request.node, "callspec", None) and request.node.callspec.params.get("kind")
    if reason := machine.products_obstacle(kind or "int16"):
        pytest.skip(f"no such products here: {reason}")


def levels(kind: str, group: int) -> int:
    """Of whole numbers on either side of zero; a sum of `group` products of 16 bits must fit 32."""
    return 127 if kind == "int8" else math.isqrt((2**31 - 1) // group)


def turned(x: torch.Tensor, kind: str, group: int) -> torch.Tensor:
    """Rows filled up with zeros to whole groups; for 8 bits every 64 numbers times Hadamard's matrix of 64, by 8."""
    padded = torch.nn.functional.pad(x.double(), (0, -x.shape[1] % group))
    if kind == "int16":
        return padded
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    matrix = functools.reduce(torch.kron, [two] * 6) / 8
    return (padded.view(len(x), -1, 64) @ matrix).view(len(x), -1)


def bound(x: torch.Tensor, w: torch.Tensor, kind: str, group: int) -> torch.Tensor:
    """|x W - its product| at most, [T, O]: |dx| |W| + |x| |dW| + |dx| |dW| with every |d| half a step."""
    step = 0.5 / levels(kind, group)
    parts = [turned(m, kind, group).abs() for m in (x, w.T)]
    dx, dw = (step * m.view(len(m), -1, group).amax(2).repeat_interleave(group, 1) for m in parts)
    ax, aw = parts
    return dx @ aw.T + (ax + dx) @ dw.T


@pytest.mark.parametrize("group", [64, 128, 192])
@kinds
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (7, 130, 67), (203, 38, 16), (150, 576, 130), (73, 1000, 48)], ids=str
)
def test_error_is_within_the_steps(
    sizes: tuple[int, int, int], kind: str, dtype: torch.dtype, group: int
) -> None:
    rows, depth, columns = sizes
    x = normal(1, rows, depth + 6)
    x[:, :: depth // 3 + 1] *= 30  # outliers
    x[rows // 2] = 0
    x, w = x[:, 3 : depth + 3].to(dtype), normal(2, columns, depth, dtype=dtype).T
    b = normal(3, columns, dtype=dtype)
    plain, got = WholeProduct(w, kind, group)(x), WholeProduct(w, kind, group, b)(x)
    exact = x.double() @ w.double()
    limit = bound(x, w, kind, group)
    rounding = torch.finfo(dtype).eps * (exact.abs() + limit) + depth * 1e-6 * limit
    assert got.shape == (rows, columns) and got.dtype == dtype
    assert ((plain.double() - exact).abs() <= limit + rounding).all()
    assert torch.equal(plain[rows // 2], torch.zeros(columns, dtype=dtype))
    assert torch.equal(got, plain + b)
    # The bound is far above the usual error, so that a wrong entry might pass it.
    error = (plain.double() - exact).square().mean().sqrt()
    assert float(error) <= 0.5 * float(limit.square().mean().sqrt()) + float(rounding.max())


@pytest.mark.parametrize("kind, group", [("int8", 64), ("int16", 64), ("int16", 192)])
def test_levels_are_exact(kind: str, group: int) -> None:
    """Rows that turn into whole numbers up to the largest level, which every group has, are levels themselves."""
    top, generator = levels(kind, group), torch.Generator().manual_seed(0)
    x, w = (torch.randint(-top, top + 1, s, generator=generator).float() for s in ((31, 384), (80, 384)))
    x[:, ::64], w[:, ::64] = top, -top
    x[0], w[0] = top, -top  # the largest sums there can be
    # The turn is its own inverse, and numbers by 8 are exact.
    turned_x, turned_w = (turned(m, kind, 64).float() for m in (x, w))
    got = WholeProduct(turned_w.T, kind, group)(turned_x)
    sums = [a.double() @ b.double().T for a, b in zip(x.split(group, 1), w.split(group, 1), strict=True)]
    rounding = 0 if kind == "int8" else 2**-22 * sum(s.abs() for s in sums)
    assert ((got.double() - sum(sums)).abs() <= rounding).all()


@pytest.mark.parametrize("kind", ["int8"])
def test_outliers_spoil_less_than_their_neighbours(kind: str) -> None:
    """One number of 64 that is 60 times as large as the others costs less than half of what its levels alone would."""
    x = normal(1, 200, 64)
    x[:, 5] = 60
    w = normal(2, 64, 48)
    exact = x.double() @ w.double()
    step = 60 / 127 / 12**0.5  # the error of a number that is rounded to the outlier's levels
    error = (WholeProduct(w, kind, 64)(x).double() - exact).square().mean().sqrt()
    assert float(error) < 0.4 * step * 8


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@kinds
def test_what_is_not_finite_stays_in_its_row(kind: str, dtype: torch.dtype, bad: float) -> None:
    x, product = normal(1, 20, 200, dtype=dtype), WholeProduct(normal(2, 200, 96, dtype=dtype), kind, 64)
    clean = product(x)
    x[7, 150] = bad
    got = product(x)
    rows = torch.arange(20) != 7
    assert torch.isnan(got[7]).all() and torch.equal(got[rows], clean[rows])


@pytest.mark.parametrize("kind", ["int8", "int16"])
def test_tiny_and_huge_numbers(kind: str) -> None:
    product = WholeProduct(torch.eye(64), kind, 64)
    assert torch.equal(product(torch.full((1, 64), 1e-38)), torch.zeros(1, 64))
    for size in (1e-30, 5e36):
        x = torch.full((1, 64), size)
        torch.testing.assert_close(product(x), x, atol=0, rtol=1e-6)
    huge = product(torch.full((1, 64), 3e38))
    # The sum of 64, which 8 bits need, is beyond float32.
    assert torch.isnan(huge).all() if kind == "int8" else torch.isfinite(huge).all()


@kinds
def test_a_row_depends_on_nothing_else(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, product = normal(1, 301, 192, dtype=dtype), WholeProduct(normal(2, 192, 96, dtype=dtype), kind, 64)
    expected = product(x)
    assert torch.equal(product(x[200:]), expected[200:])
    for threads in (1, 2, 3):
        monkeypatch.setattr("jz3.backend.threads", lambda threads=threads: threads)
        assert torch.equal(product(x), expected)
    with pytest.raises(ValueError, match="192 columns, got 100"):
        product(x[:, :100])
    with pytest.raises(ValueError, match="group must be a multiple of 64, got 16"):
        WholeProduct(torch.eye(64), kind, 16)


PASSES = [*DTYPES, ("int8_backward", torch.bfloat16), ("int8_backward", torch.float32)]
passes_of = pytest.mark.parametrize("kind, dtype", PASSES, ids=lambda x: str(x).removeprefix("torch."))


@passes_of
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_gradients(name: str, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "fast_bfloat16_cpu", lambda: dtype == torch.bfloat16)
    model, texts = small_model(name, dtype), small_texts()
    exact, exact_loss = gradients(model, texts, fast=True)
    assert set_products(model, kind) == kind
    found, loss = gradients(model, texts, fast=True)
    error = (found - exact).norm(dim=1) / exact.norm(dim=1)
    least, most = {"int8": (1e-3, 0.05), "int8_backward": (1e-3, 0.015), "int16": (1e-5, 0.002)}[kind]
    assert least < float(error.min()) and float(error.max()) < most
    torch.testing.assert_close(loss, exact_loss, atol=0.4 * most, rtol=0)
    assert not torch.equal(loss, exact_loss)  # of int8_backward by the output layer alone
    for row, text in enumerate(texts):
        [alone] = gradients(model, [text], fast=True)[0]
        assert float((alone - found[row]).norm() / found[row].norm()) < (
            1e-2 if dtype == torch.bfloat16 else 1e-3
        )
    set_products(model, "exact")
    assert torch.equal(gradients(model, texts, fast=True)[0], exact)


@passes_of
def test_products_in_8_bits_are_for_documents(kind: str, dtype: torch.dtype) -> None:
    model, texts = small_model("llama", dtype), small_texts()
    layers: dict[str, Any] = linear_layers(model)
    projection = Sketch.of("", layers, 64, 8, 4, 0)
    exact = extract(model, layers, texts, projection).values
    set_products(model, kind)
    documents = extract(model, layers, texts, projection).values
    queries = extract(model, layers, texts, projection, side="query").values
    assert not torch.equal(documents, exact)
    assert torch.equal(queries, documents if kind == "int16" else exact)


@pytest.mark.parametrize("kind", ["int8", "int8_backward"])
def test_explained_texts_and_queries_are_exact(kind: str) -> None:
    model, texts = small_model("llama", torch.bfloat16), small_texts()
    layers: dict[str, Any] = linear_layers(model)
    expected = token_values(model, layers, texts[1], texts[2:])
    set_products(model, kind)
    assert torch.equal(token_values(model, layers, texts[1], texts[2:]), expected)


@pytest.mark.parametrize("kind", ["int8"])
def test_known_queries_are_exact(kind: str) -> None:
    model, texts = small_model("llama", torch.float32), small_texts()
    layers: dict[str, Any] = linear_layers(model)
    set_products(model, kind)
    known = fit_known(model, "m", layers, {"t": texts[:2]}, rank=4)
    set_products(model, "exact")
    assert torch.equal(known.queries, extract(model, layers, texts[:2], known.fit).values.T)


@kinds
def test_groups_of_words_divide_a_block(kind: str, dtype: torch.dtype) -> None:
    h, y = normal(1, 3, 64, dtype=dtype), torch.arange(3)
    layer = OutputLayer(normal(2, 300, 64, dtype=dtype), kind, (64, 256))
    with pytest.raises(ValueError, match="must divide 384, got 256"):
        layer(h, y, torch.ones(3))


@kinds
def test_output_layer_names_what_does_not_fit(kind: str, dtype: torch.dtype) -> None:
    h, y, weights = normal(2, 9, 64, dtype=dtype), torch.arange(9), torch.ones(9)
    layer = OutputLayer(normal(1, 100, 64, dtype=dtype), kind, (64, 128))
    loss, grad = layer(h, y, weights)
    narrow = layer(h, y.int(), weights)
    assert torch.equal(narrow[0], loss) and torch.equal(narrow[1], grad)
    for arguments, message in (
        ((h[:, :32], y, weights), r"h must be \[T, 64\] .* got \[9, 32\]"),
        ((h.half(), y, weights), "h must be .* torch.float16"),
        ((h, y[:5], weights), "y must have the axes"),
        ((h, y, weights[:3]), "weights must have the axes"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(*arguments)


@kinds
@pytest.mark.parametrize("words", [16, 211, 1200])
def test_output_layer(words: int, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses to within the logits' error; gradients as near as their sums of rounded terms allow."""
    w, h = normal(1, words, 80, dtype=dtype) * 0.2, normal(2, 150, 80, dtype=dtype) * 3
    y, weights = torch.arange(150) % words, torch.linspace(0.1, 1, 150)
    # A certain target, whose gradient all but cancels; a loss that overflows float32; what isn't finite.
    h[0], h[1] = w[y[0]] * 6, (w[(y[1] + 1) % words] - w[y[1]]) * 1000
    h[2, 5] = torch.nan
    layer = OutputLayer(w, kind, (64, 128))
    loss, grad = layer(h, y, weights)
    exact_loss, exact = ce_hidden_grad_reference(h.double(), w.double(), y, weights.double())
    assert torch.isnan(loss[2]) and torch.isnan(grad[2]).all()
    rows = torch.arange(150) != 2
    step = 127 / levels(kind, 64)
    limit = 2 * bound(h.float(), w.float().T, kind, 64).amax(1)[rows] + 1e-3 * step
    assert ((loss.double() - exact_loss).abs()[rows] <= limit + 0.01 * step * exact_loss[rows]).all()
    error = (grad.double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert float(error[rows].max()) < 0.1 * step and 1e-4 * step < float(error[rows].median()) < 0.02 * step
    assert float(exact_loss[1]) > 100
    for threads in (1, 3):
        monkeypatch.setattr("jz3.backend.threads", lambda threads=threads: threads)
        again = layer(h, y, weights)
        assert torch.equal(again[0][rows], loss[rows]) and torch.equal(again[1][rows], grad[rows])
    part = layer(h[100:], y[100:], weights[100:])
    assert torch.equal(part[0], loss[100:]) and torch.equal(part[1], grad[100:])


@kinds
def test_nan_stays_in_its_text(kind: str, dtype: torch.dtype) -> None:
    model, texts = small_model("llama", dtype), small_texts()
    with torch.no_grad():
        model.get_input_embeddings().weight[210] = torch.nan
        model.get_output_embeddings().weight[210] = 0.0
    texts = [Tokens("", [min(i, 209) for i in t.ids], 1) for t in texts]
    set_products(model, kind)
    clean, _ = gradients(model, texts, fast=True)
    texts[1] = Tokens("", [*texts[1].ids[:9], 210, *texts[1].ids[10:]], 1)
    found, _ = gradients(model, texts, fast=True)
    assert torch.isfinite(found).all(1).tolist() == [True, False, True, True]
    assert torch.equal(found[[0, 2, 3]], clean[[0, 2, 3]])


@kinds
def test_exact_gradients_stay_exact(kind: str, dtype: torch.dtype) -> None:
    model, texts = small_model("llama", dtype), small_texts()
    layers: dict[str, Any] = linear_layers(model)
    expected = exact_cosines(model, layers, texts, texts[:1])
    set_products(model, kind)
    assert torch.equal(exact_cosines(model, layers, texts, texts[:1]), expected)
    assert model.__dict__["_jz3_products"] == kind


def test_what_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    model = small_model("llama", torch.float32)
    with pytest.raises(ValueError, match="'int4'"):
        set_products(model, "int4")
    other = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=9)
    )
    assert set_products(other, "int16") == "exact"
    for module in (passes, machine):
        monkeypatch.setattr(
            module, "products_obstacle", lambda kind: "" if kind == "exact" else "it is too old"
        )
    with pytest.raises(Jz3Error, match="'int8' can't be had: it is too old; use 'exact'"):
        set_products(model, "int8")
    assert set_products(model, "auto") == "exact"


@pytest.mark.parametrize("kind", ["int8_backward", "int16"])
def test_products_that_disagree_with_the_model_are_not_said_to_be_used(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a store names is what its passes used."""
    model, texts = small_model("llama", torch.float32), small_texts()
    expected, _ = gradients(model, texts)
    real = WholeProduct.__call__
    monkeypatch.setattr(WholeProduct, "__call__", lambda self, x: real(self, x) * 1.5)
    assert set_products(model, kind) == "exact"
    assert torch.equal(gradients(model, texts)[0], expected)


def test_a_pass_is_refused_products_that_this_machine_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a model that was pickled on another one: its instructions would end the process."""
    model, texts = small_model("llama", torch.float32), small_texts()
    expected, _ = gradients(model, texts)
    set_products(model, "int16")
    monkeypatch.setattr(passes, "products_obstacle", lambda kind: "" if kind == "exact" else "it is too old")
    with pytest.raises(Jz3Error, match="'int16' can't be had: it is too old; use 'exact'"):
        gradients(model, texts)
    with pytest.raises(Jz3Error, match="'int8_backward' can't be had"):
        gradients(model, texts, products="int8_backward")
    for wrong in ("auto", "int4"):
        with pytest.raises(ValueError, match=f"exact, int8_backward, int8, int16, got '{wrong}'"):
            gradients(model, texts, products=wrong)
    assert torch.equal(gradients(model, texts, products="exact")[0], expected)


def test_what_names_a_run_and_a_store_says_which_products() -> None:
    recipe = shipped_recipe("tiny")
    assert settled(recipe).features.products == machine.best_products()
    # Products in 8 bits on the way forward cost too much to be anybody's default.
    assert machine.best_products() not in ("auto", "int8")
    stated = replace(recipe, features=replace(recipe.features, products="exact"))
    assert settled(stated).features.products == "exact"
    with pytest.raises(
        ValueError, match="must be one of auto, exact, int8_backward, int8, int16, got 'int4'"
    ):
        FeaturesConfig(products="int4")
    store = StoreInfo(kind="adapted", k=8, bits=4, model_hash="m", projection_hash="p", reduction="mean")
    assert len({replace(store, products=p).identity() for p in ("exact", "int8", "int16")}) == 3
    # Stores from before the field was there are found again.
    older = {k: v for k, v in asdict(store).items() if k != "products"}
    assert store.identity() == hash_text(canonical_json(older))

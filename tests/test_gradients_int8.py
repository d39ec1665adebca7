"""Products in 8 bits: against float64 within the bound of their steps, and what a pass does with them."""

import functools
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from accuracy import normal
from test_gradients_llama import gradients, small_model, small_texts

from jz3 import machine
from jz3.config import settled, shipped_recipe
from jz3.errors import Jz3Error
from jz3.features import FeaturesConfig
from jz3.features.exact import exact_cosines
from jz3.files import canonical_json, hash_text
from jz3.gradients import Tokens, linear_layers, llama, passes, set_products
from jz3.gradients.products import Int8Product, OutputLayer
from jz3.ops.ce_hidden_grad import ce_hidden_grad_reference
from jz3.store import StoreInfo

STEP = 1 / 254
"""Half a step of 255 levels, of the largest number of a group."""


@pytest.fixture(autouse=True)
def int8() -> None:
    if reason := machine.int8_obstacle():
        pytest.skip(f"no products in 8 bits here: {reason}")


def turned(x: torch.Tensor, group: int) -> torch.Tensor:
    """Rows filled up with zeros to whole groups, every 64 numbers times Hadamard's matrix of size 64 by 8."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    matrix = functools.reduce(torch.kron, [two] * 6) / 8
    padded = torch.nn.functional.pad(x.double(), (0, -x.shape[1] % group))
    return (padded.view(len(x), -1, 64) @ matrix).view(len(x), -1)


def bound(x: torch.Tensor, w: torch.Tensor, group: int) -> torch.Tensor:
    """|x W - its 8-bit product| at most, [T, O]: |dx| |W| + |x| |dW| + |dx| |dW| with every |d| half a step."""
    parts = [turned(m, group).abs() for m in (x, w.T)]
    dx, dw = (STEP * m.view(len(m), -1, group).amax(2).repeat_interleave(group, 1) for m in parts)
    ax, aw = parts
    return dx @ aw.T + (ax + dx) @ dw.T


@pytest.mark.parametrize("group", [64, 128, 192])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (7, 130, 67), (203, 38, 16), (150, 576, 130), (73, 1000, 48)], ids=str
)
def test_error_is_within_the_steps(sizes: tuple[int, int, int], dtype: torch.dtype, group: int) -> None:
    rows, depth, columns = sizes
    x = normal(1, rows, depth + 6)
    x[:, :: depth // 3 + 1] *= 30  # outliers
    x[rows // 2] = 0
    x, w = x[:, 3 : depth + 3].to(dtype), normal(2, columns, depth, dtype=dtype).T
    b = normal(3, columns, dtype=dtype)
    plain, got = Int8Product(w, group)(x), Int8Product(w, group, b)(x)
    exact = x.double() @ w.double()
    rounding = torch.finfo(dtype).eps * (exact.abs() + bound(x, w, group)) + depth * 1e-6 * bound(x, w, group)
    assert got.shape == (rows, columns) and got.dtype == dtype
    assert ((plain.double() - exact).abs() <= bound(x, w, group) + rounding).all()
    assert torch.equal(plain[rows // 2], torch.zeros(columns, dtype=dtype))
    assert torch.equal(got, plain + b)
    # The bound is far above the usual error, so that a wrong entry might pass it.
    error = (plain.double() - exact).square().mean().sqrt()
    assert float(error) <= 0.5 * float(bound(x, w, group).square().mean().sqrt()) + float(rounding.max())


def test_levels_are_exact() -> None:
    """Rows that turn into whole numbers up to 127, with 127 in every group, are levels themselves."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-127, 128, s, generator=generator).float() for s in ((31, 128), (80, 128)))
    x[:, ::64], w[:, ::64] = 127, -127
    # The turn is its own inverse, and numbers by 8 are exact.
    x, w = (turned(m, 64).float() for m in (x, w))
    assert torch.equal(Int8Product(w.T, 64)(x).double(), x.double() @ w.double().T)


def test_outliers_spoil_less_than_their_neighbours() -> None:
    """One number of 64 that is 60 times as large as the others costs less than half of what its levels alone would."""
    x = normal(1, 200, 64)
    x[:, 5] = 60
    w = normal(2, 64, 48)
    exact = x.double() @ w.double()
    step = 60 / 127 / 12**0.5  # the error of a number that is rounded to the outlier's levels
    error = (Int8Product(w, 64)(x).double() - exact).square().mean().sqrt()
    assert float(error) < 0.4 * step * 8


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_is_not_finite_stays_in_its_row(dtype: torch.dtype, bad: float) -> None:
    x, product = normal(1, 20, 200, dtype=dtype), Int8Product(normal(2, 200, 96, dtype=dtype), 64)
    clean = product(x)
    x[7, 150] = bad
    got = product(x)
    rows = torch.arange(20) != 7
    assert torch.isnan(got[7]).all() and torch.equal(got[rows], clean[rows])


def test_tiny_and_huge_numbers() -> None:
    product = Int8Product(torch.eye(64), 64)
    assert torch.equal(product(torch.full((1, 64), 1e-38)), torch.zeros(1, 64))
    x = torch.full((1, 64), 5e36)
    torch.testing.assert_close(product(x), x)
    # The sum of 64 is beyond float32.
    assert torch.isnan(product(torch.full((1, 64), 3e38))).all()


def test_a_row_depends_on_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    x, product = (
        normal(1, 301, 192, dtype=torch.bfloat16),
        Int8Product(normal(2, 192, 96, dtype=torch.bfloat16), 64),
    )
    expected = product(x)
    assert torch.equal(product(x[200:]), expected[200:])
    for threads in (1, 2, 3):
        monkeypatch.setattr("jz3.backend.threads", lambda threads=threads: threads)
        assert torch.equal(product(x), expected)
    with pytest.raises(ValueError, match="192 columns, got 100"):
        product(x[:, :100])
    with pytest.raises(ValueError, match="group must be a multiple of 64, got 16"):
        Int8Product(torch.eye(64), 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_gradients(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "fast_bfloat16_cpu", lambda: dtype == torch.bfloat16)
    model, texts = small_model(name, dtype), small_texts()
    exact, exact_loss = gradients(model, texts, fast=True)
    assert set_products(model, "int8") == "int8"
    found, loss = gradients(model, texts, fast=True)
    error = (found - exact).norm(dim=1) / exact.norm(dim=1)
    assert 1e-3 < float(error.min()) and float(error.max()) < 0.05
    torch.testing.assert_close(loss, exact_loss, atol=0.02, rtol=0)
    assert not torch.equal(loss, exact_loss)
    for row, text in enumerate(texts):
        [alone] = gradients(model, [text], fast=True)[0]
        assert float((alone - found[row]).norm() / found[row].norm()) < (
            1e-2 if dtype == torch.bfloat16 else 1e-3
        )
    set_products(model, "exact")
    assert torch.equal(gradients(model, texts, fast=True)[0], exact)


def test_groups_of_words_divide_a_block() -> None:
    h, y = normal(1, 3, 64, dtype=torch.bfloat16), torch.arange(3)
    layer = OutputLayer(normal(2, 300, 64, dtype=torch.bfloat16), (64, 256))
    if layer._packed is None:
        pytest.skip("the output layer is exact here")
    with pytest.raises(ValueError, match="must divide 384, got 256"):
        layer(h, y, torch.ones(3))


@pytest.mark.parametrize("words", [16, 211, 1200])
def test_output_layer(words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses to within the logits' error; gradients as near as their sums of rounded terms allow."""
    w, h = normal(1, words, 80, dtype=torch.bfloat16) * 0.2, normal(2, 150, 80, dtype=torch.bfloat16) * 3
    y, weights = torch.arange(150) % words, torch.linspace(0.1, 1, 150)
    # A certain target, whose gradient all but cancels; a loss that overflows float32; what isn't finite.
    h[0], h[1] = w[y[0]] * 6, (w[(y[1] + 1) % words] - w[y[1]]) * 1000
    h[2, 5] = torch.nan
    layer = OutputLayer(w, (64, 128))
    if layer._packed is None:
        pytest.skip("the output layer is exact here")
    loss, grad = layer(h, y, weights)
    exact_loss, exact = ce_hidden_grad_reference(h.double(), w.double(), y, weights.double())
    assert torch.isnan(loss[2]) and torch.isnan(grad[2]).all()
    rows = torch.arange(150) != 2
    limit = 2 * bound(h.float(), w.float().T, 64).amax(1)[rows] + 1e-3
    assert ((loss.double() - exact_loss).abs()[rows] <= limit + 0.01 * exact_loss[rows]).all()
    error = (grad.double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert float(error[rows].max()) < 0.1 and 1e-4 < float(error[rows].median()) < 0.02
    assert float(exact_loss[1]) > 100
    for threads in (1, 3):
        monkeypatch.setattr("jz3.backend.threads", lambda threads=threads: threads)
        again = layer(h, y, weights)
        assert torch.equal(again[0][rows], loss[rows]) and torch.equal(again[1][rows], grad[rows])
    part = layer(h[100:], y[100:], weights[100:])
    assert torch.equal(part[0], loss[100:]) and torch.equal(part[1], grad[100:])


def test_nan_stays_in_its_text() -> None:
    model, texts = small_model("llama", torch.bfloat16), small_texts()
    with torch.no_grad():
        model.get_input_embeddings().weight[210] = torch.nan
        model.get_output_embeddings().weight[210] = 0.0
    texts = [Tokens("", [min(i, 209) for i in t.ids], 1) for t in texts]
    set_products(model, "int8")
    clean, _ = gradients(model, texts, fast=True)
    texts[1] = Tokens("", [*texts[1].ids[:9], 210, *texts[1].ids[10:]], 1)
    found, _ = gradients(model, texts, fast=True)
    assert torch.isfinite(found).all(1).tolist() == [True, False, True, True]
    assert torch.equal(found[[0, 2, 3]], clean[[0, 2, 3]])


def test_exact_gradients_stay_exact() -> None:
    model, texts = small_model("llama", torch.bfloat16), small_texts()
    layers: dict[str, Any] = linear_layers(model)
    expected = exact_cosines(model, layers, texts, texts[:1])
    set_products(model, "int8")
    assert torch.equal(exact_cosines(model, layers, texts, texts[:1]), expected)
    assert model.__dict__["_jz3_products"] == "int8"


def test_what_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    model = small_model("llama", torch.bfloat16)
    with pytest.raises(ValueError, match="'int4'"):
        set_products(model, "int4")
    other = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=9)
    )
    assert set_products(other, "int8") == "exact"
    monkeypatch.setattr(passes, "int8_obstacle", lambda: "this CPU has no AVX-512")
    monkeypatch.setattr(machine, "int8_obstacle", lambda: "this CPU has no AVX-512")
    with pytest.raises(Jz3Error, match="can't be had: this CPU has no AVX-512; use 'exact'"):
        set_products(model, "int8")
    assert set_products(model, "auto") == "exact"


def test_what_names_a_run_and_a_store_says_which_products() -> None:
    recipe = shipped_recipe("tiny")
    assert settled(recipe).features.products == machine.best_products() != "auto"
    stated = replace(recipe, features=replace(recipe.features, products="exact"))
    assert settled(stated).features.products == "exact"
    with pytest.raises(ValueError, match="must be one of auto, exact, int8, got 'int4'"):
        FeaturesConfig(products="int4")
    store = StoreInfo(kind="adapted", k=8, bits=4, model_hash="m", projection_hash="p", reduction="mean")
    assert len({replace(store, products=p).identity() for p in ("exact", "int8")}) == 2
    # Stores from before the field was there are found again.
    older = {k: v for k, v in asdict(store).items() if k != "products"}
    assert store.identity() == hash_text(canonical_json(older))

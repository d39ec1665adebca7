"""Feature kinds against exact gradients, and what they promise to a stranger's data."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_gradients import random_model, random_texts

from jz3.errors import Jz3Error
from jz3.features import exact
from jz3.features.adapted import AdaptedFit, fit_adapted
from jz3.features.exact import exact_cosines
from jz3.features.extract import coding_of, extract, model_hash
from jz3.features.known import EVERYTHING
from jz3.features.range_finder import RangeFinder
from jz3.features.sketch import Sketch
from jz3.gradients import Tokens, linear_layers
from jz3.store import Coding
from jz3.store.format import decode_rows, encode_rows


def fit_all(model: Any, queries: list[Tokens], documents: list[Tokens]) -> AdaptedFit:
    layers = linear_layers(model)
    total = sum(int(m.weight.numel()) for m in layers.values())  # pyright: ignore[reportCallIssue]
    return fit_adapted(model, "m", layers, queries, documents, k=total, rank=10**6, max_layers=10**6)


def test_exact_cosines_hold_the_queries_that_memory_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama")
    layers, texts, queries = linear_layers(model), random_texts(5), random_texts(3)
    whole = exact.exact_cosines(model, layers, texts, queries)
    groups: list[int] = []
    done: list[int] = []
    close = exact.ExactSink.close
    monkeypatch.setattr(exact, "_memory", lambda _: 1)
    monkeypatch.setattr(exact.ExactSink, "close", lambda s, o: (groups.append(len(o)), close(s, o)))
    found = exact.exact_cosines(model, layers, texts, queries, batch_tokens=20, advance=done.append)
    torch.testing.assert_close(found, whole)
    assert groups == [1, 1, 1] and sum(done) == len(texts)


def test_adapted_with_all_directions_is_the_exact_cosine() -> None:
    model, texts = random_model("llama"), random_texts(10)
    layers = linear_layers(model)
    # As many directions as a layer has: the bases are complete and nothing is left out.
    fit = fit_all(model, texts[:5], texts[5:])
    found = extract(model, layers, texts, fit)
    exact = exact_cosines(model, layers, texts, texts[:4])
    kept = sum(fit.left[n].shape[1] * fit.right[n].shape[1] for n in fit.layers)
    assert kept >= fit.k
    torch.testing.assert_close((found.values @ found.values[:4].T).double(), exact, atol=2e-5, rtol=0)
    torch.testing.assert_close(exact[:4].diagonal(), torch.ones(4, dtype=torch.float64), atol=1e-9, rtol=0)


def test_norm_is_that_of_the_whole_gradient() -> None:
    from test_gradients import autograd_gradients

    model, texts = random_model("gpt2"), random_texts(4)
    layers = linear_layers(model)
    every = fit_adapted(model, "m", layers, texts, [], k=EVERYTHING, rank=EVERYTHING, max_layers=EVERYTHING)
    fit = fit_adapted(model, "m", layers, texts, [], k=8, rank=2, max_layers=2)
    # What the fit's bases hold is exact, the rest is sketched.
    exact, found = (extract(model, layers, texts, f) for f in (every, fit))
    for row, text in enumerate(texts):
        full, _ = autograd_gradients(model, text, "mean")
        norm = sum(float(g.square().sum()) for g in full.values()) ** 0.5
        assert float(exact.norm[row]) == pytest.approx(norm, rel=1e-5)
        assert float(found.norm[row]) == pytest.approx(norm, rel=0.1)
    assert set(fit.layers) <= set(layers) and len(fit.layers) <= 2


def test_sketched_norm_is_close() -> None:
    """A sketch's norm is that of its projections: no hashing into few numbers touches it."""
    model, texts = random_model("llama"), random_texts(4)
    layers = linear_layers(model)
    fit = fit_adapted(model, "m", layers, texts, [], k=EVERYTHING, rank=EVERYTHING, max_layers=EVERYTHING)
    exact = extract(model, layers, texts, fit).norm
    for k in (64, 4096):
        found = extract(model, layers, texts, Sketch.of("m", layers, k, 128, 128, 0)).norm
        torch.testing.assert_close(found, exact, atol=0, rtol=0.1)


def test_adapted_keeps_the_coordinates_with_most_energy() -> None:
    model, texts = random_model("llama"), random_texts(24)
    layers = linear_layers(model)
    exact = exact_cosines(model, layers, texts[8:], texts[:8]).numpy()
    error = {}
    for k in (16, 256):
        fit = fit_adapted(model, "m", layers, texts[:8], texts[8:], k=k, rank=8, max_layers=10)
        found = extract(model, layers, texts, fit).values.numpy()
        error[k] = np.abs(found[8:] @ found[:8].T - exact).mean()
        assert fit.k == k
    assert error[256] < error[16]


def test_a_smaller_fit_is_the_one_fitted_smaller() -> None:
    model, texts = random_model("llama"), random_texts(12)
    layers = linear_layers(model)
    large, small = (
        fit_adapted(model, "m", layers, texts[:4], texts[4:], k=k, rank=6, max_layers=8) for k in (200, 20)
    )
    cut = large.top(20)
    assert cut.layers == small.layers and cut.k == 20 and len(cut.layers) < len(large.layers)
    one, other, more = (extract(model, layers, texts, f) for f in (cut, small, large))
    torch.testing.assert_close(one.values, other.values)
    # Norms are estimated with the help of the bases.
    whole = more.values[:, large.top_positions(20)] * more.norm[:, None]
    torch.testing.assert_close(one.values * one.norm[:, None], whole, atol=1e-6, rtol=1e-5)
    assert torch.equal(cut.mean, small.mean) and torch.equal(cut.scale, small.scale)
    for k in (0, 201):
        with pytest.raises(ValueError, match="between 1 and the fit's 200"):
            large.top(k)


def test_fit_is_deterministic_and_refuses_another_model(tmp_path: Path) -> None:
    model, texts = random_model("llama"), random_texts(6)
    hashes = [
        fit_adapted(model, "m", linear_layers(model), texts[:3], texts[3:], k=32, rank=4).save(
            tmp_path / f"{i}.st"
        )
        for i in range(2)
    ]
    assert hashes[0] == hashes[1]
    loaded = AdaptedFit.load(tmp_path / "0.st", "m")
    assert loaded.k == 32
    with pytest.raises(Jz3Error, match="fitted for model m"):
        AdaptedFit.load(tmp_path / "0.st", "another")
    (tmp_path / "0.st").write_bytes(b"nonsense")
    with pytest.raises(Jz3Error, match="can't be read"):
        AdaptedFit.load(tmp_path / "0.st", "m")
    for strange in ({"jz3": "{"}, {"jz3": "[]"}, {"other": "1"}):
        save_file({"mean": torch.zeros(1)}, tmp_path / "1.st", strange)
        with pytest.raises(Jz3Error, match=r"1\.st has the format None, expected 'jz3-"):
            AdaptedFit.load(tmp_path / "1.st", "m")


def test_fit_without_a_text_is_told() -> None:
    model = random_model("llama")
    with pytest.raises(ValueError, match="at least one query or document"):
        fit_adapted(model, "m", linear_layers(model), [], [])


def test_sketch_is_unbiased() -> None:
    model, texts = random_model("llama"), random_texts(4)
    layers = linear_layers(model)
    exact = exact_cosines(model, layers, texts, texts).numpy()
    draws = []
    for seed in range(60):
        found = extract(model, layers, texts, Sketch.of("m", layers, 64, 16, 8, seed)).values.numpy()
        draws.append(found @ found.T)
    mean, error = np.mean(draws, 0), np.std(draws, 0, ddof=1) / len(draws) ** 0.5
    assert (np.abs(mean - exact) < 4 * error).all()
    assert np.abs(mean - exact).max() < 0.5 * np.std(draws, 0).max()


def test_features_do_not_depend_on_the_batch() -> None:
    model, texts = random_model("neox"), random_texts(9)
    layers = linear_layers(model)
    fit = fit_adapted(model, "m", layers, texts[:4], texts[4:], k=64, rank=6)
    one, many = (extract(model, layers, texts, fit, batch_tokens=n) for n in (1, 1000))
    torch.testing.assert_close(one.values, many.values, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(one.hidden, many.hidden, atol=1e-6, rtol=1e-5)


def test_model_hash_sees_the_weights(tmp_path: Path) -> None:
    model = random_model("llama")
    names = []
    for folder in ("a", "b"):
        model.save_pretrained(tmp_path / folder)
        names.append(model_hash(tmp_path / folder))
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] += 1
    assert names[0] != names[1]


def test_the_left_covariance_is_joined_by_that_of_single_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    a, g = (torch.randn(3, 7, size, generator=generator) for size in (6, 5))
    # The last text is no gradient at all.
    a[2], g[2] = 0, torch.nan
    aa, gg = a @ a.transpose(1, 2), g @ g.transpose(1, 2)
    full = (g.transpose(1, 2) @ a)[:2]
    square = (aa * gg).sum((1, 2))
    finder = RangeFinder({"x": torch.nn.Linear(6, 5)}, 8, 0, 0.5)
    finder.add(0, {"x": (a, aa, g, gg)}, square, {"x": square}, 1.0)
    # As many columns as directions: Omega is orthogonal and the sketch can be undone.
    found = {s: finder.sketch["x", s] @ finder.omega["x", s].T for s in ("left", "right")}
    whole, tokens = (
        full @ full.transpose(1, 2),
        (g[:2, :, :, None] * g[:2, :, None] * a[:2].square().sum(2)[..., None, None]).sum(1),
    )
    unit = [x / x.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] for x in (whole, tokens)]
    torch.testing.assert_close(found["left"], (unit[0] + 0.5 * unit[1]).sum(0))
    torch.testing.assert_close(found["right"], (full.transpose(1, 2) @ full / square[:2, None, None]).sum(0))


def test_bits_by_energy_keep_more_of_the_scores_than_equal_ones() -> None:
    model, texts = random_model("llama"), random_texts(40)
    layers = linear_layers(model)
    fit = fit_adapted(model, "m", layers, texts[:8], texts[8:24], k=256, rank=8)
    values = extract(model, layers, texts[24:], fit).values
    queries = extract(model, layers, texts[:8], fit).values
    divided, equal = coding_of(fit, 2), Coding(fit.mean, fit.scale, 2)
    assert divided.widths is not None and int(divided.widths.max()) > 2 > int(divided.widths.min())
    errors = []
    for coding in (divided, equal):
        codes = encode_rows(values, coding)
        assert codes.shape == (16, 64)
        wrong = (decode_rows(codes, coding) - values) @ queries.T
        # What is added to all of a query's scores is no error of theirs.
        errors.append(float((wrong - wrong.mean(0)).square().mean()))
    assert errors[0] < 0.6 * errors[1]
    # Other kinds of features, and other numbers of bits, have equal widths.
    assert coding_of(fit, 4).widths is None
    assert coding_of(Sketch.of("m", layers, 64, 16, 8, 0), 2).widths is None
    # A smaller fit divides its own bits.
    assert int(coding_of(fit.top(32), 2).widths.sum()) == 64  # pyright: ignore[reportOptionalMemberAccess]

"""What the passes promise to the features: norms, the fit's statistics, bad texts, repetition."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gradients import random_model, random_texts
from test_gradients_llama import small_model, small_texts

from jz3.features import adapted
from jz3.features.adapted import AdaptedFit, fit_adapted
from jz3.features.adapted_sink import AdaptedSink
from jz3.features.exact import exact_cosines
from jz3.features.extract import Extracted, Projection, coding_of, extract
from jz3.features.lora import LoraAdapters, LoraShape
from jz3.features.readout import Readout
from jz3.features.sketch import Sketch
from jz3.gradients import Tokens, linear_layers, llama, products
from jz3.ops.signs import signs
from jz3.store import encode_rows

TOKENS = Path(__file__).parent


def fitted(model: Any, texts: list[Tokens], **options: Any) -> AdaptedFit:
    return fit_adapted(model, "m", linear_layers(model), texts[:4], texts[4:], **options)


def exact_norms(model: Any, texts: list[Tokens]) -> torch.Tensor:
    """By a fit of all directions, whose norms are exact."""
    many = 1 << 40
    return extract(
        model, linear_layers(model), texts, fitted(model, texts, k=many, rank=many, max_layers=many)
    ).norm


def test_norms_are_close_and_depend_on_the_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = random_model("llama"), random_texts(12, 30)
    layers = linear_layers(model)
    fit = fitted(model, texts, k=200, rank=16)
    exact = exact_norms(model, texts)
    found, alone = (extract(model, layers, texts, fit, batch_tokens=n) for n in (10_000, 1))
    torch.testing.assert_close(found.norm, alone.norm, atol=0, rtol=1e-5)
    ratio = found.norm / exact
    assert bool((ratio != 1).all()) and float((ratio - 1).abs().max()) < 0.08
    # Without the part that the fit knows, the sketch alone is worse.
    monkeypatch.setattr(products, "BUCKETS", 4)
    with_fit = extract(model, layers, texts, fit).norm / exact
    bare = extract(model, layers, texts, fitted(model, texts, k=1, rank=1)).norm / exact
    assert float((with_fit - 1).square().mean()) < float((bare - 1).square().mean())


def test_squared_norms_are_right_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = random_model("llama"), random_texts(3, 30)
    fit, exact = fitted(model, texts, k=8, rank=2), exact_norms(model, texts).square()
    found = []
    for seed in range(60):

        def drawn(own: int, name: str, rows: int, cols: int, seed: int = seed) -> torch.Tensor:
            return signs(seed, name, rows, cols)

        monkeypatch.setattr("jz3.ops.signs.signs", drawn)
        found.append(extract(model, linear_layers(model), texts, fit).norm.square() / exact)
    errors = torch.stack(found) - 1
    spread = errors.std(0) / len(found) ** 0.5
    assert bool((errors.mean(0).abs() < 3.5 * spread).all()) and float(spread.max()) < 0.02


def test_torch_s_default_number_format_changes_nothing() -> None:
    model, texts = random_model("llama"), random_texts(6)
    layers, shape = linear_layers(model), LoraShape(rank=2, targets=("q_proj",))
    expected = extract(model, layers, texts, fitted(model, texts, k=40, rank=4))
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = extract(model, layers, texts, fitted(model, texts, k=40, rank=4))
        with LoraAdapters(model, shape) as adapters:
            assert {a.weight.dtype for a in adapters.layers.values()} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.values, expected.values)


@pytest.mark.parametrize("kind", ["sketch", "readout"])
def test_torch_s_default_number_format_changes_no_random_features(kind: str) -> None:
    model, texts = random_model("llama"), random_texts(6)
    layers = linear_layers(model)
    sketch = Sketch.of("m", layers, 64, 8, 4, 0)
    projection: Projection = sketch if kind == "sketch" else Readout("m", 64, 16, 0)
    expected = extract(model, layers, texts, projection)
    codes = encode_rows(expected.values, coding_of(projection, 4))
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = extract(model, layers, texts, projection)
        again = encode_rows(found.values, coding_of(projection, 4))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.values, expected.values) and torch.equal(found.norm, expected.norm)
    assert torch.equal(again, codes)


def test_adapters_in_a_number_format_of_their_own() -> None:
    """PEFT keeps them in float32 beside a model in bfloat16."""
    import peft

    model: Any = random_model("llama")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted: Any = peft.get_peft_model(model.bfloat16(), config)
    layers, texts = linear_layers(adapted), random_texts(4)
    assert {layer.weight.dtype for layer in layers.values()} == {torch.float32}
    sketch = Sketch.of("m", layers, 4096, 32, 32, 0)
    found = extract(adapted, layers, texts, sketch)
    wide = extract(adapted.float(), layers, texts, sketch)
    assert float((found.values * wide.values).sum(1).min()) > 0.98 * float(wide.values.square().sum(1).min())


def test_the_fused_op_gives_the_same() -> None:
    """What runs on other devices, with the op's CPU code."""
    model, texts = random_model("llama"), random_texts(12, 30)
    layers, fit = linear_layers(model), fitted(model, texts, k=200, rank=16)
    parts = extract(model, layers, texts, fit)
    sink = AdaptedSink(fit, torch.device("cpu"))
    sink._fused = True
    fused = extract(model, layers, texts, fit, sink=sink)
    torch.testing.assert_close(fused.norm, parts.norm, atol=0, rtol=1e-6)
    torch.testing.assert_close(fused.values, parts.values, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_shared_inputs_are_multiplied_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "fast_bfloat16_cpu", lambda: dtype == torch.bfloat16)
    model, texts = small_model("llama", dtype), small_texts()
    layers, fit = linear_layers(model), fitted(model, texts, k=200, rank=8)
    counts = []

    def run() -> Extracted:
        calls: list[tuple[str, ...]] = []
        project = AdaptedSink._project

        def counted(sink: Any, side: str, names: tuple[str, ...], x: torch.Tensor) -> torch.Tensor:
            calls.append(names)
            return project(sink, side, names, x)

        with monkeypatch.context() as patch:
            patch.setattr(AdaptedSink, "_project", counted)
            found = extract(model, layers, texts, fit)
        counts.append(len(calls))
        return found

    shared = run()
    monkeypatch.setattr(AdaptedSink, "share", lambda sink, groups: None)
    alone = run()
    assert counts[0] < counts[1]
    torch.testing.assert_close(shared.norm, alone.norm, atol=0, rtol=1e-5)
    torch.testing.assert_close(shared.values, alone.values, atol=1e-6, rtol=1e-4)


def test_mean_and_scale_are_those_of_the_sample() -> None:
    model, texts = random_model("llama"), random_texts(15)
    fit = fitted(model, texts, k=50, rank=6, batch_tokens=40)
    found = extract(model, linear_layers(model), texts, fit)
    values = found.values * (found.norm / exact_norms(model, texts))[:, None]
    torch.testing.assert_close(fit.mean, values.mean(0), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(fit.scale, values.std(0), atol=1e-6, rtol=1e-3)


def test_fit_holds_nothing_per_text() -> None:
    model, texts = random_model("llama"), random_texts(6)
    seen: list[int] = []

    class Watched(adapted._EnergySink):
        def backward(self, name: str, kept: torch.Tensor, g: torch.Tensor) -> None:
            super().backward(name, kept, g)
            tables = [self.sums, *self.energies]
            seen.append(sum(t.numel() for table in tables for t in table.values()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapted, "_EnergySink", Watched)
        for count in (1, 4):
            fitted(model, texts * count, k=8, rank=2)
    assert len(set(seen)) == 1


def overflowing(dtype: torch.dtype) -> tuple[Any, list[Tokens]]:
    """A model and texts of which the second one's hidden states overflow."""
    model: Any = random_model("llama")
    model, texts = model.to(dtype), random_texts(9)
    embeddings: Any = model.get_input_embeddings()
    output: Any = model.get_output_embeddings()
    with torch.no_grad():
        # Ten times the largest number: infinite. The token is never one to be predicted.
        embeddings.weight[95] = 3e38
        embeddings.weight[95] *= 10
        output.weight[95] = 0.0
    texts = [Tokens(t.id, [min(i, 94) for i in t.ids], t.start) for t in texts]
    texts[1] = Tokens(texts[1].id, [95, *texts[1].ids[1:]], 1)
    return model, texts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_overflow_is_flagged_and_stays_in_its_text(dtype: torch.dtype) -> None:
    model, texts = overflowing(dtype)
    layers = linear_layers(model)
    others = [t for i, t in enumerate(texts) if i != 1]
    fit, clean = (fit_adapted(model, "m", layers, t[:3], t[3:], k=32, rank=4) for t in (texts, others))
    assert all(torch.isfinite(x).all() for x in (fit.mean, fit.scale, fit.energy, *fit.left.values()))
    found, kept = extract(model, layers, texts, clean), extract(model, layers, others, clean)
    flagged = ~(torch.isfinite(found.norm) & torch.isfinite(found.values).all(1))
    assert flagged.nonzero().flatten().tolist() == [1]
    torch.testing.assert_close(found.norm[~flagged], kept.norm, atol=0, rtol=1e-2)
    cosines = exact_cosines(model, layers, texts, others[:2])
    assert torch.isfinite(cosines).all(1).tolist() == [i != 1 for i in range(len(texts))]


SCRIPT = """
import sys, torch
sys.path.insert(0, {folder!r})
from test_gradients import random_model, random_texts
from test_gradients_llama import small_model, small_texts
from jz3.features.adapted import fit_adapted
from jz3.features.extract import extract
from jz3.gradients import linear_layers
model, texts = random_model("llama").to(torch.bfloat16), random_texts(8)
fit = fit_adapted(model, "m", linear_layers(model), texts[:4], texts[4:], k=32, rank=4)
found = extract(model, linear_layers(model), texts, fit)
print(found.values.numpy().tobytes().hex(), found.norm.numpy().tobytes().hex())
"""


def test_processes_agree_bit_for_bit() -> None:
    command = [sys.executable, "-c", SCRIPT.format(folder=str(TOKENS))]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert runs[0] == runs[1] and len(runs[0]) > 1000

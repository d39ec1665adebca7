"""Readout features against autograd's gradient of the output layer."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_gradients import MODELS, random_texts

from jz3.errors import Jz3Error
from jz3.features import readout as module
from jz3.features.extract import extract
from jz3.features.readout import Readout
from jz3.gradients import Tokens


def untied_model(dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = MODELS["llama"]
    assert not config.tie_word_embeddings
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def head_gradient(model: Any, text: Tokens, reduction: str) -> tuple[torch.Tensor, float]:
    """The output layer's gradient of one text, by autograd."""
    weight = model.get_output_embeddings().weight.requires_grad_(True)
    ids = torch.tensor([text.ids])
    logits = model(ids).logits[0, text.start - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, text.start :], reduction=reduction)
    (grad,) = torch.autograd.grad(loss, [weight])
    return grad, float(loss.detach())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("logits", [1 << 26, 1])
def test_norms_losses_and_inner_products(
    monkeypatch: pytest.MonkeyPatch, reduction: str, logits: int
) -> None:
    monkeypatch.setattr(module, "LOGITS", logits)
    monkeypatch.setattr(module, "PIECE", 40)
    model, texts = untied_model(), random_texts(6)
    expected = [head_gradient(model, t, reduction) for t in texts]
    whole = torch.stack([g.flatten() for g, _ in expected])
    unit = whole / whole.norm(dim=1, keepdim=True)
    draws = []
    for seed in range(40):
        found = extract(
            model, {}, texts, Readout("m", k=64, left=16, seed=seed), batch_tokens=40, reduction=reduction
        )
        draws.append(found.values @ found.values.T)
        torch.testing.assert_close(found.norm, whole.norm(dim=1), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.loss, torch.tensor([x for _, x in expected]), rtol=1e-5, atol=1e-5)
    stack = torch.stack(draws)
    error = stack.std(0) / len(draws) ** 0.5
    assert ((stack.mean(0) - unit @ unit.T).abs() < 4.5 * error + 1e-4).all()


def test_features_do_not_depend_on_the_batch_and_need_no_gradient() -> None:
    model, texts = untied_model(), random_texts(7)
    one, many = (extract(model, {}, texts, Readout("m", k=256), batch_tokens=n) for n in (1, 1000))
    torch.testing.assert_close(one.values, many.values, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(one.hidden, many.hidden, atol=1e-5, rtol=1e-4)
    assert all(p.grad is None for p in model.parameters())


def test_hidden_states_are_those_of_a_gradient_pass() -> None:
    from jz3.features.sketch import Sketch
    from jz3.gradients import linear_layers

    model, texts = untied_model(), random_texts(4)
    layers = linear_layers(model)
    ours = extract(model, layers, texts, Readout("m", k=8))
    other = extract(model, layers, texts, Sketch.of("m", layers, 8, 4, 4, 0))
    torch.testing.assert_close(ours.hidden, other.hidden, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.loss, other.loss, atol=1e-5, rtol=1e-5)


def test_saved_and_refused(tmp_path: Path) -> None:
    path = tmp_path / "readout.json"
    Readout("m", k=16).save(path)
    assert Readout.load(path, "m") == Readout("m", k=16)
    with pytest.raises(Jz3Error, match="made for model m"):
        Readout.load(path, "other")
    path.write_text("{}")
    with pytest.raises(Jz3Error, match="no readout sketch"):
        Readout.load(path, "m")


def test_a_long_text_in_windows_is_the_sum_of_its_windows() -> None:
    """The windows' gradients are those of texts of their own, weighted by their scored tokens."""
    model, ids = untied_model(), random_texts(1, 18)[0].ids * 3
    readout = Readout("m", k=4096)
    [whole] = [extract(model, {}, [Tokens("0", ids, 1, window=8)], readout, reduction="sum")]
    parts = [Tokens(str(b), ids[b : b + 8], 1) for b in range(0, len(ids) - 1, 7)]
    found = extract(model, {}, parts, readout, reduction="sum")
    expected = (found.values * found.norm[:, None]).sum(0)
    torch.testing.assert_close(whole.values[0] * whole.norm[0], expected, atol=1e-4, rtol=1e-4)
    assert float(whole.loss[0]) == pytest.approx(float(found.loss.sum()), rel=1e-5)

"""Llama blocks on jz3's own code: against float64, against the model's own code, and when they must not run."""

import pickle
from typing import Any

import pytest
import torch
import transformers
from accuracy import assert_as_accurate, normal
from test_gradients import Whole

from jz3.gradients import GradientPass, Tokens, linear_layers, llama, make_batches, run_pass
from jz3.ops import ce_hidden_grad

pytestmark = pytest.mark.usefixtures("tile_unit")

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 211,
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SMALL),
    "qwen2": transformers.Qwen2Config(**SMALL),
    "mistral": transformers.MistralConfig(**SMALL, sliding_window=None),
}


class WideWhole(Whole):
    """Takes what the blocks compute as it is."""

    wide = True


def small_model(name: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith("bias") or "norm" in key:
                weight.add_(torch.randn_like(weight) * 0.1)
    model = model.to(dtype).eval()
    if reason := llama.obstacle(model, linear_layers(model)):
        pytest.skip(f"jz3's own code can't run here: {reason}")
    return model


def small_texts(lengths: tuple[int, ...] = (131, 70, 33, 2)) -> list[Tokens]:
    generator = torch.Generator().manual_seed(1)
    return [Tokens("", torch.randint(0, 211, (n,), generator=generator).tolist(), 1) for n in lengths]


def gradients(model: Any, texts: list[Tokens], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """All texts' gradients of all layers [texts, numbers] float64, and losses, in the texts' order."""
    layers = linear_layers(model)
    sink = WideWhole()
    [batch] = make_batches(texts, 10**6)
    with GradientPass(model, layers, sink, **options) as run:
        result = run.run(batch)
    back = torch.tensor(batch.positions).argsort()
    rows = torch.cat([sink.gradients[n].double().flatten(1) for n in layers], 1)
    return rows[back], result.loss[back]


@pytest.mark.parametrize("products", ["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_as_accurate_as_the_model_itself(
    name: str, dtype: torch.dtype, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama, "fast_bfloat16_cpu", lambda: products == "bfloat16")
    model, texts = small_model(name, dtype), small_texts()
    fast, fast_loss = gradients(model, texts, fast=True)
    plain, plain_loss = gradients(model, texts, fast=False)
    exact, exact_loss = gradients(model.double(), texts, fast=False)
    assert_as_accurate(fast, plain, exact)
    torch.testing.assert_close(
        fast_loss.double(), exact_loss, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0
    )
    assert float((plain_loss.double() - exact_loss).abs().max()) < 2e-2


def test_the_residual_stream_is_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In eight blocks its roundings would make the error as large as the model's own in bfloat16."""
    monkeypatch.setattr(llama, "fast_bfloat16_cpu", lambda: True)
    config = transformers.LlamaConfig(**{**CONFIGS["llama"].to_dict(), "num_hidden_layers": 8})
    monkeypatch.setitem(CONFIGS, "deep", config)
    model, texts = small_model("deep", torch.bfloat16), small_texts()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)
    fast, plain = (gradients(model, texts, fast=fast)[0] for fast in (True, False))
    exact, _ = gradients(model.double(), texts, fast=False)
    error, own = (float(((x - exact).norm(dim=1) / exact.norm(dim=1)).mean()) for x in (fast, plain))
    assert error < 0.9 * own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_text_does_not_depend_on_its_batch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "fast_bfloat16_cpu", lambda: True)
    model, texts = small_model("llama", dtype), small_texts()
    together, _ = gradients(model, texts, fast=True)
    exact, _ = gradients(small_model("llama", dtype).double(), texts, fast=False)
    for row in range(len(texts)):
        [alone] = gradients(model, [texts[row]], fast=True)[0]
        error, allowed = (alone - together[row]).norm(), (together[row] - exact[row]).norm()
        assert float(error) <= 2 * float(allowed)


def test_windows() -> None:
    model = small_model("llama", torch.float32)
    texts = [Tokens("", small_texts((150,))[0].ids, 1, window=64)]
    fast, fast_loss = gradients(model, texts, fast=True)
    plain, plain_loss = gradients(model, texts, fast=False)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(fast_loss, plain_loss, atol=1e-5, rtol=0)


def test_sinks_get_the_model_s_number_format_unless_they_are_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "fast_bfloat16_cpu", lambda: False)
    model = small_model("llama", torch.bfloat16)
    for sink, dtype in ((Whole(), torch.bfloat16), (WideWhole(), torch.float32)):
        for _ in run_pass(model, linear_layers(model), sink, make_batches(small_texts(), 10**6), fast=True):
            assert {g.dtype for g in sink.gradients.values()} == {dtype}


def test_nan_stays_in_its_text() -> None:
    model, texts = small_model("llama", torch.float32), small_texts()
    with torch.no_grad():
        model.get_input_embeddings().weight[210] = torch.nan
        model.get_output_embeddings().weight[210] = 0.0
    texts = [Tokens("", [min(i, 209) for i in t.ids], 1) for t in texts]
    clean, _ = gradients(model, [t for i, t in enumerate(texts) if i != 1], fast=True)
    texts[1] = Tokens("", [*texts[1].ids[:9], 210, *texts[1].ids[10:]], 1)
    monkeyed, _ = gradients(model, texts, fast=True)
    assert torch.isfinite(monkeyed).all(1).tolist() == [True, False, True, True]
    torch.testing.assert_close(monkeyed[[0, 2, 3]], clean, atol=1e-6, rtol=1e-4)


def test_changed_weights_are_seen() -> None:
    model, texts = small_model("llama", torch.float32), small_texts()
    before, _ = gradients(model, texts)
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight.mul_(1.5)
    after, _ = gradients(model, texts)
    plain, _ = gradients(model, texts, fast=False)
    assert float((after - before).abs().max()) > 1e-4
    torch.testing.assert_close(after, plain, atol=1e-5, rtol=1e-3)


def test_weights_changed_behind_their_version_are_seen() -> None:
    """PEFT merges an adapter by writing to `.data`, which leaves the version as it was."""
    model, texts = small_model("llama", torch.float32), small_texts()
    size = len(pickle.dumps(model))
    before, _ = gradients(model, texts)
    weight = model.model.layers[1].self_attn.q_proj.weight
    known = llama._prepared[model][1]
    gradients(model, texts)
    assert llama._prepared[model][1] is known
    assert len(pickle.dumps(model)) < 1.1 * size  # what is copied or saved is the model alone
    version = weight._version
    weight.data += normal(5, *weight.shape) * 0.1
    assert weight._version == version
    after, _ = gradients(model, texts)
    plain, _ = gradients(model, texts, fast=False)
    assert float((after - before).abs().max()) > 1e-4
    torch.testing.assert_close(after, plain, atol=1e-5, rtol=1e-3)


def test_disagreement_is_told_and_switches_it_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, texts = small_model("llama", torch.float32), small_texts()
    real = llama._Mlp.through
    monkeypatch.setattr(llama._Mlp, "through", lambda self, g, gate_up: real(self, g, gate_up) * 1.5)
    found, _ = gradients(model, texts)
    plain, _ = gradients(model, texts, fast=False)
    assert "differs by" in caplog.text
    assert torch.equal(found, plain)
    with pytest.raises(ValueError, match="can't run: it disagrees"):
        gradients(model, texts, fast=True)


def test_what_it_cannot_do_is_refused() -> None:
    model = small_model("llama", torch.float32)
    layers = linear_layers(model)
    assert "none of" in llama.obstacle(
        transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=9)),
        {},
    )
    model.model.layers[0].register_forward_hook(lambda *_: None)
    assert "hooked" in llama.obstacle(model, layers)
    with pytest.raises(ValueError, match="can't run: something else has hooked"):
        GradientPass(model, layers, Whole(), fast=True)
    with pytest.raises(ValueError, match="can't run: it takes padded rows"):
        GradientPass(model, layers, Whole(), fast=True, packed=True)
    odd = transformers.LlamaConfig(**{**SMALL, "head_dim": 16})
    shared: Any = small_model("llama", torch.float32)
    shared.model.layers[1].mlp = shared.model.layers[0].mlp
    assert "share weights" in llama.obstacle(shared, {})
    assert "no multiple of 32" in llama.obstacle(transformers.LlamaForCausalLM(odd), {})
    windowed = transformers.MistralConfig(**SMALL, sliding_window=64)
    assert "sliding window" in llama.obstacle(transformers.MistralForCausalLM(windowed), {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_loss_is_as_accurate_as_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    small_model("llama", dtype)  # skips where there is no native softmax
    monkeypatch.setattr(ce_hidden_grad, "_has_instructions", lambda product: product == torch.bfloat16)
    h, weight = normal(0, 37, 16, dtype=dtype), normal(1, 211, 16, dtype=dtype)
    y = torch.randint(0, 211, (37,), generator=torch.Generator().manual_seed(0))
    weights = normal(2, 37).abs()

    def by_autograd(kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        x = h.to(kind, copy=True).requires_grad_()
        wide = torch.promote_types(kind, torch.float32)
        loss = torch.nn.functional.cross_entropy((x @ weight.to(kind).T).to(wide), y, reduction="none")
        return loss.detach(), torch.autograd.grad((loss * weights.to(wide)).sum(), x)[0]

    found = ce_hidden_grad.ce_hidden_grad_chunked(h, weight, y, weights)
    for ours, plain, exact in zip(found, by_autograd(dtype), by_autograd(torch.float64), strict=True):
        assert_as_accurate(ours, plain, exact)
    h[3] = torch.inf
    loss, grad = ce_hidden_grad.ce_hidden_grad_chunked(h, weight, y, weights)
    assert (
        torch.isfinite(loss).tolist() == torch.isfinite(grad).all(1).tolist() == [i != 3 for i in range(37)]
    )

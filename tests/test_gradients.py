"""Hooks against autograd's full gradients, per document, for several architectures."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from jz3.gradients import (
    GradientPass,
    Tokens,
    linear_layers,
    make_batches,
    run_pass,
    tokenize_query,
    tokenize_text,
)

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
}
MODELS = {
    "llama": transformers.LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2),
    "mistral": transformers.MistralConfig(**SMALL, intermediate_size=48, num_key_value_heads=2),
    "qwen2": transformers.Qwen2Config(**SMALL, intermediate_size=48, num_key_value_heads=2),
    "gpt2": transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96),
    "neox": transformers.GPTNeoXConfig(**SMALL, intermediate_size=48),
}


def random_model(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name], dtype=torch.float64)
    return model.eval()


def random_texts(count: int = 6, longest: int = 17) -> list[Tokens]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, longest, (count,), generator=generator).tolist()
    ids = [torch.randint(0, 96, (n,), generator=generator).tolist() for n in lengths]
    return [Tokens(f"{i:016x}", row, 1 + i % 2) for i, row in enumerate(ids)]


class Whole:
    """Forms every text's gradient of every layer."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def forward(self, name: str, a: torch.Tensor) -> torch.Tensor:
        return a

    def backward(self, name: str, kept: torch.Tensor, g: torch.Tensor) -> None:
        self.gradients[name] = g.transpose(1, 2) @ kept


def autograd_gradients(
    model: transformers.PreTrainedModel, text: Tokens, reduction: str
) -> tuple[dict[str, torch.Tensor], float]:
    """The full gradients of one text alone, by autograd through the weights, and its loss."""
    layers: dict[str, Any] = dict(linear_layers(model))
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    ids = torch.tensor([text.ids])
    logits = model(ids).logits[0, text.start - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, text.start :], reduction=reduction)
    grads = torch.autograd.grad(loss, [layer.weight for layer in layers.values()])
    conv = transformers.pytorch_utils.Conv1D
    return {
        name: grad.T if isinstance(layer, conv) else grad
        for (name, layer), grad in zip(layers.items(), grads, strict=True)
    }, float(loss.detach())


@pytest.mark.parametrize("name", MODELS)
def test_hooks_match_autograd(name: str) -> None:
    model, texts = random_model(name), random_texts()
    layers = linear_layers(model)
    expected = [autograd_gradients(model, text, "mean") for text in texts]
    sink = Whole()
    for batch, result in run_pass(model, layers, sink, make_batches(texts, 40)):
        for row, position in enumerate(batch.positions):
            full, loss = expected[position]
            assert float(result.loss[row]) == pytest.approx(loss, abs=1e-6)
            assert set(full) == set(sink.gradients)
            for layer, gradient in full.items():
                torch.testing.assert_close(sink.gradients[layer][row], gradient, atol=1e-7, rtol=1e-5)


def test_sum_is_mean_times_scored_tokens() -> None:
    model, texts = random_model("llama"), random_texts(3)
    layers = linear_layers(model)
    found = {}
    for reduction in ("mean", "sum"):
        sink = Whole()
        for batch, _ in run_pass(model, layers, sink, make_batches(texts, 10_000), reduction):
            found[reduction] = {n: g[batch.positions.index(0)] for n, g in sink.gradients.items()}
    scored = len(texts[0].ids) - texts[0].start
    for layer, gradient in found["sum"].items():
        torch.testing.assert_close(gradient, found["mean"][layer] * scored)


def test_text_does_not_depend_on_its_batch() -> None:
    model, texts = random_model("llama"), random_texts()
    layers = linear_layers(model)
    alone, together = Whole(), Whole()
    for _ in run_pass(model, layers, together, [b := make_batches(texts, 10_000)[0]]):
        pass
    for _ in run_pass(model, layers, alone, make_batches([texts[2]], 10_000)):
        pass
    row = b.positions.index(2)
    for layer in layers:
        torch.testing.assert_close(
            together.gradients[layer][row], alone.gradients[layer][0], atol=1e-10, rtol=1e-7
        )


def test_bad_text_does_not_spread() -> None:
    model, texts = random_model("llama"), random_texts()
    embeddings: Any = model.get_input_embeddings()
    output: Any = model.get_output_embeddings()
    with torch.no_grad():
        embeddings.weight[95] = torch.nan
        output.weight[95] = 0.0
    texts = [Tokens(t.id, [min(i, 94) for i in t.ids], t.start) for t in texts]
    texts[1] = Tokens(texts[1].id, [95, *texts[1].ids[1:]], 1)
    sink = Whole()
    [batch] = make_batches(texts, 10_000)
    with GradientPass(model, linear_layers(model), sink) as gradients:
        gradients.run(batch)
    for gradient in sink.gradients.values():
        finite = torch.isfinite(gradient).all(dim=(1, 2))
        assert [batch.positions[r] for r in range(len(texts)) if not finite[r]] == [1]


def test_batches_hold_every_text_once_within_budget() -> None:
    texts = random_texts(20)
    batches = make_batches(texts, 32)
    assert sorted(p for b in batches for p in b.positions) == list(range(20))
    assert all(b.ids.numel() <= 32 or len(b.positions) == 1 for b in batches)


def test_scored_tokens(tiny_model: Path) -> None:
    from jz3.models import load_tokenizer

    tokenizer = load_tokenizer(tiny_model)
    query = tokenize_query(tokenizer, "q", "What is 2+2?", "It is 4.", 100)
    assert tokenizer.decode(query.ids[: query.start]) == "What is 2+2?"
    assert query.ids[-1] == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="empty completion"):
        tokenize_query(tokenizer, "q", "What?", "", 100)
    with pytest.raises(ValueError, match="prompt alone"):
        tokenize_query(tokenizer, "q", "What is 2+2?" * 20, "4", 10)
    with pytest.raises(ValueError, match="at least 2"):
        tokenize_text(tokenizer, "t", "", 10)


def test_no_layer_left_is_told() -> None:
    with pytest.raises(ValueError, match="no linear layer"):
        linear_layers(random_model("llama"), lambda name: False)

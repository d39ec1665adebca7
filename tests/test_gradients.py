"""Hooks against autograd's full gradients, per document, for several architectures."""

import copy
import gc
import os
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from jz3 import backend
from jz3.errors import Jz3Error
from jz3.explain import token_values
from jz3.gradients import (
    GradientPass,
    Tokens,
    linear_layers,
    make_batches,
    run_pass,
)
from jz3.gradients.experts import ExpertLinear
from jz3.gradients.layers import check_output_layer, plain_model

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
    "mixtral": transformers.MixtralConfig(
        **SMALL, intermediate_size=24, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    ),
}


def random_model(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name], dtype=torch.float64)
    if name == "mixtral":
        # The default has no float64.
        model.set_experts_implementation("eager")
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
    # An expert's matrix is a part of a fused weight.
    fused = {n: layer._source for n, layer in layers.items() if isinstance(layer, ExpertLinear)}
    weights = {n: getattr(*fused[n][:2]) if n in fused else layer.weight for n, layer in layers.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    ids = torch.tensor([text.ids])
    logits = model(ids).logits[0, text.start - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, text.start :], reduction=reduction)
    grads = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    conv = transformers.pytorch_utils.Conv1D
    for name, layer in layers.items():
        if name in fused:
            grads[name] = grads[name][fused[name][2]]
        elif isinstance(layer, conv):
            grads[name] = grads[name].T
    return grads, float(loss.detach())


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_hooks_match_autograd(name: str, packed: bool) -> None:
    model, texts = random_model(name), random_texts()
    layers = linear_layers(model)
    expected = [autograd_gradients(model, text, "mean") for text in texts]
    sink = Whole()
    for batch, result in run_pass(model, layers, sink, make_batches(texts, 40), packed=packed):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_a_pass_leaves_no_cycles(name: str, dtype: torch.dtype) -> None:
    """What it held is free at once, so that giving memory back needs no search for cycles."""
    model: Any = random_model(name)
    model.to(dtype)
    batches = make_batches(random_texts(), 40)
    layers = linear_layers(model)
    gc.collect()
    gc.disable()
    try:
        for _ in run_pass(model, layers, Whole(), batches):
            pass
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert not [kept for kept in gc.garbage if isinstance(kept, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


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


def test_no_layer_left_is_told() -> None:
    with pytest.raises(ValueError, match="no linear layer"):
        linear_layers(random_model("llama"), lambda name: False)


def test_windows_of_a_long_text_add_up() -> None:
    model = random_model("llama")
    ids = torch.randint(0, 96, (21,), generator=torch.Generator().manual_seed(2)).tolist()
    parts = [Tokens("", part, 1) for part in (ids[:8], ids[7:15], ids[14:])]
    expected: dict[str, torch.Tensor] = {}
    total = 0.0
    for part in parts:
        full, loss = autograd_gradients(model, part, "sum")
        total += loss / 20
        for name, gradient in full.items():
            expected[name] = expected.get(name, torch.zeros(())) + gradient / 20
    layers = linear_layers(model)
    for packed in (False, True):
        sink = Whole()
        texts = [Tokens("long", ids, 1, window=8), *random_texts(2)]
        for batch, result in run_pass(model, layers, sink, make_batches(texts, 100), packed=packed):
            if batch.positions != [0]:
                continue
            assert batch.windowed and result.loss.shape == (1,) and result.hidden.shape == (1, 32)
            assert float(result.loss[0]) == pytest.approx(total, rel=1e-6)
            for name, gradient in expected.items():
                torch.testing.assert_close(sink.gradients[name][0], gradient, atol=1e-7, rtol=1e-5)


def lora_model(dora: bool = False, dropout: float = 0.0) -> Any:
    import peft

    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_dora=dora, lora_dropout=dropout
    )
    model = peft.get_peft_model(random_model("llama"), config).double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(3))
    return model


@pytest.mark.parametrize("dora", [False, True])
def test_adapters(dora: bool) -> None:
    model, texts = lora_model(dora), random_texts(4)
    layers = linear_layers(model)
    assert len(layers) == 8 and all(".lora_" in name for name in layers)
    everything = linear_layers(model, lora_only=False)
    assert len(everything) == 8 + 14 and set(layers) < set(everything)
    expected = [autograd_gradients(model, text, "mean")[0] for text in texts]
    sink = Whole()
    [batch] = make_batches(texts, 10_000)
    with GradientPass(model, layers, sink) as gradients:
        gradients.run(batch)
    for row, position in enumerate(batch.positions):
        for name in layers:
            torch.testing.assert_close(
                sink.gradients[name][row], expected[position][name], atol=1e-7, rtol=1e-5
            )


def test_what_else_adapters_train_is_named(caplog: pytest.LogCaptureFixture) -> None:
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    model: Any = peft.get_peft_model(random_model("llama"), config)
    model.add_adapter("other", config)
    layers = linear_layers(model)
    assert len(layers) == 4
    [record] = caplog.records
    assert record.message.startswith("3 weights are none of the adapters' linear layers and not covered: ")
    assert all(f"{n}.default" in record.message for n in ("lora_embedding_A", "lm_head.modules_to_save"))
    with GradientPass(model, layers, Whole()):
        pass


def test_uncovered_weights_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = random_model("mixtral")
    linear_layers(model)
    assert not caplog.records
    for module in model.modules():
        if hasattr(module, "has_bias"):
            setattr(module, "has_bias", True)  # noqa: B010
    layers = linear_layers(model)
    assert not any("experts." in name for name in layers)
    assert "not covered" in caplog.text and "experts.gate_up_proj" in caplog.text


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("shared", ["modules", "weights"])
def test_layers_that_run_several_times_have_one_gradient(shared: str, packed: bool) -> None:
    model, texts = random_model("llama"), random_texts(5)
    blocks: Any = model.model.layers
    if shared == "modules":
        blocks[1].mlp, blocks[1].self_attn.o_proj = blocks[0].mlp, blocks[0].self_attn.o_proj
    else:
        for name in ("mlp.up_proj", "self_attn.o_proj"):
            blocks[1].get_submodule(name).weight = blocks[0].get_submodule(name).weight
    layers = linear_layers(model)
    expected = [autograd_gradients(model, text, "mean")[0] for text in texts]
    for asked in (layers, {n: m for n, m in layers.items() if "layers.0." in n}):
        sink = Whole()
        for batch, _ in run_pass(model, asked, sink, make_batches(texts, 40), packed=packed):
            for row, position in enumerate(batch.positions):
                for layer, gradient in sink.gradients.items():
                    own = gradient[row], expected[position][layer]
                    torch.testing.assert_close(*own, atol=1e-7, rtol=1e-5)
        assert {n for n in asked if "layers.0." in n} <= set(sink.gradients)
    with pytest.raises(ValueError, match=r"layers\.0\..* don't run once for every token"):
        token_values(model, layers, texts[0], texts[1:])


def test_layers_that_see_a_choice_of_the_tokens_are_refused() -> None:
    model, texts = random_model("llama"), random_texts(3)

    class Chosen(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expert = torch.nn.Linear(32, 32).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = x.flatten(0, 1)
            mine = rows[:, 0] > rows[:, 0].median()
            return rows.masked_scatter(mine[:, None], self.expert(rows[mine])).view_as(x)

    model.model.layers[1].mlp = Chosen()
    for packed in (False, True):
        with (
            GradientPass(model, linear_layers(model), Whole(), packed=packed) as gradients,
            pytest.raises(ValueError, match=r"layers\.1\.mlp\.expert: it is given numbers of the shape"),
        ):
            gradients.run(make_batches(texts, 10_000)[0])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_pass_needs_no_gradients_around_it(context: Any) -> None:
    model, texts = random_model("llama"), random_texts(3)
    layers, batches = linear_layers(model), make_batches(texts, 10_000)
    expected, found = Whole(), Whole()
    [_] = run_pass(model, layers, expected, batches)
    with context():
        [_] = run_pass(model, layers, found, make_batches(texts, 10_000))
        assert not torch.is_grad_enabled()
    assert all(torch.equal(found.gradients[n], g) for n, g in expected.gradients.items())


def test_weights_of_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        model = random_model("llama")
    with pytest.raises(ValueError, match="made in inference mode.* outside of it"):
        GradientPass(model, linear_layers(model), Whole())


def test_texts_longer_than_what_positions_there_are_for_are_told() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=96, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    batches = make_batches([Tokens("long", list(range(20)), 1)], 100)
    with pytest.raises(
        ValueError, match=r"GPT2LMHeadModel has learned 16 positions, .* 20 tokens .* cut them at 16"
    ):
        list(run_pass(model, linear_layers(model), Whole(), batches))


def test_a_batch_that_memory_does_not_hold_is_told() -> None:
    model = random_model("llama")

    def forward(name: str, a: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore.")

    sink: Any = SimpleNamespace(forward=forward)
    batches = make_batches(random_texts(), 64)
    with pytest.raises(
        Jz3Error, match=rf"{batches[0].ids.numel()} tokens \(CUDA.*9 GiB\.\); lower batch_tokens"
    ):
        next(run_pass(model, linear_layers(model), sink, batches, fast=False))


def test_adapters_that_do_not_run_are_told() -> None:
    model = lora_model()
    layers, [batch] = linear_layers(model), make_batches(random_texts(3), 10_000)
    with (
        model.disable_adapter(),
        GradientPass(model, layers, Whole()) as gradients,
        pytest.raises(ValueError, match="none of the 8 layers of LlamaForCausalLM .* enabled and not merged"),
    ):
        gradients.run(batch)


def test_layers_that_take_no_part_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model, texts = random_model("mixtral"), random_texts(3)
    model.model.layers[1].self_attn.spare = torch.nn.Linear(4, 4).double()
    for _ in range(2):
        with GradientPass(model, linear_layers(model), Whole()) as gradients:
            for batch in make_batches(texts, 10_000):
                gradients.run(batch)
    [record] = [r for r in caplog.records if "took no part" in r.message]
    assert record.message.startswith("1 layers of MixtralForCausalLM took no part")
    assert record.message.endswith("model.layers.1.self_attn.spare")


def test_output_layer_with_a_bias_is_refused() -> None:
    model = transformers.PhiForCausalLM(transformers.PhiConfig(**SMALL, intermediate_size=48))
    assert model.lm_head.bias is not None
    with pytest.raises(ValueError, match=r"output layer has a bias \(PhiForCausalLM\)"):
        GradientPass(model, linear_layers(model), Whole())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_logits_than_the_output_layers_are_refused(dtype: torch.dtype) -> None:
    import peft

    model: Any = random_model("llama")
    model = model.to(dtype)
    with GradientPass(model, linear_layers(model), Whole()):
        pass
    # A fresh adapter doesn't change the logits yet.
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    with pytest.raises(ValueError, match="LlamaForCausalLM is not covered: its output layer has an adapter"):
        GradientPass(adapted, linear_layers(adapted), Whole())
    with adapted.disable_adapter(), GradientPass(adapted, linear_layers(adapted), Whole()):
        pass

    class Scaled(transformers.LlamaForCausalLM):
        def forward(self, *arguments: Any, **options: Any) -> Any:
            output: Any = super().forward(*arguments, **options)
            output.logits = output.logits * 0.5
            return output

    scaled: Any = Scaled(MODELS["llama"])
    scaled = scaled.to(dtype).eval()
    with pytest.raises(ValueError, match=r"Scaled is not covered: its logits differ by 0\.5"):
        GradientPass(scaled, linear_layers(scaled), Whole())


def test_logits_that_are_scaled_or_out_of_reach_are_refused() -> None:
    small: dict[str, Any] = {**SMALL, "intermediate_size": 48}
    scaled = random_model("llama")
    scaled.config = copy.deepcopy(scaled.config)
    scaled.config.lm_head_multiplier = 0.25
    with pytest.raises(ValueError, match="models that set lm_head_multiplier are not covered"):
        GradientPass(scaled, linear_layers(scaled), Whole())
    out_of_reach = transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(**small, head_dim=8, num_key_value_heads=2)
    )
    with pytest.raises(ValueError, match="its base model gives no last hidden states"):
        GradientPass(out_of_reach, linear_layers(out_of_reach), Whole())


def test_looking_at_the_output_layer_draws_no_random_numbers() -> None:
    model = lora_model(dropout=0.5).train()
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    check_output_layer(plain_model(model))
    assert torch.equal(torch.rand(3), wanted)


def test_adapter_without_a_wrapper_leaves_the_model_plain() -> None:
    import peft

    model: Any = random_model("llama")
    assert plain_model(peft.get_peft_model(random_model("llama"), peft.LoraConfig())) is not model
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)
    assert plain_model(model) is model


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_passes_that_are_open_together_do_not_mix(name: str, packed: bool) -> None:
    model, texts = random_model(name), random_texts()
    layers = linear_layers(model)
    first, second = make_batches(texts[:2], 100), make_batches(texts[2:], 100)
    expected = []
    for batches in (first, second):
        sink = Whole()
        [_] = run_pass(model, layers, sink, batches, packed=packed)
        expected.append(sink.gradients)
    one, other = Whole(), Whole()
    with (
        GradientPass(model, layers, one, packed=packed) as a,
        GradientPass(model, layers, other, packed=packed) as b,
    ):
        a.run(first[0])
        b.run(second[0])
        model(torch.tensor([[1, 2, 3]]))
    for sink, alone in zip((one, other), expected, strict=True):
        assert alone and set(sink.gradients) == set(alone)
        assert all(torch.equal(sink.gradients[n], g) for n, g in alone.items())


def test_freed_memory_stays_while_a_pass_is_open() -> None:
    if backend.extension_missing() or platform.libc_ver()[0] != "glibc":
        pytest.skip("the allocator is left alone here")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    model, sink = random_model("llama"), Whole()
    size = 1 << 27
    with GradientPass(model, linear_layers(model), sink), GradientPass(model, linear_layers(model), sink):
        pass
    with GradientPass(model, linear_layers(model), sink):
        before = resident()
        torch.ones(size // 4)
        held = resident()
    assert held - before > size // 2 and held - resident() > size // 2

"""LESS features against a slow implementation of its own: autograd, Adam's formula, the sign matrix."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gradients import random_model, random_texts

from jz3.errors import Jz3Error
from jz3.features.extract import extract
from jz3.features.less import AdamDirection, Less
from jz3.features.lora import PARTS, Checkpoint, LoraAdapters, LoraShape, WarmUp, learning_rates, warm_up
from jz3.gradients import Tokens
from jz3.ops.signs import signs

SHAPE = LoraShape(rank=3, alpha=12.0, dropout=0.0)
WARM = WarmUp(share=0.5, epochs=2, learning_rate=1e-2, batch_texts=4, warmup=0.25)
K = 64


def slow_gradients(model: Any, checkpoint: Checkpoint, text: Tokens) -> dict[str, torch.Tensor]:
    """Adapter gradients of one text: the adapted weights are formed whole and autograd does the rest."""
    leaves = {n: w.double().clone().requires_grad_(True) for n, w in checkpoint.weights.items()}
    scale = checkpoint.shape.alpha / checkpoint.shape.rank
    replaced = {}
    for name in {n.rpartition(".")[0] for n in leaves}:
        base = model.get_submodule(name).weight.detach().double()
        replaced[f"{name}.weight"] = base + scale * leaves[f"{name}.lora_B"] @ leaves[f"{name}.lora_A"]
    ids = torch.tensor([text.ids])
    logits = torch.func.functional_call(model, replaced, (ids,)).logits[0, text.start - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, text.start :])
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def slow_feature(model: Any, less: Less, text: Tokens, adam: bool) -> torch.Tensor:
    """LESS's recipe for one text, step by step."""
    parts = []
    checkpoints = [Checkpoint.load(p, "m") for p in less.checkpoints]
    total = sum(c.learning_rate for c in checkpoints)
    d = less.direction
    for checkpoint in checkpoints:
        projected = torch.zeros(less.k_each, dtype=torch.float64)
        for name, g in slow_gradients(model, checkpoint, text).items():
            if adam:
                m = d.beta1 * checkpoint.parts["exp_avg"][name].double() + (1 - d.beta1) * g
                v = d.beta2 * checkpoint.parts["exp_avg_sq"][name].double() + (1 - d.beta2) * g**2
                if d.bias_correction:
                    m = m / (1 - d.beta1 ** (checkpoint.step + 1))
                    v = v / (1 - d.beta2 ** (checkpoint.step + 1))
                g = m / torch.sqrt(v + d.eps) if d.eps_inside else m / (torch.sqrt(v) + d.eps)
            omega = signs(less.seed, name, less.k_each, g.numel()).double() / less.k_each**0.5
            projected += omega @ g.flatten()
        parts.append(projected / projected.norm() * (checkpoint.learning_rate / total) ** 0.5)
    return torch.cat(parts)


@pytest.fixture(scope="module")
def warmed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, tuple[Path, ...]]:
    model = random_model("llama")
    folder = tmp_path_factory.mktemp("less")
    return model, warm_up(model, "m", random_texts(16), folder, shape=SHAPE, settings=WARM)


@pytest.mark.parametrize("eps_inside", [True, False])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_parity_with_the_recipe(warmed: Any, eps_inside: bool, bias_correction: bool) -> None:
    model, paths = warmed
    texts = random_texts(5)
    direction = AdamDirection(eps_inside=eps_inside, bias_correction=bias_correction)
    less = Less("m", paths, K, 7, direction)
    for side in ("document", "query"):
        found = extract(model, {}, texts, less, side=side, batch_tokens=40).values
        expected = torch.stack([slow_feature(model, less, t, side == "document") for t in texts])
        torch.testing.assert_close(found, expected.float(), atol=2e-5, rtol=0)
    documents = extract(model, {}, texts, less, side="document").values
    queries = extract(model, {}, texts, less, side="query").values
    assert float((documents - queries).abs().max()) > 0.05


def test_the_conventions_differ(warmed: Any) -> None:
    model, paths = warmed
    texts = random_texts(3)
    kinds = [AdamDirection(eps_inside=i, bias_correction=b) for i in (True, False) for b in (True, False)]
    values = [extract(model, {}, texts, Less("m", paths, K, 7, d)).values for d in kinds]
    for number, one in enumerate(values):
        for other in values[number + 1 :]:
            assert float((one - other).abs().max()) > 1e-3


def test_scores_are_cosines_weighted_by_learning_rate(warmed: Any) -> None:
    model, paths = warmed
    texts = random_texts(4)
    rates = [Checkpoint.load(p, "m").learning_rate for p in paths]
    assert rates[0] != rates[1]
    both = Less("m", paths, K)
    score = extract(model, {}, texts, both).values @ extract(model, {}, texts, both, side="query").values.T
    expected = torch.zeros(4, 4)
    for rate, path in zip(rates, paths, strict=True):
        one = Less("m", (path,), K)
        cosine = extract(model, {}, texts, one).values @ extract(model, {}, texts, one, side="query").values.T
        assert float(cosine.abs().max()) <= 1.0001
        expected += rate / sum(rates) * cosine
    torch.testing.assert_close(score, expected, atol=1e-6, rtol=1e-5)


def test_moments_go_to_the_device_once(warmed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many batches there are: of large models they take as long as a batch does."""
    model, paths = warmed
    asked: list[str] = []
    monkeypatch.setattr(
        Checkpoint, "moments", lambda self, n: asked.append(n) or tuple(self.parts[p][n] for p in PARTS[1:])
    )
    extract(model, {}, random_texts(6), Less("m", paths[:1], K), batch_tokens=1)
    assert len(asked) == len(set(asked)) > 0


def test_warm_up_is_adamw_on_mean_losses(tmp_path: Path) -> None:
    """One step against the formula, from the gradients of the slow implementation."""
    model, texts = random_model("llama"), random_texts(8)
    settings = WarmUp(share=0.5, epochs=1, learning_rate=1e-2, batch_texts=4, warmup=0.0)
    [path] = warm_up(model, "m", texts, tmp_path, shape=SHAPE, settings=settings, seed=3)
    after = Checkpoint.load(path, "m")
    with LoraAdapters(model, SHAPE, seed=3) as fresh:
        start = {n: layer.state_dict()["weight"].clone() for n, layer in fresh.layers.items()}
    from jz3.seeding import rng

    part = [texts[i] for i in rng(3, "warm-up", "sample").permutation(8)[:4]]
    before = Checkpoint("m", SHAPE, 0, 0.0, {p: start for p in ("weight", "exp_avg", "exp_avg_sq")})
    gradients = [slow_gradients(model, before, t) for t in part]
    assert after.step == 1 and after.learning_rate == pytest.approx(1e-2)
    for name, weight in start.items():
        g = torch.stack([x[name] for x in gradients]).mean(0)
        torch.testing.assert_close(after.parts["exp_avg"][name].double(), 0.1 * g, atol=1e-7, rtol=1e-4)
        torch.testing.assert_close(
            after.parts["exp_avg_sq"][name].double(), 1e-3 * g**2, atol=1e-9, rtol=1e-3
        )
        sure = g.abs() > 1e-5
        step = 1e-2 * g / (g.abs() + 1e-8)
        moved = (weight - after.weights[name]).double()
        torch.testing.assert_close(moved[sure], step[sure], atol=1e-5, rtol=1e-3)


def test_layers_with_one_input_widen_it_once() -> None:
    """A gradient pass keeps every adapter's input: of a 7B model's q, k and v alone gigabytes."""
    model = random_model("llama").bfloat16()
    with LoraAdapters(model, SHAPE, seed=3) as adapters, torch.no_grad():
        seen: dict[str, torch.Tensor] = {}
        for name, layer in adapters.layers.items():
            layer.register_forward_hook(lambda _, inputs, __, name=name: seen.update({name: inputs[0]}))
        model(torch.tensor([[1, 2, 3]]))
    inputs = [seen[f"model.layers.1.self_attn.{x}_proj.lora_A"] for x in "qkvo"]
    assert len({x.data_ptr() for x in inputs}) == 2 and inputs[0].dtype == torch.float32


def test_warm_up_goes_on_after_the_last_epoch_and_leaves_the_model_alone(tmp_path: Path) -> None:
    model, texts = random_model("llama"), random_texts(16)
    shape = LoraShape(rank=3, alpha=12.0, dropout=0.3)
    ids = torch.tensor([texts[0].ids])
    with torch.no_grad():
        logits = model(ids).logits
    one = warm_up(model, "m", texts, tmp_path / "a", shape=shape, settings=WARM)
    two = warm_up(model, "m", texts, tmp_path / "b", shape=shape, settings=WARM)
    two[1].unlink()
    again = warm_up(model, "m", texts, tmp_path / "b", shape=shape, settings=WARM)
    assert one[1].read_bytes() == again[1].read_bytes()
    plain = warm_up(model, "m", texts, tmp_path / "c", shape=SHAPE, settings=WARM)
    assert one[1].read_bytes() != plain[1].read_bytes()
    with torch.no_grad():
        assert torch.equal(logits, model(ids).logits)


def test_finished_warm_up_of_another_kind_is_refused(warmed: Any) -> None:
    model, paths = warmed
    folder, texts = paths[0].parent, random_texts(16)
    assert warm_up(model, "m", texts, folder, shape=SHAPE, settings=WARM) == paths
    with pytest.raises(Jz3Error, match="this model is another"):
        warm_up(model, "another", texts, folder, shape=SHAPE, settings=WARM)
    with pytest.raises(Jz3Error, match="rank=5"):
        warm_up(model, "m", texts, folder, shape=dataclasses.replace(SHAPE, rank=5), settings=WARM)
    with pytest.raises(Jz3Error, match="after 2 steps, asked for are"):
        warm_up(model, "m", texts + texts, folder, shape=SHAPE, settings=WARM)


def test_learning_rates() -> None:
    rates = learning_rates(WarmUp(learning_rate=1.0, warmup=0.25), 8)
    assert rates == pytest.approx([0.0, 0.5, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert learning_rates(WarmUp(learning_rate=1.0), 1) == [1.0]


def test_foreign_moments_are_refused(warmed: Any, tmp_path: Path) -> None:
    model, paths = warmed
    with pytest.raises(Jz3Error, match="trained on model m"):
        Checkpoint.load(paths[0], "other")
    checkpoint = Checkpoint.load(paths[0], "m")
    name = next(iter(checkpoint.weights))
    swapped = {**checkpoint.parts["exp_avg"], name: checkpoint.parts["exp_avg"][name].T.contiguous()}
    with pytest.raises(Jz3Error, match=r"exp_avg of .* has the shape"):
        Checkpoint("m", SHAPE, 1, 1.0, {**checkpoint.parts, "exp_avg": swapped})
    fewer = {n: t for n, t in checkpoint.parts["exp_avg_sq"].items() if n != name}
    with pytest.raises(Jz3Error, match="1 adapters are missing"):
        Checkpoint("m", SHAPE, 1, 1.0, {**checkpoint.parts, "exp_avg_sq": fewer})
    with pytest.raises(Jz3Error, match="has the shape"):
        LoraAdapters(model, LoraShape(rank=2), checkpoint.weights)
    with pytest.raises(Jz3Error, match="are foreign"):
        LoraAdapters(model, LoraShape(rank=3, targets=("q_proj",)), checkpoint.weights)
    with pytest.raises(ValueError, match="no layer is called nothing"):
        LoraAdapters(model, LoraShape(targets=("nothing",)))


def test_saved_and_refused(warmed: Any, tmp_path: Path) -> None:
    model, paths = warmed
    files = []
    for path in paths:
        files.append(tmp_path / "checkpoints" / path.name)
        files[-1].parent.mkdir(exist_ok=True)
        files[-1].write_bytes(path.read_bytes())
    less = Less("m", tuple(files), K, 3, AdamDirection(eps_inside=False))
    less.save(tmp_path / "less.json")
    assert Less.load(tmp_path / "less.json", "m") == less
    with pytest.raises(Jz3Error, match="made for model m"):
        Less.load(tmp_path / "less.json", "other")
    files[0].write_bytes(b"changed")
    with pytest.raises(Jz3Error, match="not the checkpoint"):
        Less.load(tmp_path / "less.json", "m")


def test_unknown_side_is_told(warmed: Any) -> None:
    model, paths = warmed
    with pytest.raises(ValueError, match="side must be one of document, query"):
        extract(model, {}, random_texts(1), Less("m", paths, K), side="corpus")

"""Low-rank adapters beside a frozen model's layers, and the short training that warms them up for LESS.

A layer with output W x gets W x + (alpha / r) B A x. The adapters hang on forward hooks, so that the
model itself is never changed and is as before when they are taken off.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jz3.errors import Jz3Error
from jz3.files import read_tensors, write_tensors
from jz3.gradients import GradientPass, Tokens, layer_shape, linear_layers, make_batches
from jz3.gradients.layers import plain_model, uncompiled
from jz3.ops.checks import check_int
from jz3.seeding import rng, seed_for

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FORMAT = "jz3-less-checkpoint-1"
PARTS = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraShape:
    """Which layers get adapters, and of what size."""

    rank: int = 128
    alpha: float = 512.0
    """B A is scaled by alpha / rank."""
    dropout: float = 0.1
    """Of the adapters' input, in the warm-up only."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Last parts of the layers' names, or `all-linear` alone."""

    def __post_init__(self) -> None:
        # As PEFT takes them: one name, or a list of names.
        targets = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        object.__setattr__(self, "targets", targets)
        object.__setattr__(self, "rank", check_int("LoraShape", "rank", self.rank, 1, 1 << 30))
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"LoraShape: alpha must be above 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoraShape: dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmUp:
    """The warm-up training; the defaults are LESS's."""

    share: float = 0.05
    """Of the texts, drawn at random."""
    epochs: int = 4
    """Each leaves a checkpoint."""
    learning_rate: float = 2e-5
    """The highest; it rises linearly over `warmup` and falls linearly to zero."""
    warmup: float = 0.03
    batch_texts: int = 128
    """Texts per step; a step's loss is the mean of its texts' mean losses."""
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_texts"):
            number = check_int("WarmUp", name, getattr(self, name), 1, 1 << 30)
            object.__setattr__(self, name, number)
        if not 0 < self.share <= 1:
            raise ValueError(f"WarmUp: share must be in (0, 1], got {self.share}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"WarmUp: learning_rate must be above 0, got {self.learning_rate}")


def adapter_sizes(model: "PreTrainedModel", shape: LoraShape) -> dict[str, tuple[int, int]]:
    """Return the adapters' names (`<layer>.lora_A`, `<layer>.lora_B`) and sizes (rows, columns) in the model's order.

    Raises:
        ValueError: no layer has one of the targets' names, or the model is PEFT's.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    if plain_model(model) is not uncompiled(model):
        raise ValueError(
            "model must be without adapters, as these are hung on it; give model.unload() of it, or "
            "model.merge_and_unload()"
        )
    every = {n: m for n, m in linear_layers(model).items() if isinstance(m, (torch.nn.Linear, Conv1D))}
    wanted = None if shape.targets == ("all-linear",) else set(shape.targets)
    chosen = {n: m for n, m in every.items() if wanted is None or n.rpartition(".")[2] in wanted}
    if not chosen:
        known = sorted({n.rpartition(".")[2] for n in every})
        raise ValueError(
            f"no layer is called {' or '.join(shape.targets)}; this model has {', '.join(known)}"
        )
    sizes = {}
    for name, layer in chosen.items():
        outputs, inputs = layer_shape(layer)
        sizes[f"{name}.lora_A"], sizes[f"{name}.lora_B"] = (shape.rank, inputs), (outputs, shape.rank)
    return sizes


class LoraAdapters:
    """Adapters hanging on a model, trained ones or fresh ones (B = 0, so that nothing changes)."""

    def __init__(
        self,
        model: "PreTrainedModel",
        shape: LoraShape,
        weights: "dict[str, torch.Tensor] | None" = None,
        *,
        seed: int = 0,
    ) -> None:
        """Hang the adapters on the model; leaving the `with` block takes them off.

        Args:
            model: a causal language model.
            shape: which layers, what size.
            weights: per adapter layer its weight; drawn from `seed` if None.
            seed: of fresh adapters.

        Raises:
            ValueError: no layer has one of the targets' names.
            Jz3Error: `weights` misses an adapter of this model, holds a foreign one, or one of
                another shape.
        """
        import torch

        sizes = adapter_sizes(model, shape)
        self.layers: dict[str, torch.nn.Module] = {}
        """Adapter layers (`<layer>.lora_A`, `<layer>.lora_B`), for a GradientPass."""
        self.dropout = 0.0
        self._hooks: list[Any] = []
        self._wide: Any = (None, None)
        if weights is not None:
            check_names("weight", weights, sizes)
        device = next(model.parameters()).device
        for name, size in sizes.items():
            # Without its own start, which would be drawn from the caller's random numbers.
            adapter: Any = torch.nn.utils.skip_init(
                torch.nn.Linear, size[1], size[0], bias=False, dtype=torch.float32
            )
            with torch.no_grad():
                if weights is not None:
                    adapter.weight.copy_(weights[name])
                elif name.endswith("lora_B"):
                    adapter.weight.zero_()
                else:
                    draw = rng(seed, "lora", name).uniform(-1, 1, size) / math.sqrt(size[1])
                    adapter.weight.copy_(torch.from_numpy(draw))
            self.layers[name] = adapter.to(device).requires_grad_(False)
        for name in dict.fromkeys(n.rpartition(".")[0] for n in sizes):
            layer = model.get_submodule(name)
            self._hooks.append(layer.register_forward_hook(self._hook(name, shape.alpha / shape.rank)))

    def _hook(self, name: str, scale: float) -> Callable[..., Any]:
        import torch

        first: Any = self.layers[f"{name}.lora_A"]
        second: Any = self.layers[f"{name}.lora_B"]

        def hook(_layer: Any, inputs: tuple[Any, ...], output: Any) -> Any:
            if self._wide[0] is not inputs[0]:
                # Once for q, k and v: a gradient pass keeps it.
                self._wide = inputs[0], inputs[0].to(first.weight.dtype)
            x = self._wide[1]
            if self.dropout:
                x = torch.nn.functional.dropout(x, self.dropout)
            return output + (second(first(x)) * scale).to(output.dtype)

        return hook

    def __enter__(self) -> "LoraAdapters":
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._wide = (None, None)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Adapters with their optimiser's moments, all by the adapters' names."""

    model_hash: str
    shape: LoraShape
    step: int
    """Optimiser steps done."""
    learning_rate: float
    """Mean over the epoch that ends here: the checkpoint's weight."""
    parts: "dict[str, dict[str, torch.Tensor]]"
    """`weight`, `exp_avg`, `exp_avg_sq`: adapter's name to float32 tensor."""

    def __post_init__(self) -> None:
        sizes = {name: tuple(t.shape) for name, t in self.parts["weight"].items()}
        for part in PARTS[1:]:
            check_names(part, self.parts[part], sizes)

    @property
    def weights(self) -> "dict[str, torch.Tensor]":
        """Adapter's name to weight."""
        return self.parts["weight"]

    def moments(self, name: str) -> "tuple[torch.Tensor, torch.Tensor]":
        """Return (exp_avg, exp_avg_sq) of an adapter."""
        return self.parts["exp_avg"][name], self.parts["exp_avg_sq"][name]

    def save(self, path: Path) -> None:
        """Write everything to one safetensors file."""
        tensors = {f"{part}/{n}": t.contiguous() for part in PARTS for n, t in self.parts[part].items()}
        about = {
            "format": FORMAT,
            "model_hash": self.model_hash,
            "shape": asdict(self.shape),
            "step": self.step,
            "learning_rate": self.learning_rate,
        }
        write_tensors(path, tensors, about)

    @classmethod
    def load(cls, path: Path, model_hash: str) -> "Checkpoint":
        """Read a checkpoint and refuse one of another model."""
        tensors, about = read_tensors(path, FORMAT, "warm up again")
        if about["model_hash"] != model_hash:
            raise Jz3Error(f"{path} was trained on model {about['model_hash']}, this model is {model_hash}")
        shape = about["shape"]
        shape["targets"] = tuple(shape["targets"])
        parts: dict[str, dict[str, torch.Tensor]] = {part: {} for part in PARTS}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        return cls(model_hash, LoraShape(**shape), about["step"], about["learning_rate"], parts)


def check_names(what: str, found: "dict[str, torch.Tensor]", sizes: dict[str, tuple[int, ...]]) -> None:
    """Refuse tensors whose names or shapes are not those of the adapters.

    Raises:
        Jz3Error: one is missing, foreign or of another shape; it is named.
    """
    missing, foreign = sorted(sizes.keys() - found.keys()), sorted(found.keys() - sizes.keys())
    if missing or foreign:
        raise Jz3Error(
            f"{what}: {len(missing)} adapters are missing ({', '.join(missing[:2])}), {len(foreign)} are "
            f"foreign ({', '.join(foreign[:2])}); take the checkpoint of this model and these target layers"
        )
    for name, size in sizes.items():
        if tuple(found[name].shape) != tuple(size):
            raise Jz3Error(f"{what} of {name} has the shape {tuple(found[name].shape)}, expected {size}")


def warm_up(
    model: "PreTrainedModel",
    model_hash: str,
    texts: Sequence[Tokens],
    folder: Path,
    *,
    shape: LoraShape | None = None,
    settings: WarmUp | None = None,
    batch_tokens: int = 2048,
    seed: int = 0,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[Path, ...]:
    """Train fresh adapters on a random part of the texts and leave a checkpoint per epoch.

    AdamW on the mean over a step's texts of their mean losses. Checkpoints that are there are kept:
    a killed warm-up goes on after its last whole epoch.

    Args:
        model: frozen, in evaluation mode (its own dropout stays off).
        model_hash: identifies the model in the checkpoints.
        texts: what to draw the part from.
        folder: of the checkpoints, `epoch-1.safetensors` and so on.
        shape: of the adapters.
        settings: of the training.
        batch_tokens: padded tokens per forward and backward pass.
        seed: of the draw, the order, the adapters' start and the dropout.
        advance: called with the number of texts just done.

    Returns:
        The checkpoints, first epoch first.

    Raises:
        ValueError: there is no text.
        Jz3Error: the loss is no number, or a checkpoint in `folder` is of another model, of adapters of
            another shape or of another number of steps.
    """
    import torch

    shape, settings = shape or LoraShape(), settings or WarmUp()
    if not texts:
        raise ValueError("the warm-up needs at least one text")
    count = max(1, round(settings.share * len(texts)))
    part = [texts[i] for i in rng(seed, "warm-up", "sample").permutation(len(texts))[:count]]
    per_epoch = math.ceil(count / settings.batch_texts)
    rates = learning_rates(settings, per_epoch * settings.epochs)
    paths = tuple(folder / f"epoch-{e + 1}.safetensors" for e in range(settings.epochs))
    done = next((e for e, path in enumerate(paths) if not path.exists()), len(paths))
    last = None
    for epoch, path in enumerate(paths[:done]):
        last = Checkpoint.load(path, model_hash)
        if (last.shape, last.step) != (shape, (epoch + 1) * per_epoch):
            raise Jz3Error(
                f"{path} holds {last.shape} after {last.step} steps, asked for are {shape} after "
                f"{(epoch + 1) * per_epoch}; delete {folder} to warm up again"
            )
    advance(done * count)
    if done == len(paths):
        return paths
    with LoraAdapters(model, shape, last and last.weights, seed=seed) as adapters:
        adapters.dropout = shape.dropout
        parameters: dict[str, Any] = {n: a.weight.requires_grad_(True) for n, a in adapters.layers.items()}
        optimiser = torch.optim.AdamW(
            list(parameters.values()),
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )
        if last is not None:
            for name, weight in parameters.items():
                first, second = (x.to(weight.device) for x in last.moments(name))
                optimiser.state[weight] = {
                    "step": torch.tensor(float(last.step), dtype=torch.float32),
                    "exp_avg": first,
                    "exp_avg_sq": second,
                }
        for epoch in range(done, settings.epochs):
            order = rng(seed, "warm-up", "order", epoch).permutation(count)
            for number in range(per_epoch):
                step = epoch * per_epoch + number
                chosen = order[number * settings.batch_texts : (number + 1) * settings.batch_texts]
                optimiser.param_groups[0]["lr"] = rates[step]
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed_for(seed, "warm-up", "dropout", step) >> 1)
                    _backward(model, [part[i] for i in chosen], batch_tokens, step)
                for weight in parameters.values():
                    weight.grad /= len(chosen)
                optimiser.step()
                optimiser.zero_grad()
                advance(len(chosen))
            state = {n: optimiser.state[w] for n, w in parameters.items()}
            Checkpoint(
                model_hash,
                shape,
                (epoch + 1) * per_epoch,
                sum(rates[epoch * per_epoch : (epoch + 1) * per_epoch]) / per_epoch,
                {
                    "weight": {n: w.detach().cpu() for n, w in parameters.items()},
                    "exp_avg": {n: s["exp_avg"].cpu() for n, s in state.items()},
                    "exp_avg_sq": {n: s["exp_avg_sq"].cpu() for n, s in state.items()},
                },
            ).save(paths[epoch])
    return paths


def learning_rates(settings: WarmUp, steps: int) -> list[float]:
    """Return each step's learning rate: up over the first `warmup` (rounded up, but not all), then down to zero."""
    rise = min(math.ceil(settings.warmup * steps), steps - 1)
    return [
        settings.learning_rate
        * (step / rise if step < rise else max(0.0, (steps - step) / max(1, steps - rise)))
        for step in range(steps)
    ]


def _backward(model: "PreTrainedModel", texts: Sequence[Tokens], batch_tokens: int, step: int) -> None:
    """Add the gradients of the texts' mean losses to the adapters' `grad`."""
    import torch

    with GradientPass(model, {}, NoSink(), "mean", fast=False) as gradients:
        for batch in make_batches(texts, batch_tokens):
            loss = gradients.run(batch).loss
            if not bool(torch.isfinite(loss).all()):
                raise Jz3Error(
                    f"step {step}: the loss of a warm-up text is {loss.tolist()}; lower the learning rate"
                )


class NoSink:
    """Takes nothing: of a GradientPass without layers."""

    def forward(self, name: str, a: "torch.Tensor") -> Any:
        raise AssertionError(name)

    def backward(self, name: str, kept: Any, g: "torch.Tensor") -> None:
        raise AssertionError(name)

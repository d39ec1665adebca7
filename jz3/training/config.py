"""Settings of the two training stages."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jz3.machine import fast_bfloat16

if TYPE_CHECKING:
    from typing_extensions import Self

    from jz3.models import ModelConfig

METHODS = ("full", "lora")
PRECISIONS = ("auto", "mixed", "float32")
SCHEDULES = ("wsd", "cosine", "constant")
DECAYS = ("linear", "cosine", "1-sqrt")
OVERLONG = ("split", "reject")
PACKINGS = ("best_fit", "even")
BOOSTS = ("continue", "retrain")
HOW = ("launch", "save_every", "packs_at_once", "gradient_checkpointing")
"""Settings that the trained weights depend on by rounding at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """How a model is trained; shared by both stages and by the comparison of selections."""

    method: str = "full"
    """`full` (every weight) or `lora` (low-rank adapters, merged into the weights at the end)."""
    lora_rank: int = 16
    lora_alpha: float = 32.0
    """The adapters' product is scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Names of the modules that get adapters, or `all-linear` (all but the output layer)."""
    precision: str = "auto"
    """`mixed`: matrix products in bfloat16, trained weights and optimiser in float32 (a step of a
    small learning rate is smaller than bfloat16's spacing and would be lost); frozen weights stay in
    bfloat16. `float32`: everything in float32. `auto`: `mixed` where bfloat16 is the faster, settled
    when a run is made."""
    learning_rate: float = 1e-5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    schedule: str = "wsd"
    """Learning rate after warm-up: `wsd` (constant, then decay), `cosine` or `constant`."""
    warmup: float = 0.03
    """Share of the steps with rising learning rate (rounded down)."""
    stable_until: float = 0.85
    """`wsd`: share of the steps after which the decay begins."""
    decay: str = "linear"
    """`wsd`: `linear`, `cosine` or `1-sqrt`."""
    min_lr_ratio: float = 0.1
    """`wsd` and `cosine`: the lowest learning rate, as a share of the highest."""
    epochs: int = 1
    """How often each phase is read before the next one begins; shuffled and packed afresh each time."""
    max_tokens: int = 0
    """Stop before the first text that would exceed so many tokens (`even`: within it); 0: no limit."""
    max_length: int = 2048
    """Tokens in a pack, and so in a text."""
    overlong: str = "split"
    """A text longer than max_length is cut into pieces (`split`) or left out (`reject`)."""
    packing: str = "best_fit"
    """`best_fit`: texts stay whole, packs are nearly full; `even`: texts are cut where a pack or max_tokens
    ends, so that every training on as many tokens takes as many steps."""
    batch_packs: int = 512
    """Packs per step over all processes and accumulation steps."""
    packs_at_once: int = 1
    """Packs that one process takes through the model at a time."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    save_every: int = 100
    """Steps between checkpoints for resuming; 0: none."""
    launch: tuple[str, ...] = ()
    """Words of a launcher that starts one process per GPU, e.g. ["torchrun", "--nproc_per_node=8"];
    empty: train in this process."""

    def __post_init__(self) -> None:
        choices = {
            "method": METHODS,
            "precision": PRECISIONS,
            "schedule": SCHEDULES,
            "decay": DECAYS,
            "overlong": OVERLONG,
            "packing": PACKINGS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("lora_rank", "epochs", "batch_packs", "packs_at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_tokens", "save_every", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("warmup", "stable_until", "min_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.stable_until < self.warmup:
            raise ValueError(f"stable_until ({self.stable_until}) must not be below warmup ({self.warmup})")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must lie in [0, 1), got {self.lora_dropout}")
        for name in ("learning_rate", "lora_alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}")

    def settled(self) -> "Self":
        """Return the settings with `auto` replaced by the precision that this machine is faster in."""
        if self.precision != "auto":
            return self
        return replace(self, precision="mixed" if fast_bfloat16() else "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSettings(TrainSettings):
    """How a stage of the loop trains, and from which model on."""

    base: str = ""
    """The model that is trained, a folder or a name on the Hugging Face hub; empty: the run's, whose
    gradients choose the texts."""
    base_revision: str = ""
    """Branch, tag or commit of `base`."""

    def __post_init__(self) -> None:
        TrainSettings.__post_init__(self)
        if self.base_revision and not self.base:
            raise ValueError(f"base_revision {self.base_revision!r} needs base, the model that it is of")

    def start(self, model: "ModelConfig") -> "ModelConfig":
        """Return the model that is trained in a run with this one."""
        return replace(model, name=self.base, revision=self.base_revision) if self.base else model


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthesiserConfig(StageSettings):
    """Training of the small model that writes problems.

    Source:
        arXiv 2405.14365, script sh/synthesis/train.sh: full fine-tuning, 1e-5 with cosine and no
        warm-up, weight decay 0.1, 5 epochs of 5.3k + 4k rows, 32 rows a step (here 16 packs, about 28 rows).
    """

    boost: str = "continue"
    """`continue`: the random texts' problems first, then those of the selected texts, in one run;
    `retrain`: all of them shuffled together."""
    weight_decay: float = 0.1
    schedule: str = "cosine"
    warmup: float = 0.0
    min_lr_ratio: float = 0.0
    epochs: int = 5
    batch_packs: int = 16

    def __post_init__(self) -> None:
        StageSettings.__post_init__(self)
        if self.boost not in BOOSTS:
            raise ValueError(f"boost must be one of {', '.join(BOOSTS)}, got {self.boost!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig(StageSettings):
    """The two-stage mixture on the base model: synthetic problems, then instruction data.

    Source:
        arXiv 2405.14365, script sh/train/train.sh: 1e-5, WSD with 3% warm-up, stable to 85%, linear
        decay to a tenth, weight decay 0, 512 packs of 2,048 tokens a step, one epoch.
    """

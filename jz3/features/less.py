"""`less` features: Adam's step on low-rank adapters, as LESS and JiuZhang3.0 measure influence.

A warm-up training of adapters on a small random part of the texts gives checkpoints c with the
moments m, v of every adapter weight. With a text's own gradient g,

    m' = b1 m + (1 - b1) g      v' = b2 v + (1 - b2) g^2      Gamma = m' / sqrt(v' + eps)

is what a document adds to the weights; a query is its plain gradient g. Both are projected by one
random sign matrix to k numbers and divided by their length; the score is the mean of the checkpoints'
cosines, weighted by learning rate.

Source: LESS (arXiv 2402.04333), sections 3 and 4; code princeton-nlp/LESS, get_info.py and
collect_grad_reps.py.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jz3.errors import Jz3Error
from jz3.features.lora import Checkpoint, LoraAdapters
from jz3.files import hash_file, read_json, write_json
from jz3.gradients import Tokens, make_batches, run_pass

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FORMAT = "jz3-less-1"
SIDES = ("document", "query")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamDirection:
    """The conventions of Gamma."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    eps_inside: bool = True
    """True: m' / sqrt(v' + eps), as in LESS's code and formula; False: m' / (sqrt(v') + eps), as Adam."""
    bias_correction: bool = False
    """Divide m' by 1 - b1^t and v' by 1 - b2^t, with t = steps of the warm-up + 1; LESS's code doesn't."""

    def __call__(self, g: "torch.Tensor", m: "torch.Tensor", v: "torch.Tensor", step: int) -> "torch.Tensor":
        """Return Gamma(g) for gradients [B, n] and moments [n] after `step` steps."""
        first = self.beta1 * m + (1 - self.beta1) * g
        second = self.beta2 * v + (1 - self.beta2) * g.square()
        if self.bias_correction:
            first = first / (1 - self.beta1 ** (step + 1))
            second = second / (1 - self.beta2 ** (step + 1))
        return first / ((second + self.eps).sqrt() if self.eps_inside else second.sqrt() + self.eps)


@dataclass(frozen=True, slots=True)
class Less:
    """Warm-up checkpoints and the random projection of their gradients."""

    model_hash: str
    checkpoints: tuple[Path, ...]
    k_each: int = 8192
    """Numbers per checkpoint; those of all checkpoints stand beside each other."""
    seed: int = 0
    direction: AdamDirection = AdamDirection()

    @property
    def k(self) -> int:
        """Numbers per text."""
        return self.k_each * len(self.checkpoints)

    @property
    def mean(self) -> "torch.Tensor":
        """[K] zeros: random projections are centred by construction."""
        import torch

        return torch.zeros(self.k, dtype=torch.float32)

    @property
    def scale(self) -> "torch.Tensor":
        """[K] 1/sqrt(K): the root mean square of a unit vector's coordinates."""
        import torch

        return torch.full((self.k,), self.k**-0.5, dtype=torch.float32)

    def save(self, path: Path) -> str:
        """Write the description with the checkpoints' names and hashes and return the file's hash.

        The checkpoints must lie in the folder of `path` or below it.
        """
        files = {str(c.relative_to(path.parent)): hash_file(c) for c in self.checkpoints}
        table = {
            "format": FORMAT,
            "model_hash": self.model_hash,
            "checkpoints": files,
            "order": list(files),
            "k_each": self.k_each,
            "seed": self.seed,
            "direction": dataclasses.asdict(self.direction),
        }
        write_json(path, table)
        return hash_file(path)

    @classmethod
    def load(cls, path: Path, model_hash: str) -> "Less":
        """Read a description; refuse that of another model and changed checkpoints."""
        table = read_json(path)
        if table.get("format") != FORMAT:
            raise Jz3Error(f"{path} is no description of the format {FORMAT!r}")
        if table["model_hash"] != model_hash:
            raise Jz3Error(f"{path} was made for model {table['model_hash']}, this model is {model_hash}")
        for name, digest in table["checkpoints"].items():
            file = path.parent / name
            if not file.is_file() or hash_file(file) != digest:
                raise Jz3Error(f"{file} is missing or not the checkpoint that {path} names; warm up again")
        return cls(
            model_hash,
            tuple(path.parent / name for name in table["order"]),
            table["k_each"],
            table["seed"],
            AdamDirection(**table["direction"]),
        )


class LessSink:
    """Forms every text's adapter gradients, turns them into Gamma and projects them."""

    def __init__(self, less: Less, checkpoint: Checkpoint, side: str) -> None:
        """Prepare the moments.

        Args:
            less: the projection.
            checkpoint: the moments and the step.
            side: `document` (Gamma) or `query` (the plain gradient).
        """
        if side not in SIDES:
            raise ValueError(f"side must be one of {', '.join(SIDES)}, got {side!r}")
        self._less, self._checkpoint, self._adam = less, checkpoint, side == "document"
        self._moments: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        """Of the adapters met so far, on their device: those of a 7B model are a gigabyte, too much for every batch."""
        self._values: Any = None
        self._square: Any = None

    def forward(self, name: str, a: "torch.Tensor") -> Any:
        """Keep the input."""
        return a

    def backward(self, name: str, kept: Any, g: "torch.Tensor") -> None:
        """Add a layer's part of Omega Gamma and of ||Gamma||^2."""
        from jz3.ops.sign_project import sign_project

        full = (g.float().transpose(1, 2) @ kept.float()).flatten(1)
        if self._adam:
            if name not in self._moments:
                m, v = self._checkpoint.moments(name)
                self._moments[name] = m.flatten().to(g.device), v.flatten().to(g.device)
            full = self._less.direction(full, *self._moments[name], self._checkpoint.step)
        part = sign_project(full, self._less.k_each, seed=self._less.seed, name=name)
        square = full.square().sum(1)
        self._values = part if self._values is None else self._values + part
        self._square = square if self._square is None else self._square + square

    def take(self) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Return (projections of unit length [B, k], ||Gamma|| [B]) of the batch just run and forget it."""
        values, norm = self._values, self._square.sqrt()
        self._values = self._square = None
        return (values / values.norm(dim=1, keepdim=True)).cpu(), norm.cpu()


def less_batches(
    model: "PreTrainedModel",
    texts: Sequence[Tokens],
    less: Less,
    *,
    side: str,
    batch_tokens: int,
    reduction: str,
    take: Callable[[list[int], tuple[Any, ...]], None],
) -> None:
    """Run texts through every checkpoint and hand each text's result to `take`, batch by batch.

    The values of checkpoint c are multiplied by sqrt(w_c), w_c its share of the learning rates, so that
    the inner product of a document's and a query's numbers is sum_c w_c cos_c. Norm, loss and hidden
    states are those of the last checkpoint.
    """
    import torch

    checkpoints = [Checkpoint.load(path, less.model_hash) for path in less.checkpoints]
    total = sum(c.learning_rate for c in checkpoints)
    values = torch.zeros(len(texts), less.k, dtype=torch.float32)
    batches = make_batches(texts, batch_tokens)
    for number, checkpoint in enumerate(checkpoints):
        sink = LessSink(less, checkpoint, side)
        columns = slice(number * less.k_each, (number + 1) * less.k_each)
        with LoraAdapters(model, checkpoint.shape, checkpoint.weights) as adapters:
            for batch, result in run_pass(model, adapters.layers, sink, batches, reduction, fast=False):
                part, norm = sink.take()
                values[batch.positions, columns] = part * (checkpoint.learning_rate / total) ** 0.5
                if number == len(checkpoints) - 1:
                    found = values[batch.positions], norm, result.loss.float().cpu(), result.hidden.cpu()
                    take(batch.positions, found)

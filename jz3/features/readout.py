"""`readout` features: the gradient of the output layer, which needs the forward pass only.

The output layer's gradient of text i is G_i = sum_t s_t (p_t - y_t) h_t^T [V, d], with the predicted
distribution p_t, the one-hot target y_t, the last hidden state h_t and s_t = 1 / (scored tokens). The
vocabulary is hashed with signs into `left` buckets, and every entry of the [left, d] block with a
sign into one of K buckets, so that E<phi_i, phi_q> = <G_i, G_q>.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jz3.errors import Jz3Error
from jz3.features.lora import NoSink
from jz3.files import hash_file, read_json, write_json
from jz3.gradients import Batch, GradientPass, Tokens, make_batches

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FORMAT = "jz3-readout-1"
NAME = "readout"
PIECE = 1 << 14
"""Columns of the vocabulary that are computed and hashed at a time."""
LOGITS = 1 << 26
"""A text with more logits than this has them computed twice and never held whole."""


@dataclass(frozen=True, slots=True)
class Readout:
    """The seed and shape of a readout sketch; the hashes themselves are never stored."""

    model_hash: str
    k: int = 8192
    left: int = 1024
    """Buckets of the vocabulary."""
    seed: int = 0

    @property
    def mean(self) -> "torch.Tensor":
        """[K] zeros: hashed coordinates are centred by construction."""
        import torch

        return torch.zeros(self.k, dtype=torch.float32)

    @property
    def scale(self) -> "torch.Tensor":
        """[K] 1/sqrt(K): the root mean square of a unit vector's coordinates."""
        import torch

        return torch.full((self.k,), self.k**-0.5, dtype=torch.float32)

    def save(self, path: Path) -> str:
        """Write the sketch's description as JSON and return the file's hash."""
        fields = {f: getattr(self, f) for f in ("model_hash", "k", "left", "seed")}
        write_json(path, {"format": FORMAT, **fields})
        return hash_file(path)

    @classmethod
    def load(cls, path: Path, model_hash: str) -> "Readout":
        """Read a description and refuse one of another model."""
        table = read_json(path)
        if table.pop("format", None) != FORMAT:
            raise Jz3Error(f"{path} is no readout sketch of the format {FORMAT!r}")
        if table["model_hash"] != model_hash:
            raise Jz3Error(f"{path} was made for model {table['model_hash']}, this model is {model_hash}")
        return cls(**table)


class ReadoutPass:
    """Forward passes that give the readout features of texts."""

    def __init__(self, model: "PreTrainedModel", readout: Readout, reduction: str = "mean") -> None:
        """Freeze the model.

        Args:
            model: in evaluation mode.
            readout: the sketch.
            reduction: see GradientPass.
        """

        # A pass without layers: refuses the models whose loss is no plain softmax, and freezes.
        core = GradientPass(model, {}, NoSink(), reduction, fast=False).model
        self._model, self._readout, self._reduction = core, readout, reduction
        head: Any = core.get_output_embeddings()
        self._weight: Any = head.weight.detach()

    def run(self, batch: Batch) -> tuple[Any, ...]:
        """Return (values [B, K], norm [B], loss [B], hidden [B, d]) of a batch's texts."""
        import torch

        from jz3.ops.sketch import sketch

        model, k = self._model, self._readout.k
        ids = batch.ids.to(self._weight.device)
        with torch.no_grad():
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            rows = [list(range(len(ids)))] if batch.windowed else [[row] for row in range(len(ids))]
            values = torch.zeros(len(rows), k, device=ids.device, dtype=torch.float32)
            norm, loss = (
                torch.zeros(len(rows), dtype=torch.float32),
                torch.zeros(len(rows), dtype=torch.float32),
            )
            pooled = torch.zeros(len(rows), states.shape[2], dtype=torch.float32)
            for text, mine in enumerate(rows):
                spans = [(r, int(batch.starts[r]), int(batch.lengths[r])) for r in mine]
                h = torch.cat([states[r, max(a - 1, 0) : max(b - 1, 0)] for r, a, b in spans])
                targets = torch.cat([ids[r, a:b] for r, a, b in spans])
                block, square, total = self._text(h, targets)
                scale = 1.0 / len(h) if self._reduction == "mean" else 1.0
                sketch(
                    (block * scale).flatten()[None],
                    NAME,
                    k,
                    seed=self._readout.seed,
                    out=values[text, None],
                )
                norm[text], loss[text] = square.clamp(min=0).sqrt() * scale, total * scale
                # Windows overlap by one token, which counts where it ends a window.
                places = [
                    torch.arange(b, device=ids.device) + n * (ids.shape[1] - 1)
                    for n, (_, _, b) in enumerate(spans)
                ]
                weights = torch.cat(places) + 1.0
                every = torch.cat([states[r, :b].float() for r, _, b in spans])
                pooled[text] = (every * weights[:, None]).sum(0).cpu() / weights.sum().cpu()
        return values.cpu() / norm[:, None], norm, loss, pooled

    def _text(self, h: "torch.Tensor", targets: "torch.Tensor") -> tuple[Any, Any, Any]:
        """Return (block [left, d], squared norm, summed loss) of one text, unscaled."""
        import torch

        from jz3.ops.sketch import sketch

        count, vocabulary = len(h), len(self._weight)
        pieces = [slice(i, min(i + PIECE, vocabulary)) for i in range(0, vocabulary, PIECE)]
        keep = count * vocabulary <= LOGITS
        logits = [(h @ self._weight[p].T).float() for p in pieces] if keep else []
        parts = logits or ((h @ self._weight[p].T).float() for p in pieces)
        total = torch.logsumexp(torch.stack([torch.logsumexp(x, 1) for x in parts], 1), 1)
        gram = torch.zeros(count, count, device=h.device, dtype=torch.float32)
        hashed = torch.zeros(count, self._readout.left, device=h.device, dtype=torch.float32)
        target = torch.zeros(count, device=h.device, dtype=torch.float32)
        for number, piece in enumerate(pieces):
            part = logits[number] if keep else (h @ self._weight[piece].T).float()
            here = (targets >= piece.start) & (targets < piece.stop)
            rows, columns = here.nonzero().squeeze(1), targets[here] - piece.start
            target[rows] = part[rows, columns]
            error = (part - total[:, None]).exp_()
            error[rows, columns] -= 1
            gram += error @ error.T
            sketch(error, f"{NAME} {number}", self._readout.left, seed=self._readout.seed, out=hashed)
        states = h.float()
        return hashed.T @ states, (gram * (states @ states.T)).sum(), (total - target).sum()


def readout_batches(
    model: "PreTrainedModel",
    texts: Sequence[Tokens],
    readout: Readout,
    *,
    batch_tokens: int,
    reduction: str,
    take: Callable[[list[int], tuple[Any, ...]], None],
) -> None:
    """Run texts through a ReadoutPass and hand each batch's positions and results to `take`."""
    run = ReadoutPass(model, readout, reduction)
    for batch in make_batches(texts, batch_tokens):
        take(batch.positions, run.run(batch))

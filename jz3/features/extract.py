"""Run texts through a model and a projection: features, norms, losses and hidden states."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import xxhash

from jz3.features.adapted import AdaptedFit, AdaptedSink
from jz3.features.sketch import Sketch, SketchSink
from jz3.files import hash_file
from jz3.gradients import Tokens, make_batches, run_pass

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Projection(Protocol):
    """What turns a gradient into K numbers: an AdaptedFit or a Sketch."""

    @property
    def k(self) -> int:
        """Numbers per text."""
        ...

    @property
    def mean(self) -> "torch.Tensor":
        """[K], subtracted before coding."""
        ...

    @property
    def scale(self) -> "torch.Tensor":
        """[K], the spread of each number."""
        ...


@dataclass(frozen=True, slots=True)
class Extracted:
    """What is known of a list of texts; row i belongs to text i."""

    values: "torch.Tensor"
    """[N, K] float32, projected gradient divided by the norm of the whole gradient."""
    norm: "torch.Tensor"
    """[N] float32, the norm of the whole gradient; not finite or 0 if the text can't be used."""
    loss: "torch.Tensor"
    """[N] float32, see PassResult."""
    hidden: "torch.Tensor"
    """[N, d] float32, see PassResult."""


def open_sink(projection: Projection, dtype: "torch.dtype", device: "torch.device") -> Any:
    """Return the sink that computes a projection."""
    if isinstance(projection, AdaptedFit):
        return AdaptedSink(projection, dtype, device)
    if isinstance(projection, Sketch):
        return SketchSink(projection, dtype, device)
    raise TypeError(f"projection must be an AdaptedFit or a Sketch, got {type(projection).__name__}")


def extract(
    model: "PreTrainedModel",
    layers: dict[str, "torch.nn.Module"],
    texts: Sequence[Tokens],
    projection: Projection,
    *,
    batch_tokens: int = 2048,
    reduction: str = "mean",
    advance: Callable[[int], None] = lambda n: None,
    sink: Any = None,
) -> Extracted:
    """Compute the features of texts.

    Args:
        model: in evaluation mode.
        layers: all layers whose gradients count, from `linear_layers` (norms are of all of them).
        texts: tokenised texts.
        projection: the fit or sketch.
        batch_tokens: padded tokens per pass.
        reduction: see GradientPass.
        advance: called with the number of texts just done.
        sink: from `open_sink`, to use one for several calls.

    Returns:
        The rows in the texts' order.
    """
    import torch

    weight = next(model.parameters())
    sink = sink or open_sink(projection, weight.dtype, weight.device)
    count, width = len(texts), model.config.get_text_config().hidden_size
    values, norm = torch.zeros(count, projection.k), torch.zeros(count)
    loss, hidden = torch.zeros(count), torch.zeros(count, width)
    for batch, result in run_pass(model, layers, sink, make_batches(texts, batch_tokens), reduction):
        rows = torch.tensor(batch.positions)
        values[rows], norm[rows] = sink.take()
        loss[rows], hidden[rows] = result.loss.float().cpu(), result.hidden.cpu()
        advance(len(batch.positions))
    return Extracted(values, norm, loss, hidden)


def model_hash(folder: Path) -> str:
    """Return the 16 hexadecimal digits that identify a model folder's weights and configuration."""
    digest = xxhash.xxh3_64()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(f"{path.name} {hash_file(path)}\n".encode())
    return digest.hexdigest()

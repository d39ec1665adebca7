"""Run texts through a model and a projection: features, norms, losses and hidden states."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import xxhash

from jz3.features.adapted import AdaptedFit
from jz3.features.adapted_sink import AdaptedSink
from jz3.features.known import Known, KnownSink
from jz3.features.less import SIDES, Less, less_batches
from jz3.features.readout import Readout, readout_batches
from jz3.features.sketch import Sketch, SketchSink
from jz3.files import hash_file
from jz3.gradients import Tokens, make_batches, query_products, run_pass
from jz3.store import Coding

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Projection(Protocol):
    """What turns a gradient into K numbers: an AdaptedFit, a Sketch, a Known, a Readout or a Less."""

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


def open_sink(projection: Projection, model: "PreTrainedModel") -> Any:
    """Return the sink that computes a projection of the model's gradients, on its device."""
    weight = next(model.parameters())
    if isinstance(projection, AdaptedFit):
        return AdaptedSink(projection, weight.device)
    if isinstance(projection, Sketch):
        return SketchSink(projection, weight.dtype, weight.device)
    if isinstance(projection, Known):
        return KnownSink(projection, weight.device)
    if isinstance(projection, (Readout, Less)):
        # They run the model in their own way; see `extract`.
        return None
    raise TypeError(
        f"projection must be an AdaptedFit, Sketch, Known, Readout or Less, got {type(projection).__name__}"
    )


def coding_of(projection: Projection, bits: int) -> Coding:
    """Return how a projection's numbers are coded with `bits` each, or on average those of `adapted` with 2."""
    widths = projection.widths(bits) if bits == 2 and isinstance(projection, AdaptedFit) else None
    return Coding(projection.mean, projection.scale, bits, widths)


def extract(
    model: "PreTrainedModel",
    layers: dict[str, "torch.nn.Module"],
    texts: Sequence[Tokens],
    projection: Projection,
    *,
    batch_tokens: int = 2048,
    reduction: str = "mean",
    side: str = "document",
    advance: Callable[[int], None] = lambda n: None,
    sink: Any = None,
) -> Extracted:
    """Compute the features of texts.

    Args:
        model: in evaluation mode.
        layers: all layers whose gradients count, from `linear_layers` (norms are of all of them).
        texts: tokenised texts.
        projection: what the numbers are.
        batch_tokens: padded tokens per pass.
        reduction: see GradientPass.
        side: `document` or `query`; `less` has other features of queries, and products in 8 bits are for documents
            alone.
        advance: called with the number of texts just done.
        sink: from `open_sink`, to use one for several calls.

    Returns:
        The rows in the texts' order.
    """
    import torch

    if side not in SIDES:
        raise ValueError(f"side must be one of {', '.join(SIDES)}, got {side!r}")
    sink = sink or open_sink(projection, model)
    count, width = len(texts), model.config.get_text_config().hidden_size
    values, norm = (
        torch.zeros(count, projection.k, dtype=torch.float32),
        torch.zeros(count, dtype=torch.float32),
    )
    loss, hidden = torch.zeros(count, dtype=torch.float32), torch.zeros(count, width, dtype=torch.float32)

    def take(positions: list[int], found: tuple[Any, ...]) -> None:
        rows = torch.tensor(positions)
        values[rows], norm[rows], loss[rows], hidden[rows] = found
        advance(len(positions))

    options = {"batch_tokens": batch_tokens, "reduction": reduction}
    if isinstance(projection, Readout):
        readout_batches(model, texts, projection, take=take, **options)
    elif isinstance(projection, Less):
        less_batches(model, texts, projection, side=side, take=take, **options)
    else:
        products = query_products(model) if side == "query" else None
        batches = make_batches(texts, batch_tokens)
        for batch, result in run_pass(model, layers, sink, batches, reduction, products=products):
            take(batch.positions, (*sink.take(), result.loss.float().cpu(), result.hidden.cpu()))
    return Extracted(values, norm, loss, hidden)


def model_hash(folder: Path) -> str:
    """Return the 16 hexadecimal digits that identify a model folder's weights and configuration."""
    digest = xxhash.xxh3_64()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(f"{path.name} {hash_file(path)}\n".encode())
    return digest.hexdigest()


def weights_hash(model: "PreTrainedModel") -> str:
    """Return the 16 hexadecimal digits that identify a loaded model's weights."""
    import torch

    digest = xxhash.xxh3_64()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        digest.update(weight.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

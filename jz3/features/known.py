"""`known`: cosines with queries that are known beforehand, in one pass, with nothing stored.

The bases L_m and R_m are those of the queries alone and every coordinate of every layer is kept, so
that cos(G_i, G_q) ~ sum_m <L_m^T G_i R_m, L_m^T G_q R_m> / (||G_i|| ||G_q||) leaves out only what lies
outside the queries' own leading directions. A text's coordinates live for one batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jz3.errors import Jz3Error
from jz3.features.adapted import AdaptedFit, fit_adapted
from jz3.features.adapted_sink import AdaptedSink
from jz3.files import hash_file, read_tensors, write_tensors
from jz3.gradients import Tokens, make_batches, query_products, run_pass

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FORMAT = "jz3-known-1"
EVERYTHING = 1 << 40
"""More coordinates and layers than any model has."""


@dataclass(frozen=True, slots=True)
class Known:
    """A projection whose numbers are the cosines with known queries, or their means per task."""

    fit: AdaptedFit
    names: list[str]
    """What each number belongs to: the queries' ids, or the tasks."""
    queries: "torch.Tensor"
    """[coordinates, K] float32: the queries' features, each divided by its gradient's norm."""

    @property
    def k(self) -> int:
        """Numbers per text."""
        return len(self.names)

    @property
    def mean(self) -> "torch.Tensor":
        """[K] zeros."""
        import torch

        return torch.zeros(self.k, dtype=torch.float32)

    @property
    def scale(self) -> "torch.Tensor":
        """[K] ones: cosines are meant to be kept as they are, not coded."""
        import torch

        return torch.ones(self.k, dtype=torch.float32)

    def save(self, path: Path) -> str:
        """Write the queries' features to `path`, the fit beside it (`<stem>-fit`), and return a hash."""
        about = {"format": FORMAT, "names": self.names, "fit": self.fit.save(_fit_path(path))}
        write_tensors(path, {"queries": self.queries.contiguous()}, about)
        return hash_file(path)

    @classmethod
    def load(cls, path: Path, model_hash: str) -> "Known":
        """Read what `save` wrote and refuse that of another model."""
        tensors, about = read_tensors(path, FORMAT, "fit the known queries again")
        fit = _fit_path(path)
        if not fit.is_file() or hash_file(fit) != about["fit"]:
            raise Jz3Error(f"{fit} is not the fit that {path} was made with; fit the known queries again")
        return cls(AdaptedFit.load(fit, model_hash), about["names"], tensors["queries"])


class KnownSink:
    """Contracts every text's coordinates with those of the known queries."""

    def __init__(self, known: Known, device: "torch.device") -> None:
        self._inner = AdaptedSink(known.fit, device)
        self._queries = known.queries
        self.wide: bool = self._inner.wide
        self.begin: Callable[[], None] = self._inner.begin
        self.share: Callable[[Any], None] = self._inner.share
        self.forward: Callable[[str, Any], Any] = self._inner.forward
        self.backward: Callable[[str, Any, Any], None] = self._inner.backward

    def take(self) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Return (cosines [B, K], norms [B]) of the batch just run and forget it."""
        values, norm = self._inner.take()
        return values @ self._queries, norm


def fit_known(
    model: "PreTrainedModel",
    model_hash: str,
    layers: dict[str, "torch.nn.Module"],
    queries: Mapping[str, Sequence[Tokens]],
    *,
    per: str = "query",
    rank: int = 64,
    batch_tokens: int = 1024,
    reduction: str = "mean",
    seed: int = 0,
) -> Known:
    """Make the projection whose numbers are the cosines with known queries.

    number(i, q) = sum_m <L_m^T G_i R_m, L_m^T G_q R_m> / (||G_i|| ||G_q||)

    Args:
        model: frozen, in evaluation mode.
        model_hash: identifies the model in the fit.
        layers: all layers whose gradients count, from `linear_layers`.
        queries: per task its tokenised queries.
        per: `query` (a number per query, tasks in order) or `task` (their mean, a number per task).
        rank: directions per layer, mean of its two sides (see fit_adapted); with all that a layer has
            the cosines are exact. A text holds (layers) x 3/4 rank^2 numbers while its batch is at work,
            2.6 MB for SmolLM2-135M at 64.
        batch_tokens: padded tokens per pass.
        reduction: see GradientPass.
        seed: of the range finder.

    Returns:
        The projection.

    Raises:
        ValueError: `per` is unknown, a task has no query, or a query's gradient is zero or not finite.
    """
    import torch

    if per not in ("query", "task"):
        raise ValueError(f"per must be 'query' or 'task', got {per!r}")
    empty = [task for task, texts in queries.items() if not texts]
    if not queries or empty:
        raise ValueError(f"every task needs at least one query; without any: {empty or 'there is no task'}")
    texts = [t for group in queries.values() for t in group]
    fit = fit_adapted(
        model,
        model_hash,
        layers,
        texts,
        [],
        k=EVERYTHING,
        rank=rank,
        max_layers=EVERYTHING,
        batch_tokens=batch_tokens,
        reduction=reduction,
        seed=seed,
        token_texts=0,
    )
    sink = AdaptedSink(fit, next(model.parameters()).device)
    columns = torch.zeros(fit.k, len(texts), dtype=torch.float32)
    batches, products = make_batches(texts, batch_tokens), query_products(model)
    for batch, _ in run_pass(model, layers, sink, batches, reduction, products=products):
        values, norm = sink.take()
        for row, position in enumerate(batch.positions):
            if not (torch.isfinite(norm[row]) and norm[row] > 0):
                raise ValueError(
                    f"the gradient of query {texts[position].id} is {float(norm[row])}; leave it out"
                )
            columns[:, position] = values[row]
    if per == "query":
        return Known(fit, [t.id for t in texts], columns)
    means = columns.split([len(group) for group in queries.values()], 1)
    return Known(fit, list(queries), torch.stack([m.mean(1) for m in means], 1))


def _fit_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}-fit{path.suffix}")

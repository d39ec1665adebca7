"""Exact gradient cosines on a small sample: the yardstick of every feature kind."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jz3.gradients import Tokens, make_batches, run_pass

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class _QuerySink:
    """Forms the queries' gradients, layer by layer, in the model's own precision."""

    def __init__(self) -> None:
        self.gradients: dict[str, list[Any]] = {}

    def forward(self, name: str, a: "torch.Tensor") -> Any:
        return a

    def backward(self, name: str, kept: Any, g: "torch.Tensor") -> None:
        full = _layer_gradients(kept, g)
        self.gradients.setdefault(name, []).append((full.to(g.dtype), full.square().sum(1)))


class _DocumentSink:
    """Adds up, layer by layer, the inner products with the queries' gradients and the norms."""

    def __init__(self, queries: dict[str, Any]) -> None:
        self._queries = queries
        self.products: Any = 0.0
        self.square: Any = 0.0

    def forward(self, name: str, a: "torch.Tensor") -> Any:
        return a

    def backward(self, name: str, kept: Any, g: "torch.Tensor") -> None:
        full = _layer_gradients(kept, g)
        self.square = self.square + full.square().sum(1)
        self.products = self.products + full @ self._queries[name].to(full.dtype).T


def _layer_gradients(a: "torch.Tensor", g: "torch.Tensor") -> "torch.Tensor":
    """[B, S, I], [B, S, O] to [B, O I] float32 (float64 stays)."""
    import torch

    wide = torch.float64 if g.dtype == torch.float64 else torch.float32
    return (g.to(wide).transpose(1, 2) @ a.to(wide)).flatten(1)


def exact_cosines(
    model: "PreTrainedModel",
    layers: dict[str, "torch.nn.Module"],
    documents: Sequence[Tokens],
    queries: Sequence[Tokens],
    *,
    batch_tokens: int = 1024,
    reduction: str = "mean",
    advance: Callable[[int], None] = lambda n: None,
) -> "torch.Tensor":
    """Return cos(G_i, G_q) for every document i and query q, gradients formed whole.

    The queries' gradients are held in memory: (parameters of the layers) x (queries) numbers in the
    model's precision, 1.7 GB for 8 queries of SmolLM2-135M in bfloat16.

    Args:
        model: in evaluation mode.
        layers: from `linear_layers`.
        documents: tokenised documents.
        queries: tokenised queries.
        batch_tokens: padded tokens per pass.
        reduction: see GradientPass.
        advance: called with the number of documents just done.

    Returns:
        [documents, queries] float32 (float64 for a float64 model).
    """
    import torch

    sink, order = _QuerySink(), []
    exact: Any = {"reduction": reduction, "products": "exact"}
    for batch, _ in run_pass(model, layers, sink, make_batches(queries, batch_tokens), **exact):
        order += batch.positions
    back = torch.tensor(order).argsort()
    matrices: dict[str, Any] = {}
    square: Any = 0.0
    for name in list(sink.gradients):
        # Popped one by one: all of them twice would not fit a small machine.
        parts = sink.gradients.pop(name)
        matrices[name] = torch.cat([full for full, _ in parts])[back]
        square = square + torch.cat([s for _, s in parts])[back]
    norms = square.sqrt()
    rows = []
    order = []
    collector = _DocumentSink(matrices)
    for batch, _ in run_pass(model, layers, collector, make_batches(documents, batch_tokens), **exact):
        rows.append((collector.products / collector.square.sqrt()[:, None] / norms).cpu())
        collector.products = collector.square = 0.0
        order += batch.positions
        advance(len(batch.positions))
    return torch.cat(rows)[torch.tensor(order).argsort()]

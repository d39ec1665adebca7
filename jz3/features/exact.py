"""Exact gradient cosines on a small sample: the yardstick of every feature kind."""

import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jz3.gradients import Tokens, layer_shape, make_batches, run_pass

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


CHUNK, GPU_CHUNK = 1 << 15, 1 << 21
"""Entries of a layer's gradients that are widened to float32 at a time: what stays in a CPU's cache; what keeps a
GPU busy, where a whole matrix of a 7B model is 0.2 GB a text in float32, and as much again squared."""


class ExactSink:
    """Forms every text's gradient, layer by layer: first kept (queries), then multiplied with these (documents)."""

    def __init__(self) -> None:
        self.queries: dict[str, Any] = {}
        """Per layer the queries' gradients [Q, O I], in the model's own precision."""
        self._keep = True
        self._products: Any = 0.0
        self._square: Any = 0.0

    def forward(self, name: str, a: "torch.Tensor") -> Any:
        """Keep a layer's input."""
        return a

    def backward(self, name: str, kept: Any, g: "torch.Tensor") -> None:
        """Form the layer's gradients; keep them, or add up products and squares."""
        full = _layer_gradients(kept, g)
        if self._keep:
            self.queries.setdefault(name, []).append(full.to(g.dtype))
        queries = full[:0] if self._keep else self.queries[name]
        products, square = _products(full, queries)
        self._products, self._square = self._products + products, self._square + square

    def take(self) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Return (inner products with the kept gradients over the text's norm [B, Q], norms [B]) and forget them."""
        products, norm = self._products, self._square.sqrt()
        self._products = self._square = 0.0
        return (products / norm[:, None]).cpu(), norm.cpu()

    def close(self, order: Sequence[int]) -> None:
        """End the queries: texts from now on are documents.

        Args:
            order: the number of every query, as they came.
        """
        import torch

        back = torch.tensor(order).argsort()
        # Layer by layer: all of them twice would not fit a small machine.
        for name, parts in self.queries.items():
            self.queries[name] = torch.cat(parts)[back]
        self._keep = False


def _layer_gradients(a: "torch.Tensor", g: "torch.Tensor") -> "torch.Tensor":
    """[B, S, I], [B, S, O] to [B, O I], summed in float32 (float64 stays).

    Where the machine multiplies bfloat16 fast, a bfloat16 model's are rounded to it once.
    """
    import torch

    from jz3.machine import fast_bfloat16_cpu

    if g.dtype == torch.bfloat16 and (g.device.type != "cpu" or fast_bfloat16_cpu()):
        return (g.transpose(1, 2) @ a.to(g.dtype)).flatten(1)
    wide = torch.float64 if g.dtype == torch.float64 else torch.float32
    return (g.to(wide).transpose(1, 2) @ a.to(wide)).flatten(1)


def _products(full: "torch.Tensor", queries: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return <full_i, queries_q> [B, Q] and |full_i|^2 [B], summed in float32 (float64 stays)."""
    import torch

    wide = torch.float64 if full.dtype == torch.float64 else torch.float32
    products = torch.zeros(len(full), len(queries), dtype=wide, device=full.device)
    square = torch.zeros(len(full), dtype=wide, device=full.device)
    step = CHUNK if full.device.type == "cpu" else GPU_CHUNK
    for start in range(0, full.shape[1], step):
        part = full[:, start : start + step].to(wide)
        square += part.square().sum(1)
        products += part @ queries[:, start : start + step].to(wide).T
    return products, square


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
    model's precision, 1.7 GB for 8 queries of SmolLM2-135M in bfloat16. Where those of all would take more than a
    quarter of it, the documents run once per group of queries: 14 GB are one query of a 7B model.

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

    size = sum(math.prod(layer_shape(m)) for m in layers.values()) * next(model.parameters()).dtype.itemsize
    at_once = max(1, _memory(next(model.parameters()).device) // 4 // size)
    groups = [queries[i : i + at_once] for i in range(0, len(queries), at_once)]
    exact: Any = {"reduction": reduction, "products": "exact"}
    batches = make_batches(documents, batch_tokens)
    columns, done = [], 0
    for group in groups:
        sink = ExactSink()
        norms, order = [], []
        for batch, _ in run_pass(model, layers, sink, make_batches(group, batch_tokens), **exact):
            norms.append(sink.take()[1])
            order += batch.positions
        sink.close(order)
        norm = torch.cat(norms)[torch.tensor(order).argsort()]
        rows, order = [], []
        for batch, _ in run_pass(model, layers, sink, batches, **exact):
            rows.append(sink.take()[0] / norm)
            order += batch.positions
            before, done = done, done + len(batch.positions)
            advance(done // len(groups) - before // len(groups))
        columns.append(torch.cat(rows)[torch.tensor(order).argsort()])
        # Before the next group's are made.
        del sink
    return torch.cat(columns, 1)


def _memory(device: "torch.device") -> int:
    """Return the bytes of a device's memory."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

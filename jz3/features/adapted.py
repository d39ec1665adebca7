"""`adapted` features: the coordinates of L^T G R that carry the energy of queries and documents.

For every linear layer m, L_m [O, p] and R_m [I, p] span the leading directions of the normalised
gradients' left and right covariance; of all coordinates of all layers the K with the largest
(query energy x document energy) are kept. A document's feature holds these coordinates of
G_i / ||G_i||, so that an inner product with a query's is the cosine up to what was left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jz3.errors import Jz3Error
from jz3.features.range_finder import RangeFinder
from jz3.files import hash_file, read_tensors, write_tensors
from jz3.gradients import Batch, Tokens, make_batches, run_pass

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FORMAT = "jz3-adapted-2"
TOKEN_TEXTS = 96
"""Texts of a sample that the covariance of single tokens counts as much as; see fit_adapted."""


@dataclass(frozen=True, slots=True)
class AdaptedFit:
    """What maps a gradient to K numbers, the same for documents and queries."""

    model_hash: str
    layers: list[str]
    left: dict[str, "torch.Tensor"]
    """Per layer [O, p_o] float32, orthonormal columns."""
    right: dict[str, "torch.Tensor"]
    """Per layer [I, p_i] float32."""
    coordinates: dict[str, "torch.Tensor"]
    """Per layer [K_m] int64, positions in the flattened block [p_o, p_i]; K = sum of K_m."""
    mean: "torch.Tensor"
    """[K] float32, subtracted before coding."""
    scale: "torch.Tensor"
    """[K] float32, the standard deviation over the sample."""
    energy: "torch.Tensor"
    """[K] float32, by which the coordinates were chosen."""

    @property
    def k(self) -> int:
        """Numbers per document."""
        return len(self.mean)

    def top_positions(self, k: int) -> "torch.Tensor":
        """Return the positions, ascending, of the `k` coordinates with the most energy."""
        import torch

        if not 1 <= k <= self.k:
            raise ValueError(f"k must lie between 1 and the fit's {self.k}, got {k}")
        return torch.topk(self.energy, k).indices.sort().values

    def top(self, k: int) -> "AdaptedFit":
        """Return the smaller fit of the `k` coordinates with the most energy."""
        positions = self.top_positions(k)
        left, right, coordinates, start = {}, {}, {}, 0
        for name in self.layers:
            own = self.coordinates[name]
            inside = (positions >= start) & (positions < start + len(own))
            mine, start = own[positions[inside] - start], start + len(own)
            if len(mine):
                left[name], right[name], coordinates[name] = _needed(self.left[name], self.right[name], mine)
        parts = (x[positions] for x in (self.mean, self.scale, self.energy))
        return AdaptedFit(self.model_hash, list(left), left, right, coordinates, *parts)

    def widths(self, bits: int) -> "torch.Tensor":
        """Return how many bits each number gets where they have `bits` on average: [K] int64."""
        from jz3.store.digits import widths_of

        variance, mean = self.scale.double().square(), self.mean.double()
        # The energy counts the mean, which is not coded.
        return widths_of(self.energy.double() * variance / (variance + mean.square()), bits * self.k)

    def save(self, path: Path) -> str:
        """Write the fit to one safetensors file and return the file's hash."""
        tensors = {"mean": self.mean, "scale": self.scale, "energy": self.energy}
        for name in self.layers:
            tensors[f"left/{name}"] = self.left[name].contiguous()
            tensors[f"right/{name}"] = self.right[name].contiguous()
            tensors[f"coordinates/{name}"] = self.coordinates[name].contiguous()
        about = {"format": FORMAT, "model_hash": self.model_hash, "layers": self.layers}
        write_tensors(path, tensors, about)
        return hash_file(path)

    @classmethod
    def load(cls, path: Path, model_hash: str) -> "AdaptedFit":
        """Read a fit and refuse one that was made for another model."""
        tensors, about = read_tensors(path, FORMAT, "make it again, e.g. with `jz3 fit`")
        if about["model_hash"] != model_hash:
            raise Jz3Error(f"{path} was fitted for model {about['model_hash']}, this model is {model_hash}")
        layers = about["layers"]
        parts = {
            side: {name: tensors[f"{side}/{name}"] for name in layers}
            for side in ("left", "right", "coordinates")
        }
        vectors = {key: tensors[key] for key in ("mean", "scale", "energy")}
        return cls(model_hash, layers, **parts, **vectors)


def _gram(x: "torch.Tensor") -> "torch.Tensor":
    """Return the inner products of each text's tokens: [B, S, D] to [B, S, S] float32."""
    return (x @ x.transpose(1, 2)).float()


class _InputGrams:
    """Computes a a^T once for layers that share their input (q, k, v; gate, up)."""

    def __init__(self) -> None:
        self._input: Any = None
        self._gram: Any = None

    def of(self, a: "torch.Tensor") -> "torch.Tensor":
        """Return the Gram matrix of a, remembered while the same tensor comes again."""
        if self._input is None or a.data_ptr() != self._input.data_ptr() or a.shape != self._input.shape:
            self._input, self._gram = a, _gram(a)
        return self._gram


class _FactorSink:
    """Keeps a batch's factors and Gram matrices until its norms are known."""

    def __init__(self) -> None:
        self.factors: dict[str, tuple[Any, Any, Any, Any]] = {}
        self._grams = _InputGrams()

    def forward(self, name: str, a: "torch.Tensor") -> Any:
        return a, self._grams.of(a)

    def backward(self, name: str, kept: Any, g: "torch.Tensor") -> None:
        self.factors[name] = (*kept, g, _gram(g))

    def take(self) -> tuple[dict[str, tuple[Any, Any, Any, Any]], "torch.Tensor", dict[str, "torch.Tensor"]]:
        squares = {n: (aa * gg).sum((1, 2)) for n, (_, aa, _, gg) in self.factors.items()}
        factors, self.factors = self.factors, {}
        return factors, sum(squares.values()), squares  # pyright: ignore[reportReturnType]


class _EnergySink:
    """Adds up every coordinate's first and second moment; nothing of a text is kept."""

    wide = True

    def __init__(
        self, left: dict[str, "torch.Tensor"], right: dict[str, "torch.Tensor"], groups: int
    ) -> None:
        import torch

        self._left, self._right = left, right
        shapes = {n: (left[n].shape[1], right[n].shape[1]) for n in left}

        def zeros() -> dict[str, torch.Tensor]:
            # Beside the bases: a GPU would be waited for at every layer of a batch.
            return {n: torch.zeros(s, dtype=torch.float64, device=left[n].device) for n, s in shapes.items()}

        self.sums, self.energies = zeros(), [zeros() for _ in range(groups)]
        self.group = 0
        self.inverse: Any = None
        """[B] 1 / norm of the batch's texts; 0 for those that are left out."""

    def forward(self, name: str, a: "torch.Tensor") -> "torch.Tensor":
        return (a @ self._right[name].to(a)).float()

    def backward(self, name: str, kept: "torch.Tensor", g: "torch.Tensor") -> None:
        rows = (g @ self._left[name].to(g)).float().transpose(1, 2)
        inverse = self.inverse[:, None, None]
        blocks = (rows @ kept).masked_fill(inverse == 0, 0) * inverse
        self.sums[name] += blocks.sum(0).double()
        self.energies[self.group][name] += blocks.square().sum(0).double()


def fit_adapted(
    model: "PreTrainedModel",
    model_hash: str,
    layers: dict[str, "torch.nn.Module"],
    queries: Sequence[Tokens],
    documents: Sequence[Tokens],
    *,
    k: int = 4096,
    rank: int = 128,
    max_layers: int = 96,
    batch_tokens: int = 1024,
    reduction: str = "mean",
    seed: int = 0,
    token_texts: float = TOKEN_TEXTS,
    advance: Any = lambda n: None,
) -> AdaptedFit:
    """Choose bases and coordinates from a sample of queries, documents or both.

    Two passes over the sample, in memory that doesn't grow with it. The first finds each layer's
    leading `rank` eigenvectors of sum G G^T and sum G^T G, mean over queries plus mean over documents,
    every G divided by its text's norm, by a randomised range finder on the factors:
    G G^T Omega = g^T (a a^T) (g Omega).
    The output side has more directions than a few hundred texts determine, so the left G G^T is joined by
    token_texts / n (n texts in the sample) of the covariance of single tokens, sum_t |a_t|^2 g_t g_t^T,
    scaled to the same trace. With 32 / 64 texts of <= 128 tokens in the fit (SmolLM2-135M, K = 8,192, 40
    texts x 40 queries unseen) the Spearman coefficient against exact cosines rises from 0.917 to 0.943 /
    from 0.954 to 0.965.
    The second measures every coordinate's energy e_q (queries) and e_d (documents), keeps the `k`
    largest (e_q + e_d / 2) e_d over all layers, and takes the kept coordinates' mean and scale.

    Args:
        model: frozen, in evaluation mode.
        model_hash: identifies the model in the fit.
        layers: the layers that may be kept.
        queries: tokenised queries; may be empty.
        documents: tokenised documents; may be empty.
        k: coordinates to keep.
        rank: basis vectors per layer, mean of its two sides: 3/2 of it for the output gradient, 1/2
            for the input.
        max_layers: layers, those with the most energy, whose coordinates are measured.
        batch_tokens: padded tokens per pass.
        reduction: see GradientPass.
        seed: of the range finder.
        token_texts: how many of the sample's texts the covariance of single tokens counts as much as;
            0 if the bases are for the sample itself.
        advance: called with the number of texts just done (each text is seen twice).

    Returns:
        The fit.

    Raises:
        ValueError: there is neither a query nor a document, or no finite gradient.
    """
    import torch

    groups = [texts for texts in (queries, documents) if texts]
    if not groups:
        raise ValueError("the fit needs at least one query or document")
    finder = RangeFinder(layers, rank, seed, token_texts / sum(len(texts) for texts in groups))
    sink = _FactorSink()
    norms: list[torch.Tensor] = []
    for group, texts in enumerate(groups):
        norm = torch.zeros(len(texts), dtype=torch.float32)
        for batch, _ in run_pass(model, layers, sink, make_batches(texts, batch_tokens), reduction):
            factors, square, squares = sink.take()
            finder.add(group, factors, square, squares, 1.0 / len(texts))
            norm[batch.positions] = square.float().sqrt().cpu()
            advance(len(batch.positions))
        norms.append(norm)
    kept, left, right = finder.bases(max_layers)
    moments = _EnergySink(left, right, len(groups))
    chosen = {n: layers[n] for n in kept}
    for group, texts in enumerate(groups):
        moments.group = group
        inverse = torch.where(torch.isfinite(norms[group]) & (norms[group] > 0), 1 / norms[group], 0.0)
        batches = _announced(make_batches(texts, batch_tokens), moments, inverse, finder.device)
        for batch, _ in run_pass(model, chosen, moments, batches, reduction):
            advance(len(batch.positions))
    count = sum(int((torch.isfinite(n) & (n > 0)).sum()) for n in norms)

    sums, *energies = [{n: t.cpu() for n, t in m.items()} for m in (moments.sums, *moments.energies)]
    flat = torch.cat(
        [
            _worth([e[n] / len(texts) for e, texts in zip(energies, groups, strict=True)]).flatten()
            for n in kept
        ]
    )
    first = torch.cat([sums[n].flatten() for n in kept])
    second = torch.cat([sum(e[n] for e in energies).flatten() for n in kept])  # pyright: ignore[reportAttributeAccessIssue]
    top = torch.topk(flat, min(k, len(flat))).indices.sort().values
    mean = first[top] / count
    spread = ((second[top] - count * mean.square()) / max(count - 1, 1)).clamp(min=0).sqrt()
    bounds = np.cumsum([0] + [energies[0][n].numel() for n in kept])
    fit_left, fit_right, coordinates, names = {}, {}, {}, []
    for name, start, stop in zip(kept, bounds, bounds[1:], strict=False):
        mine = top[(top >= int(start)) & (top < int(stop))] - int(start)
        if not len(mine):
            continue
        fit_left[name], fit_right[name], coordinates[name] = _needed(left[name], right[name], mine)
        names.append(name)
    return AdaptedFit(
        model_hash,
        names,
        {n: t.cpu() for n, t in fit_left.items()},
        {n: t.cpu() for n, t in fit_right.items()},
        coordinates,
        mean.float(),
        (spread if count > 1 else mean.abs()).clamp(min=1e-8).float(),
        flat[top].float(),
    )


def _worth(energies: "Sequence[torch.Tensor]") -> "torch.Tensor":
    """Return (e_q + e_d / 2) e_d of mean energies, or the square of the only energy there is.

    Unseen queries differ from the sample's: half of the documents' energy stands for what they have more.
    """
    if len(energies) == 1:
        return energies[0].square()
    queries, documents = energies
    return (queries + documents / 2) * documents


def _announced(
    batches: Sequence[Batch], sink: _EnergySink, inverse: "torch.Tensor", device: Any
) -> Iterator[Batch]:
    """Tell the sink the norms of each batch's texts right before it runs."""
    for batch in batches:
        sink.inverse = inverse[batch.positions].to(device)
        yield batch


def _needed(
    left: "torch.Tensor", right: "torch.Tensor", coordinates: "torch.Tensor"
) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
    """Drop the basis vectors that no coordinate needs; return the rest and the coordinates among them."""
    width = right.shape[1]
    used_rows, rows = (coordinates // width).unique(return_inverse=True)
    used_columns, columns = (coordinates % width).unique(return_inverse=True)
    return left[:, used_rows].clone(), right[:, used_columns].clone(), rows * len(used_columns) + columns

"""`adapted` features: the coordinates of L^T G R that carry the energy of queries and documents.

For every linear layer m, L_m [O, p] and R_m [I, p] span the leading directions of the normalised
gradients' left and right covariance; of all coordinates of all layers the K with the largest
(query energy x document energy) are kept. A document's feature holds these coordinates of
G_i / ||G_i||, so that an inner product with a query's is the cosine up to what was left out.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jz3.errors import Jz3Error
from jz3.files import atomic_path, canonical_json, hash_file
from jz3.gradients import InputGrams, Tokens, gram, layer_shape, make_batches, run_pass
from jz3.seeding import seed_for

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FORMAT = "jz3-adapted-1"
OVERSAMPLING = 8


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

    @property
    def k(self) -> int:
        """Numbers per document."""
        return len(self.mean)

    def save(self, path: Path) -> str:
        """Write the fit to one safetensors file and return the file's hash."""
        from safetensors.torch import save_file

        tensors = {"mean": self.mean, "scale": self.scale}
        for name in self.layers:
            tensors[f"left/{name}"] = self.left[name].contiguous()
            tensors[f"right/{name}"] = self.right[name].contiguous()
            tensors[f"coordinates/{name}"] = self.coordinates[name].contiguous()
        about = {"format": FORMAT, "model_hash": self.model_hash, "layers": self.layers}
        with atomic_path(path) as part:
            # One key only: safetensors writes several in an order that changes from run to run.
            save_file(tensors, part, {"jz3": canonical_json(about)})
        return hash_file(path)

    @classmethod
    def load(cls, path: Path, model_hash: str) -> "AdaptedFit":
        """Read a fit and refuse one that was made for another model."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                metadata = json.loads((file.metadata() or {}).get("jz3", "{}"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except (OSError, SafetensorError) as error:
            raise Jz3Error(f"{path} is no readable fit ({error}); run `jz3 features` again") from error
        if metadata.get("format") != FORMAT:
            raise Jz3Error(f"{path} has the format {metadata.get('format')!r}, expected {FORMAT!r}")
        if metadata["model_hash"] != model_hash:
            raise Jz3Error(
                f"{path} was fitted for model {metadata['model_hash']}, this model is {model_hash}"
            )
        layers = metadata["layers"]
        parts = {
            side: {name: tensors[f"{side}/{name}"] for name in layers}
            for side in ("left", "right", "coordinates")
        }
        return cls(model_hash, layers, **parts, mean=tensors["mean"], scale=tensors["scale"])


class AdaptedSink:
    """Projects each text's gradient on a fit's coordinates and measures its exact norm."""

    def __init__(self, fit: AdaptedFit, dtype: "torch.dtype", device: "torch.device") -> None:
        self._left = {n: t.to(device, dtype) for n, t in fit.left.items()}
        self._right = {n: t.to(device, dtype) for n, t in fit.right.items()}
        self._coordinates = {n: t.to(device) for n, t in fit.coordinates.items()}
        self._offset = dict(
            zip(fit.layers, np.cumsum([0] + [len(fit.coordinates[n]) for n in fit.layers]), strict=False)
        )
        self._k, self._grams = fit.k, InputGrams()
        self._values: Any = None
        self._square: Any = None

    def forward(self, name: str, a: "torch.Tensor") -> Any:
        """Keep a R and the Gram matrix of a; a itself is dropped."""
        return (a @ self._right[name] if name in self._right else None), self._grams.of(a)

    def backward(self, name: str, kept: Any, g: "torch.Tensor") -> None:
        """Add ||G||^2 by the Gram identity and, for a kept layer, its coordinates."""
        import torch

        from jz3.ops.segment_project import segment_project

        projected, input_gram = kept
        if self._square is None:
            self._square = torch.zeros(len(g), device=g.device)
            self._values = torch.zeros(len(g), self._k, device=g.device)
        self._square += (input_gram * gram(g)).sum((1, 2))
        if projected is not None:
            count, width, _ = g.shape
            bounds = torch.arange(0, count * width + 1, width, device=g.device)
            # Pads have no gradient, so that a row of the batch is its text's segment.
            blocks = segment_project(projected.flatten(0, 1), g.flatten(0, 1), self._left[name], bounds)
            chosen = self._coordinates[name]
            start = self._offset[name]
            self._values[:, start : start + len(chosen)] = blocks.flatten(1)[:, chosen].float()

    def take(self) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Return (unit-norm values [B, K], norms [B]) of the batch just run and forget it."""
        norm = self._square.clamp(min=0).sqrt()
        values = self._values / norm[:, None]
        self._values = self._square = None
        return values.cpu(), norm.cpu()


class _FactorSink:
    """Keeps a batch's factors and Gram matrices until its norms are known."""

    def __init__(self) -> None:
        self.factors: dict[str, tuple[Any, Any, Any, Any]] = {}
        self._grams = InputGrams()

    def forward(self, name: str, a: "torch.Tensor") -> Any:
        return a, self._grams.of(a)

    def backward(self, name: str, kept: Any, g: "torch.Tensor") -> None:
        self.factors[name] = (*kept, g, gram(g))

    def take(self) -> tuple[dict[str, tuple[Any, Any, Any, Any]], "torch.Tensor", dict[str, "torch.Tensor"]]:
        squares = {n: (aa * gg).sum((1, 2)) for n, (_, aa, _, gg) in self.factors.items()}
        factors, self.factors = self.factors, {}
        return factors, sum(squares.values()), squares  # pyright: ignore[reportReturnType]


def fit_adapted(
    model: "PreTrainedModel",
    model_hash: str,
    layers: dict[str, "torch.nn.Module"],
    queries: Sequence[Tokens],
    documents: Sequence[Tokens],
    *,
    k: int = 2048,
    rank: int = 128,
    max_layers: int = 96,
    batch_tokens: int = 1024,
    reduction: str = "mean",
    seed: int = 0,
    advance: Any = lambda n: None,
) -> AdaptedFit:
    """Choose bases and coordinates from a sample of queries, documents or both.

    Two passes over the sample. The first finds each layer's leading `rank` eigenvectors of
    sum G G^T and sum G^T G, mean over queries plus mean over documents, every G divided by its
    text's norm, by a randomised range finder on the factors: G G^T Omega = g^T (a a^T) (g Omega).
    The second measures every coordinate's energy e_q (queries) and e_d (documents), keeps the `k`
    largest e_q e_d over all layers, and takes the kept coordinates' mean and scale.

    Args:
        model: frozen, in evaluation mode.
        model_hash: identifies the model in the fit.
        layers: the layers that may be kept.
        queries: tokenised queries; may be empty.
        documents: tokenised documents; may be empty.
        k: coordinates to keep.
        rank: basis vectors per layer and side, at most.
        max_layers: layers, those with the most energy, whose coordinates are measured.
        batch_tokens: padded tokens per pass.
        reduction: see GradientPass.
        seed: of the range finder.
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
    finder = _RangeFinder(layers, rank, seed)
    sink = _FactorSink()
    for group, texts in enumerate(groups):
        for batch, _ in run_pass(model, layers, sink, make_batches(texts, batch_tokens), reduction):
            factors, square, squares = sink.take()
            finder.add(group, factors, square, squares, 1.0 / len(texts))
            advance(len(batch.positions))
    kept, left, right = finder.bases(max_layers)

    energies = [{n: torch.zeros(left[n].shape[1], right[n].shape[1]) for n in kept} for _ in groups]
    blocks: list[dict[str, list[torch.Tensor]]] = [{n: [] for n in kept} for _ in groups]
    for group, texts in enumerate(groups):
        for batch, _ in run_pass(model, layers, sink, make_batches(texts, batch_tokens), reduction):
            factors, square, _ = sink.take()
            good = (torch.isfinite(square) & (square > 0)).cpu()
            inverse = square.rsqrt()[:, None, None]
            for name in kept:
                a, _, g, _ = factors[name]
                l_side = (g @ left[name].to(g)).float() * inverse
                block = (l_side.transpose(1, 2) @ (a @ right[name].to(a)).float()).cpu()[good]
                energies[group][name] += block.square().sum(0)
                blocks[group][name].append(block.half())
            advance(len(batch.positions))

    # e_q * e_d, or the square of the only energy there is.
    total = {n: energies[0][n] * energies[-1][n] for n in kept}
    flat = torch.cat([total[n].flatten() for n in kept])
    top = torch.topk(flat, min(k, len(flat))).indices.sort().values
    bounds = np.cumsum([0] + [total[n].numel() for n in kept])
    fit_left, fit_right, coordinates, names, samples = {}, {}, {}, [], []
    for name, start, stop in zip(kept, bounds, bounds[1:], strict=False):
        mine = top[(top >= int(start)) & (top < int(stop))] - int(start)
        if not len(mine):
            continue
        width = right[name].shape[1]
        rows, columns = mine // width, mine % width
        used_rows, new_rows = rows.unique(return_inverse=True)
        used_columns, new_columns = columns.unique(return_inverse=True)
        fit_left[name], fit_right[name] = (
            left[name][:, used_rows].clone(),
            right[name][:, used_columns].clone(),
        )
        coordinates[name] = new_rows * len(used_columns) + new_columns
        names.append(name)
        sample = torch.cat([torch.cat(b[name]).flatten(1)[:, mine] for b in blocks]).float()
        samples.append(sample)
    values = torch.cat(samples, 1)
    return AdaptedFit(
        model_hash,
        names,
        {n: t.cpu() for n, t in fit_left.items()},
        {n: t.cpu() for n, t in fit_right.items()},
        coordinates,
        values.mean(0),
        values.std(0).clamp(min=1e-8) if len(values) > 1 else values.abs().mean(0).clamp(min=1e-8),
    )


class _RangeFinder:
    """Sketches each layer's two gradient covariances and solves for their leading eigenvectors."""

    def __init__(self, layers: dict[str, "torch.nn.Module"], rank: int, seed: int) -> None:
        import torch

        self.rank = rank
        self.omega: dict[tuple[str, str], torch.Tensor] = {}
        self.sketch: dict[tuple[str, str], torch.Tensor] = {}
        self.energy: dict[tuple[int, str], float] = {}
        for name, layer in layers.items():
            device: Any = layer.weight.device
            for side, size in zip(("left", "right"), layer_shape(layer), strict=True):
                columns = min(rank + OVERSAMPLING, size)
                generator = torch.Generator().manual_seed(seed_for(seed, "range finder", name, side) >> 1)
                omega = torch.randn(size, columns, generator=generator)
                self.omega[name, side] = torch.linalg.qr(omega).Q.to(device)
                self.sketch[name, side] = torch.zeros(size, columns, device=device)

    def add(self, group: int, factors: Any, square: "torch.Tensor", squares: Any, weight: float) -> None:
        """Add a batch: Y += weight * sum of G G^T Omega / ||G||^2, both sides, finite texts only."""
        import torch

        good = torch.isfinite(square) & (square > 0)
        share = torch.where(good, weight / square, torch.zeros_like(square))
        for name, (a, aa, g, gg) in factors.items():
            if not bool(good.all()):
                a, g = torch.where(good[:, None, None], a, 0), torch.where(good[:, None, None], g, 0)
                aa, gg = torch.where(good[:, None, None], aa, 0), torch.where(good[:, None, None], gg, 0)
            mine = torch.where(good, squares[name] * share, torch.zeros_like(share)).sum()
            self.energy[group, name] = self.energy.get((group, name), 0.0) + float(mine)
            for side, x, other in (("left", g, aa), ("right", a, gg)):
                y = (other * share[:, None, None]) @ (x @ self.omega[name, side].to(x)).float()
                self.sketch[name, side] += (x.flatten(0, 1).T @ y.flatten(0, 1).to(x)).float()

    def bases(
        self, max_layers: int
    ) -> tuple[list[str], dict[str, "torch.Tensor"], dict[str, "torch.Tensor"]]:
        """Return the layers with the most energy and their eigenvectors (Nystroem)."""
        names = list(dict.fromkeys(name for _, name in self.energy))
        groups = {group for group, _ in self.energy}
        weight = {n: math.prod(self.energy[group, n] for group in groups) for n in names}
        if not any(weight.values()):
            raise ValueError("no text of the fit's sample has a finite, non-zero gradient")
        chosen = set(sorted(names, key=lambda n: -weight[n])[:max_layers])
        kept = [n for n in names if n in chosen]
        return kept, {n: self._leading(n, "left") for n in kept}, {n: self._leading(n, "right") for n in kept}

    def _leading(self, name: str, side: str) -> "torch.Tensor":
        """Source: Tropp, Yurtsever, Udell, Cevher 2017, fixed-rank Nystroem approximation, algorithm 3."""
        import torch

        omega, y = self.omega[name, side].double(), self.sketch[name, side].double()
        shift = torch.finfo(torch.float32).eps * y.norm()
        y = y + shift * omega
        core = omega.T @ y
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        good = values > shift * 1e-3
        factor = y @ (vectors[:, good] / values[good].sqrt())
        u = torch.linalg.svd(factor, full_matrices=False).U
        return u[:, : self.rank].float()

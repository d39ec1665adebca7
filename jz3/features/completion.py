"""Queries that know what the kept coordinates say about those that were left out.

Documents keep K coordinates x_S; a query may well be computed on many more, x_S and x_R. What the score
misses is <x_R(i), x_R(q)>, and over documents it is not independent of what the score has. It is estimated
in two steps, from the sample's features X_S [n, K] and X_R [n, R], documents centred.

First by the parts of the score itself: texts that agree in the kept coordinates agree in the others, the
more surely the weaker the kept ones are. With the kept coordinates in groups b by energy (the first 64, as
many more, twice as many ...) and weights beta_b >= 0 of least squares over all pairs of the sample,

    <x_R(i), x_R(j)> ~ sum_b beta_b <x_b(i), x_b(j)>

What that leaves is, for a new document, estimated by ridge regression on its x_S. Both are linear in x_S,
so that they can be added to the query once; with beta per coordinate

    psi_q = (1 + beta) x_S(q) + X_S^T (X_S X_S^T + lambda I)^-1 (X_R x_R(q) - X_S (beta x_S(q)))

lambda is the one that predicts best what is left of the sample's documents, each predicted from all others.
Weights and ridge are used only if they predict documents that they were not fitted to better than nothing.

Documents, their codes and the scan stay as they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jz3.features.adapted import AdaptedFit
from jz3.gradients import Tokens

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""What is tried for lambda, as shares of the mean squared length of the sample's centred x_S."""
STRONGEST = 64
"""Coordinates in the first group."""
GAIN = 0.02
"""Share of the squared error that weights must explain of pairs that they weren't fitted to."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A large fit for queries, and how its numbers fold into the documents' few."""

    fit: AdaptedFit
    """K + R coordinates."""
    positions: "torch.Tensor"
    """[K] int64, ascending: the documents' coordinates among them."""
    sample: "torch.Tensor"
    """[n, K + R] float32: the sample documents' features, centred."""
    solved: "torch.Tensor"
    """[n, K] float32: (X_S X_S^T + lambda I)^-1 X_S, or zeros."""
    beta: "torch.Tensor"
    """[K] float32, the weight of each coordinate's group, or zeros."""
    ridge: float
    """lambda, as a share; infinite if nothing is added."""

    @classmethod
    def of(cls, fit: AdaptedFit, k: int, values: "torch.Tensor") -> "Completion":
        """Prepare the completion.

        Args:
            fit: K + R coordinates; documents are stored by `fit.top(k)`.
            k: K.
            values: [n, K + R] features of sample documents by `fit`; rows that are not finite are left out.
        """
        import torch

        values = values[torch.isfinite(values).all(1)].double()
        positions = fit.top_positions(k)
        mean = values.mean(0)
        centred = values - mean
        kept = centred[:, positions]
        # Queries are not centred: documents' agreement with what queries have in common counts too.
        groups = _groups(fit.energy[positions])
        parts = torch.stack([kept[:, g] @ values[:, positions[g]].T for g in groups])
        missed = centred @ values.T - parts.sum(0)
        weights = _weights(parts, missed)
        left = missed - torch.einsum("b,bij->ij", weights, parts)
        beta = torch.zeros(k, dtype=torch.float64)
        for group, weight in zip(groups, weights, strict=True):
            beta[group] = weight
        kernel = kept @ kept.T
        unit = kernel.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        others = ~torch.eye(len(kernel), dtype=torch.bool)
        best, ridge, inverse = float(left[others].square().mean()), float("inf"), torch.zeros_like(kernel)
        for share in RIDGES:
            solved = torch.linalg.inv(kernel + share * unit * torch.eye(len(kernel), dtype=kernel.dtype))
            hat = kernel @ solved
            # The error of predicting a document from all others, without solving once per document.
            left_out = (left - hat @ left) / (1 - hat.diagonal())[:, None]
            error = float(left_out[others].square().mean())
            if error < best:
                best, ridge, inverse = error, share, solved
        return cls(fit, positions, centred.float(), (inverse @ kept).float(), beta.float(), ridge)

    def fold(self, values: "torch.Tensor") -> "torch.Tensor":
        """Turn queries' features by the large fit [Q, K + R] into psi [Q, K]."""
        kept = values[:, self.positions]
        rest = values.clone()
        rest[:, self.positions] = -self.beta * kept
        return (1 + self.beta) * kept + (rest @ self.sample.T) @ self.solved


def _groups(energy: "torch.Tensor") -> "list[torch.Tensor]":
    """Divide coordinates by energy: the STRONGEST, as many more, twice as many, four times as many ..."""
    import torch

    order = torch.sort(energy, descending=True, stable=True).indices
    bounds = [0]
    while bounds[-1] < len(order):
        bounds.append(min(max(2 * bounds[-1], STRONGEST), len(order)))
    return [order[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def _weights(parts: "torch.Tensor", missed: "torch.Tensor") -> "torch.Tensor":
    """Return the weights [B] >= 0 of parts [B, n, n] whose sum is nearest to what is missed [n, n], over pairs.

    Zeros if weights of every other document don't explain GAIN of the pairs of the documents between, and
    the other way round.
    """
    import torch
    from scipy.optimize import nnls

    def solve(part: slice) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
        pairs, target = parts[:, part, part], missed[part, part]
        others = ~torch.eye(len(target), dtype=torch.bool)
        columns, wanted = pairs[:, others].T, target[others]
        if not len(wanted):
            return columns, wanted, torch.zeros(len(parts), dtype=torch.float64)
        return columns, wanted, torch.from_numpy(nnls(columns.numpy(), wanted.numpy())[0])

    (one, first, by_one), (two, second, by_two) = solve(slice(0, None, 2)), solve(slice(1, None, 2))
    error = (first - one @ by_two).square().sum() + (second - two @ by_one).square().sum()
    if not error < (1 - GAIN) * (first.square().sum() + second.square().sum()):
        return torch.zeros(len(parts), dtype=torch.float64)
    return solve(slice(None))[2]


def fit_completion(
    model: "PreTrainedModel",
    layers: dict[str, "torch.nn.Module"],
    fit: AdaptedFit,
    k: int,
    documents: Sequence[Tokens],
    *,
    batch_tokens: int = 2048,
    reduction: str = "mean",
    advance: Callable[[int], None] = lambda n: None,
) -> Completion:
    """Compute the sample documents' features by a large fit and prepare the completion.

    Args:
        model: frozen, in evaluation mode.
        layers: all layers whose gradients count, from `linear_layers`.
        fit: K + R coordinates; documents are stored by `fit.top(k)`.
        k: K.
        documents: the sample, for example the fit's own documents; n (K + R) numbers are held.
        batch_tokens: padded tokens per pass.
        reduction: see GradientPass.
        advance: called with the number of texts just done.

    Returns:
        The completion.

    Raises:
        ValueError: there are fewer than two documents.
    """
    from jz3.features.extract import extract

    if len(documents) < 2:
        raise ValueError(f"a completion needs at least two documents, got {len(documents)}")
    options = {"batch_tokens": batch_tokens, "reduction": reduction}
    return Completion.of(fit, k, extract(model, layers, documents, fit, advance=advance, **options).values)

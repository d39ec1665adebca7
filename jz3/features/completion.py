"""Queries that know what the kept coordinates say about those that were left out.

Documents keep K coordinates x_S; a query may well be computed on many more, x_S and x_R. What the score
misses is <x_R(i), x_R(q)>, and over documents x_R is not independent of x_S. With the sample's centred
features X_S [n, K] and X_R [n, R], the ridge estimate of that part for a new document is linear in its
x_S, so that it can be added to the query once:

    psi_q = x_S(q) + X_S^T (X_S X_S^T + lambda I)^-1 X_R x_R(q)

lambda is the one that predicts best what the sample's documents miss of each other, each predicted from
all others; if none is better than nothing, nothing is added.

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
        centred = values - values.mean(0)
        kept = centred[:, positions]
        kernel = kept @ kept.T
        missed = centred @ centred.T - kernel
        unit = kernel.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        others = ~torch.eye(len(kernel), dtype=torch.bool)
        best, ridge, inverse = float(missed[others].square().mean()), float("inf"), torch.zeros_like(kernel)
        for share in RIDGES:
            solved = torch.linalg.inv(kernel + share * unit * torch.eye(len(kernel), dtype=kernel.dtype))
            hat = kernel @ solved
            # The error of predicting a document from all others, without solving once per document.
            left_out = (missed - hat @ missed) / (1 - hat.diagonal())[:, None]
            error = float(left_out[others].square().mean())
            if error < best:
                best, ridge, inverse = error, share, solved
        return cls(fit, positions, centred.float(), (inverse @ kept).float(), ridge)

    def fold(self, values: "torch.Tensor") -> "torch.Tensor":
        """Turn queries' features by the large fit [Q, K + R] into psi [Q, K]."""
        rest = values.clone()
        rest[:, self.positions] = 0
        return values[:, self.positions] + (rest @ self.sample.T) @ self.solved


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

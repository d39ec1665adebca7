"""Leading directions of the gradients' left and right covariance, of a stream of texts in constant memory."""

import math
from typing import TYPE_CHECKING, Any

from jz3.gradients import layer_shape
from jz3.seeding import seed_for

if TYPE_CHECKING:
    import torch

OVERSAMPLING = 8


class RangeFinder:
    """Sketches each layer's two gradient covariances and solves for their leading eigenvectors."""

    def __init__(self, layers: dict[str, "torch.nn.Module"], rank: int, seed: int, tokens: float) -> None:
        """Draw the sketches' random directions.

        Args:
            layers: by name.
            rank: directions of a layer, half as many more on the left and half as many fewer on the right.
            seed: of the directions.
            tokens: how much the covariance of single tokens counts on the left, in the trace of G G^T.
        """
        import torch

        self.tokens = tokens
        # Inputs have most of their energy in few directions, output gradients spread theirs.
        self.rank = {"left": rank + rank // 2, "right": rank - rank // 2}
        self.omega: dict[tuple[str, str], torch.Tensor] = {}
        self.sketch: dict[tuple[str, str], torch.Tensor] = {}
        self.energy: dict[tuple[int, str], torch.Tensor] = {}
        for name, layer in layers.items():
            device: Any = layer.weight.device
            self.device = device
            for side, size in zip(("left", "right"), layer_shape(layer), strict=True):
                columns = min(self.rank[side] + OVERSAMPLING, size)
                generator = torch.Generator().manual_seed(seed_for(seed, "range finder", name, side) >> 1)
                omega = torch.randn(size, columns, generator=generator, dtype=torch.float32)
                self.omega[name, side] = torch.linalg.qr(omega).Q.to(device)
                self.sketch[name, side] = torch.zeros(size, columns, device=device, dtype=torch.float32)

    def add(self, group: int, factors: Any, square: "torch.Tensor", squares: Any, weight: float) -> None:
        """Add a batch: Y += weight * sum of G G^T Omega / ||G||^2, both sides, finite texts only."""
        import torch

        good = torch.isfinite(square) & (square > 0)
        share = torch.where(good, weight / square, torch.zeros_like(square))
        # Asked once for all layers, as a GPU is waited for at every answer.
        whole = bool(good.all())
        for name, (a, aa, g, gg) in factors.items():
            if not whole:
                a, g = torch.where(good[:, None, None], a, 0), torch.where(good[:, None, None], g, 0)
                aa, gg = torch.where(good[:, None, None], aa, 0), torch.where(good[:, None, None], gg, 0)
            mine = torch.where(good, squares[name] * share, torch.zeros_like(share)).sum().double()
            before = self.energy.get((group, name))
            self.energy[group, name] = mine if before is None else before + mine
            lengths = aa.diagonal(dim1=1, dim2=2)
            # The trace of sum_t |a_t|^2 g_t g_t^T; that of G G^T is the layer's square.
            alone = (lengths * gg.diagonal(dim1=1, dim2=2)).sum(1)
            ratio = torch.where(alone > 0, self.tokens * squares[name] / alone, torch.zeros_like(alone))
            shrunk = aa + torch.diag_embed(lengths * ratio[:, None])
            for side, x, other in (("left", g, shrunk), ("right", a, gg)):
                y = (other * share[:, None, None]) @ (x @ self.omega[name, side].to(x)).float()
                self.sketch[name, side] += (x.flatten(0, 1).T @ y.flatten(0, 1).to(x)).float()

    def bases(
        self, max_layers: int
    ) -> tuple[list[str], dict[str, "torch.Tensor"], dict[str, "torch.Tensor"]]:
        """Return the layers with the most energy and their eigenvectors (Nystroem)."""
        names = list(dict.fromkeys(name for _, name in self.energy))
        groups = {group for group, _ in self.energy}
        weight = {n: math.prod(float(self.energy[group, n]) for group in groups) for n in names}
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
        return u[:, : self.rank[side]].float()

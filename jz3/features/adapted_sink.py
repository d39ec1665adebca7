"""Each text's gradient on a fit's coordinates and its norm, from the factors of a pass."""

from typing import TYPE_CHECKING, Any

import numpy as np

from jz3.gradients import InputGrams, gram

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from jz3.features.adapted import AdaptedFit

GRAM_TOKENS = 128
"""Longest text whose norm is taken by the Gram identity."""


class AdaptedSink:
    """Projects each text's gradient on a fit's coordinates and measures its norm.

    ||G||^2 is summed over layers by the Gram identity, exactly, for texts of up to GRAM_TOKENS tokens.
    For longer ones it is ||L^T G R||^2, exactly, plus a two-sided count sketch of what the fit's bases
    leave: its error is theirs, and its cost doesn't grow with the text. The choice depends on the
    text's own length alone; `norms` counts both. Layers of one input size within a part of the model have the
    signs of their inputs in common, so that a shared input is multiplied once.
    """

    wide = True

    def __init__(self, fit: "AdaptedFit", dtype: "torch.dtype", device: "torch.device") -> None:
        self._fit, self._device = fit, device
        self._fused = device.type != "cpu"  # one op reads g once for both products; a CPU has faster parts
        self._coordinates = {n: t.to(device) for n, t in fit.coordinates.items()}
        self._offset = dict(
            zip(fit.layers, np.cumsum([0] + [len(fit.coordinates[n]) for n in fit.layers]), strict=False)
        )
        self._grams = InputGrams()
        self._groups: dict[str, tuple[str, ...]] = {}
        self._input: Any = None
        self._projected: Any = None
        self._matrices: dict[Any, Any] = {}
        self._products: dict[Any, Any] = {}
        self._long = 0
        self._values: Any = None
        self._square: Any = None
        self.norms = {"gram": 0, "sketch": 0}

    def share(self, groups: "Iterable[tuple[str, ...]]") -> None:
        """Take the names of layers that will be given one tensor, one layer after the other."""
        self._groups = {name: group for group in groups for name in group}

    def begin(self, lengths: "torch.Tensor") -> None:
        """Take the lengths of the next batch's texts, the longest first (else all norms are by Gram)."""
        # A pass that broke off may have left its sums.
        self._values = self._square = self._input = None
        ordered = bool((lengths[1:] <= lengths[:-1]).all())
        self._long = int((lengths > GRAM_TOKENS).sum()) if ordered else 0
        self.norms["sketch"] += self._long
        self.norms["gram"] += len(lengths) - self._long

    def _signs(self, side: str, name: str, size: int) -> "torch.Tensor":
        """Return the signs of a count sketch."""
        from jz3.ops.signs import signs

        key = name if side == "left" else f"{name.rpartition('.')[0]} {size}"
        return signs(0, f"norm {key} {side}", 1, size)[0]

    def _width(self, side: str, name: str) -> int:
        """Return the number of basis vectors of a layer."""
        return getattr(self._fit, side)[name].shape[1] if name in self._coordinates else 0

    def _bases(self, side: str, names: tuple[str, ...], size: int, dtype: "torch.dtype") -> "torch.Tensor":
        """Return the bases that factors of one side are multiplied with, beside each other."""
        import torch

        from jz3.gradients.products import LANES

        parts = [getattr(self._fit, side)[n] for n in names if n in self._coordinates]
        if len(parts) > 1 and not self._long:
            # The last basis is read in whole lanes.
            parts.append(torch.zeros(size, LANES))
        return torch.cat([torch.zeros(size, 0), *parts], 1).to(self._device, dtype)

    def _matrix(self, side: str, names: tuple[str, ...], size: int, dtype: "torch.dtype") -> "torch.Tensor":
        """Return bases with the count sketch of long texts beside them."""
        import torch

        from jz3.gradients.products import fold_matrix

        key = (side, names, bool(self._long), dtype)
        if key not in self._matrices:
            matrix = self._bases(side, names, size, dtype)
            if self._long:
                matrix = torch.cat([matrix, fold_matrix(self._signs(side, names[0], size)).to(matrix)], 1)
            self._matrices[key] = matrix
        return self._matrices[key]

    def _project(self, side: str, names: tuple[str, ...], x: "torch.Tensor") -> "torch.Tensor":
        """Multiply factors [B, S, D] with a matrix of one side; a CPU keeps the result [B S, P] in float32."""
        import torch

        from jz3.gradients.products import Product

        x = x.flatten(0, 1)
        size = x.shape[1]
        if self._fused:
            return x @ self._matrix(side, names, size, x.dtype)
        key = (side, names, bool(self._long), x.dtype)
        if key not in self._products:
            signs = self._signs(side, names[0], size) if self._long else None
            self._products[key] = Product(self._bases(side, names, size, x.dtype), signs=signs)
        return self._products[key](x, torch.float32)

    def forward(self, name: str, a: "torch.Tensor") -> Any:
        """Keep a R with the sketch of a, and for short texts the Gram matrix of a; a itself is dropped."""
        grams = self._grams.of(a[self._long :]) if self._long < len(a) else None
        if name not in self._coordinates and not self._long:
            return None, grams
        group = self._groups.get(name, (name,))
        if self._input is not a or len(group) == 1:
            rows = a if any(n in self._coordinates for n in group) else a[: self._long]
            self._input, self._projected = a, self._project("right", group, rows)
        begin = sum(self._width("right", n) for n in group[: group.index(name)])
        return (self._projected, begin), grams

    def backward(self, name: str, kept: Any, g: "torch.Tensor") -> None:
        """Add the layer's part of ||G||^2 and, for a kept layer, its coordinates."""
        import torch

        from jz3.gradients.products import known_and_rest

        projected, grams = kept
        if self._square is None:
            self._square = torch.zeros(len(g), device=g.device)
            self._values = torch.zeros(len(g), self._fit.k, device=g.device)
        if grams is not None:
            self._square[self._long :] += (grams * gram(g[self._long :])).sum((1, 2))
        if projected is None:
            return
        inputs, begin = projected
        known, sketch = self._blocks(name, inputs, begin, g)
        if name not in self._coordinates:
            self._square[: self._long] += sketch.square().sum((1, 2))
            return
        chosen, start = self._coordinates[name], self._offset[name]
        self._values[:, start : start + len(chosen)] = known.flatten(1)[:, chosen]
        if self._long:
            turns = (self._turn(side, name) for side in ("left", "right"))
            self._square[: self._long] += known_and_rest(known[: self._long], sketch, *turns)

    def _blocks(self, name: str, projected: "torch.Tensor", begin: int, g: "torch.Tensor") -> Any:
        """Return L^T G R of every text and the sketch of the long ones' G, from a R (from a column on) and g.

        Returns:
            [B, p_o, p_i] and [long, s_o, s_i], float32; None for what isn't wanted.
        """
        import torch

        from jz3.gradients.products import BUCKETS, segment_outer
        from jz3.ops.segment_project import segment_project

        rows, columns = self._width("left", name), self._width("right", name)
        if not rows:
            g = g[: self._long]
        count, width, _ = g.shape
        bounds = torch.arange(0, count * width + 1, width, device=g.device)
        known = sketch = None
        if self._fused:
            left = self._matrix("left", (name,), g.shape[2], g.dtype)
            # Pads have no gradient, so that a row of the batch is its text's segment.
            both = segment_project(projected[: count * width], g.flatten(0, 1), left, bounds).float()
            return both[:, :rows, :columns], both[: self._long, rows:, columns:]
        left = self._project("left", (name,), g)
        if rows:
            known = segment_outer(left[:, :rows], projected[:, begin : begin + columns], bounds)
        if self._long:
            few = bounds[: self._long + 1]
            sketch = segment_outer(left[:, rows:], projected[:, -BUCKETS:], few)
        return known, sketch

    def _turn(self, side: str, name: str) -> "torch.Tensor":
        """Return L^T S or R^T S: how the sketch sees a layer's basis."""
        key = f"{side} turned", name
        if key not in self._matrices:
            from jz3.gradients.products import fold_matrix

            basis = getattr(self._fit, side)[name]
            sketch = fold_matrix(self._signs(side, name, len(basis)))
            self._matrices[key] = (basis.T @ sketch).to(self._device)
        return self._matrices[key]

    def take(self) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Return (unit-norm values [B, K], norms [B]) of the batch just run and forget it."""
        norm = self._square.clamp(min=0).sqrt()
        values = self._values / norm[:, None]
        self._values = self._square = self._input = self._projected = None
        return values.cpu(), norm.cpu()

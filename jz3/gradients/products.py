"""Products of rows with fixed matrices: by jz3's own code on CPUs that are fast in bfloat16, else by torch."""

from typing import Any

import torch

from jz3 import backend
from jz3.machine import avx2_alone, fast_bfloat16_cpu

NO_VECTORS, BFLOAT16_VECTORS = 0, 2
"""Of the vector units of csrc/cpu/ops.h none, and the one that takes rows of bfloat16."""
LANES = 16
"""The native code computes so many columns at least."""
BUCKETS = 32
"""Sums that `fold_matrix` takes of a row."""
GATED = 32
"""Columns of gate and up projections that are computed in turn."""
WHOLE_BITS = {"int8": 8, "int16": 16}
GROUP = 192
"""Numbers of a row or column under one scale, where that leaves none over: the more, the faster and the coarser."""


def native_products(dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether jz3's own products of a number format are the faster ones.

    Of bfloat16 on CPUs that are fast in it, with AMX or AVX-512; of float32 on those with AVX2 alone.
    """
    if backend.extension_missing():
        return False
    unit = getattr(backend.extension(), "vector_unit", int)()
    if dtype == torch.bfloat16:
        return fast_bfloat16_cpu() and unit == BFLOAT16_VECTORS
    return dtype == torch.float32 and avx2_alone() and unit != NO_VECTORS


def pack(matrix: torch.Tensor) -> torch.Tensor:
    """Bring a matrix [I, O] to the layout of jz3's own products on this machine.

    Returns:
        For bfloat16, int32 [ceil(O / 64), ceil(I / 2), 64]: pairs of numbers, in panels as csrc/cpu/tiles.h has
        them. For float32, float32 [ceil(O / 16), I, 16].
    """
    depth, columns = matrix.shape
    if matrix.dtype == torch.float32:
        packed = torch.empty(-(-columns // LANES), depth, LANES, dtype=torch.float32)
    else:
        packed = torch.empty(-(-columns // 64), -(-depth // 2), 64, dtype=torch.int32)
    run = getattr(backend.extension(), f"pack_product_{str(matrix.dtype).removeprefix('torch.')}")
    run(matrix.data_ptr(), packed.data_ptr(), *matrix.shape, *matrix.stride(), backend.threads())
    return packed


def fold_matrix(signs: torch.Tensor) -> torch.Tensor:
    """Return the count sketch [I, BUCKETS] of signs [I]: every number is added to or taken from one sum.

    Of random signs, E <x S, y S> = <x, y>, as with a matrix full of signs, and the error is no larger.
    Source: Charikar, Chen and Farach-Colton, Finding Frequent Items in Data Streams (2002).
    """
    place = torch.arange(len(signs)) % BUCKETS
    matrix = torch.zeros(len(signs), BUCKETS, dtype=torch.float32)
    # Neighbours lie in one lane of two vectors: the halves of 32 bits.
    matrix[torch.arange(len(signs)), place // 2 + place % 2 * (BUCKETS // 2)] = signs.float()
    return matrix


class Product:
    """y = x W (+ b) for a fixed matrix W [I, O], packed once where jz3's own code computes it.

    With signs, y = x [W S] for the S of `fold_matrix`, which costs little. Sums are float32 and rounded once to the
    dtype of y.
    """

    def __init__(
        self, matrix: torch.Tensor, bias: torch.Tensor | None = None, signs: torch.Tensor | None = None
    ) -> None:
        """Pack a matrix.

        Args:
            matrix: W [I, O], any strides.
            bias: b [O] or None.
            signs: +1 and -1 [I], or None; not with a bias.
        """
        self._depth, self._columns = matrix.shape
        self._bias, self._signs = bias, None
        self._matrix = self._packed = None
        whole = matrix.dtype == torch.float32 or not self._depth % 2  # pairs of bfloat16
        if matrix.device.type == "cpu" and whole and self._depth and native_products(matrix.dtype):
            self._packed = pack(matrix)
            if signs is not None:
                # As bits.
                self._signs = torch.where(signs < 0, -0.0, 0.0).to(matrix.dtype)
        elif signs is None:
            self._matrix = matrix
        else:
            self._matrix = torch.cat([matrix, fold_matrix(signs).to(matrix)], 1)

    def __call__(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Multiply.

        Args:
            x: [T, I]; its rows may have gaps between them.
            dtype: of the result, float32 or that of x; that of x by default.

        Returns:
            [T, O], or [T, O + BUCKETS] with signs.
        """
        dtype = dtype or x.dtype
        if x.shape[1] != self._depth:
            raise ValueError(f"x must have {self._depth} columns, got {x.shape[1]}")
        if self._packed is None:
            matrix: Any = self._matrix
            y = x @ matrix if self._bias is None else torch.addmm(self._bias, x, matrix)
            return y.to(dtype)
        columns, signs, width = _lanes(self._columns), 0, self._columns
        if self._signs is not None:
            signs, width = self._signs.data_ptr(), width + BUCKETS
        x = _rows(x)
        y = torch.empty(len(x), _lanes(width), dtype=dtype)
        names = (str(t).removeprefix("torch.") for t in (x.dtype, dtype))
        run = getattr(backend.extension(), f"product_{'_'.join(names)}")
        pointers = (x.data_ptr(), self._packed.data_ptr(), signs, y.data_ptr())
        sizes = (len(x), columns, self._depth, x.stride(0), y.stride(0), self._columns)
        run(*pointers, *sizes, backend.threads())
        y = y[:, :width]
        return y if self._bias is None else y.add_(self._bias)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return x in rows of numbers behind one another, for bfloat16 of aligned pairs, which the native code takes."""
    pairs = x.element_size() == 4 or not (x.stride(0) % 2 or x.data_ptr() % 4)
    return x if x.stride(1) == 1 and pairs else x.contiguous()


def _lanes(columns: int) -> int:
    return -(-columns // LANES) * LANES


def group_of(depth: int) -> int:
    """Return how many numbers of `depth` have one scale."""
    return 128 if depth % GROUP else GROUP


class WholeMatrix:
    """A matrix W [I, O] in whole numbers under one scale per `group` of a column, as jz3's own products take it."""

    def __init__(self, matrix: torch.Tensor, products: str, group: int) -> None:
        """Quantise and pack a matrix of any strides; `group` is a multiple of 64.

        Args:
            matrix: W, bfloat16 or float32 for `int8`, float32 for `int16`.
            products: `int8` or `int16`.
            group: numbers of a column under one scale, a multiple of 64.
        """
        if group < 64 or group % 64:
            raise ValueError(f"group must be a multiple of 64, got {group}")
        depth, columns = matrix.shape
        extension = backend.extension()
        panel, size = (
            getattr(extension, f"{products.upper()}_PANEL"),
            getattr(extension, f"{products}_bytes")(group),
        )
        parts = -(-columns // panel) * -(-depth // group)
        # 64 bytes more: packed matrices start at a multiple of 64.
        self._bytes = torch.empty(parts * size + 64, dtype=torch.uint8)
        run = getattr(extension, f"pack_{products}_{str(matrix.dtype).removeprefix('torch.')}")
        run(matrix.data_ptr(), self.data_ptr(), group, depth, columns, *matrix.stride(), backend.threads())

    def data_ptr(self) -> int:
        """Return the address of its first part."""
        return -(-self._bytes.data_ptr() // 64) * 64


class WholeProduct:
    """y = x W for a fixed matrix W [I, O], both in whole numbers, one scale per group of a row of x or a column of W.

    `int8` has 255 levels; every 64 numbers of either are multiplied with a Hadamard matrix before, which spreads
    outliers (csrc/cpu/int8.h). `int16` has 6,689 levels in groups of 192 (csrc/cpu/int16.h).

    Sums are of whole numbers within these groups and float32 beyond, rounded once to the dtype of y. A row with
    a number that isn't finite, or for `int8` beyond a 64th of float32's largest, gives NaN.
    """

    def __init__(
        self,
        matrix: torch.Tensor,
        products: str,
        group: int | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        """Quantise and pack a matrix.

        Args:
            matrix: W [I, O] of any strides, bfloat16 or float32 for `int8`, float32 for `int16`.
            products: `int8` or `int16`.
            group: numbers under one scale, a multiple of 64; `group_of(I)` by default.
            bias: b [O] or None, added to the result.
        """
        self._depth, self._columns = matrix.shape
        self._group, self._bias = group or group_of(self._depth), bias
        self._products, self._matrix = products, WholeMatrix(matrix, products, self._group)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply.

        Args:
            x: [T, I], of a dtype that the matrix might have had; its rows may have gaps between them.

        Returns:
            [T, O] of the dtype of x.
        """
        if x.shape[1] != self._depth:
            raise ValueError(f"x must have {self._depth} columns, got {x.shape[1]}")
        if x.stride(1) != 1:
            x = x.contiguous()
        columns = _lanes(self._columns)
        y = torch.empty(len(x), columns, dtype=x.dtype)
        run = getattr(backend.extension(), f"product_{self._products}_{str(x.dtype).removeprefix('torch.')}")
        sizes = (self._group, len(x), columns, self._depth, x.stride(0), columns)
        run(x.data_ptr(), self._matrix.data_ptr(), y.data_ptr(), *sizes, backend.threads())
        y = y[:, : self._columns]
        return y if self._bias is None else y.add_(self._bias)


class GatedProducts:
    """SiLU(x G) * (x U) for fixed matrices G and U [I, O], and the gradient of what a matrix D [O, I] makes of it.

    What is element by element is done while the products are still being formed, which machines with tiles can do.
    """

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        """Pack [G, U] [I, 2 O], for which `can_gate` is true, and D."""
        self._width = gate_up.shape[1] // 2
        # The columns of G and U in turn.
        self._forward = pack(gate_up.unflatten(1, (2, -1, GATED)).transpose(1, 2).flatten(1))
        self._backward = pack(down.T)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return [x G, x U] [T, 2 O] and SiLU(x G) * (x U) [T, O], of x [T, I] bfloat16."""
        gate_up, y = x.new_empty(len(x), 2 * self._width), x.new_empty(len(x), self._width)
        self._run("gated_product", x, self._forward, gate_up, y.data_ptr())
        return gate_up, y

    def backward(self, g: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
        """Return the gradient with respect to [x G, x U], in their place, of that of D's output g [T, I]."""
        self._run("gated_gradient_product", g, self._backward, gate_up, 0)
        return gate_up

    def _run(self, name: str, x: torch.Tensor, packed: torch.Tensor, gate_up: torch.Tensor, y: int) -> None:
        x = _rows(x)
        sizes = (len(x), x.shape[1], self._width, x.stride(0))
        pointers = (x.data_ptr(), packed.data_ptr(), gate_up.data_ptr(), y)
        getattr(backend.extension(), name)(*pointers, *sizes, backend.threads())


def can_gate(gate_up: torch.Tensor) -> bool:
    """Whether `GatedProducts` takes a matrix like this [G, U]."""
    depth, columns = gate_up.shape
    return (
        gate_up.dtype == torch.bfloat16
        and gate_up.device.type == "cpu"
        and not depth % GATED
        and not columns % (2 * GATED)
        and native_products()
        and bool(backend.extension().tile_unit())
    )


def project_segments(
    factors: tuple[torch.Tensor, torch.Tensor],
    begin: int,
    bounds: torch.Tensor,
    turns: tuple[torch.Tensor, torch.Tensor],
    chosen: torch.Tensor,
    square: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Add ||G||^2 of every segment's gradient G = sum_t g_t a_t^T, and set its coordinates on two bases.

    G is known in part, K = L^T G R, and sketched as a whole, S: ||G||^2 is estimated as ||K||^2 + ||S - l^T K r||^2,
    where l and r are how the sketch sees the bases L and R.

    Args:
        factors: g [T, Q + BUCKETS] and a [T, A + BUCKETS] float32, from a Product with signs: the projected
            factors, the latter of several layers, and their sketches.
        begin: a's first column of this layer; with P columns in all.
        bounds: int64 [S + 1], segment i has the tokens bounds[i] .. bounds[i + 1].
        turns: l [Q, BUCKETS] and r [P, BUCKETS] float32; Q and P may be 0.
        chosen: int64 [C], entries of K as row * P + column.
        square: [S] float32, added to.
        values: [S, C] float32, set; its rows may have gaps between them.
    """
    (g, a), (left, right) = factors, turns
    rows, columns = len(left), len(right)
    strided = g.stride(1) == a.stride(1) == values.stride(1) == 1
    strided = strided and all(x.is_contiguous() for x in (bounds, left, right, chosen))
    if g.device.type == "cpu" and strided and native_segments():
        sketches = (g[:, -BUCKETS:], a[:, -BUCKETS:])
        tensors = (g, sketches[0], a[:, begin:], sketches[1], bounds, left, right, chosen, square, values)
        sizes = (len(square), rows, columns, len(chosen), g.stride(0), a.stride(0), values.stride(0))
        backend.extension().project_segments(*(t.data_ptr() for t in tensors), *sizes, backend.threads())
        return
    edges = bounds.tolist()
    for i, (b, e) in enumerate(zip(edges, edges[1:], strict=False)):
        known = g[b:e, :rows].T @ a[b:e, begin : begin + columns]
        add_square(known[None], (g[b:e, -BUCKETS:].T @ a[b:e, -BUCKETS:])[None], turns, square[i : i + 1])
        values[i] = known.flatten()[chosen]


def native_segments() -> bool:
    """Whether `project_segments` has code of its own here."""
    if backend.extension_missing():
        return False
    extension = backend.extension()
    return getattr(extension, "vector_unit", int)() != NO_VECTORS and extension.BUCKETS == BUCKETS


def add_square(
    known: torch.Tensor, sketch: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor], square: torch.Tensor
) -> None:
    """Add ||K||^2 + ||S - l^T K r||^2 to `square` [B], for K [B, Q, P] and S [B, BUCKETS, BUCKETS]."""
    left, right = turns
    rest = sketch - left.T @ known @ right
    square += known.square().sum((1, 2)) + rest.square().sum((1, 2))


class OutputLayer:
    """Cross entropy through a fixed output layer, as jz3.ops.ce_hidden_grad; logits stay in the cache."""

    LARGEST = 1e30
    """Sums of exp(logit - the target's) beyond this, of a loss over 69, are left to `ce_hidden_grad`."""

    def __init__(
        self, weight: torch.Tensor, products: str = "exact", groups: tuple[int, int] | None = None
    ) -> None:
        """Pack the layer's matrix [V, d] in both directions.

        Args:
            weight: the matrix.
            products: `exact`, `int8` or, of float32 rows, `int16`. Other layers stay exact.
            groups: numbers under one scale, of the products forward and backward (the latter a divisor of 384).
        """
        self._weight, self._bits, self._groups = weight.contiguous(), 0, (0, 0)
        self._packed: Any = None
        if weight.device.type != "cpu" or weight.shape[1] % LANES:
            return
        both = (weight.T, weight)
        if products in WHOLE_BITS and (weight.dtype == torch.float32 or products == "int8"):
            self._bits = WHOLE_BITS[products]
            self._groups = groups or (group_of(weight.shape[1]), GROUP)
            self._packed = [WholeMatrix(w, products, g) for w, g in zip(both, self._groups, strict=True)]
        elif weight.dtype == torch.bfloat16 and native_products():
            self._packed = [*map(pack, both)]

    def __call__(
        self, h: torch.Tensor, y: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return losses [T] float32 and weighted gradients [T, d] for hidden states [T, d] and targets [T]."""
        from jz3.ops.ce_hidden_grad import ce_hidden_grad
        from jz3.ops.checks import check_tensors

        if self._packed is None:
            return ce_hidden_grad(h, self._weight, y, weights)
        check_tensors(
            "OutputLayer", h=(h, "T d", "float"), y=(y, "T", "int"), weights=(weights, "T", "float")
        )
        if h.dtype != self._weight.dtype or h.shape[1] != self._weight.shape[1]:
            raise ValueError(
                f"h must be [T, {self._weight.shape[1]}] {self._weight.dtype}, got {list(h.shape)} {h.dtype}"
            )
        h, y, weights = h.contiguous(), y.long().contiguous(), weights.float().contiguous()
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < len(self._weight):
            raise ValueError(
                f"targets must be in [0, {len(self._weight)}), got {int(y.min())} to {int(y.max())}"
            )
        (loss, rest), grad = torch.empty(2, len(h), dtype=torch.float32), torch.empty_like(h)
        tensors = (h, self._weight, *self._packed, y, weights, loss, rest, grad)
        sizes = (len(h), *self._weight.shape, self._bits, *self._groups)
        run = getattr(backend.extension(), f"cross_entropy_{str(h.dtype).removeprefix('torch.')}")
        run(*(t.data_ptr() for t in tensors), *sizes, backend.threads())
        left = (~(rest < self.LARGEST)).nonzero()[:, 0]
        if len(left):
            loss[left], grad[left] = ce_hidden_grad(h[left], self._weight, y[left], weights[left])
        return loss, grad

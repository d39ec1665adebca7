"""Products of rows with fixed matrices: by jz3's own code where a CPU multiplies bfloat16 in vectors, else by torch."""

import functools
from typing import Any

import torch

from jz3 import backend
from jz3.machine import fast_bfloat16_cpu

LANES = 16
"""The native code computes so many columns at least."""


@functools.cache
def native_products() -> bool:
    """Whether jz3's own products are the faster ones: AVX-512 with bfloat16, without the tiles of AMX."""
    return (
        fast_bfloat16_cpu()
        and not torch.cpu._is_amx_tile_supported()
        and not backend.extension_missing()
        and bool(getattr(backend.extension(), "has_bf16", bool)())
    )


class Product:
    """y = x W (+ b) for a fixed matrix W [I, O], packed once where jz3's own code computes it.

    Sums are float32 and rounded once to the dtype of y.
    """

    def __init__(self, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Pack a matrix.

        Args:
            matrix: W [I, O], any strides.
            bias: b [O] or None.
        """
        depth, self._columns = matrix.shape
        self._bias = bias
        self._matrix = self._packed = None
        if matrix.dtype == torch.bfloat16 and matrix.device.type == "cpu" and not depth % 2 and native_products():
            self._packed = torch.empty(-(-self._columns // 64), depth // 2, 64, dtype=torch.int32)
            pointers = (matrix.data_ptr(), self._packed.data_ptr())
            backend.extension().pack_product(*pointers, *matrix.shape, *matrix.stride(), backend.threads())
        else:
            self._matrix = matrix

    def __call__(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Multiply.

        Args:
            x: [T, I]; its rows may have gaps between them.
            dtype: of the result, float32 or that of x; that of x by default.

        Returns:
            [T, O].
        """
        dtype = dtype or x.dtype
        if self._packed is None:
            matrix: Any = self._matrix
            y = x @ matrix if self._bias is None else torch.addmm(self._bias, x, matrix)
            return y.to(dtype)
        depth, columns = 2 * self._packed.shape[1], -(-self._columns // LANES) * LANES
        if x.stride(1) != 1 or x.stride(0) % 2 or x.data_ptr() % 4:
            x = x.contiguous()
        y = torch.empty(len(x), columns, dtype=dtype)
        run = getattr(backend.extension(), f"product_{str(dtype).removeprefix('torch.')}")
        pointers = (x.data_ptr(), self._packed.data_ptr(), y.data_ptr())
        run(*pointers, len(x), columns, depth, x.stride(0), columns, backend.threads())
        y = y[:, : self._columns]
        return y if self._bias is None else y.add_(self._bias)

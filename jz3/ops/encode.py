"""Codes: float features to 8, 4, 2 or 1 bits per coordinate, centred and scaled, and back.

    z = (value - mean_k) * (1 / scale_k)         in float32; 0 where scale_k = 0
    index = nearest level of the kind's table    z ~ mean_k + scale_k * unit * level

Levels are integers in [-127, 127] times one unit, so that scores over codes are exact integer sums
(`score_topk`). Sub-byte tables are the Lloyd-Max quantisers of the standard normal, rounded to that
grid; `int8` is uniform over +-5 scales.

Packing: K coordinates in ceil(K * bits / 8) bytes, coordinate k at bit (k * bits) mod 8 of byte
k * bits div 8; unused bits are zero.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jz3 import backend
from jz3.ops.checks import all_finite, check_tensors

if TYPE_CHECKING:
    import torch


SMALLEST_SCALE = 2.0**-126
"""Below the smallest normal float32 a scale counts as 0."""


@dataclass(frozen=True, slots=True)
class Codebook:
    """The table of a kind of code."""

    bits: int
    unit: float
    levels: tuple[int, ...]
    """Ascending; the value of index i is `unit * levels[i]`."""

    def thresholds(self) -> list[float]:
        """Return the bounds between neighbouring levels, for sub-byte kinds."""
        return [self.unit * (a + b) / 2 for a, b in zip(self.levels, self.levels[1:], strict=False)]


CODEBOOKS = {
    "int8": Codebook(8, 645 / 2**14, tuple(range(-128, 128))),
    "4bit": Codebook(
        4, 705 / 2**15, (-127, -96, -75, -58, -44, -31, -18, -6, 6, 18, 31, 44, 58, 75, 96, 127)
    ),
    "2bit": Codebook(2, 1559 / 2**17, (-127, -38, 38, 127)),
    "1bit": Codebook(1, 823 / 2**17, (-127, 127)),
}
"""Kind -> table. `int8` never uses its index 0 (level -128). The units are the optimal ones rounded to a few
bits, so that unit * level is exact in float32."""
LEVELS = {kind: np.array(book.levels, np.int8) for kind, book in CODEBOOKS.items()}
"""The same as the compiled CPU code reads it."""


def codebook(op: str, kind: str) -> Codebook:
    """Return the table of a kind.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in CODEBOOKS:
        raise ValueError(f"{op}: kind must be one of {', '.join(CODEBOOKS)}, got {kind!r}")
    return CODEBOOKS[kind]


def row_bytes(kind: str, dim: int) -> int:
    """Return how many bytes the codes of `dim` coordinates take."""
    return -(-dim * codebook("row_bytes", kind).bits // 8)


def encode_reference(
    values: "torch.Tensor", mean: "torch.Tensor", scale: "torch.Tensor", kind: str
) -> "torch.Tensor":
    """The definition of `encode` in plain torch."""
    import torch

    book = CODEBOOKS[kind]
    z = torch.where(scale >= SMALLEST_SCALE, (values - mean) * (1 / scale), torch.zeros_like(values))
    if book.bits == 8:
        index = (z * (1 / torch.tensor(book.unit, dtype=torch.float32))).clamp(-127, 127).round().int() + 128
        return index.to(torch.uint8)
    thresholds = torch.tensor(book.thresholds(), dtype=torch.float32, device=values.device)
    index = torch.bucketize(z.contiguous(), thresholds).to(torch.uint8)
    per_byte = 8 // book.bits
    out = torch.zeros(len(index), row_bytes(kind, values.shape[1]), dtype=torch.uint8, device=values.device)
    for place in range(per_byte):
        part = index[:, place::per_byte]
        out[:, : part.shape[1]] |= part << (place * book.bits)
    return out


def decode_reference(
    codes: "torch.Tensor", mean: "torch.Tensor", scale: "torch.Tensor", kind: str
) -> "torch.Tensor":
    """The definition of `decode` in plain torch."""
    import torch

    book = CODEBOOKS[kind]
    table = torch.tensor(book.levels, dtype=torch.float32, device=codes.device) * book.unit
    return mean + scale * table[unpack_codes(codes, kind, len(mean)).long()]


def unpack_codes(codes: "torch.Tensor", kind: str, dim: int) -> "torch.Tensor":
    """Turn packed codes (uint8 [N, bytes]) into table indices (uint8 [N, dim])."""
    import torch

    bits = CODEBOOKS[kind].bits
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return ((codes[..., None] >> shifts) & ((1 << bits) - 1)).flatten(1)[:, :dim]


def encode(values: "torch.Tensor", mean: "torch.Tensor", scale: "torch.Tensor", kind: str) -> "torch.Tensor":
    """Code features with a few bits per coordinate.

    Args:
        values: float32 [N, K].
        mean: what to subtract per coordinate: float32 [K].
        scale: what to divide by per coordinate (its standard deviation): float32 [K], not negative;
            a coordinate of scale 0 always decodes to about its mean.
        kind: `int8`, `4bit`, `2bit` or `1bit`.

    Returns:
        uint8 [N, ceil(K * bits / 8)].

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: shapes or devices don't agree, `kind` is unknown, a scale is negative or a number
            is not finite.
    """
    import torch

    check_tensors(
        "encode",
        values=(values, "N K", "float32"),
        mean=(mean, "K", "float32"),
        scale=(scale, "K", "float32"),
    )
    codebook("encode", kind)
    check_scale("encode", mean, scale)
    if not all_finite(values):
        row, column = (int(x) for x in torch.nonzero(~torch.isfinite(values))[0])
        raise ValueError(
            f"encode: values must be finite, got {float(values[row, column])} at [{row}, {column}]"
        )
    with torch.no_grad():
        return backend.call("encode", values, mean, scale, kind)


def decode(codes: "torch.Tensor", mean: "torch.Tensor", scale: "torch.Tensor", kind: str) -> "torch.Tensor":
    """Turn codes back into features: mean + scale * unit * level.

    Args:
        codes: uint8 [N, ceil(K * bits / 8)] of `encode`.
        mean, scale: float32 [K], those of `encode`.
        kind: `int8`, `4bit`, `2bit` or `1bit`.

    Returns:
        float32 [N, K].

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: shapes or devices don't agree or `kind` is unknown.
    """
    import torch

    sizes = check_tensors(
        "decode", codes=(codes, "N B", "uint8"), mean=(mean, "K", "float32"), scale=(scale, "K", "float32")
    )
    codebook("decode", kind)
    check_scale("decode", mean, scale)
    check_row_bytes("decode", kind, sizes["K"], sizes["B"])
    with torch.no_grad():
        return backend.call("decode", codes, mean, scale, kind)


def check_scale(op: str, mean: "torch.Tensor", scale: "torch.Tensor") -> None:
    """Refuse means and scales that aren't finite, and negative scales."""
    import torch

    for name, value in (("mean", mean), ("scale", scale)):
        good = torch.isfinite(value) if name == "mean" else torch.isfinite(value) & (value >= 0)
        if not bool(good.all()):
            at = int(torch.nonzero(~good)[0])
            expected = "finite" if name == "mean" else "finite and not negative"
            raise ValueError(f"{op}: {name} must be {expected}, got {float(value[at])} at [{at}]")


def check_row_bytes(op: str, kind: str, dim: int, got: int) -> None:
    """Refuse codes whose rows don't hold `dim` coordinates."""
    if got != row_bytes(kind, dim):
        raise ValueError(
            f"{op}: codes must have {row_bytes(kind, dim)} bytes a row for {dim} coordinates of {kind}, got {got}"
        )


def _encode_cpu(
    values: "torch.Tensor", mean: "torch.Tensor", scale: "torch.Tensor", kind: str
) -> "torch.Tensor":
    import torch

    book = CODEBOOKS[kind]
    values, mean, scale = values.contiguous(), mean.contiguous(), scale.contiguous()
    thresholds = torch.tensor(book.thresholds(), dtype=torch.float32, device="cpu")
    rows, dim = values.shape
    out = torch.empty(rows, row_bytes(kind, dim), dtype=torch.uint8, device="cpu")
    backend.extension().encode(
        values.data_ptr(),
        mean.data_ptr(),
        scale.data_ptr(),
        thresholds.data_ptr(),
        out.data_ptr(),
        rows,
        dim,
        out.shape[1],
        book.bits,
        book.unit,
        SMALLEST_SCALE,
        backend.threads(),
    )
    return out


def _decode_cpu(
    codes: "torch.Tensor", mean: "torch.Tensor", scale: "torch.Tensor", kind: str
) -> "torch.Tensor":
    import torch

    book = CODEBOOKS[kind]
    codes, mean, scale = codes.contiguous(), mean.contiguous(), scale.contiguous()
    table = torch.tensor(book.levels, dtype=torch.float32, device="cpu") * book.unit
    out = torch.empty(len(codes), len(mean), dtype=torch.float32, device="cpu")
    backend.extension().decode(
        codes.data_ptr(),
        mean.data_ptr(),
        scale.data_ptr(),
        table.data_ptr(),
        out.data_ptr(),
        len(codes),
        len(mean),
        codes.shape[1],
        book.bits,
        backend.threads(),
    )
    return out


def _encode_triton(
    values: "torch.Tensor", mean: "torch.Tensor", scale: "torch.Tensor", kind: str
) -> "torch.Tensor":
    from jz3.kernels import encode as kernels

    return kernels.encode(values, mean, scale, kind)


def _decode_triton(
    codes: "torch.Tensor", mean: "torch.Tensor", scale: "torch.Tensor", kind: str
) -> "torch.Tensor":
    from jz3.kernels import encode as kernels

    return kernels.decode(codes, mean, scale, kind)


def _example(device: str) -> tuple[Any, ...]:
    import torch

    rng = np.random.default_rng(0)
    values, mean, scale = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 13), (13,), (13,)))
    scale[:3] = 0
    return *(torch.from_numpy(x).to(device) for x in (values, mean, np.abs(scale))), "4bit"


def _decode_example(device: str) -> tuple[Any, ...]:
    values, mean, scale, kind = _example(device)
    return encode_reference(values, mean, scale, kind), mean, scale, kind


backend.register(
    backend.Op(
        name="encode",
        reference=encode_reference,
        native={"triton": _encode_triton, "cpu": _encode_cpu},
        example=_example,
        exact=True,
    )
)
backend.register(
    backend.Op(
        name="decode",
        reference=decode_reference,
        native={"triton": _decode_triton, "cpu": _decode_cpu},
        example=_decode_example,
        exact=True,
    )
)

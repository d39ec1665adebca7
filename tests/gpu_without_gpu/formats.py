"""Number formats of PTX, as numpy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray

UINT: dict[int, Any] = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
"""The register of a width in bits."""

TYPES: dict[str, Any] = {
    **{f"{kind}{bits}": UINT[bits] for bits in (8, 16, 32, 64) for kind in "ub"},
    **{"s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64},
    **{"f16": np.float16, "f32": np.float32, "f64": np.float64, "pred": np.bool_},
    **{"bf16": np.uint16, "f16x2": np.uint32, "bf16x2": np.uint32},
}
HALVES = ("f16", "bf16", "f16x2", "bf16x2")


class PtxError(Exception):
    """The kernel did something wrong, or something that this interpreter does not cover."""


def bf16_to_f32(bits: Array) -> Array:
    """bf16 bit patterns (uint16) -> float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: Array) -> Array:
    """float32 -> bf16 bit patterns (uint16), rounded to nearest even; every NaN becomes 0x7FFF."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    r = ((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), r)


def to_bf16(x: Any) -> Array:
    """Array -> bf16 bit patterns (uint16) of the same shape."""
    return f32_to_bf16(np.asarray(x, np.float32))


def from_bf16(bits: Array) -> Array:
    """bf16 bit patterns (uint16) -> float64 array of the same shape."""
    return bf16_to_f32(bits).astype(np.float64)


def f64_to_bf16(x: Array) -> Array:
    """float64 -> bf16 with one rounding: by way of float32 rounded to odd."""
    y = x.astype(np.float32)
    y = np.where(np.abs(y.astype(np.float64)) > np.abs(x), np.nextafter(y, np.float32(0)), y)
    inexact = (y.astype(np.float64) != x) & np.isfinite(y)
    return f32_to_bf16((y.view(np.uint32) | inexact.astype(np.uint32)).view(np.float32))


def unpack_half(registers: Array, ty: str) -> Array:
    """f16, bf16, f16x2 or bf16x2 registers -> float32 [components, lanes]."""

    def one(u: Array) -> Array:
        return bf16_to_f32(u) if ty.startswith("bf16") else u.view(np.float16).astype(np.float32)

    if not ty.endswith("x2"):
        return one(registers.view(np.uint16))[None]
    return np.stack([one(registers.astype(np.uint16)), one((registers >> np.uint32(16)).astype(np.uint16))])


def pack_half(x: Array, ty: str) -> Array:
    """float64 [components, lanes] -> registers, with one rounding to nearest even."""
    x = np.asarray(x, np.float64)
    h = [f64_to_bf16(c) if ty.startswith("bf16") else c.astype(np.float16).view(np.uint16) for c in x]
    if not ty.endswith("x2"):
        return h[0]
    return h[0].astype(np.uint32) | h[1].astype(np.uint32) << np.uint32(16)


def round_directed(exact: Array, ty: str, mode: str) -> Array:
    """longdouble -> f16, f32 or f64 rounded toward zero (rz), down (rm) or up (rp)."""
    dt = TYPES[ty]
    y = exact.astype(dt)
    big, small = y.astype(np.longdouble) > exact, y.astype(np.longdouble) < exact
    down = big & (exact > 0) if mode == "rz" else big if mode == "rm" else np.zeros_like(big)
    up = small & (exact < 0) if mode == "rz" else small if mode == "rp" else np.zeros_like(big)
    y = np.where(down, np.nextafter(y, dt(-np.inf)), y)
    return np.where(up, np.nextafter(y, dt(np.inf)), y).astype(dt)


def tf32(x: Array, nearest_away: bool = False) -> Array:
    """float32 -> float32 with 10 mantissa bits, truncated or rounded to nearest with ties away."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    u = u + np.uint32(0x1000) if nearest_away else u
    return (u & np.uint32(0xFFFFE000)).view(np.float32)

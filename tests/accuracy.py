"""The rule for every floating point back end: at most twice the error of plain torch in the same dtype."""

import numpy as np
import torch

BACKENDS = ("reference", "cpu")


def assert_as_accurate(got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """Check err(got, exact) <= 2 err(plain, exact) + tiny, in the largest and in the root mean square error.

    Args:
        got: the back end's result.
        plain: plain torch's, with the same inputs in the same dtype.
        exact: the definition in float64.
    """
    assert got.shape == exact.shape and plain.shape == exact.shape
    assert torch.isfinite(got).all()
    if not got.numel():
        return
    tiny = 1e-7 * float(exact.abs().max())
    ours, theirs = (got.double() - exact).abs(), (plain.double() - exact).abs()
    assert float(ours.max()) <= 2 * float(theirs.max()) + tiny
    assert float(ours.square().mean().sqrt()) <= 2 * float(theirs.square().mean().sqrt()) + tiny


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return normal random numbers."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return torch's x y with the inner dimension filled up with zeros.

    With AMX torch reads past rows whose length is no multiple of 32, so that NaN behind them would spread.
    """
    rest = -x.shape[1] % 32
    pad = torch.nn.functional.pad
    return pad(x, (0, rest)) @ pad(y, (0, 0, 0, rest))

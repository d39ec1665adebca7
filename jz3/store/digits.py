"""Codes of unequal width: more bits for the numbers that carry more, in a row of single bits.

Number k with b_k bits is a uniform quantiser's index of its standardised value,

    i_k = floor((value - mean_k) / (scale_k * step(b_k))) + 2^(b_k - 1), clamped to [0, 2^b_k)
    value ~ mean_k + scale_k * step(b_k) * (i_k + 1/2 - 2^(b_k - 1))

written as b_k binary digits, the largest first. With digits d = +-1 the decoded value is
mean_k + sum over j of scale_k * step(b_k) * 2^(b_k - 2 - j) * d_j, a sum of signs with fixed weights, so that
a row is a `1bit` code (jz3.ops.encode) of sum of b_k signs, and `score_topk` scores it as it is: with every
number of a query repeated for each of its digits.

Widths: of all first, second, ... bits of all numbers those are taken that reduce
sum over k of gain_k * distortion(b_k) most; every number has one at least.
Source: Max 1960, Quantizing for minimum distortion.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jz3.ops.encode import CODEBOOKS

if TYPE_CHECKING:
    import torch

STEPS = (0.0, 1.915, 1.1948, 0.7032, 0.4022, 0.2257, 0.1249, 0.0683, 0.037)
"""step(b) of b bits: a fifth wider than is best for the standard normal, as features have heavier tails."""
DISTORTIONS = (1.0, 0.3889, 0.1326, 0.04342, 0.01383, 0.0043, 0.001309, 0.00039, 0.000114)
"""Mean squared error of b bits, of the standard normal."""
WIDEST = len(STEPS) - 1


def widths_of(gain: "torch.Tensor", total: int) -> "torch.Tensor":
    """Divide `total` bits among numbers.

    Args:
        gain: [K] what a number's squared error costs, not negative.
        total: bits, K at least and 8 K at most.

    Returns:
        [K] int64, bits per number, 1 to 8.

    Raises:
        ValueError: `total` is out of range, or a gain is negative or not finite.
    """
    import torch

    k = len(gain)
    if not k <= total <= WIDEST * k:
        raise ValueError(f"{k} numbers take {k} to {WIDEST * k} bits, got {total}")
    gain = gain.double()
    if not bool(torch.isfinite(gain).all()) or bool((gain < 0).any()):
        raise ValueError("gains must be finite and not negative")
    drops = torch.tensor(DISTORTIONS[1:], dtype=torch.float64).diff().neg()
    # Each further bit of a number brings less than the one before it, so that the best ones are its first.
    worth = (gain.cpu()[:, None] * drops).flatten()
    taken = torch.sort(worth, descending=True, stable=True).indices[: total - k]
    return torch.bincount(taken // len(drops), minlength=k) + 1


@dataclass(frozen=True, slots=True)
class Digits:
    """How K numbers of unequal width lie in a row of D bits."""

    number: "torch.Tensor"
    """[D] int64, the number that a bit belongs to."""
    place: "torch.Tensor"
    """[D] int64, its power of two in that number's index."""
    mean: "torch.Tensor"
    """[D] float32, of the row as a `1bit` code: a number's mean stands at its first bit."""
    scale: "torch.Tensor"
    """[D] float32, of the row as a `1bit` code."""
    step: "torch.Tensor"
    """[K] float32, scale_k * step(b_k)."""
    middle: "torch.Tensor"
    """[K] float32, 2^(b_k - 1)."""


def digits_of(mean: "torch.Tensor", scale: "torch.Tensor", widths: "torch.Tensor") -> Digits:
    """Lay out numbers of mean and scale [K] float32 in widths [K] int64."""
    import torch

    device = mean.device
    widths = widths.to(device)
    number = torch.arange(len(widths), device=device).repeat_interleave(widths)
    first = widths.cumsum(0) - widths
    place = widths[number] - 1 - (torch.arange(len(number), device=device) - first[number])
    step = scale * torch.tensor(STEPS, device=device)[widths]
    means = torch.zeros(len(number), device=device, dtype=torch.float32)
    means[first] = mean
    book = CODEBOOKS["1bit"]
    level = book.unit * book.levels[1]
    scales = step[number] * (2.0 ** (place - 1).float()) / level
    return Digits(number, place, means, scales, step, 2.0 ** (widths - 1).float())


def encode_digits(values: "torch.Tensor", mean: "torch.Tensor", digits: Digits) -> "torch.Tensor":
    """Code values [N, K] float32 as rows of D bits, uint8 [N, ceil(D / 8)].

    Raises:
        ValueError: a value isn't finite.
    """
    import torch

    if not bool(torch.isfinite(values).all()):
        raise ValueError("features must be finite")
    safe = torch.where(digits.step > 0, digits.step, torch.inf)
    index = ((values - mean) / safe).floor_() + digits.middle
    index = torch.minimum(index.clamp_(min=0), 2 * digits.middle - 1).to(torch.int16)
    bits = (index[:, digits.number] >> digits.place.to(torch.int16)) & 1
    pad = -bits.shape[1] % 8
    bits = torch.nn.functional.pad(bits, (0, pad)).view(len(values), -1, 8)
    powers = 1 << torch.arange(8, dtype=torch.int16, device=bits.device)
    return (bits * powers).sum(2).to(torch.uint8)


def decode_digits(codes: "torch.Tensor", mean: "torch.Tensor", digits: Digits) -> "torch.Tensor":
    """Turn rows of `encode_digits` back into values [N, K] float32."""
    import torch

    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
    bits = ((codes[:, :, None] >> shifts) & 1).flatten(1)[:, : len(digits.number)]
    weights = 2.0 ** digits.place.float()
    index = torch.zeros(len(codes), len(mean), device=codes.device, dtype=torch.float32)
    # Sums of whole numbers are exact in any order.
    index.index_add_(1, digits.number, bits.float() * weights)
    return mean + digits.step * (index + 0.5 - digits.middle)

"""The ops as Triton kernels; installed and imported as `jz3.kernels`."""


def cdiv(numerator: int, denominator: int) -> int:
    """Return the quotient rounded up."""
    return -(-numerator // denominator)

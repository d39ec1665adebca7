"""Randomness that depends on what is drawn for, never on order, batch, shard or worker."""

import operator

import numpy as np
import xxhash


def seed_for(seed: int, *keys: object) -> int:
    """Derive a 64-bit seed from a run's seed and the names of what it is drawn for.

    Args:
        seed: the run's seed.
        *keys: what tells this draw from every other one, e.g. the stage and the record's id.

    Returns:
        An integer in [0, 2^64).

    Raises:
        TypeError: `seed` is no integer.
    """
    if not hasattr(seed, "__index__"):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    # A tensor's str is not its number's.
    text = "\x1f".join(map(str, [operator.index(seed), *keys]))
    return xxhash.xxh3_64_intdigest(text.encode())


def rng(seed: int, *keys: object) -> np.random.Generator:
    """Return the random generator that belongs to (seed, keys), the same on every machine."""
    return np.random.Generator(np.random.Philox(key=seed_for(seed, *keys)))

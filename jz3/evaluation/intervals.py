"""Numbers with their 95% intervals."""

from collections.abc import Sequence
from typing import Any

CONFIDENCE = 0.95


def accuracy(correct: Sequence[bool]) -> dict[str, Any]:
    """Return the share of right answers with its Wilson interval.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference (1927).

    Returns:
        `accuracy`, `low`, `high` (None if there is no problem) and `n`.
    """
    from scipy.stats import binomtest

    n = len(correct)
    if not n:
        return {"accuracy": None, "low": None, "high": None, "n": 0}
    hits = sum(correct)
    interval = binomtest(hits, n).proportion_ci(CONFIDENCE, method="wilson")
    return {"accuracy": hits / n, "low": float(interval.low), "high": float(interval.high), "n": n}


def mean(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean with Student's interval over the values.

    Returns:
        `mean`, `low`, `high` (None where there are too few values) and `n`.
    """
    import numpy as np
    from scipy.stats import t

    n = len(values)
    if not n:
        return {"mean": None, "low": None, "high": None, "n": 0}
    centre = float(np.mean(values))
    if n == 1:
        return {"mean": centre, "low": None, "high": None, "n": 1}
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    return {"mean": centre, "low": centre - half, "high": centre + half, "n": n}

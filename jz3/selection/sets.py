"""Choosers that pick a set: the best single texts are often near copies of each other.

All work on unit-norm features F [N, K] of candidates, so that F_i . F_j is the cosine of two texts'
gradients, and on queries Q [M, K] of one target. A corpus that doesn't fit is scanned first: the exact
scan keeps some thousand candidates (`jz3.ops.score_topk`), and the set is chosen among these. Choosers
yield rows in the order of choice; stop asking when the budget is spent.
"""

from collections.abc import Iterator

import numpy as np


def matching(features: np.ndarray, queries: np.ndarray) -> Iterator[int]:
    """Choose texts whose summed gradient points along the target's mean gradient.

    Each step takes the text i that maximises cos(S + F_i, t), with S the sum of the chosen features and
    t the mean of the queries: what the chosen ones already cover counts for less.

    Args:
        features: [N, K] float32, unit norm up to what the features leave out.
        queries: [M, K] float32.

    Yields:
        Rows, in the order of choice; the lower row where two are equally good.

    Source: gradient matching as in CRAIG (arXiv 1906.01827) and GRAD-MATCH (arXiv 2103.00123), greedy
    in the cosine instead of the residual, so that it needs no weights.
    """
    target = _unit(queries.mean(0))
    along = (features @ target).astype(np.float64)
    squares = np.einsum("nk,nk->n", features, features, dtype=np.float64)
    with_sum = np.zeros(len(features))
    total_along = total_square = 0.0
    left = np.ones(len(features), bool)
    for _ in range(len(features)):
        norm = np.sqrt(np.maximum(total_square + 2 * with_sum + squares, 1e-30))
        best = _best((total_along + along) / norm, left)
        yield best
        left[best] = False
        total_square += 2 * with_sum[best] + squares[best]
        total_along += along[best]
        with_sum += features @ features[best]


def coverage(features: np.ndarray, queries: np.ndarray) -> Iterator[int]:
    """Choose texts that serve every query, each further one of the same query counting for less.

    Greedy maximum of the submodular sum over queries q of sqrt(sum over chosen i of max(F_i . q, 0)):
    facility location whose facilities don't saturate after one text a query.

    Args:
        features: [N, K] float32.
        queries: [M, K] float32.

    Yields:
        Rows, in the order of choice.

    Source: feature-based functions of Wei, Iyer, Bilmes 2015 (Submodularity in data subset selection and
    active learning), with the target's queries as features.
    """
    gains = np.maximum(features @ queries.T, 0.0).astype(np.float64)
    covered = np.zeros(len(queries))
    left = np.ones(len(features), bool)
    for _ in range(len(features)):
        best = _best(np.sqrt(covered + gains).sum(1), left)
        yield best
        left[best] = False
        covered += gains[best]


def diverse(features: np.ndarray, queries: np.ndarray, penalty: float = 5.0) -> Iterator[int]:
    """Choose by standardised cosine less `penalty` times the largest cosine with a chosen text.

    Args:
        features: [N, K] float32.
        queries: [M, K] float32.
        penalty: what an exact copy of a chosen text loses, in standard deviations of the score.

    Yields:
        Rows, in the order of choice.

    Source: maximal marginal relevance, Carbonell and Goldstein 1998.
    """
    score = (features @ queries.mean(0)).astype(np.float64)
    score = (score - score.mean()) / max(float(score.std()), 1e-30)
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-30)
    nearest = np.zeros(len(features))
    left = np.ones(len(features), bool)
    for _ in range(len(features)):
        best = _best(score - penalty * nearest, left)
        yield best
        left[best] = False
        nearest = np.maximum(nearest, unit @ unit[best])


def preconditioned(features: np.ndarray, queries: np.ndarray, damping: float = 0.1) -> Iterator[int]:
    """Choose by the influence function of the projected gradients, F_i (C + lambda I)^-1 t.

    With C = F^T F / N, t the mean of the queries and lambda = `damping` times the mean eigenvalue of C.
    Directions that all texts share count for less than in the cosine.

    Args:
        features: [N, K] float32.
        queries: [M, K] float32.
        damping: share of the mean eigenvalue that is added to every eigenvalue.

    Yields:
        Rows, in the order of choice.

    Source: TRAK (arXiv 2303.14186), equation 13 without its weights; the damping as in EK-FAC's
    influence functions (arXiv 2308.03296), section 3.
    """
    count = len(features)
    wide = features.astype(np.float64)
    added = damping * np.einsum("nk,nk->", wide, wide) / count / wide.shape[1]
    target = queries.mean(0).astype(np.float64)
    if count < wide.shape[1]:  # the same by Woodbury's identity, with the smaller matrix
        inner = wide @ wide.T / count
        within = wide @ target
        solved = np.linalg.solve(inner + added * np.eye(count), inner @ within)
        scores = (within - solved) / added
    else:
        covariance = wide.T @ wide / count
        scores = wide @ np.linalg.solve(covariance + added * np.eye(len(covariance)), target)
    yield from np.argsort(-scores, kind="stable").tolist()


def _best(values: np.ndarray, left: np.ndarray) -> int:
    return int(np.argmax(np.where(left, values, -np.inf)))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / max(float(np.linalg.norm(x)), 1e-30)

"""Choosers of sets against what they promise, on few features."""

import itertools

import numpy as np
import pytest

from jz3.selection.sets import coverage, diverse, matching, preconditioned


def unit(*rows: list[float]) -> np.ndarray:
    x = np.array(rows, np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_matching_is_greedy_in_the_cosine_of_the_sum() -> None:
    rng = np.random.default_rng(0)
    features, queries = rng.standard_normal((40, 12)).astype(np.float32), rng.standard_normal((5, 12))
    target, chosen = queries.mean(0), []
    for row in itertools.islice(matching(features, queries), 15):

        def cosine(i: int) -> float:
            total = features[[*chosen, i]].astype(np.float64).sum(0)
            return float(total @ target / np.linalg.norm(total))

        assert cosine(row) == pytest.approx(max(cosine(i) for i in range(40) if i not in chosen), abs=1e-5)
        chosen.append(row)


@pytest.mark.parametrize("chooser", [matching, diverse])
def test_copies_of_the_best_come_late(chooser) -> None:
    features = unit([1, 0.5, 0], [1, 0.5, 0], [1, 0.5, 0.001], [0.8, -0.7, 0.1], [0.1, 0, 1])
    order = list(chooser(features, unit([1, 0, 0])))
    assert order[:2] == [0, 3] and sorted(order) == [0, 1, 2, 3, 4]


def test_coverage_serves_every_query() -> None:
    features = unit([1, 0.1], [1, 0.2], [1, 0.3], [0.3, 0.9])
    order = list(coverage(features, unit([1, 0], [0, 1])))
    assert 3 in order[:2]


@pytest.mark.parametrize("count", [9, 50])
def test_preconditioned_is_the_influence_function_of_the_projected_gradients(count: int) -> None:
    rng = np.random.default_rng(1)
    features, queries = rng.standard_normal((count, 16)), rng.standard_normal((3, 16))
    features[:, 0] *= 9
    covariance = features.T @ features / count
    damped = covariance + 0.2 * np.trace(covariance) / 16 * np.eye(16)
    scores = features @ np.linalg.inv(damped) @ queries.mean(0)
    order = list(preconditioned(features.astype(np.float32), queries.astype(np.float32), damping=0.2))
    assert order == np.argsort(-scores).tolist() != np.argsort(-features @ queries.mean(0)).tolist()

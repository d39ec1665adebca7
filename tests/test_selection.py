"""Choosing texts: ties, quotas, agreement with exact scores, the negative control."""

import numpy as np
import pytest

from jz3.influence import agreement, bm25_scores, negative_control
from jz3.records import Query
from jz3.selection import chosen_rows, methods, select

IDS = ["0c", "0a", "0b", "0d"]


def test_ties_go_to_the_smaller_id() -> None:
    assert select(np.array([[1.0], [1.0], [2.0], [1.0]]), IDS, 3) == [2, 1, 0]


def test_combinations() -> None:
    scores = np.array([[9.0, 0.0], [8.0, 0.0], [0.0, 2.0], [4.0, 1.9]])
    assert select(scores, IDS, 2, "max") == [0, 1]
    assert select(scores, IDS, 2, "mean") == [0, 1]
    assert select(scores, IDS, 2, "quota") == [0, 2]
    assert select(scores, IDS, 3, "quota") == [0, 2, 1]
    assert sorted(select(scores, IDS, 99, "quota")) == [0, 1, 2, 3]
    assert select(scores, IDS, 0) == []


def test_wrong_arguments_are_told() -> None:
    scores = np.ones((4, 1))
    with pytest.raises(ValueError, match="combine must be one of"):
        select(scores, IDS, 1, "median")
    with pytest.raises(ValueError, match="1 rows have a score that is not finite"):
        select(np.array([[1.0], [np.nan], [1.0], [1.0]]), IDS, 1)
    with pytest.raises(ValueError, match="got shape"):
        select(np.ones(4), IDS, 1)
    with pytest.raises(ValueError, match="must not be negative"):
        select(scores, IDS, -1)


def test_methods_and_control_column() -> None:
    table = {
        "id": IDS,
        "source": ["s"] * 4,
        "tokens": np.ones(4),
        "norm": np.ones(4),
        "random": np.array([0.1, 0.2, 0.3, 0.4]),
        "influence:a": np.array([4.0, 3.0, 2.0, 1.0]),
        "influence:control": np.array([0.0, 0.0, 0.0, 99.0]),
    }
    assert methods(table) == ["influence", "random"]
    assert chosen_rows(table, "influence", 1, "mean") == [0]
    assert chosen_rows(table, "random", 1, "mean") == [3]
    with pytest.raises(ValueError, match="no scores of method 'magic'; there are: influence, random"):
        chosen_rows(table, "magic", 1, "mean")


def test_agreement_of_exact_and_of_reversed_scores() -> None:
    exact = np.random.default_rng(0).standard_normal((50, 3))
    assert agreement(exact * 2 + 1, exact) == pytest.approx({"spearman": 1, "task_spearman": 1, "recall": 1})
    assert agreement(-exact, exact)["spearman"] == pytest.approx(-1)
    assert agreement(-exact, exact)["recall"] == 0


def test_negative_control_knows_chance() -> None:
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        columns = {"influence:a": generator.random(400), "influence:control": generator.random(400)}
        found = negative_control(columns, ["a"], 60, ["s"] * 400)
        low, high = found["chance_interval"]
        assert found["chance"] == 0.15 and low < 0.15 < high
        inside += low <= found["overlap"]["a"] <= high
    assert 180 <= inside <= 199
    same = negative_control(
        {"influence:a": columns["influence:a"], "influence:control": columns["influence:a"]},
        ["a"],
        60,
        ["s"] * 400,
    )
    assert same["overlap"]["a"] == same["within_sources"]["a"] == 1.0


def test_negative_control_within_sources() -> None:
    generator = np.random.default_rng(1)
    sources = ["a"] * 200 + ["b"] * 200
    shift = np.repeat([10.0, 0.0], 200)
    columns = {
        "influence:t": generator.random(400) + shift,
        "influence:control": generator.random(400) - shift,
    }
    found = negative_control(columns, ["t"], 60, sources)
    assert found["overlap"]["t"] == 0
    low, high = found["chance_interval"]
    assert low <= found["within_sources"]["t"] <= high


def test_bm25_prefers_shared_words() -> None:
    texts = ["apples and pears in a basket", "the derivative of a polynomial", "prime numbers and divisors"]
    query = Query(id="0", task="t", problem="Find the derivative", prompt="", completion="of this polynomial")
    assert int(np.argmax(bm25_scores(texts, [query]))) == 1
    unknown = Query(id="0", task="t", problem="zzz", prompt="", completion="qqq")
    assert bm25_scores(texts, [unknown]).tolist() == [0, 0, 0]

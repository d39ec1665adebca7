"""Choosing texts: ties, quotas, agreement with exact scores, the negative control."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from jz3.bm25 import Bm25
from jz3.influence import agreement, negative_control, shared_by_chance
from jz3.records import Query
from jz3.report.terminal import _within
from jz3.selection import SelectionConfig, StreamingSelection, chosen_rows, select
from jz3.selection.stage import methods
from jz3.topk import TopK

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


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"chooser": "best"}, "chooser must be one of influence, dot"),
        ({"chooser": "control"}, "chooser must be one of"),
        ({"chooser": "matching", "combine": "max"}, "mean or quota"),
        ({"combine": "median"}, "combine must be one of"),
        ({"candidates": 0}, "at least 1"),
        ({"chooser": "coverage", "k": 30, "candidates": 20}, "raise selection.candidates"),
        ({"k": 0}, "selection.k must be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_told(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SelectionConfig(**changes)


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


def control(columns: dict[str, np.ndarray], tasks: list[str], k: int, sources: list[str]) -> dict[str, Any]:
    """The control over the table in pieces of 77 rows."""
    table = {**columns, "source": np.array(sources)}

    def batches() -> Iterator[dict[str, Any]]:
        for start in range(0, len(sources), 77):
            yield {name: values[start : start + 77] for name, values in table.items()}

    return negative_control(batches, tasks, k)


def test_negative_control_knows_chance() -> None:
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        columns = {"influence:a": generator.random(400), "influence:control": generator.random(400)}
        found = control(columns, ["a"], 60, ["s"] * 400)
        low, high = found["chance_interval"]
        assert found["chance"] == 0.15 and low < 0.15 < high
        inside += low <= found["overlap"]["a"] <= high
    assert 180 <= inside <= 199
    same = control(
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
    found = control(columns, ["t"], 60, sources)
    assert found["overlap"]["t"] == 0
    # One choice is all of one source, the other all of the other: nothing can be shared.
    assert found["expected_given_sources"]["t"] == 0 and found["interval_given_sources"]["t"] == [0, 0]
    low, high = found["within_interval"]
    assert 0 < low < 0.15 < high and low <= found["within_sources"]["t"] <= high


def test_negative_control_with_more_sources_than_texts_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within sources there is nothing to compare; nothing is kept per source then."""
    made: list[int] = []
    monkeypatch.setattr("jz3.influence.TopK", lambda size: (made.append(size), TopK(size))[1])
    generator = np.random.default_rng(3)
    columns = {"influence:t": generator.random(400), "influence:control": generator.random(400)}
    for count, compared in ((60, True), (61, False)):
        made.clear()
        found = control(columns, ["t"], 60, [f"s{i % count}" for i in range(400)])
        assert len(made) == (2 + 2 * count if compared else 2)
        assert bool(found["within_sources"]) == bool(found["within_interval"]) == compared
        low, high = found["interval_given_sources"]["t"]
        assert low <= found["overlap"]["t"] <= high and found["chance"] == 0.15
        assert _within(found).startswith("t " if compared else "not compared")


def test_negative_control_given_the_sources() -> None:
    """Both choices come from the same small source and share nothing else: 60/200 is their chance, not 60/400."""
    generator = np.random.default_rng(2)
    sources = ["a"] * 200 + ["b"] * 200
    shift = np.repeat([10.0, 0.0], 200)
    inside = above_chance = 0
    for _ in range(100):
        columns = {
            "influence:t": generator.random(400) + shift,
            "influence:control": generator.random(400) + shift,
        }
        found = control(columns, ["t"], 60, sources)
        assert found["expected_given_sources"]["t"] == pytest.approx(0.3)
        low, high = found["interval_given_sources"]["t"]
        inside += low <= found["overlap"]["t"] <= high
        above_chance += found["overlap"]["t"] > found["chance_interval"][1]
    assert inside >= 90 and above_chance >= 50


def test_shared_by_chance_is_hypergeometric() -> None:
    from scipy.stats import hypergeom

    mean, (low, high) = shared_by_chance([7, 20], [9, 40], [30, 100], 10)
    parts = [hypergeom(30, 7, 9), hypergeom(100, 20, 40)]
    assert mean == pytest.approx(sum(float(p.mean()) for p in parts) / 10)
    spread = 1.96 * sum(float(p.var()) for p in parts) ** 0.5 / 10
    assert (low, high) == pytest.approx((mean - spread, min(1.0, mean + spread)))
    assert shared_by_chance([3], [3], [3], 3) == (1.0, [1.0, 1.0])


def test_bm25_prefers_shared_words() -> None:
    texts = ["apples and pears in a basket", "the derivative of a polynomial", "prime numbers and divisors"]
    query = Query(id="0", task="t", problem="Find the derivative", prompt="", completion="of this polynomial")
    assert int(np.argmax(Bm25.count(texts, {"t": [query]}).scores(texts)["t"])) == 1
    unknown = Query(id="0", task="t", problem="zzz", prompt="", completion="qqq")
    # A word that none of the sample holds weighs most where it comes.
    model = Bm25.count(texts, {"t": [unknown]})
    assert model.scores(texts)["t"].tolist() == [0, 0, 0] and model.scores(["zzz"])["t"][0] > 1


def stream(selection: StreamingSelection, scores: np.ndarray, sources: np.ndarray) -> list[int]:
    """Show rows in pieces and return the chosen ones by number."""
    places = np.stack([np.arange(len(scores)), np.arange(len(scores)) * 7], 1)
    for start in range(0, len(scores), 13):
        part = slice(start, start + 13)
        selection.add(scores[part], places[part], sources[part])
    choices, _, enough = selection.choose()
    assert enough
    return [c.place[0] for c in choices]


@pytest.mark.parametrize("combine", ["mean", "max", "quota"])
@pytest.mark.parametrize("k", [0, 1, 17, 200, 500])
def test_streaming_selection_is_the_selection(combine: str, k: int) -> None:
    generator = np.random.default_rng(k)
    scores = np.round(generator.random((200, 3)), 1 if k == 17 else 9)  # many ties, or none
    ids = [f"{i:06d}" for i in range(200)]
    streamed = stream(StreamingSelection(k, combine), scores, np.zeros(200, int))
    assert streamed == select(scores, ids, k, combine)


def test_sources_have_their_limit() -> None:
    generator = np.random.default_rng(0)
    sources = generator.integers(0, 3, 300)
    scores = generator.random((300, 1)) + (sources == 0)[:, None]
    chosen = stream(StreamingSelection(30, "mean", source_limit=12), scores, sources)
    counts = np.bincount(sources[chosen], minlength=3)
    assert counts[0] == 12 and counts.sum() == 30 and counts.max() == 12
    expected, taken = [], [0, 0, 0]
    for row in np.argsort(-scores[:, 0]):
        if taken[sources[row]] < 12 and len(expected) < 30:
            expected.append(int(row))
            taken[sources[row]] += 1
    assert chosen == expected


@pytest.mark.parametrize("combine", ["mean", "quota"])
@pytest.mark.parametrize("slack", [1.0, 1.5])
def test_candidates_do_not_grow_with_the_sources(combine: str, slack: float) -> None:
    """A thousand sources of which each alone could give a tenth: the same choice, of bounded candidates."""
    generator = np.random.default_rng(3)
    scores = np.round(generator.random((6000, 2)), 3)  # with ties
    sources = np.r_[np.zeros(600, int), generator.integers(1, 1000, 5400)]
    scores[:600] += 0.2
    selection = StreamingSelection(40, combine, source_limit=4, slack=slack)
    chosen = stream(selection, scores, sources)
    columns = scores.shape[1] if combine == "quota" else 1
    assert 40 <= len(selection.candidates()) <= 2 * columns * 40 * slack
    expected: list[int] = []
    taken = np.zeros(1000, int)
    values = scores if combine == "quota" else scores.mean(1, keepdims=True)
    orders = [iter(np.lexsort((np.arange(6000), -values[:, c])).tolist()) for c in range(columns)]
    while len(expected) < 40:
        for order in orders:
            row = next(r for r in order if r not in expected and taken[sources[r]] < 4)
            expected.append(row)
            taken[sources[row]] += 1
    assert chosen == expected[:40] and taken[0] == 4
    # What lies beyond the candidates is not taken for absent.
    assert not selection.choose(lambda place: "no")[2]


def test_what_was_dropped_from_all_sources_together_is_not_taken_for_absent() -> None:
    """No source alone has more rows than it may keep; together they have."""
    selection = StreamingSelection(10, source_limit=10)
    scores, sources = np.arange(300, 0, -1.0)[:, None], np.arange(300) % 100
    assert stream(selection, scores, sources) == list(range(10))
    best = set(selection.candidates())
    assert len(best) < 30
    assert not selection.choose(lambda place: "no" if place in best else "")[2]


def test_refused_rows_are_replaced_or_more_slack_is_asked_for() -> None:
    scores = np.arange(100, 0, -1.0)[:, None]
    places, sources = np.arange(100)[:, None], np.arange(100) % 2

    def refuse(place: tuple[int, ...]) -> str:
        return "odd" if place[0] % 2 else ""

    tight = StreamingSelection(10)
    tight.add(scores, places, sources)
    choices, refused, enough = tight.choose(refuse)
    assert not enough and len(choices) == 5 and set(refused.values()) == {"odd"}
    for selection in (StreamingSelection(10, slack=2.0), StreamingSelection(10, source_limit=10)):
        selection.add(scores, places, sources)
        choices, refused, enough = selection.choose(refuse)
        assert enough and [c.place[0] for c in choices] == [*range(0, 20, 2)]
    # The source of all good rows ends with its candidates; those of the other are no substitute.
    short = StreamingSelection(10, source_limit=8, slack=1.0)
    short.add(scores, places, sources)
    choices, _, enough = short.choose(lambda place: "even" if place[0] in range(0, 14, 2) else "")
    assert not enough and [c.place[0] for c in choices] == [*range(1, 14, 2), 14]


def test_best_of_a_stream_in_constant_memory() -> None:
    import tracemalloc

    generator = np.random.default_rng(0)
    top, best = TopK(50), np.zeros(0)
    tracemalloc.start()
    for step in range(400):
        scores = generator.random(5000)
        scores[:3] = np.nan
        top.add(scores, np.arange(step * 5000, (step + 1) * 5000))
        best = np.sort(np.concatenate([best, scores[3:]]))[::-1][:50]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    found, rows = top.best()
    np.testing.assert_array_equal(found, best)
    assert top.seen == 400 * 4997 and top.truncated and len(rows) == 50
    assert peak < 2 << 20
    with pytest.raises(ValueError, match="must not be negative"):
        TopK(-1)

"""The trainings that judge choosers."""

import dataclasses
import itertools
import os
import types
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jz3.comparison import ComparisonConfig, stage
from jz3.comparison.stage import so_far
from jz3.comparison.table import plot, verdicts
from jz3.config import Recipe, shipped_recipe
from jz3.errors import Jz3Error
from jz3.files import read_json, read_jsonl, write_jsonl
from jz3.pipeline import run_pipeline
from jz3.records import Reject
from jz3.stage import StageContext


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison") / "run"
    recipe = shipped_recipe("tiny")
    run_pipeline(dataclasses.replace(recipe, comparison=ComparisonConfig()), folder, last="influence")
    return folder


def compared(folder: Path, **changes: Any) -> tuple[Recipe, dict]:
    from jz3.comparison import run
    from jz3.config import settled

    recipe = settled(shipped_recipe("tiny"))
    config = dataclasses.replace(recipe.comparison, **changes)
    recipe = dataclasses.replace(recipe, comparison=config)
    ctx = StageContext(recipe=recipe, run_dir=folder, name="comparison")
    ctx.out.mkdir(exist_ok=True)
    return recipe, run(ctx)


def test_every_task_and_budget_has_its_rows_and_a_rerun_trains_nothing(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {"methods": ("influence", "matching", "random"), "per_task": True, "workers": 2}
    recipe, summary = compared(run_folder, **wanted)
    rows = summary["table"]
    assert [(r["task"], r["chooser"]) for r in rows] == list(
        itertools.product(("word_problems", "number_algebra"), wanted["methods"])
    )
    assert all(np.isfinite(r["change"]["mean"]) and r["trained_tokens"] > 300 for r in rows)
    assert rows[0]["overlap_with_influence"] == 1.0 and rows[2]["against_random"]["mean"] == 0.0
    assert not list(run_folder.glob("comparison/runs/*/model*"))
    results = {path.parent.name: read_json(path) for path in run_folder.glob("comparison/runs/*/result.json")}
    # The random draw is the same for both tasks and trained once; the others are judged by their own task.
    assert sorted(len(result["nll"]) for result in results.values()) == [1, 1, 1, 1, 2]

    monkeypatch.setattr("jz3.comparison.stage.train", None)
    # As a kill leaves it that comes between a result and the end of its model.
    (run_folder / "comparison" / "runs" / next(iter(results)) / "model").mkdir()
    again = compared(run_folder, **wanted)[1]["table"]
    assert [r["change"] for r in again] == [r["change"] for r in rows]
    assert not list(run_folder.glob("comparison/runs/*/model*"))

    ctx = StageContext(recipe=recipe, run_dir=run_folder, name="comparison")
    assert [r["change"] for r in so_far(ctx)["table"]] == [r["change"] for r in rows]
    # Only the draw of `random` is judged by both tasks.
    (shared,) = (run for run, result in results.items() if len(result["nll"]) == 2)
    (run_folder / "comparison" / "runs" / shared / "result.json").rename(run_folder / "random.json")
    left = so_far(ctx)["table"]
    assert [r["chooser"] for r in left] == ["influence", "matching"] * 2
    assert all(r["against_random"] is None for r in left)


def test_a_killed_process_of_trainings_is_told_and_ends_with_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents: list[int] = []

    class Killed(ThreadPoolExecutor):
        def __init__(self, workers: int, mp_context: Any, initializer: Any, initargs: Any) -> None:
            super().__init__(workers)
            initializer(*initargs)

        def submit(self, *_: Any) -> Any:
            future: Future[None] = Future()
            future.set_exception(BrokenProcessPool())
            return future

    monkeypatch.setattr(stage, "ProcessPoolExecutor", Killed)
    monkeypatch.setattr(stage, "end_with", lambda parent: not parents.append(parent))
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    ctx = StageContext(recipe=shipped_recipe("tiny"), run_dir=tmp_path, name="comparison")
    training: Any = types.SimpleNamespace(done=False)
    with pytest.raises(Jz3Error, match="process was killed.* with fewer comparison.workers than 2"):
        stage._train_all(ctx, [training], 2)
    assert parents == [os.getpid()]


@pytest.mark.parametrize(
    "chooser",
    ["dot", "mix", "coverage", "diverse", "preconditioned", "stratified", "bm25", "loss", "control"],
)
def test_every_chooser_fills_the_budget(run_folder: Path, chooser: str) -> None:
    from jz3.selection.pool import load_pool

    recipe = shipped_recipe("tiny")
    ctx = StageContext(recipe=recipe, run_dir=run_folder, name="comparison")
    pool = load_pool(ctx)
    rows = pool.order(ctx, chooser, "", 0, 500)
    sizes = [int(pool.scores["tokens"][row]) for row in rows]
    assert len(set(rows)) == len(rows) and sum(sizes) >= 500 > sum(sizes[:-1])


def test_a_set_whose_candidates_hold_too_little_is_refused(run_folder: Path) -> None:
    from jz3.selection.pool import load_pool

    tiny = shipped_recipe("tiny")
    recipe = dataclasses.replace(tiny, selection=dataclasses.replace(tiny.selection, k=3, candidates=3))
    ctx = StageContext(recipe=recipe, run_dir=run_folder, name="comparison")
    pool = load_pool(ctx)
    # It would be trained on fewer tokens than the choosers beside it.
    with pytest.raises(Jz3Error, match=r"candidates = 3 texts, which hold \d+ of 2000 tokens"):
        pool.order(ctx, "matching", "", 0, 2000)
    everything = int(pool.scores["tokens"].sum()) + 1
    assert len(pool.order(ctx, "influence", "", 0, everything)) == len(pool.scores["id"])


def test_stratified_keeps_the_pools_proportions_and_control_serves_another_target(run_folder: Path) -> None:
    from collections import Counter

    from jz3.selection.pool import load_pool

    ctx = StageContext(recipe=shipped_recipe("tiny"), run_dir=run_folder, name="comparison")
    pool = load_pool(ctx)
    source, tokens = pool.scores["source"], int(pool.scores["tokens"].sum())
    order = pool.order(ctx, "stratified", "", 0, tokens)
    half = Counter(source[row] for row in order[: len(order) // 2])
    assert all(abs(half[name] - size / 2) <= 1 for name, size in Counter(source).items())
    score = np.mean([pool.scores[f"influence:{task}"] for task in pool.tasks], 0)
    for name in set(source):
        mine = [score[row] for row in order if source[row] == name]
        assert mine == sorted(mine, reverse=True)
    assert pool.control is not None
    control = pool.control[pool.order(ctx, "control", "", 0, tokens)]
    assert (np.diff(control) <= 0).all() and control[0] > control[-1]


def test_a_comparison_is_extended_and_trains_only_what_is_new(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    folder, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(run_folder, folder, ignore=shutil.ignore_patterns("comparison"))
    shutil.copytree(run_folder, other, ignore=shutil.ignore_patterns("comparison"))
    tiny = shipped_recipe("tiny")

    def run(**changes: Any) -> dict[str, Any]:
        config = dataclasses.replace(tiny.comparison, workers=1, **changes)
        run_pipeline(dataclasses.replace(tiny, comparison=config), folder, last="comparison")
        return read_json(folder / "comparison" / "manifest.json")["summary"]

    def results() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in folder.glob("comparison/runs/*/result.json")}

    first = run(methods=("influence", "random"))
    kept = results()
    source = next(iter(first["table"][0]["mix"]))
    more = run(methods=("influence", "theirs", "random"), runs=(("theirs", str(other)),))
    # Another run's equal scores make the same choice, whose training is shared.
    assert results() == kept and [r["change"] for r in more["table"][::2]] == [
        r["change"] for r in first["table"]
    ]
    assert more["table"][1]["overlap_with_influence"] == 1.0 and more["gradients"] == ["influence", "theirs"]
    without = run(methods=("influence", "random"), without_sources=(source,))
    assert all(source not in row["mix"] for row in without["table"]) and results().keys() > kept.keys()
    faster = dataclasses.replace(tiny.comparison.train, learning_rate=tiny.comparison.train.learning_rate * 3)
    assert (
        run(methods=("influence", "random"), train=faster)["table"][0]["change"]
        != first["table"][0]["change"]
    )
    with pytest.raises(Jz3Error, match="other settings"):
        targets = dataclasses.replace(tiny.targets, tasks=tiny.targets.tasks[:1])
        run_pipeline(dataclasses.replace(tiny, targets=targets), folder, last="comparison")
    with pytest.raises(Jz3Error, match="has no scores"):
        run(methods=("theirs",), runs=(("theirs", str(tmp_path)),))


def test_what_another_run_rejected_comes_last(run_folder: Path, tmp_path: Path) -> None:
    import shutil

    import pyarrow.parquet as pq

    from jz3.selection.pool import load_pool

    other = tmp_path / "other"
    shutil.copytree(run_folder / "influence", other / "influence")
    path = other / "influence" / "scores.parquet"
    table = pq.read_table(path)
    lost = table["id"][0].as_py()
    pq.write_table(table.slice(1), path)
    ctx = StageContext(recipe=shipped_recipe("tiny"), run_dir=run_folder, name="comparison")
    with pytest.raises(Jz3Error, match=f"1 of {len(table)} texts, e.g. {lost}"):
        load_pool(ctx, runs=[("theirs", str(other))])
    reject = Reject(id=lost, stage="features", reason="too_short")
    write_jsonl(other / "features" / "rejects.jsonl", [reject.to_json()])
    pool = load_pool(ctx, runs=[("theirs", str(other))])
    order = list(pool.ordered(ctx, "theirs", pool.tasks[:1]))
    own = [row for row in pool.ordered(ctx, "influence", pool.tasks[:1]) if pool.scores["id"][row] != lost]
    assert order == [*own, pool.scores["id"].index(lost)]


def test_several_runs_under_one_name_choose_by_their_mean(run_folder: Path, tmp_path: Path) -> None:
    import shutil

    import pyarrow as pa
    import pyarrow.parquet as pq

    from jz3.selection.pool import load_pool

    shutil.copytree(run_folder / "influence", tmp_path / "later" / "influence")
    path = tmp_path / "later" / "influence" / "scores.parquet"
    table = pq.read_table(path)
    for place, name in enumerate(table.column_names):
        if name.startswith("influence:"):
            table = table.set_column(place, name, pa.array(3 * table[name].to_numpy()[::-1]))
    pq.write_table(table, path)
    ctx = StageContext(recipe=shipped_recipe("tiny"), run_dir=run_folder, name="comparison")
    pool = load_pool(ctx, runs=[("both", str(run_folder)), ("both", str(tmp_path / "later"))])
    for task in pool.tasks:
        own = pool.scores[f"influence:{task}"]
        np.testing.assert_allclose(pool.scores[f"both:{task}"], (own + 3 * own[::-1]) / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("chooser", "combine"),
    [("matching", "mean"), ("matching", "quota"), ("stratified", "quota"), ("dot", "max")],
)
def test_any_chooser_can_select(run_folder: Path, tmp_path: Path, chooser: str, combine: str) -> None:
    import shutil

    from jz3.selection import SelectionConfig, chosen_rows, run
    from jz3.selection.pool import load_pool

    shutil.copytree(run_folder, tmp_path / "run", ignore=shutil.ignore_patterns("comparison", "selection"))
    config = SelectionConfig(k=9, chooser=chooser, combine=combine)
    recipe = dataclasses.replace(shipped_recipe("tiny"), selection=config)
    ctx = StageContext(recipe=recipe, run_dir=tmp_path / "run", name="selection")
    ctx.out.mkdir()
    summary = run(ctx)
    pool = load_pool(ctx)
    chosen = [row["id"] for row in read_jsonl(ctx.out / "selected.jsonl")]
    if combine == "quota":
        orders = [list(pool.ordered(ctx, chooser, (task,))) for task in pool.tasks]
        taken: list[int] = []
        while len(taken) < 9:
            for order in orders:
                taken += [next(row for row in order if row not in taken)][: 9 - len(taken)]
        # A comparison judges the same choice.
        both = pool.order(ctx, chooser, "", 0, sum(int(pool.scores["tokens"][row]) for row in taken))
        assert both == taken
    else:
        taken = list(pool.ordered(ctx, chooser, pool.tasks))[:9]
    assert chosen == [pool.scores["id"][row] for row in taken]
    assert summary["chooser"] == chooser and sum(summary["mix"]["chosen"].values()) == summary["chosen"] == 9
    assert {row["chooser"] for row in read_jsonl(ctx.out / "why.jsonl")} == {chooser}
    best = {pool.scores["id"][row] for row in chosen_rows(pool.scores, "influence", 9, combine)}
    assert summary["overlap_with_chosen"]["influence"] == len(best & set(chosen)) / 9 < 1


def test_random_draws_anew_for_every_seed(run_folder: Path) -> None:
    from jz3.selection.pool import load_pool

    ctx = StageContext(recipe=shipped_recipe("tiny"), run_dir=run_folder, name="comparison")
    pool = load_pool(ctx)
    draws = [pool.order(ctx, "random", "", seed, 500) for seed in (0, 1, 2)]
    assert draws[0] != draws[1] != draws[2] != draws[0]


def test_a_text_that_holds_a_test_problem_is_left_out(run_folder: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder, ignore=shutil.ignore_patterns("comparison"))
    problem = next(iter(read_jsonl(folder / "targets" / "eval.jsonl")))["problem"]
    docs = list(read_jsonl(folder / "corpus" / "docs.jsonl"))
    docs[3]["text"] = f"An exercise. {problem} Solve it."
    write_jsonl(folder / "corpus" / "docs.jsonl", docs)
    _, summary = compared(folder, methods=("random",), workers=1)
    assert summary["contaminated"] == 1
    reject = next(iter(read_jsonl(folder / "comparison" / "rejects.jsonl")))
    assert reject["id"] == docs[3]["id"] and reject["reason"] == "holds_test_problem"


def test_weights_kept_in_float32_are_judged_in_float32(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from types import SimpleNamespace

    from jz3.comparison import stage

    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder, ignore=shutil.ignore_patterns("comparison"))
    seen: list[str] = []

    def train(*arguments: Any, dtype: str, **_: Any) -> Any:
        seen.append(dtype)
        arguments[3].parent.mkdir(parents=True)
        return SimpleNamespace(tokens=1, steps=1)

    def scored(path: Path, base: Path, dtype: str, queries: dict[str, list]) -> dict[str, list[float]]:
        seen.append(dtype)
        return {task: [1.0] * len(rows) for task, rows in queries.items()}

    monkeypatch.setattr(stage, "train", train)
    monkeypatch.setattr(stage, "_scored", scored)
    tiny = shipped_recipe("tiny")
    tiny = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, dtype="bfloat16"))
    monkeypatch.setitem(globals(), "shipped_recipe", lambda name: tiny)
    settings = tiny.comparison.train
    for method, precision, dtype in (
        ("full", "float32", "float32"),
        ("full", "mixed", "float32"),
        ("lora", "float32", "float32"),
        ("lora", "mixed", "bfloat16"),
    ):
        seen.clear()
        shutil.rmtree(folder / "comparison", ignore_errors=True)
        changed = dataclasses.replace(settings, method=method, precision=precision)
        compared(folder, methods=("random",), workers=1, train=changed)
        assert set(seen) == {dtype} and len(seen) >= 3


def test_every_task_counts_alike_and_no_candidate_is_lost(run_folder: Path, tmp_path: Path) -> None:
    import shutil

    from jz3.features.stage import read_extracted
    from jz3.selection.pool import features_of

    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder, ignore=shutil.ignore_patterns("comparison"))
    rows = list(read_jsonl(folder / "targets" / "queries.jsonl"))
    fit = [row for row in rows if row["role"] == "fit"]
    tasks = sorted({row["task"] for row in fit})
    for row in [row for row in fit if row["task"] == tasks[0]][1:]:
        row["role"] = "unseen"
    write_jsonl(folder / "targets" / "queries.jsonl", rows)
    ctx = StageContext(recipe=shipped_recipe("tiny"), run_dir=folder, name="comparison")
    ids = [row["id"] for row in read_jsonl(folder / "corpus" / "docs.jsonl")][:2]
    _, queries = features_of(ctx, ids, tasks)
    names, arrays = read_extracted(folder / "features" / "queries.safetensors")
    values = dict(zip(names, arrays["values"], strict=True))
    means = [
        np.mean([values[r["id"]] for r in rows if (r["role"], r["task"]) == ("fit", task)], 0)
        for task in tasks
    ]
    assert len(tasks) == 2 and len(queries) > 2
    np.testing.assert_allclose(queries.mean(0), np.mean(means, 0), atol=1e-6)
    with pytest.raises(Jz3Error, match="lacks 1 of 3 candidates, e.g. 00000000000000ff"):
        features_of(ctx, [*ids, "00000000000000ff"], tasks)
    shard = folder / "features" / "store" / "000000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(Jz3Error, match="000000"):
        features_of(ctx, ids, tasks)


def test_the_verdict_compares_the_best_of_both_kinds() -> None:
    def row(chooser: str, mean: float) -> dict[str, Any]:
        change = {"mean": mean, "low": mean - 0.004, "high": mean + 0.004}
        seeds = [mean + 0.005, mean - 0.005]
        return {
            "budget": 2000,
            "task": "sums",
            "chooser": chooser,
            "change": change,
            "seeds": [0, 1],
            "change_per_seed": seeds,
            "against_influence": {"mean": mean + 0.03, "low": mean + 0.029, "high": mean + 0.031},
        }

    rows = [row("random", -0.01), row("bm25", -0.02), row("hidden", -0.026), row("loss", 0.001)]
    table = [*rows, row("influence", -0.03), row("matching", -0.039)]
    assert verdicts({"table": table}) == [
        "sums, 2,000 tokens: matching -0.0390; 1.50 x hidden -0.0260, intervals over problems apart, "
        "better with 2 of 2 seeds; 3.90 x random -0.0100, intervals over problems apart, "
        "better with 2 of 2 seeds; against influence -0.0090 (-0.0100 to -0.0080), problems and seeds paired"
    ]
    # A single lucky training is not compared with means of two.
    lucky = {**row("dot", -0.09), "seeds": [0], "change_per_seed": [-0.09]}
    assert verdicts({"table": [*table, lucky]}) == verdicts({"table": table})
    # With seed 0 both gave the same; what seed 1 gave is no match for seed 2.
    later = {**row("random", -0.031), "seeds": [0, 2], "change_per_seed": [-0.025, -0.037]}
    (said,) = verdicts({"table": [later, row("influence", -0.03)]})
    assert said.endswith("better with 0 of 1 seeds")
    assert verdicts({"table": rows}) == []
    assert verdicts({"table": [row("random", 0.01), row("influence", 0.004)]}) == [
        "sums, 2,000 tokens: influence +0.0040; random +0.0100, intervals over problems overlap, "
        "better with 2 of 2 seeds"
    ]


def test_dollar_signs_in_names_are_no_formulas_in_the_plot(tmp_path: Path) -> None:
    changes = [
        {"mean": -0.02, "low": -0.03, "high": -0.01, "n": 9},
        {"mean": -0.01, "low": None, "high": None, "n": 1},
    ]
    rows = [
        {"budget": 500, "task": "win $a_ and $^", "chooser": chooser, "change": change}
        for chooser, change in zip(("influence", "their$ $_"), changes, strict=True)
    ]
    plot({"tokens": 500, "table": rows}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("per_task", [False, True])
def test_without_problems_to_judge_by_nothing_is_trained(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, per_task: bool
) -> None:
    """All tasks together need one problem, each by itself one of its own."""
    rows = StageContext.rows

    def fewer(ctx: StageContext, stage: str, name: str) -> list[dict[str, Any]]:
        found = rows(ctx, stage, name)
        kept = ["word_problems"] if per_task else []
        return [row for row in found if row["task"] in kept] if name == "eval.jsonl" else found

    monkeypatch.setattr(StageContext, "rows", fewer)
    monkeypatch.setattr("jz3.comparison.stage.train", None)
    named = "of 'number_algebra' judges" if per_task else "no evaluation problem judges"
    with pytest.raises(Jz3Error, match=f"{named}.*an eval above 0"):
        compared(run_folder, tokens=500, per_task=per_task)


def test_seeds_are_paired_with_those_of_random() -> None:
    from types import SimpleNamespace

    from jz3.comparison.stage import Choice, _table

    pool: Any = SimpleNamespace(scores={"id": ["a"], "source": ["s"], "tokens": [5]})
    nll = {("random", 0): [2.0, 3.0], ("random", 1): [9.0, 9.0], ("bm25", 0): [1.5, 2.0]}
    choices = [Choice(chooser, "sums", 100, seed, ("a",), 0.0) for chooser, seed in nll]
    after = {
        choice.run: {"nll": {"sums": values}, "tokens": 100, "seconds": 1.0}
        for choice, values in zip(choices[:2], list(nll.values())[:2], strict=True)
    }
    # Equal ids share a run, so that the third is told apart by its text.
    choices[2] = Choice("bm25", "sums", 100, 0, ("a", "a"), 0.0)
    after[choices[2].run] = {"nll": {"sums": nll["bm25", 0]}, "tokens": 100, "seconds": 1.0}
    random, bm25 = _table(pool, choices, {"sums": [2.0, 2.0]}, after)
    assert bm25["against_random"]["mean"] == pytest.approx(-0.75) and bm25["against_influence"] is None
    assert random["change"]["mean"] == pytest.approx(3.75) and random["overlap_with_influence"] is None


def test_bad_settings_are_named() -> None:
    changes: tuple[dict[str, Any], ...] = (
        {"seeds": 0},
        {"tokens": -1},
        {"methods": ("random", "random")},
        {"methods": ("influence", "matchin")},
        {"methods": ("theirs",), "runs": (("others", "a"),)},
        {"runs": (("hidden", "a"),)},
        {"runs": (("a", "x"), ("a", "x"))},
    )
    for change in changes:
        with pytest.raises(ValueError, match="comparison"):
            ComparisonConfig(**change)

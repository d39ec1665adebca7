"""The `comparison` stage: the base model trained on equally many tokens of each chooser's texts."""

import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from jz3.comparison.config import ComparisonConfig
from jz3.errors import Jz3Error
from jz3.evaluation import mean_nll
from jz3.evaluation.intervals import mean
from jz3.files import canonical_json, hash_text, read_json, write_json, write_jsonl
from jz3.filtering.decontaminate import DecontaminationIndex
from jz3.models import load_tokenizer, resolve_model
from jz3.processes import end_with
from jz3.records import Doc, Query, Reject
from jz3.seeding import seed_for
from jz3.selection.config import GRADIENTS
from jz3.selection.pool import Pool, load_pool
from jz3.stage import StageContext
from jz3.training import Phase, TrainSettings, train

BASES = "base"
"""Folder of the untrained model's NLL of every problem, a file per set of problems and number format."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One chooser's texts for one task (or for all), budget and seed."""

    chooser: str
    task: str
    """Empty: chosen for all tasks together."""
    tokens: int
    seed: int
    ids: tuple[str, ...]
    seconds: float
    """What choosing took, given scores and features."""

    @property
    def run(self) -> str:
        """Name of its training, which equal choices share."""
        return _key(self.ids, self.tokens, self.seed)


@dataclass(frozen=True, slots=True)
class Training:
    """What a process needs to train and score one model."""

    base: Path
    texts: tuple[str, ...]
    settings: TrainSettings
    folder: Path
    seed: int
    dtype: str
    queries: dict[str, list[Query]]
    """Of the tasks that the choice was made for."""

    @property
    def done(self) -> bool:
        """Whether there is a result."""
        return (self.folder / "result.json").exists()


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is to be trained, and what it is judged by."""

    queries: dict[str, list[Query]]
    refused: list[Reject]
    pool: Pool
    choices: list[Choice]
    trainings: dict[str, Training]
    """By the name of the run."""


def run(ctx: StageContext) -> dict[str, Any]:
    """Train the base model on each chooser's texts and score the evaluation problems before and after.

    Texts that hold an evaluation problem, or a long phrase of one, are left out before anything is
    chosen and kept in rejects.jsonl.

    Raises:
        Jz3Error: no evaluation problem to judge the trainings by.
    """
    config = ctx.recipe.comparison
    if not config.tokens:
        return {"tokens": 0, "table": []}
    plan = _plan(ctx)
    for task in {choice.task for choice in plan.choices}:
        if not plan.queries.get(task, []) if task else not plan.queries:
            raise Jz3Error(
                f"comparison: no evaluation problem {f'of {task!r} ' if task else ''}judges the trainings; "
                "give targets.tasks an eval above 0, or set comparison.tokens to 0"
            )
    write_jsonl(ctx.out / "rejects.jsonl", (reject.to_json() for reject in plan.refused))
    before = _scored(_base(ctx, plan), resolve_model(ctx.recipe.model), _dtype(ctx), plan.queries)
    _train_all(ctx, list(plan.trainings.values()), config.workers)
    return _summary(ctx, plan, before)


def so_far(ctx: StageContext) -> dict[str, Any]:
    """Return the summary of the trainings that are finished, while others run or after a kill.

    Args:
        ctx: of the comparison, with the settings that it runs with.

    Raises:
        Jz3Error: not even the base model has been scored.
    """
    plan = _plan(ctx)
    if not _base(ctx, plan).exists():
        raise Jz3Error(f"{ctx.out} holds no result yet; run the comparison first")
    done = [choice for choice in plan.choices if plan.trainings[choice.run].done]
    return _summary(ctx, replace(plan, choices=done), read_json(_base(ctx, plan)))


def _plan(ctx: StageContext) -> Plan:
    config = ctx.recipe.comparison
    queries: dict[str, list[Query]] = {}
    for row in ctx.rows("targets", "eval.jsonl"):
        query = Query.from_json(row)
        mine = queries.setdefault(query.task, [])
        if not config.problems or len(mine) < config.problems:
            mine.append(query)
    docs = {row["id"]: Doc.from_json(row) for row in ctx.rows("corpus", "docs.jsonl")}
    refused = _contaminated(docs, queries)
    sources = config.without_sources
    barred = {r.id for r in refused} | {d.id for d in docs.values() if d.source in sources}
    pool = load_pool(ctx, barred, config.runs)
    choices = [
        _choose(ctx, pool, chooser, task, tokens, seed)
        for tokens in (config.tokens, *config.more_tokens)
        for seed in range(config.seeds)
        for task in (pool.tasks if config.per_task else ("",))
        for chooser in config.methods
    ]
    judged: dict[str, set[str]] = {}
    for choice in choices:
        judged.setdefault(choice.run, set()).update([choice.task] if choice.task else queries)
    trainings = {}
    for choice in choices:
        # Texts of a length that fills packs badly would buy more steps for as many tokens.
        settings = replace(config.train, max_tokens=choice.tokens * config.train.epochs, packing="even")
        mine = {task: rows for task, rows in queries.items() if task in judged[choice.run]}
        trainings[choice.run] = Training(
            resolve_model(ctx.recipe.model),
            tuple(docs[i].text for i in choice.ids),
            settings,
            ctx.out / "runs" / _key(choice.run, asdict(settings), _dtype(ctx), _names(mine)),
            seed_for(ctx.seed, "comparison", choice.seed) if choice.seed else ctx.seed,
            _dtype(ctx),
            mine,
        )
    return Plan(queries, refused, pool, choices, trainings)


def _key(*parts: Any) -> str:
    return hash_text(canonical_json(parts))


def _names(queries: dict[str, list[Query]]) -> dict[str, list[str]]:
    return {task: [query.id for query in rows] for task, rows in queries.items()}


def _base(ctx: StageContext, plan: Plan) -> Path:
    return ctx.out / BASES / f"{_key(_dtype(ctx), _names(plan.queries))}.json"


def _dtype(ctx: StageContext) -> str:
    """Return what models are judged in.

    Weights that are all trained are kept in float32, whatever the products run in, and must not be
    rounded before they are judged: a step of a small learning rate is below bfloat16's spacing.
    """
    train = ctx.recipe.comparison.train
    return "float32" if train.precision == "float32" or train.method == "full" else ctx.recipe.model.dtype


def _summary(ctx: StageContext, plan: Plan, before: dict[str, list[float]]) -> dict[str, Any]:
    runs = {choice.run for choice in plan.choices}
    after = {name: read_json(plan.trainings[name].folder / "result.json") for name in runs}
    return {
        "tokens": ctx.recipe.comparison.tokens,
        "problems": sum(map(len, plan.queries.values())),
        "contaminated": len(plan.refused),
        "base": {task: float(np.nanmean(values)) for task, values in before.items()},
        "gradients": _with_gradients(ctx.recipe.comparison),
        "table": _table(plan.pool, plan.choices, before, after),
    }


def _with_gradients(config: ComparisonConfig) -> list[str]:
    """Return the choosers that rest on a backward pass, those of other runs by their kind of features."""
    theirs = {
        name
        for name, folder in config.runs
        if read_json(Path(folder) / "features" / "manifest.json")["summary"]["kind"] != "readout"
    }
    return [m for m in config.methods if m in GRADIENTS or m in theirs]


def _contaminated(docs: dict[str, Doc], queries: dict[str, list[Query]]) -> list[Reject]:
    index = DecontaminationIndex()
    for task, rows in queries.items():
        for query in rows:
            index.add(task, query.problem)
    refused = []
    for doc in docs.values():
        if hits := index.find(doc.text):
            detail = f"{hits[0].suite} problem {hits[0].question}: {hits[0].span}"
            refused.append(Reject(id=doc.id, stage="comparison", reason="holds_test_problem", detail=detail))
    return refused


def _choose(ctx: StageContext, pool: Pool, chooser: str, task: str, tokens: int, seed: int) -> Choice:
    start = time.perf_counter()
    rows = pool.order(ctx, chooser, task, seed, tokens)
    ids = tuple(pool.scores["id"][row] for row in rows)
    return Choice(chooser, task, tokens, seed, ids, time.perf_counter() - start)


def _train_all(ctx: StageContext, trainings: Sequence[Training], workers: int) -> None:
    missing = [t for t in trainings if not t.done]
    for training in trainings:
        if training.done:
            _tidy(training.folder)
    with ctx.progress(len(trainings), "trainings") as advance:
        advance(len(trainings) - len(missing))
        if workers == 1:
            for training in missing:
                train_and_score(training)
                advance(1)
            return
        with ProcessPoolExecutor(
            workers, mp_context=get_context("spawn"), initializer=_begin, initargs=(workers, os.getpid())
        ) as pool:
            futures = [pool.submit(train_and_score, training) for training in missing]
            try:
                for future in as_completed(futures):
                    future.result()
                    advance(1)
            except BrokenProcessPool as error:
                raise Jz3Error(
                    f"comparison: a training's process was killed, for want of memory perhaps; run again, what is "
                    f"finished in {ctx.out} is kept, with fewer comparison.workers than {workers} if it is killed again"
                ) from error
            finally:  # an error needn't wait for the trainings that haven't begun
                pool.shutdown(cancel_futures=True)


def _begin(workers: int, parent: int) -> None:
    """Prepare a process of trainings; it must not wait for ever, nor hold a GPU, once the parent is killed."""
    import torch

    if not end_with(parent):
        os._exit(1)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def train_and_score(training: Training) -> None:
    """Train one model, score the problems, keep result.json and delete the model."""
    start = time.monotonic()
    model = training.folder / "model"
    done = train(
        training.base,
        [Phase(name="texts", rows=[("", text) for text in training.texts])],
        training.settings,
        model,
        seed=training.seed,
        dtype=training.dtype,
    )
    nll = _scored(training.folder / "nll.json", model, training.dtype, training.queries)
    result = {"nll": nll, "tokens": done.tokens, "steps": done.steps, "seconds": time.monotonic() - start}
    write_json(training.folder / "result.json", result)
    _tidy(training.folder)


def _tidy(folder: Path) -> None:
    """Delete all but the result of a training; a kill may have come between."""
    for rest in folder.iterdir():
        if rest.name != "result.json":
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink()


def _scored(path: Path, folder: Path, dtype: str, queries: dict[str, list[Query]]) -> dict[str, list[float]]:
    if not path.exists():
        from jz3.inference import load_for_inference

        model, tokenizer = load_for_inference(folder, dtype), load_tokenizer(folder)
        write_json(path, {task: mean_nll(model, tokenizer, rows) for task, rows in queries.items()})
    return read_json(path)


def _table(
    pool: Pool, choices: Sequence[Choice], before: dict[str, list[float]], after: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return a row per budget, task (empty: all together) and chooser; intervals over problems, paired.

    A problem's change is the mean over the seeds of its NLL after training less that before.
    """
    groups: dict[tuple[int, str, str], list[Choice]] = {}
    for choice in choices:
        groups.setdefault((choice.tokens, choice.task, choice.chooser), []).append(choice)
    source = dict(zip(pool.scores["id"], pool.scores["source"], strict=True))
    sizes = dict(zip(pool.scores["id"], pool.scores["tokens"], strict=True))
    changes = {}
    for key, members in groups.items():
        new = np.stack([_of_task(after[choice.run]["nll"], key[1]) for choice in members])
        changes[key] = new - _of_task(before, key[1])
    rows = []
    for key, members in groups.items():
        tokens, task, chooser = key
        mine = changes[key]
        against = {
            f"against_{other}": _paired(mine, members, changes, groups, (tokens, task, other))
            for other in ("random", "influence")
        }
        influence = groups.get((tokens, task, "influence"))
        ids = members[0].ids
        shared = len(set(influence[0].ids) & set(ids)) / max(len(ids), 1) if influence else None
        rows.append(
            {
                "budget": tokens,
                "task": task,
                "chooser": chooser,
                "change": mean(_finite(mine.mean(0))),
                "seeds": [choice.seed for choice in members],
                "change_per_seed": [float(np.nanmean(row)) for row in mine],
                **{name: None if pairs is None else mean(_finite(pairs)) for name, pairs in against.items()},
                "nll": float(np.nanmean(mine.mean(0) + _of_task(before, task))),
                "texts": len(ids),
                "trained_tokens": after[members[0].run]["tokens"],
                "mean_tokens": float(np.mean([sizes[i] for i in ids])) if ids else 0.0,
                "overlap_with_influence": shared,
                "mix": dict(sorted(Counter(source[i] for i in ids).items())),
                "choosing_seconds": members[0].seconds,
                "training_seconds": float(np.mean([after[c.run]["seconds"] for c in members])),
            }
        )
    return rows


def _paired(
    mine: np.ndarray,
    members: list[Choice],
    changes: dict[tuple[int, str, str], np.ndarray],
    groups: dict[tuple[int, str, str], list[Choice]],
    other: tuple[int, str, str],
) -> np.ndarray | None:
    """Return the problems' changes less those of another chooser, over the seeds that both were trained with."""
    rows = {
        choice.seed: row for choice, row in zip(groups.get(other, []), changes.get(other, []), strict=True)
    }
    pairs = [row - rows[c.seed] for c, row in zip(members, mine, strict=True) if c.seed in rows]
    return np.mean(pairs, 0) if pairs else None


def _of_task(values: dict[str, list[float]], task: str) -> np.ndarray:
    return np.concatenate([values[name] for name in ([task] if task else values)])


def _finite(values: np.ndarray) -> list[float]:
    return values[np.isfinite(values)].tolist()

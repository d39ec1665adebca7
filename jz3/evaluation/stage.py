"""The evaluation stage: solve, grade, score the reference solutions, compare the models."""

import contextlib
import itertools
import logging
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jz3.engines.base import Engine, Request, Sampling
from jz3.engines.on_demand import OnDemand, engine_on_demand, noted_info
from jz3.engines.text import versions
from jz3.engines.tool_loop import generate_with_tools
from jz3.errors import Jz3Error
from jz3.evaluation.benchmarks import load_benchmark, questions_hash, spread
from jz3.evaluation.choices import choices_of, chosen_letter
from jz3.evaluation.config import EvaluationConfig
from jz3.evaluation.examples import example, examples_for
from jz3.evaluation.intervals import accuracy, mean
from jz3.evaluation.nll import mean_nll
from jz3.files import read_json, read_jsonl, write_jsonl
from jz3.models import load_tokenizer, resolve_model
from jz3.records import Query, Reject, Result
from jz3.stage import StageContext
from jz3.templates import QUESTION, prompt_for

if TYPE_CHECKING:
    from jz3.grading.answer import Grader
    from jz3.grading.sandbox import Sandbox

log = logging.getLogger(__name__)

KINDS = {"nl": "cot", "tool": "tool"}
STOP = f"\n{QUESTION}"
"""A base model goes on to problems of its own, whose answers would be graded instead."""


def run(ctx: StageContext) -> dict[str, Any]:
    """Evaluate the base and the trained model.

    Accuracies are greedy and zero-shot (but for `base_shots`), in natural language and with executed Python;
    the negative log-likelihood is that of the reference solutions, per token, averaged over the problems.

    Returns:
        For `base` and `trained`: `nl` and `tool` (accuracy with its Wilson 95% interval, overall and per
        task) and `nll`; `accuracy_difference`, trained - base, and `nll_difference`, base - trained, both paired by
        problem; and how it was measured.
    """
    from jz3.grading.answer import Grader
    from jz3.grading.sandbox import Sandbox

    config = ctx.recipe.evaluation
    _check_benchmarks(ctx, config)
    queries = _queries(ctx, config)
    solved: list[Query] = []
    for task in _tasks(queries):
        solved.extend(spread([query for query in queries if query.task == task], config.limit))
    shown = {setting: _examples(ctx, setting, _tasks(queries)) for setting in config.settings}
    base = resolve_model(ctx.recipe.training.start(ctx.recipe.model))
    models = {"base": base, "trained": ctx.path("training", "model")}
    summary: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    rejects: list[dict[str, Any]] = []
    engines: dict[str, Any] = {}
    nll: dict[str, list[float | None]] = {}
    with OnDemand(Grader) as grader, OnDemand(lambda: Sandbox(config.sandbox)) as sandbox:
        for name, folder in models.items():
            note = ctx.out / f"engine-{name}.json"
            part: dict[str, Any] = {}
            with engine_on_demand(config.engine, folder, ctx.recipe.model.dtype, note) as engine:
                for setting in config.settings:
                    examples = shown[setting] if name == "base" else {}
                    done = _solve(ctx, name, setting, solved, examples, engine, sandbox, grader)
                    part[setting] = _setting_summary(done)
                    rows.extend(row["result"] for row in done if row["result"])
                    rejects.extend(row["reject"] for row in done if row["reject"])
            engines[name] = noted_info(config.engine, note)
            nll[name] = _score_references(ctx, name, folder, queries)
            summary[name] = part
    pairs = []
    for query, base, trained in zip(queries, nll["base"], nll["trained"], strict=True):
        if base is not None and trained is not None:
            pairs.append({"id": query.id, "task": query.task, "base": base, "trained": trained})
        elif query.completion.strip():
            rejects.append(
                _reject(query, "nll", "the prompt and the reference solution exceed the model's context")
            )
    for name in models:
        summary[name]["nll"] = mean([pair[name] for pair in pairs])
    write_jsonl(ctx.out / "results.jsonl", rows)
    write_jsonl(ctx.out / "nll.jsonl", pairs)
    write_jsonl(ctx.out / "rejects.jsonl", rejects)
    gains = {
        setting: _gains([row for row in rows if row["setting"] == setting]) for setting in config.settings
    }
    differences = {pair["id"]: pair["base"] - pair["trained"] for pair in pairs}
    return {
        **summary,
        "accuracy_difference": gains,
        "nll_difference": {
            **mean(list(differences.values())),
            "tasks": {
                task: mean([differences[pair["id"]] for pair in pairs if pair["task"] == task])
                for task in _tasks(queries)
            },
        },
        "problems": len(queries),
        "solved": len(solved),
        "without_reference": sum(not query.completion.strip() for query in queries),
        "rejected": dict(sorted(Counter(f"{r['reason']}:{r['where']}" for r in rejects).items())),
        "grader": {"name": "math-verify", "version": versions("math-verify").get("math-verify", "")},
        "prompt": {setting: prompt_for("{problem}", KINDS[setting]) for setting in config.settings},
        "shots": 0,
        "base_shots": {setting: max(map(len, examples.values())) for setting, examples in shown.items()},
        "decoding": {
            "temperature": 0.0,
            "max_new_tokens": config.max_new_tokens,
            "stop": [STOP],
            "rounds": config.rounds,
        },
        "engine": engines,
        "versions": versions("torch", "transformers", "math-verify", "sympy"),
    }


def _tasks(queries: list[Query]) -> list[str]:
    return list(dict.fromkeys(query.task for query in queries))


def _queries(ctx: StageContext, config: EvaluationConfig) -> list[Query]:
    queries = [Query.from_json(row) for row in ctx.rows("targets", "eval.jsonl")]
    for benchmark in config.benchmarks:
        queries.extend(load_benchmark(benchmark.name, Path(benchmark.path), benchmark.limit))
    twice = [key for key, count in Counter(query.id for query in queries).items() if count > 1]
    if twice:
        raise Jz3Error(
            f"{len(twice)} evaluation problems share their id with another, e.g. {twice[0]!r}; rename a benchmark"
        )
    if not queries:
        raise Jz3Error(
            "there is no problem to evaluate on: targets/eval.jsonl is empty and evaluation.benchmarks too"
        )
    return queries


def _check_benchmarks(ctx: StageContext, config: EvaluationConfig) -> None:
    """Refuse a benchmark with other questions than those that the filters kept out of the training data."""
    path = ctx.run_dir / "filtering" / "manifest.json"
    noted = read_json(path)["summary"].get("benchmarks", {}) if path.exists() else {}
    for benchmark in config.benchmarks:
        if noted.get(benchmark.name) not in (None, questions_hash(benchmark)):
            raise Jz3Error(
                f"benchmark {benchmark.name!r}: {benchmark.path} has other questions than when the filters kept them "
                f"out of the training data; restore it, or delete filtering, training and evaluation of {ctx.run_dir}"
            )


def _examples(ctx: StageContext, setting: str, tasks: list[str]) -> dict[str, list[str]]:
    """Return by task the examples that go in front of a problem that the base model gets."""
    count, kind = ctx.recipe.evaluation.base_shots, KINDS[setting]
    known = [Query.from_json(row) for row in ctx.rows("targets", "queries.jsonl")] if count else []
    shown = {task: examples_for(known, task, kind, count, ctx.seed) for task in tasks}
    fewest = min(map(len, shown.values()), default=count)
    if fewest < count:  # targets of files are solved in words alone
        taught = map(Query.from_json, read_jsonl(ctx.path("filtering", "instruction.jsonl")))
        usable = (
            row for row in taught if row.completion.strip() and row.prompt == prompt_for(row.problem, kind)
        )
        spare = [example(row) for row in itertools.islice(usable, count - fewest)]
        shown = {task: (examples + spare)[:count] for task, examples in shown.items()}
        fewest = min(map(len, shown.values()))
    if fewest < count:
        log.warning(
            "evaluation: the base model gets %d of %d examples (%s): neither targets nor instruction data hold more",
            fewest,
            count,
            setting,
        )
    return shown


def _solve(
    ctx: StageContext,
    model: str,
    setting: str,
    queries: list[Query],
    examples: dict[str, list[str]],
    engine: OnDemand[Engine],
    sandbox: "OnDemand[Sandbox]",
    grader: "OnDemand[Grader]",
) -> list[dict[str, Any]]:
    """Return a row per problem: its Result or its Reject, the tokens written, the sandbox's levels."""
    config = ctx.recipe.evaluation
    sampling = Sampling(max_new_tokens=config.max_new_tokens, stop=(STOP,))
    tolerances = {benchmark.name: benchmark.tolerance for benchmark in config.benchmarks}

    def work(part: list[Query]) -> list[dict[str, Any]]:
        requests = [
            Request(
                id=q.id, prompt="".join([*examples.get(q.task, ()), prompt_for(q.problem, KINDS[setting])])
            )
            for q in part
        ]
        if setting == "tool":
            limits = {"rounds": config.rounds, "output_limit": config.output_limit}
            replies: list[Any] = [
                *generate_with_tools(engine.get(), sandbox.get(), requests, sampling, **limits)
            ]
        else:
            replies = [*engine.get().generate(requests, sampling)]
        verdicts = grade(part, [reply.text for reply in replies], grader.get(), tolerances)
        rows = []
        for query, reply, (correct, prediction) in zip(part, replies, verdicts, strict=True):
            unread = reply.finish == "too_long" and not reply.text
            result = Result(
                id=query.id,
                model=model,
                setting=setting,
                task=query.task,
                correct=correct,
                prediction=prediction,
                answer=query.answer,
                output=reply.text,
                rounds=getattr(reply, "rounds", 1),
            )
            detail = f"the prompt's {reply.prompt_tokens} tokens fill the model's context"
            rows.append(
                {
                    "result": None if unread else result.to_json(),
                    "reject": _reject(query, f"{model}:{setting}", detail) if unread else None,
                    "new_tokens": reply.new_tokens,
                    "levels": sorted({block.level for block in getattr(reply, "executed", ())}),
                }
            )
        return rows

    found = ctx.shards(
        f"shards/{model}-{setting}",
        queries,
        config.shard_size,
        work,
        f"problems ({model}, {setting})",
        _model_key(ctx, model),
    )
    return list(found)


def _model_key(ctx: StageContext, model: str) -> str:
    return ctx.training_key("training") if model == "trained" else ""


def grade(
    queries: list[Query], outputs: list[str], grader: "Grader", tolerances: Mapping[str, float] | None = None
) -> list[tuple[bool, str]]:
    """Return for every output whether it is right, and the answer extracted from it.

    A multiple-choice problem is graded by the letter chosen, any other by mathematical equality, or within the
    relative tolerance that a task has in `tolerances`.
    """
    from jz3.grading.answer import extract_answer, numbers_near

    predictions = [extract_answer(output) for output in outputs]
    verdicts: list[tuple[bool, str]] = [(False, prediction) for prediction in predictions]
    plain = []
    for i, (query, output, prediction) in enumerate(zip(queries, outputs, predictions, strict=True)):
        choices = choices_of(query.problem)
        if query.answer in choices:
            letter = chosen_letter(output, prediction, choices, grader.equal_many)
            verdicts[i] = (letter == query.answer, letter or prediction)
        elif prediction:
            plain.append(i)
    equal = grader.equal_many([(queries[i].answer, predictions[i]) for i in plain])
    for i, same in zip(plain, equal, strict=True):
        tolerance = (tolerances or {}).get(queries[i].task, 0.0)
        near = tolerance > 0 and numbers_near(queries[i].answer, predictions[i], tolerance)
        verdicts[i] = (same or near, predictions[i])
    return verdicts


def _setting_summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    results = [row["result"] for row in rows if row["result"]]
    tasks = dict.fromkeys(result["task"] for result in results)
    summary = {
        **accuracy([result["correct"] for result in results]),
        "tasks": {task: accuracy([r["correct"] for r in results if r["task"] == task]) for task in tasks},
        "rejected": sum(row["reject"] is not None for row in rows),
        "new_tokens": sum(row["new_tokens"] for row in rows),
    }
    levels = sorted({level for row in rows for level in row["levels"]})
    return {**summary, "sandbox_levels": levels} if levels else summary


def _gains(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return by how much more the trained model solves, over the problems that both were given."""
    base = {row["id"]: row["correct"] for row in results if row["model"] == "base"}
    pairs = [
        (row["task"], float(row["correct"]) - float(base[row["id"]]))
        for row in results
        if row["model"] == "trained" and row["id"] in base
    ]
    tasks = dict.fromkeys(task for task, _ in pairs)
    return {
        **mean([gain for _, gain in pairs]),
        "tasks": {task: mean([gain for other, gain in pairs if other == task]) for task in tasks},
    }


def _score_references(ctx: StageContext, name: str, folder: Path, queries: list[Query]) -> list[float | None]:
    """Return the mean NLL of every query's reference solution; None where there is none or it doesn't fit."""
    config = ctx.recipe.evaluation

    def opener() -> contextlib.AbstractContextManager[tuple[Any, Any]]:
        from jz3.inference import load_for_inference

        model = load_for_inference(folder, ctx.recipe.model.dtype)
        return contextlib.nullcontext((model, load_tokenizer(folder)))

    with OnDemand(opener) as loaded:

        def work(part: list[Query]) -> list[dict[str, Any]]:
            model, tokenizer = loaded.get()
            values = mean_nll(model, tokenizer, part, config.nll_batch_tokens)
            return [{"nll": None if math.isnan(value) else value} for value in values]

        rows = ctx.shards(
            f"shards/{name}-nll",
            queries,
            config.shard_size,
            work,
            f"reference solutions ({name})",
            _model_key(ctx, name),
        )
    return [row["nll"] for row in rows]


def _reject(query: Query, where: str, detail: str) -> dict[str, Any]:
    return Reject(
        id=query.id,
        stage="evaluation",
        reason="too_long",
        detail=detail,
        where=where,
        text=query.problem[:4000],
    ).to_json()

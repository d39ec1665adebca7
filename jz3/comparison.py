"""Does the choice pay? The same model trained on equally many tokens of each method's texts."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jz3.evaluation import mean_nll
from jz3.evaluation.intervals import mean
from jz3.files import read_json, write_json
from jz3.influence import read_scores
from jz3.models import best_device, load_model, load_tokenizer, resolve_model
from jz3.records import Doc, Query
from jz3.selection import chosen_rows
from jz3.stage import StageContext
from jz3.training import Phase, TrainSettings, train


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonConfig:
    """A small training per method of choosing texts; judged by the targets' negative log-likelihood."""

    tokens: int = 0
    """Tokens of text that each model is trained on; 0: no comparison."""
    methods: tuple[str, ...] = ("influence", "random")
    """Columns of the influence stage's table."""
    problems: int = 0
    """How many evaluation problems are scored; 0: all."""
    train: TrainSettings = field(default_factory=lambda: TrainSettings(schedule="constant", warmup=0.1))


def run(ctx: StageContext) -> dict[str, Any]:
    """Train the base model on each method's best texts and score the evaluation problems before and after."""
    config = ctx.recipe.comparison
    if not config.tokens:
        return {"tokens": 0, "trained": {}}
    scores = read_scores(ctx.path("influence", "scores.parquet").parent)
    docs = {row["id"]: Doc.from_json(row) for row in ctx.rows("corpus", "docs.jsonl")}
    queries = [Query.from_json(row) for row in ctx.rows("targets", "eval.jsonl")]
    queries = queries[: config.problems or len(queries)]
    base = resolve_model(ctx.recipe.model)
    before = _score(ctx, "base", base, queries)
    trained: dict[str, Any] = {}
    for method in config.methods:
        rows = chosen_rows(scores, method, len(scores["id"]), ctx.recipe.selection.combine)
        # The last text is cut by the trainer's own limit, so that every method reads equally much.
        total = np.cumsum([scores["tokens"][r] for r in rows])
        texts = [docs[scores["id"][r]].text for r in rows[: int(np.searchsorted(total, config.tokens)) + 1]]
        after = ctx.out / method / "nll.json"
        summary = ctx.out / method / "training.json"
        folder = ctx.out / method / "model"
        if not after.exists():
            done = train(
                base,
                [Phase(name="texts", rows=[("", text) for text in texts])],
                config.train,
                folder,
                seed=ctx.seed,
                dtype=ctx.recipe.model.dtype,
                progress=ctx.progress,
            )
            write_json(summary, {"tokens": done.tokens, "steps": done.steps, "texts": len(texts)})
            _score(ctx, method, folder, queries)
        # Outside the condition: a kill may have come between the scores and the clean-up.
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_name("model.work.lock").unlink(missing_ok=True)
        values = read_json(after)
        change = [a - b for a, b in zip(values, before, strict=True) if a == a and b == b]
        trained[method] = {"nll": float(np.nanmean(values)), "change": mean(change), **read_json(summary)}
    return {
        "tokens": config.tokens,
        "problems": len(queries),
        "base": float(np.nanmean(before)),
        "trained": trained,
    }


def _score(ctx: StageContext, name: str, folder: Path, queries: list[Query]) -> list[float]:
    path = ctx.out / name / "nll.json"
    if not path.exists():
        model: Any = load_model(folder, ctx.recipe.model.dtype)
        model, tokenizer = model.to(best_device()), load_tokenizer(folder)
        write_json(path, mean_nll(model, tokenizer, queries))
    return read_json(path)

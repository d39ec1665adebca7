"""The two training stages of the loop: the synthesiser, and the model itself."""

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

from jz3.errors import Jz3Error
from jz3.files import write_jsonl
from jz3.models import resolve_model
from jz3.records import Problem, Prompt, Query
from jz3.rows import Rows
from jz3.stage import StageContext
from jz3.templates import prompt_for
from jz3.training.config import StageSettings
from jz3.training.packing import Phase
from jz3.training.run import TrainSummary, train

if TYPE_CHECKING:
    from jz3.config import Recipe

log = logging.getLogger(__name__)


def run_synthesiser(ctx: StageContext) -> dict[str, Any]:
    """Train the small model that writes problems on what the teacher wrote.

    A row is the teacher's prompt and its reply. First the problems from random texts, then the
    boost with those from the texts that influence selected (`boost = "continue"`), or all of them
    shuffled together (`"retrain"`).

    Args:
        ctx: reads distillation/prompts.jsonl, initial.jsonl and boost.jsonl; writes model/ and
            log.jsonl.

    Returns:
        The training's summary.

    Raises:
        Jz3Error: there is no row at all, or a problem's prompt is missing.
    """
    from jz3.distillation.parser import format_reply

    config = ctx.recipe.synthesiser
    prompts = {row["id"]: Prompt.from_json(row).text for row in ctx.rows("distillation", "prompts.jsonl")}

    def rows(name: str) -> list[tuple[str, str]]:
        pairs = []
        for problem in (Problem.from_json(row) for row in ctx.rows("distillation", name)):
            if problem.prompt_id not in prompts:
                raise Jz3Error(
                    f"distillation/{name}: problem {problem.id} has an unknown prompt {problem.prompt_id!r}"
                )
            pairs.append((prompts[problem.prompt_id], format_reply(problem.problem, problem.solution)))
        return pairs

    initial, boost = rows("initial.jsonl"), rows("boost.jsonl")
    if not initial and not boost:
        raise Jz3Error(
            "the teacher's problems were all rejected; see distillation/rejects.jsonl for the reasons"
        )
    notes = []
    if not boost:
        notes.append(
            "no problem from selected texts: the synthesiser is trained on those from random texts alone"
        )
    if not initial:
        notes.append(
            "no problem from random texts: the synthesiser is trained on those from selected texts alone"
        )
    if config.boost == "retrain":
        phases = [Phase(name="initial and boost", rows=initial + boost)]
    else:
        phases = [Phase(name="initial", rows=initial), Phase(name="boost", rows=boost)]
    return _train(ctx, phases, notes)


def run_training(ctx: StageContext) -> dict[str, Any]:
    """Train the base model on the two-stage mixture: kept synthetic problems, then instruction data.

    Args:
        ctx: reads filtering/kept.jsonl and instruction.jsonl; writes model/ and log.jsonl.

    Returns:
        The training's summary.

    Raises:
        Jz3Error: there is no row at all.
    """
    kept = Rows([ctx.path("filtering", "kept.jsonl")], _lesson)
    queries = Rows([ctx.path("filtering", "instruction.jsonl")], _instruction)
    if not kept and not queries:
        raise Jz3Error(
            "no synthetic problem was kept and there is no instruction data; see filtering/verdicts.jsonl "
            "and rejects.jsonl"
        )
    notes = []
    if not kept:
        notes.append("no synthetic problem was kept: the model is trained on the instruction data alone")
    if not queries:
        notes.append("there is no instruction data: the model is trained on the synthetic problems alone")
    phases = [
        Phase(name="synthetic", rows=kept),
        Phase(name="instruction", rows=queries),
    ]
    return _train(ctx, phases, notes)


def _lesson(row: dict[str, Any]) -> tuple[str, str]:
    problem = Problem.from_json(row)
    return prompt_for(problem.problem, problem.kind), problem.solution


def _instruction(row: dict[str, Any]) -> tuple[str, str]:
    query = Query.from_json(row)
    return query.prompt, query.completion


def check_synthesiser(recipe: "Recipe") -> None:
    """Get the model that becomes the synthesiser, so that a misspelt one is told before hours of work."""
    resolve_model(recipe.synthesiser.start(recipe.model))


def check_training(recipe: "Recipe") -> None:
    """Get the model that is trained on the mixture, as `check_synthesiser` does."""
    resolve_model(recipe.training.start(recipe.model))


def _train(ctx: StageContext, phases: list[Phase], notes: list[str]) -> dict[str, Any]:
    for note in notes:
        log.warning(note)
    recipe = ctx.recipe
    settings: StageSettings = getattr(recipe, ctx.name)
    summary: TrainSummary = train(
        resolve_model(settings.start(recipe.model)),
        phases,
        settings,
        ctx.out / "model",
        seed=ctx.seed,
        dtype=recipe.model.dtype,
        progress=ctx.progress,
    )
    # As they come back from training.json when a kill comes before this line.
    write_jsonl(ctx.out / "log.jsonl", (dict(sorted(row.items())) for row in summary.log))
    table = dataclasses.asdict(summary)
    del table["log"]
    return table | {"notes": notes}

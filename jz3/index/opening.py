"""Open what was made, by either command that makes texts with scores and features."""

from pathlib import Path

from jz3.config import stored_recipe
from jz3.errors import Jz3Error
from jz3.index.collection import Collection, LoopCollection
from jz3.scoring.collection import ScoredCollection
from jz3.stage import StageContext


def open_collection(run: Path | str, checkpoint: int | None = None) -> Collection:
    """Open a run of the whole loop or of `jz3 score`.

    Args:
        run: its folder.
        checkpoint: of a run of `jz3 score` with several, whose features are searched; all of them, by
            weight, where it isn't given.

    Raises:
        Jz3Error: the folder is no run.
        ValueError: the run has no such checkpoint.
    """
    run = Path(run)
    if (run / "plan.json").is_file():
        return ScoredCollection(run, checkpoint)
    if not (run / "recipe.json").is_file():
        raise Jz3Error(
            f"{run} is no run (it has neither recipe.json nor plan.json); make one with `jz3 run RECIPE --out "
            f"{run}` or `jz3 score CORPUS --target NAME=FILE --keep-features --out {run}`"
        )
    if checkpoint:
        raise ValueError(f"--checkpoint {checkpoint}: {run} is a run of the loop, which has one model")
    return LoopCollection(StageContext(recipe=stored_recipe(run), run_dir=run, name="index"))

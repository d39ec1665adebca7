"""From scores to chosen texts, with the reason of each choice."""

from typing import TYPE_CHECKING, Any

from jz3.selection.best import COMBINE, Choice, Place, StreamingSelection, chosen_rows, select
from jz3.selection.config import SelectionConfig

if TYPE_CHECKING:
    from jz3.stage import StageContext

__all__ = [
    "COMBINE",
    "Choice",
    "Place",
    "SelectionConfig",
    "StreamingSelection",
    "chosen_rows",
    "run",
    "select",
]


def run(ctx: "StageContext") -> dict[str, Any]:
    """Run the `selection` stage, see jz3.selection.stage."""
    from jz3.selection.stage import run as stage

    return stage(ctx)

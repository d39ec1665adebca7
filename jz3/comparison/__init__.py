"""Does the choice pay? Models trained on equally many tokens of each chooser's texts."""

from typing import TYPE_CHECKING, Any

from jz3.comparison.config import ComparisonConfig

if TYPE_CHECKING:
    from jz3.stage import StageContext

__all__ = ["ComparisonConfig", "run"]


def run(ctx: "StageContext") -> dict[str, Any]:
    """Run the `comparison` stage, see jz3.comparison.stage."""
    from jz3.comparison.stage import run as stage

    return stage(ctx)

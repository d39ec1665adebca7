"""Which synthesised problems are good enough to train on."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jz3.stage import StageContext


def run(context: "StageContext") -> dict[str, Any]:
    """Filter the synthesised problems, and the teacher's; see `jz3.filtering.stage`."""
    from jz3.filtering.stage import filter_problems

    return filter_problems(context)

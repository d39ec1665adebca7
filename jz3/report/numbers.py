"""How the report writes a number that may be missing."""

from typing import Any


def shown(value: float | None, spec: str) -> str:
    """Format a number, or return `-` where there was too little to compute it from.

    Args:
        value: the number, or None.
        spec: as for `format`.
    """
    return "-" if value is None else format(value, spec)


def settings_of(evaluation: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the settings that the models were evaluated in, each with its name for reading."""
    names = (("nl", "natural language"), ("tool", "with Python"))
    return [(setting, name) for setting, name in names if setting in evaluation["base"]]


def mean_of_tasks(part: dict[str, Any]) -> float | None:
    """Return the mean of the tasks' accuracies, in which a task of few problems counts as much as one of many.

    Args:
        part: of the evaluation: a model in a setting.
    """
    known = [task["accuracy"] for task in part["tasks"].values() if task["accuracy"] is not None]
    return sum(known) / len(known) if known else None

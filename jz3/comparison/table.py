"""The comparison's table as text, Markdown and a plot."""

from itertools import count
from pathlib import Path
from typing import Any

from jz3.selection.config import GRADIENTS


def text_table(summary: dict[str, Any]) -> str:
    """Return the comparison's table in Markdown, the best chooser of each target and budget first.

    Args:
        summary: of the comparison stage.
    """
    lines = [
        "| target | tokens | chooser | change of NLL (95%) | against random (95%) | texts "
        "| in influence's | trainings |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in _ranked(summary):
        against, shared = row["against_random"], row["overlap_with_influence"]
        lines.append(
            f"| {row['task'] or 'all'} | {row['budget']:,} | {row['chooser']} | {_interval(row['change'])} "
            f"| {_interval(against) if against and row['chooser'] != 'random' else ''} | {row['texts']} "
            f"| {'' if shared is None else f'{shared:.0%}'} | {len(row['change_per_seed'])} |"
        )
    base = ", ".join(f"{task} {value:.4f}" for task, value in summary.get("base", {}).items())
    lines.append(
        f"\nNLL before: {base}; {summary.get('contaminated', 0)} texts with a test "
        "problem left out; intervals over problems, paired."
    )
    return "\n".join(lines)


def verdicts(summary: dict[str, Any]) -> list[str]:
    """Return a line per target and budget: the best chooser with gradients against the best without.

    The best of several looks better than it is, on both sides alike only if as many compete. Choosers with fewer
    trainings than others (so far) are left out: one training is no match for the mean of several.

    Args:
        summary: of the comparison stage.
    """
    lines = []
    gradients = summary.get("gradients", GRADIENTS)
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in _ranked(summary):
        groups.setdefault((row["budget"], row["task"]), []).append(row)
    for (budget, task), every in groups.items():
        most = max(len(row["change_per_seed"]) for row in every)
        rows = [row for row in every if len(row["change_per_seed"]) == most]
        mine = [row for row in rows if row["chooser"] in gradients]
        others = [row for row in rows if row["chooser"] not in (*gradients, "random", "control")]
        random = [row for row in rows if row["chooser"] == "random"]
        if mine:
            said = [f"{mine[0]['chooser']} {mine[0]['change']['mean']:+.4f}"]
            said += [_against(mine[0], row) for row in (*others[:1], *random)]
            if (pairs := mine[0]["against_influence"]) and mine[0]["chooser"] != "influence":
                said.append(f"against influence {_interval(pairs)}, problems and seeds paired")
            lines.append(f"{task or 'all'}, {budget:,} tokens: " + "; ".join(said))
    return lines


def _against(mine: dict[str, Any], other: dict[str, Any]) -> str:
    ours, theirs = mine["change"], other["change"]
    said = f"{other['chooser']} {theirs['mean']:+.4f}"
    if theirs["mean"] < 0:
        said = f"{ours['mean'] / theirs['mean']:.2f} x {said}"
    if ours["high"] is not None and theirs["low"] is not None:
        said += f", intervals over problems {'apart' if ours['high'] < theirs['low'] else 'overlap'}"
    # Of unfinished trainings each chooser may have other seeds.
    first, second = (
        dict(zip(row.get("seeds", count()), row["change_per_seed"], strict=False)) for row in (mine, other)
    )
    seeds = [(first[seed], second[seed]) for seed in first if seed in second]
    return f"{said}, better with {sum(a < b for a, b in seeds)} of {len(seeds)} seeds" if seeds else said


def plot(summary: dict[str, Any], path: Path) -> None:
    """Draw each chooser's change with its interval, a panel per target, at the first budget."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = [row for row in _ranked(summary) if row["budget"] == summary["tokens"]]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    with rc_context({"text.parse_math": False}):  # names of targets and choosers may hold dollar signs
        figure = Figure(figsize=(4.5 * len(tasks), 4), layout="tight")
        axes = figure.subplots(1, len(tasks), squeeze=False)
        for axis, task in zip(axes[0], tasks, strict=True):
            mine = [row for row in rows if row["task"] == task][::-1]
            means = [-row["change"]["mean"] for row in mine]
            # A single problem gives no interval.
            half = [x["high"] - x["mean"] if x["n"] > 1 else 0.0 for x in (row["change"] for row in mine)]
            colours = ["#999999" if row["chooser"] == "random" else "#2b6cb0" for row in mine]
            axis.barh([row["chooser"] for row in mine], means, xerr=half, color=colours)
            axis.set_title(task or "all targets")
            axis.set_xlabel("NLL gained (nats per token)")
        figure.savefig(path, dpi=150)


def _ranked(summary: dict[str, Any]) -> list[dict[str, Any]]:
    order = list(dict.fromkeys((row["budget"], row["task"]) for row in summary["table"]))
    return sorted(
        summary["table"], key=lambda row: (order.index((row["budget"], row["task"])), row["change"]["mean"])
    )


def _interval(x: dict[str, Any]) -> str:
    if x["low"] is None:
        return f"{x['mean']:+.4f}"
    return f"{x['mean']:+.4f} ({x['low']:+.4f} to {x['high']:+.4f})"

"""The closing table on the terminal."""

from pathlib import Path
from typing import Any

from jz3.files import read_json
from jz3.report.numbers import mean_of_tasks, settings_of, shown


def print_results(run_dir: Path) -> None:
    """Print what a finished run found, from its results.json."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    results = read_json(run_dir / "results.json")
    # Names of sources and folders may hold brackets.
    console = Console(markup=False)
    table = Table(
        title=f"jz3 {results['recipe']}: {results['model']}", title_justify="left", show_header=False
    )
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, text in _lines(results):
        table.add_row(name, text)
    console.print(table)
    for label in results["labels"]:
        console.print(Text.assemble(("Note:", "yellow"), f" {label}"), soft_wrap=True)
    console.print(f"Read {run_dir / 'report.html'}; every number: {run_dir / 'results.json'}", soft_wrap=True)


def _lines(r: dict[str, Any]) -> list[tuple[str, str]]:
    selection, evaluation = r["selection"], r["evaluation"]
    lines = [
        ("corpus", f"{r['corpus']['texts']} texts, {r['corpus']['tokens']} tokens"),
        ("features", f"{r['features']['kind']}, {r['features']['bytes_per_document']} bytes a text"),
    ]
    fidelity = selection["fidelity"]
    if fidelity["queries"]:
        lines.append(
            (
                "fidelity",
                f"Spearman {fidelity['spearman']:.3f} per query, {fidelity['task_spearman']:.3f} for their mean, "
                f"against exact gradients of {fidelity['documents']} texts and {fidelity['queries']} unseen queries",
            )
        )
    mix = ", ".join(f"{s} {n}" for s, n in sorted(selection["mix"]["chosen"].items(), key=lambda x: -x[1]))
    lines.append(("selected", f"{selection['chosen']} by {selection['chooser']}: {mix}"))
    control = selection["negative_control"]
    if control:
        parts = []
        for task, overlap in control["overlap"].items():
            low, high = control["interval_given_sources"][task]
            parts.append(f"{task} {overlap:.0%} (chance given the sources {low:.0%} to {high:.0%})")
        lines.append(("control", f"overlap with an unrelated target's choice: {', '.join(parts)}"))
        lines.append(("", f"of the best within each source: {_within(control)}"))
    comparison = selection["comparison"]
    rows = [row for row in comparison["table"] if row["budget"] == comparison["tokens"]]
    for task in dict.fromkeys(row["task"] for row in rows):
        parts = [
            f"{row['chooser']} {shown(row['change']['mean'], '+.4f')}" for row in rows if row["task"] == task
        ]
        what = f"change of {task or 'the targets'}' NLL after {comparison['tokens']} tokens"
        lines.append(("worth", f"{what}: {', '.join(parts)}"))
    for stage, key in (("teacher", "distillation"), ("synthesis", "synthesis")):
        lines.append(
            (stage, f"asked {r[key]['asked']}, parsed {r[key]['parsed']}{_reasons(r[key]['rejected'])}")
        )
    for stage, part in (("filters", r["filtering"]), ("instruction", r["filtering"]["instruction"])):
        lines.append((stage, f"{part['in']} in, {part['kept']} kept{_reasons(part['rejected'])}"))
    training = r["training"]
    base = r.get("bases", {}).get("training", r["model"])  # older versions noted none
    other = "" if base == r["model"] else f"{base}, "
    lines.append(
        (
            "training",
            f"{other}{training['steps']} steps, loss {training['loss_first']:.3f} -> {training['loss_last']:.3f}",
        )
    )
    base, trained, gain = evaluation["base"], evaluation["trained"], evaluation["nll_difference"]
    lines.append(
        (
            "NLL",
            f"base {shown(base['nll']['mean'], '.3f')}, trained {shown(trained['nll']['mean'], '.3f')} "
            f"(lower by {shown(gain['mean'], '.3f')}, "
            f"95% interval {shown(gain['low'], '.3f')} to {shown(gain['high'], '.3f')})",
        )
    )
    for setting, name in settings_of(evaluation):
        b, t = _accuracy(base[setting]), _accuracy(trained[setting])
        lines.append((name, f"base {b}, trained {t} of {trained[setting]['n']}"))
        tasks = trained[setting]["tasks"]
        # The larger ones decide the share of all problems.
        if len({task["n"] for task in tasks.values()}) > 1:
            b, t = (shown(mean_of_tasks(model[setting]), ".1%") for model in (base, trained))
            each = ", ".join(
                f"{task} {shown(base[setting]['tasks'][task]['accuracy'], '.1%')} to {shown(x['accuracy'], '.1%')}"
                for task, x in tasks.items()
                if task in base[setting]["tasks"]
            )
            lines.append(("", f"mean of the tasks: base {b}, trained {t} ({each})"))
    seconds, peak = sum(r["seconds"].values()), max(r["peak_memory"].values())
    lines.append(("cost", f"{seconds / 60:.1f} minutes, {peak / 2**30:.1f} GiB at the peak"))
    return lines


def _accuracy(a: dict[str, Any]) -> str:
    return f"{shown(a['accuracy'], '.0%')} ({shown(a['low'], '.0%')}-{shown(a['high'], '.0%')})"


def _within(control: dict[str, Any]) -> str:
    if control["within_interval"] is None:
        return "not compared, there are more sources than chosen texts"
    shared = ", ".join(f"{task} {x:.0%}" for task, x in control["within_sources"].items())
    low, high = control["within_interval"]
    return f"{shared} (chance {low:.0%} to {high:.0%})"


def _reasons(rejected: dict[str, int]) -> str:
    if not rejected:
        return ""
    most = sorted(rejected.items(), key=lambda x: -x[1])
    return (
        ", rejected: "
        + ", ".join(f"{n} {reason}" for reason, n in most[:5])
        + (" ..." if len(most) > 5 else "")
    )

"""report.html: one self-contained page that says what was selected, written, rejected and gained."""

import base64
import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jz3.files import read_jsonl
from jz3.influence import read_scores
from jz3.records import Doc
from jz3.report.numbers import mean_of_tasks, settings_of, shown
from jz3.stage import StageContext

SHOWN_TEXTS = 5
SHOWN_REJECTS = 6
COLOURS = ("#2f6f8f", "#c8553d", "#6a994e", "#8d6a9f", "#b08968", "#777777")


def render(ctx: StageContext, results: dict[str, Any]) -> str:
    """Return the page's HTML; every text is escaped, plots are inline images, nothing is loaded."""
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(default=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = shown
    environment.filters["mean_of_tasks"] = mean_of_tasks
    environment.filters["percent"] = lambda x: shown(x, ".0%")
    scores = read_scores(ctx.path("influence", "scores.parquet").parent)
    best, worst = _texts(ctx, scores)
    return environment.get_template("page.html").render(
        r=results,
        settings=settings_of(results["evaluation"]),
        plots={
            "scores": _plot(lambda axes: _histogram(axes, scores)),
            "mix": _plot(lambda axes: _mix(axes, results["selection"]["mix"])),
            "loss": _plot(lambda axes: _losses(axes, ctx)),
        },
        best=best,
        worst=worst,
        problems=list(itertools.islice(read_jsonl(ctx.path("filtering", "kept.jsonl")), SHOWN_TEXTS)),
        rejects=_rejects(ctx),
        stages=results["seconds"],
    )


def _texts(ctx: StageContext, scores: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    columns = [c for c in scores if c.startswith("influence:") and c != "influence:control"]
    total = np.mean([scores[c] for c in columns], axis=0)
    order = np.argsort(-total, kind="stable")
    ends = {scores["id"][i] for i in (*order[:SHOWN_TEXTS], *order[::-1][:SHOWN_TEXTS])}
    texts = read_jsonl(ctx.path("corpus", "docs.jsonl"))
    docs = {row["id"]: Doc.from_json(row) for row in texts if row["id"] in ends}

    def rows(picked: Any) -> list[dict[str, Any]]:
        return [{"score": float(total[i]), "doc": docs[scores["id"][i]]} for i in picked]

    return rows(order[:SHOWN_TEXTS]), rows(order[::-1][:SHOWN_TEXTS])


def _rejects(ctx: StageContext) -> list[dict[str, Any]]:
    """Return one reject of every reason, the synthesis stage's and the filters'."""
    shown: dict[str, dict[str, Any]] = {}
    for stage in ("synthesis", "filtering"):
        for row in read_jsonl(ctx.path(stage, "rejects.jsonl")):
            shown.setdefault(f"{stage}: {row['reason']}", row)
    return [{"reason": reason, **row} for reason, row in list(shown.items())[:SHOWN_REJECTS]]


def _plot(draw: Callable[[Any], None]) -> str:
    """Draw on new axes and return the picture as a data URL."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    with rc_context({"text.parse_math": False}):  # names of sources and targets may hold dollar signs
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        # Without a date and with a fixed size the same run gives the same bytes.
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _histogram(axes: Any, scores: dict[str, Any]) -> None:
    for i, name in enumerate(c for c in scores if c.startswith("influence:")):
        colour = COLOURS[i % len(COLOURS)]
        axes.hist(scores[name], bins=40, histtype="step", color=colour, label=name.split(":", 1)[1])
    axes.set_xlabel("influence: mean cosine of gradients")
    axes.set_ylabel("texts")
    axes.legend(frameon=False)


def _mix(axes: Any, mix: dict[str, dict[str, int]]) -> None:
    sources = sorted({s for counts in mix.values() for s in counts})
    left = np.zeros(len(mix))
    palette = [COLOURS[i % len(COLOURS)] for i in range(len(sources))]
    for i, (source, colour) in enumerate(zip(sources, palette, strict=True)):
        share = np.array([counts.get(source, 0) / max(sum(counts.values()), 1) for counts in mix.values()])
        axes.barh(
            list(mix), share, left=left, color=colour, alpha=1.0 if i < len(COLOURS) else 0.5, label=source
        )
        left += share
    axes.invert_yaxis()
    axes.set_xlabel("share of the chosen texts")
    axes.legend(frameon=False, fontsize=7, bbox_to_anchor=(1.0, 1.0))


def _losses(axes: Any, ctx: StageContext) -> None:
    for colour, stage in zip(COLOURS, ("synthesiser", "training"), strict=False):
        rows = [row for row in ctx.rows(stage, "log.jsonl") if row.get("loss") is not None]
        axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], color=colour, label=stage)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.legend(frameon=False)

"""The `report` stage: results.json with every number, report.html for reading."""

from typing import Any

from jz3.files import write_json, write_text
from jz3.report.results import gather
from jz3.stage import StageContext


def run(ctx: StageContext) -> dict[str, Any]:
    """Write results.json and the self-contained report.html into the run's folder."""
    from jz3.report.page import render

    results = gather(ctx)
    write_json(ctx.run_dir / "results.json", results)
    write_text(ctx.run_dir / "report.html", render(ctx, results))
    return {"files": ["results.json", "report.html"]}

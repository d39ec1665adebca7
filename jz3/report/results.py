"""Every number of a run in one table."""

from typing import Any

from jz3.pipeline import STAGES
from jz3.stage import StageContext

STAND_IN = (
    "The teacher of this run is the offline stand-in (reasoning-gym problems with worked solutions), "
    "not GPT-4: the numbers show that the loop works, not how good the paper's data are."
)


def gather(ctx: StageContext) -> dict[str, Any]:
    """Collect the summaries of all finished stages.

    Returns:
        `recipe`, `model`, `labels`, `corpus`, `targets`, `features`, `selection` (source mix,
        fidelity, negative control, comparison), `index`, `distillation`, `synthesiser`, `synthesis`,
        `filtering`, `training`, `evaluation`, and per stage `seconds` and `peak_memory` (bytes).
    """
    manifests = {
        s.name: ctx.manifest(s.name) for s in STAGES if (ctx.run_dir / s.name / "manifest.json").exists()
    }
    summary = {name: m["summary"] for name, m in manifests.items()}
    influence = summary["influence"]
    labels = [STAND_IN] if ctx.recipe.distillation.teacher.kind == "offline" else []
    if not labels and (said := summary["distillation"]["stand_in"]):  # of recorded replies
        labels = [f"The recorded teacher of this run is a stand-in: {said}."]
    return {
        "recipe": ctx.recipe.name,
        "seed": ctx.recipe.seed,
        "model": ctx.recipe.model.name,
        "bases": {
            stage: getattr(ctx.recipe, stage).start(ctx.recipe.model).name
            for stage in ("synthesiser", "training")
        },
        "labels": labels,
        "corpus": summary["corpus"],
        "targets": summary["targets"],
        "features": summary["features"],
        "selection": {
            **summary["selection"],
            "fidelity": influence["fidelity"],
            "negative_control": influence["negative_control"],
            "comparison": summary["comparison"],
        },
        **{
            name: summary[name]
            for name in (
                "index",
                "distillation",
                "synthesiser",
                "synthesis",
                "filtering",
                "training",
                "evaluation",
            )
        },
        "seconds": {name: m["seconds"] for name, m in manifests.items()},
        "peak_memory": {name: m["peak_memory"] for name, m in manifests.items()},
        "machine": manifests["corpus"]["machine"],
        "jz3": manifests["corpus"]["jz3"],
    }

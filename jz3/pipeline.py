"""The order of the stages, written once: what is run, resumed, refused and recorded."""

import contextlib
import dataclasses
import functools
import logging
import os
import platform
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jz3
from jz3.config import Recipe, settled
from jz3.errors import Jz3Error
from jz3.files import canonical_json, hash_text, is_full, locked, read_json, write_json
from jz3.stage import Stage, StageContext, peak_memory, release_memory, reset_peak_memory
from jz3.training.config import HOW as HOW_TRAINED

log = logging.getLogger(__name__)

STAGES = (
    Stage(name="corpus", target="jz3.corpus:run", sections=("model", "corpus")),
    Stage(
        name="targets",
        target="jz3.targets:run",
        sections=("targets",),
        before="jz3.targets.stage:check_files",
    ),
    Stage(
        name="features",
        target="jz3.features.stage:run",
        needs=("corpus", "targets"),
        sections=("model", "features"),
        check="jz3.features.stage:lost_documents",
    ),
    Stage(
        name="influence",
        target="jz3.influence:run",
        needs=("features",),
        sections=("influence", "selection"),
    ),
    Stage(name="index", target="jz3.index.stage:run", needs=("features",), sections=("index",)),
    Stage(name="selection", target="jz3.selection:run", needs=("influence",), sections=("selection",)),
    Stage(
        name="comparison",
        target="jz3.comparison:run",
        needs=("selection",),
        sections=("model", "comparison"),
        extends=True,
    ),
    Stage(
        name="distillation",
        target="jz3.distillation:run",
        needs=("selection",),
        sections=("distillation",),
        before="jz3.distillation.stage:check_files",
    ),
    Stage(
        name="synthesiser",
        target="jz3.training:run_synthesiser",
        needs=("distillation",),
        sections=("model", "synthesiser"),
        before="jz3.training.stages:check_synthesiser",
    ),
    Stage(name="synthesis", target="jz3.synthesis:run", needs=("synthesiser",), sections=("synthesis",)),
    Stage(
        name="filtering",
        target="jz3.filtering:run",
        needs=("synthesis", "targets"),
        sections=("filtering", "evaluation.benchmarks"),
        before="jz3.filtering.decontaminate:check_files",
    ),
    Stage(
        name="training",
        target="jz3.training:run_training",
        needs=("filtering",),
        sections=("model", "training"),
        before="jz3.training.stages:check_training",
    ),
    Stage(
        name="evaluation",
        target="jz3.evaluation:run",
        needs=("training", "targets"),
        sections=("evaluation",),
    ),
    Stage(name="report", target="jz3.report:run", needs=("evaluation", "comparison", "index"), extends=True),
)
NAMES = tuple(stage.name for stage in STAGES)
HOW = re.compile(
    r"distillation\.teacher\.(api_key_env|max_calls|max_usd|usd_per_million_\w+|requests_per_minute|concurrency"
    r"|retries|backoff_seconds|timeout_seconds|max_failed_share|cache)"
    rf"|(synthesiser|training)\.({'|'.join(HOW_TRAINED)})"
    r"|(synthesis|evaluation)\.engine\.(batch_size|tensor_parallel|data_parallel|gpu_memory|cpu_cache_gb|base_url"
    r"|api_key_env|retries|timeout)"
    r"|(synthesis|filtering|evaluation)\.sandbox\.workers|filtering\.workers"
    r"|evaluation\.nll_batch_tokens"
)
"""Settings of how work is done and what it may cost. What comes out depends on them by rounding at most, so that
what a run has bought and made stays good when they change."""


def stages_up_to(name: str) -> list[Stage]:
    """Return the stages that `name` depends on, itself last, in order."""
    by_name = {s.name: s for s in STAGES}
    if name not in by_name:
        raise ValueError(f"unknown stage {name!r}; known: {', '.join(NAMES)}")
    wanted, open_names = set(), [name]
    while open_names:
        current = open_names.pop()
        wanted.add(current)
        open_names += by_name[current].needs
    return [s for s in STAGES if s.name in wanted]


def run_pipeline(
    recipe: Recipe, run_dir: Path, last: str = "report", say: Callable[[str], None] = log.info
) -> None:
    """Run the stages up to `last`, skipping those already finished with the same settings and still whole.

    Args:
        recipe: the settings.
        run_dir: the run's folder; created if it is not there.
        last: the last stage to run.
        say: told one line per stage.

    Raises:
        Jz3Error: the folder is another recipe's (the difference is shown), another process runs in
            it, a file for a later stage can't be read, or the disk is full.
    """
    recipe = settled(recipe)
    with _locked(run_dir):
        _claim(recipe, run_dir)
        stages = stages_up_to(last)
        for stage in stages:
            if not (run_dir / stage.name / "manifest.json").exists():
                stage.look_ahead(recipe)
        for stage in stages:
            ctx = StageContext(recipe=recipe, run_dir=run_dir, name=stage.name)
            if (ctx.out / "manifest.json").exists():
                _check_inputs(stage, ctx)
                lost = stage.lost(ctx.out)
                if not lost:
                    say(f"{stage.name}: done before, {read_json(ctx.out / 'manifest.json')['seconds']:.0f} s")
                    continue
                say(f"{stage.name}: {lost}; what is lost is made again")
            manifest = _run_stage(stage, ctx)
            say(
                f"{stage.name}: done in {manifest['seconds']:.0f} s, {manifest['peak_memory'] / 2**30:.1f} GiB"
            )


def stage_key(stage: Stage, recipe: Recipe) -> str:
    """Return the hash of all settings that a stage's result depends on, its predecessors' included."""
    sections = {name for s in stages_up_to(stage.name) for name in s.sections}
    return hash_text(canonical_json({"seed": recipe.seed, **_settings(recipe, sorted(sections))}))


def _settings(recipe: Recipe, sections: Sequence[str]) -> dict[str, Any]:
    """Return what a recipe says in each of the sections and single settings."""
    table = dataclasses.asdict(recipe)
    return {name: functools.reduce(lambda part, key: part[key], name.split("."), table) for name in sections}


def _run_stage(stage: Stage, ctx: StageContext) -> dict[str, Any]:
    ctx.out.mkdir(parents=True, exist_ok=True)
    release_memory()
    reset_peak_memory()
    start = time.monotonic()
    try:
        summary = stage.function()(ctx)
    except Exception as error:
        if is_full(error):
            raise Jz3Error(
                f"the disk of {ctx.out} is full; free some space and run again, it goes on from here"
            ) from error
        raise
    made = ctx.out / "manifest.json"
    manifest = {
        "stage": stage.name,
        # Of this making: what was only mended is still what its successors were made from.
        "id": (read_json(made) if made.exists() else {}).get("id") or secrets.token_hex(8),
        "key": stage_key(stage, ctx.recipe),
        "settings": _settings(ctx.recipe, stage.sections),
        "inputs": {name: ctx.manifest(name).get("id", "") for name in stage.needs},
        "summary": summary,
        "seconds": round(time.monotonic() - start, 3),
        "peak_memory": peak_memory(),
        "jz3": jz3.__version__,
        "machine": {
            "system": platform.platform(),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
        },
    }
    write_json(made, manifest)
    return manifest


def _check_inputs(stage: Stage, ctx: StageContext) -> None:
    """Refuse a result that was made from what other stages no longer hold.

    Raises:
        Jz3Error: a predecessor has been deleted and made again since.
    """
    inputs = ctx.manifest(stage.name).get("inputs", {})
    made = {name: ctx.manifest(name).get("id") for name in inputs}  # older versions noted none
    if others := [name for name, key in made.items() if key and inputs[name] != key]:
        later = [s.name for s in STAGES if stage.name in {x.name for x in stages_up_to(s.name)}]
        there = [str(ctx.run_dir / n) for n in later if (ctx.run_dir / n).exists()]
        raise Jz3Error(
            f"{ctx.out} was made from another {' and '.join(others)} than {ctx.run_dir} holds now; delete what "
            f"followed from it, to make it again: {' '.join(there)}"
        )


def _claim(recipe: Recipe, run_dir: Path) -> None:
    """Write the recipe into a new run folder, or compare it with the one that is there."""
    if (run_dir / "plan.json").exists():
        raise Jz3Error(f"{run_dir} is a run of `jz3 score` (it has a plan.json); use another folder")
    path = run_dir / "recipe.json"
    table = dataclasses.asdict(recipe)
    # Tuples become lists, as they come back from the file.
    wanted = _flatten(read_back(table))
    if not path.exists():
        if any(run_dir.glob("*/manifest.json")):
            raise Jz3Error(f"{run_dir} holds stages but no recipe.json; use another folder")
        write_json(path, table)
        return
    # What an older version didn't know was as it is by default.
    found = _flatten(read_back(dataclasses.asdict(Recipe(name=recipe.name)))) | _flatten(read_json(path))
    different = [
        f"{key}: {found.get(key)!r} -> {wanted.get(key)!r}"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]
    if not different:
        return
    # A stage that failed before it wrote anything, for a misspelt model perhaps, depends on nothing.
    done = [s for s in STAGES if any((run_dir / s.name).glob("*"))]
    # A setting's name and its section's, since a stage may depend on either.
    binding = [line for line in different if not HOW.fullmatch(line.split(":")[0])]
    changed = {".".join(line.split(":")[0].split(".")[:depth]) for line in binding for depth in (1, 2)}
    touched = [s for s in done if changed & _depends_on(stages_up_to(s.name))]
    fixed = {s.name: _depends_on([p for p in stages_up_to(s.name) if not p.extends]) for s in touched}
    refused = [s.name for s in touched if changed & fixed[s.name]]
    if refused:
        raise Jz3Error(
            f"{run_dir} was made with other settings ({'; '.join(binding[:5])}), which its {', '.join(refused)} "
            "depend on; use another folder or delete those"
        )
    for stage in touched:
        (run_dir / stage.name / "manifest.json").unlink(missing_ok=True)
    write_json(path, table)


def _depends_on(stages: list[Stage]) -> set[str]:
    return {"seed"} | {name for stage in stages for name in stage.sections}


def read_back(table: Any) -> Any:
    """Return a value as JSON would give it back."""
    import json

    return json.loads(json.dumps(table))


def _flatten(table: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(table, dict) and table:
        return {
            k: v
            for key, value in table.items()
            for k, v in _flatten(value, f"{prefix}.{key}".strip(".")).items()
        }
    return {prefix: table}


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Keep a second process out of the run's folder; the lock ends with the process, however it ends."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise Jz3Error(f"{run_dir} is no folder") from error
    with locked(run_dir / ".lock", wait=False) as alone:
        if not alone:
            raise Jz3Error(f"another process is running in {run_dir}")
        yield

"""The command `jz3 score`."""

import sys
import time
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from jz3.errors import Jz3Error
from jz3.scoring.config import ChooseSettings, RunSettings, ScoreSettings, split_targets
from jz3.scoring.estimate import PaperSettings

SETTINGS, CHOOSE, RUN, PAPER = ScoreSettings(), ChooseSettings(), RunSettings(), PaperSettings()


def score(
    corpus: Positional[tuple[str, ...]] = (),
    /,
    *,
    target: UseAppendAction[tuple[str, ...]] = (),
    control: Path | None = None,
    out: Path = Path("runs/score"),
    settings: Annotated[ScoreSettings, arg(name="")] = SETTINGS,
    choose: Annotated[ChooseSettings, arg(name="")] = CHOOSE,
    run: Annotated[RunSettings, arg(name="")] = RUN,
    paper: Annotated[PaperSettings, arg(name="")] = PAPER,
) -> None:
    """Rank the texts of a corpus by what they are worth for target tasks, in one streaming pass.

    Writes OUT/scores/*.parquet (a row per text, a column per task), OUT/selected.jsonl (the best texts),
    OUT/rejects.jsonl and OUT/manifest.json. Run the same command again to go on after a kill.
    `jz3 explore OUT` shows them; with --keep-features `jz3 index OUT` and `jz3 query OUT` search them.

    Args:
        corpus: files or globs of .jsonl (.gz, .zst) or .parquet.
        target: NAME=FILE, once per task: JSON lines of question and answer, problem and solution, prompt
            and completion, or text.
        control: an unrelated target's file; its choice should share with the tasks' what chance gives.
        out: the run's folder.
        settings: what the scores depend on.
        choose: what is chosen.
        run: who does the work.
        paper: for --dry-run without a corpus.
    """
    from jz3.scoring import estimate

    if settings.checkpoint and settings.model != SETTINGS.model:
        raise ValueError(f"--model {settings.model} and --checkpoint exclude each other")
    if run.dry_run and paper.documents:
        estimate.print_paper(paper, settings, max(len(target), 1))
        return
    targets = split_targets(target)
    if control is not None:
        targets["control"] = control
    if run.dry_run:
        estimate.print_measured(corpus, targets, settings, run)
        return
    score_corpus(corpus, targets, out, settings, choose, run)


def score_corpus(
    corpus: tuple[str, ...],
    targets: dict[str, Path],
    out: Path,
    settings: ScoreSettings,
    choose: ChooseSettings,
    run: RunSettings,
) -> None:
    """Plan, prepare, score all shards that are missing, choose; see `score`.

    Raises:
        Jz3Error: see the functions it calls; the message says what to do.
    """
    from jz3.files import locked, read_json
    from jz3.scoring import cluster, workers
    from jz3.scoring.job import load_job
    from jz3.scoring.merge import check_choice, merge, summary
    from jz3.scoring.plan import load_plan
    from jz3.scoring.request import Request

    # What would fail at the end is asked for at the beginning.
    part = run.part() if run.worker else None
    if part is None:
        check_choice(choose, settings)
    say = workers.print_error(sys.stderr)
    deadline = time.time() + run.limit_hours * 3600 if run.limit_hours else 0.0
    count = run.workers or workers.default_workers()
    request = Request(corpus, targets, settings, choose)
    with locked(out / ".lock", wait=False) as alone:
        # The workers of a scheduler share the folder; only one process may choose.
        if not alone and not run.worker:
            raise Jz3Error(f"another process is running in {out}")
        before = _chosen_at(out)
        if run.slurm:
            cluster.run_slurm(out, request, count, run.slurm_arguments, run.limit_hours, say)
            plan, job = load_plan(out), load_job(out)
        elif run.ray:
            cluster.run_ray(out, request, run.workers, run.ray, deadline, say)
            plan, job = load_plan(out), load_job(out)
        else:
            plan, job = request.prepare(out, workers.default_threads(count), say)
            todo = workers.missing_shards(out, plan)
            say(
                f"{plan.rows:,} rows in {len(plan.shards):,} shards of {len(plan.files):,} files, {len(todo):,} "
                "to do"
            )
            if part is not None:
                done = workers.work(out, part, deadline)
                say(f"worker {run.worker}: {'done' if done else 'stopped at the limit'}")
                return
            if todo:
                workers.run_local(out, plan, min(count, len(todo)), run.restarts, deadline, say)
        missing = workers.missing_shards(out, plan)
        if missing and deadline:
            say(
                f"stopped at the limit of {run.limit_hours} hours: {len(plan.shards) - len(missing)} of "
                f"{len(plan.shards)} shards are done; run the same command again to go on"
            )
            return
        # The last of Slurm's jobs has chosen already.
        chosen = run.slurm and _chosen_at(out) != before
        manifest = read_json(out / "manifest.json") if chosen else merge(out, plan, job, choose)
        summary(manifest, print)
        print(f"{out / 'selected.jsonl'}  {out / 'scores'}  {out / 'manifest.json'}")


def _chosen_at(out: Path) -> int:
    """Return when the run's choice was written, in nanoseconds; 0 if there is none."""
    path = out / "manifest.json"
    return path.stat().st_mtime_ns if path.is_file() else 0

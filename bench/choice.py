"""Memory and time of the choice of `jz3 score`: `python bench/choice.py --documents 5000000 --out DIR`.

Random scores (two targets and a control, four baselines) of as many short texts as are asked for are
written as a run's shards (about 130 bytes a document in all); then the choice runs over them once per
`--k`, each in a process of its own, whose peak resident memory is printed.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHARD = 2048
TASKS = ("one", "two", "control")


def write(out: Path, documents: int) -> None:
    """Write a run of random scores, unless it is there."""
    import numpy as np

    from jz3.files import hash_text, write_json
    from jz3.scoring.config import ScoreSettings
    from jz3.scoring.job import Checkpoint, Job
    from jz3.scoring.plan import open_plan
    from jz3.scoring.shard import _Rows, columns_of, scores_bytes, scores_path

    if (out / "job.json").is_file():
        return
    out.mkdir(parents=True, exist_ok=True)
    corpus, target = out.parent / f"{out.name}.jsonl", out.parent / "target.jsonl"
    target.write_text("{}\n")
    with open(corpus, "w") as handle:
        handle.writelines(f'{{"text": "text {i} {i * 7919 % 10**9}"}}\n' for i in range(documents))
    settings = ScoreSettings(dtype="float32", shard_documents=SHARD)
    plan = open_plan(out, [str(corpus)], settings, {"one": target}, 1)
    job = Job(plan.key, list(TASKS), [Checkpoint("-", "-", 1.0, "adapted", 64, "-", "-", {})])
    (out / "scores").mkdir()
    (out / "rejects").mkdir()
    for shard in plan.shards:
        generator = np.random.default_rng(shard.number)
        lines = range(shard.skip + 1, shard.skip + shard.rows + 1)
        numbers = {c: [generator.random(shard.rows, np.float32)] for c in columns_of(plan, job)}
        ids = [hash_text(str(line)) for line in lines]
        rows = _Rows(
            id=ids,
            source=["abcdefgh"[line % 8] for line in lines],
            line=list(lines),
            tokens=[100] * shard.rows,
            hash=[int(i, 16) for i in ids],
            numbers=numbers,
            records=shard.rows,
        )
        scores_path(out, shard.number).write_bytes(scores_bytes(plan, job, shard, rows))
        (out / "rejects" / f"{shard.number:06d}.jsonl").touch()
    write_json(
        out / "job.json",
        {
            "plan_key": job.plan_key,
            "tasks": job.tasks,
            "checkpoints": [{n: getattr(job.checkpoints[0], n) for n in Checkpoint.__dataclass_fields__}],
        },
    )


def choose(out: Path, k: int) -> dict[str, Any]:
    """Choose k texts and return what it took."""
    from jz3.scoring.config import ChooseSettings
    from jz3.scoring.job import load_job
    from jz3.scoring.merge import merge
    from jz3.scoring.plan import load_plan
    from jz3.stage import peak_memory, reset_peak_memory

    plan, job = load_plan(out), load_job(out)
    before, start = peak_memory(), time.perf_counter()
    reset_peak_memory()
    manifest = merge(out, plan, job, ChooseSettings(k=k))
    return {
        "documents": plan.rows,
        "k": manifest["selection"]["chosen"],
        "seconds": time.perf_counter() - start,
        "memory": peak_memory(),
        "before": before,
    }


def main() -> None:
    """Write the run, then choose in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--k", type=int, nargs="+", default=[10_000])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--step", choices=("choose",), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    out = arguments.out / str(arguments.documents)
    if arguments.step:
        print(json.dumps(choose(out, arguments.k[0])))
        return
    write(out, arguments.documents)
    for k in arguments.k:
        command = [sys.executable, __file__, "--step=choose", f"--out={arguments.out}", f"--k={k}"]
        command += [f"--documents={arguments.documents}"]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        print(
            f"{found['documents']:,} documents, {found['k']:,} chosen: {found['memory'] / 2**20:,.0f} MiB at the peak, "
            f"{found['before'] / 2**20:,.0f} before, {found['seconds']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()

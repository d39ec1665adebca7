"""A set of texts that is worth most together, chosen among a run's best single texts."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jz3.features.extract import coding_of
from jz3.scoring.collection import ScoredCollection
from jz3.scoring.config import ScoreSettings
from jz3.scoring.job import Job
from jz3.selection import Choice, Place
from jz3.selection.two_stage import CHOOSERS, gather


def choose_among(
    out: Path,
    settings: ScoreSettings,
    job: Job,
    candidates: list[Choice],
    chooser: str,
    k: int,
    source: Callable[[Place], str],
    limit: int | None,
) -> tuple[list[Choice], dict[Place, str]]:
    """Reorder candidates as a chooser of sets takes them, and keep the first k.

    The target is the mean over the tasks of their queries' mean; several checkpoints' features stand beside one
    another, each multiplied by the root of its weight, so that inner products are the weighted scores.

    Memory: candidates x K float32 per checkpoint.

    Args:
        out: the run's folder, scored with its features kept.
        settings: the run's.
        job: what `prepare` made.
        candidates: the best single texts, without repeats; places begin with the text's hash.
        chooser: one of jz3.scoring.config.SET_CHOOSERS.
        k: texts to choose.
        source: the source of a place.
        limit: texts of one source at most; None: no limit.

    Returns:
        The choices, and the places that the limit kept out.

    Raises:
        Jz3Error: the features were not kept, are damaged or of another run.
    """
    from safetensors.torch import load_file

    collection = ScoredCollection(out)
    columns = [column for column, task in enumerate(job.tasks) if task != "control"]
    ids = [int(np.int64(c.place[0]).view(np.uint64)) for c in candidates]
    features, targets = [], []
    for number, checkpoint in enumerate(job.checkpoints):
        coding = coding_of(collection.projection(number), settings.bits)
        tasks = load_file(out / "fit" / str(number) / "tasks.safetensors")["readout"].numpy()
        root = np.float32(checkpoint.weight**0.5)
        features.append(gather(collection.store(number), coding, ids) * root)
        targets.append(tasks[:, columns].mean(1) * root)
    taken: Counter[str] = Counter()
    chosen: list[Choice] = []
    refused: dict[Place, str] = {}
    for row in CHOOSERS[chooser](np.concatenate(features, 1), np.concatenate(targets)[None]):
        choice = candidates[row]
        if limit is not None and taken[source(choice.place)] >= limit:
            refused[choice.place] = "source_quota"
            continue
        chosen.append(choice)
        taken[source(choice.place)] += 1
        if len(chosen) == k:
            break
    return chosen, refused

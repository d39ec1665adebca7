"""`jz3 score --chooser`: a set among the best single texts, from the features that were kept."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scoring_runs as runs
from safetensors.numpy import load_file

from jz3.errors import Jz3Error
from jz3.features.extract import coding_of
from jz3.scoring.collection import ScoredCollection
from jz3.scoring.config import SET_CHOOSERS, ChooseSettings, ScoreSettings
from jz3.scoring.job import load_job
from jz3.scoring.merge import check_choice, merge
from jz3.scoring.plan import load_plan
from jz3.selection.two_stage import CHOOSERS, gather


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A run with two checkpoints, of other models and weights."""
    folder = tmp_path_factory.mktemp("sets")
    options: dict[str, Any] = {"keep_features": True, "bits": 16, "exact_documents": 0}
    checkpoints = (f"{tiny_model}=3", f"{runs.other_model(tiny_model, folder / 'other')}=1")
    corpus, targets = runs.make_corpus(folder), runs.make_targets(folder)
    runs.run(folder / "out", corpus, targets, checkpoint=checkpoints, **options)
    return folder / "out"


def choose(out: Path, **settings: Any) -> dict[str, Any]:
    return merge(out, load_plan(out), load_job(out), ChooseSettings(**settings))


@pytest.mark.parametrize("chooser", SET_CHOOSERS)
def test_a_set_is_chosen_among_the_candidates(finished: Path, chooser: str) -> None:
    manifest = choose(finished, k=8, chooser=chooser, candidates=30)
    chosen = runs.rows_of(finished / "selected.jsonl")
    table = runs.scores(finished)
    mean = (table["influence:sums"].to_numpy().astype(float) + table["influence:apples"].to_numpy()) / 2
    best = np.argsort(-mean)[:30]

    collection = ScoredCollection(finished)
    hashes = table["hash"].to_numpy()[best].tolist()
    features, target = [], []
    for number, weight in enumerate((0.75, 0.25)):
        coding = coding_of(collection.projection(number), 16)
        features.append(weight**0.5 * gather(collection.store(number), coding, hashes))
        readout = load_file(finished / "fit" / str(number) / "tasks.safetensors")["readout"]
        target.append(weight**0.5 * readout[:, :2].mean(1))
    both, wanted = np.concatenate(features, 1), np.concatenate(target)
    # What the set is chosen by are the run's own scores.
    np.testing.assert_allclose(both @ wanted, mean[best], atol=1e-3)
    order = best[list(islice(CHOOSERS[chooser](both, wanted[None]), 8))]
    assert [row["id"] for row in chosen] == [f"doc-{i}" for i in order]
    assert [row["score"] for row in chosen] == pytest.approx(mean[order].tolist())
    assert chosen[3]["why"] == f"number 4 of the set by {chooser}"
    selection = manifest["selection"]
    assert (selection["chooser"], selection["candidates"], selection["chosen"]) == (chooser, 30, 8)
    assert f"8 texts by {chooser} among the 30" in selection["rule"]
    assert selection["lowest_score"] == pytest.approx(mean[order].min())


def test_sources_are_limited(finished: Path) -> None:
    manifest = choose(finished, k=10, chooser="matching", candidates=40, source_quota=0.5)
    assert manifest["methods"]["selected"]["mix"] == {"a": 5, "b": 5}


def test_what_a_set_needs(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="--chooser must be one of influence, matching"):
        ChooseSettings(chooser="bm25")
    with pytest.raises(ValueError, match="wants --combine mean, got 'quota'"):
        ChooseSettings(chooser="matching", combine="quota")
    with pytest.raises(ValueError, match=r"--candidates must be at least 1 and --k \(50\), got 20"):
        ChooseSettings(k=50, candidates=20, chooser="matching")
    assert ChooseSettings(k=50_000).count(10**6) == 50_000
    wanted = ChooseSettings(chooser="matching", share=0.9, candidates=20)
    with pytest.raises(Jz3Error, match="add --keep-features"):
        check_choice(wanted, ScoreSettings(model=str(tiny_model)))
    runs.run(tmp_path / "out", runs.make_corpus(tmp_path), runs.make_targets(tmp_path))
    with pytest.raises(
        Jz3Error, match="matching chooses 54 texts among 20 candidates; raise --candidates to 54"
    ):
        choose(tmp_path / "out", share=0.9, chooser="matching", candidates=20)
    with pytest.raises(Jz3Error, match="scored without --keep-features"):
        choose(tmp_path / "out", k=8, chooser="matching")

"""Errors of users are told in one line; recipes are checked to the last key; dry runs cost nothing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jz3.cli import main
from jz3.config import load_recipe, shipped_recipe
from jz3.corpus.config import SourceConfig
from jz3.estimate import StageEstimate, estimate
from jz3.evaluation import BenchmarkConfig
from jz3.pipeline import NAMES
from jz3.scoring.estimate import ACTIVATIONS_7B

RECIPES = sorted(p.stem for p in (Path(__file__).parents[1] / "jz3" / "recipes").glob("*.toml"))


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    status = main([str(a) for a in arguments])
    error = capsys.readouterr().err
    assert status == 2 and "Traceback" not in error
    [line] = [text for text in error.splitlines() if text.startswith("jz3: error: ")]
    return line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name = 'x'\n[features]\nkk = 3", "did you mean 'k'"),
        ("name = 'x'\n[feature]\nk = 3", "did you mean 'features'"),
        ("name = 'x'\n[features]\nk = 'many'", "features: k: must be int, got 'many'"),
        ("name = 'x'\n[features]\nk = true", "features: k: must be int, got True"),
        ("name = 'x'\n[corpus]\nsources = [{name = 'a', kind = 'web'}]", "kind must be one of"),
        (
            "name = 'x'\n[model]\ndtype = 'bf16'",
            "dtype must be one of auto, bfloat16, float32, float64, got 'bf16'",
        ),
        (
            "name = 'x'\n[features.less]\nrank = 0",
            "features.less: rank, alpha and learning_rate must be positive",
        ),
        (
            "name = 'x'\n[influence]\nbaselines = ['bm52']",
            "unknown 'bm52'; known: hidden, bm25, loss, random",
        ),
        ("name = 'x'\n[index]\nprobes = 0", "index.probes must be at least 1, got 0"),
        ("name = 'x'\n[index]\nmemory = inf", "index.memory must be a number of GiB above 0, got inf"),
        ("name = 'x'\n[comparison]\nmethods = ['matchin']", "comparison: methods must be of influence,"),
        ("name = 'x'\n[comparison]\nproblems = -1", "problems must not be negative, got -1"),
        ("name = 'x'\n[synthesiser]\nlora_alpha = -1", "lora_alpha must be positive, got -1.0"),
        ("name = 'x'\n[training]\nlearning_rate = inf", "learning_rate must be positive, got inf"),
        ("name = 'x'\n[training]\nweight_decay = nan", "weight_decay must not be negative, got nan"),
        ("name = 'x'\n[synthesis]\ntemperature = nan", "temperature must not be negative, got nan"),
        ("name = 'x'\n[synthesis.engine]\nretries = -1", "retries must not be negative, got -1"),
        ("name = 'x'\n[synthesis.engine]\ntimeout = 0", "timeout must be positive, got 0.0"),
        (
            "name = 'x'\n[filtering]\nmax_problem_chars = 9",
            "min_problem_chars must lie in 0..max_problem_chars, got 15",
        ),
        ("name = 'x'\n[evaluation]\nlimit = -1", "evaluation limit must not be negative, got -1"),
        (
            "name = 'x'\n[evaluation]\nbenchmarks = [{name = 'b', path = 'p', limit = -1}]",
            "limit must not be negative",
        ),
        ("name = 'x'\n[estimate]\npeak_tflops = 0", "estimate.peak_tflops must be positive, got 0.0"),
        ("name = 'x'\n[estimate]\nkept_share = nan", "estimate.kept_share must lie in 0..1, got nan"),
        ("name = ''", "name must not be empty"),
        ("name = \n", "not valid TOML"),
        (
            "name = 'x'\n[influence]\nbaselines = ['random']\n[selection]\nchooser = 'bm25'",
            "selection.chooser 'bm25' needs 'bm25' among influence.baselines, which are random",
        ),
        (
            "name = 'x'\n[influence]\nbaselines = []\n[comparison]\ntokens = 9\nmethods = ['mix']",
            "comparison.methods 'mix' needs 'hidden' among influence.baselines, which are none",
        ),
        (
            "name = 'x'\n[targets.control]\ncount = 0\n[comparison]\ntokens = 9\nmethods = ['control']",
            "comparison.methods 'control' needs a negative control; targets.control.count is 0",
        ),
        ("seed = 3", "the key 'name' is missing"),
        (
            "name = 'x'\n[corpus]\nsources = [{kind = 'worked'}]",
            "corpus: sources[0]: the key 'name' is missing",
        ),
    ],
)
def test_wrong_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, expected: str) -> None:
    recipe = tmp_path / "wrong.toml"
    recipe.write_text(text)
    line = complaint(capsys, "run", recipe, "--out", tmp_path / "run")
    assert expected in line and "wrong.toml" in line
    assert not (tmp_path / "run").exists()


def test_recipe_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "marked.toml"
    path.write_text("name = 'x'\r\n", encoding="utf-8-sig")
    assert load_recipe(path).name == "x"


def test_missing_things_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "no.toml does not exist" in complaint(capsys, "run", tmp_path / "no.toml")
    assert "no recipe 'paper'" in complaint(capsys, "run", "paper")
    assert "is no run" in complaint(capsys, "report", tmp_path)
    assert "unknown stage 'fly'" in complaint(
        capsys, "run", "tiny", "--until", "fly", "--out", tmp_path / "r"
    )
    assert "tiny" in complaint(capsys, "quickstart", "--preset", "huge")


def test_unknown_model_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    line = complaint(
        capsys, "quickstart", "--preset", "tiny", "--model", tmp_path / "empty", "--out", tmp_path / "run"
    )
    assert "holds no config.json" in line


def test_folder_that_is_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is no folder" in complaint(capsys, "quickstart", "--preset", "tiny", "--out", tmp_path / "file")


def test_file_errors_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    line = complaint(capsys, "score", tmp_path / "a.jsonl", "--target", "t=x", "--out", out)
    assert line.endswith(f"{out}: Not a directory")


def test_a_folder_holds_one_kind_of_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Else `jz3 index` and `jz3 query` would look at the other one's files."""
    corpus = tmp_path / "a.jsonl"
    corpus.write_text("{}\n")
    for name, file in (("loop", "recipe.json"), ("scored", "plan.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    line = complaint(capsys, "score", corpus, "--target", f"t={corpus}", "--out", tmp_path / "loop")
    assert line.endswith(
        f"{tmp_path / 'loop'} is a run of the loop (it has a recipe.json); use another folder"
    )
    line = complaint(capsys, "quickstart", "--preset", "tiny", "--out", tmp_path / "scored")
    assert line.endswith(
        f"{tmp_path / 'scored'} is a run of `jz3 score` (it has a plan.json); use another folder"
    )
    assert not (tmp_path / "scored" / "recipe.json").exists()


def test_checkpoints_are_of_scored_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{}")
    line = complaint(capsys, "index", tmp_path, "--checkpoint", "2")
    assert f"--checkpoint 2: {tmp_path} is a run of the loop, which has one model" in line


def test_a_folder_with_a_recipes_name_hides_no_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `jz3 run tiny --out tiny` leaves one."""
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["run", "tiny", "--out", "tiny", "--dry-run"]) == 0
    assert "evaluation" in capsys.readouterr().out


@pytest.mark.parametrize("name", RECIPES)
def test_dry_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", name, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert all(stage in text for stage in NAMES)
    assert not list(tmp_path.iterdir())


def test_estimate_names_every_stage_and_counts_the_papers_calls() -> None:
    rows = estimate(shipped_recipe("paper-7b"))
    assert [row.stage for row in rows] == list(NAMES)
    by_stage = {row.stage: row for row in rows}
    assert by_stage["distillation"].calls == 9300
    assert by_stage["training"].tokens == pytest.approx(4.6e9, rel=0.15)
    assert by_stage["features"].gpu_hours > 1


def test_estimate_counts_the_texts_of_every_source() -> None:
    """Those of worked sources by their problems; of a source without a limit it says that it doesn't know."""
    recipe = shipped_recipe("quickstart")
    assert estimate(recipe)[0].items == "504 texts"
    lines = SourceConfig(name="mine", kind="jsonl", paths=("a.jsonl",))
    more = replace(recipe, corpus=replace(recipe.corpus, sources=(*recipe.corpus.sources, lines)))
    assert estimate(more)[0].items == "504 texts, without mine (no limit: estimate.corpus_texts)"
    told = replace(more, estimate=replace(recipe.estimate, corpus_texts=9))
    assert estimate(told)[0].items == "9 texts"


def test_the_papers_recipe_uses_all_gpus() -> None:
    """A training's 16 bytes a parameter are 116 GB, more than an H100 holds; synthesis takes 136 GPU hours."""
    recipe = shipped_recipe("paper-7b")
    for settings in (recipe.synthesiser, recipe.training):
        assert settings.method == "full"
        assert {"--num_processes=8", "--use_fsdp"} <= set(settings.launch) and settings.batch_packs % 8 == 0
    # Copies: a model on eight GPUs writes little more than on two, as each layer waits for all of them.
    assert recipe.synthesis.engine.data_parallel == recipe.evaluation.engine.data_parallel == 8
    # Every copy has enough to write that the longest reply of a shard keeps none waiting for long.
    assert recipe.synthesis.shard_size / 8 >= 8 * 256


def test_the_papers_features_fit_on_a_gpu() -> None:
    """Beside the weights of 7.2e9 parameters, with a share left for the fit and what a batch of logits takes."""
    assert shipped_recipe("paper-7b").features.batch_tokens * ACTIVATIONS_7B + 2 * 7.2e9 < 0.8 * 80e9


def test_the_papers_synthesiser_reads_about_32_rows_a_step() -> None:
    recipe = shipped_recipe("paper-7b")
    row = recipe.estimate.prompt_tokens + recipe.estimate.reply_tokens
    assert 24 <= recipe.synthesiser.batch_packs * recipe.synthesiser.max_length / row <= 40


def test_estimate_counts_every_pass() -> None:
    recipe = shipped_recipe("paper-7b")

    def stages(**sections: Any) -> dict[str, StageEstimate]:
        return {row.stage: row for row in estimate(replace(recipe, **sections))}

    once = stages()["features"]
    less = replace(recipe.features, kind="less", k=8192, bits=8)
    found = stages(features=less)["features"]
    assert found.gpu_hours == pytest.approx(once.gpu_hours * (4 + 4 * 0.05)), (
        "4 checkpoints, and their warm-up"
    )
    assert found.bytes == 4_000_000 * 4 * 8192 and "32768 numbers" in found.items
    adopted = replace(less, less=replace(less.less, checkpoints=("a", "b")))
    assert stages(features=adopted)["features"].gpu_hours == pytest.approx(once.gpu_hours * 2)
    readout = stages(features=replace(recipe.features, kind="readout"))["features"]
    assert readout.gpu_hours == pytest.approx(once.gpu_hours / 2)

    assert "without" not in stages()["training"].items
    unknown = stages(estimate=replace(recipe.estimate, instruction_tokens=0.0))["training"]
    assert "without instruction (all rows: estimate.instruction_tokens)" in unknown.items

    compared = replace(recipe.comparison, tokens=1000, more_tokens=(500,), seeds=2)
    twice = replace(compared, train=replace(compared.train, epochs=2))
    for comparison, epochs in ((compared, 1), (twice, 2)):
        assert stages(comparison=comparison)["comparison"].tokens == 1500 * 2 * 3 * epochs


def test_estimate_counts_what_is_written_and_solved(tmp_path: Path) -> None:
    recipe = shipped_recipe("tiny")
    held_out = [task.eval for task in recipe.targets.tasks]
    path = tmp_path / "b.jsonl"
    path.write_text("{}\n\n{}\n{}\n{}\n{}\n")

    def stages(**settings: Any) -> dict[str, StageEstimate]:
        evaluation = replace(recipe.evaluation, **settings)
        synthesis = replace(recipe.synthesis, samples=3)
        rows = estimate(replace(recipe, evaluation=evaluation, synthesis=synthesis))
        return {row.stage: row for row in rows}

    benchmarks = (
        BenchmarkConfig(name="all", path=str(path)),
        BenchmarkConfig(name="some", path=str(path), limit=4),
        BenchmarkConfig(name="told", path=str(tmp_path / "none.jsonl"), limit=6),
        BenchmarkConfig(name="absent", path=str(tmp_path / "none.jsonl")),
    )
    reply = recipe.estimate.reply_tokens
    found = stages(benchmarks=benchmarks)
    scored = sum(held_out) + 5 + 4 + 6
    assert found["evaluation"].tokens == scored * (4 + 2) * reply, "solved in two settings, and scored"
    said = f"2 setting(s), {scored} references x 2, without absent (no such file)"
    assert found["evaluation"].items.endswith(said)
    assert f"{recipe.synthesis.count * 3:,} problems" in found["synthesis"].items
    found = stages(benchmarks=benchmarks, limit=2, settings=("nl",))
    solved = sum(min(n, 2) for n in held_out) + 3 * 2
    assert found["evaluation"].tokens == (solved + scored) * 2 * reply


def test_dry_run_ends_at_the_last_stage_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "paper-7b", "--until", "distillation", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = {line.split("│")[1].strip() for line in lines if line.startswith("│")}
    assert {"distillation", "total"} <= shown and not shown & {"comparison", "synthesis", "training"}
    assert "unknown stage 'fly'" in complaint(capsys, "run", "tiny", "--until", "fly", "--dry-run")


def test_recipe_survives_its_own_file(tmp_path: Path) -> None:
    import dataclasses

    from jz3.config import Recipe
    from jz3.files import read_json, write_json
    from jz3.tables import from_table

    recipe = load_recipe(Path(__file__).parents[1] / "jz3" / "recipes" / "quickstart.toml")
    write_json(tmp_path / "recipe.json", dataclasses.asdict(recipe))
    assert from_table(Recipe, read_json(tmp_path / "recipe.json"), "file") == recipe

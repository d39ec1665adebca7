"""The whole loop on the tiny preset: what it leaves, what it refuses, what a kill can't change."""

import dataclasses
import errno
import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import SafetensorError, safe_open

from jz3 import records
from jz3.config import settled, shipped_recipe
from jz3.distillation import TeacherConfig
from jz3.errors import Jz3Error
from jz3.evaluation import BenchmarkConfig
from jz3.evaluation.intervals import accuracy, mean
from jz3.files import hash_file, read_json, read_jsonl, write_json, write_tensors
from jz3.influence import read_scores
from jz3.pipeline import NAMES, STAGES, run_pipeline, stage_key, stages_up_to
from jz3.report.page import render
from jz3.report.terminal import print_results
from jz3.stage import Stage, StageContext
from jz3.targets import ControlConfig, InstructionConfig, TaskConfig

VOLATILE = {"manifest.json", "results.json", "report.html", ".lock", "engine.json"}
"""Hold seconds, memory or versions; everything else must be the same bytes."""


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "jz3", *map(str, arguments)]


def finished_files(run: Path) -> dict[str, str]:
    files = (p for p in run.rglob("*") if p.is_file() and p.name not in VOLATILE)
    return {str(p.relative_to(run)): hash_file(p) for p in files if p.suffix != ".sqlite"}


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    run = tmp_path_factory.mktemp("tiny") / "run"
    done = subprocess.run(
        command("quickstart", "--preset", "tiny", "--out", run), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return run


def test_every_number_is_there(tiny_run: Path) -> None:
    results = read_json(tiny_run / "results.json")
    selection = results["selection"]
    assert set(selection["mix"]) == {"corpus", "chosen", "influence", "hidden", "bm25", "loss", "random"}
    assert all(sum(counts.values()) == 12 for name, counts in selection["mix"].items() if name != "corpus")
    assert selection["fidelity"]["documents"] >= 20 and 0 < selection["fidelity"]["spearman"] <= 1
    assert set(selection["negative_control"]["overlap"]) == {"word_problems", "number_algebra"}
    assert [row["chooser"] for row in selection["comparison"]["table"]] == ["influence", "matching", "random"]
    assert results["distillation"]["asked"] == 14
    synthesis = results["synthesis"]
    assert synthesis["asked"] == 6 == synthesis["parsed"] + sum(synthesis["rejected"].values())
    assert (
        results["filtering"]["kept"] + sum(results["filtering"]["rejected"].values())
        == results["filtering"]["in"]
    )
    for model in ("base", "trained"):
        assert results["evaluation"][model]["nl"]["n"] == results["evaluation"][model]["tool"]["n"] == 6
    assert results["evaluation"]["nll_difference"]["mean"] > 0
    assert set(results["seconds"]) == set(results["peak_memory"]) == set(NAMES) - {"report"}
    assert "stand-in" in results["labels"][0]


def test_the_files_of_a_run_are_those_that_the_docs_name(tiny_run: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "runs.md").read_text(encoding="utf-8")
    loop = text[: text.index("## `jz3 score`")]
    named = re.findall(r"`([\w.*/-]+)`", "".join(re.findall(r"^\| (.*?) \|", loop, re.MULTILINE)))
    assert len(named) > 25 and not [name for name in named if not any(tiny_run.glob(name))]
    written = {str(p.relative_to(tiny_run)) for p in tiny_run.glob("*/*.jsonl")}
    assert written - set(named) == {
        f"{p.parent.name}/rejects.jsonl" for p in tiny_run.glob("*/rejects.jsonl")
    }
    for name, kind in re.findall(r"^\| `([\w/]+\.jsonl)` \| `(\w+)`:", loop, re.MULTILINE):
        for row in read_jsonl(tiny_run / name):
            getattr(records, kind).from_json(row)


def test_comparison_trains_on_equally_many_tokens(tiny_run: Path) -> None:
    rows = read_json(tiny_run / "results.json")["selection"]["comparison"]["table"]
    assert rows[0]["trained_tokens"] == pytest.approx(rows[1]["trained_tokens"], rel=0.35)


def test_report_is_self_contained_and_escaped(tiny_run: Path) -> None:
    page = (tiny_run / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script" not in page
    assert page.count("data:image/png;base64,") == 3
    assert "not GPT-4" in page and f"<code>{shipped_recipe('tiny').selection.chooser}</code>" in page
    tasks = read_json(tiny_run / "results.json")["selection"]["fidelity"]["tasks"]
    assert all(f"{f['task_spearman']:.3f} for the mean of {task}'s" in page for task, f in tasks.items())


def test_each_task_has_its_accuracy_in_the_report(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of all problems together a benchmark of three thousand decides; the paper's average is that of the tasks."""
    results = read_json(tiny_run / "results.json")
    for model, shares in (("base", (0.25, 0.75)), ("trained", (0.5, 1.0))):
        part = results["evaluation"][model]["nl"]
        part["tasks"] = {
            name: accuracy([i < share * n for i in range(n)])
            for name, share, n in zip(("mmlu", "math"), shares, (300, 20), strict=True)
        }
    assert results["evaluation"]["accuracy_difference"]["nl"]["n"] == 6
    ctx = StageContext(recipe=shipped_recipe("tiny"), run_dir=tiny_run, name="report")
    page = " ".join(render(ctx, results).split())
    assert '<td class="quiet">mmlu</td> <td class="n">25.0% (20%–30%) of 300</td>' in page
    assert '<td class="quiet">mean of the tasks</td> <td class="n">50.0%</td><td class="n">75.0%</td>' in page
    assert "trained minus base, paired" in page
    write_json(tmp_path / "results.json", results)
    print_results(tmp_path)
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert (
        "mean of the tasks: base 50.0%, trained 75.0% (math 75.0% to 100.0%, mmlu 25.0% to 50.0%)" in printed
    )


def test_report_of_an_evaluation_without_some_numbers(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One setting, no reference solutions, one problem of the comparison: `-` stands for what is missing."""
    results = read_json(tiny_run / "results.json")
    evaluation, comparison = results["evaluation"], results["selection"]["comparison"]
    for model in ("base", "trained"):
        del evaluation[model]["tool"]
        evaluation[model]["nl"] |= {"accuracy": None, "low": None, "high": None, "n": 0}
        evaluation[model]["nll"] = mean([])
    evaluation["nll_difference"] |= mean([])
    for row, values in zip(comparison["table"], ([], [-0.25], [0.5]), strict=True):
        row["change"] = mean(values)
    ctx = StageContext(recipe=shipped_recipe("tiny"), run_dir=tiny_run, name="report")
    page = render(ctx, results)
    assert "accuracy, natural language" in page and "accuracy, with Python" not in page
    assert "- (-–-) of 0" in page and "paired: - nats\n(- to -)" in page
    assert "- (- to -)" in page and "-0.2500 (- to -)" in page
    results["selection"]["mix"]["chosen"] = {"maths[/v2]": 3}
    assert results["bases"] == {"synthesiser": "tiny", "training": "tiny"}
    results["bases"]["training"] = "other/model"
    folder = tmp_path / "run[new]"
    write_json(folder / "results.json", results)
    print_results(folder)
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "natural language" in printed and "with Python" not in printed
    assert f"training other/model, {results['training']['steps']} steps" in printed
    assert "base -, trained - (lower by -," in printed and "influence -, matching -0.2500" in printed
    assert "maths[/v2] 3" in printed and "run[new]" in printed


def test_selected_texts_explain_themselves(tiny_run: Path) -> None:
    docs = {row["id"]: row for row in read_jsonl(tiny_run / "corpus" / "docs.jsonl")}
    chosen = list(read_jsonl(tiny_run / "selection" / "selected.jsonl"))
    why = list(read_jsonl(tiny_run / "selection" / "why.jsonl"))
    assert [row["id"] for row in chosen] == [row["id"] for row in why]
    assert all(docs[row["id"]] == row for row in chosen)
    assert [(row["rank"], row["chooser"]) for row in why] == [(i, "matching") for i in range(12)]
    table = read_scores(tiny_run / "influence")
    place = {name: row for row, name in enumerate(table["id"])}
    for row in why:
        assert row["scores"] == {t: float(table[f"influence:{t}"][place[row["id"]]]) for t in row["scores"]}
    total = sum(table[f"influence:{task}"] for task in why[0]["scores"])
    best = [table["id"][row] for row in np.argsort(-total)]
    # A set begins with the best single text, but for what decoded features lack of unit norm.
    assert chosen[0]["id"] in best[:3] and {row["id"] for row in chosen} != set(best[:12])


def test_running_again_does_nothing(tiny_run: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in tiny_run.rglob("*") if p.is_file() and p.name != ".lock"}
    done = subprocess.run(
        command("quickstart", "--preset", "tiny", "--out", tiny_run),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.count("done before") == len(STAGES)
    assert before == {
        p: p.stat().st_mtime_ns for p in tiny_run.rglob("*") if p.is_file() and p.name != ".lock"
    }


def test_other_settings_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    shipped = Path(__file__).parents[1] / "jz3" / "recipes" / "tiny.toml"
    recipe = tmp_path / "other.toml"
    recipe.write_text(shipped.read_text().replace("k = 256", "k = 128"))
    done = subprocess.run(command("run", recipe, "--out", tiny_run), capture_output=True, text=True)
    assert done.returncode == 2
    assert "features.k: 256 -> 128" in done.stderr and "Traceback" not in done.stderr


def test_a_stage_that_wrote_nothing_binds_no_settings(tmp_path: Path) -> None:
    """A misspelt model costs no new folder."""
    recipe = shipped_recipe("tiny")
    wrong = dataclasses.replace(
        recipe, model=dataclasses.replace(recipe.model, name=str(tmp_path / "missing"))
    )
    with pytest.raises(Jz3Error, match="missing"):
        run_pipeline(wrong, tmp_path / "run", "corpus")
    run_pipeline(recipe, tmp_path / "run", "corpus")
    assert (tmp_path / "run" / "corpus" / "manifest.json").is_file()


def test_results_of_what_is_no_longer_there_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    recipe = shipped_recipe("tiny")
    shutil.rmtree(run / "corpus")
    with pytest.raises(
        Jz3Error, match="features was made from another corpus .* to make it again: .*selection"
    ):
        run_pipeline(recipe, run, "influence")
    for name in NAMES[NAMES.index("corpus") + 1 :]:
        shutil.rmtree(run / name)
    run_pipeline(recipe, run, "features")
    assert finished_files(run).items() <= finished_files(tiny_run).items()


def test_query_finds_a_text(tiny_run: Path) -> None:
    [text] = [row["text"] for row in list(read_jsonl(tiny_run / "corpus" / "docs.jsonl"))[:1]]
    done = subprocess.run(
        command("query", tiny_run, "--text", text, "--k", "3"), capture_output=True, text=True, check=True
    )
    first = done.stdout.splitlines()[0]
    assert first.startswith("1. cosine") and hash_of(tiny_run, 0) in first
    empty = subprocess.run(command("query", tiny_run, "--text", " "), capture_output=True, text=True)
    assert empty.returncode == 2 and "empty" in empty.stderr


def hash_of(run: Path, row: int) -> str:
    return list(read_jsonl(run / "corpus" / "docs.jsonl"))[row]["id"]


def test_kept_tool_rows_print_what_they_state(tiny_run: Path) -> None:
    """An independent look: plain subprocesses, no code of jz3 (the rows are the offline teacher's)."""
    rows = [row for row in read_jsonl(tiny_run / "filtering" / "kept.jsonl") if row["kind"] == "tool"]
    assert rows
    for row in rows:
        program, output = row["solution"].split("```python\n")[1].split("\n```", 1)
        stated = output.split("```output\n")[1].split("\n```")[0]
        done = subprocess.run(
            [sys.executable, "-I", "-c", program], capture_output=True, text=True, timeout=20, check=True
        )
        assert done.stdout.strip() == stated.strip()


@pytest.mark.slow
def test_killed_anywhere_ends_the_same(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    seconds = sum(read_json(tiny_run / name / "manifest.json")["seconds"] for name in NAMES)
    choice = random.Random(0)
    kills = 0
    for _ in range(12):
        process = subprocess.Popen(
            command("quickstart", "--preset", "tiny", "--out", run),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.wait(timeout=3 + choice.uniform(0, seconds / 4))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            time.sleep(0.2)
        else:
            break
    subprocess.run(command("quickstart", "--preset", "tiny", "--out", run), capture_output=True, check=True)
    assert kills >= 3
    assert finished_files(run) == finished_files(tiny_run)
    same, other = read_json(run / "results.json"), read_json(tiny_run / "results.json")
    for results in (same, other):
        del results["seconds"], results["peak_memory"]
    assert json.dumps(same, sort_keys=True) == json.dumps(other, sort_keys=True)


def test_stage_order_respects_needs() -> None:
    seen: set[str] = set()
    for stage in STAGES:
        assert set(stage.needs) <= seen
        seen.add(stage.name)
    assert [s.name for s in stages_up_to("index")] == ["corpus", "targets", "features", "index"]


def test_filters_depend_on_the_benchmarks_alone_of_the_evaluation() -> None:
    recipe = shipped_recipe("tiny")
    added = BenchmarkConfig(name="gsm8k", path="gsm8k.jsonl")
    other = dataclasses.replace(
        recipe, evaluation=dataclasses.replace(recipe.evaluation, benchmarks=(added,))
    )
    longer = dataclasses.replace(recipe, evaluation=dataclasses.replace(recipe.evaluation, max_new_tokens=9))
    keys = {
        stage.name: [stage_key(stage, r) for r in (recipe, other, longer)]
        for stage in STAGES
        if stage.name in ("synthesis", "filtering", "training", "evaluation")
    }
    assert len(set(keys["synthesis"])) == 1 and len(set(keys["evaluation"])) == 3
    for name in ("filtering", "training"):
        assert keys[name][0] == keys[name][2] != keys[name][1]


def test_other_benchmarks_are_refused_by_finished_filters(tmp_path: Path) -> None:
    recipe = shipped_recipe("tiny")
    (tmp_path / "synthesis").mkdir()
    write_json(tmp_path / "recipe.json", dataclasses.asdict(settled(recipe)))
    (tmp_path / "filtering").mkdir()
    (tmp_path / "filtering" / "kept.jsonl").touch()
    added = BenchmarkConfig(name="gsm8k", path="gsm8k.jsonl")
    other = dataclasses.replace(
        recipe, evaluation=dataclasses.replace(recipe.evaluation, benchmarks=(added,))
    )
    with pytest.raises(Jz3Error, match="evaluation.benchmarks.* which its filtering depend on"):
        run_pipeline(other, tmp_path)


def test_a_run_goes_on_with_other_settings_of_how_it_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the budget is used up, a GPU's memory too, or with fewer GPUs: nothing bought or made is given up."""
    recipe = settled(shipped_recipe("tiny"))
    write_json(tmp_path / "recipe.json", dataclasses.asdict(recipe))
    for stage in STAGES:
        (tmp_path / stage.name).mkdir()
        (tmp_path / stage.name / "made").touch()
    monkeypatch.setattr("jz3.pipeline._run_stage", lambda stage, ctx: {"seconds": 0, "peak_memory": 0})
    teacher = dataclasses.replace(recipe.distillation.teacher, max_usd=900.0, max_calls=20_000, retries=9)
    engine = dataclasses.replace(recipe.synthesis.engine, gpu_memory=0.5, tensor_parallel=2, batch_size=4)
    how = {"launch": ("torchrun",), "save_every": 5, "packs_at_once": 2, "gradient_checkpointing": True}
    other = dataclasses.replace(
        recipe,
        distillation=dataclasses.replace(recipe.distillation, teacher=teacher),
        synthesiser=dataclasses.replace(recipe.synthesiser, **how),
        synthesis=dataclasses.replace(recipe.synthesis, engine=engine),
        training=dataclasses.replace(recipe.training, **how),
    )
    run_pipeline(other, tmp_path)
    assert read_json(tmp_path / "recipe.json")["distillation"]["teacher"]["max_usd"] == 900.0
    hotter = dataclasses.replace(other, synthesis=dataclasses.replace(other.synthesis, temperature=0.5))
    with pytest.raises(Jz3Error, match="temperature: 1.0 -> 0.5"):
        run_pipeline(hotter, tmp_path)


def test_broken_benchmark_ends_a_run_before_its_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gsm8k.jsonl"
    path.write_text('{"question": "What is 1 + 1?", "answer": null}\n')
    added = BenchmarkConfig(name="gsm8k", path=str(path))
    recipe = shipped_recipe("tiny")
    recipe = dataclasses.replace(
        recipe, evaluation=dataclasses.replace(recipe.evaluation, benchmarks=(added,))
    )
    monkeypatch.setattr("jz3.pipeline._run_stage", lambda stage, ctx: {"seconds": 0, "peak_memory": 0})
    with pytest.raises(Jz3Error, match="gsm8k.jsonl:1 .* can't be read"):
        run_pipeline(recipe, tmp_path / "run")
    run_pipeline(recipe, tmp_path / "run", "synthesis")  # it doesn't look at them
    (tmp_path / "run" / "filtering").mkdir()
    write_json(tmp_path / "run" / "filtering" / "manifest.json", {"seconds": 0})
    run_pipeline(recipe, tmp_path / "run")


def test_missing_files_of_later_stages_end_a_run_before_its_first_stage(tmp_path: Path) -> None:
    recipe, missing = shipped_recipe("tiny"), str(tmp_path / "none.jsonl")
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"question": ["q"]}), table)
    task = TaskConfig(name="sums", path=missing)
    changes: dict[str, tuple[Any, str]] = {
        "matches no file": (dataclasses.replace(recipe.targets, tasks=(task,)), "targets"),
        "is a Parquet file": (
            dataclasses.replace(
                recipe.targets, instruction=(InstructionConfig(name="more", path=str(table)),)
            ),
            "targets",
        ),
        "'none.jsonl' matches": (
            dataclasses.replace(recipe.targets, control=ControlConfig(kind="jsonl", path="none.jsonl")),
            "targets",
        ),
        "recorded replies .*none.jsonl can't be read": (
            dataclasses.replace(
                recipe.distillation, teacher=TeacherConfig(kind="recorded", recorded=missing)
            ),
            "distillation",
        ),
    }
    for number, (told, (section, name)) in enumerate(changes.items()):
        with pytest.raises(Jz3Error, match=told):
            run_pipeline(dataclasses.replace(recipe, **{name: section}), tmp_path / str(number))
        assert not (tmp_path / str(number) / "corpus").exists()


def full_disk(ctx: StageContext) -> dict[str, object]:
    raise OSError(errno.ENOSPC, "No space left on device", str(ctx.out / "docs.jsonl"))


RUST = "Error while serializing: I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (SafetensorError(RUST), True),
        (SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"), True),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), True),
        (RuntimeError("basic_ios::clear: iostream error"), True),
        (RuntimeError("the model has no layers"), False),
        (Jz3Error("/other/disk: No space left on device"), False),
    ],
)
def test_a_full_disk_is_told_whatever_library_meets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, told: bool
) -> None:
    def fail(ctx: StageContext) -> dict[str, object]:
        raise error

    monkeypatch.setattr("test_pipeline.full_disk", fail)
    broken = Stage(name="corpus", target="test_pipeline:full_disk", sections=("corpus",))
    monkeypatch.setattr("jz3.pipeline.STAGES", (broken,))
    with pytest.raises(Exception) as caught:
        run_pipeline(shipped_recipe("tiny"), tmp_path, "corpus")
    assert (caught.value is not error) == told
    assert ("is full; free some space and run again" in str(caught.value)) == told


def test_tensors_that_do_not_fit_on_the_disk_are_an_os_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.zeros(3)}, {"format": "f"})
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["jz3"]) == {"format": "f"}
    # Whoever may read the folder's other files may read this one.
    write_json(tmp_path / "a.json", {})
    assert path.stat().st_mode == (tmp_path / "a.json").stat().st_mode
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise SafetensorError(text)

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    text = RUST
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_tensors(path, {"x": torch.ones(3)})
    assert caught.value.errno == errno.ENOSPC and str(caught.value.filename).startswith(str(path))
    text = "some other trouble"
    with pytest.raises(SafetensorError, match="some other trouble"):
        write_tensors(path, {"x": torch.ones(3)})
    assert path.read_bytes() == before


def test_full_disk_and_second_process_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Stage(name="corpus", target="test_pipeline:full_disk", sections=("corpus",))
    monkeypatch.setattr("jz3.pipeline.STAGES", (broken,))
    recipe = shipped_recipe("tiny")
    with pytest.raises(Jz3Error, match="disk of .* is full; free some space and run again"):
        run_pipeline(recipe, tmp_path, "corpus")
    assert not (tmp_path / "corpus" / "manifest.json").exists()
    with open(tmp_path / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(Jz3Error, match="another process is running"):
            run_pipeline(recipe, tmp_path, "corpus")

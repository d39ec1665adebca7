"""Recipes that are like others, and trainings that start from another model than the run's."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from jz3.config import Recipe, load_recipe, settled, shipped_recipe
from jz3.errors import Jz3Error
from jz3.estimate import estimate
from jz3.evaluation import stage as evaluation
from jz3.files import read_json, write_json, write_jsonl
from jz3.models import TINY, ModelConfig, load_model, resolve_model
from jz3.pipeline import run_pipeline
from jz3.records import Problem, Query
from jz3.stage import StageContext
from jz3.training import TrainingConfig, run_training
from jz3.training.config import TrainSettings
from jz3.training.packing import Phase
from jz3.training.run import train


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_recipe_takes_what_it_does_not_say_from_the_one_that_it_is_like(tmp_path: Path) -> None:
    written(
        tmp_path / "mine.toml", 'like = "tiny"\nname = "mine"\n[training]\nepochs = 7\n[selection]\nk = 3\n'
    )
    path = written(tmp_path / "more.toml", 'like = "mine.toml"\nname = "more"\n[selection]\nk = 2\n')
    tiny, more = shipped_recipe("tiny"), load_recipe(path)
    assert (more.name, more.training.epochs, more.selection.k) == ("more", 7, 2)
    expected = dataclasses.replace(
        tiny,
        name="more",
        training=dataclasses.replace(tiny.training, epochs=7),
        selection=dataclasses.replace(tiny.selection, k=2),
    )
    assert more == expected
    (source, *_) = tiny.corpus.sources
    assert len(tiny.corpus.sources) > 1
    lists = written(
        tmp_path / "lists.toml",
        f'like = "tiny"\n[[corpus.sources]]\nname = "{source.name}"\nkind = "jsonl"\npaths = ["a.jsonl"]\n',
    )
    assert [s.kind for s in load_recipe(lists).corpus.sources] == ["jsonl"], "lists are taken whole"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('like = "me.toml"', "is like itself"),
        ('like = "tinny"', "no recipe 'tinny'; shipped: .*paper-8b"),
        ('like = "none.toml"', "none.toml does not exist"),
        ("like = 3", "like must be a shipped recipe's name or a TOML file, got 3"),
        ('like = "tiny"\n[training]\nepoch = 3', "unknown key 'epoch'; did you mean 'epochs'"),
        ('like = "tiny"\n[training]\nbase_revision = "main"', "base_revision 'main' needs base"),
    ],
)
def test_what_a_recipe_cannot_be_like_is_told(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_recipe(written(tmp_path / "me.toml", text))


def test_the_paper_trains_three_models() -> None:
    seven, eight = shipped_recipe("paper-7b"), shipped_recipe("paper-8b")
    assert "deepseek-math-7b" in seven.synthesiser.base and not seven.training.base
    assert "Llama-3-8B" in eight.training.base
    same = {"name": seven.name, "training": seven.training, "estimate": seven.estimate}
    assert dataclasses.replace(eight, **same) == seven
    experts = shipped_recipe("paper-8x7b")
    engine = experts.evaluation.engine
    assert "Mixtral-8x7B" in experts.training.base and engine.tensor_parallel * engine.data_parallel == 8
    assert dataclasses.replace(experts, evaluation=seven.evaluation, **same) == seven
    hours = [{row.stage: row.gpu_hours for row in estimate(recipe)} for recipe in (seven, eight)]
    assert hours[1].pop("training") / hours[0].pop("training") == pytest.approx(8.03 / 7.24)
    assert hours[1].pop("evaluation") > hours[0].pop("evaluation") and hours[0] == hours[1]


@pytest.fixture
def wider(tmp_path: Path) -> Path:
    """Another model than the tiny one, with its tokenizer."""
    folder = tmp_path / "wider"
    shutil.copytree(resolve_model(ModelConfig(name=TINY)), folder)
    config = AutoConfig.from_pretrained(folder)
    config.intermediate_size += 32
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_a_training_starts_from_its_base_and_the_evaluation_compares_with_that(
    tmp_path: Path, wider: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections: dict[str, Any] = {"max_length": 128, "batch_packs": 2, "save_every": 0, "base": str(wider)}
    model = ModelConfig(name=TINY, dtype="float32")
    recipe = Recipe(name="x", model=model, training=TrainingConfig(**sections))
    row: dict[str, Any] = {"prompt_id": "p", "doc_id": "d", "kind": "cot", "level": "college", "origin": "t"}
    kept = [
        Problem(id=f"{i}", problem=f"What is {i}?", solution="It is.", answer="", **row) for i in range(4)
    ]
    write_jsonl(tmp_path / "run" / "filtering" / "kept.jsonl", (problem.to_json() for problem in kept))
    write_jsonl(tmp_path / "run" / "filtering" / "instruction.jsonl", ())
    run_training(StageContext(recipe=recipe, run_dir=tmp_path / "run", name="training"))
    trained = read_json(tmp_path / "run" / "training" / "model" / "config.json")
    base = read_json(wider / "config.json")
    assert trained["intermediate_size"] == base["intermediate_size"]

    query = Query(id="q", task="t", problem="What is 2?", prompt="What is 2?", completion="2.", role="eval")
    write_jsonl(tmp_path / "run" / "targets" / "eval.jsonl", [query.to_json()])
    asked: list[Path] = []

    def scored(ctx: StageContext, name: str, folder: Path, queries: list[Query]) -> list[float]:
        asked.append(folder)
        return [1.0] * len(queries)

    monkeypatch.setattr(evaluation, "_score_references", scored)
    monkeypatch.setattr(evaluation, "_solve", lambda *_: [])
    monkeypatch.setattr(evaluation, "_setting_summary", lambda _: {"tasks": {}})
    (tmp_path / "run" / "evaluation").mkdir()
    evaluation.run(StageContext(recipe=recipe, run_dir=tmp_path / "run", name="evaluation"))
    assert asked == [wider, tmp_path / "run" / "training" / "model"]


@pytest.fixture
def experts(tmp_path: Path) -> Callable[[float], Path]:
    """Tiny mixtures of experts whose router's loss has a weight, with the tiny model's tokenizer."""

    def build(coefficient: float) -> Path:
        folder = tmp_path / f"experts-{coefficient}"
        shutil.copytree(resolve_model(ModelConfig(name=TINY)), folder)
        (folder / "model.safetensors").unlink()
        config = MixtralConfig(
            vocab_size=AutoConfig.from_pretrained(resolve_model(ModelConfig(name=TINY))).vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            sliding_window=None,
            router_aux_loss_coef=coefficient,
        )
        torch.manual_seed(0)
        MixtralForCausalLM(config).save_pretrained(folder)
        return folder

    return build


def test_experts_are_trained_with_their_routers_loss(
    tmp_path: Path, experts: Callable[[float], Path]
) -> None:
    """As the paper's 8x7B; its weight is the model's own."""
    settings = TrainSettings(max_length=64, batch_packs=2, save_every=0, max_tokens=256, learning_rate=1e-3)
    phase = Phase(name="a", rows=[("What is this? ", f"It is number {i} of some.") for i in range(30)])
    first = []
    for coefficient in (0.0, 1.0, 2.0):
        out = tmp_path / f"{coefficient}"
        summary = train(experts(coefficient), [phase], settings, out, dtype="float32")
        first.append(summary.log[0]["loss"])
        assert not read_json(out / "config.json").get("output_router_logits"), "generation doesn't want them"
    assert first[1] - first[0] > 1 and first[2] - first[0] == pytest.approx(
        2 * (first[1] - first[0]), rel=1e-3
    )
    assert isinstance(load_model(tmp_path / "1.0", "float32"), MixtralForCausalLM)


@pytest.mark.parametrize("stage", ["synthesiser", "training"])
def test_a_base_that_is_not_there_ends_a_run_before_its_first_stage(tmp_path: Path, stage: str) -> None:
    tiny = shipped_recipe("tiny")
    settings = dataclasses.replace(getattr(tiny, stage), base=str(tmp_path / "misspelt"))
    with pytest.raises(Jz3Error, match="misspelt"):
        run_pipeline(dataclasses.replace(tiny, **{stage: settings}), tmp_path / "run")
    assert not (tmp_path / "run" / "corpus").exists()


def test_a_run_of_an_older_version_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that it didn't know are as by default; with others it is refused."""
    recipe = settled(shipped_recipe("tiny"))
    stored = dataclasses.asdict(recipe)
    del stored["training"]["base"], stored["training"]["base_revision"]
    write_json(tmp_path / "recipe.json", stored)
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "made").touch()
    monkeypatch.setattr("jz3.pipeline._run_stage", lambda stage, ctx: {"seconds": 0, "peak_memory": 0})
    other = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, base=TINY))
    with pytest.raises(Jz3Error, match="training.base: '' -> 'tiny'"):
        run_pipeline(other, tmp_path)
    run_pipeline(recipe, tmp_path)

"""Checkpoints of a real PEFT training with the Hugging Face Trainer, read by name."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_gradients import random_model, random_texts

import jz3
from jz3.errors import Jz3Error
from jz3.features.extract import extract, weights_hash
from jz3.features.less import AdamDirection, Less
from jz3.features.lora import LoraAdapters
from jz3.features.trainer_checkpoint import adopt_checkpoints, read_trainer_checkpoint
from jz3.gradients import tokenize_text

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Path], dict[str, Any], torch.Tensor]:
    """The base model, two checkpoints, the last optimiser's state by PEFT's names, and its logits."""
    folder = tmp_path_factory.mktemp("trainer")
    config = peft.LoraConfig(r=3, lora_alpha=12, lora_dropout=0.1, target_modules=TARGETS)
    model: Any = peft.get_peft_model(random_model("llama").float(), config)
    rows = [{"input_ids": t.ids[:3], "labels": t.ids[:3]} for t in random_texts(8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        num_train_epochs=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        save_strategy="epoch",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)  # pyright: ignore[reportArgumentType]
    trainer.train()
    optimizer: Any = trainer.optimizer
    while not optimizer.state or not isinstance(next(iter(optimizer.state)), torch.Tensor):
        optimizer = optimizer.optimizer
    state = {n: optimizer.state[p] for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        logits = model.eval()(torch.tensor([random_texts(1)[0].ids])).logits
    return random_model("llama").float(), [folder / "checkpoint-4", folder / "checkpoint-8"], state, logits


class Letters:
    """A tokenizer: a letter is a token."""

    def __call__(self, text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=[ord(c) % 96 for c in text])


def altered(source: Path, target: Path, **values: Any) -> Path:
    """Copy a checkpoint with other entries of its adapter_config.json."""
    shutil.copytree(source, target)
    table = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(table | values))
    return target


def test_moments_are_those_of_the_same_name(trained: Any) -> None:
    model, folders, state, logits = trained
    found = read_trainer_checkpoint(folders[1], model, "m")
    assert (found.step, found.shape.rank, found.shape.targets) == (8, 3, ("down_proj", "q_proj", "v_proj"))
    assert found.weights.keys() == {
        n.removeprefix("base_model.model.").removesuffix(".default.weight") for n in state
    }
    for name, entry in state.items():
        name = name.removeprefix("base_model.model.").removesuffix(".default.weight")
        for moment, wanted in zip(found.moments(name), ("exp_avg", "exp_avg_sq"), strict=True):
            assert float(moment.abs().sum()) > 0 and torch.equal(moment, entry[wanted])
    with LoraAdapters(model, found.shape, found.weights), torch.no_grad():
        torch.testing.assert_close(model(torch.tensor([random_texts(1)[0].ids])).logits, logits)


def test_weighed_by_the_learning_rates_of_the_epoch(trained: Any, tmp_path: Path) -> None:
    model, folders, _, _ = trained
    # Eight steps down from 1e-2 to zero, four to an epoch.
    rates = [read_trainer_checkpoint(f, model, "m").learning_rate for f in folders]
    assert rates == pytest.approx([1e-2 * (8 + 7 + 6 + 5) / 32, 1e-2 * (4 + 3 + 2 + 1) / 32])
    paths = adopt_checkpoints(folders, model, "m", tmp_path)
    values = extract(model, {}, random_texts(3), Less("m", paths, 64)).values
    assert values.shape == (3, 128)
    squares = values.square().reshape(3, 2, 64).sum(2)
    torch.testing.assert_close(squares, (torch.tensor(rates) / sum(rates)).expand(3, 2))
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(Jz3Error, match="logs no learning rate"):
        shutil.copytree(folders[0], tmp_path / "silent")
        (tmp_path / "silent" / "trainer_state.json").write_text('{"epoch": 1.0, "log_history": []}')
        read_trainer_checkpoint(tmp_path / "silent", model, "m")
    with pytest.raises(ValueError, match="2 checkpoints and 1 learning rates"):
        adopt_checkpoints(folders, model, "m", tmp_path, learning_rates=(1.0,))


def test_featurize_adopts_them(trained: Any, tmp_path: Path) -> None:
    model, folders, _, _ = trained
    kind = jz3.Less(tmp_path / "adopted", folders, k=32)
    one = jz3.featurize(model, Letters(), ["abcdefg", "hgfedcbaa"], kind)  # pyright: ignore[reportArgumentType]
    paths = adopt_checkpoints(folders, model, weights_hash(model), tmp_path)
    texts = [tokenize_text(Letters(), "", t, 512) for t in ("abcdefg", "hgfedcbaa")]  # pyright: ignore[reportArgumentType]
    other = extract(model, {}, texts, Less(weights_hash(model), paths, 32)).values
    torch.testing.assert_close(torch.from_numpy(one.values), other)


def test_states_by_name_as_fsdp_writes_them(trained: Any, tmp_path: Path) -> None:
    model, folders, state, _ = trained
    folder = altered(folders[1], tmp_path / "fsdp")
    (folder / "optimizer.pt").unlink()
    # The order says nothing here, the names do.
    torch.save({"state": dict(reversed(state.items())), "param_groups": []}, folder / "optimizer.bin")
    by_name, by_number = (read_trainer_checkpoint(f, model, "m") for f in (folder, folders[1]))
    for name in by_number.weights:
        for one, other in zip(by_name.moments(name), by_number.moments(name), strict=True):
            assert torch.equal(one, other)


def test_what_does_not_fit_is_refused(trained: Any, tmp_path: Path) -> None:
    model, folders, _, _ = trained
    source = folders[1]
    settings = (
        *(("use_dora", True), ("bias", "all"), ("rank_pattern", {"q": 1})),
        *(("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "olora")),
    )
    for number, (key, value) in enumerate(settings):
        with pytest.raises(Jz3Error, match=f"adapters with {key}"):
            read_trainer_checkpoint(altered(source, tmp_path / str(number), **{key: value}), model, "m")
    with pytest.raises(Jz3Error, match=r"has the shape .* expected"):
        read_trainer_checkpoint(altered(source, tmp_path / "rank", r=5), model, "m")
    with pytest.raises(Jz3Error, match="name a checkpoint folder"):
        read_trainer_checkpoint(tmp_path, model, "m")
    with pytest.raises(Jz3Error, match="betas"):
        read_trainer_checkpoint(source, model, "m", direction=AdamDirection(beta2=0.95))
    folder = altered(source, tmp_path / "fewer")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(Jz3Error, match="1 adapters are missing"):
        read_trainer_checkpoint(folder, model, "m")


def test_a_foreign_optimiser_is_refused(trained: Any, tmp_path: Path) -> None:
    model, folders, _, _ = trained
    folder = altered(folders[1], tmp_path / "copy")
    path = folder / "optimizer.pt"
    whole = torch.load(path, weights_only=True)
    first = whole["state"][0]

    def refused(match: str, state: Any = None, groups: Any = None) -> None:
        torch.save({"state": state or whole["state"], "param_groups": groups or whole["param_groups"]}, path)
        with pytest.raises(Jz3Error, match=match):
            read_trainer_checkpoint(folder, model, "m")

    refused("the optimiser is no Adam", whole["state"] | {0: {"step": first["step"]}})
    refused("exp_avg of .* has the shape", whole["state"] | {0: first | {"exp_avg": first["exp_avg"].T}})
    refused("no state of .*q_proj.lora_A", {i: s for i, s in whole["state"].items() if i})
    refused("different numbers of steps", whole["state"] | {0: first | {"step": torch.tensor(3.0)}})
    group = whole["param_groups"][0]
    halves = [{**group, "params": group["params"][:2]}, {**group, "params": group["params"][2:]}]
    refused("12 weights in 2 groups without names", groups=halves)
    path.write_bytes(b"not an optimiser")
    with pytest.raises(Jz3Error, match="no state of a torch optimiser"):
        read_trainer_checkpoint(folder, model, "m")
    torch.save({"state": {0: Path("code")}}, path)
    with pytest.raises(Jz3Error, match="no state of a torch optimiser"):
        read_trainer_checkpoint(folder, model, "m")
    path.unlink()
    with pytest.raises(Jz3Error, match=r"holds no optimizer\.pt or optimizer\.bin"):
        read_trainer_checkpoint(folder, model, "m")

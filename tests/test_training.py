"""Training learns what it should, in the order it should, and survives any kill."""

import dataclasses
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from trainings import PHASES, SETTINGS, rows

from jz3.errors import Jz3Error
from jz3.files import read_json
from jz3.models import load_model, load_tokenizer
from jz3.training import Phase, TrainSettings, train
from jz3.training.export import export
from jz3.training.run import choose_attention, lora_config

LORA = dataclasses.replace(SETTINGS, method="lora", learning_rate=1e-2)


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def learning_rates(settings, steps):
    """The rate at every step, from the scheduler that the trainer builds of our arguments."""
    import torch
    from transformers import get_scheduler

    from jz3.training.trainer import schedule

    chosen = schedule(settings, steps)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings.learning_rate)
    scheduler = get_scheduler(
        chosen["lr_scheduler_type"],
        optimizer,
        num_warmup_steps=chosen["warmup_steps"],
        num_training_steps=steps,
        scheduler_specific_kwargs=chosen.get("lr_scheduler_kwargs"),
    )
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates, scheduler.get_last_lr()[0]


def test_warmup_stable_decay():
    rates, after = learning_rates(TrainSettings(learning_rate=2e-5), 200)
    assert rates[0] == pytest.approx(0.1 * 2e-5)
    assert rates[:6] == sorted(rates[:6]) and rates[5] < 2e-5
    assert rates[6:171] == [2e-5] * 165, "3% warm-up, then constant up to and including 85%"
    assert rates[171] == pytest.approx(2e-5 * (1 - 0.9 / 30))
    assert rates[185] == pytest.approx(2e-5 * (1 - 0.9 * 15 / 30))
    assert after == pytest.approx(0.1 * 2e-5)


def test_other_schedules():
    rates, after = learning_rates(TrainSettings(schedule="cosine", learning_rate=1.0, warmup=0.0), 100)
    assert rates[0] == 1.0 and rates[50] == pytest.approx(0.55) and after == pytest.approx(0.1)
    rates, _ = learning_rates(TrainSettings(schedule="constant", learning_rate=1.0, warmup=0.1), 100)
    assert rates[10:] == [1.0] * 90 and rates[5] == pytest.approx(0.5)
    for steps in (1, 2, 7):
        assert learning_rates(TrainSettings(learning_rate=1.0), steps)[0][0] == 1.0, (
            "no step is lost to warm-up"
        )


def test_phases_in_order_with_their_losses_and_tokens(tiny_model, tmp_path):
    seen = []

    def progress(total, label):
        import contextlib

        @contextlib.contextmanager
        def bar():
            seen.append((total, label))
            yield lambda n: seen.append(n)

        return bar()

    summary = train(tiny_model, PHASES, SETTINGS, tmp_path / "model", progress=progress)
    assert [row["step"] for row in summary.log] == list(range(1, summary.steps + 1))
    order = [row["phase"] for row in summary.log]
    assert order == sorted(order) and set(order) == {"first", "second"}
    assert summary.steps == -(-summary.packs // 2)
    assert summary.tokens == summary.log[-1]["tokens"] == sum(p["tokens"] for p in summary.phases.values())
    assert seen[0] == (summary.tokens, "tokens") and sum(seen[1:]) == summary.tokens
    assert summary.loss_last < summary.loss_first - 1
    losses = [row["loss"] for row in summary.log]
    assert len(losses) in range(11, 21), "so a tenth is two steps"
    assert (summary.loss_first, summary.loss_last) == (sum(losses[:2]) / 2, sum(losses[-2:]) / 2)
    second = losses[order.index("second") :]
    assert summary.phases["second"]["loss_first"] == second[0]
    rates, _ = learning_rates(SETTINGS, summary.steps)
    assert [row["lr"] for row in summary.log] == pytest.approx(rates)
    assert not (tmp_path / "model.work").exists() and not (tmp_path / "model.work.lock").exists()
    json.dumps(dataclasses.asdict(summary))


def test_first_loss_is_the_mean_over_the_predicted_tokens_of_the_step(tiny_model, tmp_path):
    """Two packs of unequal size: the mean over tokens, not the mean of the packs' means."""
    import torch
    from torch.nn.functional import cross_entropy

    from jz3.training.packing import encode

    texts = [("", "A farmer has three fields. " * 11), ("## Question\n" * 20, "No.")]
    settings = dataclasses.replace(SETTINGS, precision="float32")
    summary = train(tiny_model, [Phase(name="a", rows=texts)], settings, tmp_path / "m", dtype="float32")
    assert (summary.steps, summary.packs) == (1, 2)
    model, total, targets = load_model(tiny_model, "float32"), 0.0, 0
    for document in encode(texts, load_tokenizer(tiny_model))[0]:
        ids = torch.tensor(document.ids, dtype=torch.long)
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, document.target - 1 : -1]
        total += cross_entropy(logits, ids[document.target :], reduction="sum").item()
        targets += len(ids) - document.target
    assert summary.targets == targets
    assert summary.loss_first == pytest.approx(total / targets, rel=1e-5)


def test_the_end_is_learned_and_the_model_is_whole(tiny_model, tmp_path):
    import torch
    from safetensors.torch import load_file

    same = [("Say it: ", "apples.")] * 60
    settings = dataclasses.replace(SETTINGS, learning_rate=1e-2, epochs=3, max_length=64)
    train(tiny_model, [Phase(name="a", rows=same)], settings, tmp_path / "model")
    model, tokenizer = load_model(tmp_path / "model"), load_tokenizer(tmp_path / "model")
    prompt = tokenizer("Say it: ", return_tensors="pt")
    out = model.generate(  # pyright: ignore[reportCallIssue]
        **prompt, max_new_tokens=20, do_sample=False
    )[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(out) == f"apples.{tokenizer.eos_token}"
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    before, after = (read_json(folder / "config.json") for folder in (tiny_model, tmp_path / "model"))
    assert after == before | {"dtype": "bfloat16"}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_merged_adapters_equal_adapters(tiny_model, tmp_path):
    import torch
    from peft import get_peft_model

    torch.manual_seed(1)
    adapted = get_peft_model(load_model(tiny_model, "float32"), lora_config(LORA))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    export(tiny_model, tmp_path / "adapter", tmp_path / "merged", "float32")
    weights, config = (tmp_path / "merged" / name for name in ("model.safetensors", "config.json"))
    assert weights.stat().st_mode == config.stat().st_mode
    merged, base = load_model(tmp_path / "merged", "float32"), load_model(tiny_model, "float32")
    ids = torch.arange(5, 300)[None]
    with torch.no_grad():
        want, got, plain = adapted.eval()(ids).logits, merged(ids).logits, base(ids).logits
    assert (want - plain).abs().max() > 0.1, "the adapters must matter"
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_adapters_learn_in_float32_over_frozen_weights(tiny_model, tmp_path):
    settings = dataclasses.replace(LORA, epochs=2)
    summary = train(tiny_model, PHASES, settings, tmp_path / "model", dtype="float32")
    assert summary.loss_last < summary.loss_first - 0.5
    assert summary.trained_parameters < 40_000
    before, after = load_model(tiny_model, "float32"), load_model(tmp_path / "model", "float32")
    same = {
        name: bool((a == b).all())
        for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True)
    }
    assert same["model.embed_tokens.weight"] and same["model.norm.weight"]
    assert not any(equal for name, equal in same.items() if "proj" in name)


def test_small_steps_are_not_lost_to_rounding(tiny_model, tmp_path):
    """Of steps far below bfloat16's spacing, mixed precision keeps the sum."""
    base = tmp_path / "base"
    load_model(tiny_model, "bfloat16").save_pretrained(base)
    load_tokenizer(tiny_model).save_pretrained(base)
    settings = dataclasses.replace(SETTINGS, learning_rate=1e-6, schedule="constant", warmup=0.0)
    train(base, PHASES, settings, tmp_path / "model", dtype="float32")
    before, after = load_model(base, "float32"), load_model(tmp_path / "model", "float32")
    for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True):
        if "proj" in name:
            assert (a != b).float().mean() > 0.9, name


def test_mixed_precision_is_close_to_float32(tiny_model, tmp_path):
    for settings in (SETTINGS, LORA):
        mixed = train(tiny_model, PHASES, settings, tmp_path / f"{settings.method}-mixed")
        exact = dataclasses.replace(settings, precision="float32")
        exact = train(tiny_model, PHASES, exact, tmp_path / f"{settings.method}-exact", dtype="float32")
        for a, b in zip(mixed.log, exact.log, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=0.05)


def test_a_finished_training_is_returned_and_never_overwritten(tiny_model, tmp_path):
    out = tmp_path / "model"
    first = train(tiny_model, PHASES, SETTINGS, out)
    written = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    (tmp_path / "model.work").mkdir()
    again = train(tiny_model, PHASES, dataclasses.replace(SETTINGS, save_every=7), out)
    assert again == first
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == written
    assert not (tmp_path / "model.work").exists()
    with pytest.raises(Jz3Error, match="trained otherwise or on other rows"):
        train(tiny_model, PHASES[:1], SETTINGS, out)
    with pytest.raises(Jz3Error, match="exists and is no finished training"):
        train(tiny_model, PHASES, SETTINGS, tmp_path)


def test_only_one_process_at_a_time(tiny_model, tmp_path):
    with open(tmp_path / "model.work.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(Jz3Error, match="another process trains"):
            train(tiny_model, PHASES, SETTINGS, tmp_path / "model")


def test_no_usable_row_and_a_diverging_run_are_clear_errors(tiny_model, tmp_path):
    with pytest.raises(Jz3Error, match="nothing to train on.*empty_completion"):
        train(tiny_model, [Phase(name="a", rows=[("x", "")])], SETTINGS, tmp_path / "a")
    wild = dataclasses.replace(SETTINGS, learning_rate=1e30, max_grad_norm=0.0)
    with pytest.raises(Jz3Error, match="lower learning_rate"):
        train(tiny_model, PHASES, wild, tmp_path / "b")
    with pytest.raises(ValueError, match="different names"):
        train(tiny_model, [PHASES[0], PHASES[0]], SETTINGS, tmp_path / "c")


def test_no_checkpoint_is_kept_of_a_step_whose_gradient_is_no_number(tiny_model, tmp_path, monkeypatch):
    """Its loss is one still; resumed from such weights, a training could never end well."""
    from jz3.training.trainer import PackTrainer

    compute = PackTrainer.compute_loss

    def broken(trainer, model, inputs, *rest, **more):
        loss = compute(trainer, model, inputs, *rest, **more)
        if trainer.state.global_step == 3:
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    settings = dataclasses.replace(SETTINGS, save_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(PackTrainer, "compute_loss", broken)
        with pytest.raises(Jz3Error, match="gradient of step 4 is nan; run again.* lower learning_rate"):
            train(tiny_model, PHASES, settings, tmp_path / "model")
    assert [p.name for p in (tmp_path / "model.work" / "checkpoints").iterdir()] == ["checkpoint-3"]
    assert (tmp_path / "model.work" / "packs").exists() and not (tmp_path / "model.work" / "packing").exists()
    assert train(tiny_model, PHASES, settings, tmp_path / "model").steps > 4


@pytest.fixture(scope="module")
def processes():
    """Children that start with the libraries loaded, one thread each."""
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jz3.training.trainer", "peft"])
    context.Process(target=int).start()
    if threads is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = threads
    return context


RESUMABLE = {
    "full": dataclasses.replace(SETTINGS, save_every=3),
    "lora": dataclasses.replace(LORA, save_every=3, lora_dropout=0.1),
}


@pytest.fixture(scope="module", params=["full", "lora"])
def uninterrupted(request, tiny_model, tmp_path_factory, processes):
    """The settings, and the files of a training that nothing interrupted."""
    out = tmp_path_factory.mktemp(request.param) / "model"
    settings = RESUMABLE[request.param]
    finish(processes, tiny_model, settings, out)
    return settings, contents(out)


def start(processes, model, settings, out):
    child = processes.Process(target=train, args=(model, PHASES, settings, out))
    child.start()
    return child


def finish(processes, model, settings, out):
    child = start(processes, model, settings, out)
    child.join(120)
    assert child.exitcode == 0


def kill_when(child, condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert child.is_alive() and time.monotonic() < deadline, (
            "the training ended before it could be killed"
        )
        time.sleep(0.0005)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL


def test_killed_again_and_again_it_ends_with_the_same_bytes(uninterrupted, processes, tiny_model, tmp_path):
    """Killed while the packs are written, while a checkpoint is written, after one, and at the end."""
    settings, expected = uninterrupted
    out, work = tmp_path / "model", tmp_path / "model.work"
    checkpoints = work / "checkpoints"
    moments = (
        lambda: (work / "key.json").exists(),
        lambda: (checkpoints / "checkpoint-3").exists(),
        lambda: (checkpoints / "checkpoint-6" / "complete.json").exists(),
        lambda: (checkpoints / "checkpoint-9").exists(),
        lambda: (work / "trained").exists(),
        lambda: (tmp_path / "model.part").exists(),
    )
    for moment in moments:
        kill_when(start(processes, tiny_model, settings, out), moment)
        assert not out.exists()
    finish(processes, tiny_model, settings, out)
    assert contents(out) == expected
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_unfinished_and_damaged_checkpoints_are_ignored(
    uninterrupted, processes, tiny_model, tmp_path, caplog
):
    from jz3.training.trainer import newest_complete

    settings, expected = uninterrupted
    out = tmp_path / "model"
    checkpoints = tmp_path / "model.work" / "checkpoints"
    whole = checkpoints / "checkpoint-6"
    kill_when(start(processes, tiny_model, settings, out), lambda: (whole / "complete.json").exists())
    for path in checkpoints.iterdir():
        if path.name not in ("checkpoint-3", "checkpoint-6"):
            shutil.rmtree(path)
    unmarked, damaged = checkpoints / "checkpoint-12", checkpoints / "checkpoint-9"
    for copy in (unmarked, damaged):
        shutil.copytree(whole, copy)
        optimizer = bytearray((copy / "optimizer.pt").read_bytes())
        optimizer[len(optimizer) // 2] ^= 1
        (copy / "optimizer.pt").write_bytes(optimizer)
    (unmarked / "complete.json").unlink()
    assert newest_complete(checkpoints) == whole
    assert not unmarked.exists() and not damaged.exists()
    assert "checkpoint-9" in caplog.text
    finish(processes, tiny_model, settings, out)
    assert contents(out) == expected


@pytest.mark.parametrize("uninterrupted", ["lora"], indirect=True)
def test_work_of_another_training_is_not_resumed(uninterrupted, processes, tiny_model, tmp_path):
    settings, expected = uninterrupted
    out = tmp_path / "model"
    other = dataclasses.replace(settings, learning_rate=settings.learning_rate / 2)
    marker = tmp_path / "model.work" / "checkpoints" / "checkpoint-3" / "complete.json"
    kill_when(start(processes, tiny_model, other, out), marker.exists)
    finish(processes, tiny_model, settings, out)
    assert contents(out) == expected


def test_a_training_goes_on_with_other_packs_at_once(tiny_model, tmp_path, monkeypatch):
    """After a GPU's memory was too small, say: the packs of a step stay the same."""
    from jz3.training import trainer

    settings = dataclasses.replace(SETTINGS, precision="float32", batch_packs=4, save_every=2)
    expected = train(tiny_model, PHASES, settings, tmp_path / "expected", dtype="float32")
    out = tmp_path / "model"
    at_once = dataclasses.replace(settings, packs_at_once=2)
    step = trainer.Watch.on_step_end

    def too_little(watch, args, state, control, **rest):
        if state.global_step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(watch, args, state, control, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Watch, "on_step_end", too_little)
        with pytest.raises(Jz3Error, match="packs_at_once"):
            train(tiny_model, PHASES, at_once, out, dtype="float32")
    resumed = []
    begin = trainer.Watch.on_train_begin

    def began(watch, args, state, control, **rest):
        resumed.append(state.global_step)
        begin(watch, args, state, control, **rest)

    monkeypatch.setattr(trainer.Watch, "on_train_begin", began)
    less = dataclasses.replace(settings, gradient_checkpointing=True)
    summary = train(tiny_model, PHASES, less, out, dtype="float32")
    assert resumed == [2]
    for a, b in zip(summary.log, expected.log, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_attention_is_chosen_and_named(tiny_model):
    model = load_model(Path(tiny_model), "float32")
    assert choose_attention(model) in ("jz3_documents", "flash_attention_2")
    assert model.config._attn_implementation in ("jz3_documents", "flash_attention_2")


def test_models_that_would_mix_the_texts_of_a_pack_are_refused():
    from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

    bloom = BloomForCausalLM(BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=2))
    with pytest.raises(Jz3Error, match="own attention of 'bloom' models would mix the texts of a pack"):
        choose_attention(bloom)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1))
    with pytest.raises(Jz3Error, match="recurrent layers of 'mamba' models would mix"):
        choose_attention(mamba)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(
    "given, saved",
    [
        ({"temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
        ({"length_penalty": 2.0, "eos_token_id": [0, 5]}, {"eos_token_id": [0, 5]}),
    ],
)
def test_generation_settings_that_transformers_would_not_save(tiny_model, tmp_path, method, given, saved):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    (base / "generation_config.json").write_text(json.dumps(given))
    settings = dataclasses.replace(SETTINGS, method=method, save_every=1)
    train(base, [Phase(name="a", rows=rows(6))], settings, tmp_path / "out", dtype="float32")
    written = read_json(tmp_path / "out" / "generation_config.json")
    assert written.items() >= saved.items() and "length_penalty" not in written

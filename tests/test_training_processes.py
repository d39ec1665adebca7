"""One training in one or several processes: who launches them, who reads and packs, and on which GPU."""

import dataclasses
import functools
import math
import signal
import sys

import pytest
import torch
from trainings import PHASES, SETTINGS, rows

from jz3.errors import Jz3Error
from jz3.files import write_json, write_jsonl
from jz3.training import Phase, train
from jz3.training.run import run_job


@pytest.mark.slow
def test_two_processes_train_like_one(tiny_model, tmp_path, monkeypatch):
    """The same global batch, hence the same steps and losses, whatever the number of processes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = dataclasses.replace(SETTINGS, precision="float32", batch_packs=4)
    one = train(tiny_model, PHASES, settings, tmp_path / "one", dtype="float32")
    launch = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2")
    settings = dataclasses.replace(settings, launch=launch)
    two = train(tiny_model, PHASES, settings, tmp_path / "two", dtype="float32")
    assert (one.processes, two.processes) == (1, 2)
    assert one.steps == two.steps
    for a, b in list(zip(one.log, two.log, strict=True))[:-1]:
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["tokens"] == b["tokens"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_a_launcher_that_fails_or_is_missing_is_named(tiny_model, tmp_path):
    settings = dataclasses.replace(SETTINGS, launch=("no-such-launcher",))
    with pytest.raises(Jz3Error, match="no-such-launcher.*not installed"):
        train(tiny_model, PHASES, settings, tmp_path / "a")
    told = "import ctypes, sys; n = ctypes.c_int(); ctypes.CDLL(None).prctl(2, ctypes.byref(n)); sys.exit(n.value)"
    settings = dataclasses.replace(SETTINGS, launch=(sys.executable, "-c", told))
    # It gets this signal when jz3 is killed.
    with pytest.raises(Jz3Error, match=f"ended with code {signal.SIGTERM.value}"):
        train(tiny_model, PHASES, settings, tmp_path / "told")
    settings = dataclasses.replace(SETTINGS, launch=("false",))
    with pytest.raises(Jz3Error, match="ended with code 1"):
        train(tiny_model, PHASES, settings, tmp_path / "b")


def test_processes_wait_for_the_packs_longer_than_nccl_does(tiny_model, tmp_path, monkeypatch):
    """The groups of accelerate would end after ten minutes, while millions of rows are packed."""
    given = {}

    class Refused(Exception):
        pass

    def state(**options):
        given.update(options)
        raise Refused

    monkeypatch.setattr("accelerate.PartialState", state)
    with pytest.raises(Refused):
        train(tiny_model, PHASES, SETTINGS, tmp_path / "a")
    assert given["timeout"].total_seconds() >= 3600


def test_packs_that_cannot_be_shared_out_are_refused_before_any_packing(tiny_model, tmp_path):
    settings = dataclasses.replace(SETTINGS, batch_packs=3, packs_at_once=2)
    with pytest.raises(ValueError, match=r"batch_packs \(3\) must be a multiple"):
        train(tiny_model, PHASES, settings, tmp_path / "a")
    assert not (tmp_path / "a.work").exists()


def test_only_the_first_process_reads_the_rows(tmp_path, monkeypatch):
    job = {"model": "m", "phases": ["first"], "settings": {}, "out": "o", "seed": 0, "dtype": "float32"}
    write_json(tmp_path / "job.json", job)
    write_jsonl(tmp_path / "0.jsonl", [{"prompt": "a", "completion": "b"}])
    seen = []
    monkeypatch.setattr(
        "jz3.training.run.train", lambda model, phases, *_, **__: seen.append(list(phases[0].rows))
    )
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        run_job(tmp_path / "job.json")
    assert seen == [[("a", "b")], []]


def test_too_little_memory_of_a_gpu_is_told_with_its_remedies(tiny_model, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

    monkeypatch.setattr("jz3.training.trainer.PackTrainer.train", full)
    with pytest.raises(Jz3Error, match=r"2\.00 GiB\.\).*gradient_checkpointing"):
        train(tiny_model, [Phase(name="a", rows=rows(6))], SETTINGS, tmp_path / "a")


def test_one_process_trains_on_one_of_several_gpus(tiny_model, tmp_path, monkeypatch, caplog):
    """The trainer would spread one process's batches over all GPUs, and TRL refuses to."""
    from transformers import TrainingArguments

    found = TrainingArguments._setup_devices.func

    def two_gpus(arguments):
        device = found(arguments)
        arguments._n_gpu = 2
        return device

    devices = functools.cached_property(two_gpus)
    devices.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", devices)
    phases = (Phase(name="first", rows=rows(20)),)
    summary = train(tiny_model, phases, SETTINGS, tmp_path / "model")
    assert len(summary.log) == math.ceil(summary.packs / SETTINGS.batch_packs) == summary.steps
    assert "one of 2 GPUs trains" in caplog.text and "launch" in caplog.text

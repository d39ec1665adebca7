"""One function that trains: resumable, in this process or under a launcher."""

import contextlib
import dataclasses
import functools
import gc
import logging
import math
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from jz3.errors import Jz3Error
from jz3.files import (
    atomic_path,
    canonical_json,
    hash_file,
    hash_text,
    locked,
    read_json,
    write_json,
    write_jsonl,
)
from jz3.models import load_model, load_tokenizer
from jz3.processes import end_with
from jz3.rows import Rows
from jz3.seeding import seed_for
from jz3.stage import progress_bar, release_memory
from jz3.training.config import HOW, TrainSettings
from jz3.training.export import export, settle_generation
from jz3.training.packing import Packs, Phase, pack
from jz3.training.quiet import quiet

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

SUMMARY = "training.json"
"""Inside the trained model's folder: what it was trained on, and its summary."""
PATIENCE = timedelta(hours=6)
"""How long processes wait for the first, which packs millions of rows and writes the model; NCCL's is ten minutes."""

Progress = Callable[[int, str], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSummary:
    """What a training did."""

    steps: int
    packs: int
    tokens: int
    """Read, over all epochs."""
    targets: int
    """Of these, predicted: the tokens that the loss is a mean over."""
    loss_first: float
    """Mean over the first tenth of the steps (at least one)."""
    loss_last: float
    """Mean over the last tenth of the steps (at least one)."""
    phases: dict[str, dict[str, Any]]
    """Per phase: rows, documents, split_rows, packs, tokens, targets, loss_first, loss_last."""
    dropped: dict[str, dict[str, int]]
    """Per phase: rows left out, by reason."""
    trained_parameters: int
    device: str
    processes: int
    attention: str
    log: list[dict[str, Any]]
    """One row per step: step, phase, loss, lr, grad_norm, tokens (read so far)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The arguments of a training."""

    model: Path
    phases: tuple[Phase, ...]
    settings: TrainSettings
    out: Path
    seed: int
    dtype: str

    @property
    def work(self) -> Path:
        """Where packs and checkpoints lie until the model is whole."""
        return self.out.with_name(self.out.name + ".work")

    def table(self) -> dict[str, Any]:
        """Return the settings as JSON."""
        return {f.name: getattr(self.settings, f.name) for f in dataclasses.fields(TrainSettings)}

    def key(self) -> str:
        """Hash all that the trained weights depend on, but for rounding."""
        weights = {
            p.name: hash_file(p)
            for p in sorted(self.model.iterdir())
            if p.suffix in (".safetensors", ".json")
        }
        settings = {name: value for name, value in self.table().items() if name not in HOW}
        rows = []
        for phase in self.phases:
            digest = xxhash.xxh3_64()
            for row in phase.rows:
                digest.update(canonical_json(row).encode("utf-8", "surrogatepass"))
            rows.append([phase.name, digest.hexdigest()])
        return hash_text(canonical_json([weights, settings, rows, self.seed, self.dtype]))


def train(
    model: Path,
    phases: Sequence[Phase],
    settings: TrainSettings,
    out: Path,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    progress: Progress = progress_bar,
) -> TrainSummary:
    """Train a causal language model on phases of rows and write it to a folder.

    The loss of a step is the mean cross-entropy over the predicted tokens of its packs. Checkpoints
    and packs lie in `<out>.work` until the model is whole. Killed at any moment and called again
    with the same arguments, it goes on from the last whole checkpoint and ends with the same bytes
    (with the same number of threads or GPUs, packs_at_once and gradient_checkpointing, else up to rounding);
    called once more, it returns the stored summary.

    With `settings.launch` the training runs in the processes that the launcher starts, for example
    `["torchrun", "--nproc_per_node=8"]`, or, with the weights sharded over the GPUs,
    `["accelerate", "launch", "--num_processes=8", "--use_fsdp", "--fsdp_version=2",
    "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP"]`. A step takes batch_packs packs over all of
    them; the last one is filled up with the first packs if it can't be shared out evenly.

    Args:
        model: the folder of the model to start from.
        phases: what to read, in order.
        settings: how.
        out: the folder of the trained model, which must not exist unless it is this training's own:
            weights as safetensors in `dtype` (adapters merged), tokenizer, and training.json.
        seed: of the order of rows, the adapters' start and dropout.
        dtype: `bfloat16` or `float32`, of the written weights, and of frozen ones in training.
        progress: gives a progress bar over tokens, like StageContext.progress.

    Returns:
        The summary.

    Raises:
        Jz3Error: no usable row, another model in `out`, another process at work, a model whose layers
            mix the texts of a pack, a loss that is no number, too little memory of a GPU, or a launcher
            that failed.
        ValueError: batch_packs can't be divided over the processes.
    """
    if len({phase.name for phase in phases}) < len(phases):
        raise ValueError("phases must have different names")
    settings = settings.settled()
    job = Job(model=model, phases=tuple(phases), settings=settings, out=out, seed=seed, dtype=dtype)
    if (out / SUMMARY).is_file():
        stored = read_json(out / SUMMARY)
        if stored["key"] != job.key():
            raise Jz3Error(f"{out} holds a model trained otherwise or on other rows; delete it to train anew")
        shutil.rmtree(job.work, ignore_errors=True)
        return TrainSummary(**stored["summary"])
    if out.exists():
        raise Jz3Error(f"{out} exists and is no finished training; choose another folder or delete it")
    return _launch(job) if settings.launch else _train_here(job, progress)


def _launch(job: Job) -> TrainSummary:
    folder = job.out.with_name(job.out.name + ".job")
    for number, phase in enumerate(job.phases):
        write_jsonl(folder / f"{number}.jsonl", ({"prompt": p, "completion": c} for p, c in phase.rows))
    table = {
        "model": str(job.model.absolute()),
        "phases": [phase.name for phase in job.phases],
        "settings": job.table() | {"launch": []},
        "out": str(job.out.absolute()),
        "seed": job.seed,
        "dtype": job.dtype,
    }
    write_json(folder / "job.json", table)
    launcher = job.settings.launch
    release_memory()
    try:
        # It passes the signal on: else it would hold the GPUs, and its training the lock, when this is killed.
        ending = functools.partial(end_with, os.getpid(), signal.SIGTERM)
        command = [*launcher, "-m", "jz3.training", str(folder / "job.json")]
        done = subprocess.run(command, check=False, preexec_fn=ending)
    except FileNotFoundError as error:
        raise Jz3Error(f"the launcher {launcher[0]!r} is not installed or not on PATH") from error
    if done.returncode or not (job.out / SUMMARY).is_file():
        raise Jz3Error(
            f"{launcher[0]!r} ended with code {done.returncode} before the model was trained; see its messages above"
        )
    shutil.rmtree(folder)
    return TrainSummary(**read_json(job.out / SUMMARY)["summary"])


def run_job(path: Path) -> None:
    """Train what a job file describes; every process that a launcher starts calls this."""
    from jz3.tables import from_table

    job = read_json(path)
    # The first process alone packs; eight copies of millions of rows would fill the machine's memory.
    first = os.environ.get("RANK", "0") == "0"
    files = [path.with_name(f"{number}.jsonl") for number in range(len(job["phases"]))]
    phases = [
        Phase(name=name, rows=Rows([file], lambda row: (row["prompt"], row["completion"])) if first else ())
        for name, file in zip(job["phases"], files, strict=True)
    ]
    train(
        Path(job["model"]),
        phases,
        from_table(TrainSettings, job["settings"], str(path)),
        Path(job["out"]),
        seed=job["seed"],
        dtype=job["dtype"],
    )


def _train_here(job: Job, progress: Progress) -> TrainSummary:
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    main = state.is_main_process
    accumulation(job.settings, state.num_processes)  # refuses before hours of packing
    with quiet(), _locked(job.work) if main else contextlib.nullcontext():
        with state.main_process_first():
            if main:
                _prepare(job)
            packs = _load_packs(job.work)
        summary = _fit(job, packs, state.num_processes, progress if main else _no_progress)
        if main:
            gc.collect()
            with atomic_path(job.out) as part:
                part.mkdir(parents=True)
                export(job.model, job.work / "trained", part, job.dtype)
                write_json(part / SUMMARY, {"key": job.key(), "summary": dataclasses.asdict(summary)})
            shutil.rmtree(job.work)
        state.wait_for_everyone()
    return summary


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    work.mkdir(parents=True, exist_ok=True)
    lock = work.with_name(work.name + ".lock")
    with locked(lock, wait=False) as alone:
        if not alone:
            raise Jz3Error(f"another process trains in {work}; wait for it or stop it")
        try:
            yield
        finally:
            lock.unlink()


@contextlib.contextmanager
def _no_progress(total: int, label: str) -> Iterator[Callable[[int], None]]:
    yield lambda _: None


def _prepare(job: Job) -> None:
    """Make sure that the work folder belongs to this training and holds its packs."""
    work, key = job.work, job.key()
    if (work / "key.json").is_file() and read_json(work / "key.json") != key:
        log.warning("%s is left from an unfinished training with other settings or rows; it is deleted", work)
        shutil.rmtree(work)
    write_json(work / "key.json", key)
    if (work / "packs").is_dir():
        return
    tokenizer = load_tokenizer(job.model)
    if tokenizer.eos_token_id is None:
        raise Jz3Error(f"the tokenizer of {job.model} has no end token; a completion's end can't be taught")
    scratch = work / "packing"
    shutil.rmtree(scratch, ignore_errors=True)
    packs = pack(job.phases, tokenizer, job.settings, job.seed, scratch)
    if not packs.phase:
        raise Jz3Error(f"nothing to train on: {packs.counts}, left out: {packs.dropped}")
    with atomic_path(work / "packs") as part:
        packs.dataset.save_to_disk(part)
        write_json(
            part / "packs.json", {"phase": packs.phase, "counts": packs.counts, "dropped": packs.dropped}
        )
    shutil.rmtree(scratch)


def _load_packs(work: Path) -> Packs:
    from datasets import Dataset

    return Packs(dataset=Dataset.load_from_disk(work / "packs"), **read_json(work / "packs" / "packs.json"))


def accumulation(settings: TrainSettings, processes: int) -> int:
    """Return the accumulation steps that make `batch_packs` packs a step over all processes.

    Raises:
        ValueError: batch_packs is no multiple of processes * packs_at_once.
    """
    at_once = processes * settings.packs_at_once
    if settings.batch_packs % at_once:
        raise ValueError(
            f"batch_packs ({settings.batch_packs}) must be a multiple of "
            f"{processes} processes x {settings.packs_at_once} packs_at_once"
        )
    return settings.batch_packs // at_once


def _fit(job: Job, packs: Packs, processes: int, progress: Progress) -> TrainSummary:
    import torch
    from peft.helpers import disable_input_dtype_casting
    from transformers import PrinterCallback

    from jz3.training.trainer import PackTrainer, Watch, arguments, newest_complete

    settings = job.settings
    size, adapters = settings.batch_packs, settings.method == "lora"
    lengths = [sum(documents) for documents in packs.dataset["seq_lengths"]]
    step_tokens = [sum(lengths[i : i + size]) for i in range(0, len(lengths), size)]
    checkpoints = job.work / "checkpoints"
    seed = seed_for(job.seed, "training") % 2**32
    config = arguments(settings, checkpoints, len(step_tokens), accumulation(settings, processes), seed)
    frozen_in_bfloat16 = adapters and settings.precision == "mixed"
    model = load_model(job.model, job.dtype if frozen_in_bfloat16 else "float32")
    settle_generation(model)
    attention = choose_attention(model)
    with progress(sum(lengths), "tokens") as advance:
        trainer = PackTrainer(
            model=model,
            args=config,
            train_dataset=packs.dataset,
            processing_class=load_tokenizer(job.model),
            peft_config=lora_config(settings) if adapters else None,
            callbacks=[Watch(step_tokens, advance)],
        )
        trainer.remove_callback(PrinterCallback)
        with trainer.accelerator.main_process_first():
            checkpoint = newest_complete(checkpoints)
        # Under autocast the adapters' products run in bfloat16 like the rest; PEFT would cast the
        # activations to the adapters' float32 first.
        trained: Any = trainer.model
        try:
            with disable_input_dtype_casting(trained, active=frozen_in_bfloat16):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except torch.OutOfMemoryError as error:
            raise Jz3Error(
                f"the GPU's memory does not hold this training ({str(error).splitlines()[0]}); set "
                "gradient_checkpointing, lower packs_at_once or max_length, take method lora, or shard the weights "
                "over several GPUs by launch, as the recipe paper-7b does"
            ) from error
        if trainer.is_fsdp_enabled:
            plugin: Any = trainer.accelerator.state.fsdp_plugin
            plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(str(job.work / "trained"))
    rows = _log_rows(trainer.state.log_history, packs, step_tokens, size)
    return TrainSummary(
        steps=len(rows),
        packs=len(lengths),
        tokens=sum(lengths),
        targets=sum(count["targets"] for count in packs.counts.values()),
        **_losses(rows),
        phases={
            name: count | _losses([row for row in rows if row["phase"] == name])
            for name, count in packs.counts.items()
        },
        dropped=packs.dropped,
        trained_parameters=sum(p.numel() for p in trained.parameters() if p.requires_grad),
        device=config.device.type,
        processes=processes,
        attention=attention,
        log=rows,
    )


def _log_rows(
    history: list[dict[str, Any]], packs: Packs, step_tokens: list[int], size: int
) -> list[dict[str, Any]]:
    rows, tokens = [], 0
    for entry in history:
        if "loss" in entry:
            step = entry["step"]
            tokens += step_tokens[step - 1]
            rows.append(
                {
                    "step": step,
                    "phase": packs.phase[(step - 1) * size],
                    "loss": entry["loss"],
                    "lr": entry["learning_rate"],
                    "grad_norm": entry.get("grad_norm"),
                    "tokens": tokens,
                }
            )
    return rows


def _losses(rows: list[dict[str, Any]]) -> dict[str, Any]:
    if not rows:
        return {"loss_first": None, "loss_last": None}
    tenth = math.ceil(len(rows) / 10)
    losses = [row["loss"] for row in rows]
    return {"loss_first": sum(losses[:tenth]) / tenth, "loss_last": sum(losses[-tenth:]) / tenth}


def choose_attention(model: "PreTrainedModel") -> str:
    """Set the attention that keeps the documents of a pack apart, and return its name.

    On a GPU with flash-attn its variable-length kernels; else `jz3.training.attention`.

    Raises:
        Jz3Error: the model's layers would mix the documents.
    """
    import torch
    from transformers.utils import is_flash_attn_2_available

    from jz3.training.attention import register

    name = register()
    if torch.cuda.is_available():
        if is_flash_attn_2_available():
            name = "flash_attention_2"
        else:
            log.warning("flash-attn is not installed: attention runs document by document, which is slower")
    model.set_attn_implementation(name)
    # transformers only warns where a model's class keeps its own attention; a state runs on over a pack.
    if model.config._attn_implementation != name or model._is_stateful:
        layers = "recurrent layers" if model._is_stateful else "own attention"
        raise Jz3Error(
            f"the {layers} of {model.config.model_type!r} models would mix the texts of a pack, and there is no "
            "training without packs: choose a base model whose attention transformers can replace, e.g. a Llama"
        )
    return name


def lora_config(settings: TrainSettings) -> "LoraConfig":
    """Return PEFT's configuration of the adapters."""
    from peft import LoraConfig

    targets = settings.lora_targets
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear" if targets == ("all-linear",) else list(targets),
    )

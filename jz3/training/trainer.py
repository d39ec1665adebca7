"""TRL's trainer with the loss computed where labels are, and checkpoints that are whole or ignored."""

import dataclasses
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from jz3.errors import Jz3Error
from jz3.files import hash_file, read_json, write_json
from jz3.training.config import TrainSettings
from jz3.training.packing import IGNORED

log = logging.getLogger(__name__)

MARKER = "complete.json"


class PackTrainer(SFTTrainer):
    """Trains on packs that are already tokenised and in reading order."""

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the mean cross-entropy over the labels of the step's packs.

        TRL's fused output layer selects the labelled positions on GPUs only; elsewhere it computes
        all of them, twice. Here the output layer sees the labelled positions alone.
        """
        if inputs["input_ids"].device.type != "cpu" or self.aux_loss_enabled or num_items_in_batch is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][0, 1:]
        positions = (labels != IGNORED).nonzero().squeeze(1)
        kept = {key: value for key, value in inputs.items() if key != "labels"}
        outputs = model(**kept, use_cache=False, logits_to_keep=positions)
        total = cross_entropy(outputs.logits[0].float(), labels[positions], reduction="sum")
        loss = total / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        # Past SFTTrainer's own method, which only adds a model card.
        Trainer._save_checkpoint(self, model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            folder = Path(str(self.args.output_dir))
            newest = folder / f"checkpoint-{self.state.global_step}"
            mark_complete(newest)
            for older in folder.glob("checkpoint-*"):
                if older != newest:
                    shutil.rmtree(older)


class Watch(TrainerCallback):
    """Reports progress in tokens and stops a run whose loss or gradient is no number."""

    def __init__(self, step_tokens: list[int], advance: Callable[[int], None]):
        self.step_tokens = step_tokens
        self.advance = advance

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step:
            self.advance(sum(self.step_tokens[: state.global_step]))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.advance(self.step_tokens[state.global_step - 1])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if not math.isfinite(logs.get("loss", 0.0)):
            raise Jz3Error(
                f"the loss of step {state.global_step} is {logs['loss']}; "
                f"lower learning_rate ({args.learning_rate}) or set precision to float32"
            )
        # The weights are lost by now, and their checkpoint would replace the one before.
        if not math.isfinite(logs.get("grad_norm") or 0.0):
            raise Jz3Error(
                f"the gradient of step {state.global_step} is {logs['grad_norm']}; run again from the last checkpoint "
                f"in case the machine failed, else lower learning_rate ({args.learning_rate}) or set precision to "
                "float32"
            )


def arguments(settings: TrainSettings, folder: Path, steps: int, accumulation: int, seed: int) -> SFTConfig:
    """Translate our settings to TRL's.

    Args:
        settings: ours.
        folder: where the checkpoints go.
        steps: the number of optimiser steps, which the schedule is laid over.
        accumulation: packs that a process accumulates, over packs_at_once.
        seed: of the adapters' start and of dropout.
    """
    config = SFTConfig(
        output_dir=str(folder),
        seed=seed,
        data_seed=seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=settings.precision == "mixed",
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        **schedule(settings, steps),
        num_train_epochs=1,
        per_device_train_batch_size=settings.packs_at_once,
        gradient_accumulation_steps=accumulation,
        **_checkpointing(settings.gradient_checkpointing),
        train_sampling_strategy="sequential",
        packing=True,
        packing_strategy="bfd",
        max_length=settings.max_length,
        dataset_kwargs={"skip_prepare_dataset": True},
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if config.n_gpu > 1:
        # Else the trainer copies the model to all of them, which TRL refuses, and a step takes more packs.
        log.warning(
            "one of %d GPUs trains, as launch names no launcher that starts a process for each, e.g. "
            '["torchrun", "--nproc_per_node=%d"]',
            config.n_gpu,
            config.n_gpu,
        )
        config._n_gpu = 1
    return config


def _checkpointing(on: bool) -> dict[str, Any]:
    """Return the setting that recomputes activations under its name here: it changed in transformers 5.21."""
    known = {field.name for field in dataclasses.fields(SFTConfig)}
    return {
        "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing": on
    }


def schedule(settings: TrainSettings, steps: int) -> dict[str, Any]:
    """Return TRL's arguments for the learning rate over `steps` steps."""
    warmup = int(settings.warmup * steps)
    if settings.schedule == "constant":
        return {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": warmup}
    if settings.schedule == "cosine":
        return {
            "lr_scheduler_type": "cosine_with_min_lr",
            "warmup_steps": warmup,
            "lr_scheduler_kwargs": {"min_lr_rate": settings.min_lr_ratio},
        }
    return {
        "lr_scheduler_type": "warmup_stable_decay",
        "warmup_steps": warmup,
        "lr_scheduler_kwargs": {
            "num_decay_steps": steps - int(settings.stable_until * steps),
            "decay_type": settings.decay,
            "min_lr_ratio": settings.min_lr_ratio,
        },
    }


def mark_complete(checkpoint: Path) -> None:
    """Write the marker of a checkpoint: its files, their sizes and hashes."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MARKER)
    write_json(
        checkpoint / MARKER,
        {str(p.relative_to(checkpoint)): [p.stat().st_size, hash_file(p)] for p in files},
    )


def newest_complete(folder: Path) -> Path | None:
    """Return the newest whole checkpoint in `folder`; unfinished and damaged ones are deleted."""
    checkpoints = [p for p in folder.glob("checkpoint-*") if p.is_dir()]
    for checkpoint in sorted(checkpoints, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
        if _is_complete(checkpoint):
            return checkpoint
        log.warning("%s is unfinished or damaged; it is deleted", checkpoint)
        shutil.rmtree(checkpoint)
    return None


def _is_complete(checkpoint: Path) -> bool:
    if not (checkpoint / MARKER).is_file():
        return False
    for name, (size, digest) in read_json(checkpoint / MARKER).items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size or hash_file(path) != digest:
            return False
    return True

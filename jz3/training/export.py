"""From trained weights or adapters to a folder that every engine loads."""

import copy
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from jz3.files import usual_rights
from jz3.models import load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

log = logging.getLogger(__name__)


def export(base: Path, trained: Path, out: Path, dtype: str) -> None:
    """Write a trained model as a plain folder: weights merged and in `dtype`, tokenizer included.

    Args:
        base: the folder of the model that the training began with.
        trained: a folder of adapters, or of all weights in float32.
        out: the folder to fill.
        dtype: `bfloat16` or `float32`.
    """
    import torch

    if (trained / "adapter_config.json").is_file():
        from peft import PeftModel

        model = PeftModel.from_pretrained(load_model(base, "float32"), trained).merge_and_unload()
    else:
        # The trainer's own (no cache, say) would be wrong for generation.
        for name in ("config.json", "generation_config.json"):
            if (base / name).is_file():
                shutil.copyfile(base / name, trained / name)
        model = load_model(trained, "float32")
    tokenizer = load_tokenizer(base)
    model = model.to(getattr(torch, dtype))
    settle_generation(model)
    if model.generation_config is not None:
        ends = model.generation_config.eos_token_id
        known = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if tokenizer.eos_token_id not in known:
            model.generation_config.eos_token_id = [tokenizer.eos_token_id, *known]
    model.save_pretrained(out)
    usual_rights(out)
    tokenizer.save_pretrained(out)


def settle_generation(model: "PreTrainedModel") -> None:
    """Make a model's generation settings valid, as transformers saves no model with others.

    Several published models state a temperature without `do_sample`, which is then added; of settings
    that are invalid otherwise the token ids alone are kept.

    Args:
        model: changed in place.
    """
    from transformers import GenerationConfig

    config = model.generation_config
    if config is None or not (problem := _refusal(config)):
        return
    sampled = copy.deepcopy(config)
    sampled.do_sample = True
    if not _refusal(sampled):
        log.warning("the base model's generation settings lack do_sample = true; it is added")
        model.generation_config = sampled
        return
    log.warning("of the base model's generation settings only the token ids are kept: %s", problem)
    pad = config.pad_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=None if pad is None or pad < 0 else pad,
    )


def _refusal(config: "GenerationConfig") -> str:
    """Return why transformers would not save the settings; empty if it would."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        return str(error)
    return ""

"""From trained weights or adapters to a folder that every engine loads."""

import shutil
from pathlib import Path

from jz3.models import load_model, load_tokenizer


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
    if model.generation_config is not None:
        ends = model.generation_config.eos_token_id
        known = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if tokenizer.eos_token_id not in known:
            model.generation_config.eos_token_id = [tokenizer.eos_token_id, *known]
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)

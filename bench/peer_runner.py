"""One peer's features of tokenised texts, timed; run by bench/peers.py with a Python that has the peer.

`python peer_runner.py PEER MODEL TOKENS.json DTYPE OUT` reads (tokens, first scored one) of every text and says that it
is ready; then it runs once for every line of its input, and after each prints a JSON line: the seconds and the rows'
shape. It checks that the first run gave a finite row per text and writes these to OUT if it isn't empty.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

MARK = "jz3-peer "
"""Begins the lines that bench/peers.py reads."""
BATCH_TOKENS = 2048
SIDE = 16
"""Numbers per layer and side of a two-sided projection: bergson's default."""
LAYERS = r"layers\.\d+\..*\.(q|k|v|o|gate|up|down)_proj"
TRAK_NUMBERS, LESS_NUMBERS = 8, 64
"""Of 2,048 and 8,192: without their CUDA kernel, both draw the whole random matrix anew for every batch."""
DRAWN = 1 << 27
"""Entries of that matrix at a time."""

Texts = list[tuple[list[int], int]]
"""Tokens, and the first one that is scored."""
Run = Callable[[Texts, Path], Any]
"""Computes the rows of texts, with a folder to write to, and returns what `rows` below is made of."""


def open_model(folder: str, dtype: str, **options: Any) -> Any:
    """Load the frozen model; gradients flow from the embeddings on."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **options).eval()
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    return model


def padded(texts: Texts) -> dict[str, torch.Tensor]:
    """Lay texts out as a batch, padded on the right."""
    width = max(len(ids) for ids, _ in texts)
    found = torch.zeros(3, len(texts), width, dtype=torch.int64)
    found[2] = -100
    for row, (ids, start) in enumerate(texts):
        found[0, row, : len(ids)] = torch.tensor(ids)
        found[1, row, : len(ids)] = 1
        found[2, row, start : len(ids)] = torch.tensor(ids[start:])
    return dict(zip(("input_ids", "attention_mask", "labels"), found, strict=True))


def bergson(folder: str, dtype: str) -> tuple[Run, Callable[[Any], np.ndarray]]:
    """An index of 16 x 16 numbers per layer on disk."""
    from bergson import GradientProcessor, IndexConfig, collect_gradients, load_gradients
    from bergson.data import allocate_batches
    from datasets import Dataset

    model = open_model(folder, dtype)

    def run(texts: Texts, out: Path) -> Path:
        ids = [i for i, _ in texts]
        labels = [[-100] * start + i[start:] for i, start in texts]
        data = Dataset.from_dict({"input_ids": ids, "labels": labels, "length": [len(i) for i in ids]})
        config = IndexConfig(
            run_path=str(out / "index"),
            token_batch_size=BATCH_TOKENS,
            projection_dim=SIDE,
            loss_reduction="mean",
        )
        config.partial_run_path.mkdir(parents=True, exist_ok=True)
        batches = allocate_batches(data["length"][:], BATCH_TOKENS)
        collect_gradients(model, data, GradientProcessor(projection_dim=SIDE), config, batches=batches)
        return config.partial_run_path

    def rows(path: Path) -> np.ndarray:
        found = load_gradients(path)
        if found.dtype.names:
            return np.concatenate([_wide(found[n]).reshape(len(found), -1) for n in found.dtype.names], 1)
        return _wide(found)

    return run, rows


def dattri_llm(folder: str, dtype: str) -> tuple[Run, Callable[[Any], np.ndarray]]:
    """Its LoGra capture, 16 x 16 numbers per layer, into its store on disk; batches of four, longest first."""
    from dattri_llm import AttributionArguments, GradientStorageManager, GradientStreamer, HookManagerConfig
    from dattri_llm.attribution.utils import collect_gradients

    model = open_model(folder, dtype)
    projection = {"style": "logra", "proj_dim": SIDE, "proj_type": "normal", "proj_max_batch_size": 32}
    config = HookManagerConfig(
        linear_io=[LAYERS],
        projection_kwargs={"__default__": projection},
        capture_style="materialized",
        include_frozen=True,
    )
    size = 4

    def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        targets = batch["labels"][:, 1:]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return (each.view_as(targets).sum(1) / (targets >= 0).sum(1)).sum()

    def run(texts: Texts, out: Path) -> tuple[Any, list[int]]:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i][0]))
        arguments = AttributionArguments(
            output_dir=str(out), use_cpu=True, per_device_train_batch_size=size, dataloader_pin_memory=False
        )
        streamer = GradientStreamer(
            model,
            [texts[i] for i in order],  # pyright: ignore[reportArgumentType]
            arguments,
            batch_size=size,
            loss_fn=loss,
            config=config,
            collate_fn=padded,
        )
        return collect_gradients(streamer, GradientStorageManager(str(out / "store"))), order

    def rows(found: tuple[Any, list[int]]) -> np.ndarray:
        store, order = found
        parts = []
        for file in sorted({entry["file"] for entries in store.index.values() for entry in entries}):
            for record in store.load_records(file):
                layers = record.gradient.materialize().data
                parts.append(torch.cat([layers[n].flatten(1).float() for n in sorted(layers)], 1))
        return torch.cat(parts).numpy()[np.argsort(order)]

    return run, rows


def traker(folder: str, dtype: str) -> tuple[Run, Callable[[Any], np.ndarray]]:
    """TRAK's features of the loss: gradients of the blocks' matrices are formed, a dense normal projection."""
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import BasicProjector, ProjectionType

    model = open_model(folder, dtype, attn_implementation="eager")
    model.requires_grad_(True)
    names = [n for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    count = sum(p.numel() for n, p in model.named_parameters() if n in names)

    class Loss(AbstractModelOutput):
        def __init__(self) -> None:
            pass

        @staticmethod
        def get_output(model: Any, weights: Any, buffers: Any, *batch: Any) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            keys = ("input_ids", "attention_mask", "labels")
            options = {k: x[None] for k, x in zip(keys, batch, strict=True)}
            return torch.func.functional_call(model, (weights, buffers), args=(), kwargs=options).loss

        def get_out_to_loss_grad(self, model: Any, weights: Any, buffers: Any, batch: Any) -> torch.Tensor:
            # The output is the loss itself.
            return torch.ones(len(batch[0]), 1)

    projector = BasicProjector(
        count, TRAK_NUMBERS, 0, ProjectionType.normal, torch.device("cpu"), max(1, DRAWN // count)
    )

    def run(texts: Texts, out: Path) -> Any:
        traker = TRAKer(
            model=model,
            task=Loss(),
            train_set_size=len(texts),
            save_dir=str(out),
            device="cpu",
            projector=projector,
            proj_dim=TRAK_NUMBERS,
            use_half_precision=False,
            grad_wrt=names,
            logging_level=40,
        )
        traker.load_checkpoint(model.state_dict(), model_id=0)
        for text in texts:
            traker.featurize(batch=list(padded([text]).values()), num_samples=1)
        return traker

    return run, lambda found: np.asarray(found.saver.current_store["grads"], dtype=np.float32)


def less(folder: str, dtype: str) -> tuple[Run, Callable[[Any], np.ndarray]]:
    """LESS's recipe: adapters, one text at a time, Adam's direction, a dense sign projection.

    Its own package doesn't import beside a current torch. Adapters and moments are drawn, not trained, which
    takes the same time.
    """
    from peft import LoraConfig, get_peft_model
    from trak.projectors import BasicProjector, ProjectionType

    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=128, lora_alpha=512, lora_dropout=0.1, target_modules=targets)
    model: Any = get_peft_model(open_model(folder, dtype), config).eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.001)
    count = sum(p.numel() for p in parameters)
    m, v = torch.randn(count) * 1e-4, torch.rand(count) * 1e-6
    block = max(1, DRAWN // count)
    projector = BasicProjector(
        count, LESS_NUMBERS, 0, ProjectionType.rademacher, torch.device("cpu"), block, torch.float32
    )

    def run(texts: Texts, out: Path) -> torch.Tensor:
        found, waiting = [], []
        for number, text in enumerate(texts):
            model.zero_grad()
            model(**padded([text])).loss.backward()
            g = torch.cat([p.grad.flatten().float() for p in parameters])
            waiting.append((0.9 * m + 0.1 * g) / torch.sqrt(0.999 * v + 0.001 * g.square() + 1e-8))
            if len(waiting) == 16 or number == len(texts) - 1:
                found.append(projector.project(torch.stack(waiting), model_id=0))
                waiting = []
        return torch.nn.functional.normalize(torch.cat(found), dim=1)

    return run, lambda found: found.numpy()


PEERS = {"bergson": bergson, "dattri-llm": dattri_llm, "traker": traker, "less": less}


def _wide(x: Any) -> np.ndarray:
    # numpy has no bfloat16 of its own; what stores use instead is read by its bytes.
    x = np.asarray(x)
    if x.dtype.itemsize == 2 and x.dtype != np.float16:
        return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16).float().numpy()
    return x.astype(np.float32)


def main() -> None:
    """Warm up on one text, then run once for every line that comes in; check the first run's rows."""
    peer, folder, tokens, dtype, out = sys.argv[1:]
    texts: Texts = json.loads(Path(tokens).read_text(encoding="utf-8"))
    run, rows = PEERS[peer](folder, dtype)
    with tempfile.TemporaryDirectory() as temporary:
        run(texts[:1], Path(temporary))
    shape = None
    say({"ready": True})
    for _ in sys.stdin:
        with tempfile.TemporaryDirectory() as temporary:
            start = time.perf_counter()
            found = run(texts, Path(temporary))
            seconds = time.perf_counter() - start
            if shape is None:
                first = rows(found)
                shape = first.shape
                if len(first) != len(texts) or not np.isfinite(first).all():
                    raise SystemExit(f"{peer} gave {shape} numbers for {len(texts)} texts")
                if not np.abs(first).sum(1).all():
                    raise SystemExit(f"{peer} gave a row of zeros")
                if out:
                    np.save(out, first)
        say({"seconds": seconds, "shape": shape})


def say(what: dict[str, Any]) -> None:
    """Print what bench/peers.py waits for, among whatever else a peer prints."""
    print(f"\n{MARK}{json.dumps(what)}", flush=True)


if __name__ == "__main__":
    main()

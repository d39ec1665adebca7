"""Per-document gradient features per second against the hardware and peers: `python bench/gradients.py`.

SmolLM2-135M, real texts of at most 512 tokens (the folder `../shared/data` beside the checkout, or docstrings of
installed packages), norms over all linear layers of the blocks, `adapted` features of 2,048 numbers. The floor is
4 N floating point operations per token for N parameters (forward, and backward to the activations) at the fastest
product of two 2048 x 2048 matrices in this process, in whatever number format of these is the faster: products in 8
or 16 bits may be below it. Ours with exact products, with the fastest and with those that `auto` chooses, bergson's
runs and the peak take turns.

Peers run in environments of their own, named by JZ3_PEER_PYTHON; see bench/peers.py. Without it they are "absent".
"""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from jz3.corpus.config import SourceConfig
from jz3.corpus.sources import read_texts
from jz3.features.adapted import fit_adapted
from jz3.features.extract import open_sink
from jz3.files import write_json
from jz3.gradients import (
    GradientPass,
    Tokens,
    linear_layers,
    llama,
    make_batches,
    passes,
    set_products,
    tokenize_text,
)
from jz3.gradients.products import OutputLayer
from jz3.machine import best_dtype
from jz3.models import EMBEDDED, ModelConfig, load_model, load_tokenizer, resolve_model
from jz3.records import Reject

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import peers  # noqa: E402

SAMPLES = HERE.parents[1] / "shared" / "data" / "samples"
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
SHORTEST, LONGEST = 64, 512
FIT_TEXTS = 8
"""Enough for a fit whose cost per text is that of any other."""


class Nothing:
    """Takes factors and keeps none: the pass alone."""

    wide = True

    def forward(self, name: str, a: torch.Tensor) -> None:
        """Drop a."""

    def backward(self, name: str, kept: None, g: torch.Tensor) -> None:
        """Drop g."""


class Timed:
    """Adds up the time spent in functions while it is active."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, owner: Any, name: str, label: str) -> Callable[[], None]:
        """Time a function of a module, class or object; return what undoes it."""
        inner, own = getattr(owner, name), name in vars(owner)

        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*arguments, **options)
            finally:
                self.seconds[label] = self.seconds.get(label, 0.0) + time.perf_counter() - start

        setattr(owner, name, timed)
        return lambda: setattr(owner, name, inner) if own else delattr(owner, name)


def machine() -> dict[str, Any]:
    """Return the processor's name, the instruction sets that matter and the threads."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    found = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    flags = found.get("flags", "").split()
    return {
        "model": found.get("model name", platform.processor() or platform.machine()),
        "flags": [f for f in FLAGS if f in flags],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def own_formats() -> list[str]:
    """Return the number formats worth measuring: an emulated product of two such matrices takes a minute."""
    return sorted({best_dtype(), "float32"})


def peak_gflops() -> dict[str, float]:
    """Return the fastest of ten products of 2048 x 2048 matrices per number format that this machine has."""
    found = {}
    for name in own_formats():
        a = torch.randn(2048, 2048).to(getattr(torch, name))
        times = []
        for _ in range(10):
            start = time.perf_counter()
            torch.mm(a, a)
            times.append(time.perf_counter() - start)
        found[name] = 2 * 2048**3 / min(times) / 1e9
    return found


def read_documents() -> list[str]:
    """Return real texts, in an order that doesn't depend on the machine."""
    texts = []
    for path in sorted(SAMPLES.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines()[:200]:
            row = json.loads(line)
            if "input" in row and "output" in row:
                texts.append(row["input"] + row["output"])
    if texts:
        return texts
    records = read_texts(SourceConfig(name="sympy", kind="docstrings"))
    return [r.text for r in records if not isinstance(r, Reject)]


def load_texts(tokenizer: Any, count: int) -> list[Tokens]:
    """Tokenise `count` texts of 64 to 512 tokens, spread over all there are."""
    found = []
    for i, text in enumerate(read_documents()):
        try:
            tokens = tokenize_text(tokenizer, str(i), text, LONGEST)
        except ValueError:
            continue
        if len(tokens.ids) >= SHORTEST:
            found.append(tokens)
    if len(found) < count:
        raise SystemExit(f"only {len(found)} of {count} texts of at least {SHORTEST} tokens are to be had")
    return found[:: len(found) // count][:count]


class Pass:
    """Our pass over all texts with one kind of products and one sink, kept open between its runs."""

    def __init__(self, model: Any, layers: Any, sink: Any, batches: Any, products: str) -> None:
        self._sink, self._batches = sink, batches
        self._gradients = GradientPass(model, layers, sink, products=products)
        self._gradients.__enter__()
        self.seconds = list[float]()

    def warm_up(self) -> None:
        """Run the last batch, untimed."""
        self._through(self._batches[-1:])

    def run(self) -> None:
        """Run once; what the products need was packed before."""
        start = time.perf_counter()
        self._through(self._batches)
        self.seconds.append(time.perf_counter() - start)

    def _through(self, batches: Any) -> None:
        for batch in batches:
            self._gradients.run(batch)
            if hasattr(self._sink, "take"):
                self._sink.take()


def breakdown(model: Any, layers: Any, sink: Any, batches: Any) -> dict[str, float]:
    """Return the seconds of one pass by what they were spent on; products are what is left."""
    timed = Timed()
    undo = [
        timed.wrap(llama._Native, "attention", "attention"),
        timed.wrap(llama._Native, "norm", "norms and activations"),
        timed.wrap(llama._Native, "norm_backward", "norms and activations"),
        # Where tiles multiply, these are part of the products.
        timed.wrap(llama._Native, "swiglu", "norms and activations"),
        timed.wrap(llama._Native, "swiglu_backward", "norms and activations"),
        timed.wrap(OutputLayer, "__call__", "loss and output layer"),
        timed.wrap(type(sink), "forward", "projection and norms of inputs"),
        timed.wrap(type(sink), "backward", "projection and norms of gradients"),
    ]
    start = time.perf_counter()
    for _ in passes.run_pass(model, layers, sink, batches):
        sink.take()
    whole = time.perf_counter() - start
    for each in undo:
        each()
    rest = whole - sum(timed.seconds.values())
    return {"products of the blocks and the rest": rest, **timed.seconds}


def main() -> None:
    """Measure, print, write the JSON."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # this is about CPUs, and a GPU would choose the number formats
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5, help="rounds, of which the medians count")
    parser.add_argument("--seconds", type=float, default=300, help="no round begins later than this")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument(
        "--dtype", default=best_dtype(), help="of the model: bfloat16 or float32; the faster here"
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=[p.name for p in peers.PEERS],
        default=[p.name for p in peers.PEERS if p.dtype in own_formats()],
        help="which to run; by default all in number formats that aren't emulated here",
    )
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()

    folder = resolve_model(ModelConfig(name=EMBEDDED))
    model, tokenizer = load_model(folder, arguments.dtype), load_tokenizer(folder)
    layers = linear_layers(model)
    texts = load_texts(tokenizer, arguments.texts)
    batches = make_batches(texts, arguments.batch_tokens)
    tokens = sum(len(t.ids) for t in texts)
    parameters = sum(p.numel() for p in model.parameters())

    fit = fit_adapted(model, "", layers, [], texts[:FIT_TEXTS], batch_tokens=512)
    sink = open_sink(fit, model)
    best = set_products(model, "auto")
    fastest = "int8" if best == "int8_backward" else best
    kinds: list[str] = list(dict.fromkeys(("exact", fastest, best)))
    ours = {(k, s is sink): Pass(model, layers, s, batches, k) for k in kinds for s in (sink, Nothing())}
    wanted = [p for p in peers.PEERS if p.name in arguments.peers]
    # Ours, the peer's and the machine's best take turns, so that a slower hour of the machine is everyone's.
    threads = torch.get_num_threads()
    running = {p.name: peers.Running(p, folder, texts, threads) for p in wanted if not p.texts}
    for each in ours.values():
        each.warm_up()
    peak, start, rounds = peak_gflops(), time.perf_counter(), 0
    while rounds < arguments.repeats and time.perf_counter() - start < arguments.seconds:
        for each in (*ours.values(), *running.values()):
            each.run()
        # The highest of all: a machine that was busy must not flatter the fraction.
        peak = {k: max(v, peak[k]) for k, v in peak_gflops().items()}
        rounds += 1
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    others = {name: each.close() for name, each in running.items()}
    others |= {p.name: peers.run_peer(p, folder, texts, threads, rounds) for p in wanted if p.texts}
    floor = max(peak.values()) * 1e9 / (4 * parameters)
    rival = max((x.tokens_per_s for name, x in others.items() if name.startswith("bergson")), default=0)
    by_products = {}
    for kind in kinds:
        set_products(model, kind)
        speed, bare = (tokens / statistics.median(ours[kind, full].seconds) for full in (True, False))
        by_products[kind] = {
            "tokens_per_s": speed,
            "tokens_per_s_without_features": bare,
            "fraction_of_floor": speed / floor,
            "fraction_of_floor_without_features": bare / floor,
            "ratio_vs_bergson": speed / rival if rival else None,
            "breakdown_s": breakdown(model, layers, sink, batches),
        }
    result = {
        "machine": machine(),
        "model": {"name": EMBEDDED, "dtype": arguments.dtype, "parameters": parameters},
        "texts": len(texts),
        "tokens": tokens,
        "padded_tokens": sum(b.ids.numel() for b in batches),
        "rounds": rounds,
        "fast": not llama.obstacle(model, layers),
        "peak_gflops": max(peak.values()),
        "peak_gflops_by_dtype": peak,
        "floor_tokens_per_s": floor,
        "products": kinds[-1],
        **by_products[kinds[-1]],
        "by_products": by_products,
        "peers": {name: other.cell for name, other in others.items()},
        "peer_features": {name: other.shape for name, other in others.items() if other.shape},
        "peak_memory_mb": memory,
    }
    show(result)
    if arguments.json:
        write_json(arguments.json, result)


def show(result: dict[str, Any], indent: int = 0) -> None:
    """Print a table, its parts indented."""
    for key, value in result.items():
        label = f"{' ' * indent}{key}"
        if isinstance(value, dict):
            print(f"{label}:")
            show(value, indent + 4)
        else:
            print(f"{label:48}{value:>14.2f}" if isinstance(value, float) else f"{label:48} {value}")


if __name__ == "__main__":
    main()

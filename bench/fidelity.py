"""Feature kinds against exact gradients: `python bench/fidelity.py [--json FILE] [--tokens 128]`.

Real mathematical texts (the folder `../shared/data` beside the checkout, or --data, and docstrings of
installed packages) and queries of GSM8K and MATH. Texts and queries are split by the hash of their
text: those with an even one may be seen by the fit, those with an odd one are measured. One pass over
the measured documents gives the exact cosines and every kind's features; `plain adapted` leaves out the
completion of the queries (jz3/features/completion.py). A kind's seconds are those of its fit and of its own
pass over some of the documents, scaled to all of them.

What was tried for `adapted`, on 128 texts and 40 queries that the fit hadn't seen (<= 128 tokens; bases of
120 documents and 60 queries, without single tokens; 2,048 numbers of 4 bits unless said; Spearman per
query, 0.9715 as is): completed queries 0.9723; a second 4-bit code for what the first leaves of the 16 best
coordinates, instead of the 16 worst, 0.9722 (8,192 numbers, 128 such codes: 0.9859 to 0.9872; not built
in); scales times 0.9, 1.1 and 1.5: 0.9710, 0.9701, 0.9697; choice by e_q e_d, (e_q + 2 e_d) e_d, e_d^2:
0.9712 to 0.9715, no matter. Uncoded 0.9735, 65,536 numbers 0.9944, all that the bases span 0.9951: numbers
left out cost most, then bases, then codes. Rotations lose to coordinates: against the score of all that the
bases span, 0.9816 as it is, 0.9800 and 0.9785 with 32 and 256 principal components over all layers of
12,036 single tokens in place of as many coordinates.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from jz3 import backend
from jz3.features import FeaturesConfig
from jz3.features.adapted import AdaptedFit, fit_adapted
from jz3.features.completion import Completion
from jz3.features.exact import ExactSink, exact_cosines
from jz3.features.extract import Projection, coding_of, extract, open_sink
from jz3.features.known import Known, fit_known
from jz3.features.readout import Readout
from jz3.features.sketch import Sketch
from jz3.files import atomic_path, read_json, write_json
from jz3.gradients import (
    Tokens,
    layer_shape,
    linear_layers,
    make_batches,
    run_pass,
    set_products,
)
from jz3.influence import agreement
from jz3.machine import PRODUCTS, best_products, products_obstacle
from jz3.models import EMBEDDED, ModelConfig, load_model, load_on_device, load_tokenizer, resolve_model
from jz3.ops.signs import signs
from jz3.stage import progress_bar
from jz3.store.format import decode_rows, encode_rows

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fidelity_texts import DATA, Texts, load_texts  # noqa: E402

PIECE = 64
"""Texts between two writes to the folder of --keep."""
FEW, FEW_QUERIES = 128, 16
"""Documents and queries that are run in float32 and in everything that passes can multiply in."""
ADAPTED = ((2048, 2), (4096, 2), (16384, 2), (1024, 4), (2048, 4), (8192, 4), (4096, 8))
"""Numbers and bits; two bits are an average."""
DEFAULT = ADAPTED[1]
LARGEST = max(k for k, _ in ADAPTED)
SKETCH = FeaturesConfig(kind="sketch", k=65536, bits=1, sketch_left=1024)
PEER = 16
"""Directions per layer and side of the random projection that peers store."""


class Peer:
    """A random two-sided projection of every layer, stored whole, as bergson and TrackStar do."""

    def __init__(self, layers: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        self._sides: dict[str, tuple[Any, Any]] = {}
        for name, layer in layers.items():
            left, right = (
                signs(0, f"peer {name} {side}", PEER, size).T.to(device, dtype) / size**0.5
                for side, size in zip(("left", "right"), layer_shape(layer), strict=True)
            )
            self._sides[name] = left, right
        self._blocks: list[torch.Tensor] = []

    def forward(self, name: str, a: torch.Tensor) -> Any:
        return a @ self._sides[name][1]

    def backward(self, name: str, kept: torch.Tensor, g: torch.Tensor) -> None:
        block = (g @ self._sides[name][0]).float().transpose(1, 2) @ kept.float()
        self._blocks.append(block.flatten(1))

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (unit vectors, as bfloat16 keeps them, and norms)."""
        values, self._blocks = torch.cat(self._blocks, 1), []
        norm = values.norm(dim=1, keepdim=True)
        return (values / norm).bfloat16().float().cpu(), norm[:, 0].cpu()


class Several:
    """Hands the same factors to several sinks."""

    def __init__(self, sinks: dict[str, Any]) -> None:
        self.sinks = sinks

    def begin(self) -> None:
        for sink in self.sinks.values():
            if begin := getattr(sink, "begin", None):
                begin()

    def forward(self, name: str, a: torch.Tensor) -> Any:
        return [sink.forward(name, a) for sink in self.sinks.values()]

    def backward(self, name: str, kept: Any, g: torch.Tensor) -> None:
        for sink, mine in zip(self.sinks.values(), kept, strict=True):
            sink.backward(name, mine, g)


class Kept:
    """What a run has computed so far, on disk, so that one that broke off goes on; nothing without a folder."""

    def __init__(self, folder: Path | None, arguments: dict[str, str]) -> None:
        self.folder = folder
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "arguments.json"
            if path.exists() and read_json(path) != arguments:
                raise SystemExit(f"{folder} belongs to a run with other arguments; name another folder")
            write_json(path, arguments)

    def tensors(self, label: str, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return the tensors kept under a label, or make and keep them."""
        if not self.folder:
            return make()
        path = self.folder / f"{label}.safetensors"
        if not path.exists():
            made = {name: tensor.contiguous() for name, tensor in make().items()}
            with atomic_path(path) as part:
                save_file(made, part)
        return load_file(path)

    def fit(self, label: str, kind: Any, make: Callable[[], Any]) -> tuple[Any, float]:
        """Return the fit kept under a label with the seconds that it took, or make and keep it."""
        start = time.perf_counter()
        if not self.folder:
            return make(), time.perf_counter() - start
        path = self.folder / f"{label}.safetensors"
        if not path.exists():
            made = make()
            seconds = torch.tensor([time.perf_counter() - start])
            self.tensors(f"{label} seconds", lambda: {"seconds": seconds})
            made.save(path)
        seconds = self.tensors(f"{label} seconds", dict)["seconds"]
        return kind.load(path, ""), float(seconds)


class Bench:
    """The model with the options of all passes."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder = resolve_model(ModelConfig(name=arguments.model))
        self.tokenizer = load_tokenizer(self.folder)
        self.model = load_on_device(self.folder, arguments.dtype)
        self.layers = linear_layers(self.model)
        self.weight = next(self.model.parameters())
        self.batch_tokens = arguments.batch_tokens

    def several(
        self, texts: Sequence[Tokens], sinks: dict[str, Any], advance: Any = lambda n: None
    ) -> dict[str, torch.Tensor]:
        """Return what every sink says of every text with its norm, and the hidden states."""
        found: dict[str, torch.Tensor] = {}
        batches = make_batches(texts, self.batch_tokens)
        for batch, result in run_pass(self.model, self.layers, Several(sinks), batches):
            parts = {"hidden": result.hidden.cpu()}
            for name, sink in sinks.items():
                parts[name], parts[f"{name} norm"] = sink.take()
            for name, rows in parts.items():
                if name not in found:
                    found[name] = torch.zeros(len(texts), *rows.shape[1:])
                found[name][batch.positions] = rows.float()
            advance(len(batch.positions))
        return found

    def pieces(self, kept: Kept, label: str, texts: Sequence[Tokens], work: Any) -> dict[str, torch.Tensor]:
        """Return what `work(texts, advance)` says of all texts, a piece at a time, so that pieces can be kept."""
        parts = []

        def timed(some: Sequence[Tokens]) -> dict[str, torch.Tensor]:
            begin = time.perf_counter()
            made = work(some, advance)
            return {**made, "seconds": torch.tensor([time.perf_counter() - begin])}

        with progress_bar(len(texts), label) as advance:
            for start in range(0, len(texts), PIECE):
                some = texts[start : start + PIECE]
                parts.append(kept.tensors(f"{label} {start}", lambda some=some: timed(some)))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def sinks(self, projections: dict[str, Projection]) -> dict[str, Any]:
        """Open the projections' sinks, the peer's and the exact one."""
        opened = {n: open_sink(p, self.model) for n, p in projections.items()}
        return {**opened, "random": Peer(self.layers, self.weight.dtype, self.weight.device)}

    def seconds(self, sample: Sequence[Tokens], sink: Any, documents: int) -> float:
        """Time a pass with one sink over some texts, scaled to all documents."""
        start = time.perf_counter()
        for _ in run_pass(self.model, self.layers, sink, make_batches(sample, self.batch_tokens)):
            sink.take()
        return (time.perf_counter() - start) * documents / len(sample)

    def timed(self, sample: Sequence[Tokens], projection: Projection, documents: int) -> float:
        """The same for a projection that runs the model in its own way."""
        start = time.perf_counter()
        extract(self.model, self.layers, sample, projection, batch_tokens=self.batch_tokens)
        return (time.perf_counter() - start) * documents / len(sample)


def coded(values: torch.Tensor, fit: AdaptedFit | Sketch | Readout, bits: int) -> torch.Tensor:
    """Return the values as their codes give them back."""
    coding = coding_of(fit, bits)
    return decode_rows(encode_rows(values, coding), coding)


def row(
    kind: str, size: int, queries: str, scores: torch.Tensor, exact: torch.Tensor, tasks: Any, seconds: float
) -> dict[str, Any]:
    """Return a line of the table: scores [N, Q] against exact cosines."""
    found, wanted = scores.double().numpy(), exact.double().numpy()
    whole = agreement(found, wanted)
    return {
        "kind": kind,
        "bytes": size,
        "queries": queries,
        "spearman": whole["spearman"],
        "task_spearman": {t: agreement(found[:, c], wanted[:, c])["task_spearman"] for t, c in tasks.items()},
        "recall": whole["recall"],
        "seconds": seconds,
    }


def by_products(
    bench: Bench,
    texts: Texts,
    fit: AdaptedFit,
    completion: Completion,
    asked: dict[str, torch.Tensor],
    target: torch.Tensor,
) -> Iterator[dict[str, Any]]:
    """Yield lines of some documents and queries against exact gradients in float32.

    What `target` has of them, which are the model's own dtype's, and the default features by what the documents'
    passes multiply in; queries' passes stay exact.
    """
    per = min(FEW_QUERIES // len(texts.queries), *map(len, texts.queries.values()))
    documents, chosen, parts, first = texts.documents[:FEW], [], [], 0
    model = load_model(bench.folder, "float32").to(bench.weight.device)
    for group in texts.queries.values():
        # A task at a time: the gradients of its queries are held.
        parts.append(
            exact_cosines(
                model, linear_layers(model), documents, group[:per], batch_tokens=bench.batch_tokens
            )
        )
        chosen += range(first, first + per)
        first += len(group)
    del model
    exact = torch.cat(parts, 1)
    tasks = {t: slice(i * per, (i + 1) * per) for i, t in enumerate(texts.queries)}
    label = f"{len(documents)} x {len(chosen)} in float32"
    yield row(f"uncompressed {label}", 0, "unseen", target[: len(documents), chosen], exact, tasks, 0)
    k, bits = DEFAULT
    part, psi = fit.top(k), completion.fold(asked["adapted"])[chosen]
    for products in (p for p in PRODUCTS[1:] if not products_obstacle(p)):
        set_products(bench.model, products)
        start = time.perf_counter()
        values = extract(bench.model, bench.layers, documents, part, batch_tokens=bench.batch_tokens).values
        seconds = time.perf_counter() - start
        scores = coded(values, part, bits) @ psi.T
        yield row(f"{products} {label}", k * bits // 8, "unseen", scores, exact, tasks, seconds)
    set_products(bench.model, "exact")


def measure(bench: Bench, texts: Texts, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the lines of the table."""
    queries = [t for group in texts.queries.values() for t in group]
    bounds = np.cumsum([0] + [len(group) for group in texts.queries.values()])
    tasks = {t: slice(a, b) for t, a, b in zip(texts.queries, bounds, bounds[1:], strict=False)}
    seen = [t for group in texts.fit_queries.values() for t in group]
    documents, sample = texts.documents, texts.documents[:: max(1, len(texts.documents) // 32)][:32]
    model, layers, many = bench.model, bench.layers, len(documents)

    def made_fit() -> AdaptedFit:
        options = {"rank": arguments.rank, "max_layers": arguments.layers}
        with progress_bar(2 * (len(seen) + len(texts.fit_documents)), "fit") as advance:
            return fit_adapted(
                model,
                "",
                layers,
                seen,
                texts.fit_documents,
                k=LARGEST + arguments.completion,
                batch_tokens=bench.batch_tokens,
                advance=advance,
                **options,
            )

    kept = Kept(arguments.keep, {k: str(v) for k, v in vars(arguments).items() if k not in ("keep", "json")})
    fit, fit_seconds = kept.fit("fit", AdaptedFit, made_fit)
    known, known_seconds = kept.fit(
        "known", Known, lambda: fit_known(model, "", layers, texts.queries, rank=arguments.known_rank)
    )
    sketch = Sketch.of("", layers, SKETCH.k, SKETCH.sketch_left, SKETCH.sketch_right, 0)
    readout = Readout("")

    exact = ExactSink()
    asked = bench.several(queries, {**bench.sinks({"adapted": fit, "sketch": sketch}), "exact": exact})
    exact.close([p for b in make_batches(queries, bench.batch_tokens) for p in b.positions])
    sinks = bench.sinks({"adapted": fit, "sketch": sketch, "known": known})
    found = bench.pieces(
        kept,
        "documents",
        documents,
        lambda some, advance: bench.several(some, {**sinks, "exact": exact}, advance),
    )
    exact.queries.clear()
    target = found["exact"] / asked["exact norm"]

    completing = {"batch_tokens": bench.batch_tokens}
    sampled = bench.pieces(
        kept,
        "completion",
        texts.fit_documents,
        lambda some, advance: {
            "values": extract(model, layers, some, fit, advance=advance, **completing).values
        },
    )
    fit_seconds += float(sampled["seconds"].sum())

    small = open_sink(fit.top(LARGEST), bench.model)
    pass_seconds = bench.seconds(sample, small, many)
    for k, bits in ADAPTED:
        part = fit.top(k)
        completion = Completion.of(fit, k, sampled["values"])
        values = coded(found["adapted"][:, completion.positions], part, bits)
        size, seconds = k * bits // 8, fit_seconds + pass_seconds
        name = f"{bits} bits" + (" each" if bits > 2 else "")
        for kind, psi in (
            ("adapted", completion.fold(asked["adapted"])),
            ("plain adapted", asked["adapted"][:, completion.positions]),
        ):
            yield row(f"{kind} {name}", size, "unseen", values @ psi.T, target, tasks, seconds)
    if best_products() != "exact":
        completion = Completion.of(fit, DEFAULT[0], sampled["values"])
        yield from by_products(bench, texts, fit, completion, asked, target)
    scores = coded(found["sketch"], sketch, SKETCH.bits) @ asked["sketch"].T
    seconds = bench.seconds(sample, sinks["sketch"], many)
    yield row("sketch", sketch.k * SKETCH.bits // 8, "unseen", scores, target, tasks, seconds)
    seconds = known_seconds + bench.seconds(sample, sinks["known"], many)
    yield row("known", 0, "known", found["known"], target, tasks, seconds)
    mine, theirs = (extract(model, layers, x, readout).values for x in (documents, queries))
    scores = coded(mine, readout, 8) @ theirs.T
    seconds = bench.timed(sample, readout, many)
    yield row("readout int8", readout.k, "unseen", scores, target, tasks, seconds)
    unit = [torch.nn.functional.normalize(x["hidden"], dim=1) for x in (found, asked)]
    yield row("hidden", 2 * unit[0].shape[1], "unseen", unit[0] @ unit[1].T, target, tasks, seconds)
    scores = found["random"] @ asked["random"].T
    size = 2 * found["random"].shape[1]
    seconds = bench.seconds(sample, sinks["random"], many)
    yield row(f"random {PEER}x{PEER}", size, "unseen", scores, target, tasks, seconds)
    if arguments.peers:
        from peers import peer_features

        texts_of_both = [*documents, *queries]
        for name, measured, rows in peer_features(bench.folder, texts_of_both, torch.get_num_threads()):
            if rows is None:
                print(f"{name:20} {measured.reason}")
                continue
            scores = torch.from_numpy(rows[:many] @ rows[many:].T)
            seconds = sum(len(t.ids) for t in documents) / measured.tokens_per_s
            yield row(name, 2 * rows.shape[1], "unseen", scores, target, tasks, seconds)


def machine() -> str:
    """Return the line that the table begins with."""
    features = backend.extension().cpu_features() if not backend.extension_missing() else "not compiled"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return f"{name or platform.machine()}, {torch.get_num_threads()} threads, {features}, torch {torch.__version__}"


def main() -> None:
    """Parse the arguments, print the table, write the JSON."""
    defaults = FeaturesConfig()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument(
        "--keep", type=Path, help="folder of what is computed; a run that broke off goes on there"
    )
    parser.add_argument("--data", type=Path, default=DATA, help="folder with samples/, targets/ and eval/")
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--tokens", type=int, default=128, help="of a text or query")
    parser.add_argument("--fit-tokens", type=int, default=0, help="of the fit's texts; 0: as many")
    parser.add_argument("--documents", type=int, default=1000, help="measured ones")
    parser.add_argument("--queries", type=int, default=40, help="measured ones, 0.2 GB each for SmolLM2-135M")
    parser.add_argument("--fit-documents", type=int, default=defaults.fit_documents)
    parser.add_argument("--fit-queries", type=int, default=defaults.fit_queries)
    parser.add_argument("--rank", type=int, default=defaults.rank)
    parser.add_argument("--layers", type=int, default=defaults.layers)
    parser.add_argument("--completion", type=int, default=defaults.completion, help="more numbers of a query")
    parser.add_argument("--known-rank", type=int, default=128)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument(
        "--peers", action="store_true", help="also those of bench/peers.py that store features"
    )
    arguments = parser.parse_args()
    if not (arguments.data / "samples").is_dir():
        raise SystemExit(f"{arguments.data} has no folder samples; say where the texts are with --data")
    print(machine())
    bench = Bench(arguments)
    texts = load_texts(arguments.data, bench.tokenizer, arguments)
    counts = {name: len(getattr(texts, name)) for name in ("documents", "fit_documents")}
    print(f"{counts}, {arguments.queries} measured queries, {arguments.fit_queries} in the fit")
    print(f"{'kind':28}{'bytes':>8}{'queries':>9}{'Spearman':>10}{'task Spearman':>26}{'recall':>8}{'s':>8}")
    rows = []
    for line in measure(bench, texts, arguments):
        rows.append(line)
        per_task = ", ".join(f"{t} {x:.3f}" for t, x in line["task_spearman"].items())
        print(
            f"{line['kind']:28}{line['bytes']:>8}{line['queries']:>9}{line['spearman']:>10.3f}{per_task:>26}"
            f"{line['recall']:>8.2f}{line['seconds']:>8.0f}",
            flush=True,
        )
    if arguments.json:
        table = {key: str(value) for key, value in vars(arguments).items() if key != "json"}
        write_json(arguments.json, {"machine": machine(), "arguments": table, "rows": rows})


if __name__ == "__main__":
    main()

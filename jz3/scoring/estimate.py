"""What `jz3 score` will cost, measured on a few batches of the corpus or computed on paper."""

import dataclasses
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from jz3.errors import Jz3Error
from jz3.scoring.config import RunSettings, ScoreSettings

PEAK_TFLOPS = {"A100": 312.0, "L40S": 362.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0}
"""Dense bfloat16 peak of one GPU, from the vendor's data sheets."""
CALIBRATION = (64, 16, 8)
"""Texts that are scored to measure the rate, texts in the fit, queries per target."""
TOKEN_SAMPLE = 1024
"""Texts that are tokenised to measure their length."""
ACTIVATIONS_7B = 5e6
"""Bytes a token holds between forward and backward pass of a 7B model; it grows with parameters^0.54
(0.6 MB for 135M)."""
WIDTHS_7B = 2.5e6
"""Sum of all linear layers' inputs and outputs of a 7B model; grows with parameters^(2/3)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperSettings:
    """A corpus and machines that are not here, for --dry-run on paper."""

    documents: int = 0
    """Texts of the corpus; 0: measure the given corpus on this machine instead."""
    tokens_per_document: float = 500.0
    bytes_per_document: float = 1024.0
    """Of the corpus's text."""
    params: float = 7e9
    """Of the model."""
    gpus: int = 8
    gpu: str = "H100"
    """A100, L40S, H100, H200 or B200; its bfloat16 peak is what utilisation is a share of."""
    utilisation: float = 0.5
    """Share of the peak that is assumed."""
    tokens_per_second: float = 0.0
    """A GPU's measured rate (from --dry-run on it) instead of that assumption."""

    def __post_init__(self) -> None:
        if self.gpu not in PEAK_TFLOPS:
            raise ValueError(f"--gpu must be one of {', '.join(PEAK_TFLOPS)}, got {self.gpu!r}")
        for name in ("params", "gpus", "tokens_per_document", "bytes_per_document"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(self, name)}")
        for name in ("documents", "tokens_per_second"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be 0 or more, got {getattr(self, name)}")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"--utilisation must be above 0 and at most 1, got {self.utilisation}")


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run takes."""

    documents: int
    tokens: float
    hours: float
    """On all workers together."""
    tokens_per_second: float
    """Of one worker."""
    files: int
    score_bytes: float
    feature_bytes: float
    memory: float
    """Bytes of a worker's device, at its peak."""


def sizes(settings: ScoreSettings, documents: int, shards: int, targets: int) -> tuple[int, float, float]:
    """Return (files, bytes of scores, bytes of kept features) of a run.

    A shard has its scores, rejects, timing and claim. A row of scores holds id, place and text hash (about
    32 bytes compressed) and float32 columns.
    """
    per_task = 1 + sum(b in settings.baselines for b in ("hidden", "bm25"))
    columns = 1 + targets * per_task + sum(b in settings.baselines for b in ("loss", "random"))
    stores = max(len(settings.checkpoint), 1) if settings.keep_features else 0
    features = documents * stores * (settings.coordinates * settings.bits / 8 + 12)
    return shards * (4 + 2 * stores) + 8, documents * (32.0 + 4 * columns), features


def paper_cost(paper: PaperSettings, settings: ScoreSettings, targets: int) -> Cost:
    """Compute the cost of a corpus that is not here.

    Per token 4 N flop (forward pass and activation gradients of N parameters; the weight-gradient
    product is never done) and 2 (rank + BUCKETS) W for the projections and the norms' sketch (W: the layers'
    widths), at the assumed share of the GPU's peak; once per checkpoint.
    """
    from jz3.gradients.products import BUCKETS

    length = min(paper.tokens_per_document, settings.max_tokens)
    tokens = paper.documents * length
    widths = WIDTHS_7B * (paper.params / 7e9) ** (2 / 3)
    flop = 4 * paper.params + 2 * (settings.rank + BUCKETS) * widths
    rate = paper.tokens_per_second or paper.utilisation * PEAK_TFLOPS[paper.gpu] * 1e12 / flop
    passes = max(len(settings.checkpoint), 1)
    shards = -(-paper.documents // settings.shard_documents)
    files, scores, features = sizes(settings, paper.documents, shards, targets)
    memory = passes * 2 * paper.params + settings.batch_tokens * ACTIVATIONS_7B * (paper.params / 7e9) ** 0.54
    hours = tokens * passes / rate / paper.gpus / 3600
    return Cost(paper.documents, tokens, hours, rate, files, scores, features, memory)


def print_paper(paper: PaperSettings, settings: ScoreSettings, targets: int) -> None:
    """Print the cost on paper with its assumptions."""
    from jz3.gradients.products import BUCKETS

    cost = paper_cost(paper, settings, targets)
    rate = (
        "measured"
        if paper.tokens_per_second
        else f"assumed: {paper.utilisation:.0%} of {PEAK_TFLOPS[paper.gpu]:,.0f} TFLOP/s"
    )
    print(f"on paper: {paper.params:.3g} parameters, {paper.gpus} x {paper.gpu}; nothing was run")
    _print(cost, settings, paper.gpus, paper.documents * paper.bytes_per_document)
    print(
        f"  rate              {rate}; 4 N + 2 (rank + {BUCKETS}) W flop a token, W = {WIDTHS_7B:.3g} at 7B\n"
        f"  memory            2 bytes a parameter and checkpoint + {settings.batch_tokens:,} tokens x "
        f"{ACTIVATIONS_7B / 1e6:.0f} MB (at 7B)"
    )


def print_measured(
    corpus: tuple[str, ...], targets: dict[str, Path], settings: ScoreSettings, run: RunSettings
) -> None:
    """Plan the corpus, score a few batches of it on this machine and print what the whole will take.

    Nothing is left behind; the fit is a small one, which costs as much per document as a large one.

    Raises:
        Jz3Error: the corpus or a target can't be used.
    """
    import torch

    from jz3.scoring.job import cpu_threads, no_usable_text, prepare
    from jz3.scoring.plan import make_plan
    from jz3.scoring.reading import Reader
    from jz3.scoring.shard import Scorer
    from jz3.scoring.workers import default_threads, default_workers, print_error
    from jz3.stage import peak_memory, reset_peak_memory

    workers = run.workers or default_workers()
    texts, documents, queries = CALIBRATION
    small = dataclasses.replace(
        settings,
        threads=settings.threads or default_threads(workers),
        fit_documents=documents,
        queries=queries,
        keep_features=False,
        exact_documents=0,
    )
    plan = make_plan(corpus, small, targets, say=print_error(sys.stderr))
    with tempfile.TemporaryDirectory() as temporary, cpu_threads(small.threads):
        out = Path(temporary)
        job = prepare(out, plan, targets)
        reset_peak_memory()
        scorer = Scorer(out, plan, job)
        sample = Reader(plan).sample(TOKEN_SAMPLE, "estimate")
        lengths, usable = [], []
        for text in sample:
            try:
                lengths.append(len(settings.tokens_of(scorer.tokenizer, text).ids))
                usable.append(text)
            except ValueError:
                continue
        if not lengths:
            raise Jz3Error(no_usable_text(Reader(plan)))
        scorer.score(iter(usable[:8]))  # the first batches also load kernels
        start = time.monotonic()
        scored = scorer.score(iter(usable[:texts]))
        rate = sum(scored.tokens) / (time.monotonic() - start)
        on_gpu = torch.cuda.is_available()
        memory = torch.cuda.max_memory_allocated() if on_gpu else peak_memory()
    share = len(lengths) / len(sample)
    total = plan.rows * share * sum(lengths) / len(lengths)
    shards = len(plan.shards)
    files, scores, features = sizes(settings, plan.rows, shards, len(targets))
    cost = Cost(plan.rows, total, total / rate / workers / 3600, rate, files, scores, features, float(memory))
    print(
        f"measured here: {len(scored.tokens)} texts scored, {len(sample)} tokenised; {workers} worker(s), "
        f"{'GPU' if on_gpu else f'{small.threads} CPU thread(s)'} each; nothing was written"
    )
    _print(cost, settings, workers, float(plan.size))


def _print(cost: Cost, settings: ScoreSettings, workers: int, size: float) -> None:
    hours = f"{cost.hours:,.1f}" if cost.hours >= 0.1 else f"{cost.hours:.4f}"
    lines = [
        ("documents", f"{cost.documents:,}, {_bytes(size)}"),
        ("tokens", f"{cost.tokens:,.0f} ({cost.tokens / max(cost.documents, 1):,.0f} a document)"),
        ("hours", f"{hours} on {workers} worker(s) of {cost.tokens_per_second:,.0f} tokens a second"),
        ("scores", _bytes(cost.score_bytes)),
        ("features", _bytes(cost.feature_bytes) if cost.feature_bytes else "not kept (--keep-features)"),
        ("files", f"{cost.files:,}, {settings.shard_documents:,} documents a shard"),
        ("memory a worker", _bytes(cost.memory)),
    ]
    for name, value in lines:
        print(f"  {name:17} {value}")


def _bytes(value: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"

"""Settings of `jz3 score`: what the scores depend on, how the work is run, what is chosen."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import UseAppendAction

from jz3.corpus.readers import SourceText
from jz3.gradients.tokens import Tokens, tokenize_text
from jz3.machine import PRODUCTS
from jz3.models import EMBEDDED
from jz3.store import CODES

KINDS = ("adapted", "known", "sketch", "readout")
BASELINES = ("hidden", "bm25", "loss", "random")
SET_CHOOSERS = ("matching", "diverse", "preconditioned")
"""Of jz3.selection.sets those that know a target by the mean of its queries, which is what a run keeps."""
DEFAULT_SHARE, DEFAULT_MOST = 0.1, 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSettings:
    """Everything that a score depends on; a run with other settings is another run."""

    model: str = EMBEDDED
    """Folder or hub name of the model."""
    checkpoint: UseAppendAction[tuple[str, ...]] = ()
    """PATH=WEIGHT, once per checkpoint: scores are the mean over checkpoints by weight (LESS weighs by
    learning rate); instead of --model. The first one's tokenizer is used."""
    dtype: str = "auto"
    """`bfloat16`, `float32`, or `auto`: what the machine that makes the plan multiplies faster."""
    products: str = "auto"
    """In what the documents' passes multiply: `exact` (the dtype), of Llama-like models on a CPU also `int8_backward`
    (8 bits on the way back, with AVX-512 VNNI), `int8` (8 bits, faster and coarser) or `int16` (16 bits, with AVX2), or
    `auto`: the fastest but `int8` on the machine that makes the plan."""
    kind: str = "adapted"
    """`adapted` (fitted to queries and a sample of the corpus), `known` (contracted with the queries in
    the pass; needs no sample), `sketch` (random) or `readout` (random, forward pass only)."""
    fit: str = ""
    """A fit of an earlier run (fit.safetensors) instead of a new one."""
    coordinates: int = 4096
    """Numbers per document; `sketch` usually wants 8192 or, with --bits 1, 65536."""
    rank: int = 128
    """adapted, known: basis vectors per layer and side."""
    layers: int = 256
    """adapted: layers that may give coordinates."""
    fit_documents: int = 400
    """adapted: documents in the fit's sample, drawn by row number; 0: the queries alone."""
    exact_documents: int = 32
    """Documents, unseen by the fit, on which features are compared with exact gradients; 0: none."""
    exact_queries: int = 4
    """Queries per target in that comparison; a pass over its documents each."""
    queries: int = 200
    """Queries per target, drawn by hash; 0: all."""
    query_tokens: int = 512
    """Queries are cut at this length."""
    max_tokens: int = 512
    """Documents are cut at this length, start tokens included."""
    reduction: str = "mean"
    """A text's loss is the `mean` or the `sum` over its scored tokens."""
    batch_tokens: int = 4096
    """Padded tokens per forward and backward pass."""
    window: int = 512
    """Documents that are read, tokenised and sorted by length together; memory grows with it."""
    shard_documents: int = 2048
    """Lines or rows per shard: what a kill can lose."""
    text_field: str = "text"
    """The corpus's field with the text; several joined by `+`, nested ones by dots."""
    id_field: str = "id"
    """The corpus's field with the id; a text without one is named by its hash."""
    source_field: str = "source"
    """The corpus's field with the source; a text without one is named by its file."""
    prompt_field: str = ""
    """A field of the corpus: where a text begins with what it holds, only the rest is scored (a text without more is
    rejected). Empty: all of every text is."""
    max_line_bytes: int = 16 << 20
    """A longer line is rejected."""
    problem_field: str = ""
    """The targets' field with the problem; found by itself if it is question or problem."""
    solution_field: str = ""
    """The targets' field with the solution; found by itself if it is answer, solution or completion. Where
    --problem-field is given and none of these is there, all of that field is scored."""
    baselines: tuple[str, ...] = ("hidden", "bm25", "loss", "random")
    """Columns without gradients: hidden (RDS+: cosine of position-weighted means of the last hidden states),
    bm25 (document frequencies from a sample; needs bm25s), loss, random."""
    keep_features: bool = False
    """Also write every document's code into OUT/store (of several checkpoints: OUT/store-N, which `jz3 index`
    and `jz3 query` search together)."""
    bits: int = 2
    """keep_features: bits per number; with 2 those of `adapted` get 1 to 8 each, 2 on average."""
    threads: int = 0
    """CPU threads a worker, part of what identifies a run since sums round differently with another
    number. 0: what the machine has for each when the plan is made, cores / workers, with GPUs cores / GPUs;
    so without GPUs give it where runs with other numbers of workers are to be equal to the byte."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"--kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind == "known" and self.keep_features:
            raise ValueError(
                "--keep-features wants --kind adapted or sketch: `known` has no features to keep"
            )
        if unknown := sorted(set(self.baselines) - set(BASELINES)):
            raise ValueError(f"--baselines: unknown {unknown[0]!r}; known: {', '.join(BASELINES)}")
        if self.bits not in CODES:
            raise ValueError(f"--bits must be one of {sorted(CODES)}, got {self.bits}")
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"--dtype must be auto, bfloat16 or float32, got {self.dtype!r}")
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"--reduction must be mean or sum, got {self.reduction!r}")
        if self.products not in PRODUCTS:
            raise ValueError(f"--products must be one of {', '.join(PRODUCTS)}, got {self.products!r}")
        for name in ("coordinates", "rank", "layers", "max_tokens", "query_tokens", "batch_tokens", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(self, name)}")
        for name in ("fit_documents", "exact_documents", "exact_queries", "queries", "threads"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"--{name.replace('_', '-')} must not be negative, got {getattr(self, name)}"
                )
        if self.shard_documents < 1 or self.max_line_bytes < 1:
            raise ValueError("--shard-documents and --max-line-bytes must be positive")
        if self.fit and len(self.checkpoint) > 1:
            raise ValueError("--fit belongs to one model; with several checkpoints every one is fitted anew")

    def tokens_of(self, tokenizer: Any, text: SourceText) -> Tokens:
        """Tokenise a text of the corpus.

        Raises:
            RefusedText: there is nothing to score.
        """
        prompt = text.meta.get(self.prompt_field, "")
        # A book's tokens would take longer than the pass over its first few hundred.
        return tokenize_text(tokenizer, text.where, text.text, self.max_tokens, "begin", prompt)

    def checkpoints(self) -> list[tuple[str, float]]:
        """Return (model, weight) of every checkpoint, the weights summing to 1."""
        if not self.checkpoint:
            return [(self.model, 1.0)]
        pairs = [split_weight(text) for text in self.checkpoint]
        try:
            weights = [float(value) for _, value in pairs]
        except ValueError as error:
            raise ValueError(f"--checkpoint takes PATH=WEIGHT: {error}") from error
        if not all(0 < w < float("inf") for w in weights):
            raise ValueError(f"--checkpoint: weights must be positive, got {weights}")
        return [(path, w / sum(weights)) for (path, _), w in zip(pairs, weights, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChooseSettings:
    """How the best documents are chosen from the scores; may be changed in a later run."""

    k: int = 0
    """How many to choose; 0: by --share."""
    share: float = 0.0
    """Share of the scored documents to choose; 0: a tenth, but at most 10,000. The memory of the choice
    grows with it, by about 6 KB a text, and not with the corpus."""
    combine: str = "mean"
    """`mean` or `max` of the tasks' scores, or `quota`: the tasks choose in turn."""
    chooser: str = "influence"
    """`influence`, the texts with the best scores, or a set among the `candidates` best: `matching`, `diverse` or
    `preconditioned` (jz3.selection.sets; wants --keep-features and --combine mean)."""
    candidates: int = 20_000
    """Texts with the best scores among which a set is chosen; each takes 4 bytes of memory per number. With
    --source-quota they may leave fewer than --k."""
    source_quota: float = 1.0
    """At most this share of the chosen from one source."""
    near_duplicates: bool = True
    """Leave out texts that nearly repeat a better one (MinHash, needs rensa)."""
    similarity: float = 0.8
    """Estimated Jaccard similarity from which on a text counts as a near duplicate."""

    def __post_init__(self) -> None:
        if self.k < 0 or not 0 <= self.share <= 1:
            raise ValueError(f"--k must be 0 or more, --share in 0..1; got {self.k} and {self.share}")
        if self.combine not in ("mean", "max", "quota"):
            raise ValueError(f"--combine must be mean, max or quota, got {self.combine!r}")
        if self.chooser not in ("influence", *SET_CHOOSERS):
            known = ", ".join(("influence", *SET_CHOOSERS))
            raise ValueError(f"--chooser must be one of {known}, got {self.chooser!r}")
        if self.of_set and self.combine != "mean":
            raise ValueError(f"--chooser {self.chooser} wants --combine mean, got {self.combine!r}")
        if self.candidates < 1 or (self.of_set and self.candidates < self.k):
            raise ValueError(f"--candidates must be at least 1 and --k ({self.k}), got {self.candidates}")
        if not 0 < self.source_quota <= 1:
            raise ValueError(f"--source-quota must be above 0 and at most 1, got {self.source_quota}")

    @property
    def of_set(self) -> bool:
        """Whether a set is chosen instead of the best single texts."""
        return self.chooser in SET_CHOOSERS

    def count(self, documents: int) -> int:
        """Return how many of so many documents are chosen."""
        if self.k:
            return min(self.k, documents)
        share = self.share or DEFAULT_SHARE
        count = min(documents, max(1, round(share * documents)))
        return count if self.share else min(count, DEFAULT_MOST)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """Who does the work; at equal --threads the scores don't depend on it, to the byte."""

    workers: int = 0
    """Local processes; 0: one per GPU, or one where there is none."""
    worker: str = ""
    """I/N: do part I (from 0) of N of the shards in this process and choose nothing; for any scheduler.
    The first one plans and fits, the others wait for it."""
    slurm: bool = False
    """Submit the fits, the shards (an array of --workers tasks) and the choice through sbatch, each after
    the one before, and wait. The nodes settle --dtype auto and --threads 0, not this machine."""
    slurm_arguments: str = ""
    """Further arguments of sbatch, e.g. "--partition=gpu --gres=gpu:1", for all jobs."""
    ray: str = ""
    """Address of a Ray cluster (`auto`: the running one, `local`: start one here)."""
    restarts: int = 3
    """How often a local worker that died is started again, per worker, before it finishes another shard."""
    limit_hours: float = 0.0
    """Stop at a shard boundary before so many hours are over; 0: no limit."""
    dry_run: bool = False
    """Print documents, tokens, bytes, files, memory and hours, from costs measured on a few batches."""

    def __post_init__(self) -> None:
        if self.workers < 0 or self.restarts < 0 or self.limit_hours < 0:
            raise ValueError("--workers, --restarts and --limit-hours must not be negative")
        if sum((bool(self.worker), self.slurm, bool(self.ray))) > 1:
            raise ValueError("--worker, --slurm and --ray exclude each other")
        if self.slurm_arguments and not self.slurm:
            raise ValueError(f"--slurm-arguments belong to --slurm, got {self.slurm_arguments!r} without it")

    def part(self) -> tuple[int, int]:
        """Return (I, N) of --worker."""
        number, _, count = self.worker.partition("/")
        if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
            raise ValueError(f"--worker takes I/N with I from 0 to N - 1, got {self.worker!r}")
        return int(number), int(count)


def split_weight(text: str) -> tuple[str, str]:
    """Split a checkpoint's PATH=WEIGHT at the last `=`, as paths may hold others."""
    left, sign, right = text.rpartition("=")
    if not (sign and left and right):
        raise ValueError(f"--checkpoint takes PATH=WEIGHT, got {text!r}")
    return left, right


def split_targets(texts: tuple[str, ...]) -> dict[str, Path]:
    """Split NAME=FILE of every target."""
    targets: dict[str, Path] = {}
    for text in texts:
        name, sign, path = text.partition("=")
        if not (sign and name and path):
            raise ValueError(f"--target takes NAME=FILE, got {text!r}")
        if name in targets or name == "control" or ":" in name:
            raise ValueError(
                f"--target: the name {name!r} is taken or holds ':'; the control has an option of its own"
            )
        targets[name] = Path(path)
    if not targets:
        raise ValueError("--target NAME=FILE is missing: what are the texts to help with?")
    return targets

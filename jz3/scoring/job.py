"""What a run computes once before its shards: queries, fits, and what turns features into scores."""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jz3.bm25 import Bm25
from jz3.errors import Jz3Error
from jz3.features import BY_PRODUCTS
from jz3.features.adapted import AdaptedFit, fit_adapted
from jz3.features.exact import exact_cosines
from jz3.features.extract import Projection, extract, model_hash
from jz3.features.known import Known, fit_known
from jz3.features.readout import Readout
from jz3.features.sketch import Sketch
from jz3.files import (
    atomic_path,
    canonical_json,
    hash_file,
    hash_text,
    locked,
    read_json,
    write_json,
    write_jsonl,
    write_tensors,
)
from jz3.gradients import (
    RefusedText,
    Tokens,
    layer_shape,
    linear_layers,
    set_products,
    tokenize_query,
)
from jz3.influence import agreement
from jz3.models import ModelConfig, load_on_device, load_tokenizer, resolve_model
from jz3.records import Query, Reject
from jz3.scoring.config import ScoreSettings
from jz3.scoring.plan import PREPARING, Plan
from jz3.scoring.reading import Reader
from jz3.scoring.targets import read_target, summary
from jz3.stage import release_memory
from jz3.store import StoreInfo, module_hash

PROJECTIONS: dict[str, tuple[str, Any]] = {
    "adapted": ("fit.safetensors", AdaptedFit),
    "known": ("known.safetensors", Known),
    "sketch": ("sketch.json", Sketch),
    "readout": ("readout.json", Readout),
}
"""Per kind its file in the folder of a checkpoint, and its class."""
FIT_BATCH_TOKENS = 1024
BM25_DOCUMENTS = 4000
"""Documents, at least, of which the baseline bm25 counts the words."""
SKETCH_SHAPE = (512, 32)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model of the run with what its features are read with."""

    model: str
    """Folder."""
    model_hash: str
    weight: float
    kind: str
    k: int
    projection_hash: str
    module_hash: str
    """Of the table of layers whose gradients count."""
    fidelity: dict[str, float]
    """How features compare with exact gradients, see `jz3.influence.agreement`; empty if not measured."""
    products: str = "exact"
    """In what the passes multiply, settled."""


@dataclass(frozen=True, slots=True)
class Job:
    """What every worker needs to know; the arrays lie in OUT/fit/N."""

    plan_key: str
    tasks: list[str]
    """The tasks in the order of their columns, the control last if there is one."""
    checkpoints: list[Checkpoint]

    @property
    def key(self) -> str:
        """Identifies plan, models and fits in every file of scores."""
        made = [[c.model_hash, c.projection_hash, c.weight] for c in self.checkpoints]
        return hash_text(canonical_json([self.plan_key, self.tasks, made]))

    def store_info(self, number: int, settings: ScoreSettings) -> StoreInfo:
        """Return what the rows of a checkpoint's store are."""
        c = self.checkpoints[number]
        return StoreInfo(
            kind=c.kind,
            k=c.k,
            bits=settings.bits,
            model_hash=c.model_hash,
            projection_hash=c.projection_hash,
            reduction=settings.reduction,
            module_hash=c.module_hash,
            seed=settings.seed,
            products=c.products,
        )


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Compute with so many CPU threads: another number rounds sums differently."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_job(out: Path) -> Job:
    """Read what `prepare` left in a run's folder."""
    table = read_json(out / "job.json")
    return Job(table["plan_key"], table["tasks"], [Checkpoint(**c) for c in table["checkpoints"]])


def prepare(
    out: Path, plan: Plan, targets: dict[str, Path], say: Callable[[str], None] = lambda line: None
) -> Job:
    """Make the run's fits and query features, or check that those it has belong to its models.

    Args:
        out: the run's folder.
        plan: its plan.
        targets: per target its file, the negative control's under `control`.
        say: told one line per step.

    Raises:
        Jz3Error: a target or the corpus's sample is unusable, or a model isn't the one of the fit.
    """
    with locked(out / PREPARING), cpu_threads(plan.settings.threads):
        if (out / "job.json").is_file():
            job = load_job(out)
            _check(out, plan, job)
            return job
        tasks = [name for name in targets if name != "control"]
        tasks += ["control"] if "control" in targets else []
        queries: dict[str, list[Query]] = {}
        rejects: list[Reject] = []
        for name in tasks:
            queries[name], refused = read_target(name, targets[name], plan.settings)
            rejects += refused
        reader = Reader(plan)
        if field := plan.settings.prompt_field:
            drawn = reader.sample(plan.settings.fit_documents, "fit")
            if drawn and not any(field in text.meta for text in drawn):
                say(
                    f"none of the {len(drawn)} texts drawn has the field {field!r} of --prompt-field: all of every "
                    "text is scored"
                )
        checkpoints = []
        for number, (model, weight) in enumerate(plan.settings.checkpoints()):
            say(f"fit {number + 1} of {len(plan.settings.checkpoints())}: {model}")
            checkpoints.append(_prepare_checkpoint(out, reader, number, model, weight, queries, rejects))
            release_memory()
        if "bm25" in plan.settings.baselines:
            count = max(10 * plan.settings.fit_documents, BM25_DOCUMENTS)
            texts = [text.text for text in reader.sample(count, "bm25")]
            Bm25.count(texts, {t: queries[t] for t in tasks}).save(out / "bm25.json")
        reader.close()
        write_jsonl(out / "queries.jsonl", (q.to_json() for group in queries.values() for q in group))
        write_jsonl(out / "targets.rejects.jsonl", (r.to_json() for r in rejects))
        if rejects:
            where = out / "targets.rejects.jsonl"
            say(f"of the targets' rows {len(rejects):,} are refused ({summary(rejects)}); see {where}")
        job = Job(plan.key, tasks, checkpoints)
        write_json(out / "job.json", dataclasses.asdict(job))
        return job


def _check(out: Path, plan: Plan, job: Job) -> None:
    if job.plan_key != plan.key:
        raise Jz3Error(f"{out / 'job.json'} belongs to another plan; delete {out} or use another folder")
    for checkpoint, (name, _) in zip(job.checkpoints, plan.settings.checkpoints(), strict=True):
        check_model(out, name, checkpoint)


def check_model(out: Path, name: str, checkpoint: Checkpoint) -> Path:
    """Return the folder of a checkpoint's model, if it is still the one of the run.

    Raises:
        Jz3Error: it is missing or another one.
    """
    folder = resolve_model(ModelConfig(name=name))
    found = model_hash(folder)
    if found != checkpoint.model_hash:
        raise Jz3Error(
            f"the model {name!r} changed: {out} was made with {checkpoint.model_hash}, it is {found} now; "
            "restore it or use another folder"
        )
    return folder


def _prepare_checkpoint(
    out: Path,
    reader: Reader,
    number: int,
    name: str,
    weight: float,
    queries: dict[str, list[Query]],
    rejects: list[Reject],
) -> Checkpoint:
    import torch

    settings = reader.plan.settings
    folder = resolve_model(ModelConfig(name=name))
    tokenizer = load_tokenizer(resolve_model(ModelConfig(name=settings.checkpoints()[0][0])))
    tokens: dict[str, list[Tokens]] = {}
    for task, group in queries.items():
        tokens[task] = []
        refused: list[Reject] = []
        for q in group:
            try:
                row = tokenize_query(tokenizer, q.id, q.prompt, q.completion, settings.query_tokens)
                tokens[task].append(row)
            except RefusedText as error:
                refused.append(Reject(id=q.id, stage="targets", reason=error.reason, detail=str(error)))
        rejects += refused if not number else []
        if not tokens[task]:
            raise Jz3Error(f"target {task!r} has no query with anything to score ({summary(refused)})")
    model = load_on_device(folder, settings.dtype)
    products = set_products(model, settings.products if settings.kind in BY_PRODUCTS else "exact")
    _check_vocabulary(model, tokenizer, name)
    identity = model_hash(folder)
    path, kind = _projection(out, reader, number, model, identity, tokenizer, tokens)
    projection: Projection = PROJECTIONS[kind][1].load(path, identity)
    readout, hidden = [], []
    layers = linear_layers(model)
    for column, (task, group) in enumerate(tokens.items()):
        found = extract(
            model,
            layers,
            group,
            projection,
            batch_tokens=settings.batch_tokens,
            reduction=settings.reduction,
            side="query",
        )
        good = torch.isfinite(found.norm) & (found.norm > 0) & torch.isfinite(found.values).all(1)
        if not bool(good.any()):
            raise Jz3Error(f"target {task!r}: no query has a finite gradient of the model {name!r}")
        one = torch.zeros(projection.k, dtype=torch.float32)
        if kind == "known":
            one[column] = 1
        else:
            one = found.values[good].mean(0)
        readout.append(one)
        unit = torch.nn.functional.normalize(found.hidden[good], dim=1)
        hidden.append(unit.mean(0))
    tasks = {"readout": torch.stack(readout, 1), "hidden": torch.stack(hidden, 1)}
    write_tensors(path.with_name("tasks.safetensors"), tasks)
    measured = {} if kind == "known" else _fidelity(reader, model, layers, projection, tokenizer, tokens)
    table = module_hash({n: layer_shape(m) for n, m in layers.items()})
    return Checkpoint(
        str(folder), identity, weight, kind, projection.k, hash_file(path), table, measured, products
    )


def _fidelity(
    reader: Reader,
    model: Any,
    layers: dict[str, Any],
    projection: Projection,
    tokenizer: Any,
    tokens: dict[str, list[Tokens]],
) -> dict[str, float]:
    """Compare cosines of features with exact ones, on documents that the fit hasn't seen."""
    import torch

    settings = reader.plan.settings
    seen = {text.where for text in reader.sample(settings.fit_documents, "fit")}
    documents = []
    for text in reader.sample(settings.exact_documents + len(seen), "exact"):
        if text.where not in seen and len(documents) < settings.exact_documents:
            with contextlib.suppress(RefusedText):
                documents.append(settings.tokens_of(tokenizer, text))
    queries = [
        t for task, group in tokens.items() if task != "control" for t in group[: settings.exact_queries]
    ]
    if len(documents) < 2 or not queries:
        return {}
    options: dict[str, Any] = {"batch_tokens": settings.batch_tokens, "reduction": settings.reduction}
    found = extract(model, layers, documents, projection, **options).values
    wanted = extract(model, layers, queries, projection, side="query", **options).values
    # One query at a time: a whole gradient is as large as the model.
    options["batch_tokens"] = FIT_BATCH_TOKENS
    exact = torch.cat([exact_cosines(model, layers, documents, [q], **options) for q in queries], 1).cpu()
    good = torch.isfinite(exact).all(1) & torch.isfinite(found).all(1)
    if int(good.sum()) < 2:
        return {}
    scores, cosines = (found[good] @ wanted.T).numpy(), exact[good].numpy()
    # Texts that are all equal have no order to agree about.
    if not all(np.ptp(values, axis=0).all() for values in (scores, cosines)):
        return {}
    measured = agreement(scores, cosines)
    return {"documents": float(good.sum()), "queries": float(len(queries)), **measured}


def no_usable_text(reader: Reader) -> str:
    """Say that none of the texts drawn can be used, and why."""
    refused = reader.refused()
    reader.close()
    why = summary(refused) if refused else "they are too short"
    return f"none of the texts drawn from the corpus can be used ({why}); --text-field names the field with the text"


def _check_vocabulary(model: Any, tokenizer: Any, name: str) -> None:
    size = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > size:
        raise Jz3Error(
            f"the model {name!r} has {size} embeddings, the tokenizer {len(tokenizer)} tokens: "
            "they don't belong together"
        )


def _projection(
    out: Path, reader: Reader, number: int, model: Any, identity: str, tokenizer: Any, tokens: dict[str, list]
) -> tuple[Path, str]:
    """Make a checkpoint's projection, or copy the one that was given; return its file and kind."""
    settings = reader.plan.settings
    kind = settings.kind
    if settings.fit:
        given = Path(settings.fit)
        kinds = [k for k, (file, _) in PROJECTIONS.items() if given.name == file and k != "known"]
        kind = kinds[0] if kinds else "adapted"
        if settings.kind not in (kind, "adapted"):  # the default, which nobody needs to have meant
            raise Jz3Error(f"--fit {given} is of the kind {kind}, not {settings.kind} as --kind says")
    path = out / "fit" / str(number) / PROJECTIONS[kind][0]
    if path.exists():
        return path, kind
    layers = linear_layers(model)
    if settings.fit:
        given = Path(settings.fit)
        if not given.is_file():
            raise Jz3Error(f"--fit {given} is no file")
        PROJECTIONS[kind][1].load(given, identity)
        with atomic_path(path) as part:
            shutil.copyfile(given, part)
    elif kind == "sketch":
        Sketch.of(identity, layers, settings.coordinates, *SKETCH_SHAPE, settings.seed).save(path)
    elif kind == "readout":
        Readout(identity, settings.coordinates, seed=settings.seed).save(path)
    elif kind == "known":
        fit_known(
            model,
            identity,
            layers,
            tokens,
            per="task",
            rank=min(settings.rank, 64),
            batch_tokens=FIT_BATCH_TOKENS,
            reduction=settings.reduction,
            seed=settings.seed,
        ).save(path)
    else:
        documents = []
        for text in reader.sample(settings.fit_documents, "fit"):
            try:
                documents.append(settings.tokens_of(tokenizer, text))
            except RefusedText:
                continue  # the text's shard rejects it with the reason
        if settings.fit_documents and not documents:
            raise Jz3Error(no_usable_text(reader))
        seen = [t for task, group in tokens.items() if task != "control" for t in group]
        fit_adapted(
            model,
            identity,
            layers,
            seen,
            documents,
            k=settings.coordinates,
            rank=settings.rank,
            max_layers=settings.layers,
            batch_tokens=FIT_BATCH_TOKENS,
            reduction=settings.reduction,
            seed=settings.seed,
        ).save(path)
    return path, kind

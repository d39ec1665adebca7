"""What a recipe will cost before it runs: texts, tokens, calls, bytes, GPU hours and money."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from jz3.config import Recipe
from jz3.corpus.config import SourceConfig
from jz3.errors import Jz3Error
from jz3.evaluation.config import EvaluationConfig


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """One stage's cost."""

    stage: str
    items: str
    tokens: float = 0.0
    gpu_hours: float = 0.0
    calls: int = 0
    bytes: float = 0.0
    usd: float = 0.0


def estimate(recipe: Recipe, last: str = "report") -> list[StageEstimate]:
    """Compute the cost of every stage up to `last` from counts and the recipe's assumptions.

    FLOP per token: gradients 4 N (forward and activation gradients; the weight-gradient product is
    never done), of `less` for every checkpoint and in its warm-up, of `readout` 2 N; training 6 N,
    generation 2 N, with N the model's parameters.

    Raises:
        ValueError: the model's parameters or the corpus's size are neither known nor given, or the
            stage is unknown.
    """
    from jz3.pipeline import stages_up_to

    wanted = {stage.name for stage in stages_up_to(last)}
    a = recipe.estimate
    n = a.parameters or _parameters(recipe.model.name)
    synthesiser = a.synthesiser_parameters or _parameters(recipe.synthesiser.base) or n
    trained = a.training_parameters or _parameters(recipe.training.base) or n
    sizes = {s.name: _texts(s) for s in recipe.corpus.sources}
    texts = a.corpus_texts or sum(sizes.values())
    unlimited = [name for name, size in sizes.items() if not size and not a.corpus_texts]
    left_out = f", without {', '.join(unlimited)} (no limit: estimate.corpus_texts)" if unlimited else ""
    if not n or not texts:
        what = "estimate.parameters (the model is not a local folder)" if not n else "estimate.corpus_texts"
        raise ValueError(f"recipe {recipe.name!r} needs {what} for --dry-run")

    def hours(flop: float, utilisation: float) -> float:
        return flop / (a.peak_tflops * 1e12 * utilisation) / 3600

    def gpu(
        stage: str, items: str, tokens: float, flop_per_token: float, utilisation: float, size: float = 0.0
    ) -> StageEstimate:
        spent = hours(tokens * flop_per_token, utilisation)
        return StageEstimate(stage, items, tokens, spent, bytes=size, usd=spent * a.usd_per_gpu_hour)

    features, teacher = recipe.features, recipe.distillation
    less = features.less
    checkpoints = (len(less.checkpoints) or less.epochs) if features.kind == "less" else 1
    # Passes over the corpus; the warm-up's are over a share of it.
    warm_up = less.share * less.epochs if features.kind == "less" and not less.checkpoints else 0.0
    numbers = features.k * checkpoints
    compared = recipe.comparison
    trainings = (
        len(compared.methods) * compared.seeds * (len(recipe.targets.tasks) if compared.per_task else 1)
    )
    corpus_tokens = float(texts) * min(a.corpus_tokens, recipe.corpus.max_tokens)
    queries = sum(t.fit + t.unseen for t in recipe.targets.tasks)
    calls = teacher.initial + teacher.boost
    paid = teacher.teacher.kind == "openai"
    teacher_tokens = float(calls) * (a.prompt_tokens + a.reply_tokens)
    teacher_usd = (
        calls
        * (
            a.prompt_tokens * teacher.teacher.usd_per_million_prompt
            + a.reply_tokens * teacher.teacher.usd_per_million_completion
        )
        / 1e6
    )
    problems = recipe.synthesis.count * recipe.synthesis.samples
    synthetic = problems * a.kept_share * a.reply_tokens
    instruction = (
        a.instruction_tokens or float(sum(i.count for i in recipe.targets.instruction)) * a.reply_tokens
    )
    uncounted = [i.name for i in recipe.targets.instruction if not i.count and not a.instruction_tokens]
    whole = f", without {', '.join(uncounted)} (all rows: estimate.instruction_tokens)" if uncounted else ""
    read = (synthetic + instruction) * recipe.training.epochs
    if recipe.training.max_tokens:
        read = min(read, float(recipe.training.max_tokens))
    held_out = [t.eval for t in recipe.targets.tasks]
    benchmarks, unread = _benchmark_sizes(recipe.evaluation)
    limit, settings = recipe.evaluation.limit, len(recipe.evaluation.settings)
    solved = sum(min(size, limit) if limit > 0 else size for size in (*held_out, *benchmarks))
    scored = sum((*held_out, *benchmarks))
    unknown = f", without {', '.join(unread)} (no such file)" if unread else ""
    rows = [
        StageEstimate("corpus", f"{texts:,} texts{left_out}", corpus_tokens, bytes=corpus_tokens * 4),
        StageEstimate("targets", f"{queries:,} queries, {sum(held_out):,} held out"),
        gpu(
            "features",
            f"{texts:,} texts x {numbers} numbers x {features.bits} bits",
            corpus_tokens,
            (2 if features.kind == "readout" else 4) * n * (checkpoints + warm_up),
            a.gradient_utilisation,
            texts * numbers * features.bits / 8,
        ),
        StageEstimate("influence", f"{texts:,} texts x {len(recipe.targets.tasks)} tasks"),
        StageEstimate("index", recipe.index.factory),
        StageEstimate("selection", f"{recipe.selection.k:,} chosen"),
        gpu(
            "comparison",
            f"{trainings * (1 + len(compared.more_tokens)) if compared.tokens else 0} trainings",
            float(compared.tokens + sum(compared.more_tokens)) * compared.train.epochs * trainings,
            6 * n,
            a.training_utilisation,
        ),
        StageEstimate(
            "distillation",
            f"{teacher.initial:,} + {teacher.boost:,} texts, teacher {teacher.teacher.kind}",
            teacher_tokens,
            calls=calls if paid else 0,
            usd=teacher_usd if paid else 0.0,
        ),
        gpu(
            "synthesiser",
            f"{calls:,} rows x {recipe.synthesiser.epochs} epochs",
            teacher_tokens * recipe.synthesiser.epochs,
            6 * synthesiser,
            a.training_utilisation,
        ),
        gpu(
            "synthesis",
            f"{problems:,} problems",
            float(problems) * (a.prompt_tokens + a.reply_tokens),
            2 * synthesiser,
            a.generation_utilisation,
        ),
        StageEstimate("filtering", f"{problems:,} in, about {problems * a.kept_share:,.0f} kept"),
        gpu(
            "training", f"{recipe.training.epochs} epoch(s){whole}", read, 6 * trained, a.training_utilisation
        ),
        gpu(
            "evaluation",
            f"{solved:,} problems x 2 models x {settings} setting(s), {scored:,} references x 2{unknown}",
            (solved * settings + scored) * 2.0 * a.reply_tokens,
            2 * trained,
            a.generation_utilisation,
        ),
        StageEstimate("report", "results.json, report.html"),
    ]
    return [row for row in rows if row.stage in wanted]


def _texts(source: SourceConfig) -> int:
    """Return how many texts a source gives at most; 0 where nothing tells."""
    worked = source.count * len(source.families) if source.kind == "worked" else 0
    return min(filter(None, (source.limit, worked)), default=0)


def _benchmark_sizes(config: EvaluationConfig) -> tuple[list[int], list[str]]:
    """Return how many problems each benchmark gives, and the names of those that nothing tells of."""
    sizes, unread = [], []
    for benchmark in config.benchmarks:
        path = Path(benchmark.path).expanduser()
        if path.is_file():
            with open(path, "rb") as handle:
                size = sum(bool(line.strip()) for line in handle)
            sizes.append(min(size, benchmark.limit) if benchmark.limit > 0 else size)
        elif benchmark.limit > 0:
            sizes.append(benchmark.limit)
        else:
            unread.append(benchmark.name)
    return sizes, unread


def print_estimate(recipe: Recipe, last: str = "report") -> None:
    """Print the estimate up to the stage `last` as a table, with the assumptions it rests on."""
    from rich.console import Console
    from rich.table import Table

    rows = estimate(recipe, last)
    table = Table(title=f"{recipe.name}: estimate, nothing was run", title_justify="left")
    for name in ("stage", "items", "tokens", "bytes", "calls", "GPU hours", "USD"):
        table.add_column(name, justify="left" if name in ("stage", "items") else "right")
    for row in rows:
        table.add_row(
            row.stage,
            row.items,
            _short(row.tokens),
            _short(row.bytes),
            f"{row.calls:,}" if row.calls else "",
            f"{row.gpu_hours:,.1f}" if row.gpu_hours >= 0.05 else "",
            f"{row.usd:,.0f}" if row.usd >= 0.5 else "",
        )
    hours, usd = sum(r.gpu_hours for r in rows), sum(r.usd for r in rows)
    table.add_section()
    calls = sum(r.calls for r in rows)
    table.add_row("total", "", "", "", f"{calls:,}" if calls else "", f"{hours:,.1f}", f"{usd:,.0f}")
    console = Console(width=max(110, Console().width), markup=False)
    console.print(table)
    console.print(f"assuming {json.dumps(dataclasses.asdict(recipe.estimate))}", soft_wrap=True)


def _short(value: float) -> str:
    if not value:
        return ""
    step = min(int(math.log10(max(value, 1)) // 3), 4)
    return f"{value / 1000**step:.3g}{['', ' k', ' M', ' G', ' T'][step]}"


def _parameters(name: str) -> float:
    """Count a local model's parameters from its safetensors headers; 0 if there are none."""
    from safetensors import SafetensorError, safe_open

    from jz3.models import DAMAGED, EMBEDDED, TINY, UNUSED_WEIGHTS

    if name == EMBEDDED:
        return 134.5e6
    if name == TINY:
        return 1e5
    if not name:
        return 0.0
    total, folder = 0, Path(name).expanduser()
    for path in set(folder.glob("*.safetensors")) - set(folder.glob(UNUSED_WEIGHTS)):
        try:
            with safe_open(path, "np") as file:
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
        except SafetensorError as error:
            raise Jz3Error(f"{path} can't be read: {error}{DAMAGED}") from error
    return float(total)

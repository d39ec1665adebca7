"""Does the choice pay? `python bench/selection.py --data DIR [--targets gsm8k,math,asdiv] [--seeds N] [--json FILE]`.

For every chooser: take its best texts of one pool, train the same model on equally many tokens, measure the
change of the held-out problems' mean negative log-likelihood. The pool is made of the released training samples
of JiuZhang3.0 and of docstrings; targets are GSM8K (training split), MATH and ASDiv (split by hash). Resumable:
run the same command again. The defaults are one target, one seed and five choosers.

DIR holds `eval/*.jsonl`, `targets/gsm8k_train.jsonl` and `samples/*_sampled.jsonl` with the fields of the originals.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from jz3.comparison import ComparisonConfig
from jz3.comparison.stage import so_far
from jz3.comparison.table import plot, text_table, verdicts
from jz3.config import InfluenceConfig, Recipe, settled
from jz3.corpus.config import CorpusConfig, SourceConfig
from jz3.features import KINDS, FeaturesConfig, LessConfig
from jz3.files import read_jsonl, write_json
from jz3.models import ModelConfig, resolve_model
from jz3.pipeline import run_pipeline
from jz3.selection import SelectionConfig
from jz3.stage import StageContext
from jz3.targets import ControlConfig, TargetsConfig, TaskConfig
from jz3.training import Phase, TrainSettings, train

FIVE = "influence,matching,hidden,bm25,random"
PROMPT = "input"
"""The samples' field that holds the problem; `output` is its solution."""


def tasks(data: Path, names: list[str], fit: int, problems: int) -> tuple[TaskConfig, ...]:
    """Return the targets by name; nothing that is measured is among what chooses."""
    common: dict[str, Any] = {"fit": fit, "unseen": 8, "eval": problems}
    known = {
        "gsm8k": TaskConfig(
            name="gsm8k",
            path=str(data / "targets" / "gsm8k_train.jsonl"),
            eval_path=str(data / "eval" / "gsm8k.jsonl"),
            **common,
        ),
        "math": TaskConfig(
            name="math",
            path=str(data / "eval" / "math-oai.jsonl"),
            problem_field="problem",
            solution_field="solution",
            answer_field="answer",
            **{**common, "eval": min(problems, 100)},
        ),
        "asdiv": TaskConfig(
            name="asdiv",
            path=str(data / "eval" / "asdiv.jsonl"),
            problem_field="body+question",
            solution_field="formula",
            answer_field="answer",
            **common,
        ),
    }
    for name in names:
        if name not in known:
            raise SystemExit(f"unknown target {name!r}; known: {', '.join(known)}")
    return tuple(known[name] for name in names)


def sources(data: Path, size: int, prompts: bool) -> tuple[SourceConfig, ...]:
    """Return the pool's sources in the proportions 5 : 3 : 3 : 2 : 2 : 1 : 4; with `prompts`, samples know theirs."""
    part = size // 20
    pool = [
        SourceConfig(
            name=name,
            kind="jsonl",
            paths=(str(data / "samples" / f"{file}_sampled.jsonl"),),
            text_field="input+output",
            keep_fields=(PROMPT,) if prompts else (),
            generated=True,
            limit=share * part,
        )
        for name, file, share in (
            ("cot", "cot_pretrain", 5),
            ("tool", "tool_pretrain", 3),
            ("finetune", "finetune", 3),
        )
    ]
    docstrings = (("sympy", 2), ("scipy", 2), ("networkx", 1), ("stdlib", 4))
    return (*pool, *(SourceConfig(name=n, kind="docstrings", limit=share * part) for n, share in docstrings))


def recipe(arguments: argparse.Namespace) -> Recipe:
    """Return the recipe whose comparison stage is the experiment."""
    data = arguments.data
    names = arguments.targets.split(",")
    return Recipe(
        name="selection",
        seed=arguments.seed,
        model=ModelConfig(name=arguments.model),
        corpus=CorpusConfig(
            sources=sources(data, arguments.pool, arguments.completions),
            max_tokens=arguments.max_tokens,
            min_tokens=24,
            pieces_per_document=1,
        ),
        targets=TargetsConfig(
            tasks=tasks(data, names, arguments.queries, arguments.problems),
            control=ControlConfig(count=min(24, arguments.queries)),
        ),
        features=FeaturesConfig(
            kind=arguments.features,
            k=arguments.k,
            bits=arguments.bits,
            fit_documents=160,
            exact_documents=0,
            batch_tokens=arguments.batch_tokens,
            fit_batch_tokens=768,
            query_tokens=256,
            prompt_field=PROMPT if arguments.completions else "",
            less=LessConfig(
                rank=arguments.less_rank,
                alpha=4.0 * arguments.less_rank,
                epochs=arguments.less_epochs,
                share=arguments.less_share,
                batch_texts=arguments.less_batch,
            ),
        ),
        influence=InfluenceConfig(),
        selection=SelectionConfig(k=arguments.pool // 10),
        comparison=ComparisonConfig(
            tokens=arguments.tokens,
            more_tokens=tuple(int(x) for x in arguments.more_tokens.split(",") if x),
            methods=tuple(arguments.choosers.split(",")),
            runs=tuple((n, f) for n, _, f in (x.partition("=") for x in arguments.runs.split(",") if x)),
            without_sources=tuple(x for x in arguments.without.split(",") if x),
            per_task=True,
            seeds=arguments.seeds,
            problems=arguments.judged,
            workers=arguments.workers,
            train=settings(arguments),
        ),
    )


def settings(arguments: argparse.Namespace) -> TrainSettings:
    """Return how models are trained."""
    return TrainSettings(
        method=arguments.method,
        precision=arguments.precision,
        learning_rate=arguments.learning_rate,
        epochs=arguments.epochs,
        schedule="constant",
        warmup=0.0,
        max_length=arguments.pack,
        batch_packs=1,
        save_every=0,
    )


def later_checkpoint(arguments: argparse.Namespace) -> str:
    """Train the model on random texts of another run's pool and return its folder."""
    rows = [("", row["text"]) for row in read_jsonl(arguments.trained_on / "corpus" / "docs.jsonl")]
    folder = arguments.out / "model"
    train(
        resolve_model(ModelConfig(name=arguments.model)),
        [Phase(name="texts", rows=rows)],
        replace(settings(arguments), max_tokens=arguments.trained_tokens, packing="even"),
        folder,
        seed=arguments.seed,
        dtype="float32",
    )
    return str(folder)


def main() -> None:
    """Parse the arguments, run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/selection"))
    parser.add_argument("--model", default=ModelConfig().name)
    parser.add_argument(
        "--trained-on", type=Path, help="score by a later checkpoint: train on this run's pool first"
    )
    parser.add_argument("--trained-tokens", type=int, default=8_000, help="of it, drawn at random")
    parser.add_argument("--targets", default="gsm8k")
    parser.add_argument("--choosers", default=FIVE)
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each choice")
    parser.add_argument("--seed", type=int, default=0, help="of everything else")
    parser.add_argument("--pool", type=int, default=1200, help="texts, about")
    parser.add_argument("--without", default="", help="sources nobody may choose from, e.g. finetune")
    parser.add_argument(
        "--runs", default="", help="further choosers NAME=FOLDER,...: other runs' influence scores"
    )
    parser.add_argument("--max-tokens", type=int, default=128, help="of a text")
    parser.add_argument(
        "--tokens", type=int, default=8_000, help="that each model is trained on, in every epoch"
    )
    parser.add_argument("--more-tokens", default="", help="further budgets, e.g. 2000,32000")
    parser.add_argument("--queries", type=int, default=40, help="solutions of each target that choose")
    parser.add_argument("--problems", type=int, default=150, help="test problems of each target")
    parser.add_argument("--judged", type=int, default=0, help="of these, how many judge a training; 0: all")
    parser.add_argument("--features", choices=KINDS, default="adapted", help="kind; `sketch` needs no fit")
    defaults = FeaturesConfig()
    parser.add_argument("--k", type=int, default=defaults.k, help="numbers of a feature; 65536 for a sketch")
    parser.add_argument("--bits", type=int, default=defaults.bits, help="of a number; 1 for a sketch")
    parser.add_argument("--batch-tokens", type=int, default=1024, help="of a pass")
    parser.add_argument(
        "--completions",
        action="store_true",
        help="score solutions alone where a text begins with its problem",
    )
    less = defaults.less
    parser.add_argument(
        "--less-rank", type=int, default=less.rank, help="of the adapters of `--features less`"
    )
    parser.add_argument("--less-epochs", type=int, default=less.epochs, help="each leaves a checkpoint")
    parser.add_argument("--less-share", type=float, default=less.share, help="of the pool, for the warm-up")
    parser.add_argument(
        "--less-batch", type=int, default=less.batch_texts, help="texts per step of the warm-up"
    )
    parser.add_argument("--method", choices=("full", "lora"), default="full", help="what is trained")
    parser.add_argument(
        "--precision", choices=("float32", "mixed"), default="float32", help="of the training"
    )
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--pack", type=int, default=512, help="tokens of a step")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--so-far", action="store_true", help="print what is finished, train nothing")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    if arguments.trained_on:
        arguments.model = later_checkpoint(arguments)
    wanted = recipe(arguments)
    ctx = StageContext(recipe=settled(wanted), run_dir=arguments.out, name="comparison")
    if arguments.so_far:
        summary = so_far(ctx)
        print(text_table(summary), *verdicts(summary), sep="\n")
        return
    run_pipeline(wanted, arguments.out, "comparison", say=lambda line: print(line, file=sys.stderr))
    manifest = ctx.manifest("comparison")
    print(text_table(manifest["summary"]), *verdicts(manifest["summary"]), sep="\n")
    if arguments.json:
        cost = {stage: ctx.manifest(stage)["seconds"] for stage in ("features", "influence")}
        result = {**manifest["summary"], "machine": manifest["machine"], "seconds": cost}
        write_json(arguments.json, result)
    if arguments.plot:
        plot(manifest["summary"], arguments.plot)


if __name__ == "__main__":
    main()

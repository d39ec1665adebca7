"""`jz3 explain`: which tokens of a text help a problem or a task, in the terminal and as a page."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from jz3.errors import Jz3Error
from jz3.printable import printable

if TYPE_CHECKING:
    from jz3.explain import Values
    from jz3.models import ModelConfig


def explain(
    where: Positional[Path],
    text: str = "",
    doc: str = "",
    problem: str = "",
    solution: str = "",
    task: str = "",
    queries: int = 32,
    html: Path | None = None,
    max_tokens: int = 512,
    dtype: str = "auto",
) -> None:
    """Show which tokens of a text help with a problem, or with a run's task.

    Args:
        where: a model (folder, hub name or shipped name) or the folder of a run of `jz3 run` or `jz3 score`.
        text: the text.
        doc: instead of --text, the id of a text of the run's corpus.
        problem: the problem; without one the run's target queries are taken.
        solution: its solution: then only its tokens are scored.
        task: of the run, whose queries are taken instead of --problem; all tasks by default.
        queries: at most so many of them.
        html: also write a page of its own here.
        max_tokens: longer texts are cut at the end (a run of `jz3 score` has its own limits).
        dtype: `bfloat16`, `float32` or `auto`, of a model (a run has its own).
    """
    from rich.console import Console

    from jz3.explain import render, write_html
    from jz3.models import ModelConfig

    if queries < 1:
        raise ValueError(f"--queries must be at least 1, got {queries}")
    if html is not None and html.is_dir():
        raise ValueError(f"--html {html} is a folder; name a file")
    is_scored = (where / "plan.json").is_file()
    is_run = is_scored or (where / "recipe.json").is_file()
    for option, value in (("task", task), ("doc", doc)):
        if value and not is_run:
            raise ValueError(
                f"--{option} {value}: {where} is no folder of `jz3 run` or `jz3 score`, which it is looked up in"
            )
    if solution and not problem:
        raise ValueError("--solution needs its --problem")
    if task and problem:
        raise ValueError("give either --task or --problem, not both")
    if bool(text) == bool(doc):
        raise ValueError("jz3 explain needs either --text or --doc")
    if not (problem or is_run):
        raise ValueError("jz3 explain needs --problem, or the folder of a run with target queries")
    if is_scored:
        values, about = _by_scored_run(where, text, doc, problem, solution, task, queries)
    else:
        config = ModelConfig(name=str(where), dtype=dtype)
        values, about = _by_model(config, where, text, doc, problem, solution, task, queries, max_tokens)
    console = Console(highlight=False)
    console.print(render(values), soft_wrap=True)
    total = sum(value for _, value in values)
    console.print(f"\ncosine of gradients {total:+.4f}, with {printable(about[:200])}", markup=False)
    for title, sign in (("helps most", -1), ("harms most", 1)):
        best = [v for v in sorted(values, key=lambda v: sign * v[1])[:8] if sign * v[1] < 0]
        console.print(
            f"{title}: " + ", ".join(f"{piece!r} {value:+.4f}" for piece, value in best), markup=False
        )
    if html is not None:
        write_html(html, values, "Which tokens help", about)
        console.print(f"{html} written", markup=False)


def _by_model(
    config: "ModelConfig",
    where: Path,
    text: str,
    doc: str,
    problem: str,
    solution: str,
    task: str,
    queries: int,
    max_tokens: int,
) -> tuple["Values", str]:
    """Explain a text by a model, or by that of a run of the loop."""
    from jz3.explain import explain as values_of
    from jz3.files import read_jsonl
    from jz3.models import load_on_device, load_tokenizer, resolve_model
    from jz3.templates import prompt_for

    reduction, prompt = "mean", ""
    if (where / "recipe.json").is_file():
        from jz3.config import stored_recipe

        recipe = stored_recipe(where)
        config, reduction = recipe.model, recipe.features.reduction
        if doc:
            row = _document(where, doc)
            text, prompt = row["text"], row.get("meta", {}).get(recipe.features.prompt_field, "")
    if problem:
        pairs = [(prompt_for(problem, "cot"), solution) if solution else ("", problem)]
        about = problem
    else:
        rows = _in_turn(where, list(read_jsonl(where / "targets" / "queries.jsonl")), task, queries)
        pairs = [(row["prompt"], row["completion"]) for row in rows]
        about = f"{len(pairs)} queries of {task or 'all tasks'} of {where}"
    folder = resolve_model(config)
    model = load_on_device(folder, config.dtype)
    tokenizer, options = load_tokenizer(folder), {"max_tokens": max_tokens, "reduction": reduction}
    return values_of(model, tokenizer, text, pairs, prompt=prompt, **options), about


def _by_scored_run(
    where: Path, text: str, doc: str, problem: str, solution: str, task: str, queries: int
) -> tuple["Values", str]:
    """Explain a text as a run of `jz3 score` scores it: by the mean over its checkpoints by weight."""
    from jz3.explain import pieces_of, token_values
    from jz3.gradients import RefusedText, linear_layers, tokenize_query, tokenize_text
    from jz3.models import load_on_device, load_tokenizer
    from jz3.scoring.collection import ScoredCollection
    from jz3.templates import prompt_for

    run = ScoredCollection(where)
    encoding, prompt = run.encoding(), ""
    tokenizer, limit = load_tokenizer(encoding.tokenizer), encoding.query_tokens
    if doc:
        [found] = run.texts([run.find(doc)])
        text, prompt = found.text, found.meta.get(run.prompt_field, "")
    tokens = tokenize_text(tokenizer, doc or "--text", text, encoding.document_tokens, "begin", prompt)
    if problem and solution:
        asked = [tokenize_query(tokenizer, "--problem", prompt_for(problem, "cot"), solution, limit)]
    elif problem:
        asked = [tokenize_text(tokenizer, "--problem", problem, limit)]
    else:
        asked = []
        for row in _in_turn(where, [query.to_json() for query in run.queries()], task, queries):
            # Some can't be scored, which the run's rejects tell.
            with contextlib.suppress(RefusedText):
                asked.append(tokenize_query(tokenizer, row["id"], row["prompt"], row["completion"], limit))
    about = problem or f"{len(asked)} queries of {task or 'all tasks'} of {where}"
    values = [0.0] * len(tokens.ids)
    for member, weight in enumerate(run.weights):
        encoding = run.encoding(member)
        model = load_on_device(encoding.model, encoding.dtype)
        found_values = token_values(model, linear_layers(model), tokens, asked, reduction=encoding.reduction)
        values = [v + weight * w for v, w in zip(values, found_values.mean(0).tolist(), strict=True)]
    return list(zip(pieces_of(tokenizer, text, prompt, len(values)), values, strict=True)), about


def _document(run: Path, key: str) -> dict[str, Any]:
    from jz3.files import read_jsonl

    for row in read_jsonl(run / "corpus" / "docs.jsonl"):
        if row["id"] == key:
            return row
    raise Jz3Error(f"the corpus of {run} has no text {key!r}")


def _in_turn(run: Path, rows: list[dict[str, Any]], task: str, limit: int) -> list[dict[str, Any]]:
    """Return the first fit queries of a run's task, of all tasks in turn if none is named."""
    rows = [row for row in rows if row["role"] == "fit"]
    tasks = sorted({row["task"] for row in rows})
    if task and task not in tasks:
        raise ValueError(f"{run} has no task {task!r}; it has {', '.join(tasks)}")
    groups = [[r for r in rows if r["task"] == name] for name in ([task] if task else tasks)]
    turns = [group[i] for i in range(max(map(len, groups), default=0)) for group in groups if i < len(group)]
    if not turns:
        raise Jz3Error(f"{run} has no target query")
    return turns[:limit]

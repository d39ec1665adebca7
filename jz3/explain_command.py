"""`jz3 explain`: which tokens of a text help a problem or a task, in the terminal and as a page."""

from pathlib import Path
from typing import Any

from tyro.conf import Positional

from jz3.errors import Jz3Error


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
        where: a model (folder, hub name or shipped name) or the folder of a run of `jz3 run`.
        text: the text.
        doc: instead of --text, the id of a text of the run's corpus.
        problem: the problem; without one the run's target queries are taken.
        solution: its solution: then only its tokens are scored.
        task: of the run, whose queries are taken instead of --problem; all tasks by default.
        queries: at most so many of them.
        html: also write a page of its own here.
        max_tokens: longer texts are cut at the end.
        dtype: `bfloat16`, `float32` or `auto`, of a model (a run has its own).
    """
    from rich.console import Console

    from jz3.explain import explain as values_of
    from jz3.explain import render, write_html
    from jz3.models import ModelConfig, best_device, load_model, load_tokenizer, resolve_model
    from jz3.templates import prompt_for

    config, reduction, prompt_field = ModelConfig(name=str(where), dtype=dtype), "mean", ""
    if (where / "plan.json").is_file():
        raise ValueError(
            f"{where} is a run of `jz3 score`; jz3 explain takes a model, with --text and --problem, or the folder "
            f"of a run of `jz3 run` (`jz3 explore {where}` shows the tokens of what it finds)"
        )
    if queries < 1:
        raise ValueError(f"--queries must be at least 1, got {queries}")
    is_run = (where / "recipe.json").is_file()
    for option, value in (("task", task), ("doc", doc)):
        if value and not is_run:
            raise ValueError(
                f"--{option} {value}: {where} is no folder of `jz3 run`, which it is looked up in"
            )
    if solution and not problem:
        raise ValueError("--solution needs its --problem")
    if task and problem:
        raise ValueError("give either --task or --problem, not both")
    if is_run:
        from jz3.config import stored_recipe

        recipe = stored_recipe(where)
        config, reduction = recipe.model, recipe.features.reduction
        prompt_field = recipe.features.prompt_field
    if bool(text) == bool(doc):
        raise ValueError("jz3 explain needs either --text or --doc")
    prompt = ""
    if doc:
        row = _document(where, doc)
        text, prompt = row["text"], row.get("meta", {}).get(prompt_field, "")
    if problem:
        pairs = [(prompt_for(problem, "cot"), solution) if solution else ("", problem)]
        about = problem
    elif is_run:
        pairs = _run_queries(where, task, queries)
        about = f"{len(pairs)} queries of {task or 'all tasks'} of {where}"
    else:
        raise ValueError("jz3 explain needs --problem, or the folder of a run with target queries")
    folder = resolve_model(config)
    model: Any = load_model(folder, config.dtype)
    model = model.to(best_device())
    tokenizer, options = load_tokenizer(folder), {"max_tokens": max_tokens, "reduction": reduction}
    values = values_of(model, tokenizer, text, pairs, prompt=prompt, **options)
    console = Console(highlight=False)
    console.print(render(values), soft_wrap=True)
    total = sum(value for _, value in values)
    console.print(f"\ncosine of gradients {total:+.4f}, with {about[:200]}", markup=False)
    for title, sign in (("helps most", -1), ("harms most", 1)):
        best = [v for v in sorted(values, key=lambda v: sign * v[1])[:8] if sign * v[1] < 0]
        console.print(
            f"{title}: " + ", ".join(f"{piece!r} {value:+.4f}" for piece, value in best), markup=False
        )
    if html is not None:
        write_html(html, values, "Which tokens help", about)
        console.print(f"{html} written", markup=False)


def _document(run: Path, key: str) -> dict[str, Any]:
    from jz3.files import read_jsonl

    for row in read_jsonl(run / "corpus" / "docs.jsonl"):
        if row["id"] == key:
            return row
    raise Jz3Error(f"the corpus of {run} has no text {key!r}")


def _run_queries(run: Path, task: str, limit: int) -> list[tuple[str, str]]:
    """Return the first fit queries of a run's task, of all tasks in turn if none is named."""
    from jz3.files import read_jsonl

    rows = [row for row in read_jsonl(run / "targets" / "queries.jsonl") if row["role"] == "fit"]
    tasks = sorted({row["task"] for row in rows})
    if task and task not in tasks:
        raise ValueError(f"{run} has no task {task!r}; it has {', '.join(tasks)}")
    groups = [[r for r in rows if r["task"] == name] for name in ([task] if task else tasks)]
    turns = [group[i] for i in range(max(map(len, groups), default=0)) for group in groups if i < len(group)]
    if not turns:
        raise Jz3Error(f"{run} has no target query")
    return [(row["prompt"], row["completion"]) for row in turns[:limit]]

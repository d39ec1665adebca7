"""Synthesis: the trained synthesiser writes problems with solutions from corpus texts."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jz3.config import SynthesisConfig
from jz3.engines.base import Engine, Generation, Request
from jz3.engines.on_demand import OnDemand, engine_on_demand, noted_info
from jz3.engines.tool_loop import ToolTrace, generate_with_tools
from jz3.errors import Jz3Error
from jz3.files import hash_text, read_jsonl, write_jsonl
from jz3.records import Problem, Prompt, Reject
from jz3.seeding import rng, seed_for
from jz3.stage import StageContext

if TYPE_CHECKING:
    from jz3.grading.sandbox import Sandbox

KEPT_TEXT = 4000
"""Characters of a refused reply that are kept."""


@dataclass(frozen=True, slots=True)
class _Item:
    """A reply to be written."""

    prompt: Prompt
    id: str


def run(ctx: StageContext) -> dict[str, Any]:
    """Have the synthesiser write problems and take its replies apart.

    Reads corpus/docs.jsonl, distillation/prompts.jsonl and synthesiser/model; writes prompts.jsonl,
    problems.jsonl and rejects.jsonl.

    Returns:
        Counts: prompts, replies asked for, parsed and rejected by reason; by kind and level; tokens;
        and the engine that wrote them.
    """
    config = ctx.recipe.synthesis
    model = ctx.path("synthesiser", "model")
    prompts = list(_prompts(ctx))
    write_jsonl(ctx.out / "prompts.jsonl", (prompt.to_json() for prompt in prompts))
    items = [
        _Item(prompt, hash_text(f"{prompt.id}\x1f{sample}"))
        for prompt in prompts
        for sample in range(config.samples)
    ]
    rows: list[dict[str, Any]] = []
    note = ctx.out / "engine.json"
    with (
        engine_on_demand(config.engine, model, ctx.recipe.model.dtype, note) as engine,
        _sandbox(config) as sandbox,
    ):
        for kind in ("cot", "tool"):
            part = [item for item in items if item.prompt.kind == kind]

            def work(shard: list[_Item], kind: str = kind) -> list[dict[str, Any]]:
                return _write(ctx, kind, shard, engine.get(), sandbox)

            label, size = f"{kind} replies", config.shard_size
            rows.extend(
                ctx.shards(f"shards/{kind}", part, size, work, label, ctx.training_key("synthesiser"))
            )
    write_jsonl(ctx.out / "problems.jsonl", (row["problem"] for row in rows if row["problem"]))
    write_jsonl(ctx.out / "rejects.jsonl", (row["reject"] for row in rows if row["reject"]))
    return {
        "prompts": len(prompts),
        "texts": len({prompt.doc_id for prompt in prompts}),
        **_counts(rows),
        "by_kind": {kind: _counts(part) for kind, part in _grouped(rows, "kind")},
        "by_level": {level: _counts(part) for level, part in _grouped(rows, "level")},
        "prompt_tokens": sum(row["prompt_tokens"] for row in rows),
        "new_tokens": sum(row["new_tokens"] for row in rows),
        "executed_blocks": dict(
            sorted(Counter(reason for row in rows for reason in row["executed"]).items())
        ),
        "sandbox_levels": sorted({level for row in rows for level in row["sandbox_levels"]}),
        "engine": noted_info(config.engine, note),
    }


def _sandbox(config: SynthesisConfig) -> "OnDemand[Sandbox]":
    from jz3.grading.sandbox import Sandbox

    return OnDemand(lambda: Sandbox(config.sandbox))


def _prompts(ctx: StageContext) -> Iterator[Prompt]:
    """Draw texts, kinds and levels: texts in an order drawn by their ids, unused ones first."""
    from jz3.distillation.prompts import fill

    config = ctx.recipe.synthesis
    texts = {row["id"]: row["text"] for row in read_jsonl(ctx.path("corpus", "docs.jsonl"))}
    if not texts:
        raise Jz3Error("corpus/docs.jsonl holds no text to write problems from")
    # What the teacher was asked, the synthesiser has learnt the reply to, and would repeat it.
    bits = {level: 1 << i for i, level in enumerate((*config.levels, "tool"))}
    before: dict[str, int] = {}
    for row in ctx.rows("distillation", "prompts.jsonl"):
        before[row["doc_id"]] = before.get(row["doc_id"], 0) | bits.get(row["level"], 0)
    order = sorted(texts, key=lambda key: (key in before, seed_for(ctx.seed, ctx.name, "order", key), key))
    had = [before.get(key, 0) for key in order]  # a bit per level
    owed = 0
    for number in range(config.count):
        turn, place = divmod(number, len(order))
        key = order[place]
        # Moved on by one text in every turn, or the same texts would be asked for Python each time.
        step = place + turn
        owed += int((step + 1) * config.tool_share) - int(step * config.tool_share)
        tool = owed > 1 or (owed == 1 and not before.get(key, 0) & bits["tool"])
        owed -= tool
        draw = rng(ctx.seed, ctx.name, "level", key, turn)
        every = range(len(config.levels))
        free = [i for i in every if not had[place] >> i & 1] or every
        chosen = free[int(draw.integers(len(free)))]
        had[place] |= 0 if tool else 1 << chosen
        level = "tool" if tool else config.levels[chosen]
        yield Prompt(
            id=hash_text(f"{key}\x1f{level}\x1f{turn}"),
            doc_id=key,
            kind="tool" if tool else "cot",
            level=level,
            text=fill(level, texts[key]),
        )


def _write(
    ctx: StageContext, kind: str, items: list[_Item], engine: Engine, sandbox: "OnDemand[Sandbox]"
) -> list[dict[str, Any]]:
    """Return a row per reply: its Problem or its Reject, and what is counted."""
    config = ctx.recipe.synthesis
    requests = [
        Request(id=item.id, prompt=item.prompt.text, seed=seed_for(ctx.seed, ctx.name, item.id))
        for item in items
    ]
    replies: list[Generation] | list[ToolTrace]
    if kind == "tool" and config.execute_tools:
        replies = generate_with_tools(
            engine, sandbox.get(), requests, config.sampling(kind), config.rounds, config.output_limit
        )
    else:
        replies = engine.generate(requests, config.sampling(kind))
    origin = f"synthesiser:{_model_name(ctx)}"
    return [_row(item, reply, origin) for item, reply in zip(items, replies, strict=True)]


def _model_name(ctx: StageContext) -> str:
    return ctx.recipe.synthesis.engine.model or Path(ctx.recipe.model.name).name


def _row(item: _Item, reply: Generation | ToolTrace, origin: str) -> dict[str, Any]:
    from jz3.distillation.parser import ReplyError, parse_reply

    prompt = item.prompt
    executed = reply.executed if isinstance(reply, ToolTrace) else ()
    problem = reject = None
    if reply.finish == "too_long" and not reply.text:
        detail = f"its {reply.prompt_tokens} tokens fill the model's context"
        reject = _reject(item, "prompt_too_long", detail, "")
    elif reply.finish == "refused":
        reject = _reject(
            item, "refused", "the endpoint refused the prompt; the log has its words", reply.text
        )
    else:
        try:
            # A reply whose rounds are used up ends in an output block, which the parser judges by itself.
            parsed = parse_reply(
                reply.text, prompt.kind, "length" if reply.finish in ("length", "too_long") else "stop"
            )
        except ReplyError as error:
            reject = _reject(item, error.reason, error.detail, reply.text)
        else:
            problem = Problem(
                id=item.id,
                prompt_id=prompt.id,
                doc_id=prompt.doc_id,
                kind=prompt.kind,
                level=prompt.level,
                problem=parsed.problem,
                solution=parsed.solution,
                answer=parsed.answer,
                origin=origin,
                meta={"finish": reply.finish, **({"executed": str(len(executed))} if executed else {})},
            )
    return {
        "kind": prompt.kind,
        "level": prompt.level,
        "problem": problem.to_json() if problem else None,
        "reject": reject.to_json() if reject else None,
        "prompt_tokens": reply.prompt_tokens,
        "new_tokens": reply.new_tokens,
        "executed": [block.reason for block in executed],
        "sandbox_levels": sorted({block.level for block in executed}),
    }


def _reject(item: _Item, reason: str, detail: str, text: str) -> Reject:
    return Reject(
        id=item.id,
        stage="synthesis",
        reason=reason,
        detail=detail,
        where=item.prompt.id,
        text=text[:KEPT_TEXT],
    )


def _counts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    reasons = Counter(row["reject"]["reason"] for row in rows if row["reject"])
    return {
        "asked": len(rows),
        "parsed": sum(row["problem"] is not None for row in rows),
        "rejected": dict(sorted(reasons.items())),
    }


def _grouped(rows: list[dict[str, Any]], key: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for value in dict.fromkeys(row[key] for row in rows):
        yield value, [row for row in rows if row[key] == value]

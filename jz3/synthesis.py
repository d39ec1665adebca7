"""Synthesis: the trained synthesiser writes problems with solutions from corpus texts."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from jz3.config import SynthesisConfig
from jz3.engines.base import Engine, Generation, Request
from jz3.engines.on_demand import OnDemand, engine_on_demand, noted_info
from jz3.engines.tool_loop import ToolTrace, generate_with_tools
from jz3.errors import Jz3Error
from jz3.files import hash_text, jsonl_writer, write_jsonl
from jz3.records import Problem, Prompt, Reject
from jz3.rows import Rows
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


class _Items(Sequence[_Item]):
    """So many replies to each prompt."""

    def __init__(self, prompts: Rows[Prompt], samples: int) -> None:
        self._prompts, self._samples = prompts, samples

    def __len__(self) -> int:
        return len(self._prompts) * self._samples

    @overload
    def __getitem__(self, index: int) -> _Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[_Item]: ...
    def __getitem__(self, index: int | slice) -> _Item | list[_Item]:
        import numpy as np

        if not isinstance(index, slice):
            index = range(len(self))[index]
            return self[index : index + 1][0]
        numbers = np.arange(*index.indices(len(self)))
        return [
            _Item(prompt, hash_text(f"{prompt.id}\x1f{number % self._samples}"))
            for number, prompt in zip(numbers, self._prompts.take(numbers // self._samples), strict=True)
        ]


def run(ctx: StageContext) -> dict[str, Any]:
    """Have the synthesiser write problems and take its replies apart.

    Reads corpus/docs.jsonl, distillation/prompts.jsonl and synthesiser/model; writes prompts.jsonl,
    problems.jsonl and rejects.jsonl.

    Returns:
        Counts: prompts, replies asked for, parsed and rejected by reason; by kind and level; tokens;
        and the engine that wrote them.
    """
    import numpy as np

    config = ctx.recipe.synthesis
    model = ctx.path("synthesiser", "model")
    path = ctx.out / "prompts.jsonl"
    write_jsonl(path, (prompt.to_json() for prompt in _prompts(ctx)))
    prompts = Rows([path], Prompt.from_json)
    about = [(prompt.kind, prompt.doc_id) for prompt in prompts]
    kinds = np.array([kind for kind, _ in about])
    shards: list[Iterable[dict[str, Any]]] = []
    note = ctx.out / "engine.json"
    with (
        engine_on_demand(config.engine, model, ctx.recipe.model.dtype, note) as engine,
        _sandbox(config) as sandbox,
    ):
        for kind in ("cot", "tool"):
            items = _Items(prompts.take(kinds == kind), config.samples)

            def work(shard: list[_Item], kind: str = kind) -> list[dict[str, Any]]:
                return _write(ctx, kind, shard, engine.get(), sandbox)

            label, size = f"{kind} replies", config.shard_size
            shards.append(
                ctx.shards(f"shards/{kind}", items, size, work, label, ctx.training_key("synthesiser"))
            )
    every, by_kind, by_level = _Counts(), defaultdict(_Counts), defaultdict(_Counts)
    with (
        jsonl_writer(ctx.out / "problems.jsonl") as keep,
        jsonl_writer(ctx.out / "rejects.jsonl") as refuse,
    ):
        for row in itertools.chain.from_iterable(shards):
            if row["problem"]:
                keep(row["problem"])
            if row["reject"]:
                refuse(row["reject"])
            for counts in (every, by_kind[row["kind"]], by_level[row["level"]]):
                counts.add(row)
    return {
        "prompts": len(prompts),
        "texts": len({text for _, text in about}),
        **every.table(),
        "by_kind": {kind: counts.table() for kind, counts in by_kind.items()},
        "by_level": {level: counts.table() for level, counts in by_level.items()},
        "prompt_tokens": every.prompt_tokens,
        "new_tokens": every.new_tokens,
        "executed_blocks": dict(sorted(every.executed.items())),
        "sandbox_levels": sorted(every.sandbox_levels),
        "engine": noted_info(config.engine, note),
    }


def _sandbox(config: SynthesisConfig) -> "OnDemand[Sandbox]":
    from jz3.grading.sandbox import Sandbox

    return OnDemand(lambda: Sandbox(config.sandbox))


def _prompts(ctx: StageContext) -> Iterator[Prompt]:
    """Draw texts, kinds and levels: texts in an order drawn by their ids, unused ones first."""
    import numpy as np

    from jz3.distillation.prompts import fill

    config = ctx.recipe.synthesis
    docs = Rows([ctx.path("corpus", "docs.jsonl")], lambda row: (row["id"], row["text"]))
    ids = [key for key, _ in docs]
    if not ids:
        raise Jz3Error("corpus/docs.jsonl holds no text to write problems from")
    # What the teacher was asked, the synthesiser has learnt the reply to, and would repeat it.
    bits = {level: 1 << i for i, level in enumerate((*config.levels, "tool"))}
    before: dict[str, int] = {}
    for row in ctx.rows("distillation", "prompts.jsonl"):
        before[row["doc_id"]] = before.get(row["doc_id"], 0) | bits.get(row["level"], 0)
    drawn = [(key in before, seed_for(ctx.seed, ctx.name, "order", key), key) for key in ids]
    order = sorted(range(len(ids)), key=drawn.__getitem__)
    had = [before.get(ids[i], 0) for i in order]  # a bit per level
    owed = 0
    # The file is opened once a turn: where it lies on a server, once a text would take hours.
    texts = itertools.chain.from_iterable(itertools.repeat(docs.take(np.array(order))))
    for number, (key, text) in zip(range(config.count), texts, strict=False):
        turn, place = divmod(number, len(order))
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
            text=fill(level, text),
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
    recipe = ctx.recipe
    return recipe.synthesis.engine.model or Path(recipe.synthesiser.start(recipe.model).name).name


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


@dataclass(slots=True)
class _Counts:
    """What became of some replies."""

    asked: int = 0
    parsed: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    new_tokens: int = 0
    executed: Counter[str] = field(default_factory=Counter)
    sandbox_levels: set[str] = field(default_factory=set)

    def add(self, row: dict[str, Any]) -> None:
        self.asked += 1
        self.parsed += row["problem"] is not None
        if row["reject"]:
            self.rejected[row["reject"]["reason"]] += 1
        self.prompt_tokens += row["prompt_tokens"]
        self.new_tokens += row["new_tokens"]
        self.executed.update(row["executed"])
        self.sandbox_levels.update(row["sandbox_levels"])

    def table(self) -> dict[str, Any]:
        return {
            "asked": self.asked,
            "parsed": self.parsed,
            "rejected": dict(sorted(self.rejected.items())),
        }

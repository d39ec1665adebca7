"""The stage: which texts are put to the teacher, and what becomes of the replies."""

import heapq
import logging
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jz3.distillation.config import DistillationConfig, TeacherConfig
from jz3.distillation.parser import ReplyError, parse_reply
from jz3.distillation.prompts import NAMES, fill, template
from jz3.distillation.recorded import RecordedTeacher
from jz3.distillation.teachers import Reply, Request, Teacher
from jz3.errors import Jz3Error
from jz3.files import hash_text, read_jsonl, write_jsonl
from jz3.records import Doc, Problem, Prompt, Reject
from jz3.seeding import rng, seed_for

if TYPE_CHECKING:
    from jz3.config import Recipe
    from jz3.stage import StageContext

log = logging.getLogger(__name__)

TYPICAL_COMPLETION = 700
"""Tokens of a usual reply, by the mean of 2,400 characters of the paper's released rows."""
CHARS_PER_TOKEN = 4
MAX_REJECT_TEXT = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What asking the teacher is expected to take."""

    teacher: str
    calls: int
    """Without repeats after errors."""
    prompt_tokens: int
    completion_tokens: int
    usd: float
    usd_at_most: float
    """If every reply were as long as max_tokens allows."""
    within_budget: bool
    """Whether `calls` and `usd` stay within max_calls and max_usd."""


def estimate(
    config: DistillationConfig, text_tokens: int = 512, prompts: Sequence[str] | None = None
) -> Estimate:
    """Estimate calls, tokens and money without asking anybody.

    Args:
        config: the settings.
        text_tokens: tokens of a usual text of the corpus; used if there are no prompts yet.
        prompts: the prompts themselves, if there are.

    Returns:
        The estimate; the offline and the recorded teacher cost nothing.
    """
    teacher = config.teacher
    if teacher.kind != "openai":
        calls = config.initial + config.boost if prompts is None else len(prompts)
        return Estimate(
            teacher=teacher.kind,
            calls=0 if teacher.kind == "recorded" else calls,
            prompt_tokens=0,
            completion_tokens=0,
            usd=0.0,
            usd_at_most=0.0,
            within_budget=True,
        )
    from jz3.distillation.endpoint import price

    if prompts is None:
        calls = config.initial + config.boost
        frame = sum(len(template(name)) for name in NAMES) // len(NAMES) // CHARS_PER_TOKEN
        prompt_tokens = calls * (frame + text_tokens)
    else:
        calls = len(prompts)
        prompt_tokens = sum(len(p) for p in prompts) // CHARS_PER_TOKEN
    completion_tokens = calls * min(TYPICAL_COMPLETION, teacher.max_tokens)
    usd = price(teacher, prompt_tokens, completion_tokens)
    return Estimate(
        teacher=teacher.model,
        calls=calls,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        usd=round(usd, 4),
        usd_at_most=round(price(teacher, prompt_tokens, calls * teacher.max_tokens), 4),
        within_budget=calls <= teacher.max_calls and usd <= teacher.max_usd,
    )


def dry_run(ctx: "StageContext") -> Estimate:
    """Estimate what is left to buy for a run whose texts are selected; makes no request."""
    config = ctx.recipe.distillation
    prompts = [request.prompt.text for part in _plan(ctx).values() for request in part]
    if config.teacher.kind == "openai":
        from jz3.distillation.endpoint import cache_path, key_of
        from jz3.distillation.ledger import AnswerCache

        wanted = {key_of(config.teacher, p): p for p in prompts}
        if cache_path(config.teacher).is_file():
            cache = AnswerCache(cache_path(config.teacher))
            wanted = {key: p for key, p in wanted.items() if cache.get(key) is None}
            cache.close()
        prompts = list(wanted.values())
    return estimate(config, prompts=prompts)


def run(ctx: "StageContext") -> dict[str, Any]:
    """Write prompts.jsonl, initial.jsonl, boost.jsonl, rejects.jsonl and replies.jsonl.

    The initial set is drawn at random from the texts that influence did not choose, the boost takes
    the chosen ones, best first. replies.jsonl can be given to the recorded teacher.

    Returns:
        Counts asked, parsed and rejected by reason, by set, kind, level, topic and family; the
        teacher's name, its label as a stand-in, and calls, tokens and money.

    Raises:
        Jz3Error: the teacher can't be asked, or its budget is used up.
    """
    config = ctx.recipe.distillation
    plan = _plan(ctx)
    requests = [*plan["initial"], *plan["boost"]]
    if not requests:
        raise Jz3Error("distillation: the corpus and the selection hold no text to ask about")
    write_jsonl(ctx.out / "prompts.jsonl", (r.prompt.to_json() for r in requests))
    # What the corpus holds as worked problems must not come back as the teacher's.
    corpus_families = {family for source in ctx.recipe.corpus.sources for family in source.families}
    teacher = open_teacher(config.teacher, ctx.out, ctx.seed, corpus_families)
    try:
        with ctx.progress(len(requests), "replies") as advance:
            replies = teacher.answer(requests, advance)
        spending = asdict(teacher.spending())
    finally:
        teacher.close()
    rows = [_parse(request, reply, teacher) for request, reply in zip(requests, replies, strict=True)]
    first = len(plan["initial"])
    for name, part in (("initial", rows[:first]), ("boost", rows[first:])):
        write_jsonl(ctx.out / f"{name}.jsonl", (row.to_json() for row in part if isinstance(row, Problem)))
    write_jsonl(ctx.out / "rejects.jsonl", (row.to_json() for row in rows if isinstance(row, Reject)))
    write_jsonl(
        ctx.out / "replies.jsonl",
        (
            _recorded(request, reply)
            for request, reply in zip(requests, replies, strict=True)
            if not reply.failure
        ),
    )
    return {
        **_counts(requests, rows),
        "sets": {
            "initial": _tally(rows[:first], config.initial),
            "boost": _tally(rows[first:], config.boost),
        },
        "teacher": teacher.name,
        "stand_in": teacher.stand_in,
        **spending,
    }


def _plan(ctx: "StageContext") -> dict[str, list[Request]]:
    """Choose the texts and write the prompts of both sets."""
    config = ctx.recipe.distillation
    selected = [Doc.from_json(row) for row in ctx.rows("selection", "selected.jsonl")]
    chosen = {doc.id for doc in selected}
    # The draw depends on each text's id alone, not on the corpus' order; only the drawn are kept.
    drawn = heapq.nsmallest(
        config.initial,
        (row for row in read_jsonl(ctx.path("corpus", "docs.jsonl")) if row["id"] not in chosen),
        key=lambda row: (seed_for(ctx.seed, "distillation", "initial", row["id"]), row["id"]),
    )
    texts = {"initial": [Doc.from_json(row) for row in drawn], "boost": selected[: config.boost]}
    for name, asked in (("initial", config.initial), ("boost", config.boost)):
        if len(texts[name]) < asked:
            log.warning(
                "distillation: %d texts asked for the %s set, there are %d", asked, name, len(texts[name])
            )
    return {
        name: [_request(doc, name, number, ctx) for number, doc in enumerate(docs)]
        for name, docs in texts.items()
    }


def _request(doc: Doc, name: str, number: int, ctx: "StageContext") -> Request:
    """Write the prompt for a text; tool prompts are spread evenly over the set, levels are drawn."""
    config = ctx.recipe.distillation
    tool = int((number + 1) * config.tool_share) > int(number * config.tool_share)
    draw = rng(ctx.seed, "distillation", "level", name, doc.id)
    level = "tool" if tool else config.levels[int(draw.integers(len(config.levels)))]
    prompt = Prompt(
        id=hash_text("\x1f".join(["distillation", name, doc.id, level])),
        doc_id=doc.id,
        kind="tool" if tool else "cot",
        level=level,
        text=fill(level, doc.text),
    )
    return Request(prompt=prompt, text=doc.text)


def _parse(request: Request, reply: Reply, teacher: Teacher) -> Problem | Reject:
    """Turn a reply into a problem, or into a reject with its reason."""
    prompt = request.prompt
    reason, detail = reply.failure, reply.detail
    if not reason:
        try:
            parsed = parse_reply(reply.text, prompt.kind, reply.finish)
        except ReplyError as error:
            reason, detail = error.reason, error.detail
        else:
            return Problem(
                id=hash_text("\x1f".join([prompt.id, parsed.problem, parsed.solution])),
                prompt_id=prompt.id,
                doc_id=prompt.doc_id,
                kind=prompt.kind,
                level=prompt.level,
                problem=parsed.problem,
                solution=parsed.solution,
                answer=parsed.answer,
                origin=f"teacher:{teacher.name}",
                meta=reply.meta,
            )
    return Reject(
        id=prompt.id,
        stage="distillation",
        reason=reason,
        detail=detail,
        where=prompt.id,
        text=reply.text[:MAX_REJECT_TEXT],
    )


def _recorded(request: Request, reply: Reply) -> dict[str, Any]:
    return {
        "prompt_id": request.prompt.id,
        "prompt_hash": hash_text(request.prompt.text),
        "reply": reply.text,
        "finish": reply.finish,
        "meta": reply.meta,
    }


def _tally(rows: Sequence[Problem | Reject], wanted: int) -> dict[str, int]:
    parsed = sum(isinstance(row, Problem) for row in rows)
    return {
        "asked": len(rows),
        "parsed": parsed,
        "rejected": len(rows) - parsed,
        "texts_lacking": wanted - len(rows),
    }


def _counts(requests: Sequence[Request], rows: Sequence[Problem | Reject]) -> dict[str, Any]:
    problems = [row for row in rows if isinstance(row, Problem)]
    table: dict[str, Any] = {
        "asked": len(rows),
        "parsed": len(problems),
        "distinct": len({row.problem for row in problems}),
        "rejected": dict(sorted(Counter(row.reason for row in rows if isinstance(row, Reject)).items())),
        "by_kind": dict(sorted(Counter(row.kind for row in problems).items())),
        "by_level": {
            level: {
                "asked": sum(r.prompt.level == level for r in requests),
                "parsed": sum(row.level == level for row in problems),
            }
            for level in sorted({r.prompt.level for r in requests})
        },
    }
    for name in ("topic", "family"):
        table[f"by_{name}"] = dict(
            sorted(Counter(row.meta[name] for row in problems if name in row.meta).items())
        )
    return table


def check_files(recipe: "Recipe") -> None:
    """Read the recorded replies of a recipe as the stage will.

    Raises:
        Jz3Error: they can't be used.
    """
    teacher = recipe.distillation.teacher
    if teacher.kind == "recorded":
        RecordedTeacher(Path(teacher.recorded).expanduser())


def open_teacher(config: TeacherConfig, folder: Path, seed: int, avoid: Collection[str] = ()) -> Teacher:
    """Open the configured teacher.

    Args:
        config: which one.
        folder: the stage's folder; the endpoint's ledger of this run lies there.
        seed: the run's seed, for the offline teacher's draws.
        avoid: families of worked problems that the offline teacher must not write.

    Raises:
        Jz3Error: a key, package or file that it needs is missing.
    """
    if config.kind == "offline":
        from jz3.distillation.offline import OfflineTeacher

        return OfflineTeacher(seed, avoid)
    if config.kind == "recorded":
        return RecordedTeacher(Path(config.recorded).expanduser())
    from jz3.distillation.endpoint import EndpointTeacher

    return EndpointTeacher(config, folder)

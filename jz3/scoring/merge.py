"""From the shards' scores to the chosen texts: one selection over all, explained and counted."""

import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import jz3
from jz3.bm25 import tokenize
from jz3.corpus.config import MinHashConfig
from jz3.corpus.dedup import Deduplicator
from jz3.corpus.readers import SourceText
from jz3.errors import Jz3Error
from jz3.files import atomic_path, locked, raise_trouble, write_json, write_jsonl
from jz3.influence import negative_control
from jz3.scoring.config import ChooseSettings, ScoreSettings
from jz3.scoring.job import Job
from jz3.scoring.plan import Plan
from jz3.scoring.reading import Reader
from jz3.scoring.sets import choose_among
from jz3.scoring.shard import read_about, scores_path
from jz3.scoring.workers import missing_shards
from jz3.selection import Choice, Place, StreamingSelection

SLACK = (1.5, 4.0)
"""Candidates per text to choose at first, and by how much more if duplicates leave too few."""


ABOUT = {
    "influence": "cosine of gradients, mean over a target's queries",
    "hidden": "RDS+: cosine of position-weighted means of the last hidden states, mean over a target's queries",
    "bm25": "BM25 of the text for a target's problems and solutions, mean over the queries",
    "loss": "the text's own loss, highest first",
    "random": "drawn by the text's place in the corpus",
    "control": "cosine of gradients with the unrelated target's queries",
    "selected": "influence without repeats and within the sources' limit: selected.jsonl",
}
"""Per method of the manifest's table what its choice goes by."""


def merge(out: Path, plan: Plan, job: Job, choose: ChooseSettings) -> dict[str, Any]:
    """Write selected.jsonl, passed_over.jsonl, rejects.jsonl and manifest.json.

    Args:
        out: the run's folder, all shards done.
        plan: its plan.
        job: what `prepare` made.
        choose: how to choose.

    Returns:
        The manifest.

    Raises:
        Jz3Error: shards are missing or damaged, or no text could be scored.
    """
    # Slurm's last job may still choose when a command that was stopped is given again.
    with locked(out / ".choose.lock"):
        return _merge(out, plan, job, choose)


def _merge(out: Path, plan: Plan, job: Job, choose: ChooseSettings) -> dict[str, Any]:
    missing = missing_shards(out, plan)
    if missing:
        raise Jz3Error(f"{len(missing)} of {len(plan.shards)} shards are not scored yet; run again to go on")
    counts = _counts(out, plan, job)
    kept = counts["kept"]
    if not kept:
        raise Jz3Error(
            f"no text of the corpus could be scored: {json.dumps(counts['rejected'])}; see {out / 'rejects'}"
        )
    k = choose.count(kept)
    tasks = [t for t in job.tasks if t != "control"]
    many = k
    if choose.of_set:
        many = min(choose.candidates, kept)
        if many < k:
            raise Jz3Error(
                f"{choose.chooser} chooses {k:,} texts among {many:,} candidates; raise --candidates to {k} or more"
            )
    codes = {source: number for number, source in enumerate(counts["sources"])}
    limit = max(1, int(choose.source_quota * k)) if choose.source_quota < 1 else None
    slack = SLACK[0]
    with tempfile.TemporaryFile(dir=out) as spill:
        while True:
            selection = StreamingSelection(many, choose.combine, None if choose.of_set else limit, slack)
            for _, table in _tables(out, plan, ["hash", "line", "source", *_columns("influence", tasks)]):
                selection.add(_matrix(table, "influence", tasks), _places(table), _codes(table, codes))
            texts = _Spill(spill, plan, selection.candidates())
            filters = _Refuse(choose, texts)
            choices, refused, enough = selection.choose(filters)
            if enough:
                break
            slack *= SLACK[1]
        details = _details(out, plan, job, [c.place for c in choices], [*refused])
        if choose.of_set:
            choices, kept_out = choose_among(
                out,
                plan.settings,
                job,
                choices,
                choose.chooser,
                k,
                lambda place: details[place[1:]]["source"],
                limit,
            )
            refused |= kept_out
        passed = np.sort([_combined(details[place[1:]], tasks, choose) for place in refused])
        rows = (
            _row(rank, choice, texts[choice.place], details[choice.place[1:]], tasks, choose, kept, passed)
            for rank, choice in enumerate(choices)
        )
        write_jsonl(out / "selected.jsonl", rows)
    write_jsonl(
        out / "passed_over.jsonl",
        (
            {**_where(details[place[1:]]), "reason": reason, "repeats": filters.repeats.get(place, "")}
            for place, reason in refused.items()
        ),
    )
    _join_rejects(out, plan)
    ids = Counter(details[c.place[1:]]["id"] for c in choices)
    manifest = {
        "jz3": jz3.__version__,
        "run": job.key,
        "settings": plan.to_json()["settings"],
        "targets": plan.targets,
        "files": len(plan.files),
        "shards": len(plan.shards),
        "checkpoints": [
            {name: value for name, value in dataclasses.asdict(c).items() if name != "projection_hash"}
            for c in job.checkpoints
        ],
        "documents": {name: counts[name] for name in ("records", "kept", "rejected", "tokens", "cut")},
        "selection": {
            "wanted": k,
            "chosen": len(choices),
            "chooser": choose.chooser,
            "candidates": many if choose.of_set else None,
            "combine": choose.combine,
            "source_limit": limit,
            "near_duplicates": choose.near_duplicates,
            "similarity": choose.similarity,
            "passed_over": dict(sorted(Counter(refused.values()).items())),
            "lowest_score": min((c.score for c in choices), default=None),
            "repeated_ids": sum(n - 1 for n in ids.values()),
            "rule": _rule(choose, k, limit),
        },
        "methods": _methods(out, plan, job, choices, details, codes, k, choose.combine),
        "negative_control": negative_control(
            lambda: (t for _, t in _tables(out, plan, ["source", *_columns("influence", job.tasks)])),
            tasks,
            k,
        ),
    }
    write_json(out / "manifest.json", manifest)
    return manifest


def _counts(out: Path, plan: Plan, job: Job) -> dict[str, Any]:
    """Sum the shards' counts; every file of scores is looked at, so that a foreign one is named."""
    total: dict[str, Any] = {"records": 0, "kept": 0, "tokens": 0, "cut": 0}
    rejected: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    for shard in plan.shards:
        about = read_about(scores_path(out, shard.number), job.key)
        for name in total:
            total[name] += about[name]
        rejected.update(about["rejected"])
    for _, table in _tables(out, plan, ["source"]):
        sources.update(table["source"].tolist())
    return {**total, "rejected": dict(sorted(rejected.items())), "sources": dict(sorted(sources.items()))}


def _tables(out: Path, plan: Plan, columns: list[str]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Read columns of the scores shard by shard."""
    import pyarrow
    import pyarrow.parquet as pq

    for shard in plan.shards:
        path = scores_path(out, shard.number)
        try:
            with pq.ParquetFile(path) as file:
                table = file.read([c for c in columns if c in file.schema_arrow.names])
        except (pyarrow.ArrowException, OSError) as error:
            raise_trouble(error, path)
            raise Jz3Error(
                f"{path} is damaged ({error}); delete it and run the same command again"
            ) from error
        arrays = {name: table[name].to_numpy() for name in table.column_names}
        if table.num_rows:
            arrays["shard"] = np.full(table.num_rows, shard.number, np.int64)
            yield shard.number, arrays


def _columns(method: str, tasks: list[str]) -> list[str]:
    if method == "control":
        return ["influence:control"]
    return [f"{method}:{task}" for task in tasks] if method in ("influence", "hidden", "bm25") else [method]


def _matrix(table: dict[str, np.ndarray], method: str, tasks: list[str]) -> np.ndarray:
    return np.stack([table[c].astype(np.float64) for c in _columns(method, tasks)], 1)


def _places(table: dict[str, np.ndarray]) -> np.ndarray:
    """Name rows by the hash of their text first, so that equal scores don't favour the first files."""
    return np.stack([table["hash"].view(np.int64), table["shard"], table["line"]], 1)


def _codes(table: dict[str, np.ndarray], codes: dict[str, int]) -> np.ndarray:
    return np.array([codes[s] for s in table["source"]])


class _Spill:
    """Texts of the candidates on disk, read by place; memory holds where they stand."""

    def __init__(self, handle: Any, plan: Plan, places: list[Place]) -> None:
        handle.seek(0)
        handle.truncate()
        self._handle, self._at = handle, {}
        at = 0
        for shard, line, text in Reader(plan).read_places([(p[1], p[2]) for p in places]):
            data = json.dumps([text.text, text.where, text.meta], ensure_ascii=False).encode()
            handle.write(data)
            self._at[shard, line] = (at, len(data))
            at += len(data)

    def __getitem__(self, place: Place) -> SourceText:
        at, size = self._at[place[1], place[2]]
        self._handle.seek(at)
        text, where, meta = json.loads(self._handle.read(size))
        return SourceText(text=text, source="", where=where, meta=meta)


def check_choice(choose: ChooseSettings, settings: ScoreSettings) -> None:
    """Look for what the choice and the baselines need, before the work begins.

    Raises:
        Jz3Error: a package is missing; the message says how to get it, or do without.
    """
    deduplicator(choose)
    if choose.of_set and not settings.keep_features:
        raise Jz3Error(f"--chooser {choose.chooser} looks at the texts' features; add --keep-features")
    if "bm25" in settings.baselines:
        tokenize([])


def deduplicator(choose: ChooseSettings) -> Deduplicator:
    """Return what finds repeats among the chosen.

    Raises:
        Jz3Error: the package that it needs is missing.
    """
    return Deduplicator(MinHashConfig(enabled=choose.near_duplicates, threshold=choose.similarity))


class _Refuse:
    """Says which candidate repeats a better one."""

    def __init__(self, choose: ChooseSettings, texts: _Spill) -> None:
        self._texts = texts
        self._seen = deduplicator(choose)
        self.repeats: dict[Place, str] = {}
        """Per refused place, which chosen text it repeats."""

    def __call__(self, place: Place) -> str:
        text = self._texts[place]
        found = self._seen.admit(text.text, text.where)
        if found is None:
            return ""
        self.repeats[place] = found[1]
        return found[0]


def _details(
    out: Path, plan: Plan, job: Job, chosen: list[Place], refused: list[Place]
) -> dict[tuple[int, ...], dict[str, Any]]:
    """Read the whole rows of some places."""
    wanted: dict[int, set[int]] = {}
    for place in (*chosen, *refused):
        wanted.setdefault(place[1], set()).add(place[2])
    found: dict[tuple[int, ...], dict[str, Any]] = {}
    methods = ("influence", "hidden", "bm25", "loss", "random")
    columns = ["id", "source", "file", "line", "tokens", "norm"]
    columns += [c for method in methods for c in _columns(method, job.tasks)]
    for shard, table in _tables(out, plan, columns):
        if shard not in wanted:
            continue
        for row in np.flatnonzero(np.isin(table["line"], list(wanted[shard]))).tolist():
            found[shard, int(table["line"][row])] = {
                name: values[row].item() if isinstance(values[row], np.generic) else values[row]
                for name, values in table.items()
            }
    return found


def _where(details: dict[str, Any]) -> dict[str, Any]:
    return {name: details[name] for name in ("id", "source", "file", "line")}


def _row(
    rank: int,
    choice: Choice,
    text: SourceText,
    details: dict[str, Any],
    tasks: list[str],
    choose: ChooseSettings,
    kept: int,
    passed: np.ndarray,
) -> dict[str, Any]:
    """Return a chosen text with what decided; `passed` are the sorted scores of what was passed over."""
    scores = {task: details[f"influence:{task}"] for task in tasks}
    if choose.of_set:
        why = f"number {rank + 1:,} of the set by {choose.chooser}"
    elif choice.task >= 0:
        why = f"next best of {kept:,} for {tasks[choice.task]}, whose turn it was"
    else:
        highest = f"highest of its scores, for {max(scores, key=lambda t: scores[t])},"
        what = highest if choose.combine == "max" else "mean of its scores"
        better = len(passed) - int(np.searchsorted(passed, choice.score, "right"))
        why = f"{what} is number {rank + 1 + better:,} of {kept:,}"
        why += f", {better:,} of the better ones were passed over" if better else ""
    return {
        **_where(details),
        "text": text.text,
        "tokens": details["tokens"],
        "rank": rank,
        "score": choice.score,
        "scores": scores,
        "why": why,
    }


def _combined(details: dict[str, Any], tasks: list[str], choose: ChooseSettings) -> float:
    """Return what a text is ranked by, but for quotas."""
    scores = np.array([details[f"influence:{task}"] for task in tasks])
    return float(scores.max() if choose.combine == "max" else scores.mean())


def _rule(choose: ChooseSettings, k: int, limit: int | None) -> str:
    """Say in one sentence how the texts were chosen."""
    how = {
        "mean": f"the {k:,} texts with the highest mean of the tasks' scores",
        "max": f"the {k:,} texts with the highest of the tasks' scores",
        "quota": f"the tasks choose their best text in turn until there are {k:,}",
    }[choose.combine]
    if choose.of_set:
        best = f"the {choose.candidates:,} with the highest mean of the tasks' scores"
        how = f"{k:,} texts by {choose.chooser} among {best}"
    parts = [how, "equal scores by the text's hash", "a text that repeats a better one is passed over"]
    if choose.near_duplicates:
        parts.append(f"also a near repeat (Jaccard similarity of 5-word shingles from {choose.similarity})")
    if limit is not None:
        parts.append(f"at most {limit:,} of one source")
    return "; ".join(parts)


def _methods(
    out: Path,
    plan: Plan,
    job: Job,
    choices: list[Choice],
    details: dict[tuple[int, ...], dict[str, Any]],
    codes: dict[str, int],
    k: int,
    combine: str,
) -> dict[str, Any]:
    """Compare the choice with those of the baselines and the control, repeats not removed."""
    tasks = [t for t in job.tasks if t != "control"]
    methods = ["influence", *plan.settings.baselines, *(["control"] if "control" in job.tasks else [])]
    columns = [c for method in methods for c in _columns(method, tasks)]
    tops = {
        m: StreamingSelection(k, combine if m in ("influence", "hidden", "bm25") else "mean") for m in methods
    }
    for _, table in _tables(out, plan, ["hash", "line", "source", "tokens", *columns]):
        payload = np.stack([table["tokens"].astype(np.int64), _codes(table, codes)], 1)
        places = np.concatenate([_places(table), payload], 1)
        for method, top in tops.items():
            top.add(_matrix(table, method, tasks), places, payload[:, 1])
    names = list(codes)
    chosen = {m: [c.place for c in top.choose()[0]] for m, top in tops.items()}
    mine = {place[:3] for place in chosen["influence"]}
    result = {
        method: {
            "about": ABOUT[method],
            "mean_tokens": float(np.mean([place[3] for place in places])),
            "overlap_with_influence": len({place[:3] for place in places} & mine) / max(len(places), 1),
            "mix": dict(sorted(Counter(names[place[4]] for place in places).items())),
        }
        for method, places in chosen.items()
    }
    rows = [details[c.place[1:]] for c in choices]
    result["selected"] = {
        "about": ABOUT["selected"],
        "mean_tokens": float(np.mean([r["tokens"] for r in rows])) if rows else 0.0,
        "overlap_with_influence": len({c.place for c in choices} & mine) / max(len(rows), 1),
        "mix": dict(sorted(Counter(r["source"] for r in rows).items())),
    }
    return result


def _join_rejects(out: Path, plan: Plan) -> None:
    with atomic_path(out / "rejects.jsonl") as part, open(part, "wb") as handle:
        for shard in plan.shards:
            with open(out / "rejects" / f"{shard.number:06d}.jsonl", "rb") as source:
                while data := source.read(1 << 20):
                    handle.write(data)


def summary(manifest: dict[str, Any], say: Callable[[str], None]) -> None:
    """Tell what a run found in a few lines."""
    documents, chosen = manifest["documents"], manifest["selection"]
    rejected = ", ".join(f"{n} {reason}" for reason, n in documents["rejected"].items())
    say(
        f"scored {documents['kept']:,} of {documents['records']:,} records, {documents['tokens']:,} tokens"
        + (f"; rejected: {rejected}" if rejected else "")
    )
    passed = ", ".join(f"{n} {reason}" for reason, n in chosen["passed_over"].items())
    say(f"chosen {chosen['chosen']:,}: {chosen['rule']}" + (f"; passed over: {passed}" if passed else ""))
    for checkpoint in manifest["checkpoints"]:
        if found := checkpoint["fidelity"]:
            say(
                f"  fidelity   of {checkpoint['kind']} features to exact gradients: Spearman {found['spearman']:.3f} "
                f"per query ({found['documents']:.0f} unseen texts, {found['queries']:.0f} queries)"
            )
    for method, found in manifest["methods"].items():
        mix = sorted(found["mix"].items(), key=lambda pair: -pair[1])
        sources = ", ".join(f"{n:,} {source}" for source, n in mix[:5])
        shared = f"shares {found['overlap_with_influence']:.0%} with influence"
        say(f"  {method:10} {shared:28} {found['mean_tokens']:6.0f} tokens a text; {sources}")
    control = manifest["negative_control"]
    for task, overlap in control.get("overlap", {}).items():
        low, high = control["interval_given_sources"][task]
        say(
            f"  control    {task}: shares {overlap:.0%} with an unrelated target's choice; given the sources, "
            f"chance is {low:.0%} to {high:.0%}"
        )

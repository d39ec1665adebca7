"""`jz3 store info | verify | merge`."""

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jz3.errors import Jz3Error
from jz3.files import atomic_path, write_json
from jz3.store.format import CODES, differences, open_store, read_info, read_manifest
from jz3.store.reader import Store
from jz3.store.repeats import repeated_ids
from jz3.store.shard import has_shard, read_sidecar, shard_path


@dataclass(frozen=True, slots=True)
class Findings:
    """What `verify` found."""

    shards: int
    rows: int
    damaged: dict[str, str]
    """File name and what is wrong with it."""
    unfinished: list[str]
    """Files of shards that were never finished; they are ignored."""
    duplicates: list[tuple[str, str, str]]
    """Document ids that come more than once, with two of the shards' names; at most 20."""
    duplicate_count: int
    """Such ids; equal texts of a corpus have the same."""


def find_store(folder: Path | str) -> Path:
    """Return the store of a folder: the folder itself, or that of a run.

    Raises:
        Jz3Error: there is none, or one per checkpoint of `jz3 score`.
    """
    folder = Path(folder)
    for path in (folder, folder / "store", folder / "features" / "store"):
        if (path / "store.json").is_file():
            return path
    # One per checkpoint, see jz3.scoring.shard.store_folder.
    several = sorted(
        (path.parent for path in folder.glob("store-*/store.json")), key=lambda p: (len(p.name), p)
    )
    if several:
        raise Jz3Error(f"{folder} has a store per checkpoint; give {' or '.join(map(str, several))}")
    raise Jz3Error(f"{folder} is no feature store and no run with one (no store.json)")


def describe(folder: Path) -> dict[str, Any]:
    """Return what a store is: its manifest, shards, rows, bytes, damaged shards."""
    store = Store(folder)
    return {
        **read_manifest(folder),
        "code": CODES[store.info.bits],
        "identity": store.info.identity(),
        "shards": len(store.shards),
        "rows": len(store),
        "bytes": sum(s.size for s in store.shards),
        "damaged": store.damaged,
    }


def verify(folder: Path | str) -> Findings:
    """Read every byte of a store and compare checksums; find duplicate documents and leftovers."""
    store = Store(folder, verify=True)
    whole = {s.path.name for s in store.shards}
    unfinished = sorted(
        path.name
        for path in store.folder.iterdir()
        if path.name.endswith(".part")
        or (path.suffix == ".safetensors" and path.name not in whole and path.name not in store.damaged)
    )
    duplicates, count = repeated_ids([(s.path.name, s) for s in store.shards])
    return Findings(len(store.shards), len(store), store.damaged, unfinished, duplicates, count)


def merge_stores(
    sources: Sequence[Path | str], out: Path | str, say: Callable[[str], None] = lambda line: None
) -> int:
    """Make one store of the shards of several, linked where the file system allows it and copied elsewhere.

    Killed and run again it goes on. The shards are numbered in the order of the sources.

    Args:
        sources: compatible stores.
        out: the new store's folder.
        say: told how many documents come more than once.

    Returns:
        The number of shards.

    Raises:
        Jz3Error: a store is of another kind (the differences are named), a shard is damaged, or one
            is in two of the stores.
    """
    if not sources:
        raise ValueError("merge needs at least one store")
    if any(Path(folder).resolve() == Path(out).resolve() for folder in sources):
        raise ValueError(f"{out} can't be merged into itself; name a new folder")
    first = read_info(sources[0])
    stores = []
    for folder in sources:
        if different := differences(first, read_info(folder), (f"in {sources[0]}", f"in {folder}")):
            raise Jz3Error(f"stores that don't fit together: {'; '.join(different)}")
        store = Store(folder, verify=True)
        if store.damaged:
            raise Jz3Error(f"{folder} has damaged shards: {'; '.join(store.damaged.values())}")
        stores.append(store)
    shards = [shard for store in stores for shard in store.shards]
    seen: dict[str, Path] = {}
    for store in stores:
        # Within a store equal shards are a corpus's repeats; in two they are the same work counted twice.
        for shard in store.shards:
            if shard.xxh3 in seen:
                raise Jz3Error(f"{shard.path} is the same shard as {seen[shard.xxh3]}; merge it once")
        seen |= {shard.xxh3: shard.path for shard in store.shards}
    found = repeated_ids([(str(s.path), s) for s in shards])
    if found[1]:
        say(_repeats(*found))
    open_store(out, first)
    for number, shard in enumerate(shards):
        path = shard_path(out, number)
        if has_shard(out, number):
            if read_sidecar(path.with_suffix(".json"))["xxh3"] != shard.xxh3:
                raise Jz3Error(f"{path} is not {shard.path}: {out} holds something else; name a new folder")
            continue
        _link(shard.path, path)
        write_json(path.with_suffix(".json"), read_sidecar(shard.path.with_suffix(".json")))
    extra = len(Store(out).shards) - len(shards)
    if extra:
        raise Jz3Error(f"{out} holds {extra} more shards than the merged stores; name a new folder")
    return len(shards)


def command(
    action: str, folders: Sequence[Path], out: Path | None, say: Callable[[str], None] = print
) -> None:
    """Do what `jz3 store ACTION FOLDERS --out OUT` asks for.

    Raises:
        ValueError: the action or the folders are wrong.
        Jz3Error: `verify` found damage, or `merge` can't be done.
    """
    if action == "merge":
        if out is None:
            raise ValueError("store merge needs --out, the new store's folder")
        number = merge_stores([find_store(f) for f in folders], out, say)
        say(f"{out}: {number} shards, {len(Store(out))} documents")
        return
    if action not in ("info", "verify"):
        raise ValueError(f"store {action}: must be one of info, verify, merge")
    if out is not None:
        raise ValueError(f"store {action} writes nothing; --out {out} is for merge")
    if not folders:
        raise ValueError(f"store {action} needs the folder of a store or of a run")
    wrong = []
    for folder in map(find_store, folders):
        if action == "info":
            for key, value in describe(folder).items():
                say(f"{key:16} {value}")
            continue
        found = verify(folder)
        say(f"{folder}: {found.shards} whole shards, {found.rows} documents")
        for name in found.unfinished:
            say(f"  unfinished, ignored: {name}")
        for text in found.damaged.values():
            say(f"  damaged: {text}")
        if found.duplicate_count:
            say(_repeats(found.duplicates, found.duplicate_count))
        if found.damaged:
            wrong.append(f"{folder}: {len(found.damaged)} damaged shards")
    if wrong:
        raise Jz3Error("; ".join(wrong))


def _repeats(shown: list[tuple[str, str, str]], count: int) -> str:
    name, one, other = shown[0]
    return f"  note: {count} ids come more than once (equal texts), e.g. {name} in {one} and {other}"


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        with atomic_path(target) as part:
            shutil.copyfile(source, part)

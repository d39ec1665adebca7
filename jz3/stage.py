"""What a stage is given and what it leaves behind: folder, manifest, shards, progress."""

import contextlib
import ctypes
import dataclasses
import functools
import gc
import importlib
import logging
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jz3.errors import Jz3Error
from jz3.files import canonical_json, hash_text, read_json, read_jsonl, write_jsonl

if TYPE_CHECKING:
    from jz3.config import Recipe

T = TypeVar("T")

log = logging.getLogger(__name__)

INPUTS = "inputs"
"""The only key of a shard's first line."""
AHEAD = 128
"""Shards that a pool is given before the first of them is needed: two for each process of the largest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One step of the loop."""

    name: str
    """Also the name of its folder in the run."""
    target: str
    """`module:function`; the function takes a StageContext and returns the summary that goes into
    the manifest and into results.json. The module is imported when the stage runs."""
    needs: tuple[str, ...] = ()
    """Stages whose files it reads."""
    sections: tuple[str, ...] = ()
    """Sections of the recipe that its result depends on, or single settings of one: `section.setting`."""
    extends: bool = False
    """Whether its own files are kept by what they depend on, so that with other settings of its own it goes
    on with what fits instead of being refused."""
    check: str = ""
    """`module:function`; the function takes the folder of the finished stage and says what has been lost of it,
    so that the stage goes on; an empty text: nothing. Where none is named, what is finished stays so."""
    before: str = ""
    """`module:function`; the function takes the recipe and raises for files that the stage would refuse, so that
    a run with a broken one ends before its first stage."""

    def function(self) -> Callable[["StageContext"], dict[str, Any]]:
        """Import and return the stage's function."""
        return _imported(self.target)

    def lost(self, folder: Path) -> str:
        """Say what has been lost of the finished stage; empty: nothing."""
        return _imported(self.check)(folder) if self.check else ""

    def look_ahead(self, recipe: "Recipe") -> None:
        """Raise for files of the user that the stage would refuse."""
        if self.before:
            _imported(self.before)(recipe)


def _imported(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageContext:
    """Everything a stage may look at."""

    recipe: "Recipe"
    run_dir: Path
    name: str

    @property
    def out(self) -> Path:
        """The stage's own folder (it exists)."""
        return self.run_dir / self.name

    @property
    def seed(self) -> int:
        """The run's seed; draw with `jz3.seeding.rng(ctx.seed, ctx.name, record_id)`."""
        return self.recipe.seed

    def path(self, stage: str, name: str) -> Path:
        """Return a finished file of another stage, or say which stage has to run first."""
        path = self.run_dir / stage / name
        if not path.exists():
            raise Jz3Error(f"{path} is missing; run the stage {stage!r} first")
        return path

    def rows(self, stage: str, name: str) -> list[dict[str, Any]]:
        """Read a whole JSON-lines file of another stage."""
        return list(read_jsonl(self.path(stage, name)))

    def training_key(self, stage: str) -> str:
        """Return the hash of all that a stage's trained model depends on; nothing where none is noted."""
        path = self.run_dir / stage / "model" / "training.json"
        return read_json(path)["key"] if path.exists() else ""

    def manifest(self, stage: str) -> dict[str, Any]:
        """Return the manifest of a finished stage."""
        return read_json(self.path(stage, "manifest.json"))

    @contextlib.contextmanager
    def progress(self, total: int, label: str) -> Iterator[Callable[[int], None]]:
        """Show a progress bar with an estimate of the time left.

        Args:
            total: how many units there are.
            label: what they are, e.g. `texts`.

        Yields:
            A function to call with the number of units just done.
        """
        with progress_bar(total, f"{self.name}: {label}") as advance:
            yield advance

    def shards(
        self,
        folder: str,
        items: Sequence[T],
        size: int,
        work: Callable[[list[T]], list[dict[str, Any]]],
        label: str,
        beside: str = "",
        pool: Executor | None = None,
    ) -> "ShardRows":
        """Map `work` over `items` in shards that survive a kill.

        Each shard is written whole under `<stage>/<folder>/`, behind a line with the hash of its inputs;
        running again computes only those that are missing or were made from others.

        Args:
            folder: the folder of the shards, inside the stage's own.
            items: the inputs, dataclasses in a fixed order; they are asked for a shard at a time.
            size: how many inputs a shard holds.
            work: inputs of one shard to its output rows; must not depend on other shards.
            label: what the items are, for the progress bar.
            beside: what the rows depend on beside the items and the recipe, such as the model that writes them.
            pool: does the work of several shards at a time, if it is given; `work` must be what it can send.

        Returns:
            The rows of all shards, in order.
        """
        paths: list[Path] = []
        begun: deque[tuple[Path, str, int, Callable[[], list[dict[str, Any]]]]] = deque()

        def finish() -> None:
            path, inputs, count, made = begun.popleft()
            if inputs:
                write_jsonl(path, [{INPUTS: inputs}, *made()])
            paths.append(path)
            advance(count)

        with self.progress(len(items), label) as advance:
            for number, start in enumerate(range(0, len(items), size)):
                part = list(items[start : start + size])
                path = self.out / folder / f"{number:06d}.jsonl"
                inputs = _hash_of(beside, part)
                if _made_from(path, inputs):
                    begun.append((path, "", len(part), list))
                else:
                    made = pool.submit(work, part).result if pool else functools.partial(work, part)
                    begun.append((path, inputs, len(part), made))
                while len(begun) > (AHEAD if pool else 0):
                    finish()
            while begun:
                finish()
        return ShardRows(paths)


class ShardRows(Iterable[dict[str, Any]]):
    """The rows of shards, read from their files each time that they are gone through."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (row for path in self._paths for row in read_jsonl(path) if row.keys() != {INPUTS})


def _hash_of(beside: str, items: list[Any]) -> str:
    return hash_text(canonical_json([beside, *map(dataclasses.asdict, items)]))


def _made_from(path: Path, inputs: str) -> bool:
    """Tell whether a shard is there and of these inputs; older versions did not note what theirs were of."""
    if not path.exists():
        return False
    found = next(read_jsonl(path), {}).get(INPUTS, inputs)
    if found != inputs:
        log.warning("%s was made from other inputs; it is made again", path)
    return found == inputs


@contextlib.contextmanager
def progress_bar(total: int, label: str) -> Iterator[Callable[[int], None]]:
    """Show progress on stderr: a bar on a terminal, a line every 15 seconds elsewhere."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(label, total=total)
            yield lambda n=1: bar.advance(task, n)
        return
    done, start = 0, time.monotonic()
    last = start

    def advance(n: int = 1) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= 15 or done == total:
            last = now
            left = (now - start) / max(done, 1) * (total - done)
            print(
                f"  {label}: {done}/{total}, {now - start:.0f} s, about {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    yield advance


def reset_peak_memory() -> None:
    """Start a new peak of this process's resident memory, where the kernel allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Return the peak resident memory in bytes of this process since `reset_peak_memory`."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def release_memory() -> None:
    """Give freed memory back to the system: cycles through autograd graphs first, then heap and GPU."""
    gc.collect()
    trim_heap()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        # What torch keeps for itself is lacking to vLLM's or a launcher's processes on the same GPU.
        torch.cuda.empty_cache()


def trim_heap() -> None:
    """Give the heap's free memory back to the system, without the second that a search for cycles takes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)

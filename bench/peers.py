"""What others need for features of the same texts (bench/gradients.py), and what those keep (bench/fidelity.py).

JZ3_PEER_PYTHON names the interpreters that have them, separated by `:` (their pins conflict, so as a rule every peer
has an environment of its own): bergson, dattri-llm, traker, and for LESS's recipe traker and peft. Everyone gets the
token lists that jz3 gets, as many threads, and the linear layers of the blocks (LESS: its adapters). Those that form
whole gradients get a few of the texts only. A peer that no interpreter has is called absent, with the reason.
"""

import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jz3.gradients import Tokens

RUNNER = Path(__file__).resolve().parent / "peer_runner.py"
MARK = "jz3-peer "
"""As in peer_runner.py, which runs where jz3 isn't."""
VARIABLE = "JZ3_PEER_PYTHON"
STORED = ("bergson", "dattri-llm")
"""Who writes the projected gradients of all layers to disk: what bench/fidelity.py compares."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One line of the table."""

    name: str
    runner: str
    """Its name in peer_runner.py."""
    needs: tuple[str, ...]
    """Packages."""
    dtype: str
    """Of the model."""
    texts: int = 0
    """At most so many of them; 0: all."""


PEERS = (
    Peer("bergson", "bergson", ("bergson",), "bfloat16"),
    Peer("bergson float32", "bergson", ("bergson",), "float32"),
    Peer("dattri-llm", "dattri-llm", ("dattri_llm", "dattri"), "bfloat16", 16),
    Peer("dattri-llm float32", "dattri-llm", ("dattri_llm", "dattri"), "float32", 16),
    Peer("traker float32, 8 of 2048 numbers", "traker", ("trak",), "float32", 2),
    Peer("LESS float32, 64 of 8192 numbers", "less", ("trak", "peft"), "float32", 16),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """What a peer did, or why there is nothing."""

    tokens_per_s: float = 0.0
    shape: tuple[int, ...] = ()
    """Texts, numbers per text."""
    reason: str = ""

    @property
    def cell(self) -> float | str:
        """Tokens per second, or the reason."""
        return self.reason or self.tokens_per_s


def interpreters() -> dict[str, set[str]]:
    """Return the peers' interpreters with the packages that each of them has."""
    packages = sorted({p for peer in PEERS for p in peer.needs})
    probe = f"import importlib.util as u; print(*[p for p in {packages} if u.find_spec(p)])"
    found = {}
    for python in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        done = subprocess.run([python, "-c", probe], capture_output=True, text=True, env=_environment(1))
        if done.returncode:
            raise SystemExit(f"{VARIABLE}: {python} does not run: {_last(done.stderr)}")
        found[python] = set(done.stdout.split())
    return found


class Running:
    """A peer's process, warmed up, that runs whenever it is told to."""

    def __init__(
        self, peer: Peer, folder: Path, texts: Sequence[Tokens], threads: int, rows: Path | None = None
    ) -> None:
        """Start it, if an interpreter has the peer.

        Args:
            peer: who.
            folder: the model.
            texts: whose features it computes.
            threads: of its process.
            rows: where the first run's features go as a .npy file, if anywhere.
        """
        self.reason, self._seconds, self._shape = "", [], ()
        self._process: subprocess.Popen[str] | None = None
        known = interpreters()
        python = next((p for p, packages in known.items() if packages.issuperset(peer.needs)), None)
        if python is None:
            where = f"no interpreter of {VARIABLE} has" if known else f"{VARIABLE} is not set; wanted:"
            self.reason = f"absent: {where} {' and '.join(peer.needs)}"
            return
        if peer.texts:
            texts = texts[:: max(1, len(texts) // peer.texts)][: peer.texts]
        self._tokens = sum(len(t.ids) for t in texts)
        self._folder = tempfile.TemporaryDirectory()
        tokens = Path(self._folder.name) / "tokens.json"
        tokens.write_text(json.dumps([(t.ids, t.start) for t in texts]), encoding="utf-8")
        self._errors = open(Path(self._folder.name) / "errors", "w+", encoding="utf-8")  # noqa: SIM115
        self._process = subprocess.Popen(
            [
                python,
                str(RUNNER),
                peer.runner,
                str(folder),
                str(tokens),
                peer.dtype,
                str(rows) if rows else "",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=_environment(threads),
            cwd=self._folder.name,
        )
        self._answer()

    def run(self) -> None:
        """Run once more; after a failure this does nothing."""
        if self._process is None or self.reason:
            return
        assert self._process.stdin is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        if answer := self._answer():
            self._seconds.append(answer["seconds"])
            self._shape = tuple(answer["shape"])

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line[len(MARK) :])
        self._process.wait()
        self._errors.seek(0)
        self.reason = f"failed: {_last(self._errors.read())}"
        return {}

    def close(self) -> Measured:
        """End the process and return what it did; the median run counts."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()
            self._errors.close()
            self._folder.cleanup()
        if self.reason or not self._seconds:
            return Measured(reason=self.reason or "not run")
        return Measured(self._tokens / statistics.median(self._seconds), self._shape)


def run_peer(
    peer: Peer, folder: Path, texts: Sequence[Tokens], threads: int, runs: int, rows: Path | None = None
) -> Measured:
    """Time a peer, after a warm-up; see Running. The median of `runs` counts."""
    running = Running(peer, folder, texts, threads, rows)
    for _ in range(runs):
        running.run()
    return running.close()


def peer_features(
    folder: Path, texts: Sequence[Tokens], threads: int
) -> Iterator[tuple[str, Measured, np.ndarray | None]]:
    """Yield name, measurement and unit rows [N, K] of every peer that stores all layers' gradients, projected."""
    for peer in (p for p in PEERS if p.runner in STORED and p.dtype == "bfloat16"):
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "rows.npy"
            measured = run_peer(replace(peer, texts=0), folder, texts, threads, 1, path)
            rows = None if measured.reason else np.load(path)
        yield (
            peer.name,
            measured,
            None if rows is None else rows / np.linalg.norm(rows, axis=1, keepdims=True),
        )


def _environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]

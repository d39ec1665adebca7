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

import numpy as np

from jz3.gradients import Tokens

RUNNER = Path(__file__).resolve().parent / "peer_runner.py"
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


def run_peer(
    peer: Peer, folder: Path, texts: Sequence[Tokens], threads: int, runs: int, rows: Path | None = None
) -> Measured:
    """Time a peer, after a warm-up.

    Args:
        peer: who.
        folder: the model.
        texts: whose features it computes.
        threads: of its process.
        runs: how many are timed; the median counts.
        rows: where its features go as a .npy file, if anywhere.

    Returns:
        The speed, or the reason why there is none.
    """
    known = interpreters()
    python = next((p for p, packages in known.items() if packages.issuperset(peer.needs)), None)
    if python is None:
        where = f"no interpreter of {VARIABLE} has" if known else f"{VARIABLE} is not set; wanted:"
        return Measured(reason=f"absent: {where} {' and '.join(peer.needs)}")
    if peer.texts:
        texts = texts[:: max(1, len(texts) // peer.texts)][: peer.texts]
    with tempfile.TemporaryDirectory() as temporary:
        tokens = Path(temporary) / "tokens.json"
        tokens.write_text(json.dumps([(t.ids, t.start) for t in texts]), encoding="utf-8")
        command = [python, str(RUNNER), peer.runner, str(folder), str(tokens), peer.dtype, str(runs)]
        command.append(str(rows) if rows else "")
        done = subprocess.run(
            command, capture_output=True, text=True, env=_environment(threads), cwd=temporary
        )
    if done.returncode:
        return Measured(reason=f"failed: {_last(done.stderr)}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    speed = sum(len(t.ids) for t in texts) / statistics.median(result["seconds"])
    return Measured(speed, tuple(result["shape"]))


def run_peers(
    folder: Path, texts: Sequence[Tokens], threads: int, runs: int, names: Sequence[str] | None = None
) -> dict[str, Measured]:
    """Time every peer, or those named, on the same texts."""
    wanted = [peer for peer in PEERS if names is None or peer.name in names]
    return {peer.name: run_peer(peer, folder, texts, threads, runs) for peer in wanted}


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

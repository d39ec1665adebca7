"""What `jz3 score` was asked for, in a form that a job on another machine can read."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jz3.files import read_json, write_json
from jz3.scoring.config import ChooseSettings, ScoreSettings
from jz3.scoring.job import Job, prepare
from jz3.scoring.plan import Plan, open_plan


@dataclass(frozen=True, slots=True)
class Request:
    """Everything that decides what a run computes, but for what the machine that plans it settles."""

    corpus: tuple[str, ...]
    targets: dict[str, Path]
    """Per target its file, the negative control's under `control`."""
    settings: ScoreSettings
    choose: ChooseSettings

    def write(self, path: Path) -> None:
        """Write the request as JSON."""
        table = dataclasses.asdict(self)
        # Pairs, as their order, which is that of the scores' columns, counts.
        write_json(path, {**table, "targets": [[name, str(file)] for name, file in self.targets.items()]})

    @classmethod
    def read(cls, path: Path) -> "Request":
        """Read what `write` wrote."""
        table = read_json(path)
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in table["settings"].items()
        }
        targets = {name: Path(file) for name, file in table["targets"]}
        choose = ChooseSettings(**table["choose"])
        return cls(tuple(table["corpus"]), targets, ScoreSettings(**settings), choose)

    def plan(self, out: Path, threads: int, say: Callable[[str], None] = lambda line: None) -> Plan:
        """Make the run's plan, or check that the one it has is for this request; see `open_plan`."""
        return open_plan(out, self.corpus, self.settings, self.targets, threads, say)

    def prepare(
        self, out: Path, threads: int, say: Callable[[str], None] = lambda line: None
    ) -> tuple[Plan, Job]:
        """Make the run's plan and fits, on the kind of machine that is to do the shards.

        What the request leaves open (dtype `auto`, 0 threads) is settled here.

        Raises:
            Jz3Error: see `open_plan` and `prepare`.
        """
        plan = self.plan(out, threads, say)
        return plan, prepare(out, plan, self.targets, say)

"""Settings of the comparison stage."""

from dataclasses import dataclass, field

from jz3.selection.config import BUILT_IN
from jz3.training.config import TrainSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonConfig:
    """Trainings on equally many tokens of each chooser's texts, judged by the targets' problems."""

    tokens: int = 0
    """Tokens of text that each model is trained on (in every epoch); 0: no comparison."""
    more_tokens: tuple[int, ...] = ()
    """Further budgets, each compared like `tokens`."""
    methods: tuple[str, ...] = ("influence", "matching", "random")
    """Choosers: columns of the influence stage's table (`influence`, `hidden`, `bm25`, `loss`, `random`), `dot`
    (influence times the gradient's norm), `mix` (ranks of influence and hidden states), `stratified`
    (influence within every source, in the pool's proportions), `control` (what an unrelated target would
    choose), the choosers of sets `matching`, `coverage`, `diverse`, `preconditioned` (an inverse covariance
    between text and target; all four among `selection.candidates`), and the names of `runs`."""
    runs: tuple[tuple[str, str], ...] = ()
    """Further choosers: pairs of a name and the folder of another run over the same texts and tasks, whose
    influence scores (of another kind of features, of a later checkpoint) choose under that name; of several runs
    under one name the mean chooses. Texts that a run rejected (say, without a completion) come last in it."""
    without_sources: tuple[str, ...] = ()
    """Sources whose texts nobody may choose: a second pool from the same scores."""
    per_task: bool = False
    """Choose for each task by itself and judge by that task, instead of for all together."""
    seeds: int = 1
    """Trainings of each choice, with other orders of the texts; `random` also draws anew."""
    problems: int = 0
    """How many evaluation problems are scored per task; 0: all."""
    workers: int = 1
    """Trainings at a time, in processes of their own."""
    train: TrainSettings = field(default_factory=lambda: TrainSettings(schedule="constant", warmup=0.1))

    def __post_init__(self) -> None:
        for name in ("seeds", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"comparison: {name} must be at least 1, got {getattr(self, name)}")
        for budget in (self.tokens, *self.more_tokens):
            if budget < 0:
                raise ValueError(f"comparison: tokens must not be negative, got {budget}")
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"comparison: a method is named twice in {', '.join(self.methods)}")
        if self.problems < 0:
            raise ValueError(f"comparison: problems must not be negative, got {self.problems}")
        for name, _ in self.runs:
            if name in BUILT_IN or not name or ":" in name:
                raise ValueError(f"comparison.runs: the name {name!r} is taken, empty or has a colon")
        # Known here already: the stage itself comes hours after features and influence.
        known = (*BUILT_IN, *dict(self.runs))
        if unknown := [name for name in self.methods if name not in known]:
            raise ValueError(f"comparison: methods must be of {', '.join(known)}, got {unknown[0]!r}")
        if len(set(self.runs)) < len(self.runs):
            raise ValueError("comparison.runs: a folder is named twice under one name")

"""Settings of the selection, and what may choose."""

from dataclasses import dataclass

from jz3.selection.best import COMBINE

SETS = ("matching", "coverage", "diverse", "preconditioned")
"""Choosers that look at the candidates' features, see jz3.selection.sets."""
DERIVED = ("dot", "mix", "stratified")
"""`dot`: influence times the gradient's norm; `mix`: mean of the ranks by influence and by hidden states;
`stratified`: influence, with as many texts of every source as the pool has in proportion."""
GRADIENTS = ("influence", *DERIVED, *SETS)
"""Choosers that use gradients."""
BASELINES = ("hidden", "bm25", "loss", "random")
"""Columns of the influence stage without gradients."""
BUILT_IN = (*GRADIENTS, *BASELINES, "control")


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionConfig:
    """How many texts are chosen, by what, and how tasks are combined."""

    k: int = 4000
    """Texts to choose (the paper's second teacher round has 4k)."""
    chooser: str = "matching"
    """`influence` (best cosines), another chooser of single texts (`dot`, `mix`, `stratified`), one of sets
    (`matching`, `coverage`, `diverse`, `preconditioned`), or a baseline of the influence stage. In
    docs/selection.md `matching` and `influence` gave most: equal at 5% of the pool, `matching` ahead at 10%."""
    candidates: int = 20_000
    """Texts of highest influence that the choosers of sets choose from."""
    combine: str = "mean"
    """`mean` or `max` of the tasks' scores, or `quota`: the same number of texts for every task.
    `max` can collapse onto one task."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"selection.k must be at least 1, got {self.k}")
        if self.chooser not in BUILT_IN or self.chooser == "control":
            known = ", ".join(name for name in BUILT_IN if name != "control")
            raise ValueError(f"selection.chooser must be one of {known}, got {self.chooser!r}")
        if self.combine not in COMBINE:
            raise ValueError(f"selection.combine must be one of {', '.join(COMBINE)}, got {self.combine!r}")
        if self.chooser in SETS and self.combine == "max":
            raise ValueError(
                f"selection: the chooser {self.chooser!r} combines tasks by mean or quota; for max "
                "set chooser = 'influence'"
            )
        if self.candidates < 1:
            raise ValueError(f"selection.candidates must be at least 1, got {self.candidates}")
        if self.chooser in SETS and self.k > self.candidates:
            raise ValueError(
                f"selection: {self.chooser!r} chooses k ({self.k}) among candidates ({self.candidates}); raise "
                "selection.candidates"
            )

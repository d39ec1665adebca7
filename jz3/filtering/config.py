"""Settings of the filters."""

from dataclasses import dataclass, field

from jz3.grading.sandbox import SandboxConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationFile:
    """A further evaluation set to keep out of the training data."""

    path: str
    """A JSON-lines file."""
    name: str = ""
    """Its name in the report; the file's name if empty."""
    fields: tuple[str, ...] = ("question",)
    """The fields that make up a question, in order, e.g. `["body", "question"]`."""

    def __post_init__(self) -> None:
        if not self.fields:
            raise ValueError(
                f"evaluation file {self.path!r}: fields must name what makes up a question, got none"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class FilteringConfig:
    """Which problems are kept."""

    include_distillation: bool = True
    """Filter the teacher's problems too, by the same rules, and keep the good ones."""
    max_problem_chars: int = 4000
    max_solution_chars: int = 12000
    min_problem_chars: int = 15
    min_solution_chars: int = 15
    max_foreign_letters: float = 0.2
    """Refuse a problem with a larger share of letters that are neither Latin nor Greek."""
    reject_multi_part: bool = True
    """Refuse problems with several questions, (a) ... (b) ...: one boxed answer can't answer them."""
    reject_yes_no: bool = True
    """Refuse problems answered by yes or no: a coin answers half of them."""
    reject_proofs: bool = True
    """Refuse problems that ask for a proof: the answer can't be compared."""
    reject_self_corrections: bool = True
    """Refuse solutions that find themselves wrong half-way."""
    reject_meta_talk: bool = True
    """Refuse texts that talk about the task, the level or themselves."""
    max_repeated_share: float = 0.4
    """Refuse a text of which 8-word phrases repeated four times or more make up a larger share."""
    near_duplicate: float = 0.8
    """Jaccard similarity of 5-word phrases from which a problem is a duplicate, looked for in about 2 KB of memory a
    row kept; 0: exact ones only."""
    ngram: int = 13
    """Length in words of the phrases compared with evaluation questions; a shorter question must be
    contained whole."""
    min_question_share: float = 0.7
    """Refuse a row that covers at least this share of an evaluation question's words, so that common
    formulas alone don't count."""
    min_question_words: int = 6
    """An evaluation question with fewer words must be the whole problem; such questions are counted."""
    evaluation_files: tuple[EvaluationFile, ...] = ()
    """Evaluation sets beside the run's own and those of `evaluation.benchmarks`, which are always kept out."""
    executions: int = 2
    """How often a tool solution must print its stated output, each time with other string hashes, so
    that kept rows don't depend on chance, time or hash order."""
    cross_check: str = "vote"
    """How answers of natural-language solutions are checked: `none`, `vote` (the majority of the
    solutions of the same problem) or `tool` (an executed tool solution of the same problem)."""
    require_cross_check: bool = False
    """Refuse rows for which there is nothing to check against."""
    workers: int = 0
    """Processes that read rows at once, where there are many; 0: one for each core, up to 64."""
    shard_size: int = 256
    """Tool rows to a shard; what is lost by a kill."""
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)

    def __post_init__(self) -> None:
        if self.cross_check not in ("none", "vote", "tool"):
            raise ValueError(f"filtering.cross_check must be none, vote or tool, got {self.cross_check!r}")
        if self.ngram < 2 or self.shard_size < 1 or self.executions < 1 or self.min_question_words < 1:
            raise ValueError(
                "filtering: ngram must be at least 2, shard_size, executions and min_question_words at least 1; got "
                f"{self.ngram}, {self.shard_size}, {self.executions}, {self.min_question_words}"
            )
        for what in ("problem", "solution"):
            least, most = getattr(self, f"min_{what}_chars"), getattr(self, f"max_{what}_chars")
            if not 0 <= least <= most:
                raise ValueError(
                    f"filtering: min_{what}_chars must lie in 0..max_{what}_chars, got {least} and {most}"
                )
        if self.workers < 0:
            raise ValueError(f"filtering.workers must be 0 or more, got {self.workers}")
        for name in ("max_foreign_letters", "max_repeated_share", "near_duplicate", "min_question_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"filtering.{name} must lie in [0, 1], got {getattr(self, name)!r}")

"""Settings of the targets: tasks, negative control and instruction data."""

from dataclasses import dataclass


def _check_source(config: "TaskConfig | InstructionConfig", where: str) -> None:
    if not config.name:
        raise ValueError(f"{where}: name must not be empty")
    if config.kind not in ("jsonl", "worked"):
        raise ValueError(f"{where}: kind must be jsonl or worked, got {config.kind!r}")
    if config.kind == "jsonl" and not config.path:
        raise ValueError(f"{where}: kind 'jsonl' needs a path")
    if config.kind == "worked" and not config.families:
        raise ValueError(f"{where}: kind 'worked' needs families")
    if not 0 <= config.tool_share <= 1:
        raise ValueError(f"{where}: tool_share must lie in 0..1, got {config.tool_share}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskConfig:
    """A target task."""

    name: str
    """Scores are kept under this name."""
    kind: str = "jsonl"
    """`jsonl` (a file of problems with solutions) or `worked` (families of `jz3.worked`)."""
    families: tuple[str, ...] = ()
    """worked: the families, in equal shares."""
    path: str = ""
    """jsonl: a file or glob with one problem a line."""
    eval_path: str = ""
    """jsonl: the file of the evaluation problems; if empty, a quarter of `path` (by hash) is theirs."""
    problem_field: str = "question"
    """jsonl: the field with the problem, bare or as the paper's data have it (`## Question ... ## Solution`)."""
    solution_field: str = "answer"
    """jsonl: the field with the solution, in GSM8K's form (ends with `#### 18`) or with \\boxed{}."""
    answer_field: str = ""
    """jsonl: the field with the bare answer, if the solution doesn't state it in either form."""
    fit: int = 100
    """Queries that the fit and the selection see."""
    unseen: int = 20
    """Queries kept back to measure the fidelity of the features."""
    eval: int = 200
    """Problems for evaluation."""
    tool_share: float = 0.0
    """worked: share of the fit and unseen queries whose solution is a program."""

    def __post_init__(self) -> None:
        _check_source(self, f"target {self.name!r}")
        for count in ("fit", "unseen", "eval"):
            if getattr(self, count) < 0:
                raise ValueError(
                    f"target {self.name!r}: {count} must be 0 or more, got {getattr(self, count)}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructionConfig:
    """A source of instruction data for the second stage of the training."""

    name: str
    """Kept as the rows' task."""
    kind: str = "jsonl"
    """`jsonl` or `worked`."""
    families: tuple[str, ...] = ()
    """worked: the families, in equal shares."""
    path: str = ""
    """jsonl: a file or glob; a solution with a ```python block becomes a tool row."""
    problem_field: str = "question"
    """jsonl: the field with the problem, bare or as the paper's data have it (`## Question ... ## Solution`)."""
    solution_field: str = "answer"
    """jsonl: the field with the solution."""
    answer_field: str = ""
    """jsonl: the field with the bare answer, if the solution doesn't state it."""
    count: int = 1000
    """How many rows; jsonl: 0 takes all. Several solutions of a problem are as many rows."""
    tool_share: float = 0.5
    """worked: share of the rows whose solution is a program."""

    def __post_init__(self) -> None:
        _check_source(self, f"instruction {self.name!r}")
        if self.count < (self.kind == "worked"):
            raise ValueError(
                f"instruction {self.name!r}: count must be positive (jsonl: or 0 for all), got {self.count}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlConfig:
    """The negative control: texts that have nothing to do with the tasks."""

    kind: str = "docstrings"
    """`docstrings` (of a package) or `jsonl`."""
    package: str = "stdlib"
    """docstrings: an installed package, a part of one, or `stdlib` without its mathematical modules."""
    path: str = ""
    """jsonl: a file or glob."""
    text_field: str = "text"
    """jsonl: the field with the text."""
    count: int = 100
    """How many queries; 0 for no control."""
    max_chars: int = 800
    """Longer texts are cut at the end; the first third is the prompt, the rest the completion."""

    def __post_init__(self) -> None:
        if self.kind not in ("docstrings", "jsonl"):
            raise ValueError(f"control: kind must be docstrings or jsonl, got {self.kind!r}")
        if self.kind == "jsonl" and not self.path:
            raise ValueError("control: kind 'jsonl' needs a path")
        if self.count < 0 or self.max_chars < 60:
            raise ValueError(f"control: count must be 0 or more and max_chars 60 or more, got {self!r}")


DEFAULT_TASKS = (
    TaskConfig(name="word_problems", kind="worked", families=("gsm_symbolic",)),
    TaskConfig(name="number_algebra", kind="worked", families=("gcd", "lcm", "simple_equations")),
)
DEFAULT_INSTRUCTION = (
    InstructionConfig(
        name="worked", kind="worked", families=("gsm_symbolic", "gcd", "lcm", "simple_equations", "products")
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetsConfig:
    """The tasks, the negative control and the instruction data."""

    tasks: tuple[TaskConfig, ...] = DEFAULT_TASKS
    """What the model is to get better at; selection weighs them by its own settings."""
    control: ControlConfig = ControlConfig()
    """Unrelated texts; their best documents should overlap with the tasks' at chance only."""
    instruction: tuple[InstructionConfig, ...] = DEFAULT_INSTRUCTION
    """Data of the training's second stage."""

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        if not names:
            raise ValueError("targets: no tasks; add a [[targets.tasks]] table")
        for name in names:
            if names.count(name) > 1 or name == "control":
                raise ValueError(
                    f"targets: the task name {name!r} is taken; names must differ and not be 'control'"
                )

"""The settings of the evaluation."""

from dataclasses import dataclass, field

from jz3.engines.base import EngineConfig
from jz3.grading.sandbox import SandboxConfig

SETTINGS = ("nl", "tool")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkConfig:
    """A benchmark file beside the recipe's own held-out problems."""

    name: str
    """The task's name in the results, e.g. `gsm8k`."""
    path: str
    """A JSON-lines file in the field layout of the original."""
    limit: int = 0
    """Only so many problems, spread evenly over the file; 0 is all."""
    tolerance: float = 0.0
    """Up to what relative difference a number is the right one, where a file's own answers are rounded (1e-4 in the
    paper's grader, for all)."""

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ValueError(f"benchmark {self.name!r}: limit must not be negative, got {self.limit}")
        if not 0 <= self.tolerance <= 0.01:
            raise ValueError(
                f"benchmark {self.name!r}: tolerance must lie between 0 and 0.01, got {self.tolerance}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """How models are evaluated: greedy, and zero-shot but for `base_shots`."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    """`transformers` or `vllm`; it has to load the models itself."""
    settings: tuple[str, ...] = SETTINGS
    """`nl` (solve in words) and `tool` (solve with Python that is executed)."""
    limit: int = 0
    """Only so many problems of each task are solved, spread evenly; 0 is all. The negative
    log-likelihood is always taken over all."""
    base_shots: int = 0
    """Solved examples, of the targets' own queries and, where those are too few (of Python, say), of the instruction
    data, in front of each problem that the base model gets, which hasn't been taught the prompt: else a part of what
    the training gains is the prompt. The trained model gets none. The paper gives its base models 5."""
    max_new_tokens: int = 1024
    """Of a solution; in the tool setting, of each round."""
    rounds: int = 4
    """Generate-execute rounds of the tool setting."""
    output_limit: int = 400
    """Characters of an output block that the model gets to see."""
    nll_batch_tokens: int = 4096
    """Padded tokens of a batch when reference solutions are scored."""
    shard_size: int = 128
    """Problems between two saved points."""
    benchmarks: tuple[BenchmarkConfig, ...] = ()
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)

    def __post_init__(self) -> None:
        for setting in self.settings:
            if setting not in SETTINGS:
                raise ValueError(f"evaluation setting {setting!r} is unknown; choose {' or '.join(SETTINGS)}")
        if self.engine.name == "openai":
            raise ValueError(
                "evaluation loads two models itself: its engine must be transformers or vllm, not openai"
            )
        for name in ("max_new_tokens", "rounds", "output_limit", "nll_batch_tokens", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"evaluation {name} must be at least 1, got {getattr(self, name)}")
        for name in ("limit", "base_shots"):
            if getattr(self, name) < 0:
                raise ValueError(f"evaluation {name} must not be negative, got {getattr(self, name)}")
        names = [benchmark.name for benchmark in self.benchmarks]
        if len(set(names)) < len(names):
            raise ValueError(f"every benchmark needs a name of its own, got {', '.join(names)}")

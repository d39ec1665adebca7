"""A recipe: one frozen dataclass per stage, read from TOML, every key checked.

A stage that is a package keeps its settings in its own config.py; those of the others are here.
"""

import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jz3.comparison.config import ComparisonConfig
from jz3.corpus.config import CorpusConfig
from jz3.distillation.config import DistillationConfig
from jz3.engines.base import EngineConfig, Sampling
from jz3.errors import Jz3Error
from jz3.evaluation.config import EvaluationConfig
from jz3.features import FeaturesConfig
from jz3.files import read_json
from jz3.filtering.config import FilteringConfig
from jz3.grading.sandbox import SandboxConfig
from jz3.index.config import IndexConfig
from jz3.machine import best_dtype, best_products
from jz3.models import ModelConfig
from jz3.records import LEVELS
from jz3.selection.config import BASELINES, SelectionConfig
from jz3.tables import from_table
from jz3.targets.config import TargetsConfig
from jz3.training.config import SynthesiserConfig, TrainingConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True, slots=True, kw_only=True)
class InfluenceConfig:
    """What is reported beside the gradient scores."""

    baselines: tuple[str, ...] = ("hidden", "bm25", "loss", "random")
    """Choosers without gradients: `hidden` (RDS+: weighted mean of the last hidden states), `bm25`,
    `loss` (highest loss first), `random`."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.baselines) - set(BASELINES)):
            raise ValueError(f"influence.baselines: unknown {unknown[0]!r}; known: {', '.join(BASELINES)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthesisConfig:
    """How the synthesiser is asked.

    Source:
        The paper's code: temperature 1.0 for natural-language problems, 0.1 and top_p 0.95 for tool
        problems; 27% of the released rows are tool rows.
    """

    engine: EngineConfig = field(default_factory=EngineConfig)
    count: int = 20_000
    """Prompts. Texts that distillation has not used come first; a text is used again only when all have
    been used, for natural-language prompts at a level that it has not had, from the teacher either, while there
    is one."""
    tool_share: float = 0.27
    """Share of the prompts that ask for a Python solution."""
    levels: tuple[str, ...] = LEVELS
    """Levels to draw from for the natural-language prompts."""
    samples: int = 1
    """Replies to each prompt."""
    temperature: float = 1.0
    top_p: float = 1.0
    tool_temperature: float = 0.1
    tool_top_p: float = 0.95
    max_new_tokens: int = 2500
    """Of a reply; of a tool reply, of each round."""
    execute_tools: bool = True
    """Run the code of tool replies while they are written, so that their outputs are real."""
    rounds: int = 4
    """Generate-execute rounds of a tool reply."""
    output_limit: int = 400
    """Characters of an output block."""
    shard_size: int = 512
    """Replies between two saved points."""
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)

    def __post_init__(self) -> None:
        for name in ("count", "samples", "max_new_tokens", "rounds", "output_limit", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"synthesis: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.tool_share <= 1:
            raise ValueError(f"synthesis: tool_share must lie in 0..1, got {self.tool_share}")
        unknown = [level for level in self.levels if level not in LEVELS]
        if unknown or not self.levels:
            raise ValueError(f"synthesis: levels must be some of {', '.join(LEVELS)}, got {self.levels!r}")
        self.sampling("cot")
        self.sampling("tool")

    def sampling(self, kind: str) -> Sampling:
        """Return how replies of a kind are drawn."""
        if kind == "tool":
            return Sampling(
                max_new_tokens=self.max_new_tokens, temperature=self.tool_temperature, top_p=self.tool_top_p
            )
        return Sampling(max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p)


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimateConfig:
    """Assumptions of `--dry-run`; nothing that runs depends on them."""

    parameters: float = 0.0
    """Of the run's model; 0: read from its folder, where it is local."""
    synthesiser_parameters: float = 0.0
    """Of the synthesiser; 0: of its `base` where that is local, else as the run's model."""
    training_parameters: float = 0.0
    """Of the model that is trained on the mixture; 0: of its `base` where that is local, else as the run's model."""
    corpus_texts: int = 0
    """Texts of the corpus; 0: the sum of the sources' limits, of `worked` ones their problems."""
    corpus_tokens: int = 350
    """Mean tokens of a text (1,000 characters are about 300)."""
    prompt_tokens: int = 450
    """Mean tokens of a problem-writing prompt, its text included."""
    reply_tokens: int = 650
    """Mean tokens of a problem with its solution."""
    kept_share: float = 0.8
    """Share of the synthesised problems that the filters keep."""
    instruction_tokens: float = 0.0
    """Tokens of the second phase's instruction data; 0: rows of the targets times reply_tokens."""
    peak_tflops: float = 989.0
    """Dense bf16 peak of one GPU (H100 SXM)."""
    gradient_utilisation: float = 0.5
    """Share of the peak reached by forward and activation-gradient passes."""
    training_utilisation: float = 0.4
    generation_utilisation: float = 0.2
    """Share of the peak reached by batched generation, prompt and reply tokens together."""
    usd_per_gpu_hour: float = 2.5

    def __post_init__(self) -> None:
        for name in ("peak_tflops", "gradient_utilisation", "training_utilisation", "generation_utilisation"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"estimate.{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.kept_share <= 1:
            raise ValueError(f"estimate.kept_share must lie in 0..1, got {self.kept_share}")
        counts = ("corpus_texts", "corpus_tokens", "prompt_tokens", "reply_tokens", "instruction_tokens")
        models = ("parameters", "synthesiser_parameters", "training_parameters")
        for name in (*counts, *models, "usd_per_gpu_hour"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"estimate.{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The whole loop's settings; the sections are in the order of the stages."""

    name: str
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    influence: InfluenceConfig = field(default_factory=InfluenceConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    comparison: ComparisonConfig = field(default_factory=ComparisonConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    synthesiser: SynthesiserConfig = field(default_factory=SynthesiserConfig)
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    filtering: FilteringConfig = field(default_factory=FilteringConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    estimate: EstimateConfig = field(default_factory=EstimateConfig)

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name must not be empty: it names the run's folder")
        compared = self.comparison.methods if self.comparison.tokens else ()
        choosers = [("selection.chooser", self.selection.chooser)]
        for where, chooser in choosers + [("comparison.methods", method) for method in compared]:
            column = "hidden" if chooser == "mix" else chooser
            if column in BASELINES and column not in self.influence.baselines:
                there = ", ".join(self.influence.baselines) or "none"
                raise ValueError(
                    f"{where} {chooser!r} needs {column!r} among influence.baselines, which are {there}"
                )
            if chooser == "control" and not self.targets.control.count:
                raise ValueError(f"{where} 'control' needs a negative control; targets.control.count is 0")


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from a TOML file.

    `like = "NAME"` (a shipped recipe) or `like = "other.toml"` (beside it) takes another recipe's settings where it
    has none of its own; lists, as those of sources, are taken whole.

    Raises:
        ValueError: the file is missing or no TOML, or a key is unknown or of the wrong type; the
            message names the key and the nearest known one.
    """
    return from_table(Recipe, _table(path), str(path))


def _table(path: Path, before: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path in before:
        raise ValueError(f"recipe {path} is like itself, by way of {before[-1]}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ValueError(f"recipe {path} does not exist") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} is not valid TOML: {error}") from error
    like = table.pop("like", None)
    if like is None:
        return table
    if not isinstance(like, str):
        raise ValueError(f"{path}: like must be a shipped recipe's name or a TOML file, got {like!r}")
    other = path.parent / like if like.endswith(".toml") else _shipped(like)
    return _over(_table(other, (*before, path)), table)


def _over(table: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return a table with what another one says in place of it."""
    both = {
        key: _over(table[key], value)
        if isinstance(value, dict) and isinstance(table.get(key), dict)
        else value
        for key, value in other.items()
    }
    return table | both


def settled(recipe: Recipe) -> Recipe:
    """Return the recipe with every `auto` replaced by what it stands for on this machine.

    It is done before a run is made, so that its folder names what was used and refuses a machine where
    the same recipe means something else.
    """
    changes: dict[str, Any] = {
        "comparison": replace(recipe.comparison, train=recipe.comparison.train.settled()),
        "synthesiser": recipe.synthesiser.settled(),
        "training": recipe.training.settled(),
    }
    if recipe.model.dtype == "auto":
        changes["model"] = replace(recipe.model, dtype=best_dtype())
    if recipe.features.products == "auto":
        changes["features"] = replace(recipe.features, products=best_products())
    return replace(recipe, **changes)


def shipped_recipe(name: str) -> Recipe:
    """Return a recipe of `jz3/recipes` by its name, e.g. `quickstart`."""
    return load_recipe(_shipped(name))


def _shipped(name: str) -> Path:
    folder = Path(__file__).parent / "recipes"
    path = folder / f"{name}.toml"
    if not path.is_file():
        raise ValueError(
            f"no recipe {name!r}; shipped: {', '.join(sorted(p.stem for p in folder.glob('*.toml')))}"
        )
    return path


def stored_recipe(run_dir: Path) -> Recipe:
    """Return the recipe that a run was made with."""
    path = run_dir / "recipe.json"
    if not path.is_file():
        raise Jz3Error(
            f"{run_dir} is no run (it has no recipe.json); make one with `jz3 run RECIPE --out {run_dir}`"
        )
    return from_table(Recipe, read_json(path), str(path))

"""A recipe: one frozen dataclass per stage, read from TOML, every key checked."""

import dataclasses
import difflib
import sys
import types
import typing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jz3.comparison import ComparisonConfig
from jz3.corpus.config import CorpusConfig
from jz3.distillation.config import DistillationConfig
from jz3.estimate import EstimateConfig
from jz3.evaluation import EvaluationConfig
from jz3.features import FeaturesConfig
from jz3.filtering.config import FilteringConfig
from jz3.index import IndexConfig
from jz3.influence import InfluenceConfig
from jz3.machine import best_dtype, best_products
from jz3.models import ModelConfig
from jz3.selection import SelectionConfig
from jz3.synthesis import SynthesisConfig
from jz3.targets import TargetsConfig
from jz3.training import SynthesiserConfig, TrainingConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


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


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from a TOML file.

    Raises:
        ValueError: the file is missing or no TOML, or a key is unknown or of the wrong type; the
            message names the key and the nearest known one.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"recipe {path} does not exist") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} is not valid TOML: {error}") from error
    return from_table(Recipe, table, str(path))


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
    folder = Path(__file__).parent / "recipes"
    path = folder / f"{name}.toml"
    if not path.is_file():
        raise ValueError(
            f"no recipe {name!r}; shipped: {', '.join(sorted(p.stem for p in folder.glob('*.toml')))}"
        )
    return load_recipe(path)


def from_table(cls: type[Any], table: dict[str, Any], where: str) -> Any:
    """Build the dataclass `cls` from a TOML table, checking every key and type."""
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key in table:
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"
            raise ValueError(f"{where}: unknown key {key!r}{hint}")
    values = {key: _convert(value, hints[key], f"{where}: {key}") for key, value in table.items()}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_table(typing.cast(type, hint), value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(v, arguments[0], f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {k: _convert(v, arguments[1], f"{where}.{k}") for k, v in value.items()}
    if origin in (typing.Union, types.UnionType):
        return _convert(value, next(a for a in arguments if a is not type(None)), where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{where}: must be {getattr(hint, '__name__', hint)}, got {value!r}")

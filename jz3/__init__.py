"""jz3: which texts make a language model better at mathematics, and what to do with them.

The names below load their packages when they are first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jz3.embed import Adapted, Features, Less, Scores, Sketch, featurize, influence_scores, select
    from jz3.errors import Jz3Error

__version__ = "0.1.0"
__all__ = [
    "Adapted",
    "Features",
    "Jz3Error",
    "Less",
    "Scores",
    "Sketch",
    "__version__",
    "featurize",
    "influence_scores",
    "select",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'jz3' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("jz3.errors" if name == "Jz3Error" else "jz3.embed"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

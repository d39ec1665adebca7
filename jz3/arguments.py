"""What callers of the Python interface give: a model that is theirs and goes on to be, its tokenizer, queries."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from jz3.gradients.layers import plain_model

Pair = tuple[str, str]
"""A query: what the model is given, and the completion whose loss counts."""

_locks: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
_lock_of_locks = threading.Lock()


@contextmanager
def borrowed(model: Any) -> Iterator[None]:
    """Have a model for oneself, frozen and in evaluation mode, and give it back as it was.

    Hooks are the model's: passes of two threads at once would take each other's texts for their own.
    """
    with _lock_of_locks:
        lock = _locks.setdefault(plain_model(model), threading.RLock())
    with lock:
        training = [(module, module.training) for module in model.modules()]
        trained = [p for p in model.parameters() if p.requires_grad]
        try:
            model.eval().requires_grad_(False)
            yield
        finally:
            for module, mode in training:
                module.training = mode
            for parameter in trained:
                parameter.requires_grad_(True)


def check_model(model: Any, tokenizer: Any) -> None:
    """Refuse what people give for a model and a tokenizer: names, wrappers, one for the other."""
    import torch

    core: Any = plain_model(model)
    if not isinstance(core, torch.nn.Module) or not hasattr(core, "config"):
        is_wrapper = isinstance(core, torch.nn.Module) and hasattr(getattr(core, "module", None), "config")
        found = f"a {type(core).__name__}" if isinstance(core, torch.nn.Module) else f"{model!r:.60}"
        remedy = (
            "give its .module" if is_wrapper else "for example AutoModelForCausalLM.from_pretrained(NAME)"
        )
        raise TypeError(f"model must be a loaded causal language model, got {found}; {remedy}")
    if getattr(core.config, "is_encoder_decoder", False):
        raise TypeError(
            f"model must be a causal language model, got {type(core).__name__}, which has an encoder"
        )
    if not callable(tokenizer) or isinstance(tokenizer, torch.nn.Module):
        raise TypeError(
            f"tokenizer must be a loaded tokenizer, got {tokenizer!r:.60}; for example "
            "AutoTokenizer.from_pretrained(NAME)"
        )


def several(queries: Iterable[Pair]) -> list[Pair]:
    """Return the queries, which may be there to be gone through once, as a list."""
    if not isinstance(queries, Iterable):
        raise TypeError(f"queries must be several pairs (prompt, completion), got {queries!r:.60}")
    return list(queries)


def check_pairs(queries: Sequence[Pair]) -> None:
    """Refuse what is no pair of texts.

    Raises:
        TypeError: one of them is none.
    """
    for i, pair in enumerate(queries):
        two = isinstance(pair, (Sequence, np.ndarray)) and not isinstance(pair, str) and len(pair) == 2
        if not two or not all(isinstance(part, str) for part in pair):
            raise TypeError(f"query {i} must be a pair (prompt, completion), got {pair!r:.60}")

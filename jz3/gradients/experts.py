"""The experts of a mixture as linear layers of their own.

transformers keeps a layer's experts in two matrices of three dimensions. For the time of a gradient
pass they are computed one by one: the tokens that were sent to an expert are laid out per document,
[B, C, I] with C the most that any document sent, so that a sink sees the rows of a document together,
as with every other layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "jz3_documents"
MATRICES = ("gate_up_proj", "down_proj")


class ExpertLinear(torch.nn.Module):
    """One expert's matrix [O, I], a view of the fused weight."""

    def __init__(self, experts: torch.nn.Module, matrix: str, index: int) -> None:
        super().__init__()
        # In a tuple, so that the experts don't become a part of this module.
        self._source = (experts, matrix, index)

    @property
    def weight(self) -> torch.Tensor:
        """[O, I]."""
        experts, matrix, index = self._source
        return getattr(experts, matrix)[index]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, I] to [B, C, O]."""
        return torch.nn.functional.linear(x, self.weight)


def obstacle(experts: Any) -> str:
    """Return why a module's experts are not covered, or an empty string."""
    if not all(getattr(getattr(experts, m, None), "ndim", 0) == 3 for m in MATRICES):
        return "its weights are not gate_up_proj and down_proj of three dimensions"
    for flag, wanted in (
        ("has_gate", True),
        ("has_bias", False),
        ("has_post_expert_norm", False),
        ("is_transposed", False),
    ):
        if getattr(experts, flag, wanted) != wanted:
            return f"{flag} is {not wanted}"
    return ""


def expert_layers(name: str, experts: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the linear layers of a module of experts by name; the same ones at every call."""
    known: Any = experts.__dict__.setdefault("_jz3_layers", {})
    count = len(getattr(experts, MATRICES[0]))
    for index in range(count):
        for matrix in MATRICES:
            known.setdefault(f"{matrix}.{index}", ExpertLinear(experts, matrix, index))
    return {f"{name}.{key}": layer for key, layer in known.items()}


def documents_forward(
    experts: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Compute a mixture expert by expert, with the tokens laid out per document.

    Args:
        experts: the module; `_jz3_document` holds the document of every token.
        hidden: [T, H].
        chosen: [T, k] int64, the experts of every token.
        weights: [T, k], their shares.

    Returns:
        [T, H].
    """
    document: torch.Tensor = experts._jz3_document
    layers = experts._jz3_layers
    count = int(document.max()) + 1
    out = torch.zeros_like(hidden)
    for index in range(len(layers) // 2):
        token, place = torch.where(chosen == index)
        row = document[token]
        sent = torch.bincount(row, minlength=count)
        # Tokens come in order, and so do documents: a token's slot is its number within its document.
        slot = torch.arange(len(token), device=hidden.device) - (sent.cumsum(0) - sent)[row]
        # An expert that nobody chose still runs, on zeros: sinks expect every layer in every batch.
        shape = (count, max(1, int(sent.max())), hidden.shape[1])
        laid = hidden.new_zeros(shape).index_put((row, slot), hidden[token])
        middle = experts._apply_gate(layers[f"{MATRICES[0]}.{index}"](laid))
        result = layers[f"{MATRICES[1]}.{index}"](middle)[row, slot] * weights[token, place, None]
        out = out.index_add(0, token, result.to(out.dtype))
    return out


@contextmanager
def by_document(model: "PreTrainedModel", document: torch.Tensor) -> Iterator[None]:
    """Run the model's experts document by document.

    Args:
        model: with layers from `expert_layers`; others are left alone.
        document: [T] int64, the document of every token, not decreasing.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    found: list[Any] = [m for m in model.modules() if "_jz3_layers" in m.__dict__]
    if not found:
        yield
        return
    ALL_EXPERTS_FUNCTIONS.register(NAME, documents_forward)
    before = [m.config._experts_implementation for m in found]
    for module in found:
        module.config._experts_implementation = NAME
        module._jz3_document = document
    try:
        yield
    finally:
        for module, name in zip(found, before, strict=True):
            module.config._experts_implementation = name
            del module._jz3_document

"""What makes a model that is only read from faster than as it is loaded: weights and cache laid out for it."""

import inspect
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from jz3.errors import Jz3Error
from jz3.models import load_on_device

ROWS = 16
"""Rows of a product that weights are laid out for; one that fits them is as fast with thousands."""
ROOM = 64
"""Tokens for which a cache has room behind a prompt, at least."""


class PackedLinear(torch.nn.Module):
    """y = x Wᵀ + b with W in the layout of oneDNN, into which `nn.Linear` brings it in every product.

    With few rows, as when a text is written token by token, that takes longer than the product.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self._bias = None if linear.bias is None else linear.bias.detach()

    @property
    def weight(self) -> torch.Tensor:
        """W as a copy, for code that reads it."""
        return self._packed.to_dense()

    @property
    def bias(self) -> torch.Tensor | None:
        """b."""
        return self._bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply rows [..., I]."""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")


def load_for_inference(folder: Path, dtype: str = "auto") -> Any:
    """Load a causal language model for forward passes alone, onto the GPU where there is one.

    On a CPU, linear layers in float32 become `PackedLinear`s.

    Args:
        folder: of the model.
        dtype: as `load_model` takes it.

    Returns:
        The model in evaluation mode. Its packed weights can't be trained, moved or saved.
    """
    model = load_on_device(folder, dtype)
    if model.device.type == "cpu" and torch.backends.mkldnn.is_available():
        _pack(model)
    return model


def _pack(module: torch.nn.Module) -> None:
    for name, child in module.named_children():
        if type(child) is torch.nn.Linear and child.weight.dtype == torch.float32:
            setattr(module, name, PackedLinear(child))
        else:
            _pack(child)


class _RoomyLayer(DynamicLayer):
    """Keys and values with room behind them: a step writes its own there and copies none of those before it."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._rooms: list[Any] = [self.keys, self.values]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._extended(0, self.keys, key_states)
        self.values = self._extended(1, self.values, value_states)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        length = self.get_seq_length()
        if not length:
            return
        # With their room: else the next step would make another one, and until then a GPU would hold all of the
        # old rows of every layer beside the new.
        old: Any
        for which, old in enumerate((self.keys, self.values)):
            room = self._rooms[which]
            whole = room if room.data_ptr() == old.data_ptr() else old
            self._rooms[which] = whole.index_select(0, beam_idx.to(whole.device))
        self.keys, self.values = (room[..., :length, :] for room in self._rooms)

    def _extended(self, which: int, old: Any, new: torch.Tensor) -> torch.Tensor:
        length = old.shape[-2] if old.numel() else 0
        total = length + new.shape[-2]
        room = self._rooms[which]
        # Rows that were picked out of `old` lie elsewhere.
        if room.data_ptr() != old.data_ptr() or not length or room.shape[-2] < total:
            room = new.new_empty(*new.shape[:-2], total + max(ROOM, total // 2), new.shape[-1])
            if length:
                room[..., :length, :] = old
            self._rooms[which] = room
        room[..., length:total, :] = new
        return room[..., :total, :]


def roomy_cache(config: Any) -> DynamicCache:
    """Return an empty cache of keys and values for a model's configuration.

    Where `DynamicCache` copies all keys and values for every token, this one copies them when its room is full,
    which grows by half each time.
    """
    cache = DynamicCache(config=config)
    # Sliding windows and linear attention keep what they have.
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def cache_argument(model: Any) -> str:
    """Return the name of the model's argument for the cache, which transformers 5 renames on the way to version 6.

    An argument that a model doesn't know it takes without a word, and without reading it.

    Raises:
        Jz3Error: it has none.
    """
    known = inspect.signature(model.forward).parameters
    for name in ("cache", "past_key_values", "cache_params"):
        if name in known:
            return name
    raise Jz3Error(
        f"{type(model).__name__} takes no cache and can't generate here; use the engine vllm or openai"
    )

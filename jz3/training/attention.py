"""Attention within each document of a pack, without a mask."""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from jz3.errors import Jz3Error

NAME = "jz3_documents"


def document_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally, document by document: the cost is the sum of the documents' squared lengths.

    A mask over the whole pack computes every pair of tokens and throws most of them away; this
    computes only the pairs that count, on any device, and documents can't see each other at all.

    Args:
        module: the attention layer.
        query: [1, heads, T, d].
        key: [1, key heads, T, d].
        value: like key.
        attention_mask: None; the boundaries replace it.
        scaling: factor of the scores; 1/sqrt(d) if None.
        dropout: probability with which a weight is dropped.
        cu_seq_lens_q: [documents + 1] where the documents begin, and the end.
        sliding_window: reach of the attention in tokens, if the model limits it.
        softcap: not supported.
        s_aux: not supported.

    Returns:
        The output [1, T, heads, d], and None for the weights.

    Raises:
        Jz3Error: the model's attention needs something that this one doesn't do.
    """
    if cu_seq_lens_q is None or attention_mask is not None:
        raise Jz3Error("attention within documents needs their boundaries and takes no mask")
    if softcap is not None or s_aux is not None:
        raise Jz3Error("this model's attention has soft capping or sinks; train it on a GPU with flash-attn")
    bounds = cu_seq_lens_q.tolist()
    spans = list(zip(bounds, bounds[1:], strict=False))
    if sliding_window is not None and max(end - start for start, end in spans) > sliding_window:
        raise Jz3Error(
            f"a text is longer than the model's sliding window; set max_length <= {sliding_window}"
        )
    outputs = [
        scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for start, end in spans
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def register() -> str:
    """Make the attention known to transformers and return its name."""
    AttentionInterface.register(NAME, document_attention)
    return NAME

"""Per-document gradients of a frozen language model, factored per linear layer and never formed.

A linear layer with input a [T, I] and output gradient g [T, O] has, for document i, the gradient
G_i = sum over its tokens of g_t a_t^T [O, I]. Hooks hand a and g to a sink; weights are frozen, so
the backward pass computes activation gradients only, and no weight-gradient product is done.
"""

from jz3.gradients.layers import layer_shape, linear_layers
from jz3.gradients.passes import (
    GradientPass,
    PassResult,
    Sink,
    query_products,
    run_pass,
    set_products,
    set_query_products,
)
from jz3.gradients.tokens import (
    Batch,
    RefusedText,
    Tokens,
    make_batches,
    start_tokens,
    tokenize_chat,
    tokenize_query,
    tokenize_text,
)

__all__ = [
    "Batch",
    "GradientPass",
    "PassResult",
    "RefusedText",
    "Sink",
    "Tokens",
    "layer_shape",
    "linear_layers",
    "make_batches",
    "query_products",
    "run_pass",
    "set_products",
    "set_query_products",
    "start_tokens",
    "tokenize_chat",
    "tokenize_query",
    "tokenize_text",
]

"""What is stored per document instead of its gradient: feature kinds behind one interface."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FeaturesConfig:
    """How documents become features."""

    kind: str = "adapted"
    """`adapted` (coordinates fitted to queries and documents) or `sketch` (random, needs no fit)."""
    k: int = 2048
    """Numbers per document; `sketch` usually wants 8192."""
    bits: int = 4
    """Bits per number: 1, 4 or 8."""
    rank: int = 128
    """adapted: basis vectors per layer and side before the coordinates are chosen."""
    layers: int = 96
    """adapted: how many layers, those with the most energy, may give coordinates."""
    fit_documents: int = 400
    """adapted: documents in the fit's sample."""
    fit_queries: int = 200
    """adapted: queries in the fit's sample (of the role `fit`)."""
    fit_batch_tokens: int = 1024
    """adapted: padded tokens per pass of the fit, which holds a batch's layer inputs and output
    gradients: 0.6 MB a token for SmolLM2-135M, 5 MB for 7B."""
    sketch_left: int = 512
    """sketch: sign projections of the output gradient, per layer."""
    sketch_right: int = 32
    """sketch: sign projections of the input, per layer."""
    reduction: str = "mean"
    """A text's loss is the `mean` (default, as in LESS) or the `sum` over its scored tokens."""
    batch_tokens: int = 2048
    """Padded tokens per forward and backward pass."""
    shard_documents: int = 2048
    """Documents per shard of the store: what a kill can lose."""
    query_tokens: int = 512
    """Queries are cut at this length."""
    exact_documents: int = 128
    """Documents, unseen by the fit, on which the features are compared with exact gradients."""
    exact_queries: int = 16
    """Unseen queries of that comparison."""

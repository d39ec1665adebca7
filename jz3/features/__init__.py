"""What is stored per document instead of its gradient: feature kinds behind one interface."""

import math
from dataclasses import dataclass, field

from jz3.machine import PRODUCTS
from jz3.store import CODES

KINDS = ("adapted", "sketch", "less", "readout")
"""What the stage can store. `known` (jz3.features.known) stores nothing: it is for `jz3 score`; `hidden`,
`bm25`, `loss` and `random` are columns of every influence stage."""

BY_PRODUCTS = ("adapted", "sketch", "known")
"""Kinds that `products` is for: the others run the model in ways of their own, always exact."""


POSITIVE = (
    *("k", "rank", "layers", "fit_batch_tokens", "sketch_left", "sketch_right", "readout_left"),
    *("batch_tokens", "shard_documents", "query_tokens"),
)
COUNTS = ("completion", "fit_documents", "fit_queries", "exact_documents", "exact_queries")
"""Settings that may be 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LessConfig:
    """The warm-up and the direction of `less`; the defaults are the LESS recipe."""

    share: float = 0.05
    """Share of the corpus, drawn at random, that warms the adapters up."""
    epochs: int = 4
    """Of the warm-up; each leaves a checkpoint, weighted by its learning rate."""
    learning_rate: float = 2e-5
    batch_texts: int = 128
    """Texts per step of the warm-up."""
    rank: int = 128
    """Of the adapters."""
    alpha: float = 512.0
    dropout: float = 0.1
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Last parts of the names of the layers that get adapters, or `all-linear` alone."""
    eps: float = 1e-8
    eps_inside: bool = True
    """m' / sqrt(v' + eps), as LESS has it, instead of Adam's m' / (sqrt(v') + eps)."""
    bias_correction: bool = False
    """Adam's division by 1 - beta^t, which LESS's code leaves out."""
    checkpoints: tuple[str, ...] = ()
    """Folders of a PEFT training of the same model with the Hugging Face Trainer (adapters and optimizer.pt), or of
    LESS's (optimizer.bin); if there are any, they take the place of the warm-up."""
    learning_rates: tuple[float, ...] = ()
    """The weights of `checkpoints`; none: what their training logged over the epoch that ends there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeaturesConfig:
    """How documents become features."""

    kind: str = "adapted"
    """`adapted` (coordinates fitted to queries and documents), `sketch` (random, needs no fit), `less`
    (Adam's step on warmed-up adapters) or `readout` (the output layer's gradient: forward pass only)."""
    k: int = 4096
    """Numbers per document (`less`: and checkpoint); of the other kinds `sketch` is best with 65536 of 1 bit, and
    `less` and `readout` usually want 8192 of 8 bits."""
    bits: int = 2
    """Bits per number: 1, 2, 4, 8 or 16. With 2 the numbers of `adapted` get 1 to 8 each, the more the more of the
    scores they carry, 2 on average: the most faithful use of as many bytes."""
    rank: int = 128
    """adapted: basis vectors per layer before the coordinates are chosen, mean of its two sides (3/2 of
    it for the output gradient, 1/2 for the input)."""
    layers: int = 256
    """adapted: how many layers, those with the most energy, may give coordinates."""
    completion: int = 32768
    """adapted: coordinates beyond `k` that queries are computed on and that their features stand for as
    far as the fit's documents allow (jz3.features.completion); 0 for none."""
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
    products: str = "auto"
    """In what the documents' passes multiply: `exact` (the model's dtype); on a CPU and of a Llama-like model also
    `int8_backward` (8 bits on the way back and in the output layer, with AVX-512 VNNI, for 0.001 of Spearman), `int8`
    (on the way forward too: a sixth more texts per second for 0.006 of Spearman on mathematical texts, and 0.02 to
    0.04 on others) or `int16` (16 bits, with AVX2, closer than bfloat16); or `auto`: the fastest of these but `int8` on
    the machine that begins the run. Queries' features and the comparison with exact gradients have none in 8 bits."""
    shard_documents: int = 2048
    """Documents per shard of the store: what a kill can lose."""
    query_tokens: int = 512
    """Queries are cut at this length."""
    prompt_field: str = ""
    """A field of the texts' `meta` (one of their source's `keep_fields`): where a text begins with what it holds, only
    the rest is scored, as where instructions are trained on. A text without more is rejected. Empty: all is scored."""
    long: str = "truncate"
    """What becomes of a document that the model's tokenizer finds longer than `corpus.max_tokens` (start tokens not
    counted): `truncate` (cut at its end) or `split` (run in windows of that length, whose gradients are summed)."""
    exact_documents: int = 128
    """Documents, unseen by the fit, on which the features are compared with exact gradients."""
    exact_queries: int = 16
    """Unseen queries of that comparison."""
    readout_left: int = 1024
    """readout: buckets that the vocabulary is hashed into."""
    less: LessConfig = field(default_factory=LessConfig)
    """less: its warm-up and direction."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"features.kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"features.reduction must be 'mean' or 'sum', got {self.reduction!r}")
        if self.products not in PRODUCTS:
            raise ValueError(f"features.products must be one of {', '.join(PRODUCTS)}, got {self.products!r}")
        if self.long not in ("truncate", "split"):
            raise ValueError(f"features.long must be 'truncate' or 'split', got {self.long!r}")
        if self.bits not in CODES:
            raise ValueError(f"features.bits must be one of {sorted(CODES)}, got {self.bits}")
        for least, names in ((1, POSITIVE), (0, COUNTS)):
            for name in names:
                if getattr(self, name) < least:
                    raise ValueError(f"features.{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.less.share <= 1 or self.less.epochs < 1 or self.less.batch_texts < 1:
            raise ValueError(
                "features.less: share must lie in (0, 1], epochs and batch_texts must be at least 1, "
                f"got {self.less.share}, {self.less.epochs} and {self.less.batch_texts}"
            )
        if not all(0 < x < math.inf for x in (self.less.rank, self.less.alpha, self.less.learning_rate)):
            raise ValueError(
                "features.less: rank, alpha and learning_rate must be positive, "
                f"got {self.less.rank}, {self.less.alpha} and {self.less.learning_rate}"
            )
        if not (0 <= self.less.dropout < 1 and 0 <= self.less.eps < math.inf):
            raise ValueError(
                "features.less: dropout must lie in [0, 1), eps must be 0 or more, "
                f"got {self.less.dropout} and {self.less.eps}"
            )

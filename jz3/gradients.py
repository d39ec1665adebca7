"""Per-document gradients of a frozen language model, factored per linear layer and never formed.

A linear layer with input a [T, I] and output gradient g [T, O] has, for document i, the gradient
G_i = sum over its tokens of g_t a_t^T [O, I]. Hooks hand a and g to a sink; weights are frozen, so
the backward pass computes activation gradients only, and no weight-gradient product is done.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenised text with the part whose loss counts."""

    id: str
    ids: list[int]
    start: int
    """First scored token: 1 for a plain text, the completion's first token for a query."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts of similar length, padded on the right: with causal attention no real token sees a pad."""

    positions: list[int]
    """Where each row stands in the sequence the batches were made of."""
    ids: "torch.Tensor"
    """[B, S] int64."""
    lengths: "torch.Tensor"
    """[B] int64."""
    starts: "torch.Tensor"
    """[B] int64, see Tokens.start."""


class Sink(Protocol):
    """Consumes the factors of every hooked layer."""

    def forward(self, name: str, a: "torch.Tensor") -> Any:
        """Take a layer's input a [B, S, I]; what is returned is kept for `backward`."""
        ...

    def backward(self, name: str, kept: Any, g: "torch.Tensor") -> None:
        """Take what `forward` returned and the gradient g [B, S, O] of the layer's output."""
        ...


@dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass gives besides the factors."""

    loss: "torch.Tensor"
    """[B] float32 (float64 of a float64 model), mean (or summed) cross-entropy of each text's scored tokens."""
    hidden: "torch.Tensor"
    """[B, d] float32, last hidden states averaged with weights growing with the position (RDS+)."""


def tokenize_text(tokenizer: "PreTrainedTokenizerBase", key: str, text: str, max_tokens: int) -> Tokens:
    """Tokenise a corpus text: every token after the first is scored.

    Raises:
        ValueError: the text has fewer than two tokens, so there is nothing to predict.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:max_tokens]
    if len(ids) < 2:
        raise ValueError(f"text {key} has {len(ids)} token(s); at least 2 are needed")
    return Tokens(key, ids, 1)


def tokenize_query(
    tokenizer: "PreTrainedTokenizerBase", key: str, prompt: str, completion: str, max_tokens: int
) -> Tokens:
    """Tokenise a prompt with its completion, followed by the end token: only the completion is scored.

    A sequence longer than `max_tokens` is cut at its end.

    Raises:
        ValueError: nothing of the completion is left to score.
    """
    head = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    tail = tokenizer(completion, add_special_tokens=False, verbose=False).input_ids
    if not tail:
        raise ValueError(f"query {key} has an empty completion")
    if tokenizer.eos_token_id is not None:
        tail = [*tail, tokenizer.eos_token_id]
    ids = [*head, *tail][:max_tokens]
    start = max(len(head), 1)
    if len(ids) <= start:
        raise ValueError(f"query {key}: its prompt alone has {len(head)} tokens, the limit is {max_tokens}")
    return Tokens(key, ids, start)


def make_batches(texts: Sequence[Tokens], batch_tokens: int, pad: int = 0) -> list[Batch]:
    """Group texts by length into batches of at most `batch_tokens` padded tokens (at least one text)."""
    import torch

    order = sorted(range(len(texts)), key=lambda i: (-len(texts[i].ids), i))
    batches: list[Batch] = []
    while order:
        width = len(texts[order[0]].ids)
        count = max(1, batch_tokens // width)
        rows, order = order[:count], order[count:]
        ids = torch.full((len(rows), width), pad, dtype=torch.int64)
        for r, i in enumerate(rows):
            ids[r, : len(texts[i].ids)] = torch.tensor(texts[i].ids)
        lengths = torch.tensor([len(texts[i].ids) for i in rows])
        starts = torch.tensor([texts[i].start for i in rows])
        batches.append(Batch(rows, ids, lengths, starts))
    return batches


def linear_layers(
    model: "PreTrainedModel", keep: Callable[[str], bool] | None = None
) -> dict[str, "torch.nn.Module"]:
    """Return the linear layers of the model's blocks by name, the output layer left out.

    Matrices that are neither linear layers nor embeddings (fused experts, for example) are named in
    a warning: their gradients are not part of the features.

    Args:
        model: a Hugging Face causal language model.
        keep: chooses layers by name; all by default.

    Returns:
        Name to layer (`torch.nn.Linear` or GPT-2's `Conv1D`), in the model's order.

    Raises:
        ValueError: no layer is left.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings()
    layers: dict[str, torch.nn.Module] = {}
    covered: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not output:
            layers[name] = module
        if isinstance(module, (torch.nn.Linear, Conv1D, torch.nn.Embedding)):
            covered.update(id(p) for p in module.parameters(recurse=False))
    missed = [n for n, p in model.named_parameters() if p.dim() >= 2 and id(p) not in covered]
    if missed:
        log.warning(
            "%d weights are no linear layers and not covered: %s ...", len(missed), ", ".join(missed[:4])
        )
    if keep is not None:
        layers = {n: m for n, m in layers.items() if keep(n)}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no linear layer to take gradients of, or the filter left none"
        )
    return layers


def layer_shape(layer: "torch.nn.Module") -> tuple[int, int]:
    """Return (output features O, input features I) of a linear layer."""
    from transformers.pytorch_utils import Conv1D

    weight: Any = layer.weight
    rows, columns = weight.shape
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


class GradientPass:
    """Forward and backward over batches of texts, feeding each layer's factors to a sink."""

    def __init__(
        self,
        model: "PreTrainedModel",
        layers: dict[str, "torch.nn.Module"],
        sink: Sink,
        reduction: str = "mean",
    ) -> None:
        """Freeze the model and hook the layers.

        Args:
            model: in evaluation mode; its parameters stop requiring gradients.
            layers: from `linear_layers`.
            sink: takes the factors.
            reduction: `mean` (the loss of a text is the mean over its scored tokens, so that its
                gradient doesn't depend on its batch) or `sum`.
        """
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        config = model.config.get_text_config()
        for key in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(config, key, None) not in (None, 1.0):
                raise ValueError(
                    f"models that set {key} are not covered: their loss is no plain softmax of the output layer"
                )
        self.model, self.reduction, self.sink = model, reduction, sink
        model.requires_grad_(False)
        self._hooks = [layer.register_forward_hook(self._hook(name)) for name, layer in layers.items()]

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(_layer: Any, inputs: tuple[Any, ...], output: Any) -> None:
            kept = self.sink.forward(name, inputs[0].detach())
            output.register_hook(lambda g: self.sink.backward(name, kept, g))

        return hook

    def __enter__(self) -> "GradientPass":
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def run(self, batch: Batch) -> PassResult:
        """Run one batch; the sink has seen every layer when this returns."""
        import torch

        from jz3.ops.ce_hidden_grad import ce_hidden_grad

        model = self.model
        device = next(model.parameters()).device
        ids, lengths = batch.ids.to(device), batch.lengths.to(device)
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        hidden = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        index = torch.arange(ids.shape[1], device=device)
        # Token t is predicted at position t - 1.
        predicts = (index + 1 >= batch.starts.to(device)[:, None]) & (index + 1 < lengths[:, None])
        rows, columns = predicts.nonzero(as_tuple=True)
        counts = predicts.sum(1)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        scale = torch.ones(len(rows), dtype=wide, device=device)
        if self.reduction == "mean":
            scale /= counts[rows]
        head: Any = model.get_output_embeddings()
        loss, grad = ce_hidden_grad(
            hidden.detach()[rows, columns], head.weight.detach(), ids[rows, columns + 1], scale
        )
        full = torch.zeros_like(hidden)
        full[rows, columns] = grad.to(hidden.dtype)
        hidden.backward(full)
        total = torch.zeros(len(ids), dtype=wide, device=device).index_add_(0, rows, loss * scale)
        weights = (index + 1) * (index < lengths[:, None])
        pooled = (hidden.detach().float() * weights[:, :, None]).sum(1) / weights.sum(1, keepdim=True)
        return PassResult(total, pooled)


def run_pass(
    model: "PreTrainedModel",
    layers: dict[str, "torch.nn.Module"],
    sink: Sink,
    batches: Iterable[Batch],
    reduction: str = "mean",
) -> Iterator[tuple[Batch, PassResult]]:
    """Run batches through a GradientPass, handing each back when the sink has seen it."""
    with GradientPass(model, layers, sink, reduction) as gradients:
        for batch in batches:
            yield batch, gradients.run(batch)


def gram(x: "torch.Tensor") -> "torch.Tensor":
    """Return the inner products of each text's tokens: [B, S, D] to [B, S, S] float32."""
    return (x @ x.transpose(1, 2)).float()


class InputGrams:
    """Computes a a^T once for layers that share their input (q, k, v; gate, up)."""

    def __init__(self) -> None:
        self._input: Any = None
        self._gram: Any = None

    def of(self, a: "torch.Tensor") -> "torch.Tensor":
        """Return gram(a), remembered while the same tensor comes again."""
        if self._input is None or a.data_ptr() != self._input.data_ptr() or a.shape != self._input.shape:
            self._input, self._gram = a, gram(a)
        return self._gram

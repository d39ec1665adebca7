"""Forward and backward passes that hand every layer's factors to a sink."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from jz3 import backend
from jz3.errors import Jz3Error
from jz3.gradients.layers import check_output_layer, plain_model
from jz3.gradients.tokens import Batch
from jz3.machine import PRODUCTS, best_products, products_obstacle
from jz3.modes import plain_modes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

_said: set[str] = set()


class Sink(Protocol):
    """Consumes the factors of every hooked layer.

    A sink may also have `begin()`, which is called before a batch; `share(groups)`, which is called before any
    pass with tuples of names of the layers that will be given one tensor, one layer after the other; and an
    attribute `wide`: true if it takes factors in float32 of a bfloat16 model too, which is where some CPUs
    compute faster (other sinks get them rounded to bfloat16).
    """

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


@dataclass(frozen=True, slots=True)
class _Layout:
    """How the rows that the model sees become the rows of texts that a sink sees."""

    document: "torch.Tensor"
    """[T] int64, the text of every token that the model sees, in its order."""
    texts: int
    packed: Any = None
    """(text, position) of every token of a packed row [1, T]; None if the rows are padded texts."""
    width: int = 0

    def rows(self, x: "torch.Tensor") -> "torch.Tensor":
        """Lay out a layer's input or output gradient as [texts, tokens, features].

        Raises:
            ValueError: its rows are not those of the texts in their order.
        """
        count, tokens = x.shape[:-1].numel(), len(self.document)
        if self.packed is not None:
            known = count == tokens
        elif x.dim() == 2 or x.shape[0] == 1:
            known = count > 0 and count % tokens == 0
        else:
            known = count > 0 and x.shape[0] % self.texts == 0
        if not known:
            raise ValueError(
                f"it is given numbers of the shape {list(x.shape)} for {tokens} tokens of {self.texts} texts, so that "
                "it can't be told which belong to which text (an expert that is a linear layer of its own sees a "
                "choice of the tokens)"
            )
        if self.packed is not None:
            out = x.new_zeros(self.texts, self.width, x.shape[-1])
            out[self.packed] = x.reshape(-1, x.shape[-1])
            return out
        return x.reshape(self.texts, -1, x.shape[-1])


class GradientPass:
    """Forward and backward over batches of texts, feeding each layer's factors to a sink."""

    @plain_modes()
    def __init__(
        self,
        model: "PreTrainedModel",
        layers: dict[str, "torch.nn.Module"],
        sink: Sink,
        reduction: str = "mean",
        *,
        fast: bool | None = None,
        packed: bool | None = None,
        products: str | None = None,
    ) -> None:
        """Freeze the model and hook the layers.

        Args:
            model: in evaluation mode; its parameters stop requiring gradients.
            layers: from `linear_layers`.
            sink: takes the factors.
            reduction: `mean` (the loss of a text is the mean over its scored tokens, so that its
                gradient doesn't depend on its batch) or `sum`.
            fast: compute Llama blocks on a CPU by jz3's own code (jz3/gradients/llama.py). By default
                wherever it can and agrees with the model's own code.
            packed: put a batch's texts behind one another in one row instead of padding them. By
                default with FlashAttention 2, which then runs over the texts' own lengths.
            products: one of PRODUCTS but `auto` instead of what `set_products` chose for the model
                (`exact` if nobody did).

        Raises:
            ValueError: `reduction` or `products` is unknown, the model is refused by `check_output_layer` or has
                weights of inference mode, or `fast` or `packed` asks for what can't be had.
            Jz3Error: the products can't be had.
        """
        from jz3.gradients.experts import ExpertLinear

        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        if products is not None and products not in PRODUCTS[1:]:
            raise ValueError(f"products must be one of {', '.join(PRODUCTS[1:])}, got {products!r}")
        core = plain_model(model)
        _check_weights(core)
        config = core.config.get_text_config()
        check_output_layer(core)
        self.model, self.reduction, self.sink = core, reduction, sink
        model.requires_grad_(False)
        attention = getattr(config, "_attn_implementation", "")
        if packed and attention == "eager":
            raise ValueError(
                "packed rows need attn_implementation 'sdpa' or 'flash_attention_2', got 'eager'"
            )
        self._packed = attention == "flash_attention_2" if packed is None else packed
        if fast and self._packed:
            raise ValueError("the fast pass can't run: it takes padded rows, packed ones are asked for")
        self._layout: Any = None
        self._holds = self._ran = False
        self._hooks: list[Any] = []
        # A batch may leave experts out; other layers only if the model uses their weights in a way of its own.
        self._idle = {name for name, layer in layers.items() if not isinstance(layer, ExpertLinear)}
        self._seen: set[str] = set()
        self._repeated: set[str] = set()
        self._parts: dict[str, list[list[Any]]] = {}
        self._fast = (
            None
            if fast is False or self._packed
            else self._open_fast(core, layers, bool(fast), products or chosen_products(core))
        )
        if share := getattr(sink, "share", None):
            share(self._fast.shared() if self._fast else [])
        if self._fast is None:
            self._hooks = [
                layer.register_forward_hook(self._hook(name)) for name, layer in self._hooked(layers)
            ]

    def _open_fast(self, core: Any, layers: dict[str, Any], wanted: bool, products: str) -> Any:
        from jz3.gradients import llama

        reason = llama.obstacle(core, layers)
        if not reason:
            _check_products(products)  # the model may be of another machine
        blocks = None if reason else llama.blocks_of(core, layers, products)
        if wanted and blocks is None:
            raise ValueError(
                f"the fast pass can't run: {reason or 'it disagrees with the own code of the model'}"
            )
        if reason:
            llama.say(core, reason)
        return blocks

    def _hooked(self, layers: dict[str, Any]) -> list[tuple[str, Any]]:
        """Return the layers to hook, by name; layers with one weight in common have the first one's name."""
        import torch
        from transformers.pytorch_utils import Conv1D

        def key(layer: Any) -> int:
            # Not `layer.weight`, which an expert makes anew: an id belongs to what stays.
            return id(layer._parameters.get("weight", layer))

        first: dict[int, str] = {}
        for name, layer in layers.items():
            first.setdefault(key(layer), name)
        found = {id(layer): (first[key(layer)], layer) for layer in layers.values()}
        # A fit's second pass names only the first of them.
        for module in self.model.modules():
            if isinstance(module, (torch.nn.Linear, Conv1D)) and key(module) in first:
                found.setdefault(id(module), (first[key(module)], module))
        self._idle &= {name for name, _ in found.values()}
        return list(found.values())

    def _hook(self, name: str) -> Callable[..., None]:
        from jz3.gradients.experts import ExpertLinear

        def hook(layer: Any, inputs: tuple[Any, ...], output: Any) -> None:
            layout: _Layout | None = self._layout
            if layout is None:  # somebody else runs the model, perhaps another pass
                return
            # Experts lay their tokens out themselves; routers return their logits first.
            rows = (lambda x: x) if isinstance(layer, ExpertLinear) else layout.rows
            out = output[0] if isinstance(output, tuple) else output
            # Nothing of the loss depends on it, as where DoRA measures its matrices.
            if not out.requires_grad:
                return
            self._idle.discard(name)
            try:
                a = rows(inputs[0].detach())
            except ValueError as error:
                raise ValueError(f"{type(self.model).__name__} is not covered: {name}: {error}") from error
            if name in self._repeated:
                part = [a, None]
                self._parts.setdefault(name, []).append(part)
                out.register_hook(lambda g: part.__setitem__(1, rows(g)))
                return
            if name in self._seen:
                self._repeated.add(name)
            self._seen.add(name)
            kept = self.sink.forward(name, a)
            out.register_hook(lambda g: self.sink.backward(name, kept, rows(g)))

        return hook

    def __enter__(self) -> "GradientPass":
        self._holds = next(self.model.parameters()).device.type == "cpu" and not backend.extension_missing()
        if self._holds:
            # What a batch frees the next one takes.
            backend.extension().hold_memory(True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._holds:
            backend.extension().hold_memory(False)
        for hook in self._hooks:
            hook.remove()
        if self._hooks and self._ran and self._idle:
            _say_idle(type(self.model).__name__, sorted(self._idle))

    @plain_modes()
    def run(self, batch: Batch) -> PassResult:
        """Run one batch; the sink has seen every layer when this returns.

        Raises:
            ValueError: none of the layers is a part of the computation.
            Jz3Error: a GPU's memory is too small for the batch.
        """
        import torch

        try:
            return self._run(batch)
        except torch.OutOfMemoryError as error:
            raise Jz3Error(
                f"the GPU's memory does not hold a pass over {batch.ids.numel():,} tokens "
                f"({str(error).splitlines()[0]}); lower batch_tokens (of a fit: fit_batch_tokens), or the tokens of a "
                "text if the batch is a single one"
            ) from error

    def _run(self, batch: Batch) -> PassResult:
        import torch

        from jz3.ops.ce_hidden_grad import ce_hidden_grad

        model = self.model
        device = next(model.parameters()).device
        ids, lengths, starts = (x.to(device) for x in (batch.ids, batch.lengths, batch.starts))
        index = torch.arange(ids.shape[1], device=device)
        real = index < lengths[:, None]
        texts = 1 if batch.windowed else len(ids)
        # Row by row, the text that a row belongs to.
        owner = torch.zeros_like(lengths) if batch.windowed else torch.arange(len(ids), device=device)
        if begin := getattr(self.sink, "begin", None):
            begin()
        hidden, backward = self._forward(ids, real, owner, texts)
        # Token t is predicted at position t - 1.
        predicts = (index + 1 >= starts[:, None]) & (index + 1 < lengths[:, None])
        rows, columns = predicts.nonzero(as_tuple=True)
        counts = torch.zeros(texts, dtype=torch.int64, device=device).index_add_(0, owner, predicts.sum(1))
        wide = torch.promote_types(hidden.dtype, torch.float32)
        scale = torch.ones(len(rows), dtype=wide, device=device)
        if self.reduction == "mean":
            scale /= counts[owner[rows]]
        scored, targets = hidden[rows, columns], ids[rows, columns + 1]
        if self._fast:
            loss, grad = self._fast.output(scored, targets, scale)
        else:
            head: Any = model.get_output_embeddings().weight.detach()
            loss, grad = ce_hidden_grad(scored, head, targets, scale)
        full = torch.zeros_like(hidden)
        full[rows, columns] = grad.to(hidden.dtype)
        backward(full)
        self._give_repeated()
        total = torch.zeros(texts, dtype=wide, device=device).index_add_(0, owner[rows], loss * scale)
        # Windows overlap by one token, which counts where it ends a window.
        place = (
            index + 1 + (torch.arange(len(ids), device=device)[:, None] * (len(index) - 1)) * batch.windowed
        )
        weights = place * real
        pooled = torch.zeros(texts, hidden.shape[2], dtype=torch.float32, device=device)
        pooled.index_add_(0, owner, (hidden.float() * weights[:, :, None]).sum(1))
        mass = torch.zeros(texts, dtype=weights.dtype, device=device).index_add_(0, owner, weights.sum(1))
        self._ran = True
        return PassResult(total, pooled / mass[:, None])

    def _forward(
        self, ids: "torch.Tensor", real: "torch.Tensor", owner: "torch.Tensor", texts: int
    ) -> tuple["torch.Tensor", Callable[["torch.Tensor"], None]]:
        """Return the last hidden states [B, S, d] and what takes their gradient back through the layers."""
        import torch

        from jz3.gradients.experts import by_document

        if self._fast:
            run = self._fast.forward(ids, self.sink, texts)
            return run.hidden, run.backward
        model: Any = self.model
        embed = model.get_input_embeddings()
        options: dict[str, Any] = {"use_cache": False}
        if self._packed:
            rows, columns = real.nonzero(as_tuple=True)
            bounds = torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).int()
            longest = int(real.sum(1).max())
            options["position_ids"] = columns[None]
            if model.config.get_text_config()._attn_implementation == "flash_attention_2":
                options |= {f"cu_seq_lens_{x}": bounds for x in "qk"}
                options |= {f"max_length_{x}": longest for x in "qk"}
            place = (rows, columns) if texts == len(ids) else (owner[rows], rows * ids.shape[1] + columns)
            width = ids.shape[1] * (len(ids) // texts)
            self._layout = _Layout(owner[rows], texts, place, width)
            embedded = embed(ids[rows, columns][None]).detach().requires_grad_()
        else:
            self._layout = _Layout(owner.repeat_interleave(ids.shape[1]), texts)
            embedded = embed(ids).detach().requires_grad_()
        known = len(self._repeated)
        # The experts' backward pass needs nothing of the context: it is recorded by then.
        try:
            with by_document(model, self._layout.document) if self._hooks else nullcontext():
                states = self._states(inputs_embeds=embedded, **options)
                if len(self._repeated) > known:
                    # Their first inputs were not kept.
                    states = self._states(inputs_embeds=embedded, **options)
        finally:
            self._layout = None
        if self._hooks and not self._seen | self._repeated:
            raise ValueError(
                f"none of the {len(self._hooks)} layers of {type(model).__name__} whose gradients are asked for took "
                "part in its pass; adapters must be enabled and not merged (or merged for good by merge_and_unload)"
            )
        if not self._packed:
            return states.detach(), states.backward
        padded = states.new_zeros(*ids.shape, states.shape[-1])
        padded[rows, columns] = states.detach()[0]
        return padded, lambda grad: states.backward(grad[rows, columns][None])

    def _states(self, **options: Any) -> Any:
        """Run the model up to its last hidden states, which the hooks follow."""
        self._seen.clear()
        self._parts.clear()
        tokens = options["inputs_embeds"].shape[1]
        known = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or tokens
        try:
            return self.model.base_model(**options).last_hidden_state
        except IndexError as error:
            if tokens <= known:
                raise
            raise ValueError(
                f"{type(self.model).__name__} has learned {known} positions, and texts of up to {tokens} tokens are "
                f"asked for; cut them at {known}"
            ) from error

    def _give_repeated(self) -> None:
        """Give the sink the layers that ran several times in the pass, all of their rows as those of one run."""
        import torch

        for name, parts in self._parts.items():
            used = [part for part in parts if part[1] is not None]
            if used:
                a, g = (torch.cat(x, 1) for x in zip(*used, strict=True))
                self.sink.backward(name, self.sink.forward(name, a), g)
        self._parts.clear()


def _say_idle(model: str, layers: list[str]) -> None:
    """Log once that layers took no part in a pass: their weights are used directly, or not at all."""
    message = (
        f"{len(layers)} layers of {model} took no part, so that nothing of their gradients is in the features: "
        f"{', '.join(layers[:3])}{' ...' if len(layers) > 3 else ''}"
    )
    if message not in _said:
        _said.add(message)
        log.warning(message)


def _check_weights(model: Any) -> None:
    """Refuse weights that autograd refuses."""
    if any(p.is_inference() for p in model.parameters()):
        raise ValueError(
            f"weights of {type(model).__name__} were made in inference mode, which gradients can't pass through; "
            "load the model outside of it"
        )


def _check_products(products: str) -> None:
    """Refuse products that this machine has not."""
    if reason := products_obstacle(products):
        raise Jz3Error(f"products {products!r} can't be had: {reason}; use 'exact', or 'auto' in a new run")


@plain_modes()
def set_products(model: "PreTrainedModel", products: str) -> str:
    """Choose in what the gradient passes of a model multiply, as its dtype is chosen when it is loaded.

    Args:
        model: the model, plain or with adapters.
        products: one of PRODUCTS.

    Returns:
        What its passes will use. A model that runs on its own code is always exact, as is one that its products
        in 8 or 16 bits disagree with, which is looked at here.

    Raises:
        ValueError: `products` is unknown, or the model has weights of inference mode.
        Jz3Error: 8 or 16 bits are asked for where they can't be had.
    """
    from jz3.gradients import llama

    if products not in PRODUCTS:
        raise ValueError(f"products must be one of {', '.join(PRODUCTS)}, got {products!r}")
    wanted = best_products() if products == "auto" else products
    _check_products(wanted)
    core = plain_model(model)
    _check_weights(core)
    if wanted != "exact" and (reason := llama.obstacle(core, {})):
        llama.say(core, f"{reason}; its products are exact")
        wanted = "exact"
    elif wanted != "exact" and llama.blocks_of(core, {}, wanted) is None:  # which has said so
        wanted = "exact"
    core.__dict__["_jz3_products"] = wanted
    return wanted


def chosen_products(model: "PreTrainedModel") -> str:
    """Return in what the gradient passes of a model multiply: what `set_products` chose, `exact` if nobody did."""
    return str(plain_model(model).__dict__.get("_jz3_products", "exact"))


def set_query_products(model: "PreTrainedModel", products: str) -> str:
    """Choose the products of a model whose passes are all of queries, to documents of `products`, as `set_products`.

    Exact queries fit documents of any products, should this machine not have these.
    """
    return set_products(
        model, "exact" if products.startswith("int8") or products_obstacle(products) else products
    )


def query_products(model: "PreTrainedModel") -> str:
    """Return in what the passes of queries multiply: those of 8 bits are for documents.

    A query's error is in all of its scores, and there are so few queries that the exact passes take little time.
    """
    chosen = chosen_products(model)
    return "exact" if chosen.startswith("int8") else chosen


def run_pass(
    model: "PreTrainedModel",
    layers: dict[str, "torch.nn.Module"],
    sink: Sink,
    batches: Iterable[Batch],
    reduction: str = "mean",
    *,
    fast: bool | None = None,
    packed: bool | None = None,
    products: str | None = None,
) -> Iterator[tuple[Batch, PassResult]]:
    """Run batches through a GradientPass, handing each back when the sink has seen it."""
    with GradientPass(
        model, layers, sink, reduction, fast=fast, packed=packed, products=products
    ) as gradients:
        for batch in batches:
            yield batch, gradients.run(batch)

"""Llama blocks on a CPU: forward and backward without autograd, for activation gradients alone.

The model's own code spends about half of its time outside of matrix products: in attention, in a dozen
element-wise operations per block, in autograd. Here a block is eight products, with the native parts
of csrc/cpu/block.cpp and csrc/cpu/attention_task.h between them or, of the gated layer and where tiles
multiply, within them (csrc/cpu/gated_product.cpp); queries, keys and values, and gate and
up, are one product each. It is used if it agrees with the model's own code on a small input.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import xxhash

from jz3 import backend
from jz3.gradients.products import (
    BFLOAT16_VECTORS,
    GatedProducts,
    OutputLayer,
    Product,
    WholeProduct,
    can_gate,
    native_products,
)
from jz3.machine import fast_bfloat16_cpu

log = logging.getLogger(__name__)

MODELS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
TOLERANCE = {torch.bfloat16: 0.03, torch.float32: 1e-3}
"""Relative difference from the model's own code, whose rounding errors alone reach 0.015 and 1e-5."""

WHOLE_TOLERANCE = {"exact": 0.0, "int8_backward": 0.05, "int8": 0.05, "int16": 0.005}
"""What products with whole numbers may add to it; in all products of a block they reach 0.03 and 0.002."""

SAMPLE = 256
"""About as many entries of every parameter are looked at to tell whether it has changed."""

_said: set[str] = set()
_prepared: WeakKeyDictionary[Any, tuple[Any, "Blocks | None"]] = WeakKeyDictionary()
"""A model's blocks; beside it, as with it they would be copied and saved."""


def obstacle(model: Any, layers: dict[str, torch.nn.Module]) -> str:
    """Return why a model's blocks can't be computed here, or an empty string."""
    weight = next(model.parameters())
    config = model.config.get_text_config()
    if type(model).__name__ not in MODELS:
        return f"{type(model).__name__} is none of {', '.join(MODELS)}"
    if weight.device.type != "cpu" or weight.dtype not in TOLERANCE:
        return f"the model is in {weight.dtype} on {weight.device}, not in bfloat16 or float32 on the CPU"
    if backend.extension_missing():
        return backend.extension_missing()
    if not vector_unit():
        return "this CPU has no AVX2 with FMA (or jz3._C was built without it)"
    width = model.model.layers[0].self_attn.head_dim
    if width % 32 or config.hidden_size % 16 or config.intermediate_size % 16:
        return f"head size {width} is no multiple of 32, or another size none of 16"
    if config.hidden_act != "silu":
        return f"the activation is {config.hidden_act}"
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"} or (
        "Mistral" in type(model).__name__ and config.sliding_window
    ):
        return "its attention has a sliding window"
    own: dict[int, torch.nn.Module] = {}
    for block in model.model.layers:
        own |= {id(m): m for m in (block.get_submodule(p) for p in PARTS)}
    if any(type(m) is not torch.nn.Linear for m in own.values()):
        return "its linear layers are replaced by others"
    if len({id(m.weight) for m in own.values()}) < len(PARTS) * len(model.model.layers):
        return "its blocks share weights"
    if any(id(m) not in own for m in layers.values()):
        return "layers outside of the blocks are asked for"
    if model.get_output_embeddings().bias is not None:
        return "its output layer has a bias"
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return "something else has hooked the model"
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    # Packed products have a copy for either direction.
    directions = 2 if native_products(_dtype(model)) else 1
    copies = directions * sum(p.numel() for p in model.parameters()) * _dtype(model).itemsize
    if copies > pages * size / 4:
        return f"copies of the weights may take {copies >> 30} GiB, more than a quarter of the memory"
    return ""


def vector_unit() -> int:
    """Return what computes the blocks' parts: 0 nothing, 1 AVX2, in float32 alone, 2 AVX-512 with bfloat16."""
    return int(getattr(backend.extension(), "vector_unit", int)())


def say(model: Any, reason: str) -> None:
    """Log once why the model's own code runs."""
    message = f"{type(model).__name__} runs on its own code: {reason}"
    if message not in _said:
        _said.add(message)
        log.info(message)


def blocks_of(model: Any, layers: dict[str, torch.nn.Module], products: str = "exact") -> "Blocks | None":
    """Return the model's blocks, prepared once and checked against its own code; None if they disagree."""
    state = (products, *_state(model))
    known: Any = _prepared.get(model)
    if known is None or known[0] != state:
        known = None
        _prepared.pop(model, None)  # lest both be in memory
        blocks = Blocks(model, products)
        difference = blocks.difference(model)
        if not difference <= TOLERANCE[blocks.model_dtype] + WHOLE_TOLERANCE[products]:
            log.warning(
                "the fast pass of %s is off: it differs by %.3g from the model's own code",
                type(model).__name__,
                difference,
            )
            blocks = None
        known = _prepared[model] = (state, blocks)
    found: Blocks | None = known[1]
    if found is not None:
        found.name_layers(model, layers)
    return found


def _state(model: Any) -> tuple[Any, ...]:
    """Return what is another once the model's weights have changed."""
    # Versions miss what is written to `.data`, as PEFT does when it merges an adapter. That changes nearly
    # every entry of a matrix, so that a sample sees it.
    sample = []
    for p in model.parameters():
        flat = p.detach().reshape(-1)
        sample += [flat[:: max(1, len(flat) // SAMPLE)], flat[-1:]]
    content = torch.cat(sample).view(torch.uint8).numpy().tobytes()
    versions = tuple((p.data_ptr(), p._version) for p in model.parameters())
    return xxhash.xxh3_64_intdigest(content), versions


def _dtype(model: Any, products: str = "exact") -> torch.dtype:
    """Return in what rows are kept between products: bfloat16 only where the processor is faster with it."""
    fast = fast_bfloat16_cpu() and vector_unit() == BFLOAT16_VECTORS and products != "int16"
    return next(model.parameters()).dtype if fast else torch.float32


class _Native:
    """The functions of jz3._C for one type of rows."""

    def __init__(self, dtype: torch.dtype) -> None:
        kind = str(dtype).removeprefix("torch.")
        module = backend.extension()
        names = ("rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "attention")
        self._run: dict[str, Any] = {name: getattr(module, f"{name}_{kind}") for name in names}

    def norm(
        self, x: torch.Tensor, add: torch.Tensor | None, weight: torch.Tensor, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (x + add in float32, as x is, its RMSNorm, 1 / rms)."""
        total = x if add is None else torch.empty_like(x)
        y, scale = torch.empty_like(x, dtype=weight.dtype), torch.empty(len(x), dtype=torch.float32)
        pointers = (x, add, weight, total, y, scale)
        self._run["rms_norm"](*map(_address, pointers), *x.shape, epsilon, backend.threads())
        return total, y, scale

    def norm_backward(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        dy: torch.Tensor,
        add: torch.Tensor | None,
        scale: torch.Tensor,
    ) -> torch.Tensor:
        """Return add + the gradient with respect to the norm's input, in the place of `dy`."""
        pointers = (x, weight, dy, add, scale, dy)
        self._run["rms_norm_backward"](*map(_address, pointers), *x.shape, backend.threads())
        return dy

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Return silu(gate) * up."""
        y = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        self._run["swiglu"](_address(gate_up), _address(y), *y.shape, backend.threads())
        return y

    def swiglu_backward(self, gate_up: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        """Return the gradient with respect to gate and up, in their place."""
        self._run["swiglu_backward"](*map(_address, (gate_up, dy, gate_up)), *dy.shape, backend.threads())
        return gate_up

    def attention(self, *tensors: torch.Tensor | None, sizes: Sequence[int], scale: float) -> None:
        """Run jz3::attention of csrc/cpu/ops.h, backward if `dout` is given."""
        self._run["attention"](*map(_address, tensors), *sizes, scale, backend.threads())


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


@dataclass(frozen=True, slots=True)
class _Block:
    """One block's weights in the dtype of the computation, and the names of its hooked layers."""

    norm: torch.Tensor
    mlp_norm: torch.Tensor
    qkv: "_Linear"
    o: "_Linear"
    mlp: "_Mlp"


def _together(layers: list[Any], dtype: torch.dtype, field: str = "weight") -> Any:
    """Return the layers' weights or biases one after the other, None if there are none."""
    parts = [getattr(layer, field) for layer in layers]
    if parts[0] is None:
        return None
    parts = [p.detach().to(dtype) for p in parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _forward(matrix: torch.Tensor, products: str, bias: torch.Tensor | None) -> Any:
    exact = products in ("exact", "int8_backward")
    return Product(matrix, bias) if exact else WholeProduct(matrix, products, bias=bias)


def _backward(matrix: torch.Tensor, products: str) -> Any:
    return Product(matrix) if products == "exact" else WholeProduct(matrix, _whole(products))


def _whole(products: str) -> str:
    """Return the number format of products on the way back and in the output layer."""
    return products.removesuffix("_backward")


class _Linear:
    """Layers that share their input, as one product in either direction."""

    def __init__(self, layers: list[Any], dtype: torch.dtype, products: str) -> None:
        weight = _together(layers, dtype)
        self.forward: Any = _forward(weight.T, products, _together(layers, dtype, "bias"))
        self.backward: Any = _backward(weight, products)


class _Mlp:
    """A block's gated layer: both products in either direction, and what is element by element between them."""

    def __init__(
        self, gate: Any, up: Any, down: Any, dtype: torch.dtype, products: str, native: _Native
    ) -> None:
        self._native = native
        self._gated = None
        both = _together([gate, up], dtype)
        bias = _together([gate, up], dtype, "bias")
        last = _together([down], dtype)
        if products == "exact" and bias is None and can_gate(both.T):
            self._gated = GatedProducts(both.T, last.T)
        else:
            self._gate_up, self._back = _forward(both.T, products, bias), _backward(last, products)
        self.down: Any = _forward(last.T, products, _together([down], dtype, "bias"))
        self.backward: Any = _backward(both, products)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return gate and up of x, and SiLU(gate) * up, which `down` takes."""
        if self._gated:
            return self._gated.forward(x)
        gate_up = self._gate_up(x)
        return gate_up, self._native.swiglu(gate_up)

    def through(self, g: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
        """Return the gradient of gate and up, in their place, of that of `down`'s output; `backward` takes it."""
        if self._gated:
            return self._gated.backward(g, gate_up)
        return self._native.swiglu_backward(gate_up, self._back(g))


class Blocks:
    """All blocks of a model and its output layer, with products as `set_products` has them."""

    def __init__(self, model: Any, products: str = "exact") -> None:
        config = model.config.get_text_config()
        attention = model.model.layers[0].self_attn
        self.dtype = _dtype(model, products)
        self.native = _Native(self.dtype)
        self.model_dtype = next(model.parameters()).dtype
        self.width, self.scale = attention.head_dim, float(attention.scaling)
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.epsilon = float(config.rms_norm_eps)
        self.embedding = model.get_input_embeddings()
        self.rotary = model.model.rotary_emb
        output = model.get_output_embeddings().weight.detach().to(self.dtype)
        self.output = OutputLayer(output, _whole(products))
        self.norm = model.model.norm.weight.detach().to(self.dtype)
        self.blocks = [self._block(block, products) for block in model.model.layers]
        self.names: list[dict[str, str]] = []

    def _block(self, block: Any, products: str) -> _Block:
        q, k, v, o, gate, up, down = (block.get_submodule(name) for name in PARTS)
        dtype = self.dtype
        return _Block(
            block.input_layernorm.weight.detach().to(dtype),
            block.post_attention_layernorm.weight.detach().to(dtype),
            _Linear([q, k, v], dtype, products),
            _Linear([o], dtype, products),
            _Mlp(gate, up, down, dtype, products, self.native),
        )

    def name_layers(self, model: Any, layers: dict[str, torch.nn.Module]) -> None:
        """Note under which names a sink wants which layers."""
        names = {id(m): n for n, m in layers.items()}
        self.names = [
            {p: names[i] for p in PARTS if (i := id(block.get_submodule(p))) in names}
            for block in model.model.layers
        ]

    def shared(self) -> list[tuple[str, ...]]:
        """Return the names of the layers that share an input."""
        q, k, v, _, gate, up, _ = PARTS
        return [
            tuple(name[p] for p in parts if p in name)
            for name in self.names
            for parts in ((q, k, v), (gate, up))
        ]

    def forward(self, ids: torch.Tensor, sink: Any, texts: int) -> "Run":
        """Run a padded batch; `Run.backward` takes the gradient of `Run.hidden`."""
        x = self.embedding(ids).detach().to(self.dtype)
        return Run(self, x.flatten(0, 1).contiguous(), len(ids), sink, texts, self.names)

    @torch.no_grad()
    def difference(self, model: Any) -> float:
        """Return the largest relative difference from the model's own first and last block."""
        tokens, size = 19, len(self.norm)
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(2 * tokens, size, generator=generator)
        grad = torch.randn(2 * tokens, size, generator=generator)
        worst = 0.0
        for index in (0, len(self.blocks) - 1):
            part = Run(self, states.to(self.dtype), 2, None, 2, [{}] * 2, blocks=[self.blocks[index]] * 2)
            # Two blocks, as the first one's gradient is not taken: the second is the one that is compared.
            middle = part.saved[1]["x"]
            found = part.through(grad.to(self.dtype))
            with torch.enable_grad():
                x = middle.to(self.model_dtype).view(2, tokens, size).requires_grad_()
                angles = model.model.rotary_emb(x, torch.arange(tokens)[None])
                unseen = torch.finfo(x.dtype).min
                mask = torch.full((1, 1, tokens, tokens), unseen, dtype=x.dtype).triu(1)
                own = model.model.layers[index](x, attention_mask=mask, position_embeddings=angles)
                (back,) = torch.autograd.grad(own, x, grad.to(self.model_dtype).view_as(own))
            pairs = ((part.states, own.flatten(0, 1), middle), (found, back.flatten(0, 1), grad))
            for ours, theirs, through in pairs:
                # In float32 what the block adds is compared; in bfloat16 its rounding hides that.
                base = (
                    through.float()
                    if self.model_dtype == torch.float32
                    else torch.zeros((), dtype=torch.float32)
                )
                error = (ours.float() - theirs.float()).norm() / (theirs.float() - base).norm()
                worst = max(worst, float(error)) if error == error else float("inf")
        return worst


class Run:
    """One batch on its way through the blocks."""

    def __init__(
        self,
        model: Blocks,
        x: torch.Tensor,
        rows: int,
        sink: Any,
        texts: int,
        names: list[dict[str, str]],
        blocks: list[_Block] | None = None,
    ) -> None:
        self.model, self.native, self.sink, self.texts, self.names = model, model.native, sink, texts, names
        self.blocks = model.blocks if blocks is None else blocks
        self.rows, self.tokens = rows, len(x) // rows
        positions = torch.arange(self.tokens)[None]
        self.angles = [
            t[0].contiguous() for t in model.rotary(torch.zeros(1, dtype=torch.float32), positions)
        ]
        self.saved: list[dict[str, Any]] = []
        with torch.no_grad():
            x, add = x.float(), None
            for block, name in zip(self.blocks, names, strict=True):
                x, add = self._forward(block, name, x, add)
            self.states, y, self.scale = self.native.norm(x, add, model.norm, model.epsilon)
        self.hidden = y.view(rows, self.tokens, -1)

    def _offer(self, x: torch.Tensor, names: list[str]) -> dict[str, Any]:
        """Give a layer's input to the sink."""
        if not names:
            return {}
        seen = self._seen(x)
        return {n: self.sink.forward(n, seen) for n in names}

    def _seen(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor as a sink wants it: [texts, tokens, features]."""
        if not getattr(self.sink, "wide", False):
            x = x.to(self.model.model_dtype)
        return x.view(self.texts, -1, x.shape[-1])

    def _forward(
        self, block: _Block, name: dict[str, str], x: torch.Tensor, add: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the block's two summands: the residual stream and what the block adds last."""
        own = self.model
        x, y, scale = self.native.norm(x, add, block.norm, own.epsilon)
        q, k, v, o, gate, up, down = PARTS
        kept = self._offer(y, [name[p] for p in (q, k, v) if p in name])
        qkv = block.qkv.forward(y)
        mixed = y.new_empty(len(y), own.heads * own.width)
        statistics = torch.empty(self.rows, own.heads, self.tokens, dtype=torch.float32)
        sizes = (self.rows, self.tokens, own.heads, own.key_heads, own.width)
        self.native.attention(qkv, *self.angles, mixed, statistics, None, None, sizes=sizes, scale=own.scale)
        kept |= self._offer(mixed, [name[o]] if o in name else [])
        middle, y, mlp_scale = self.native.norm(x, block.o.forward(mixed), block.mlp_norm, own.epsilon)
        kept |= self._offer(y, [name[p] for p in (gate, up) if p in name])
        gate_up, y = block.mlp.forward(y)
        kept |= self._offer(y, [name[down]] if down in name else [])
        self.saved.append(
            {
                "x": x,
                "scale": scale,
                "qkv": qkv,
                "mixed": mixed,
                "statistics": statistics,
                "middle": middle,
                "mlp_scale": mlp_scale,
                "gate_up": gate_up,
                "kept": kept,
            }
        )
        return middle, block.mlp.down(y)

    @torch.no_grad()
    def backward(self, grad: torch.Tensor) -> None:
        """Take the gradient of `hidden` back to the first block's queries, keys and values."""
        g = grad.reshape(len(self.states), -1).clone(memory_format=torch.contiguous_format)
        self.through(self.native.norm_backward(self.states, self.model.norm, g, None, self.scale))

    def through(self, g: torch.Tensor) -> torch.Tensor:
        """Take the gradient of the last block's output back to the second block's input."""
        for index in reversed(range(len(self.blocks))):
            back = self._backward(self.blocks[index], self.names[index], self.saved.pop(), g, index == 0)
            g = g if back is None else back
        return g

    def _backward(
        self, block: _Block, name: dict[str, str], saved: dict[str, Any], g: torch.Tensor, last: bool
    ) -> Any:
        own, native, kept = self.model, self.native, saved["kept"]
        q, k, v, o, gate, up, down = PARTS
        self._give(name, kept, g, [down], [g.shape[1]])
        d = block.mlp.through(g, saved["gate_up"])
        self._give(name, kept, d, [gate, up], [d.shape[1] // 2] * 2)
        g = native.norm_backward(
            saved["middle"], block.mlp_norm, block.mlp.backward(d), g, saved["mlp_scale"]
        )
        self._give(name, kept, g, [o], [g.shape[1]])
        sizes = (self.rows, self.tokens, own.heads, own.key_heads, own.width)
        d = torch.empty_like(saved["qkv"])
        tensors = (saved["qkv"], *self.angles, saved["mixed"], saved["statistics"], block.o.backward(g), d)
        native.attention(*tensors, sizes=sizes, scale=own.scale)
        self._give(
            name, kept, d, [q, k, v], [h * own.width for h in (own.heads, own.key_heads, own.key_heads)]
        )
        if last:
            return None
        return native.norm_backward(saved["x"], block.norm, block.qkv.backward(d), g, saved["scale"])

    def _give(
        self, name: dict[str, str], kept: dict[str, Any], g: torch.Tensor, parts: list[str], sizes: list[int]
    ) -> None:
        """Give the output gradients of layers that are one product here to the sink, one by one."""
        if not any(p in name for p in parts):
            return
        for part, piece in zip(parts, self._seen(g).split(sizes, dim=2), strict=True):
            if part in name:
                self.sink.backward(name[part], kept.pop(name[part]), piece)

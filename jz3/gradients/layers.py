"""The layers whose gradients are taken: linear layers, routers and the experts of a mixture, adapters."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

SCALED = (
    *("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"),
    *("logit_scale", "logits_scaling", "lm_head_multiplier"),
)
"""Settings of models that cap or scale their logits."""
ROUNDED = {2: 1e-2}
"""Relative difference of logits that rounding explains, by the bytes of a number; 1e-4 of longer ones."""


def plain_model(model: Any) -> Any:
    """Return the causal language model itself, out of its wrappers (torch.compile's, PEFT's) if it has any."""
    model = uncompiled(model)
    # transformers' own `add_adapter` sets peft_config too, without a wrapper.
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def uncompiled(model: Any) -> Any:
    """Return what torch.compile has wrapped, so that layers have the same names, or the model."""
    return getattr(model, "_orig_mod", model)


def linear_layers(
    model: "PreTrainedModel",
    keep: Callable[[str], bool] | None = None,
    *,
    lora_only: bool = True,
) -> dict[str, "torch.nn.Module"]:
    """Return the linear layers of the model's blocks by name, the output layer left out.

    A mixture's fused experts count as one layer per expert and matrix, `...gate_up_proj.3`. Other
    matrices that are neither linear layers nor embeddings (of a PEFT model: what else of its adapters is
    trained) are named in a warning: their gradients are not part of the features.

    Args:
        model: a Hugging Face causal language model, or a PEFT model around one.
        keep: chooses layers by name; all by default.
        lora_only: of a PEFT model, take only the active adapters' two matrices per layer (as LESS
            does) and not the base model's. Without meaning for other models.

    Returns:
        Name to layer (`torch.nn.Linear`, GPT-2's `Conv1D`, a router, an expert), in the model's order.

    Raises:
        ValueError: no layer is left.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    from jz3.gradients.experts import expert_layers, obstacle

    model = uncompiled(model)
    core = plain_model(model)
    output = core.get_output_embeddings()
    adapters: Any = getattr(model, "active_adapters", ()) if core is not model else ()
    layers: dict[str, torch.nn.Module] = {}
    covered: set[int] = set()
    for name, module in model.named_modules():
        mine = list(module.parameters(recurse=False))
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            covered.update(id(p) for p in mine)
            parts = name.split(".")
            # PEFT names an adapter's matrices `<layer>.lora_A.<adapter>`.
            lora = len(parts) > 1 and parts[-2] in ("lora_A", "lora_B")
            chosen = lora and parts[-1] in adapters if core is not model and lora_only else True
            if module is not output and chosen and (not lora or parts[-1] in adapters):
                layers[name] = module
        elif isinstance(module, torch.nn.Embedding):
            covered.update(id(p) for p in mine)
        elif is_router(module):
            covered.update(id(p) for p in mine)
            if core is model or not lora_only:
                layers[name] = module
        elif hasattr(module, "_apply_gate") and not obstacle(module):
            covered.update(id(p) for p in mine)
            if core is model or not lora_only:
                layers.update(expert_layers(name, module))
    if core is not model and lora_only:
        # Of the adapters themselves: on embeddings, or whole layers that are trained beside them.
        covered = {id(p) for m in layers.values() for p in m.parameters(recurse=False)}
        weights = [(n, p) for n, p in model.named_parameters() if not set(adapters).isdisjoint(n.split("."))]
        kind = "none of the adapters' linear layers"
    else:
        weights, kind = list(model.named_parameters()), "no linear layers"
    missed = [n for n, p in weights if p.dim() >= 2 and id(p) not in covered]
    if missed:
        log.warning("%d weights are %s and not covered: %s ...", len(missed), kind, ", ".join(missed[:4]))
    if keep is not None:
        layers = {n: m for n, m in layers.items() if keep(n)}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no linear layer to take gradients of, or the filter left none"
        )
    return layers


def check_output_layer(model: Any) -> None:
    """Refuse a model whose logits are not its last hidden states times the matrix of its output layer.

    Caps, scales, biases and adapters there are named where they are known, and otherwise found by comparing the
    logits of three tokens. A model is looked at once, and again when its output layer is another module or a wrapper.

    Args:
        model: a causal language model without a PEFT wrapper.

    Raises:
        ValueError: it is not covered.
    """
    import torch

    name, head = type(model).__name__, model.get_output_embeddings()
    if getattr(head, "weight", None) is None:
        raise ValueError(f"{name} is not covered: it has no output layer with a matrix")
    own: Any = head
    if not getattr(own, "disable_adapters", True) and set(own.active_adapters) & set(
        getattr(own, "lora_A", ())
    ):
        # Fresh ones leave the logits as they are.
        raise ValueError(
            f"{name} is not covered: its output layer has an adapter; leave it out of the target modules"
        )
    if model.__dict__.get("_jz3_output_layer") is head:
        return
    config = model.config.get_text_config()
    for key in SCALED:
        if getattr(config, key, None) not in (None, 1.0):
            raise ValueError(
                f"models that set {key} are not covered: their loss is no plain softmax of the output layer"
            )
    if getattr(head, "bias", None) is not None:
        raise ValueError(
            f"models whose output layer has a bias ({name}) are not covered: "
            "their loss is no plain softmax of the output layer's matrix alone"
        )
    states: list[torch.Tensor | None] = []
    keep = model.base_model.register_forward_hook(
        lambda _module, _inputs, output: states.append(getattr(output, "last_hidden_state", None))
    )
    # Dropout in training must not draw other numbers because of this.
    with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            ids = torch.arange(3, device=head.weight.device)[None] % len(head.weight)
            logits = model(input_ids=ids, use_cache=False).logits
        finally:
            keep.remove()
        if not states or states[0] is None:
            raise ValueError(f"{name} is not covered: its base model gives no last hidden states")
        product = torch.nn.functional.linear(states[0].to(head.weight), head.weight)
        difference = float((logits - product).float().norm() / product.float().norm())
    if difference > ROUNDED.get(head.weight.dtype.itemsize, 1e-4):
        raise ValueError(
            f"{name} is not covered: its logits differ by {difference:.2g} from its last hidden states times the "
            "output layer's matrix, as with an adapter (leave the output layer out of it), a cap or a scale there"
        )
    if not any(head.children()):
        # What wraps a layer may come to compute something else.
        model.__dict__["_jz3_output_layer"] = head


def is_router(module: "torch.nn.Module") -> bool:
    """Tell a mixture's router: a matrix [experts, hidden] whose module returns the logits first."""
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith("TopKRouter") and weight is not None and weight.dim() == 2


def layer_shape(layer: "torch.nn.Module") -> tuple[int, int]:
    """Return (output features O, input features I) of a linear layer."""
    from transformers.pytorch_utils import Conv1D

    weight: Any = layer.weight
    rows, columns = weight.shape
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)

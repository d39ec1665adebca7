"""The layers whose gradients are taken: linear layers, routers and the experts of a mixture, adapters."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def plain_model(model: Any) -> Any:
    """Return the causal language model itself, out of its PEFT wrapper if it has one."""
    # transformers' own `add_adapter` sets peft_config too, without a wrapper.
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def linear_layers(
    model: "PreTrainedModel",
    keep: Callable[[str], bool] | None = None,
    *,
    lora_only: bool = True,
) -> dict[str, "torch.nn.Module"]:
    """Return the linear layers of the model's blocks by name, the output layer left out.

    A mixture's fused experts count as one layer per expert and matrix, `...gate_up_proj.3`. Other
    matrices that are neither linear layers nor embeddings are named in a warning: their gradients are
    not part of the features.

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
    missed = [n for n, p in model.named_parameters() if p.dim() >= 2 and id(p) not in covered]
    if missed and (core is model or not lora_only):
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

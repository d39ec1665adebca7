"""Cross entropy and its gradient against whole logits and autograd."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as functional

from jz3.ops.ce_hidden_grad import ce_hidden_grad


def cases(device: str) -> Iterator[dict[str, Any]]:
    """Yield the output layer of a 135M model."""
    tokens, width, vocabulary = (8192, 4096, 32_000) if device == "cuda" else (512, 576, 49_152)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    h = torch.randn(tokens, width, device=device).to(dtype)
    weight = (torch.randn(vocabulary, width, device=device) / width**0.5).to(dtype)
    y = torch.randint(0, vocabulary, (tokens,), device=device)

    def plain() -> tuple[torch.Tensor, torch.Tensor]:
        x = h.detach().requires_grad_()
        loss = functional.cross_entropy((x @ weight.T).float(), y, reduction="none")
        loss.sum().backward()
        return loss.detach(), x.grad if x.grad is not None else h

    yield {
        "name": f"T={tokens} d={width} V={vocabulary}",
        "rows": tokens,
        "dim": width,
        "dtype": str(dtype),
        "run": lambda: ce_hidden_grad(h, weight, y),
        "plain": plain,
        "bytes": (2 * h.numel() + weight.numel()) * h.element_size(),
        "flops": 4 * tokens * width * vocabulary,
    }

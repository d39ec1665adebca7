"""Cross entropy without whole logits: against autograd in float64, chunk by chunk."""

import pytest
import torch
import torch.nn.functional as functional
from accuracy import assert_as_accurate, normal

from jz3.ops import ce_hidden_grad as module
from jz3.ops.ce_hidden_grad import ce_hidden_grad


def by_autograd(
    h: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    h = h.detach().clone().requires_grad_()
    loss = functional.cross_entropy(
        (h @ weight.T).float() if h.dtype != torch.float64 else h @ weight.T, y, reduction="none"
    )
    (loss * weights.to(loss.dtype)).sum().backward()
    assert h.grad is not None
    return loss.detach(), h.grad


@pytest.mark.parametrize("backend_name", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accuracy(backend_name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JZ3_BACKEND", f"ce_hidden_grad={backend_name}")
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 101 * 7)
    monkeypatch.setattr(module, "VOCABULARY_CHUNK", 32)
    h, weight = normal(0, 23, 16, dtype=dtype), normal(1, 101, 16, dtype=dtype)
    weights = normal(2, 23).abs()
    y = torch.randint(0, 101, (23,), generator=torch.Generator().manual_seed(0))
    y[[0, 5, 22]] = -100
    loss, grad = ce_hidden_grad(h, weight, y, weights)
    exact_loss, exact_grad = by_autograd(h.double(), weight.double(), y, weights)
    plain_loss, plain_grad = by_autograd(h, weight, y, weights)
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    assert_as_accurate(loss, plain_loss, exact_loss)
    assert_as_accurate(grad, plain_grad, exact_grad)
    assert float(loss[5]) == 0 and float(grad[5].abs().max()) == 0


def test_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 1000 * 10)
    largest = 0
    real = module._product

    def watched(
        h: torch.Tensor, weight: torch.Tensor, product: torch.dtype, dtype: torch.dtype
    ) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, len(h))
        return real(h, weight, product, dtype)

    monkeypatch.setattr(module, "_product", watched)
    ce_hidden_grad(normal(0, 95, 8), normal(1, 1000, 8), torch.arange(95))
    assert largest == 10


def test_large_logits_don_t_overflow() -> None:
    loss, grad = ce_hidden_grad(
        torch.full((1, 2), 300.0), torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), torch.tensor([1])
    )
    assert float(loss[0]) == 1200 and torch.equal(grad, torch.tensor([[2.0, 2.0]]))


def test_float16_products_of_a_large_vocabulary_don_t_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As GPUs take them: sums of exponentials reach the vocabulary's size."""
    h, weight = torch.zeros(2, 8, dtype=torch.float16), normal(1, 100_000, 8, dtype=torch.float16)
    y, weights = torch.tensor([5, 70_000]), torch.ones(2)
    expected = module.ce_hidden_grad_reference(h, weight, y, weights)
    monkeypatch.setattr(module, "_has_instructions", lambda dtype: True)
    loss, grad = module.ce_hidden_grad_chunked(h, weight, y, weights)
    assert torch.allclose(loss, expected[0]) and torch.allclose(grad, expected[1], rtol=0, atol=0.01)


def test_no_targets_and_no_tokens() -> None:
    weight = normal(1, 9, 4)
    loss, grad = ce_hidden_grad(normal(0, 3, 4), weight, torch.full((3,), -100))
    assert not loss.any() and not grad.any()
    loss, grad = ce_hidden_grad(normal(0, 0, 4), weight, torch.empty(0, dtype=torch.int64))
    assert loss.shape == (0,) and grad.shape == (0, 4)


def test_wrong_arguments_are_named() -> None:
    h, weight = normal(0, 3, 4), normal(1, 9, 4)
    with pytest.raises(ValueError, match=r"y must be -100 or in \[0, 9\), got 9"):
        ce_hidden_grad(h, weight, torch.tensor([0, 9, 1]))
    with pytest.raises(TypeError, match="weight must hold torch.float32 like h"):
        ce_hidden_grad(h, weight.double(), torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="weight must have the axes"):
        ce_hidden_grad(h, normal(1, 9, 5), torch.tensor([0, 1, 1]))

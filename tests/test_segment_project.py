"""Projected gradients per document: against autograd, float64 and packing."""

import pytest
import torch
from accuracy import assert_as_accurate, normal

from jz3.ops.segment_project import segment_norms, segment_project, segment_project_reference

RAGGED = [0, 5, 5, 6, 40, 67]


def plain(a: torch.Tensor, g: torch.Tensor, left: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    rows = g @ left
    pairs = zip(bounds, bounds[1:], strict=False)
    return torch.stack([(rows[b:e].T @ a[b:e]) for b, e in pairs])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("p_i", "o", "p_o"), [(8, 33, 16), (1, 1, 1), (32, 200, 32)])
def test_accuracy(dtype: torch.dtype, p_i: int, o: int, p_o: int) -> None:
    a, g, left = (
        normal(0, 67, p_i, dtype=dtype),
        normal(1, 67, o, dtype=dtype),
        normal(2, o, p_o, dtype=dtype),
    )
    bounds = torch.tensor(RAGGED)
    got = segment_project(a, g, left, bounds)
    exact = segment_project_reference(a.double(), g.double(), left.double(), bounds)
    assert got.dtype == torch.float32
    assert_as_accurate(got, plain(a, g, left, RAGGED), exact)
    assert float(got[1].abs().max()) == 0


def test_it_is_the_gradient_of_each_document() -> None:
    weight = normal(0, 6, 4, dtype=torch.float64).requires_grad_()
    a, target = normal(1, 9, 4, dtype=torch.float64), normal(2, 9, 6, dtype=torch.float64)
    out = a @ weight.T
    g = out.detach() - target
    got = segment_project(a, g, None, torch.tensor([0, 4, 9]))
    for i, (begin, end) in enumerate([(0, 4), (4, 9)]):
        loss = (out[begin:end] - target[begin:end]).square().sum() / 2
        assert torch.allclose(got[i], torch.autograd.grad(loss, weight, retain_graph=True)[0])


def test_a_document_alone_gives_the_same_as_packed() -> None:
    a, g, left = normal(0, 30, 8), normal(1, 30, 20), normal(2, 20, 8)
    packed = segment_project(a, g, left, torch.tensor([0, 12, 30]))
    alone = segment_project(a[12:], g[12:], left, torch.tensor([0, 18]))
    assert torch.allclose(packed[1], alone[0], rtol=1e-5, atol=1e-5)
    padded = segment_project(a, g, left, torch.tensor([12, 30]))
    assert torch.allclose(padded[0], alone[0], rtol=1e-5, atol=1e-5)


def test_inputs_need_not_be_contiguous() -> None:
    a, g, left = normal(0, 8, 30).T, normal(1, 20, 60).T[::2], normal(2, 8, 20).T
    bounds = torch.tensor([0, 12, 30], dtype=torch.int32)
    same = segment_project(a.contiguous(), g.contiguous(), left.contiguous(), bounds)
    assert torch.allclose(segment_project(a, g, left, bounds), same, rtol=1e-5, atol=1e-5)


def test_norms_are_those_of_the_gradients() -> None:
    for i, o in [(4, 3), (40, 60)]:  # both ways of computing them
        a, g, bounds = normal(0, 67, i), normal(1, 67, o), torch.tensor(RAGGED)
        full = segment_project(a.double(), g.double(), None, bounds)
        assert torch.allclose(segment_norms(a, g, bounds).double(), full.square().sum((1, 2)), rtol=1e-4)


def test_nothing_tracks_gradients_and_no_documents_is_fine() -> None:
    a, g = normal(0, 5, 3).requires_grad_(), normal(1, 5, 2)
    assert not segment_project(a, g, None, torch.tensor([0, 5])).requires_grad
    assert segment_project(a, g, None, torch.tensor([0])).shape == (0, 2, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"g": normal(0, 4, 2)},
            ValueError,
            r"g must have the axes \[T, O\] with T = 5 \(from a\), got \(4, 2\)",
        ),
        ({"a": normal(0, 5)}, ValueError, r"a must have the axes \[T, P\], got \(5,\)"),
        ({"a": [1.0]}, TypeError, "a must be a torch.Tensor, got list"),
        ({"g": torch.ones(5, 2, dtype=torch.int64)}, TypeError, "g must hold float, got int64"),
        ({"left": normal(0, 3, 2)}, ValueError, "left must have the axes"),
        (
            {"cu_seqlens": torch.tensor([0, 6])},
            ValueError,
            r"cu_seqlens must not decrease and lie in \[0, 5\]",
        ),
        ({"cu_seqlens": torch.tensor([0, 4, 3])}, ValueError, "must not decrease"),
        ({"cu_seqlens": torch.tensor([-1, 3])}, ValueError, "must not decrease"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int64)}, ValueError, "cu_seqlens"),
    ],
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], message: str) -> None:
    good = {
        "a": normal(0, 5, 3),
        "g": normal(1, 5, 2),
        "left": normal(2, 2, 2),
        "cu_seqlens": torch.tensor([0, 5]),
    }
    with pytest.raises(error, match=message):
        segment_project(**{**good, **change})

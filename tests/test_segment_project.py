"""Projected gradients per document: against autograd, float64 and packing."""

from typing import Any

import numpy as np
import pytest
import torch
from accuracy import assert_as_accurate, normal, product

from jz3 import backend
from jz3.errors import Jz3Error
from jz3.ops.segment_plan import plan_segments
from jz3.ops.segment_project import (
    segment_norms,
    segment_project,
    segment_project_cpu,
    segment_project_reference,
    unpack_left,
)
from jz3.ops.signs import sign_bits, signs

RAGGED = [0, 5, 5, 6, 40, 67]
UNITS = range(1, 4)
compiled = pytest.mark.skipif(bool(backend.extension_missing()), reason="the CPU extension is not compiled")


def plain(a: torch.Tensor, g: torch.Tensor, left: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    rows = product(g, left)
    pairs = zip(bounds, bounds[1:], strict=False)
    return torch.stack([product(rows[b:e].T, a[b:e]) for b, e in pairs])


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
    strided = torch.stack([bounds.long(), torch.full((3,), 10**9)], 1)[:, 0]
    assert torch.allclose(segment_project(a, g, left, strided), same, rtol=1e-5, atol=1e-5)


def test_norms_are_those_of_the_gradients() -> None:
    for i, o in [(4, 3), (40, 60)]:  # both ways of computing them
        a, g, bounds = normal(0, 67, i), normal(1, 67, o), torch.tensor(RAGGED)
        full = segment_project(a.double(), g.double(), None, bounds)
        assert torch.allclose(segment_norms(a, g, bounds).double(), full.square().sum((1, 2)), rtol=1e-4)


def test_tokens_may_belong_to_documents_in_any_order() -> None:
    a, g, left = normal(0, 9, 4), normal(1, 9, 6), normal(2, 6, 3)
    owner = torch.tensor([3, 0, -1, 3, 1, 0, 3, -1, 0])
    got = segment_project(a, g, left, owner, documents=5)
    for i in range(5):
        mine = owner == i
        assert torch.allclose(got[i], left.T @ (g[mine].T @ a[mine]), rtol=1e-5, atol=1e-5)
    assert torch.equal(segment_project(a, g, left, owner.int(), documents=5), got)
    nobody = torch.full((9,), -1)
    assert not segment_project(a, g, left, nobody, documents=2).any()
    assert segment_project(a, g, left, nobody, documents=0).shape == (0, 3, 4)


def test_packed_signs_stand_for_a_dense_matrix() -> None:
    a, g, bounds = normal(0, 30, 4), normal(1, 30, 50), torch.tensor([0, 12, 30])
    for outputs in (1, 32, 140):
        bits = sign_bits(3, "m", 50, outputs)
        dense = signs(3, "m", 50, outputs, dtype=torch.float32) / outputs**0.5
        got = segment_project(a, g, bits, bounds, outputs=outputs)
        assert torch.allclose(got, segment_project(a, g, dense, bounds), rtol=1e-5, atol=1e-5)


def test_norms_of_the_blocks() -> None:
    a, g, left, bounds = normal(0, 30, 4), normal(1, 30, 6), normal(2, 6, 3), torch.tensor([0, 12, 12, 30])
    blocks, norms = segment_project(a, g, left, bounds, norms=True)
    assert torch.equal(blocks, segment_project(a, g, left, bounds))
    assert norms.shape == (3,) and torch.allclose(norms, blocks.square().sum((1, 2)), rtol=1e-5)


def on_unit(unit: int, *arguments: Any) -> torch.Tensor:
    """Run the compiled pass on a vector unit: 1 AVX2, 2 AVX-512, 3 AVX-512 with bfloat16 products."""
    if unit > backend.extension().segment_unit():
        pytest.skip("this machine lacks the vector unit")
    return segment_project_cpu(*arguments, unit=unit)


@compiled
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "width", "outputs", "columns"),
    [
        ("dense", 576, 32, 32),
        ("dense", 33, 130, 7),  # two blocks of outputs, rows of odd length
        ("dense", 1, 1, 1),
        ("signs", 300, 72, 40),  # two blocks of g's columns
        ("signs", 33, 140, 33),
    ],
)
def test_compiled_on_every_vector_unit(
    unit: int, dtype: torch.dtype, kind: str, width: int, outputs: int, columns: int
) -> None:
    """Tokens of no document and what follows the rows of g are NaN; a document goes on in a third piece."""
    bounds = [2, 7, 7, 8, 42, 69, 69, 70, 670, 671]
    count, mine = bounds[-1] + 3, slice(bounds[0], bounds[-1])
    a, wide = (torch.full((count, n), float("nan"), dtype=dtype) for n in (columns, width + 3))
    a[mine], wide[mine, :width] = (
        normal(seed, count, n, dtype=dtype)[mine] for seed, n in ((0, columns), (1, width))
    )
    g, given = wide[:, :width], outputs if kind == "signs" else None
    left = sign_bits(0, "m", width, outputs) if given else normal(2, width, outputs, dtype=dtype)
    matrix = unpack_left(left, outputs, torch.float32) / outputs**0.5 if given else left
    edges = torch.tensor(bounds)
    got = on_unit(unit, a, g, left, edges, None, given)
    exact = segment_project_reference(a.double(), g.double(), matrix.double(), edges)
    expected = plain(a[mine], g[mine], matrix.to(dtype), [b - bounds[0] for b in bounds])
    assert_as_accurate(got, expected, exact)
    assert not got[1].any() and not got[5].any()
    long = slice(bounds[7], bounds[8])
    alone = on_unit(unit, a[long], g[long], left, torch.tensor([0, 600]), None, given)
    assert torch.equal(alone[0], got[7])
    order = torch.from_numpy(np.random.default_rng(0).permutation(count))
    at_home = torch.empty_like(order)
    at_home[order] = torch.arange(count)
    assert torch.equal(on_unit(unit, a[order], g[order], left, edges, at_home, given), got)


@compiled
@pytest.mark.parametrize("kind", ["dense", "signs"])
def test_threads_do_not_change_a_bit(kind: str) -> None:
    """Few documents for many threads: each takes a share of the outputs."""
    a, g = normal(0, 900, 24), normal(1, 900, 500)
    left = sign_bits(0, "m", 500, 200) if kind == "signs" else normal(2, 500, 200)
    given = 200 if kind == "signs" else None
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            for bounds in ([0, 900], [0, 100, 500, 900]):
                results.append(segment_project_cpu(a, g, left, torch.tensor(bounds), None, given))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(results, results[2:], strict=False):
        assert torch.equal(one, other)


@compiled
def test_what_the_compiled_pass_leaves_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    a, g, left, bounds = normal(0, 9, 4), normal(1, 9, 6), normal(2, 6, 3), torch.tensor([0, 9])
    monkeypatch.setenv("JZ3_BACKEND", "segment_project=cpu")
    segment_project(a, g, left, bounds)
    for arguments, reason in (((a, g, None), "no L"), ((a.half(), g.half(), left.half()), "float16")):
        with pytest.raises(Jz3Error, match=reason):
            segment_project(*arguments, bounds)
    monkeypatch.setattr(backend.extension(), "segment_unit", lambda: 0)
    with pytest.raises(Jz3Error, match="vector unit"):
        segment_project(a, g, left, bounds)


@pytest.mark.parametrize("tile", [128, 256])
@pytest.mark.parametrize("tiles", [1, 2])
def test_a_plan_covers_every_document_once_and_in_order(tiles: int, tile: int) -> None:
    lengths = np.concatenate([np.random.default_rng(0).integers(0, 700, 40), [1] * 30, [0, 256, 128, 16]])
    bounds = 3 + np.concatenate([[0], lengths.cumsum()])
    plan = plan_segments(bounds, tiles * tile, tile)
    written: dict[int, list[int]] = {}
    for first, last in zip(plan.groups, plan.groups[1:], strict=False):
        sums: list[int] = []
        for number in range(first, last):
            for begin, end, target, complete in plan.pieces[plan.tiles[number] : plan.tiles[number + 1]]:
                assert 0 <= begin < end <= tile and begin % 16 == end % 16 == 0
                slots = plan.slots[number * tile + begin : number * tile + end]
                sums += slots[slots >= 0].tolist()
                if complete:
                    assert target not in written
                    written[target], sums = sums, []
        assert not sums
    for i, document in enumerate(plan.documents):
        parts = [written.pop(~k) for k in range(plan.partials[i], plan.partials[i + 1])]
        written[document] = sum(parts, [])
    assert written == {i: list(range(bounds[i], bounds[i + 1])) for i in range(len(lengths))}


def test_a_plan_depends_on_nothing_but_the_document() -> None:
    """The slots of a document's pieces, counted from their own beginning, are the same beside any other."""
    alone = plan_segments(np.array([0, 300]), 128, 128)
    beside = plan_segments(np.array([0, 40, 340, 350]), 128, 128)
    mine = beside.pieces[1:4]
    assert (mine[:, 1] - mine[:, 0]).tolist() == (alone.pieces[:, 1] - alone.pieces[:, 0]).tolist()
    assert beside.documents.tolist() == [1] and alone.partials.tolist() == beside.partials.tolist()


def test_nothing_tracks_gradients_and_no_documents_is_fine() -> None:
    a, g = normal(0, 5, 3).requires_grad_(), normal(1, 5, 2)
    assert not segment_project(a, g, None, torch.tensor([0, 5])).requires_grad
    assert segment_project(a, g, None, torch.tensor([0])).shape == (0, 2, 3)
    assert not segment_project(a[:0], g[:0], None, torch.tensor([0, 0])).any()


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
            {"segments": torch.tensor([0, 6])},
            ValueError,
            r"segments must not decrease and lie in \[0, 5\]",
        ),
        ({"segments": torch.tensor([0, 4, 3])}, ValueError, "must not decrease"),
        ({"segments": torch.tensor([-1, 3])}, ValueError, "must not decrease"),
        ({"segments": torch.tensor([], dtype=torch.int64)}, ValueError, "segments must have the axes"),
        ({"segments": torch.tensor([0.0, 5.0])}, TypeError, "segments must hold int, got float32"),
        ({"documents": 2}, ValueError, r"segments must have the axes \[T\] with T = 5"),
        ({"segments": torch.full((5,), 2), "documents": 2}, ValueError, r"segments must lie in \[-1, 1\]"),
        ({"segments": torch.full((5,), -2), "documents": 2}, ValueError, r"segments must lie in \[-1, 1\]"),
        (
            {"segments": torch.tensor([0, 1, 1, 2**31 - 1, 0], dtype=torch.int32), "documents": 2},
            ValueError,
            r"segments must lie in \[-1, 1\]",
        ),
        (
            {"segments": torch.tensor([0, 1, 1, 2**62, 0]), "documents": 2},
            ValueError,
            r"segments must lie in \[-1, 1\]",
        ),
        ({"documents": 2.0}, TypeError, "documents must be an int"),
        ({"outputs": 2}, ValueError, "outputs is for packed signs"),
        ({"left": torch.zeros(2, 4, dtype=torch.int32)}, ValueError, "outputs must be given"),
        (
            {"left": torch.zeros(2, 4, dtype=torch.int32), "outputs": 129},
            ValueError,
            r"outputs must be in \[1, 128\], got 129",
        ),
    ],
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], message: str) -> None:
    good = {
        "a": normal(0, 5, 3),
        "g": normal(1, 5, 2),
        "left": normal(2, 2, 2),
        "segments": torch.tensor([0, 5]),
    }
    with pytest.raises(error, match=message):
        segment_project(**{**good, **change})

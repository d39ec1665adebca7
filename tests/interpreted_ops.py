"""ce_hidden_grad, encode, decode, sketch and score_topk in Triton's interpreter; run by test_kernels.py."""

from pathlib import Path

import pytest
import torch
from accuracy import assert_as_accurate, normal
from interpreted import DTYPES, far_apart, guarded
from kernel_cases import Elsewhere, mutant
from test_ce_hidden_grad import by_autograd

from jz3 import backend
from jz3.kernels import ce_hidden_grad as ce_kernels
from jz3.kernels import encode as encode_kernels
from jz3.kernels import launch
from jz3.kernels import score_topk as score_kernels
from jz3.kernels import sketch as sketch_kernels
from jz3.kernels.ce_hidden_grad import ce_hidden_grad
from jz3.kernels.encode import decode, encode
from jz3.kernels.score_topk import score_topk
from jz3.kernels.sketch import sketch
from jz3.ops.encode import CODEBOOKS, decode_reference, encode_reference
from jz3.ops.score_queries import fold_queries
from jz3.ops.score_topk import score_topk_reference
from jz3.ops.sketch import sketch_reference


def ce_inputs(tokens: int, vocabulary: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    h, weight = normal(0, tokens, width, dtype=dtype), normal(1, vocabulary, width, dtype=dtype)
    y = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(0))
    y[2::7] = -100
    return h, weight, y, normal(2, tokens).abs()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(23, 101, 16), (1, 1, 1), (150, 300, 70)], ids=str)
def test_ce_accuracy(
    dtype: torch.dtype, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    h, weight, y, weights = ce_inputs(*shape, dtype)
    loss, grad = ce_hidden_grad(h, weight, y, weights)
    exact_loss, exact_grad = by_autograd(h.double(), weight.double(), y, weights)
    plain_loss, plain_grad = by_autograd(h, weight, y, weights)
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    assert_as_accurate(loss, plain_loss, exact_loss)
    assert_as_accurate(grad, plain_grad, exact_grad)
    assert not loss[y == -100].any() and not grad[y == -100].any()
    monkeypatch.setattr(ce_kernels, "SCRATCH_BYTES", 1)  # chunks of one block of tokens
    again = ce_hidden_grad(h, weight, y, weights)
    assert torch.equal(again[0], loss) and torch.equal(again[1], grad)


def test_ce_chunks_bound_the_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    h, weight, y, weights = ce_inputs(300, 40, 8, torch.float32)
    monkeypatch.setattr(ce_kernels, "SCRATCH_BYTES", 4 * 48 * 150)
    largest, empty = 0, torch.empty

    def watched(*shape, **options):
        nonlocal largest
        out = empty(*shape, **options)
        largest = max(largest, out.numel() * out.element_size())
        return out

    monkeypatch.setattr(torch, "empty", watched)
    ce_hidden_grad(h, weight, y, weights)
    assert largest <= 4 * 48 * 150


def test_ce_large_logits_and_a_token_alone() -> None:
    h, weight, y, weights = ce_inputs(70, 150, 24, torch.float32)
    h[5] *= 1000
    loss, grad = ce_hidden_grad(h, weight, y, weights)
    assert torch.isfinite(loss).all() and torch.isfinite(grad).all()
    for token in (0, 5, 69):
        own = slice(token, token + 1)
        alone = ce_hidden_grad(h[own], weight, y[own], weights[own])
        assert torch.equal(alone[0], loss[own]) and torch.equal(alone[1], grad[own])
    assert not ce_hidden_grad(h, weight, torch.full((70,), -100), weights)[1].any()
    assert ce_hidden_grad(h[:0], weight, y[:0], weights[:0])[1].shape == (0, 24)


def test_ce_strides() -> None:
    h, weight, y, weights = ce_inputs(20, 50, 16, torch.float16)
    expected = ce_hidden_grad(h, weight, y, weights)
    for other in (
        ce_hidden_grad(h.T.contiguous().T, weight.T.contiguous().T, y, weights),
        ce_hidden_grad(torch.cat([h, h], 1)[:, 16:], torch.cat([weight, weight])[50:], y.int(), weights),
    ):
        assert torch.equal(other[0], expected[0]) and torch.equal(other[1], expected[1])
    few = ce_hidden_grad(far_apart(h[:3]), weight, y[:3], weights[:3])
    assert torch.equal(few[0], expected[0][:3]) and torch.equal(few[1], expected[1][:3])


@pytest.mark.parametrize("kind", CODEBOOKS)
@pytest.mark.parametrize("dim", [1, 3, 8, 1025])
def test_codes_bit_for_bit(kind: str, dim: int) -> None:
    values, mean, scale = normal(0, 7, dim) * 3, normal(1, dim), normal(2, dim).abs()
    scale[::5] = 0
    values[0] = mean  # on thresholds and halves
    codes = encode(values, mean, scale, kind)
    assert torch.equal(codes, encode_reference(values, mean, scale, kind))
    assert torch.equal(decode(codes, mean, scale, kind), decode_reference(codes, mean, scale, kind))
    assert torch.equal(encode(values.T.contiguous().T, mean, scale, kind), codes)
    assert encode(values[:0], mean, scale, kind).shape == (0, codes.shape[1])
    wide = far_apart(codes[:3])
    assert torch.equal(decode(wide, mean, scale, kind), decode_reference(codes[:3], mean, scale, kind))


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_codes_of_extremes(kind: str) -> None:
    mean, scale = torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([0.0, 1e-42, 1.0, 1e30])
    values = torch.tensor([[3e38, -3e38, 3.0, 1e-30], [1.0, 2.0, -3e38, 3e38]])
    assert torch.equal(encode(values, mean, scale, kind), encode_reference(values, mean, scale, kind))
    unit = CODEBOOKS[kind].unit  # exactly on the bounds between levels, and half way
    grid = (torch.arange(-600, 600) * unit / 2)[None]
    zeros, ones = torch.zeros(1200), torch.ones(1200)
    assert torch.equal(encode(grid, zeros, ones, kind), encode_reference(grid, zeros, ones, kind))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "n", "dim"), [(3, 2000, 64), (1, 1, 1), (5, 1000, 900), (2, 7, 3)])
def test_sketch(dtype: torch.dtype, rows: int, n: int, dim: int) -> None:
    block = normal(0, rows, n, dtype=dtype)
    got = sketch(block, 77, dim)
    assert torch.equal(got, sketch_reference(block, 77, dim))
    assert_as_accurate(
        got, sketch_reference(block.float(), 77, dim), sketch_reference(block.double(), 77, dim)
    )
    assert torch.equal(sketch(block.T.contiguous().T, 77, dim), got)


def test_sketch_of_nothing_and_far_rows() -> None:
    assert not sketch(torch.empty(2, 0), 5, 4).any()
    assert sketch(torch.empty(0, 5), 5, 4).shape == (0, 4)
    block = normal(0, 3, 40, dtype=torch.float16)
    assert torch.equal(sketch(far_apart(block), 5, 16), sketch_reference(block, 5, 16))


def score_arguments(kind: str, rows: int, dim: int, queries: int, k: int, planes: int = 2) -> tuple:
    mean, scale = normal(1, dim), normal(2, dim).abs()
    codes = encode_reference(normal(0, rows, dim) * scale + mean, mean, scale, kind)
    codes[rows // 2] = codes[0]
    digits = fold_queries(normal(3, queries, dim), mean, scale, CODEBOOKS[kind].unit)
    extra = digits.planes.new_zeros(max(planes - 2, 0), queries, dim)
    row_scale = normal(4, rows)
    row_scale[rows // 2] = row_scale[0]
    ids = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    stacked = torch.cat([extra, digits.planes])[-planes:]
    groups = torch.arange(queries) % 3 if queries > 2 else torch.zeros(queries, dtype=torch.int64)
    count = min(queries, 3) if queries > 2 else 1
    return codes, kind, stacked, digits.step, digits.bias, row_scale, ids, groups, count, k


@pytest.mark.parametrize("kind", CODEBOOKS)
@pytest.mark.parametrize(
    ("rows", "dim", "queries", "k"), [(1, 1, 1, 1), (150, 131, 5, 20), (33, 530, 70, 4), (130, 64, 16, 200)]
)
def test_scores_bit_for_bit(
    kind: str, rows: int, dim: int, queries: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = score_arguments(kind, rows, dim, queries, k)
    expected = score_topk_reference(*arguments)
    for height in (1 << 20, 37):
        monkeypatch.setattr("jz3.ops.best.rows_at_once", lambda _, height=height: height)
        values, ids = score_topk(*arguments)
        assert torch.equal(values, expected[0]) and torch.equal(ids, expected[1])


@pytest.mark.parametrize("planes", [1, 3, 4])
def test_scores_with_any_number_of_planes(planes: int) -> None:
    arguments = score_arguments("4bit", 60, 70, 4, 9, planes)
    got, expected = score_topk(*arguments), score_topk_reference(*arguments)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_scores_of_far_rows_of_nothing_and_of_long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = score_arguments("int8", 3, 48, 4, 3)
    expected = score_topk_reference(*arguments)
    got = score_topk(far_apart(arguments[0]), *arguments[1:])
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    codes, kind, planes, step, bias, row_scale, ids, groups, count, k = arguments
    nothing = score_topk(codes[:0], kind, planes, step, bias, row_scale[:0], ids[:0], groups, count, k)
    assert nothing[0].shape == nothing[1].shape == (count, 0)
    dim = 1 << 17  # sums just below 2^31
    longest = torch.zeros(1, dim, dtype=torch.uint8)
    digits = torch.full((1, 1, dim), 127, dtype=torch.int8)
    monkeypatch.setitem(launch.TABLE[80], "score_codes/wide/32", {"BN": 16, "BC": 16, "BK": 8192})
    one = torch.ones(1, dtype=torch.float64)
    values, _ = score_topk(
        longest, "int8", digits, one, one, torch.ones(1), torch.zeros(1).long(), torch.zeros(1).long(), 1, 1
    )
    assert float(values) == float(torch.tensor(-128.0 * 127 * dim + 1, dtype=torch.float64).float())


def test_every_access_is_in_bounds() -> None:
    h, weight, y, weights = ce_inputs(37, 83, 21, torch.float32)
    values, mean, scale = normal(0, 5, 131), normal(1, 131), normal(2, 131).abs()
    block = normal(0, 3, 45)
    scored = {kind: score_arguments(kind, 37, 131, 5, 4) for kind in CODEBOOKS}
    with guarded():
        results = [*ce_hidden_grad(h, weight, y, weights), sketch(block, 5, 70)]
        for kind, arguments in scored.items():
            results += [
                decode(encode(values, mean, scale, kind), mean, scale, kind),
                score_topk(*arguments)[0],
            ]
    assert all(torch.isfinite(x).all() for x in results)


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        (
            ce_kernels,
            "mask=live[:, None] & (d < D)[None, :], other=0.0)\n        w",
            "mask=live[:, None], other=0.0)\n        w",
        ),
        (ce_kernels, "mask=(v < V)[:, None] & (d < D)[None, :]", "mask=(d < D)[None, :]"),
        (sketch_kernels, "mask=(row < S)[:, None] & more[None, :]", "mask=more[None, :]"),
        (encode_kernels, "& (byte < width)[None, :]", ""),
        (score_kernels, "mask=(row < N)[:, None] & (byte < width)[None, :]", "mask=(row < N)[:, None]"),
    ],
    ids=["ce_exp", "ce_grad", "sketch", "encode", "score"],
)
def test_the_guard_catches_a_dropped_mask(module, old: str, new: str, tmp_path: Path) -> None:
    broken = mutant(module, tmp_path, (old, new))
    with guarded(), pytest.raises(Exception, match="out-of-bounds"):
        if module is ce_kernels:
            broken.ce_hidden_grad(*ce_inputs(3, 5, 7, torch.float32))
        elif module is sketch_kernels:
            broken.sketch(normal(0, 3, 45), 5, 70)
        elif module is encode_kernels:
            broken.encode(normal(0, 5, 131), normal(1, 131), normal(2, 131).abs(), "4bit")
        else:
            broken.score_topk(*score_arguments("4bit", 3, 20, 4, 2))


@pytest.mark.parametrize(
    "name", ["ce_hidden_grad", "segment_project", "sign_project", "score_topk", "score_codes"]
)
def test_the_check_that_gpus_make_at_the_start_is_passed(name: str) -> None:
    __import__(f"jz3.ops.{backend.OPS[name]}")
    op = backend._ops[name]
    assert backend._self_check(op, "triton", Elsewhere("cpu")) == ""
    if name == "ce_hidden_grad":
        assert backend._self_check(op, "cuda", Elsewhere("cpu")) == ""


def test_the_ops_run_on_triton_when_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JZ3_BACKEND", "triton")
    for op in ("ce_hidden_grad", "encode", "decode", "sketch", "score_topk", "score_codes"):
        module = backend.OPS[op]
        __import__(f"jz3.ops.{module}")
        assert backend.choose(op) == ("triton", "forced by JZ3_BACKEND")

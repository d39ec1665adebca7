"""The Triton kernels on a CUDA device: against the references, twice the same bits, and chosen by the dispatch."""

import contextlib

import pytest
import torch
from accuracy import assert_as_accurate, normal
from test_ce_hidden_grad import by_autograd

from jz3 import backend
from jz3.ops.ce_hidden_grad import ce_hidden_grad
from jz3.ops.encode import CODEBOOKS, decode_reference, encode_reference
from jz3.ops.score_queries import fold_queries
from jz3.ops.score_topk import score_topk_reference
from jz3.ops.segment_project import segment_project
from jz3.ops.sign_project import sign_project
from jz3.ops.sketch import sketch, sketch_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def triton(name: str):
    """Return an op's Triton implementation, which must run here."""
    assert not backend.triton_missing()
    return backend.implementation(name, "triton")


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 1), (150, 300, 70), (1000, 5003, 576)], ids=str)
def test_ce_hidden_grad(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    tokens, vocabulary, width = shape
    h = normal(0, tokens, width, dtype=dtype).cuda()
    weight = (normal(1, vocabulary, width) / width**0.5).to(dtype).cuda()
    y = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(0)).cuda()
    y[2::7] = -100
    weights = normal(2, tokens).abs().cuda()
    got = triton("ce_hidden_grad")(h, weight, y, weights)
    again = triton("ce_hidden_grad")(h, weight, y, weights)
    exact = by_autograd(h.double(), weight.double(), y, weights)
    plain = by_autograd(h, weight, y, weights)
    for ours, same, theirs, truth in zip(got, again, plain, exact, strict=True):
        assert_as_accurate(ours, theirs, truth)
        assert torch.equal(ours, same)


def test_ce_hidden_grad_of_a_large_vocabulary_is_dispatched_here() -> None:
    if backend.forced("ce_hidden_grad"):
        pytest.skip("JZ3_BACKEND forces a back end")
    assert backend.choose("ce_hidden_grad", "cuda")[0] == "triton"
    h = normal(0, 300, 4096, dtype=torch.bfloat16).cuda()
    weight = (normal(1, 128_256, 4096) / 64).bfloat16().cuda()
    y = torch.arange(300).cuda() * 400
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss, grad = ce_hidden_grad(h, weight, y)
    assert torch.cuda.max_memory_allocated() - before < 400 << 20
    exact = torch.nn.functional.cross_entropy((h.float() @ weight.float().T), y, reduction="none")
    assert torch.allclose(loss, exact, atol=1e-2) and torch.isfinite(grad).all()


@pytest.mark.parametrize("where", ["a second GPU", "another stream"])
def test_elsewhere_than_by_default(where: str) -> None:
    other = where == "a second GPU"
    if other and torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    x, left = (normal(i, rows, 136, dtype=torch.bfloat16) for i, rows in enumerate((300, 136)))

    def run(device: torch.device) -> list[torch.Tensor]:
        on, matrix = x.to(device), left.to(device)
        blocks = segment_project(on, on, matrix, torch.tensor([0, 3, 3, 290]))
        results = blocks, sign_project(on, 70, seed=0, name="m"), sketch(on, "m", 64, seed=0)
        return [result.cpu() for result in results]

    expected, device = run(torch.device("cuda:0")), torch.device("cuda", int(other))
    with contextlib.nullcontext() if other else torch.cuda.stream(torch.cuda.Stream(device)):
        found = run(device)
    for one, two in zip(found, expected, strict=True):
        assert float((one - two).abs().max()) <= 1e-2 * float(two.abs().max())
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("kind", CODEBOOKS)
@pytest.mark.parametrize("dim", [1, 1025, 2048])
def test_codes(kind: str, dim: int) -> None:
    values, mean, scale = normal(0, 700, dim) * 3, normal(1, dim), normal(2, dim).abs()
    scale[::5] = 0
    expected = encode_reference(values, mean, scale, kind)
    device = [x.cuda() for x in (values, mean, scale)]
    codes = triton("encode")(*device, kind)
    assert torch.equal(codes.cpu(), expected)
    decoded = triton("decode")(codes, *device[1:], kind)
    assert torch.equal(decoded.cpu(), decode_reference(expected, mean, scale, kind))


@DTYPES
@pytest.mark.parametrize(("rows", "n", "dim"), [(1, 1, 1), (5, 4097, 900), (33, 16384, 8192)])
def test_sketch(dtype: torch.dtype, rows: int, n: int, dim: int) -> None:
    block = normal(0, rows, n, dtype=dtype)
    assert torch.equal(triton("sketch")(block.cuda(), 77, dim).cpu(), sketch_reference(block, 77, dim))


@pytest.mark.parametrize("kind", CODEBOOKS)
@pytest.mark.parametrize(
    ("rows", "dim", "queries", "k"), [(1, 1, 1, 1), (3000, 2048, 64, 100), (777, 131, 5, 20)]
)
def test_scores(kind: str, rows: int, dim: int, queries: int, k: int) -> None:
    mean, scale = normal(1, dim), normal(2, dim).abs()
    codes = encode_reference(normal(0, rows, dim) * scale + mean, mean, scale, kind)
    codes[rows // 2] = codes[0]
    digits = fold_queries(normal(3, queries, dim), mean, scale, CODEBOOKS[kind].unit)
    ids = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    groups = torch.arange(queries) // 2
    arguments = (digits.planes, digits.step, digits.bias, normal(4, rows), ids, groups)
    rest = (int(groups.max()) + 1, k)
    expected = score_topk_reference(codes, kind, *arguments, *rest)
    got = triton("score_topk")(codes.cuda(), kind, *(x.cuda() for x in arguments), *rest)
    assert torch.equal(got[0].cpu(), expected[0]) and torch.equal(got[1].cpu(), expected[1])

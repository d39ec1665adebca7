"""Products with fixed matrices and what is built on them: against float64, in threads and after a fork."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accuracy import assert_as_accurate, normal

from jz3 import backend
from jz3.gradients import llama, products
from jz3.gradients.products import (
    BUCKETS,
    GatedProducts,
    OutputLayer,
    Product,
    can_gate,
    fold_matrix,
    project_segments,
)
from jz3.ops.ce_hidden_grad import ce_hidden_grad_reference

pytestmark = pytest.mark.usefixtures("tile_unit")


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=["own", "torch"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = request.getfixturevalue("dtype") if "dtype" in request.fixturenames else torch.bfloat16
    if request.param == "torch":
        monkeypatch.setattr(products, "native_products", lambda *_: False)
        monkeypatch.setattr(products, "native_segments", lambda: False)
    elif not products.native_products(numbers):
        pytest.skip("jz3's own products are not the faster ones here")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("result", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 2, 1),
        (7, 64, 48),
        (203, 38, 67),
        (500, 576, 130),
        (20, 8192, 130),
        (70, 960, 66),  # in two parts of the inner dimension
        (70, 3072, 98),  # deep: all rows take a part before the next
        (70, 576, 1200),  # in chunks of columns
        (1100, 64, 1024),  # more than the caches hold
    ],
    ids=str,
)
def test_product(sizes: tuple[int, int, int], dtype: torch.dtype, result: torch.dtype, bias: bool) -> None:
    if dtype == torch.float32 != result:
        pytest.skip("sums of float32 are not rounded")
    rows, depth, columns = sizes
    x = normal(1, rows, depth + 6, dtype=dtype)[:, 2 : depth + 2]
    w = normal(2, columns, depth, dtype=dtype).T
    b = normal(3, columns, dtype=dtype) if bias else None
    got = Product(w, b)(x, result)
    assert got.dtype == result
    plain = x @ w if b is None else torch.addmm(b, x, w)
    exact = x.double() @ w.double() + (0 if b is None else b.double())
    assert_as_accurate(got, plain, exact)


@pytest.mark.parametrize("result", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [(3, 48, 0), (7, 64, 48), (50, 576, 29), (20, 38, 5)], ids=str)
def test_folded_rows_stand_beside_the_product(
    sizes: tuple[int, int, int], dtype: torch.dtype, result: torch.dtype
) -> None:
    if dtype == torch.float32 != result:
        pytest.skip("sums of float32 are not rounded")
    rows, depth, columns = sizes
    x = normal(1, rows, depth + 6, dtype=dtype)[:, 2 : depth + 2]
    w, signs = normal(2, depth, columns, dtype=dtype), normal(3, depth).sign()
    got = Product(w, signs=signs)(x, result)
    assert got.shape == (rows, columns + BUCKETS)
    exact = torch.zeros(rows, BUCKETS).double()
    for k in range(depth):
        exact[:, k % 32 // 2 + 16 * (k % 2)] += signs[k] * x[:, k].double()
    plain = x @ fold_matrix(signs).to(x)
    assert_as_accurate(got[:, columns:], plain, exact)
    if columns:
        assert_as_accurate(got[:, :columns], x @ w, x.double() @ w.double())


@pytest.mark.parametrize(
    "sizes", [(1, 32, 32), (37, 64, 96), (70, 576, 640), (70, 2048, 64), (1100, 64, 512)], ids=str
)
def test_gated_products(sizes: tuple[int, int, int]) -> None:
    rows, depth, width = sizes
    both = normal(1, depth, 2 * width, dtype=torch.bfloat16) * depth**-0.5
    if not can_gate(both):
        pytest.skip("done where tiles multiply")
    down = normal(2, width, depth, dtype=torch.bfloat16)
    # Rows with gaps between them, of odd numbers too.
    x, g = (normal(n, rows, depth + n, dtype=torch.bfloat16)[:, :depth] for n in (1, 2))
    gated = GatedProducts(both, down)
    gate_up, y = gated.forward(x)
    assert_as_accurate(gate_up, x @ both, x.double() @ both.double())

    def layer(z: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(z[:, :width]) * z[:, width:]

    def gradient(z: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        z = z.requires_grad_()
        return torch.autograd.grad(layer(z), z, grad)[0]

    assert_as_accurate(y, layer(gate_up), layer(gate_up.double()))
    exact = gradient(gate_up.double(), g.double() @ down.T.double())
    plain = gradient(gate_up.clone(), g @ down.T)
    assert_as_accurate(gated.backward(g, gate_up), plain, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products_of_other_sizes_and_of_none(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="x must have 64 columns, got 8"):
        Product(normal(1, 64, 48, dtype=dtype))(normal(0, 3, 8, dtype=dtype))
    empty = Product(torch.zeros(0, 16, dtype=dtype))(torch.zeros(48, 0, dtype=dtype))
    assert torch.equal(empty, torch.zeros(48, 16, dtype=dtype))


def test_gated_products_without_tiles_are_refused() -> None:
    both = normal(1, 64, 128, dtype=torch.bfloat16)
    if not can_gate(both):
        pytest.skip("done where tiles multiply")
    gated, extension = GatedProducts(both, both[:, :64]), backend.extension()
    unit = extension.tile_unit()
    extension.choose_tile_unit(0)
    try:
        with pytest.raises(ValueError, match="need tiles"):
            gated.forward(normal(2, 5, 64, dtype=torch.bfloat16))
    finally:
        extension.choose_tile_unit(unit)


def test_gated_products_refuse_other_sizes() -> None:
    assert not can_gate(normal(1, 48, 128, dtype=torch.bfloat16))
    assert not can_gate(normal(1, 64, 96, dtype=torch.bfloat16))
    assert not can_gate(normal(1, 64, 128))


@pytest.mark.parametrize("rows", [40, 2100])  # the latter more than the caches hold
def test_norm(rows: int, dtype: torch.dtype) -> None:
    if not products.native_products(dtype):
        pytest.skip("jz3's own code is not used")
    native = llama._Native(dtype)
    x, add, weight = normal(1, rows, 576), normal(2, rows, 576, dtype=dtype), normal(3, 576, dtype=dtype)
    total, y, scale = native.norm(x, add, weight, 1e-5)
    assert torch.equal(total, x + add)
    for begin in range(0, rows, 40):  # as the sum's, and a few rows' as many's
        part = slice(begin, begin + 40)
        _, few, few_scale = native.norm(total[part], None, weight, 1e-5)
        assert torch.equal(y[part], few) and torch.equal(scale[part], few_scale)
    wide = total.double()
    exact = wide * (wide.square().mean(1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    plain = torch.nn.functional.rms_norm(total.to(dtype), (576,), weight, 1e-5)
    assert_as_accurate(y, plain, exact)


def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    x, product = normal(1, 301, 64, dtype=dtype), Product(normal(2, 64, 96, dtype=dtype))
    if product._packed is None:
        pytest.skip("torch's products do")
    assert torch.equal(product(x)[200:], product(x[200:]))


@pytest.mark.parametrize("sizes", [(13, 21, 4), (40, 7, 0), (1, 1, 5), (0, 0, 3), (33, 70, 9)], ids=str)
def test_project_segments(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, columns, begin = sizes
    tokens, bounds = 90, torch.tensor([0, 40, 40, 41, 90])
    g = normal(1, tokens, rows + 3 + BUCKETS)
    a = normal(2, tokens, begin + columns + 2 + BUCKETS)
    left, right = normal(3, rows, BUCKETS), normal(4, columns, BUCKETS)
    chosen = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(0))[:17]
    square, values = torch.ones(4), torch.full((4, len(chosen) + 5), torch.nan)
    project_segments((g, a), begin, bounds, (left, right), chosen, square, values[:, 2 : 2 + len(chosen)])
    wide = [x.double() for x in (g, a, left, right)]
    for i, (b, e) in enumerate(((0, 40), (40, 40), (40, 41), (41, 90))):
        known = wide[0][b:e, :rows].T @ wide[1][b:e, begin : begin + columns]
        rest = wide[0][b:e, -BUCKETS:].T @ wide[1][b:e, -BUCKETS:] - wide[2].T @ known @ wide[3]
        exact = 1 + known.square().sum() + rest.square().sum()
        torch.testing.assert_close(square[i].double(), exact, atol=0, rtol=1e-5)
        expected = known.flatten()[chosen]
        torch.testing.assert_close(values[i, 2:-3].double(), expected, atol=1e-4, rtol=1e-5)
    assert torch.isnan(values[:, :2]).all() and torch.isnan(values[:, -3:]).all()


@pytest.mark.parametrize("words", [16, 211, 1200, 1248])
def test_output_layer(words: int) -> None:
    w, h = normal(1, words, 64, dtype=torch.bfloat16) * 0.2, normal(2, 150, 64, dtype=torch.bfloat16) * 3
    y, weights = torch.arange(150) % words, torch.linspace(0.1, 1, 150)
    # A certain target, whose gradient all but cancels, and a loss that overflows float32.
    h[0], h[1] = w[y[0]] * 6, (w[(y[1] + 1) % words] - w[y[1]]) * 1000
    layer = OutputLayer(w)
    loss, grad = layer(h, y, weights)
    exact_loss, exact = ce_hidden_grad_reference(h.double(), w.double(), y, weights.double())
    logits = h @ w.T
    plain_loss = torch.nn.functional.cross_entropy(logits, y, reduction="none")
    p = torch.softmax(logits, 1) - torch.nn.functional.one_hot(y, words)
    plain = (p * weights[:, None].bfloat16()) @ w
    assert_as_accurate(grad, plain, exact)
    assert_as_accurate(loss, plain_loss, exact_loss)
    assert float(exact_loss[1]) > 100
    if layer._packed is not None:
        assert float((grad[0].double() - exact[0]).norm() / exact[0].norm()) < 2e-2


def test_output_layer_keeps_nan_in_its_row_and_names_bad_targets() -> None:
    w, h = normal(1, 40, 32, dtype=torch.bfloat16), normal(2, 9, 32, dtype=torch.bfloat16)
    h[4, 3] = torch.nan
    loss, grad = OutputLayer(w)(h, torch.arange(9), torch.ones(9))
    rows = torch.arange(9) != 4
    assert torch.isnan(loss[4]) and torch.isfinite(loss[rows]).all()
    assert torch.isnan(grad[4]).all() and torch.isfinite(grad[rows]).all()
    with pytest.raises(ValueError, match="40"):
        OutputLayer(w)(h, torch.arange(9) + 32, torch.ones(9))


def test_callers_in_several_threads(dtype: torch.dtype) -> None:
    x, product = normal(1, 700, 128, dtype=dtype), Product(normal(2, 128, 256, dtype=dtype))
    expected = product(x)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: product(x), range(40)):
            assert torch.equal(found, expected)


def test_after_a_fork(dtype: torch.dtype) -> None:
    x, product = normal(1, 700, 128, dtype=dtype), Product(normal(2, 128, 256, dtype=dtype))
    if product._packed is None:
        pytest.skip("torch's own threads don't survive a fork")
    expected = product(x).view(torch.uint8).numpy()
    child = os.fork()
    if not child:
        # A child that hangs ends too; in it nothing may use torch's threads.
        signal.alarm(30)
        os._exit(0 if (product(x).view(torch.uint8).numpy() == expected).all() else 1)
    assert os.waitpid(child, 0)[1] == 0

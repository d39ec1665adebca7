"""The signed hash: unbiased, deterministic, the same on every back end."""

import pytest
import torch
from accuracy import BACKENDS, assert_as_accurate, normal

from jz3 import backend
from jz3.ops.sketch import sketch, sketch_plan, sketch_reference


@pytest.fixture(params=BACKENDS)
def on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu" and backend.extension_missing():
        pytest.skip(backend.extension_missing())
    monkeypatch.setenv("JZ3_BACKEND", f"sketch={request.param}")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "n", "dim"), [(3, 5000, 64), (1, 1, 1), (5, 4097, 8192), (2, 7, 3)])
def test_accuracy(on: str, dtype: torch.dtype, rows: int, n: int, dim: int) -> None:
    block = normal(0, rows, n, dtype=dtype)
    got = backend.call("sketch", block, 77, dim)
    assert_as_accurate(
        got, sketch_reference(block.float(), 77, dim), sketch_reference(block.double(), 77, dim)
    )


def test_definition_one_coordinate_at_a_time(on: str) -> None:
    block = normal(0, 2, 50)
    buckets, flips = sketch_plan(5, 50, 7)
    expected = torch.zeros(2, 7)
    for j in range(50):
        expected[:, int(buckets[j])] += int(flips[j]) * block[:, j]
    assert torch.equal(backend.call("sketch", block, 5, 7), expected)


def test_rows_don_t_depend_on_their_neighbours(on: str) -> None:
    block = normal(0, 9, 6000)
    whole = sketch(block, "m", 128, seed=1)
    assert torch.equal(whole[3:5], sketch(block[3:5], "m", 128, seed=1))
    assert torch.equal(whole, sketch(block.T.contiguous().T, "m", 128, seed=1))
    assert torch.equal(whole, sketch(block, "m", 128, seed=1))


def test_blocks_add_up_and_names_differ(on: str) -> None:
    a, b = normal(0, 2, 300), normal(1, 2, 40)
    out = torch.zeros(2, 64)
    assert sketch(a, "a", 64, seed=0, out=out) is out
    sketch(b, "b", 64, seed=0, out=out)
    assert torch.equal(out, sketch(a, "a", 64, seed=0) + sketch(b, "b", 64, seed=0))
    assert not torch.equal(sketch(a, "a", 64, seed=0), sketch(a, "b", 64, seed=0))
    assert not torch.equal(sketch(a, "a", 64, seed=0), sketch(a, "a", 64, seed=1))


def test_the_most_buckets_go_where_a_launch_reaches_them() -> None:
    from jz3.ops.sketch import MAX_DIM, TRITON_MOST

    unsupported = backend._ops["sketch"].unsupported
    block = torch.empty(1, 2, device="meta")
    assert not unsupported("triton", (block, 0, TRITON_MOST))
    assert "16777216 buckets" in unsupported("triton", (block, 0, MAX_DIM))
    assert not unsupported("cpu", (block, 0, MAX_DIM))


def test_inner_products_are_kept_on_average(on: str) -> None:
    x, y = normal(0, 1, 500, dtype=torch.float32), normal(1, 1, 500)
    y = y + x
    exact = float((x * y).sum())
    estimates = [float((sketch(x, "m", 256, seed=s) * sketch(y, "m", 256, seed=s)).sum()) for s in range(200)]
    mean, error = sum(estimates) / 200, torch.tensor(estimates).std() / 200**0.5
    assert abs(mean - exact) < 4 * float(error)
    assert float(error) * 200**0.5 < 3 * float(x.norm() * y.norm()) / 16


def test_empty_and_wrong_arguments(on: str) -> None:
    assert sketch(torch.empty(0, 5), "m", 4, seed=0).shape == (0, 4)
    assert torch.equal(sketch(torch.empty(2, 0), "m", 4, seed=0), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"dim must be in \[1, \d+\], got 0"):
        sketch(torch.ones(2, 2), "m", 0, seed=0)
    with pytest.raises(ValueError, match="out must have dim = 4 columns"):
        sketch(torch.ones(2, 2), "m", 4, seed=0, out=torch.zeros(2, 5))
    with pytest.raises(ValueError, match="out must have the axes"):
        sketch(torch.ones(2, 2), "m", 4, seed=0, out=torch.zeros(3, 4))

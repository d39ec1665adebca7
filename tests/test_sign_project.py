"""The dense sign projection: accuracy, pieces, unbiasedness, back ends."""

import pytest
import torch
from accuracy import BACKENDS, assert_as_accurate, normal

from jz3 import backend
from jz3.ops import sign_project as module
from jz3.ops.sign_project import sign_project, sign_project_reference
from jz3.ops.signs import signs


@pytest.fixture(params=BACKENDS)
def on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu" and backend.extension_missing():
        pytest.skip(backend.extension_missing())
    monkeypatch.setenv("JZ3_BACKEND", f"sign_project={request.param}")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "p", "k"), [(3, 5000, 64), (1, 1, 1), (5, 127, 33), (2, 129, 1000), (103, 2071, 6)]
)
def test_accuracy(on: str, dtype: torch.dtype, rows: int, p: int, k: int) -> None:
    x = normal(0, rows, p, dtype=dtype)
    omega = signs(4, "m", k, p, dtype=torch.float32) / k**0.5
    got = sign_project(x, k, seed=4, name="m")
    exact = x.double() @ signs(4, "m", k, p, dtype=torch.float64).T / k**0.5
    assert_as_accurate(got, (x @ omega.to(dtype).T).float(), exact)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_any_strides_and_far_columns(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, fused: bool
) -> None:
    if backend.extension_missing():
        pytest.skip(backend.extension_missing())
    if not fused:
        monkeypatch.setattr(backend.extension(), "has_sign_project", lambda: False)
    first = (1 << 40) - 128  # the counter's high half begins after the first block
    x = normal(0, 14, 3000, dtype=dtype)
    for part in (x[:, 7:1207], x[::3, ::2], x.T[:700]):
        expected = sign_project_reference(part.double(), _key(), 21, first)
        got = sign_project(part, 21, seed=0, name="m", first_col=first)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5 * part.shape[1] ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_depends_on_nothing_else(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    if backend.extension_missing() or not backend.extension().has_sign_project():
        pytest.skip("no compiled kernel for AVX-512 here")
    monkeypatch.setattr("jz3.ops.sign_project.TILE", 111 * 5000)
    x = normal(0, 111, 9000, dtype=dtype)
    expected = sign_project(x, 50, seed=0, name="m")
    for threads in (1, 2, 3):
        monkeypatch.setattr("jz3.backend.threads", lambda threads=threads: threads)
        for rows in (slice(0, 1), slice(7, 10), slice(60, 111), slice(0, 111)):
            assert torch.equal(sign_project(x[rows], 50, seed=0, name="m"), expected[rows])


def test_pieces_add_up(on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(0, 2, 900, dtype=torch.float32)
    whole = sign_project(x, 40, seed=0, name="m")
    pieces = sign_project(x[:, :512], 40, seed=0, name="m") + sign_project(
        x[:, 512:], 40, seed=0, name="m", first_col=512
    )
    assert torch.allclose(whole, pieces, rtol=1e-5, atol=1e-4)
    monkeypatch.setattr("jz3.ops.sign_project.TILE", 128 * 40)
    x = normal(0, 2, 5000, dtype=torch.float32)
    whole = sign_project(x[:, :2048], 40, seed=0, name="m") + sign_project(
        x[:, 2048:], 40, seed=0, name="m", first_col=2048
    )
    assert torch.allclose(whole, sign_project(x, 40, seed=0, name="m"), rtol=1e-5, atol=1e-4)


def test_signs_are_made_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    if backend.extension_missing():
        pytest.skip(backend.extension_missing())
    monkeypatch.setenv("JZ3_BACKEND", "sign_project=cpu")
    x = normal(0, 3, 5000)
    whole = sign_project(x, 70, seed=4, name="m")
    monkeypatch.setattr(module, "TILE", 16 * module.CPU_CHUNK)
    assert torch.allclose(sign_project(x, 70, seed=4, name="m"), whole, atol=1e-4)


def test_inner_products_are_kept_on_average(on: str) -> None:
    x, y = normal(0, 1, 300), normal(1, 1, 300) + normal(0, 1, 300)
    pairs = torch.cat([x, y])
    estimates = []
    for seed in range(100):
        a, b = sign_project(pairs, 128, seed=seed, name="m")
        estimates.append(float(a @ b))
    spread = torch.tensor(estimates).std()
    assert abs(sum(estimates) / 100 - float((x * y).sum())) < 4 * float(spread) / 10
    assert float(spread) < 3 * float(x.norm() * y.norm()) / 128**0.5


def test_float64_runs_on_the_reference_and_empty_is_fine() -> None:
    x = normal(0, 2, 300, dtype=torch.float64)
    assert torch.equal(
        sign_project(x, 9, seed=0, name="m"),
        backend.implementation("sign_project", "reference")(x, _key(), 9, 0),
    )
    assert sign_project(x[:0], 9, seed=0, name="m").shape == (0, 9)
    assert torch.equal(sign_project(x[:, :0].float(), 9, seed=0, name="m"), torch.zeros(2, 9))


def test_as_many_rows_as_a_launch_reaches() -> None:
    unsupported = backend._ops["sign_project"].unsupported
    x = torch.ones(1, 8, dtype=torch.bfloat16).expand(module.CUDA_MOST + 1, -1)
    assert not unsupported("cuda", (x[1:], 0, 4, 0))
    assert "8388481 rows" in unsupported("cuda", (x, 0, 4, 0))
    assert not unsupported("triton", (x, 0, 4, 0))


def _key() -> int:
    from jz3.ops.signs import signs_key

    return signs_key(0, "m")


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="first_col must be a multiple of 128, got 64"):
        sign_project(torch.ones(2, 2), 4, seed=0, name="m", first_col=64)
    with pytest.raises(ValueError, match="k must be in"):
        sign_project(torch.ones(2, 2), 0, seed=0, name="m")
    with pytest.raises(TypeError, match="x must hold float, got int64"):
        sign_project(torch.ones(2, 2, dtype=torch.int64), 4, seed=0, name="m")
    assert sign_project_reference(torch.ones(1, 1, dtype=torch.float64), 3, 4, 0).dtype == torch.float64

"""Run by test_kernels.py in a process with TRITON_INTERPRET=1, which is read when kernels are decorated."""

import pytest
import torch
from accuracy import assert_as_accurate, normal
from interpreted import DTYPES, guarded

from jz3 import backend
from jz3.kernels.segment_project import segment_project
from jz3.kernels.sign_project import sign_bits, sign_project
from jz3.ops.segment_project import segment_project_reference
from jz3.ops.sign_project import sign_project_reference
from jz3.ops.signs import sign_bits_reference, unpack_signs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "p", "k"), [(3, 300, 40), (1, 1, 1), (70, 129, 65), (17, 600, 20)])
def test_sign_project(dtype: torch.dtype, rows: int, p: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jz3.kernels.sign_project.PIECE", 256)
    x = normal(0, rows, p, dtype=dtype)
    key, first = 0xFEDCBA98F6543210, 128 * ((1 << 32) - 1)
    got = sign_project(x, key, k, first)
    omega = unpack_signs(sign_bits_reference(key, k, p, 0, first), p)
    plain = (x @ torch.from_numpy(omega).to(dtype).T).float() * k**-0.5
    exact = sign_project_reference(x.double(), key, k, first)
    assert_as_accurate(got, plain, exact)


def test_sign_bits() -> None:
    for key, rows, blocks, first in [(0xFEDCBA98F6543210, 3, 130, (1 << 32) - 1), (5, 1, 1, 0)]:
        got = sign_bits(key, rows, blocks, first, torch.device("cpu")).numpy().view("uint32")
        assert (got == sign_bits_reference(key, rows, 128 * blocks, 0, 128 * first)).all()


def test_sign_project_strides_and_long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jz3.kernels.sign_project.BITS_BYTES", 1)
    monkeypatch.setattr("jz3.kernels.sign_project.PIECE", 256)
    x = normal(0, 600, 2)
    assert torch.allclose(
        sign_project(x.T, 5, 7, 0), sign_project_reference(x.T, 5, 7, 0), rtol=1e-4, atol=1e-3
    )
    assert sign_project(x.T[:0], 5, 7, 0).shape == (0, 7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("p_i", "o", "p_o"), [(8, 70, 16), (33, 130, 20), (1, 1, 1), (140, 40, 17)])
def test_segment_project(dtype: torch.dtype, p_i: int, o: int, p_o: int) -> None:
    bounds = torch.tensor([2, 5, 5, 6, 70, 340])
    a, g, left = (
        normal(0, 345, p_i, dtype=dtype),
        normal(1, 345, o, dtype=dtype),
        normal(2, o, p_o, dtype=dtype),
    )
    for matrix in (left, None):
        got = segment_project(a, g, matrix, bounds)
        rows = g if matrix is None else g @ matrix
        pairs = [(2, 5), (5, 5), (5, 6), (6, 70), (70, 340)]
        plain = torch.stack([rows[b:e].T @ a[b:e] for b, e in pairs]).float()
        exact = segment_project_reference(
            a.double(), g.double(), None if matrix is None else matrix.double(), bounds
        )
        assert_as_accurate(got, plain, exact)
        assert float(got[1].abs().max()) == 0


def test_a_document_alone_is_the_same_bit_for_bit() -> None:
    a, g, left = normal(0, 700, 8), normal(1, 700, 20), normal(2, 20, 8)
    packed = segment_project(a, g, left, torch.tensor([0, 100, 690]))
    alone = segment_project(a[100:690], g[100:690], left, torch.tensor([0, 590]))
    assert torch.equal(packed[1], alone[0])


def test_strides_and_emptiness() -> None:
    a, g, left = normal(0, 8, 30).T, normal(1, 20, 60).T[::2], normal(2, 8, 20).T
    bounds = torch.tensor([0, 12, 30])
    expected = segment_project_reference(a, g, left, bounds)
    assert torch.allclose(segment_project(a, g, left, bounds), expected, rtol=1e-5, atol=1e-4)
    assert not segment_project(a, g, left, torch.tensor([3, 3])).any()
    assert segment_project(a, g, left, torch.tensor([3])).shape == (0, 8, 8)


def test_more_documents_than_a_grid_has_rows_are_launchable(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *_, **__: grids.append(self.grid))
    a = torch.ones(70_000, 1)
    segment_project(a, a, None, torch.arange(70_001))
    assert grids == [(70_000, 1, 1), (70_000,)]  # at most 2^31 - 1, 65,535 and 65,535


def test_sums_of_several_blocks_of_several_documents() -> None:
    a, g = normal(0, 700, 40), normal(1, 700, 60)
    bounds = torch.tensor([0, 300, 300, 600, 650])
    expected = segment_project_reference(a, g, None, bounds)
    with guarded():
        assert torch.allclose(segment_project(a, g, None, bounds), expected, rtol=1e-4, atol=1e-4)


def test_every_access_is_in_bounds() -> None:
    a, g, left, x = normal(0, 67, 9), normal(1, 67, 33), normal(2, 33, 5), normal(3, 3, 300)
    with guarded():
        got = segment_project(a, g, left, torch.tensor([0, 5, 67]))
        signed = sign_project(x, 5, 7, 0)
    assert torch.isfinite(got).all() and torch.isfinite(signed).all()


def test_the_ops_run_on_triton_when_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JZ3_BACKEND", "triton")
    import jz3.ops.segment_project as segments
    import jz3.ops.sign_project as signs

    assert backend.choose("sign_project") == ("triton", "forced by JZ3_BACKEND")
    x = normal(0, 3, 200)
    reference = backend.implementation("sign_project", "reference")
    assert torch.allclose(
        signs.sign_project(x, 9, seed=1, name="m"),
        reference(x, signs.signs_key(1, "m"), 9, 0),
        rtol=1e-4,
        atol=1e-4,
    )
    got = segments.segment_project(x, x, None, torch.tensor([0, 3]))
    assert torch.allclose(got[0], x.T @ x, rtol=1e-4, atol=1e-4)

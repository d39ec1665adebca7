"""Codes: the table's nearest level, packing, the same bits on every back end."""

import pytest
import torch
from accuracy import BACKENDS, normal

from jz3 import backend
from jz3.ops.encode import CODEBOOKS, decode, encode, encode_reference, row_bytes, unpack_codes


@pytest.fixture(params=BACKENDS)
def on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu" and backend.extension_missing():
        pytest.skip(backend.extension_missing())
    monkeypatch.setenv("JZ3_BACKEND", f"encode={request.param},decode={request.param}")
    return request.param


@pytest.mark.parametrize("kind", CODEBOOKS)
@pytest.mark.parametrize("dim", [1, 3, 8, 1023, 1025, 2050])
def test_back_ends_agree_bit_for_bit(on: str, kind: str, dim: int) -> None:
    values, mean, scale = normal(0, 7, dim) * 3, normal(1, dim), normal(2, dim).abs()
    scale[::5] = 0
    codes = encode(values, mean, scale, kind)
    assert codes.shape == (7, row_bytes(kind, dim)) and codes.dtype == torch.uint8
    assert torch.equal(codes, encode_reference(values, mean, scale, kind))
    assert torch.equal(
        decode(codes, mean, scale, kind),
        backend.implementation("decode", "reference")(codes, mean, scale, kind),
    )


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_the_nearest_level_is_chosen(on: str, kind: str) -> None:
    book = CODEBOOKS[kind]
    levels = torch.tensor(book.levels[1:] if kind == "int8" else book.levels, dtype=torch.float64) * book.unit
    z = normal(0, 4, 500) * 2
    decoded = decode(
        encode(z, torch.zeros(500), torch.ones(500), kind), torch.zeros(500), torch.ones(500), kind
    )
    nearest = (z.double()[..., None] - levels).abs().amin(-1)
    assert torch.allclose((z.double() - decoded.double()).abs(), nearest, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "worst"), [("int8", 2e-4), ("4bit", 0.0102), ("2bit", 0.119), ("1bit", 0.37)]
)
def test_distortion_on_normal_numbers(kind: str, worst: float) -> None:
    """Lloyd-Max on N(0, 1) has 0.0095, 0.1175 and 0.3634 (Max 1960, table I)."""
    values, mean, scale = normal(0, 100, 1000) * 3 + 1, torch.ones(1000), torch.full((1000,), 3.0)
    error = (decode(encode(values, mean, scale, kind), mean, scale, kind) - values).square().mean() / 9
    assert float(error) < worst


def test_packing_order() -> None:
    zeros, ones = torch.zeros(5), torch.ones(5)
    values = torch.tensor([[-9.0, 9.0, 9.0, -9.0, 9.0]])
    assert encode(values, zeros, ones, "4bit").tolist() == [[0xF0, 0x0F, 0x0F]]
    assert encode(values, zeros, ones, "1bit").tolist() == [[0b10110]]
    assert encode(values, zeros, ones, "2bit").tolist() == [[0b00111100, 0b11]]
    assert encode(values, zeros, ones, "int8").tolist() == [[1, 255, 255, 1, 255]]
    assert unpack_codes(torch.tensor([[0xF0, 0x0F, 0x0F]], dtype=torch.uint8), "4bit", 5).tolist() == [
        [0, 15, 15, 0, 15]
    ]


def test_extremes(on: str) -> None:
    mean, scale = torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([0.0, 1e-42, 1.0, 1e30])
    values = torch.tensor([[3e38, -3e38, 3.0, 1e-30], [1.0, 2.0, -3e38, 3e38]])
    for kind in CODEBOOKS:
        codes = encode(values, mean, scale, kind)
        assert torch.equal(codes, encode_reference(values, mean, scale, kind))
        assert torch.allclose(decode(codes, mean, scale, kind)[:, 0], torch.ones(2))


def test_strides_and_empty(on: str) -> None:
    values, mean, scale = normal(0, 12, 40), normal(1, 12), torch.ones(12)
    assert torch.equal(
        encode(values.T, mean, scale, "4bit"), encode(values.T.contiguous(), mean, scale, "4bit")
    )
    assert encode(torch.empty(0, 12), mean, scale, "4bit").shape == (0, 6)
    assert encode(torch.empty(3, 0), mean[:0], scale[:0], "4bit").shape == (3, 0)


def test_wrong_arguments_are_named() -> None:
    values, mean, scale = normal(0, 3, 4), torch.zeros(4), torch.ones(4)
    with pytest.raises(ValueError, match="kind must be one of int8, 4bit, 2bit, 1bit, got '3bit'"):
        encode(values, mean, scale, "3bit")
    with pytest.raises(ValueError, match=r"values must be finite, got nan at \[1, 2\]"):
        bad = values.clone()
        bad[1, 2] = float("nan")
        encode(bad, mean, scale, "4bit")
    with pytest.raises(ValueError, match=r"scale must be finite and not negative, got -1.0 at \[0\]"):
        encode(values, mean, -scale, "4bit")
    with pytest.raises(ValueError, match="codes must have 2 bytes a row for 4 coordinates of 4bit, got 3"):
        decode(torch.zeros(1, 3, dtype=torch.uint8), mean, scale, "4bit")
    with pytest.raises(TypeError, match="values must hold float32, got float64"):
        encode(values.double(), mean, scale, "4bit")

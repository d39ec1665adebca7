"""The random signs: the published generator, the same everywhere, every rectangle on its own."""

import numpy as np
import pytest
import torch
from accuracy import BACKENDS

from jz3 import backend
from jz3.ops.signs import philox, sign_bits, sign_bits_reference, signs, signs_key


@pytest.fixture(params=BACKENDS)
def on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu" and backend.extension_missing():
        pytest.skip(backend.extension_missing())
    monkeypatch.setenv("JZ3_BACKEND", request.param)
    return request.param


KNOWN = [
    (0x0, [0, 0, 0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (0xFFFFFFFFFFFFFFFF, [0xFFFFFFFF] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        0x299F31D0A4093822,
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
"""Known answers of Philox4x32-10 published with Random123: key, counter, result."""


@pytest.mark.parametrize(("key", "counter", "expected"), KNOWN)
def test_reference_is_philox(key: int, counter: list[int], expected: list[int]) -> None:
    assert philox(key, np.array([counter], np.uint32))[0].tolist() == expected


def test_back_ends_agree_bit_for_bit(on: str) -> None:
    key = signs_key(3, "layer.0")
    for rows, cols, first_row, first_col in [
        (1, 1, 0, 0),
        (7, 300, 5, 256),
        (64, 1000, 1 << 33, 128 << 33),
        (0, 9, 0, 0),
    ]:
        got = backend.call("signs", key, rows, cols, first_row, first_col)
        assert np.array_equal(got, sign_bits_reference(key, rows, cols, first_row, first_col))


def test_a_rectangle_can_be_made_on_its_own(on: str) -> None:
    whole = signs(1, "m", 40, 700)
    part = signs(1, "m", 10, 200, first_row=20, first_col=384)
    assert torch.equal(whole[20:30, 384:584], part)
    assert whole.dtype == torch.int8 and set(whole.unique().tolist()) == {-1, 1}


def test_bits_are_the_signs(on: str) -> None:
    bits, full = sign_bits(1, "m", 3, 200), signs(1, "m", 3, 200)
    for row, col in [(0, 0), (1, 31), (2, 32), (2, 199)]:
        set_bit = int(bits[row, col // 32]) >> (col % 32) & 1
        assert int(full[row, col]) == 1 - 2 * set_bit


def test_all_bits_look_random_and_keys_differ() -> None:
    x = signs(0, "m", 64, 4096, dtype=torch.float32)
    assert abs(float(x.mean())) < 5 / 512
    assert float((x @ x.T / 4096 - torch.eye(64)).abs().max()) < 6 / 64
    assert float((x.T.reshape(32, 128, 64).mean((0, 2))).abs().max()) < 6 / 45
    for other in (signs(1, "m", 64, 4096), signs(0, "n", 64, 4096)):
        assert abs(float((x * other).mean())) < 5 / 512


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="first_col must be a multiple of 128, got 5"):
        signs(0, "m", 2, 2, first_col=5)
    with pytest.raises(ValueError, match="rows must be in"):
        signs(0, "m", -1, 2)
    with pytest.raises(TypeError, match="cols must be an int, got float"):
        signs(0, "m", 1, 2.0)  # pyright: ignore[reportArgumentType]

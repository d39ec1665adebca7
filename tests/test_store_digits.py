"""Codes of unequal width: how bits are divided, and rows of single bits that the scan takes as they are."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from test_store import CODING, INFO, check_best

from jz3.ops.encode import decode
from jz3.store import Coding, Store, open_store, scan, write_shard
from jz3.store.digits import DISTORTIONS, STEPS, WIDEST, digits_of, encode_digits, widths_of

WIDTHS = torch.tensor([8, 6, 5, 4, 1, 1, 1, 1, 2, 2] + [1] * 18 + [7, 1, 1, 6])
MIXED = Coding(CODING.mean, CODING.scale, 2, WIDTHS)


def normal(rows: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed))


def test_bits_go_where_they_reduce_the_error_most() -> None:
    gain = torch.tensor([9.0, 0.5, 30.0, 1.0])
    for total in (4, 7, 10, 15):
        found = widths_of(gain, total)
        assert int(found.sum()) == total
        choices = [b for b in itertools.product(range(1, 9), repeat=4) if sum(b) == total]
        errors = [sum(float(g) * DISTORTIONS[n] for g, n in zip(gain, b, strict=True)) for b in choices]
        assert tuple(found.tolist()) == choices[int(np.argmin(errors))]
    assert widths_of(torch.ones(5), 7).tolist() == [2, 2, 1, 1, 1]
    assert widths_of(torch.zeros(2), 16).tolist() == [8, 8]
    for total in (3, 33):
        with pytest.raises(ValueError, match=f"4 numbers take 4 to 32 bits, got {total}"):
            widths_of(gain, total)
    with pytest.raises(ValueError, match="finite and not negative"):
        widths_of(torch.tensor([1.0, -1.0]), 4)


def test_a_numbers_error_is_that_of_its_width(tmp_path: Path) -> None:
    open_store(tmp_path, dataclasses.replace(INFO, bits=2))
    values = CODING.mean + CODING.scale * normal(4000)
    write_shard(tmp_path, 0, [f"{i:016x}" for i in range(4000)], values, torch.ones(4000), MIXED)
    [(shard, decoded)] = Store(tmp_path, verify=True).values(MIXED)
    assert shard.codes.shape == (4000, 8)
    error = ((decoded - values) / CODING.scale).square().mean(0)
    # Rare numbers beyond the widest quantisers' ends make their errors uncertain.
    wanted = torch.tensor(DISTORTIONS)[WIDTHS]
    assert (error < 1.15 * wanted + 2e-5).all() and (error > 0.85 * wanted).all()


def test_a_row_is_a_code_of_single_bits(tmp_path: Path) -> None:
    open_store(tmp_path, dataclasses.replace(INFO, bits=2))
    values = CODING.mean + 3 * CODING.scale * normal(50)
    scale = CODING.scale.clone()
    scale[3] = 0
    coding = Coding(CODING.mean, scale, 2, WIDTHS)
    write_shard(tmp_path, 0, [f"{i:016x}" for i in range(50)], values, torch.ones(50), coding)
    [(shard, decoded)] = Store(tmp_path).values(coding)
    kind, mean, spread, queries = coding.scanned(torch.eye(32))
    signs = decode(torch.from_numpy(np.array(shard.codes)), mean, spread, kind)
    torch.testing.assert_close(signs @ queries.T, decoded, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decoded[:, 3], CODING.mean[3].expand(50))
    # What lies beyond a quantiser's end is coded as that end.
    far = torch.full((1, 32), 1e4)
    with pytest.raises(ValueError, match="queries must be"):
        coding.scanned(torch.eye(31))
    open_store(tmp_path / "far", dataclasses.replace(INFO, bits=2))
    write_shard(tmp_path / "far", 0, ["0", "1"], torch.cat([far, -far]), torch.ones(2), MIXED)
    [(shard, _)] = Store(tmp_path / "far").values(MIXED)
    assert (shard.codes[0] == 255).all() and (shard.codes[1] == 0).all()


def test_scan_scores_what_is_decoded(tmp_path: Path) -> None:
    open_store(tmp_path, dataclasses.replace(INFO, bits=2))
    for number in range(3):
        ids = [f"{number * 20 + i:016x}" for i in range(20)]
        write_shard(tmp_path, number, ids, normal(20, number), torch.ones(20), MIXED)
    store, queries = Store(tmp_path), normal(3, 9)
    decoded = torch.cat([v for _, v in store.values(MIXED)])
    scores, ids = scan(store, MIXED, queries, 15)
    check_best(queries @ decoded.T, scores, ids)


def test_widths_must_fill_the_row() -> None:
    assert int(WIDTHS.sum()) == 64 and WIDEST == 8
    with pytest.raises(ValueError, match="2 x 32 bits in all, got 32"):
        Coding(CODING.mean, CODING.scale, 2, torch.ones(32, dtype=torch.int64))


def test_a_row_has_the_layout_that_stored_rows_have() -> None:
    """Digits largest first, numbers in order, the first bit lowest in its byte."""
    widths, zeros, ones = torch.tensor([3, 1, 2]), torch.zeros(3), torch.ones(3)
    # Index 6 of 8 (110), 0 of 2 (0), 1 of 4 (01): the bits 1 1 0 0 0 1.
    values = torch.tensor([[2.5 * STEPS[3], -1.0, -0.5 * STEPS[2]]])
    assert encode_digits(values, zeros, digits_of(zeros, ones, widths)).tolist() == [[0b100011]]

"""The streaming scan: exact ids and values on every back end and instruction set, ties, groups, shards."""

from typing import Any

import pytest
import torch
from accuracy import BACKENDS, normal

from jz3 import backend
from jz3.ops.best import merge_topk
from jz3.ops.encode import CODEBOOKS, decode, encode, unpack_codes
from jz3.ops.score_checkpoints import score_codes_cpu
from jz3.ops.score_queries import fold_queries
from jz3.ops.score_topk import (
    score_codes_reference,
    score_topk,
    score_topk_cpu,
    score_topk_reference,
)


@pytest.fixture(params=BACKENDS)
def on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu" and backend.extension_missing():
        pytest.skip(backend.extension_missing())
    monkeypatch.setenv("JZ3_BACKEND", f"score_topk={request.param}")
    return request.param


def table(rows: int, dim: int, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mean, scale = normal(1, dim), normal(2, dim).abs()
    return encode(normal(0, rows, dim) * scale + mean, mean, scale, kind), mean, scale


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_values_are_inner_products_with_queries_on_a_grid_of_15_bits(on: str, kind: str) -> None:
    codes, mean, scale = table(300, 70, kind)
    queries, row_scale = normal(3, 4, 70), normal(4, 300).abs()
    values, ids = score_topk(codes, mean, scale, kind, queries, 25, row_scale=row_scale)
    book = CODEBOOKS[kind]
    levels = torch.tensor(book.levels, dtype=torch.float64)[unpack_codes(codes, kind, 70).long()] * book.unit
    exact = row_scale.double() * (queries.double() @ (mean.double() + scale.double() * levels).T)
    half_step = (queries * scale).abs().amax(1, keepdim=True).double() / (127 * 128) / 2
    bound = row_scale.double() * half_step * levels.abs().sum(1) + 1e-6 * exact.abs()
    assert bool(((values.double() - exact.gather(1, ids)).abs() <= bound.gather(1, ids)).all())
    missed = exact.topk(25).values[:, -1] - exact.gather(1, ids).amin(1)
    assert bool((missed <= 2 * bound.amax(1)).all())


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_two_planes_find_the_best_hundred_of_the_decoded_rows(kind: str) -> None:
    codes, mean, scale = table(20_000, 256, kind)
    queries = normal(3, 8, 256)
    found = score_topk(codes, mean, scale, kind, queries, 100)[1]
    expected = (queries @ decode(codes, mean, scale, kind).T).topk(100).indices
    hits = sum(len(set(f) & set(e)) for f, e in zip(found.tolist(), expected.tolist(), strict=True))
    assert hits >= 0.99 * expected.numel()


@pytest.mark.parametrize(
    "instructions", range(5), ids=["scalar", "avx2", "avx512vnni", "amx", "emulated_tiles"]
)
@pytest.mark.parametrize("kind", CODEBOOKS)
def test_every_instruction_set_is_exact(instructions: int, kind: str) -> None:
    if backend.extension_missing():
        pytest.skip(backend.extension_missing())
    try:
        backend.extension().isa_name(instructions)
    except ValueError as error:
        pytest.skip(str(error))
    for rows, dim, k, queries in [
        (1, 1, 1, 1),
        (35, 63, 9, 2),
        (5, 200, 9, 4),
        (67, 130, 67, 9),
        (33, 2049, 4, 17),
        (150, 4224, 3, 33),
        (9, 33_000, 2, 70),
        (9, 33_000, 2, 1),
        (21, 4500, 5, 7),
        (700, 256, 20, 8),
        (5000, 64, 5, 40),
        (5000, 64, 900, 25),
        (300, 64, 2, 1050),  # more than 64 blocks of eight
    ]:
        codes, mean, scale = table(rows, dim, kind)
        codes[rows // 2 :: 3] = codes[0].clone()
        digits = fold_queries(normal(3, queries, dim), mean, scale, CODEBOOKS[kind].unit)
        row_scale = normal(4, rows)
        row_scale[rows // 2 :: 3] = row_scale[0].clone()
        ids = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
        arguments = (codes, kind, digits.planes, digits.step, digits.bias, row_scale, ids)
        groups = torch.arange(queries) % -(-queries // 2)
        expected = score_topk_reference(*arguments, groups, -(-queries // 2), k)
        got = score_topk_cpu(*arguments, groups, -(-queries // 2), k, instructions)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
        scores = score_codes_cpu(*arguments[:-1], instructions)
        assert torch.equal(scores, score_codes_reference(*arguments[:-1]))


@pytest.mark.parametrize("kind", CODEBOOKS)
@pytest.mark.parametrize("queries", [1, 30])
def test_rows_may_lie_in_pieces(on: str, monkeypatch: pytest.MonkeyPatch, kind: str, queries: int) -> None:
    codes, mean, scale = table(2000, 530, kind)
    codes[::9] = codes[4].clone()
    arguments = (mean, scale, kind, normal(3, queries, 530), 150)
    options: dict[str, Any] = {"row_scale": normal(4, 2000).abs(), "ids": torch.arange(2000).flip(0)}
    expected = score_topk(codes, *arguments, **options)
    sizes = [0, 1, 700, 0, 0, 33, 128, 1138, 0]
    pieces = [piece.clone() for piece in codes.split(sizes)]
    for piece in (1, 2):  # torch calls the first of them, a single row, contiguous
        pieces[piece] = torch.cat([pieces[piece], pieces[piece]], 1)[:, : codes.shape[1]]
    for threads in (1, 3):
        monkeypatch.setattr("jz3.backend.threads", lambda threads=threads: threads)
        got = score_topk(pieces, *arguments, **options)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    empty = score_topk([codes[:0], codes[:0]], *arguments)
    assert empty[1].shape == (queries, 0)


@pytest.mark.parametrize("digits", [(127, 0), (-127, 0), (127, 63), (-128, -128)], ids=str)
@pytest.mark.parametrize("queries", [1, 2, 4, 30])
def test_largest_levels_and_digits_do_not_overflow(digits: tuple[int, int], queries: int) -> None:
    if backend.extension_missing():
        pytest.skip(backend.extension_missing())
    rows, dim = 33, 20_000
    codes = torch.full((rows, dim), 255, dtype=torch.uint8)
    codes[::3] = 0
    planes = torch.tensor(digits, dtype=torch.int8)[:, None, None].expand(2, queries, dim).contiguous()
    step, bias = torch.ones(queries, dtype=torch.float64), torch.zeros(queries, dtype=torch.float64)
    arguments = (codes, "int8", planes, step, bias, torch.ones(rows))
    expected = score_codes_reference(*arguments)
    assert torch.equal(score_codes_cpu(*arguments), expected)
    found = (torch.arange(rows), torch.zeros(queries, dtype=torch.long), 1, rows)
    assert torch.equal(score_topk_cpu(*arguments, *found)[0], score_topk_reference(*arguments, *found)[0])


def test_planes_of_any_digits() -> None:
    """Those of jz3's own queries are smaller, and what their highest 7 bits leave fits 8."""
    if backend.extension_missing():
        pytest.skip(backend.extension_missing())
    codes, _, _ = table(3000, 256, "int8")
    planes = torch.randint(-128, 128, (2, 30, 256), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    planes[0, :, :2] = 127
    step, bias = torch.ones(30, dtype=torch.float64), torch.zeros(30, dtype=torch.float64)
    arguments = (codes, "int8", planes, step, bias, torch.ones(3000), torch.arange(3000))
    expected = score_topk_reference(*arguments, torch.arange(30), 30, 3)
    got = score_topk_cpu(*arguments, torch.arange(30), 30, 3)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("queries", [7, 30])
@pytest.mark.parametrize("planes", [1, 3])
def test_any_number_of_planes(planes: int, queries: int) -> None:
    if backend.extension_missing():
        pytest.skip(backend.extension_missing())
    codes, mean, scale = table(900, 200, "4bit")
    digits = fold_queries(normal(3, queries, 200), mean, scale, CODEBOOKS["4bit"].unit)
    more = torch.cat([digits.planes, digits.planes[1:]])[:planes].contiguous()
    arguments = (codes, "4bit", more, digits.step, digits.bias, normal(4, 900), torch.arange(900))
    expected = score_topk_reference(*arguments, torch.arange(queries), queries, 30)
    got = score_topk_cpu(*arguments, torch.arange(queries), queries, 30)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("queries", [1, 30])
def test_bounds_hold_for_the_worst_rows_and_queries(queries: int) -> None:
    """The scan skips rows by a bound on what the lower plane adds; here that bound is reached."""
    if backend.extension_missing():
        pytest.skip(backend.extension_missing())
    dim, generator = 128, torch.Generator().manual_seed(0)
    low = torch.randint(-64, 64, (1, dim), generator=generator)
    planes = torch.stack([torch.ones_like(low), low]).to(torch.int8).expand(2, queries, dim).contiguous()
    codes = torch.full((4000, dim), 129, dtype=torch.uint8)
    codes[1::2] = (128 + low).to(torch.uint8)
    codes[3] = 128 - low.to(torch.int16).to(torch.uint8)
    codes[2500] = 0
    step, bias = torch.ones(queries, dtype=torch.float64), torch.zeros(queries, dtype=torch.float64)
    row_scale = torch.where(torch.arange(4000) % 7 == 0, -1.0, 1.0)
    arguments = (codes, "int8", planes, step, bias, row_scale, torch.arange(4000).flip(0))
    expected = score_topk_reference(*arguments, torch.arange(queries), queries, 40)
    got = score_topk_cpu(*arguments, torch.arange(queries), queries, 40)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("queries", [1, 30])
def test_bounds_hold_for_a_row_that_the_highest_digits_do_not_see(
    monkeypatch: pytest.MonkeyPatch, queries: int
) -> None:
    if backend.extension_missing():
        pytest.skip(backend.extension_missing())
    monkeypatch.setattr(backend, "threads", lambda: 1)  # another would begin without a limit
    dim, rows = 256, 4000
    planes = torch.randint(-64, 64, (2, queries, dim), generator=torch.Generator().manual_seed(0))
    planes[1] = planes[1, :1]
    planes[0, :, 2:], planes[0, :, :2], planes[1, :, :2] = 0, 127, 0
    codes = torch.full((rows, dim), 128, dtype=torch.uint8)
    codes[5, 0] += int(0.75 * planes[1, 0].square().sum() / (127 * 128))
    codes[2500] = (128 + planes[1, 0]).to(torch.uint8)
    step, bias = torch.ones(queries, dtype=torch.float64), torch.zeros(queries, dtype=torch.float64)
    arguments = (codes, "int8", planes.to(torch.int8), step, bias, torch.ones(rows), torch.arange(rows))
    got = score_topk_cpu(*arguments, torch.arange(queries), queries, 1)
    assert got[1].tolist() == [[2500]] * queries
    assert got[0].tolist() == [[float(planes[1, 0].square().sum())]] * queries


@pytest.mark.parametrize("queries", [1, 2, 4, 8, 9, 30])
def test_bounds_hold_for_rows_of_one_bit_along_the_lower_plane(queries: int) -> None:
    if backend.extension_missing():
        pytest.skip(backend.extension_missing())
    dim, generator = 1064, torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (dim,), generator=generator)
    low = (64 * (2 * signs - 1)).clamp(max=63)
    planes = (
        torch.stack([torch.ones_like(low), low]).to(torch.int8)[:, None].expand(2, queries, dim).contiguous()
    )
    bits = torch.randint(0, 2, (4000, dim), generator=generator)
    bits[1000:3000:40] = signs
    bits[2000] = 1 - signs
    packed = (bits.view(4000, -1, 8) << torch.arange(8)).sum(2).to(torch.uint8)
    step, bias = torch.ones(queries, dtype=torch.float64), torch.zeros(queries, dtype=torch.float64)
    arguments = (packed, "1bit", planes, step, bias, torch.ones(4000), torch.arange(4000).flip(0))
    expected = score_topk_reference(*arguments, torch.arange(queries), queries, 40)
    got = score_topk_cpu(*arguments, torch.arange(queries), queries, 40)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("queries", [1, 2, 4, 8, 9, 30])
def test_bounds_hold_for_rows_of_four_bits_along_the_lower_plane(queries: int) -> None:
    if backend.extension_missing():
        pytest.skip(backend.extension_missing())
    dim, generator = 256, torch.Generator().manual_seed(0)
    levels = torch.tensor(CODEBOOKS["4bit"].levels)
    low = torch.randint(-64, 64, (1, dim), generator=generator)
    planes = torch.stack([torch.ones_like(low), low]).to(torch.int8).expand(2, queries, dim).contiguous()
    along = (low[0, :, None] * 2 - levels).abs().argmin(1).to(torch.uint8)
    codes = torch.randint(0, 16, (4000, dim), generator=generator, dtype=torch.uint8)
    codes[1000:3000:40] = along
    codes[2000] = 15 - along
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    step, bias = torch.ones(queries, dtype=torch.float64), torch.zeros(queries, dtype=torch.float64)
    arguments = (packed, "4bit", planes, step, bias, torch.ones(4000), torch.arange(4000).flip(0))
    expected = score_topk_reference(*arguments, torch.arange(queries), queries, 60)
    got = score_topk_cpu(*arguments, torch.arange(queries), queries, 60)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_rows_need_not_be_contiguous(on: str) -> None:
    codes, mean, scale = table(300, 64, "4bit")
    wide = torch.zeros(600, 50, dtype=torch.uint8)
    view = wide[::2, 7:39]
    view.copy_(codes)
    queries = normal(3, 3, 64)
    one, other = (score_topk(c, mean, scale, "4bit", queries, 9) for c in (codes, view))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    one = score_topk(codes.T.contiguous().T, mean, scale, "4bit", queries, 9)
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_long_rows_don_t_overflow(on: str) -> None:
    dim = 70_000
    codes = torch.full((3, dim), 255, dtype=torch.uint8)
    codes[1] = 1
    unit = CODEBOOKS["int8"].unit
    values, ids = score_topk(codes, torch.zeros(dim), torch.ones(dim), "int8", torch.ones(1, dim), 3)
    assert ids.tolist() == [[0, 2, 1]]
    assert values[0].tolist() == pytest.approx(
        [127 * unit * dim, 127 * unit * dim, -127 * unit * dim], rel=1e-6
    )


def test_ties_go_to_the_smaller_id(on: str) -> None:
    codes, mean, scale = table(8, 16, "4bit")
    codes = codes[:1].expand(8, -1)
    ids = torch.tensor([70, 10, 50, -3, 20, 60, 40, 30])
    values, found = score_topk(codes, mean, scale, "4bit", normal(3, 2, 16), 5, ids=ids)
    assert found.tolist() == [[-3, 10, 20, 30, 40]] * 2
    assert len(values[0].unique()) == 1


def test_groups(on: str) -> None:
    codes, mean, scale = table(200, 32, "int8")
    queries, groups = normal(3, 5, 32), torch.tensor([1, 0, 1, 0, 0])
    single_values, single_ids = score_topk(codes, mean, scale, "int8", queries, 200)
    scores = torch.zeros(5, 200).scatter_(1, single_ids, single_values)
    for reduce in ("mean", "max"):
        values, ids = score_topk(codes, mean, scale, "int8", queries, 9, groups=groups, reduce=reduce)
        for group in (0, 1):
            own = scores[groups == group]
            expected = own.mean(0) if reduce == "mean" else own.amax(0)
            assert torch.equal(ids[group], expected.topk(9).indices)
            assert torch.allclose(values[group], expected.topk(9).values, rtol=1e-4, atol=1e-3)


def test_shards_and_threads_change_nothing(on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, mean, scale = table(1000, 64, "4bit")
    codes[500:600] = codes[:100]
    queries = normal(3, 3, 64)
    whole = score_topk(codes, mean, scale, "4bit", queries, 50)
    parts = []
    for begin, end in [(0, 10), (10, 507), (507, 1000)]:
        ids = torch.arange(begin, end)
        parts.append(score_topk(codes[begin:end], mean, scale, "4bit", queries, 50, ids=ids))
    merged = merge_topk(parts[::-1], 50)
    assert torch.equal(whole[0], merged[0]) and torch.equal(whole[1], merged[1])
    monkeypatch.setattr(backend, "threads", lambda: 7)
    again = score_topk(codes, mean, scale, "4bit", queries, 50)
    assert torch.equal(whole[0], again[0]) and torch.equal(whole[1], again[1])


def test_few_rows_no_rows_no_queries(on: str) -> None:
    codes, mean, scale = table(3, 8, "1bit")
    assert score_topk(codes, mean, scale, "1bit", normal(3, 2, 8), 10)[1].shape == (2, 3)
    assert score_topk(codes[:0], mean, scale, "1bit", normal(3, 2, 8), 10)[1].shape == (2, 0)
    assert score_topk(codes, mean, scale, "1bit", normal(3, 0, 8), 10)[1].shape == (0, 3)


def test_wrong_arguments_are_named() -> None:
    codes, mean, scale = table(3, 8, "4bit")
    queries = normal(3, 2, 8)
    for change, message in [
        ({"queries": normal(3, 2, 9)}, "queries must have the axes"),
        ({"queries": queries / 0}, "queries must be finite"),
        ({"k": 0}, "k must be in"),
        ({"groups": torch.tensor([0, 2])}, "groups must be counted from 0 without gaps"),
        ({"groups": torch.tensor([-1, 0])}, "groups must be counted from 0 without gaps"),
        ({"groups": torch.tensor([-1, -1])}, "groups must be counted from 0 without gaps"),
        ({"groups": torch.tensor([0, 1 << 40])}, "groups must be counted from 0 without gaps"),
        ({"reduce": "sum"}, "reduce must be mean or max, got 'sum'"),
        ({"codes": codes[:, :3]}, "codes must have 4 bytes a row"),
        ({"codes": [codes, codes[:, :3]]}, "codes must have the axes"),
        ({"codes": []}, "codes must hold at least one tensor"),
        ({"ids": torch.arange(4)}, "ids must have the axes"),
        ({"row_scale": torch.full((3,), float("inf"))}, "row_scale must be finite"),
    ]:
        good = {"codes": codes, "mean": mean, "scale": scale, "kind": "4bit", "queries": queries, "k": 2}
        with pytest.raises(ValueError, match=message):
            score_topk(**{**good, **change})  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="codes must be a torch.Tensor or a list of them, got ndarray"):
        score_topk(codes.numpy(), mean, scale, "4bit", queries, 2)  # pyright: ignore[reportArgumentType]

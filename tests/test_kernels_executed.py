"""What the compiler makes of the Triton kernels for sm_80 and sm_90, executed on the CPU and compared with references.

Every kernel runs with asynchronous copies as late as allowed, as early as possible, and with its warps in random order;
conflicting accesses to shared memory are reported, and every schedule must give the same bits. Broken copies of the
kernels show that the check bites.
"""

import dataclasses
import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import normal
from kernel_cases import KERNELS, Case, compiled, mutant, shipped

from jz3.kernels import cdiv
from jz3.ops.ce_hidden_grad import ce_hidden_grad_reference
from jz3.ops.encode import CODEBOOKS, decode_reference, encode_reference
from jz3.ops.score_queries import fold_queries
from jz3.ops.segment_project import segment_project_reference
from jz3.ops.sign_project import sign_project_reference
from jz3.ops.signs import sign_bits_reference
from jz3.ops.sketch import sketch_reference

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
ARCHS = pytest.mark.parametrize("arch", [80, 90])
SCHEDULES = ({"async_mode": "lazy", "race": True}, {"async_mode": "eager"}, {"order": 1})


@functools.cache
def binary(arch: int, row: str, **constants: Any):
    """Return the compiled configuration of a row whose further constants are those given."""
    (case,) = (
        case
        for case in shipped(arch)
        if case.row == row and constants.items() <= dict(case.constants).items()
    )
    return compiled(case)


def blocks(arch: int, row: str) -> dict[str, int]:
    from jz3.kernels import launch

    return launch.TABLE[arch][row]


class Machine:
    """A simulated device and what was put on it."""

    def __init__(self, **schedule: Any) -> None:
        from gpu_without_gpu.ptxsim import Device

        self.device = Device()
        self.schedule = schedule

    def put(self, array: torch.Tensor | np.ndarray) -> int:
        """Copy an array to the device."""
        if isinstance(array, torch.Tensor):
            whole: torch.Tensor = array.contiguous()
            array = (whole.view(torch.int16) if whole.dtype == torch.bfloat16 else whole).numpy()
        return self.device.put(np.ascontiguousarray(array))

    def empty(self, *shape: int) -> int:
        """Make float32 on the device that shows where nothing was written."""
        return self.put(np.full(shape, np.nan, np.float32))

    def get(self, address: int, *shape: int, kind: Any = np.float32) -> torch.Tensor:
        """Copy an array back."""
        return torch.from_numpy(self.device.get(address, kind, shape).copy())

    def run(self, kernel: Any, grid: tuple[int, ...], *arguments: Any) -> None:
        """Execute a kernel and refuse races.

        Triton lets several warps write the same number to one place, which the simulator reports as well; only
        reading what another warp wrote without a barrier in between is an error.
        """
        run = kernel.run(self.device, grid, list(arguments), **self.schedule)
        races = [race for race in run.races if race.startswith("read")]
        assert not races, races


def on_every_schedule(execute: Any) -> Any:
    """Execute under every schedule and return the result, the same bit for bit."""
    results = [execute(Machine(**schedule)) for schedule in SCHEDULES]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    return results[0]


def bf16(values: torch.Tensor) -> torch.Tensor:
    """Read bit patterns as bfloat16."""
    return values.view(torch.bfloat16)


@ARCHS
def test_sign_project(arch: int) -> None:
    rows, p, k, piece, key = 20, 600, 70, 256, 0xFEDCBA98F6543210
    (case,) = (case for case in shipped(arch) if case.row == "sign_project/half/64")
    kernel = compiled(case, PIECE=piece)
    x = normal(0, rows, 608, dtype=torch.bfloat16)
    bits = sign_bits_reference(key, k, p, 0, 0)

    def execute(machine: Machine) -> list[torch.Tensor]:
        partial = machine.empty(3, rows, k)
        addresses = [machine.put(x), machine.put(bits), partial]
        machine.run(kernel, (1, 2, 3), *addresses, rows, p, k, bits.shape[1] // 4, 608)
        return [machine.get(partial, 3, rows, k)]

    got = on_every_schedule(execute)[0].sum(0) / k**0.5
    expected = sign_project_reference(x[:, :p].double(), key, k, 0)
    assert torch.allclose(got.double(), expected, rtol=1e-4, atol=1e-4)


@ARCHS
def test_sign_bits(arch: int) -> None:
    rows, count, first, key = 3, 130, (1 << 32) - 1, 0xFEDCBA98F6543210
    machine = Machine()
    bits = machine.put(np.zeros((rows, 4 * count), np.int32))
    halves = [np.int32(np.uint32(word).view(np.int32)) for word in (key & 0xFFFFFFFF, key >> 32)]
    kernel = sign_bits_for_large_blocks(arch)
    machine.run(kernel, (rows, 2), bits, *halves, np.int64(first), count, rows)
    expected = sign_bits_reference(key, rows, 128 * count, 0, 128 * first).view(np.int32)
    assert torch.equal(machine.get(bits, rows, 4 * count, kind=np.int32), torch.from_numpy(expected))


def sign_bits_for_large_blocks(arch: int) -> Any:
    """Compile with a 64-bit number of the first block, as the launcher does where it doesn't fit 32 bits."""
    kernel = KERNELS["sign_bits_kernel"]
    wide = dataclasses.replace(kernel, signature=kernel.signature | {"first_block": "i64"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KERNELS, kernel.name, wide)
        return compiled(Case(kernel.name, "sign_bits/any", (), "bf16", arch))


@ARCHS
@pytest.mark.parametrize("dense", [True, False])
def test_segment_project(arch: int, dense: bool) -> None:
    from jz3.kernels.segment_project import chunk_table

    p_i, o, p_o, bounds = 32, 80, 40 if dense else 80, [1, 4, 4, 90]
    row = "segment_project/half/medium" if dense else "segment_project/half/tall"
    kernel, summing = binary(arch, row, HAS_LEFT=dense), binary(arch, "segment_sum/any")
    a, g, left = (
        normal(i, *shape, dtype=torch.bfloat16) for i, shape in enumerate([(95, 32), (95, 80), (80, 48)])
    )
    chunks, first = chunk_table(bounds)

    def execute(machine: Machine) -> list[torch.Tensor]:
        partial, out = machine.empty(len(chunks), p_o, p_i), machine.empty(3, p_o, p_i)
        addresses = [machine.put(m) for m in (a, g, left)]
        addresses += [machine.put(np.array(chunks, np.int64)), partial]
        grid = (len(chunks), cdiv(p_o, blocks(arch, row)["BQ"]), 1)
        machine.run(kernel, grid, *addresses, p_i, o, p_o, 32, 80, 48)
        n, width = p_o * p_i, blocks(arch, "segment_sum/any")["B"]
        machine.run(summing, (cdiv(n, width) * 3,), partial, machine.put(np.array(first, np.int64)), out, n)
        return [machine.get(out, 3, p_o, p_i)]

    (got,) = on_every_schedule(execute)
    matrix = left[:, :p_o].double() if dense else None
    exact = segment_project_reference(a.double(), g.double(), matrix, torch.tensor(bounds))
    assert torch.allclose(got.double(), exact, rtol=1e-3, atol=2e-3)


CE_SHAPE = (24, 208, 80)


def run_ce(machine: Machine, arch: int, kernels: dict[str, Any]) -> list[torch.Tensor]:
    """Run the three kernels on 20 of 24 tokens."""
    (tokens, vocabulary, width), index = CE_SHAPE, torch.arange(24)[torch.arange(24) % 6 != 2]
    h, weight, y, weights = ce_inputs()
    forward, summing, backward = (blocks(arch, row) for row in ("ce_exp/half", "ce_loss/any", "ce_grad/half"))
    count, tiles = len(index), cdiv(vocabulary, forward["BV"])
    addresses = {
        name: machine.put(x) for name, x in (("h", h), ("weight", weight), ("y", y), ("index", index))
    }
    scratch = machine.put(torch.full((count, vocabulary), float("nan"), dtype=torch.bfloat16))
    highest, sums, target = machine.empty(tiles, count), machine.empty(tiles, count), machine.empty(count)
    loss = machine.put(np.zeros(tokens, np.float32))
    grad = machine.put(torch.zeros(tokens, width, dtype=torch.bfloat16))
    statistics = [highest, sums, target]
    machine.run(
        kernels["exp"],
        (cdiv(count, forward["BT"]), tiles),
        *addresses.values(),
        scratch,
        *statistics,
        *(count, vocabulary, width, width, width, vocabulary),
    )
    machine.run(
        kernels["loss"], (cdiv(count, summing["BT"]),), addresses["index"], *statistics, loss, count, tiles
    )
    machine.run(
        kernels["grad"],
        (cdiv(count, backward["BT"]), cdiv(width, backward["BD"])),
        *(scratch, highest, addresses["weight"], addresses["y"], addresses["index"]),
        *(loss, machine.put(weights), grad),
        *(count, vocabulary, width, vocabulary, width, width),
    )
    return [machine.get(loss, tokens), bf16(machine.get(grad, tokens, width, kind=np.int16))]


def ce_inputs() -> tuple[torch.Tensor, ...]:
    tokens, vocabulary, width = CE_SHAPE
    h, weight = (
        normal(0, tokens, width, dtype=torch.bfloat16),
        normal(1, vocabulary, width, dtype=torch.bfloat16),
    )
    y = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(0))
    y[2::6] = -100
    return h, weight, y, normal(2, tokens).abs()


def ce_kernels(arch: int) -> dict[str, Any]:
    rows = {"exp": "ce_exp/half", "loss": "ce_loss/any", "grad": "ce_grad/half"}
    return {name: binary(arch, row) for name, row in rows.items()}


def ce_is_right(got: list[torch.Tensor]) -> bool:
    h, weight, y, weights = ce_inputs()
    loss, grad = ce_hidden_grad_reference(h.double(), weight.double(), y, weights.double())
    close = torch.allclose(got[0].double(), loss, rtol=1e-5, atol=1e-4)
    return close and torch.allclose(got[1].double(), grad, rtol=2**-7, atol=2e-2)


@ARCHS
def test_ce_hidden_grad(arch: int) -> None:
    kernels = ce_kernels(arch)
    assert ce_is_right(on_every_schedule(lambda machine: run_ce(machine, arch, kernels)))


@ARCHS
@pytest.mark.parametrize("kind", CODEBOOKS)
def test_score_codes(arch: int, kind: str) -> None:
    from jz3.kernels.score_topk import case, digit_columns

    rows, dim, queries = 150, 600, 5
    book, row = CODEBOOKS[kind], case(CODEBOOKS[kind].bits, 2 * queries)
    kernel, sizes = binary(arch, row, BITS=book.bits), blocks(arch, row)
    mean, scale = normal(1, dim), normal(2, dim).abs()
    codes = encode_reference(normal(0, rows, dim) * scale + mean, mean, scale, kind)
    width = cdiv(codes.shape[1], 16) * 16
    codes = torch.nn.functional.pad(codes, (0, width - codes.shape[1]))
    digits = fold_queries(normal(3, queries, dim), mean, scale, book.unit)
    columns, row_scale = digit_columns(digits.planes, book.bits, width), normal(4, rows)

    def execute(machine: Machine) -> list[torch.Tensor]:
        scores = machine.empty(queries, rows)
        addresses = [
            machine.put(x)
            for x in (codes, torch.tensor(book.levels, dtype=torch.int8), columns, digits.step, digits.bias)
        ]
        grid = (cdiv(rows, sizes["BN"]), cdiv(2 * queries, sizes["BC"]))
        machine.run(
            kernel, grid, *addresses, machine.put(row_scale), scores, rows, queries, width, width, width
        )
        return [machine.get(scores, queries, rows)]

    (got,) = on_every_schedule(execute)
    assert torch.equal(got, exact_scores(codes, kind, digits, row_scale))


def exact_scores(codes: torch.Tensor, kind: str, digits: Any, row_scale: torch.Tensor) -> torch.Tensor:
    """Return the definition's scores of every row: float32 [Q, N]."""
    from jz3.ops.encode import unpack_codes

    level = torch.tensor(CODEBOOKS[kind].levels)[unpack_codes(codes, kind, digits.planes.shape[2]).long()]
    high, low = (level @ plane.long().T for plane in digits.planes)
    dot = (128 * high + low).double()
    return (row_scale.double()[:, None] * (dot * digits.step + digits.bias)).float().T.contiguous()


@ARCHS
@pytest.mark.parametrize("kind", CODEBOOKS)
def test_encode_and_decode(arch: int, kind: str) -> None:
    rows, dim, book = 6, 640, CODEBOOKS[kind]
    values, mean, scale = normal(0, rows, dim) * 3, normal(1, dim), normal(2, dim).abs()
    scale[::5] = 0
    inverse = torch.where(scale > 0, 1 / scale, scale)
    expected = encode_reference(values, mean, scale, kind)
    width = expected.shape[1]
    encoding, decoding = (binary(arch, row, BITS=book.bits) for row in ("encode/any", "decode/any"))
    sizes, other = blocks(arch, "encode/any"), blocks(arch, "decode/any")
    thresholds = np.array(book.thresholds() if book.bits < 8 else [0], np.float32)
    table = np.array(book.levels, np.float32) * np.float32(book.unit)
    machine = Machine(race=True)
    codes, decoded = machine.put(np.full((rows, width), 77, np.uint8)), machine.empty(rows, dim)
    means = machine.put(mean)
    machine.run(
        encoding,
        (cdiv(rows, sizes["BN"]), cdiv(width, sizes["BB"])),
        *(machine.put(values), means, machine.put(inverse), machine.put(thresholds), codes),
        *(rows, dim, width, dim, np.float32(1) / np.float32(book.unit)),
    )
    machine.run(
        decoding,
        (cdiv(rows, other["BN"]), cdiv(dim, other["BK"])),
        *(codes, means, machine.put(scale), machine.put(table), decoded, rows, dim, width),
    )
    assert torch.equal(machine.get(codes, rows, width, kind=np.uint8), expected)
    assert torch.equal(machine.get(decoded, rows, dim), decode_reference(expected, mean, scale, kind))


def run_sketch(machine: Machine, kernel: Any, arch: int) -> torch.Tensor:
    from jz3.kernels.sketch import sorted_plan

    sizes = blocks(arch, "sketch/any")
    block = normal(0, 6, 992, dtype=torch.bfloat16)
    first, order = sorted_plan(77, 992, 304, torch.device("cpu"))
    out = machine.empty(6, 304)
    grid = (cdiv(6, sizes["BS"]), cdiv(304, sizes["BB"]))
    machine.run(kernel, grid, *map(machine.put, (block, first, order)), out, 6, 304, 992)
    return machine.get(out, 6, 304)


@ARCHS
def test_sketch(arch: int) -> None:
    (got,) = on_every_schedule(lambda machine: [run_sketch(machine, binary(arch, "sketch/any"), arch)])
    assert torch.equal(got, sketch_reference(normal(0, 6, 992, dtype=torch.bfloat16), 77, 304))


def test_a_wrong_stride_is_caught(tmp_path: Path) -> None:
    from gpu_without_gpu.ptxsim import PtxError

    from jz3.kernels import sketch

    (case,) = (case for case in shipped(80) if case.row == "sketch/any")
    changes = ("p_out + row[:, None] * K", "p_out + row[:, None] * (K - 16)")
    kernel = compiled(case, mutant(sketch, tmp_path, changes))
    got = run_sketch(Machine(), kernel, 80)
    assert not torch.equal(got, sketch_reference(normal(0, 6, 992, dtype=torch.bfloat16), 77, 304))
    changes = ("row[:, None] * stride_block", "row[:, None] * stride_block * 65536")
    kernel = compiled(case, mutant(sketch, tmp_path, changes))
    with pytest.raises(PtxError, match="out-of-bounds|out of bounds"):
        run_sketch(Machine(), kernel, 80)


def without(compiled_kernel: Any, pattern: str) -> Any:
    """Return a compiled kernel without the instructions of a pattern."""
    text, count = re.subn(pattern, "", compiled_kernel.ptx)
    assert count
    return dataclasses.replace(compiled_kernel, ptx=text)


def test_a_removed_wait_is_caught() -> None:
    kernels = ce_kernels(80)
    broken = kernels | {"exp": without(kernels["exp"], r"cp\.async\.wait_group\s+\d+;")}
    assert not ce_is_right(run_ce(Machine(async_mode="lazy"), 80, broken))


def test_a_removed_barrier_is_caught() -> None:
    kernels = ce_kernels(80)
    broken = kernels | {"exp": without(kernels["exp"], r"bar\.sync\s+0;")}
    with pytest.raises(AssertionError, match="also touched by another warp"):
        run_ce(Machine(race=True), 80, broken)

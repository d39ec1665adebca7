"""The PTX interpreter that the kernels' tests rely on: its instructions against numpy and Python integers.

The programs are PTX text, so that nothing has to be installed. Layouts of fragments are written down here as the
PTX manual states them, element by element.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gpu_without_gpu.ptxsim import Device, Module, PtxError, Run, from_bf16, to_bf16
from simulated_ptx import kernel

MASK = 0xFFFFFFFF


def signed(v: int, bits: int = 32) -> int:
    v &= (1 << bits) - 1
    return v - (1 << bits) if v >> (bits - 1) else v


def elementwise(
    instruction: str, *arrays: np.ndarray, result: str = "b32", dtype: Any = np.uint32, setup: str = ""
) -> np.ndarray:
    """Run `instruction` with %a, %b, %c as sources and %d as its result, one thread an element."""
    sizes = [a.itemsize for a in arrays]
    body = "mov.u32 %i, %tid.x;\ncvt.u64.u32 %at, %i;\n"
    for k, (name, size) in enumerate(zip("abc", sizes, strict=False)):
        body += f"mad.lo.u64 %p, %at, {size}, %arg{k};\nld.global.b{8 * size} %{name}, [%p];\n"
    out = np.dtype(dtype).itemsize
    body += f"{setup}{instruction}\nmad.lo.u64 %p, %at, {out}, %arg{len(arrays)};\n"
    body += f"st.global.{result} [%p], %d;\nret;"
    registers = {name: f"b{8 * size}" for name, size in zip("abc", sizes, strict=False)}
    registers |= {"d": result, "i": "b32", "at": "b64", "p": "b64", "q": "pred"}
    device, n = Device(1 << 20), len(arrays[0])
    addresses = [device.put(a) for a in arrays] + [device.put(np.zeros(n, dtype))]
    device.launch(kernel(body, len(addresses), registers), (1,), (n,), addresses)
    return device.get(addresses[-1], dtype, n)


def words(seed: int, n: int = 512) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    x, y, z = (rng.integers(0, 2**32, n, dtype=np.uint32) for _ in range(3))
    y[: n // 2] &= np.uint32(63)  # half of the cases with positions and lengths in range
    z[: n // 2] &= np.uint32(0x3F)
    x[:3] = 0, 1, MASK
    return [x, y, z]


def permute(a: int, b: int, selector: int) -> int:
    source = [(b << 32 | a) >> 8 * i & 255 for i in range(8)]
    out = 0
    for i in range(4):
        pick = selector >> 4 * i & 15
        value = source[pick & 7]
        out |= ((255 if value & 128 else 0) if pick & 8 else value) << 8 * i
    return out


def extract(a: int, b: int, c: int, sign: bool) -> int:
    pos, n = b & 255, c & 255
    last = a >> min(pos + n - 1, 31) & 1 if sign and n else 0
    return sum((a >> (pos + i) & 1 if i < n and pos + i <= 31 else last) << i for i in range(32))


def insert(a: int, b: int, pos: int, n: int) -> int:
    for i in range(n):
        if pos + i < 32:
            b = b & ~(1 << pos + i) | (a >> i & 1) << pos + i
    return b


def dot4(a: int, b: int, c: int, signs: tuple[bool, bool]) -> int:
    parts = [
        [signed(v >> 8 * i, 8) if s else v >> 8 * i & 255 for i in range(4)]
        for v, s in zip((a, b), signs, strict=True)
    ]
    return c + sum(p * q for p, q in zip(*parts, strict=True)) & MASK


def lookup(a: int, b: int, c: int, table: int) -> int:
    return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in range(32))


INTEGERS: dict[str, Callable[[int, int, int], int]] = {
    "add.u32 %d, %a, %b;": lambda a, b, c: a + b & MASK,
    "sub.s32 %d, %a, %b;": lambda a, b, c: a - b & MASK,
    "mul.lo.u32 %d, %a, %b;": lambda a, b, c: a * b & MASK,
    "mul.hi.u32 %d, %a, %b;": lambda a, b, c: a * b >> 32,
    "mul.hi.s32 %d, %a, %b;": lambda a, b, c: signed(a) * signed(b) >> 32 & MASK,
    "mad.lo.u32 %d, %a, %b, %c;": lambda a, b, c: a * b + c & MASK,
    "min.s32 %d, %a, %b;": lambda a, b, c: min(signed(a), signed(b)) & MASK,
    "max.u32 %d, %a, %b;": lambda a, b, c: max(a, b),
    "shl.b32 %d, %a, %b;": lambda a, b, c: a << b & MASK if b < 32 else 0,
    "shr.u32 %d, %a, %b;": lambda a, b, c: a >> b if b < 32 else 0,
    "shr.s32 %d, %a, %b;": lambda a, b, c: signed(a) >> min(b, 31) & MASK,
    "shf.l.wrap.b32 %d, %a, %b, %c;": lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32 & MASK,
    "shf.r.clamp.b32 %d, %a, %b, %c;": lambda a, b, c: (b << 32 | a) >> min(c, 32) & MASK,
    "prmt.b32 %d, %a, %b, %c;": permute,
    "prmt.b32 %d, %a, %b, 0x5410;": lambda a, b, c: permute(a, b, 0x5410),
    "prmt.b32 %d, %a, %b, 0xC28F;": lambda a, b, c: permute(a, b, 0xC28F),
    "bfe.u32 %d, %a, %b, %c;": lambda a, b, c: extract(a, b, c, False),
    "bfe.s32 %d, %a, %b, %c;": lambda a, b, c: extract(a, b, c, True),
    "bfi.b32 %d, %a, %b, 5, 9;": lambda a, b, c: insert(a, b, 5, 9),
    "popc.b32 %d, %a;": lambda a, b, c: bin(a).count("1"),
    "clz.b32 %d, %a;": lambda a, b, c: 32 - a.bit_length(),
    "brev.b32 %d, %a;": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "bfind.u32 %d, %a;": lambda a, b, c: a.bit_length() - 1 & MASK,
    "dp4a.s32.s32 %d, %a, %b, %c;": lambda a, b, c: dot4(a, b, c, (True, True)),
    "dp4a.u32.s32 %d, %a, %b, %c;": lambda a, b, c: dot4(a, b, c, (False, True)),
}


@pytest.mark.parametrize("instruction", INTEGERS)
def test_integers(instruction: str) -> None:
    x = words(0)
    expected = [INTEGERS[instruction](*map(int, v)) for v in zip(*x, strict=True)]
    assert elementwise(instruction, *x).tolist() == expected


def test_lop3_of_every_table() -> None:
    x = [v[:32] for v in words(1)]
    for table in range(256):
        expected = [lookup(int(a), int(b), int(c), table) for a, b, c in zip(*x, strict=True)]
        assert elementwise(f"lop3.b32 %d, %a, %b, %c, {table};", *x).tolist() == expected, table


def test_wide_products_and_carries() -> None:
    x, y, z = words(2)
    got = elementwise("mul.wide.u32 %d, %a, %b;", x, y, result="b64", dtype=np.uint64)
    assert got.tolist() == [int(a) * int(b) for a, b in zip(x, y, strict=True)]
    wide = x.astype(np.uint64) << np.uint64(32) | z
    other = y.astype(np.uint64) << np.uint64(31) | x
    got = elementwise("mul.hi.u64 %d, %a, %b;", wide, other, result="b64", dtype=np.uint64)
    assert got.tolist() == [int(a) * int(b) >> 64 for a, b in zip(wide, other, strict=True)]


def test_floats() -> None:
    rng = np.random.default_rng(3)
    x, y, z = (rng.standard_normal(256).astype(np.float32) for _ in range(3))
    run = {"result": "f32", "dtype": np.float32}
    assert np.array_equal(elementwise("add.f32 %d, %a, %b;", x, y, **run), x + y)
    assert np.array_equal(elementwise("mul.f32 %d, %a, %b;", x, y, **run), x * y)
    exact = (x.astype(np.float64) * y + z).astype(np.float32)
    assert np.array_equal(elementwise("fma.rn.f32 %d, %a, %b, %c;", x, y, z, **run), exact)
    down = elementwise("add.rz.f32 %d, %a, %b;", x, y, **run)
    sums = x.astype(np.float64) + y
    assert (np.abs(down) <= np.abs(sums)).all()
    assert (np.abs(np.nextafter(down, np.sign(down) * np.float32(np.inf))) > np.abs(sums)).all()
    compare = "setp.lt.f32 %q, %a, %b;\nselp.b32 %d, 1, 0, %q;"
    x[0] = np.nan
    assert np.array_equal(elementwise(compare, x, y), (x < y).astype(np.uint32))


def test_conversions() -> None:
    rng = np.random.default_rng(4)
    x = (rng.standard_normal(512) * 300).astype(np.float32)
    whole = elementwise("cvt.rni.sat.s8.f32 %d, %a;", x, result="b32")
    assert np.array_equal(whole.astype(np.int32), np.clip(np.rint(x), -128, 127))
    pair = elementwise("cvt.rn.bf16x2.f32 %d, %a, %b;", x, x[::-1].copy())
    ulp = 2.0 ** (np.floor(np.log2(np.abs(x.astype(np.float64)))) - 7)
    nearest = np.rint(x / ulp) * ulp  # ties to even, from the definition
    assert np.array_equal(from_bf16((pair >> np.uint32(16)).astype(np.uint16)), nearest)
    assert np.array_equal(from_bf16((pair & np.uint32(0xFFFF)).astype(np.uint16)), nearest[::-1])
    assert np.array_equal(from_bf16(to_bf16(x)), nearest)
    half = elementwise("cvt.rn.f16.f32 %d, %a;", x, result="b16", dtype=np.uint16)
    assert np.array_equal(half.view(np.float16), x.astype(np.float16))


def warp(body: str, inputs: list[np.ndarray], outputs: int, **registers: str) -> np.ndarray:
    """Run one warp that loads row `lane` of each input to %x0, %x1 ...; return %y0, %y1 ... as [32, outputs]."""
    count = [a.shape[1] for a in inputs]
    text = "mov.u32 %i, %tid.x;\ncvt.u64.u32 %at, %i;\n"
    k = 0
    for argument, n in enumerate(count):
        text += f"mad.lo.u64 %p, %at, {4 * n}, %arg{argument};\n"
        for j in range(n):
            text += f"ld.global.b32 %x{k}, [%p+{4 * j}];\n"
            k += 1
    text += f"{body}\nmad.lo.u64 %p, %at, {4 * outputs}, %arg{len(inputs)};\n"
    text += "".join(f"st.global.b32 [%p+{4 * j}], %y{j};\n" for j in range(outputs)) + "ret;"
    names = {f"x{j}": "b32" for j in range(k)} | {f"y{j}": "b32" for j in range(outputs)}
    names |= {"i": "b32", "at": "b64", "p": "b64", **registers}
    device = Device(1 << 20)
    addresses = [device.put(a.view(np.uint32)) for a in inputs]
    addresses.append(device.put(np.zeros((32, outputs), np.uint32)))
    device.launch(kernel(text, len(addresses), names), (1,), (32,), addresses)
    return device.get(addresses[-1], np.uint32, (32, outputs))


def fragments(
    matrix: np.ndarray, place: Callable[[int, int, int], tuple[int, int]], per_lane: int
) -> np.ndarray:
    """Distribute a matrix: element i of lane 4 g + t is matrix[place(g, t, i)]."""
    out = np.empty((32, per_lane), matrix.dtype)
    for lane in range(32):
        for i in range(per_lane):
            out[lane, i] = matrix[place(lane >> 2, lane & 3, i)]
    return out


def registers(start: int, count: int, letter: str = "x") -> str:
    return "{" + ", ".join(f"%{letter}{i}" for i in range(start, start + count)) + "}"


def accumulator(g: int, t: int, i: int) -> tuple[int, int]:
    return g if i < 2 else g + 8, 2 * t + (i & 1)


def test_mma_bf16_and_tf32() -> None:
    rng = np.random.default_rng(5)
    a, b = to_bf16(rng.standard_normal((16, 16))), to_bf16(rng.standard_normal((16, 8)))
    c = rng.standard_normal((16, 8)).astype(np.float32)
    inputs = [
        fragments(a, lambda g, t, i: (g + 8 * (i // 2 % 2), 2 * t + i % 2 + 8 * (i // 4)), 8),
        fragments(b, lambda g, t, i: (2 * t + i % 2 + 8 * (i // 2), g), 4),
        fragments(c, accumulator, 4),
    ]
    instruction = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    parts = f"{registers(0, 4, 'y')}, {registers(0, 4)}, {registers(4, 2)}, {registers(6, 4)};"
    got = warp(f"{instruction} {parts}", [v.view(np.uint32) for v in inputs], 4).view(np.float32)
    expected = (from_bf16(a) @ from_bf16(b) + c).astype(np.float32)
    assert np.array_equal(got, fragments(expected, accumulator, 4))

    x, y = (rng.integers(-9, 9, s).astype(np.float32) for s in ((16, 8), (8, 8)))
    inputs = [
        fragments(x, lambda g, t, i: (g + 8 * (i % 2), t + 4 * (i // 2)), 4),
        fragments(y, lambda g, t, i: (t + 4 * i, g), 2),
        fragments(c, accumulator, 4),
    ]
    instruction = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
    got = warp(f"{instruction} {parts}", [v.view(np.uint32) for v in inputs], 4).view(np.float32)
    assert np.array_equal(got, fragments((x.astype(float) @ y + c).astype(np.float32), accumulator, 4))


@pytest.mark.parametrize(("kind", "low", "high"), [("s8", -128, 128), ("u8", 0, 256)])
def test_mma_int8(kind: str, low: int, high: int) -> None:
    rng = np.random.default_rng(6)
    dtype = np.int8 if low else np.uint8
    a, b = rng.integers(low, high, (16, 32)).astype(dtype), rng.integers(low, high, (32, 8)).astype(dtype)
    c = rng.integers(-(2**30), 2**30, (16, 8)).astype(np.int32)
    inputs = [
        fragments(a, lambda g, t, i: (g + 8 * (i // 4 % 2), 4 * t + i % 4 + 16 * (i // 8)), 16),
        fragments(b, lambda g, t, i: (4 * t + i % 4 + 16 * (i // 4), g), 8),
        fragments(c, accumulator, 4),
    ]
    parts = f"{registers(0, 4, 'y')}, {registers(0, 4)}, {registers(4, 2)}, {registers(6, 4)};"
    instruction = f"mma.sync.aligned.m16n8k32.row.col.s32.{kind}.{kind}.s32 {parts}"
    got = warp(instruction, [v.view(np.uint32) for v in inputs], 4).view(np.int32)
    assert np.array_equal(got, fragments(a.astype(int) @ b.astype(int) + c, accumulator, 4))


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed: bool) -> None:
    tiles = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)  # row r of matrix m is given by lane 8 m + r
    rows = tiles.reshape(32, 8).view(np.uint32)
    body = "shl.b32 %s, %i, 4;\nmov.u32 %b, memory;\nadd.u32 %s, %s, %b;\n"
    body += "st.shared.v4.b32 [%s], {%x0, %x1, %x2, %x3};\nbar.warp.sync 0xffffffff;\n"
    name = f"ldmatrix.sync.aligned.m8n8.x4{'.trans' if transposed else ''}.shared.b16"
    body += f"{name} {registers(0, 4, 'y')}, [%s];"
    got = warp(".shared .align 16 .b8 memory[512];\n" + body, [rows], 4, s="b32", b="b32").view(np.uint16)
    for lane in range(32):
        for m in range(4):
            for j in range(2):
                at = (lane >> 2, 2 * (lane & 3) + j)
                assert got[lane, 2 * m + j] == tiles[m][at[::-1] if transposed else at]


def test_shuffles_and_votes() -> None:
    x = np.arange(100, 132, dtype=np.uint32)[:, None]
    got = warp(
        "shfl.sync.bfly.b32 %y0, %x0, 5, 31, -1;\nshfl.sync.up.b32 %y1, %x0, 3, 0, -1;\n"
        "shfl.sync.idx.b32 %y2, %x0, 7, 31, -1;\nsetp.gt.u32 %q, %x0, 120;\n"
        "vote.sync.ballot.b32 %y3, %q, -1;\nredux.sync.add.s32 %y4, %x0, -1;",
        [x],
        5,
        q="pred",
    )
    lane = np.arange(32)
    assert np.array_equal(got[:, 0], 100 + (lane ^ 5))
    assert np.array_equal(got[:, 1], 100 + np.where(lane < 3, lane, lane - 3))
    assert (got[:, 2] == 107).all() and (got[:, 3] == sum(1 << i for i in range(21, 32))).all()
    assert (got[:, 4] == x.sum()).all()


def test_what_is_not_covered_is_refused() -> None:
    for instruction in ("add.cc.u32 %d, %a, %b;", "tcgen05.alloc %d, %a;", "add.e4m3 %d, %a, %b;"):
        with pytest.raises(PtxError, match="not covered"):
            elementwise(instruction, *words(0)[:2])
    with pytest.raises(PtxError, match="no kernel"):
        Module("")


def test_statistics_count_threads() -> None:
    device = Device(1 << 20)
    run: Run = device.launch(kernel("bar.sync 0;\nret;", 0, {}), (3,), (64,), [])
    assert run.stats == {"bar.sync": 192, "ret": 192} and run.insts == 384

"""What the PTX interpreter must catch: missing waits and barriers, wrong addresses, deadlocks; and what it counts."""

from typing import Any

import numpy as np
import pytest
from gpu_without_gpu import roofline
from gpu_without_gpu.ptxsim import Device, PtxError, Run, TensorMap, from_bf16, to_bf16
from simulated_ptx import kernel

POISON = 0xCDCDCDCD
COMMON = {"i": "b32", "s": "b32", "v": "b32", "at": "b64", "p": "b64", "q": "pred"}
ADDRESSES = "mov.u32 %i, %tid.x;\nmul.wide.u32 %at, %i, 4;\nadd.u64 %p, %arg0, %at;\n"
SHARED = ".shared .align 16 .b8 memory[4096];\nmov.u32 %s, memory;\n"


def launch(
    body: str, arrays: list[np.ndarray], threads: int = 64, blocks: int = 1, **options: Any
) -> tuple[Run, Any]:
    """Run `body` and return the run and the last array as it left it."""
    extra = options.pop("registers", {})
    device = Device(1 << 20)
    at = [device.put(a) for a in arrays]
    program = kernel(f"{ADDRESSES}{body}\nret;", len(at), COMMON | extra)
    run = device.launch(program, (blocks,), (threads,), at, **options)
    return run, device.get(at[-1], arrays[-1].dtype, arrays[-1].shape)


EXCHANGE = SHARED + (
    "shl.b32 %v, %i, 2;\nadd.u32 %s, %s, %v;\nst.shared.u32 [%s], %i;\n{barrier}\n"
    "xor.b32 %v, %v, 128;\nmov.u32 %s, memory;\nadd.u32 %s, %s, %v;\n"
    "ld.shared.u32 %v, [%s];\nst.global.u32 [%p], %v;"
)


def test_a_missing_barrier_is_a_race() -> None:
    out = np.zeros(64, np.uint32)
    for options in ({"race": True}, {"race": True, "order": 3}):
        run, got = launch(EXCHANGE.format(barrier="bar.sync 0;"), [out], **options)
        assert not run.races and np.array_equal(got, np.arange(64) ^ 32)
        assert launch(EXCHANGE.format(barrier=""), [out], **options)[0].races
    wrong = [launch(EXCHANGE.format(barrier=""), [out], order=seed)[1] for seed in range(1, 6)]
    assert any((got == POISON).any() for got in wrong)


def test_a_barrier_orders_only_the_warps_that_meet_at_it() -> None:
    named = (
        "shr.u32 %v, %i, 6;\nadd.u32 %v, %v, 1;\nbar.sync %v, 64;\nshl.b32 %v, %i, 2;"  # warps 0 1 and 2 3
    )
    out = np.zeros(128, np.uint32)
    run, got = launch(EXCHANGE.format(barrier=named), [out], threads=128, race=True)
    assert not run.races and np.array_equal(got, np.arange(128) ^ 32)
    across = EXCHANGE.replace("xor.b32 %v, %v, 128", "xor.b32 %v, %v, 256")  # reads what the other pair wrote
    assert launch(across.format(barrier=named), [out], threads=128, race=True)[0].races


def test_all_warps_writing_one_word_race() -> None:
    body = SHARED + "st.shared.u32 [%s], %i;\nst.global.u32 [%p], %i;"
    assert launch(body, [np.zeros(64, np.uint32)], race=True)[0].races
    assert not launch(body, [np.zeros(64, np.uint32)], threads=32, race=True)[0].races


COPY = SHARED + (
    "shl.b32 %v, %i, 2;\nadd.u32 %s, %s, %v;\nadd.u64 %p, %arg0, %at;\n"
    "cp.async.ca.shared.global [%s], [%p], 4{size};\n"
    "cp.async.commit_group;\n{wait}\nld.shared.u32 %v, [%s];\nadd.u64 %p, %arg1, %at;\nst.global.u32 [%p], %v;"
)


@pytest.mark.parametrize("wait", ["cp.async.wait_group 0;", "cp.async.wait_all;"])
def test_a_missing_wait_shows_when_copies_are_lazy(wait: str) -> None:
    x, out = np.arange(100, 164, dtype=np.uint32), np.zeros(64, np.uint32)
    for mode in ("lazy", "eager"):
        assert np.array_equal(launch(COPY.format(size="", wait=wait), [x, out], async_mode=mode)[1], x)
    missing = COPY.format(size="", wait="")
    assert np.array_equal(launch(missing, [x, out], async_mode="eager")[1], x)
    assert (launch(missing, [x, out], async_mode="lazy")[1] == POISON).all()
    assert (launch(COPY.format(size="", wait="cp.async.wait_group 1;"), [x, out])[1] == POISON).all()


def test_a_copy_of_fewer_bytes_fills_with_zeros() -> None:
    x, out = np.full(64, 0x01020304, np.uint32), np.zeros(64, np.uint32)
    got = launch(COPY.format(size=", %b", wait="cp.async.wait_all;").replace(
        "cp.async.ca", "and.b32 %b, %i, 3;\ncp.async.ca"
    ), [x, out], registers={"b": "b32"})[1]  # fmt: skip
    assert np.array_equal(got, x & ((1 << 8 * (np.arange(64) & 3)) - 1))


def test_wrong_addresses_are_caught() -> None:
    x = np.zeros(64, np.uint32)
    launch("ld.global.u32 %v, [%p];\nst.global.u32 [%p], %v;", [x])
    for body, what in (
        ("ld.global.u32 %v, [%p+4];", "out-of-bounds global load"),
        ("ld.global.u32 %v, [%p+-4];", "out-of-bounds global load"),
        ("st.global.u32 [%p+256], %i;", "out-of-bounds global store"),
        ("ld.global.u32 %v, [%p+2];", "misaligned load"),
        ("ld.global.v2.u32 {%v, %s}, [%p];", "misaligned load"),
        (
            SHARED + "shl.b32 %v, %i, 7;\nadd.u32 %s, %s, %v;\nst.shared.u32 [%s], %i;",
            "out-of-bounds shared store",
        ),
        (
            COPY.format(size="", wait="").replace("[%p], 4", "[%p+256], 4"),
            "out-of-bounds global cp.async load",
        ),
    ):
        with pytest.raises(PtxError, match=what):
            launch(body, [x, x])


def test_deadlock_and_livelock_are_caught() -> None:
    x = np.zeros(64, np.uint32)
    with pytest.raises(PtxError, match="deadlock: 64 threads wait at a barrier"):
        launch("bar.sync 1, 96;", [x])
    with pytest.raises(PtxError, match="livelock"):
        launch("again: bra again;", [x], max_steps=100)
    half = "setp.lt.u32 %q, %i, 16;\n@%q bra one;\nshfl.sync.idx.b32 %v, %i, 0, 31, -1;\none:"
    with pytest.raises(PtxError, match="partial warp"):
        launch(half, [x], threads=32)


TMA = ".shared .align 1024 .b8 memory[2048];\n.shared .align 8 .b8 barrier[8];\n" + (
    "mov.u32 %s, memory;\nmov.u32 %b, barrier;\nmov.b64 %p, k_1;\ncvta.param.u64 %p, %p;\nsetp.eq.u32 %q, %i, 0;\n"
    "@%q mbarrier.init.shared::cta.b64 [%b], 1;\nbar.sync 0;\n"
    "@%q mbarrier.arrive.expect_tx.shared::cta.b64 _, [%b], {expected};\n"
    "@%q cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%s], [%p, {{%x, %y}}], [%b];\n"
    "{wait}\nshl.b32 %v, %i, 4;\nadd.u32 %s, %s, %v;\n"
    "ld.shared.v4.u32 {{%r0, %r1, %r2, %r3}}, [%s];\nmul.wide.u32 %at, %i, 16;\nadd.u64 %p, %arg0, %at;\n"
    "st.global.v4.u32 [%p], {{%r0, %r1, %r2, %r3}};\nret;"
)
WAIT = "again: mbarrier.try_wait.parity.shared::cta.b64 %q, [%b], 0;\n@!%q bra again;"


def copied_tile(wait: str, expected: int = 1024, **options: Any) -> np.ndarray:
    """A 8 x 64 tile of halves at column 40, row -2 of a 5 x 100 tensor, as it lies in shared memory."""
    device = Device(1 << 20)
    tensor = np.zeros((5, 104), np.uint16)
    tensor[:, :100] = np.arange(1, 501).reshape(5, 100)
    out = device.put(np.zeros(512, np.uint16))
    tensor_map = TensorMap(device.put(tensor), 2, (100, 5), 208, (64, 8), 128)
    names = COMMON | {"b": "b32", "x": "b32", "y": "b32"} | {f"r{i}": "b32" for i in range(4)}
    body = f"{ADDRESSES}mov.u32 %x, 40;\nmov.u32 %y, -2;\n{TMA.format(wait=wait, expected=expected)}"
    program = kernel(body, 2, names)
    device.launch(program, (1,), (64,), [out, tensor_map], max_steps=500, **options)
    return device.get(out, np.uint16, 512)


@pytest.mark.parametrize("mode", ["lazy", "eager"])
def test_tma_swizzles_and_fills_with_zeros(mode: str) -> None:
    expected = np.zeros(512, np.uint16)
    for row in range(8):
        for column in range(64):
            inside = 0 <= row - 2 < 5 and column + 40 < 100
            unit = column // 8 ^ row  # 16-byte units of a row of 128 bytes are permuted by the row
            expected[row * 64 + unit * 8 + column % 8] = inside and 1 + (row - 2) * 100 + column + 40
    assert np.array_equal(copied_tile(WAIT, async_mode=mode), expected)


def test_a_missing_wait_for_tma_shows() -> None:
    assert (copied_tile("", async_mode="lazy") == 0xCDCD).all()
    with pytest.raises(PtxError, match="livelock"):
        copied_tile(WAIT, expected=1040)


def swizzled_image(matrix: np.ndarray) -> np.ndarray:
    """Rows of 64 halves as wgmma's 128-byte swizzle has them."""
    image = np.empty_like(matrix)
    for row in range(len(matrix)):
        for unit in range(8):
            at = (unit ^ row % 8) * 8
            image[row, at : at + 8] = matrix[row, unit * 8 : unit * 8 + 8]
    return image


@pytest.mark.parametrize("mode", ["lazy", "eager"])
@pytest.mark.parametrize("from_registers", [False, True])
def test_wgmma_layouts(mode: str, from_registers: bool) -> None:
    rng = np.random.default_rng(0)
    a, b = to_bf16(rng.standard_normal((64, 64))), to_bf16(rng.standard_normal((8, 64)))
    image = np.concatenate([swizzled_image(a), swizzled_image(b)])  # 8192 bytes of a, 1024 of b
    in_registers = np.empty((128, 4, 2), np.uint16)  # of columns 16 .. 31 of a: the manual's figure
    for thread in range(128):
        g, t = thread % 32 // 4, thread % 4
        for i in range(8):
            row = thread // 32 * 16 + g + 8 * (i // 2 % 2)
            in_registers[thread, i // 2, i % 2] = a[row, 16 + 2 * t + i % 2 + 8 * (i // 4)]
    body = ".shared .align 1024 .b8 memory[9216];\nmov.u32 %s, memory;\nmul.lo.u32 %v, %i, 72;\nadd.u32 %s, %s, %v;\n"
    body += "mul.wide.u32 %at, %i, 72;\nadd.u64 %p, %arg0, %at;\n"
    for j in range(18):  # 72 bytes a thread
        body += f"ld.global.u32 %v, [%p+{4 * j}];\nst.shared.u32 [%s+{4 * j}], %v;\n"
    body += "mul.wide.u32 %at, %i, 16;\nadd.u64 %p, %arg1, %at;\n"
    body += "ld.global.v4.u32 {%x0, %x1, %x2, %x3}, [%p];\nbar.sync 0;\n"
    high = 1 << 62 | (1024 >> 4) << 32 | 1 << 16
    body += f"mov.u64 %l, {high | (32 >> 4)};\nmov.u64 %r, {high | (8192 + 32) >> 4};\n"  # columns 16 .. 31
    body += "mov.f32 %y0, 0f3F800000;\nmov.f32 %y1, 0f3F800000;\nmov.f32 %y2, 0f3F800000;\nmov.f32 %y3, 0f3F800000;\n"
    left = "{%x0, %x1, %x2, %x3}, %r, 1, 1, 1, 0;" if from_registers else "%l, %r, 1, 1, 1, 0, 0;"
    body += f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%y0, %y1, %y2, %y3}}, {left}\n"
    body += "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"
    body += "add.u64 %p, %arg2, %at;\nst.global.v4.f32 [%p], {%y0, %y1, %y2, %y3};"
    names = {"l": "b64", "r": "b64"} | {f"x{i}": "b32" for i in range(4)} | {f"y{i}": "f32" for i in range(4)}
    arrays = [image, in_registers, np.zeros((128, 4), np.float32)]
    got = launch(body, arrays, threads=128, async_mode=mode, registers=names)[1]
    expected = (1 + from_bf16(a[:, 16:32]) @ from_bf16(b[:, 16:32]).T).astype(np.float32)
    for thread in range(128):
        for i in range(4):
            row, column = thread // 32 * 16 + thread % 32 // 4 + 8 * (i // 2), 2 * (thread % 4) + i % 2
            assert got[thread, i] == expected[row, column]


def test_counts() -> None:
    x = np.zeros(64, np.uint32)
    run, _ = launch("ld.global.u32 %v, [%p];\nst.global.u32 [%p], %v;", [x], metrics=True)
    counted = roofline.counts(run)
    assert counted["dram_bytes"] == 512 and counted["l2_bytes"] == 512
    for shift, conflicts in ((2, 1), (3, 2), (7, 32)):  # words side by side, every second, one bank
        body = SHARED + f"shl.b32 %v, %i, {shift};\nadd.u32 %s, %s, %v;\nst.shared.u32 [%s], %i;"
        counted = roofline.counts(launch(body, [x], threads=32, metrics=True)[0])
        assert counted["smem_wavefronts"] == conflicts * counted["smem_wavefronts_ideal"]
    bounds = roofline.bounds({**counted, "dram_bytes": 3.35e12, "flop": {"bf16": 989e12}}, "H100")
    assert bounds["dram"] == bounds["tensor"] == 1

"""Compile a Triton kernel ahead of time, without a GPU, and look at or execute what came out.

    c = compile_aot(kernel, {"A": "*bf16", "C": "*fp32", "M": "i32", "BM": "constexpr"}, {"BM": 64},
                    div16=("A", "C", "M"), arch=90, options={"num_warps": 4, "num_stages": 3})
    c.resources                    # registers, stack, shared, spills, tensor-core instructions, bytes of code
    c.run(dev, grid, args)         # execute c.ptx in ptxsim

Needs an environment without TRITON_INTERPRET (the decorator decides at import). The launcher derives
`tt.divisibility` from pointer alignment and from integers that are multiples of 16; ahead of time it has
to be said (div16), or no vector loads, cp.async and TMA appear. An integer argument equal to 1 becomes a
constexpr. Since a committed option is better than a default, pass enable_fp_fusion in options or set
TRITON_DEFAULT_FP_FUSION.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .ptxsim import Device, Module, Run
from .sass_report import report

DIV16 = [["tt.divisibility", 16]]


@dataclass
class Compiled:
    """A compiled Triton kernel; `target` is that of the PTX (as sm_90a), `shared` in bytes."""

    name: str
    arch: int
    target: str
    ptx: str
    ttgir: str
    cubin: bytes
    threads: int
    shared: int
    resources: dict[str, Any]
    metadata: Any

    def run(self, dev: Device, grid: Sequence[int], args: Sequence[Any], **options: Any) -> Run:
        """Execute in ptxsim. args: the non-constexpr arguments; the trailing scratch pointers are added."""
        k = Module(self.ptx).kernels[self.name]
        args = list(args) + [0] * (len(k.params) - len(args))
        return dev.launch(k, grid, (self.threads,), args, dyn_smem=self.shared, **options)


def compile_aot(
    fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any] | None = None,
    attrs: Mapping[tuple[int, ...], Any] | None = None,
    arch: int = 90,
    options: Mapping[str, Any] | None = None,
    div16: Iterable[str] = (),
) -> Compiled:
    """Compile a Triton kernel for a GPU that isn't there.

    Args:
        fn: a function decorated with triton.jit.
        signature: each argument's type or "constexpr", in order.
        constexprs: the values of those.
        attrs: further attributes of arguments, by position.
        arch: 80, 90 or 100.
        options: num_warps, num_stages and the like.
        div16: names of arguments that are multiples of 16 (pointers: 16-byte aligned), merged into attrs.

    Raises:
        RuntimeError: this process has TRITON_INTERPRET=1.
        ValueError: a constexpr has no value.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("ahead-of-time compilation needs a process without TRITON_INTERPRET=1")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(signature)
    missing = [n for n in names if signature[n] == "constexpr" and n not in (constexprs or {})]
    if missing:
        raise ValueError(f"constexpr without a value: {missing}")
    attrs = dict(attrs or {})
    attrs.update({(names.index(n),): DIV16 for n in div16})
    src = ASTSource(fn=fn, signature=dict(signature), constexprs=dict(constexprs or {}), attrs=attrs)
    k = triton.compile(src, target=GPUTarget("cuda", arch, 32), options=dict(options or {}))
    ptx = k.asm["ptx"]
    name, target = k.metadata.name, next(x.split()[1] for x in ptx.splitlines() if x.startswith(".target"))
    threads = k.metadata.num_warps * 32
    with tempfile.TemporaryDirectory() as d:
        cubin = Path(d, "k.cubin")
        cubin.write_bytes(k.asm["cubin"])
        r = report(cubin, threads, k.metadata.shared)[0]
    resources = dict(
        registers=r.registers, stack=r.stack, shared=k.metadata.shared, spills=r.spills, mma=r.mma,
        instructions=r.instructions, blocks_per_sm=r.blocks_per_sm, ops=dict(r.ops),
    )  # fmt: skip
    return Compiled(
        name,
        arch,
        target,
        ptx,
        str(k.asm["ttgir"]),
        k.asm["cubin"],
        threads,
        k.metadata.shared,
        resources,
        k.metadata,
    )

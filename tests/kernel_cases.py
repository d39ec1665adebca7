"""Every shipped configuration of the Triton kernels, as the compiler is told about it.

PYTHONPATH=... python tests/kernel_cases.py            # measure; rewrites "triton" in kernel_budgets.json
"""

import importlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

BUDGETS = Path(__file__).with_name("kernel_budgets.json")


class Elsewhere(str):
    """The name of a device that doesn't pass for the CPU's, though what is on it is there."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class Kernel:
    """How a kernel is called: its module, the types of its arguments, and those that are multiples of 16."""

    module: str
    name: str
    signature: dict[str, str]
    """Type of each argument in order; `?` stands for the dtype of a case."""
    aligned: tuple[str, ...]
    rows: dict[str, tuple[dict[str, Any], ...]]
    """Beginning of rows of the launch table -> further constants; each makes a configuration."""
    mma: bool = False
    """Tensor cores are meant."""


def _arguments(pointers: dict[str, str], integers: str = "") -> dict[str, str]:
    return {f"p_{name}": f"*{kind}" for name, kind in pointers.items()} | dict.fromkeys(
        integers.split(), "i32"
    )


BITS = tuple({"BITS": bits} for bits in (8, 4, 2, 1))
CE_STATISTICS = {"y": "i64", "index": "i64"}

KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel(
            "segment_project",
            "segment_project_kernel",
            _arguments(
                {"a": "?", "g": "?", "left": "?", "chunks": "i64", "partial": "fp32"},
                "P O Q stride_a stride_g stride_left",
            ),
            ("p_a", "p_g", "p_left", "p_partial", "stride_a", "stride_g", "stride_left"),
            {"segment_project/": ({"HAS_LEFT": True}, {"HAS_LEFT": False})},
            mma=True,
        ),
        Kernel(
            "segment_project",
            "segment_sum_kernel",
            _arguments({"partial": "fp32", "first": "i64", "out": "fp32"}, "n"),
            ("p_partial", "p_first", "p_out", "n"),
            {"segment_sum/": ({},)},
        ),
        Kernel(
            "sign_project",
            "sign_bits_kernel",
            _arguments({"bits": "i32"}, "key_low key_high first_block blocks k"),
            ("p_bits",),
            {"sign_bits/": ({},)},
        ),
        Kernel(
            "sign_project",
            "sign_project_kernel",
            _arguments({"x": "?", "bits": "i32", "partial": "fp32"}, "S P k blocks stride_x"),
            ("p_x", "p_bits", "p_partial", "stride_x"),
            {"sign_project/": ({"PIECE": 16384},)},
            mma=True,
        ),
        Kernel(
            "ce_hidden_grad",
            "ce_exp_kernel",
            _arguments(
                {"h": "?", "weight": "?", **CE_STATISTICS, "scratch": "?"}
                | dict.fromkeys(("max", "sum", "target"), "fp32"),
                "T V D stride_h stride_weight stride_scratch",
            ),
            ("p_h", "p_weight", "p_scratch", "V", "D", "stride_h", "stride_weight", "stride_scratch"),
            {"ce_exp/": ({"SCALE": 1},)},
            mma=True,
        ),
        Kernel(
            "ce_hidden_grad",
            "ce_loss_kernel",
            _arguments({"index": "i64"} | dict.fromkeys(("max", "sum", "target", "loss"), "fp32"), "T tiles"),
            ("p_max", "p_sum", "p_target", "p_loss"),
            {"ce_loss/": ({},)},
        ),
        Kernel(
            "ce_hidden_grad",
            "ce_grad_kernel",
            _arguments(
                {"scratch": "?", "factor": "fp32", "weight": "?", **CE_STATISTICS, "loss": "fp32"}
                | {"weights": "fp32", "grad": "?"},
                "T V D stride_scratch stride_weight stride_grad",
            ),
            ("p_scratch", "p_weight", "p_grad", "V", "D", "stride_scratch", "stride_weight", "stride_grad"),
            {"ce_grad/half": ({"SCALE": 1, "BV": 128},), "ce_grad/float": ({"SCALE": 1, "BV": 64},)},
            mma=True,
        ),
        Kernel(
            "score_topk",
            "score_codes_kernel",
            _arguments(
                {"codes": "u8", "levels": "i8", "digits": "i8", "step": "fp64", "bias": "fp64"}
                | {"row_scale": "fp32", "scores": "fp32"},
                "N Q width stride_codes stride_digits",
            ),
            ("p_codes", "p_levels", "p_digits", "p_step", "p_bias", "p_row_scale", "p_scores")
            + ("width", "stride_codes", "stride_digits"),
            {
                "score_codes/wide/": tuple({"BITS": bits, "PLANES": 2} for bits in (8, 4)),
                "score_codes/narrow/": tuple({"BITS": bits, "PLANES": 2} for bits in (2, 1)),
            },
            mma=True,
        ),
        Kernel(
            "encode",
            "encode_kernel",
            _arguments(
                {"values": "fp32", "mean": "fp32", "inverse": "fp32", "thresholds": "fp32", "codes": "u8"},
                "N K width stride_values",
            )
            | {"per_unit": "fp32"},
            ("p_values", "p_mean", "p_inverse", "p_thresholds", "p_codes", "K", "width", "stride_values"),
            {"encode/": BITS},
        ),
        Kernel(
            "encode",
            "decode_kernel",
            _arguments(
                {"codes": "u8", "mean": "fp32", "scale": "fp32", "table": "fp32", "values": "fp32"},
                "N K stride_codes",
            ),
            ("p_codes", "p_mean", "p_scale", "p_table", "p_values", "K", "stride_codes"),
            {"decode/": BITS},
        ),
        Kernel(
            "sketch",
            "sketch_kernel",
            _arguments({"block": "?", "first": "i32", "order": "i32", "out": "fp32"}, "S K stride_block"),
            ("p_block", "p_first", "p_order", "p_out", "K", "stride_block"),
            {"sketch/": ({},)},
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration of one kernel for one architecture."""

    kernel: str
    row: str
    constants: tuple[tuple[str, Any], ...]
    dtype: str
    arch: int

    @property
    def name(self) -> str:
        """The case's name in the budget file."""
        extra = "".join(f" {name}={value}" for name, value in self.constants)
        return f"{self.row}{extra} sm_{self.arch}"


def shipped(arch: int) -> list[Case]:
    """Return every configuration that the launch table of an architecture holds; bf16 stands for both halves."""
    from jz3.kernels import launch

    return [
        Case(kernel.name, row, tuple(constants.items()), "fp32" if "/float" in row else "bf16", arch)
        for kernel in KERNELS.values()
        for beginning, extra in kernel.rows.items()
        for row in launch.TABLE[arch]
        if row.startswith(beginning)
        for constants in extra
    ]


def compiled(case: Case, module: ModuleType | None = None, target: int = 0, **changed: Any):
    """Compile a case, or that of another copy of its module or for another architecture (`target`); `changed` replaces
    constants or launch parameters.
    """
    from gpu_without_gpu.triton_aot import compile_aot

    from jz3.kernels import launch

    kernel = KERNELS[case.kernel]
    module = module or importlib.import_module(f"jz3.kernels.{kernel.module}")
    constants = launch.TABLE[case.arch][case.row] | dict(case.constants) | changed
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    signature = {name: kind.replace("?", case.dtype) for name, kind in kernel.signature.items()}
    signature |= dict.fromkeys(constants, "constexpr")
    function = getattr(module, case.kernel)
    return compile_aot(
        function,
        {name: signature[name] for name in function.arg_names},
        constants,
        arch=target or case.arch,
        options=options | {"enable_fp_fusion": launch.fuses(case.row)},
        div16=kernel.aligned,
    )


def mutant(module: ModuleType, folder: Path, *changes: tuple[str, str]) -> ModuleType:
    """Load a copy of a kernel's module with its text changed, each change at exactly one place."""
    text = Path(str(module.__file__)).read_text(encoding="utf-8")
    for old, new in changes:
        assert text.count(old) == 1, (old, text.count(old))
        text = text.replace(old, new)
    path = folder / f"mutant_{module.__name__.rpartition('.')[2]}.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def measured(case: Case, target: int = 0) -> dict[str, Any]:
    """Return what a case takes, compiled for its or for another architecture."""
    resources = compiled(case, target=target).resources
    return {name: resources[name] for name in ("registers", "shared", "spills", "mma")}


def main() -> None:
    """Measure all cases and write their budgets."""
    from jz3.kernels import launch

    found = {}
    for arch in launch.TABLE:
        for case in shipped(arch):
            took = measured(case)
            print(case.name, took, flush=True)
            found[case.name] = {"registers": took["registers"], "shared": took["shared"]}
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    budgets["triton"] = found
    BUDGETS.write_text(json.dumps(budgets, indent=1) + "\n")


if __name__ == "__main__":
    main()

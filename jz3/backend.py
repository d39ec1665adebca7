"""Which implementation of an op runs, and why: cuda, triton, cpu, else the reference.

`JZ3_BACKEND` forces one: a back end's name for all ops that have it, or `op=backend` for single ones, comma
separated (`JZ3_BACKEND=cpu,sketch=reference`). A forced back end that can't run is an error.
"""

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jz3.errors import Jz3Error

logger = logging.getLogger(__name__)

BACKENDS = ("cuda", "triton", "cpu", "reference")
"""In the order of preference, except that compiled ones go before plain torch."""

OPS = {
    "signs": "signs",
    "segment_project": "segment_project",
    "sketch": "sketch",
    "sign_project": "sign_project",
    "ce_hidden_grad": "ce_hidden_grad",
    "encode": "encode",
    "decode": "encode",
    "score_topk": "score_topk",
    "score_codes": "score_checkpoints",
}
"""Op -> its module in `jz3.ops`."""


def _anything_goes(backend: str, arguments: tuple[Any, ...]) -> str:
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One op with its definition and its native implementations, all of one signature."""

    name: str
    reference: Callable[..., Any]
    native: dict[str, Callable[..., Any]]
    """Back end -> implementation; each is imported when it is first called."""
    example: Callable[[str], tuple[Any, ...]]
    """Device -> tiny arguments, on which a native implementation must agree with the reference."""
    exact: bool = False
    """The results are integers or defined bit for bit."""
    plain: frozenset[str] = frozenset()
    """Back ends whose implementation is plain torch and needs nothing compiled."""
    unsupported: Callable[[str, tuple[Any, ...]], str] = field(default=_anything_goes)
    """(back end, arguments) -> why this back end can't take them, or an empty string."""


_ops: dict[str, Op] = {}
_choices: dict[tuple[str, str, str, int], tuple[str, str]] = {}
_obstacles: dict[tuple[str, str, str, bool, int], str] = {}
_said: set[str] = set()


def register(op: Op) -> None:
    """Make an op known; its module does so when it is imported."""
    _ops[op.name] = op


def call(name: str, *arguments: Any) -> Any:
    """Run an op on the best back end for its arguments.

    Raises:
        Jz3Error: `JZ3_BACKEND` forces a back end that can't run.
    """
    op, device = _ops[name], _device(arguments)
    with _current_device(arguments):
        backend, _ = choose(name, device)
        refused = []
        while backend != "reference" and (reason := op.unsupported(backend, arguments)):
            if forced(name):
                raise Jz3Error(
                    f"JZ3_BACKEND forces {backend} for {name}, which can't take these arguments: {reason}"
                )
            refused.append(f"{backend} can't take {reason}")
            candidates = (*_candidates(op, device), "reference")
            later = candidates[candidates.index(backend) + 1 :]
            backend = next(b for b in later if not _obstacle(name, b, device, wanted=False))
        if refused:
            _say_once(logging.INFO, f"{name} on {device} runs on {backend} where {', '.join(refused)}")
        return implementation(name, backend)(*arguments)


def implementation(name: str, backend: str) -> Callable[..., Any]:
    """Return an op's implementation for a back end, whether it can run here or not."""
    op = _ops[name]
    return op.reference if backend == "reference" else op.native[backend]


def choose(name: str, device: str = "cpu") -> tuple[str, str]:
    """Return the back end that runs an op on a device (`cpu` or `cuda`), and why.

    The first call for an op checks the candidate against the reference on a tiny input. `cuda` is the current GPU;
    a machine's may differ, so that each is asked for itself.

    Raises:
        Jz3Error: `JZ3_BACKEND` is malformed or forces a back end that can't run.
    """
    wanted = forced(name)
    key = (name, device, wanted, _gpu(device))
    if key not in _choices:
        _choices[key] = _forced_choice(name, device, wanted) if wanted else _best_choice(name, device)
        chosen, reason = _choices[key]
        better = {"cpu"} if device == "cpu" else {"cuda", "triton"}
        loud = chosen == "reference" and not wanted and bool(better & set(_ops[name].native))
        _say_once(logging.WARNING if loud else logging.INFO, f"{name} on {device} runs on {chosen}: {reason}")
    return _choices[key]


def place(name: str, device: str) -> str:
    """Return where an op runs for a device: what only the CPU has an implementation of is done there and brought."""
    return "cpu" if set(_ops[name].native) == {"cpu"} else device


def forced(name: str) -> str:
    """Return the back end that `JZ3_BACKEND` forces for an op, or an empty string.

    Raises:
        Jz3Error: `JZ3_BACKEND` names an unknown op or back end.
    """
    general = special = ""
    for item in filter(None, (part.strip() for part in os.environ.get("JZ3_BACKEND", "").split(","))):
        op, _, backend = item.rpartition("=")
        if backend not in BACKENDS or (op and op not in OPS):
            raise Jz3Error(
                f"JZ3_BACKEND has {item!r}; expected one of {', '.join(BACKENDS)}, or op=backend "
                f"with one of {', '.join(OPS)}"
            )
        if op == name:
            special = backend
        elif not op and (backend == "reference" or name not in _ops or backend in _ops[name].native):
            general = backend
    return special or general


def _forced_choice(name: str, device: str, wanted: str) -> tuple[str, str]:
    reason = _obstacle(name, wanted, device, wanted=True)
    if reason:
        raise Jz3Error(f"JZ3_BACKEND forces {wanted} for {name} on {device}, which can't run: {reason}")
    return wanted, "forced by JZ3_BACKEND"


def _candidates(op: Op, device: str) -> tuple[str, ...]:
    """Return the native back ends of a device, compiled ones before plain torch."""
    known = ("cpu",) if device == "cpu" else ("cuda", "triton")
    return tuple(sorted(known, key=lambda backend: backend in op.plain))


def _best_choice(name: str, device: str) -> tuple[str, str]:
    passed_over = []
    for backend in _candidates(_ops[name], device):
        reason = _obstacle(name, backend, device, wanted=False)
        if not reason:
            return backend, "; ".join(["agrees with the reference", *passed_over])
        passed_over.append(f"not {backend}: {reason}")
    return "reference", "; ".join(passed_over)


def _obstacle(name: str, backend: str, device: str, *, wanted: bool) -> str:
    """Return why a back end can't run an op on a device, or an empty string; found out once for each GPU."""
    key = (name, backend, device, wanted, _gpu(device))
    if key not in _obstacles:
        _obstacles[key] = _find_obstacle(name, backend, device, wanted)
    return _obstacles[key]


def _find_obstacle(name: str, backend: str, device: str, wanted: bool) -> str:
    op = _ops[name]
    if backend == "reference":
        return ""
    if backend not in op.native:
        return "it has no implementation"
    interpreted = backend == "triton" and wanted and os.environ.get("TRITON_INTERPRET") == "1"
    if device != ("cpu" if backend == "cpu" else "cuda") and not interpreted:
        return f"the tensors are on {device}"
    if backend not in op.plain:
        missing = {"cpu": extension_missing, "cuda": cuda_missing, "triton": triton_missing}[backend]()
        if missing:
            return missing
    return _self_check(op, backend, device)


def _self_check(op: Op, backend: str, device: str) -> str:
    """Compare a native implementation with the reference on a tiny input."""
    arguments = op.example(device)
    try:
        difference = _difference(op.native[backend](*arguments), op.reference(*arguments), op.exact)
    except Exception as error:  # whatever a back end dies of, the reference still runs, and the user is told
        difference = f"{type(error).__name__}: {error}"
    if difference:
        logger.warning("%s on %s failed its check against the reference: %s", op.name, backend, difference)
        return f"failed its check against the reference ({difference:.200})"
    return ""


def _difference(got: Any, expected: Any, exact: bool) -> str:
    if isinstance(expected, tuple):
        return next(filter(None, (_difference(g, e, exact) for g, e in zip(got, expected, strict=True))), "")
    import torch

    got, expected = torch.as_tensor(_signed(got)).cpu(), torch.as_tensor(_signed(expected)).cpu()
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"{got.dtype} {tuple(got.shape)} instead of {expected.dtype} {tuple(expected.shape)}"
    if exact:
        return "" if torch.equal(got, expected) else "the results differ"
    error = float((got.double() - expected.double()).abs().max()) if got.numel() else 0.0
    share = 2e-2 if expected.dtype in (torch.bfloat16, torch.float16) else 1e-4
    allowed = share * float(expected.double().abs().max()) if got.numel() else 0.0
    return "" if error <= allowed else f"error {error:.3g}, allowed {allowed:.3g}"


def _signed(value: Any) -> Any:
    return value.view("int32") if getattr(value, "dtype", None) == "uint32" else value


def _device(arguments: tuple[Any, ...]) -> str:
    first = _first_tensor(arguments)
    return "cpu" if first is None else first.device.type


def _first_tensor(arguments: tuple[Any, ...]) -> Any:
    return next((a for a in arguments if hasattr(a, "device") and hasattr(a, "dim")), None)


def _current_device(arguments: tuple[Any, ...]) -> AbstractContextManager[Any]:
    """Make the GPU of the arguments the current one: it is asked what it can run, and Triton launches there."""
    first = _first_tensor(arguments)
    if first is None or first.device.type != "cuda":
        return contextlib.nullcontext()
    import torch

    return torch.cuda.device(first.device)


def _gpu(device: str) -> int:
    """Return the number of the GPU that `cuda` stands for; 0 where there is none."""
    if device != "cuda":
        return 0
    import torch

    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def _say_once(level: int, message: str) -> None:
    if message not in _said:
        _said.add(message)
        logger.log(level, message)


@functools.cache
def _load(module: str) -> tuple[Any, str]:
    """Import a compiled extension; return it, or None and why not."""
    try:
        return importlib.import_module(f"jz3.{module}"), ""
    except ImportError as error:
        what = "not built" if isinstance(error, ModuleNotFoundError) else f"built, but not loadable: {error}"
        note = Path(__file__).with_name("build_note.txt")
        lines = note.read_text(encoding="utf-8").splitlines() if note.is_file() else []
        why = next((line.partition(": ")[2] for line in lines if line.startswith(f"jz3.{module} ")), "")
        return None, f"jz3.{module} is {what}" + (f" ({why})" if why else "")


def extension() -> Any:
    """Return the compiled CPU extension.

    Raises:
        Jz3Error: it isn't there; the message says why.
    """
    module, missing = _load("_C")
    if module is None:
        raise Jz3Error(missing)
    return module


def extension_missing() -> str:
    """Return why the compiled CPU extension can't be used, or an empty string."""
    return _load("_C")[1]


def threads() -> int:
    """Return how many threads a compiled op may use: torch's number."""
    import torch

    return torch.get_num_threads()


def cuda_extension() -> Any:
    """Return the compiled CUDA extension.

    Raises:
        Jz3Error: it isn't there; the message says why.
    """
    module, missing = _load("_cuda")
    if module is None:
        raise Jz3Error(missing)
    return module


def cuda_missing() -> str:
    """Return why the compiled CUDA extension can't be used, or an empty string."""
    import torch

    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    module, missing = _load("_cuda")
    if module is None:
        return missing
    major, minor = torch.cuda.get_device_capability()
    if not module.runs_on(major, minor):
        return f"jz3._cuda is built for {', '.join(module.archs())}, the device is sm_{major}{minor}"
    return ""


def triton_missing() -> str:
    """Return why Triton kernels can't run, or an empty string."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    import torch

    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


def report(device: str = "") -> dict[str, Any]:
    """Return which back end runs each op and why, for manifests and `jz3 doctor`.

    Args:
        device: `cpu` or `cuda`; by default the best there is.

    Raises:
        Jz3Error: `JZ3_BACKEND` forces a back end that can't run.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    ops = {}
    for name, module in OPS.items():
        importlib.import_module(f"jz3.ops.{module}")
        chosen, reason = choose(name, place(name, device))
        ops[name] = {"backend": chosen, "reason": reason}
    features = extension().cpu_features() if not extension_missing() else extension_missing()
    return {
        "device": device,
        "forced": os.environ.get("JZ3_BACKEND", ""),
        "ops": ops,
        "cpu": features,
        "cuda": cuda_missing() or "usable",
        "triton": triton_missing() or "usable",
    }

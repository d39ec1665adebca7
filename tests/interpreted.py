"""What the interpreted tests share; imported in a process with TRITON_INTERPRET=1, read when kernels are decorated."""

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch
from gpu_without_gpu import triton_interpreter

assert os.environ.get("TRITON_INTERPRET") == "1"

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
triton_interpreter.install()  # without its patch the interpreter computes on bf16's bits


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Refuse every access of a kernel outside the tensors it is given, and poison what `torch.empty` makes."""
    from triton.runtime.interpreter import GridExecutor

    launch, empty = GridExecutor.__call__, torch.empty

    def guarded_launch(self, *arguments, **options):
        given = (x for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor))
        with triton_interpreter.guard(*given):
            return launch(self, *arguments, **options)

    def poisoned(*arguments, **options):
        out = empty(*arguments, **options)
        return out.fill_(float("nan") if out.is_floating_point() else 77)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", guarded_launch)
        patch.setattr(torch, "empty", poisoned)
        yield


def far_apart(rows: torch.Tensor) -> torch.Tensor:
    """Return the same rows 2^30 numbers apart: the third lies beyond what 32 bits can address."""
    stride = (1 << 30) + 16
    buffer = torch.empty(stride * (len(rows) - 1) + rows.shape[1], dtype=rows.dtype)
    return buffer.as_strided(rows.shape, (stride, 1)).copy_(rows)

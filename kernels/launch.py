"""Block sizes, warps and pipeline stages of every kernel: one table per architecture, nothing tuned at run time.

A row is named kernel/case; the kernel's module says which case an input is. The tests compile every row for its
architecture and hold its registers and shared memory to a budget. Devices of other architectures take the rows of
sm_80, whose blocks need at most 99 KB of shared memory, what every GPU since then has.
"""

from typing import Any

import torch

_SM80: dict[str, dict[str, int]] = {
    "segment_project/half/small": {"BT": 64, "BO": 64, "BQ": 32, "BI": 32, "num_warps": 4, "num_stages": 3},
    "segment_project/half/medium": {"BT": 64, "BO": 64, "BQ": 64, "BI": 64, "num_warps": 4, "num_stages": 3},
    "segment_project/half/tall": {"BT": 32, "BO": 64, "BQ": 128, "BI": 32, "num_warps": 8, "num_stages": 3},
    "segment_project/half/large": {"BT": 32, "BO": 64, "BQ": 64, "BI": 128, "num_warps": 8, "num_stages": 3},
    "segment_project/float/small": {"BT": 32, "BO": 16, "BQ": 32, "BI": 32, "num_warps": 4, "num_stages": 3},
    "segment_project/float/medium": {"BT": 32, "BO": 16, "BQ": 64, "BI": 64, "num_warps": 8, "num_stages": 3},
    "segment_sum/any": {"B": 1024, "num_warps": 4, "num_stages": 1},
    "sign_bits/any": {"B": 128, "num_warps": 4, "num_stages": 1},
    "sign_project/half/16": {"BM": 16, "BN": 64, "num_warps": 4, "num_stages": 3},
    "sign_project/half/64": {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 3},
    "sign_project/half/128": {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 3},
    "sign_project/float/16": {"BM": 16, "BN": 64, "num_warps": 4, "num_stages": 3},
    "sign_project/float/128": {"BM": 32, "BN": 64, "num_warps": 8, "num_stages": 3},
    "ce_exp/half": {"BT": 128, "BV": 128, "BD": 64, "num_warps": 8, "num_stages": 3},
    "ce_exp/float": {"BT": 64, "BV": 64, "BD": 32, "num_warps": 8, "num_stages": 2},
    "ce_loss/any": {"BT": 32, "B": 64, "num_warps": 4, "num_stages": 1},
    "ce_grad/half": {"BT": 128, "BK": 32, "BD": 128, "num_warps": 8, "num_stages": 3},
    "ce_grad/float": {"BT": 64, "BK": 32, "BD": 64, "num_warps": 8, "num_stages": 2},
    "score_codes/wide/32": {"BN": 128, "BC": 32, "BK": 64, "num_warps": 8, "num_stages": 3},
    "score_codes/wide/128": {"BN": 128, "BC": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
    "score_codes/narrow/32": {"BN": 128, "BC": 32, "BK": 32, "num_warps": 4, "num_stages": 2},
    "score_codes/narrow/128": {"BN": 128, "BC": 128, "BK": 32, "num_warps": 8, "num_stages": 2},
    "encode/any": {"BN": 4, "BB": 256, "num_warps": 4, "num_stages": 1},
    "decode/any": {"BN": 4, "BK": 512, "num_warps": 4, "num_stages": 1},
    "sketch/any": {"BS": 4, "BB": 256, "num_warps": 8, "num_stages": 1},
}

_SM90 = _SM80 | {
    "segment_project/half/large": {"BT": 32, "BO": 64, "BQ": 128, "BI": 128, "num_warps": 8, "num_stages": 3},
    "ce_grad/half": {"BT": 128, "BK": 64, "BD": 256, "num_warps": 8, "num_stages": 3},
}

_SM100 = _SM90 | {
    "ce_grad/half": {"BT": 128, "BK": 64, "BD": 128, "num_warps": 8, "num_stages": 3},
}

TABLE: dict[int, dict[str, dict[str, int]]] = {80: _SM80, 90: _SM90, 100: _SM100}
"""Architecture -> kernel/case -> block sizes, `num_warps` and `num_stages`."""


def architecture(device: torch.device) -> int:
    """Return which table a device takes."""
    if device.type != "cuda":
        return 80
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100}.get(major, 80)


EXACT = ("encode/", "decode/", "score_codes/")
"""Rows of kernels whose results are defined bit for bit: no multiplication is fused with an addition."""


def parameters(case: str, device: torch.device) -> dict[str, Any]:
    """Return the launch parameters of a kernel's case on a device."""
    return {**TABLE[architecture(device)][case], "enable_fp_fusion": fuses(case)}


def fuses(case: str) -> bool:
    """Tell whether a case's multiplications may be fused with additions."""
    return not case.startswith(EXACT)


def kind(dtype: torch.dtype) -> str:
    """Return the part of a case's name that says how wide the numbers are."""
    return "float" if dtype == torch.float32 else "half"

"""Dispatch: loud, forced or by preference, and never on a back end that disagrees with the reference."""

import importlib
import logging
import sys

import pytest
import torch

from jz3 import backend
from jz3.errors import Jz3Error
from jz3.ops.signs import sign_bits
from jz3.ops.sketch import sketch


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_choices", {})
    monkeypatch.setattr(backend, "_obstacles", {})
    monkeypatch.setattr(backend, "_said", set())
    monkeypatch.delenv("JZ3_BACKEND", raising=False)


def spoil(monkeypatch: pytest.MonkeyPatch, name: str, function) -> None:
    op = backend._ops[name]
    broken = backend.Op(
        name=name,
        reference=op.reference,
        native={"cpu": function},
        example=op.example,
        plain=frozenset({"cpu"}),
    )
    monkeypatch.setitem(backend._ops, name, broken)


def test_report_names_a_back_end_and_a_reason_for_every_op() -> None:
    report = backend.report("cpu")
    assert set(report["ops"]) == set(backend.OPS)
    assert all(op["backend"] in backend.BACKENDS and op["reason"] for op in report["ops"].values())


def test_what_only_the_cpu_can_do_is_done_there_for_a_gpu() -> None:
    assert backend.place("signs", "cuda") == backend.place("signs", "cpu") == "cpu"
    assert backend.place("sketch", "cuda") == "cuda"


def test_compiled_ops_are_preferred() -> None:
    if backend.extension_missing():
        pytest.skip(backend.extension_missing())
    ops = backend.report("cpu")["ops"]
    for name in ("signs", "sketch", "sign_project", "encode", "decode", "score_topk"):
        assert ops[name]["backend"] == "cpu", ops[name]


def test_the_choice_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "jz3.backend"):
        for _ in range(3):
            sketch(torch.ones(1, 3), "m", 2, seed=0)
    assert [r.message for r in caplog.records if r.message.startswith("sketch on cpu runs on")] and len(
        caplog.records
    ) == 1


@pytest.mark.parametrize(
    "wrong", [lambda *a: torch.zeros(3, 37), lambda *a: torch.zeros(1), lambda *a: 1 / 0]
)
def test_a_wrong_native_op_is_not_used(
    wrong, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(monkeypatch, "sketch", wrong)
    with caplog.at_level(logging.WARNING, "jz3.backend"):
        assert backend.choose("sketch")[0] == "reference"
    assert any("failed its check against the reference" in r.message for r in caplog.records)
    monkeypatch.setenv("JZ3_BACKEND", "cpu")
    with pytest.raises(Jz3Error, match="JZ3_BACKEND forces cpu for sketch.*failed its check"):
        sketch(torch.ones(1, 3), "m", 2, seed=0)


def test_forcing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JZ3_BACKEND", "reference")
    assert backend.report("cpu")["ops"]["sketch"] == {
        "backend": "reference",
        "reason": "forced by JZ3_BACKEND",
    }
    monkeypatch.setenv("JZ3_BACKEND", "triton, ce_hidden_grad=reference")
    assert backend.forced("sketch") == "triton" and backend.forced("ce_hidden_grad") == "reference"


@pytest.mark.parametrize("value", ["gpu", "sketch=fast", "nosuchop=cpu", "cpu,"])
def test_malformed_forcing_is_an_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JZ3_BACKEND", value)
    if value == "cpu,":
        assert backend.forced("sketch") == "cpu"
        return
    with pytest.raises(Jz3Error, match="JZ3_BACKEND has"):
        backend.report("cpu")


def test_a_forced_back_end_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JZ3_BACKEND", "triton")
    with pytest.raises(Jz3Error, match="JZ3_BACKEND forces triton for sketch on cpu"):
        sketch(torch.ones(1, 3), "m", 2, seed=0)
    assert sign_bits(0, "m", 2, 128).shape == (2, 4)  # has no back end but the CPU's
    monkeypatch.setenv("JZ3_BACKEND", "sketch=cuda")
    with pytest.raises(
        Jz3Error, match="JZ3_BACKEND forces cuda for sketch on cpu, which can't run: it has no implementation"
    ):
        sketch(torch.ones(1, 3), "m", 2, seed=0)
    monkeypatch.setenv("JZ3_BACKEND", "sketch=cpu")
    if not backend.extension_missing():
        with pytest.raises(Jz3Error, match="can't take these arguments: float64"):
            sketch(torch.ones(1, 3, dtype=torch.float64), "m", 2, seed=0)


def test_without_the_extension_the_reference_runs_loudly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend, "_load", lambda module: (None, f"jz3.{module} is not built (no compiler)"))
    with caplog.at_level(logging.WARNING, "jz3.backend"):
        expected = sketch(torch.ones(1, 3), "m", 2, seed=0)
    assert "sketch on cpu runs on reference" in caplog.text and "no compiler" in caplog.text
    assert expected.shape == (1, 2)
    with pytest.raises(Jz3Error, match="not built"):
        backend.extension()


def test_a_second_gpu_is_made_the_current_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current one, whose memory the tensors may not be in."""

    class OnSecond:
        device = torch.device("cuda:1")

        def dim(self) -> int:
            return 1

    current = []

    class Current:
        def __init__(self, device: torch.device) -> None:
            current.append(device)

        def __enter__(self) -> None:
            pass

        def __exit__(self, *error: object) -> None:
            current.append(None)

    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(backend, "choose", lambda name, device: ("triton", ""))
    op = backend.Op(
        name="sketch",
        reference=lambda *a: None,
        native={"triton": lambda *a: list(current)},
        example=lambda device: (),
    )
    monkeypatch.setitem(backend._ops, "sketch", op)
    assert backend.call("sketch", OnSecond(), 3) == [torch.device("cuda:1")]
    assert current == [torch.device("cuda:1"), None]
    assert backend.call("sketch", torch.zeros(1), 3) == current


def test_each_gpu_is_asked_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled kernels aren't built for the second one; nothing is tried on the first in its place."""
    capabilities, current, tried = [(9, 0), (12, 0)], [0], []

    class On:
        def __init__(self, number: int) -> None:
            self.device = torch.device("cuda", number)

        def dim(self) -> int:
            return 1

    class Current:
        def __init__(self, device: torch.device) -> None:
            self.number = device.index

        def __enter__(self) -> None:
            current.append(self.number)

        def __exit__(self, *error: object) -> None:
            current.pop()

    class Module:
        @staticmethod
        def runs_on(major: int, minor: int) -> bool:
            return (major, minor) == (9, 0)

        @staticmethod
        def archs() -> list[str]:
            return ["90a"]

    def native(name: str):
        def run(*arguments: object) -> torch.Tensor:
            tried.append((name, current[-1], "call" if arguments else "check"))
            return torch.ones(1)

        return run

    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capabilities[current[-1]])
    monkeypatch.setattr(backend, "_load", lambda module: (Module, ""))
    monkeypatch.setattr(backend, "triton_missing", lambda: "")
    op = backend.Op(
        name="sketch",
        reference=lambda: torch.ones(1),
        native={name: native(name) for name in ("cuda", "triton")},
        example=lambda device: (),
    )
    monkeypatch.setitem(backend._ops, "sketch", op)
    for number in (1, 0, 1):
        backend.call("sketch", On(number))
    assert tried == [
        ("triton", 1, "check"),
        ("triton", 1, "call"),
        ("cuda", 0, "check"),
        ("cuda", 0, "call"),
        ("triton", 1, "call"),
    ]


def test_importing_ops_imports_no_torch() -> None:
    import subprocess

    names = ", ".join(f"jz3.ops.{m}" for m in set(backend.OPS.values()))
    code = f"import sys, jz3, jz3.backend, jz3.doctor, {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd="/").returncode == 0


def test_doctor_reports_every_kind_of_thing() -> None:
    doctor = importlib.import_module("jz3.doctor")
    checks = doctor.report()
    names = [check.name for check in checks]
    assert len(names) == len(set(names))
    for expected in (
        "python",
        "memory",
        "torch",
        "triton",
        "jz3._C",
        "op sketch",
        "sandbox",
        "embedded model",
    ):
        assert expected in names
    assert all(check.status in ("ok", "info", "missing") and check.found for check in checks)
    assert all(check.remedy for check in checks if check.status == "missing")

"""What `auto` stands for: settled once, before a run is made."""

import dataclasses

import pytest

from jz3 import machine
from jz3.config import settled, shipped_recipe
from jz3.models import ModelConfig


@pytest.fixture(params=[True, False], ids=["fast", "slow"])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    for module in ("jz3.machine", "jz3.training.config"):
        monkeypatch.setattr(f"{module}.fast_bfloat16", lambda: request.param)
    return request.param


def test_auto_becomes_what_the_machine_is_fast_in(fast: bool) -> None:
    recipe = settled(shipped_recipe("quickstart"))
    assert recipe.model.dtype == ("bfloat16" if fast else "float32")
    for settings in (recipe.comparison.train, recipe.synthesiser, recipe.training):
        assert settings.precision == ("mixed" if fast else "float32")
    assert settled(recipe) == recipe


def test_what_is_stated_stays(fast: bool) -> None:
    recipe = shipped_recipe("paper-7b")
    assert settled(recipe).model.dtype == "bfloat16"
    assert settled(recipe).training.precision == settled(recipe).synthesiser.precision == "mixed"
    stated = dataclasses.replace(recipe, model=ModelConfig(name="tiny", dtype="float32"))
    assert settled(stated).model.dtype == "float32"


@pytest.mark.parametrize(
    ("amx", "instructions", "vendor", "expected"),
    [
        (True, True, "GenuineIntel", True),
        (False, True, "AuthenticAMD", True),
        (False, True, "GenuineIntel", False),
        (False, False, "AuthenticAMD", False),
    ],
)
def test_the_rule_for_cpus(
    amx: bool, instructions: bool, vendor: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(machine, "_cpu_info", lambda: f"vendor_id : {vendor}")
    machine.fast_bfloat16_cpu.cache_clear()
    assert machine.fast_bfloat16_cpu() is expected
    machine.fast_bfloat16_cpu.cache_clear()

"""Settings of a training are checked, and its batches are what they say."""

import subprocess
import sys

import pytest

from jz3.training import SynthesiserConfig, TrainSettings
from jz3.training.run import accumulation


@pytest.mark.parametrize(
    "change, named",
    [
        ({"method": "qlora"}, "method"),
        ({"precision": "bfloat16"}, "precision"),
        ({"schedule": "linear"}, "schedule"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"warmup": 0.9}, "stable_until"),
        ({"epochs": 0}, "epochs"),
        ({"max_length": 1}, "max_length"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
    ],
)
def test_bad_settings_are_named(change, named):
    with pytest.raises(ValueError, match=named):
        TrainSettings(**change)


def test_bad_boost_is_named():
    with pytest.raises(ValueError, match="boost"):
        SynthesiserConfig(boost="twice")


def test_importing_the_settings_imports_no_torch():
    code = "import sys, jz3.training; sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_global_batch_is_what_the_settings_say():
    settings = TrainSettings(batch_packs=512, packs_at_once=4)
    assert accumulation(settings, 1) == 128
    assert accumulation(settings, 8) == 16
    with pytest.raises(ValueError, match=r"batch_packs \(512\) must be a multiple of 3 processes x 4"):
        accumulation(settings, 3)

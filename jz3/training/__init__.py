"""Training: packed, isolated, resumable; the synthesiser and the two-stage mixture."""

from jz3.training.config import SynthesiserConfig, TrainingConfig, TrainSettings
from jz3.training.packing import Phase
from jz3.training.run import TrainSummary, train
from jz3.training.stages import run_synthesiser, run_training

__all__ = [
    "Phase",
    "SynthesiserConfig",
    "TrainSettings",
    "TrainSummary",
    "TrainingConfig",
    "run_synthesiser",
    "run_training",
    "train",
]

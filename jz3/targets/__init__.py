"""Targets: the problems the model is to get better at, and what goes with them."""

from jz3.targets.config import ControlConfig, InstructionConfig, TargetsConfig, TaskConfig
from jz3.targets.stage import clean_solution, refuse_parquet, run

__all__ = [
    "ControlConfig",
    "InstructionConfig",
    "TargetsConfig",
    "TaskConfig",
    "clean_solution",
    "refuse_parquet",
    "run",
]

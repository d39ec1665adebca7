"""Evaluation: the base model against the trained one, in natural language and with tools."""

from jz3.evaluation.benchmarks import load_benchmark
from jz3.evaluation.config import BenchmarkConfig, EvaluationConfig
from jz3.evaluation.nll import mean_nll
from jz3.evaluation.stage import run

__all__ = ["BenchmarkConfig", "EvaluationConfig", "load_benchmark", "mean_nll", "run"]

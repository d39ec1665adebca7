"""Text generation behind one small protocol: transformers, vLLM, any OpenAI-compatible endpoint."""

from jz3.engines.base import Engine, EngineConfig, Generation, Request, Sampling
from jz3.engines.on_demand import open_engine

__all__ = ["Engine", "EngineConfig", "Generation", "Request", "Sampling", "open_engine"]

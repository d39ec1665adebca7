"""Copies of a model share the requests out; what ends one of them is told."""

import multiprocessing
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from echo_engine import Echo

from jz3.engines import EngineConfig, Request, Sampling, open_engine
from jz3.engines.copies import Copies
from jz3.errors import Jz3Error

CONFIG = EngineConfig(name="vllm", data_parallel=2, tensor_parallel=2)
REQUESTS = [Request(id=str(i), prompt=f"{i} ") for i in range(5)]


def open_copies(monkeypatch: pytest.MonkeyPatch, dtype: str = "float32") -> Copies:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    return Copies(CONFIG, Path("model"), dtype, Echo)


def test_requests_are_shared_out_and_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_copies(monkeypatch)
    try:
        assert engine.info() == {"name": "echo", "parallel": 1, "copies": 2}
        for count in (5, 1, 0):
            found = engine.generate(REQUESTS[:count], Sampling())
            assert [g.id for g in found] == [r.id for r in REQUESTS[:count]]
            assert [g.text for g in found] == ["0 4,5", "1 6,7", "2 4,5", "3 6,7", "4 4,5"][:count]
    finally:
        engine.close()


@pytest.mark.parametrize(("stop", "told"), [("kill", "copy 2 of 2 .* was killed"), ("fail", "no more")])
def test_a_copy_that_ends_is_told(monkeypatch: pytest.MonkeyPatch, stop: str, told: str) -> None:
    engine = open_copies(monkeypatch)
    try:
        with pytest.raises(Jz3Error, match=told):
            engine.generate(REQUESTS, Sampling(stop=(stop,)))
    finally:
        engine.close()


def test_copies_that_cannot_be_opened_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Jz3Error, match="the model is broken"):
        open_copies(monkeypatch, "broken")
    assert not multiprocessing.active_children()  # of the copy that was opened
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(Jz3Error, match="need 4 GPUs, there are 3; lower data_parallel"):
        open_engine(CONFIG, Path("model"))
    with pytest.raises(ValueError, match="data_parallel must be at least 1, got 0"):
        EngineConfig(data_parallel=0)


def test_what_vllm_raises_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its engine's process ends for want of memory with errors of its own."""

    class EngineDead(Exception):
        pass

    class Llm:
        def __init__(self, **options: Any) -> None:
            if options["dtype"] == "bfloat16":
                raise RuntimeError("Engine core initialization failed.")
            config = types.SimpleNamespace(model_config=types.SimpleNamespace(max_model_len=100))
            self.llm_engine = types.SimpleNamespace(vllm_config=config)

        def get_tokenizer(self) -> Any:
            return lambda text, verbose: types.SimpleNamespace(input_ids=[1, 2])

        def generate(self, *_: Any, **__: Any) -> Any:
            raise EngineDead("EngineCore encountered an issue.")

    module = types.ModuleType("vllm")
    module.LLM = Llm  # pyright: ignore[reportAttributeAccessIssue]
    module.SamplingParams = module.TokensPrompt = dict  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "vllm", module)
    for name in (
        "VLLM_NO_USAGE_STATS",
        "VLLM_CPU_KVCACHE_SPACE",
        "VLLM_CPU_OMP_THREADS_BIND",
        "OMP_NUM_THREADS",
    ):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    config = EngineConfig(name="vllm")
    with pytest.raises(Jz3Error, match="could not open the model: RuntimeError: Engine core .*gpu_memory"):
        open_engine(config, Path("model"), "bfloat16")
    engine = open_engine(config, Path("model"), "float32")
    monkeypatch.setattr("jz3.engines.vllm_engine.prompt_ids", lambda tokenizer, prompt: [1, 2])
    with pytest.raises(Jz3Error, match="broke down .* EngineDead: EngineCore .* what is finished is kept"):
        engine.generate(REQUESTS, Sampling())

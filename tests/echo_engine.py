"""An engine that other processes open, which import it by its name."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jz3.engines import EngineConfig, Generation, Request, Sampling
from jz3.errors import Jz3Error


class Echo:
    """Says which GPUs it has."""

    def __init__(self, config: EngineConfig, model: Path, dtype: str) -> None:
        if dtype == "broken" and os.environ["CUDA_VISIBLE_DEVICES"] == "6,7":
            raise Jz3Error("the model is broken")
        self.config = config

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
        if sampling.stop == ("kill",) and requests[0].id == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        if sampling.stop == ("fail",):
            raise RuntimeError("no more")
        devices = os.environ["CUDA_VISIBLE_DEVICES"]
        return [
            Generation(id=r.id, text=r.prompt + devices, finish="stop", prompt_tokens=1, new_tokens=1)
            for r in requests
        ]

    def info(self) -> dict[str, Any]:
        return {"name": "echo", "parallel": self.config.data_parallel}

    def close(self) -> None:
        pass

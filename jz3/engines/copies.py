"""Copies of a model, each in a process with GPUs of its own, that share out the requests."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from jz3.engines.base import Engine, EngineConfig, Generation, Request, Sampling
from jz3.errors import Jz3Error
from jz3.processes import end_with

PATIENCE = 60.0
"""Seconds that the copies may take to end."""


class Copies:
    """Continues prompts with `data_parallel` copies of a model, each on `tensor_parallel` GPUs.

    A model that one GPU holds writes several times as much on eight GPUs in eight copies as in one that
    has to exchange activations within every layer.

    Args:
        config: of each copy, and how many there are.
        model: the model's folder.
        dtype: of its weights.
        make: opens one copy; it is called in the copy's process.

    Raises:
        Jz3Error: there are too few GPUs, or a copy could not be opened.
    """

    def __init__(self, config: EngineConfig, model: Path, dtype: str, make: Callable[..., Engine]) -> None:
        each, count = config.tensor_parallel, config.data_parallel
        visible = gpus()
        if len(visible) < each * count:
            raise Jz3Error(
                f"{count} copies of the model on {each} GPUs each need {each * count} GPUs, there are {len(visible)}; "
                "lower data_parallel"
            )
        alone = dataclasses.replace(config, data_parallel=1)
        context = get_context("spawn")
        self._copies: list[tuple[Any, Any]] = []
        with contextlib.ExitStack() as unless_all_open:
            unless_all_open.callback(self.close)
            for i in range(count):
                ours, theirs = context.Pipe()
                devices = ",".join(visible[i * each : (i + 1) * each])
                arguments = (theirs, make, alone, model, dtype, devices, os.getpid())
                process = context.Process(target=_serve, args=arguments)
                process.start()
                theirs.close()
                self._copies.append((process, ours))
            self._info = [self._receive(i) for i in range(count)][0] | {"copies": count}
            unless_all_open.pop_all()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
        """Continue every request's prompt; one Generation per request, in order."""
        count = len(self._copies)
        for i, (_, pipe) in enumerate(self._copies):
            with contextlib.suppress(OSError):  # one that has ended is told by what it doesn't answer
                pipe.send((list(requests[i::count]), sampling))
        results: list[Any] = [None] * len(requests)
        for i in range(count):
            results[i::count] = self._receive(i)
        return results

    def _receive(self, number: int) -> Any:
        try:
            answer = self._copies[number][1].recv()
        except (EOFError, OSError) as error:
            raise Jz3Error(
                f"copy {number + 1} of {len(self._copies)} of the model was killed, for want of memory perhaps; see "
                "its messages above, and run again: what is finished is kept"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def info(self) -> dict[str, Any]:
        """What a copy says of itself, and how many there are."""
        return self._info

    def close(self) -> None:
        """End the copies."""
        for _, pipe in self._copies:
            pipe.close()
        end = time.monotonic() + PATIENCE
        for process, _ in self._copies:
            process.join(max(end - time.monotonic(), 0.0))
            if process.is_alive():
                process.kill()
                process.join()
        self._copies = []


def gpus() -> list[str]:
    """Return the names of the GPUs that this process may use, without opening one."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]


def _serve(
    pipe: Any,
    make: Callable[..., Engine],
    config: EngineConfig,
    model: Path,
    dtype: str,
    devices: str,
    parent: int,
) -> None:
    """Answer requests until the other end of the pipe is closed."""
    if not end_with(parent):
        os._exit(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = devices
    try:
        with contextlib.closing(make(config, model, dtype)) as engine:
            pipe.send(engine.info())
            while True:
                pipe.send(engine.generate(*pipe.recv()))
    except (EOFError, BrokenPipeError):
        return
    except (Jz3Error, ValueError) as error:
        pipe.send(error)
    except Exception as error:
        pipe.send(Jz3Error(f"a copy of the model failed: {type(error).__name__}: {error}"))

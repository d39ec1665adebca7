"""Generation through any endpoint that speaks OpenAI's completions protocol with raw prompts."""

import asyncio
import ipaddress
import logging
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from jz3.engines.base import EngineConfig, Generation, Request, Sampling
from jz3.engines.text import cut_at_stop, versions, whole_characters
from jz3.errors import Jz3Error

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

SEED_LIMIT = 1 << 31
"""Servers take seeds of different widths; all take 31 bits."""


MOST_REFUSED = 0.02
"""Share of the requests of a call that an endpoint may refuse, for what a prompt holds perhaps; at least one of ten."""

log = logging.getLogger(__name__)


class _Refused(Jz3Error):
    """An endpoint answers others, but not this request."""


class OpenAIEngine:
    """Continues prompts by `/v1/completions`, as many requests in flight as the batch size says.

    A request's seed is sent along, but few servers repeat an answer under another load. Connection
    errors, time-outs, rate limits and server errors are retried with growing pauses by the client.
    """

    def __init__(self, config: EngineConfig) -> None:
        if not config.base_url:
            raise ValueError("engine 'openai' needs base_url, e.g. http://127.0.0.1:8000/v1")
        if not config.model:
            raise ValueError("engine 'openai' needs model, the name under which the endpoint serves it")
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise Jz3Error("engine 'openai' needs the package openai: pip install 'jz3[teacher]'") from error
        self._config = config
        self._url = shown_url(config.base_url)
        self._local = is_local(config.base_url)
        self._key = os.environ.get(config.api_key_env, "")
        if not self._key and not self._local:
            raise Jz3Error(
                f"{self._url} needs a key: set the environment variable {config.api_key_env} "
                "(or name another one in api_key_env)"
            )

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
        """Continue every request's prompt; one Generation per request, in order.

        A few refused requests are Generations with finish `refused`: the answers to the others are paid for.

        Raises:
            Jz3Error: the endpoint refused more requests, or was not to be reached after all retries.
        """
        return asyncio.run(self._generate(requests, sampling))

    async def _generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        client = AsyncOpenAI(
            base_url=self._config.base_url,
            api_key=self._key or "none",
            max_retries=self._config.retries,
            timeout=self._config.timeout,
            # A proxy set for the outside world can't reach an endpoint on this machine.
            http_client=DefaultAsyncHttpxClient(trust_env=not self._local),
        )
        gate = asyncio.Semaphore(self._config.batch_size)

        allowed = max(int(MOST_REFUSED * len(requests)), int(len(requests) >= 10))

        async def one(request: Request) -> Generation:
            nonlocal allowed
            async with gate:
                try:
                    return await self._ask(client, request, sampling)
                except _Refused as error:
                    allowed -= 1
                    if allowed < 0:
                        raise
                    log.warning("%s (%s)", error, request.id)
                    return Generation(id=request.id, text="", finish="refused", prompt_tokens=0, new_tokens=0)

        async with client:
            tasks = [asyncio.create_task(one(request)) for request in requests]
            try:
                return list(await asyncio.gather(*tasks))
            finally:  # where one failed, or we are interrupted, the others are still asking
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, client: "AsyncOpenAI", request: Request, sampling: Sampling) -> Generation:
        from openai import APIError, APIStatusError

        limit, context = sampling.max_new_tokens, 0
        while True:
            asked = 1 if context else limit
            try:
                reply = await client.completions.create(
                    model=self._config.model,
                    prompt=request.prompt,
                    max_tokens=asked,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    seed=request.seed % SEED_LIMIT,
                    stop=list(sampling.stop) or None,
                )
            except APIStatusError as error:
                over = context_overflow(error)
                if over is None:
                    said = f"{error.status_code} {_said(error)}"
                    # Some servers repeat the key.
                    said = said.replace(self._key, "***") if self._key else said
                    kind = _Refused if error.status_code in (400, 422) else Jz3Error
                    raise kind(f"{self._url} refused a request: {said}") from error
                room, tokens = over
                if not 0 < room < asked:
                    return Generation(
                        id=request.id, text="", finish="too_long", prompt_tokens=tokens, new_tokens=0
                    )
                # vLLM counts a prompt as far as the first token too many; of one that fits it tells the length.
                context = room + tokens if room == limit - 1 else 0
                limit = room
            except APIError as error:
                raise Jz3Error(
                    f"{self._url} gave no answer after {self._config.retries} retries: {error}"
                ) from error
            else:
                if not context:
                    break
                if reply.usage:
                    limit = min(limit, context - reply.usage.prompt_tokens)
                context = 0
        if not reply.choices:
            raise Jz3Error(f"{self._url} answered without a choice")
        choice, usage = reply.choices[0], reply.usage
        text, stopped = cut_at_stop(whole_characters(choice.text), sampling.stop)
        return Generation(
            id=request.id,
            text=text,
            finish="length" if choice.finish_reason == "length" and not stopped else "stop",
            prompt_tokens=usage.prompt_tokens if usage else 0,
            new_tokens=usage.completion_tokens if usage else 0,
        )

    def info(self) -> dict[str, Any]:
        """Name, versions, model and endpoint, for the manifest; never the key."""
        return {
            "name": "openai",
            "model": self._config.model,
            "base_url": self._url,
            "in_flight": self._config.batch_size,
            "versions": versions("openai"),
        }

    def close(self) -> None:
        """Do nothing: every call of `generate` closes its own connections."""


def shown_url(url: str) -> str:
    """Return an endpoint's address as it may be shown, without user and password."""
    return re.sub(r"//[^/?#]*@", "//", url)


def is_local(url: str) -> bool:
    """Tell whether an endpoint is on this machine or in a private network."""
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return False


def context_overflow(error: "APIStatusError") -> tuple[int, int] | None:
    """Read from a refusal that a prompt and its limit of new tokens don't fit the model's context.

    Returns:
        How many new tokens would fit (0 if it isn't said) and the prompt's tokens (0 likewise), or None
        if the refusal is about something else.
    """
    said = _said(error)
    if error.status_code not in (400, 413, 422) or not re.search(r"context (length|size|window)", said):
        return None
    limit = re.search(r"context length is (?:only )?(\d+)", said)
    prompt = re.search(r"(\d+) (?:input tokens|in (?:your|the) (?:prompt|messages))", said)
    tokens = int(prompt[1]) if prompt else 0
    return (int(limit[1]) - tokens if limit and prompt else 0), tokens


def _said(error: "APIStatusError") -> str:
    body = error.body
    message = body.get("message") if isinstance(body, dict) else None
    return str(message or error.message)[:500]

"""The teacher behind an OpenAI-compatible endpoint: paced, retried, paid for once and within a budget."""

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jz3.distillation.config import TeacherConfig
from jz3.distillation.ledger import Answer, AnswerCache, Ledger, request_key
from jz3.distillation.teachers import Reply, Request, Spending
from jz3.engines.openai_engine import is_local, shown_url
from jz3.engines.text import whole_characters
from jz3.errors import Jz3Error
from jz3.models import cache_folder
from jz3.seeding import rng

log = logging.getLogger(__name__)

_LONGEST_WAIT = 60.0
_LEAST_INTERVAL = 0.02
"""Seconds between two requests after the first refusal as too many, where no limit is configured."""
_RECOVERY = 0.98
"""Factor of the interval after an answer, until it is the configured one again."""
_EXTRA_PROMPT_TOKENS = 64
"""Room for what a chat template adds to the message."""
_MOST_TOKENS = 1 << 31


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    """A request that brought no answer."""

    detail: str
    repeat: bool
    """Whether another try may help."""
    fatal: bool = False
    """Whether no request can succeed, e.g. after a wrong key."""
    wait: float = 0.0
    """Seconds that the endpoint asks to wait."""
    too_fast: bool = False
    """Whether requests come faster than the endpoint allows."""


def cache_path(config: TeacherConfig) -> Path:
    """Return the file of the answers bought so far."""
    return Path(config.cache).expanduser() if config.cache else cache_folder() / "teacher.sqlite"


def endpoint_url(config: TeacherConfig) -> str:
    """Return the endpoint's address, OpenAI's own if the recipe has none."""
    return (config.base_url or "https://api.openai.com/v1").rstrip("/")


def key_of(config: TeacherConfig, prompt: str) -> str:
    """Return the cache's key for a prompt under these settings."""
    return request_key(url=endpoint_url(config), **_body(config, prompt))


def most_usd(config: TeacherConfig, prompt: str) -> float:
    """Return the most that a request can cost; a token is at least one byte."""
    return price(config, len(prompt.encode("utf-8", "replace")) + _EXTRA_PROMPT_TOKENS, config.max_tokens)


def price(config: TeacherConfig, prompt_tokens: int, completion_tokens: int) -> float:
    """Return the price of so many tokens in USD."""
    return (
        prompt_tokens * config.usd_per_million_prompt + completion_tokens * config.usd_per_million_completion
    ) / 1e6


def _body(config: TeacherConfig, prompt: str) -> dict[str, Any]:
    return {
        "model": config.model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": config.temperature,
        config.max_tokens_name: config.max_tokens,
    }


def _joined(content: Any) -> str:
    """Return an answer's text, joined if it came in parts; raise ValueError if it holds none."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    found = [text for text in texts if isinstance(text, str)]
    if not found:
        raise ValueError(f"the response's content is no text: {content!r:.100}")
    return "".join(found)


class EndpointTeacher:
    """Asks an endpoint, never twice for the same and never beyond the budget."""

    stand_in = ""

    def __init__(self, config: TeacherConfig, folder: Path) -> None:
        try:
            import openai
        except ImportError as error:
            raise Jz3Error("teacher: the package openai is missing; pip install 'jz3[teacher]'") from error
        self._key = os.environ.get(config.api_key_env, "")
        if not self._key and not config.base_url:
            raise Jz3Error(
                f"teacher: the environment variable {config.api_key_env} holds no API key; set it, name another by "
                "distillation.teacher.api_key_env, or give base_url for an endpoint that needs none"
            )
        self.name = config.model
        self._config = config
        self._openai = openai
        self._cache = AnswerCache(cache_path(config))
        self._ledger = Ledger(folder / "ledger.sqlite", config.max_calls, config.max_usd)
        self._from_cache = 0

    def answer(self, requests: Sequence[Request], advance: Callable[[int], None]) -> list[Reply]:
        """Answer every request from the cache or the endpoint.

        Raises:
            Jz3Error: the budget is used up, too many requests failed, or the endpoint refuses us; the
                message says what was spent and what is left. Answers got so far are kept.
        """
        keys = [key_of(self._config, r.prompt.text) for r in requests]
        prompts = dict(zip(keys, (r.prompt.text for r in requests), strict=True))
        wanted = {key: prompt for key, prompt in prompts.items() if self._cache.get(key) is None}
        advance(sum(key not in wanted for key in keys))
        shares = Counter(keys)
        purchase = _Purchase(self._config, self._openai, self._key, self._cache, self._ledger)
        failed = purchase.buy(wanted, len(prompts), lambda key: advance(shares[key])) if wanted else {}
        self._from_cache = sum(key not in failed and not self._ledger.asked(key) for key in prompts)
        return [self._reply(key, failed) for key in keys]

    def _reply(self, key: str, failed: dict[str, _Failure]) -> Reply:
        if failure := failed.get(key):
            reason = "teacher_failed" if failure.repeat else "refused"
            return Reply(text="", failure=reason, detail=failure.detail)
        answer = self._cache.get(key)
        if answer is None:
            raise Jz3Error(
                f"the cache {cache_path(self._config)} lost an answer while it was in use; run again"
            )
        return Reply(text=answer.text, finish=answer.finish, meta={"model": self._config.model})

    def spending(self) -> Spending:
        """Return what this run has cost so far, as its ledger has it."""
        totals = self._ledger.totals()
        return Spending(
            calls=totals.calls,
            prompt_tokens=totals.prompt_tokens,
            completion_tokens=totals.completion_tokens,
            usd=totals.usd,
            from_cache=self._from_cache,
        )

    def close(self) -> None:
        """Close cache and ledger."""
        self._cache.close()
        self._ledger.close()


class _Purchase:
    """One round of buying answers, on an event loop of its own."""

    def __init__(
        self, config: TeacherConfig, openai: Any, key: str, cache: AnswerCache, ledger: Ledger
    ) -> None:
        self._config = config
        self._openai = openai
        self._key = key
        self._cache = cache
        self._ledger = ledger
        self._failed: dict[str, _Failure] = {}
        self._stop = ""
        """Why no further request is sent."""
        self._in_flight = 0
        self._next_slot = 0.0
        pace = config.requests_per_minute
        self._shortest = self._interval = 60.0 / pace if pace else 0.0
        """Seconds between two requests: as configured, and at present."""
        self._slowed = 0.0
        """When the interval was last made longer."""
        self._warned = False

    def buy(self, wanted: dict[str, str], total: int, done: Callable[[str], None]) -> dict[str, _Failure]:
        """Ask for all `wanted` (key to prompt) and return the requests that failed for good.

        Args:
            wanted: what to ask for.
            total: how many requests there are with those answered before; the tolerated failures are
                a share of it.
            done: told each key that is answered or given up.
        """
        self._allowed = int(self._config.max_failed_share * total)
        asyncio.run(self._all(wanted, done))
        if self._stop:
            left = sum(self._cache.get(key) is None for key in wanted)
            spent = self._ledger.totals()
            raise Jz3Error(
                f"teacher {self._config.model!r}: {self._stop}. Spent by this run: {spent.calls} calls, "
                f"${spent.usd:.4f}; left to ask: {left} of {total}. Answers already bought are kept and "
                "cost nothing when you run again"
            )
        return self._failed

    async def _all(self, wanted: dict[str, str], done: Callable[[str], None]) -> None:
        self._settled = asyncio.Condition()
        queue = iter(wanted.items())
        async with self._openai.AsyncOpenAI(
            api_key=self._key or "none",
            base_url=endpoint_url(self._config),
            max_retries=0,
            timeout=self._config.timeout_seconds,
            # A proxy set for the outside world can't reach an endpoint on this machine.
            http_client=self._openai.DefaultAsyncHttpxClient(
                trust_env=not is_local(endpoint_url(self._config))
            ),
        ) as client:
            workers = [
                self._worker(client, queue, done) for _ in range(min(self._config.concurrency, len(wanted)))
            ]
            await asyncio.gather(*workers)

    async def _worker(self, client: Any, queue: Any, done: Callable[[str], None]) -> None:
        for key, prompt in queue:
            failure = await self._ask(client, key, prompt)
            if self._stop:
                return
            if failure is not None:
                self._failed[key] = failure
                log.warning("teacher: a request failed for good: %s", failure.detail)
                if len(self._failed) > self._allowed:
                    self._stop = (
                        f"{len(self._failed)} requests failed for good, max_failed_share allows {self._allowed}; "
                        f"the last: {failure.detail}"
                    )
                    return
            done(key)

    async def _ask(self, client: Any, key: str, prompt: str) -> _Failure | None:
        """Send one request until it is answered or given up; None means answered."""
        failure: _Failure | None = None
        for attempt in range(self._config.retries + 1):
            if failure is not None:
                pause = min(self._config.backoff_seconds * 2.0 ** (attempt - 1), _LONGEST_WAIT)
                jitter = rng(0, "backoff", key, attempt).uniform(0.5, 1.0)
                await asyncio.sleep(max(pause * jitter, min(failure.wait, _LONGEST_WAIT)))
            call = await self._book(key, prompt)
            if call is None:
                return None
            failure = await self._send(client, key, prompt, call)
            if failure is None:
                return None
            if failure.fatal:
                self._stop = self._stop or failure.detail
                return None
            if not failure.repeat:
                return failure
        return failure

    async def _book(self, key: str, prompt: str) -> int | None:
        """Wait for a slot of the rate limit and book the call; None if we are to stop."""
        loop = asyncio.get_running_loop()
        # No slot is promised beforehand, as all may have to wait for longer by then.
        while not self._stop and (wait := self._next_slot - loop.time()) > 0:
            await asyncio.sleep(wait)
        self._next_slot = max(self._next_slot, loop.time()) + self._interval
        async with self._settled:
            while not self._stop:
                call = self._ledger.book(key, most_usd(self._config, prompt))
                if call is not None:
                    self._in_flight += 1
                    return call
                if not self._in_flight:
                    self._stop = (
                        f"the budget of {self._config.max_calls} calls and ${self._config.max_usd:g} allows no further "
                        "request; to go on, raise max_calls or max_usd"
                    )
                    break
                # A call in flight may turn out cheaper than booked and leave room for this one.
                await self._settled.wait()
        return None

    async def _send(self, client: Any, key: str, prompt: str, call: int) -> _Failure | None:
        """Send a booked request, keep its answer, and settle what it cost."""
        openai = self._openai
        sent = asyncio.get_running_loop().time()
        usd, tokens = most_usd(self._config, prompt), (0, 0)
        try:
            response = await asyncio.wait_for(
                client.chat.completions.create(**_body(self._config, prompt)), self._config.timeout_seconds
            )
            answer = self._read(response, prompt)
            self._cache.put(key, self._config.model, answer)
            tokens = answer.prompt_tokens, answer.completion_tokens
            usd = price(self._config, *tokens)
            self._interval = max(self._shortest, self._interval * _RECOVERY)
            return None
        except openai.APIStatusError as error:
            usd = 0.0
            failure = self._status_failure(error)
            if failure.too_fast:
                self._slow_down(sent, failure.wait)
            return failure
        except (openai.APITimeoutError, asyncio.TimeoutError):
            return _Failure(detail=f"no answer within {self._config.timeout_seconds:g} s", repeat=True)
        except (openai.APIError, ValueError) as error:
            # The connection broke, or the answer is no JSON or lacks its parts; it may have been charged.
            return _Failure(detail=self._clean(f"{type(error).__name__}: {error}"), repeat=True)
        finally:
            self._ledger.settle(call, usd, *tokens)
            async with self._settled:
                self._in_flight -= 1
                self._settled.notify_all()

    def _status_failure(self, error: Any) -> _Failure:
        status = error.status_code
        detail = self._clean(f"HTTP {status}: {error.message}")
        if status in (401, 403, 404) or error.code == "insufficient_quota":
            return _Failure(
                detail=f"the endpoint {shown_url(endpoint_url(self._config))} says {detail}",
                repeat=False,
                fatal=True,
            )
        try:
            wait = float(error.response.headers.get("retry-after", 0))
        except ValueError:
            wait = 0.0
        repeat = status in (408, 409, 429) or status >= 500
        return _Failure(detail=detail, repeat=repeat, wait=wait, too_fast=status == 429)

    def _slow_down(self, sent: float, wait: float) -> None:
        """Double the time between requests, of all workers, and keep all from asking as long as we are told to.

        Those in flight together are refused together, and slow us down once.
        """
        now = asyncio.get_running_loop().time()
        if sent >= self._slowed:
            self._interval = min(max(2 * self._interval, _LEAST_INTERVAL), _LONGEST_WAIT)
            self._slowed = now
            log.warning(
                "teacher: the endpoint refuses so many requests; one every %.2f s is sent", self._interval
            )
        self._next_slot = max(self._next_slot, now + min(wait, _LONGEST_WAIT), self._slowed + self._interval)

    def _clean(self, message: str) -> str:
        """Make one short line of a message, without the key that some servers repeat."""
        line = " ".join(message.split())
        return (line.replace(self._key, "***") if self._key else line)[:300]

    def _read(self, response: Any, prompt: str) -> Answer:
        """Take the answer out of a response; raise ValueError if it lacks its parts."""
        choices = getattr(response, "choices", None)
        if not choices or getattr(choices[0], "message", None) is None:
            raise ValueError("the response holds no choices")
        text = whole_characters(_joined(choices[0].message.content or ""))
        counts = ("prompt_tokens", "completion_tokens")
        tokens: list[Any] = [getattr(response.usage, name, None) for name in counts]
        # Some servers send an empty usage, or one with nulls; a negative one would raise the budget.
        if not all(isinstance(count, int) and 0 <= count < _MOST_TOKENS for count in tokens):
            if not self._warned:
                log.warning("teacher: the endpoint reports no usage; every byte is booked as a token")
            self._warned = True
            tokens = [len(part.encode("utf-8", "replace")) for part in (prompt, text)]
        return Answer(
            text=text,
            finish=choices[0].finish_reason or "stop",
            prompt_tokens=tokens[0],
            completion_tokens=tokens[1],
        )

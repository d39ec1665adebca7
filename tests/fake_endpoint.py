"""An OpenAI-compatible server on loopback that misbehaves on demand and counts what it is asked."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REPLY = "[Problem]: What is 6 times 7?\n\n[Solution]: It is \\boxed{42}."
Behaviour = Callable[[str, int], str]
"""Prompt and number of the attempt (from 1) to what is done; see `FakeEndpoint`."""


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A killed client is no error here."""


class FakeEndpoint:
    """A server whose behaviour is chosen per request.

    `behave(prompt, attempt)` returns `ok`, `no_boxed`, `no_usage`, an HTTP status such as `500`, `hang`
    (no answer), `cut` (truncated JSON), `drop` (connection closed), `no_choices`, `echo_key` (an error
    that repeats the Authorization header) or `quota`; or a JSON object whose `usage` and `content`
    replace those of the answer.
    """

    prompt_tokens = 100
    completion_tokens = 50
    retry_after = 0.0

    def __init__(self, behave: Behaviour = lambda prompt, attempt: "ok", delay: float = 0.0) -> None:
        self.received: Counter[str] = Counter()
        self.completed: Counter[str] = Counter()
        self.times: list[float] = []
        self.bodies: list[dict[str, Any]] = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                prompt = body["messages"][-1]["content"]
                with endpoint._lock:
                    endpoint.received[prompt] += 1
                    attempt = endpoint.received[prompt]
                    endpoint.times.append(time.monotonic())
                    endpoint.bodies.append(body)
                    endpoint._now += 1
                    endpoint.most_at_once = max(endpoint.most_at_once, endpoint._now)
                try:
                    if delay:
                        time.sleep(delay)
                    self._answer(behave(prompt, attempt), prompt)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                finally:
                    with endpoint._lock:
                        endpoint._now -= 1

            def _answer(self, what: str, prompt: str) -> None:
                if what == "hang":
                    endpoint._stop.wait(20)
                    self.close_connection = True
                elif what == "drop":
                    self.close_connection = True
                elif what.isdigit():
                    self._send(int(what), {"error": {"message": f"status {what}", "code": None}})
                elif what == "echo_key":
                    self._send(
                        500, {"error": {"message": f"bad key {self.headers['authorization']}", "code": None}}
                    )
                elif what == "quota":
                    self._send(429, {"error": {"message": "no money left", "code": "insufficient_quota"}})
                else:
                    odd = json.loads(what) if what.startswith("{") else {}
                    text = "[Problem]: A\n\n[Solution]: It is 2." if what == "no_boxed" else REPLY
                    choice = {
                        "index": 0,
                        "finish_reason": "stop",
                        "message": {"role": "assistant", "content": odd.get("content", text)},
                    }
                    answer: dict[str, Any] = {
                        "id": "x",
                        "object": "chat.completion",
                        "created": 0,
                        "model": "fake",
                        "choices": [] if what == "no_choices" else [choice],
                        "usage": {
                            "prompt_tokens": endpoint.prompt_tokens,
                            "completion_tokens": endpoint.completion_tokens,
                            "total_tokens": endpoint.prompt_tokens + endpoint.completion_tokens,
                        },
                    }
                    if what == "no_usage":
                        del answer["usage"]
                    elif "usage" in odd:
                        answer["usage"] = odd["usage"]
                    self._send(200, answer, cut=what == "cut")
                    if what in ("ok", "no_boxed", "no_usage"):
                        with endpoint._lock:
                            endpoint.completed[prompt] += 1

            def _send(self, status: int, body: dict[str, Any], cut: bool = False) -> None:
                data = json.dumps(body).encode()
                data = data[: len(data) // 2] if cut else data
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                if status == 429:
                    self.send_header("retry-after", str(endpoint.retry_after))
                self.end_headers()
                self.wfile.write(data)
                self.wfile.flush()

            def log_message(self, format: str, *args: Any) -> None:
                """Keep the test's output clean."""

        self._server = _QuietServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def requests(self) -> int:
        """Requests received so far."""
        return sum(self.received.values())

    def __enter__(self) -> "FakeEndpoint":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._server.shutdown()
        self._server.server_close()

"""Serve the page: to this machine alone unless told otherwise, and without anything from elsewhere."""

import ipaddress
import os
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jz3.errors import Jz3Error

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)
"""What the browser may load: nothing from other machines, whatever the toolkit or a text asks for."""

ORDERS = ("queue", "run", "call", "api", "cancel", "reset")
"""What the page posts to, below /gradio_api; Gradio would also take uploads, from anyone and of any size."""


def serve(run: Path, host: str = "127.0.0.1", port: int = 7860, checkpoint: int | None = None) -> None:
    """Serve a run's page until interrupted.

    Args:
        run: the folder of a run of the loop or of `jz3 score`.
        host: the address to listen on.
        port: 0 takes any free one.
        checkpoint: see `open_collection`.

    Raises:
        Jz3Error: Gradio is not installed, the run has neither scores nor features, or the port is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise Jz3Error("the explore page needs Gradio; pip install 'jz3[explore]'") from error
    from jz3.explore.view import View
    from jz3.index.opening import open_collection

    collection = open_collection(run, checkpoint)
    with _listen(host, port) as listener:
        print("loading scores, model and index", file=sys.stderr, flush=True)
        app = build_app(View(collection), host)
        if not _is_loopback(host):
            print(
                f"warning: --host {host}: everyone who can reach this machine can read the corpus and use the model; "
                "the page has no password",
                file=sys.stderr,
                flush=True,
            )
        name = f"[{host}]" if ":" in host else host
        print(f"http://{name}:{listener.getsockname()[1]}  (Ctrl-C ends)", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def build_app(view: Any, host: str) -> Any:
    """Return the ASGI application of a run's page."""
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from jz3.explore.page import build_page

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Guard)
    if _is_loopback(host):
        # Another site's name that resolves to this machine must not reach the page.
        app.add_middleware(
            TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", "::1", host]
        )
    return gr.mount_gradio_app(
        app,
        build_page(view),
        path="/",
        server_name=host,
        footer_links=[],
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        run_history=False,
        theme=gr.themes.Base(
            primary_hue="sky",
            font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "Consolas", "monospace"],
        ),
        css_paths=[Path(__file__).with_name("style.css")],
    )


class _Guard:
    """Adds the policy to every response, and refuses what the page never sends: uploads, orders from other sites."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", []),
                    (b"content-security-policy", POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        app = self._app
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD") and not _is_own(scope):
            from starlette.responses import PlainTextResponse

            app = PlainTextResponse("this page sends no such request", 403)
        await app(scope, receive, send_with_policy)


def _is_own(scope: Any) -> bool:
    """Tell whether an order may come from the page: by its path, and by the site that a browser names."""
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
    if scope["path"].rpartition("/gradio_api/")[2].partition("/")[0] not in ORDERS:
        return False
    if site := headers.get(b"sec-fetch-site"):
        return site in ("same-origin", "none")
    origin = headers.get(b"origin")
    return not origin or urlsplit(origin).netloc == headers.get(b"host")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    """Open the port before anything is loaded."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()
    except (OSError, OverflowError) as error:
        raise Jz3Error(f"can't listen on {host} port {port} ({error}); choose another with --port") from error
    return listener

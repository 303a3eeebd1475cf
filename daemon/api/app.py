"""Routes, and what surrounds every request: errors as JSON, a request id, clients that leave."""

import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HTTPRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ... import __version__
from .. import logs
from ..metrics import Metrics
from .errors import ApiError
from .http import ClientGone, json_response
from .openai import OpenAI
from .protocol import ABORT

log = logs.get("api")
Handler = Callable[[Scope, Receive, Send], Awaitable[None]]
MAX_REQUEST_ID = 128
MAX_HEAD_BYTES = 32 * 1024
MAX_FIELDS = 64
"""Header fields of a request."""


class Endpoint:
    """A bound method as an ASGI application: Starlette would wrap a plain function."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._handler(scope, receive, send)
        except ApiError as error:
            await error.response()(scope, receive, send)


def build(openai: OpenAI, metrics: Metrics, health: Callable[[], tuple[bool, str]]) -> ASGIApp:
    """The whole HTTP application. `health` says whether a request would be served, and a word."""

    async def livez(request: HTTPRequest) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(request: HTTPRequest) -> Response:
        is_ready, word = health()
        headers = {} if is_ready else {"retry-after": "5"}
        return PlainTextResponse(word + "\n", 200 if is_ready else 503, headers)

    async def version(request: HTTPRequest) -> Response:
        return json_response({"version": __version__})

    async def scrape(request: HTTPRequest) -> Response:
        body, media_type = metrics.exposition()
        return Response(body, media_type=media_type)

    post, get = ["POST"], ["GET"]
    routes = [
        Route("/livez", livez, methods=get),
        Route("/readyz", readyz, methods=get),
        Route("/health", readyz, methods=get),
        Route("/version", version, methods=get),
        Route("/metrics", scrape, methods=get),
        Route("/v1/models", Endpoint(openai.models), methods=get),
        Route("/v1/models/{name:path}", Endpoint(openai.model), methods=get),
        Route("/v1/completions", Endpoint(openai.completions), methods=post),
        Route("/v1/chat/completions", Endpoint(openai.chat), methods=post),
        Route("/tokenize", Endpoint(openai.tokenize), methods=post),
        Route("/detokenize", Endpoint(openai.detokenize), methods=post),
    ]
    handlers: Mapping[Any, Any] = {HTTPException: _http_error, Exception: _fault}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False  # a redirect would carry the client's Host header
    return Surroundings(app)


async def _http_error(request: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        404: f"there is no route {request.url.path}",
        405: f"{request.method} is not allowed on {request.url.path}",
    }
    message = messages.get(error.status_code, str(error.detail))
    headers = dict(error.headers or {})
    return ApiError(error.status_code, message, headers=headers).response()


async def _fault(request: HTTPRequest, error: Exception) -> Response:
    """Starlette sends this, and raises the error again for `Surroundings` to log."""
    return ApiError(500, "the daemon failed to answer; its log has the reason").response()


class Surroundings:
    """The outermost application: gives each answer its `x-request-id`, ends what a client left, and
    logs a fault of ours, of which the client's 500 shows nothing."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request_id = _request_id(scope)
        is_complete = False

        async def send_with_id(message: Message) -> None:
            nonlocal is_complete
            is_complete = not message.get("more_body", False)
            if message["type"] == "http.response.start":
                is_complete = False
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        try:
            if (refusal := _check_head(scope)) is not None:
                await refusal.response()(scope, receive, send_with_id)
                return
            await self._app(scope, receive, send_with_id)
        except ClientGone:
            log.debug("client gone", path=scope["path"])
            scope.get(ABORT, lambda: None)()
        except Exception:
            log.exception("request failed", path=scope["path"], request_id=request_id.decode())
            if not is_complete:  # in the middle of a stream: it must not look complete
                raise


def _check_head(scope: Scope) -> ApiError | None:
    """h11 bounds a head only while it is incomplete: one that comes at once is looked at here."""
    headers = scope["headers"]
    if len(headers) > MAX_FIELDS:
        return ApiError(431, f"the head has more than {MAX_FIELDS} fields")
    size = len(scope["raw_path"]) + len(scope["query_string"])
    size += sum(len(name) + len(value) for name, value in headers)
    if size > MAX_HEAD_BYTES:
        return ApiError(431, f"the head has more than {MAX_HEAD_BYTES} bytes")
    return None


def _request_id(scope: Scope) -> bytes:
    given: bytes = next((v for k, v in scope["headers"] if k == b"x-request-id"), b"")
    if 0 < len(given) <= MAX_REQUEST_ID and given.isascii() and given.decode().isprintable():
        return given
    return secrets.token_hex(12).encode()

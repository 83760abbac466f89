"""How does every failure leave as OpenAI's error JSON?"""

import asyncio
import logging
import re
import secrets
from collections.abc import Mapping
from typing import Any

from litestar import Request
from litestar.exceptions import HTTPException, MethodNotAllowedException, NotFoundException
from litestar.types import ASGIApp, ExceptionHandlersMap, Receive, Scope, Send

from gateway.errors import (
    BodyTooLarge,
    GatewayError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    RequestTimeout,
    UnknownURL,
)

logger = logging.getLogger("suiron")

LINGER_S = 1.0
VERSION = (b"openai-version", b"2020-10-01")
JSON = (b"content-type", b"application/json")

ID_HEADERS = (b"x-request-id", b"x-client-request-id")
CLEAN_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")

Headers = list[tuple[bytes, bytes]]


def request_id_of(fields: Mapping[bytes, bytes]) -> str | None:
    """The id that the client gave its request, if it is fit to be repeated."""
    for name in ID_HEADERS:
        if name in fields and CLEAN_ID.fullmatch(fields[name]):
            return fields[name].decode()
    return None


def new_request_id() -> str:
    return f"req_{secrets.token_hex(16)}"


class ErrorResponse:
    """An ASGI application that answers with *error*, with its headers and perhaps others."""

    def __init__(
        self, error: GatewayError, request_id: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        self._error = error
        self._request_id = request_id
        self._headers = {**headers, **error.headers} if headers else error.headers

    def to_asgi_response(self, *_: Any, **__: Any) -> ASGIApp:
        """As Litestar asks of what its exception handlers return."""
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._request_id = self._request_id or request_id_of(dict(scope["headers"]))
        await self.send(send, receive)

    def parts(self) -> tuple[int, Headers, bytes]:
        """Status, headers and body, for where there is no application."""
        body = self._error.json()
        headers: Headers = [
            JSON,
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", (self._request_id or new_request_id()).encode()),
            VERSION,
        ]
        headers += [(name.encode(), value.encode("latin-1")) for name, value in self._headers.items()]
        return self._error.status, headers, body

    async def send(self, send: Send, receive: Receive | None = None) -> None:
        """With *receive*, a body that was refused for its size or slowness is heard out for a moment."""
        status, headers, body = self.parts()
        await send({"type": "http.response.start", "status": status, "headers": headers})
        if receive is not None and isinstance(self._error, BodyTooLarge | RequestTimeout):
            await send({"type": "http.response.body", "body": body, "more_body": True})
            await _linger(receive)
            body = b""
        await send({"type": "http.response.body", "body": body, "more_body": False})


async def _linger(receive: Receive) -> None:
    """Takes what a client is still sending, so that it reads the answer instead of a reset connection."""
    try:
        async with asyncio.timeout(LINGER_S):
            while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                pass
    except TimeoutError:
        pass


def unexpected(exc: Exception) -> InternalError:
    """What a client is told of a fault of ours; the log has the rest."""
    logger.error("unexpected %s", type(exc).__name__, exc_info=exc)
    return InternalError("The gateway failed to handle this request. The fault is not yours; trying again may help.")


def _gateway_error(_: Request[Any, Any, Any], exc: GatewayError) -> ASGIApp:
    return ErrorResponse(exc)


def _unknown_url(request: Request[Any, Any, Any], _: NotFoundException) -> ASGIApp:
    path = "".join(char for char in request.scope["path"] if char.isprintable())[:200]
    there = [route.path for route in request.app.routes if route.path.startswith("/v1/") and "{" not in route.path]
    hint = f"Did you mean /v1{path}?" if f"/v1{path}" in there else f"There are {', '.join(sorted(there))}."
    return ErrorResponse(UnknownURL(f"Invalid URL ({request.method} {path}). {hint}"))


def _method_not_allowed(request: Request[Any, Any, Any], exc: MethodNotAllowedException) -> ASGIApp:
    allow = (exc.headers or {}).get("Allow") or ", ".join(sorted(_methods(request)))
    message = f"Not allowed to {request.method} here. Allowed: {allow}."
    return ErrorResponse(MethodNotAllowed(message, headers={"allow": allow}))


def _methods(request: Request[Any, Any, Any]) -> set[str]:
    path = request.scope["path"].rstrip("/") or "/"
    return {
        method
        for route in request.app.routes
        if route.path == path or (route.path_parameters and path.startswith(route.path.partition("/{")[0] + "/"))
        for method in getattr(route, "methods", ())
        if method != "OPTIONS"
    }


def _http_exception(_: Request[Any, Any, Any], exc: HTTPException) -> ASGIApp:
    if exc.status_code >= 500:
        return ErrorResponse(unexpected(exc))
    return ErrorResponse(InvalidRequest("The request could not be understood."))


def _unexpected(_: Request[Any, Any, Any], exc: Exception) -> ASGIApp:
    return ErrorResponse(unexpected(exc))


EXCEPTION_HANDLERS: ExceptionHandlersMap = {
    GatewayError: _gateway_error,  # type: ignore[dict-item]
    NotFoundException: _unknown_url,  # type: ignore[dict-item]
    MethodNotAllowedException: _method_not_allowed,  # type: ignore[dict-item]
    HTTPException: _http_exception,  # type: ignore[dict-item]
    Exception: _unexpected,  # type: ignore[dict-item]
}

"""How is a request's body taken in: bounded in size and time?"""

import asyncio

from litestar.types import Receive, Scope

from gateway.api.client import client_of
from gateway.errors import BodyTooLarge, InvalidRequest, RequestTimeout
from gateway.interrupt import Interrupt
from gateway.settings import Server

CLOSE = {"connection": "close"}


async def read_body(scope: Scope, receive: Receive, server: Server, interrupt: Interrupt) -> bytes:
    """Raises BodyTooLarge, whether the length is declared or not; RequestTimeout; InvalidRequest for another type."""
    declared = _declared(scope)
    if declared > server.max_body_bytes:
        raise _too_large(server)
    if (body := client_of(scope).body()) is not None:
        if len(body) > server.max_body_bytes:
            raise _too_large(server)
        return body
    timer = interrupt.loop.call_later(server.body_timeout_s, interrupt.ring, "slow body")
    try:
        return await _read(receive, server)
    except asyncio.CancelledError as exc:
        if interrupt.caused(exc, "slow body"):
            raise RequestTimeout("The request's body did not arrive in time.", headers=CLOSE) from None
        raise
    finally:
        timer.cancel()


async def _read(receive: Receive, server: Server) -> bytes:
    blocks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise InvalidRequest("The client left before its body was complete.", headers=CLOSE)
        blocks.append(message["body"])
        size += len(blocks[-1])
        if size > server.max_body_bytes:
            raise _too_large(server)
        if not message["more_body"]:
            return b"".join(blocks)


def _declared(scope: Scope) -> int:
    """The Content-Length, 0 without one; raises InvalidRequest unless the type is JSON."""
    length, content_type = 0, b""
    for name, value in scope["headers"]:
        if name == b"content-length":
            length = int(value[:20]) if value.isdigit() else 0
        elif name == b"content-type":
            content_type = value
    if content_type.partition(b";")[0].strip().lower() != b"application/json":
        shown = content_type.decode("ascii", "replace")[:100]
        raise InvalidRequest(
            f"Unsupported content type: '{shown}'. This API takes 'application/json'.", code="unsupported_content_type"
        )
    return length


def _too_large(server: Server) -> BodyTooLarge:
    return BodyTooLarge(f"The body is larger than {server.max_body_bytes} bytes.", headers=CLOSE)

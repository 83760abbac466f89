"""How is a request's body taken in: bounded in size and time?"""

import asyncio
from collections.abc import Mapping

from litestar.types import Receive

from gateway.api.client import Client
from gateway.errors import BodyTooLarge, InvalidRequest, RequestTimeout
from gateway.interrupt import Interrupt
from gateway.settings import Server

CLOSE = {"connection": "close"}


async def read_body(
    fields: Mapping[bytes, bytes], client: Client, receive: Receive, server: Server, interrupt: Interrupt
) -> bytes:
    """Raises BodyTooLarge, whether the length is declared or not; RequestTimeout; InvalidRequest for another type."""
    declared = _declared(fields)
    if declared > server.max_body_bytes:
        raise _too_large(server)
    if (body := client.body()) is not None:
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


def _declared(fields: Mapping[bytes, bytes]) -> int:
    """The Content-Length, 0 without one; raises InvalidRequest unless the type is JSON."""
    content_type = fields.get(b"content-type", b"")
    if content_type != b"application/json" and content_type.partition(b";")[0].strip().lower() != b"application/json":
        shown = content_type.decode("ascii", "replace")[:100]
        raise InvalidRequest(
            f"Unsupported content type: '{shown}'. This API takes 'application/json'.", code="unsupported_content_type"
        )
    length = fields.get(b"content-length", b"")
    return int(length[:20]) if length.isdigit() else 0


def _too_large(server: Server) -> BodyTooLarge:
    return BodyTooLarge(f"The body is larger than {server.max_body_bytes} bytes.", headers=CLOSE)

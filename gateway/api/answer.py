"""How does an answer reach a client that may leave at any time?"""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from litestar.types import Receive, Scope, Send

from gateway.api.client import client_of
from gateway.api.errors import JSON, VERSION, ErrorResponse, Headers, unexpected
from gateway.api.shutdown import SHUTDOWN, Shutdown
from gateway.call import Call
from gateway.errors import GatewayError, ShuttingDown
from gateway.interrupt import Interrupt
from gateway.schema.payload import Parts
from gateway.settings import Server
from gateway.sse import DONE, KEEP_ALIVE, write_events

HANG_UP = "hang-up"

STREAM_HEADERS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
PRIVATE = (b"cache-control", b"no-store")
"""Nobody between here and the client may keep an answer, however old it says it is."""


class Answer:
    """An ASGI application that answers one call: JSON, or an event stream if the call asks for one."""

    def __init__(
        self, call: Call, parts: AsyncGenerator[Parts], server: Server, interrupt: Interrupt, shutdown: Shutdown
    ) -> None:
        self._call = call
        self._parts = parts
        self._server = server
        self._interrupt = interrupt
        self._shutdown = shutdown

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stops when the client leaves, since nobody else cancels this task, and when the process is about to end."""
        client = client_of(scope)
        client.when_gone(self._hang_up)
        try:
            try:
                self._shutdown.add(self._interrupt)
                await self._give(send)
                self._call.outcome = "completed"
            except asyncio.CancelledError as exc:
                if not self._interrupt.caused(exc, SHUTDOWN):
                    raise
                await self._fail(ShuttingDown(), send)
            except GatewayError as exc:
                await self._fail(exc, send)
            except Exception as exc:
                await self._fail(unexpected(exc), send)
        except asyncio.CancelledError as exc:
            if not self._interrupt.caused(exc, HANG_UP):
                raise
            self._call.outcome = "client_gone"
        finally:
            client.when_gone(None)
            self._shutdown.discard(self._interrupt)

    def _hang_up(self) -> None:
        self._interrupt.ring(HANG_UP)

    async def _give(self, send: Send) -> None:
        try:
            async for arrived in self._parts:  # to its end: the pipeline goes on behind its last part
                body = bytes(arrived[0].wire)
        finally:
            await self._parts.aclose()
        self._shutdown.discard(self._interrupt)
        await send(self._start([JSON, PRIVATE, (b"content-length", b"%d" % len(body))]))
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _fail(self, error: GatewayError, send: Send) -> None:
        self._leaves(error.status)
        self._call.error = error
        await ErrorResponse(error, self._call.request_id, self._call.headers).send(send)

    def _start(self, headers: Headers) -> Any:
        call = self._call
        self._leaves(200)
        headers = [
            *headers,
            (b"x-request-id", call.request_id.encode()),
            (b"openai-processing-ms", b"%d" % ((call.left_at - call.started) * 1000)),
            VERSION,
        ]
        if call.headers:
            headers += [(name.encode(), value.encode("latin-1")) for name, value in call.headers.items()]
        return {"type": "http.response.start", "status": 200, "headers": headers}

    def _leaves(self, status: int) -> None:
        self._call.status = status
        self._call.left_at = self._call.clock()


class Stream(Answer):
    """
    An event stream on its way out.

    The status waits for the first part, so that a failure can still be one; after `hold_s`, and whenever nothing has
    been said for `keep_alive_s`, a comment keeps the connection alive.
    """

    _begun = False
    _beat: asyncio.Task[None] | None = None

    async def _give(self, send: Send) -> None:
        self._loop = self._interrupt.loop
        self._send = send
        self._spoke = self._loop.time()
        self._timer = self._loop.call_later(self._server.hold_s, self._ring)
        try:
            async for arrived in self._parts:
                await self._write(write_events([part.wire for part in arrived]))
            await self._write(DONE, last=True)
        finally:
            await self._parts.aclose()
            self._timer.cancel()
            if self._beat is not None:
                self._beat.cancel()

    async def _write(self, block: bytes, *, last: bool = False) -> None:
        self._spoke = self._loop.time()
        if not self._begun:
            self._begun = True
            await self._send(self._start(STREAM_HEADERS))
        await self._send({"type": "http.response.body", "body": block, "more_body": not last})

    async def _fail(self, error: GatewayError, send: Send) -> None:
        """An error event and no `[DONE]`: SDKs raise, and nobody takes what came for the whole."""
        if self._begun:
            self._call.error = error
            await self._write(write_events([error.json()]), last=True)
        else:
            self._begun = True
            await super()._fail(error, send)

    def _ring(self) -> None:
        server, now = self._server, self._loop.time()
        due = self._spoke + (server.keep_alive_s if self._begun else server.hold_s)
        if now >= due and (self._beat is None or self._beat.done()):
            self._beat = asyncio.ensure_future(self._write(KEEP_ALIVE))
            due = now + server.keep_alive_s
        self._timer = self._loop.call_at(max(due, now + 0.001), self._ring)

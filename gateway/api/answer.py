"""How does an answer reach a client that may leave at any time?"""

import asyncio
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any

from litestar.types import Receive, Scope, Send

from gateway.api.client import Client, client_of
from gateway.api.errors import JSON, VERSION, ErrorResponse, Headers, unexpected
from gateway.api.shutdown import Shutdown
from gateway.call import Call
from gateway.errors import GatewayError
from gateway.interrupt import Interrupt
from gateway.schema.payload import Parts
from gateway.settings import Server
from gateway.sse import DONE, KEEP_ALIVE, write_events

STREAM_HEADERS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
PRIVATE = (b"cache-control", b"no-store")
"""Nobody between here and the client may keep an answer, however old it says it is."""


class Hangup:
    """Cancels the current task when the client leaves: neither a server nor the framework does."""

    def __init__(self, call: Call, client: Client, interrupt: Interrupt) -> None:
        self._call = call
        self._client = client
        self._interrupt = interrupt

    def __enter__(self) -> None:
        self._client.when_gone(self._ring)

    def _ring(self) -> None:
        self._interrupt.ring("hang-up")

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, _: TracebackType | None) -> bool:
        self._client.when_gone(None)
        gone = self._interrupt.caused(exc, "hang-up")
        if gone:
            self._call.outcome = "client_gone"
        return gone


class Answer:
    """An ASGI application that answers one call: JSON, or an event stream if the call asks for one."""

    def __init__(
        self, call: Call, parts: AsyncGenerator[Parts], server: Server, interrupt: Interrupt, shutdown: Shutdown
    ) -> None:
        self.parts = parts
        self.shutdown = shutdown
        self.server = server
        self.interrupt = interrupt
        self._call = call
        self._request_id = call.request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with Hangup(self._call, client_of(scope), self.interrupt):
            await (_Stream(self, send).run() if self._call.streamed else self._send_whole(send))

    async def _send_whole(self, send: Send) -> None:
        try:
            body = await self._whole()
        except GatewayError as exc:
            await self.refuse(exc, send)
        except Exception as exc:
            await self.refuse(unexpected(exc), send)
        else:
            await send(self.start([JSON, PRIVATE, (b"content-length", b"%d" % len(body))]))
            await send({"type": "http.response.body", "body": body, "more_body": False})
            self.completed()

    async def _whole(self) -> bytes:
        try:
            with self.shutdown.running(self.interrupt):
                arrived = await anext(self.parts)
                await anext(self.parts, None)  # the pipeline ends behind its last part
        finally:
            await self.parts.aclose()
        return bytes(arrived[0].wire)

    def start(self, headers: Headers) -> Any:
        self._leaves(200)
        taken_ms = int((self._call.left_at - self._call.started) * 1000)
        headers = [
            *headers,
            (b"x-request-id", self._request_id.encode()),
            (b"openai-processing-ms", str(taken_ms).encode()),
            VERSION,
            *((name.encode(), value.encode("latin-1")) for name, value in self._call.headers.items()),
        ]
        return {"type": "http.response.start", "status": 200, "headers": headers}

    async def refuse(self, error: GatewayError, send: Send) -> None:
        self._leaves(error.status)
        self.failed(error)
        await ErrorResponse(error, self._request_id, self._call.headers).send(send)

    def completed(self) -> None:
        self._call.outcome = "completed"

    def failed(self, error: GatewayError) -> None:
        self._call.error = error

    def _leaves(self, status: int) -> None:
        self._call.status = status
        self._call.left_at = self._call.clock()


class _Stream:
    """
    An event stream on its way out.

    The status waits for the first part, so that a failure can still be one; after `hold_s`, and whenever nothing has
    been said for `keep_alive_s`, a comment keeps the connection alive.
    """

    def __init__(self, answer: Answer, send: Send) -> None:
        self._answer = answer
        self._send = send
        self._loop = answer.interrupt.loop
        self._begun = False
        self._spoke = self._loop.time()
        self._beat: asyncio.Task[None] | None = None

    async def run(self) -> None:
        self._timer = self._loop.call_later(self._answer.server.hold_s, self._ring)
        try:
            with self._answer.shutdown.running(self._answer.interrupt):
                async for arrived in self._answer.parts:
                    await self._write(write_events([part.wire for part in arrived]))
                await self._write(DONE, last=True)
            self._answer.completed()
        except GatewayError as exc:
            await self._fail(exc)
        except Exception as exc:
            await self._fail(unexpected(exc))
        finally:
            await self._answer.parts.aclose()
            self._timer.cancel()
            if self._beat is not None:
                self._beat.cancel()

    async def _write(self, block: bytes, *, last: bool = False) -> None:
        self._spoke = self._loop.time()
        if not self._begun:
            self._begun = True
            await self._send(self._answer.start(STREAM_HEADERS))
        await self._send({"type": "http.response.body", "body": block, "more_body": not last})

    async def _fail(self, error: GatewayError) -> None:
        """An error event and no `[DONE]`: SDKs raise, and nobody takes what came for the whole."""
        if self._begun:
            self._answer.failed(error)
            await self._write(write_events([error.json()]), last=True)
        else:
            self._begun = True
            await self._answer.refuse(error, self._send)

    def _ring(self) -> None:
        server, now = self._answer.server, self._loop.time()
        due = self._spoke + (server.keep_alive_s if self._begun else server.hold_s)
        if now >= due and (self._beat is None or self._beat.done()):
            self._beat = asyncio.ensure_future(self._write(KEEP_ALIVE))
            due = now + server.keep_alive_s
        self._timer = self._loop.call_at(max(due, now + 0.001), self._ring)

"""One request and its answer: what an ASGI application is given."""

import asyncio
import http
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Protocol

from gateway.api.client import CLIENT
from gateway.api.errors import ErrorResponse, Headers, unexpected

ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]

MAX_WAITING_BYTES = 64 * 1024
STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in http.HTTPStatus}
CONTINUE = STATUS_LINES[100] + b"\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n"
CLOSE = b"connection: close\r\n"
LAST_CHUNK = b"0\r\n\r\n"
WITHOUT_BODY = (204, 304)


class Line(Protocol):
    """What an exchange needs of the connection that it is on."""

    loop: asyncio.AbstractEventLoop
    is_writable: asyncio.Event

    @property
    def date(self) -> bytes:
        """The header of that name."""

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def write(self, data: bytes, *, last: bool = True) -> None:
        """Unless it is the last of an answer, it waits for what else is written in this turn of the event loop."""

    def answered(self, *, keep_alive: bool) -> None:
        """The exchange has come to its end."""

    def close(self) -> None: ...


class Exchange:
    """One request and its answer, for an ASGI application."""

    def __init__(self, connection: Line, scope: dict[str, Any], *, keep_alive: bool) -> None:
        self.scope = scope
        self.keep_alive = keep_alive
        self.more_body = True
        self.is_gone = False
        self.is_started = False
        self.is_complete = False
        self.loop = connection.loop
        self._connection = connection
        self._blocks: list[bytes] = []
        self._waiting_bytes = 0
        self._has_news = False
        self._news: asyncio.Event | None = None
        self._on_gone: Callable[[], None] | None = None
        self._head = b""  # until it leaves with the first block of the body
        self._is_chunked = False
        self._missing_bytes: int | None = None  # of the body; None where its length was not told
        scope["extensions"] = {CLIENT: self}

    async def run(self, app: ASGIApp) -> None:
        try:
            await app(self.scope, self.receive, self.send)
            if not self.is_started and not self.is_gone:
                raise RuntimeError("the application gave no answer")
        except Exception as exc:
            error = unexpected(exc)
            if not self.is_started:
                await ErrorResponse(error).send(self.send)
        finally:
            del self.scope["extensions"]  # they refer to us: a cycle for the garbage collector
            if not self.is_complete and not self.is_gone:
                self._connection.close()

    # What the connection tells.

    def take(self, block: bytes) -> None:
        if self.is_complete or self.is_gone:
            return
        self._blocks.append(block)
        self._waiting_bytes += len(block)
        if self._waiting_bytes > MAX_WAITING_BYTES:
            self._connection.pause_reading()
        self._tell()

    def take_end(self) -> None:
        self.more_body = False
        self._tell()

    def lose_client(self) -> None:
        if self.is_complete or self.is_gone:
            return
        self.is_gone = True
        self._tell()
        if self._on_gone is not None:
            self._on_gone()

    def _tell(self) -> None:
        self._has_news = True
        if self._news is not None:
            self._news.set()

    # For the application, beyond ASGI: see `gateway.api.client`.

    def body(self) -> bytes | None:
        if self.more_body or self.is_gone:
            return None
        self._has_news = False
        return b"".join(self._blocks)

    def when_gone(self, tell: Callable[[], None] | None) -> None:
        self._on_gone = tell
        if tell is not None and self.is_gone:
            tell()

    # ASGI.

    async def receive(self) -> Mapping[str, Any]:
        if not self._has_news and not self.is_gone and not self.is_complete:
            await self._wait_for_news()
        self._has_news = False
        if self.is_gone or self.is_complete:
            return {"type": "http.disconnect"}
        block = b"".join(self._blocks)
        self._blocks.clear()
        self._waiting_bytes = 0
        return {"type": "http.request", "body": block, "more_body": self.more_body}

    async def _wait_for_news(self) -> None:
        self._connection.resume_reading()
        if self._news is None:
            self._news = asyncio.Event()
            if self.more_body and not self.is_started and self._expects_continue():
                self._connection.write(CONTINUE)
        self._news.clear()
        await self._news.wait()

    def _expects_continue(self) -> bool:
        headers: Headers = self.scope["headers"]
        return any(name == b"expect" and value.lower() == b"100-continue" for name, value in headers)

    async def send(self, message: Mapping[str, Any]) -> None:
        """Raises RuntimeError where an answer would not be well-formed."""
        if not self._connection.is_writable.is_set():
            await self._connection.is_writable.wait()
        if self.is_gone:
            return
        if self.is_complete:
            raise RuntimeError("the answer is complete already")
        if self.is_started:
            self._send_block(message.get("body", b""), last=not message.get("more_body"))
        else:
            self._send_head(message["status"], message["headers"])

    def _send_head(self, status: int, headers: Headers) -> None:
        self.is_started = True
        if self.more_body and self._news is None and self._expects_continue():
            self.keep_alive = False  # the body that was not called for may come or not: nobody could tell
        fields = dict(headers)
        head = head_of(status, self._connection.date, headers)
        length = fields.get(b"content-length")
        if length is not None:
            self._missing_bytes = int(length)
        elif status not in WITHOUT_BODY and self.scope["method"] != "HEAD":
            self._is_chunked = self.scope["http_version"] == "1.1"
            head += CHUNKED if self._is_chunked else b""
        if b"connection" in fields:
            self.keep_alive = self.keep_alive and fields[b"connection"] != b"close"
        elif not self.keep_alive:
            head += CLOSE
        self._head = head + b"\r\n"

    def _send_block(self, block: bytes, *, last: bool) -> None:
        if self.scope["method"] == "HEAD":
            block = b""
        elif self._is_chunked:
            block = b"%x\r\n%b\r\n" % (len(block), block) if block else b""
            block += LAST_CHUNK if last else b""
        elif self._missing_bytes is not None:
            self._missing_bytes -= len(block)
            if self._missing_bytes < 0 or (last and self._missing_bytes):
                raise RuntimeError("the answer is not as long as it says")
        if self._head or block:
            self._connection.write(self._head + block, last=last)
            self._head = b""
        if last:
            self.is_complete = True
            self._tell()
            self._connection.answered(keep_alive=self.keep_alive)


def head_of(status: int, date: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The head of an answer, without the empty line at its end. Raises RuntimeError where a line would be two."""
    lines = [b": ".join(header) for header in headers]
    head = b"%b%b%b\r\n" % (STATUS_LINES[status], date, b"\r\n".join(lines))
    if not head.count(b"\n") == head.count(b"\r") == 2 + len(lines):
        raise RuntimeError("a header of the answer has a line break in it")
    return head

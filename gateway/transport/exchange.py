"""One request and its answer: the parser writes one end, the caller reads the other."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from functools import cached_property
from typing import NamedTuple

import httptools
import httpx2

from gateway.transport.asking import FRAMING, RawHeaders
from gateway.transport.pool import Connection, Pool

BLOCK_BYTES = 65_536
PORTION_BYTES = 16_384
MAX_HEADERS = 256
EXTENSIONS = {"1.1": {"http_version": b"HTTP/1.1"}, "1.0": {"http_version": b"HTTP/1.0"}}

Timeouts = Mapping[str, float | None]


class Limits(NamedTuple):
    header_bytes: int
    buffer_bytes: int


class Response(httpx2.Response):
    """An answer whose head is here. What `headers` costs httpx2 is spent only when they are asked for."""

    next_request = None
    is_closed = is_stream_consumed = False
    default_encoding = "utf-8"
    _num_bytes_downloaded = 0

    stream: "Exchange"

    def __init__(self, status: int, raw_headers: RawHeaders, exchange: "Exchange", request: httpx2.Request) -> None:
        self.status_code = status
        self.raw_headers = raw_headers
        self.stream = exchange
        self.extensions = EXTENSIONS[exchange.version]
        self.history = []
        self._request = request

    @cached_property
    def headers(self) -> httpx2.Headers:  # type: ignore[override]
        return httpx2.Headers(list(self.raw_headers))

    async def aclose(self) -> None:
        """Without httpx2's context that names the request in an error: there is none."""
        self.is_closed = True
        await self.stream.aclose()


class Exchange(httpx2.AsyncByteStream):
    """One request and its answer: httptools calls `on_…`, the caller iterates."""

    def __init__(self, request: httpx2.Request, pool: Pool, limits: Limits) -> None:
        self._request = request
        self._pool = pool
        self._limits = limits
        self._connection: Connection | None = None
        self._blocks: list[bytes] = []
        self.on_body = self._blocks.append  # for the parser, which finds as many blocks as there are chunks
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._ended = False  # it has no connection and no slot any more
        self._unsent = False
        self._heard = False
        self._status = 0  # until the head is whole
        self.version = ""
        self._headers: list[tuple[bytes, bytes]] = []
        self._keep_alive = False
        self._until_close = False
        self._whole = False
        self._queued_bytes = 0
        self._barren_bytes = 0  # received since the last byte of a body

    async def run(self, connection: Connection, head: bytes, body: bytes, timeouts: Timeouts) -> bool:
        """Sends the request and waits for the head of the answer; False: the connection was stale, try another."""
        self._connection = connection
        connection.exchange = self
        if len(body) <= BLOCK_BYTES:
            connection.write(head + body)
        else:
            connection.expect_progress(timeouts.get("write"))
            await self._upload(connection, head, body)
        if self._connection is not None:
            connection.expect_progress(timeouts.get("read"))
        while self._unanswered():
            await self._wait()
        if self._error is not None and not self._status:
            raise self._error
        return self._status != 0

    def response(self) -> Response:
        return Response(self._status, self._headers, self, self._request)

    # What the caller sees.

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        while not self._blocks:
            if self._error is not None:
                raise self._error
            if self._whole:
                raise StopAsyncIteration
            try:
                await self._wait()
            except asyncio.CancelledError:
                self.close()
                raise
        return self._take()

    async def aclose(self) -> None:
        self.close()

    def close(self) -> None:
        """Ends it where it stands; what was not read is gone."""
        self._blocks.clear()
        if not self._ended:
            self._end(httpx2.StreamClosed())

    # What the connection tells.

    def fail(self, error: httpx2.RequestError) -> None:
        error.request = self._request
        self._end(error)

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def feed(self, data: bytes) -> None:
        self._heard = True
        self._barren_bytes += len(data)
        known = len(self._blocks)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            if not self._whole:
                self.fail(httpx2.RemoteProtocolError(str(exc.__context__ or exc)))
                return
            self._keep_alive = False  # more than an answer: the answer is good, the connection is not
        if len(self._blocks) > known:
            if self._request.method == "HEAD":  # the parser cannot know, and took what comes for a body
                self._blocks.clear()
            self._queued_bytes += sum(map(len, self._blocks[known:]))
            self._barren_bytes = 0
        if self._whole:
            self._end()
        elif self._barren_bytes > self._limits.header_bytes:
            self.fail(httpx2.RemoteProtocolError("too many bytes that are not of a body"))
        else:
            if self._queued_bytes > self._limits.buffer_bytes and self._connection is not None:
                self._connection.pause_reading()
            self.wake()

    def lost(self, exc: Exception | None) -> None:
        if self._connection is not None and self._connection.reused and not self._heard:
            self._connection = None
            self.wake()
        elif exc is not None:
            kind = httpx2.WriteError if self._unsent else httpx2.ReadError
            self.fail(kind(str(exc) or type(exc).__name__))
        elif self._until_close:
            self._whole = True
            self._end()
        else:
            self.fail(httpx2.RemoteProtocolError("the connection was closed before the end of the answer"))

    def silent(self) -> None:
        if self._unsent and not self._status:
            self.fail(httpx2.WriteTimeout("the upstream does not take the request"))
        else:
            self.fail(httpx2.ReadTimeout("the upstream is silent"))

    # What the parser finds.

    def on_message_begin(self) -> None:
        if self._whole:
            raise httpx2.RemoteProtocolError("bytes after the end of the answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._status:  # else it is a trailer
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        self.version = self._parser.get_http_version()
        if status < 100 or status == 101 or self.version not in EXTENSIONS:
            raise httpx2.RemoteProtocolError(f"HTTP/{self.version} {status} was not asked for")
        if len(self._headers) > MAX_HEADERS or self._header_bytes() > self._limits.header_bytes:
            raise httpx2.RemoteProtocolError("too many headers")
        if status < 200:
            self._headers.clear()
            return
        self._until_close = not _is_framed(self._headers)
        self._keep_alive = self._parser.should_keep_alive()
        self._status = status
        if self._request.method == "HEAD":  # the parser cannot know, and now expects a body
            self._whole = True
            self._keep_alive = False

    def on_message_complete(self) -> None:
        self._whole = self._status != 0

    # How it goes on, and ends.

    async def _upload(self, connection: Connection, head: bytes, body: bytes) -> None:
        """Stops as soon as an answer has come: it is then an error, or at least the last word."""
        self._unsent = True
        connection.write(head)
        view = memoryview(body)
        for start in range(0, len(body), BLOCK_BYTES):
            connection.write(view[start : start + BLOCK_BYTES])
            while connection.writing_paused and self._unanswered():
                await self._wait()
            if not self._unanswered():
                return
        self._unsent = False

    def _header_bytes(self) -> int:
        if self._barren_bytes <= self._limits.header_bytes:
            return self._barren_bytes  # with all that came along: no need to count
        return sum(len(name) + len(value) + 4 for name, value in self._headers)

    def _unanswered(self) -> bool:
        return self._status == 0 and self._connection is not None

    async def _wait(self) -> None:
        assert self._connection is not None  # or there were nothing to wait for
        self._waiter = self._connection.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _take(self) -> bytes:
        """All there is, or of much only some: each stage behind this holds a copy while its client does not read."""
        blocks, count = self._blocks, len(self._blocks)
        if self._queued_bytes > PORTION_BYTES:
            size = count = 0
            while size < PORTION_BYTES and count < len(blocks):
                size += len(blocks[count])
                count += 1
        block = blocks[0] if count == 1 else b"".join(blocks[:count])
        del blocks[:count]
        self._queued_bytes -= len(block)
        if self._connection is not None and self._queued_bytes <= self._limits.buffer_bytes:
            self._connection.resume_reading()
        return block

    def _end(self, error: Exception | None = None) -> None:
        if self._ended:
            return
        self._ended = True
        self._error = error
        del self._parser  # it refers to us: a cycle for the garbage collector
        connection, self._connection = self._connection, None
        reusable = error is None and self._keep_alive and not self._unsent
        self._pool.release(connection, reusable=reusable)
        self.wake()


def _is_framed(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether the answer says where it ends. The parser has refused all that is ambiguous, but for codings."""
    framed = False
    for name, value in headers:
        lower = name.lower()
        if lower == b"transfer-encoding" and (framed or value.strip().lower() != b"chunked"):
            raise httpx2.RemoteProtocolError("a transfer coding other than chunked")
        framed = framed or lower in FRAMING
    return framed

"""How does a request reach an upstream, and how does its answer come back?

HTTP/1.1 on asyncio protocols and httptools' parser, behind httpx2's transport interface. The life of a connection:

    connect ──► sending ──► head ──► body ──► idle ──► sending ──► …
                   │         │        │        │
                   └─────────┴────────┴────────┴──► closed

It is idle from the moment the last byte of an answer is parsed, whether or not that answer has been read. Errors,
timeouts, cancellation and an answer closed before its end all close it; an idle one is closed when it expires, is
evicted, or when its peer says anything.

A `_Connection` moves bytes and keeps time. An `_Exchange` is one request and its answer: the parser writes one end,
the caller reads the other. It holds a slot of the `_Pool` from before it has a connection until `_end`, its only exit.
All of it runs on one event loop, without a task of its own.
"""

import asyncio
import re
import ssl
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, cast

import httptools
import httpx2

from gateway.addresses import Addresses

_BLOCK_BYTES = 65_536
_PORTION_BYTES = 16_384
_MAX_HEADERS = 256
_TIMER_SLACK_S = 0.001
_FAREWELL_S = 1.0

_LINES = rb"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\0\r\n]*\r\n)*"
_HEADERS = re.compile(_LINES)
_HEAD = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+ [!-~]+ HTTP/1\.1\r\n" + _LINES)
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})
_METHODS_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})
_EXTENSIONS = {"1.1": {"http_version": b"HTTP/1.1"}, "1.0": {"http_version": b"HTTP/1.0"}}

RawHeaders = Sequence[tuple[bytes, bytes]]
_Timeouts = Mapping[str, float | None]


class _Origin(NamedTuple):
    scheme: str
    raw_host: bytes
    port: int | None


class _Limits(NamedTuple):
    header_bytes: int
    buffer_bytes: int


class Preamble:
    """What many requests to one address have in common: checked and written once.

    Raises LocalProtocolError where it is malformed.
    """

    def __init__(self, method: str, url: httpx2.URL, headers: RawHeaders) -> None:
        self.method = method
        self.url = url
        self.headers = headers
        self.origin = _Origin(url.scheme, url.raw_host, url.port)
        self.wire = _opening(httpx2.Request(method, url, headers=list(headers), stream=httpx2.ByteStream(b"")))


class Request(httpx2.Request):
    """A request with a preamble, and *headers* of its own, none of which frames it.

    What `headers` costs httpx2 is spent only when they are asked for; all else is ready to leave.
    """

    def __init__(self, preamble: Preamble, headers: RawHeaders, body: bytes, extensions: dict[str, Any]) -> None:
        self.method = preamble.method
        self.url = preamble.url
        self.extensions = extensions
        self.stream = httpx2.ByteStream(body)
        self.preamble = preamble
        self.own_headers = headers
        self._content = body

    @cached_property
    def headers(self) -> httpx2.Headers:  # type: ignore[override]
        length = (b"content-length", b"%d" % len(self._content))
        return httpx2.Headers([*self.preamble.headers, *self.own_headers, length])


class Response(httpx2.Response):
    """An answer whose head is here. What `headers` costs httpx2 is spent only when they are asked for."""

    next_request = None
    is_closed = is_stream_consumed = False
    default_encoding = "utf-8"
    _num_bytes_downloaded = 0

    stream: "_Exchange"

    def __init__(self, status: int, raw_headers: RawHeaders, exchange: "_Exchange", request: httpx2.Request) -> None:
        self.status_code = status
        self.raw_headers = raw_headers
        self.stream = exchange
        self.extensions = _EXTENSIONS[exchange.version]
        self.history = []
        self._request = request

    @cached_property
    def headers(self) -> httpx2.Headers:  # type: ignore[override]
        return httpx2.Headers(list(self.raw_headers))

    async def aclose(self) -> None:
        """Without httpx2's context that names the request in an error: there is none."""
        self.is_closed = True
        await self.stream.aclose()


def _origin(request: httpx2.Request) -> _Origin:
    if isinstance(request, Request):
        return request.preamble.origin
    url = request.url
    return _Origin(url.scheme, url.raw_host, url.port)


class Transport(httpx2.AsyncBaseTransport):
    """Redirects, cookies, proxies and decompression are not its business.

    `request.extensions["timeout"]` may set `connect`, `read`, `write` and `pool` in seconds; None or absent: no bound.
    `read` bounds the silence between two arrivals of bytes, before the head as well. A request is repeated, once, only
    where a reused connection turns out to be closed before any byte of the answer.

    The response's stream yields what has arrived since it was last asked, as one block unless that is much. Whoever
    does not read it to its end must `aclose()` it, which closes the connection at once; a read that is cancelled does
    so by itself.
    """

    def __init__(
        self,
        *,
        max_connections: int = 1000,
        max_idle: int = 100,
        keepalive_s: float = 2.0,
        max_header_bytes: int = 65_536,
        max_buffer_bytes: int = 262_144,
        ssl_context: ssl.SSLContext | None = None,
        addresses: Addresses | None = None,
    ) -> None:
        """`max_connections` counts idle ones too; `max_idle` is per origin; `ssl_context` None: the system's CAs."""
        self._pool = _Pool(max_connections, max_idle, keepalive_s)
        self._limits = _Limits(max_header_bytes, max_buffer_bytes)
        self._ssl_context = ssl_context
        self._addresses = addresses or Addresses()

    @property
    def open_connections(self) -> int:
        return len(self._pool.connections)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Raises httpx2's TransportErrors. Only the head has arrived when it returns."""
        sync = isinstance(request.stream, httpx2.SyncByteStream)
        body = request.read() if sync else await request.aread()
        head = _head(request, len(body))
        origin = _origin(request)
        timeouts: _Timeouts = request.extensions.get("timeout") or {}
        if not self._pool.acquire():
            await self._pool.wait(request, timeouts.get("pool"))
        exchange = _Exchange(request, self._pool, self._limits)
        try:
            connection = self._pool.take(origin)
            while connection is None or not await exchange.run(connection, head, body, timeouts):
                connection = await self._connect(origin, request, timeouts.get("connect"))
        except BaseException:
            exchange.close()
            raise
        return exchange.response()

    async def aclose(self) -> None:
        """Answers still being read end with ReadError. Returns when their sockets are closed."""
        self._addresses.close()
        await self._pool.aclose()

    async def _connect(self, origin: _Origin, request: httpx2.Request, timeout_s: float | None) -> "_Connection":
        if self._pool.closed:
            raise httpx2.ConnectError("the transport is closed", request=request)
        self._pool.make_room()
        tls = self._tls(origin, request)
        try:
            async with asyncio.timeout(timeout_s):
                connection = await self._reach(origin, tls, timeout_s)
        except TimeoutError as exc:
            raise httpx2.ConnectTimeout("the connection was not made in time", request=request) from exc
        except (OSError, UnicodeError, OverflowError) as exc:
            raise httpx2.ConnectError(str(exc), request=request) from exc
        if connection.closed:
            raise httpx2.ConnectError("the connection was closed as soon as it was made", request=request)
        return connection

    async def _reach(self, origin: _Origin, tls: ssl.SSLContext | None, timeout_s: float | None) -> "_Connection":
        """A connection to the first of the host's addresses that takes one; no address may use up the time of all."""
        host, port = origin.raw_host.decode("ascii"), origin.port or (443 if tls else 80)
        addresses = await self._addresses.of(host, port)
        share_s = None if timeout_s is None else timeout_s / len(addresses)
        for address in addresses[:-1]:
            try:
                async with asyncio.timeout(share_s):
                    return await self._open(origin, host, address, port, tls)
            except OSError:
                self._addresses.failed(address)
        try:
            return await self._open(origin, host, addresses[-1], port, tls)
        except OSError:
            self._addresses.failed(addresses[-1])
            raise

    async def _open(
        self, origin: _Origin, host: str, address: str, port: int, tls: ssl.SSLContext | None
    ) -> "_Connection":
        loop = asyncio.get_running_loop()
        connection = _Connection(self._pool, origin, loop)
        server_hostname = host if tls else None
        try:
            await loop.create_connection(lambda: connection, address, port, ssl=tls, server_hostname=server_hostname)
        except BaseException:
            self._pool.gone(connection)  # uvloop, when cancelled after connection_made, calls no connection_lost
            raise
        return connection

    def _tls(self, origin: _Origin, request: httpx2.Request) -> ssl.SSLContext | None:
        if not origin.raw_host or origin.scheme not in ("http", "https"):
            raise httpx2.UnsupportedProtocol("the URL is not http://… or https://…", request=request)
        if origin.scheme == "http":
            return None
        if self._ssl_context is None:
            self._ssl_context = ssl.create_default_context()
        return self._ssl_context


def _head(request: httpx2.Request, body_bytes: int) -> bytes:
    if not isinstance(request, Request):
        return _opening(request) + _ending(request.method, body_bytes)
    lines = b"".join([b"%b: %b\r\n" % header for header in request.own_headers])
    _check(request, lines, len(request.own_headers), _HEADERS)
    return request.preamble.wire + lines + _ending(request.method, body_bytes)


def _opening(request: httpx2.Request) -> bytes:
    """The framing headers are always ours: one that disagrees with the body would smuggle a second request."""
    lines = [b"%b %b HTTP/1.1\r\n" % (request.method.encode(), request.url.raw_path)]
    has_host = False
    for name, value in request.headers.raw:
        lower = name.lower()
        if lower not in _FRAMING:
            lines.append(b"%b: %b\r\n" % (name, value))
            has_host = has_host or lower == b"host"
    if not has_host:
        lines.insert(1, b"host: %b\r\n" % request.url.netloc)
    opening = b"".join(lines)
    _check(request, opening, len(lines), _HEAD)
    return opening


def _check(request: httpx2.Request, wire: bytes, lines: int, form: re.Pattern[bytes]) -> None:
    if wire.count(b"\n") != lines or not form.fullmatch(wire):  # a value may hide a line that is well formed
        raise httpx2.LocalProtocolError("the request line or a header is malformed", request=request)


def _ending(method: str, body_bytes: int) -> bytes:
    framed = body_bytes or method in _METHODS_WITH_BODY
    return b"content-length: %d\r\n\r\n" % body_bytes if framed else b"\r\n"


class _Pool:
    """Who may have a connection, and which are idle.

    Slots taken plus idle connections never exceed `max_connections`: whoever gets a slot while idle connections fill
    the rest takes one of them, or has the oldest closed before it opens another.
    """

    def __init__(self, max_connections: int, max_idle: int, keepalive_s: float) -> None:
        self.connections: set[_Connection] = set()
        self.closed = False
        self._max_connections = max_connections
        self._max_idle = max_idle
        self._keepalive_s = keepalive_s
        self._slots_taken = 0
        self._waiters: OrderedDict[asyncio.Future[None], None] = OrderedDict()
        self._idle: dict[_Origin, dict[_Connection, None]] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._emptied: asyncio.Future[None] | None = None

    def acquire(self) -> bool:
        """Takes a slot, which `release` gives back; False: there is none, and one must `wait` for it."""
        if self._slots_taken >= self._max_connections:
            return False
        self._slots_taken += 1
        return True

    async def wait(self, request: httpx2.Request, timeout_s: float | None) -> None:
        """Takes a slot when it is our turn: first come, first served."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = None
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
        except BaseException as exc:
            self._waiters.pop(waiter, None)
            if waiter.done() and not waiter.cancelled():
                self._free_slot()  # granted in the very moment in which we stopped waiting
            if isinstance(exc, TimeoutError):
                raise httpx2.PoolTimeout("no connection became free in time", request=request) from exc
            raise

    def release(self, connection: "_Connection | None", *, reusable: bool) -> None:
        if connection is not None:
            if reusable and not self.closed:
                self._keep(connection)
            else:
                connection.abort()
        self._free_slot()

    def take(self, origin: _Origin) -> "_Connection | None":
        """The idle connection used last: the others may then grow old and go."""
        idle = self._idle.get(origin)
        if not idle:
            return None
        connection = next(reversed(idle))
        if connection.idle_since <= connection.loop.time() - self._keepalive_s:
            for expired in list(idle):
                expired.abort()
            return None
        self.forget(connection)
        return connection

    def make_room(self) -> None:
        while self._slots_taken + sum(map(len, self._idle.values())) > self._max_connections:
            oldest = min((next(iter(idle)) for idle in self._idle.values()), key=lambda idle: idle.idle_since)
            oldest.abort()

    def forget(self, connection: "_Connection") -> None:
        """The connection is idle no more, if it was."""
        idle = self._idle.get(connection.origin)
        if idle is not None and connection in idle:
            del idle[connection]
            if not idle:
                del self._idle[connection.origin]

    def gone(self, connection: "_Connection") -> None:
        self.connections.discard(connection)
        if self._emptied is not None and not self.connections and not self._emptied.done():
            self._emptied.set_result(None)

    async def aclose(self) -> None:
        self.closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in list(self.connections):
            connection.shut()
        if self.connections:
            self._emptied = self._emptied or asyncio.get_running_loop().create_future()
            await asyncio.wait({self._emptied}, timeout=_FAREWELL_S)

    def _keep(self, connection: "_Connection") -> None:
        connection.rest()
        idle = self._idle.setdefault(connection.origin, {})
        idle[connection] = None
        if len(idle) > self._max_idle:
            next(iter(idle)).abort()
        if self._sweeper is None:
            self._sweeper = connection.loop.call_later(self._keepalive_s, self._sweep, connection.loop)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        self._sweeper = None
        newest_expired = loop.time() - self._keepalive_s + _TIMER_SLACK_S
        for idle in list(self._idle.values()):
            for connection in list(idle):
                if connection.idle_since > newest_expired:
                    break
                connection.abort()
        if self._idle:
            oldest = min(next(iter(idle)).idle_since for idle in self._idle.values())
            self._sweeper = loop.call_at(oldest + self._keepalive_s, self._sweep, loop)

    def _free_slot(self) -> None:
        while self._waiters:
            waiter, _ = self._waiters.popitem(last=False)
            if not waiter.done():
                waiter.set_result(None)
                return
        self._slots_taken -= 1


class _Connection(asyncio.Protocol):
    """One socket: bytes in both directions, and the clock of the silence between them."""

    def __init__(self, pool: _Pool, origin: _Origin, loop: asyncio.AbstractEventLoop) -> None:
        self.origin = origin
        self.loop = loop
        self.exchange: _Exchange | None = None
        self.reused = False
        self.closed = False
        self.idle_since = 0.0
        self.writing_paused = False
        self.reading_paused = False
        self._pool = pool
        self._transport: asyncio.Transport
        self._patience_s: float | None = None
        self._last_progress = 0.0
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._pool.connections.add(self)
        if self._pool.closed:
            self.abort()

    def data_received(self, data: bytes) -> None:
        if self.exchange is None:
            self.abort()  # an answer that nobody asked for must not be taken for the next one's
            return
        self._last_progress = self.loop.time()
        self.exchange.feed(data)

    def eof_received(self) -> None:
        self._lose(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose(exc)
        self._pool.gone(self)

    def pause_writing(self) -> None:
        self.writing_paused = True

    def resume_writing(self) -> None:
        self.writing_paused = False
        self._last_progress = self.loop.time()
        if self.exchange is not None:
            self.exchange.wake()

    def write(self, data: bytes | memoryview) -> None:
        if not self._transport.is_closing():  # uvloop's would raise; `connection_lost` is on its way
            self._transport.write(data)

    def pause_reading(self) -> None:
        if not self.reading_paused:
            self.reading_paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self.reading_paused:
            self.reading_paused = False
            self._last_progress = self.loop.time()
            if not self._transport.is_closing():
                self._transport.resume_reading()

    def expect_progress(self, patience_s: float | None) -> None:
        """From now on a silence of `patience_s` ends the exchange; None: silence is fine.

        The alarm is moved only when it rings too early, so that a request seldom costs a timer.
        """
        self._patience_s = patience_s
        if patience_s is not None:
            self._last_progress = self.loop.time()
            self._set_alarm(self._last_progress + patience_s)

    def rest(self) -> None:
        self.exchange = None
        self.reused = True
        self.idle_since = self.loop.time()
        self.resume_reading()

    def shut(self) -> None:
        """Closes the connection because the transport closes."""
        if self.exchange is not None:
            self.exchange.fail(httpx2.ReadError("the transport was closed"))
        self.abort()

    def abort(self) -> None:
        """Closes the connection now, without a farewell: what is still buffered is not sent."""
        self.exchange = None
        self.closed = True
        self._pool.forget(self)
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        self._transport.abort()

    def _lose(self, exc: Exception | None) -> None:
        if self.exchange is not None:
            self.exchange.lost(exc)
        self.abort()

    def _set_alarm(self, due: float) -> None:
        if self._alarm is not None:
            if self._alarm_at <= due:
                return
            self._alarm.cancel()
        self._alarm_at = due
        self._alarm = self.loop.call_at(due, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        if self.exchange is None or self._patience_s is None:
            return
        now = self.loop.time()
        if self.reading_paused:
            self._last_progress = now  # the silence is ours
        due = self._last_progress + self._patience_s
        if due > now + _TIMER_SLACK_S:
            self._set_alarm(due)
        else:
            self.exchange.silent()


class _Exchange(httpx2.AsyncByteStream):
    """One request and its answer: httptools calls `on_…`, the caller iterates."""

    def __init__(self, request: httpx2.Request, pool: _Pool, limits: _Limits) -> None:
        self._request = request
        self._pool = pool
        self._limits = limits
        self._connection: _Connection | None = None
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
        self._blocks: list[bytes] = []
        self._queued_bytes = 0
        self._barren_bytes = 0  # received since the last byte of a body

    async def run(self, connection: _Connection, head: bytes, body: bytes, timeouts: _Timeouts) -> bool:
        """Sends the request and waits for the head of the answer; False: the connection was stale, try another."""
        self._connection = connection
        connection.exchange = self
        if len(body) <= _BLOCK_BYTES:
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
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            if not self._whole:
                self.fail(httpx2.RemoteProtocolError(str(exc.__context__ or exc)))
                return
            self._keep_alive = False  # more than an answer: the answer is good, the connection is not
        if self._whole:
            self._end()
        elif self._barren_bytes > self._limits.header_bytes:
            self.fail(httpx2.RemoteProtocolError("too many bytes that are not of a body"))
        else:
            if self._queued_bytes > self._limits.buffer_bytes and self._connection is not None:
                self._connection.pause_reading()
            self.wake()

    def lost(self, exc: Exception | None) -> None:
        """The peer closed the connection, or (`exc`) broke it."""
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
        if status < 100 or status == 101 or self.version not in _EXTENSIONS:
            raise httpx2.RemoteProtocolError(f"HTTP/{self.version} {status} was not asked for")
        if len(self._headers) > _MAX_HEADERS or self._header_bytes() > self._limits.header_bytes:
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

    def on_body(self, block: bytes) -> None:
        if not self._whole:
            self._blocks.append(block)
            self._queued_bytes += len(block)
            self._barren_bytes = 0

    def on_message_complete(self) -> None:
        self._whole = self._status != 0

    # How it goes on, and ends.

    async def _upload(self, connection: _Connection, head: bytes, body: bytes) -> None:
        """Stops as soon as an answer has come: it is then an error, or at least the last word."""
        self._unsent = True
        connection.write(head)
        view = memoryview(body)
        for start in range(0, len(body), _BLOCK_BYTES):
            connection.write(view[start : start + _BLOCK_BYTES])
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
        if self._queued_bytes > _PORTION_BYTES:
            size = count = 0
            while size < _PORTION_BYTES and count < len(blocks):
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
        framed = framed or lower in _FRAMING
    return framed

"""How does a request reach an upstream, and how does its answer come back?

HTTP/1.1 on asyncio protocols and httptools' parser, behind httpx2's transport interface. The life of a connection:

    connect ──► sending ──► head ──► body ──► idle ──► sending ──► …
                   │         │        │        │
                   └─────────┴────────┴────────┴──► closed

It is idle from the moment the last byte of an answer is parsed, whether or not that answer has been read. Errors,
timeouts, cancellation and an answer closed before its end all close it; an idle one is closed when it expires, is
evicted, or when its peer says anything.

A `Connection` moves bytes and keeps time. An `Exchange` is one request and its answer: the parser writes one end,
the caller reads the other. It holds a slot of the `Pool` from before it has a connection until `_end`, its only exit.
All of it runs on one event loop, without a task of its own.
"""

import asyncio
import ssl

import httpx2

from gateway.addresses import Addresses
from gateway.transport.asking import Origin, Request, head_of, origin_of
from gateway.transport.exchange import Exchange, Limits, Timeouts
from gateway.transport.pool import Connection, Pool


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
        self._pool = Pool(max_connections, max_idle, keepalive_s)
        self._limits = Limits(max_header_bytes, max_buffer_bytes)
        self._ssl_context = ssl_context
        self._addresses = addresses or Addresses()

    @property
    def open_connections(self) -> int:
        return len(self._pool.connections)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Raises httpx2's TransportErrors. Only the head has arrived when it returns."""
        body = request.body if isinstance(request, Request) else await _read(request)
        head = head_of(request, len(body))
        origin = origin_of(request)
        timeouts: Timeouts = request.extensions.get("timeout") or {}
        if not self._pool.acquire():
            await self._pool.wait(request, timeouts.get("pool"))
        exchange = Exchange(request, self._pool, self._limits)
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

    async def _connect(self, origin: Origin, request: httpx2.Request, timeout_s: float | None) -> Connection:
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

    async def _reach(self, origin: Origin, tls: ssl.SSLContext | None, timeout_s: float | None) -> Connection:
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

    async def _open(self, origin: Origin, host: str, address: str, port: int, tls: ssl.SSLContext | None) -> Connection:
        loop = asyncio.get_running_loop()
        connection = Connection(self._pool, origin, loop)
        server_hostname = host if tls else None
        try:
            await loop.create_connection(lambda: connection, address, port, ssl=tls, server_hostname=server_hostname)
        except BaseException:
            self._pool.gone(connection)  # uvloop, when cancelled after connection_made, calls no connection_lost
            raise
        return connection

    def _tls(self, origin: Origin, request: httpx2.Request) -> ssl.SSLContext | None:
        if not origin.raw_host or origin.scheme not in ("http", "https"):
            raise httpx2.UnsupportedProtocol("the URL is not http://… or https://…", request=request)
        if origin.scheme == "http":
            return None
        if self._ssl_context is None:
            self._ssl_context = ssl.create_default_context()
        return self._ssl_context


async def _read(request: httpx2.Request) -> bytes:
    return request.read() if isinstance(request.stream, httpx2.SyncByteStream) else await request.aread()

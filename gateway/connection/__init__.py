"""
How is HTTP/1.1 spoken with a client?

A `Connection` reads requests with httptools' parser, has a deadline for whatever a client can be slow at, and answers
by itself what is not HTTP. An `Exchange` is one request and its answer: what an ASGI application is given. Requests
that arrive before their predecessor is answered wait in line.
"""

import asyncio
import enum
import ipaddress
import math
from collections import deque
from collections.abc import Callable, Coroutine, MutableSequence
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

import httptools

from gateway.api.errors import ErrorResponse, Headers
from gateway.api.shutdown import Shutdown
from gateway.auth import client_address
from gateway.connection.exchange import ASGIApp, Exchange, head_of
from gateway.errors import GatewayError, HeadersTooLarge, InvalidRequest, Overloaded, RequestTimeout
from gateway.settings import Server

IDLE_S = 75.0  # longer than clients keep an idle connection, so that none is closed under a request
LINGER_S = 1.0  # a refused client is heard out for so long: closed at once, it might not see why
LISTEN_AGAIN_S = 0.25
MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 1000
MAX_IN_LINE = 100
MAX_HELD_BYTES = 64 * 1024
BODY_HEADERS = (b"content-length", b"transfer-encoding")
NO_UPGRADE = "This server speaks HTTP/1.1 only: do not ask to upgrade (in Java: HttpClient.Version.HTTP_1_1)."
ASGI = {"version": "3.0", "spec_version": "2.3"}
NOWHERE: deque[tuple[bytes, bytes]] = deque(maxlen=0)
"""Where trailers go: whoever looks at headers does not expect any behind the body."""


class Connections:
    """All that a process has, and what they share. *on_left* is called when one of them is gone."""

    def __init__(self, app: ASGIApp, settings: Server, shutdown: Shutdown, on_left: Callable[[], None]) -> None:
        self.app = app
        self.settings = settings
        self.shutdown = shutdown
        self.trusted = [ipaddress.ip_network(network) for network in settings.trusted_proxies]
        self.open: set[Connection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.date = b""
        self._on_left = on_left

    def run(self, serving: Coroutine[Any, Any, None]) -> None:
        """In a task that is one of `tasks` until it ends."""
        task = asyncio.get_running_loop().create_task(serving)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def left(self, connection: "Connection") -> None:
        self.open.discard(connection)
        self._on_left()

    def are_too_many(self) -> bool:
        limit = self.settings.max_connections
        return limit is not None and len(self.open) > limit


class Reading(enum.Enum):
    NOTHING = enum.auto()
    HEAD = enum.auto()
    BODY = enum.auto()


class Connection(asyncio.Protocol):
    """One timer, armed anew only when it rings early, does for all the requests of a connection."""

    transport: asyncio.Transport

    def __init__(self, shared: Connections) -> None:
        self.loop = asyncio.get_running_loop()
        self.shared = shared
        self.is_writable = asyncio.Event()
        self.is_writable.set()
        self._settings = shared.settings
        self._parser = httptools.HttpRequestParser(self)
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)  # or the error hides the answer before it
        self._waiting: deque[Exchange] = deque()
        self._active: Exchange | None = None
        self._read: Exchange | None = None
        self._reading = Reading.NOTHING
        self._reading_paused = False
        self._url = b""
        self._headers: Headers = []
        self._listed: MutableSequence[tuple[bytes, bytes]] = NOWHERE
        self._barren_bytes = 0  # received since the last byte of a body, or the beginning of a head
        self._arrived_bytes = 0
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._turn: asyncio.Future[tuple[Exchange, ASGIApp]] | None = None
        self._fault: GatewayError | None = None
        self._surplus = False
        self._due = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._stall: asyncio.TimerHandle | None = None

    # What the transport tells.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self._server = _address(transport.get_extra_info("sockname"))
        self._client = _address(transport.get_extra_info("peername"))
        self.shared.open.add(self)
        self._surplus = self.shared.are_too_many()
        self._expect(self._settings.header_timeout_s)

    def data_received(self, data: bytes) -> None:
        if self._fault is not None:
            return
        self._arrived_bytes = len(data)
        self._barren_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # the answer is the last: see `on_headers_complete`
        except httptools.HttpParserError:
            self._misunderstood()
        if self._barren_bytes > MAX_HEAD_BYTES and self._reading is not Reading.NOTHING and self._fault is None:
            self._fault = _head_too_large()
            self._misunderstood()

    def pause_writing(self) -> None:
        self.is_writable.clear()
        self._stall = self.loop.call_later(self._settings.write_stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        self.is_writable.set()
        if self._stall is not None:
            self._stall.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        del self._parser  # it refers to us: a cycle for the garbage collector
        self._waiting.clear()
        if self._active is not None:
            self._active.lose_client()
        self._active = self._read = None
        self.is_writable.set()
        for timer in (self._timer, self._stall):
            if timer is not None:
                timer.cancel()
        if self._turn is not None:
            self._turn.cancel()
        self.shared.left(self)

    # What the parser tells.

    def on_message_begin(self) -> None:
        self._url = b""
        self._headers = self._listed = []
        self._reading = Reading.HEAD
        self._barren_bytes = 0
        self._expect(self._settings.header_timeout_s)

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._listed.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self._barren_bytes + self._arrived_bytes > MAX_HEAD_BYTES or len(self._headers) > MAX_HEADERS:
            self._measure_head()  # what arrived may be more than the head
        self._barren_bytes = 0
        self._listed = NOWHERE
        parser = self._parser
        upgrades = parser.should_upgrade()
        if upgrades and any(name in BODY_HEADERS for name, _ in self._headers):
            raise self._at_fault(InvalidRequest(NO_UPGRADE, code="upgrade_not_supported"))
        scope = self._scope(parser.get_method().decode("ascii"), parser.get_http_version())
        goes_on = parser.should_keep_alive() and not upgrades and not self.shared.shutdown.begun
        self._read = exchange = Exchange(self, scope, keep_alive=goes_on and scope["http_version"] == "1.1")
        self._reading = Reading.BODY
        self._due = math.inf
        if self.is_idle:
            self._begin(exchange)
        else:
            self._waiting.append(exchange)
            self.pause_reading()
            self.loop.call_later(LISTEN_AGAIN_S, self._listen_again)

    def _listen_again(self) -> None:
        """Or nobody would notice that a client leaves; one with many in line is not heard before their turn."""
        if len(self._waiting) < MAX_IN_LINE:
            self.resume_reading()

    def on_body(self, block: bytes) -> None:
        assert self._read is not None
        self._barren_bytes = 0
        self._read.take(block)

    def on_message_complete(self) -> None:
        self._reading = Reading.NOTHING
        exchange = self._read
        assert exchange is not None
        if exchange.is_complete:
            self._expect(IDLE_S)
        else:
            exchange.take_end()

    def _scope(self, method: str, version: str) -> dict[str, Any]:
        path, raw_path, query = _target(self._url)
        client = self._client
        if self.shared.trusted and client is not None:
            forwarded = [value for name, value in self._headers if name == b"x-forwarded-for"]
            client = (client_address(client[0], forwarded, self.shared.trusted), 0)
        return {
            "type": "http",
            "asgi": ASGI,
            "http_version": version,
            "server": self._server,
            "client": client,
            "scheme": "http",
            "method": method,
            "root_path": "",
            "path": path,
            "raw_path": raw_path,
            "query_string": query,
            "headers": self._headers,
        }

    def _misunderstood(self) -> None:
        """The parser refuses what came, or a callback of it does."""
        error = self._fault or InvalidRequest("The request is not well-formed HTTP/1.1.", code="malformed_request")
        self._fault = error
        if self._reading is not Reading.BODY or self._read is None:
            self._refuse(error)
        elif self._read in self._waiting:
            self._waiting.pop()
            self._refuse(error)
        elif self._read.is_started:
            self.close()
        else:
            self.refuse_body(error)

    def _at_fault(self, error: GatewayError) -> GatewayError:
        self._fault = error
        return error

    def _measure_head(self) -> None:
        size = len(self._url) + sum(len(name) + len(value) + 4 for name, value in self._headers)
        if size > MAX_HEAD_BYTES or len(self._headers) > MAX_HEADERS:
            raise self._at_fault(_head_too_large())

    # For an exchange to use: a `Line`.

    @property
    def date(self) -> bytes:
        return self.shared.date

    def write(self, data: bytes, *, last: bool = True) -> None:
        """Unless it is the last of an answer, it waits for what else is written in this turn of the event loop."""
        if not last and not self._held:
            self.loop.call_soon(self._flush)
        self._held.append(data)
        self._held_bytes += len(data)
        if last or self._held_bytes > MAX_HELD_BYTES:  # a writer that never waits is told here to pause
            self._flush()

    def _flush(self) -> None:
        """One write, one packet."""
        if self._held:
            data = b"".join(self._held)
            self._held.clear()
            self._held_bytes = 0
            if not self.transport.is_closing():  # the client may have left within this turn
                self.transport.write(data)

    def pause_reading(self) -> None:
        if not self._reading_paused and not self.transport.is_closing():
            self._reading_paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if self._reading_paused and not self.transport.is_closing():
            self._reading_paused = False
            self.transport.resume_reading()

    def answered(self, *, keep_alive: bool) -> None:
        """The active exchange has come to its end."""
        if not keep_alive:
            self.close()
        if self.transport.is_closing():
            return
        self.resume_reading()
        if self._waiting:
            self._begin(self._waiting.popleft())
        elif self._fault is not None:
            self._refuse(self._fault)
        elif self._reading is Reading.NOTHING:
            self._expect(IDLE_S)
        elif self._reading is Reading.BODY:  # of the request that was answered, or else it were waiting
            self._expect(self._settings.header_timeout_s)

    # Answers, and the ends of a connection.

    def _begin(self, exchange: Exchange) -> None:
        self._active = exchange
        app = self.shared.app
        if self._surplus and not exchange.scope["path"].startswith("/health/"):
            exchange.keep_alive = False
            app = ErrorResponse(Overloaded("The gateway has as many connections as it takes. Try again later."))
        if self._turn is None:
            self.shared.run(self._serve(exchange, app))
        else:
            turn, self._turn = self._turn, None
            turn.set_result((exchange, app))

    async def _serve(self, exchange: Exchange, app: ASGIApp) -> None:
        """One task for all requests, unless something has cancelled it: one for each would cost a thirtieth of them."""
        task = asyncio.current_task(self.loop)
        while True:
            await exchange.run(app)
            if self._turn is not None or self.transport.is_closing() or (task is not None and task.cancelling()):
                return
            self._turn = turn = self.loop.create_future()
            exchange, app = await turn

    @property
    def is_idle(self) -> bool:
        return self._active is None or self._active.is_complete

    def close(self) -> None:
        """The other side has a while to take what was written."""
        self._flush()
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self.loop.call_later(self._settings.write_stall_s, self.transport.abort)

    def close_after_answer(self) -> None:
        if self._active is not None:
            self._active.keep_alive = False

    def close_if_idle(self) -> None:
        if self.is_idle:
            self.close()
        else:
            self.close_after_answer()

    def refuse_body(self, error: GatewayError) -> None:
        """Answers a request whose body is still to come; to the application its client has left."""
        active = self._active
        if active is not None and active.more_body and not active.is_started:
            active.lose_client()
            self._active = None
            self._refuse(error)

    def _refuse(self, error: GatewayError) -> None:
        """Answers what is being read when its turn has come; nothing more is read."""
        self._fault = error
        if not self.is_idle or self.transport.is_closing():
            return
        status, headers, body = ErrorResponse(error).parts()
        lines = dict([*headers, (b"connection", b"close")])
        self.transport.write(head_of(status, self.date, lines.items()) + b"\r\n" + body)
        self.transport.write_eof()
        self._reading = Reading.NOTHING
        self._expect(LINGER_S)

    # The one timer.

    def _expect(self, seconds: float) -> None:
        """Something must come to its end within so many *seconds*."""
        self._due = due = self.loop.time() + seconds
        if self._timer_at > due:
            self._arm(due)

    def _arm(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = when
        self._timer = self.loop.call_at(when, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._timer_at = math.inf
        if self._due == math.inf:
            return
        if self.loop.time() < self._due:
            self._arm(self._due)
        elif self._reading is Reading.HEAD:
            self._refuse(RequestTimeout("The request's headers did not arrive in time."))
        else:
            self.close()


@lru_cache(maxsize=64)
def _target(url: bytes) -> tuple[str, bytes, bytes]:
    """The path, as it stands for and as it was written, and the query. Raises what the parser then calls a bad URL."""
    parsed = httptools.parse_url(url)
    raw_path = parsed.path
    path = raw_path.decode("ascii")
    return unquote(path) if "%" in path else path, raw_path, parsed.query or b""


def _address(name: Any) -> tuple[str, int] | None:
    """None where the other side has left already."""
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) else None


def _head_too_large() -> GatewayError:
    says = f"The request's headers are larger than {MAX_HEAD_BYTES} bytes, or more than {MAX_HEADERS}."
    return HeadersTooLarge(says)

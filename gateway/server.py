"""How does the gateway listen, how do answers leave, and how does it end?"""

import asyncio
import contextlib
import enum
import errno
import gc
import ipaddress
import logging
import math
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from typing import Any

import uvicorn
from uvicorn.lifespan.on import LifespanOn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from gateway.api.errors import ErrorResponse, unexpected
from gateway.api.shutdown import Shutdown
from gateway.auth import client_address, is_loopback
from gateway.errors import GatewayError, HeadersTooLarge, InvalidRequest, Overloaded, RequestTimeout, ShuttingDown
from gateway.settings import Server, SettingsError

logger = logging.getLogger("suiron")

ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]

IDLE_S = 75.0  # longer than clients keep an idle connection, so that none is closed under a request
LINGER_S = 1.0  # a refused client is heard out for so long: closed at once, it might not see why
SILENT_S = 15  # a peer that was silent for so long is asked whether it is there, and gone after three times no answer
MAX_HEAD_BYTES = 64 * 1024
MAX_HELD_BYTES = 64 * 1024
BODY_HEADERS = (b"content-length", b"transfer-encoding")
NO_UPGRADE = "This server speaks HTTP/1.1 only: do not ask to upgrade (in Java: HttpClient.Version.HTTP_1_1)."
BACKLOG = 2048
AT_ONCE = 64  # connections accepted in one turn of the event loop
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
EXHAUSTED_S = 0.1
SPARE_FILES = 64
DRAIN_DELAY_S = 5.0
CUT_S = 1.0  # for the last words to leave
GC_THRESHOLDS = (20_000, 20, 50)  # a request makes hardly any cycles; the default looks for them every few requests


def listen(server: Server) -> socket.socket:
    """Raises SettingsError where that is not possible."""
    try:
        family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
        listener = socket.create_server((server.host, server.port), family=family, backlog=BACKLOG)
    except OSError as exc:
        hint = "; is another one running? Choose another with --port" if server.port else ""
        why = os.strerror(exc.errno) if exc.errno else str(exc)
        raise SettingsError(f"cannot listen on {server.host}:{server.port}: {why}{hint}") from None
    _notice_who_vanishes(listener, server)
    return listener


def _notice_who_vanishes(listener: socket.socket, server: Server) -> None:
    """A peer that lost its cable never says so. Connections inherit this from what listens."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    stall_ms = int(server.write_stall_s * 1000)
    options = {"KEEPIDLE": SILENT_S, "KEEPINTVL": SILENT_S, "KEEPCNT": 3, "USER_TIMEOUT": stall_ms}
    for name, value in options.items():
        if (option := getattr(socket, f"TCP_{name}", None)) is not None:  # not every system has each
            listener.setsockopt(socket.IPPROTO_TCP, option, value)


def run(app: ASGIApp, listener: socket.socket, settings: Server, shutdown: Shutdown) -> bool:
    """Serves until SIGINT or SIGTERM; whether it had come up."""
    gateway = Gateway(app, settings, shutdown, room=_room(settings))
    gc.collect()
    gc.freeze()  # what is there now stays: the collector need not look at it again
    gc.set_threshold(*GC_THRESHOLDS)
    with asyncio.Runner(loop_factory=uvicorn.Config(app).get_loop_factory()) as runner:
        runner.get_loop().add_signal_handler(signal.SIGTERM, gateway.stop)
        runner.get_loop().add_signal_handler(signal.SIGINT, gateway.stop, 0.0)  # whoever presses Ctrl-C waits for it
        runner.run(gateway.serve(listener))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return gateway.started.is_set()


def _room(settings: Server) -> int:
    """How many connections there are file descriptors for: each may need another to an upstream."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # where the kernel's own limit is lower than the one it tells
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    files = 1_000_000 if soft == resource.RLIM_INFINITY else soft
    room = max(1, (files - SPARE_FILES) // 2)
    wanted = settings.max_connections or 1000
    if room < wanted:
        logger.warning("%d file descriptors do for %d connections, not for %d: raise `ulimit -n`", files, room, wanted)
    return room


class Gateway:
    """
    The process's server, from its start to its end.

    Beyond *room* connections, others wait in the kernel to be accepted.
    """

    def __init__(self, app: ASGIApp, settings: Server, shutdown: Shutdown, *, room: int = 100_000) -> None:
        self.settings = settings
        self.shutdown = shutdown
        self.trusted = [ipaddress.ip_network(network) for network in settings.trusted_proxies]
        self.connections: set[Connection] = set()
        self.started = asyncio.Event()
        self._app = app
        self._room = room
        self._state = ServerState()
        self._stopping = asyncio.Event()
        self._hurried = asyncio.Event()
        self._empty = asyncio.Event()
        self._drain_delay_s = 0.0

    def stop(self, drain_delay_s: float | None = None) -> None:
        """Begins the end, and the second time cuts it short. Without *drain_delay_s*, it is as configured."""
        if self._stopping.is_set():
            self._hurried.set()
            return
        self._drain_delay_s = self._configured_delay_s() if drain_delay_s is None else drain_delay_s
        self._stopping.set()

    def _configured_delay_s(self) -> float:
        if self.settings.drain_delay_s is not None:
            return self.settings.drain_delay_s
        return 0.0 if is_loopback(self.settings.host) else DRAIN_DELAY_S

    async def serve(self, listener: socket.socket) -> None:
        """Until `stop`, and as long after it as that takes."""
        sys.set_asyncgen_hooks(firstiter=None)  # every generator is closed by who made it: no need to list them
        config = uvicorn.Config(
            self._answer,
            interface="asgi3",
            lifespan="on",
            ws="none",
            log_config=None,
            log_level=logging.ERROR,
            access_log=False,
            proxy_headers=False,
        )
        lifespan = LifespanOn(config)
        await lifespan.startup()
        if lifespan.should_exit:
            return
        self._tell_the_time()
        self._entrance = Entrance(self, listener, lambda: Connection(self, config, self._state, lifespan.state))
        self.started.set()
        await self._stopping.wait()
        await self._end()
        self._clock.cancel()
        await lifespan.shutdown()

    async def _end(self) -> None:
        self.shutdown.begin()
        for connection in self.connections:
            connection.close_after_answer()
        await _first_of(self._hurried, within_s=self._drain_delay_s)
        await self._entrance.close()
        for connection in [*self.connections]:
            connection.close_if_idle()
        if running := len(self._state.tasks):
            logger.info("waiting for %d requests to end; a second signal ends them now", running)
        await self._until_empty(self.settings.grace_s, self._hurried)
        self.shutdown.cut()
        for connection in [*self.connections]:
            connection.refuse_body(ShuttingDown())
        await self._until_empty(CUT_S)
        for connection in [*self.connections]:
            connection.transport.abort()
        if self._state.tasks:
            await asyncio.wait(self._state.tasks, timeout=CUT_S)

    async def _until_empty(self, seconds: float, *unless: asyncio.Event) -> None:
        if self.connections:
            await _first_of(self._empty, *unless, within_s=seconds)

    def has_room(self, coming: int) -> bool:
        return len(self.connections) + coming < self._room

    def joined(self, connection: "Connection") -> None:
        self.connections.add(connection)
        self._empty.clear()

    def left(self, connection: "Connection") -> None:
        self.connections.discard(connection)
        if not self.connections:
            self._empty.set()
        self._entrance.open()

    def is_full(self) -> bool:
        limit = self.settings.max_connections
        return limit is not None and len(self.connections) > limit

    def _tell_the_time(self) -> None:
        self._state.default_headers = [(b"date", formatdate(time.time(), usegmt=True).encode())]
        self._clock = asyncio.get_running_loop().call_later(1.0, self._tell_the_time)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self._app(scope, receive, send)
        except Exception as exc:
            if scope["type"] != "http":
                raise
            await ErrorResponse(unexpected(exc)).send(send)


async def _first_of(*events: asyncio.Event, within_s: float) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waits, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


class Entrance:
    """
    Where connections are accepted, while there is room for them.

    Not by asyncio's own server: uvloop's closes at once what there is no file descriptor for, and others spin.
    """

    def __init__(self, gateway: Gateway, listener: socket.socket, protocol: Callable[[], "Connection"]) -> None:
        listener.setblocking(False)
        self._gateway = gateway
        self._listener = listener
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._coming: set[asyncio.Task[None]] = set()
        self._is_open = self._is_closed = False
        self.open()

    def open(self) -> None:
        if not self._is_open and not self._is_closed:
            self._is_open = True
            self._loop.add_reader(self._listener, self._accept)

    def _pause(self) -> None:
        if self._is_open:
            self._is_open = False
            self._loop.remove_reader(self._listener)

    def _accept(self) -> None:
        for _ in range(AT_ONCE):
            if not self._gateway.has_room(len(self._coming)):
                return self._pause()
            try:
                accepted, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return None
            except OSError as exc:
                if exc.errno not in EXHAUSTED:
                    raise
                self._loop.call_later(EXHAUSTED_S, self.open)
                return self._pause()
            task = self._loop.create_task(self._connect(accepted))
            self._coming.add(task)
            task.add_done_callback(self._came)
        return None

    def _came(self, task: asyncio.Task[None]) -> None:
        self._coming.discard(task)
        self.open()

    async def _connect(self, accepted: socket.socket) -> None:
        accepted.setblocking(False)
        try:
            await self._loop.connect_accepted_socket(self._protocol, accepted)
        except OSError:  # it has left already
            accepted.close()

    async def close(self) -> None:
        self._pause()
        self._is_closed = True
        await asyncio.sleep(0)  # libuv lets go of a file descriptor only in its next turn
        self._listener.close()
        if self._coming:
            await asyncio.wait(self._coming)


class Reading(enum.Enum):
    NOTHING = enum.auto()
    HEAD = enum.auto()
    BODY = enum.auto()


class Connection(HttpToolsProtocol):
    """
    uvicorn's, with a deadline for whatever a client can be slow at, and OpenAI's error for what is not HTTP.

    One timer, armed anew only when it rings early, does for all the requests of a connection.
    """

    transport: "Corked"  # type: ignore[assignment]

    def __init__(self, gateway: Gateway, config: uvicorn.Config, state: ServerState, app_state: dict[str, Any]) -> None:
        super().__init__(config, state, app_state)
        self._gateway = gateway
        self._settings = gateway.settings
        self._shutdown = gateway.shutdown
        self._trusted = gateway.trusted
        self._reading = Reading.NOTHING
        self._head_bytes = 0
        self._arrived_bytes = 0
        self._active: RequestResponseCycle | None = None
        self._fault: GatewayError | None = None
        self._surplus = False
        self._due = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    # What the transport tells.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(Corked(transport, self.loop, self._settings.write_stall_s))  # type: ignore[arg-type]
        self._gateway.joined(self)
        self._surplus = self._gateway.is_full()
        self._expect(self._settings.header_timeout_s)

    def data_received(self, data: bytes) -> None:
        if self._fault is not None:
            return
        in_pieces = self._reading is Reading.HEAD
        self._arrived_bytes = len(data)
        super().data_received(data)
        if in_pieces and self._reading is Reading.HEAD:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and self._fault is None:
                self._refuse(_head_too_large())

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(self._settings.write_stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._active is not None and not self._active.response_complete:
            self._active.disconnected = True  # uvicorn tells only the last request of a pipeline
            self._active.message_event.set()
        super().connection_lost(exc)
        for timer in (self._timer, self._stall):
            if timer is not None:
                timer.cancel()
        self._gateway.left(self)

    # What the parser tells.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._reading = Reading.HEAD
        self._head_bytes = 0
        self._expect(self._settings.header_timeout_s)

    def on_headers_complete(self) -> None:
        if self._head_bytes + self._arrived_bytes > MAX_HEAD_BYTES:  # perhaps: what arrived may be more than the head
            self._measure_head()
        upgrades = self.parser.should_upgrade()
        if upgrades and any(name in BODY_HEADERS for name, _ in self.headers):
            raise self._at_fault(InvalidRequest(NO_UPGRADE, code="upgrade_not_supported"))
        super().on_headers_complete()
        self._reading = Reading.BODY
        self._due = math.inf
        if self._trusted:
            self._look_behind_proxy()
        if upgrades or self._shutdown.begun:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        self._reading = Reading.NOTHING
        if self.cycle.response_complete:
            self._expect(IDLE_S)
        else:
            self.cycle.more_body = False
            self.cycle.message_event.set()

    def send_400_response(self, msg: str) -> None:
        """Called for what the parser refuses, or a callback of it."""
        error = self._fault or InvalidRequest("The request is not well-formed HTTP/1.1.", code="malformed_request")
        self._fault = error
        if self._reading is not Reading.BODY:
            self._refuse(error)
        elif any(cycle is self.cycle for cycle, _ in self.pipeline):
            self.pipeline.popleft()
            self._refuse(error)
        elif self.cycle.response_started:
            self.transport.close()
        else:
            self.refuse_body(error)

    def _at_fault(self, error: GatewayError) -> GatewayError:
        self._fault = error
        return error

    def _measure_head(self) -> None:
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES:
            raise self._at_fault(_head_too_large())

    def _look_behind_proxy(self) -> None:
        if self.client is not None:
            forwarded = [value for name, value in self.headers if name == b"x-forwarded-for"]
            self.scope["client"] = (client_address(self.client[0], forwarded, self._trusted), 0)

    # Answers, and the ends of a connection.

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._active = cycle
        if self._surplus and not cycle.scope["path"].startswith("/health/"):
            cycle.keep_alive = False
            app = ErrorResponse(Overloaded("The gateway has as many connections as it takes. Try again later."))
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._fault is not None:
            self._refuse(self._fault)
        elif self._reading is Reading.NOTHING:
            self._expect(IDLE_S)
        elif self._reading is Reading.BODY:  # of the request that was answered, or else it were in the pipeline
            self._expect(self._settings.header_timeout_s)

    @property
    def _is_idle(self) -> bool:
        return self._active is None or self._active.response_complete

    def close_after_answer(self) -> None:
        if self._active is not None:
            self._active.keep_alive = False

    def close_if_idle(self) -> None:
        if self._is_idle:
            self.transport.close()
        else:
            self.close_after_answer()

    def refuse_body(self, error: GatewayError) -> None:
        """Answers a request whose body is still to come; to the application its client has left."""
        active = self._active
        if active is not None and active.more_body and not active.response_started:
            active.disconnected = True
            active.message_event.set()
            self._active = None
            self._refuse(error)

    def _refuse(self, error: GatewayError) -> None:
        """Answers what is being read when its turn has come; nothing more is read."""
        self._fault = error
        if not self._is_idle or self.transport.is_closing():
            return
        status, headers, body = ErrorResponse(error).parts()
        lines = [*self.server_state.default_headers, *headers, (b"connection", b"close")]
        head = b"".join(b"%b: %b\r\n" % line for line in dict(lines).items())
        self.transport.write(STATUS_LINE[status] + head + b"\r\n" + body)
        self.transport.write_eof()
        self._reading = Reading.NOTHING
        self._expect(LINGER_S)

    # The one timer.

    def _expect(self, seconds: float) -> None:
        """Something must come to its end within so many *seconds*."""
        self._due = due = self.loop.time() + seconds
        if self._timer is None or self._timer.when() > due:
            self._arm(due)

    def _arm(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_at(when, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._due == math.inf:
            return
        if self.loop.time() < self._due:
            self._arm(self._due)
        elif self._reading is Reading.HEAD:
            self._refuse(RequestTimeout("The request's headers did not arrive in time."))
        else:
            self.transport.close()


def _head_too_large() -> GatewayError:
    return HeadersTooLarge(f"The request's headers are larger than {MAX_HEAD_BYTES} bytes.")


class Corked:
    """
    A transport whose writes leave together, at the end of the event loop's turn: one system call, one packet.

    When it is closed, the other side has *stall_s* to take what was written.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, stall_s: float) -> None:
        self._transport = transport
        self._loop = loop
        self._stall_s = stall_s
        self._held: list[bytes] = []
        self._held_bytes = 0

    def write(self, data: bytes) -> None:
        if not self._held:
            self._loop.call_soon(self._flush)
        self._held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > MAX_HELD_BYTES:  # a writer that never waits is told here to pause
            self._flush()

    def write_eof(self) -> None:
        self._flush()
        self._transport.write_eof()

    def close(self) -> None:
        self._flush()
        self._transport.close()
        if self._transport.get_write_buffer_size():
            self._loop.call_later(self._stall_s, self._transport.abort)

    def _flush(self) -> None:
        if self._held:
            if not self._transport.is_closing():  # the client may have left within this turn
                self._transport.write(b"".join(self._held))
            self._held.clear()
            self._held_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

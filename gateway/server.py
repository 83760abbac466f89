"""How does the gateway listen, and how does it end?"""

import asyncio
import contextlib
import errno
import gc
import logging
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

from gateway.api.errors import unexpected
from gateway.api.shutdown import Shutdown
from gateway.auth import is_loopback
from gateway.connection import Connection, Connections
from gateway.connection.exchange import ASGIApp
from gateway.errors import ShuttingDown
from gateway.settings import Server, SettingsError

try:
    from uvloop import new_event_loop
except ImportError:  # there is none for Windows
    from asyncio import new_event_loop  # type: ignore[assignment]

logger = logging.getLogger("suiron")

SILENT_S = 15  # a peer that was silent for so long is asked whether it is there, and gone after three times no answer
CANNOT_LISTEN = {
    errno.EADDRINUSE: "is another one running? Choose another port with --port",
    errno.EACCES: "ports below 1024 may need root: choose another with --port",
}
"""What to do about it."""
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
        why = str(exc.strerror or exc).partition(" (")[0]
        hint = CANNOT_LISTEN.get(exc.errno or 0, "choose an address of this machine with --host")
        raise SettingsError(f"cannot listen on {server.host}:{server.port}: {why}; {hint}") from None
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


GIL_S = 0.0002
"""How long another thread, such as the one that writes the ledger, may keep the event loop from running on."""


def run(app: ASGIApp, listener: socket.socket, settings: Server, shutdown: Shutdown) -> bool:
    """Serves until SIGINT or SIGTERM; whether it had come up."""
    gateway = Gateway(app, settings, shutdown, room=_room(settings))
    gc.collect()
    gc.freeze()  # what is there now stays: the collector need not look at it again
    gc.set_threshold(*GC_THRESHOLDS)
    sys.setswitchinterval(GIL_S)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
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
        self.started = asyncio.Event()
        self._app = app
        self._room = room
        self._connections = Connections(app, settings, shutdown, self._left)
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
        lifespan = Lifespan(self._app)
        if not await lifespan.begin():
            return
        self._tell_the_time()
        self._entrance = Entrance(self, listener, lambda: Connection(self._connections))
        self.started.set()
        await self._stopping.wait()
        await self._end()
        self._clock.cancel()
        await lifespan.end()

    async def _end(self) -> None:
        self.shutdown.begin()
        everybody, tasks = self._connections.open, self._connections.tasks
        for connection in everybody:
            connection.close_after_answer()
        await _first_of(self._hurried, within_s=self._drain_delay_s)
        await self._entrance.close()
        for connection in [*everybody]:
            connection.close_if_idle()
        if running := sum(not connection.is_idle for connection in everybody):
            logger.info("waiting for %d requests to end; a second signal ends them now", running)
        await self._until_empty(self.settings.grace_s, self._hurried)
        self.shutdown.cut()
        for connection in [*everybody]:
            connection.refuse_body(ShuttingDown())
        await self._until_empty(CUT_S)
        for connection in [*everybody]:
            connection.transport.abort()
        if tasks:
            await asyncio.wait(tasks, timeout=CUT_S)

    async def _until_empty(self, seconds: float, *unless: asyncio.Event) -> None:
        if self._connections.open:
            self._empty.clear()
            await _first_of(self._empty, *unless, within_s=seconds)

    def has_room(self, coming: int) -> bool:
        return len(self._connections.open) + coming < self._room

    def _left(self) -> None:
        if not self._connections.open:
            self._empty.set()
        self._entrance.open()

    def _tell_the_time(self) -> None:
        self._connections.date = f"date: {formatdate(time.time(), usegmt=True)}\r\n".encode()
        self._clock = asyncio.get_running_loop().call_later(1.0, self._tell_the_time)


async def _first_of(*events: asyncio.Event, within_s: float) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waits, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


class Lifespan:
    """An ASGI application's own beginning and end, for which it has a task."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._asked: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._said: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def begin(self) -> bool:
        """Whether it did."""
        self._task = asyncio.create_task(self._run())
        return await self._ask("lifespan.startup")

    async def end(self) -> None:
        await self._ask("lifespan.shutdown")
        await self._task

    async def _ask(self, what: str) -> bool:
        self._asked.put_nowait({"type": what})
        said = await self._said.get()
        if said["type"] == f"{what}.complete":
            return True
        logger.error("%s failed: %s", what, said.get("message"))
        return False

    async def _run(self) -> None:
        try:
            await self._app({"type": "lifespan", "asgi": {"version": "3.0"}}, self._asked.get, self._said.put)
        except Exception as exc:
            unexpected(exc)
        self._said.put_nowait({"type": "over", "message": "the application has ended"})


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

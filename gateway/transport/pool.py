"""Connections: who may have one, which are idle, and what each of them hears."""

import asyncio
from collections import OrderedDict
from typing import Protocol, cast

import httpx2

from gateway.transport.asking import Origin

TIMER_SLACK_S = 0.001
FAREWELL_S = 1.0


class Listener(Protocol):
    """Whom a connection serves: the exchange that has it."""

    def feed(self, data: bytes) -> None: ...

    def lost(self, exc: Exception | None) -> None:
        """The peer closed the connection, or (*exc*) broke it."""

    def silent(self) -> None:
        """Nothing has moved for as long as was to be waited."""

    def wake(self) -> None:
        """There may be room to write again."""

    def fail(self, error: httpx2.RequestError) -> None: ...


class Pool:
    """Who may have a connection, and which are idle.

    Slots taken plus idle connections never exceed `max_connections`: whoever gets a slot while idle connections fill
    the rest takes one of them, or has the oldest closed before it opens another.
    """

    def __init__(self, max_connections: int, max_idle: int, keepalive_s: float) -> None:
        self.connections: set[Connection] = set()
        self.closed = False
        self._max_connections = max_connections
        self._max_idle = max_idle
        self._keepalive_s = keepalive_s
        self._slots_taken = 0
        self._waiters: OrderedDict[asyncio.Future[None], None] = OrderedDict()
        self._idle: dict[Origin, dict[Connection, None]] = {}
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

    def release(self, connection: "Connection | None", *, reusable: bool) -> None:
        if connection is not None:
            if reusable and not self.closed:
                self._keep(connection)
            else:
                connection.abort()
        self._free_slot()

    def take(self, origin: Origin) -> "Connection | None":
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

    def forget(self, connection: "Connection") -> None:
        """The connection is idle no more, if it was."""
        idle = self._idle.get(connection.origin)
        if idle is not None and connection in idle:
            del idle[connection]
            if not idle:
                del self._idle[connection.origin]

    def gone(self, connection: "Connection") -> None:
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
            await asyncio.wait({self._emptied}, timeout=FAREWELL_S)

    def _keep(self, connection: "Connection") -> None:
        connection.rest()
        idle = self._idle.setdefault(connection.origin, {})
        idle[connection] = None
        if len(idle) > self._max_idle:
            next(iter(idle)).abort()
        if self._sweeper is None:
            self._sweeper = connection.loop.call_later(self._keepalive_s, self._sweep, connection.loop)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        self._sweeper = None
        newest_expired = loop.time() - self._keepalive_s + TIMER_SLACK_S
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


class Connection(asyncio.Protocol):
    """One socket: bytes in both directions, and the clock of the silence between them."""

    def __init__(self, pool: Pool, origin: Origin, loop: asyncio.AbstractEventLoop) -> None:
        self.origin = origin
        self.loop = loop
        self.exchange: Listener | None = None
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
        if due > now + TIMER_SLACK_S:
            self._set_alarm(due)
        else:
            self.exchange.silent()

"""A Redis server: a connection that is kept up, what waits to be sent, and whether it is worth asking."""

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

from msgspec import Struct

from gateway.stores import StoreCounts, StoreUnavailable
from gateway.stores.redis.link import Answered, Link, Lost, ReplyError, packed

Address = tuple[str, int]

CONSECUTIVE = 5
SPAN_S = 10.0
ENOUGH = 20
SLOW = 0.4
"""Of the time that a call may take."""
SLOW_TRIPS = 5
PROBE_S = 1.0
PROBE_AGAIN_S = 0.1
PROBES = 3
NOT_ITS_FAULT = ("NOSCRIPT", "MOVED", "ASK", "TRYAGAIN", "CROSSSLOT", "ERR", "WRONGTYPE")


class Access(Struct, frozen=True):
    """What a connection begins with."""

    username: str | None = None
    password: str | None = None
    database: int = 0
    tls: ssl.SSLContext | None = None


class Node:
    """
    Commands that are asked in one turn of the event loop leave in one write; no reply is waited for before the next.

    A server that fails five times in a row, or half of the time, or is slow five times and in one of four round trips,
    is left alone: `open`. It is then tried in the background once a second, until it has done a *probe* well three
    times. Round trips that overlap count once: whatever holds up one holds up all, if only our own event loop.
    """

    def __init__(
        self,
        find: Callable[[], Awaitable[Address]],
        access: Access,
        timeout_s: float,
        greeting: list[bytes],
        probe: bytes,
        counts: StoreCounts,
        changed: Callable[["Node"], None],
    ) -> None:
        self.open = False
        self.trouble = ""
        self._loop = asyncio.get_running_loop()
        self._find = find
        self._access = access
        self._timeout_s = timeout_s
        self._slow_s = timeout_s * SLOW
        self._greeting = greeting
        self._probe = probe
        self._counts = counts
        self._changed = changed
        self._link: Link | None = None
        self._commands: list[bytes] = []
        self._asked: list[Answered] = []
        self._asked_since = 0.0
        self._due = False
        self._connecting: asyncio.Task[None] | None = None
        self._probing: asyncio.Task[None] | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._in_a_row = 0
        self._span_began = 0.0
        self._trip_ended = 0.0
        self._good = self._bad = self._trips = self._slow = 0

    def ask(self, command: bytes, answered: Answered) -> None:
        """Raises StoreUnavailable at once while the server is left alone; then *answered* is not called."""
        if self.open:
            raise StoreUnavailable(self.trouble)
        if not self._asked:
            self._asked_since = self._loop.time()
        self._commands.append(command)
        self._asked.append(answered)
        if not self._due:
            self._due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._due = False
        if self._watch is None:
            self._watch = self._loop.call_later(self._timeout_s, self._look)
        if self._link is not None:
            commands, self._commands = self._commands, []
            asked, self._asked = self._asked, []
            if asked:
                self._counts.round_trips += 1
                self._link.send(commands, asked)
        elif self._connecting is None:
            self._connecting = self._loop.create_task(self._connect())

    def waits_s(self) -> float:
        """How long the oldest command has been waiting for its reply; 0 where none is."""
        oldest = self._asked_since if self._asked else None
        if self._link is not None and (sent := self._link.waits_since()) is not None:
            oldest = sent if oldest is None else min(oldest, sent)
        return 0.0 if oldest is None else self._loop.time() - oldest

    def _look(self) -> None:
        """Has anything been waiting for too long?"""
        self._watch = None
        if not (waits_s := self.waits_s()):
            return
        left = self._timeout_s - waits_s
        if left > 0.001:
            self._watch = self._loop.call_later(left, self._look)
        else:
            self.drop(f"no answer within {self._timeout_s * 1000:.0f} ms", final=True)

    async def _connect(self) -> None:
        try:
            self._link = await self.connect()
        except (OSError, TimeoutError, ReplyError, Lost, StoreUnavailable) as exc:
            self._lose(str(exc) or "no connection in time", final=True)
        finally:
            self._connecting = None
        if self._link is not None:
            self._flush()

    async def connect(self) -> Link:
        """A link on which the server has been greeted."""
        access = self._access
        async with asyncio.timeout(self._timeout_s):
            host, port = await self._find()
            _, link = await self._loop.create_connection(lambda: Link(self._closed), host, port, ssl=access.tls)
            try:
                if access.password is not None:
                    await self._must(link, "AUTH", *([access.username] if access.username else []), access.password)
                if access.database:
                    await self._must(link, "SELECT", str(access.database))
                await _all(link, self._greeting)
            except BaseException:
                link.close("it was not greeted")
                raise
        link.answered = self._answered  # from here on: to be greeted well is not to be well
        return link

    async def _must(self, link: Link, *command: str) -> None:
        [reply] = await _all(link, [packed(*command)])
        if isinstance(reply, Exception):
            raise reply

    def _answered(self, good: int, sent: float) -> None:
        now = self._turn()
        self._good += good
        if good:
            self._in_a_row = 0
        if sent < self._trip_ended:
            return
        self._trip_ended = now
        self._trips += 1
        if now - sent > self._slow_s:
            self._slow += 1
            if self._slow >= SLOW_TRIPS and self._slow * 4 > self._trips:
                self.leave_alone(f"slow: {(now - sent) * 1000:.0f} ms")

    def refused(self, error: ReplyError) -> bool:
        """Whether the server itself is at fault: it is loading, full, read-only, or the like."""
        if str(error).startswith(NOT_ITS_FAULT):
            return False
        self._fail(1, str(error))
        return True

    def _fail(self, count: int, reason: str) -> None:
        self._counts.failures += count
        self.trouble = reason
        self._turn()
        self._bad += count
        self._in_a_row += count
        if self._in_a_row >= CONSECUTIVE or (self._bad >= self._good and self._bad + self._good >= ENOUGH):
            self.leave_alone(reason)

    def _turn(self) -> float:
        now = self._loop.time()
        if now - self._span_began > SPAN_S:
            self._span_began = now
            self._good = self._bad = self._trips = self._slow = 0
        return now

    def _closed(self, link: Link, reason: str) -> None:
        if link is self._link:
            self._link = None
            self.trouble = reason

    def drop(self, reason: str, final: bool = False) -> None:
        """Close the connection; those who wait, on it or for it, are told."""
        self._let_go(reason, final)
        self._lose(reason, final)

    def _let_go(self, reason: str, final: bool = False) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close(reason, final)

    def _lose(self, reason: str, final: bool) -> None:
        asked, self._asked, self._commands = self._asked, [], []
        for answered in asked:
            answered(Lost(reason, sent=False, final=final))

    def lost(self, error: Lost) -> None:
        """A command that was asked has no reply."""
        self._fail(1, str(error))

    def leave_alone(self, reason: str) -> None:
        """Ask nothing of it until it has shown in the background that it is well."""
        if self.open:
            return
        self.open = True
        self.trouble = reason
        self._counts.opened += 1
        self._probing = self._loop.create_task(self._until_well())
        self._changed(self)
        self.drop(reason)

    async def _until_well(self) -> None:
        done = 0
        while done < PROBES:
            await asyncio.sleep(PROBE_AGAIN_S if done else PROBE_S)
            try:
                done = done + 1 if await self._is_well() else 0
            except (OSError, TimeoutError, ReplyError, Lost, StoreUnavailable) as exc:
                self.trouble = str(exc) or "no connection in time"
                self._let_go(self.trouble)
                done = 0
        self._in_a_row = self._good = self._bad = self._trips = self._slow = 0
        self.open = False
        self.trouble = ""
        self._changed(self)

    async def _is_well(self) -> bool:
        if self._link is None:
            self._link = await self.connect()
        began = self._loop.time()
        async with asyncio.timeout(self._timeout_s):
            [reply] = await _all(self._link, [self._probe])
        if isinstance(reply, ReplyError) and not str(reply).startswith("MOVED"):
            raise reply
        return self._loop.time() - began < self._slow_s

    async def aclose(self) -> None:
        self.open = True
        self.trouble = "the store is closed"
        for task in (self._connecting, self._probing):
            if task is not None:
                task.cancel()
        if self._watch is not None:
            self._watch.cancel()
        self.drop(self.trouble)


async def _all(link: Link, commands: list[bytes]) -> list[Any]:
    """The replies, errors among them. Raises Lost."""
    futures: list[asyncio.Future[Any]] = [asyncio.get_running_loop().create_future() for _ in commands]
    link.send(commands, [settable(future) for future in futures])
    replies = await asyncio.gather(*futures)
    for reply in replies:
        if isinstance(reply, Lost):
            raise reply
    return replies


def settable(future: "asyncio.Future[Any]") -> Answered:
    """Whoever waited may have left."""
    return lambda reply: None if future.done() else future.set_result(reply)

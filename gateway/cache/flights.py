"""Who shares one generation that is under way?"""

import asyncio
import copy
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from gateway.cache.track import Track
from gateway.call import Call
from gateway.errors import ShuttingDown, UpstreamFailed
from gateway.schema.payload import Parts
from gateway.stores.answers import Epochs

MAX_SEATS = 256
MAX_KEPT_BYTES = 4 * 1024 * 1024
"""Of what was said, for those who come late. Beyond it nobody may, and those who are there are waited for."""
MAX_WHOLE_BYTES = 64 * 1024 * 1024
"""… where somebody wants the answer whole, which needs all of it."""
CLOSING_S = 1.0


class Seat:
    """One call's place in a flight, and how far it has heard."""

    __slots__ = ("call", "position", "waiting")

    def __init__(self, call: Call) -> None:
        self.call = call
        self.position = 0
        self.waiting: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_result(None)


class Flight:
    """
    One generation, in a task of its own, and those who listen to it.

    `call` is the generation's: a copy of the first caller's, who may leave before it ends. The first pays for it; if
    that one leaves, who has been there longest does. `borrowed` is set where the answer was found elsewhere after all;
    `is_complete`, where `track` has all of it.
    """

    def __init__(self, call: Call, epochs: Epochs | None, clock: Callable[[], float]) -> None:
        self.call = copy.copy(call)
        self.epochs = epochs
        self._clock = clock
        self.track = Track(call.endpoint, call.streamed, clock)
        self._latest: tuple[int, Parts] | None = None
        self.borrowed = False
        self.error: Exception | None = None
        self._seats: list[Seat] = []
        self._over = False
        self._closed = False
        self._drained: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def is_complete(self) -> bool:
        return self._over and self.error is None and not self._closed

    @property
    def is_open(self) -> bool:
        """Whether another may take a seat."""
        return len(self._seats) < MAX_SEATS and not self._closed and self.error is None

    def start(self, source: AsyncGenerator[Parts], landed: Callable[[], Awaitable[None]]) -> "asyncio.Task[None]":
        """*landed* is awaited in the end, whatever came of it; until it is done, late ones may still come."""
        self._task = asyncio.ensure_future(self._fly(source, landed))
        return self._task

    async def _fly(self, source: AsyncGenerator[Parts], landed: Callable[[], Awaitable[None]]) -> None:
        try:
            async with aclosing(source):
                async for arrived in source:
                    self._latest = len(self.track), arrived
                    self.track.add(arrived)
                    self._wake()
                    if self.track.size_bytes > MAX_KEPT_BYTES:
                        await self._overflow()
        except Exception as exc:
            self.error = exc
        except asyncio.CancelledError:
            self.error = ShuttingDown()
            raise
        finally:
            self._over = True
            self._wake()
            await landed()

    def _wake(self) -> None:
        for seat in self._seats:
            seat.wake()

    async def _overflow(self) -> None:
        """Wait until all have heard what there is, and drop it: the slowest sets the pace now."""
        self._closed = True
        if not all(_is_live(seat.call, self.track) for seat in self._seats):
            if self.track.size_bytes > MAX_WHOLE_BYTES:
                raise UpstreamFailed("The upstream's answer is too large.")
            return
        while any(seat.position < len(self.track) for seat in self._seats):
            self._drained = asyncio.get_running_loop().create_future()
            await self._drained
        self.track = Track(self.call.endpoint, self.track.streamed, self._clock)
        self._latest = None
        for seat in self._seats:
            seat.position = 0

    async def listen(self, call: Call) -> AsyncGenerator[Parts | Track]:
        """
        Take a seat: what has been said, then what is, for as long as it goes on; raises what it failed with.

        Where *call* wants it in another form, there is one item: the whole track, when it is whole. Who stops listening
        last ends the generation, before this returns.
        """
        seat = Seat(call)
        self._seats.append(seat)
        try:
            live = _is_live(call, self.track)
            while True:
                track, position = self.track, seat.position
                if live and position < len(track):
                    seat.position = len(track)
                    yield self._heard(seat, position)
                elif not self._over:
                    await self._news(seat)
                elif self.error is not None:
                    raise self.error
                else:
                    break
            if not live:
                yield self.track
        finally:
            if self._leave(seat):
                await self._end()

    def _heard(self, seat: Seat, position: int) -> Parts:
        """What has come since; who pays gets the parts themselves, and the others' are made anew: they are changed."""
        if seat is self._seats[0] and self._latest is not None and self._latest[0] == position:
            parts, self._latest = self._latest[1], None
            return parts
        return self.track.parts(position, len(self.track))

    async def _news(self, seat: Seat) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        seat.waiting = asyncio.get_running_loop().create_future()
        await seat.waiting

    def _leave(self, seat: Seat) -> bool:
        """Whether this was the last one, and the generation was under way."""
        pays = seat is self._seats[0]
        self._seats.remove(seat)
        if self._over:
            return False
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        if not self._seats:
            self._closed = True
            return True
        if pays:
            self._hand_over(seat.call, self._seats[0].call)
        return False

    def _hand_over(self, first: Call, next_: Call) -> None:
        """The generation goes on without *first*, whose own record ends here."""
        now = first.clock()
        running = self.call.attempts
        if first.attempts is running:
            first.attempts = [copy.copy(attempt) for attempt in running]
            for attempt in first.attempts:
                attempt.ended = attempt.ended or now
        next_.attempts = running
        next_.cache = "miss"
        self.call.trace = next_.trace

    async def _end(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=CLOSING_S)


def _is_live(call: Call, track: Track) -> bool:
    """Whether it can be heard as it comes: chunks by who wants chunks."""
    return call.streamed and track.streamed

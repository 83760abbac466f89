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
"""Of what was said, for those who come late. Beyond it nobody may."""
MAX_BEHIND_BYTES = 64 * 1024 * 1024
"""How far behind a listener may be; further, it is waited for. Who wants the answer whole is at its beginning."""
CLOSING_S = 1.0


class Stretch:
    """Some of what was said, and where it goes on. One that everybody has heard is held by nobody."""

    __slots__ = ("begins_at", "next", "track")

    def __init__(self, track: Track, begins_at: int) -> None:
        self.track = track
        self.begins_at = begins_at
        self.next: Stretch | None = None

    def whole(self) -> Track:
        """From here to the end."""
        track, stretch = self.track, self.next
        while stretch is not None:
            track = track.joined_by(stretch.track)
            stretch = stretch.next
        return track


class Seat:
    """One call's place in a flight, and how far it has heard. It is `live` if it can be given pieces as they come."""

    __slots__ = ("call", "is_refused", "live", "position", "stretch", "waiting")

    def __init__(self, call: Call, stretch: Stretch) -> None:
        self.call = call
        self.stretch = stretch
        self.position = 0
        self.live = call.streamed and stretch.track.streamed
        self.is_refused = False
        self.waiting: asyncio.Future[None] | None = None

    def has_heard(self, stretch: Stretch) -> bool:
        """All of it, where this is the latest or the one before."""
        return stretch.next is self.stretch or (stretch is self.stretch and self.position == len(stretch.track))

    def refuse(self) -> None:
        """So much is not kept for who wants it whole: it may ask for itself."""
        self.is_refused = True
        self.wake()

    def wake(self) -> None:
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_result(None)


class Flight:
    """
    One generation, in a task of its own, and those who listen to it.

    `call` is the generation's: a copy of the first caller's, who may leave before it ends. The first pays for it; if
    that one leaves, who has been there longest does. `borrowed` is set where the answer was found elsewhere after all;
    `is_complete`, where `track` has all of it. The fastest listener sets
    the pace; a slow one is waited for only when it is very far behind.
    """

    def __init__(self, call: Call, epochs: Epochs | None, clock: Callable[[], float]) -> None:
        self.call = copy.copy(call)
        self.epochs = epochs
        self._clock = clock
        self.track = Track(call.endpoint, call.streamed, clock)
        self._last = Stretch(self.track, 0)
        self._latest: tuple[int, Parts] | None = None
        self.borrowed = False
        self.error: Exception | None = None
        self._seats: list[Seat] = []
        self._over = False
        self._closed = False
        self._moved: asyncio.Future[None] | None = None
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
                    track = self._last.track
                    self._latest = len(track), arrived
                    track.add(arrived)
                    self._wake()
                    if track.size_bytes > MAX_KEPT_BYTES:
                        await self._begin_stretch()
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

    async def _begin_stretch(self) -> None:
        self._closed = True
        full, track = self._last, self._last.track
        self._last = Stretch(Track(self.call.endpoint, track.streamed, self._clock), full.begins_at + track.size_bytes)
        full.next = self._last
        self._latest = None
        while self._outruns_listeners(full):
            self._moved = asyncio.get_running_loop().create_future()
            await self._moved

    def _outruns_listeners(self, full: Stretch) -> bool:
        """Whether nobody has heard all of *full* yet, or somebody is very far behind."""
        live, far = [], False
        for seat in self._seats:
            is_far = self._last.begins_at - seat.stretch.begins_at > MAX_BEHIND_BYTES
            if seat.live:
                live.append(seat)
                far = far or is_far
            elif is_far:
                seat.refuse()
        return far or bool(live and not any(seat.has_heard(full) for seat in live))

    def _has_moved(self) -> None:
        """Somebody is less far behind, or has left."""
        if self._moved is not None and not self._moved.done():
            self._moved.set_result(None)

    async def listen(self, call: Call) -> AsyncGenerator[Parts | Track]:
        """
        Take a seat: what has been said, then what is, for as long as it goes on; raises what it failed with.

        Where *call* wants it in another form, there is one item: the whole track, when it is whole. Who stops listening
        last ends the generation, before this returns.
        """
        seat = Seat(call, self._last)
        self._seats.append(seat)
        try:
            while True:
                stretch, position = seat.stretch, seat.position
                if seat.live and position < len(stretch.track):
                    seat.position = len(stretch.track)
                    self._has_moved()
                    yield self._heard(seat, position)
                elif seat.live and stretch.next is not None:
                    seat.stretch, seat.position = stretch.next, 0
                    self._has_moved()
                elif seat.is_refused:
                    raise UpstreamFailed("The upstream's answer is too large.")
                elif not self._over:
                    await self._news(seat)
                elif self.error is not None:
                    raise self.error
                else:
                    break
            if not seat.live:
                yield seat.stretch.whole()
        finally:
            if self._leave(seat):
                await self._end()

    def _heard(self, seat: Seat, position: int) -> Parts:
        """What has come since; who pays gets the parts themselves, and the others' are made anew: they are changed."""
        latest, track = self._latest, seat.stretch.track
        if latest is not None and latest[0] == position and seat is self._seats[0] and seat.stretch is self._last:
            self._latest = None
            return latest[1]
        return track.parts(position, len(track))

    async def _news(self, seat: Seat) -> None:
        seat.waiting = asyncio.get_running_loop().create_future()
        await seat.waiting

    def _leave(self, seat: Seat) -> bool:
        """Whether this was the last one, and the generation was under way."""
        pays = seat is self._seats[0]
        self._seats.remove(seat)
        if self._over:
            return False
        self._has_moved()
        if pays and not seat.live:
            _hear_of(seat)
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


def _hear_of(seat: Seat) -> None:
    """Who waits for the whole of a stream and leaves has been given nothing, and pays for what was generated."""
    stretch: Stretch | None = seat.stretch
    while stretch is not None:
        seat.call.usage = seat.call.heard.add(stretch.track.in_runs(0, len(stretch.track))) or seat.call.usage
        stretch = stretch.next

"""How long may an upstream take, and what are its failures called?"""

import asyncio
import math
import ssl
from types import TracebackType

import httpx2
import msgspec

from gateway import errors
from gateway.interrupt import Interrupt
from gateway.sse import Event, EventReader

MAX_EVENT_BYTES = 1024 * 1024


class Vigil:
    """
    The patience with one upstream: one timer for all exchanges, set for the first of them that may be over.

    It is set anew when it rings, or has to ring earlier: so that an exchange seldom costs a timer, which is a tenth of
    what `asyncio.timeout` around every wait would cost. It is bound to the event loop of its first exchange.
    """

    def __init__(self) -> None:
        self.exchanges: set[Patience] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = math.inf

    def patience(self, deadline: float) -> "Patience":
        """For one exchange of the current task, until *deadline* on the event loop's clock."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        return Patience(self, self._loop, deadline)

    def watch(self, until: float, loop: asyncio.AbstractEventLoop) -> None:
        """Rings at that time, or before it."""
        if until < self._rings_at:
            if self._timer is not None:
                self._timer.cancel()
            self._rings_at, self._timer = until, loop.call_at(until, self._ring, loop)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._rings_at, self._timer = math.inf, None

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        self._rings_at, self._timer = math.inf, None
        now = loop.time()
        for patience in list(self.exchanges):
            if patience.until <= now:
                patience.end()
        if self.exchanges:
            self.watch(min(patience.until for patience in self.exchanges), loop)


class Patience:
    """
    How long one exchange may wait, and what its failures are called.

    Between `allow` and `rest` the upstream is being waited for; the time that a slow client takes does not count.
    Leaving the context translates the HTTP client's exceptions, and this is the only place that does.
    """

    def __init__(self, vigil: Vigil, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        self.until = math.inf
        self._vigil = vigil
        self._loop = loop
        self._interrupt = Interrupt(loop)
        self._deadline = deadline
        self._latest = deadline

    def allow(self, seconds: float) -> None:
        self._latest = min(self._loop.time() + seconds, self._deadline)
        self.go_on()

    def go_on(self) -> None:
        """Waiting again, for no longer than was allowed last."""
        self.until = until = self._latest
        self._vigil.watch(until, self._loop)

    def rest(self) -> None:
        self.until = math.inf

    def end(self) -> None:
        """It is over: whoever waits is interrupted."""
        self.until = math.inf
        self._interrupt.ring()

    def __enter__(self) -> "Patience":
        self._vigil.exchanges.add(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, _: TracebackType | None) -> None:
        self._vigil.exchanges.discard(self)
        if exc is None:
            return
        if self._interrupt.caused(exc):
            raise errors.UpstreamTimeout("The upstream took too long to answer.") from exc
        if isinstance(exc, httpx2.ConnectTimeout | httpx2.ConnectError | ssl.SSLError):
            raise errors.UpstreamUnreachable("The upstream could not be reached.") from exc
        if isinstance(exc, httpx2.PoolTimeout):
            raise errors.Overloaded("All connections to the upstream are in use. Try again later.") from exc
        if isinstance(exc, httpx2.TimeoutException):
            raise errors.UpstreamTimeout("The upstream took too long to answer.") from exc
        if isinstance(exc, httpx2.TransportError):
            raise errors.UpstreamFailed("The upstream broke off before its answer was complete.") from exc
        if isinstance(exc, msgspec.MsgspecError | RecursionError | UnicodeDecodeError):
            raise errors.UpstreamFailed("The upstream's answer could not be understood.") from exc


class Events:
    """
    The events of a response, those that arrived together in one list.

    Patience counts complete events: neither comments nor half an event prove that a generation goes on. Until `begun`,
    with the first content, they are all in the time for the first token.
    """

    def __init__(self, response: httpx2.Response, patience: Patience, idle_s: float) -> None:
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        self.begun = False
        self._blocks = aiter(response.stream)
        self._reader = EventReader(MAX_EVENT_BYTES)
        self._patience = patience
        self._idle_s = idle_s

    def __aiter__(self) -> "Events":
        return self

    async def __anext__(self) -> list[Event]:
        if self.begun:
            self._patience.allow(self._idle_s)
        else:
            self._patience.go_on()
        while True:
            if events := self._reader.feed(await anext(self._blocks)):
                self._patience.rest()
                return events

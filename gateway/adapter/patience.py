"""How long may an upstream take, and what are its failures called?"""

import asyncio
import ssl
from types import TracebackType

import httpx2
import msgspec

from gateway import errors
from gateway.interrupt import Interrupt
from gateway.sse import Event, EventReader

MAX_EVENT_BYTES = 1024 * 1024


class Patience:
    """
    How long one exchange may wait, and what its failures are called.

    Between `allow` and `rest` the upstream is being waited for; the time that a slow client takes does not count. One
    timer, armed anew only when it rings early, costs a tenth of `asyncio.timeout` around every wait. Leaving the
    context translates the HTTP client's exceptions, and this is the only place that does.
    """

    def __init__(self, deadline: float) -> None:
        self._interrupt = Interrupt()
        self._loop = self._interrupt.loop
        self._deadline = deadline
        self._until: float | None = None
        self._latest = deadline
        self._timer: asyncio.TimerHandle | None = None

    def allow(self, seconds: float) -> None:
        self._latest = min(self._loop.time() + seconds, self._deadline)
        self.go_on()

    def go_on(self) -> None:
        """Waiting again, for no longer than was allowed last."""
        self._until = until = self._latest
        if self._timer is None or self._timer.when() > until:
            self._arm(until)

    def rest(self) -> None:
        self._until = None

    def _arm(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._until is None:
            return
        if self._loop.time() < self._until:
            self._arm(self._until)
        else:
            self._interrupt.ring()

    def __enter__(self) -> "Patience":
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, _: TracebackType | None) -> None:
        self._until = None
        if self._timer is not None:
            self._timer.cancel()
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

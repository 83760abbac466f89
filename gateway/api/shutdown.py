"""How does a request learn that the process is about to end?"""

from types import TracebackType

from gateway.errors import ShuttingDown
from gateway.interrupt import Interrupt


class Shutdown:
    """It is announced first, for readiness to turn red; in the end, what still runs is interrupted."""

    def __init__(self) -> None:
        self.begun = False
        self._over = False
        self._running: set[Interrupt] = set()

    def begin(self) -> None:
        self.begun = True

    def cut(self) -> None:
        self._over = True
        for interrupt in self._running:
            interrupt.ring("shutdown")

    def running(self, interrupt: Interrupt) -> "Running":
        """A context that may be interrupted, and then raises ShuttingDown."""
        return Running(self, interrupt)

    def add(self, interrupt: Interrupt) -> None:
        if self._over:
            raise ShuttingDown
        self._running.add(interrupt)

    def discard(self, interrupt: Interrupt) -> None:
        self._running.discard(interrupt)


class Running:
    def __init__(self, shutdown: Shutdown, interrupt: Interrupt) -> None:
        self._shutdown = shutdown
        self._interrupt = interrupt

    def __enter__(self) -> None:
        self._shutdown.add(self._interrupt)

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, _: TracebackType | None) -> None:
        self._shutdown.discard(self._interrupt)
        if self._interrupt.caused(exc, "shutdown"):
            raise ShuttingDown from None

"""How does a request learn that the process is about to end?"""

from gateway.errors import ShuttingDown
from gateway.interrupt import Interrupt

SHUTDOWN = "shutdown"


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
            interrupt.ring(SHUTDOWN)

    def add(self, interrupt: Interrupt) -> None:
        """What may be interrupted from now on, for this reason; raises ShuttingDown where it is too late to begin."""
        if self._over:
            raise ShuttingDown
        self._running.add(interrupt)

    def discard(self, interrupt: Interrupt) -> None:
        self._running.discard(interrupt)

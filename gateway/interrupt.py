"""How is a task stopped from outside, and told apart from one that was cancelled for another reason?"""

import asyncio


class Interrupt:
    """
    Cancels the task that made it.

    What `asyncio.timeout` does, without its context manager: for waits that nearly always end at once, a timer that
    rings it costs a third as much.
    """

    def __init__(self) -> None:
        self._task = asyncio.current_task()
        self._rung = False

    def ring(self) -> None:
        self._rung = True
        if self._task is not None:
            self._task.cancel()

    def caused(self, exc: BaseException | None) -> bool:
        """Whether *exc* is this interrupt's doing and nobody else's; then it may be swallowed or renamed."""
        ours = self._rung and isinstance(exc, asyncio.CancelledError)
        return ours and self._task is not None and self._task.uncancel() == 0

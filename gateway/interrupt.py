"""How is a task stopped from outside, and told apart from one that was cancelled for another reason?"""

import asyncio


class Interrupt:
    """
    Cancels the task that made it, for a reason that it keeps.

    What `asyncio.timeout` does, without its context manager: for waits that nearly always end at once, a timer that
    rings it costs a third as much. Holds the event loop too, since asking for it is a system call in Python 3.11:
    where it is known, it should be given.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.loop = loop or asyncio.get_running_loop()
        self._task = asyncio.current_task(self.loop)
        self._reason: object = None

    def ring(self, reason: object = "") -> None:
        """Only the first counts."""
        if self._reason is None and self._task is not None:
            self._reason = reason
            self._task.cancel()

    def caused(self, exc: BaseException | None, reason: object = "") -> bool:
        """Whether *exc* is its doing for this reason, and nobody else's; then it may be swallowed or renamed."""
        ours = self._reason == reason and isinstance(exc, asyncio.CancelledError)
        return ours and self._task is not None and self._task.uncancel() == 0

"""How late is the event loop?"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

PERIOD_S = 0.25
AGAIN_S = 1.0

logger = logging.getLogger("suiron")


async def watch_lag(
    observe: Callable[[float], None],
    clock: Callable[[], float],
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Observes, four times a second, by how many seconds the event loop woke this up too late; never ends."""
    while True:
        due = clock() + PERIOD_S
        await sleep(PERIOD_S)
        observe(max(0.0, clock() - due))


async def supervised(
    name: str, work: Callable[[], Awaitable[None]], sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
) -> None:
    """Begins *work* anew whenever it fails."""
    while True:
        try:
            await work()
        except Exception as exc:
            logger.error("%s failed; it is started again", name, exc_info=exc)
        await sleep(AGAIN_S)

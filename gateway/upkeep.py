"""What keeps up the reservations of the living, and finishes those of the dead?"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

import msgspec

from gateway.database.record import decode, encode
from gateway.ledger import Ledger
from gateway.limits import Limiter, settlement
from gateway.stores import LedgerUnavailable, LimitStore, Reservation, StoreUnavailable
from gateway.tokens import Tokens

BEAT_S = 10
SWEEP_S = 5
TICK_S = 1.0

logger = logging.getLogger("suiron")

Sleep = Callable[[float], Awaitable[object]]


class Upkeep:
    """
    Background work on a store and a ledger: heartbeats, and what replicas that died have left behind.

    *clock* is the wall clock: only that goes on while a machine sleeps.
    """

    def __init__(
        self,
        limiter: Limiter,
        store: LimitStore,
        ledger: Ledger,
        tokens: Tokens,
        *,
        sleep: Sleep = asyncio.sleep,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._limiter = limiter
        self._tokens = tokens
        self._store = store
        self._ledger = ledger
        self._sleep = sleep
        self._clock = clock

    async def beat(self) -> None:
        """
        Every 10 s, and as soon as the store is back: what it has lost is made anew. The journal, every second.

        At once where this process has stood still.
        """
        due_s, was_there = 0.0, True
        while True:
            began = self._clock()
            await self._sleep(TICK_S)
            self._ledger.beat(self._tokens.generated)
            is_there = self._store.available
            due_s -= max(TICK_S, self._clock() - began)
            if is_there and (due_s <= 0 or not was_there):
                due_s = BEAT_S
                try:
                    await self._limiter.beat()
                except StoreUnavailable:
                    is_there = False
            was_there = is_there

    async def sweep(self) -> None:
        """Every 5 s: records of requests whose process died, and of those that it did not come to write."""
        while True:
            await self._sleep(SWEEP_S)
            if self._store.available:
                try:
                    await self._sweep()
                except (StoreUnavailable, LedgerUnavailable) as exc:
                    logger.warning("what other replicas left behind has to wait: %s", exc)

    async def _sweep(self) -> None:
        for reservation in await self._store.overdue():
            if not self._limiter.keeps(reservation.request_id):  # else it was this process that stood still
                await self._finish(reservation)
        if strays := await self._store.strays():
            self._store.recorded(await self._ledger.ingest([stray.event for stray in strays]))

    async def _finish(self, reservation: Reservation) -> None:
        try:
            record = decode(self._ledger.abandoned(reservation.intent, reservation.progress))
        except msgspec.MsgspecError:
            logger.error("what request %s was about to do cannot be read: it is let go", reservation.request_id)
            self._store.settle(reservation, reservation.costs, exact=False)
            return
        actual, exact = settlement(record)
        event = encode(record)
        self._store.settle(reservation, actual, exact=exact, event=event)
        self._store.recorded(await self._ledger.ingest([event]))

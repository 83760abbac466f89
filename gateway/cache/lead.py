"""Which of the replicas that share a store generates an answer, and which wait for it?"""

import asyncio
import secrets
from contextlib import suppress

from gateway.cache.question import digest
from gateway.stores import StoreUnavailable
from gateway.stores.answers import AnswerStore, Epochs

LEASE_S = 6.0
RENEWALS = 3
"""How often within a lease who leads says so: all but one may be lost."""


class Lead:
    """
    One process's bid to be the one that looks for the answer to a question, of those that ask in the same *epochs*.

    Where nobody can say who leads, everybody does.
    """

    def __init__(self, store: AnswerStore, key: bytes, epochs: Epochs, lease_s: float = LEASE_S) -> None:
        self.epochs = epochs
        self._lease_s = lease_s
        self._store = store
        self._key = digest((key, *(epoch.encode() for epoch in epochs)))
        self._token = secrets.token_hex(8)
        self._due: asyncio.TimerHandle | None = None
        self._renewing: asyncio.Task[None] | None = None

    async def take(self) -> bool:
        """Whether this one leads, from now on."""
        try:
            return await self._store.lead(self._key, self._token, self._lease_s)
        except StoreUnavailable:
            return True

    async def is_taken(self) -> bool:
        """Whether somebody leads."""
        try:
            return await self._store.is_led(self._key)
        except StoreUnavailable:
            return False

    def keep(self) -> None:
        """From now on, until it is left."""
        self._due = asyncio.get_running_loop().call_later(self._lease_s / RENEWALS, self._renew)

    def _renew(self) -> None:
        self._renewing = asyncio.ensure_future(self._take_again())

    async def _take_again(self) -> None:
        await self.take()
        self.keep()

    async def leave(self) -> None:
        """Somebody else may lead."""
        if self._due is not None:
            self._due.cancel()
        if self._renewing is not None:
            self._renewing.cancel()
        with suppress(StoreUnavailable):
            await self._store.follow(self._key, self._token)

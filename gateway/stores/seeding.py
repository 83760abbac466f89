"""How does a quota that a store does not know get what the ledger knows of it? Asked once for all who wait."""

import asyncio

from gateway.stores import LedgerUnavailable, Quota, StoreUnavailable, Used


class Seeding:
    """Questions to the ledger that are under way. Who stops waiting does not stop them for the others."""

    def __init__(self, used: Used) -> None:
        self._used = used
        self._asked: dict[tuple[Quota, int], asyncio.Task[tuple[int, int]]] = {}
        self.count = 0

    async def ask(self, quota: Quota, period_start_ms: int) -> tuple[int, int]:
        """What was used since *period_start_ms*, and the watermark. Raises StoreUnavailable where the ledger fails."""
        key = (quota, period_start_ms)
        task = self._asked.get(key)
        if task is None:
            task = asyncio.ensure_future(self._used(quota.scope, quota.metric, period_start_ms))
            self._asked[key] = task
            task.add_done_callback(lambda done: self._answered(key, done))
        try:
            return await asyncio.shield(task)
        except LedgerUnavailable as exc:
            raise StoreUnavailable(f"the ledger cannot say what was used of {quota.scope}: {exc}") from exc

    def _answered(self, key: tuple[Quota, int], done: "asyncio.Task[tuple[int, int]]") -> None:
        del self._asked[key]
        self.count += 1
        if not done.cancelled():
            done.exception()  # seen, even where all who asked have left

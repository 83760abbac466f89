"""Both stores under one clock and over one ledger."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import pytest

from gateway.settings import Store
from gateway.stores import LimitStore, Metric
from gateway.stores.memory import MemoryStore
from gateway.stores.redis import RedisStore
from tests.stores.servers import Clock, RedisServer, redis_server


@dataclass
class Ledger:
    """What a ledger would say of quotas: rows are added by hand, numbered in the order of their commit."""

    rows: list[tuple[str, int, int]] = field(default_factory=list)
    """Of each: scope, when, how much."""
    asked: int = 0

    async def __call__(self, scope: str, metric: Metric, period_start_ms: int) -> tuple[int, int]:
        self.asked += 1
        used = sum(amount for whose, at, amount in self.rows if whose == scope and at >= period_start_ms)
        return used, len(self.rows)

    def add(self, scope: str, at_ms: int, amount: int) -> int:
        """The row's seq."""
        self.rows.append((scope, at_ms, amount))
        return len(self.rows)


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture(params=["memory", "redis"])
async def store(request: pytest.FixtureRequest, clock: Clock, ledger: Ledger) -> AsyncIterator[LimitStore]:
    made: LimitStore
    if request.param == "memory":
        made = MemoryStore(ledger, clock, clock.monotonic_s)
    else:
        server: RedisServer = request.getfixturevalue("redis")
        server.said("FLUSHALL")
        made = RedisStore(
            Store(url=server.url, timeout_s=5), ledger, now_ms=clock, monotonic_s=clock.monotonic_s, settled_down_s=0
        )
    await made.start()
    yield made
    await made.aclose()

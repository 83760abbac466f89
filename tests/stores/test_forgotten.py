"""What was used of a window counts on where Redis has lost it, and nothing that ended by itself is taken for lost."""

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest
import redis as redis_py

from gateway.settings import Store
from gateway.stores import Costs, Decision, Lease, Plan, Reservation, Rule, Window
from gateway.stores.redis import RedisStore
from tests.stores.conftest import Ledger
from tests.stores.servers import Clock, RedisServer

pytestmark = pytest.mark.anyio

MINUTE = 60_000
SECOND = 1_000
RPM = Window("key:a", "requests", 10, MINUTE)
TPM = Window("key:a", "tokens", 1_000, MINUTE)
RPH = Window("team:t", "requests", 15, 60 * MINUTE)
ids = (f"req_{number}" for number in itertools.count())
Start = Callable[[], Awaitable["Replica"]]


class Replica:
    def __init__(self, store: RedisStore, clock: Clock) -> None:
        self.store = store
        self.clock = clock
        self.plans: dict[tuple[Rule, ...], Plan] = {}

    def asking(self, *rules: Rule, tokens: int = 0) -> Reservation:
        plan = self.plans.setdefault(rules, Plan("t", rules))
        return Reservation(plan, next(ids), Costs(tokens), b"intent", since_s=self.clock.monotonic_s())

    async def ask(self, *rules: Rule, tokens: int = 0) -> Decision:
        return await self.store.admit(self.asking(*rules, tokens=tokens))

    async def settle(self, reservation: Reservation, tokens: int = 0, requests: int = 1) -> None:
        self.store.settle(reservation, Costs(tokens, requests=requests), exact=True)
        await self.store.delivered()

    async def use_up(self, *rules: Rule, tokens: int = 0) -> int:
        """How many are admitted until one is refused."""
        for count in range(1_000):
            if (await self.ask(*rules, tokens=tokens)).denied is not None:
                return count
        raise AssertionError("nothing is refused")


@pytest.fixture
async def start(redis: RedisServer, clock: Clock, ledger: Ledger) -> AsyncIterator[Start]:
    """Starts a replica."""
    redis.said("FLUSHALL")
    options = Store(url=redis.url, timeout_s=5)
    async with AsyncExitStack() as stack:

        async def started() -> Replica:
            store = RedisStore(options, ledger, now_ms=clock, monotonic_s=clock.monotonic_s, settled_down_s=0)
            await store.start()
            stack.push_async_callback(store.aclose)
            return Replica(store, clock)

        yield started


@pytest.fixture
def flush(redis: RedisServer, clock: Clock) -> Callable[[], None]:
    def flushed() -> None:
        redis.said("FLUSHALL")
        clock.forward(1)

    return flushed


def contents(redis: RedisServer) -> dict[bytes, bytes]:
    with redis_py.Redis(port=redis.port) as client:
        return {key: client.dump(key) for key in client.scan_iter() if not key.endswith(b":m")}


async def test_a_window_that_was_used_up_stays_so_until_it_is_over(
    start: Start, clock: Clock, flush: Callable[[], None]
) -> None:
    one = await start()
    assert await one.use_up(RPM) == 10
    clock.forward(20 * SECOND)
    flush()
    refused = await one.ask(RPM)
    assert (refused.denied, refused.remaining, refused.wait_ms) == (0, [0], 41 * SECOND - 1)
    assert refused.reset_ms == [41 * SECOND - 1]
    clock.forward(41 * SECOND - 2)
    assert (await one.ask(RPM)).denied == 0
    clock.forward(1)
    assert await one.use_up(RPM) == 10


async def test_what_is_left_can_be_used_and_no_more(start: Start, clock: Clock, flush: Callable[[], None]) -> None:
    one = await start()
    for _ in range(4):
        await one.ask(RPM, TPM, tokens=100)
    flush()
    assert (await one.ask(RPM, TPM, tokens=10)).remaining == [5, 590]
    clock.forward(30 * SECOND)
    assert await one.use_up(RPM, TPM, tokens=118) == 5
    clock.forward(30 * SECOND)
    flush()
    assert await one.use_up(RPM, TPM) == 0


async def test_it_can_be_lost_again_and_again(start: Start, clock: Clock, flush: Callable[[], None]) -> None:
    one = await start()
    for left in range(9, -1, -1):
        assert (await one.ask(RPM, TPM, tokens=100)).remaining == [left, 100 * left]
        flush()
    for _ in range(3):
        assert (await one.ask(RPM, TPM)).denied is not None
        flush()


async def test_a_replica_that_saw_nothing_gets_no_more_than_it_gets_before_the_first_that_did(
    start: Start, flush: Callable[[], None]
) -> None:
    one, other = await start(), await start()
    await one.use_up(RPM)
    flush()
    assert [(await other.ask(RPM)).denied for _ in range(3)] == [None, None, None]
    assert (await one.ask(RPM)).denied == 0
    assert (await other.ask(RPM)).denied == 0


async def test_a_replica_that_was_only_refused_has_seen_it_too(start: Start, flush: Callable[[], None]) -> None:
    one, other = await start(), await start()
    await one.use_up(RPM)
    await other.ask(RPM)
    flush()
    assert (await other.ask(RPM)).denied == 0


async def test_of_replicas_that_saw_different_things_the_one_that_saw_most_is_right(
    start: Start, clock: Clock, flush: Callable[[], None]
) -> None:
    replicas = [await start(), await start(), await start()]
    for count, replica in zip((1, 2, 3), replicas, strict=True):
        for _ in range(count):
            await replica.ask(RPM)
        clock.forward(SECOND)
    flush()
    for replica, left in zip([replicas[i] for i in (1, 0, 2, 1)], (6, 5, 1, 0), strict=True):
        assert (await replica.ask(RPM)).remaining == [left]


async def test_many_that_ask_at_once_tell_it_once(start: Start, flush: Callable[[], None]) -> None:
    one = await start()
    for _ in range(4):
        await one.ask(RPM)
    flush()
    asking = [one.ask(RPM) for _ in range(3)]
    assert [(await answer).remaining for answer in asking] == [[5], [4], [3]]


async def test_keys_of_a_team_share_what_was_seen_of_its_window(start: Start, flush: Callable[[], None]) -> None:
    one = await start()
    first, second = Window("key:1", "requests", 100, MINUTE), Window("key:2", "requests", 100, MINUTE)
    await one.ask(second, RPH)
    assert await one.use_up(first, RPH) == 14
    flush()
    refused = await one.ask(second, RPH)
    assert (refused.denied, refused.remaining) == (1, [99, 0])


async def test_a_refusal_takes_nothing_and_once_it_has_told_changes_nothing(
    start: Start, redis: RedisServer, flush: Callable[[], None]
) -> None:
    one = await start()
    rules = (RPM, TPM, RPH, Lease("key:a", 50))
    await one.use_up(*rules, tokens=90)
    flush()
    assert (await one.ask(*rules)).denied == 0
    before = contents(redis)
    for tokens in (0, 90, 2_000):
        assert (await one.ask(*rules, tokens=tokens)).denied is not None
    assert contents(redis) == before
    assert (await one.ask(RPH)).remaining == [4]


async def test_only_what_is_lost_is_told(start: Start, redis: RedisServer, clock: Clock) -> None:
    one = await start()
    for _ in range(3):
        await one.ask(RPM, TPM, RPH, tokens=100)
    clock.forward(1)
    with redis_py.Redis(port=redis.port) as client:
        [evicted] = client.scan_iter(f"*:w:*:t:{MINUTE}")
        client.delete(evicted)
    assert (await one.ask(RPM, TPM, RPH, tokens=100)).remaining == [6, 600, 11]


async def test_a_request_that_costs_nothing_of_a_window_does_not_make_it_forgotten(
    start: Start, flush: Callable[[], None]
) -> None:
    one, other = await start(), await start()
    await one.use_up(TPM, tokens=250)
    flush()
    assert (await one.ask(RPM, TPM, tokens=0)).denied is None
    assert (await one.ask(TPM, tokens=1)).denied == 0
    assert (await other.ask(TPM, tokens=1)).denied == 0


async def test_a_window_that_has_ended_is_not_taken_for_lost(start: Start, clock: Clock) -> None:
    one, idle = await start(), await start()
    await one.use_up(RPM)
    await idle.ask(RPM)
    clock.forward(61 * SECOND)
    assert (await one.ask(RPM)).remaining == [9]
    assert (await idle.ask(RPM)).remaining == [8]
    clock.forward(30 * SECOND)
    assert (await one.ask(RPM)).remaining == [7]
    clock.forward(31 * SECOND)
    assert (await idle.ask(RPM)).remaining == [8]


async def test_an_idle_replica_takes_nothing_for_lost(start: Start, clock: Clock) -> None:
    one, idle = await start(), await start()
    await idle.ask(RPM)
    for _ in range(20):
        clock.forward(7 * SECOND)
        assert (await one.ask(RPM)).denied is None
    assert await idle.use_up(RPM) == 1
    clock.forward(61 * SECOND)
    assert await one.use_up(RPM) + await idle.use_up(RPM) == 10


@pytest.mark.parametrize("step_ms", [-1, -700, -5 * SECOND, -40 * SECOND, -90 * SECOND, -3_600 * SECOND])
async def test_a_clock_that_steps_back_makes_nobody_tell_of_a_loss(start: Start, clock: Clock, step_ms: int) -> None:
    one, other = await start(), await start()
    for replica in (one, other, one):
        await replica.ask(RPM)
    clock.forward(step_ms)
    left = 7
    for _ in range(3):
        for replica in (one, other):
            left -= 1
            assert (await replica.ask(RPM)).remaining == [left]
            clock.forward(400)


async def test_what_has_left_is_not_told_of_where_the_clock_steps_back_after(
    start: Start, clock: Clock, flush: Callable[[], None]
) -> None:
    one = await start()
    await one.use_up(RPM)
    flush()  # as Redis does itself after a while
    later = one.asking(RPM)
    later.since_s += 61
    assert (await one.store.admit(later)).remaining == [9]


async def test_what_has_left_by_a_clock_that_steps_forward_is_not_told_of(
    start: Start, clock: Clock, flush: Callable[[], None]
) -> None:
    one, other = await start(), await start()
    await one.use_up(RPM)
    began_s = clock.monotonic_s()
    clock.forward(70 * SECOND)
    flush()  # as Redis does itself
    await other.ask(RPM)
    at_once = one.asking(RPM)
    at_once.since_s = began_s + 0.01
    assert (await one.store.admit(at_once)).remaining == [8]


async def test_a_window_of_an_older_version_is_not_taken_for_lost(start: Start, redis: RedisServer) -> None:
    one = await start()
    for _ in range(4):
        await one.ask(RPM)
    with redis_py.Redis(port=redis.port) as client:
        [name] = client.scan_iter("*:w:*")
        assert client.hdel(name, "born") == 1
    assert (await one.ask(RPM)).remaining == [5]


async def test_an_answer_that_is_asked_for_again_tells_nothing_new(
    start: Start, clock: Clock, flush: Callable[[], None]
) -> None:
    one, other = await start(), await start()
    early = one.asking(RPM)
    await one.store.admit(early)
    clock.forward(SECOND)
    for _ in range(7):
        await other.ask(RPM)
    await one.ask(RPM)
    await one.store.admit(early)
    flush()
    assert (await one.ask(RPM)).remaining == [0]


@pytest.mark.parametrize("told_first", [True, False])
async def test_what_is_under_way_counts_once(start: Start, flush: Callable[[], None], told_first: bool) -> None:
    one = await start()
    under_way = [one.asking(RPM, TPM, tokens=100) for _ in range(5)]
    for reservation in under_way:
        await one.store.admit(reservation)
    flush()
    if told_first:
        await one.ask(RPM, TPM)
    await one.store.heartbeat(under_way)
    assert (await one.ask(RPM, TPM)).remaining == [5 - 1 - told_first, 500]
    await one.settle(under_way[0], 130)
    assert (await one.ask(RPM, TPM)).remaining == [3 - told_first, 470]


@pytest.mark.parametrize("told_first", [True, False])
async def test_what_ends_after_the_loss_counts_once_and_what_it_took_beyond_is_a_debt(
    start: Start, flush: Callable[[], None], told_first: bool
) -> None:
    one = await start()
    under_way = [one.asking(RPM, TPM, tokens=100) for _ in range(5)]
    for reservation in under_way:
        await one.store.admit(reservation)
    flush()
    if told_first:
        await one.ask(RPM, TPM)
    await one.settle(under_way[0], 100)
    await one.settle(under_way[1], 150)
    assert (await one.ask(RPM, TPM)).remaining == [5 - 1 - told_first, 450]


async def test_what_was_admitted_after_somebody_looked_counts_beside_what_he_saw(
    start: Start, clock: Clock, flush: Callable[[], None]
) -> None:
    one, other = await start(), await start()
    for _ in range(4):
        await one.ask(RPM)
    clock.forward(SECOND)
    later = [other.asking(RPM) for _ in range(3)]
    for reservation in later:
        await other.store.admit(reservation)
    flush()
    await other.settle(later[0])
    assert (await one.ask(RPM)).remaining == [4]  # of 10: 4 that it saw, the one that has ended, its own
    await other.settle(later[1])
    assert (await one.ask(RPM)).remaining == [2]
    assert (await other.ask(RPM)).remaining == [0]  # of which it saw 7, and 2 were asked for since

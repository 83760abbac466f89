"""What does a Redis in trouble cost? Real servers that are killed, frozen, flushed, emptied; replies that are lost."""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress

import pytest
import redis as redis_py

from gateway.settings import Secret, Store
from gateway.stores import Costs, Decision, Lease, Plan, Quota, Reservation, StoreUnavailable, Window
from gateway.stores.redis import RedisStore
from tests.stores.conftest import Ledger
from tests.stores.proxy import proxy_to
from tests.stores.servers import RedisServer, free_port, redis_server

pytestmark = pytest.mark.anyio

PATIENT_S = 5.0
HOUR = 3_600_000
ids = (f"req_{number}" for number in itertools.count())
slots = (f"team-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """One that may be killed."""
    with redis_server() as server:
        yield server


@asynccontextmanager
async def store_at(url: str, ledger: Ledger | None = None, timeout_s: float = PATIENT_S) -> AsyncIterator[RedisStore]:
    store = RedisStore(Store(url=url, timeout_s=timeout_s), ledger or Ledger(), stray_ms=0, settled_down_s=0)
    await store.start()
    try:
        yield store
    finally:
        await store.aclose()


def plan_of(limit: int = 100, slot: str = "") -> Plan:
    scope = slot or next(slots)
    return Plan(scope, (Window(scope, "requests", limit, HOUR), Window(scope, "tokens", limit * 10, HOUR)))


def asking(plan: Plan, tokens: int = 10) -> Reservation:
    return Reservation(plan, next(ids), Costs(tokens), b"intent")


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in another process
            await asyncio.sleep(0.01)


async def refused_at_once(store: RedisStore) -> None:
    began = time.monotonic()
    for _ in range(20):
        with pytest.raises(StoreUnavailable):
            await store.admit(asking(plan_of()))
    assert time.monotonic() - began < 0.2


async def test_a_redis_that_is_not_there_at_the_start_is_found_when_it_comes() -> None:
    port = free_port()
    async with store_at(f"redis://127.0.0.1:{port}", timeout_s=0.25) as store:
        assert not store.available
        await refused_at_once(store)
        with redis_server(port=port):
            await until(lambda: store.available)
            assert (await store.admit(asking(plan_of()))).denied is None


async def test_a_server_that_hangs_up_on_everyone_is_tried_until_it_does_not() -> None:
    port = free_port()
    async with proxy_to(port) as proxy, store_at(f"redis://127.0.0.1:{proxy.port}", timeout_s=1) as store:
        assert not store.available
        await until(lambda: proxy.connections > 2)
        with redis_server(port=port):
            await until(lambda: store.available)
            assert (await store.admit(asking(plan_of()))).denied is None


async def test_when_redis_dies_no_request_waits_long_and_what_was_settled_arrives_when_it_is_back(
    own_redis: RedisServer,
) -> None:
    ledger = Ledger()
    scope = next(slots)
    plan = Plan(scope, (Window(scope, "tokens", 1_000, HOUR), Quota(scope, "tokens", 1_000, "month")))
    async with store_at(own_redis.url, ledger, timeout_s=0.25) as store:
        under_way = asking(plan)
        await store.admit(under_way)
        own_redis.kill()
        began = time.monotonic()
        tries = await asyncio.gather(*(store.admit(asking(plan)) for _ in range(30)), return_exceptions=True)
        assert {type(failed) for failed in tries} == {StoreUnavailable}
        assert time.monotonic() - began < 2
        assert not store.available
        await refused_at_once(store)
        store.settle(under_way, Costs(70), exact=True, event=b"row")
        assert store.counts.backlog == 1
        own_redis.start()  # with nothing of what it knew
        await until(lambda: store.available)
        await store.delivered()
        assert store.counts.late == 1
        store.recorded({under_way.request_id: ledger.add(scope, time.time_ns() // 1_000_000, 70)})
        await store.delivered()
        assert (await store.admit(asking(plan, 0))).remaining == [930, 930]


async def test_what_was_settled_in_an_outage_arrives_before_what_is_asked_after_it(own_redis: RedisServer) -> None:
    plan = plan_of()
    first: list[asyncio.Task[Decision]] = []

    def changed(is_back: bool) -> None:
        if is_back:
            first.append(asyncio.create_task(store.admit(asking(plan, 0))))

    store = RedisStore(Store(url=own_redis.url, timeout_s=PATIENT_S), Ledger(), changed=changed)
    await store.start()
    try:
        own_redis.kill()
        while store.available:
            with suppress(StoreUnavailable):
                await store.admit(asking(plan))
        for _ in range(40):  # as a share has admitted them
            store.settle(asking(plan), Costs(10), exact=True)
        own_redis.start()
        await until(lambda: first)
        assert (await first[0]).remaining == [59, 600]
    finally:
        await store.aclose()


async def test_a_frozen_redis_costs_its_timeout_a_few_times_and_then_nothing(own_redis: RedisServer) -> None:
    plan = plan_of()
    async with store_at(own_redis.url, timeout_s=0.25) as store:
        await store.admit(asking(plan))
        own_redis.freeze()
        for _ in range(5):
            began = time.monotonic()
            with pytest.raises(StoreUnavailable, match=r"250 ms|no connection"):
                await store.admit(asking(plan))
            assert time.monotonic() - began < 1.5
        assert not store.available
        await refused_at_once(store)
        own_redis.thaw()
        await until(lambda: store.available)
        assert (await store.admit(asking(plan))).denied is None


async def test_what_a_frozen_redis_does_late_is_undone_by_the_settle(own_redis: RedisServer) -> None:
    plan = plan_of()
    async with store_at(own_redis.url, timeout_s=0.25) as store:
        await store.admit(asking(plan))
        own_redis.freeze()
        unanswered = asking(plan)
        with pytest.raises(StoreUnavailable):
            await store.admit(unanswered)
        store.settle(unanswered, Costs(requests=0), exact=True)
        own_redis.thaw()
        await until(lambda: store.available)
        await store.delivered()
        assert (await store.admit(asking(plan, 0))).remaining == [98, 990]


async def test_a_lost_reply_counts_once(redis: RedisServer) -> None:
    plan = plan_of()
    async with proxy_to(redis.port) as proxy, store_at(f"redis://127.0.0.1:{proxy.port}") as store:
        for lost in range(5):
            reservation = asking(plan)
            proxy.lose_replies = 1
            assert (await store.admit(reservation)).remaining == [99 - lost, 995 - 5 * lost - 5]
            proxy.lose_replies = 1
            store.settle(reservation, Costs(5), exact=True)
            await store.delivered()
        assert proxy.lost == 10
        assert (await store.admit(asking(plan, 0))).remaining == [94, 975]


async def test_a_script_that_was_flushed_is_sent_again(redis: RedisServer) -> None:
    plan = plan_of()
    async with store_at(redis.url) as store:
        for _ in range(5):
            redis.said("SCRIPT", "FLUSH")
            reservation = asking(plan)
            await store.admit(reservation)
            redis.said("SCRIPT", "FLUSH")
            store.settle(reservation, Costs(5), exact=True)
            await store.heartbeat([reservation])
        assert (await store.admit(asking(plan, 0))).remaining == [94, 975]


async def test_calls_of_one_turn_of_the_loop_share_a_round_trip(redis: RedisServer) -> None:
    plan = plan_of()
    async with store_at(redis.url) as store:
        await store.admit(asking(plan))
        before = store.counts.round_trips
        answers = await asyncio.gather(*(store.admit(asking(plan)) for _ in range(99)))
        assert sorted(answer.remaining[0] for answer in answers) == list(range(99))
        assert store.counts.round_trips == before + 1


async def test_a_refused_request_changes_no_key(redis: RedisServer) -> None:
    scope = next(slots)
    rules = (
        Window(scope, "requests", 3, HOUR),
        Window(scope, "tokens", 1_000, HOUR),
        Lease(scope, 3),
        Quota(scope, "tokens", 1_000, "day"),
    )
    plan = Plan(scope, rules)
    async with store_at(redis.url) as store:
        for _ in range(3):
            await store.admit(asking(plan))
        before = contents(redis)
        for tokens in (1, 100, 10_000):
            assert (await store.admit(asking(plan, tokens))).denied is not None
        assert contents(redis) == before


def contents(redis: RedisServer) -> dict[str, bytes]:
    """Each key with what it holds, as Redis serializes it."""
    keys = sorted(line for line in redis.said("KEYS", "*").decode().splitlines() if line.startswith("{g1:"))
    return {key: redis.said("DUMP", key) for key in keys if not key.endswith(":m")}


async def test_what_is_settled_and_recorded_leaves_its_counters_and_for_a_while_its_mark(redis: RedisServer) -> None:
    redis.said("FLUSHALL")
    plan = plan_of()
    async with store_at(redis.url) as store:
        reservation = asking(plan)
        await store.admit(reservation)
        assert kinds(redis) == {"w", "r", "rz", "m"}
        store.settle(reservation, Costs(5), exact=True, event=b"row")
        store.recorded({reservation.request_id: 1})
        await store.delivered()
        assert kinds(redis) == {"w", "r", "u", "m"}
        assert redis.said("XLEN", next(key for key in contents(redis) if key.endswith(":u"))) == b":0\r\n"
        mark = next(key for key in contents(redis) if ":r:" in key)
        assert 200 < int(redis.said("TTL", mark)[1:]) <= 300


def kinds(redis: RedisServer) -> set[str]:
    return {key.split(":")[2] for key in redis.said("KEYS", "*").decode().splitlines() if key.startswith("{g1:")}


async def test_names_do_not_enter_keys(redis: RedisServer) -> None:
    plan = plan_of(slot="key:ich@example.com")
    async with store_at(redis.url) as store:
        await store.admit(asking(plan))
        assert b"example" not in redis.said("KEYS", "*")


async def test_a_read_only_redis_is_left_alone_until_it_takes_writes(own_redis: RedisServer) -> None:
    plan = plan_of()
    async with store_at(own_redis.url) as store:
        await store.admit(asking(plan))
        own_redis.said("REPLICAOF", "127.0.0.1", str(free_port()))
        for _ in range(5):
            with pytest.raises(StoreUnavailable, match=r"READONLY|MASTERDOWN"):
                await store.admit(asking(plan))
        assert not store.available
        own_redis.said("REPLICAOF", "NO", "ONE")
        await until(lambda: store.available)
        assert (await store.admit(asking(plan))).denied is None


async def test_a_full_redis_is_a_store_that_is_not_available(own_redis: RedisServer) -> None:
    plan = plan_of()
    async with store_at(own_redis.url) as store:
        await store.admit(asking(plan))
        own_redis.said("CONFIG", "SET", "maxmemory", "1")
        for _ in range(5):
            with pytest.raises(StoreUnavailable, match="OOM"):
                await store.admit(asking(plan))
        assert not store.available
        own_redis.said("CONFIG", "SET", "maxmemory", "0")
        await until(lambda: store.available)


async def test_a_slow_redis_is_left_alone(redis: RedisServer) -> None:
    plan = plan_of()
    async with (
        proxy_to(redis.port) as proxy,
        store_at(f"redis://127.0.0.1:{proxy.port}", timeout_s=0.25) as store,
    ):
        for _ in range(20):
            await store.admit(asking(plan, 0))
        proxy.delay_s = 0.15
        for _ in range(30):
            with suppress(StoreUnavailable):
                await store.admit(asking(plan, 0))
        assert not store.available
        proxy.delay_s = 0
        await until(lambda: store.available)


async def test_one_stall_that_holds_up_many_calls_is_one_slow_round_trip(own_redis: RedisServer) -> None:
    plan = plan_of()
    async with store_at(own_redis.url, timeout_s=1.0) as store:
        await store.admit(asking(plan, 0))
        own_redis.freeze()
        asked = []
        for _ in range(30):
            asked.append(asyncio.create_task(store.admit(asking(plan, 0))))
            await asyncio.sleep(0.001)  # each in a round trip of its own
        await asyncio.sleep(0.45)
        own_redis.thaw()
        await asyncio.gather(*asked)
        assert store.counts.round_trips >= 30
        assert store.available


async def test_what_is_slow_is_told_by_what_a_call_may_take(redis: RedisServer) -> None:
    plan = plan_of()
    async with (
        proxy_to(redis.port) as proxy,
        store_at(f"redis://127.0.0.1:{proxy.port}", timeout_s=1.0) as store,
    ):
        proxy.delay_s = 0.15
        for _ in range(10):
            await store.admit(asking(plan, 0))
        assert store.available


async def test_a_wrong_password_is_said_and_the_right_one_opens(own_redis: RedisServer, tmp_path: object) -> None:
    own_redis.said("CONFIG", "SET", "requirepass", "sesame")
    port = own_redis.port
    async with store_at(f"redis://:wrong@127.0.0.1:{port}/3") as store:
        assert not store.available
        with pytest.raises(StoreUnavailable, match="WRONGPASS"):
            await store.admit(asking(plan_of()))
    async with store_at(f"redis://:sesame@127.0.0.1:{port}/3") as store:
        assert (await store.admit(asking(plan_of()))).denied is None


async def test_the_password_may_be_kept_elsewhere(own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    own_redis.said("CONFIG", "SET", "requirepass", "sesame")
    monkeypatch.setenv("STORE_PASSWORD", "sesame")
    store = RedisStore(Store(url=own_redis.url, password=Secret(env="STORE_PASSWORD")), Ledger())
    await store.start()
    assert store.available
    await store.aclose()


async def test_requests_cancelled_at_random_leave_the_answers_of_others_alone(redis: RedisServer) -> None:
    async with store_at(redis.url) as store:
        plans = [plan_of(limit) for limit in range(1_000, 1_050)]
        chance = random.Random(7)

        async def ask(index: int) -> None:
            answer = await store.admit(asking(plans[index], 0))
            assert answer.remaining[1] == plans[index].rules[1].limit

        for _ in range(40):
            tasks = [asyncio.create_task(ask(index)) for index in range(50)]
            await asyncio.sleep(chance.random() * 0.002)
            for task in chance.sample(tasks, 30):
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert result is None or isinstance(result, asyncio.CancelledError)


async def test_events_that_their_replica_did_not_see_recorded_are_strays(redis: RedisServer) -> None:
    redis.said("FLUSHALL")
    plan = plan_of()
    async with store_at(redis.url) as second:
        async with store_at(redis.url) as first:
            seen, unseen = asking(plan), asking(plan)
            for reservation in (seen, unseen):
                await first.admit(reservation)
                first.settle(reservation, Costs(5), exact=True, event=reservation.request_id.encode())
            first.recorded({seen.request_id: 1})
            await first.delivered()
            assert await first.strays() == []
        [stray] = await second.strays()
        assert (stray.request_id, stray.event) == (unseen.request_id, unseen.request_id.encode())
        assert await second.strays() == [stray]
        second.recorded({unseen.request_id: 2})
        await second.delivered()
        assert await second.strays() == []


async def test_a_stray_that_lost_its_reservation_is_charged_by_whoever_records_it(redis: RedisServer) -> None:
    redis.said("FLUSHALL")
    ledger, scope = Ledger(), next(slots)
    plan = Plan(scope, (Quota(scope, "tokens", 1_000, "month"),))
    async with store_at(redis.url, ledger) as second:
        async with store_at(redis.url, ledger) as first:
            await first.admit(asking(plan, 0))
            lost = asking(plan)
            first.settle(lost, Costs(30), exact=True, event=b"row")
            await first.delivered()
        [stray] = await second.strays()
        second.recorded({stray.request_id: ledger.add(scope, time.time_ns() // 1_000_000, 30)})
        await second.delivered()
        assert (await second.admit(asking(Plan(scope, plan.rules), 0))).remaining == [970]


async def test_what_two_replicas_record_is_charged_once(redis: RedisServer) -> None:
    redis.said("FLUSHALL")
    ledger, scope = Ledger(), next(slots)
    plan = Plan(scope, (Quota(scope, "tokens", 1_000, "month"),))
    async with store_at(redis.url, ledger) as first, store_at(redis.url, ledger) as second:
        await first.admit(asking(plan, 0))
        lost = asking(plan)
        first.settle(lost, Costs(30), exact=True, event=b"row")
        await first.delivered()
        [stray] = await second.strays()
        seq = ledger.add(scope, time.time_ns() // 1_000_000, 30)
        for replica in (first, second):
            replica.recorded({stray.request_id: seq})
            await replica.delivered()
        assert (await first.admit(asking(plan, 0))).remaining == [970]


async def test_what_was_settled_before_redis_forgot_all_and_recorded_after_is_counted(own_redis: RedisServer) -> None:
    ledger, scope = Ledger(), next(slots)
    plan = Plan(scope, (Quota(scope, "tokens", 1_000, "month"),))
    async with store_at(own_redis.url, ledger, timeout_s=0.25) as store:
        settled = [asking(plan) for _ in range(4)]
        for reservation in settled:
            await store.admit(reservation)
            store.settle(reservation, Costs(7), exact=True, event=b"row")
        await store.delivered()
        seqs = [ledger.add(scope, time.time_ns() // 1_000_000, 7)]
        own_redis.said("FLUSHALL")
        assert (await store.admit(asking(plan, 0))).remaining == [993]
        seqs += [ledger.add(scope, time.time_ns() // 1_000_000, 7) for _ in range(3)]
        store.recorded({reservation.request_id: seq for reservation, seq in zip(settled[:2], seqs, strict=False)})
        await store.delivered()
        assert (await store.admit(asking(plan, 0))).remaining == [986]
        own_redis.kill()
        store._nodes[0].leave_alone("it was killed")
        store.recorded({reservation.request_id: seq for reservation, seq in zip(settled[2:], seqs[2:], strict=False)})
        own_redis.start()
        await until(lambda: store.available)
        assert (await store.admit(asking(plan, 0))).remaining == [972]
        await store.delivered()
        assert (await store.admit(asking(plan, 0))).remaining == [972]


async def test_replicas_that_race_to_seed_a_flushed_quota_seed_it_once(redis: RedisServer) -> None:
    ledger, scope = Ledger(), next(slots)
    ledger.add(scope, time.time_ns() // 1_000_000, 400)
    rules = (Quota(scope, "tokens", 100_000, "month"),)
    async with store_at(redis.url, ledger) as a, store_at(redis.url, ledger) as b, store_at(redis.url, ledger) as c:
        for turn in range(1, 6):
            redis.said("FLUSHALL")
            plans = [Plan(scope, rules) for _ in range(6)]
            answers = await asyncio.gather(
                *(store.admit(asking(plan, 10)) for store in (a, b, c) for plan in plans), return_exceptions=False
            )
            assert min(answer.remaining[0] for answer in answers) == 100_000 - 400 - 18 * 10, turn


async def test_who_was_taken_for_dead_and_ends_much_later_is_not_counted_again(redis: RedisServer) -> None:
    scope = next(slots)
    ledger, plan = Ledger(), Plan(scope, (Quota(scope, "tokens", 1_000, "month"),))
    async with store_at(redis.url, ledger) as store:
        slow, now_ms = asking(plan), time.time_ns() // 1_000_000
        await store.admit(slow)
        partition = slow.plan.prepared.partition
        with redis_py.Redis(port=redis.port) as client:
            client.zadd(f"{{g1:{partition}}}:rz", {slow.request_id: now_ms})
            [found] = [one for one in await store.overdue() if one.request_id == slow.request_id]
            store.settle(found, Costs(2), exact=False, event=b"abandoned")
            await store.delivered()
            assert client.ttl(f"{{g1:{partition}}}:r:{slow.request_id}") > 3_600
        store.recorded({slow.request_id: ledger.add(scope, now_ms, 10)})
        await store.delivered()
        store.settle(slow, Costs(7), exact=True, event=b"completed")
        store.recorded({slow.request_id: ledger.add(scope, now_ms, 7)})
        await store.delivered()
        assert (await store.admit(asking(plan, 0))).remaining == [990]


async def test_replicas_count_each_other(redis: RedisServer) -> None:
    redis.said("FLUSHALL")
    async with store_at(redis.url) as first:
        async with store_at(redis.url) as second:
            assert (first.replicas, second.replicas) == (1, 2)
            await first._count_members()
            assert first.replicas == 2
            assert {first.rank, second.rank} == {0, 1}
        for seen in (2, 2, 1):
            await first._count_members()
            assert first.replicas == seen


async def test_replicas_that_a_redis_has_forgotten_are_there_all_the_same(redis: RedisServer) -> None:
    redis.said("FLUSHALL")
    async with store_at(redis.url) as first, store_at(redis.url) as second:
        await first._count_members()
        redis.said("FLUSHALL")
        await first._count_members()
        assert first.replicas == 2
        await second._count_members()
        await first._count_members()
        assert first.replicas == 2

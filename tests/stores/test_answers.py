"""Do both stores keep answers alike: for as long as they may, no more than they may, and each under its own key?"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from hashlib import sha256

import pytest

from gateway.stores import StoreUnavailable
from gateway.stores.answers import AnswerStore, MemoryAnswers
from gateway.stores.redis.answers import RedisAnswers
from tests.stores.servers import RedisServer

pytestmark = pytest.mark.anyio

SCOPES = ("all", "model:smart", "tenant:red")
MIB = 1024 * 1024


def name(text: object) -> bytes:
    return sha256(str(text).encode()).digest()


def same_partition(count: int) -> list[bytes]:
    return [bytes(1) + name(number)[1:] for number in range(count)]


Make = Callable[[int], AnswerStore]


@pytest.fixture(params=["memory", "redis"])
def make(request: pytest.FixtureRequest) -> Make:
    """Both hold as much for one partition of Redis as for all of the memory's."""
    if request.param == "memory":
        return MemoryAnswers
    server: RedisServer = request.getfixturevalue("redis")
    server.said("FLUSHALL")
    return lambda max_bytes: RedisAnswers(server.url, None, 5.0, max_bytes * 16)


@pytest.fixture
async def answers(make: Make) -> AsyncIterator[AnswerStore]:
    store = make(MIB)
    await store.start()
    yield store
    await store.aclose()


async def test_what_was_written_is_read_until_its_time_is_over(answers: AnswerStore) -> None:
    assert (await answers.read(name(1), SCOPES)).entry is None
    await answers.write(name(1), b"one", 30)
    await answers.write(name(2), b"two", 0.03)
    assert (await answers.read(name(1), SCOPES)).entry == b"one"
    await asyncio.sleep(0.05)
    assert (await answers.read(name(2), SCOPES)).entry is None
    assert (await answers.read(name(1), SCOPES)).entry == b"one"
    await answers.write(name(1), b"another", 30)
    assert (await answers.read(name(1), SCOPES)).entry == b"another"


async def test_to_forget_begins_an_epoch_of_that_scope_only(answers: AnswerStore) -> None:
    first = (await answers.read(name(1), SCOPES)).epochs
    assert (await answers.read(name(1), SCOPES)).epochs == first
    seen = {first}
    for place, scope in enumerate(SCOPES):
        before = (await answers.read(name(1), SCOPES)).epochs
        await answers.forget(scope)
        after = (await answers.read(name(1), SCOPES)).epochs
        assert [old == new for old, new in zip(before, after, strict=True)] == [index != place for index in range(3)]
        assert after not in seen
        seen.add(after)


@pytest.mark.parametrize("make", ["memory", "redis"], indirect=True)
async def test_no_more_is_kept_than_there_is_room_for(make: Make) -> None:
    store = make(100_000)
    await store.start()
    keys = same_partition(200)
    for key in keys:
        await store.write(key, key * 100, 60)
    found = [(await store.read(key, SCOPES)).entry for key in keys]
    kept = [entry for entry in found if entry is not None]
    assert all(entry == key * 100 for key, entry in zip(keys, found, strict=True) if entry is not None)
    assert 25 <= len(kept) <= 31
    assert found[-1] is not None
    await store.write(keys[0], bytes(100_001), 60)
    assert (await store.read(keys[0], SCOPES)).entry is None
    assert (await store.read(keys[-1], SCOPES)).entry is not None
    await store.aclose()


@pytest.mark.parametrize("make", ["redis"], indirect=True)
async def test_one_leads_until_it_says_so_or_its_lease_is_over(answers: AnswerStore) -> None:
    assert not await answers.is_led(name(1))
    assert await answers.lead(name(1), "a", 10)
    assert await answers.lead(name(1), "a", 10)
    assert not await answers.lead(name(1), "b", 10)
    assert await answers.is_led(name(1))
    await answers.follow(name(1), "b")
    assert await answers.is_led(name(1))
    await answers.follow(name(1), "a")
    assert await answers.lead(name(1), "b", 0.03)
    await asyncio.sleep(0.05)
    assert not await answers.is_led(name(1))


async def test_readers_that_are_cancelled_at_random_never_get_anothers_value(make: Make) -> None:
    chance = random.Random(3)
    store = make(4 * MIB)
    await store.start()
    keys = [name(number) for number in range(50)]
    for key in keys:
        await store.write(key, key * 20, 60)

    async def read(key: bytes) -> int:
        found = (await store.read(key, SCOPES)).entry
        assert found == key * 20
        return 1

    done = 0
    for _ in range(100):
        tasks = [asyncio.create_task(read(chance.choice(keys))) for _ in range(100)]
        for task in tasks:
            if chance.random() < 0.5:
                asyncio.get_running_loop().call_later(chance.random() * 0.005, task.cancel)
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert not [end for end in ended if not isinstance(end, int | asyncio.CancelledError)]
        done += sum(end for end in ended if isinstance(end, int))
    assert done > 1000
    await store.aclose()


# What Redis may do.


@pytest.fixture
async def kept(redis: RedisServer) -> AsyncIterator[RedisAnswers]:
    redis.said("FLUSHALL")
    store = RedisAnswers(redis.url, None, 0.25, 64 * MIB)
    await store.start()
    yield store
    await store.aclose()


async def test_epochs_that_are_lost_do_not_bring_back_what_was_forgotten(
    kept: RedisAnswers, redis: RedisServer
) -> None:
    first = (await kept.read(name(1), SCOPES)).epochs
    await kept.forget("model:smart")
    redis.said("DEL", "{g1:0}:c:epochs")
    after = (await kept.read(name(1), SCOPES)).epochs
    assert after[0] != first[0]
    assert (await kept.read(name(1), SCOPES)).epochs == after


async def test_what_was_forgotten_does_not_come_back_where_redis_has_lost_that_it_was(
    kept: RedisAnswers, redis: RedisServer
) -> None:
    """As at a failover to a replica that had not heard of it."""
    await kept.forget("model:smart")
    first = (await kept.read(name(1), SCOPES)).epochs
    for _ in range(2):
        await kept.forget("model:smart")
        redis.said("HSET", "{g1:0}:c:epochs", "model:smart", first[1])
        after = (await kept.read(name(1), SCOPES)).epochs
        assert after[1] != first[1]
        assert (after[0], after[2]) == (first[0], first[2])
    redis.said("HDEL", "{g1:0}:c:epochs", "model:smart")
    assert (await kept.read(name(1), SCOPES)).epochs[1] not in (first[1], "")


async def test_to_forget_all_frees_the_room_in_this_process() -> None:
    store = MemoryAnswers(MIB)
    await store.write(name(1), b"one", 60)
    await store.forget("model:smart")
    assert len(store) == 1
    await store.forget("all")
    assert (len(store), store.size_bytes) == (0, 0)


async def test_a_full_redis_keeps_nothing_new_and_gives_what_it_has(kept: RedisAnswers, redis: RedisServer) -> None:
    await kept.write(name(1), b"one", 60)
    await kept.read(name(1), SCOPES)
    redis.said("CONFIG", "SET", "maxmemory", "1")
    try:
        for number in range(50):
            with pytest.raises(StoreUnavailable):
                await kept.write(name(2), b"%d" % number, 60)
        assert (await kept.read(name(1), SCOPES)).entry == b"one"
    finally:
        redis.said("CONFIG", "SET", "maxmemory", "0")
    await kept.write(name(2), b"two", 60)
    assert (await kept.read(name(2), SCOPES)).entry == b"two"


async def test_scripts_that_are_flushed_are_sent_again(kept: RedisAnswers, redis: RedisServer) -> None:
    redis.said("SCRIPT", "FLUSH")
    await kept.write(name(1), b"one", 60)
    assert (await kept.read(name(1), SCOPES)).entry == b"one"


async def test_room_is_found_again_after_redis_has_evicted_what_it_knew(
    redis: RedisServer,
) -> None:
    redis.said("FLUSHALL")
    store = RedisAnswers(redis.url, None, 0.25, 16 * 100_000)
    await store.start()
    keys = same_partition(100)
    for key in keys[:50]:
        await store.write(key, bytes(10_000), 60)
    redis.said("DEL", "{g1:0}:c:ends")
    for key in keys[50:]:
        await store.write(key, bytes(10_000), 60)
    kept = [key for key in keys[50:] if (await store.read(key, SCOPES)).entry is not None]
    assert 5 <= len(kept) <= 9
    await store.aclose()

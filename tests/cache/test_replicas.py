"""Do several gateways share what they keep, and does none of them need Redis for an answer?"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any

import httpx2
import msgspec
import pytest

from gateway.cache.lead import Lead
from gateway.settings import Answers, Auth, Timeouts, Upstream
from gateway.stores.redis.answers import RedisAnswers
from tests.cache.conftest import STREAM, Playing, both, hello, keeping, probed, settings_with
from tests.cache.test_admin import ADMIN, forget
from tests.cache.test_flights import Stepwise, asking, text_of
from tests.house import HELLO, KEY, House, running
from tests.stores.proxy import Proxy, proxy_to
from tests.stores.servers import RedisServer, redis_server

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture(autouse=True)
def empty(redis: RedisServer) -> None:
    redis.said("FLUSHALL")


@asynccontextmanager
async def replicas(
    where: RedisServer | Proxy, *adapters: Playing, total_s: float = 600, **answers: Any
) -> AsyncIterator[list[House]]:
    url = f"redis://127.0.0.1:{where.port}"
    async with AsyncExitStack() as stack:
        settings = settings_with(cache=Answers(url=url, **{"timeout_s": 1.0, **answers}))
        patient = Upstream(adapter="scripted", timeouts=Timeouts(total_s=total_s))
        settings = msgspec.structs.replace(settings, upstreams={"one": patient})
        houses = [await stack.enter_async_context(running(settings, {"one": adapter})) for adapter in adapters]
        await asyncio.gather(*map(probed, houses))
        yield houses


def state(response: httpx2.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.headers.get("x-suiron-cache")


async def test_what_one_replica_keeps_the_other_gives(redis: RedisServer) -> None:
    first, second = both(), both()
    async with replicas(redis, first, second) as (one, two):
        assert state(await one.post(STREAM)) == "miss"
        for body in (STREAM, HELLO):
            response = await two.post(body)
            assert state(response) == "hit"
            assert text_of(response, body) == "Hello"
    assert second.calls == 0


async def test_another_replica_waits_for_the_answer_that_is_being_generated(redis: RedisServer) -> None:
    first, second = Stepwise(), both()
    async with replicas(redis, first, second) as (one, two):
        leader = asyncio.create_task(one.post(STREAM))
        await asking(first)
        waiting = [asyncio.create_task(two.post(STREAM)) for _ in range(3)]
        await asyncio.sleep(0.3)
        first.go()
        assert state(await leader) == "miss"
        for response in await asyncio.gather(*waiting):
            assert state(response) in ("shared", "hit")  # one that came too late
            assert text_of(response, STREAM) == "Hello, 世界!"
    assert second.calls == 0


async def test_it_waits_for_so_long_and_then_goes_itself(redis: RedisServer) -> None:
    first, second = Stepwise(), both()
    async with replicas(redis, first, second, wait_s=0.2) as (one, two):
        leader = asyncio.create_task(one.post(STREAM))
        await asking(first)
        assert state(await two.post(STREAM)) == "miss"
        first.go()
        await leader
    assert second.calls == 1


async def test_it_waits_for_no_more_than_half_of_the_time_that_an_answer_may_take(redis: RedisServer) -> None:
    first, second = Stepwise(), both()
    async with replicas(redis, first, second, total_s=3.0, wait_s=60) as (one, two):
        leader = asyncio.create_task(one.post(STREAM))
        await asking(first)
        async with asyncio.timeout(10):
            assert state(await two.post(STREAM)) == "miss"
        left_s = second.dispatches[0].deadline - time.monotonic()
        first.go()
        await leader
    assert left_s < 1.5


async def test_it_goes_itself_when_the_other_comes_to_nothing(redis: RedisServer) -> None:
    first, second = Stepwise(), both()
    async with replicas(redis, first, second, wait_s=30) as (one, two):
        leader = asyncio.create_task(one.post(STREAM))
        await asking(first)
        waiting = asyncio.create_task(two.post(STREAM))
        await asyncio.sleep(0.1)
        leader.cancel()
        async with asyncio.timeout(5):
            assert state(await waiting) == "miss"
    assert second.calls == 1


async def test_who_waits_for_another_replica_waits_no_more_when_that_answer_is_forgotten(redis: RedisServer) -> None:
    first, second = Stepwise(), both()
    async with replicas(redis, first, second, wait_s=30) as (one, two):
        leader = asyncio.create_task(one.post(STREAM))
        await asking(first)
        waiting = asyncio.create_task(two.post(STREAM))
        await asyncio.sleep(0.2)
        redis.said("HSET", "{g1:0}:c:epochs", "model:smart", "another")
        async with asyncio.timeout(5):
            assert state(await waiting) == "miss"
        first.go()
        await leader
    assert second.calls == 1


async def test_who_leads_does_so_for_as_long_as_it_takes(redis: RedisServer) -> None:
    async with aclosing(RedisAnswers(redis.url, None, 1.0, 2**20)) as store:
        await store.start()
        one, two, other = (Lead(store, bytes(32), (epoch,), lease_s=0.3) for epoch in "aab")
        assert await one.take()
        one.keep()
        for _ in range(10):
            await asyncio.sleep(0.1)
            assert not await two.take()
            assert await two.is_taken()
        assert await other.take()  # who asks in another epoch does not ask the same
        await one.leave()
        assert await two.take()
        await asyncio.sleep(0.5)
        assert not await two.is_taken()


async def test_when_the_one_that_generates_comes_to_nothing_the_next_does_and_not_all(redis: RedisServer) -> None:
    first, others = Stepwise(), [Stepwise() for _ in range(3)]
    async with replicas(redis, first, *others, wait_s=30) as (one, *rest):
        leader = asyncio.create_task(one.post(STREAM))
        await asking(first)
        waiting = [asyncio.create_task(house.post(STREAM)) for house in rest]
        await asyncio.sleep(0.3)
        leader.cancel()
        async with asyncio.timeout(20):
            while not sum(adapter.calls for adapter in others):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.5)
            for adapter in others:
                adapter.go()
            responses = await asyncio.gather(*waiting)
    assert {text_of(response, STREAM) for response in responses} == {"Hello, 世界!"}
    assert sum(adapter.calls for adapter in others) == 1


async def test_an_entry_under_anothers_key_is_a_miss(redis: RedisServer) -> None:
    """As after a reply that belongs to another request, or a writer that is no friend."""
    adapter = both("of another")
    async with replicas(redis, adapter) as (house,):
        await house.post(HELLO | {"seed": 1})
        await house.post(HELLO | {"seed": 2})
        swap = (
            "local all = redis.call('KEYS','*c:e:*') local a = redis.call('GET', all[1]) "
            "local b = redis.call('GET', all[2]) redis.call('SET', all[1], b) redis.call('SET', all[2], a)"
        )
        redis.said("EVAL", f'"{swap}"', "0")
        for seed in (1, 2):
            assert state(await house.post(HELLO | {"seed": seed})) == "miss"
            assert state(await house.post(HELLO | {"seed": seed})) == "hit"
        metrics = (await house.http.get(f"{house.url}/metrics")).text
    assert "suiron_cache_spoiled_total 2.0" in metrics
    assert "suiron_cache_kept_total 4.0" in metrics


async def test_an_entry_that_is_spoiled_is_a_miss(redis: RedisServer) -> None:
    adapter = both()
    async with replicas(redis, adapter) as (house,):
        await house.post(HELLO)
        redis.said("EVAL", "\"local k = redis.call('KEYS','*c:e:*')[1] redis.call('SETRANGE', k, 40, 'x')\"", "0")
        assert state(await house.post(HELLO)) == "miss"
        assert state(await house.post(HELLO)) == "hit"


# Without Redis.


async def test_without_redis_there_is_no_cache_and_no_failure(redis: RedisServer) -> None:
    adapter = both()
    async with proxy_to(redis.port) as proxy, replicas(proxy, adapter, timeout_s=0.05) as (house,):
        assert state(await house.post(STREAM)) == "miss"
        assert state(await house.post(STREAM)) == "hit"
        proxy.hole = True
        took_s = []
        for _ in range(20):
            began = time.monotonic()
            assert state(await house.post(STREAM)) == "miss"
            took_s.append(time.monotonic() - began)
        assert adapter.calls == 21
        took_s.sort()
        assert took_s[10] < 0.05  # it is left alone by then
        proxy.hole = False
        async with asyncio.timeout(15):
            while state(await house.post(STREAM)) != "hit":  # noqa: ASYNC110 - nobody tells when Redis is believed again
                await asyncio.sleep(0.1)


async def test_a_redis_that_was_never_there(redis: RedisServer) -> None:
    adapter = both()
    async with keeping(adapter, cache=Answers(url="redis://127.0.0.1:1")) as house:
        responses = await asyncio.gather(*(house.post(STREAM) for _ in range(20)))
        assert {state(response) for response in responses} <= {"miss", "shared"}


async def test_a_slow_redis_is_waited_for_no_longer_than_it_may_take(redis: RedisServer) -> None:
    adapter = Playing(lambda _: hello())
    async with proxy_to(redis.port) as proxy, replicas(proxy, adapter, timeout_s=0.03) as (house,):
        await house.post(STREAM)
        proxy.delay_s = 0.2
        for _ in range(10):
            assert state(await house.post(STREAM)) == "miss"


async def test_a_full_redis_costs_the_cache_and_no_answer_and_still_forgets(redis: RedisServer) -> None:
    answers = Answers(url=redis.url, timeout_s=1.0)
    async with keeping(both(), auth=Auth(keys=[KEY], admin_keys=[ADMIN]), cache=answers) as house:
        await house.post(HELLO | {"seed": 1})
        redis.said("CONFIG", "SET", "maxmemory", "1")
        try:
            for _ in range(3):
                assert state(await house.post(HELLO | {"seed": 2})) == "miss"
            assert state(await house.post(HELLO | {"seed": 1})) == "hit"
            assert (await forget(house, "?model=smart")).status_code == 200
            assert state(await house.post(HELLO | {"seed": 1})) == "miss"
        finally:
            redis.said("CONFIG", "SET", "maxmemory", "0")
        assert state(await house.post(HELLO | {"seed": 1})) == "miss"
        assert state(await house.post(HELLO | {"seed": 1})) == "hit"


async def test_an_evicting_redis_costs_hits_and_no_answer(redis: RedisServer) -> None:
    adapter = both("Hello " * 50)
    redis.said("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    redis.said("CONFIG", "SET", "maxmemory", "3mb")
    try:
        async with replicas(redis, adapter) as (house,):
            for seed in range(300):
                response = await house.post(HELLO | {"seed": seed})
                assert text_of(response, HELLO) == "Hello " * 50
                response = await house.post(HELLO | {"seed": seed // 2})
                assert text_of(response, HELLO) == "Hello " * 50
    finally:
        redis.said("CONFIG", "SET", "maxmemory", "0")
        redis.said("CONFIG", "SET", "maxmemory-policy", "noeviction")

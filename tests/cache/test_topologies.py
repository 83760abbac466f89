"""Does the cache follow Sentinel's failovers and a cluster's slots, and does no request fail or wait for them?"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
from redis.crc import key_slot

from gateway.settings import Answers, Auth
from gateway.stores import StoreUnavailable
from gateway.stores.redis.answers import EPOCHS, PARTITIONS, RedisAnswers
from gateway.stores.redis.node import CONSECUTIVE
from gateway.stores.redis.places import tag
from tests.cache.conftest import both, probed, settings_with
from tests.cache.test_admin import ADMIN, forget
from tests.cache.test_replicas import state
from tests.house import HELLO, KEY, House, running
from tests.stores.servers import RedisServer
from tests.stores.test_topologies import cluster, move, owns, sentinels

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

SEEDS = range(40)
"""So many questions that every server of a cluster has some."""
PATIENCE_S = 30.0
DEADLINE_S = 5.0
"""Of any request, whatever becomes of Redis: its own times are a twentieth of that."""


@asynccontextmanager
async def replicas(url: str, count: int = 2) -> AsyncIterator[list[House]]:
    auth = Auth(keys=[KEY], admin_keys=[ADMIN])
    async with AsyncExitStack() as stack:
        settings = settings_with(auth=auth, cache=Answers(url=url, timeout_s=0.25))
        houses = [await stack.enter_async_context(running(settings, {"one": both()})) for _ in range(count)]
        await asyncio.gather(*map(probed, houses))
        yield houses


async def ask(house: House, seed: int) -> str:
    async with asyncio.timeout(DEADLINE_S):
        return str(state(await house.post(HELLO | {"seed": seed})))


async def states(house: House, seeds: range = SEEDS) -> set[str]:
    return {await ask(house, seed) for seed in seeds}


async def until_kept(house: House, seeds: range = SEEDS) -> None:
    """Again and again, until every answer is a hit; none fails meanwhile."""
    async with asyncio.timeout(PATIENCE_S):
        while await states(house, seeds) != {"hit"}:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.1)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


@asynccontextmanager
async def asked_all_the_while(*houses: House) -> AsyncIterator[list[str]]:
    """Each house is asked on and on; what came of it. A request that fails, or takes too long, ends the test."""
    heard: list[str] = []
    stop = False

    async def keep_asking(house: House) -> None:
        seed = 0
        while not stop:
            heard.append(await ask(house, seed % len(SEEDS)))
            seed += 1

    asking = [asyncio.create_task(keep_asking(house)) for house in houses]
    try:
        yield heard
    finally:
        stop = True
        await asyncio.gather(*asking)


def url_of(nodes: list[RedisServer]) -> str:
    return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes)


def owner_of(nodes: list[RedisServer], partition: int) -> RedisServer:
    slot = key_slot(tag(partition).encode())
    return next(node for node in nodes if owns(node, slot) and b"role:master" in node.said("INFO", "replication"))


async def test_what_a_cluster_keeps_is_given_by_all_and_forgotten_by_all_while_slots_move() -> None:
    with cluster() as nodes:
        async with replicas(url_of(nodes)) as (one, two):
            assert await states(one) == {"miss"}
            assert await states(two) == {"hit"}
            assert all(b"keys=" in node.said("INFO", "keyspace") for node in nodes)
            async with asked_all_the_while(one, two) as heard:
                for partition in (EPOCHS, PARTITIONS[1], PARTITIONS[2]):
                    owner = owner_of(nodes, partition)
                    target = nodes[(nodes.index(owner) + 1) % 3]
                    slot = key_slot(tag(partition).encode())
                    await asyncio.to_thread(move, nodes, slot, target)
            assert set(heard) <= {"hit", "miss", "shared"}
            for query in ("?model=smart", "?key=alice", ""):
                await until_kept(two)
                assert (await forget(one, query)).status_code == 200
                assert await ask(two, 1) == "miss", query
                assert await ask(one, 1) == "hit", query


async def test_of_a_cluster_only_the_server_that_is_late_is_left_alone() -> None:
    with cluster() as nodes:
        store = RedisAnswers(url_of(nodes), None, 0.05, 2**20)
        await store.start()
        names = {owner: next(p for p in PARTITIONS if owner_of(nodes, p) is owner) for owner in nodes}
        frozen = next(node for node in nodes if node is not owner_of(nodes, EPOCHS))
        frozen.freeze()
        for _ in range(2 * CONSECUTIVE):
            for partition in names.values():
                with suppress(StoreUnavailable):
                    await store.read(bytes([PARTITIONS.index(partition)]) + bytes(31), ("all",))
        left_alone = {partition for partition in names.values() if store._places.nodes[partition].open}
        assert left_alone == {names[frozen]}
        await store.aclose()


@pytest.mark.parametrize(("partition", "fail"), [(EPOCHS, RedisServer.freeze), (PARTITIONS[1], RedisServer.kill)])
async def test_a_server_of_a_cluster_that_hangs_or_dies_costs_hits_until_another_steps_in(
    partition: int, fail: Callable[[RedisServer], None]
) -> None:
    with cluster(replicas=1) as nodes:
        async with replicas(url_of(nodes)) as (one, two):
            await states(one)
            await until_kept(two)
            failing = owner_of(nodes, partition)
            others = [node for node in nodes if node is not failing]
            await until(lambda: all(b"link_status:down" not in node.said("INFO", "replication") for node in nodes))
            async with asked_all_the_while(one, two):
                fail(failing)
                await until(lambda: has_stepped_in(others))
            await until_kept(one)
            await until_kept(two)
            assert (await forget(one)).status_code == 200
            assert await ask(two, 1) == "miss"


def has_stepped_in(nodes: list[RedisServer]) -> bool:
    """Whether those that are left have three masters among them, and all know it."""
    masters = [node for node in nodes if b"role:master" in node.said("INFO", "replication")]
    return len(masters) == 3 and all(b"cluster_state:ok" in node.said("CLUSTER", "INFO") for node in nodes)


async def test_a_failover_of_sentinel_costs_hits_and_no_answer_and_nothing_forgotten_comes_back() -> None:
    with sentinels() as ((master, replica), watching):
        url = "redis+sentinel://" + ",".join(f"127.0.0.1:{one.port}" for one in watching) + "/mymaster"
        watching[0].freeze()  # the first to be asked
        async with replicas(url) as (one, two):
            await states(one)
            await until_kept(two)
            assert (await forget(one)).status_code == 200
            assert await ask(two, 1) == "miss"
            await until(lambda: b"state=online" in master.said("INFO", "replication"))

            async with asked_all_the_while(
                one, two
            ):  # an orderly one: the old master lives on, and may not be written to
                watching[1].said("SENTINEL", "FAILOVER", "mymaster")
                await until(lambda: b"role:master" in replica.said("INFO", "replication"))
                await until(lambda: b"role:slave" in master.said("INFO", "replication"))
            await until_kept(two)
            assert (await forget(two)).status_code == 200
            assert await ask(one, 1) == "miss"

            await until(lambda: b"state=online" in replica.said("INFO", "replication"))
            async with asked_all_the_while(one, two):
                replica.kill()  # and one that is none
                await until(lambda: b"role:master" in master.said("INFO", "replication"))
            await until_kept(two)
            assert (await forget(two)).status_code == 200
            assert await ask(one, 1) == "miss"

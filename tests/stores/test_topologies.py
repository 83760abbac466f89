"""Sentinel that fails over, a cluster whose slots move, TLS: the same verbs, and nothing counted twice."""

import asyncio
import re
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import cast

import pytest
from redis import Redis
from redis.crc import key_slot

from gateway.stores import Costs, Lease, Plan, Quota, Reservation, StoreUnavailable, Window
from gateway.stores.redis.node import Access, Address, Node
from gateway.stores.redis.places import Where, parse, partition_of, places, tag
from tests.stores.conftest import Ledger
from tests.stores.servers import RedisServer, free_port, redis_server
from tests.stores.test_redis_faults import asking, plan_of, store_at, until

HOUR = 3_600_000


@pytest.mark.parametrize(
    ("url", "where"),
    [
        ("redis://db", Where([("db", 6379)], Access())),
        (
            "redis+sentinel://a,b:7000/mymaster",
            Where([("a", 26379), ("b", 7000)], Access(), "mymaster"),
        ),
        ("redis+cluster://a:1,b:2", Where([("a", 1), ("b", 2)], Access(), None, True)),
        ("redis://[::1]:7", Where([("::1", 7)], Access())),
    ],
)
def test_urls_say_where_the_store_is(url: str, where: Where) -> None:
    assert parse(url, None) == where


def test_urls_say_how_a_connection_begins() -> None:
    access = parse("redis+sentinel://me:s%40crt@a,b/mymaster/4", None).access
    assert (access.username, access.password, access.database, access.tls) == ("me", "s@crt", 4, None)
    assert parse("redis://me:old@a", "kept elsewhere").access.password == "kept elsewhere"
    assert parse("rediss://a", None).access.tls is not None


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("http://a", "redis://"),
        ("redis://a,b", "one host"),
        ("redis://", "one host"),
        ("redis://a/db", "number"),
        ("redis+sentinel://a", "name of the master"),
        ("redis+sentinel://a/m/1/2", "number"),
    ],
)
def test_urls_that_are_none_say_what_is_wrong(url: str, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        parse(url, None)


@contextmanager
def sentinels() -> Iterator[tuple[list[RedisServer], list[RedisServer]]]:
    """A master and its replica, and three sentinels that watch them."""
    with ExitStack() as running:
        master = running.enter_context(redis_server())
        replica = running.enter_context(redis_server("--replicaof", "127.0.0.1", str(master.port)))
        watching = []
        for _ in range(3):
            port = free_port()
            config = master.folder / f"sentinel-{port}.conf"
            config.write_text(
                f"sentinel monitor mymaster 127.0.0.1 {master.port} 2\n"
                "sentinel down-after-milliseconds mymaster 1000\n"
                "sentinel failover-timeout mymaster 5000\n"
            )
            watching.append(running.enter_context(redis_server("--sentinel", port=port, config=config)))
        give_up = time.monotonic() + 20
        while b"num-slaves" not in watching[0].said("SENTINEL", "MASTER", "mymaster") or any(
            b"num-other-sentinels\r\n$1\r\n2" not in one.said("SENTINEL", "MASTER", "mymaster") for one in watching
        ):
            assert time.monotonic() < give_up
            time.sleep(0.1)
        yield [master, replica], watching


@pytest.mark.anyio
async def test_who_has_asked_the_sentinels_leaves_no_connection_to_them() -> None:
    with redis_server() as master, ExitStack() as running:
        watching = []
        for _ in range(3):
            port = free_port()
            config = master.folder / f"sentinel-{port}.conf"
            config.write_text(f"sentinel monitor mymaster 127.0.0.1 {master.port} 1\n")
            watching.append(running.enter_context(redis_server("--sentinel", port=port, config=config)))
        found: list[Callable[[], Awaitable[Address]]] = []

        def make(find: Callable[[], Awaitable[Address]], access: Access) -> Node:
            found.append(find)
            return cast(Node, None)

        url = "redis+sentinel://" + ",".join(f"127.0.0.1:{one.port}" for one in watching) + "/mymaster"
        places(parse(url, None), make, 5.0)
        for _ in range(100):
            assert await found[0]() == ("127.0.0.1", master.port)
        await until(lambda: not any(b"lib-name=redis-py" in one.said("CLIENT", "LIST") for one in watching))


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_failover_of_sentinel_is_followed() -> None:
    with sentinels() as ((master, replica), watching):
        url = "redis+sentinel://" + ",".join(f"127.0.0.1:{one.port}" for one in watching) + "/mymaster"
        ledger, plan = Ledger(), plan_of(limit=10_000)
        plan = Plan(plan.slot, (*plan.rules, Lease(plan.slot, 10_000), Quota(plan.slot, "tokens", 10**6, "month")))
        async with store_at(url, ledger, timeout_s=0.25) as store:
            for _ in range(50):
                assert (await store.admit(asking(plan, 1))).denied is None
            await until(lambda: b"state=online" in master.said("INFO", "replication"))
            under_way = asking(plan, 1)
            await store.admit(under_way)
            await until(lambda: replicated(master))

            watching[0].said("SENTINEL", "FAILOVER", "mymaster")  # an orderly one: the old master lives on, read-only
            await until(lambda: b"role:master" in replica.said("INFO", "replication"), 30)
            await until(lambda: b"role:slave" in master.said("INFO", "replication"), 30)
            answer = None
            for _ in range(100):
                try:
                    answer = await store.admit(asking(plan, 1))
                    break
                except StoreUnavailable:
                    await asyncio.sleep(0.1)
            assert answer is not None
            assert answer.remaining[0] == 10_000 - 52
            await until(lambda: b"state=online" in replica.said("INFO", "replication"), 30)
            await until(lambda: replicated(replica))

            replica.kill()  # and one that is none
            store.settle(under_way, Costs(1), exact=True, event=b"row")
            began = time.monotonic()
            answer = None
            while answer is None and time.monotonic() < began + 30:
                asked = time.monotonic()
                try:
                    answer = await store.admit(asking(plan, 1))
                except StoreUnavailable:
                    assert time.monotonic() - asked < 1.5
                    await asyncio.sleep(0.1)
            assert answer is not None
            assert answer.remaining[0] == 10_000 - 53
            await store.delivered()
            assert store.counts.late == 0


def replicated(master: RedisServer) -> bool:
    """Whether its replica has all it has."""
    said = master.said("INFO", "replication").decode()
    has, sent = re.search(r"offset=(\d+)", said), re.search(r"master_repl_offset:(\d+)", said)
    return bool(has and sent and has[1] == sent[1])


@contextmanager
def cluster(replicas: int = 0) -> Iterator[list[RedisServer]]:
    """Three masters, and *replicas* of each."""
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000")
    with ExitStack() as running:
        nodes = [running.enter_context(redis_server(*options)) for _ in range(3 * (1 + replicas))]
        addresses = [f"127.0.0.1:{node.port}" for node in nodes]
        command = ["redis-cli", "--cluster", "create", *addresses, "--cluster-replicas", str(replicas), "--cluster-yes"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        give_up = time.monotonic() + 30
        while not all(b"cluster_state:ok" in node.said("CLUSTER", "INFO") for node in nodes):
            assert time.monotonic() < give_up
            time.sleep(0.1)
        yield nodes


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_cluster_whose_slots_move_under_load_counts_each_request_once() -> None:
    with cluster() as nodes:
        url = f"redis+cluster://127.0.0.1:{nodes[0].port}"
        async with store_at(url, timeout_s=5) as store:
            slots = [f"tenant-{number}" for number in range(40)]
            assert len({store._nodes[partition_of(slot)] for slot in slots}) == 3
            limits = 10**6, 10**9
            plans = {
                slot: Plan(slot, (Window(slot, "requests", limits[0], HOUR), Quota(slot, "tokens", limits[1], "month")))
                for slot in slots
            }
            slot = key_slot(tag(partition_of(slots[0])).encode())
            stop = False

            async def admitted(reservation: Reservation) -> None:
                for _ in range(500):  # while its slot moves, a script that makes a key is told to come again
                    with suppress(StoreUnavailable):
                        assert (await store.admit(reservation)).denied is None
                        return
                    await asyncio.sleep(0.01)
                raise AssertionError("never admitted")

            async def load(slot: str) -> int:
                done = 0
                while not stop:
                    reservation = asking(plans[slot], 1)
                    await admitted(reservation)
                    store.settle(reservation, Costs(1), exact=True)
                    done += 1
                    await asyncio.sleep(0.002)
                return done

            loads = {slot: asyncio.create_task(load(slot)) for slot in slots}
            await asyncio.sleep(0.3)
            for target in (nodes[1], nodes[2], nodes[0]):
                await asyncio.to_thread(move, nodes, slot, target)
            await asyncio.sleep(0.3)
            stop = True
            done = {slot: await task for slot, task in loads.items()}
            await store.delivered()
            for name, count in done.items():
                assert count > 20
                probe = Reservation(plans[name], f"probe-{name}", Costs(0, 0, 0))
                assert (await store.admit(probe)).remaining == [limits[0] - count, limits[1] - count]
            assert store.available


def move(nodes: list[RedisServer], slot: int, target: RedisServer) -> None:
    """As a resharding does it: keys one after the other, while both nodes serve the slot."""
    names = {node: node.said("CLUSTER", "MYID").split(b"\r\n")[1].decode() for node in nodes}
    owner = next(node for node in nodes if owns(node, slot))
    if owner is target:
        return
    target.said("CLUSTER", "SETSLOT", str(slot), "IMPORTING", names[owner])
    owner.said("CLUSTER", "SETSLOT", str(slot), "MIGRATING", names[target])
    with Redis(port=owner.port) as client:
        while keys := client.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 3):
            for key in keys:
                assert client.execute_command("MIGRATE", "127.0.0.1", target.port, key, 0, 5000) in (b"OK", b"NOKEY")
    for node in (target, owner, *nodes):
        node.said("CLUSTER", "SETSLOT", str(slot), "NODE", names[target])


def owns(node: RedisServer, slot: int) -> bool:
    for line in node.said("CLUSTER", "NODES").split(b"\n"):
        if b"myself" in line:
            for part in line.split()[8:]:
                first, _, last = part.partition(b"-")
                if not part.startswith(b"[") and int(first) <= slot <= int(last or first):
                    return True
    return False


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, signed by itself, and its key."""
    made, key = tmp_path / "redis.crt", tmp_path / "redis.key"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subprocess.run([*command, "-keyout", key, "-out", made, "-days", "2", *subject], check=True, capture_output=True)
    return made, key


@pytest.mark.anyio
async def test_tls_is_spoken_and_the_server_proven(certificate: tuple[Path, Path]) -> None:
    made, key = certificate
    port = free_port()
    files = ("--tls-cert-file", str(made), "--tls-key-file", str(key), "--tls-ca-cert-file", str(made))
    with redis_server("--tls-port", str(port), "--tls-auth-clients", "no", *files):
        async with store_at(f"rediss://127.0.0.1:{port}?ca={made}") as store:
            assert (await store.admit(asking(plan_of()))).denied is None
        async with store_at(f"rediss://127.0.0.1:{port}") as store:
            assert not store.available
            with pytest.raises(StoreUnavailable, match=r"(?i)certificate"):
                await store.admit(asking(plan_of()))

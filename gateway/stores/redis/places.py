"""Which Redis server has what? One; the one that Sentinel names; or the one of a cluster whose slots have it."""

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, Protocol
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from msgspec import Struct
from redis.asyncio.sentinel import Sentinel
from redis.crc import key_slot
from redis.exceptions import RedisError

from gateway.stores import StoreUnavailable
from gateway.stores.redis.link import Lost, ReplyError, packed
from gateway.stores.redis.node import Access, Address, Node, settable

PARTITIONS = 64
SCHEMES = ("redis", "rediss", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")
DEFAULT_PORT = 6379
SENTINEL_PORT = 26379

MakeNode = Callable[[Callable[[], Awaitable[Address]], Access], Node]
"""A node from how to find it, and what a connection begins with."""


class Places(Protocol):
    """`nodes` has a node for each partition."""

    nodes: list[Node]

    async def start(self) -> None: ...

    def moved(self, partition: int, address: Address) -> Node:
        """The partition is at *address* now."""

    def at(self, address: Address) -> Node: ...

    def unwell(self, node: Node) -> None:
        """The node is left alone: somebody else may have its partitions by now."""

    def all(self) -> list[Node]: ...


class Where(Struct, frozen=True):
    """A store's URL, taken apart. `master` is Sentinel's name for the master; None without Sentinel."""

    addresses: list[Address]
    access: Access
    master: str | None = None
    cluster: bool = False


def tag(partition: int) -> str:
    """What the names of all keys of a partition begin with; `g1` is the layout they have."""
    return f"{{g1:{partition}}}:"


def parse(url: str, password: str | None) -> Where:
    """Raises ValueError, which says what is wrong with *url*."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise ValueError(f"a store is one of {', '.join(f'{scheme}://' for scheme in SCHEMES)}")
    sentinel, cluster = parts.scheme.endswith("+sentinel"), parts.scheme.endswith("+cluster")
    user, _, hosts = parts.netloc.rpartition("@")
    name, _, secret = user.partition(":")
    path = [unquote(part) for part in parts.path.split("/") if part]
    if sentinel and not path:
        raise ValueError("Sentinel needs the name of the master: redis+sentinel://host,host/master")
    database = path[1:] if sentinel else path
    if len(database) > 1 or not all(part.isdigit() for part in database):
        raise ValueError("after the host comes the number of the database, and nothing else")
    addresses = [_address(host, SENTINEL_PORT if sentinel else DEFAULT_PORT) for host in hosts.split(",") if host]
    if not addresses or (len(addresses) > 1 and not sentinel and not cluster):
        raise ValueError("one host, or redis+sentinel:// or redis+cluster:// with several")
    access = Access(
        username=unquote(name) or None,
        password=password or unquote(secret) or None,
        database=int(database[0]) if database else 0,
        tls=_tls(parts) if parts.scheme.startswith("rediss") else None,
    )
    return Where(addresses, access, path[0] if sentinel else None, cluster)


def _address(host: str, default_port: int) -> Address:
    parts = urlsplit(f"//{host}")
    if not parts.hostname:
        raise ValueError(f"'{host}' is no host")
    return parts.hostname, parts.port or default_port


def _tls(parts: SplitResult) -> ssl.SSLContext:
    """`?ca=FILE` names certificates to trust instead of the system's."""
    return ssl.create_default_context(cafile=parse_qs(parts.query).get("ca", [None])[0])


def partition_of(slot: str) -> int:
    return key_slot(slot.encode()) % PARTITIONS


def places(where: Where, make: MakeNode, timeout_s: float, mapped: Callable[[], None] = lambda: None) -> Places:
    """*mapped* is called whenever a partition has another node."""
    if where.cluster:
        return Cluster(where, make, mapped)
    if where.master is not None:
        return Single(make(_asking_sentinel(where, where.master, timeout_s), where.access))
    return Single(make(_always(where.addresses[0]), where.access))


def _always(address: Address) -> Callable[[], Awaitable[Address]]:
    async def find() -> Address:
        return address

    return find


def _asking_sentinel(where: Where, master: str, timeout_s: float) -> Callable[[], Awaitable[Address]]:
    options: dict[str, Any] = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}

    async def ask(sentinel: Sentinel) -> Address:
        host, port = await sentinel.discover_master(master)
        return str(host), int(port)

    async def find() -> Address:
        """As the first one says that answers: one that hangs would take all the time there is."""
        sentinels = [Sentinel([address], **options) for address in where.addresses]  # type: ignore[no-untyped-call]
        asking = [asyncio.ensure_future(ask(sentinel)) for sentinel in sentinels]
        trouble: Exception = RedisError("there is none")
        try:
            for told in asyncio.as_completed(asking):
                try:
                    return await told
                except RedisError as exc:
                    trouble = exc
            raise StoreUnavailable(f"Sentinel: {trouble}")
        finally:
            await asyncio.shield(_leave(sentinels, asking))  # a close that is cancelled leaves its connection open

    return find


async def _leave(sentinels: list[Sentinel], asking: "list[asyncio.Task[Address]]") -> None:
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    for sentinel in sentinels:
        for client in sentinel.sentinels:
            await client.aclose()


class Single:
    """One server has everything."""

    def __init__(self, node: Node) -> None:
        self.nodes = [node] * PARTITIONS

    async def start(self) -> None:
        """Nothing to find out."""

    def moved(self, partition: int, address: Address) -> Node:
        return self.nodes[partition]

    def at(self, address: Address) -> Node:
        return self.nodes[0]

    def unwell(self, node: Node) -> None:
        """Where it is now is found out when it is connected to."""

    def all(self) -> list[Node]:
        return self.nodes[:1]


class Cluster:
    """The map of a cluster, learned from any of its nodes, and from being sent elsewhere."""

    def __init__(self, where: Where, make: MakeNode, mapped: Callable[[], None]) -> None:
        self._access = where.access
        self._mapped = mapped
        self._make = make
        self._known: dict[Address, Node] = {}
        self._learning: asyncio.Task[None] | None = None
        self._seeds = where.addresses
        self.nodes = [self.at(where.addresses[0])] * PARTITIONS

    async def start(self) -> None:
        for address in self._seeds:
            if await self._learn_from(address):
                break

    def at(self, address: Address) -> Node:
        node = self._known.get(address)
        if node is None:
            node = self._known[address] = self._make(_always(address), self._access)
        return node

    def moved(self, partition: int, address: Address) -> Node:
        node = self.nodes[partition] = self.at(address)
        self._mapped()
        self._learn_soon()
        return node

    def unwell(self, node: Node) -> None:
        self._learn_soon()

    def all(self) -> list[Node]:
        return list(self._known.values())

    def _learn_soon(self) -> None:
        if self._learning is None or self._learning.done():
            self._learning = asyncio.ensure_future(self._learn())

    async def _learn(self) -> None:
        """Ask one after the other, until one knows; again while a partition is with a node that is left alone."""
        while True:
            for address in [*self._known, *(seed for seed in self._seeds if seed not in self._known)]:
                if await self._learn_from(address):
                    break
            if not any(node.open for node in self.nodes):
                return
            await asyncio.sleep(1)

    async def _learn_from(self, address: Address) -> bool:
        asked: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        try:
            self.at(address).ask(packed("CLUSTER", "SLOTS"), settable(asked))
        except StoreUnavailable:
            return False
        ranges = await asked
        if isinstance(ranges, Lost | ReplyError) or not ranges:
            return False
        owners = [(first, last, (host.decode() or address[0], port)) for first, last, (host, port, *_), *_ in ranges]
        for partition in range(PARTITIONS):
            slot = key_slot(tag(partition).encode())
            for first, last, owner in owners:
                if first <= slot <= last:
                    self.nodes[partition] = self.at(owner)
        self._mapped()
        return True

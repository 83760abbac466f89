"""Kept answers in Redis: what is not there in time counts as not kept."""

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from gateway.stores import StoreCounts, StoreUnavailable
from gateway.stores.answers import OVERHEAD_BYTES, Found
from gateway.stores.redis.calls import Calls
from gateway.stores.redis.link import Lost, ReplyError, packed
from gateway.stores.redis.node import CONSECUTIVE, Access, Address, Node, settable
from gateway.stores.redis.places import Places, parse, places, tag
from gateway.stores.redis.scripts import Script

T = TypeVar("T")

PARTITIONS = tuple(range(0, 64, 4))
"""Those of the counters' partitions that have entries: so many share the room there is."""
EPOCHS = 0
PATIENCE_S = 0.25
"""How long Redis may take to connect, or to reply to what nobody waits for."""
REMEMBERED = 32
"""Epochs of a scope that were ended by this process."""
ALMOST = 0.8
"""Of the time that a reply may take: so long has that of a late server been waited for, whenever it was asked."""

logger = logging.getLogger("suiron")


class _Full(StoreUnavailable):
    """It takes nothing more, and may be read from all the same."""


class RedisAnswers:
    """
    *max_bytes* in all, shared out evenly; *timeout_s* for what a request waits for.

    The epochs of all scopes are one hash: it is evicted or flushed as a whole, and then `all` begins a new one, since
    every epoch is a random number.
    """

    shared = True

    def __init__(self, url: str, password: str | None, timeout_s: float, max_bytes: int) -> None:
        """Raises ValueError where *url* is no store's."""
        self.counts = StoreCounts()
        self._where = parse(url, password)
        self._timeout_s = timeout_s
        self._most_bytes = max_bytes // len(PARTITIONS)
        self._keep = Script("keep", False)
        self._lead = Script("lead", False)
        self._follow = Script("follow", False)
        self._late: dict[Node, int] = {}
        self._over: dict[str, deque[bytes | None]] = {}
        self._loop: asyncio.AbstractEventLoop
        self._places: Places
        self._calls: Calls

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._places = places(self._where, self._node, PATIENCE_S)
        self._calls = Calls(self._places, None)
        await self._places.start()

    def _node(self, find: Callable[[], Awaitable[Address]], access: Access) -> Node:
        loads = [self._keep.load(), self._lead.load(), self._follow.load()]
        patience_s = max(PATIENCE_S, self._timeout_s)
        return Node(find, access, patience_s, loads, packed("PING"), self.counts, self._changed)

    def _changed(self, node: Node) -> None:
        if node.open:
            logger.warning("a Redis of the cache is left alone: %s", node.trouble)
            self._places.unwell(node)
        else:
            logger.warning("a Redis of the cache is back")

    async def read(self, key: bytes, scopes: Sequence[str]) -> Found:
        partition = _partition(key)
        return await self._in_time(self._read(partition, key, scopes), partition, EPOCHS)

    async def _read(self, partition: int, key: bytes, scopes: Sequence[str]) -> Found:
        get, epochs = packed("GET", _named(partition, b"e:", key)), packed("HMGET", _EPOCHS, *scopes)
        asked = self._asked(partition, get), self._asked(EPOCHS, epochs)  # both, before either is waited for
        entry = await self._replied(partition, get, asked[0])
        found = await self._replied(EPOCHS, epochs, asked[1])
        if found[0] is None:
            await self._ask(EPOCHS, packed("HSETNX", _EPOCHS, scopes[0], secrets.token_hex(8)))
            found = await self._ask(EPOCHS, epochs)
        if self._over and (back := self._come_back(scopes, found)):
            for scope in back:
                await self.forget(scope)
            found = await self._ask(EPOCHS, epochs)
        return Found(entry, tuple([(epoch or b"").decode() for epoch in found]))

    def _come_back(self, scopes: Sequence[str], epochs: Sequence[bytes | None]) -> list[str]:
        """Those of *scopes* that are in an epoch again which was over."""
        return [scope for scope, epoch in zip(scopes, epochs, strict=True) if epoch in self._over.get(scope, ())]

    async def write(self, key: bytes, entry: bytes, ttl_s: float) -> None:
        partition = _partition(key)
        keys = [_named(partition, b"e:", key), _named(partition, b"ends"), _named(partition, b"sizes")]
        ttl_ms = max(1, int(ttl_s * 1000))
        arguments: list[bytes | int] = [key, entry, ttl_ms, self._most_bytes, OVERHEAD_BYTES]
        await self._run(partition, self._keep, keys, arguments)

    async def forget(self, scope: str) -> None:
        """A server that fails over may lose it, and an epoch come back that was over: it is remembered here."""
        before = await self._ask(EPOCHS, packed("HGET", _EPOCHS, scope))
        try:
            await self._ask(EPOCHS, packed("HSET", _EPOCHS, scope, secrets.token_hex(8)))
        except _Full:  # but for what takes something away: then all is forgotten
            await self._ask(EPOCHS, packed("DEL", _EPOCHS))
        over = self._over.setdefault(scope, deque(maxlen=REMEMBERED))
        if before not in over:
            over.append(before)

    async def lead(self, key: bytes, token: str, lease_s: float) -> bool:
        partition = _partition(key)
        arguments: list[bytes | int] = [token.encode(), int(lease_s * 1000)]
        leads = self._run(partition, self._lead, [_named(partition, b"l:", key)], arguments)
        return bool(await self._in_time(leads, partition))

    async def follow(self, key: bytes, token: str) -> None:
        partition = _partition(key)
        await self._run(partition, self._follow, [_named(partition, b"l:", key)], [token.encode()])

    async def is_led(self, key: bytes) -> bool:
        partition = _partition(key)
        exists = self._ask(partition, packed("EXISTS", _named(partition, b"l:", key)))
        return bool(await self._in_time(exists, partition))

    async def aclose(self) -> None:
        for node in self._places.all():
            await node.aclose()

    async def _in_time(self, replied: Coroutine[Any, Any, T], *partitions: int) -> T:
        """
        Raises StoreUnavailable after `timeout_s`. A reply that comes later is dropped, and nobody else's.

        A server that is late so often in a row is left alone; in a cluster, only that one of those with *partitions*.
        """
        nodes = {self._calls.nodes[partition] for partition in partitions}
        try:
            async with asyncio.timeout(self._timeout_s):
                reply = await replied
        except TimeoutError:
            for node in nodes:
                if node.waits_s() >= self._timeout_s * ALMOST:
                    self._is_late(node)
            raise StoreUnavailable("late") from None
        for node in nodes:
            self._late.pop(node, None)
        return reply

    def _is_late(self, node: Node) -> None:
        times = self._late[node] = self._late.get(node, 0) + 1
        if times >= CONSECUTIVE:
            del self._late[node]
            node.leave_alone(f"no answer within {self._timeout_s * 1000:.0f} ms")

    async def _run(self, partition: int, script: Script, keys: list[bytes], arguments: Sequence[bytes | int]) -> Any:
        return await self._ask(
            partition, script.call(keys, arguments), lambda whole: script.call(keys, arguments, whole)
        )

    async def _ask(self, partition: int, command: bytes, anew: Callable[[bool], bytes] | None = None) -> Any:
        return await self._replied(partition, command, self._asked(partition, command), anew)

    def _asked(self, partition: int, command: bytes) -> "asyncio.Future[Any]":
        asked: asyncio.Future[Any] = self._loop.create_future()
        self._calls.nodes[partition].ask(command, settable(asked))
        return asked

    async def _replied(
        self, partition: int, command: bytes, asked: "asyncio.Future[Any]", anew: Callable[[bool], bytes] | None = None
    ) -> Any:
        reply = await asked
        if isinstance(reply, ReplyError) and str(reply).startswith("OOM"):
            raise _Full(str(reply))
        if isinstance(reply, Lost | ReplyError):
            return await self._calls.again(partition, reply, anew or (lambda whole: command))
        return reply


def _partition(key: bytes) -> int:
    return PARTITIONS[key[0] % len(PARTITIONS)]


def _named(partition: int, kind: bytes, key: bytes = b"") -> bytes:
    return tag(partition).encode() + b"c:" + kind + key


_EPOCHS = _named(EPOCHS, b"epochs")

"""How is a script called, and where and when is it worth another try?"""

import asyncio
import struct
from collections.abc import Callable, Sequence
from typing import Any

from gateway.stores import Costs, StoreUnavailable
from gateway.stores.redis.link import Lost, ReplyError, packed
from gateway.stores.redis.node import Node, settable
from gateway.stores.redis.places import Places
from gateway.stores.redis.scripts import Script, bulk

TRY_AGAIN_S = 0.02
ASKING = packed("ASKING")
_COSTS = struct.Struct("<ddd")
pack_costs = _COSTS.pack
"""Tokens, nano-dollars, requests, each exact up to 2^53."""


def costs_in(packed_costs: bytes) -> Costs:
    tokens, nano_usd, requests = _COSTS.unpack(packed_costs)
    return Costs(int(tokens), int(nano_usd), int(requests))


def ignore(reply: Any) -> None:
    """It will be seen elsewhere whether it was done."""


class Calls:
    """
    One more try, where another reply can be hoped for: all scripts may be executed twice. Not after a timeout, which is
    the whole of the time there was.

    *now_ms* is for tests: every script is then told the time.
    """

    def __init__(self, places: Places, now_ms: Callable[[], int] | None) -> None:
        self.nodes = places.nodes
        self._places = places
        self._now_ms = now_ms
        self._loop = asyncio.get_running_loop()

    def timed(self, command: bytes) -> bytes:
        """*command*, a call without its last argument, with that."""
        return command if self._now_ms is None else command + bulk(b"%d" % self._now_ms())

    async def call(
        self, script: Script, partition: int, keys: Sequence[bytes], arguments: Sequence[bytes | int]
    ) -> Any:
        """What the script returned. Raises StoreUnavailable."""
        return await self.ask(partition, lambda whole: self.timed(script.call(keys, arguments, whole)))

    async def ask(self, partition: int, command: Callable[[bool], bytes]) -> Any:
        """The reply to *command*, which is made with the whole script where its hash alone does not do."""
        asked: asyncio.Future[Any] = self._loop.create_future()
        self.nodes[partition].ask(command(False), settable(asked))
        reply = await asked
        if isinstance(reply, Lost | ReplyError):
            return await self.again(partition, reply, command)
        return reply

    async def again(self, partition: int, error: Any, command: Callable[[bool], bytes]) -> Any:
        """The reply to a second try after *error*. Raises StoreUnavailable."""
        node = self.nodes[partition]
        elsewhere = self.elsewhere(node, partition, error)
        if elsewhere is None:
            self.at_fault(node, error)
            raise StoreUnavailable(str(error))
        word = str(error).partition(" ")[0]
        if word == "TRYAGAIN":
            await asyncio.sleep(TRY_AGAIN_S)
        asked: asyncio.Future[Any] = self._loop.create_future()
        if word == "ASK":
            elsewhere.ask(ASKING, ignore)
        elsewhere.ask(command(word == "NOSCRIPT"), settable(asked))
        reply = await asked
        if isinstance(reply, Lost | ReplyError):
            self.at_fault(elsewhere, reply)
            raise StoreUnavailable(str(reply))
        return reply

    def elsewhere(self, node: Node, partition: int, error: Any) -> Node | None:
        """Where to try again after *error*; None if it is not worth it."""
        if isinstance(error, Lost):
            return None if error.final else node
        word, *rest = str(error).split()
        if word in ("MOVED", "ASK"):
            host, _, port = rest[1].rpartition(":")
            address = (host, int(port))
            return self._places.moved(partition, address) if word == "MOVED" else self._places.at(address)
        if word == "READONLY":  # a master that is one no more: whoever it is now is found anew
            node.drop(str(error))
            return node
        return node if word in ("NOSCRIPT", "TRYAGAIN") else None

    def at_fault(self, node: Node, error: Any) -> None:
        """The call has failed for good."""
        if isinstance(error, Lost):
            node.lost(error)
        elif isinstance(error, ReplyError):
            node.refused(error)

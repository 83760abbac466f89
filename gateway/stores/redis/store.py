"""The verbs of the store, each one atomic script in Redis, decided by Redis's clock."""

import asyncio
import base64
import hashlib
import itertools
import logging
import math
import secrets
import struct
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from gateway import settings
from gateway.stores import (
    Costs,
    Decision,
    Event,
    Lease,
    Plan,
    Quota,
    Reservation,
    Rule,
    StoreCounts,
    StoreUnavailable,
    Used,
    Window,
)
from gateway.stores.redis.link import Lost, ReplyError, packed
from gateway.stores.redis.node import Access, Address, Node, settable
from gateway.stores.redis.places import PARTITIONS, Places, parse, partition_of, places, tag
from gateway.stores.redis.scripts import Script, Scripts, bulk
from gateway.stores.seeding import Seeding

AT_A_TIME = 100
STRAY_MS = 5_000
MEMBER_MS = 15_000
MEMBER_EVERY_S = 5.0
MOST_BACKLOG = 50_000
MOST_UNRECORDED = 200_000
REDELIVER_S = 0.1
REDELIVER_AT_A_TIME = 500
CERTAIN_S = 240.0
"""After so long a settle whose reply was lost counts only if its reservation is open: what it left may have expired."""
SETTLED_DOWN_S = 20.0
CLOSE_S = 1.0
METRICS = {"tokens": 1, "nano_usd": 2, "requests": 3}

logger = logging.getLogger("suiron")


class RedisStore:
    """
    *now_ms* is for tests: a clock for the scripts to go by instead of Redis's own. *changed* is told when the store is
    left alone, and when it is back.
    """

    def __init__(
        self,
        options: settings.Store,
        used: Used,
        *,
        changed: Callable[[bool], None] = lambda available: None,
        now_ms: Callable[[], int] | None = None,
        monotonic_s: Callable[[], float] = time.monotonic,
        stray_ms: int = STRAY_MS,
        settled_down_s: float = SETTLED_DOWN_S,
    ) -> None:
        """Raises ValueError where the URL is no store's."""
        self.counts = StoreCounts()
        self.replicas = 1
        self._where = parse(options.url or "", options.password.reveal() if options.password else None)
        self._timeout_s = options.timeout_s
        self._changed = changed
        self._now_ms = now_ms
        self._monotonic_s = monotonic_s
        self._stray_ms = stray_ms
        self._settled_down_s = settled_down_s
        self._scripts = Scripts(given_clock=now_ms is not None)
        self._seeding = Seeding(used)
        self._name = secrets.token_hex(8)
        self._seedings = itertools.count()
        self._membership: asyncio.Task[None] | None = None
        self._charging: set[asyncio.Task[None]] = set()
        self._unrecorded: dict[str, _Settling] = {}
        self._strays: dict[str, tuple[int, bytes, Plan | None]] = {}
        self._backlog: deque[_Settling] = deque()
        self._redelivery: asyncio.TimerHandle | None = None
        self._dropping: dict[int, list[bytes]] = {}
        self._delivery = asyncio.Event()
        self._was_available = True
        self._back_since_s = -math.inf
        self._nodes: list[Node] = []
        self._places: Places
        self._loop: asyncio.AbstractEventLoop

    @property
    def available(self) -> bool:
        return bool(self._nodes) and not any(node.open for node in self._nodes)

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._places = places(self._where, self._node, self._timeout_s)
        self._nodes = self._places.nodes
        await self._places.start()
        try:
            await self._count_members()
        except StoreUnavailable as exc:
            self._nodes[0].leave_alone(str(exc))
        self._membership = asyncio.create_task(self._stay_a_member())

    def _node(self, find: Callable[[], Awaitable[Address]], access: Access, partition: int) -> Node:
        probe = packed("EVAL", "return redis.call('SET', KEYS[1], 1, 'PX', 1000)", 1, f"{tag(0)}probe")
        greeting = self._scripts.loads()
        return Node(find, access, self._timeout_s, greeting, probe, self.counts, self._node_changed)

    # -- admit

    async def admit(self, reservation: Reservation) -> Decision:
        plan = reservation.plan
        prepared: _Prepared = plan.prepared or self._prepare(plan)
        for _ in range(4):
            asked = self._loop.create_future()
            command = self._admission(reservation, prepared, prepared.admit)
            self._nodes[prepared.partition].ask(command, settable(asked))
            reply = await asked
            if type(reply) is not list:
                reply = await self._again(
                    prepared.partition,
                    reply,
                    lambda whole: self._admission(reservation, prepared, prepared.admit_head(self._scripts, whole)),
                )
            if reply[0] == 0:
                return Decision(reply[2], reply[3], shadowed=tuple(reply[4]), at_ms=reply[1])
            if reply[0] == 1:
                wait = None if reply[6] < 0 else reply[6]
                return Decision(reply[2], reply[3], reply[5], wait, tuple(reply[4]), reply[1])
            await self._seed(plan, prepared, reply[2:])
        raise StoreUnavailable("a quota is lost as soon as it is seeded")

    def _admission(self, reservation: Reservation, prepared: "_Prepared", head: bytes) -> bytes:
        request_id, intent, costs = reservation.request_id.encode(), reservation.intent, reservation.costs
        command = b"%b$%d\r\n%b%b\r\n%b$24\r\n%b\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (
            head,
            prepared.name_length + len(request_id),
            prepared.name,
            request_id,
            prepared.plan,
            _pack(costs.tokens, costs.nano_usd, costs.requests),
            len(intent),
            intent,
            len(request_id),
            request_id,
        )
        return command if self._now_ms is None else command + bulk(b"%d" % self._now_ms())

    async def _seed(self, plan: Plan, prepared: "_Prepared", unknown: list[int]) -> None:
        for index, start in zip(unknown[::2], unknown[1::2], strict=True):
            rule = plan.rules[index]
            assert isinstance(rule, Quota)
            used, watermark = await self._seeding.ask(rule, start)
            name = f"{self._name}{next(self._seedings)}".encode()
            arguments = (rule.period.encode(), start, used, watermark, name)
            await self._call(self._scripts.seed, prepared.partition, [prepared.keys[1 + index]], arguments)
        self.counts.seeded = self._seeding.count

    # -- settle

    def settle(self, reservation: Reservation, actual: Costs, *, exact: bool, event: bytes = b"") -> None:
        if reservation.request_id in self._unrecorded:
            return
        while len(self._unrecorded) >= MOST_UNRECORDED:  # then the event of the oldest is a stray
            del self._unrecorded[next(iter(self._unrecorded))]
        settling = _Settling(self, reservation, actual, exact, event)
        self._unrecorded[reservation.request_id] = settling
        self._deliver(settling, self._node_of(reservation))

    def _deliver(self, settling: "_Settling", node: Node, whole: bool = False) -> None:
        settling.node = node
        if node.open:
            self._keep(settling)
            return
        prepared: _Prepared = settling.reservation.plan.prepared
        head = prepared.settle if not whole else prepared.settle_head(self._scripts, whole)
        now = self._monotonic_s()
        unsure_s = now - settling.unsure_since_s if settling.unsure_since_s else 0.0
        lost_counts = prepared.lost_counts and unsure_s < CERTAIN_S
        request_id, actual = settling.reservation.request_id.encode(), settling.actual
        age = b"%d" % max(0, round((now - settling.reservation.since_s) * 1000))
        command = b"%b$%d\r\n%b%b\r\n%b$24\r\n%b\r\n$%d\r\n%b\r\n$1\r\n%d\r\n$1\r\n%d\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (
            head,
            prepared.name_length + len(request_id),
            prepared.name,
            request_id,
            prepared.plan,
            _pack(actual.tokens, actual.nano_usd, actual.requests),
            len(request_id),
            request_id,
            settling.exact,
            lost_counts,
            len(age),
            age,
            len(settling.event),
            settling.event,
        )
        node.ask(command if self._now_ms is None else command + bulk(b"%d" % self._now_ms()), settling.answered)

    def settled(self, settling: "_Settling", reply: Any) -> None:
        """The reply to a settle, whatever it is."""
        if type(reply) is list:
            settling.entry = reply[1] if len(reply) > 1 else b""
            settling.late = reply[0] == 2
            self.counts.late += settling.late
            settling.delivered = True
            self._delivery.set()
            self._finish(settling)
            return
        node, partition = settling.node, settling.reservation.plan.prepared.partition
        assert node is not None
        settling.tries += 1
        if settling.tries == 1 and isinstance(reply, ReplyError):
            elsewhere, asking = self._elsewhere(node, partition, reply)
            if elsewhere is not None and not elsewhere.open:
                if asking:
                    elsewhere.ask(ASKING, _ignore)
                self._deliver(settling, elsewhere, whole=str(reply).startswith("NOSCRIPT"))
                return
        if isinstance(reply, Lost) and reply.sent and not settling.unsure_since_s:
            settling.unsure_since_s = self._monotonic_s()
        self._at_fault(node, reply)
        self._keep(settling)

    def _keep(self, settling: "_Settling") -> None:
        """It could not be delivered; it will be."""
        settling.tries = 0
        if len(self._backlog) >= MOST_BACKLOG:
            self._unrecorded.pop(self._backlog.popleft().reservation.request_id, None)
            self.counts.dropped += 1
        self._backlog.append(settling)
        self.counts.backlog = len(self._backlog)
        if self._redelivery is None:
            self._redelivery = self._loop.call_later(REDELIVER_S, self._redeliver)

    def _redeliver(self) -> None:
        self._redelivery = None
        for _ in range(min(len(self._backlog), REDELIVER_AT_A_TIME)):
            settling = self._backlog.popleft()
            self._deliver(settling, self._node_of(settling.reservation))
        self.counts.backlog = len(self._backlog)
        if self._backlog and self._redelivery is None:
            self._redelivery = self._loop.call_later(REDELIVER_S, self._redeliver)

    # -- what the ledger has

    def recorded(self, rows: Mapping[str, int]) -> None:
        for request_id, seq in rows.items():
            settling = self._unrecorded.get(request_id)
            if settling is not None:
                settling.seq = seq
                self._finish(settling)
            elif request_id in self._strays:
                partition, entry, plan = self._strays.pop(request_id)
                self._drop_event(partition, entry)
                if plan is not None:
                    self._charge_soon(plan, request_id, seq)

    def _finish(self, settling: "_Settling") -> None:
        """Once it is settled and recorded, both, nothing of it is needed any more."""
        if not settling.delivered or (settling.seq is None and (settling.event or settling.late)):
            return
        reservation = settling.reservation
        self._unrecorded.pop(reservation.request_id, None)
        if settling.entry:
            self._drop_event(reservation.plan.prepared.partition, settling.entry)
        if settling.late and settling.seq is not None:
            self._charge_soon(reservation.plan, reservation.request_id, settling.seq)

    def _drop_event(self, partition: int, entry: bytes) -> None:
        if not self._dropping:
            self._loop.call_soon(self._drop_events)
        self._dropping.setdefault(partition, []).append(entry)

    def _drop_events(self) -> None:
        dropping, self._dropping = self._dropping, {}
        for partition, entries in dropping.items():
            node = self._nodes[partition]
            if not node.open:  # else they are strays, and found as such
                node.ask(packed("XDEL", f"{tag(partition)}u", *entries), _ignore)

    def _charge_soon(self, plan: Plan, request_id: str, seq: int) -> None:
        task = self._loop.create_task(self._charge(plan, request_id, seq))
        self._charging.add(task)
        task.add_done_callback(self._charging.discard)

    async def _charge(self, plan: Plan, request_id: str, seq: int) -> None:
        prepared: _Prepared = plan.prepared
        keys = [*prepared.keys, prepared.name + request_id.encode()]
        while True:
            try:
                await self._call(self._scripts.charge, prepared.partition, keys, (seq,))
                return
            except StoreUnavailable:
                await asyncio.sleep(1.0)

    # -- the living and the dead

    async def heartbeat(self, reservations: Collection[Reservation]) -> None:
        for some in _chunks(list(reservations), AT_A_TIME):
            await _together(self._beat(reservation) for reservation in some)

    async def _beat(self, reservation: Reservation) -> None:
        prepared: _Prepared = reservation.plan.prepared or self._prepare(reservation.plan)
        request_id, costs = reservation.request_id.encode(), reservation.costs
        packed = _pack(costs.tokens, costs.nano_usd, costs.requests)
        age = max(0, round((self._monotonic_s() - reservation.since_s) * 1000))
        arguments = (prepared.blob, packed, reservation.intent, request_id, age, reservation.progress)
        keys = [*prepared.keys, prepared.name + request_id]
        await self._call(self._scripts.heartbeat, prepared.partition, keys, arguments)

    async def overdue(self) -> list[Reservation]:
        if not self.available or self._loop.time() - self._back_since_s < self._settled_down_s:
            return []
        ids = await _together(
            self._call(self._scripts.overdue, partition, [_key(partition, "rz")], (AT_A_TIME,))
            for partition in range(PARTITIONS)
        )
        found = [(partition, request_id) for partition, some in enumerate(ids) for request_id in some]
        fetched = await _together(self._fetch(*one) for one in found[:AT_A_TIME])
        return [reservation for reservation in fetched if reservation is not None]

    async def _fetch(self, partition: int, request_id: bytes) -> Reservation | None:
        keys = [_key(partition, "rz"), _key(partition, "r:") + request_id]
        kept = await self._call(self._scripts.fetch, partition, keys, (request_id,))
        if kept is None:
            return None
        age, blob, packed, intent, progress = kept
        tokens, nano_usd, requests = (int(cost) for cost in _unpack(packed))
        return Reservation(
            self._plan_of(partition, blob),
            request_id.decode(),
            Costs(tokens, nano_usd, requests),
            intent,
            progress,
            self._monotonic_s() - age / 1000,
        )

    async def strays(self) -> list[Event]:
        streams = await _together(
            self._call(self._scripts.strays, partition, [_key(partition, "u")], (self._stray_ms, AT_A_TIME))
            for partition in range(PARTITIONS)
        )
        events = []
        for partition, entries in enumerate(streams):
            for entry, (_, request_id, _, event, _, blob) in entries:
                name = request_id.decode()
                if name not in self._unrecorded:
                    events.append(Event(name, event))
                    self._strays[name] = partition, entry, self._plan_of(partition, blob) if blob else None
        for forgotten in list(self._strays)[: max(0, len(self._strays) - MOST_UNRECORDED)]:
            del self._strays[forgotten]
        return events[:AT_A_TIME]

    async def _stay_a_member(self) -> None:
        while True:
            await asyncio.sleep(MEMBER_EVERY_S)
            try:
                await self._count_members()
            except StoreUnavailable:
                continue  # the last count stands

    async def _count_members(self) -> None:
        arguments = (self._name.encode(), MEMBER_MS)
        self.replicas = await self._call(self._scripts.members, 0, [_key(0, "m")], arguments)

    def _node_changed(self, node: Node) -> None:
        if node.open:
            self._places.unwell(node)
        else:
            self._back_since_s = self._loop.time()
        if self.available != self._was_available:
            self._was_available = self.available
            if self.available:
                logger.warning("the store is back")
            else:
                logger.error("the store is left alone: %s", node.trouble)
            self._changed(self.available)

    async def aclose(self) -> None:
        if not self._nodes:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self.delivered()
        if self.available:
            leave = packed("ZREM", _key(0, "m"), self._name)
            left = self._loop.create_future()
            self._nodes[0].ask(leave, settable(left))
            await left
        if self._redelivery is not None:
            self._redelivery.cancel()
        for task in (self._membership, *self._charging):
            if task is not None:
                task.cancel()
        for node in self._places.all():
            await node.aclose()

    async def delivered(self) -> None:
        """Returns when nothing that was settled or recorded is on its way."""
        while any(not settling.delivered for settling in self._unrecorded.values()):
            self._delivery.clear()
            await self._delivery.wait()
        await asyncio.gather(*self._charging)

    # -- calls

    async def _call(
        self, script: Script, partition: int, keys: Sequence[bytes], arguments: Sequence[bytes | int]
    ) -> Any:
        """What the script returned. Raises StoreUnavailable."""
        if self._now_ms is not None:
            arguments = (*arguments, self._now_ms())
        asked = self._loop.create_future()
        self._nodes[partition].ask(script.call(keys, arguments), settable(asked))
        reply = await asked
        if isinstance(reply, Lost | ReplyError):
            return await self._again(partition, reply, lambda whole: script.call(keys, arguments, whole))
        return reply

    async def _again(self, partition: int, error: Any, command: Callable[[bool], bytes]) -> Any:
        """
        One more try, where another reply can be hoped for: all scripts may be executed twice.

        Not after a timeout, which is the whole of the time there was. Raises StoreUnavailable.
        """
        node = self._nodes[partition]
        elsewhere, asking = self._elsewhere(node, partition, error)
        if elsewhere is None:
            self._at_fault(node, error)
            raise StoreUnavailable(str(error))
        if str(error).startswith("TRYAGAIN"):
            await asyncio.sleep(0.02)
        asked = self._loop.create_future()
        if asking:
            elsewhere.ask(ASKING, _ignore)
        elsewhere.ask(command(str(error).startswith("NOSCRIPT")), settable(asked))
        reply = await asked
        if isinstance(reply, Lost | ReplyError):
            self._at_fault(elsewhere, reply)
            raise StoreUnavailable(str(reply))
        return reply

    def _elsewhere(self, node: Node, partition: int, error: Any) -> tuple[Node | None, bool]:
        """Where to try again after *error*, if it is worth it, and whether to say ASKING before."""
        if isinstance(error, Lost):
            return (None if error.final else node), False
        word, *rest = str(error).split()
        if word in ("MOVED", "ASK"):
            host, _, port = rest[1].rpartition(":")
            address = (host, int(port))
            return (
                (self._places.moved(partition, address), False)
                if word == "MOVED"
                else (
                    self._places.at(address),
                    True,
                )
            )
        if word == "READONLY":  # a master that is one no more: whoever it is now is found anew
            node.drop(str(error))
            return node, False
        return (node if word in ("NOSCRIPT", "TRYAGAIN") else None), False

    def _at_fault(self, node: Node, error: Any) -> None:
        if isinstance(error, Lost):
            node.lost(error)
        elif isinstance(error, ReplyError):
            node.refused(error)

    # -- plans

    def _node_of(self, reservation: Reservation) -> Node:
        prepared: _Prepared = reservation.plan.prepared or self._prepare(reservation.plan)
        return self._nodes[prepared.partition]

    def _prepare(self, plan: Plan) -> "_Prepared":
        partition = partition_of(plan.slot)
        names = [_name(rule) for rule in plan.rules]
        rules = [
            (*_figures(rule), int(rule.shadow), names.index(name) + 1 if names.index(name) < index else 0, name)
            for index, (rule, name) in enumerate(zip(plan.rules, names, strict=True))
        ]
        blob = msgspec.msgpack.encode(rules)
        plan.prepared = prepared = _Prepared(self._scripts, partition, blob, names, self._now_ms is not None)
        return prepared

    def _plan_of(self, partition: int, blob: bytes) -> Plan:
        """The plan of somebody else's reservation, as far as settling needs it."""
        names = [rule[-1] for rule in msgspec.msgpack.decode(blob)]
        plan = Plan("", ())
        plan.prepared = _Prepared(self._scripts, partition, blob, names, self._now_ms is not None)
        plan.prepared.lost_counts = False
        return plan


ASKING = packed("ASKING")
_COSTS = struct.Struct("<ddd")
_pack, _unpack = _COSTS.pack, _COSTS.unpack


def _ignore(reply: Any) -> None:
    """It will be seen elsewhere whether it was done."""


def _key(partition: int, name: str) -> bytes:
    return f"{tag(partition)}{name}".encode()


def _name(rule: Rule) -> str:
    """What its counter's key ends with. Names of people do not enter a key."""
    scope = base64.urlsafe_b64encode(hashlib.blake2b(rule.scope.encode(), digest_size=9).digest()).decode()
    if isinstance(rule, Window):
        return f"w:{scope}:{rule.metric[0]}:{rule.window_ms}"
    if isinstance(rule, Lease):
        return f"c:{scope}"
    return f"q:{scope}:{rule.metric[0]}:{rule.period}"


def _figures(rule: Rule) -> tuple[str, int, int, int | str]:
    """Kind, metric, limit and span, as the scripts know them."""
    if isinstance(rule, Window):
        return "w", METRICS[rule.metric], rule.limit, rule.window_ms
    if isinstance(rule, Lease):
        return "c", 0, rule.limit, rule.lease_ms
    return "q", METRICS[rule.metric], rule.limit, rule.period


def _chunks(things: list[Any], size: int) -> list[list[Any]]:
    return [things[at : at + size] for at in range(0, len(things), size)]


async def _together(calls: Any) -> list[Any]:
    """All results, in one round trip; raises the first of the errors when all are through."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


class _Prepared:
    """What of a plan's calls is always the same."""

    __slots__ = (
        "_more",
        "_settle_keys",
        "admit",
        "blob",
        "keys",
        "lost_counts",
        "name",
        "name_length",
        "partition",
        "plan",
        "settle",
    )

    def __init__(self, scripts: Scripts, partition: int, blob: bytes, names: list[str], given_clock: bool) -> None:
        self.partition = partition
        self.blob = blob
        self.plan = bulk(blob)
        self.keys = [_key(partition, "rz"), *(_key(partition, name) for name in names)]
        self.name = _key(partition, "r:")
        self.name_length = len(self.name)
        self.lost_counts = True
        self._settle_keys = [*self.keys, _key(partition, "u")]
        self._more = int(given_clock)
        self.admit = self.admit_head(scripts)
        self.settle = self.settle_head(scripts)

    def admit_head(self, scripts: Scripts, whole: bool = False) -> bytes:
        return scripts.admit.head(self.keys, 1, 4 + self._more, whole)

    def settle_head(self, scripts: Scripts, whole: bool = False) -> bytes:
        return scripts.settle.head(self._settle_keys, 1, 7 + self._more, whole)


class _Settling:
    """A settle on its way, until it is delivered and its row is recorded."""

    __slots__ = (
        "_store",
        "actual",
        "delivered",
        "entry",
        "event",
        "exact",
        "late",
        "node",
        "reservation",
        "seq",
        "tries",
        "unsure_since_s",
    )

    def __init__(self, store: RedisStore, reservation: Reservation, actual: Costs, exact: bool, event: bytes) -> None:
        self._store = store
        self.reservation = reservation
        self.actual = actual
        self.exact = exact
        self.event = event
        self.delivered = False
        self.entry = b""
        self.unsure_since_s = 0.0
        self.late = False
        self.node: Node | None = None
        self.seq: int | None = None
        self.tries = 0

    def answered(self, reply: Any) -> None:
        self._store.settled(self, reply)

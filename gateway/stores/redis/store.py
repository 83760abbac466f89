"""The verbs of the store, each one atomic script in Redis, decided by Redis's clock."""

import asyncio
import itertools
import logging
import math
import re
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any

from gateway import settings
from gateway.stores import Costs, Decision, Event, Plan, Quota, Reservation, StoreCounts, StoreUnavailable, Used
from gateway.stores.redis.calls import Calls, costs_in, ignore, pack_costs
from gateway.stores.redis.link import packed
from gateway.stores.redis.node import Access, Address, Node
from gateway.stores.redis.places import PARTITIONS, Places, parse, places, tag
from gateway.stores.redis.plans import Prepared, key, prepare, revive
from gateway.stores.redis.scripts import Scripts
from gateway.stores.redis.settlements import Settlements
from gateway.stores.redis.views import Seen
from gateway.stores.seeding import Seeding

ANSWERED = (0, 3)
"""Of an admission: now, or before."""
AT_A_TIME = 100
STRAY_MS = 5_000
MEMBER_MS = 15_000
MEMBER_EVERY_S = 5.0
MEMBER_COUNTS = 3
SETTLED_DOWN_S = 20.0
CLOSE_S = 1.0
SEEDINGS = 3

logger = logging.getLogger("suiron")


class RedisStore:
    """
    *changed* is told when the store is left alone, and when it is back. *now_ms* is for tests: a clock for the scripts
    to go by instead of Redis's own.
    """

    def __init__(
        self,
        options: settings.Store,
        used: Used,
        *,
        changed: Callable[[bool], None] = ignore,
        now_ms: Callable[[], int] | None = None,
        monotonic_s: Callable[[], float] = time.monotonic,
        stray_ms: int = STRAY_MS,
        settled_down_s: float = SETTLED_DOWN_S,
    ) -> None:
        """Raises ValueError where the URL is no store's."""
        self.counts = StoreCounts()
        self.replicas = 1
        self.rank = 0
        self._members: deque[tuple[int, int]] = deque(maxlen=MEMBER_COUNTS)
        self._where = parse(options.url or "", options.password.reveal() if options.password else None)
        self._timeout_s = options.timeout_s
        self._changed = changed
        self._now_ms = now_ms
        self._monotonic_s = monotonic_s
        self._stray_ms = stray_ms
        self._settled_down_s = settled_down_s
        self._scripts = Scripts(given_clock=now_ms is not None)
        self._seeding = Seeding(used)
        self._seen = Seen()
        self._name = secrets.token_hex(8)
        self._seedings = itertools.count()
        self.available = False
        self._back_since_s = -math.inf
        self._nodes: list[Node] = []
        self._loop: asyncio.AbstractEventLoop
        self._places: Places
        self._calls: Calls
        self._settlements: Settlements
        self._membership: asyncio.Task[None]

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._places = places(self._where, self._node, self._timeout_s, self._look_around)
        self._nodes = self._places.nodes
        self.available = True
        self._calls = Calls(self._places, self._now_ms)
        self._settlements = Settlements(self._calls, self._scripts, self.counts, self._monotonic_s)
        await self._places.start()
        try:
            await self._count_members()
        except StoreUnavailable as exc:
            self._nodes[0].leave_alone(str(exc))
        self._membership = asyncio.create_task(self._stay_a_member())
        await self._warn_of_eviction()

    async def _warn_of_eviction(self) -> None:
        with suppress(StoreUnavailable):
            info: bytes = await self._calls.ask(0, lambda whole: packed("INFO", "memory"))
            policy = re.search(r"maxmemory_policy:(\S+)", info.decode())
            if policy and policy[1] != "noeviction":
                logger.warning("the store's Redis may evict counters: its maxmemory-policy is %s", policy[1])

    def _node(self, find: Callable[[], Awaitable[Address]], access: Access) -> Node:
        probe = packed("EVAL", "return redis.call('SET', KEYS[1], 1, 'PX', 1000)", 1, f"{tag(0)}probe")
        return Node(find, access, self._timeout_s, self._scripts.loads(), probe, self.counts, self._node_changed)

    def _node_changed(self, node: Node) -> None:
        if node.open:
            logger.error("a Redis of the store is left alone: %s", node.trouble)
            self._places.unwell(node)
        else:
            self._back_since_s = self._loop.time()
            self._settlements.hurry()
        self._look_around()

    def _look_around(self) -> None:
        available = not any(node.open for node in self._nodes)
        if available != self.available:
            self.available = available
            logger.warning("the store is %s", "back" if available else "out of reach")
            self._changed(available)

    async def admit(self, reservation: Reservation) -> Decision:
        plan = reservation.plan
        prepared: Prepared = plan.prepared or prepare(plan, self._scripts)
        views = prepared.views = prepared.views or self._seen.of(plan)
        for _ in range(1 + SEEDINGS):
            reply = await self._calls.ask(prepared.partition, lambda whole: self._admission(reservation, whole))
            if reply[0] < 2:
                views.renew(reservation.since_s, reply[1], reply[2], reply[3])
            if reply[0] in ANSWERED:
                return Decision(reply[2], reply[3], shadowed=tuple(reply[4]), at_ms=reply[1])
            if reply[0] == 1:
                wait = None if reply[6] < 0 else reply[6]
                return Decision(reply[2], reply[3], reply[5], wait, tuple(reply[4]), reply[1])
            for index, start in zip(reply[2::2], reply[3::2], strict=True):
                await self._seed(plan, index, start)
        raise StoreUnavailable("a quota is lost as soon as it is seeded")

    def _admission(self, reservation: Reservation, whole: bool) -> bytes:
        prepared: Prepared = reservation.plan.prepared
        assert prepared.views is not None
        request_id, intent, costs = reservation.request_id.encode(), reservation.intent, reservation.costs
        views = prepared.views.told(reservation.since_s)
        command = b"%b$%d\r\n%b%b\r\n%b$24\r\n%b\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (
            prepared.admit_head(whole=True) if whole else prepared.admit,
            prepared.reservation_length + len(request_id),
            prepared.reservation,
            request_id,
            prepared.rules_bulk,
            pack_costs(costs.tokens, costs.nano_usd, costs.requests),
            len(intent),
            intent,
            len(request_id),
            request_id,
            len(views),
            views,
        )
        return self._calls.timed(command)

    async def _seed(self, plan: Plan, index: int, start: int) -> None:
        rule, prepared = plan.rules[index], plan.prepared
        assert isinstance(rule, Quota)
        used, watermark = await self._seeding.ask(rule, start)
        self.counts.seeded = self._seeding.count
        name = f"{self._name}{next(self._seedings)}".encode()
        arguments = (rule.period.encode(), start, used, watermark, name)
        await self._calls.call(self._scripts.seed, prepared.partition, [prepared.keys[1 + index]], arguments)

    def settle(self, reservation: Reservation, actual: Costs, *, exact: bool, event: bytes = b"") -> None:
        self._settlements.add(reservation, actual if exact else actual.at_least(reservation.costs), event)

    def recorded(self, rows: Mapping[str, int]) -> None:
        self._settlements.recorded(rows)

    async def delivered(self) -> None:
        """Returns when nothing that was settled or recorded is on its way."""
        await self._settlements.delivered()

    async def heartbeat(self, reservations: Collection[Reservation]) -> None:
        waiting = list(reservations)
        for begin in range(0, len(waiting), AT_A_TIME):
            await _together(map(self._beat, waiting[begin : begin + AT_A_TIME]))

    async def _beat(self, reservation: Reservation) -> None:
        prepared = prepare(reservation.plan, self._scripts)
        request_id, costs = reservation.request_id.encode(), reservation.costs
        packed_costs = pack_costs(costs.tokens, costs.nano_usd, costs.requests)
        age = max(0, round((self._monotonic_s() - reservation.since_s) * 1000))
        arguments = (prepared.rules, packed_costs, reservation.intent, request_id, age, reservation.progress)
        keys = [*prepared.keys, prepared.reservation + request_id]
        await self._calls.call(self._scripts.heartbeat, prepared.partition, keys, arguments)

    async def overdue(self) -> list[Reservation]:
        if not self.available or self._loop.time() - self._back_since_s < self._settled_down_s:
            return []
        call, script = self._calls.call, self._scripts.overdue
        ids = await _together(call(script, place, [key(place, "rz")], (AT_A_TIME,)) for place in range(PARTITIONS))
        found = [(partition, request_id) for partition, some in enumerate(ids) for request_id in some]
        fetched = await _together(self._fetch(*one) for one in found[:AT_A_TIME])
        return [reservation for reservation in fetched if reservation is not None]

    async def _fetch(self, partition: int, request_id: bytes) -> Reservation | None:
        keys = [key(partition, "rz"), key(partition, "r:") + request_id]
        kept = await self._calls.call(self._scripts.fetch, partition, keys, (request_id,))
        if kept is None:
            return None
        age, rules, packed_costs, intent, progress = kept
        plan = revive(partition, rules, self._scripts)
        since_s = self._monotonic_s() - age / 1000
        return Reservation(plan, request_id.decode(), costs_in(packed_costs), intent, progress, since_s)

    async def strays(self) -> list[Event]:
        call, script = self._calls.call, self._scripts.strays
        arguments = (self._stray_ms, AT_A_TIME)
        streams = await _together(call(script, place, [key(place, "u")], arguments) for place in range(PARTITIONS))
        events: list[Event] = []
        for partition, entries in enumerate(streams):
            for entry, (_, request_id, _, event, _, rules) in entries:
                name, plan = request_id.decode(), revive(partition, rules, self._scripts) if rules else None
                if len(events) < AT_A_TIME and self._settlements.stray(name, partition, entry, plan):
                    events.append(Event(name, event))
        return events

    async def _stay_a_member(self) -> None:
        while True:
            await asyncio.sleep(MEMBER_EVERY_S)
            with suppress(StoreUnavailable):  # then the last count stands
                await self._count_members()

    async def _count_members(self) -> None:
        arguments = (self._name.encode(), MEMBER_MS)
        count, rank = await self._calls.call(self._scripts.members, 0, [key(0, "m")], arguments)
        self._members.append((count, rank))
        self.replicas, self.rank = max(
            self._members
        )  # a Redis that has just lost all counts only those that have come back

    async def aclose(self) -> None:
        if not self._nodes:
            return
        with suppress(TimeoutError, StoreUnavailable):
            async with asyncio.timeout(CLOSE_S):
                await self.delivered()
                await self._calls.ask(0, lambda whole: packed("ZREM", key(0, "m"), self._name))
        self._membership.cancel()
        self._settlements.close()
        for node in self._places.all():
            await node.aclose()


async def _together(calls: Iterable[Awaitable[Any]]) -> list[Any]:
    """All results, in one round trip; raises the first of the errors when all are through."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results

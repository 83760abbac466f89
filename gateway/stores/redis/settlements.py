"""What becomes of a settle: delivered once, whatever is lost on the way, and forgotten when its row is recorded."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from msgspec import Struct

from gateway.stores import Costs, Plan, Reservation, StoreCounts, StoreUnavailable
from gateway.stores.redis.calls import ASKING, Calls, ignore, pack_costs
from gateway.stores.redis.link import Lost, ReplyError, packed
from gateway.stores.redis.node import Node
from gateway.stores.redis.plans import Prepared, key, prepare
from gateway.stores.redis.scripts import Scripts

MOST_UNRECORDED = 200_000
MOST_BACKLOG = 50_000
AGAIN_S = 0.1
AT_A_TIME = 500
CHARGES = 86_400
HOPELESS = ("ERR", "WRONGTYPE", "CROSSSLOT")
"""What Redis says of a command that it will never do: a fault of ours."""
CERTAIN_S = 240.0
"""After so long a settle that may have been done counts only if its reservation is open: what it left may be gone."""

logger = logging.getLogger("suiron")


class Settlements:
    """All settles that are on their way, or whose rows are not recorded yet."""

    def __init__(self, calls: Calls, scripts: Scripts, counts: StoreCounts, monotonic_s: Callable[[], float]) -> None:
        self._calls = calls
        self._scripts = scripts
        self._counts = counts
        self._monotonic_s = monotonic_s
        self._loop = asyncio.get_running_loop()
        self._known: dict[str, Settling] = {}
        self._strays: dict[str, tuple[int, bytes, Plan | None]] = {}
        self._backlog: deque[Settling] = deque()
        self._events: dict[int, list[tuple[bytes, Settling | None]]] = {}
        self._events_due = False
        self._dropping = 0
        self._again: asyncio.TimerHandle | None = None
        self._charging: set[asyncio.Task[None]] = set()
        self._progress = asyncio.Event()

    def add(self, reservation: Reservation, actual: Costs, event: bytes) -> None:
        if reservation.request_id in self._known:
            return
        while len(self._known) >= MOST_UNRECORDED:  # then the event of the oldest is a stray
            del self._known[next(iter(self._known))]
        settling = Settling(reservation, actual, event)
        self._known[reservation.request_id] = settling
        self._deliver(settling, self._calls.nodes[prepare(reservation.plan, self._scripts).partition])

    def _deliver(self, settling: "Settling", node: Node, whole: bool = False) -> None:
        settling.node = node
        if node.open:
            self._keep(settling)
            return
        prepared: Prepared = settling.reservation.plan.prepared
        now = self._monotonic_s()
        lost_counts = prepared.lost_counts and now - settling.unsure_since_s < CERTAIN_S
        request_id, event = settling.reservation.request_id.encode(), settling.event
        actual, reserved = settling.actual, settling.reservation.costs
        age = b"%d" % max(0, round((now - settling.reservation.since_s) * 1000))
        command = b"%b$%d\r\n%b%b\r\n%b$48\r\n%b%b\r\n$%d\r\n%b\r\n$1\r\n%d\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (
            prepared.settle_head(whole=True) if whole else prepared.settle,
            prepared.reservation_length + len(request_id),
            prepared.reservation,
            request_id,
            prepared.rules_bulk,
            pack_costs(actual.tokens, actual.nano_usd, actual.requests),
            pack_costs(reserved.tokens, reserved.nano_usd, reserved.requests),
            len(request_id),
            request_id,
            lost_counts,
            len(age),
            age,
            len(event),
            event,
        )
        node.ask(self._calls.timed(command), partial(self.answered, settling))

    def answered(self, settling: "Settling", reply: Any) -> None:
        """The reply to a settle, whatever it is."""
        if type(reply) is list:
            settling.delivered = True
            settling.late = reply[0] == 2
            settling.entry = reply[1] if settling.event else b""
            self._counts.late += settling.late
            self._progress.set()
            self._finish(settling)
            return
        node = settling.node
        assert node is not None
        settling.tries += 1
        if settling.tries == 1 and isinstance(reply, ReplyError):
            elsewhere = self._calls.elsewhere(node, settling.reservation.plan.prepared.partition, reply)
            if elsewhere is not None and not elsewhere.open:
                word = str(reply).partition(" ")[0]
                if word == "ASK":
                    elsewhere.ask(ASKING, ignore)
                self._deliver(settling, elsewhere, whole=word == "NOSCRIPT")
                return
        if isinstance(reply, ReplyError) and str(reply).startswith(HOPELESS):
            self._give_up(settling, reply)
            return
        if isinstance(reply, Lost) and reply.sent:
            settling.unsure_since_s = min(settling.unsure_since_s, self._monotonic_s())
        self._calls.at_fault(node, reply)
        self._keep(settling)

    def _keep(self, settling: "Settling") -> None:
        """It could not be delivered; it will be."""
        settling.tries = 0
        if len(self._backlog) >= MOST_BACKLOG:
            self._give_up(self._backlog.popleft(), "too much waits for the store")
        self._backlog.append(settling)
        self._counts.backlog = len(self._backlog)
        self._try_again_soon()

    def _give_up(self, settling: "Settling", reason: object) -> None:
        """Its reservation stays as it is, until it is found overdue."""
        logger.error("%s could not be settled in the store: %s", settling.reservation.request_id, reason)
        self._known.pop(settling.reservation.request_id, None)
        self._counts.dropped += 1
        self._progress.set()

    def hurry(self) -> None:
        """The store is back: what waits for it goes before what it is asked from now on."""
        if self._again is not None:
            self._again.cancel()
            self._try_again()

    def _try_again_soon(self) -> None:
        if self._again is None:
            self._again = self._loop.call_later(AGAIN_S, self._try_again)

    def _try_again(self) -> None:
        self._again = None
        for _ in range(min(len(self._backlog), AT_A_TIME)):
            settling = self._backlog.popleft()
            self._deliver(settling, self._calls.nodes[settling.reservation.plan.prepared.partition])
        self._counts.backlog = len(self._backlog)
        if self._events:
            self._drop_events()
        if self._backlog:
            self._try_again_soon()

    # -- what the ledger has

    def recorded(self, rows: Mapping[str, int]) -> None:
        for request_id, seq in rows.items():
            settling = self._known.get(request_id)
            if settling is not None:
                settling.seq = seq
                self._finish(settling)
            elif request_id in self._strays:
                partition, entry, plan = self._strays.pop(request_id)
                self._drop_event(partition, entry, None)
                if plan is not None:
                    self._charge_soon(plan, request_id, seq)

    def stray(self, request_id: str, partition: int, entry: bytes, plan: Plan | None) -> bool:
        """Whether this event is nobody's here. Then it is kept in mind for when it is recorded."""
        if request_id in self._known:
            return False
        while len(self._strays) >= MOST_UNRECORDED:
            del self._strays[next(iter(self._strays))]
        self._strays[request_id] = partition, entry, plan
        return True

    def _finish(self, settling: "Settling") -> None:
        """Once it is settled and recorded, both, nothing of it is needed any more."""
        if not settling.delivered or (settling.seq is None and (settling.event or settling.late)):
            return
        reservation = settling.reservation
        self._known.pop(reservation.request_id, None)
        if settling.entry:
            self._drop_event(reservation.plan.prepared.partition, settling.entry, settling)
        if settling.late and settling.seq is not None:
            self._charge_soon(reservation.plan, reservation.request_id, settling.seq)

    def _drop_event(self, partition: int, entry: bytes, settling: "Settling | None") -> None:
        self._events.setdefault(partition, []).append((entry, settling))
        if not self._events_due:
            self._events_due = True
            self._loop.call_soon(self._drop_events)

    def _drop_events(self) -> None:
        self._events_due = False
        events, self._events = self._events, {}
        for partition, dropping in events.items():
            node = self._calls.nodes[partition]
            if node.open:
                self._events[partition] = dropping[-MOST_UNRECORDED:]
                self._try_again_soon()
            else:
                command = packed("XDEL", key(partition, "u"), *(entry for entry, _ in dropping))
                self._dropping += 1
                node.ask(command, partial(self._dropped, dropping))

    def _dropped(self, dropping: "list[tuple[bytes, Settling | None]]", reply: Any) -> None:
        """
        Where an event was not there any more, Redis may have lost all it knew between the settle and the row. Settled
        anew, what is still known changes nothing, and what was lost is counted as such. If the events are there because
        this did not arrive, they are strays.
        """
        self._dropping -= 1
        self._progress.set()
        if not isinstance(reply, int) or reply == len(dropping):
            return
        for _, settling in dropping:
            if settling is not None:
                settling.delivered, settling.event, settling.entry = False, b"", b""
                settling.unsure_since_s = min(settling.unsure_since_s, self._monotonic_s())
                self._known[settling.reservation.request_id] = settling
                self._deliver(settling, self._calls.nodes[settling.reservation.plan.prepared.partition])

    def _charge_soon(self, plan: Plan, request_id: str, seq: int) -> None:
        task = self._loop.create_task(self._charge(plan.prepared, request_id, seq))
        self._charging.add(task)
        task.add_done_callback(self._charging.discard)

    async def _charge(self, prepared: Prepared, request_id: str, seq: int) -> None:
        keys = [*prepared.keys, prepared.reservation + request_id.encode()]
        for _ in range(CHARGES):
            try:
                await self._calls.call(self._scripts.charge, prepared.partition, keys, (seq,))
                return
            except StoreUnavailable:
                await asyncio.sleep(1.0)

    async def delivered(self) -> None:
        """Returns when nothing that was settled or recorded is on its way."""
        await asyncio.sleep(0)  # what was recorded leaves with this turn of the loop
        while self._dropping or self._events or any(not settling.delivered for settling in self._known.values()):
            self._progress.clear()
            await self._progress.wait()
        await asyncio.gather(*self._charging)

    def close(self) -> None:
        if self._again is not None:
            self._again.cancel()
        for task in self._charging:
            task.cancel()


class Settling(Struct, eq=False):
    """A settle on its way, until it is delivered and its row is recorded."""

    reservation: Reservation
    actual: Costs
    event: bytes
    delivered: bool = False
    entry: bytes = b""
    late: bool = False
    node: Node | None = None
    seq: int | None = None
    tries: int = 0
    unsure_since_s: float = float("inf")

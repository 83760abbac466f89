"""The counters of one process, kept in its memory: as many as scopes and limits are configured."""

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from operator import attrgetter

from msgspec import Struct

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
    Used,
    Window,
)
from gateway.stores.seeding import Seeding

BUCKETS = 60
LEASE_WAIT_MS = 1_000
OVERDUE_MS = 45_000
SETTLED_MS = 300_000
LATE_MS = 86_400_000
MAX_REMEMBERED = 100_000
AT_A_TIME = 100
Mark = tuple[int, int]
"""Where a counter put a cost, so that it finds it again: a bucket or an epoch, and how much."""


def clock_ms() -> int:
    return time.time_ns() // 1_000_000


class MemoryStore:
    """`now_ms` is the store's clock, `monotonic_s` the one that reservations are dated by."""

    available = True
    replicas = 1
    rank = 0

    def __init__(
        self,
        used: Used,
        now_ms: Callable[[], int] = clock_ms,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counts = StoreCounts()
        self._now_ms = now_ms
        self._monotonic_s = monotonic_s
        self._seeding = Seeding(used)
        self._counters: dict[tuple[str, str, int | str], _Counter] = {}
        self._open: dict[str, _Held] = {}
        self._settled: OrderedDict[str, _Settled] = OrderedDict()
        self._late: OrderedDict[str, _Settled] = OrderedDict()

    async def start(self) -> None:
        """There is nothing to reach."""

    async def admit(self, reservation: Reservation) -> Decision:
        while True:
            if answer := self._known(reservation.request_id):
                return answer
            now = self._now_ms()
            unknown = [
                (counted.rule, counted.counter)
                for counted in self._counted(reservation.plan)
                if isinstance(counted.counter, _QuotaCounter) and not counted.counter.known(now)
            ]
            if not unknown:
                return self._reserve(reservation, now)
            for rule, counter in unknown:
                assert isinstance(rule, Quota)
                start, _ = period(rule, now)
                counter.seed(start, *await self._seeding.ask(rule, start))
            self.counts.seeded = self._seeding.count

    def _reserve(self, reservation: Reservation, now: int) -> Decision:
        counted = self._counted(reservation.plan)
        waits = [one.counter.wait_ms(one.cost(reservation.costs), one.rule.limit, now) for one in counted]
        refusing = [index for index, wait in enumerate(waits) if wait != 0]
        denying = [index for index in refusing if not counted[index].rule.shadow]
        if not denying:
            answer = self._hold(reservation, now, now)
        else:
            answer = _figures(counted, now)
            answer.denied = max(denying, key=lambda index: _longest(waits[index]))
            answer.wait_ms = waits[answer.denied]
        answer.shadowed = tuple(index for index in refusing if counted[index].rule.shadow)
        return answer

    def _hold(self, reservation: Reservation, now: int, admitted: int) -> Decision:
        counted = self._counted(reservation.plan)
        request_id, costs = reservation.request_id, reservation.costs
        marks = [one.counter.take(request_id, one.cost(costs), now, admitted) if one.first else None for one in counted]
        answer = _figures(counted, now)
        answer.at_ms = admitted
        self._open[request_id] = _Held(reservation, answer, marks, now + OVERDUE_MS)
        return answer

    def settle(self, reservation: Reservation, actual: Costs, *, exact: bool, event: bytes = b"") -> None:
        request_id = reservation.request_id
        if request_id in self._settled or request_id in self._late:
            return
        if not exact:
            actual = actual.at_least(reservation.costs)
        now = self._now_ms()
        held = self._open.pop(request_id, None)
        if held is None:
            self._settle_lost(reservation, actual, now)
            return
        late: list[_Late] = []
        for one, mark in zip(self._counted(held.reservation.plan), held.marks, strict=True):
            amount = one.cost(actual)
            if one.first and not one.counter.settle(request_id, mark, amount, now):
                late.append(_Late(one.counter, one.period(held.answer.at_ms), amount))
        self._remember(request_id, held.answer, late, now)

    def _settle_lost(self, reservation: Reservation, actual: Costs, now: int) -> None:
        """There is no reservation: windows count it as of when it was admitted, quotas when its row is recorded."""
        admitted = self._admitted(reservation, now)
        late: list[_Late] = []
        counted = self._counted(reservation.plan)
        for one in counted:
            if one.first and isinstance(one.counter, _WindowCounter):
                one.counter.take(reservation.request_id, one.cost(actual), now, admitted)
            elif one.first and isinstance(one.counter, _QuotaCounter):
                late.append(_Late(one.counter, one.period(admitted), one.cost(actual)))
        answer = _figures(counted, now)
        answer.at_ms = admitted
        self._remember(reservation.request_id, answer, late, now)

    def _remember(self, request_id: str, answer: Decision, late: "list[_Late]", now: int) -> None:
        """What was settled, so that doing it again changes nothing."""
        self.counts.late += bool(late)
        remembered, lasts = (self._late, LATE_MS) if late else (self._settled, SETTLED_MS)
        remembered[request_id] = _Settled(answer, now + lasts, late)
        for settled in (self._settled, self._late):
            while settled and (len(settled) > MAX_REMEMBERED or next(iter(settled.values())).until <= now):
                settled.popitem(last=False)

    def recorded(self, rows: Mapping[str, int]) -> None:
        for request_id, seq in rows.items():
            if settled := self._late.get(request_id):
                for late in settled.late:
                    late.counter.charge(late.period_start, late.amount, seq)
                settled.late.clear()

    async def heartbeat(self, reservations: Collection[Reservation]) -> None:
        now = self._now_ms()
        for reservation in reservations:
            held = self._open.get(reservation.request_id)
            if held is not None:
                held.deadline = now + OVERDUE_MS
                for one in self._counted(reservation.plan):
                    one.counter.renew(reservation.request_id, now)
            elif self._known(reservation.request_id) is None:
                self._hold(reservation, now, self._admitted(reservation, now))

    async def overdue(self) -> list[Reservation]:
        now = self._now_ms()
        return [held.reservation for held in self._open.values() if held.deadline <= now][:AT_A_TIME]

    async def strays(self) -> list[Event]:
        return []

    async def aclose(self) -> None:
        """There is nothing to let go of."""

    def _known(self, request_id: str) -> Decision | None:
        """The answer that this request got."""
        known = self._open.get(request_id) or self._settled.get(request_id) or self._late.get(request_id)
        return known.answer if known else None

    def _admitted(self, reservation: Reservation, now: int) -> int:
        return now - max(0, round((self._monotonic_s() - reservation.since_s) * 1000))

    def _counted(self, plan: Plan) -> "list[_Counted]":
        if plan.prepared is None:
            plan.prepared = []
            seen = set()
            for rule in plan.rules:
                kind, key = _counter_of(rule)
                counter = self._counters.get(key)
                if counter is None:
                    counter = self._counters[key] = kind(rule)
                cost = _one if isinstance(rule, Lease) else attrgetter(rule.metric)
                plan.prepared.append(_Counted(rule, counter, key not in seen, cost))
                seen.add(key)
        counted: list[_Counted] = plan.prepared
        return counted


def period(quota: Quota, at_ms: int) -> tuple[int, int]:
    """Start and end of the calendar period in UTC, in ms since 1970."""
    if quota.period == "day":
        start = at_ms - at_ms % 86_400_000
        return start, start + 86_400_000
    at = datetime.fromtimestamp(at_ms / 1000, UTC)
    following = (at.year + at.month // 12, at.month % 12 + 1)
    first, end = datetime(at.year, at.month, 1, tzinfo=UTC), datetime(*following, 1, tzinfo=UTC)
    return int(first.timestamp()) * 1000, int(end.timestamp()) * 1000


def _figures(counted: "list[_Counted]", now: int) -> Decision:
    """What is left of each rule."""
    remaining = [max(0, one.rule.limit - one.counter.used(now)) for one in counted]
    return Decision(remaining, [one.counter.reset_ms(now) for one in counted], at_ms=now)


def _one(costs: Costs) -> int:
    return 1


def _longest(wait: int | None) -> float:
    return float("inf") if wait is None else wait


class _Counter:
    """One counter, as the verbs need it. *now* is the store's clock in ms."""

    def used(self, now: int) -> int:
        raise NotImplementedError

    def wait_ms(self, cost: int, limit: int, now: int) -> int | None:
        """Until *cost* fits under *limit*: 0 for now, None for never."""
        raise NotImplementedError

    def reset_ms(self, now: int) -> int:
        raise NotImplementedError

    def take(self, request_id: str, cost: int, now: int, admitted: int) -> Mark | None:
        """Count *cost* as of when it was admitted; None where that is not possible."""
        raise NotImplementedError

    def settle(self, request_id: str, mark: Mark | None, actual: int, now: int) -> bool:
        """Whether the counter now has what was used; False if it never had what was reserved."""
        raise NotImplementedError

    def renew(self, request_id: str, now: int) -> None:
        """The request is still under way."""

    def charge(self, period_start: int, amount: int, seq: int) -> None:
        """Count what is recorded with *seq*, if it is not counted yet."""


class _WindowCounter(_Counter):
    """
    A sliding window of 60 buckets and the one under way, the oldest of them counted whole.

    Never more than the limit in any window, so it can refuse a sixtieth of the window longer than a list would.
    """

    def __init__(self, rule: Window) -> None:
        self._size = -(-rule.window_ms // BUCKETS)
        self._buckets: dict[int, int] = {}
        self._used = 0
        self._turned = 0
        self._written = 0

    def used(self, now: int) -> int:
        self._turn(now)
        return self._used

    def wait_ms(self, cost: int, limit: int, now: int) -> int | None:
        excess = self.used(now) + cost - limit
        if excess <= 0:
            return 0
        if cost > limit:
            return None
        for bucket in sorted(self._buckets):
            excess -= self._buckets[bucket]
            if excess <= 0:
                return (bucket + BUCKETS + 1) * self._size - now
        raise AssertionError("the sum of the buckets is what is used")

    def reset_ms(self, now: int) -> int:
        return (self._written + BUCKETS + 1) * self._size - now if self.used(now) else 0

    def take(self, request_id: str, cost: int, now: int, admitted: int) -> Mark | None:
        current = self._turn(now)
        bucket = current if admitted >= now else min(current, admitted // self._size)
        if bucket < current - BUCKETS:
            return None
        self._add(bucket, cost)
        return bucket, cost

    def settle(self, request_id: str, mark: Mark | None, actual: int, now: int) -> bool:
        bucket, reserved = mark or (-1, actual)
        if actual > reserved:
            self._add(self._turn(now), actual - reserved)
        else:
            self._add(bucket, -min(reserved - actual, self._buckets.get(bucket, 0)))
        return True

    def _add(self, bucket: int, amount: int) -> None:
        if amount:
            self._buckets[bucket] = self._buckets.get(bucket, 0) + amount
            self._used += amount
            self._written = self._turned if amount > 0 else self._written

    def _turn(self, now: int) -> int:
        """Forget the buckets that have left the window; the current one. It never turns back, clocks do."""
        current = now // self._size
        if current == self._turned:
            return current
        if current < self._turned - BUCKETS:  # so far that all of it would be held for long: count it as of now
            self._buckets = {current: self._used}
            self._turned = self._written = current
        elif current < self._turned:
            return self._turned
        for bucket in range(self._turned - BUCKETS, min(current - BUCKETS, self._turned + 1)):
            self._used -= self._buckets.pop(bucket, 0)
        self._turned = current
        return current


class _LeaseCounter(_Counter):
    """Leases in the order in which they end, but for a clock that steps back: then they may end a little late."""

    def __init__(self, rule: Lease) -> None:
        self._lasts_ms = rule.lease_ms
        self._ends: dict[str, int] = {}

    def used(self, now: int) -> int:
        while self._ends and self._ends[first := next(iter(self._ends))] <= now:
            del self._ends[first]
        return len(self._ends)

    def wait_ms(self, cost: int, limit: int, now: int) -> int | None:
        if not limit:
            return None
        return 0 if self.used(now) < limit else LEASE_WAIT_MS

    def reset_ms(self, now: int) -> int:
        return self._lasts_ms if self.used(now) else 0

    def take(self, request_id: str, cost: int, now: int, admitted: int) -> Mark | None:
        self.renew(request_id, now)
        return None

    def settle(self, request_id: str, mark: Mark | None, actual: int, now: int) -> bool:
        self._ends.pop(request_id, None)
        return True

    def renew(self, request_id: str, now: int) -> None:
        self._ends.pop(request_id, None)
        self._ends[request_id] = now + self._lasts_ms


class _QuotaCounter(_Counter):
    """What was used in a calendar period. Each seeding is an epoch: reservations of an earlier one are not in it."""

    def __init__(self, rule: Quota) -> None:
        self._rule = rule
        self._start = -1
        self._end = -1
        self._used = 0
        self._watermark = -1
        self._epoch = 0

    def known(self, now: int) -> bool:
        return now < self._end  # also before its start: then the clock has stepped back

    def seed(self, start: int, used: int, watermark: int) -> None:
        if start > self._start:
            self._start, self._end = period(self._rule, start)
            self._used, self._watermark = used, watermark
            self._epoch += 1

    def used(self, now: int) -> int:
        return self._used

    def wait_ms(self, cost: int, limit: int, now: int) -> int | None:
        if self._used + cost <= limit:
            return 0
        return None if cost > limit else self.reset_ms(now)

    def reset_ms(self, now: int) -> int:
        return (self._end if self._start <= now < self._end else period(self._rule, now)[1]) - now

    def take(self, request_id: str, cost: int, now: int, admitted: int) -> Mark | None:
        if not self.known(now) or self._start > admitted:
            return None
        self._used += cost
        return self._epoch, cost

    def settle(self, request_id: str, mark: Mark | None, actual: int, now: int) -> bool:
        if mark is None or mark[0] != self._epoch:
            return False
        self._used += actual - mark[1]
        return True

    def charge(self, period_start: int, amount: int, seq: int) -> None:
        if period_start == self._start and self._watermark < seq:
            self._used += amount


class _Counted(Struct):
    """A rule and its counter. `first`: no rule before it in the plan has the same counter, so this one counts."""

    rule: Rule
    counter: _Counter
    first: bool
    cost: Callable[[Costs], int]
    """What of a request's costs counts for this rule."""

    def period(self, at_ms: int) -> int:
        """When the period began that *at_ms* is in; 0 where there are no periods."""
        return period(self.rule, at_ms)[0] if isinstance(self.rule, Quota) else 0


class _Held(Struct):
    """A reservation, where its costs are, and when it is overdue."""

    reservation: Reservation
    answer: Decision
    marks: list[Mark | None]
    deadline: int


class _Late(Struct):
    """What a quota is to be charged with once the row is recorded."""

    counter: _Counter
    period_start: int
    amount: int


class _Settled(Struct):
    """What is remembered of a request that was settled, and until when."""

    answer: Decision
    until: int
    late: list[_Late]


def _counter_of(rule: Rule) -> tuple[type, tuple[str, str, int | str]]:
    if isinstance(rule, Window):
        return _WindowCounter, (rule.scope, rule.metric, rule.window_ms)
    if isinstance(rule, Lease):
        return _LeaseCounter, (rule.scope, "leases", 0)
    return _QuotaCounter, (rule.scope, rule.metric, rule.period)

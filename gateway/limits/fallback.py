"""What holds while the store is out of reach? Each limit by its own policy, on counters of this process."""

import time
from collections.abc import Callable

import msgspec

from gateway.errors import LimiterUnavailable
from gateway.limits.terms import Term, Terms
from gateway.stores import (
    Costs,
    Decision,
    Lease,
    LedgerUnavailable,
    LimitStore,
    Metric,
    Plan,
    Quota,
    Reservation,
    Rule,
    Used,
    Window,
)
from gateway.stores.memory import MemoryStore, clock_ms, period

GUARD_SHARE = 0.05
"""Of a quota, kept back: other replicas may have spent what this one has not seen."""


LEASE_MS = 86_400_000


class Shares:
    """
    This replica's part of every limit, for one outage.

    Under `local` it is the limit divided by the replicas last seen, and at first no more than what was left when the
    store was last heard. Under `guard` it is such a part of what is left of the quota, less the guard; `closed`
    refuses, `open` only counts. So all replicas together admit less than the limit once more, and quotas are not
    exceeded by more than what was in flight; unless this replica alone is cut off: then by its part of what was left.
    """

    def __init__(self, store: LimitStore, used: Used, now_ms: Callable[[], int] = clock_ms) -> None:
        self._memory = MemoryStore(_nothing, now_ms)
        self._now_ms = now_ms
        self._replicas, self._rank = max(1, store.replicas), store.rank
        self._used = used
        self._plans: dict[int, tuple[Plan, float]] = {}
        """Of each plan the rules here, and until when: then a quota starts anew."""

    async def admit(self, terms: Terms, reservation: Reservation) -> Decision:
        """Raises LimiterUnavailable, also for what is too large for a share of a rate, and not for the rate."""
        plan = self._begun(terms.plan) or await self._begin(terms)
        decision = await self._memory.admit(self._here(plan, reservation))
        if decision.denied is not None and decision.wait_ms is None:
            rule = terms.terms[decision.denied].rule
            cost = 1 if isinstance(rule, Lease) else getattr(reservation.costs, rule.metric)
            if cost <= rule.limit and not isinstance(rule, Quota):
                raise LimiterUnavailable
        return decision

    def settle(self, reservation: Reservation, actual: Costs, *, exact: bool) -> None:
        plan, _ = self._plans.get(id(reservation.plan)) or (None, 0)
        if plan is not None:
            self._memory.settle(self._here(plan, reservation), actual, exact=exact)

    def _here(self, plan: Plan, reservation: Reservation) -> Reservation:
        return Reservation(plan, reservation.request_id, reservation.costs)

    def _begun(self, plan: Plan) -> Plan | None:
        ours, until_ms = self._plans.get(id(plan)) or (None, 0)
        return ours if self._now_ms() < until_ms else None

    async def _begin(self, terms: Terms) -> Plan:
        """The rules of this outage. What others may have used already is counted once."""
        now = self._now_ms()
        rules: list[Rule] = []
        seen = [_still(terms, index) for index in range(len(terms.terms))]
        for term, left in zip(terms.terms, seen, strict=True):
            rules.append(await self._share(term, left))
        if begun := self._begun(terms.plan):  # by another request, while the ledger was asked
            return begun
        if id(terms.plan) not in self._plans:
            self._count(terms, rules, seen)
        plan = Plan(terms.plan.slot, tuple(rules))
        until_ms = min((period(rule, now)[1] for rule in rules if isinstance(rule, Quota)), default=float("inf"))
        self._plans[id(terms.plan)] = plan, until_ms
        return plan

    def _count(self, terms: Terms, rules: list[Rule], seen: list[int | None]) -> None:
        """What others have used of a share already, until it leaves the window."""
        for index, (rule, left) in enumerate(zip(rules, seen, strict=True)):
            if isinstance(rule, Window) and not rule.shadow and left is not None and (used := rule.limit - left) > 0:
                assert terms.seen is not None
                spent = Costs(**{"requests": 0, rule.metric: used})
                since_s = min(terms.seen_s, terms.seen_s + (terms.seen.reset_ms[index] - rule.window_ms) / 1000)
                name = f"{index} of {id(terms.plan)}"
                used_before = Reservation(Plan(terms.plan.slot, (rule,)), name, spent, since_s=since_s)
                self._memory.settle(used_before, spent, exact=True)

    async def _share(self, term: Term, seen: int | None) -> Window | Lease | Quota:
        rule = term.rule
        if rule.shadow or term.on_loss == "open":
            return msgspec.structs.replace(rule, shadow=True)
        if term.on_loss == "closed":
            raise LimiterUnavailable
        share, over = divmod(rule.limit, self._replicas)
        share += self._rank < over  # all shares together are the limit
        if isinstance(rule, Lease):  # nobody keeps it up here, and if this process dies, so does what it counts
            return msgspec.structs.replace(rule, limit=share, lease_ms=LEASE_MS)
        if isinstance(rule, Window):
            return msgspec.structs.replace(rule, limit=share)
        left = await self._left(rule, seen)
        guard = int(rule.limit * GUARD_SHARE) if term.on_loss == "guard" else 0
        return msgspec.structs.replace(rule, limit=max(0, left - guard) // self._replicas)

    async def _left(self, quota: Quota, seen: int | None) -> int:
        """Of a quota, by what the store said last and by the ledger. Raises LimiterUnavailable if neither is known."""
        try:
            used, _ = await self._used(quota.scope, quota.metric, period(quota, self._now_ms())[0])
        except LedgerUnavailable:
            if seen is None:
                raise LimiterUnavailable from None
            return seen
        return quota.limit - used if seen is None else min(quota.limit - used, seen)


def _still(terms: Terms, index: int) -> int | None:
    """What was left of a rule when the store was last heard; None if nobody knows, or all of it is over since."""
    rule, seen = terms.terms[index].rule, terms.seen
    if seen is None:
        return None
    age_ms = int((time.monotonic() - terms.seen_s) * 1000)
    if isinstance(rule, Quota):
        is_over = period(rule, seen.at_ms + age_ms)[0] > seen.at_ms
    else:
        is_over = isinstance(rule, Window) and age_ms >= seen.reset_ms[index]
    return None if is_over else seen.remaining[index]


async def _nothing(scope: str, metric: Metric, period_start_ms: int) -> tuple[int, int]:
    """What a share has used when its outage begins."""
    return 0, 0

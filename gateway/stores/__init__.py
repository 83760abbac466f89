"""
What do replicas share? Counters, leases and reservations, changed by atomic verbs only.

One contract, two stores: `memory` for one process, `redis` for many. What a verb does is done wholly or not at all, by
the store's clock, and doing it twice is doing it once.
"""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import msgspec
from msgspec import Struct

Metric = Literal["requests", "tokens", "nano_usd"]
Period = Literal["day", "month"]


class Window(Struct, frozen=True):
    """No more than *limit* of *metric* in any *window_ms*."""

    scope: str
    metric: Metric
    limit: int
    window_ms: int
    shadow: bool = False


class Lease(Struct, frozen=True):
    """No more than *limit* requests at a time. A lease that is not renewed within *lease_ms* lapses."""

    scope: str
    limit: int
    lease_ms: int = 30_000
    shadow: bool = False


class Quota(Struct, frozen=True):
    """No more than *limit* of *metric* in each calendar *period* of UTC."""

    scope: str
    metric: Metric
    limit: int
    period: Period
    shadow: bool = False


Rule = Window | Lease | Quota
"""One counter. `scope` says whose it is; rules of one scope, metric and span share it. `shadow` refuses nothing."""


class Plan:
    """
    The rules that one request is under, all in one slot.

    Made once for each key and model, and kept: `prepared` is for what a store makes of it.
    """

    __slots__ = ("prepared", "rules", "slot")

    def __init__(self, slot: str, rules: tuple[Rule, ...]) -> None:
        self.slot = slot
        self.rules = rules
        self.prepared: Any = None


class Costs(Struct, frozen=True, gc=False):
    """What a request takes of each metric; a request is always one of `requests`, unless nothing was dispatched."""

    tokens: int = 0
    nano_usd: int = 0
    requests: int = 1

    def at_least(self, other: "Costs") -> "Costs":
        return Costs(
            max(self.tokens, other.tokens), max(self.nano_usd, other.nano_usd), max(self.requests, other.requests)
        )


class Reservation(Struct, gc=False):
    """
    What one request takes from the counters of its plan, from `admit` to `settle`.

    Made before `admit`, and good where the store was out of reach too: `settle` and `heartbeat` then bring to the store
    what it has missed. `intent` is for whoever finds the request abandoned. `progress` is how many tokens were
    generated; heartbeats carry it. `since_s` is the monotonic clock of this process when the request was admitted.
    """

    plan: Plan
    request_id: str
    costs: Costs
    intent: bytes = b""
    progress: int = 0
    since_s: float = msgspec.field(default_factory=time.monotonic)


class Event(Struct, frozen=True):
    """What `settle` was given for the ledger, left behind by a replica that did not say it was recorded."""

    request_id: str
    event: bytes


class Decision(Struct, gc=False):
    """
    The answer to `admit`, with a figure for each rule of the plan, in its order.

    `remaining` is what is left of each after this request, never below 0; `reset_ms` the time until it is whole again.
    `denied` is the index of the rule that refused, the one that asks for the longest wait; then nothing was consumed by
    any. `wait_ms` is how long a sole client has to wait to be admitted with the same costs; None: it never will be. A
    wait for a lease is a guess, for nobody knows when a request ends. `shadowed` are the rules that would have refused.
    `at_ms` is the store's clock, which decides into which calendar period the request falls.
    """

    remaining: list[int]
    reset_ms: list[int]
    denied: int | None = None
    wait_ms: int | None = 0
    shadowed: tuple[int, ...] = ()
    at_ms: int = 0


class StoreUnavailable(Exception):
    """The store cannot be reached in time, or cannot do what it is asked for."""


class LedgerUnavailable(Exception):
    """The ledger cannot be asked now."""


class Used(Protocol):
    """
    What the ledger says was used of a quota since its period began, and the highest `seq` in that sum.

    Raises LedgerUnavailable.
    """

    async def __call__(self, scope: str, metric: Metric, period_start_ms: int) -> tuple[int, int]: ...


@dataclass(slots=True)
class StoreCounts:
    """What a store has been through, for metrics: plain numbers that only grow, but for `backlog`."""

    round_trips: int = 0
    failures: int = 0
    opened: int = 0
    scripts_sent: int = 0
    seeded: int = 0
    late: int = 0
    backlog: int = 0
    dropped: int = 0


class LimitStore(Protocol):
    """
    Counters that are reserved from before a request is dispatched, and settled after.

    For each request: `admit` (again if its answer was lost), `heartbeat` every 10 s while it is under way, and, unless
    it was denied, `settle`, whatever came of it, also when `admit` raised or was cancelled: the reservation may exist
    all the same. Then `recorded`, when its row is in the ledger.
    """

    counts: StoreCounts

    @property
    def available(self) -> bool:
        """Whether `admit` would ask the store at all: False while it is left alone for having failed."""

    @property
    def replicas(self) -> int:
        """How many processes share the store, this one among them, as far as was last seen."""

    @property
    def rank(self) -> int:
        """Which of the processes that share the store this one is, from 0."""

    async def start(self) -> None:
        """Reach for the store. Does not fail: what is not there is looked for in the background from now on."""

    async def admit(self, reservation: Reservation) -> Decision:
        """
        Reserve for all rules of the plan, or for none and change nothing; the same answer to the same request id.

        Raises StoreUnavailable at once while not available, else within the store's timeout. A quota that the store
        does not know is asked of the ledger, once for all who wait for it; the time that takes is the ledger's.
        """

    def settle(self, reservation: Reservation, actual: Costs, *, exact: bool, event: bytes = b"") -> None:
        """
        Replace what was reserved by what was used. Does not wait, does not fail, and counts once, whatever is lost.

        Less than reserved is given back only if *exact*; more is a debt that counts from now on. Leases end. `actual`
        of no requests and no tokens, exact, takes all of it back. *event* is kept for other replicas until `recorded`;
        empty keeps nothing. A settle that cannot be delivered is kept, up to a bound, for when the store is back.
        """

    def recorded(self, rows: Mapping[str, int]) -> None:
        """
        These requests have their rows in the ledger: request id to `seq`. Does not wait, and does not fail.

        Their events are dropped. What was used by those whose reservation was lost is added to the quotas now, unless
        the sum that a quota was seeded with has the row in it: it has all up to its `seq`.
        """

    async def heartbeat(self, reservations: Collection[Reservation]) -> None:
        """
        These requests are under way: their leases and reservations hold on, and are made anew where they were lost.

        To be called every 10 s, and when the store has come back. Raises StoreUnavailable.
        """

    async def overdue(self) -> list[Reservation]:
        """
        Reservations that nobody has kept up for 45 s: of processes that died. At most 100 at a time, from all slots.

        Whoever gets one records its row, and settles it, not exact, with that row as event. May be given to several.
        Empty for a while after the store was away, so that the living come first. Raises StoreUnavailable.
        """

    async def strays(self) -> list[Event]:
        """
        Events older than 5 s, of other processes, that nobody has said are recorded; at most 100 at a time.

        Whoever gets one inserts it, if it is not there, and then calls `recorded`. Raises StoreUnavailable.
        """

    async def aclose(self) -> None:
        """Deliver what is waiting, as far as that goes within a second, and let go of the store."""

"""
What do replicas share? Counters, leases and reservations, changed by atomic verbs only.

One contract, two stores: `memory` for one process, `redis` for many. What a verb does is done wholly or not at all, by
the store's clock, and doing it twice is doing it once.
"""

from typing import Any, Literal, Protocol

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


class Decision(Struct, gc=False):
    """
    The answer to `admit`, with a figure for each rule of the plan, in its order.

    `remaining` is what is left of each after this request, never below 0; `reset_ms` the time until it is whole again.
    `denied` is the index of the rule that refused, the one that asks for the longest wait; then nothing was consumed by
    any. `wait_ms` is how long a sole client has to wait to be admitted with the same costs; None: it never will be.
    `shadowed` are the rules that would have refused.
    """

    remaining: list[int]
    reset_ms: list[int]
    denied: int | None = None
    wait_ms: int | None = 0
    shadowed: tuple[int, ...] = ()


class StoreUnavailable(Exception):
    """The store cannot be reached in time, or cannot do what it is asked for."""


class LimitStore(Protocol):
    """To be filled in by the engineer of the stores: admit, settle, heartbeat, seed, charge, reap, aclose."""

"""What is known about one request on its way through the gateway?"""

import random
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from gateway.auth import Principal
from gateway.errors import GatewayError
from gateway.models import Model, Target
from gateway.schema.common import Usage
from gateway.schema.endpoint import Endpoint
from gateway.schema.payload import Payload


@dataclass(slots=True)
class Attempt:
    """One target's chance to answer, on the call's clock."""

    target: Target
    started: float
    ended: float = 0.0
    error: GatewayError | None = None


class Tally:
    """Seconds, counted by size: how many are up to each of *bounds*, and how many above all."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def join(self, other: "Tally") -> None:
        self.counts = [ours + theirs for ours, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += other.total


GAPS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Trace(Protocol):
    """Told of each attempt when it is dispatched, and of the end."""

    def dispatched(self, attempt: Attempt) -> str:
        """The `traceparent` to send along."""
        ...

    def over(self, call: "Call", record: Any) -> None: ...


@dataclass(slots=True)
class Call:
    """The one mutable thing: each stage of the pipeline writes its own fields; adapters never see it."""

    endpoint: Endpoint
    principal: Principal
    request: Payload[Any]
    unknown: set[str]
    """Top-level members that OpenAI does not know."""
    id: str = field(default_factory=lambda: f"{random.getrandbits(128):032x}")  # names, and guards nothing
    created: int = field(default_factory=lambda: int(time.time()))
    given_id: str | None = None
    """What the client calls it, if that is fit to be repeated; upstreams never see it."""
    clock: Callable[[], float] = time.perf_counter
    started: float = field(default_factory=time.perf_counter)
    """When its body was there, in seconds on `clock`, as are the other times."""

    model: Model | None = None  # resolve
    headers: dict[str, str] = field(default_factory=dict)  # resolve: for the client
    attempts: list[Attempt] = field(default_factory=list)  # route
    usage: Usage | None = None  # account
    first_at: float | None = None  # account: when its first part arrived
    last_at: float = 0.0  # account: when its latest part did
    gaps: Tally | None = None  # account: between what arrived; None with less than two parts
    status: int | None = None  # answer: None while none is sent
    left_at: float = 0.0  # answer: when it began to leave
    error: GatewayError | None = None  # answer: what the client was told
    outcome: Literal["completed", "client_gone", "failed"] = "failed"  # answer: where there was no error
    trace: Trace | None = None  # telemetry

    @property
    def request_id(self) -> str:
        """What the client and the log know it by."""
        return self.given_id or f"req_{self.id}"

    @property
    def streamed(self) -> bool:
        return self.endpoint.streams and bool(self.request.value.stream)

    @property
    def include_usage(self) -> bool:
        """Whether this client's stream ends with a usage chunk."""
        options = self.request.value.stream_options
        return options is not None and bool(options.include_usage)

    def arrived(self) -> None:
        """A part has come, or several at once."""
        now = self.clock()
        if self.first_at is None:
            self.first_at = now
        else:
            if self.gaps is None:
                self.gaps = Tally(GAPS_S)
            self.gaps.add(now - self.last_at)
        self.last_at = now

"""In which order are targets tried?"""

from collections.abc import Callable, Sequence
from math import ceil, log

from gateway.models import Target
from gateway.routing.health import Health

Candidate = tuple[Target, Health]


def in_order(candidates: Sequence[Candidate], now: float, random: Callable[[], float]) -> list[Candidate]:
    """
    By tier; within one, a weighted draw without replacement: each is first as often as its share of the weight.

    Each draws the time of its first arrival in a stream as frequent as its weight: whose comes first, goes first.
    """
    if len(candidates) == 1:
        return list(candidates)

    def place(candidate: Candidate) -> tuple[int, float]:
        target, health = candidate
        return target.tier, -log(1.0 - random()) / (target.weight * health.ramp(now))

    return sorted(candidates, key=place)


class Choice:
    """
    The way of one request through its targets: each at most once.

    First those that are up, in order. While none of them is, or all of these fail, one request a second goes first to
    one that was ejected, to find out whether it is back. Where all are out, the last to go is asked all the same; and
    one that stands alone always is, unless it has no room.
    """

    def __init__(self, candidates: Sequence[Candidate], now: float, random: Callable[[], float]) -> None:
        self._left = in_order(candidates, now, random)
        self._last: Candidate | None = None
        if len(candidates) == 1:
            self._last = candidates[0]
        elif all(health.is_out(now) for _, health in candidates):
            self._last = max(self._left, key=lambda candidate: candidate[1].ejected_at)

    @property
    def is_left(self) -> bool:
        """Whether there are targets that were not tried."""
        return bool(self._left)

    def next(self, now: float) -> Target | None:
        """The target to try now; None if there is no other to try."""
        chosen = self._chosen(now)
        if chosen is None:
            return None
        self._left.remove(chosen)
        return chosen[0]

    def wait_s(self, now: float) -> int:
        """After how many seconds one that was not tried may take a request."""
        waits = [health.busy_s(now) or 1.0 for _, health in self._left]
        return max(1, ceil(min(waits, default=1.0)))

    def _chosen(self, now: float) -> Candidate | None:
        free = [candidate for candidate in self._left if _has_room(candidate, now)]
        if free == [self._last]:
            return self._last
        up = [candidate for candidate in free if not candidate[1].is_out(now)]
        if all(health.failing for _, health in up):
            for candidate in free:
                if candidate[1].is_out(now) and candidate[1].trickle(now):
                    return candidate
        if up:
            return next((candidate for candidate in up if not candidate[1].is_full(now)), up[0])
        return self._last if self._last in free else None


def _has_room(candidate: Candidate, now: float) -> bool:
    target, health = candidate
    full = target.max_in_flight is not None and health.in_flight >= target.max_in_flight
    return not full and not health.is_busy(now)

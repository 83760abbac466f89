"""How does a request find the target that answers it?"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from gateway.adapter import Dispatch
from gateway.call import Attempt, Call
from gateway.errors import (
    CredentialRefused,
    GatewayError,
    InvalidRequest,
    NotServed,
    Overloaded,
    UpstreamError,
    UpstreamFailed,
    UpstreamUnreachable,
)
from gateway.models import Target
from gateway.routing.health import Health, State
from gateway.routing.order import Choice
from gateway.schema.common import Usage
from gateway.schema.payload import Parts, speaks
from gateway.settings import Upstream

MOST_GENERATIONS = 3
"""How often a request may be begun in all, not counting what surely was not."""
RETRY_SHARE = 0.2
LEAST_RETRIES = 3
PAUSE_S = 0.05
LONGEST_PAUSE_S = 0.5
MAX_HELD = 1000
ALARM_S = 60.0
ALARMS: dict[type[UpstreamError], str] = {
    CredentialRefused: "upstream %s refuses this gateway's credential for %s: mend its api_key",
    NotServed: "upstream %s has no model %s, or not the endpoint: mend the target's model, or the upstream's base_url",
}
"""What no waiting mends, and the log says as an error: once a minute, for each target."""
CANNOT = frozenset({"unsupported_parameter", "unsupported_value", "unsupported_endpoint"})
"""The codes with which a target says that it cannot do what another may."""

logger = logging.getLogger("suiron")


class Watch(Protocol):
    """Told of what routing does; by the target's label."""

    def retried(self, target: str) -> None: ...

    def no_retry_left(self, target: str) -> None: ...

    def ejected(self, target: str, reason: str) -> None: ...


class Standing(NamedTuple):
    target: str
    state: State
    in_flight: int


class Router:
    """
    Sends each request to the targets of its model, one after the other, until one begins to answer.

    *clock* gives seconds, *draw* numbers from 0 up to 1. A request that moves on takes one of the process's retries
    with it until it is over, unless it could not connect: there are as many as a fifth of the requests under way, but
    at least three.
    """

    def __init__(
        self,
        upstreams: Mapping[str, Upstream],
        watch: Watch,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.in_flight = 0
        self.retrying = 0
        self.clock = clock
        self.draw = draw
        self.sleep = sleep
        self.watch = watch
        self._upstreams = upstreams
        self._health: dict[str, Health] = {}
        self._alarmed_at: dict[str, float] = {}

    async def answer(self, call: Call, targets: Sequence[Target]) -> AsyncGenerator[Parts]:
        """
        The parts of the first of *targets* to begin an answer; until one has, a failing one makes way for the next.

        What says nothing yet, such as a chunk with a role only, is held back: with it, no answer has begun. Each
        attempt is in `call.attempts`, with its error and, if it was abandoned, the usage it had told. Raises what the
        last target to fail raised, or InvalidRequest where none can do what is asked.
        """
        passage = _Passage(self, call, targets)
        try:
            while attempt := passage.next():
                verb = getattr(attempt.target.adapter, call.endpoint.verb)
                held: Parts = []
                parts = verb(call.request, self._dispatch(call, attempt, passage.deadline))
                try:
                    async for arrived in parts:
                        if not attempt.answered:
                            held += arrived
                            if len(held) < MAX_HELD and not any(map(speaks, arrived)):
                                continue
                            passage.answered()
                            arrived, held = held, []
                        yield arrived
                    if not attempt.answered:
                        raise UpstreamFailed("The upstream ended its answer before it began.")
                    return
                except (UpstreamError, InvalidRequest) as exc:
                    attempt.usage = _usage_of(held)
                    pause_s = passage.failed(exc)
                finally:
                    await parts.aclose()
                    passage.ended()
                if pause_s:
                    await self.sleep(pause_s)
            raise passage.verdict()
        finally:
            passage.over()

    def over(self, call: Call) -> None:
        """The call is; only now is it known whether its answer was whole."""
        attempt, error = call.attempts[-1], call.error
        if not attempt.answered or attempt.error is not None:
            return
        if error is None and call.outcome == "completed":
            self.health(attempt.target).completed(self.clock())
        elif isinstance(error, UpstreamError):
            attempt.error = error
            self.judge(attempt.target, error, call.model.targets if call.model is not None else ())

    def standings(self) -> list[Standing]:
        """What is known of each target that has been asked yet."""
        now = self.clock()
        return [Standing(label, health.state(now), health.in_flight) for label, health in self._health.items()]

    def health(self, target: Target) -> Health:
        health = self._health.get(target.label)
        if health is None:
            health = self._health[target.label] = Health(self.draw)
        return health

    def may_retry(self) -> bool:
        """Whether a request may move on; it then has one of the retries, until `retrying` is told of its end."""
        if self.retrying >= max(LEAST_RETRIES, RETRY_SHARE * self.in_flight):
            return False
        self.retrying += 1
        return True

    def latest_end(self, targets: Sequence[Target]) -> float:
        """Until when a request that starts now may take in all, on `time.monotonic`."""
        return time.monotonic() + max([self._upstreams[target.upstream].timeouts.total_s for target in targets])

    def judge(self, target: Target, error: UpstreamError, targets: Sequence[Target]) -> None:
        """An attempt with *target*, one of the model's *targets*, has failed."""
        now = self.clock()
        health = self.health(target)
        last_standing = all(self.health(other).is_out(now) for other in targets if other is not target)
        reason = health.failed(error, now, last_standing=last_standing)
        if reason is not None:
            self.watch.ejected(target.label, reason)
            logger.warning("%s is left alone for %.0f s: %s", target.label, health.ejection_s, error.message)
        alarm = ALARMS.get(type(error))
        if alarm is not None and now >= self._alarmed_at.get(target.label, now):
            self._alarmed_at[target.label] = now + ALARM_S
            logger.error(alarm, target.upstream, target.model)

    def _dispatch(self, call: Call, attempt: Attempt, deadline: float) -> Dispatch:
        target = attempt.target
        timeouts = self._upstreams[target.upstream].timeouts
        return Dispatch(
            model=target.model,
            request_id=call.id,
            attempt=len(call.attempts),
            tenant=call.principal.tenant,
            deadline=min(deadline, time.monotonic() + timeouts.total_s),
            timeouts=timeouts,
            traceparent=None if call.trace is None else call.trace.dispatched(attempt),
        )


class _Passage:
    """One request on its way: which target is next, and what became of the last."""

    def __init__(self, router: Router, call: Call, targets: Sequence[Target]) -> None:
        self._router = router
        self._call = call
        self._targets = targets
        candidates = [(target, router.health(target)) for target in targets]
        self._choice = Choice(candidates, router.clock(), router.draw)
        self._attempt: Attempt
        self._health: Health  # of its target
        self._retries = 0
        self._generations = 0
        self._error: UpstreamError | None = None
        self._refusal: InvalidRequest | None = None
        self.deadline = router.latest_end(targets) - (call.clock() - call.started)
        router.in_flight += 1

    def over(self) -> None:
        self._router.in_flight -= 1
        self._router.retrying -= self._retries

    def next(self) -> Attempt | None:
        """The next attempt, begun; None if there is no other target, or it must not go on."""
        if self._error is not None and not self._may_go_on(self._error):
            return None
        target = self._choice.next(self._router.clock())
        if target is None:
            return None
        if self._error is not None:
            self._router.watch.retried(self._attempt.target.label)
        self._attempt = attempt = Attempt(target, self._call.clock())
        self._call.attempts.append(attempt)
        self._health = self._router.health(target)
        self._health.in_flight += 1
        return attempt

    def answered(self) -> None:
        self._attempt.answered = True
        self._health.answered(self._router.clock())

    def failed(self, error: UpstreamError | InvalidRequest) -> float:
        """
        How long to pause before the next attempt. Raises *error* where there must be none.

        A target that cannot do what is asked has not failed; a client's mistake is one wherever it is sent.
        """
        attempt = self._attempt
        attempt.error = error
        if isinstance(error, InvalidRequest):
            if attempt.answered or error.code not in CANNOT:
                raise error
            self._refusal = self._refusal or error
            return 0.0
        self._router.judge(attempt.target, error, self._targets)
        if attempt.answered:
            raise error
        self._error = error
        if isinstance(error, UpstreamUnreachable | Overloaded):
            return 0.0
        pause_s = min(PAUSE_S * 2**self._generations, LONGEST_PAUSE_S) * self._router.draw()
        self._generations += 1
        return pause_s if self._choice.is_left else 0.0

    def ended(self) -> None:
        self._attempt.ended = self._call.clock()
        self._health.in_flight -= 1

    def verdict(self) -> GatewayError:
        """What to tell the client where no target has answered."""
        error = self._error or self._refusal
        if error is None:
            wait_s = self._choice.wait_s(self._router.clock())
            return Overloaded("No upstream of this model has room. Try again later.", retry_after_s=wait_s)
        tried = len(self._call.attempts)
        if isinstance(error, UpstreamError) and not isinstance(error, Overloaded) and (tried > 1 or not error.curable):
            error.headers["x-should-retry"] = "false"
        return error

    def _may_go_on(self, error: UpstreamError) -> bool:
        if not self._choice.is_left or self._generations >= MOST_GENERATIONS or time.monotonic() >= self.deadline:
            return False
        if isinstance(error, UpstreamUnreachable):
            return True  # it asked nobody for anything: moving on multiplies nothing
        if not self._router.may_retry():
            self._router.watch.no_retry_left(self._attempt.target.label)
            return False
        self._retries += 1
        return True


def _usage_of(parts: Parts) -> Usage | None:
    return next((part.usage for part in reversed(parts) if part.usage is not None), None)

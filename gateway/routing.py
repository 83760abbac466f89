"""Which targets, in which order? Who is healthy?"""

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

from gateway.adapter import Dispatch
from gateway.call import Attempt, Call
from gateway.errors import UpstreamError, UpstreamFailed
from gateway.models import Target
from gateway.schema.payload import Parts
from gateway.settings import Upstream


class Router:
    def __init__(self, upstreams: Mapping[str, Upstream]) -> None:
        self._upstreams = upstreams

    async def answer(self, call: Call, targets: Sequence[Target]) -> AsyncGenerator[Parts]:
        """
        The parts of the first of *targets* to begin an answer; until one has, a failing one makes way for the next.

        Each attempt is in `call.attempts`, with its error. Raises the last one's UpstreamError.
        """
        for target in targets:
            attempt = Attempt(target, call.clock())
            call.attempts.append(attempt)
            verb = getattr(target.adapter, call.endpoint.verb)
            begun = False
            try:
                async with aclosing(verb(call.request, self._dispatch(call, attempt))) as parts:
                    async for arrived in parts:
                        begun = True
                        yield arrived
                if not begun:
                    raise UpstreamFailed("The upstream ended its answer before it began.")
                return
            except UpstreamError as exc:
                attempt.error = exc
                if begun or target is targets[-1]:
                    raise
            finally:
                attempt.ended = call.clock()

    def _dispatch(self, call: Call, attempt: Attempt) -> Dispatch:
        target = attempt.target
        timeouts = self._upstreams[target.upstream].timeouts
        return Dispatch(
            model=target.model,
            request_id=call.id,
            attempt=len(call.attempts),
            tenant=call.principal.tenant,
            deadline=time.monotonic() + timeouts.total_s,
            timeouts=timeouts,
            traceparent=None if call.trace is None else call.trace.dispatched(attempt),
        )

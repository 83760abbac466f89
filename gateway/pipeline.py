"""What happens to a request, in order?"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from gateway.adapter import Dispatch
from gateway.call import Attempt, Call
from gateway.errors import UpstreamError, UpstreamFailed
from gateway.models import Models, Target
from gateway.schema.payload import Parts
from gateway.schema.reading import judge_unknown
from gateway.settings import Settings
from gateway.stream import finished


class Pipeline:
    def __init__(self, settings: Settings, models: Models) -> None:
        self._models = models
        self._upstreams = settings.upstreams

    def answer(self, call: Call) -> AsyncGenerator[Parts]:
        """
        Answer a call, part by part.

        A GatewayError raised before the first part can still become an HTTP status; after it, the answer has begun and
        the error can only end it.
        """
        return finished(call, self._first_to_answer(call))

    def _resolve(self, call: Call) -> list[Target]:
        """What can answer this; raises ModelNotFound or InvalidRequest, at no cost to anyone."""
        call.model = self._models.get(call.request.value.model, call.principal)
        targets = call.model.targets_for(call.endpoint)
        if call.unknown:
            extensions = frozenset[str]().union(*(target.adapter.extra_fields for target in targets))
            if ignored := judge_unknown(call.unknown, extensions):
                call.headers["x-suiron-ignored"] = ", ".join(ignored[:10]).encode("ascii", "replace").decode()[:500]
        return targets

    async def _first_to_answer(self, call: Call) -> AsyncGenerator[Parts]:
        """The first target to yield a part is committed to; until then, a failing one makes way for the next."""
        targets = self._resolve(call)
        for target in targets:
            attempt = Attempt(target, call.clock())
            call.attempts.append(attempt)
            verb = getattr(target.adapter, call.endpoint.verb)
            try:
                async with aclosing(verb(call.request, self._dispatch(call, attempt))) as parts:
                    first = await anext(parts, None)
                    if first is None:
                        raise UpstreamFailed("The upstream ended its answer before it began.")
                    self._account(call, first)
                    yield first
                    async for arrived in parts:
                        self._account(call, arrived)
                        yield arrived
                    return
            except UpstreamError as exc:
                attempt.error = exc
                if call.first_at is not None or target is targets[-1]:
                    raise
            finally:
                attempt.ended = call.clock()

    def _account(self, call: Call, parts: Parts) -> None:
        call.arrived()
        for part in parts:
            if part.usage is not None:
                call.usage = part.usage

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

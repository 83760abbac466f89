"""What happens to a request, in order?"""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from gateway.auth import Principal
from gateway.cache import Cache
from gateway.call import Call
from gateway.ledger import Ledger
from gateway.limits import Limiter
from gateway.models import Models, Target
from gateway.routing import Router
from gateway.schema.payload import Parts
from gateway.schema.reading import judge_unknown
from gateway.stream import finish
from gateway.tokens import Tokens


class Pipeline:
    def __init__(
        self, models: Models, ledger: Ledger, limiter: Limiter, cache: Cache, router: Router, tokens: Tokens
    ) -> None:
        self._models = models
        self._ledger = ledger
        self._limiter = limiter
        self._cache = cache
        self._router = router
        self._tokens = tokens

    async def answer(self, call: Call) -> AsyncGenerator[Parts]:
        """
        Answer a call, part by part; whatever comes of it, `settle` has to be called afterwards.

        A GatewayError raised before the first part can still become an HTTP status; after it, the answer has begun and
        the error can only end it.
        """
        targets = self._resolve(call)
        costs = await self._limiter.expect(call, targets)
        call.entry = self._ledger.entry(call)
        if costs is not None:
            await self._limiter.admit(call, costs)
        parts = self._cache.through(call, lambda generation: self._router.answer(generation, targets))
        streamed, answer = call.streamed, finish(call)
        try:
            async for arrived in parts:
                call.arrived(arrived)
                if not streamed:
                    self._tokens.ended(call)
                if sent := answer.rewrite(arrived):
                    yield sent
                if answer.outrun:
                    break
            if streamed:
                self._tokens.ended(call)
            if last := answer.end():
                yield last
        finally:
            await parts.aclose()

    def check_model(self, name: str, principal: Principal) -> None:
        """Raises ModelNotFound."""
        self._models.get(name, principal)

    def settle(self, call: Call) -> None:
        """Bill what the call took, and give back what it did not. Does not wait, so that nothing can cut it short."""
        if call.entry is None:
            return
        if call.attempts:
            self._router.over(call)
        self._tokens.settle(call)
        left = call.error is None and call.outcome != "completed"
        record = call.entry.close(asyncio.CancelledError() if left else call.error)
        self._limiter.settle(call, record)

    def _resolve(self, call: Call) -> Sequence[Target]:
        """What can answer this; raises ModelNotFound or InvalidRequest, at no cost to anyone."""
        call.model = self._models.get(call.request.value.model, call.principal)
        targets = call.model.targets_for(call.endpoint, call.request.value)
        self._tokens.check(call)
        if call.unknown:
            extensions = frozenset[str]().union(*(target.adapter.extra_fields for target in targets))
            if ignored := judge_unknown(call.unknown, extensions):
                call.headers["x-suiron-ignored"] = ", ".join(ignored[:10]).encode("ascii", "replace").decode()[:500]
        return targets

"""What happens to a request, in order?"""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from gateway.call import Call
from gateway.models import Models, Target
from gateway.routing import Router
from gateway.schema.payload import Parts
from gateway.schema.reading import judge_unknown
from gateway.stream import finished


class Pipeline:
    def __init__(self, models: Models, router: Router) -> None:
        self._models = models
        self._router = router

    def answer(self, call: Call) -> AsyncGenerator[Parts]:
        """
        Answer a call, part by part.

        A GatewayError raised before the first part can still become an HTTP status; after it, the answer has begun and
        the error can only end it.
        """
        return finished(call, self._answered(call))

    def _resolve(self, call: Call) -> list[Target]:
        """What can answer this; raises ModelNotFound or InvalidRequest, at no cost to anyone."""
        call.model = self._models.get(call.request.value.model, call.principal)
        targets = call.model.targets_for(call.endpoint)
        if call.unknown:
            extensions = frozenset[str]().union(*(target.adapter.extra_fields for target in targets))
            if ignored := judge_unknown(call.unknown, extensions):
                call.headers["x-suiron-ignored"] = ", ".join(ignored[:10]).encode("ascii", "replace").decode()[:500]
        return targets

    async def _answered(self, call: Call) -> AsyncGenerator[Parts]:
        targets = self._resolve(call)
        async with aclosing(self._router.answer(call, targets)) as parts:
            async for arrived in parts:
                call.arrived()
                for part in arrived:
                    if part.usage is not None:
                        call.usage = part.usage
                yield arrived

"""GET /metrics: what does Prometheus scrape, and who may?"""

import asyncio
from typing import Any

from litestar import Request, Response, get
from litestar.handlers import HTTPRouteHandler

from gateway.auth import Keyring, is_local_call, is_loopback, joined
from gateway.settings import Telemetry
from gateway.telemetry.metrics import CONTENT_TYPE, Metrics


def metrics_routes(keyring: Keyring, metrics: Metrics, settings: Telemetry) -> list[HTTPRouteHandler]:
    """None where they are off. Where they are not open, programs on this machine may read them, and who holds a key."""

    @get("/metrics")
    async def read(request: Request[Any, Any, Any]) -> Response[bytes]:
        headers = request.scope["headers"]
        client = request.scope["client"]
        local = client is not None and is_loopback(client[0]) and is_local_call(joined(headers))
        if settings.metrics == "local" and not local:
            keyring.authenticate(headers)
        metrics.settle()
        text = await asyncio.to_thread(metrics.render)
        return Response(text, media_type=CONTENT_TYPE, headers={"cache-control": "no-store"})

    return [] if settings.metrics == "off" else [read]

"""GET /health/live and /health/ready: is this process alive, and should it be sent requests?"""

from litestar import Response, get
from litestar.handlers import HTTPRouteHandler

from gateway.api.shutdown import Shutdown


class Readiness:
    """
    Red until every upstream has been asked once and all is loaded, and from the first sign of the end.

    A local model that cannot be loaded keeps it red.
    """

    def __init__(self, shutdown: Shutdown) -> None:
        self.loading = True
        self.broken = False
        self._shutdown = shutdown

    @property
    def status(self) -> str:
        if self._shutdown.begun:
            return "draining"
        return "loading" if self.loading else "failed" if self.broken else "ready"


def health_routes(readiness: Readiness) -> list[HTTPRouteHandler]:
    @get("/health/live")
    async def live() -> Response[dict[str, str]]:
        return Response({"status": "ok"})

    @get("/health/ready")
    async def ready() -> Response[dict[str, str]]:
        if (status := readiness.status) != "ready":
            return Response({"status": status}, status_code=503, headers={"retry-after": "1"})
        return Response({"status": status})

    return [live, ready]

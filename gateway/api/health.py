"""GET /health/live and /health/ready: is this process alive, and should it be sent requests?"""

from litestar import Response, get
from litestar.handlers import HTTPRouteHandler


class Readiness:
    """Red until every upstream has been asked once; a local model that cannot be loaded keeps it red."""

    def __init__(self) -> None:
        self.loading = True
        self.broken = False


def health_routes(readiness: Readiness) -> list[HTTPRouteHandler]:
    @get("/health/live")
    async def live() -> Response[dict[str, str]]:
        return Response({"status": "ok"})

    @get("/health/ready")
    async def ready() -> Response[dict[str, str]]:
        if readiness.loading or readiness.broken:
            status = "loading" if readiness.loading else "failed"
            return Response({"status": status}, status_code=503, headers={"retry-after": "1"})
        return Response({"status": "ready"})

    return [live, ready]

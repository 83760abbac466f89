"""What do the endpoints that generate take and give: chat completions, completions, embeddings?"""

from litestar import asgi
from litestar.handlers import ASGIRouteHandler
from litestar.types import Receive, Scope, Send

from gateway.api.answer import Answer
from gateway.api.body import read_body
from gateway.auth import Keyring
from gateway.call import Call
from gateway.errors import MethodNotAllowed
from gateway.interrupt import Interrupt
from gateway.pipeline import Pipeline
from gateway.schema.endpoint import ENDPOINTS, Endpoint
from gateway.schema.reading import read_request
from gateway.settings import Server


def generation_routes(keyring: Keyring, pipeline: Pipeline, server: Server) -> list[ASGIRouteHandler]:
    """ASGI handlers, since they read and answer by themselves: Litestar's requests would cost and add nothing."""

    def route(endpoint: Endpoint) -> ASGIRouteHandler:
        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["method"] != "POST":  # type: ignore[typeddict-item]
                raise MethodNotAllowed("Only POST is allowed here.", headers={"allow": "POST"})
            principal = keyring.authenticate(scope["headers"])
            interrupt = Interrupt()
            payload, unknown = read_request(endpoint, await read_body(scope, receive, server, interrupt))
            call = Call(endpoint, principal, payload, unknown)
            await Answer(call, pipeline.answer(call), server, interrupt)(scope, receive, send)

        return asgi(f"/v1/{endpoint.path}", copy_scope=False)(answer)

    return [route(endpoint) for endpoint in ENDPOINTS]

"""What do the endpoints that generate take and give: chat completions, completions, embeddings?"""

import secrets

from litestar import asgi
from litestar.handlers import ASGIRouteHandler
from litestar.types import Receive, Scope, Send

from gateway.api.answer import Answer
from gateway.api.body import read_body
from gateway.api.errors import ErrorResponse, request_id_of, unexpected
from gateway.api.shutdown import Shutdown
from gateway.auth import Keyring, Principal
from gateway.call import Call
from gateway.errors import GatewayError, MethodNotAllowed
from gateway.interrupt import Interrupt
from gateway.pipeline import Pipeline
from gateway.schema.endpoint import ENDPOINTS, Endpoint
from gateway.schema.reading import read_request
from gateway.settings import Server
from gateway.telemetry import Telemetry


def generation_routes(
    keyring: Keyring, pipeline: Pipeline, server: Server, shutdown: Shutdown, telemetry: Telemetry
) -> list[ASGIRouteHandler]:
    """ASGI handlers, since they read and answer by themselves: Litestar's requests would cost and add nothing."""
    clock = telemetry.clock

    def route(endpoint: Endpoint) -> ASGIRouteHandler:
        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            started = clock()
            principal: Principal | None = None
            interrupt = Interrupt()
            try:
                if scope["method"] != "POST":  # type: ignore[typeddict-item]
                    raise MethodNotAllowed("Only POST is allowed here.", headers={"allow": "POST"})
                principal = keyring.authenticate(scope["headers"])
                body = await read_body(scope, receive, server, interrupt)
                started = clock()
                payload, unknown = read_request(endpoint, body)
            except Exception as exc:
                error = exc if isinstance(exc, GatewayError) else unexpected(exc)
                request_id = f"req_{secrets.token_hex(16)}"
                telemetry.refuse(endpoint, request_id, None if principal is None else principal.name, started, error)
                await ErrorResponse(error, request_id_of(scope["headers"]) or request_id)(scope, receive, send)
                return
            given_id = request_id_of(scope["headers"])
            call = Call(endpoint, principal, payload, unknown, given_id=given_id, clock=clock, started=started)
            telemetry.begin(call, scope["headers"])
            try:
                await Answer(call, pipeline.answer(call), server, interrupt, shutdown)(scope, receive, send)
            finally:
                telemetry.over(call)

        return asgi(f"/v1/{endpoint.path}", copy_scope=False)(answer)

    return [route(endpoint) for endpoint in ENDPOINTS]

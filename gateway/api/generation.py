"""What do the endpoints that generate take and give: chat completions, completions, embeddings?"""

from collections.abc import Awaitable

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Receive, Scope, Send

from gateway.api.answer import Answer, Stream
from gateway.api.body import read_body
from gateway.api.client import client_of
from gateway.api.errors import ErrorResponse, new_request_id, request_id_of, unexpected
from gateway.api.shutdown import Shutdown
from gateway.auth import Keyring, Principal, joined
from gateway.call import Call
from gateway.errors import GatewayError, InvalidRequest, MalformedBody, MethodNotAllowed
from gateway.interrupt import Interrupt
from gateway.pipeline import Pipeline
from gateway.schema.endpoint import ENDPOINTS, Endpoint
from gateway.schema.reading import model_in, read_request
from gateway.settings import Server
from gateway.telemetry import Telemetry


def generation_apps(
    keyring: Keyring, pipeline: Pipeline, server: Server, shutdown: Shutdown, telemetry: Telemetry
) -> dict[str, ASGIApp]:
    """An ASGI application for each path, since they read and answer by themselves."""
    clock = telemetry.clock

    def app(endpoint: Endpoint) -> ASGIApp:
        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            started = clock()
            principal: Principal | None = None
            fields, client = joined(scope["headers"]), client_of(scope)
            interrupt = Interrupt(client.loop)
            try:
                if scope["method"] != "POST":  # type: ignore[typeddict-item]
                    raise MethodNotAllowed("Only POST is allowed here.", headers={"allow": "POST"})
                principal = keyring.identify(fields)
                body = await read_body(fields, client, receive, server, interrupt)
                started = clock()
                try:
                    payload, unknown = read_request(endpoint, body)
                except MalformedBody:
                    raise
                except InvalidRequest:  # a model that is not there goes before a parameter that is wrong
                    if (model := model_in(body)) is not None:
                        pipeline.check_model(model, principal)
                    raise
            except Exception as exc:
                error = exc if isinstance(exc, GatewayError) else unexpected(exc)
                request_id = new_request_id()
                telemetry.refuse(endpoint, request_id, None if principal is None else principal.name, started, error)
                await ErrorResponse(error, request_id_of(fields) or request_id)(scope, receive, send)
                return
            call = Call(
                endpoint,
                principal,
                payload,
                unknown,
                given_id=request_id_of(fields),
                cache_control=fields.get(b"cache-control", b""),
                clock=clock,
                started=started,
            )
            telemetry.begin(call, fields.items())
            try:
                await (Stream if call.streamed else Answer)(call, pipeline.answer(call), server, interrupt, shutdown)(
                    scope, receive, send
                )
            finally:
                pipeline.settle(call)
                telemetry.over(call)

        return answer

    return {f"/v1/{endpoint.path}": app(endpoint) for endpoint in ENDPOINTS}


class Shortcut:
    """Around *app*: a request for exactly one of *paths* goes straight there, which saves it a tenth of its cost."""

    def __init__(self, app: ASGIApp, paths: dict[str, ASGIApp]) -> None:
        self._app = app
        self._paths = paths

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        app = self._paths.get(scope["path"], self._app) if scope["type"] == ScopeType.HTTP else self._app
        return app(scope, receive, send)

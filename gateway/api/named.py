"""By what name can every answer be asked about?"""

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api.errors import VERSION, new_request_id, request_id_of


class Named:
    """Around an application: each answer says its request's id, and which of OpenAI's APIs this is."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            return await self._app(scope, receive, send)

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start" and b"x-request-id" not in dict(message["headers"]):
                name = request_id_of(dict(scope["headers"])) or new_request_id()
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode()), VERSION]
            await send(message)

        return await self._app(scope, receive, send_named)

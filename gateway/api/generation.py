"""What do the endpoints that generate take and give: chat completions, completions, embeddings?"""

from typing import Any

from litestar import Request, post
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp

from gateway.api.answer import Answer
from gateway.api.body import read_body
from gateway.auth import Keyring
from gateway.call import Call
from gateway.pipeline import Pipeline
from gateway.schema.endpoint import CHAT, COMPLETIONS, EMBEDDINGS, Endpoint
from gateway.schema.reading import read_request
from gateway.settings import Server

AnyRequest = Request[Any, Any, Any]


def generation_routes(keyring: Keyring, pipeline: Pipeline, server: Server) -> list[HTTPRouteHandler]:
    async def answer(request: AnyRequest, endpoint: Endpoint) -> ASGIApp:
        principal = keyring.authenticate(request.scope["headers"])
        payload, unknown = read_request(endpoint, await read_body(request.scope, request.receive, server))
        call = Call(endpoint, principal, payload, unknown)
        return Answer(call, pipeline.answer(call), server)

    @post("/v1/chat/completions", status_code=200)
    async def create_chat_completion(request: AnyRequest) -> ASGIApp:
        return await answer(request, CHAT)

    @post("/v1/completions", status_code=200)
    async def create_completion(request: AnyRequest) -> ASGIApp:
        return await answer(request, COMPLETIONS)

    @post("/v1/embeddings", status_code=200)
    async def create_embeddings(request: AnyRequest) -> ASGIApp:
        return await answer(request, EMBEDDINGS)

    return [create_chat_completion, create_completion, create_embeddings]

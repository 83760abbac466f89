"""GET /v1/models and GET /v1/models/{id}: which models may this key use?"""

from typing import Any

import msgspec
from litestar import Request, Response, get
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath

from gateway.auth import Keyring
from gateway.models import Model, Models


def model_routes(keyring: Keyring, models: Models) -> list[HTTPRouteHandler]:
    @get("/v1/models")
    async def list_models(request: Request[Any, Any, Any]) -> Response[bytes]:
        principal = keyring.authenticate(request.scope["headers"])
        return _json({"object": "list", "data": [_entry(model) for model in models.of(principal)]})

    @get("/v1/models/{model_id:path}")
    async def retrieve_model(request: Request[Any, Any, Any], model_id: FromPath[str]) -> Response[bytes]:
        principal = keyring.authenticate(request.scope["headers"])
        return _json(_entry(models.get(model_id.removeprefix("/"), principal)))

    return [list_models, retrieve_model]


def _entry(model: Model) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "suiron"}


def _json(document: dict[str, Any]) -> Response[bytes]:
    headers = {"openai-processing-ms": "0"}  # a lookup in memory
    return Response(msgspec.json.encode(document), media_type="application/json", headers=headers)

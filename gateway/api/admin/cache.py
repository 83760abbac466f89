"""DELETE /admin/v1/cache: which kept answers are to be given no more?"""

import logging
from typing import Any

import msgspec
from litestar import Request, Response, delete
from litestar.handlers import HTTPRouteHandler

from gateway.auth import Keyring
from gateway.cache import Cache
from gateway.errors import CacheUnavailable, InvalidRequest
from gateway.stores import StoreUnavailable

logger = logging.getLogger("suiron")

BY = ("model", "key", "team")


def cache_routes(keyring: Keyring, cache: Cache) -> list[HTTPRouteHandler]:
    @delete("/admin/v1/cache", status_code=200)
    async def forget(request: Request[Any, Any, Any]) -> Response[bytes]:
        """Those of a model, of a team, of a key (and its team, which shares them), or without a query all."""
        admin = keyring.authenticate_admin(request.scope["headers"])
        by, name = _asked(request)
        try:
            if by is None:
                await cache.forget()
            elif by == "model":
                await cache.forget(model=name)
            else:
                await cache.forget(tenant=keyring.tenant_of(by, name))
        except LookupError:
            raise InvalidRequest(f"There is no {by} '{name[:100]}'.", param=by, code="not_found") from None
        except StoreUnavailable:
            raise CacheUnavailable from None
        logger.info("%s has kept answers forgotten: %s", admin, "all" if by is None else f"of {by} {name}")
        document = {"object": "cache", "deleted": True} | ({} if by is None else {by: name})
        told = {"cache-control": "no-store"}
        return Response(msgspec.json.encode(document), media_type="application/json", headers=told)

    return [forget]


def _asked(request: Request[Any, Any, Any]) -> tuple[str | None, str]:
    """A misspelled word must not mean all."""
    given = list(request.query_params.multi_items())
    for by, _ in given:
        if by not in BY:
            raise InvalidRequest(f"Unknown parameter: '{by[:100]}'. Known are {', '.join(BY)}.", param=by[:100])
    if len(given) > 1:
        raise InvalidRequest(f"Give one of {', '.join(BY)}, or nothing for all.", param=given[1][0])
    return given[0] if given else (None, "")

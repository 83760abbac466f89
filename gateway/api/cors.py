"""Which pages of other sites may call from a browser? Those that the configuration names, and by default none."""

import re

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api.errors import Headers

VARY = (b"vary", b"origin")
READABLE = (
    b"x-request-id, openai-processing-ms, openai-version, retry-after, retry-after-ms, x-should-retry, "
    b"x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, "
    b"x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens, "
    b"x-suiron-ignored, x-suiron-warning, x-suiron-enforcement, x-suiron-max-completion-tokens, x-suiron-cache, age"
)
PREFLIGHT: Headers = [
    (b"access-control-allow-methods", b"GET, POST"),
    (b"access-control-max-age", b"7200"),
    (b"vary", b"access-control-request-headers"),
]
HEADER_NAMES = re.compile(rb"[A-Za-z0-9, -]{1,2000}")


class CORS:
    """
    Around an application: says to browsers which *origins* may read its answers.

    Never with credentials, so that cookies count for nothing: a page has to hold a key, as every other program.
    """

    def __init__(self, app: ASGIApp, origins: list[str]) -> None:
        self._app = app
        self._origins = frozenset(origin.encode() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            return await self._app(scope, receive, send)
        origins = [value for name, value in scope["headers"] if name == b"origin"]
        allowed: Headers = [VARY]
        if len(origins) == 1 and origins[0] in self._origins:
            allowed += [(b"access-control-allow-origin", origins[0]), (b"access-control-expose-headers", READABLE)]
            if scope["method"] == "OPTIONS" and (asked := _preflight(scope)) is not None:
                headers = [*allowed, *PREFLIGHT, *asked]
                await send({"type": "http.response.start", "status": 204, "headers": headers})
                return await send({"type": "http.response.body", "body": b"", "more_body": False})

        async def send_allowed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *allowed]
            await send(message)

        return await self._app(scope, receive, send_allowed)


def _preflight(scope: Scope) -> Headers | None:
    """What to allow of the headers that a page wants to send; None for an OPTIONS request of another kind."""
    fields = dict(scope["headers"])
    if b"access-control-request-method" not in fields:
        return None
    wanted = fields.get(b"access-control-request-headers", b"")
    return [(b"access-control-allow-headers", wanted)] if HEADER_NAMES.fullmatch(wanted) else []

"""GET /, a page to try the gateway from, and the three files it loads: who may use what is the API's to say."""

import hashlib
from importlib.resources import files
from typing import Any

from litestar import Request, Response, get
from litestar.handlers import HTTPRouteHandler

TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}

POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self'; script-src 'self'; style-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def page_routes() -> list[HTTPRouteHandler]:
    folder = files("gateway.api") / "static"
    return [
        _file("/", (folder / "page.html").read_bytes(), TYPES["html"]),
        *(_file(f"/page.{kind}", (folder / f"page.{kind}").read_bytes(), TYPES[kind]) for kind in ("css", "js", "svg")),
    ]


def _file(path: str, content: bytes, media_type: str) -> HTTPRouteHandler:
    headers = {**HEADERS, "etag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}

    @get(path)
    async def page(request: Request[Any, Any, Any]) -> Response[bytes]:
        if headers["etag"] in request.headers.get("if-none-match", ""):
            return Response(b"", status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return page

"""What is asked of an upstream, as bytes."""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import httpx2

LINES = rb"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\0\r\n]*\r\n)*"
HEADERS = re.compile(LINES)
HEAD = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+ [!-~]+ HTTP/1\.1\r\n" + LINES)
FRAMING = frozenset({b"content-length", b"transfer-encoding"})
METHODS_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})

RawHeaders = Sequence[tuple[bytes, bytes]]


class Origin(NamedTuple):
    scheme: str
    raw_host: bytes
    port: int | None


class Preamble:
    """What many requests to one address have in common: checked and written once.

    Raises LocalProtocolError where it is malformed.
    """

    def __init__(self, method: str, url: httpx2.URL, headers: RawHeaders) -> None:
        self.method = method
        self.url = url
        self.headers = headers
        self.origin = Origin(url.scheme, url.raw_host, url.port)
        self.wire = _opening(httpx2.Request(method, url, headers=list(headers), stream=httpx2.ByteStream(b"")))


class Request(httpx2.Request):
    """A request with a preamble, and *headers* of its own, none of which frames it.

    What `headers` and `stream` cost httpx2 is spent only when they are asked for; all else is ready to leave.
    """

    def __init__(self, preamble: Preamble, headers: RawHeaders, body: bytes, extensions: dict[str, Any]) -> None:
        self.method = preamble.method
        self.url = preamble.url
        self.extensions = extensions
        self.preamble = preamble
        self.own_headers = headers
        self._content = body

    @property
    def body(self) -> bytes:
        return self._content

    @cached_property
    def stream(self) -> httpx2.ByteStream:  # type: ignore[override]
        return httpx2.ByteStream(self._content)

    @cached_property
    def headers(self) -> httpx2.Headers:  # type: ignore[override]
        length = (b"content-length", b"%d" % len(self._content))
        return httpx2.Headers([*self.preamble.headers, *self.own_headers, length])


def origin_of(request: httpx2.Request) -> Origin:
    if isinstance(request, Request):
        return request.preamble.origin
    url = request.url
    return Origin(url.scheme, url.raw_host, url.port)


def head_of(request: httpx2.Request, body_bytes: int) -> bytes:
    if not isinstance(request, Request):
        return _opening(request) + _ending(request.method, body_bytes)
    lines = b"".join([b"%b: %b\r\n" % header for header in request.own_headers])
    _check(request, lines, len(request.own_headers), HEADERS)
    return request.preamble.wire + lines + _ending(request.method, body_bytes)


def _opening(request: httpx2.Request) -> bytes:
    """The framing headers are always ours: one that disagrees with the body would smuggle a second request."""
    lines = [b"%b %b HTTP/1.1\r\n" % (request.method.encode(), request.url.raw_path)]
    has_host = False
    for name, value in request.headers.raw:
        lower = name.lower()
        if lower not in FRAMING:
            lines.append(b"%b: %b\r\n" % (name, value))
            has_host = has_host or lower == b"host"
    if not has_host:
        lines.insert(1, b"host: %b\r\n" % request.url.netloc)
    opening = b"".join(lines)
    _check(request, opening, len(lines), HEAD)
    return opening


def _check(request: httpx2.Request, wire: bytes, lines: int, form: re.Pattern[bytes]) -> None:
    if wire.count(b"\n") != lines or not form.fullmatch(wire):  # a value may hide a line that is well formed
        raise httpx2.LocalProtocolError("the request line or a header is malformed", request=request)


def _ending(method: str, body_bytes: int) -> bytes:
    framed = body_bytes or method in METHODS_WITH_BODY
    return b"content-length: %d\r\n\r\n" % body_bytes if framed else b"\r\n"

"""
What is an adapter?

An adapter speaks one upstream's dialect; everything outside it speaks OpenAI's. This module is the waist of the gateway
and its only door to the HTTP client.
"""

import asyncio
import importlib
import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from types import TracebackType
from typing import Any, ClassVar, Protocol

import httpx2
import msgspec
from msgspec import Struct

from gateway import __version__, errors
from gateway.interrupt import Interrupt
from gateway.schema.chat import ChatRequest
from gateway.schema.completions import CompletionRequest
from gateway.schema.embeddings import EmbeddingRequest
from gateway.schema.endpoint import CHAT, COMPLETIONS, EMBEDDINGS, ENDPOINTS, Endpoint
from gateway.schema.payload import NULL, Part, Parts, Payload
from gateway.settings import SettingsError, Timeouts, Upstream
from gateway.sse import Event, EventReader
from gateway.transport import Transport

MAX_BODY_BYTES = 32 * 1024 * 1024
MAX_EVENT_BYTES = 1024 * 1024
MAX_ERROR_BYTES = 64 * 1024
WRITE_S = 30.0
POOL_S = 5.0

ASKS_NOTHING = frozenset(
    "user metadata store safety_identifier prompt_cache_key prompt_cache_options prompt_cache_retention".split()
)
"""Fields that ask nothing of the answer: they are for this gateway, and stay here."""

RawHeaders = list[tuple[bytes, bytes]]


class Dispatch(Struct, frozen=True, gc=False):
    """
    What an adapter is told beside the request.

    `model` is the upstream's name for it, `tenant` a hash; `deadline` is on `time.monotonic`, the event loop's clock.
    """

    model: str
    request_id: str
    attempt: int
    tenant: str
    deadline: float
    timeouts: Timeouts


class ModelFacts(Struct, frozen=True, kw_only=True):
    """`context_tokens` is None where the upstream does not tell."""

    id: str
    context_tokens: int | None = None


class UpstreamFacts(Struct, frozen=True, kw_only=True):
    """What a probe found out: `kind` is a name to print."""

    kind: str
    version: str | None = None
    models: list[ModelFacts] = []


class Adapter(Protocol):
    """
    An adapter serves an endpoint by having its method: `chat`, `complete` or `embed`, all of this one shape::

        def chat(self, request: Payload[ChatRequest], dispatch: Dispatch) -> AsyncGenerator[Parts]

    Many chunks if the request asks for a stream, else one completion, in OpenAI's shape; `id`, `created`, `model` and
    `object` may be left out, since `gateway/stream.py` mints them. Parts that arrived together come in one list.
    Raises UpstreamError, or InvalidRequest for what this target cannot honour; before the first part, another target
    may be tried. Closing the generator cancels the generation.
    """

    extra_fields: frozenset[str]
    """Parameters beyond OpenAI's that this upstream honours."""

    async def probe(self) -> UpstreamFacts:
        """What the upstream is; waits for a local model to load. Raises UpstreamError."""
        ...

    async def aclose(self) -> None: ...


class Outgoing(Struct):
    """The HTTP request that a dialect wants sent; `path` is relative to the upstream's base URL."""

    path: str
    body: bytes


class HTTPAdapter:
    """
    Base for adapters that reach their upstream over HTTP: it does all the I/O.

    A dialect overrides `encode`, `decode`, `decode_stream` and, where its errors have a shape of their own,
    `decode_error`; none of them does I/O.
    """

    extensions: ClassVar[frozenset[str]] = frozenset()
    """Parameters beyond OpenAI's that every server of this dialect honours."""

    def __init__(self, upstream: Upstream, *, transport: httpx2.AsyncBaseTransport | None = None) -> None:
        if not upstream.base_url:
            raise SettingsError(f"an upstream with the adapter '{upstream.adapter}' needs a base_url")
        self.extra_fields = self.extensions | frozenset(upstream.extra_fields)
        self.timeouts = upstream.timeouts
        self._allowed = {endpoint: (endpoint.known | self.extra_fields) - ASKS_NOTHING for endpoint in ENDPOINTS}
        self._base_url = upstream.base_url.rstrip("/")
        self._transport = transport or Transport(max_connections=upstream.max_connections)
        self._urls: dict[str, httpx2.URL] = {}
        self._extensions = {
            "timeout": {"connect": upstream.timeouts.connect_s, "read": None, "write": WRITE_S, "pool": POOL_S}
        }
        self._headers: RawHeaders = [
            (b"host", httpx2.URL(self._base_url).netloc),
            (b"user-agent", f"suiron/{__version__}".encode()),
            (b"accept-encoding", b"identity"),
        ]
        if upstream.api_key is not None:
            self._headers.append((b"authorization", f"Bearer {upstream.api_key.reveal()}".encode()))

    def chat(self, request: Payload[ChatRequest], dispatch: Dispatch) -> AsyncGenerator[Parts]:
        return self._answer(CHAT, request, dispatch)

    def complete(self, request: Payload[CompletionRequest], dispatch: Dispatch) -> AsyncGenerator[Parts]:
        return self._answer(COMPLETIONS, request, dispatch)

    def embed(self, request: Payload[EmbeddingRequest], dispatch: Dispatch) -> AsyncGenerator[Parts]:
        return self._answer(EMBEDDINGS, request, dispatch)

    async def probe(self) -> UpstreamFacts:
        raise NotImplementedError

    async def aclose(self) -> None:
        await self._transport.aclose()

    def allowed_fields(self, endpoint: Endpoint, request: Payload[Any]) -> dict[str, Any]:
        """What of a request may go upstream, still encoded: the allow-list, and nothing that is null."""
        allowed = self._allowed[endpoint]
        return {name: raw for name, raw in request.fields().items() if name in allowed and raw != NULL}

    # The dialect.

    def encode(self, endpoint: Endpoint, request: Payload[Any], dispatch: Dispatch) -> Outgoing:
        raise NotImplementedError

    def decode(self, endpoint: Endpoint, request: Payload[Any], body: bytes) -> Part[Any]:
        raise NotImplementedError

    def decode_stream(
        self, endpoint: Endpoint, request: Payload[Any], events: AsyncIterator[list[Event]]
    ) -> AsyncGenerator[Parts]:
        raise NotImplementedError

    def decode_error(self, status: int, body: bytes, headers: Mapping[str, str]) -> errors.GatewayError:
        return upstream_error(status, read_fault(body), headers.get("retry-after"))

    # The I/O.

    async def get(self, path: str) -> bytes:
        """The body of a GET below the base URL, for probes. Raises UpstreamError."""
        loop = asyncio.get_running_loop()
        with Patience(loop.time() + self.timeouts.first_token_s) as patience:
            patience.allow(self.timeouts.first_token_s)
            response = await self._send("GET", path, b"", [])
            try:
                if response.status_code != 200:
                    raise upstream_error(response.status_code, read_fault(b""), None)
                return await _read(response, MAX_BODY_BYTES)
            finally:
                await response.aclose()

    async def _answer(self, endpoint: Endpoint, request: Payload[Any], dispatch: Dispatch) -> AsyncGenerator[Parts]:
        outgoing = self.encode(endpoint, request, dispatch)
        streamed = endpoint.streams and bool(request.value.stream)
        headers = [
            (b"content-type", b"application/json"),
            (b"accept", b"text/event-stream" if streamed else b"application/json"),
            (b"x-request-id", f"{dispatch.request_id}-{dispatch.attempt}".encode()),
            (b"content-length", b"%d" % len(outgoing.body)),
        ]
        with Patience(dispatch.deadline) as patience:
            patience.allow(dispatch.timeouts.first_token_s if streamed else dispatch.timeouts.total_s)
            response = await self._send("POST", outgoing.path, outgoing.body, headers)
            try:
                await self._refuse(response, streamed)
                if streamed:
                    events = _Events(response, patience, dispatch.timeouts.idle_s)
                    async with aclosing(self.decode_stream(endpoint, request, events)) as parts:
                        async for arrived in parts:
                            yield arrived
                else:
                    yield [self.decode(endpoint, request, await _read(response, MAX_BODY_BYTES))]
            finally:
                await response.aclose()

    async def _send(self, method: str, path: str, body: bytes, headers: RawHeaders) -> httpx2.Response:
        url = self._urls.get(path) or self._urls.setdefault(path, httpx2.URL(f"{self._base_url}/{path}"))
        # raw headers and a ready stream: httpx2 takes a fifth of the time that `content=` costs it
        request = httpx2.Request(
            method,
            url,
            headers=[*self._headers, *headers],
            stream=httpx2.ByteStream(body),
            extensions=self._extensions,
        )
        return await self._transport.handle_async_request(request)

    async def _refuse(self, response: httpx2.Response, streamed: bool) -> None:
        """Raises for every answer that is not the one that was asked for."""
        if response.status_code != 200:
            body = await _read_some(response, MAX_ERROR_BYTES)
            raise self.decode_error(response.status_code, body, response.headers)
        # a lookup in httpx2's headers costs more than all of this
        headers = {name.lower(): value for name, value in response.headers.raw}
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise errors.UpstreamFailed("The upstream sent an encoded answer that was not asked for.")
        content_type = headers.get(b"content-type", b"")
        if streamed and content_type and not content_type.lower().startswith(b"text/event-stream"):
            fault = read_fault(await _read(response, MAX_ERROR_BYTES))
            if fault.message:
                raise upstream_error(fault.status or 500, fault, None)
            raise errors.UpstreamFailed("The upstream answered with something else than an event stream.")


class Fault(Struct):
    """What an upstream's error body says, whatever its shape; empty where it says nothing."""

    message: str = ""
    param: str | None = None
    code: str | None = None
    status: int | None = None


def read_fault(body: bytes) -> Fault:
    """
    The error in *body*: OpenAI's `{"error": {…}}`, TGI's `{"error": text}`, old vLLM's and SGLang's flat
    `{"object": "error", "message"}`, FastAPI's `{"detail"}`.
    """
    try:
        document = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return Fault()
    if not isinstance(document, dict):
        return Fault()
    error = document.get("error") or document.get("detail") or document
    if isinstance(error, str):
        return Fault(message=error)
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return Fault()
    param, code = error.get("param"), error.get("code")
    number = code if isinstance(code, int) else error.get("http_status_code")
    return Fault(
        message=error["message"],
        param=param if isinstance(param, str) else None,
        code=code if isinstance(code, str) else None,
        status=number if isinstance(number, int) and 400 <= number < 600 else None,
    )


_OVERFLOW = re.compile(
    r"maximum context length|context.length.exceeded|exceed_context_size|context size|max_model_len|"
    r"must have less than \d+ tokens|`max_new_tokens` must be",
    re.IGNORECASE,
)


def upstream_error(status: int, fault: Fault, retry_after: str | None) -> errors.GatewayError:
    """What an upstream's status means to the client: its 4xx about the request is the client's, all else is not."""
    if status in (400, 413, 422):
        message = clean(fault.message) or "The upstream refused the request."
        if fault.code == "context_length_exceeded" or _OVERFLOW.search(fault.message):
            return errors.ContextLengthExceeded(message, param=fault.param or "messages")
        return errors.InvalidRequest(message, param=fault.param, code=fault.code)
    if status in (429, 503):
        seconds = int(retry_after) if retry_after and retry_after.isdecimal() else 1
        return errors.Overloaded("The upstream is overloaded. Try again later.", retry_after_s=min(max(seconds, 1), 30))
    if status in (408, 504):
        return errors.UpstreamTimeout("The upstream took too long to answer.")
    if status in (401, 403):
        return errors.UpstreamFailed("The upstream refused this gateway's credential. Ask its operator.")
    if status == 404:
        return errors.UpstreamFailed("The upstream does not have this model or endpoint. Ask the gateway's operator.")
    return errors.UpstreamFailed(f"The upstream failed with status {status}.")


_ADDRESS = re.compile(
    r"\w+://\S+"
    r"|(?<!\w)/(?:[\w.-]+/)+[\w.-]*"
    r"|\b\d{1,3}(?:\.\d{1,3}){3}\b(?::\d+)?"
    r"|\b[A-Za-z][\w.-]*:\d{2,5}\b"
)
"""A URL, a path, an IPv4 address, or a host with its port."""


def clean(message: str, limit: int = 300) -> str:
    """An upstream's sentence without addresses, paths and control characters, cut to *limit* characters."""
    message = _ADDRESS.sub("…", message)
    return "".join(char for char in message if char.isprintable())[:limit]


class Patience:
    """
    How long one exchange may wait, and what its failures are called.

    Between `allow` and `rest` the upstream is being waited for; the time that a slow client takes does not count. One
    timer, armed anew only when it rings early, costs a tenth of `asyncio.timeout` around every wait. Leaving the
    context translates the HTTP client's exceptions, and this is the only place that does.
    """

    def __init__(self, deadline: float) -> None:
        self._interrupt = Interrupt()
        self._loop = self._interrupt.loop
        self._deadline = deadline
        self._until: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def allow(self, seconds: float) -> None:
        self._until = until = min(self._loop.time() + seconds, self._deadline)
        if self._timer is None or self._timer.when() > until:
            self._arm(until)

    def rest(self) -> None:
        self._until = None

    def _arm(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._until is None:
            return
        if self._loop.time() < self._until:
            self._arm(self._until)
        else:
            self._interrupt.ring()

    def __enter__(self) -> "Patience":
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, _: TracebackType | None) -> None:
        self._until = None
        if self._timer is not None:
            self._timer.cancel()
        if exc is None:
            return
        if self._interrupt.caused(exc):
            raise errors.UpstreamTimeout("The upstream took too long to answer.") from exc
        if isinstance(exc, httpx2.ConnectTimeout | httpx2.ConnectError | ssl.SSLError):
            raise errors.UpstreamUnreachable("The upstream could not be reached.") from exc
        if isinstance(exc, httpx2.PoolTimeout):
            raise errors.Overloaded("All connections to the upstream are in use. Try again later.") from exc
        if isinstance(exc, httpx2.TimeoutException):
            raise errors.UpstreamTimeout("The upstream took too long to answer.") from exc
        if isinstance(exc, httpx2.TransportError):
            raise errors.UpstreamFailed("The upstream broke off before its answer was complete.") from exc
        if isinstance(exc, msgspec.MsgspecError | RecursionError | UnicodeDecodeError):
            raise errors.UpstreamFailed("The upstream's answer could not be understood.") from exc


class _Events:
    """
    The events of a response, those that arrived together in one list.

    Patience counts complete events: neither comments nor half an event prove that a generation goes on.
    """

    def __init__(self, response: httpx2.Response, patience: Patience, idle_s: float) -> None:
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        self._blocks = aiter(response.stream)
        self._reader = EventReader(MAX_EVENT_BYTES)
        self._patience = patience
        self._idle_s = idle_s
        self._begun = False

    def __aiter__(self) -> "_Events":
        return self

    async def __anext__(self) -> list[Event]:
        if self._begun:
            self._patience.allow(self._idle_s)
        while True:
            if events := self._reader.feed(await anext(self._blocks)):
                self._begun = True
                self._patience.rest()
                return events


async def _read(response: httpx2.Response, limit: int) -> bytes:
    body = await _read_some(response, limit)
    if len(body) > limit:
        raise errors.UpstreamFailed("The upstream's answer is too large.")
    return body


async def _read_some(response: httpx2.Response, limit: int) -> bytes:
    """The body, or its beginning of just over *limit* bytes: a long error is still the error that its status says."""
    body = bytearray()
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    async for block in response.stream:
        body += block
        if len(body) > limit:
            break
    return bytes(body)


def load_adapter(upstream: Upstream) -> Adapter:
    """
    Build the adapter that *upstream* names.

    `vllm` means `adapters.vllm:Adapter`; `package.module:Class` may live anywhere. Raises SettingsError.
    """
    name = upstream.adapter if ":" in upstream.adapter else f"adapters.{upstream.adapter}:Adapter"
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        if exc.name is None or not module_name.startswith(exc.name):
            raise  # something the adapter itself needs
        raise SettingsError(f"there is no adapter '{upstream.adapter}'") from None
    adapter: Adapter = getattr(module, attribute)(upstream)
    return adapter

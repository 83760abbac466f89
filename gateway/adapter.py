"""
What is an adapter?

An adapter speaks one upstream's dialect; everything outside it speaks OpenAI's. This module is the waist of the gateway
and its only door to the HTTP client.
"""

import asyncio
import importlib
import pkgutil
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from types import TracebackType
from typing import Any, Protocol

import httpx2
import msgspec
from msgspec import Struct

from gateway import __version__, errors
from gateway.faults import Fault, read_fault, told_wait, upstream_error
from gateway.interrupt import Interrupt
from gateway.schema.chat import ChatRequest
from gateway.schema.common import Usage
from gateway.schema.completions import CompletionRequest
from gateway.schema.embeddings import EmbeddingRequest
from gateway.schema.endpoint import CHAT, COMPLETIONS, EMBEDDINGS, ENDPOINTS, Endpoint
from gateway.schema.mould import Mould
from gateway.schema.payload import NULL, Part, Parts, Payload, speaks
from gateway.settings import SettingsError, Timeouts, Upstream
from gateway.sse import Event, EventReader
from gateway.transport import Transport
from gateway.transport.asking import Preamble, RawHeaders, Request
from gateway.transport.exchange import Response

MAX_BODY_BYTES = 32 * 1024 * 1024
MAX_EVENT_BYTES = 1024 * 1024
MAX_ERROR_BYTES = 64 * 1024
WRITE_S = 30.0
POOL_S = 5.0
PROBE_S = 10.0

ASKS_NOTHING = frozenset(
    "user metadata store safety_identifier prompt_cache_key prompt_cache_options prompt_cache_retention".split()
)
"""Fields that ask nothing of the answer: they are for this gateway, and stay here."""

JSON = (b"content-type", b"application/json")


class Dispatch(Struct, frozen=True, gc=False):
    """
    What an adapter is told beside the request.

    `model` is the upstream's name for it, `tenant` a hash; `deadline` is on `time.monotonic`, the event loop's clock;
    `traceparent` is W3C's, None where nothing is traced.
    """

    model: str
    request_id: str
    attempt: int
    tenant: str
    deadline: float
    timeouts: Timeouts
    traceparent: str | None = None


class Features(Struct, frozen=True, kw_only=True):
    """
    What a model can do at this upstream; None where nobody knows before it is asked.

    `vision`, `audio` and `files` are content parts that it takes; `usage_on_abort`, that the tokens of a stream that is
    cut short are known exactly.
    """

    tools: bool | None = None
    logprobs: bool | None = None
    json_schema: bool | None = None
    vision: bool | None = None
    audio: bool | None = None
    files: bool | None = None
    usage_on_abort: bool | None = None

    def joined(self, other: "Features") -> "Features":
        """With what *other* knows more or better."""
        known = {name: value for name, value in msgspec.structs.asdict(other).items() if value is not None}
        return msgspec.structs.replace(self, **known)


class ModelFacts(Struct, frozen=True, kw_only=True):
    """
    `context_tokens` is None where the upstream does not tell. `revision` is whatever tells one model from another that
    goes by the same name: where its files lie, or their digest; None where nobody tells.
    """

    id: str
    owned_by: str = ""
    context_tokens: int | None = None
    revision: str | None = None
    features: Features = Features()


class Repair(Struct, frozen=True):
    """A deviation from OpenAI that a dialect puts right: in words, and the golden of the dialect that proves it."""

    says: str
    golden: str


class UpstreamFacts(Struct, frozen=True, kw_only=True):
    """
    What a probe found out: `kind` is a name to print; `max_concurrent`, how many requests it takes at a time, where it
    tells; `repairs`, what its adapter puts right of its deviations.
    """

    kind: str
    version: str | None = None
    max_concurrent: int | None = None
    models: list[ModelFacts] = []
    repairs: tuple[Repair, ...] = ()


class Adapter(Protocol):
    """
    An adapter serves an endpoint by having its method: `chat`, `complete` or `embed`, all of this one shape::

        def chat(self, request: Payload[ChatRequest], dispatch: Dispatch) -> AsyncGenerator[Parts]

    Many chunks if the request asks for a stream, else one completion, in OpenAI's shape; `id`, `created`, `model` and
    `object` may be left out, since `gateway/stream.py` mints them. Parts that arrived together come in one list.
    Raises UpstreamError, or InvalidRequest for what this target cannot honour; before the first part, another target
    may be tried. Closing the generator cancels the generation.

    One that can tell how many tokens the prompt of such a request has may do so, without an answer to it::

        async def count(self, endpoint: Endpoint, request: Payload[Any], model: str) -> int

    *model* is the upstream's name for it. Raises a GatewayError where that cannot be told.
    """

    extra_fields: frozenset[str]
    """Parameters beyond OpenAI's that this upstream honours."""

    async def probe(self) -> UpstreamFacts:
        """What the upstream is; waits for a local model to load. Raises UpstreamError."""
        ...

    async def aclose(self) -> None: ...


class _Listed(Struct):
    id: str
    owned_by: str = ""
    max_model_len: int | None = None
    root: str | None = None


class _ModelList(Struct):
    data: list[_Listed]


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

    extensions: frozenset[str] = frozenset()
    """Parameters beyond OpenAI's that every server of this dialect honours."""

    def __init__(self, upstream: Upstream, *, transport: httpx2.AsyncBaseTransport | None = None) -> None:
        if not upstream.base_url:
            what = f"the adapter '{upstream.adapter}' needs one, such as http://host:port/v1"
            raise SettingsError(what, ("base_url",))
        self.extra_fields = self.extensions | frozenset(upstream.extra_fields)
        self.timeouts = upstream.timeouts
        self._allowed = {endpoint: (endpoint.known | self.extra_fields) - ASKS_NOTHING for endpoint in ENDPOINTS}
        self._base_url = upstream.base_url.rstrip("/")
        self._transport = transport or Transport(max_connections=upstream.max_connections)
        self._preambles: dict[tuple[str, str, bytes], Preamble] = {}
        self._extensions = {
            "timeout": {"connect": upstream.timeouts.connect_s, "read": None, "write": WRITE_S, "pool": POOL_S}
        }
        self._headers = [
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

    def features(self, model: str) -> Features:
        """What *model* can do, as far as it is configured or was found out."""
        return Features()

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

    def decode_usage(self, headers: Mapping[bytes, bytes]) -> Usage | None:
        """The usage of an answer that is not a stream, where its headers, by lower-case name, know better than it."""
        return None

    def decode_error(self, status: int, body: bytes, headers: Mapping[str, str]) -> errors.GatewayError:
        return upstream_error(status, read_fault(body), told_wait(headers, time.time()))

    # For dialects to use.

    async def read_chunks(
        self,
        endpoint: Endpoint,
        events: AsyncIterator[list[Event]],
        mend: Callable[[Any, bytes], Part[Any]] | None = None,
    ) -> AsyncGenerator[Parts]:
        """
        What OpenAI's dialect says in each event up to `[DONE]`. What came before a fault, even with it, goes out first.

        *mend* makes the part of a chunk's value and document; one that it leaves as it came may be the mould of others.

        Chunks that differ from the last in nothing but their text, as most do, are not decoded: their values can wait.
        """
        decoder = endpoint.chunks
        mould: Mould | None = None
        async for arrived in events:
            documents = [event.data for event in arrived]
            parts: Parts = []
            try:
                while True:
                    if mould is not None:
                        parts += _alike(mould, decoder, documents[len(parts) :])
                    if len(parts) == len(documents):
                        break
                    document = documents[len(parts)]
                    if document.startswith(b"[DONE]"):
                        return
                    value = self.read(decoder, document)
                    part = Part(value, document, value.usage or None) if mend is None else mend(value, document)
                    mould = Mould.of(document) if part.usage is None and part.wire is document else None
                    part.mould = mould
                    parts.append(part)
            finally:
                if parts:
                    yield parts

    def read(self, decoder: msgspec.json.Decoder[Any], document: bytes) -> Any:
        """
        The value of an answer or a chunk.

        Raises the error that *document* is, where it is one: servers send them with status 200 and within streams.
        """
        if not document.isascii():
            document.decode()  # nobody reads all of it here, but the client will
        try:
            value = decoder.decode(document)
        except msgspec.ValidationError:
            fault = read_fault(document)
            if fault.message:
                raise self.decode_error(fault.status or 500, document, {}) from None
            raise
        if value.error:
            raise self.decode_error(read_fault(document).status or 500, document, {})
        return value

    async def list_models(self, path: str = "models") -> list[ModelFacts]:
        """
        What `/models` says, with vLLM's `max_model_len` and `root` where they are there. Raises UpstreamError.

        That is how most probes begin, so it also says what an operator can mend.
        """
        try:
            listed = msgspec.json.decode(await self.get(path), type=_ModelList)
        except errors.NotServed as exc:
            raise errors.UpstreamFailed(f"It has no {path} below its base_url, which mostly ends in /v1.") from exc
        except errors.CredentialRefused as exc:
            has_key = any(name == b"authorization" for name, _ in self._headers)
            says = "It refuses the credential in api_key." if has_key else "It wants a credential: give it an api_key."
            raise errors.UpstreamFailed(says) from exc
        except msgspec.MsgspecError as exc:
            raise errors.UpstreamFailed("The upstream's list of models could not be understood.") from exc
        return [
            ModelFacts(id=model.id, owned_by=model.owned_by, context_tokens=model.max_model_len, revision=model.root)
            for model in listed.data
        ]

    # The I/O.

    async def get(self, path: str) -> bytes:
        """The body of a GET below the base URL, for probes. Raises UpstreamError."""
        return await self._fetch("GET", path, b"", min(self.timeouts.first_token_s, PROBE_S))

    async def post(self, path: str, body: bytes, timeout_s: float) -> bytes:
        """What a POST beside an answer says, such as how many tokens a prompt has. Raises a GatewayError."""
        return await self._fetch("POST", path, body, timeout_s)

    async def try_post(self, path: str, body: bytes, timeout_s: float) -> tuple[int, bytes]:
        """The status and body of a POST that may be refused, for probes; 0 where nobody could be reached."""
        try:
            return await self._once("POST", path, body, timeout_s)
        except errors.UpstreamError:
            return 0, b""

    async def _fetch(self, method: str, path: str, body: bytes, timeout_s: float) -> bytes:
        status, answer = await self._once(method, path, body, timeout_s)
        if status != 200:
            raise upstream_error(status, Fault())
        return answer

    async def _once(self, method: str, path: str, body: bytes, timeout_s: float) -> tuple[int, bytes]:
        loop = asyncio.get_running_loop()
        with Patience(loop.time() + timeout_s) as patience:
            patience.allow(timeout_s)
            response = await self._send(method, path, body, b"application/json")
            try:
                return response.status_code, await _read(response, MAX_BODY_BYTES)
            finally:
                await response.aclose()

    async def _answer(self, endpoint: Endpoint, request: Payload[Any], dispatch: Dispatch) -> AsyncGenerator[Parts]:
        outgoing = self.encode(endpoint, request, dispatch)
        streamed = endpoint.streams and bool(request.value.stream)
        headers = [(b"x-request-id", b"%b-%d" % (dispatch.request_id.encode(), dispatch.attempt))]
        if dispatch.traceparent is not None:
            headers.append((b"traceparent", dispatch.traceparent.encode()))
        with Patience(dispatch.deadline) as patience:
            patience.allow(dispatch.timeouts.first_token_s if streamed else dispatch.timeouts.total_s)
            accept = b"text/event-stream" if streamed else b"application/json"
            response = await self._send("POST", outgoing.path, outgoing.body, accept, headers)
            try:
                answer_headers = await self._refuse(response, streamed)
                if streamed:
                    events = _Events(response, patience, dispatch.timeouts.idle_s)
                    parts = self.decode_stream(endpoint, request, events)
                    try:
                        async for arrived in parts:
                            events.begun = events.begun or any(speaks(part.value) for part in arrived)
                            yield arrived
                    finally:
                        await parts.aclose()
                else:
                    part = self.decode(endpoint, request, await _read(response, MAX_BODY_BYTES))
                    part.usage = self.decode_usage(answer_headers) or part.usage
                    yield [part]
            except errors.ContextLengthExceeded as exc:
                exc.param = exc.param or endpoint.asks
                raise
            finally:
                await response.aclose()

    async def _send(
        self, method: str, path: str, body: bytes, accept: bytes, headers: RawHeaders = ()
    ) -> httpx2.Response:
        preamble = self._preambles.get((method, path, accept)) or self._preamble(method, path, accept)
        return await self._transport.handle_async_request(Request(preamble, headers, body, self._extensions))

    def _preamble(self, method: str, path: str, accept: bytes) -> Preamble:
        url = httpx2.URL(f"{self._base_url}/").join(path)
        types = [JSON, (b"accept", accept)] if method == "POST" else [(b"accept", accept)]
        self._preambles[method, path, accept] = preamble = Preamble(method, url, [*self._headers, *types])
        return preamble

    async def _refuse(self, response: httpx2.Response, streamed: bool) -> Mapping[bytes, bytes]:
        """The headers of the answer by name; raises for every answer that is not the one that was asked for."""
        if response.status_code != 200:
            body = await _read_some(response, MAX_ERROR_BYTES)
            raise self.decode_error(response.status_code, body, response.headers)
        raw = response.raw_headers if isinstance(response, Response) else response.headers.raw
        headers = {name.lower(): value for name, value in raw}
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise errors.UpstreamFailed("The upstream sent an encoded answer that was not asked for.")
        content_type = headers.get(b"content-type", b"")
        if streamed and content_type and not content_type.lower().startswith(b"text/event-stream"):
            body = await _read(response, MAX_ERROR_BYTES)
            fault = read_fault(body)
            if fault.message:
                raise self.decode_error(fault.status or 500, body, {})
            raise errors.UpstreamFailed("The upstream answered with something else than an event stream.")
        return headers


def _alike(mould: Mould, decoder: msgspec.json.Decoder[Any], documents: list[bytes]) -> Parts:
    """The first of *documents* that fit the mould, as parts."""
    texts = mould.texts_of(documents)
    return [Part(decoder, document, None, mould, text) for document, text in zip(documents, texts, strict=False)]


async def until_done(events: AsyncIterator[list[Event]], read: Callable[[bytes], Parts]) -> AsyncGenerator[Parts]:
    """What *read* makes of each event up to `[DONE]`. What came before a fault, even with it, goes out first."""
    async for arrived in events:
        parts: Parts = []
        try:
            for event in arrived:
                if event.data.startswith(b"[DONE]"):
                    return
                parts += read(event.data)
        finally:
            if parts:
                yield parts


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
        self._latest = deadline
        self._timer: asyncio.TimerHandle | None = None

    def allow(self, seconds: float) -> None:
        self._latest = min(self._loop.time() + seconds, self._deadline)
        self.go_on()

    def go_on(self) -> None:
        """Waiting again, for no longer than was allowed last."""
        self._until = until = self._latest
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

    Patience counts complete events: neither comments nor half an event prove that a generation goes on. Until `begun`,
    with the first content, they are all in the time for the first token.
    """

    def __init__(self, response: httpx2.Response, patience: Patience, idle_s: float) -> None:
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        self.begun = False
        self._blocks = aiter(response.stream)
        self._reader = EventReader(MAX_EVENT_BYTES)
        self._patience = patience
        self._idle_s = idle_s

    def __aiter__(self) -> "_Events":
        return self

    async def __anext__(self) -> list[Event]:
        if self.begun:
            self._patience.allow(self._idle_s)
        else:
            self._patience.go_on()
        while True:
            if events := self._reader.feed(await anext(self._blocks)):
                self._patience.rest()
                return events


async def _read(response: httpx2.Response, limit: int) -> bytes:
    body = await _read_some(response, limit)
    if len(body) > limit:
        raise errors.UpstreamFailed("The upstream's answer is too large.")
    return body


async def _read_some(response: httpx2.Response, limit: int) -> bytes:
    """The body, or its beginning of just over *limit* bytes: a long error is still the error that its status says."""
    blocks: list[bytes] = []
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    async for block in response.stream:
        blocks.append(block)
        limit -= len(block)
        if limit < 0:
            break
    return b"".join(blocks)


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
        known = ", ".join(found.name for found in pkgutil.iter_modules(importlib.import_module("adapters").__path__))
        what = f"there is no adapter '{upstream.adapter}'; known are: {known}; or one of your own, package.module:Class"
        raise SettingsError(what, ("adapter",)) from None
    adapter: Adapter = getattr(module, attribute)(upstream)
    return adapter

"""How is an upstream reached over HTTP? All the I/O of its exchanges; what is said in them is for the dialects."""

import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from operator import attrgetter
from typing import Any

import httpx2
import msgspec
from msgspec import Struct

from gateway import __version__, errors
from gateway.adapter.patience import Events, Vigil
from gateway.adapter.waist import Dispatch, Features, ModelFacts, UpstreamFacts
from gateway.faults import Fault, read_fault, told_wait, upstream_error
from gateway.schema.chat import ChatRequest
from gateway.schema.common import Usage
from gateway.schema.completions import CompletionRequest
from gateway.schema.embeddings import EmbeddingRequest
from gateway.schema.endpoint import CHAT, COMPLETIONS, EMBEDDINGS, ENDPOINTS, Endpoint
from gateway.schema.mould import Mould
from gateway.schema.payload import NULL, Part, Parts, Payload, speaks
from gateway.settings import SettingsError, Upstream
from gateway.sse import Event
from gateway.transport import Transport
from gateway.transport.asking import Preamble, RawHeaders, Request
from gateway.transport.exchange import Response

MAX_BODY_BYTES = 32 * 1024 * 1024
MAX_ERROR_BYTES = 64 * 1024
WRITE_S = 30.0
POOL_S = 5.0
PROBE_S = 10.0

ASKS_NOTHING = frozenset(
    "user metadata store safety_identifier prompt_cache_key prompt_cache_options prompt_cache_retention".split()
)
"""Fields that ask nothing of the answer: they are for this gateway, and stay here."""

JSON = (b"content-type", b"application/json")

_DATA = attrgetter("data")


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
        self._vigil = Vigil()
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
        self._vigil.close()
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

        Chunks that differ from the last in nothing but their text, as most do, are not decoded: of several of them, one
        after the other, there is one part.
        """
        decoder = endpoint.chunks
        mould: Mould | None = None
        begun = False
        async for arrived in events:
            documents = list(map(_DATA, arrived))
            parts: Parts = []
            place = 0
            try:
                while True:
                    if mould is not None and (texts := mould.texts_of(documents[place:])):
                        parts.append(_run(mould, decoder, texts))
                        place += len(texts)
                    if place == len(documents):
                        break
                    document = documents[place]
                    place += 1
                    if document.startswith(b"[DONE]"):
                        return
                    value = self.read(decoder, document)
                    part = Part(value, document, value.usage or None) if mend is None else mend(value, document)
                    is_mould = begun and part.usage is None and part.wire is document
                    mould = part.mould = Mould.of(document) if is_mould else None
                    begun = True  # with a chunk that is like no other
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
            raise errors.NotServed(f"It has no {path} below its base_url, which mostly ends in /v1.") from exc
        except errors.CredentialRefused as exc:
            has_key = any(name == b"authorization" for name, _ in self._headers)
            says = "It refuses the credential in api_key." if has_key else "It wants a credential: give it an api_key."
            raise errors.CredentialRefused(says) from exc
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
        with self._vigil.patience(math.inf) as patience:
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
        with self._vigil.patience(dispatch.deadline) as patience:
            patience.allow(dispatch.timeouts.first_token_s if streamed else dispatch.timeouts.total_s)
            accept = b"text/event-stream" if streamed else b"application/json"
            response = await self._send("POST", outgoing.path, outgoing.body, accept, headers)
            try:
                answer_headers = await self._refuse(response, streamed)
                if streamed:
                    events = Events(response, patience, dispatch.timeouts.idle_s)
                    parts = self.decode_stream(endpoint, request, events)
                    try:
                        async for arrived in parts:
                            events.begun = events.begun or any(map(speaks, arrived))
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


def _run(mould: Mould, decoder: msgspec.json.Decoder[Any], texts: list[bytes]) -> Part[Any]:
    if len(texts) > 1:
        return Part(decoder, b"", None, mould, texts=texts)
    return Part(decoder, mould.before + texts[0] + mould.after, None, mould, texts[0])


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

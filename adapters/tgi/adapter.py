"""How is TGI made to speak OpenAI? Chat by its chat route, completions by its native one, one choice an exchange."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from adapters.tgi import chat, generate
from adapters.tgi.asking import Asked, refuse
from adapters.tgi.faults import Overflow, ToolCutShort, fault_in
from adapters.tgi.merging import gathered
from adapters.tgi.options import Options
from gateway.adapter import Dispatch, Features, HTTPAdapter, ModelFacts, Outgoing, Repair, UpstreamFacts
from gateway.errors import GatewayError, InvalidRequest, UpstreamError, UpstreamFailed
from gateway.fanout import Tally, merged
from gateway.schema.chat import ChatChunk, ChatRequest
from gateway.schema.common import Usage
from gateway.schema.completions import Completion, CompletionRequest
from gateway.schema.embeddings import EmbeddingRequest
from gateway.schema.endpoint import CHAT, COMPLETIONS, Endpoint
from gateway.schema.payload import NULL, Part, Parts, Payload, encode_fields
from gateway.schema.reading import asks_nothing
from gateway.settings import Upstream, read_options
from gateway.sse import Event

COUNTING_S = 5.0
"""How long an answer's usage may wait for TGI to count its prompt."""


class _Info(Struct):
    """What `/info` says."""

    model_id: str
    model_sha: str | None = None
    version: str | None = None
    max_total_tokens: int | None = None
    max_stop_sequences: int = 4
    max_concurrent_requests: int | None = None


class _Templated(Struct):
    tokenize_response: list[Any]


REPAIRS = (
    Repair("stop strings cut out of the text", "chat-stop-gathered"),
    Repair("streams of tool calls ended", "chat-stream-tools"),
    Repair("empty streams of tool calls as cut short", "chat-stream-tools-empty"),
    Repair("calls of tools that a limit cuts off", "chat-tools-cut-short"),
    Repair("finish reasons of OpenAI's", "chat-stream-2-0"),
    Repair("end tokens left out of the text", "completion-stream-old"),
    Repair("events without a space, and without [DONE]", "chat-stream-2-0"),
    Repair("top_p, stop and other defaults of SDKs that it refuses", "chat-everything"),
    Repair("json_schema as its grammar", "chat-json-schema"),
    Repair("schemas that it cannot hold to refused in words", "chat-refused-schema"),
    Repair("completions through /generate", "completion"),
    Repair("best_of ranked here", "completion-best-of"),
    Repair("echo made here", "completion-echo-two-prompts"),
    Repair("errors of every shape as OpenAI's", "completion-refused-as-text"),
    Repair("a prompt beyond the context with its numbers", "completion-stream-overflow"),
    Repair("errors within a 200 stream", "chat-stream-overloaded"),
    Repair("streams without an end as errors", "chat-stream-cut"),
)


class Adapter(HTTPAdapter):
    """
    `base_url` is TGI's root, or its `/v1`.

    Whatever was asked for, each exchange yields chunks of one choice, and a client that wants the whole is given what
    they amount to: so that there is one way in which an answer is read.
    """

    extensions = generate.EXTENSIONS

    def __init__(self, upstream: Upstream, **wiring: Any) -> None:
        root = upstream.base_url.rstrip("/").removesuffix("/v1")
        super().__init__(replace(upstream, base_url=root), **wiring)
        self._options = read_options(upstream.options, Options)
        self._max_stops = 4

    def chat(self, request: Payload[ChatRequest], dispatch: Dispatch) -> AsyncGenerator[Parts]:
        fields = request.fields()
        for name in sorted(self.extra_fields):
            asks = not asks_nothing(name, msgspec.json.decode(fields.get(name, NULL)))
            refuse(name, asks, " It is in /v1/completions.")
        asked = chat.exchanges(request, dispatch)
        parts = self._collected(CHAT, asked, dispatch)
        return parts if request.value.stream else gathered(parts, chat.whole)

    def complete(self, request: Payload[CompletionRequest], dispatch: Dispatch) -> AsyncGenerator[Parts]:
        asked = generate.exchanges(request, dispatch, self._options)
        parts = self._collected(COMPLETIONS, asked, dispatch)
        return parts if request.value.stream else gathered(parts, partial(generate.whole, request.value))

    def embed(self, request: Payload[EmbeddingRequest], dispatch: Dispatch) -> AsyncGenerator[Parts]:
        raise InvalidRequest("This model does not serve /v1/embeddings.", param="model", code="unsupported_endpoint")

    async def count(self, endpoint: Endpoint, request: Payload[Any], model: str) -> int:
        """Tokens of the prompt, as TGI's routes for it say. Raises a GatewayError where that cannot be told."""
        dispatch = Dispatch(model=model, request_id="", attempt=0, tenant="", deadline=0, timeouts=self.timeouts)
        if endpoint is CHAT:
            asked: Sequence[Asked[Any]] = chat.exchanges(request, dispatch)
        else:
            asked = generate.exchanges(request, dispatch, self._options)
        prompts = Tally(asked).uncounted()
        counts = await asyncio.gather(*(self._prompt_tokens(endpoint, each, dispatch) for each in prompts))
        if 0 in counts:
            raise UpstreamFailed("The upstream does not count tokens.")
        return sum(counts)

    def features(self, model: str) -> Features:
        return Features(
            tools=True, logprobs=True, json_schema=True, vision=self._options.vision, audio=False, files=False
        )

    async def probe(self) -> UpstreamFacts:
        try:
            info = msgspec.json.decode(await self.get("info"), type=_Info)
        except (UpstreamError, msgspec.MsgspecError):
            models = [replace(model, features=self.features(model.id)) for model in await self.list_models("v1/models")]
            return UpstreamFacts(kind="TGI", models=models, repairs=REPAIRS)
        self._max_stops = info.max_stop_sequences
        features = self.features(info.model_id)
        facts = ModelFacts(
            id=info.model_id, context_tokens=info.max_total_tokens, revision=info.model_sha, features=features
        )
        return UpstreamFacts(
            kind="TGI",
            version=info.version,
            max_concurrent=info.max_concurrent_requests,
            models=[facts],
            repairs=REPAIRS,
        )

    # The dialect.

    def encode(self, endpoint: Endpoint, request: Payload[Any], dispatch: Dispatch) -> Outgoing:
        assert isinstance(request, Asked)
        lora = dispatch.model if dispatch.model in self._options.loras else None
        if endpoint is CHAT:
            fields = chat.encode(request, lora, self._options, self._max_stops)
            return Outgoing("v1/chat/completions", encode_fields(fields))
        fields = generate.encode(request, lora, self._max_stops)
        given = request.fields()
        configured = self.extra_fields - self.extensions
        fields["parameters"] |= {name: given[name] for name in configured & given.keys() if given[name] != NULL}
        return Outgoing("generate_stream" if request.value.stream else "generate", encode_fields(fields))

    def decode(self, endpoint: Endpoint, request: Payload[Any], body: bytes) -> Part[Any]:
        assert isinstance(request, Asked)
        if endpoint is not CHAT:
            return generate.Reply(request).read_whole(body)
        return chat.Reply(request).read_whole(body)

    def decode_usage(self, headers: Mapping[bytes, bytes]) -> Usage | None:
        """In the body, usage may be that of a first attempt to call a tool, which TGI threw away."""
        prompt, made = headers.get(b"x-prompt-tokens", b""), headers.get(b"x-generated-tokens", b"")
        if not (prompt.isdigit() and made.isdigit()):
            return None
        return Usage(prompt_tokens=int(prompt), completion_tokens=int(made))

    async def decode_stream(
        self, endpoint: Endpoint, request: Payload[Any], events: AsyncIterator[list[Event]]
    ) -> AsyncGenerator[Parts]:
        assert isinstance(request, Asked)
        reply = chat.Reply(request) if endpoint is CHAT else generate.Reply(request)
        async for arrived in events:
            parts: Parts = []
            try:
                for event in arrived:
                    if event.data.startswith(b"[DONE]"):
                        parts += reply.end(done=True)
                        return
                    parts += reply.read(event.data)
                    if reply.over:
                        return
            finally:
                if parts:  # also those before a fault or the end
                    yield parts
        if parts := reply.end(done=False):
            yield parts

    def decode_error(self, status: int, body: bytes, headers: Mapping[str, str]) -> GatewayError:
        return fault_in(status, body)

    # The exchanges of one answer.

    async def _collected(
        self, endpoint: Endpoint, asked: Sequence[Asked[Any]], dispatch: Dispatch
    ) -> AsyncGenerator[Parts]:
        """The chunks of all choices as they come; in the end, what nobody has counted is counted."""
        tally = Tally(asked)
        exchanges = [self._exchange(endpoint, each, dispatch) for each in asked]
        async with aclosing(merged(exchanges)) as arrivals:
            async for index, arrived in arrivals:
                for part in arrived:
                    part.usage = tally.add(asked[index], part.usage)
                yield arrived
        if uncounted := tally.uncounted():
            counts = await asyncio.gather(*(self._prompt_tokens(endpoint, each, dispatch) for each in uncounted))
            for each, prompt_tokens in zip(uncounted, counts, strict=True):
                tally.count(each, prompt_tokens)
            yield [Part.encode((ChatChunk if endpoint is CHAT else Completion)(choices=[]), tally.total())]

    async def _exchange(self, endpoint: Endpoint, asked: Asked[Any], dispatch: Dispatch) -> AsyncGenerator[Parts]:
        if endpoint is not CHAT and generate.needs_nobody(asked.value):
            yield [generate.Reply(asked).unasked()]
            return
        try:
            async with aclosing(self._answer(endpoint, asked, dispatch)) as parts:
                async for arrived in parts:
                    if endpoint is CHAT and not asked.value.stream:
                        arrived = [chat.corrected(arrived[0], asked)]
                    yield arrived
            return
        except Overflow as exc:
            if endpoint is not CHAT or not exc.room_tokens:
                raise
            limit: int | None = exc.room_tokens  # OpenAI cuts a limit that is beyond the context
        except ToolCutShort:
            if asked.value.limit is None:
                raise
            limit = None
        if limit is None:
            yield chat.Reply(asked).cut_short()
            return
        async with aclosing(self._answer(endpoint, chat.limited(asked, limit), dispatch)) as parts:
            async for arrived in parts:
                yield arrived

    async def _prompt_tokens(self, endpoint: Endpoint, asked: Asked[Any], dispatch: Dispatch) -> int:
        """As TGI counts them; 0 where it does not."""
        try:
            if endpoint is CHAT:
                body = self.encode(endpoint, asked, dispatch).body
                templated = await self.post("chat_tokenize", body, COUNTING_S)
                return len(msgspec.json.decode(templated, type=_Templated).tokenize_response)
            body = msgspec.json.encode({"inputs": asked.value.prompt})
            return len(msgspec.json.decode(await self.post("tokenize", body, COUNTING_S), type=list[Any]))
        except (GatewayError, msgspec.MsgspecError):
            return 0

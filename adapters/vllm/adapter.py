"""The dialect of vLLM: OpenAI's, written and read with care."""

import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

import msgspec
from msgspec import UNSET
from msgspec.structs import replace

from adapters.vllm.asking import (
    COUNTED,
    DROPPED,
    GUIDED,
    MOST_COUNTED,
    SAMPLING,
    TEMPLATE,
    TOKENIZING,
    USELESS,
    Options,
    check_chat,
    refuse,
    write_chat,
    write_completion,
    write_sampling,
    write_tools,
)
from adapters.vllm.drawing import Draw, Tally
from gateway.adapter import PROBE_S, Dispatch, Features, HTTPAdapter, Outgoing, Repair, UpstreamFacts, until_done
from gateway.errors import GatewayError, InvalidRequest, UpstreamError, UpstreamFailed
from gateway.faults import read_fault
from gateway.mending import mend_delta, mend_message, reason_of
from gateway.schema.common import Object, Usage
from gateway.schema.endpoint import CHAT, EMBEDDINGS, Endpoint
from gateway.schema.payload import Part, Parts, Payload, encode_fields
from gateway.schema.reading import asks_nothing
from gateway.settings import Upstream, read_options
from gateway.sse import Event

MOST_ASKED = 50
_MEMBERS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_NO_TOOLS = re.compile(r"--enable-auto-tool-choice|--tool-call-parser|tool_choice.*requires.*parser")


class _Counted(msgspec.Struct):
    count: int


REPAIRS = (
    Repair("deltas of tool calls completed", "chat-stream-tools"),
    Repair("empty lists of tool calls left out", "chat-old"),
    Repair("tools left out where none may be called", "chat-tools-none"),
    Repair("no tool calling said in OpenAI's words", "chat-tools-not-enabled"),
    Repair("reasoning under one name", "chat-stream-reasoning"),
    Repair("members that OpenAI does not have left out", "chat"),
    Repair("n at temperature 0 by copies", "chat-greedy-n"),
    Repair("the temperature that OpenAI takes for default", "chat-reasoning"),
    Repair("best_of ranked here", "completion-best-of"),
    Repair("guided_* as structured_outputs", "chat-guided"),
    Repair("usage of several choices summed", "chat-stream-n"),
    Repair("errors of every shape as OpenAI's", "chat-old-detail"),
    Repair("pydantic's complaints in one sentence", "chat-pydantic"),
    Repair("a prompt beyond the context with its numbers", "chat-context"),
    Repair("errors within a 200 stream", "chat-stream-overloaded"),
    Repair("aborted generations as errors", "chat-stream-abort"),
    Repair("streams without an end as errors", "chat-stream-unfinished"),
)


class Adapter(HTTPAdapter):
    extensions = SAMPLING | TEMPLATE | TOKENIZING | GUIDED.keys()

    def __init__(self, upstream: Upstream, **transport: Any) -> None:
        super().__init__(upstream, **transport)
        self._options = read_options(upstream.options, Options)
        self._context: dict[str, int] = {}
        self._calls_tools: dict[str, bool | None] = {}

    def features(self, model: str) -> Features:
        return Features(
            tools=self._calls_tools.get(model),
            logprobs=True,
            json_schema=True,
            vision=self._options.vision,
            audio=self._options.audio,
            files=False,
            usage_on_abort=True,
        )

    async def probe(self) -> UpstreamFacts:
        models = await self.list_models()
        self._context = {model.id: model.context_tokens for model in models if model.context_tokens}
        try:
            version = msgspec.json.decode(await self.get("../version"), type=dict[str, str]).get("version")
        except (UpstreamError, msgspec.MsgspecError):
            version = None  # behind a proxy that passes on only /v1
        for model in models[:MOST_ASKED]:
            await self._ask_for_tools(model.id)
        told = [replace(model, features=self.features(model.id)) for model in models]
        return UpstreamFacts(kind="vLLM", version=version, models=told, repairs=REPAIRS)

    async def _ask_for_tools(self, model: str) -> None:
        """
        Whether it was started with a parser of tool calls: no endpoint tells.

        A request that wants no token is refused before anything is generated, but first for this, if it is so.
        """
        if model in self._calls_tools:
            return
        asked = {
            "model": model,
            "messages": [{"role": "user", "content": "-"}],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
            "tool_choice": "auto",
            "max_tokens": 0,
        }
        status, body = await self.try_post("chat/completions", msgspec.json.encode(asked), PROBE_S)
        says = read_fault(body).message
        if 0 < status < 500:
            is_told = _NO_TOOLS.search(says) or "max_tokens" in says
            self._calls_tools[model] = not _NO_TOOLS.search(says) if is_told else None

    async def count(self, endpoint: Endpoint, request: Payload[Any], model: str) -> int:
        """Tokens of the prompt, as `/tokenize` says. Raises a GatewayError where that cannot be told."""
        fields = {name: raw for name, raw in self.allowed_fields(endpoint, request).items() if name in COUNTED}
        if endpoint is CHAT:
            check_chat(request.value, self._options)
            write_tools(fields, request.value)
            return await self._count(fields | {"model": model})
        asked = request.value.input if endpoint is EMBEDDINGS else request.value.prompt
        texts = [asked] if isinstance(asked, str) else asked
        if not texts or not all(isinstance(text, str) for text in texts) or len(texts) > MOST_COUNTED:
            raise InvalidRequest("This prompt is not counted here.", param=endpoint.asks)
        return sum([await self._count(fields | {"model": model, "prompt": text}) for text in texts])

    async def _count(self, fields: Object) -> int:
        said = await self.post("../tokenize", encode_fields(fields), self.timeouts.first_token_s)
        try:
            return msgspec.json.decode(said, type=_Counted).count
        except msgspec.MsgspecError as exc:
            raise UpstreamFailed("The upstream's count of tokens could not be understood.") from exc

    def encode(self, endpoint: Endpoint, request: Payload[Any], dispatch: Dispatch) -> Outgoing:
        asked = request.value
        fields: Object = self.allowed_fields(endpoint, request)
        for name in fields.keys() & USELESS[endpoint]:
            refuse(name, not asks_nothing(name, msgspec.json.decode(fields.pop(name))))
        fields = {name: raw for name, raw in fields.items() if name not in DROPPED}
        fields["model"] = dispatch.model
        if endpoint.streams:
            draw = Draw.of(asked)
            write_sampling(fields, asked, draw, self._options)
            if endpoint is CHAT:
                check_chat(asked, self._options)
                write_chat(fields, asked, self._context.get(dispatch.model), self._options)
            else:
                write_completion(fields, asked, draw)
            if self._options.cache_salt:
                fields["cache_salt"] = dispatch.tenant
        return Outgoing(endpoint.path, encode_fields(fields))

    def decode(self, endpoint: Endpoint, request: Payload[Any], body: bytes) -> Part[Any]:
        answer = self.read(endpoint.answers, body)
        usage = answer.usage or None
        if endpoint is EMBEDDINGS:
            return _vectors(answer, body, usage)
        draw = Draw.of(request.value)
        for choice in answer.choices:
            choice.index = choice.index or 0
            choice.finish_reason = reason_of(choice.finish_reason)
            choice.logprobs = choice.logprobs or None
            if endpoint is CHAT:
                mend_message(choice.message)
        answer.choices = draw.chosen(answer.choices)
        if draw.is_ranked and request.value.logprobs is None:
            for choice in answer.choices:
                choice.logprobs = None
        answer.usage = UNSET
        return Part.encode(answer, usage and draw.counted(usage))

    def decode_stream(
        self, endpoint: Endpoint, request: Payload[Any], events: AsyncIterator[list[Event]]
    ) -> AsyncGenerator[Parts]:
        """Chunks are encoded anew, so that nothing passes but what the schema lists; their usage is beside them."""
        draw, decoder, chat = Draw.of(request.value), endpoint.chunks, endpoint is CHAT
        tally = None if draw.is_of_one else Tally(draw)
        begun: set[tuple[int, int]] = set()

        def read(document: bytes) -> Parts:
            chunk = self.read(decoder, document)
            for choice in chunk.choices:
                choice.index = choice.index or 0
                if choice.finish_reason is not None:
                    choice.finish_reason = reason_of(choice.finish_reason)
                if chat:
                    mend_delta(choice.delta, choice.index, begun)
            usage = tally.add(chunk) if tally is not None else chunk.usage or None
            chunk.usage = UNSET
            if draw.copies == 1 or not chunk.choices:
                return [Part(chunk, msgspec.json.encode(chunk), usage)]
            return [Part.encode(replace(chunk, choices=[copy]), usage) for copy in draw.chosen(chunk.choices)]

        return until_done(events, read)

    def decode_error(self, status: int, body: bytes, headers: Mapping[str, str]) -> GatewayError:
        fault = read_fault(body)
        if _NO_TOOLS.search(fault.message):
            return InvalidRequest("This model has no tool calling here.", param="tools", code="unsupported_parameter")
        if "is not a multimodal model" in fault.message:  # after the name it has upstream
            return InvalidRequest("This model takes nothing but text.", param="messages", code="unsupported_parameter")
        return super().decode_error(status, body, headers)


def _vectors(answer: Any, body: bytes, usage: Usage | None) -> Part[Any]:
    counts = usage and {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens}
    return Part(answer, encode_fields({"data": _MEMBERS.decode(body)["data"], "usage": counts}), usage)

"""The dialect itself: OpenAI's, with what the options switch."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any
from urllib.parse import urlsplit

from msgspec import UNSET
from msgspec.structs import replace

from adapters.openai.answering import Reader
from adapters.openai.asking import Alone, split, write
from adapters.openai.options import Options, holds_for, switches
from adapters.openai.probing import Probe
from gateway.adapter import Dispatch, Features, HTTPAdapter, Outgoing, UpstreamFacts
from gateway.fanout import Tally, merged
from gateway.schema.chat import ChatRequest
from gateway.schema.completions import CompletionRequest
from gateway.schema.endpoint import CHAT, COMPLETIONS, EMBEDDINGS, Endpoint
from gateway.schema.payload import Part, Parts, Payload, encode_fields, one_by_one
from gateway.settings import Upstream, read_options
from gateway.sse import Event


class Adapter(HTTPAdapter):
    def __init__(self, upstream: Upstream, **wiring: Any) -> None:
        options = read_options(upstream.options, Options)
        if options.engine is None and urlsplit(upstream.base_url).hostname == "api.openai.com":
            options = replace(options, engine="openai")
        self._engine = options.engine
        self._switches = switches(options)
        self.extensions = self._switches.extensions
        super().__init__(upstream, **wiring)
        self._probed: dict[str, Features] = {}

    def chat(self, request: Payload[ChatRequest], dispatch: Dispatch) -> AsyncGenerator[Parts]:
        return self._exchanged(CHAT, request, dispatch)

    def complete(self, request: Payload[CompletionRequest], dispatch: Dispatch) -> AsyncGenerator[Parts]:
        return self._exchanged(COMPLETIONS, request, dispatch)

    def features(self, model: str) -> Features:
        """What of *model* is configured, or was found out."""
        given = self._switches
        seen = {name: holds_for(model, getattr(given, name)) for name in ("vision", "audio", "files")}
        lacks = {name: False for name in ("logprobs", "response_format", "tool_choice") if name in given.refuse}
        configured = Features(
            **seen, logprobs=lacks.get("logprobs"), json_schema=lacks.get("response_format"), tools=None
        )
        probed = self._probed.get(model)
        return configured if probed is None else configured.joined(probed)

    async def probe(self) -> UpstreamFacts:
        facts = await Probe(self.list_models, self.get, self.post, self._engine).facts()
        self._probed = {model.id: model.features for model in facts.models}
        models = [replace(model, features=self.features(model.id)) for model in facts.models]
        return replace(facts, models=models, repairs=self._switches.repairs)

    # The dialect.

    def encode(self, endpoint: Endpoint, request: Payload[Any], dispatch: Dispatch) -> Outgoing:
        fields = self.allowed_fields(endpoint, request)
        fields["model"] = dispatch.model
        if endpoint is not EMBEDDINGS:
            write(fields, endpoint, request, self._switches)
        return Outgoing(endpoint.path, encode_fields(fields))

    def decode(self, endpoint: Endpoint, request: Payload[Any], body: bytes) -> Part[Any]:
        value = self.read(endpoint.answers, body)
        if endpoint is EMBEDDINGS:
            return Part(value, body, value.usage or None)
        return Reader(endpoint, request, self._switches).whole(value, body)

    def decode_stream(
        self, endpoint: Endpoint, request: Payload[Any], events: AsyncIterator[list[Event]]
    ) -> AsyncGenerator[Parts]:
        return self.read_chunks(endpoint, events, Reader(endpoint, request, self._switches).chunk)

    # Several exchanges, where the server gives one choice in each.

    def _exchanged(self, endpoint: Endpoint, request: Payload[Any], dispatch: Dispatch) -> AsyncGenerator[Parts]:
        asked = split(request, self._switches)
        return self._collected(endpoint, asked, dispatch) if asked else self._answer(endpoint, request, dispatch)

    async def _collected(self, endpoint: Endpoint, asked: list[Alone], dispatch: Dispatch) -> AsyncGenerator[Parts]:
        """The chunks of all as they come; or in the end the whole answer, with the choices of all."""
        tally, streamed = Tally(asked), bool(asked[0].value.stream)
        wholes: dict[int, Any] = {}
        exchanges = [self._answer(endpoint, each, _named(dispatch, each)) for each in asked]
        async with aclosing(merged(exchanges)) as arrivals:
            async for number, together in arrivals:
                arrived = one_by_one(together)
                for part in arrived:
                    part.usage = part.usage and tally.add(asked[number], part.usage)
                    for choice in part.value.choices:
                        choice.index = asked[number].index
                    part.value.usage = UNSET
                if streamed:
                    yield [Part.encode(part.value, part.usage) for part in arrived]
                else:
                    wholes[number] = arrived[-1].value
        if not streamed:
            answer = wholes[0]
            answer.choices = [choice for _, whole in sorted(wholes.items()) for choice in whole.choices]
            total = tally.total()
            yield [Part.encode(answer, total if total.prompt_tokens else None)]


def _named(dispatch: Dispatch, alone: Alone) -> Dispatch:
    """Each exchange has a name of its own: two of the same that run at once would be one for some servers."""
    return replace(dispatch, request_id=f"{dispatch.request_id}-{alone.index}")

"""OpenAI, and every server that speaks its dialect; what one of them adds is listed as `extra_fields` in its config."""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from gateway.adapter import Dispatch, HTTPAdapter, ModelFacts, Outgoing, UpstreamFacts
from gateway.schema.endpoint import Endpoint
from gateway.schema.payload import Part, Parts, Payload, encode_fields
from gateway.sse import Event

INCLUDE_USAGE = {"include_usage": True}


UNKNOWN = "OpenAI-speaking server"
SIGNATURES = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "llamacpp": "llama.cpp",
    "library": "Ollama",
    "suiron": "Suiron",
    "openai": "OpenAI",
    "system": "OpenAI",
}


class Adapter(HTTPAdapter):
    def encode(self, endpoint: Endpoint, request: Payload[Any], dispatch: Dispatch) -> Outgoing:
        fields = self.allowed_fields(endpoint, request)
        fields["model"] = dispatch.model
        if endpoint.streams and request.value.stream:
            fields["stream_options"] = INCLUDE_USAGE
        else:
            fields.pop("stream_options", None)
        return Outgoing(endpoint.path, encode_fields(fields))

    def decode(self, endpoint: Endpoint, request: Payload[Any], body: bytes) -> Part[Any]:
        value = self.read(endpoint.answers, body)
        return Part(value, body, value.usage or None)

    def decode_stream(
        self, endpoint: Endpoint, request: Payload[Any], events: AsyncIterator[list[Event]]
    ) -> AsyncGenerator[Parts]:
        return self.read_chunks(endpoint, events)

    async def probe(self) -> UpstreamFacts:
        models = await self.list_models()
        return UpstreamFacts(kind=_kind(models[0]) if models else UNKNOWN, models=models)


def _kind(model: ModelFacts) -> str:
    """Which server it is, by how it signs its models."""
    return "TGI" if model.owned_by == model.id else SIGNATURES.get(model.owned_by, UNKNOWN)

"""OpenAI, and every server that speaks its dialect; what one of them adds is listed as `extra_fields` in its config."""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import msgspec

from gateway.adapter import Dispatch, HTTPAdapter, ModelFacts, Outgoing, UpstreamFacts, read_fault, upstream_error
from gateway.schema.endpoint import Endpoint
from gateway.schema.payload import Part, Parts, Payload, encode_fields
from gateway.sse import Event

INCLUDE_USAGE = {"include_usage": True}


class Listed(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class ModelList(msgspec.Struct):
    data: list[Listed]


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
        return _part(endpoint.answers, body)

    async def decode_stream(
        self, endpoint: Endpoint, request: Payload[Any], events: AsyncIterator[list[Event]]
    ) -> AsyncGenerator[Parts]:
        decoder = endpoint.chunks
        async for arrived in events:
            parts: Parts = []
            try:
                for event in arrived:
                    if event.data.startswith(b"[DONE]"):
                        return
                    parts.append(_part(decoder, event.data))
            finally:
                if parts:  # also those before a fault or the end
                    yield parts

    async def probe(self) -> UpstreamFacts:
        listed = msgspec.json.decode(await self.get("models"), type=ModelList)
        models = [ModelFacts(id=model.id, context_tokens=model.max_model_len) for model in listed.data]
        return UpstreamFacts(kind="OpenAI-speaking server", models=models)


def _part(decoder: msgspec.json.Decoder[Any], document: bytes) -> Part[Any]:
    """Raises the error that *document* is, where it is one: servers send them with status 200 and within streams."""
    if not document.isascii():
        document.decode()  # nobody reads all of it here, but the client will
    try:
        value = decoder.decode(document)
    except msgspec.ValidationError:
        fault = read_fault(document)
        if fault.message:
            raise upstream_error(fault.status or 500, fault, None) from None
        raise
    if value.error:
        fault = read_fault(document)
        raise upstream_error(fault.status or 500, fault, None)
    return Part(value, document, value.usage or None)

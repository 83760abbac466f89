"""Which endpoints generate, and what are the types of each?"""

from typing import Any, Literal

import msgspec
from msgspec import Struct

from gateway.schema.chat import ChatChunk, ChatCompletion, ChatRequest
from gateway.schema.completions import Completion, CompletionRequest
from gateway.schema.embeddings import EmbeddingRequest, Embeddings

Verb = Literal["chat", "complete", "embed"]


class Endpoint:
    """
    One of OpenAI's generating endpoints.

    `path` is relative to `/v1/`; `verb` is the adapter's method; `asks` is the member with what is to be answered;
    `answers` and `chunks` decode as far as the gateway reads. An endpoint that cannot be streamed has the same decoder
    for both.
    """

    def __init__(
        self,
        verb: Verb,
        path: str,
        asks: str,
        request: type[Struct],
        answer: type[Struct],
        chunk: type[Struct],
        *,
        id_prefix: str = "",
        object: str = "list",
        chunk_object: str = "list",
    ) -> None:
        self.verb = verb
        self.path = path
        self.asks = asks
        self.known = frozenset(field.name for field in msgspec.structs.fields(request))
        self.streams = "stream" in self.known
        self.requests: msgspec.json.Decoder[Any] = msgspec.json.Decoder(request)
        self.answers: msgspec.json.Decoder[Any] = msgspec.json.Decoder(answer)
        self.chunks: msgspec.json.Decoder[Any] = msgspec.json.Decoder(chunk)
        self.id_prefix = id_prefix
        self.object = object
        self.chunk_object = chunk_object


CHAT = Endpoint(
    "chat",
    "chat/completions",
    "messages",
    ChatRequest,
    ChatCompletion,
    ChatChunk,
    id_prefix="chatcmpl-",
    object="chat.completion",
    chunk_object="chat.completion.chunk",
)
COMPLETIONS = Endpoint(
    "complete",
    "completions",
    "prompt",
    CompletionRequest,
    Completion,
    Completion,
    id_prefix="cmpl-",
    object="text_completion",
    chunk_object="text_completion",
)
EMBEDDINGS = Endpoint("embed", "embeddings", "input", EmbeddingRequest, Embeddings, Embeddings)
ENDPOINTS = (CHAT, COMPLETIONS, EMBEDDINGS)


def expected_choices(request: Any) -> int:
    return texts_in(getattr(request, "prompt", None)) * (request.n or 1)


def texts_in(given: Any) -> int:
    """How many texts a `prompt` or an `input` is; a list of token ids is one."""
    return len(given) if isinstance(given, list) and not isinstance(given[0], int) else 1

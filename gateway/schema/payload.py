"""How does a JSON document travel: typed where the gateway reads it, verbatim where it forwards it?"""

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import Raw, Struct

from gateway.schema.common import Usage
from gateway.schema.mould import Mould

T = TypeVar("T", bound=Struct)

NULL = Raw(b"null")
"""To compare with: three times as fast as taking the bytes out."""

_FIELDS = msgspec.json.Decoder(dict[str, Raw])


class Payload(Struct, Generic[T]):
    """
    A JSON object: its bytes as they came, and its typed value.

    The value is a view for reading. To change the document, encode another from `fields()`.
    """

    value: T
    wire: bytes

    @classmethod
    def encode(cls, value: T) -> "Payload[T]":
        return cls(value, msgspec.json.encode(value))

    def fields(self) -> dict[str, Raw]:
        """The top-level members, each still encoded."""
        return _FIELDS.decode(self.wire)


class Part(Struct, Generic[T], gc=False):
    """
    A completion, or one chunk of a stream, in OpenAI's shape.

    `usage` is cumulative over the answer so far and private: set by the dialect whenever it knows, so that an answer
    cut short is billed rightly; it is never written to the client as such. Where a chunk has a `mould`, it came as
    that, filled; of one that was not decoded, `text` is what it is filled with, as JSON writes it. With `texts` it
    is a run of several chunks, one after the other, which fill its mould with these, and has neither value nor bytes.
    """

    _value: T | msgspec.json.Decoder[T]
    wire: bytes
    usage: Usage | None = None
    mould: Mould | None = None
    text: bytes | None = None
    texts: list[bytes] | None = None

    @property
    def value(self) -> T:
        if isinstance(self._value, msgspec.json.Decoder):
            self._value = self._value.decode(self.wire)
        return self._value

    @classmethod
    def encode(cls, value: T, usage: Usage | None = None) -> "Part[T]":
        return cls(value, msgspec.json.encode(value), usage)


Parts = list[Part[Any]]
"""Parts that arrived together, so that they can leave together; never empty, never held back for more."""


def one_by_one(parts: Parts) -> Parts:
    """The same, with each chunk of a run by itself."""
    single: Parts = []
    for part in parts:
        if part.texts is None or (mould := part.mould) is None:
            single.append(part)
        else:
            single += [Part(part._value, mould.before + text + mould.after, None, mould, text) for text in part.texts]
    return single


def speaks(part: Part[Any]) -> bool:
    """Whether an answer, or a chunk of one, says anything that nobody must be told twice: content, or an end."""
    if part.texts is not None:
        return any(part.texts)  # what its mould says besides, the chunk that it was made of has said
    choices = getattr(part.value, "choices", None)
    if choices is None:
        return True  # embeddings
    for choice in choices:
        if choice.finish_reason or getattr(choice, "message", None) is not None or getattr(choice, "text", None):
            return True
        delta = getattr(choice, "delta", None)
        if delta is not None and (
            delta.content or delta.tool_calls or delta.reasoning_content or delta.reasoning or delta.refusal
        ):
            return True
    return False


def encode_fields(fields: Mapping[str, Any]) -> bytes:
    return msgspec.json.encode(fields)

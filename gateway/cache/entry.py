"""How does an answer lie in the store?"""

import zlib
from typing import Any

import msgspec
from msgspec import Struct

from gateway.cache.track import Shape, Track
from gateway.schema.common import Usage
from gateway.stores.answers import Epochs

COMPRESS_FROM_BYTES = 1024
MAX_BYTES = 32 * 1024 * 1024
"""Of an entry, no longer compressed: one that claims to be larger is none."""


class Run(Struct, array_like=True, frozen=True, gc=False):
    """Chunks that differ in nothing but their text, which is `text`, cut into pieces of so many characters."""

    before: bytes
    after: bytes
    text: str | None
    cuts: list[int]


class Entry(Struct, array_like=True, frozen=True):
    """
    An answer, and what it is the answer to.

    `at` is when it was generated, in seconds since 1970. `tokens` are how many were generated with each piece, as far
    as the upstream told; empty where it told nothing until the end.
    """

    key: bytes
    at: float
    epochs: Epochs
    streamed: bool
    usage: Usage | None
    runs: list[Run]
    waits_ms: list[int]
    tokens: list[int]

    def track(self, decoder: "msgspec.json.Decoder[Any]") -> Track:
        """Raises MsgspecError where a chunk is none."""
        track = Track(self.streamed)
        position = 0
        for run in self.runs:
            shape = Shape(None, run.before, run.after)
            start = 0
            for length in run.cuts:
                text = None if run.text is None else run.text[start : start + length]
                start += length
                track.put(shape, text, self.waits_ms[position], self._usage(position))
                position += 1
            shape.value = decoder.decode(track.part(position - 1).wire)
        track.usage = self.usage
        return track

    def _usage(self, position: int) -> Usage | None:
        if self.usage is None or position == len(self.waits_ms) - 1:
            return self.usage
        if not self.tokens:
            return None
        prompt, said = self.usage.prompt_tokens, self.tokens[position]
        return Usage(prompt_tokens=prompt, completion_tokens=said, total_tokens=prompt + said)


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Entry)


def entry_of(key: bytes, at: float, epochs: Epochs, track: Track) -> Entry:
    tokens = [0 if usage is None else usage.completion_tokens for usage in track.usages]
    return Entry(
        key=key,
        at=at,
        epochs=epochs,
        streamed=track.streamed,
        usage=track.usage,
        runs=_runs(track),
        waits_ms=track.waits_ms,
        tokens=tokens if any(tokens[:-1]) else [],
    )


def _runs(track: Track) -> list[Run]:
    runs = []
    start = 0
    while start < len(track):
        shape, end = track.shapes[start], track.end_of_run(start)
        texts = [text for text in track.texts[start:end] if text is not None]
        if texts:
            runs.append(Run(shape.before, shape.after, "".join(texts), [len(text) for text in texts]))
        else:
            runs.append(Run(shape.before, b"", None, [0]))
        start = end
    return runs


def pack(entry: Entry) -> bytes:
    """May take milliseconds where the answer is long."""
    packed = _ENCODER.encode(entry)
    return b"\0" + packed if len(packed) < COMPRESS_FROM_BYTES else b"\1" + zlib.compress(packed, 1)


def unpack(packed: bytes) -> Entry | None:
    """None for what is no entry."""
    try:
        if packed[:1] == b"\0":
            return _DECODER.decode(packed[1:])
        if packed[:1] == b"\1":
            inflating = zlib.decompressobj()
            plain = inflating.decompress(packed[1:], MAX_BYTES)
            return _DECODER.decode(plain) if inflating.eof else None
    except (zlib.error, msgspec.MsgspecError):
        pass
    return None

"""How does an answer lie in the store?"""

import zlib

import msgspec
from msgspec import Struct

from gateway.cache.track import Track
from gateway.schema.common import Usage
from gateway.schema.endpoint import Endpoint
from gateway.schema.mould import Mould
from gateway.stores.answers import Epochs

COMPRESS_FROM_BYTES = 2048
PLAIN, COMPRESSED = b"p", b"z"
MAX_BYTES = 32 * 1024 * 1024
"""Of an entry, no longer compressed: one that claims to be larger is none."""


class Run(Struct, array_like=True, frozen=True, gc=False):
    """Chunks of one mould, their text in pieces of so many bytes; or without one, a chunk that is all `text`."""

    mould: Mould | None
    text: bytes
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

    @property
    def is_sound(self) -> bool:
        """Whether its lists fit each other."""
        pieces = 0
        for run in self.runs:
            pieces += len(run.cuts)
            if sum(run.cuts) != len(run.text) or min(run.cuts, default=0) < 0:
                return False
        return pieces == len(self.waits_ms) and len(self.tokens) in (0, pieces)

    def track(self, endpoint: Endpoint) -> Track:
        track = Track(endpoint, self.streamed)
        for run in self.runs:
            end = 0
            track.moulds += [run.mould] * len(run.cuts)
            track.texts += [run.text[end : (end := end + length)] for length in run.cuts]
        track.waits_ms = self.waits_ms
        track.usages = self._usages()
        track.usage = self.usage
        return track

    def _usages(self) -> list[Usage | None]:
        """Who takes only the beginning has had all of it, unless it is known how much that was."""
        usage = self.usage
        if usage is None or not self.tokens:
            return [usage] * len(self.waits_ms)
        prompt = usage.prompt_tokens
        told = [
            Usage(prompt_tokens=prompt, completion_tokens=said, total_tokens=prompt + said) for said in self.tokens[:-1]
        ]
        return [*told, usage]


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
        runs=[_run(track, start, end) for start, end in track.runs()],
        waits_ms=track.waits_ms,
        tokens=tokens if any(tokens[:-1]) else [],
    )


def _run(track: Track, start: int, end: int) -> Run:
    texts = track.texts[start:end]
    return Run(track.moulds[start], b"".join(texts), [len(text) for text in texts])


def pack(entry: Entry) -> bytes:
    """May take milliseconds where the answer is long."""
    plain = _ENCODER.encode(entry)
    packed = plain if len(plain) < COMPRESS_FROM_BYTES else zlib.compress(plain, 1)
    return (PLAIN if packed is plain else COMPRESSED) + zlib.crc32(packed).to_bytes(4, "big") + packed


def unpack(stored: bytes) -> Entry | None:
    """None for what is no entry, or no longer as it was."""
    form, check, packed = stored[:1], stored[1:5], stored[5:]
    if form not in (PLAIN, COMPRESSED) or zlib.crc32(packed).to_bytes(4, "big") != check:
        return None
    try:
        if form == COMPRESSED:
            inflating = zlib.decompressobj()
            packed = inflating.decompress(packed, MAX_BYTES)
            if not inflating.eof:
                return None
        entry = _DECODER.decode(packed)
    except (zlib.error, msgspec.MsgspecError):
        return None
    return entry if entry.is_sound else None

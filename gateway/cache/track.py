"""
What was said in an answer, piece by piece, in little room?

Most chunks of a stream differ from the one before in nothing but their text. Of those only the text is kept: where
*before + text + after* is, byte for byte, the chunk that came. All others are kept whole. So nothing of a chunk needs
to be understood for it to come back as it was.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from msgspec import UNSET

from gateway.schema.common import Usage
from gateway.schema.endpoint import Endpoint
from gateway.schema.payload import Part, Parts

_encode = msgspec.json.encode
PIECE_BYTES = 200
"""What a piece takes beside its text."""


class Shape:
    """The bytes that chunks have in common, around their text; all of them where there is no telling."""

    __slots__ = ("after", "before")

    def __init__(self, before: bytes, after: bytes = b"") -> None:
        self.before = before
        self.after = after


class Track:
    """
    The pieces of one answer, as they come or as they were kept.

    *streamed* says whether they are the chunks of a stream; else there is one, the whole. `waits_ms` is how long each
    piece was waited for, 0 where it came with the one before; `usages`, what was used by then, None if nobody said.
    """

    def __init__(self, endpoint: Endpoint, streamed: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.streamed = streamed
        self.shapes: list[Shape] = []
        self.texts: list[str | None] = []
        self.waits_ms: list[int] = []
        self.usages: list[Usage | None] = []
        self.usage: Usage | None = None
        self.size_bytes = 0
        self.finishes: dict[int, str] = {}
        """Of each choice that has ended: why."""
        self._decoder = endpoint.chunks if streamed else endpoint.answers
        self._clock = clock
        self._last = clock()

    def __len__(self) -> int:
        return len(self.texts)

    def add(self, arrived: Parts) -> None:
        now = self._clock()
        wait_ms, self._last = round((now - self._last) * 1000), now
        for part in arrived:
            self._add(part, wait_ms)
            wait_ms = 0

    def _add(self, part: Part[Any], wait_ms: int) -> None:
        wire, value = part.wire, part.value
        text = _text_of(value) if self.streamed else None
        shape = self.shapes[-1] if self.shapes else None
        if text is not None:
            written = _encode(text)
            if shape is None or self.texts[-1] is None or shape.before + written + shape.after != wire:
                before, found, after = wire.partition(written)
                shape = Shape(before, after) if found else None
        if text is None or shape is None:
            text, shape = None, Shape(wire)
        if not self.shapes or shape is not self.shapes[-1]:
            self.size_bytes += len(shape.before) + len(shape.after)
        self.size_bytes += PIECE_BYTES + (len(text) if text else 0)
        self.put(shape, text, wait_ms, part.usage)
        for place, choice in enumerate(getattr(value, "choices", ())):
            if choice.finish_reason:
                self.finishes[place if choice.index is UNSET else choice.index] = choice.finish_reason

    def put(self, shape: Shape, text: str | None, wait_ms: int, usage: Usage | None) -> None:
        self.shapes.append(shape)
        self.texts.append(text)
        self.waits_ms.append(wait_ms)
        self.usages.append(usage)
        if usage is not None:
            self.usage = usage

    def part(self, position: int) -> Part[Any]:
        """One piece, for one reader to change."""
        shape, text = self.shapes[position], self.texts[position]
        wire = shape.before if text is None else shape.before + _encode(text) + shape.after
        return Part(self._decoder.decode(wire), wire, self.usages[position])

    def parts(self, start: int, end: int) -> Parts:
        return [self.part(position) for position in range(start, end)]

    def end_of_run(self, start: int) -> int:
        """Behind the last of the pieces from *start* on that have one shape."""
        end = start + 1
        while end < len(self) and self.shapes[end] is self.shapes[start]:
            end += 1
        return end

    def joined(self) -> Iterator[bytes]:
        """The chunks, with those that differ in their text alone made one: it says the same at once."""
        start = 0
        while start < len(self):
            shape, end = self.shapes[start], self.end_of_run(start)
            texts = [text for text in self.texts[start:end] if text is not None]
            yield shape.before + _encode("".join(texts)) + shape.after if texts else shape.before
            start = end


def _text_of(value: Any) -> str | None:
    """The text of a chunk with one choice; None where there is none, or no telling."""
    choices = value.choices
    if len(choices) != 1 or choices[0].finish_reason:
        return None
    delta = getattr(choices[0], "delta", None)
    if delta is None:
        text: str | None = choices[0].text
        return text
    if delta.tool_calls is not UNSET:
        return None
    text = delta.content or delta.reasoning_content or delta.reasoning or delta.content
    return text if isinstance(text, str) else None

"""
What was said in an answer, piece by piece, in little room?

Most chunks of a stream differ from the one before in nothing but their text. Of those only the text is kept, beside the
mould that all of them fit; the others are kept whole. Either way they come back byte for byte.
"""

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

from msgspec import UNSET

from gateway.schema.common import Usage
from gateway.schema.endpoint import Endpoint
from gateway.schema.mould import Mould
from gateway.schema.payload import Part, Parts, one_by_one

PIECE_BYTES = 120
"""What a piece takes beside its text."""
FEWEST_IN_RUN = 3


class Track:
    """
    The pieces of one answer, as they come or as they were kept.

    *streamed* says whether they are the chunks of a stream; else there is one, the whole. Of each there is its mould,
    and its text; None for the mould where the text is all of it. `waits_ms` is how long it was waited for, 0 where it
    came with the one before; `usages`, what was used by then, None if nobody said. `finishes` is why each choice ended.
    """

    def __init__(self, endpoint: Endpoint, streamed: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.streamed = streamed
        self.moulds: list[Mould | None] = []
        self.texts: list[bytes] = []
        self.waits_ms: list[int] = []
        self.usages: list[Usage | None] = []
        self.usage: Usage | None = None
        self.finishes: dict[int, str] = {}
        self.size_bytes = 0
        self._decoder = endpoint.chunks if streamed else endpoint.answers
        self._clock = clock
        self._last = clock()

    def __len__(self) -> int:
        return len(self.texts)

    def add(self, arrived: Parts) -> None:
        now = self._clock()
        wait_ms, self._last = round((now - self._last) * 1000), now
        for part in one_by_one(arrived):
            mould = self.moulds[-1] if self.moulds else None
            text = None if mould is None else part.text if part.mould is mould else mould.text_of(part.wire)
            if text is None:
                mould, text = self._new(part)
            self.size_bytes += PIECE_BYTES + len(text)
            self.put(mould, text, wait_ms, part.usage)
            wait_ms = 0

    def _new(self, part: Part[Any]) -> tuple[Mould | None, bytes]:
        """The mould and the text of a piece that is not like the one before."""
        for place, choice in enumerate(getattr(part.value, "choices", ())):
            if choice.finish_reason:
                self.finishes[place if choice.index is UNSET else choice.index] = choice.finish_reason
        mould = (part.mould or Mould.of(part.wire)) if self.streamed else None
        text = None if mould is None else mould.text_of(part.wire)
        if mould is None or text is None:
            return None, part.wire
        self.size_bytes += len(mould.before) + len(mould.after)
        return mould, text

    def put(self, mould: Mould | None, text: bytes, wait_ms: int, usage: Usage | None) -> None:
        self.moulds.append(mould)
        self.texts.append(text)
        self.waits_ms.append(wait_ms)
        self.usages.append(usage)
        if usage is not None:
            self.usage = usage

    def joined_by(self, other: "Track") -> "Track":
        """Both, one after the other, for who wants them whole."""
        both = copy.copy(self)
        both.moulds = self.moulds + other.moulds
        both.texts = self.texts + other.texts
        both.waits_ms = self.waits_ms + other.waits_ms
        both.usages = self.usages + other.usages
        both.usage = other.usage or self.usage
        both.finishes = self.finishes | other.finishes
        both.size_bytes = self.size_bytes + other.size_bytes
        return both

    def part(self, position: int) -> Part[Any]:
        """One piece, for one reader to change."""
        mould, text, usage = self.moulds[position], self.texts[position], self.usages[position]
        if mould is None:
            return Part(self._decoder, text, usage)
        return Part(self._decoder, mould.before + text + mould.after, usage, mould, text)

    def parts(self, start: int, end: int) -> Parts:
        return [self.part(position) for position in range(start, end)]

    def in_runs(self, start: int, end: int) -> Parts:
        """The same pieces, with those of one mould in one part."""
        parts: Parts = []
        moulds = self.moulds
        while start < end:
            mould, upto = moulds[start], start + 1
            while upto < end and mould is not None and moulds[upto] is mould:
                upto += 1
            if mould is None or upto - start < FEWEST_IN_RUN:
                parts += self.parts(start, upto)
            else:
                parts.append(Part(self._decoder, b"", None, mould, texts=self.texts[start:upto]))
            start = upto
        return parts

    def runs(self) -> Iterator[tuple[int, int]]:
        """From where to where pieces are of one mould; those without are runs by themselves."""
        start = 0
        while start < len(self):
            mould, end = self.moulds[start], start + 1
            while mould is not None and end < len(self) and self.moulds[end] is mould:
                end += 1
            yield start, end
            start = end

    def joined(self, says_nothing_else: Callable[[bytes], bool]) -> Iterator[bytes]:
        """
        The chunks, with those of one mould made one where that says the same: where what is around their text adds
        nothing to the answer, as *says_nothing_else* tells of a chunk without text.
        """
        for start, end in self.runs():
            mould, texts = self.moulds[start], self.texts[start:end]
            if mould is None:
                yield from texts
            elif len(texts) > 1 and says_nothing_else(mould.before + mould.after):
                yield mould.before + b"".join(texts) + mould.after
            else:
                yield from [mould.before + text + mould.after for text in texts]

"""Does a chunk differ from another one in nothing but its text?"""

import re
from collections.abc import Sequence
from itertools import takewhile

from msgspec import Struct

_TEXT = re.compile(rb'"(?:content|text|reasoning(?:_content)?|arguments)"\s*:\s*"')
"""What goes before a chunk's text. No string has these bytes: in one, the quotes would be escaped."""
_INSIDE = re.compile(rb'[^"\\\x00-\x1f]*(?:\\["\\/bfnrt][^"\\\x00-\x1f]*)*')
"""The inside of a JSON string, but for `\\u`, which may be half a character."""


class Mould(Struct, array_like=True, frozen=True, gc=False):
    """A valid chunk before and after its text: whatever valid text is between them, it is as valid."""

    before: bytes
    after: bytes
    shortest: int

    @classmethod
    def of(cls, wire: bytes) -> "Mould | None":
        """None if there is no telling where the text is."""
        found = _TEXT.search(wire)
        if found is None:
            return None
        start = found.end()
        end = _INSIDE.match(wire, start).end()  # type: ignore[union-attr]  # it matches everywhere
        if wire[end : end + 1] != b'"' or _TEXT.search(wire, end) is not None:
            return None
        return cls(wire[:start], wire[end:], len(wire) - (end - start))

    def text_of(self, wire: bytes) -> bytes | None:
        """The text of a chunk, as it is written in JSON; None if it differs in more than that, or may."""
        texts = self.texts_of([wire])
        return texts[0] if texts else None

    def texts_of(self, wires: Sequence[bytes]) -> list[bytes]:
        """The texts of the first of *wires*, up to one that differs in more, or may."""
        before, after, around = self.before, self.after, self.shortest
        texts = []
        for wire in wires:
            text = wire.removeprefix(before).removesuffix(after)
            if len(wire) - len(text) != around:
                break
            texts.append(text)
        if _is_inside(b" ".join(texts)):  # none ends in a backslash: before a space, that is no escape
            return texts
        return list(takewhile(_is_inside, texts))


def _is_inside(text: bytes) -> bool:
    """Whether it may be the inside of a JSON string."""
    return _INSIDE.fullmatch(text) is not None and (text.isascii() or _is_utf8(text))


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True

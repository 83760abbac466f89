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
        places = list(_TEXT.finditer(wire))
        if len(places) != 1:
            return None
        start = places[0].end()
        end = start + len(_INSIDE.match(wire, start)[0])  # type: ignore[index]  # it matches everywhere
        return cls(wire[:start], wire[end:], len(wire) - (end - start)) if wire[end : end + 1] == b'"' else None

    def text_of(self, wire: bytes) -> bytes | None:
        """The text of a chunk, as it is written in JSON; None if it differs in more than that, or may."""
        if len(wire) < self.shortest or not wire.startswith(self.before) or not wire.endswith(self.after):
            return None
        text = wire[len(self.before) : -len(self.after)]
        return text if _is_inside(text) else None

    def texts_of(self, wires: Sequence[bytes]) -> list[bytes]:
        """The texts of the first of *wires*, up to one that differs in more, or may."""
        before, after, shortest = self.before, self.after, self.shortest
        start, end = len(before), -len(after)
        texts = []
        for wire in wires:
            if len(wire) < shortest or not wire.startswith(before) or not wire.endswith(after):
                break
            texts.append(wire[start:end])
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

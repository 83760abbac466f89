"""How is an event stream read and written?"""

from collections.abc import Iterable

from msgspec import Struct

from gateway.errors import UpstreamFailed

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


class Event(Struct, gc=False):
    """A server-sent event; `name` is the `event:` field."""

    data: bytes
    name: str = "message"


BETWEEN = b"\n\ndata: "


class EventReader:
    """
    Server-sent events out of blocks of bytes, wherever the network cut them.

    Follows the WHATWG standard: lines end in LF, CRLF or CR, a leading byte order mark and comments are dropped, the
    space after a colon is optional, an event without data is none, and one that the end cut off is dropped. Lines are
    split as bytes, since `str.splitlines` would also split at U+2028.
    """

    def __init__(self, max_event_bytes: int) -> None:
        self._max = max_event_bytes
        self._rest = b""
        self._data: list[bytes] = []
        self._size = 0
        self._name = "message"
        self._started = False
        self._after_cr = False

    def feed(self, block: bytes) -> list[Event]:
        """The events that *block* completes; raises UpstreamFailed when one is larger than allowed."""
        if not self._started:
            block = self._rest + block
            if b"\xef\xbb\xbf".startswith(block[:3]) and len(block) < 3:
                self._rest = block
                return []
            self._started, self._rest = True, b""
            block = block.removeprefix(b"\xef\xbb\xbf")
        if block and (self._after_cr or b"\r" in block):
            block = self._with_line_feeds(block)
        block = self._rest + block
        if not self._data and self._name == "message" and block.startswith(b"data: ") and block.endswith(b"\n\n"):
            documents = block[6:-2].split(BETWEEN)
            if b"\n" not in b"".join(documents):  # each has one line, as in nearly all blocks
                self._rest = b""
                return list(map(Event, documents))
        *lines, self._rest = block.split(b"\n")
        events = []
        for line in lines:
            if not line:
                if self._data:
                    events.append(Event(b"\n".join(self._data), self._name))
                self._data, self._size, self._name = [], 0, "message"
            else:
                self._field(line)
        if self._size + len(self._rest) > self._max:
            raise UpstreamFailed("The upstream sent an event that is too large.")
        return events

    def _with_line_feeds(self, block: bytes) -> bytes:
        """A CR ends its line at once; the LF that may follow, even in the next block, is part of the same end."""
        if self._after_cr:
            block = block.removeprefix(b"\n")
        self._after_cr = block.endswith(b"\r")
        return block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
            self._size += len(value)
        elif name == b"event":
            self._name = value.decode(errors="replace") or "message"


def write_events(wires: Iterable[bytes]) -> bytes:
    return b"data: " + BETWEEN.join(wires) + b"\n\n"

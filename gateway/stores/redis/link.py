"""One connection to a Redis server: commands go out back to back, replies come back in their order."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import hiredis

Answered = Callable[[Any], object]
"""Called once with the reply, which may be an error of Redis, or with Lost where there is none. Does not raise."""


def packed(*command: str | bytes | int) -> bytes:
    """A command as it is sent."""
    done: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]  # its stub knows commands of one word only
    return done


class ReplyError(Exception):
    """An error that Redis replied with; it begins with a word such as NOSCRIPT."""


class Lost(Exception):
    """No reply will come. If it was *sent*, nobody knows whether it was done. If *final*, it is not to be repeated."""

    def __init__(self, reason: str, *, sent: bool, final: bool = False) -> None:
        super().__init__(reason)
        self.sent = sent
        self.final = final


class _Nothing:
    """Not a whole reply yet."""


class Link(asyncio.Protocol):
    """
    Replies belong to commands by their order alone, so after a reply that is missing nothing can be trusted: whoever
    sees one late closes the link.

    `answered` is told of each batch how many replies were no errors, and when it was sent, by the loop's clock.
    """

    def __init__(self, closed: Callable[["Link", str], None]) -> None:
        self.answered: Callable[[int, float], None] = lambda good, sent: None
        self._loop = asyncio.get_running_loop()
        self._closed = closed
        self._reader = hiredis.Reader(replyError=ReplyError, protocolError=ValueError, notEnoughData=_Nothing)
        self._asked: deque[Answered] = deque()
        self._batches: deque[tuple[int, float]] = deque()
        self._left = 0
        self._errors = 0
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is none by its class

    def send(self, commands: list[bytes], asked: list[Answered]) -> None:
        """One write for all of them."""
        if self._transport is None:
            for answered in asked:
                answered(Lost("the server closed the connection", sent=False))
            return
        self._asked.extend(asked)
        self._batches.append((len(asked), self._loop.time()))
        if len(self._batches) == 1:
            self._left = len(asked)
        self._transport.write(b"".join(commands))

    def waits_since(self) -> float | None:
        """When the oldest command went out that has no reply, by the loop's clock."""
        return self._batches[0][1] if self._batches else None

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        gets = self._reader.gets
        try:
            while (reply := gets()) is not _Nothing:
                answered = self._asked.popleft()
                if type(reply) is ReplyError:
                    self._errors += 1
                self._left -= 1
                if not self._left:
                    self._batch_is_answered()
                answered(reply)
        except (ValueError, IndexError) as exc:  # not RESP, or a reply that nobody asked for
            self.close(f"nonsense: {exc}")

    def _batch_is_answered(self) -> None:
        count, sent = self._batches.popleft()
        if self._batches:
            self._left = self._batches[0][0]
        good, self._errors = count - self._errors, 0
        self.answered(good, sent)

    def connection_lost(self, exc: Exception | None) -> None:
        self.close(str(exc) if exc else "the server closed the connection")

    def close(self, reason: str, final: bool = False) -> None:
        """Whoever waits for a reply is told that it is lost."""
        transport, self._transport = self._transport, None
        if transport is None:
            return
        transport.abort()
        self._closed(self, reason)
        asked, self._asked = self._asked, deque()
        self._batches.clear()
        for answered in asked:
            answered(Lost(reason, sent=True, final=final))

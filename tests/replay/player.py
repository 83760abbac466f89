"""Where is an answer split, delayed, cut or silenced? A server that plays a dialect, with faults to order."""

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from socket import SO_LINGER, SOL_SOCKET
from typing import Any, Literal

from gateway.settings import Timeouts, Upstream
from tests.house import Received, UpstreamServer, head, upstream
from tests.replay.speech import Dialect, Reply

PROBES = frozenset("/v1/models /version /info /health /tokenize /chat_tokenize".split())
DONE = "[DONE]"


@dataclass(frozen=True)
class Faults:
    """
    What goes wrong, and where; bytes are counted over head and body, tokens over the events that have one.

    *split*: no write is longer; *split_at*: one write up to there, another from there. *cut_at*: the connection ends
    there, in a FIN, or in a RST if *reset*. *fail_after* so many tokens the generation fails; *freeze_after* so many
    nothing comes any more, and `freeze` is before the head, or before the body. *comments* are all that comes.
    """

    split: int | None = None
    split_at: int | None = None
    delay_s: float = 0.0
    cut_at: int | None = None
    reset: bool = False
    fail_after: int | None = None
    freeze_after: int | None = None
    freeze: Literal["head", "body"] | None = None
    comments: bool = False
    busy: bool = False
    status: int | None = None
    garbage: bytes | None = None
    without: frozenset[str] = frozenset()
    """Out of `done`, `finish`, `usage`."""
    usage: Literal["negative", "everywhere"] | None = None


NONE = Faults()


@dataclass
class Player:
    """A running server. *faults* are for the requests to come; *faults_of* may choose others for each."""

    dialect: Dialect
    server: UpstreamServer
    faults: Faults = NONE
    faults_of: Callable[[Received], Faults | None] = field(default=lambda received: None)
    length: int = 0
    """Of the latest answer, in bytes, had it had no faults of the wire."""

    @property
    def requests(self) -> list[Received]:
        """Those for an answer, and not the questions beside them."""
        return [received for received in self.server.requests if received.path not in PROBES]

    def settings(self, timeouts: Timeouts | None = None, **changes: Any) -> Upstream:
        return self.server.settings(self.dialect.adapter, timeouts, **changes)

    def forget(self) -> None:
        self.server.requests.clear()
        self.faults, self.faults_of = NONE, lambda received: None

    async def script(self, received: Received, writer: asyncio.StreamWriter) -> None:
        asked = received.json if received.body else {}
        faults = NONE if received.path in PROBES else self.faults_of(received) or self.faults
        streamed = bool(asked.get("stream")) or received.path == "/generate_stream"
        reply = self.dialect.answer(received.path, asked)
        if faults.busy:
            reply = self.dialect.busy(received.path, streamed)
        if faults.status is not None:
            reply = Reply([b"<html>Bad gateway</html>"], faults.status)
        writes = _altered(reply, faults, self.dialect.failure(received.path))
        self.length = sum(map(len, writes))
        await _Wire(writer, received, faults).play(writes, reply.opening)


@asynccontextmanager
async def playing(dialect: Dialect) -> AsyncIterator[Player]:
    async with upstream(_nothing) as server:
        player = Player(dialect, server)
        server.script = player.script
        yield player


async def _nothing(received: Received, writer: asyncio.StreamWriter) -> None:
    writer.close()


def _altered(reply: Reply, faults: Faults, failure: list[Any]) -> list[bytes]:
    """The writes of an answer: its head, and its body or each of its events, with what is left out or put in."""
    documents = list(reply.documents)
    if faults.fail_after is not None and reply.streamed:
        documents = documents[: reply.opening + faults.fail_after] + failure
    elif reply.done and "done" not in faults.without:
        documents.append(DONE)
    if "finish" in faults.without:
        documents = [_without_finish(document) for document in documents]
    if "usage" in faults.without:
        documents = [_without_usage(document) for document in documents if not _is_usage_alone(document)]
    if faults.usage is not None:
        documents = [_with_usage(document, faults.usage) for document in documents]
    if reply.streamed:
        return [_stream_head(reply), *(_chunked(_event(document)) for document in documents), b"0\r\n\r\n"]
    body = b"".join(document if isinstance(document, bytes) else _dump(document) for document in documents)
    if faults.garbage is not None:
        body = faults.garbage
    fields = {"content-type": "application/json", "content-length": str(len(body)), **reply.headers}
    return [head(reply.status, fields), body]


def _stream_head(reply: Reply) -> bytes:
    return head(reply.status, {"content-type": "text/event-stream", "transfer-encoding": "chunked", **reply.headers})


def _dump(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def _event(document: Any) -> bytes:
    if isinstance(document, bytes):
        return document
    return b"data: " + (document.encode() if document == DONE else _dump(document)) + b"\n\n"


def _chunked(block: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(block), block)


def _without_finish(document: Any) -> Any:
    if isinstance(document, dict) and document.get("details"):
        return {**document, "details": None, "generated_text": None}
    if not isinstance(document, dict) or "choices" not in document:
        return document
    choices = [{**choice, "finish_reason": None} for choice in document["choices"]]
    return {**document, "choices": choices}


def _is_usage_alone(document: Any) -> bool:
    return isinstance(document, dict) and document.get("choices") == []


def _without_usage(document: Any) -> Any:
    if not isinstance(document, dict):
        return document
    return {name: value for name, value in document.items() if name != "usage"}


def _with_usage(document: Any, which: str) -> Any:
    if not isinstance(document, dict) or "choices" not in document:
        return document
    used = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    if which == "everywhere":
        return {"usage": used, **{name: value for name, value in document.items() if name != "usage" or value}}
    return {**document, "usage": {"prompt_tokens": -1, "completion_tokens": -2, "total_tokens": -3}}


class _Wire:
    """One answer on its way out."""

    def __init__(self, writer: asyncio.StreamWriter, received: Received, faults: Faults) -> None:
        self._writer = writer
        self._received = received
        self._faults = faults
        self._sent = 0

    async def play(self, writes: list[bytes], opening: int) -> None:
        faults = self._faults
        if faults.freeze == "head":
            return await self._hang()
        if faults.garbage is not None and len(writes) > 2:
            writes = [writes[0], _chunked(faults.garbage), writes[-1]]
        if faults.comments:
            return await self._comment(writes[0])
        if faults.freeze == "body":
            writes = writes[:1]
        if faults.freeze_after is not None:
            writes = writes[: 1 + opening + faults.freeze_after]
        whole = b"".join(writes)
        if faults.split_at is not None:
            writes = [whole[: faults.split_at], whole[faults.split_at :]]
        if faults.split is not None:
            writes = [whole[start : start + faults.split] for start in range(0, len(whole), faults.split)]
        for block in writes:
            if not await self._send(block):
                return None
        if faults.freeze is not None or faults.freeze_after is not None:
            await self._hang()
        return None

    async def _send(self, block: bytes) -> bool:
        """Whether there is more to send. A block that is cut is sent up to there."""
        cut_at = self._faults.cut_at
        if cut_at is not None and self._sent + len(block) >= cut_at:
            self._writer.write(block[: cut_at - self._sent])
            await self._writer.drain()
            self._end()
            return False
        self._sent += len(block)
        self._writer.write(block)
        await self._writer.drain()
        if self._faults.delay_s:
            await asyncio.sleep(self._faults.delay_s)
        elif self._faults.split or self._faults.split_at is not None:
            for _ in range(3):  # turns in which the other side may read it alone
                await asyncio.sleep(0)
        return not self._received.gone.is_set()

    def _end(self) -> None:
        if self._faults.reset:
            self._writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
            self._writer.transport.abort()
        else:
            self._writer.close()

    async def _comment(self, opening: bytes) -> None:
        self._writer.write(opening)
        while not self._received.gone.is_set():
            self._writer.write(_chunked(b": keep-alive\n\n"))
            await self._writer.drain()
            await asyncio.sleep(0.02)

    async def _hang(self) -> None:
        await self._received.gone.wait()
        self._writer.close()

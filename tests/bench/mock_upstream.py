"""An OpenAI server that costs next to nothing: what every server under test stands in front of.

It answers whatever it is asked with the same text, ignores keys and limits, and counts what it generated
(`GET /stats`), so that a bill can be compared with the truth.

    python -m tests.bench.mock_upstream --port N [--interval-ms 0] [--one-by-one] [--tokens 32]
"""

import argparse
import asyncio
import base64
import json
import struct
from dataclasses import asdict, dataclass
from typing import cast

import httptools
import msgspec
import uvloop

PROMPT_TOKENS = 16
VECTOR = (0.5, -0.25, 0.125, 0.0)
Content = dict[str, object]
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Asked(msgspec.Struct):
    """The fields of a request that change the shape of its answer."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    input: str | list[str | int | list[int]] = ""
    encoding_format: str = "float"


@dataclass(slots=True)
class Stats:
    """What was generated so far; a paced stream counts as far as it got."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cut_short: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event in its HTTP chunk, and the tokens that were generated for it."""

    wire: bytes
    tokens: int


class Dialogue:
    """The answer of one endpoint, written out once: `plain`, and `events` by whether usage was asked for."""

    def __init__(self, model: str, tokens: int, *, chat: bool) -> None:
        self._name = "chatcmpl" if chat else "cmpl"
        self._kind = "chat.completion.chunk" if chat else "text_completion"
        self._model = model
        pieces = [f" w{index % 10}" for index in range(tokens - 1)]  # the last token ends the text, unseen
        self.text = "".join(pieces)
        self._usage = {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": tokens,
            "total_tokens": PROMPT_TOKENS + tokens,
        }
        role = {"role": "assistant", "content": "", "refusal": None}
        whole: Content = {"message": role | {"content": self.text}} if chat else {"text": self.text}
        self.plain = json_response(
            self._body(whole, "stop") | {"object": self._kind.removesuffix(".chunk"), "usage": self._usage}
        )
        parts: list[Content] = [{"delta": {"content": piece}} if chat else {"text": piece} for piece in pieces]
        opening: list[Content] = [{"delta": role}] if chat else []
        ending: Content = {"delta": {}} if chat else {"text": ""}
        self.events = {asked: self._events(opening, parts, ending, asked) for asked in (False, True)}
        self.burst = {asked: b"".join(event.wire for event in events) for asked, events in self.events.items()}

    def _body(self, content: Content, finish: str | None = None) -> dict[str, object]:
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish}
        name = f"{self._name}-B4mockmockmockmockmockmockmo"
        return {"id": name, "object": self._kind, "created": 1_700_000_000, "model": self._model, "choices": [choice]}

    def _events(self, opening: list[Content], parts: list[Content], ending: Content, usage_asked: bool) -> list[Event]:
        no_usage = {"usage": None} if usage_asked else {}
        events = [event(self._body(content) | no_usage, tokens=0) for content in opening]
        events += [event(self._body(content) | no_usage, tokens=1) for content in parts]
        events.append(event(self._body(ending, "stop") | no_usage, tokens=1))
        if usage_asked:
            events.append(event(self._body({}) | {"choices": [], "usage": self._usage}, tokens=0))
        events.append(Event(chunked(b"data: [DONE]\n\n") + chunked(b""), 0))
        return [Event(STREAM_HEAD + events[0].wire, events[0].tokens), *events[1:]]


def event(body: object, tokens: int) -> Event:
    return Event(chunked(b"data: %b\n\n" % json_bytes(body)), tokens)


def chunked(block: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(block), block)


def json_bytes(body: object) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


def json_response(body: object, status: bytes = b"200 OK") -> bytes:
    content = json_bytes(body)
    head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % (status, len(content)) + content


def error(status: bytes, message: str) -> bytes:
    detail = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return json_response({"error": detail}, status)


class Mock:
    """What all connections share: the answers, the counts, and the pace: all events at once, or one after the other."""

    def __init__(
        self, model: str = "mock-upstream-model", tokens: int = 32, *, at_once: bool = True, interval_s: float = 0.0
    ) -> None:
        self.model, self.tokens = model, tokens
        self.at_once, self.interval_s = at_once and not interval_s, interval_s
        self.dialogues = {
            b"/v1/chat/completions": Dialogue(model, tokens, chat=True),
            b"/v1/completions": Dialogue(model, tokens, chat=False),
        }
        self.stats = Stats()
        self.decode = msgspec.json.Decoder(Asked).decode

    def count(self, tokens: int) -> None:
        self.stats.requests += 1
        self.stats.prompt_tokens += PROMPT_TOKENS
        self.stats.completion_tokens += tokens

    def get(self, path: bytes) -> bytes:
        if path == b"/v1/models":
            card = {"id": self.model, "object": "model", "created": 0, "owned_by": "bench"}
            return json_response({"object": "list", "data": [card]})
        if path == b"/stats":
            return json_response(asdict(self.stats))
        return error(b"404 Not Found", "no such path")

    def embeddings(self, asked: Asked) -> bytes:
        one = isinstance(asked.input, str) or (asked.input and isinstance(asked.input[0], int))
        vector: object = VECTOR
        if asked.encoding_format == "base64":
            vector = base64.b64encode(struct.pack(f"<{len(VECTOR)}f", *VECTOR)).decode()
        rows = [{"object": "embedding", "index": i, "embedding": vector} for i in range(1 if one else len(asked.input))]
        spent = {"prompt_tokens": PROMPT_TOKENS, "total_tokens": PROMPT_TOKENS}
        self.count(tokens=0)
        return json_response({"object": "list", "data": rows, "model": self.model, "usage": spent})


class Connection(asyncio.Protocol):
    """One client's connection. Its requests are answered one after the other: no pipelining."""

    def __init__(self, mock: Mock) -> None:
        self._mock = mock
        self._parser = httptools.HttpRequestParser(self)
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.Handle | None = None
        self._path = self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is none by inheritance

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer:
            self._timer.cancel()
            self._mock.stats.cut_short += 1

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.close()

    def on_message_begin(self) -> None:
        self._path = self._body = b""

    def on_url(self, url: bytes) -> None:
        self._path += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._parser.get_method() != b"POST":
            self._transport.write(self._mock.get(self._path))
            return
        try:
            asked = self._mock.decode(self._body)
        except msgspec.DecodeError as exc:
            self._transport.write(error(b"400 Bad Request", str(exc)))
            return
        if dialogue := self._mock.dialogues.get(self._path):
            self._generate(asked, dialogue)
        elif self._path == b"/v1/embeddings":
            self._transport.write(self._mock.embeddings(asked))
        else:
            self._transport.write(error(b"404 Not Found", "no such path"))

    def _generate(self, asked: Asked, dialogue: Dialogue) -> None:
        usage_asked = bool(asked.stream_options and asked.stream_options.include_usage)
        if asked.stream and not self._mock.at_once:
            self._mock.count(tokens=0)
            self._next_event(dialogue.events[usage_asked], 0, self._loop.time())
        else:
            self._mock.count(self._mock.tokens)
            self._transport.write(dialogue.burst[usage_asked] if asked.stream else dialogue.plain)

    def _next_event(self, events: list[Event], index: int, due_s: float) -> None:
        """Write one event, and arrange for the next: due by the clock, so that a late one delays none after it."""
        self._transport.write(events[index].wire)
        self._mock.stats.completion_tokens += events[index].tokens
        index, interval_s = index + 1, self._mock.interval_s
        if index == len(events):
            self._timer = None
        elif interval_s:
            self._timer = self._loop.call_at(due_s + interval_s, self._next_event, events, index, due_s + interval_s)
        else:
            self._timer = self._loop.call_soon(self._next_event, events, index, due_s)


async def serve(mock: Mock, port: int) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Connection(mock), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--port", type=int, required=True)
    options.add_argument("--interval-ms", type=float, default=0.0)
    options.add_argument("--one-by-one", action="store_true", help="each event in a write of its own, without a pause")
    options.add_argument("--tokens", type=int, default=32)
    options.add_argument("--model", default="mock-upstream-model")
    chosen = options.parse_args()
    mock = Mock(chosen.model, chosen.tokens, at_once=not chosen.one_by_one, interval_s=chosen.interval_ms / 1000)
    uvloop.run(serve(mock, chosen.port))


if __name__ == "__main__":
    main()

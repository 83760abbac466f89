"""A running gateway, and the fakes at its two seams: an adapter that follows a script, and an upstream that does."""

import asyncio
import hashlib
import json
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
from openai import AsyncOpenAI

from gateway.adapter import Adapter, Dispatch, UpstreamFacts
from gateway.api.shutdown import Shutdown
from gateway.app import create_app
from gateway.call import Call
from gateway.ledger import Ledger
from gateway.schema.payload import Parts, Payload
from gateway.server import Gateway
from gateway.settings import Auth, Key, Model, Settings, Target, Timeouts, Upstream
from gateway.stores import LimitStore
from gateway.stream import finish
from gateway.telemetry import Telemetry

TOKEN = "sk-test-0123456789"
KEY = Key(name="alice", sha256=hashlib.sha256(TOKEN.encode()).hexdigest())
AUTH = {"authorization": f"Bearer {TOKEN}"}
HELLO: dict[str, Any] = {"model": "smart", "messages": [{"role": "user", "content": "Hi"}]}


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class House:
    """A gateway on a real socket. `openai` holds a key, and does not retry."""

    url: str
    port: int
    openai: AsyncOpenAI
    http: httpx2.AsyncClient

    async def post(self, body: Any = None, path: str = "chat/completions", **headers: str) -> httpx2.Response:
        content = body if isinstance(body, bytes) else json.dumps(HELLO if body is None else body).encode()
        sent = {**AUTH, "content-type": "application/json", **headers}
        return await self.http.post(f"{self.url}/v1/{path}", content=content, headers=sent)


@asynccontextmanager
async def running(
    settings: Settings,
    adapters: Mapping[str, Adapter] | None = None,
    telemetry: Telemetry | None = None,
    store: LimitStore | None = None,
    ledger: Ledger | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[House]:
    """A gateway with *settings*, in this event loop; *clock* is for what it remembers of upstreams."""
    shutdown = Shutdown()
    app = create_app(
        settings,
        adapters=adapters,
        telemetry=telemetry,
        store=store,
        ledger=ledger,
        shutdown=shutdown,
        clock=clock,
    )
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    port = listener.getsockname()[1]
    gateway = Gateway(app, settings.server, shutdown)
    serving = asyncio.create_task(gateway.serve(listener))
    starting = asyncio.create_task(gateway.started.wait())
    await asyncio.wait([serving, starting], return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        starting.cancel()
        serving.result()
        raise RuntimeError("the gateway did not come up: the log says why")
    url = f"http://127.0.0.1:{port}"
    try:
        async with (
            AsyncOpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0) as client,
            httpx2.AsyncClient(timeout=20) as http,
        ):
            yield House(url, port, client, http)
    finally:
        gateway.stop(0.0)
        gateway.stop()
        await serving


def settings_for(*upstreams: Upstream, **changes: Any) -> Settings:
    """One public model, `smart`, with a target `model-N` on each of *upstreams*, tried in this order, and one key."""
    names = [f"upstream-{number}" for number in range(1, len(upstreams) + 1)]
    targets = [Target(upstream=name, model=f"model-{n}", tier=n) for n, name in enumerate(names, 1)]
    return Settings(
        auth=Auth(keys=[KEY]),
        upstreams=dict(zip(names, upstreams, strict=True)),
        models={"smart": Model(targets=targets)},
        **changes,
    )


async def finished(call: Call, parts: AsyncGenerator[Parts]) -> AsyncGenerator[Parts]:
    """The parts of an answer as the client may see them."""
    answer = finish(call)
    async with aclosing(parts):
        async for arrived in parts:
            if sent := answer.rewrite(arrived):
                yield sent
            if answer.outrun:
                break
    if last := answer.end():
        yield last


class ScriptedAdapter:
    """
    Follows a script: yields each list of parts, raises each exception, waits for each event.

    Serves every endpoint with the same script; counts the calls and those that were closed.
    """

    extra_fields: frozenset[str] = frozenset()

    def __init__(self, *script: Parts | Exception | asyncio.Event) -> None:
        self.script = script
        self.requests: list[Any] = []
        self.dispatches: list[Dispatch] = []
        self.closed = 0

    @property
    def calls(self) -> int:
        return len(self.requests)

    async def chat(self, request: Payload[Any], dispatch: Dispatch) -> AsyncGenerator[Parts]:
        self.requests.append(request.value)
        self.dispatches.append(dispatch)
        try:
            for line in self.script:
                if isinstance(line, Exception):
                    raise line
                if isinstance(line, asyncio.Event):
                    await line.wait()
                else:
                    yield line
        finally:
            self.closed += 1

    complete = chat
    embed = chat

    async def probe(self) -> UpstreamFacts:
        return UpstreamFacts(kind="script")

    async def aclose(self) -> None: ...


@asynccontextmanager
async def scripted(*adapters: ScriptedAdapter, **changes: Any) -> AsyncIterator[House]:
    """A gateway whose model `smart` is answered by *adapters*, in order."""
    settings = settings_for(*(Upstream(adapter="scripted") for _ in adapters), **changes)
    async with running(settings, dict(zip(settings.upstreams, adapters, strict=True))) as house:
        yield house


@dataclass
class Received:
    """A request as an upstream saw it. `gone` is set when the other side has closed the connection."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Script = Callable[[Received, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class UpstreamServer:
    """A server that speaks HTTP/1.1 with keep-alive, and answers by a script that writes raw bytes."""

    script: Script
    port: int = 0
    requests: list[Received] = field(default_factory=list)
    connections: int = 0

    def settings(self, adapter: str = "openai", timeouts: Timeouts | None = None, **options: Any) -> Upstream:
        base_url = f"http://127.0.0.1:{self.port}/v1"
        return Upstream(adapter=adapter, base_url=base_url, timeouts=timeouts or Timeouts(), **options)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while received := await _read_request(reader):
                self.requests.append(received)
                watch = asyncio.ensure_future(self._watch(reader, received))
                try:
                    await self.script(received, writer)
                    await writer.drain()
                except (ConnectionError, RuntimeError):
                    received.gone.set()  # writing found out before the watch did
                    raise
                finally:
                    watch.cancel()
                    await asyncio.gather(watch, return_exceptions=True)
                if writer.is_closing() or received.gone.is_set():
                    return
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except RuntimeError:  # uvloop's, for writing when the other side has closed
            if not writer.is_closing():
                raise
        finally:
            self.connections -= 1
            writer.close()

    async def _watch(self, reader: asyncio.StreamReader, received: Received) -> None:
        while not reader.at_eof() and reader.exception() is None:  # noqa: ASYNC110 - reading would take what comes next
            await asyncio.sleep(0.005)
        received.gone.set()


async def _read_request(reader: asyncio.StreamReader) -> Received | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Received(method, path, headers, body)


@asynccontextmanager
async def upstream(script: Script) -> AsyncIterator[UpstreamServer]:
    fake = UpstreamServer(script)
    server = await asyncio.start_server(fake._serve, "127.0.0.1", 0)
    fake.port = server.sockets[0].getsockname()[1]
    try:
        yield fake
    finally:
        server.close()


def json_reply(document: Any, status: int = 200, **headers: str) -> Script:
    """A whole JSON answer; for the model list, what a server with `model-1` says."""

    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        answer, code = (MODEL_LIST, 200) if received.path.endswith("/models") else (document, status)
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        fields = {"content-type": "application/json", "content-length": str(len(body)), **headers}
        writer.write(head(code, fields) + body)

    return script


def stream_reply(*blocks: bytes | asyncio.Event, cut: bool = False, **headers: str) -> Script:
    """An event stream in *blocks*, each a write of its own; an event is waited for; *cut* ends it mid-body."""

    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        if received.path.endswith("/models"):
            return await json_reply({})(received, writer)
        writer.write(head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked", **headers}))
        for block in blocks:
            if isinstance(block, asyncio.Event):
                waits = [asyncio.ensure_future(event.wait()) for event in (block, received.gone)]
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for wait in waits:
                    wait.cancel()
                if received.gone.is_set():
                    return None
            else:
                writer.write(b"%x\r\n%b\r\n" % (len(block), block))
                await writer.drain()
        if cut:
            writer.close()
        else:
            writer.write(b"0\r\n\r\n")
        return None

    return script


MODEL_LIST = {"object": "list", "data": [{"id": "model-1", "object": "model", "created": 0, "owned_by": "test"}]}


def head(status: int, headers: Mapping[str, str]) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} X\r\n{lines}\r\n".encode()


def completion(content: str | None = "Hello", **changes: Any) -> dict[str, Any]:
    """A chat completion as an upstream sends it; *changes* go into its only choice."""
    message = {"role": "assistant", "content": content, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", **changes}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    envelope = {"id": "up-1", "object": "chat.completion", "created": 17, "model": "model-1"}
    return {**envelope, "choices": [choice], "usage": usage}


def chunk(delta: dict[str, Any] | None, finish: str | None = None, index: int = 0, **changes: Any) -> bytes:
    """An event with a chunk as an upstream sends it; without a delta, one without choices."""
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
    envelope = {"id": "up-1", "object": "chat.completion.chunk", "created": 17, "model": "model-1"}
    choices = [] if delta is None else [choice]
    return event({**envelope, "choices": choices, **changes})


def event(document: Any) -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


ROLE = {"role": "assistant", "content": ""}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
DONE = b"data: [DONE]\n\n"


def hello_stream() -> list[bytes]:
    """The events of a whole stream that says "Hello"."""
    return [
        chunk(ROLE),
        chunk({"content": "Hel"}),
        chunk({"content": "lo"}),
        chunk({}, "stop"),
        chunk(None, usage=USAGE),
        DONE,
    ]


def events_of(body: bytes) -> list[Any]:
    """The events of a stream that the gateway sent, decoded; `[DONE]` stays text, comments are left out."""
    found = []
    for line in body.decode().split("\n\n"):
        if line.startswith("data: "):
            text = line.removeprefix("data: ")
            assert "\n" not in text, text
            found.append(text if text == "[DONE]" else json.loads(text))
    return found

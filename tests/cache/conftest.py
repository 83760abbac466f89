"""A gateway that keeps answers, in front of an adapter that follows a script."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import msgspec

from gateway.adapter import Dispatch
from gateway.schema.common import Usage
from gateway.schema.endpoint import CHAT, Endpoint
from gateway.schema.payload import Part, Parts, Payload
from gateway.settings import Auth, Caching, Key, Model, Settings, Target, Upstream
from tests.house import HELLO, KEY, House, ScriptedAdapter, running

ALL = Caching(mode="all")
STREAM: dict[str, Any] = {**HELLO, "stream": True}
ASK_USAGE: dict[str, Any] = {**STREAM, "stream_options": {"include_usage": True}}
USED = Usage(prompt_tokens=3, completion_tokens=2, total_tokens=5)


def token(name: str) -> str:
    return f"sk-test-{name}"


def key(name: str, **more: Any) -> Key:
    return Key(name=name, sha256=hashlib.sha256(token(name).encode()).hexdigest(), **more)


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token(name)}"}


def settings_with(caching: Caching = ALL, keys: tuple[Key, ...] = (), **changes: Any) -> Settings:
    return Settings(
        auth=changes.pop("auth", Auth(keys=[KEY, *keys])),
        upstreams={"one": Upstream(adapter="scripted")},
        models={
            name: Model(targets=[Target(upstream="one", model="model-1")], cache=caching) for name in ("smart", "other")
        },
        **changes,
    )


@asynccontextmanager
async def keeping(
    adapter: ScriptedAdapter, caching: Caching = ALL, keys: tuple[Key, ...] = (), **changes: Any
) -> AsyncIterator[House]:
    """A gateway that keeps what *adapter* answers."""
    async with running(settings_with(caching, keys, **changes), {"one": adapter}) as house:
        await probed(house)
        yield house


async def probed(house: House) -> None:
    """What is found out about upstreams at the start is a part of every question."""
    async with asyncio.timeout(20):
        while (await house.http.get(f"{house.url}/health/ready")).status_code != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def whole(endpoint: Endpoint = CHAT, usage: Usage | None = USED, **answer: Any) -> Part[Any]:
    wire = msgspec.json.encode({"id": "up-1", "model": "model-1", "usage": usage, **answer})
    return Part(endpoint.answers.decode(wire), wire, usage)


def chunk(
    choices: list[dict[str, Any]], endpoint: Endpoint = CHAT, used: Usage | None = None, **rest: Any
) -> Part[Any]:
    wire = msgspec.json.encode({"id": "up-1", "model": "model-1", "choices": choices, **rest})
    return Part(endpoint.chunks.decode(wire), wire, used)


def delta(said: dict[str, Any], finish: str | None = None, index: int = 0, **more: Any) -> Part[Any]:
    """A chunk of a chat."""
    return chunk([{"index": index, "delta": said, "logprobs": None, "finish_reason": finish, **more}])


def answer(text: str = "Hello", finish: str = "stop", **message: Any) -> Part[Any]:
    said = {"role": "assistant", "content": text, "refusal": None, **message}
    return whole(choices=[{"index": 0, "message": said, "logprobs": None, "finish_reason": finish}])


def hello(*pieces: str, finish: str = "stop") -> list[Parts]:
    """The chunks of a whole stream, each arriving alone."""
    said = [delta({"content": piece}) for piece in pieces or ("Hel", "lo")]
    opening = delta({"role": "assistant", "content": ""})
    return [[part] for part in [opening, *said, delta({}, finish), chunk([], used=USED, usage=USED)]]


Script = Sequence[Parts | Exception | asyncio.Event]


class Playing(ScriptedAdapter):
    """Follows the script that *write* makes for each request; `calls` are those before it."""

    def __init__(self, write: Callable[[Any], Script]) -> None:
        super().__init__()
        self.write = write

    async def chat(self, request: Payload[Any], dispatch: Dispatch) -> AsyncGenerator[Parts]:
        self.script = tuple(self.write(request.value))
        async with aclosing(super().chat(request, dispatch)) as parts:
            async for arrived in parts:
                yield arrived

    complete = chat
    embed = chat

    async def until_closed(self, times: int = 1) -> None:
        """Within a second, no more than *times* answers have not been closed by then."""
        async with asyncio.timeout(1):
            while self.closed < times:  # noqa: ASYNC110
                await asyncio.sleep(0.005)


def both(text: str = "Hello") -> Playing:
    """Streams *text*, a character at a time, to who asks for a stream, and says it at once to others."""
    return Playing(lambda asked: hello(*text) if asked.stream else [[answer(text)]])

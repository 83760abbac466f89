"""One gateway in front of every adapter: each has a public model of its name."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from msgspec.structs import replace
from openai.types.chat import ChatCompletion

from gateway.adapter import load_adapter
from gateway.settings import Auth, Model, Settings, Target, Timeouts, Upstream
from tests.house import KEY, Clock, House, events_of, running
from tests.models import make_model
from tests.replay import CONTEXT_TOKENS, TGI, VLLM, Dialect, OpenAI, Player, Transformers, playing

OPTIONS = {"openai": {"engine": "openai"}, "transformers": {"engine": "transformers"}}
DIALECTS: dict[str, type[Dialect]] = {"vllm": VLLM, "tgi": TGI, "openai": OpenAI, "transformers": Transformers}
ADAPTERS = ["echo", "local", *DIALECTS]
TEXT = "The quick brown fox 推論 👩‍👩‍👧‍👦 jumps over 東京 🇯🇵, and rests."


@dataclass
class Contestant:
    """An adapter behind the gateway; *player* is the engine behind it, where that speaks HTTP."""

    name: str
    house: House
    player: Player | None
    clock: Clock

    async def chat(self, text: Any = TEXT, **changes: Any) -> ChatCompletion:
        answer: ChatCompletion = await self.house.openai.chat.completions.create(**self.asks(text, **changes))
        return answer

    async def chunks(self, text: Any = TEXT, **changes: Any) -> list[Any]:
        stream: Any = await self.house.openai.chat.completions.create(**self.asks(text, stream=True, **changes))
        return [chunk async for chunk in stream]

    async def complete(self, prompt: Any = TEXT, **changes: Any) -> Any:
        asked = {"model": self.name, "prompt": prompt, **changes}
        answer: Any = await self.house.openai.completions.create(**asked)
        return [chunk async for chunk in answer] if changes.get("stream") else answer

    async def events(self, path: str = "chat/completions", **changes: Any) -> list[Any]:
        """The events of a stream as they are on the wire, `[DONE]` too."""
        asked = self.asks(TEXT) if path == "chat/completions" else {"model": self.name, "prompt": TEXT}
        response = await self.house.post({**asked, "stream": True, **changes}, path)
        assert response.status_code == 200, response.text
        return events_of(response.content)

    def asks(self, text: str, **changes: Any) -> Any:
        """What a chat asks: of an answer that is always the same, and not too long."""
        asked = {"model": self.name, "messages": [{"role": "user", "content": text}], "temperature": 0}
        return asked | ({"max_completion_tokens": 40} if self.name == "local" else {}) | changes


@pytest.fixture(scope="module")
async def contestants(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, Contestant]]:
    folder = make_model(tmp_path_factory.mktemp("models") / "tiny", context_tokens=CONTEXT_TOKENS)
    local = {"model": str(folder), "threads": 1, "device": "cpu"}
    async with AsyncExitStack() as stack:
        players = {name: await stack.enter_async_context(playing(kind())) for name, kind in DIALECTS.items()}
        upstreams = {"echo": Upstream(adapter="echo"), "local": Upstream(adapter="local", options=local)}
        upstreams |= {name: player.settings(Timeouts(total_s=30)) for name, player in players.items()}
        upstreams |= {name: replace(upstreams[name], options=options) for name, options in OPTIONS.items()}
        models = {name: Model(targets=[Target(upstream=name, model="model-1")]) for name in upstreams}
        adapters = {name: load_adapter(upstream) for name, upstream in upstreams.items()}
        await adapters["local"].probe()  # until then it is loading
        settings = Settings(auth=Auth(keys=[KEY]), upstreams=upstreams, models=models)
        clock = Clock()
        house = await stack.enter_async_context(running(settings, adapters, clock=clock))
        yield {name: Contestant(name, house, players.get(name), clock) for name in ADAPTERS}


def ready(contestant: Contestant) -> Contestant:
    """With an engine that has no faults and no memory, and of which nothing is remembered."""
    contestant.clock.now += 1000
    if contestant.player is not None:
        contestant.player.forget()
    return contestant


@pytest.fixture(params=ADAPTERS)
def adapter(request: pytest.FixtureRequest, contestants: dict[str, Contestant]) -> Contestant:
    return ready(contestants[request.param])

"""A stage on which many tests play, one after the other: starting a gateway for each would take most of the time."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest

from gateway.settings import Auth, Model, Settings, Target, Timeouts, Upstream
from tests.house import (
    HELLO,
    KEY,
    Clock,
    House,
    Script,
    UpstreamServer,
    events_of,
    json_reply,
    running,
    settings_for,
    upstream,
)

HASTY = Timeouts(first_token_s=0.3, idle_s=0.15)


@dataclass
class Stage:
    """
    A gateway, and two upstreams that follow the scripts a test gives them.

    `smart` is answered by the first, `spare` by the first or else the second, `hasty` by the first, with little
    patience.
    """

    house: House
    first: UpstreamServer
    second: UpstreamServer
    clock: Clock

    async def post(
        self, script: Script, path: str = "chat/completions", headers: dict[str, str] | None = None, **changes: Any
    ) -> httpx2.Response:
        """What the gateway answers when the first upstream follows *script*; *changes* go into the request."""
        self.first.script = script
        body = HELLO | changes if path == "chat/completions" else {"model": "smart"} | changes
        return await self.house.post(body, path, **(headers or {}))

    async def answer(self, script: Script, path: str = "chat/completions", **changes: Any) -> Any:
        response = await self.post(script, path, **changes)
        assert response.status_code == 200, response.text
        return json.loads(response.content)

    async def events(self, script: Script, path: str = "chat/completions", **changes: Any) -> list[Any]:
        """The events of a streamed answer, `[DONE]` too."""
        response = await self.post(script, path, stream=True, **changes)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        return events_of(response.content)

    @property
    def sent(self) -> Any:
        """The body that the first upstream saw last."""
        return self.first.requests[-1].json


@pytest.fixture(scope="module")
async def shared_stage() -> AsyncIterator[Stage]:
    async with upstream(json_reply({})) as first, upstream(json_reply({})) as second:
        settings = Settings(
            auth=Auth(keys=[KEY]),
            upstreams={
                "one": first.settings(extra_fields=["top_k"]),
                "two": second.settings(),
                "hasty": first.settings(timeouts=HASTY),
            },
            models={
                "smart": Model(targets=[Target(upstream="one", model="model-1")]),
                "spare": Model(targets=[Target(upstream="one", model="a"), Target(upstream="two", model="b", tier=1)]),
                "hasty": Model(targets=[Target(upstream="hasty", model="model-1")]),
            },
        )
        clock = Clock()
        async with running(settings, clock=clock) as house:
            yield Stage(house, first, second, clock)


@pytest.fixture
def stage(shared_stage: Stage) -> Stage:
    shared_stage.clock.now += 1000  # what an earlier test did is forgiven
    for fake in (shared_stage.first, shared_stage.second):
        fake.requests.clear()
        fake.script = json_reply({"error": {"message": "no script"}}, 500)
    return shared_stage


@pytest.fixture(scope="module")
async def echo() -> AsyncIterator[House]:
    """A gateway whose model `smart` is an echo."""
    async with running(settings_for(Upstream(adapter="echo"))) as house:
        yield house

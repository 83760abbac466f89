"""What do servers that speak OpenAI's dialect, but ignore some of it, never get to see?"""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from adapters.openai import Adapter
from gateway.settings import Auth, Model, Settings, Target, Upstream
from tests.house import HELLO, KEY, House, completion, json_reply, running, upstream

pytestmark = pytest.mark.anyio

ENGINES = ["transformers", "sglang", "llamacpp", "ollama"]
FUNCTION = {"type": "function", "function": {"name": "f"}}
IGNORED: dict[str, dict[str, Any]] = {
    "modalities": {"modalities": ["audio"]},
    "web_search_options": {"web_search_options": {}},
    "moderation": {"moderation": {}},
    "tools": {"tools": [{"type": "custom", "custom": {"name": "c"}}]},
    "tool_choice": {"tools": [FUNCTION], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}},
}
ASKING_NOTHING: dict[str, Any] = {
    "modalities": ["text"],
    "parallel_tool_calls": False,
    "tools": [],
    "tool_choice": "none",
    "presence_penalty": 0,
    "logprobs": False,
}


@pytest.fixture(scope="module")
async def house() -> AsyncIterator[House]:
    """A model for each engine."""
    async with upstream(json_reply(completion())) as server:
        upstreams = {engine: server.settings(options={"engine": engine}) for engine in ENGINES}
        models = {engine: Model(targets=[Target(upstream=engine, model="model-1")]) for engine in ENGINES}
        async with running(Settings(auth=Auth(keys=[KEY]), upstreams=upstreams, models=models)) as house:
            yield house


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("param", IGNORED)
async def test_what_it_would_ignore_is_refused_by_name(house: House, engine: str, param: str) -> None:
    response = await house.post({**HELLO, "model": engine, **IGNORED[param]})
    assert response.status_code == 400, response.text
    error = json.loads(response.content)["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", param)


@pytest.mark.parametrize("engine", ENGINES)
async def test_what_asks_for_nothing_is_taken(house: House, engine: str) -> None:
    response = await house.post({**HELLO, "model": engine, **ASKING_NOTHING})
    assert response.status_code == 200, response.text


async def test_a_penalty_that_transformers_takes_for_another_is_not_sent(house: House) -> None:
    response = await house.post({**HELLO, "model": "transformers", "frequency_penalty": 0.5})
    assert json.loads(response.content)["error"]["param"] == "frequency_penalty"
    response = await house.post({**HELLO, "model": "transformers", "frequency_penalty": 0})
    assert response.status_code == 200


@pytest.mark.parametrize("engine", ["transformers", "ollama"])
async def test_an_engine_that_cannot_echo_is_not_asked_for_no_tokens(house: House, engine: str) -> None:
    response = await house.post({"model": engine, "prompt": "Hi", "max_tokens": 0}, "completions")
    assert response.status_code == 400, response.text
    assert json.loads(response.content)["error"]["param"] == "max_tokens"


@pytest.mark.parametrize(
    ("url", "sees"), [("https://api.openai.com/v1", True), ("https://api.openai.com.evil/v1", False)]
)
def test_openai_itself_is_known_by_its_address(url: str, sees: bool) -> None:
    adapter = Adapter(Upstream(adapter="openai", base_url=url))
    assert adapter.features("gpt").vision is sees

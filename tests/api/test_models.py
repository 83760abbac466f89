"""Does the SDK find the models that its key may use, and no others?"""

import hashlib
import time
from collections.abc import AsyncIterator
from typing import Any

import anyio.to_thread
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from gateway.settings import Auth, Key, Model, Settings, Target, Upstream
from tests.house import AUTH, HELLO, KEY, TOKEN, House, running

pytestmark = pytest.mark.anyio

NARROW = "sk-narrow"
NAMES = ["echo", "org/name", "推論:7b", "with space"]


@pytest.fixture(scope="module")
async def house() -> AsyncIterator[House]:
    narrow = Key(name="bob", sha256=hashlib.sha256(NARROW.encode()).hexdigest(), models=["org/name"])
    model = Model(targets=[Target(upstream="echo")])
    settings = Settings(
        auth=Auth(keys=[KEY, narrow]),
        upstreams={"echo": Upstream(adapter="echo")},
        models=dict.fromkeys(NAMES, model),
    )
    async with running(settings) as house:
        yield house


@pytest.fixture
async def narrow(house: House) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{house.url}/v1", api_key=NARROW, max_retries=0) as client:
        yield client


async def test_the_sdk_lists_the_models(house: House) -> None:
    models = [model async for model in house.openai.models.list()]
    assert sorted(model.id for model in models) == sorted(NAMES)
    assert {(model.object, model.owned_by) for model in models} == {("model", "suiron")}
    assert all(0 < model.created <= time.time() for model in models)


@pytest.mark.parametrize("name", NAMES)
async def test_the_sdk_retrieves_a_model_by_any_name(house: House, name: str) -> None:
    model = await house.openai.models.retrieve(name)
    assert (model.id, model.object) == (name, "model")
    assert model._request_id is not None


@pytest.mark.parametrize("path", ["org/name", "org%2Fname", "org%2fname"])
async def test_a_slash_in_a_name_may_be_raw_or_escaped(house: House, path: str) -> None:
    answer = await house.http.get(f"{house.url}/v1/models/{path}", headers=AUTH)
    assert set(answer.json()) == {"id", "object", "created", "owned_by"}
    assert answer.json()["id"] == "org/name"


@pytest.mark.parametrize("name", ["nobody", "org", "org/name/more", "org%2Fname", "../models"])
async def test_an_unknown_model_is_not_found(house: House, name: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await house.openai.models.retrieve(name)
    assert caught.value.code == "model_not_found"
    assert caught.value.request_id is not None


async def test_a_model_that_a_key_may_not_use_does_not_exist_for_it(narrow: AsyncOpenAI) -> None:
    assert [model.id async for model in narrow.models.list()] == ["org/name"]
    assert (await narrow.models.retrieve("org/name")).id == "org/name"
    told = []
    for name in ("echo", "nobody"):
        with pytest.raises(openai.NotFoundError) as caught:
            await narrow.models.retrieve(name)
        told.append(caught.value.message.replace(name, "…"))
        asked: Any = HELLO | {"model": name}
        with pytest.raises(openai.NotFoundError) as caught:
            await narrow.chat.completions.create(**asked)
        told.append(caught.value.message.replace(name, "…"))
    assert len(set(told)) == 1


@pytest.mark.parametrize("base", ["/v1", "/v1/"])
async def test_the_sync_sdk_finds_models_whether_or_not_its_base_url_ends_in_a_slash(house: House, base: str) -> None:
    def ask() -> tuple[int, str]:
        with OpenAI(base_url=house.url + base, api_key=TOKEN, max_retries=0) as client:
            return len(client.models.list().data), client.models.retrieve("org/name").id

    assert await anyio.to_thread.run_sync(ask) == (4, "org/name")


async def test_a_stranger_learns_nothing_of_models(house: House) -> None:
    for path in ("/v1/models", "/v1/models/echo", "/v1/models/nobody"):
        answer = await house.http.get(house.url + path)
        assert answer.status_code == 401
        assert "echo" not in answer.text

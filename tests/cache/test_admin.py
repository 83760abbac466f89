"""Can an admin, and nobody else, have kept answers forgotten?"""

import asyncio
import hashlib
from collections.abc import Iterator

import httpx2
import pytest

from gateway.settings import AdminKey, Answers, Auth
from tests.cache.conftest import STREAM, Playing, bearer, both, keeping, key, token
from tests.cache.test_flights import Stepwise, asking
from tests.house import HELLO, KEY, House
from tests.stores.servers import RedisServer, redis_server

pytestmark = pytest.mark.anyio

ADMIN = AdminKey(name="root", sha256=hashlib.sha256(token("root").encode()).hexdigest())
AUTH = Auth(keys=[KEY, key("bob"), key("carol", team="red"), key("dave", team="red")], admin_keys=[ADMIN])


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture(params=["memory", "redis"])
def answers(request: pytest.FixtureRequest) -> Answers:
    if request.param == "memory":
        return Answers()
    server: RedisServer = request.getfixturevalue("redis")
    server.said("FLUSHALL")
    return Answers(url=server.url, timeout_s=1)


async def forget(house: House, query: str = "", by: str = "root") -> httpx2.Response:
    return await house.http.delete(f"{house.url}/admin/v1/cache{query}", headers=bearer(by))


async def state(house: House, who: str, model: str = "smart") -> str:
    response = await house.post(HELLO | {"model": model}, **bearer(who))
    return str(response.headers["x-suiron-cache"])


async def everybody(house: House) -> dict[str, str]:
    asked = [(who, model) for who in ("bob", "carol") for model in ("smart", "other")]
    return {f"{who} {model}": await state(house, who, model) for who, model in asked}


async def missed(house: House) -> set[str]:
    return {who for who, what in (await everybody(house)).items() if what == "miss"}


async def test_by_model_by_key_by_team_or_all(answers: Answers, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "suiron")
    async with keeping(both(), auth=AUTH, cache=answers) as house:
        assert len(await missed(house)) == 4
        assert await missed(house) == set()
        for query, gone in (
            ("?model=smart", {"bob smart", "carol smart"}),
            ("?key=bob", {"bob smart", "bob other"}),
            ("?key=dave", {"carol smart", "carol other"}),
            ("?team=red", {"carol smart", "carol other"}),
            ("", {"bob smart", "carol smart", "bob other", "carol other"}),
        ):
            response = await forget(house, query)
            assert response.status_code == 200
            assert response.json()["deleted"] is True
            assert await missed(house) == gone, query
            assert await missed(house) == set()
    said = [record.message for record in caplog.records if "forgotten" in record.message]
    assert said[0] == "root has kept answers forgotten: of model smart"
    assert said[-1] == "root has kept answers forgotten: all"


async def test_only_an_admins_key_may_and_it_may_nothing_else() -> None:
    async with keeping(both(), auth=AUTH) as house:
        for response, status, code in (
            (await forget(house, by="bob"), 403, "permission_denied"),
            (await forget(house, by="nobody"), 401, "invalid_api_key"),
            (await house.http.delete(f"{house.url}/admin/v1/cache"), 401, None),
            (await house.post(HELLO, **bearer("root")), 403, "permission_denied"),
            (await house.http.get(f"{house.url}/v1/models", headers=bearer("root")), 403, "permission_denied"),
        ):
            assert (response.status_code, response.json()["error"]["code"]) == (status, code)


async def test_without_admin_keys_nobody_may() -> None:
    async with keeping(both(), auth=Auth(keys=[KEY, key("bob")])) as house:
        assert (await forget(house)).status_code == 401
        assert (await forget(house, by="bob")).status_code == 403


async def test_a_misspelled_word_does_not_mean_all() -> None:
    async with keeping(both(), auth=AUTH) as house:
        await everybody(house)
        for query in ("?modle=smart", "?model=smarter", "?key=nobody", "?team=bob", "?model=smart&key=bob"):
            response = await forget(house, query)
            assert response.status_code == 400, query
            assert response.json()["error"]["type"] == "invalid_request_error"
        assert await missed(house) == set()


async def test_an_answer_that_was_begun_before_is_not_kept_after(answers: Answers) -> None:
    adapter = Stepwise()
    async with keeping(adapter, auth=AUTH, cache=answers) as house:
        first = asyncio.create_task(house.post(STREAM))
        await asking(adapter)
        await forget(house, "?model=smart")
        async with asyncio.timeout(5):
            second = await house.post(STREAM)  # neither joins nor awaits what is to be forgotten
        assert second.headers["x-suiron-cache"] == "miss"
        adapter.go()
        await first
        assert adapter.calls == 2


async def test_a_store_out_of_reach_is_said_to_be(redis: RedisServer) -> None:
    adapter = Playing(lambda _: [])
    async with keeping(adapter, auth=AUTH, cache=Answers(url="redis://127.0.0.1:1")) as house:
        response = await forget(house)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "cache_unavailable")

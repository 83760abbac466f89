"""What is a request billed that comes in by the front door, however it ends?"""

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway import settings
from gateway.settings import Limits, Prices
from tests.house import HELLO, ROLE, House, chunk, completion, json_reply, running, settings_for, stream_reply, upstream
from tests.house import hello_stream as a_stream
from tests.ledger.calls import ask, rows_at
from tests.served import until

pytestmark = pytest.mark.anyio

PRICES = Prices(input=1, output=2)
NO_LIMITS = Limits()


@asynccontextmanager
async def gateway(
    folder: Path, *upstreams: settings.Upstream, prices: Prices | None = PRICES, limits: Limits = NO_LIMITS
) -> AsyncIterator[House]:
    made = settings_for(*upstreams, database=settings.Database(url=f"sqlite:///{folder}/ledger.db", journal_mib=1))
    models = {name: msgspec.structs.replace(model, prices=prices) for name, model in made.models.items()}
    async with running(msgspec.structs.replace(made, models=models, limits=limits)) as house:
        yield house


async def the_row(folder: Path) -> dict[str, Any]:
    await until(lambda: bool(rows_at(folder)))
    (row,) = rows_at(folder)
    return dict(row)


async def test_an_answer_is_billed_what_the_upstream_counted(tmp_path: Path) -> None:
    async with upstream(json_reply(completion())) as server, gateway(tmp_path, server.settings()) as house:
        reply = await house.post()

    row = await the_row(tmp_path)
    assert row["request_id"] == reply.headers["x-request-id"]
    assert (row["key_name"], row["outcome"], row["usage_source"]) == ("alice", "completed", "upstream")
    assert (row["prompt_tokens"], row["completion_tokens"], row["cost_nano"]) == (3, 2, 3 * 1000 + 2 * 2000)
    assert row["stream"] == 0
    assert row["total_ms"] >= (row["ttft_ms"] or 0) >= 0


async def test_the_row_of_an_answer_is_found_by_its_id_whatever_its_client_calls_it(tmp_path: Path) -> None:
    async with upstream(json_reply(completion())) as server, gateway(tmp_path, server.settings()) as house:
        reply = await house.post(**{"x-request-id": "mine"})

    assert reply.headers["x-request-id"] == "mine"
    assert (await the_row(tmp_path))["request_id"] == reply.json()["id"].replace("chatcmpl-", "req_")


async def test_a_stream_is_billed_what_its_end_says(tmp_path: Path) -> None:
    async with upstream(stream_reply(*a_stream())) as server, gateway(tmp_path, server.settings()) as house:
        await house.post({**HELLO, "stream": True})

    row = await the_row(tmp_path)
    assert (row["outcome"], row["usage_source"], row["stream"]) == ("completed", "upstream", 1)
    assert (row["prompt_tokens"], row["completion_tokens"]) == (3, 2)


async def test_a_stream_that_its_client_leaves_is_billed_for_what_it_was_given(tmp_path: Path) -> None:
    forever = asyncio.Event()
    blocks = [chunk(ROLE), *(chunk({"content": f"word{number} "}) for number in range(7))]
    async with upstream(stream_reply(*blocks, forever)) as server, gateway(tmp_path, server.settings()) as house:
        async with house.http.stream(
            "POST", f"{house.url}/v1/chat/completions", json={**HELLO, "stream": True}, headers=KEYED
        ) as reply:
            read = b""
            async for piece in reply.aiter_raw():
                read += piece
                if b"word6" in read:
                    break
        row = await the_row(tmp_path)

    assert (row["outcome"], row["usage_source"]) == ("client_gone", "counted")
    assert 7 <= row["completion_tokens"] < 100
    assert row["prompt_tokens"] > 0
    assert row["cost_nano"] == row["prompt_tokens"] * 1000 + row["completion_tokens"] * 2000


KEYED = {"authorization": "Bearer sk-test-0123456789"}


async def test_a_stream_that_its_upstream_cuts_is_billed_for_what_came(tmp_path: Path) -> None:
    blocks = [chunk(ROLE), *(chunk({"content": "la "}) for _ in range(5))]
    async with upstream(stream_reply(*blocks, cut=True)) as server, gateway(tmp_path, server.settings()) as house:
        await house.post({**HELLO, "stream": True})

    row = await the_row(tmp_path)
    assert (row["outcome"], row["usage_source"]) == ("upstream_error", "counted")
    assert 5 <= row["completion_tokens"] < 50
    (attempt,) = json.loads(row["attempts"])
    assert attempt == {"target": "upstream-1/model-1", "ms": attempt["ms"], "error": "upstream_error"}


async def test_a_request_that_another_target_answers_is_one_row_with_both_attempts(tmp_path: Path) -> None:
    async with (
        upstream(json_reply({"error": {"message": "broken"}}, status=500)) as broken,
        upstream(json_reply(completion())) as sound,
        gateway(tmp_path, broken.settings(), sound.settings()) as house,
    ):
        assert (await house.post()).status_code == 200

    row = await the_row(tmp_path)
    assert (row["outcome"], row["target"], row["completion_tokens"]) == ("completed", "upstream-2/model-2", 2)
    first, second = json.loads(row["attempts"])
    assert first == {**first, "target": "upstream-1/model-1", "error": "upstream_error", "wasted_tokens": 3}
    assert first["wasted_nano"] == 3000
    assert second == {"target": "upstream-2/model-2", "ms": second["ms"]}


async def test_what_fails_before_its_first_token_is_a_row_that_costs_nothing(tmp_path: Path) -> None:
    async with (
        upstream(json_reply({"error": {"message": "broken"}}, status=500)) as broken,
        gateway(tmp_path, broken.settings()) as house,
    ):
        assert (await house.post()).status_code == 502

    row = await the_row(tmp_path)
    assert (row["outcome"], row["usage_source"], row["charged_tokens"], row["cost_nano"]) == (
        "upstream_error",
        "none",
        0,
        0,
    )


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_cannot_be_given_costs_nothing_and_is_a_waste(stream: bool, tmp_path: Path) -> None:
    unfinished = completion()
    unfinished["choices"][0]["finish_reason"] = None
    nonsense = chunk({"content": "Hi"}, index=7, usage={"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5})
    reply = stream_reply(nonsense) if stream else json_reply(unfinished)
    async with upstream(reply) as server, gateway(tmp_path, server.settings()) as house:
        assert (await house.post({**HELLO, "stream": stream})).status_code == 502

    row = await the_row(tmp_path)
    assert (row["outcome"], row["usage_source"], row["charged_tokens"], row["cost_nano"]) == (
        "upstream_error",
        "none",
        0,
        0,
    )
    (attempt,) = json.loads(row["attempts"])
    assert (attempt["error"], attempt["wasted_tokens"], attempt["wasted_nano"]) == ("upstream_error", 5, 7000)


async def test_a_new_limit_begins_with_what_was_used_before_it(tmp_path: Path) -> None:
    async with upstream(json_reply(completion())) as server:
        async with gateway(tmp_path, server.settings()) as house:
            for _ in range(3):
                await house.post()
        async with gateway(tmp_path, server.settings(), limits=Limits(tokens_per_month=1000)) as house:
            reply = await house.post({**HELLO, "max_tokens": 2})

    estimated = 1000 - int(reply.headers["x-ratelimit-remaining-tokens"]) - 3 * 5 - 2
    assert 0 < estimated < 10


async def test_what_is_refused_before_it_is_dispatched_is_no_row(tmp_path: Path) -> None:
    async with upstream(json_reply(completion())) as server, gateway(tmp_path, server.settings()) as house:
        refused = [
            await house.post({**HELLO, "model": "other"}),
            await house.post({**HELLO, "temperature": 9}),
            await house.post({**HELLO, "max_token": 9}),
            await house.post(b"{"),
            await house.post(authorization="Bearer wrong"),
        ]
        assert [reply.status_code for reply in refused] == [404, 400, 400, 400, 401]
        await house.post()

    assert len(rows_at(tmp_path)) == 1


async def test_a_model_without_prices_has_no_cost_rather_than_none(tmp_path: Path) -> None:
    async with (
        upstream(json_reply(completion())) as server,
        gateway(tmp_path, server.settings(), prices=None) as house,
    ):
        await house.post()

    row = await the_row(tmp_path)
    assert (row["cost_nano"], row["price_input"], row["charged_tokens"]) == (None, None, 5)
    (sums,) = ask(tmp_path, "SELECT requests, cost_nano, unpriced FROM usage_hour")
    assert tuple(sums) == (1, 0, 1)


@pytest.mark.parametrize("usage", [{"prompt_tokens": -5, "completion_tokens": 2**40, "total_tokens": 0}])
async def test_nonsense_of_an_upstream_does_not_end_in_the_bill(usage: dict[str, int], tmp_path: Path) -> None:
    nonsense = {**completion(), "usage": usage}
    async with upstream(json_reply(nonsense)) as server, gateway(tmp_path, server.settings()) as house:
        await house.post()
        await house.post()

    await until(lambda: len(rows_at(tmp_path)) == 2)
    assert all(0 <= row["prompt_tokens"] <= 2**31 - 1 >= row["completion_tokens"] for row in rows_at(tmp_path))


async def test_where_there_is_no_room_to_record_the_answer_is_503_and_nothing_is_dispatched(tmp_path: Path) -> None:
    async with upstream(json_reply(completion())) as server, gateway(tmp_path, server.settings()) as house:
        other = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        replies = [await house.post() for _ in range(513)]
        asked = len([each for each in server.requests if each.method == "POST"])
        other.close()

        assert [reply.status_code for reply in replies] == [200] * 512 + [503]
        assert replies[-1].json()["error"]["code"] == "ledger_full"
        assert replies[-1].headers["retry-after"] == "5"
        assert asked == 512
        await until(lambda: len(rows_at(tmp_path)) == 512)
        assert (await house.post()).status_code == 200

"""Does each request have exactly one row, whatever happens to it?"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gateway import settings
from gateway.errors import ContextLengthExceeded, LedgerFull, UpstreamFailed, UpstreamUnreachable
from gateway.ledger import Ledger, open_ledger
from gateway.schema.common import CompletionTokensDetails, PromptTokensDetails, Usage
from tests.ledger.calls import a_call, ask, rows_at, sqlite_at
from tests.served import until

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def ledger_at(path: Path) -> AsyncIterator[Ledger]:
    ledger = open_ledger(sqlite_at(path))
    async with ledger.running():
        yield ledger


async def test_a_completed_request_is_one_row_with_everything_about_it_but_its_content(tmp_path: Path) -> None:
    usage = Usage(
        prompt_tokens=100,
        completion_tokens=50,
        total_tokens=150,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=40),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=20),
    )
    call = a_call(usage)
    async with ledger_at(tmp_path) as ledger:
        with ledger.entry(call):
            pass

    (row,) = rows_at(tmp_path)
    assert dict(row) | {"started_ms": 0, "ended_ms": 0, "ttft_ms": 0, "total_ms": 0} == {
        "seq": 1,
        "request_id": f"req_{call.id}",
        "started_ms": 0,
        "ended_ms": 0,
        "ttft_ms": 0,
        "total_ms": 0,
        "key_name": "alice-app",
        "user_name": "alice",
        "team_name": "red",
        "endpoint": "chat/completions",
        "model": "smart",
        "stream": 0,
        "price_input": 2_000_000_000,
        "price_cached_input": 500_000_000,
        "price_output": 6_000_000_000,
        "target": "up/model-1",
        "outcome": "completed",
        "usage_source": "upstream",
        "prompt_tokens": 100,
        "cached_tokens": 40,
        "completion_tokens": 50,
        "reasoning_tokens": 20,
        "charged_tokens": 150,
        "cost_nano": 60 * 2000 + 40 * 500 + 50 * 6000,
        "cache": "",
        "attempts": '[{"target":"up/model-1","ms":0}]',
        "saved_nano": 0,
    }


async def test_a_request_refused_before_dispatch_leaves_no_row_and_its_slot(tmp_path: Path) -> None:
    async with ledger_at(tmp_path) as ledger:
        for _ in range(1000):
            with pytest.raises(ContextLengthExceeded), ledger.entry(a_call(dispatched=False)):
                raise ContextLengthExceeded("too long")

    assert rows_at(tmp_path) == []


async def test_without_a_database_requests_are_counted_and_nothing_is_kept() -> None:
    ledger = open_ledger(settings.Database())
    async with ledger.running():
        with ledger.entry(a_call(Usage(prompt_tokens=1), prices=None)):
            pass
        assert await ledger.used("key:alice-app", "tokens", 0) == (0, 0)
    assert ledger.counts.unpriced == 1


async def test_used_is_what_the_ledger_sums_for_a_scope(tmp_path: Path) -> None:
    async with ledger_at(tmp_path) as ledger:
        told = asyncio.Event()
        ledger.committed = lambda _: told.set()
        with ledger.entry(a_call(Usage(prompt_tokens=10, completion_tokens=5))):
            pass
        await asyncio.wait_for(told.wait(), 20)

        for scope in ("key:alice-app", "user:alice", "team:red", "key:alice-app/model:smart"):
            assert await ledger.used(scope, "tokens", 0) == (15, 1)
        assert await ledger.used("team:red", "nano_usd", 0) == (50_000, 1)
        assert await ledger.used("team:red", "requests", 0) == (1, 1)
        assert await ledger.used("team:red/model:other", "tokens", 0) == (0, 1)
        assert await ledger.used("team:red", "tokens", 4_000_000_000_000) == (0, 1)


async def test_where_there_is_no_room_to_record_nothing_is_begun(tmp_path: Path) -> None:
    ledger = open_ledger(sqlite_at(tmp_path))
    entries = [ledger.entry(a_call(dispatched=False)) for _ in range(512)]
    with pytest.raises(LedgerFull) as caught:
        ledger.entry(a_call())
    assert (caught.value.status, caught.value.headers["retry-after"], ledger.counts.full) == (503, "5", 1)

    entries[7].close(ContextLengthExceeded("it was refused"))
    ledger.entry(a_call())
    ledger.close()


@pytest.mark.parametrize(
    ("exc", "outcome", "tokens"),
    [
        (None, "completed", 15),
        (GeneratorExit(), "client_gone", 15),
        (asyncio.CancelledError(), "client_gone", 15),
        (UpstreamFailed("cut"), "upstream_error", 15),
        (ValueError("a bug"), "failed", 15),
    ],
)
async def test_however_it_ends_what_was_said_is_billed(
    exc: BaseException | None, outcome: str, tokens: int, tmp_path: Path
) -> None:
    async with ledger_at(tmp_path) as ledger:
        ledger.entry(a_call(Usage(prompt_tokens=10, completion_tokens=5))).close(exc)

    (row,) = rows_at(tmp_path)
    assert (row["outcome"], row["charged_tokens"], row["cost_nano"]) == (outcome, tokens, 50_000)


async def test_an_upstream_that_fails_before_it_said_anything_is_paid_nothing(tmp_path: Path) -> None:
    call = a_call()
    call.usage, call.reckoned = Usage(prompt_tokens=10), True
    call.attempts[0].error = UpstreamUnreachable("refused")
    async with ledger_at(tmp_path) as ledger:
        ledger.entry(call).close(UpstreamUnreachable("refused"))

    (row,) = rows_at(tmp_path)
    assert (row["outcome"], row["usage_source"], row["charged_tokens"], row["cost_nano"]) == (
        "upstream_error",
        "none",
        0,
        0,
    )


async def test_a_request_is_in_the_hour_in_which_the_store_admitted_it(tmp_path: Path) -> None:
    """Which may be another than by our clock: then a quota that is read anew has what was reserved from it."""
    midnight_ms = 1_793_491_200_000
    call = a_call(Usage(prompt_tokens=10))
    call.admitted_ms = midnight_ms
    async with ledger_at(tmp_path) as ledger:
        ledger.entry(call).close(None)
        await until(lambda: ledger.backlog == 0)
        assert await ledger.used("team:red", "tokens", midnight_ms) == (10, 1)
        assert await ledger.used("team:red", "tokens", midnight_ms + 3_600_000) == (0, 1)

    (row,) = rows_at(tmp_path)
    assert row["started_ms"] == midnight_ms
    assert [hour["hour"] for hour in ask(tmp_path, "SELECT hour FROM usage_hour")] == [midnight_ms // 1000]


@pytest.mark.parametrize(("said", "counted"), [(-1, 0), (2**31, 2**31 - 1), (2**70, 2**31 - 1)])
async def test_what_no_request_can_have_used_is_not_believed(said: int, counted: int, tmp_path: Path) -> None:
    async with ledger_at(tmp_path) as ledger:
        ledger.entry(a_call(Usage(prompt_tokens=said, completion_tokens=said))).close(None)

    (row,) = rows_at(tmp_path)
    assert (row["prompt_tokens"], row["completion_tokens"]) == (counted, counted)


async def test_more_from_the_cache_than_there_was_is_not_believed(tmp_path: Path) -> None:
    usage = Usage(prompt_tokens=10, prompt_tokens_details=PromptTokensDetails(cached_tokens=1000))
    async with ledger_at(tmp_path) as ledger:
        ledger.entry(a_call(usage)).close(None)

    (row,) = rows_at(tmp_path)
    assert (row["cached_tokens"], row["cost_nano"]) == (10, 10 * 500)


async def test_names_of_any_length_find_room_in_the_journal(tmp_path: Path) -> None:
    long = "名" * 5000
    ledger = open_ledger(sqlite_at(tmp_path))
    entry = ledger.entry(a_call(Usage(prompt_tokens=10), model=long))
    entry.close(None)
    ledger.entry(a_call(Usage(prompt_tokens=10), model=long))
    ledger.close()  # as a crash does
    async with ledger_at(tmp_path):
        pass

    assert [row["outcome"] for row in rows_at(tmp_path)] == ["completed", "abandoned"]
    assert all(long.startswith(row["model"]) and row["model"] for row in rows_at(tmp_path))

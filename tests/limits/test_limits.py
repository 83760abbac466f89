"""Limits, as clients meet them: through the front door, on the store of one process."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import openai
import pytest

from gateway.adapter import Adapter
from gateway.auth import Principal
from gateway.errors import LimiterUnavailable, UpstreamUnreachable
from gateway.ledger import Ledger
from gateway.limits.fallback import Shares
from gateway.limits.terms import Terms, terms_of
from gateway.schema.chat import AnswerMessage, ChatChoice, ChatChunk, ChatCompletion, ChunkChoice, Delta
from gateway.schema.common import Usage
from gateway.schema.payload import Part
from gateway.settings import Settings, parse
from gateway.stores import Costs, Decision, LedgerUnavailable, Metric, Plan, Reservation, StoreUnavailable, Used, Window
from gateway.stores.memory import MemoryStore
from gateway.telemetry import Telemetry
from tests.house import HELLO, KEY, House, ScriptedAdapter, completion, json_reply, running, upstream
from tests.served import until

pytestmark = pytest.mark.anyio

NOON_MS = 1_795_780_800_000  # a Friday, 2026-11-27


@dataclass
class Clock:
    ms: int = NOON_MS

    def __call__(self) -> int:
        return self.ms


@dataclass
class Stage:
    house: House
    clock: Clock
    adapter: ScriptedAdapter
    store: Any

    async def ask(self, **changes: Any) -> httpx2.Response:
        return await self.house.post({**HELLO, **changes})


def answer(completion_tokens: int = 2, prompt_tokens: int = 3) -> list[Part[Any]]:
    usage = Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )
    message = AnswerMessage(role="assistant", content="Hello", refusal=None)
    choice = ChatChoice(message=message, index=0, finish_reason="stop", logprobs=None)
    return [Part.encode(ChatCompletion(choices=[choice], usage=usage), usage)]


def chunk(content: str | None) -> Part[Any]:
    delta = Delta() if content is None else Delta(role="assistant", content=content)
    return Part.encode(
        ChatChunk(choices=[ChunkChoice(delta=delta, index=0, finish_reason=None if content else "stop")])
    )


def configured(limits: str, more: str = "") -> Settings:
    return parse(
        f"""
auth:
  keys: [{{name: alice, sha256: "{KEY.sha256}", team: red, limits: {{{limits}}}}}]
upstreams: {{one: {{adapter: scripted}}}}
models:
  smart: {{targets: [{{upstream: one}}], prices: {{input: 1, output: 2}}, default_output_tokens: 50}}
{more}
""",
        "gateway.yaml",
    )


@asynccontextmanager
async def limited(limits: str, *script: Any, more: str = "") -> AsyncIterator[Stage]:
    """A gateway whose only key is under *limits*; its model follows *script*."""
    clock = Clock()
    adapter = ScriptedAdapter(*(script or (answer(),)))
    ledger = Ledger()
    store = MemoryStore(ledger.used, clock)
    async with running(configured(limits, more), {"one": adapter}, store=store, ledger=ledger) as house:
        yield Stage(house, clock, adapter, store)


async def test_what_is_beyond_the_limit_is_refused_and_reaches_no_upstream() -> None:
    async with limited("requests_per_minute: 2") as stage:
        assert [(await stage.ask()).status_code for _ in range(4)] == [200, 200, 429, 429]
        assert stage.adapter.calls == 2


async def test_answers_tell_what_is_left_in_openais_headers() -> None:
    async with limited("requests_per_minute: 10, tokens_per_minute: 1000") as stage:
        headers = (await stage.ask(max_tokens=20)).headers
        told = {name: value for name, value in headers.items() if name.startswith("x-ratelimit")}
        assert told.pop("x-ratelimit-remaining-tokens") < "980"
        assert told == {
            "x-ratelimit-limit-requests": "10",
            "x-ratelimit-remaining-requests": "9",
            "x-ratelimit-reset-requests": "1m1s",
            "x-ratelimit-limit-tokens": "1000",
            "x-ratelimit-reset-tokens": "1m1s",
        }


async def test_a_stream_tells_them_too_and_so_does_a_refusal() -> None:
    async with limited("requests_per_minute: 1", [chunk("Hi"), chunk(None)]) as stage:
        streamed, refused = await stage.ask(stream=True), await stage.ask()
        assert streamed.headers["x-ratelimit-remaining-requests"] == "0"
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"


async def test_who_waits_as_long_as_was_said_is_admitted() -> None:
    async with limited("requests_per_minute: 3") as stage:
        for _ in range(3):
            assert (await stage.ask()).status_code == 200
            stage.clock.ms += 7_001
        refused = await stage.ask()
        wait_ms = int(refused.headers["retry-after-ms"])
        assert (int(refused.headers["retry-after"]) - 1) * 1000 < wait_ms <= int(refused.headers["retry-after"]) * 1000
        stage.clock.ms += wait_ms - 1
        assert (await stage.ask()).status_code == 429
        stage.clock.ms += 1
        assert (await stage.ask()).status_code == 200


async def test_the_sdk_retries_by_itself_and_succeeds() -> None:
    async with limited("concurrent_requests: 1", gate := asyncio.Event(), answer()) as stage:
        first = asyncio.create_task(stage.ask())
        await until(lambda: stage.adapter.calls == 1)
        refused: list[int] = []

        async def note(response: httpx2.Response) -> None:
            refused.append(response.status_code)
            gate.set()

        async with httpx2.AsyncClient(event_hooks={"response": [note]}) as http:
            patient = stage.house.openai.with_options(max_retries=2, http_client=http)
            completed = await patient.chat.completions.create(**HELLO)
        assert completed.choices[0].message.content == "Hello"
        assert (await first).status_code == 200
        assert refused == [429, 200]


async def test_the_sdk_raises_its_own_errors() -> None:
    async with limited("requests_per_minute: 0") as stage:
        with pytest.raises(openai.RateLimitError) as refused:
            await stage.house.openai.chat.completions.create(**HELLO)
        assert (refused.value.type, refused.value.code) == ("insufficient_quota", "insufficient_quota")
        assert refused.value.response.headers["x-should-retry"] == "false"


async def test_what_was_not_used_is_given_back() -> None:
    async with limited("tokens_per_minute: 1000") as stage:
        for _ in range(5):  # each reserves 500 and more, and uses 5
            assert (await stage.ask(max_tokens=500)).status_code == 200
        left = int((await stage.ask(max_tokens=500)).headers["x-ratelimit-remaining-tokens"])
        assert 450 < left < 500


async def test_what_was_used_beyond_is_a_debt() -> None:
    async with limited("tokens_per_minute: 1000", answer(completion_tokens=5000)) as stage:
        assert (await stage.ask()).status_code == 200
        refused = await stage.ask(max_tokens=1)
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "tokens")
        stage.clock.ms += int(refused.headers["retry-after-ms"])
        assert (await stage.ask(max_tokens=1)).status_code == 200


async def test_money_is_counted_by_the_models_prices() -> None:
    async with limited("usd_per_day: 0.001", answer(completion_tokens=400, prompt_tokens=100)) as stage:
        assert (await stage.ask()).status_code == 200  # 100 at $1 and 400 at $2 a million are $0.0009
        refused = await stage.ask()
        assert refused.json()["error"]["code"] == "insufficient_quota"
        assert "US dollars per day of key 'alice': limit $0.001, used $0.0009, " in refused.json()["error"]["message"]
        stage.clock.ms += 12 * 3_600_000 - 1
        assert (await stage.ask()).status_code == 429
        stage.clock.ms += 1  # midnight in UTC
        assert (await stage.ask()).status_code == 200


async def test_a_request_that_can_never_pass_is_a_400_with_the_numbers() -> None:
    async with limited("tokens_per_minute: 100") as stage:
        refused = await stage.ask(max_tokens=5000)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "request_too_large"
        assert "limit 100" in refused.json()["error"]["message"]
        assert (await stage.ask()).status_code == 200, "one that does not say how much it wants may pass"


async def test_a_prompt_is_not_refused_for_a_guess_where_its_tokens_can_be_counted() -> None:
    async with limited("tokens_per_minute: 100") as stage:
        long = {"messages": [{"role": "user", "content": "x" * 2000}], "max_tokens": 1}
        assert (await stage.ask(**long)).status_code == 400

        async def count(*_: object) -> int:
            return 70

        stage.adapter.count = count  # type: ignore[attr-defined]
        assert (await stage.ask(**long)).status_code == 200


async def test_a_request_that_was_refused_consumes_nothing_of_any_limit() -> None:
    async with limited("requests_per_minute: 1, requests_per_hour: 3") as stage:
        assert [(await stage.ask()).status_code for _ in range(5)] == [200, 429, 429, 429, 429]
        stage.clock.ms += 61_000
        headers = (await stage.ask()).headers
        assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("1", "0")
        stage.clock.ms += 61_000
        assert (await stage.ask()).status_code == 200


async def test_a_bad_request_and_an_unknown_model_consume_nothing() -> None:
    async with limited("requests_per_minute: 1") as stage:
        assert (await stage.ask(model="smrt")).status_code == 404
        assert (await stage.ask(temperature="hot")).status_code == 400
        assert (await stage.ask()).status_code == 200


async def test_a_failed_request_counts_as_a_request_and_takes_no_tokens() -> None:
    async with limited("requests_per_minute: 2, tokens_per_minute: 400", UpstreamUnreachable("no")) as stage:
        assert (await stage.ask(max_tokens=200)).status_code == 502
        headers = (await stage.ask(max_tokens=200)).headers
        assert headers["x-ratelimit-remaining-requests"] == "0"
        assert int(headers["x-ratelimit-remaining-tokens"]) > 150


async def test_a_client_that_leaves_frees_its_place() -> None:
    async with limited("concurrent_requests: 1", asyncio.Event()) as stage:
        first = asyncio.create_task(stage.ask())
        await until(lambda: stage.adapter.calls == 1)
        assert (await stage.ask()).status_code == 429
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await until(lambda: stage.adapter.closed == 1)
        again = asyncio.create_task(stage.ask())
        await until(lambda: stage.adapter.calls == 2)
        again.cancel()
        await asyncio.gather(again, return_exceptions=True)


async def test_a_limit_in_the_shadow_refuses_nobody_and_is_counted() -> None:
    async with limited("requests_per_minute: {limit: 1, enforce: shadow}") as stage:
        assert [(await stage.ask()).status_code for _ in range(3)] == [200] * 3
        assert "x-ratelimit-limit-requests" not in (await stage.ask()).headers


async def test_a_warning_comes_before_the_limit_does() -> None:
    async with limited("requests_per_minute: 20") as stage:
        told = [(await stage.ask()).headers.get("x-suiron-warning") for _ in range(20)]
        warned = "requests per minute of key 'alice': {} % used"
        assert told == [None] * 15 + [warned.format(percent) for percent in (80, 85, 90, 95, 100)]


async def test_what_limits_do_is_counted() -> None:
    limits = "requests_per_minute: 2, requests_per_hour: {limit: 1, enforce: shadow}"
    telemetry = Telemetry(configured(limits))
    async with running(configured(limits), {"one": ScriptedAdapter(answer())}, telemetry) as house:
        assert [(await house.post()).status_code for _ in range(3)] == [200, 200, 429]
    told = telemetry.metrics.render().decode()
    for line in (
        'suiron_limits_total{limit="key requests per minute",result="refused"} 1.0',
        'suiron_limits_total{limit="key requests per minute",result="warned_95"} 2.0',
        'suiron_limits_total{limit="key requests per hour",result="shadow"} 1.0',
        "suiron_degraded_requests_total 0.0",
        "suiron_ledger_unpriced_total 0.0",
    ):
        assert line in told.splitlines(), [line for line in told.splitlines() if line.startswith("suiron_l")]


async def test_teams_share_a_limit_and_each_of_its_keys_has_its_own() -> None:
    more = "  plain: {targets: [{upstream: one}], prices: {input: 1, output: 2}}\n"
    async with limited("models: {smart: {requests_per_minute: 1}}", more=more) as stage:
        assert [(await stage.ask()).status_code for _ in range(2)] == [200, 429]
        assert [(await stage.ask(model="plain")).status_code for _ in range(2)] == [200, 200]


async def test_a_strict_limit_caps_what_may_be_generated_and_says_so() -> None:
    async with limited("tokens_per_minute: {limit: 5000, strict: true}") as stage:
        capped, free = await stage.ask(), await stage.ask(max_tokens=7)
        assert capped.headers["x-suiron-max-completion-tokens"] == "50"
        assert "x-suiron-max-completion-tokens" not in free.headers
        assert [asked.limit for asked in stage.adapter.requests] == [50, 7]


async def test_the_cap_reaches_the_upstream() -> None:
    async with upstream(json_reply(completion())) as server:
        settings = configured("tokens_per_minute: {limit: 5000, strict: true}")
        settings = Settings(auth=settings.auth, models=settings.models, upstreams={"one": server.settings()})
        async with running(settings) as house:
            assert (await house.post()).status_code == 200
        assert server.requests[-1].json["max_completion_tokens"] == 50


class Away(MemoryStore):
    """A store that can be out of reach, or do what it is asked and not say so."""

    available = True
    mute = False
    settled = 0

    async def admit(self, reservation: Any) -> Any:
        if not self.available:
            raise StoreUnavailable("away")
        decision = await super().admit(reservation)
        if self.mute:
            raise StoreUnavailable("mute")
        return decision

    def settle(self, reservation: Reservation, actual: Costs, *, exact: bool, event: bytes = b"") -> None:
        self.settled += 1
        super().settle(reservation, actual, exact=exact, event=event)


@asynccontextmanager
async def losing(limits: str, replicas: int = 1) -> AsyncIterator[Stage]:
    clock, adapter, ledger = Clock(), ScriptedAdapter(answer()), Ledger()
    store = Away(ledger.used, clock)
    store.replicas = replicas
    adapters: dict[str, Adapter] = {"one": adapter}
    async with running(configured(limits), adapters, store=store, ledger=ledger) as house:
        yield Stage(house, clock, adapter, store)


async def test_without_its_store_a_replica_admits_its_share_and_says_so() -> None:
    async with losing("requests_per_minute: 9", replicas=3) as stage:
        assert (await stage.ask()).status_code == 200
        stage.store.available = False
        answers = [await stage.ask() for _ in range(5)]
        assert [answered.status_code for answered in answers] == [200, 200, 200, 429, 429]
        assert all(answered.headers["x-suiron-enforcement"] == "degraded" for answered in answers)
        stage.store.available = True
        assert "x-suiron-enforcement" not in (await stage.ask()).headers


async def test_what_was_used_up_before_the_outage_stays_used_up() -> None:
    async with losing("requests_per_minute: 3") as stage:
        assert [(await stage.ask()).status_code for _ in range(3)] == [200] * 3
        stage.store.available = False
        assert (await stage.ask()).status_code == 429


async def test_what_was_used_up_in_a_window_that_is_over_holds_nobody_up() -> None:
    settings = configured("requests_per_minute: 3")
    terms = terms_of(settings, Principal("alice", "t", team="red"), "smart")
    terms.seen = Decision(remaining=[0], reset_ms=[60_000], at_ms=NOON_MS)
    for age_s, admitted in ((0, False), (61, True)):
        terms.seen_s = time.monotonic() - age_s
        decision = await Shares(one_of(1), Ledger().used).admit(terms, Reservation(terms.plan, "req_1", Costs()))
        assert (decision.denied is None) == admitted


def sharing(
    limits: str, clock: Clock, seen: Decision | None, used: Used, *, rank: int = 0, replicas: int = 2
) -> tuple[Shares, Terms]:
    """The share of one of the replicas, when the store has just been heard."""
    terms = terms_of(configured(limits), Principal("alice", "t", team="red"), "smart")
    terms.seen, terms.seen_s = seen, time.monotonic()
    return Shares(one_of(replicas, rank), used, clock), terms


def one_of(replicas: int, rank: int = 0) -> MemoryStore:
    store = MemoryStore(nothing_used)
    store.replicas, store.rank = replicas, rank
    return store


async def asked(shares: Shares, terms: Terms, times: int) -> int:
    """How many are admitted."""
    names = [f"req_{time.monotonic_ns()}_{number}" for number in range(times)]
    answers = [await shares.admit(terms, Reservation(terms.plan, name, Costs())) for name in names]
    return sum(answer.denied is None for answer in answers)


async def nothing_used(scope: str, metric: Metric, period_start_ms: int) -> tuple[int, int]:
    return 0, 0


async def ledger_away(scope: str, metric: Metric, period_start_ms: int) -> tuple[int, int]:
    raise LedgerUnavailable("away")


async def test_what_was_used_up_before_an_outage_may_be_used_once_its_window_is_over() -> None:
    clock = Clock()
    seen = Decision(remaining=[1], reset_ms=[60_000], at_ms=NOON_MS)
    shares, terms = sharing("requests_per_minute: 8", clock, seen, nothing_used)
    assert await asked(shares, terms, 5) == 1
    clock.ms += 59_000
    assert await asked(shares, terms, 5) == 0
    clock.ms += 2_000
    assert await asked(shares, terms, 5) == 4


async def test_what_was_used_before_an_outage_leaves_when_it_would_have_left() -> None:
    clock = Clock()
    seen = Decision(remaining=[1], reset_ms=[20_000], at_ms=NOON_MS)
    shares, terms = sharing("requests_per_minute: 8", clock, seen, nothing_used)
    assert await asked(shares, terms, 5) == 1
    clock.ms += 18_000
    assert await asked(shares, terms, 5) == 0
    clock.ms += 4_000
    assert await asked(shares, terms, 5) == 3


@pytest.mark.parametrize("limit", [1, 2, 3, 10])
@pytest.mark.parametrize("name", ["requests_per_minute", "concurrent_requests"])
async def test_all_shares_together_are_the_limit(name: str, limit: int) -> None:
    shares = [sharing(f"{name}: {limit}", Clock(), None, nothing_used, rank=rank, replicas=3) for rank in range(3)]
    for share, terms in shares[limit:]:  # for them there is nothing
        with pytest.raises(LimiterUnavailable):
            await share.admit(terms, Reservation(terms.plan, "req_1", Costs()))
    assert sum([await asked(*one, 20) for one in shares[:limit]]) == limit


async def test_what_is_too_large_for_a_share_alone_is_told_to_come_again() -> None:
    async with losing("tokens_per_minute: 1000", replicas=3) as stage:
        stage.store.available = False
        assert (await stage.ask(max_tokens=200)).status_code == 200
        later = await stage.ask(max_tokens=600)
        assert (later.status_code, later.json()["error"]["code"]) == (503, "limiter_unavailable")
        assert later.headers["retry-after"] == "1"
        never = await stage.ask(max_tokens=1200)
        assert (never.status_code, never.json()["error"]["code"]) == (400, "request_too_large")


async def test_a_long_answer_keeps_its_place_in_an_outage() -> None:
    clock = Clock()
    shares, terms = sharing("concurrent_requests: 2", clock, None, nothing_used)
    long = Reservation(terms.plan, "req_long", Costs())
    assert (await shares.admit(terms, long)).denied is None
    clock.ms += 3_600_000
    assert await asked(shares, terms, 1) == 0
    shares.settle(long, Costs(), exact=True)
    assert await asked(shares, terms, 2) == 1


PER_DAY = "requests_per_day: {limit: 40, window: calendar}"


async def test_without_the_ledger_a_quota_goes_by_what_the_store_said_last() -> None:
    seen = Decision(remaining=[12], reset_ms=[1], at_ms=NOON_MS)
    shares, terms = sharing(PER_DAY, Clock(), seen, ledger_away)
    assert await asked(shares, terms, 20) == 5  # half of what is left but for the guard of 2


async def test_a_quota_that_nobody_knows_anything_of_is_closed() -> None:
    shares, terms = sharing(PER_DAY, Clock(), None, ledger_away)
    with pytest.raises(LimiterUnavailable):
        await asked(shares, terms, 1)


async def test_an_outage_over_midnight_starts_a_quota_anew() -> None:
    clock = Clock()
    days: list[int] = []

    async def used(scope: str, metric: Metric, period_start_ms: int) -> tuple[int, int]:
        days.append(period_start_ms)
        return (40 if len(days) == 1 else 2), 0

    shares, terms = sharing(f"requests_per_hour: 100, {PER_DAY}", clock, None, used)
    assert await asked(shares, terms, 3) == 0
    clock.ms += 12 * 3_600_000 - 1
    assert await asked(shares, terms, 3) == 0
    clock.ms += 1
    assert await asked(shares, terms, 30) == 18
    assert days == [NOON_MS - 12 * 3_600_000, NOON_MS + 12 * 3_600_000]


async def test_what_others_had_used_is_taken_from_the_share_once() -> None:
    clock = Clock()
    seen = Decision(remaining=[20, 40], reset_ms=[86_400_000, 1], at_ms=NOON_MS)
    shares, terms = sharing(f"requests_per_day: 60, {PER_DAY.replace('requests', 'tokens')}", clock, seen, nothing_used)
    assert await asked(shares, terms, 5) == 5
    clock.ms += 12 * 3_600_000  # the quota starts anew, the window goes on
    assert await asked(shares, terms, 20) == 15


async def test_a_quota_is_spent_up_to_the_guard() -> None:
    async with losing("requests_per_day: {limit: 40, window: calendar}") as stage:
        assert [(await stage.ask()).status_code for _ in range(30)] == [200] * 30
        stage.store.available = False
        assert [(await stage.ask()).status_code for _ in range(10)] == [200] * 8 + [429] * 2


async def test_a_strict_limit_refuses_without_its_store() -> None:
    async with losing("tokens_per_minute: {limit: 5000, strict: true}") as stage:
        stage.store.available = False
        refused = await stage.ask()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "limiter_unavailable")
        assert refused.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("limit", "status"), [("requests_per_minute: 3", 429), ("tokens_per_hour: {limit: 5000, strict: true}", 503)]
)
async def test_what_is_refused_here_and_may_have_been_admitted_by_a_mute_store_is_given_back(
    limit: str, status: int
) -> None:
    async with losing(f"{limit}, requests_per_day: 50", replicas=3) as stage:
        assert (await stage.ask(max_tokens=5)).status_code == 200
        stage.store.mute = True
        answers = [await stage.ask(max_tokens=5) for _ in range(2)]
        assert answers[-1].status_code == status
        stage.store.mute = False
        admitted = sum(answered.status_code == 200 for answered in answers)
        assert stage.store._open == {}
        plan = Plan("t", (Window("key:alice", "requests", 50, 86_400_000),))
        assert (await stage.store.admit(Reservation(plan, "req_probe", Costs()))).remaining == [50 - 1 - admitted - 1]


async def test_what_is_refused_without_asking_the_store_leaves_it_nothing_to_do() -> None:
    for limit in ("requests_per_minute: 1", "tokens_per_minute: {limit: 5000, strict: true}"):
        async with losing(limit) as stage:
            assert (await stage.ask()).status_code == 200
            settled, stage.store.available = stage.store.settled, False
            assert [(await stage.ask()).status_code for _ in range(3)] in ([429] * 3, [503] * 3)
            assert stage.store.settled == settled


async def test_an_open_limit_holds_nobody_up() -> None:
    async with losing("requests_per_minute: {limit: 1, on_store_loss: open}") as stage:
        stage.store.available = False
        assert [(await stage.ask()).status_code for _ in range(3)] == [200] * 3

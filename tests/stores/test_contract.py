"""What holds for both stores, under a clock that the tests turn."""

import itertools
from datetime import UTC, datetime

import pytest

from gateway.stores import (
    Costs,
    Decision,
    Lease,
    LedgerUnavailable,
    LimitStore,
    Plan,
    Quota,
    Reservation,
    StoreUnavailable,
    Window,
)
from tests.stores.conftest import Ledger
from tests.stores.servers import Clock

pytestmark = pytest.mark.anyio

MINUTE = 60_000
DAY = 86_400_000
RPM = Window("key:a", "requests", 3, MINUTE)
TPM = Window("key:a", "tokens", 100, MINUTE)
AT_ONCE = Lease("key:a", 2)
PER_DAY = Quota("key:a", "tokens", 1_000, "day")
MONEY = Quota("team:t", "nano_usd", 5_000, "month")
NOTHING = Costs(requests=0)
ids = (f"req_{number}" for number in itertools.count())


def asking(
    plan: Plan, clock: Clock, tokens: int = 0, nano_usd: int = 0, request_id: str = "", progress: int = 0
) -> Reservation:
    costs = Costs(tokens, nano_usd)
    return Reservation(plan, request_id or next(ids), costs, b"\xff who", progress, clock.monotonic_s())


async def admitted(store: LimitStore, reservation: Reservation) -> bool:
    return (await store.admit(reservation)).denied is None


def ms(year: int, month: int, day: int, hour: int = 0, minute: int = 0, second: int = 0) -> int:
    return int(datetime(year, month, day, hour, minute, second, tzinfo=UTC).timestamp()) * 1000


async def test_as_many_are_admitted_as_the_limit_says(store: LimitStore, clock: Clock) -> None:
    plan = Plan("t", (RPM,))
    answers = [await store.admit(asking(plan, clock)) for _ in range(4)]
    assert [a.denied for a in answers] == [None, None, None, 0]
    assert [a.remaining for a in answers] == [[2], [1], [0], [0]]
    assert [a.wait_ms for a in answers] == [0, 0, 0, 61_000]


async def test_who_waits_as_told_is_admitted_and_a_millisecond_earlier_is_not(store: LimitStore, clock: Clock) -> None:
    plan = Plan("t", (RPM, TPM))
    for tokens in (40, 30, 30):
        assert await admitted(store, asking(plan, clock, tokens))
        clock.forward(7_300)
    refused = await store.admit(asking(plan, clock, 65))
    wait_ms = (7 + 61) * 1_000 - 3 * 7_300
    assert (refused.denied, refused.wait_ms) == (1, wait_ms)
    clock.forward(wait_ms - 1)
    assert not await admitted(store, asking(plan, clock, 65))
    clock.forward(1)
    assert await admitted(store, asking(plan, clock, 65))


async def test_the_rule_that_asks_for_the_longest_wait_is_named(store: LimitStore, clock: Clock) -> None:
    plan = Plan("t", (RPM, Window("key:a", "requests", 3, 60 * MINUTE), AT_ONCE))
    for _ in range(3):
        reservation = asking(plan, clock)
        await store.admit(reservation)
        store.settle(reservation, Costs(), exact=True)
    assert (await store.admit(asking(plan, clock))).denied == 1


async def test_what_can_never_pass_has_no_wait(store: LimitStore, clock: Clock) -> None:
    plan = Plan("t", (RPM, TPM, PER_DAY))
    answer = await store.admit(asking(plan, clock, 101))
    assert (answer.denied, answer.wait_ms) == (1, None)
    answer = await store.admit(asking(plan, clock, 1_001))
    assert answer.wait_ms is None
    assert (await store.admit(asking(Plan("t", (Lease("key:b", 0),)), clock))).wait_ms is None


async def test_never_is_longer_than_any_wait(store: LimitStore, clock: Clock) -> None:
    hourly = Window("key:a", "requests", 1, 60 * MINUTE)
    for plan in (Plan("t", (hourly, TPM)), Plan("t", (TPM, hourly))):
        await store.admit(asking(plan, clock))
        answer = await store.admit(asking(plan, clock, 101))
        assert answer.denied is not None
        assert (plan.rules[answer.denied], answer.wait_ms) == (TPM, None)


async def test_a_refused_request_takes_nothing_from_anyone(store: LimitStore, clock: Clock) -> None:
    plan = Plan("t", (RPM, TPM, AT_ONCE, PER_DAY, MONEY))
    before = await store.admit(asking(plan, clock, 60, 600))
    for _ in range(5):
        assert not await admitted(store, asking(plan, clock, 41, 10))
    after = await store.admit(asking(plan, clock, 40, 400))
    assert before.remaining == [2, 40, 1, 940, 4_400]
    assert after.remaining == [1, 0, 0, 900, 4_000]


async def test_the_same_request_gets_the_same_answer_and_counts_once(store: LimitStore, clock: Clock) -> None:
    plan = Plan("t", (RPM, TPM, AT_ONCE, PER_DAY))
    reservation = asking(plan, clock, 50)
    first = await store.admit(reservation)
    clock.forward(10)
    assert await store.admit(reservation) == first
    store.settle(reservation, Costs(50), exact=True)
    assert await store.admit(reservation) == first
    assert (await store.admit(asking(plan, clock, 50))).remaining == [1, 0, 1, 900]


async def test_exact_usage_gives_back_what_was_not_used(store: LimitStore, clock: Clock) -> None:
    plan = Plan("t", (RPM, TPM, AT_ONCE, PER_DAY))
    reservation = asking(plan, clock, 90)
    await store.admit(reservation)
    clock.forward(5_000)
    store.settle(reservation, Costs(30), exact=True)
    assert (await store.admit(asking(plan, clock, 0))).remaining == [1, 70, 1, 970]


async def test_inexact_usage_gives_nothing_back_but_the_lease(store: LimitStore, clock: Clock) -> None:
    plan = Plan("t", (RPM, TPM, AT_ONCE, PER_DAY))
    reservation = asking(plan, clock, 90)
    await store.admit(reservation)
    store.settle(reservation, Costs(30), exact=False)
    assert (await store.admit(asking(plan, clock, 0))).remaining == [1, 10, 1, 910]


async def test_what_was_not_dispatched_is_taken_back_whole(store: LimitStore, clock: Clock) -> None:
    plan = Plan("t", (RPM, TPM, AT_ONCE, PER_DAY))
    reservation = asking(plan, clock, 90)
    await store.admit(reservation)
    store.settle(reservation, NOTHING, exact=True)
    assert (await store.admit(asking(plan, clock, 0))).remaining == [2, 100, 1, 1_000]


async def test_a_refund_goes_back_to_its_own_bucket(store: LimitStore, clock: Clock) -> None:
    plan = Plan("t", (TPM,))
    early, late = asking(plan, clock, 50), asking(plan, clock, 50)
    await store.admit(early)
    clock.forward(30_000)
    await store.admit(late)
    store.settle(early, Costs(10), exact=True)
    refused = await store.admit(asking(plan, clock, 50))
    assert refused.wait_ms == 31_000
    clock.forward(31_000)
    assert (await store.admit(asking(plan, clock, 0))).remaining == [50]


async def test_a_refund_that_comes_after_its_bucket_has_left_gives_nothing(store: LimitStore, clock: Clock) -> None:
    plan = Plan("t", (TPM,))
    early = asking(plan, clock, 50)
    await store.admit(early)
    clock.forward(90_000)
    await store.admit(asking(plan, clock, 70))
    store.settle(early, Costs(10), exact=True)
    assert (await store.admit(asking(plan, clock, 0))).remaining == [30]


async def test_an_overrun_is_a_debt_from_when_it_is_known(store: LimitStore, clock: Clock) -> None:
    plan = Plan("t", (TPM, PER_DAY))
    reservation = asking(plan, clock, 50)
    await store.admit(reservation)
    clock.forward(30_000)
    store.settle(reservation, Costs(140), exact=False)
    refused = await store.admit(asking(plan, clock, 5))
    assert refused.remaining == [0, 860]
    assert refused.wait_ms == 31_000
    clock.forward(31_000)
    assert (await store.admit(asking(plan, clock, 5))).remaining == [5, 855]


async def test_settling_twice_is_settling_once(store: LimitStore, clock: Clock) -> None:
    plan = Plan("t", (RPM, TPM, AT_ONCE, PER_DAY))
    reservation, other = asking(plan, clock, 20), asking(plan, clock, 30)
    await store.admit(reservation)
    await store.admit(other)
    for _ in range(3):
        store.settle(reservation, Costs(40), exact=True)
    assert (await store.admit(asking(plan, clock, 0))).remaining == [0, 30, 0, 930]


async def test_leases_limit_what_is_under_way_at_once(store: LimitStore, clock: Clock) -> None:
    plan = Plan("t", (AT_ONCE,))
    first, second = asking(plan, clock), asking(plan, clock)
    assert await admitted(store, first)
    assert await admitted(store, second)
    refused = await store.admit(asking(plan, clock))
    assert (refused.denied, refused.wait_ms) == (0, 1_000)
    store.settle(first, Costs(), exact=True)
    assert await admitted(store, asking(plan, clock))


async def test_a_lease_lapses_unless_it_is_kept_up(store: LimitStore, clock: Clock) -> None:
    plan = Plan("t", (AT_ONCE,))
    kept, lost = asking(plan, clock), asking(plan, clock)
    await store.admit(kept)
    await store.admit(lost)
    clock.forward(29_999)
    assert not await admitted(store, asking(plan, clock))
    await store.heartbeat([kept])
    clock.forward(1)
    assert await admitted(store, asking(plan, clock))
    assert not await admitted(store, asking(plan, clock))


async def test_a_shadow_rule_counts_and_refuses_nothing(store: LimitStore, clock: Clock) -> None:
    plan = Plan("t", (Window("key:a", "requests", 1, MINUTE, shadow=True), AT_ONCE))
    assert (await store.admit(asking(plan, clock))).shadowed == ()
    answer = await store.admit(asking(plan, clock))
    assert (answer.denied, answer.shadowed, answer.remaining) == (None, (0,), [0, 0])
    refused = await store.admit(asking(plan, clock))
    assert (refused.denied, refused.shadowed) == (1, (0,))


async def test_rules_of_one_scope_metric_and_span_share_a_counter_and_it_counts_once(
    store: LimitStore, clock: Clock
) -> None:
    plan = Plan("t", (RPM, Window("key:a", "requests", 2, MINUTE, shadow=True)))
    other = Plan("t", (Window("key:a", "requests", 5, MINUTE),))
    assert (await store.admit(asking(plan, clock))).remaining == [2, 1]
    assert (await store.admit(asking(other, clock))).remaining == [3]
    assert (await store.admit(asking(plan, clock))).remaining == [0, 0]


async def test_slots_do_not_share(store: LimitStore, clock: Clock) -> None:
    for user in ("key:a", "key:b", "key:a/model:m"):
        plan = Plan(user, (Window(user, "requests", 1, MINUTE),))
        assert await admitted(store, asking(plan, clock))
        assert not await admitted(store, asking(plan, clock))


async def test_a_window_is_whole_again_after_its_reset(store: LimitStore, clock: Clock) -> None:
    plan = Plan("t", (RPM, TPM))
    await store.admit(asking(plan, clock, 10))
    clock.forward(1_500)
    answer = await store.admit(asking(plan, clock, 10))
    assert answer.reset_ms == [60_500, 60_500]
    clock.forward(60_500)
    probe = asking(plan, clock, 0)
    assert (await store.admit(probe)).remaining == [2, 100]


async def test_a_clock_that_steps_back_never_admits_more(store: LimitStore, clock: Clock) -> None:
    plan = Plan("t", (RPM,))
    for _ in range(3):
        await store.admit(asking(plan, clock))
    clock.forward(-30_000)
    assert not await admitted(store, asking(plan, clock))
    clock.forward(-3_600_000)
    refused = await store.admit(asking(plan, clock))
    assert refused.denied == 0
    assert refused.wait_ms is not None
    clock.forward(refused.wait_ms)
    assert await admitted(store, asking(plan, clock))


async def test_a_quota_begins_with_what_the_ledger_knows(store: LimitStore, clock: Clock, ledger: Ledger) -> None:
    clock.now_ms = ms(2028, 2, 29, 12)
    ledger.add("key:a", ms(2028, 2, 28, 23, 59), 500)
    ledger.add("key:a", ms(2028, 2, 29), 300)
    plan = Plan("t", (PER_DAY, Quota("key:a", "tokens", 5_000, "month")))
    answer = await store.admit(asking(plan, clock, 100))
    assert answer.remaining == [600, 4_100]
    assert answer.reset_ms == [DAY // 2, DAY // 2]
    assert answer.at_ms == clock.now_ms
    asked = ledger.asked
    await store.admit(asking(plan, clock, 100))
    assert ledger.asked == asked


@pytest.mark.parametrize(
    ("now", "end"),
    [
        (ms(2027, 12, 31, 23, 59, 59), ms(2028, 1, 1)),
        (ms(2028, 1, 1), ms(2028, 2, 1)),
        (ms(2028, 2, 1), ms(2028, 3, 1)),
        (ms(2028, 2, 29, 23), ms(2028, 3, 1)),
        (ms(2027, 2, 28, 23), ms(2027, 3, 1)),
        (ms(2100, 2, 28), ms(2100, 3, 1)),
        (ms(2028, 3, 31, 1), ms(2028, 4, 1)),
        (ms(2028, 4, 30), ms(2028, 5, 1)),
        (ms(2028, 7, 31), ms(2028, 8, 1)),
        (ms(2028, 8, 1), ms(2028, 9, 1)),
    ],
)
async def test_months_end_when_the_calendar_says(store: LimitStore, clock: Clock, now: int, end: int) -> None:
    clock.now_ms = now
    answer = await store.admit(asking(Plan("t", (MONEY,)), clock, 0, 5_000))
    assert answer.reset_ms == [end - now]
    refused = await store.admit(asking(Plan("t", (MONEY,)), clock, 0, 1))
    assert (refused.denied, refused.wait_ms) == (0, end - now)
    clock.now_ms = end
    assert (await store.admit(asking(Plan("t", (MONEY,)), clock, 0, 1))).remaining == [4_999]


async def test_a_request_over_midnight_counts_where_it_was_admitted(
    store: LimitStore, clock: Clock, ledger: Ledger
) -> None:
    clock.now_ms = ms(2028, 5, 5, 23, 59, 50)
    plan = Plan("t", (PER_DAY,))
    over = asking(plan, clock, 100)
    await store.admit(over)
    clock.forward(20_000)
    await store.admit(asking(plan, clock, 10))
    store.settle(over, Costs(700), exact=True)
    store.recorded({over.request_id: ledger.add("key:a", ms(2028, 5, 5, 23, 59, 50), 700)})
    assert (await store.admit(asking(plan, clock, 10))).remaining == [980]


async def test_a_ledger_that_cannot_say_makes_the_store_unavailable(store: LimitStore, clock: Clock) -> None:
    async def down(*_: object) -> tuple[int, int]:
        raise LedgerUnavailable("the database is gone")

    store._seeding._used = down  # type: ignore[attr-defined]
    with pytest.raises(StoreUnavailable, match="key:a"):
        await store.admit(asking(Plan("t", (PER_DAY,)), clock))
    assert await admitted(store, asking(Plan("t", (RPM,)), clock))


async def test_a_settle_without_a_reservation_counts_in_windows_as_of_its_admission(
    store: LimitStore, clock: Clock
) -> None:
    plan = Plan("t", (RPM, TPM))
    lost = asking(plan, clock, 50)
    ancient = asking(plan, clock, 50)
    ancient.since_s -= 100
    clock.forward(40_000)
    store.settle(lost, Costs(30), exact=True)
    store.settle(ancient, Costs(30), exact=True)
    assert (await store.admit(asking(plan, clock, 0))).remaining == [1, 70]
    clock.forward(21_000)
    assert (await store.admit(asking(plan, clock, 0))).remaining == [1, 100]


async def test_a_settle_without_a_reservation_counts_in_quotas_once_its_row_is_recorded(
    store: LimitStore, clock: Clock, ledger: Ledger
) -> None:
    plan = Plan("t", (PER_DAY,))
    await store.admit(asking(plan, clock, 0))
    lost = asking(plan, clock, 50)
    store.settle(lost, Costs(30), exact=True, event=b"row")
    assert (await store.admit(asking(plan, clock, 0))).remaining == [1_000]
    seq = ledger.add("key:a", clock.now_ms, 30)
    for _ in range(2):
        store.recorded({lost.request_id: seq})
        assert (await recorded(store, plan, clock)).remaining == [970]


async def test_a_row_that_a_seeding_has_counted_is_not_counted_again(
    store: LimitStore, clock: Clock, ledger: Ledger
) -> None:
    plan = Plan("t", (PER_DAY,))
    lost = asking(plan, clock, 50)
    store.settle(lost, Costs(30), exact=True, event=b"row")
    seq = ledger.add("key:a", clock.now_ms, 30)
    assert (await store.admit(asking(plan, clock, 0))).remaining == [970]
    store.recorded({lost.request_id: seq})
    assert (await recorded(store, plan, clock)).remaining == [970]


async def test_a_heartbeat_makes_anew_what_was_lost(store: LimitStore, clock: Clock) -> None:
    plan = Plan("t", (RPM, TPM, AT_ONCE, PER_DAY))
    await store.admit(asking(plan, clock, 0))
    lost = asking(plan, clock, 50)
    clock.forward(5_000)
    for _ in range(2):
        await store.heartbeat([lost])
    assert (await store.admit(asking(plan, clock, 0))).denied == 2
    store.settle(lost, Costs(20), exact=True)
    assert (await store.admit(asking(plan, clock, 0))).remaining == [0, 80, 0, 980]


async def test_a_heartbeat_after_the_settle_changes_nothing(store: LimitStore, clock: Clock) -> None:
    plan = Plan("t", (RPM, TPM, AT_ONCE))
    reservation = asking(plan, clock, 50)
    await store.admit(reservation)
    store.settle(reservation, Costs(20), exact=True)
    await store.heartbeat([reservation])
    assert (await store.admit(asking(plan, clock, 0))).remaining == [1, 80, 1]


async def test_what_nobody_keeps_up_is_overdue_and_settles_like_any_other(store: LimitStore, clock: Clock) -> None:
    plan = Plan("team", (TPM, AT_ONCE, PER_DAY))
    dead, alive = asking(plan, clock, 50), asking(plan, clock, 10)
    dead.progress = 7
    await store.admit(dead)
    await store.admit(alive)
    await store.heartbeat([dead])
    clock.forward(44_999)
    await store.heartbeat([alive])
    assert await store.overdue() == []
    clock.forward(1)
    [found] = await store.overdue()
    assert (found.request_id, found.costs, found.intent, found.progress) == (
        dead.request_id,
        Costs(50),
        b"\xff who",
        7,
    )
    store.settle(found, Costs(20), exact=False, event=b"abandoned")
    assert await store.overdue() == []
    assert (await store.admit(asking(plan, clock, 0))).remaining == [40, 0, 940]


async def recorded(store: LimitStore, plan: Plan, clock: Clock) -> Decision:
    """The counters after what was recorded has reached them."""
    await store.heartbeat([])
    delivered = getattr(store, "delivered", None)
    if delivered is not None:
        await delivered()
    return await store.admit(asking(plan, clock, 0))

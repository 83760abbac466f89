"""Who is healthy, and who is asked next: the decisions by themselves, on a clock that the test moves."""

from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from adapters.echo import Adapter
from gateway.errors import CredentialRefused, Overloaded, UpstreamError, UpstreamFailed, UpstreamUnreachable
from gateway.models import Target
from gateway.routing.health import (
    CREDENTIAL_TIMES,
    EJECTION_S,
    FAILURES,
    FULL_S,
    JITTER,
    LONGEST_BUSY_S,
    LONGEST_EJECTION_S,
    RAMP_S,
    Health,
)
from gateway.routing.order import Candidate, Choice, in_order
from gateway.settings import Upstream

ECHO = Adapter(Upstream(adapter="echo"))
BROKEN = UpstreamFailed("broken")


def target(name: str, **changes: Any) -> Target:
    return Target(name, "m", ECHO, **changes)


def candidate(name: str, **changes: Any) -> Candidate:
    return target(name, **changes), Health(lambda: 0.0)


def eject(health: Health, now: float) -> None:
    while health.failed(BROKEN, now, last_standing=False) is None:
        pass


def names(candidates: list[Candidate]) -> list[str]:
    return [target.upstream for target, _ in candidates]


def first(*candidates: Candidate, now: float = 0.0) -> str | None:
    chosen = Choice(candidates, now, lambda: 0.5).next(now)
    return None if chosen is None else chosen.upstream


def test_a_target_is_ejected_after_failures_in_a_row_and_no_sooner() -> None:
    health = Health(lambda: 0.0)
    for _ in range(FAILURES - 1):
        assert health.failed(BROKEN, 0.0, last_standing=False) is None
    health.completed(0.0)
    for _ in range(FAILURES - 1):
        assert health.failed(BROKEN, 0.0, last_standing=False) is None
    assert health.failed(BROKEN, 0.0, last_standing=False) == "failures"
    assert (health.state(0.0), health.state(EJECTION_S - 0.1), health.state(EJECTION_S)) == (
        "ejected",
        "ejected",
        "trial",
    )


def test_each_ejection_in_a_row_is_longer_up_to_a_bound() -> None:
    health, now, lengths = Health(lambda: 0.0), 0.0, []
    for _ in range(40):
        eject(health, now)
        lengths.append(health.ejection_s)
        now += health.ejection_s
    assert lengths[:3] == [EJECTION_S, 2 * EJECTION_S, 3 * EJECTION_S]
    assert lengths[-1] == LONGEST_EJECTION_S


def test_on_trial_one_failure_is_enough_and_one_answer_too() -> None:
    health = Health(lambda: 0.0)
    eject(health, 0.0)
    assert health.failed(BROKEN, EJECTION_S, last_standing=False) == "failures"
    later = EJECTION_S + 2 * EJECTION_S
    health.answered(later)
    assert health.state(later) == "up"
    assert health.failed(BROKEN, later, last_standing=False) is None


def test_a_target_that_was_well_for_long_enough_begins_anew() -> None:
    health = Health(lambda: 0.0)
    eject(health, 0.0)
    health.answered(EJECTION_S)
    health.completed(EJECTION_S + RAMP_S)
    eject(health, 100.0)
    assert health.ejection_s == EJECTION_S


def test_jitter_makes_an_ejection_shorter_never_longer() -> None:
    health = Health(lambda: 0.999)
    eject(health, 0.0)
    assert EJECTION_S * (1 - JITTER) <= health.ejection_s < EJECTION_S


def test_a_refused_credential_ejects_at_once_and_for_longer() -> None:
    health = Health(lambda: 0.0)
    assert health.failed(CredentialRefused(), 0.0, last_standing=False) == "credential"
    assert health.ejection_s == CREDENTIAL_TIMES * EJECTION_S


def test_being_full_ejects_nobody() -> None:
    health = Health(lambda: 0.0)
    for _ in range(100):
        assert health.failed(Overloaded(""), 0.0, last_standing=False) is None


def test_the_last_one_standing_is_not_ejected() -> None:
    health = Health(lambda: 0.0)
    for _ in range(100):
        assert health.failed(BROKEN, 0.0, last_standing=True) is None
    assert health.state(0.0) == "up"
    assert health.failing
    assert health.failed(BROKEN, 0.0, last_standing=False) == "failures"


@pytest.mark.parametrize(("told_s", "busy_s"), [(5.0, 5.0), (1e9, LONGEST_BUSY_S), (0.0, 0.0)])
def test_a_target_that_says_when_to_come_back_is_left_alone_until_then(told_s: float, busy_s: float) -> None:
    health = Health(lambda: 0.0)
    health.failed(Overloaded("", busy_s=told_s), 0.0, last_standing=False)
    assert health.busy_s(0.0) == busy_s
    assert health.busy_s(busy_s) == 0


def test_who_refused_without_saying_for_how_long_is_asked_after_the_others_for_a_while() -> None:
    full, other = candidate("full"), candidate("other", tier=1)
    full[1].failed(Overloaded(""), 0.0, last_standing=False)
    assert first(full, other, now=0.0) == "other"
    assert first(full, other, now=FULL_S) == "full"
    assert first(full, now=0.0) == "full"


def test_lower_tiers_go_first() -> None:
    candidates = [candidate("c", tier=2), candidate("a"), candidate("b", tier=1)]
    assert names(in_order(candidates, 0.0, Random(1).random)) == ["a", "b", "c"]


def test_within_a_tier_each_is_first_as_often_as_its_weight_says() -> None:
    candidates = [candidate("a", weight=3), candidate("b"), candidate("c", weight=0.5)]
    random = Random(7).random
    counted = Counter(names(in_order(candidates, 0.0, random))[0] for _ in range(9000))
    assert counted["a"] == pytest.approx(6000, rel=0.05)
    assert counted["b"] == pytest.approx(2000, rel=0.1)
    assert counted["c"] == pytest.approx(1000, rel=0.15)


def test_after_an_ejection_a_target_gets_its_share_back_step_by_step() -> None:
    health = Health(lambda: 0.0)
    eject(health, 0.0)
    health.answered(EJECTION_S)
    ramp = [health.ramp(EJECTION_S + seconds) for seconds in (0.0, RAMP_S / 2, RAMP_S, 2 * RAMP_S)]
    assert ramp == [0.1, 0.5, 1.0, 1.0]


def test_an_ejected_target_is_skipped_while_another_is_well() -> None:
    out, well = candidate("out"), candidate("well", tier=1)
    eject(out[1], 0.0)
    for _ in range(5):
        assert first(out, well, now=1.0) == "well"


def test_where_the_others_have_failed_a_request_an_ejected_target_is_tried_but_once_a_second() -> None:
    out, well = candidate("out"), candidate("well", tier=1)
    eject(out[1], 0.0)
    ways = [Choice([out, well], now, lambda: 0.5) for now in (1.0, 1.5, 2.0)]
    tried = [
        [chosen.upstream for _ in range(2) if (chosen := way.next(now))]
        for way, now in zip(ways, (1.0, 1.5, 2.0), strict=True)
    ]
    assert tried == [["well", "out"], ["well"], ["well", "out"]]


def test_on_trial_a_target_gets_one_request_at_a_time() -> None:
    tried, other = candidate("tried"), candidate("other", tier=1)
    eject(tried[1], 0.0)
    assert first(tried, other, now=EJECTION_S) == "tried"
    tried[1].in_flight = 1
    assert first(tried, other, now=EJECTION_S) == "other"


def test_where_all_fail_one_request_a_second_looks_for_who_is_back() -> None:
    out, failing = candidate("out"), candidate("failing", tier=1)
    eject(out[1], 0.0)
    for _ in range(FAILURES):
        failing[1].failed(BROKEN, 0.0, last_standing=True)
    firsts = [first(out, failing, now=now) for now in (0.0, 0.2, 0.9, 1.0, 1.5, 2.0)]
    assert firsts == ["out", "failing", "failing", "out", "failing", "out"]


def test_where_all_are_out_the_last_to_go_is_asked_all_the_same() -> None:
    earlier, later = candidate("earlier"), candidate("later", tier=1)
    eject(earlier[1], 0.0)
    eject(later[1], 1.0)
    assert [first(earlier, later, now=2.0) for _ in range(4)] == ["earlier", "later", "later", "later"]


def test_a_target_without_room_is_skipped_and_none_is_left_where_all_are_full() -> None:
    small, large = candidate("small", max_in_flight=1), candidate("large", tier=1, max_in_flight=2)
    small[1].in_flight = 1
    assert first(small, large) == "large"
    large[1].in_flight = 2
    assert first(small, large) is None


def test_one_that_stands_alone_is_asked_whatever_became_of_it_unless_it_wants_none() -> None:
    alone = candidate("alone", max_in_flight=1)
    eject(alone[1], 0.0)
    assert first(alone, now=1.0) == "alone"
    alone[1].failed(Overloaded("", busy_s=7), 1.0, last_standing=True)
    choice = Choice([alone], 2.0, lambda: 0.5)
    assert choice.next(2.0) is None
    assert choice.wait_s(2.0) == 6


class Fleet(RuleBasedStateMachine):
    """Requests that begin, end well or badly, in any order, on targets of one model."""

    running = Bundle("running")

    @initialize(count=st.integers(1, 4), seed=st.integers(0, 99))
    def build(self, count: int, seed: int) -> None:
        self.now = 0.0
        self.random = Random(seed).random
        self.candidates = [
            (target(str(number), tier=number % 2, max_in_flight=3), Health(self.random)) for number in range(count)
        ]

    @rule(target=running)
    def begin(self) -> Any:
        choice = Choice(self.candidates, self.now, self.random)
        chosen = []
        while (found := choice.next(self.now)) is not None:
            chosen.append(found)
        assert len(set(map(id, chosen))) == len(chosen), "no target twice"
        room = [health for t, health in self.candidates if health.in_flight < 3 and not health.busy_s(self.now)]
        up = [health for health in room if not health.is_out(self.now)]
        assert chosen or not up, "who is up and has room is asked"
        if len(self.candidates) == 1:
            assert bool(chosen) == bool(room), "who stands alone is asked, if there is room"
        if not chosen:
            return None
        health = next(health for t, health in self.candidates if t is chosen[0])
        health.in_flight += 1
        return health

    @rule(
        health=running,
        error=st.sampled_from([None, BROKEN, UpstreamUnreachable(""), Overloaded(""), CredentialRefused()]),
    )
    def end(self, health: Health | None, error: UpstreamError | None) -> None:
        if health is None or not health.in_flight:
            return
        health.in_flight -= 1
        if error is None:
            health.answered(self.now)
            health.completed(self.now)
            assert health.state(self.now) == "up"
        else:
            others = [other for _, other in self.candidates if other is not health]
            last = all(other.is_out(self.now) for other in others)
            reason = health.failed(error, self.now, last_standing=last)
            assert reason is None or not last

    @rule(seconds=st.floats(0.1, 400))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def nobody_is_ejected_for_longer_than_the_bound(self) -> None:
        for _, health in getattr(self, "candidates", ()):
            assert health.ejection_s <= LONGEST_EJECTION_S
            assert health.state(self.now + LONGEST_EJECTION_S) != "ejected"


TestFleet = Fleet.TestCase
TestFleet.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(
    weights=st.lists(st.tuples(st.integers(0, 3), st.floats(0.001, 1000)), min_size=1, max_size=6),
    seed=st.integers(0, 999),
)
def test_an_order_is_of_all_and_by_tier(weights: list[tuple[int, float]], seed: int) -> None:
    candidates = [candidate(str(n), tier=tier, weight=weight) for n, (tier, weight) in enumerate(weights)]
    ordered = in_order(candidates, 0.0, Random(seed).random)
    assert sorted(names(ordered)) == sorted(names(candidates))
    assert [t.tier for t, _ in ordered] == sorted(t.tier for t, _ in ordered)

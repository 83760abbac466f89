"""What a client is told of its limits."""

from datetime import UTC, datetime

import pytest

from gateway.errors import GatewayError
from gateway.limits import told
from gateway.limits.terms import Terms, _term
from gateway.settings import Limit
from gateway.stores import Costs, Decision

NOON = datetime(2026, 11, 27, 12, tzinfo=UTC)


def terms(**limits: float | Limit) -> Terms:
    given = [(name, limit if isinstance(limit, Limit) else Limit(limit=limit)) for name, limit in limits.items()]
    return Terms("key:alice", tuple(_term("key:alice", "key 'alice'", name, limit) for name, limit in given))


def refusal(of: Terms, decision: Decision, costs: Costs | None = None) -> GatewayError:
    return told.refusal(of, decision, costs or Costs(tokens=10), NOON)


@pytest.mark.parametrize(
    ("ms", "shown"),
    [
        (0, "0ms"), (850, "850ms"), (1000, "1s"), (1001, "2s"), (59_999, "1m0s"), (60_000, "1m0s"), (360_000, "6m0s"),
        (3_723_000, "1h2m3s"), (3_600_000, "1h0m0s"), (90_000_000, "25h0m0s"),
    ],
)  # fmt: skip
def test_durations_are_written_as_go_writes_them(ms: int, shown: str) -> None:
    assert told.go_duration(ms) == shown


def test_the_headers_tell_of_the_limit_of_which_the_least_is_left() -> None:
    of = terms(requests_per_minute=60, requests_per_hour=100, tokens_per_minute=1000, concurrent_requests=2)
    decision = Decision(remaining=[30, 10, 900, 0], reset_ms=[60_000, 3_600_000, 850, 0])
    assert dict(told.headers(of, decision)) == {
        "x-ratelimit-limit-requests": "100",
        "x-ratelimit-remaining-requests": "10",
        "x-ratelimit-reset-requests": "1h0m0s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "900",
        "x-ratelimit-reset-tokens": "850ms",
    }


def test_limits_that_refuse_nothing_are_not_in_the_headers() -> None:
    of = terms(requests_per_minute=Limit(limit=5, enforce="shadow"), usd_per_day=1)
    assert dict(told.headers(of, Decision(remaining=[0, 0], reset_ms=[1, 1]))) == {}


def test_a_warning_comes_at_80_and_at_95_percent() -> None:
    of = terms(tokens_per_month=100, tokens_per_minute=100, requests_per_minute=100, concurrent_requests=1)
    found = told.warnings(of, Decision(remaining=[21, 20, 5, 0], reset_ms=[1] * 4))
    assert [(percent, said) for _, percent, said in found] == [
        (80, "tokens per minute of key 'alice': 80 % used"),
        (95, "requests per minute of key 'alice': 95 % used"),
    ]


def test_what_is_not_used_up_is_not_said_to_be() -> None:
    [(_, _, said)] = told.warnings(terms(tokens_per_day=2000), Decision(remaining=[4], reset_ms=[1]))
    assert said == "tokens per day of key 'alice': 99 % used"


@pytest.mark.parametrize(("wait_ms", "seconds"), [(1, "1"), (1000, "1"), (1001, "2"), (61_500, "62")])
def test_a_rate_limit_says_when_to_come_back_in_whole_seconds_and_exactly(wait_ms: int, seconds: str) -> None:
    decision = Decision(remaining=[0], reset_ms=[60_000], denied=0, wait_ms=wait_ms)
    error = refusal(terms(requests_per_minute=60), decision)
    assert (error.status, error.type, error.code) == (429, "requests", "rate_limit_exceeded")
    assert error.headers == {"retry-after": seconds, "retry-after-ms": str(wait_ms)}


def test_the_message_names_the_limit_and_its_figures() -> None:
    decision = Decision(remaining=[4], reset_ms=[60_000], denied=0, wait_ms=2500)
    error = refusal(terms(tokens_per_minute=100), decision)
    assert (error.type, error.message) == (
        "tokens",
        "Rate limit reached. tokens per minute of key 'alice': limit 100, used 96, remaining 4, requested 10. "
        "Please try again in 3s.",
    )


def test_a_quota_is_not_to_be_retried_and_says_when_it_starts_anew() -> None:
    decision = Decision(remaining=[250_000_000], reset_ms=[12 * 3_600_000], denied=0, wait_ms=12 * 3_600_000)
    error = refusal(terms(usd_per_day=1.5), decision, Costs(nano_usd=500_000_000))
    assert (error.status, error.type, error.code) == (429, "insufficient_quota", "insufficient_quota")
    assert error.headers == {"x-should-retry": "false"}
    assert error.message == (
        "Quota used up. US dollars per day of key 'alice': limit $1.5, used $1.25, remaining $0.25, requested $0.5. "
        "It starts anew at 2026-11-28T00:00:00Z; an administrator of this gateway can raise it."
    )


def test_a_request_that_can_never_pass_is_no_rate_limit() -> None:
    decision = Decision(remaining=[100], reset_ms=[0], denied=0, wait_ms=None)
    error = refusal(terms(tokens_per_minute=100), decision, Costs(tokens=101))
    assert (error.status, error.code) == (400, "request_too_large")
    assert "needs 101, and can never pass: tokens per minute of key 'alice': limit 100" in error.message


def test_too_many_at_a_time_is_to_be_tried_again_in_a_second() -> None:
    decision = Decision(remaining=[0], reset_ms=[0], denied=0, wait_ms=250)
    error = refusal(terms(concurrent_requests=2), decision)
    assert (error.status, error.type, error.headers["retry-after"]) == (429, "requests", "1")


def test_a_limit_of_nothing_is_a_quota_that_is_used_up() -> None:
    decision = Decision(remaining=[0], reset_ms=[0], denied=0, wait_ms=None)
    error = refusal(terms(requests_per_minute=0), decision)
    assert (error.status, error.code) == (429, "insufficient_quota")

"""Which limits a request is under, from the configuration."""

import pytest

from gateway.auth import ANONYMOUS, Principal
from gateway.limits.terms import Terms, terms_of
from gateway.settings import Settings, SettingsError, parse
from gateway.stores import Lease, Quota, Window

DIGEST = "0" * 64
MODELS = """
upstreams: {echo: {adapter: echo}}
models:
  smart: {targets: [{upstream: echo}], prices: {input: 1, output: 2}, limits: {requests_per_minute: 7}}
  plain: {targets: [{upstream: echo}], prices: {input: 0, output: 0}}
"""


def settings(text: str) -> Settings:
    return parse(MODELS + text, "g.yaml")


def shown(terms: Terms) -> list[tuple[str, str, int]]:
    return [(term.whose, term.name, term.rule.limit) for term in terms.terms]


ALICE = Principal("alice", "t", user="ann", team="red")
EVERYWHERE = f"""
limits: {{requests_per_minute: 60, tokens_per_minute: 1000}}
auth:
  keys: [{{name: alice, sha256: "{DIGEST}", user: ann, team: red,
          limits: {{requests_per_minute: 5, models: {{smart: {{tokens_per_hour: 9}}}}}}}}]
  teams: {{red: {{limits: {{usd_per_month: 1.5, models: {{smart: {{tokens_per_month: 8}}}}}}}}}}
  users: {{ann: {{limits: {{concurrent_requests: 2}}}}}}
"""


def test_a_request_is_under_the_limits_of_its_key_user_and_team_and_of_each_on_its_model() -> None:
    assert shown(terms_of(settings(EVERYWHERE), ALICE, "smart")) == [
        ("key 'alice'", "requests per minute", 5),
        ("key 'alice'", "tokens per minute", 1000),
        ("key 'alice' on `smart`", "requests per minute", 7),
        ("key 'alice' on `smart`", "tokens per hour", 9),
        ("user 'ann'", "concurrent requests", 2),
        ("team 'red'", "US dollars per month", 1_500_000_000),
        ("team 'red' on `smart`", "tokens per month", 8),
    ]


def test_another_model_is_under_none_of_the_limits_on_that_one() -> None:
    names = [whose for whose, _, _ in shown(terms_of(settings(EVERYWHERE), ALICE, "plain"))]
    assert names == ["key 'alice'", "key 'alice'", "user 'ann'", "team 'red'"]


def test_the_counters_of_a_team_lie_in_one_slot() -> None:
    assert terms_of(settings(EVERYWHERE), ALICE, "smart").plan.slot == "team:red"
    assert Principal("bob", "t", user="ann").slot == "user:ann"
    assert Principal("bob", "t").slot == "key:bob"


def test_the_defaults_hold_for_who_has_no_key_too() -> None:
    terms = terms_of(settings("limits: {requests_per_hour: 3}"), ANONYMOUS, "plain")
    assert [term.rule for term in terms.terms] == [Window("key:anonymous", "requests", 3, 3_600_000)]


@pytest.mark.parametrize(
    ("limit", "rule"),
    [
        ("requests_per_minute: 5", Window("key:anonymous", "requests", 5, 60_000)),
        ("requests_per_day: 5", Window("key:anonymous", "requests", 5, 86_400_000)),
        ("requests_per_day: {limit: 5, window: calendar}", Quota("key:anonymous", "requests", 5, "day")),
        ("tokens_per_hour: 5", Window("key:anonymous", "tokens", 5, 3_600_000)),
        ("tokens_per_day: 5", Quota("key:anonymous", "tokens", 5, "day")),
        ("tokens_per_day: {limit: 5, window: sliding}", Window("key:anonymous", "tokens", 5, 86_400_000)),
        ("tokens_per_month: 5", Quota("key:anonymous", "tokens", 5, "month")),
        ("usd_per_day: 0.07", Quota("key:anonymous", "nano_usd", 70_000_000, "day")),
        ("usd_per_month: {limit: 1, enforce: shadow}", Quota("key:anonymous", "nano_usd", 10**9, "month", True)),
        ("concurrent_requests: 5", Lease("key:anonymous", 5)),
    ],
)
def test_each_limit_means_one_rule(limit: str, rule: object) -> None:
    assert [term.rule for term in terms_of(settings(f"limits: {{{limit}}}"), ANONYMOUS, "plain").terms] == [rule]


def test_a_limit_that_is_off_is_none() -> None:
    off = settings("limits: {requests_per_minute: {limit: 5, enforce: off}}")
    assert terms_of(off, ANONYMOUS, "plain").terms == ()


@pytest.mark.parametrize(
    ("limit", "policy"),
    [
        ("requests_per_minute: 5", "local"),
        ("tokens_per_month: 5", "guard"),
        ("tokens_per_minute: {limit: 5, strict: true}", "closed"),
        ("tokens_per_minute: {limit: 5, on_store_loss: open}", "open"),
    ],
)
def test_what_holds_without_the_store_depends_on_the_kind_of_limit(limit: str, policy: str) -> None:
    terms = terms_of(settings(f"limits: {{{limit}}}"), ANONYMOUS, "plain")
    assert [term.on_loss for term in terms.terms] == [policy]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("limits: {requests_per_minute: 1.5}", "limits.requests_per_minute: not a whole number up to"),
        ("limits: {requests_per_minute: {limit: 5, strict: true}}", "`strict` is for tokens and money"),
        ("limits: {tokens_per_month: {limit: 5, window: sliding}}", "`window` is for requests and tokens per day"),
        ("limits: {usd_per_day: 100000000}", "limits.usd_per_day: more than 9000000 US dollars"),
        ("limits: {usd_per_day: -1}", "limits.usd_per_day: expected"),
        ("limits: {usd_per_day: .inf}", "limits.usd_per_day"),
        ("limits: {usd_per_day: .nan}", ".nan is no number"),
        (
            f"auth: {{keys: [{{name: a, sha256: '{DIGEST}', limits: {{models: {{smrt: {{}}}}}}}}]}}",
            "auth.keys[0].limits.models.smrt: there is no model 'smrt'; did you mean 'smart'?",
        ),
        ("auth: {teams: {red: {models: [smrt]}}}", "auth.teams.red.models[0]: there is no model 'smrt'"),
        (
            f"auth: {{users: {{ann: {{limits: {{concurrent_requests: 1}}}}}}, keys: ["
            f"{{name: a, sha256: '{DIGEST}', user: ann, team: red}}, {{name: b, sha256: '{DIGEST}', user: ann}}]}}",
            "auth.users.ann.limits: all keys of a user with limits must be in one team, or in none",
        ),
    ],
)
def test_limits_that_mean_nothing_are_refused(text: str, fault: str) -> None:
    with pytest.raises(SettingsError) as refused:
        settings(text)
    assert fault in str(refused.value)


def test_a_limit_of_money_needs_prices() -> None:
    unpriced = "upstreams: {echo: {adapter: echo}}\nmodels: {smart: {targets: [{upstream: echo}]}}\n"
    with pytest.raises(SettingsError, match="the model 'smart' has no prices: give it some"):
        parse(f"{unpriced}limits: {{usd_per_day: 1}}", "g.yaml")


def test_a_limit_of_money_needs_no_prices_on_what_its_key_may_not_use() -> None:
    document = """
        upstreams: {echo: {adapter: echo}}
        models:
          smart: {targets: [{upstream: echo}], prices: {input: 1, output: 2}}
          other: {targets: [{upstream: echo}]}
        auth:
          keys: [{name: a, sha256: %s, models: [smart%s], limits: {usd_per_day: 1}}]
    """
    assert parse(document % ("a" * 64, ""), "g.yaml").has_limits
    with pytest.raises(SettingsError, match=r"auth\.keys\[0\]\.limits\.usd_per_day: the model 'other' has no prices"):
        parse(document % ("a" * 64, ", other"), "g.yaml")

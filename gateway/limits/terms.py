"""Which limits is a request under? The configuration's, as rules for a store."""

from collections.abc import Iterator
from decimal import Decimal
from typing import Literal

from msgspec import Struct

from gateway.auth import Principal
from gateway.settings import Limit, Limits, LimitsByModel, Settings
from gateway.stores import Decision, Lease, Metric, Period, Plan, Quota, Rule, Window

NANO = 10**9

OnLoss = Literal["local", "guard", "closed", "open"]

METRICS: dict[str, Metric] = {"requests": "requests", "tokens": "tokens", "usd": "nano_usd"}
RATES: tuple[Metric, Metric] = "requests", "tokens"
WINDOWS_MS = {"minute": 60_000, "hour": 3_600_000, "day": 86_400_000}
PERIODS: dict[str, Period] = {"day": "day", "month": "month"}


class Term(Struct, frozen=True):
    """One limit: the rule, whose it is and what it is called where people read it, and how strictly it holds."""

    rule: Rule
    whose: str
    name: str
    strict: bool
    on_loss: OnLoss

    @property
    def label(self) -> str:
        """For metrics: what is limited, and for which kind of holder."""
        return f"{self.whose.partition(' ')[0]} {self.name}"


class Terms:
    """
    All that one key is under on one model: the plan for the store, and a term for each of its rules.

    `firm` are those that refuse when they are used up, as place and limit, leases aside; `rates` those of them that
    headers tell of, behind the names of these. `seen` is what the store last said of them, None before it has, and
    `seen_s` when, on the monotonic clock.
    """

    __slots__ = ("ceiling_nano_usd", "ceiling_tokens", "firm", "plan", "rates", "seen", "seen_s", "strict", "terms")

    def __init__(self, slot: str, terms: tuple[Term, ...]) -> None:
        self.plan = Plan(slot, tuple(term.rule for term in terms))
        self.terms = terms
        self.firm = _firm(terms, *METRICS.values())
        self.rates = [(_headers(metric), rules) for metric in RATES if (rules := _firm(terms, metric))]
        self.seen: Decision | None = None
        self.seen_s = 0.0
        self.strict = any(term.strict for term in terms)
        self.ceiling_tokens = _ceiling(terms, "tokens")
        self.ceiling_nano_usd = _ceiling(terms, "nano_usd")


def _firm(terms: tuple[Term, ...], *metrics: Metric) -> list[tuple[int, int]]:
    rules = [term.rule for term in terms]
    return [
        (index, rule.limit)
        for index, rule in enumerate(rules)
        if not isinstance(rule, Lease) and rule.metric in metrics and not rule.shadow
    ]


def _headers(metric: Metric) -> tuple[str, str, str]:
    return f"x-ratelimit-limit-{metric}", f"x-ratelimit-remaining-{metric}", f"x-ratelimit-reset-{metric}"


def _ceiling(terms: tuple[Term, ...], metric: Metric) -> int | None:
    """The most that one request can take of *metric* and be admitted; None where nothing bounds it."""
    return min((limit for _, limit in _firm(terms, metric)), default=None)


def terms_of(settings: Settings, principal: Principal, model: str) -> Terms:
    """What *principal* has to keep to when it asks for *model*."""
    return Terms(principal.slot, tuple(_terms(settings, principal, model)))


def _terms(settings: Settings, principal: Principal, model: str) -> Iterator[Term]:
    auth = settings.auth
    key = next((key.limits for key in auth.keys if key.name == principal.name), LimitsByModel())
    yield from _of_holder(f"key:{principal.name}", f"key '{principal.name}'", key, settings.limits)
    yield from _of_model(f"key:{principal.name}", f"key '{principal.name}'", key, model, settings.models[model].limits)
    for kind, name, groups in (("user", principal.user, auth.users), ("team", principal.team, auth.teams)):
        if name is not None and name in groups:
            limits = groups[name].limits
            yield from _of_holder(f"{kind}:{name}", f"{kind} '{name}'", limits, Limits())
            yield from _of_model(f"{kind}:{name}", f"{kind} '{name}'", limits, model, Limits())


def _of_model(scope: str, whose: str, limits: LimitsByModel, model: str, defaults: Limits) -> Iterator[Term]:
    own = limits.models.get(model, Limits())
    yield from _of_holder(f"{scope}/model:{model}", f"{whose} on `{model}`", own, defaults)


def _of_holder(scope: str, whose: str, limits: Limits, defaults: Limits) -> Iterator[Term]:
    """A term for each limit of *limits*, or of *defaults* where those say nothing."""
    for name in Limits.__struct_fields__:
        given = getattr(limits, name)
        given = getattr(defaults, name) if given is None else given
        if given is None:
            continue
        limit = given if isinstance(given, Limit) else Limit(limit=given)
        if limit.enforce != "off":
            yield _term(scope, whose, name, limit)


def _term(scope: str, whose: str, name: str, limit: Limit) -> Term:
    rule = rule_for(scope, name, limit)
    default: OnLoss = "closed" if limit.strict else "guard" if isinstance(rule, Quota) else "local"
    said = name.replace("_", " ").replace("usd", "US dollars")
    return Term(rule, whose, said, limit.strict, limit.on_store_loss or default)


def rule_for(scope: str, name: str, limit: Limit) -> Rule:
    """The rule that a limit such as `tokens_per_minute` means."""
    shadow = limit.enforce == "shadow"
    if name == "concurrent_requests":
        return Lease(scope, int(limit.limit), shadow=shadow)
    what, _, span = name.partition("_per_")
    metric = METRICS[what]
    much = int(Decimal(str(limit.limit)) * NANO) if metric == "nano_usd" else int(limit.limit)
    by_calendar = span == "month" or metric == "nano_usd"
    if span == "day" and metric != "nano_usd":
        by_calendar = (limit.window or ("sliding" if metric == "requests" else "calendar")) == "calendar"
    if by_calendar:
        return Quota(scope, metric, much, PERIODS[span], shadow)
    return Window(scope, metric, much, WINDOWS_MS[span], shadow)

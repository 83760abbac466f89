"""What is a client told of its limits? OpenAI's headers, warnings, and errors that name the limit and its figures."""

from datetime import UTC, datetime, timedelta

from gateway.errors import GatewayError, QuotaExceeded, RateLimited, RequestTooLarge
from gateway.limits.terms import NANO, Term, Terms
from gateway.stores import Costs, Decision, Lease, Quota, Rule

CONCURRENCY_WAIT_MS = 1000
"""Nobody knows when a request will end: the only wait that is not promised."""

WARN_AT = ((0.05, 95), (0.2, 80))
"""The share that is left, and the percentage that is used, from the more urgent on."""


def headers(terms: Terms, decision: Decision) -> dict[str, str]:
    """OpenAI's six, as far as there are limits: for requests and for tokens that of which the least is left."""
    said, remaining = {}, decision.remaining
    for (of_limit, of_remaining, of_reset), limits in terms.rates:
        index, limit = limits[0] if len(limits) == 1 else min(limits, key=lambda one: _share_left(remaining, *one))
        said[of_limit] = str(limit)
        said[of_remaining] = str(remaining[index])
        said[of_reset] = go_duration(decision.reset_ms[index])
    return said


def _share_left(remaining: list[int], index: int, limit: int) -> float:
    return remaining[index] / limit if limit else 0.0


def warnings(terms: Terms, decision: Decision) -> list[tuple[Term, int, str]]:
    """The limits of which 80 or 95 % and more are used: with that percentage, and in words."""
    remaining = decision.remaining
    return [
        (terms.terms[index], _percent(remaining[index], limit), _used_up(terms.terms[index], remaining[index]))
        for index, limit in terms.firm
        if remaining[index] <= 0.2 * limit
    ]


def _percent(left: int, limit: int) -> int:
    return next(percent for share, percent in WARN_AT if left <= share * limit)


def _used_up(term: Term, left: int) -> str:
    used = 100 * (term.rule.limit - left) // term.rule.limit if term.rule.limit else 100
    return f"{term.name} of {term.whose}: {used} % used"


def refusal(terms: Terms, decision: Decision, costs: Costs, now: datetime) -> GatewayError:
    """The error for a decision that denied. *now* is in UTC."""
    assert decision.denied is not None
    term = terms.terms[decision.denied]
    rule, used = term.rule, term.rule.limit - decision.remaining[decision.denied]
    about = f"{term.name} of {term.whose}: limit {_much(rule, rule.limit)}, used {_much(rule, used)}"
    if isinstance(rule, Lease):
        return RateLimited(
            f"Too many requests at a time. {about}. Wait until one has ended.", "requests", CONCURRENCY_WAIT_MS
        )
    cost = getattr(costs, rule.metric)
    if cost > rule.limit > 0:
        return RequestTooLarge(
            f"This request needs {_much(rule, cost)}, and can never pass: {about}. "
            "Ask for less: a shorter prompt, a lower output limit, or fewer choices."
        )
    about = f"{about}, remaining {_much(rule, rule.limit - used)}, requested {_much(rule, cost)}"
    if isinstance(rule, Quota) or decision.wait_ms is None:
        reset = now + timedelta(milliseconds=decision.reset_ms[decision.denied])
        ends = "It is 0" if rule.limit == 0 else f"It starts anew at {reset:%Y-%m-%dT%H:%M:%SZ}"
        return QuotaExceeded(f"Quota used up. {about}. {ends}; an administrator of this gateway can raise it.")
    metric = "tokens" if rule.metric == "tokens" else "requests"
    wait = go_duration(decision.wait_ms)
    return RateLimited(f"Rate limit reached. {about}. Please try again in {wait}.", metric, decision.wait_ms)


def _much(rule: Rule, amount: int) -> str:
    if isinstance(rule, Lease) or rule.metric != "nano_usd":
        return str(amount)
    return f"${amount / NANO:.6f}".rstrip("0").rstrip(".")


def go_duration(ms: int) -> str:
    """As Go prints it, and OpenAI: `850ms`, `1s`, `6m0s`, `1h2m3s`; whole seconds from one on, rounded up."""
    if ms < 1000:
        return f"{ms}ms"
    minutes, seconds = divmod(-(-ms // 1000), 60)
    if not minutes:
        return f"{seconds}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{seconds}s" if hours else f"{minutes}m{seconds}s"


def utc_now() -> datetime:
    return datetime.now(UTC)

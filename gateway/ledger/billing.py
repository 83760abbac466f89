"""What is recorded of a call, and what is it billed? The one place where a record is made from a call."""

import asyncio

import msgspec
from msgspec import Struct

from gateway.call import Attempt, Call
from gateway.database.record import Outcome, UsageRecord, encode
from gateway.errors import GatewayError, RequestError, ShuttingDown, UpstreamError, UpstreamFailed, UpstreamTimeout
from gateway.schema.common import Usage

MOST_TOKENS = 2**31 - 1
"""What an upstream says beyond that is no count of tokens."""


def intended(call: Call, now_ms: int) -> UsageRecord:
    principal, model = call.principal, call.model
    prices = None if model is None else model.prices
    return UsageRecord(
        request_id=f"req_{call.id}",
        started_ms=now_ms,
        key=principal.name,
        user=principal.user or "",
        team=principal.team or "",
        endpoint=call.endpoint.path,
        model=call.request.value.model if model is None else model.name,
        stream=int(call.streamed),
        price_input=None if prices is None else prices.input,
        price_cached_input=None if prices is None else prices.cached_input,
        price_output=None if prices is None else prices.output,
        prompt_tokens=0 if call.estimate is None else call.estimate.tokens,
    )


def complete(call: Call, record: UsageRecord, exc: BaseException | None) -> UsageRecord:
    """*record* with what came of *call*."""
    hit = call.cache in ("hit", "shared")
    record.outcome = _outcome(exc, hit)
    record.cache = call.cache
    started, first_at = call.started, call.first_at
    if first_at is not None:
        record.ttft_ms = int((first_at - started) * 1000)
    record.total_ms = int((call.clock() - started) * 1000)
    expected = record.prompt_tokens
    given = _was_given(call, exc)
    usage = call.usage if given else None
    if usage is None:
        record.prompt_tokens = 0
        record.usage_source = "none"
    else:
        _count_in(record, usage)
        record.usage_source = "counted" if call.reckoned else "upstream"
    _charge(record, call.hits_cost if hit else "full")
    if call.attempts:
        record.target = call.attempts[-1].target.label
        delivered = call.attempts[-1] if given and first_at is not None else None
        record.attempts = _told(call, record, delivered, Usage(prompt_tokens=record.prompt_tokens or expected))
    call.saved_nano = record.saved_nano
    return record


def _was_given(call: Call, exc: BaseException | None) -> bool:
    """Whether there is something to pay: not where an upstream failed before it said anything, or was not passed on."""
    if not isinstance(exc, GatewayError):
        return True
    return call.first_at is not None and (call.status is None or call.status < 400)


def _count_in(record: UsageRecord, usage: Usage) -> None:
    prompt, completion = a_count(usage.prompt_tokens), a_count(usage.completion_tokens)
    record.prompt_tokens, record.completion_tokens = prompt, completion
    details, more = usage.prompt_tokens_details, usage.completion_tokens_details
    if details is not None and details.cached_tokens is not None:
        record.cached_tokens = min(a_count(details.cached_tokens), prompt)
    if more is not None and more.reasoning_tokens is not None:
        record.reasoning_tokens = min(a_count(more.reasoning_tokens), completion)


def _charge(record: UsageRecord, share: str) -> None:
    """What counts against quotas, and what it costs: all, the prompt at the price of cached input, or nothing."""
    prompt, cached, completion = record.prompt_tokens, record.cached_tokens, record.completion_tokens
    if share != "full":
        prompt, cached, completion = (prompt, prompt, 0) if share == "cached" else (0, 0, 0)
    record.charged_tokens = prompt + completion
    prices = record.prices
    if prices is None:
        record.cost_nano = None
        return
    record.cost_nano = prices.cost_nano(prompt, cached, completion)
    if share != "full":
        whole = prices.cost_nano(record.prompt_tokens, record.cached_tokens, record.completion_tokens)
        record.saved_nano = max(0, whole - record.cost_nano)


def a_count(tokens: int) -> int:
    """A number of tokens: what an upstream says may be anything."""
    return tokens if 0 <= tokens <= MOST_TOKENS else 0 if tokens < 0 else MOST_TOKENS


def _outcome(exc: BaseException | None, hit: bool) -> Outcome:
    if exc is None:
        return "cached" if hit else "completed"
    if isinstance(exc, GeneratorExit | asyncio.CancelledError):
        return "client_gone"
    if isinstance(exc, UpstreamError):
        return "upstream_error"
    if isinstance(exc, RequestError):
        return "client_error"
    return "shutting_down" if isinstance(exc, ShuttingDown) else "failed"


class _Tried(Struct, gc=False, omit_defaults=True):
    """
    An attempt, in the record. What was wasted on one that failed is what it said it had used, else its prompt; and what
    that would have cost.
    """

    target: str
    ms: int
    error: str | None = None
    wasted_tokens: int = 0
    wasted_nano: int = 0


_encode_json = msgspec.json.Encoder().encode


def _told(call: Call, record: UsageRecord, delivered: Attempt | None, expected: Usage) -> str:
    """Each attempt, as JSON. What the *delivered* one used is in the bill, however it ended."""
    tried = []
    for attempt in call.attempts:
        used = (call.usage if attempt.answered else attempt.usage) or expected
        tried.append(_tried(attempt, record, None if attempt is delivered else used, attempt.ended or call.clock()))
    return _encode_json(tried).decode()


def _tried(attempt: Attempt, record: UsageRecord, used: Usage | None, ended: float) -> _Tried:
    error = attempt.error
    tried = _Tried(attempt.target.label, int((ended - attempt.started) * 1000))
    if error is not None:
        tried.error = type(error).code or type(error).type
        if used is not None and isinstance(error, UpstreamFailed | UpstreamTimeout):  # it may have read the prompt
            prompt, completion = a_count(used.prompt_tokens), a_count(used.completion_tokens)
            tried.wasted_tokens = prompt + completion
            prices = record.prices
            tried.wasted_nano = 0 if prices is None else prices.cost_nano(prompt, 0, completion)
    return tried


def shortened(record: UsageRecord, limit: int) -> UsageRecord:
    """A copy whose encoding has no more than *limit* bytes, where names are as long as no sane one is."""
    short = msgspec.structs.replace(record, attempts="[]")
    for length in (160, 64, 24):
        if len(encode(short)) <= limit:
            break
        for name in ("model", "target", "key", "user", "team"):
            text = getattr(short, name).encode()[:length].decode(errors="ignore")
            setattr(short, name, text)
    return short

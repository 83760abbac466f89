"""How much may a key ask for? Reserved before dispatch in one round trip, settled after by what was used."""

import time
from collections.abc import Callable, Sequence
from datetime import datetime

import msgspec

from gateway.call import Call
from gateway.database.record import UsageRecord
from gateway.errors import LimiterUnavailable
from gateway.limits import told
from gateway.limits.fallback import Shares
from gateway.limits.terms import Terms, terms_of
from gateway.models import Target
from gateway.schema.endpoint import CHAT
from gateway.schema.payload import Payload, encode_fields
from gateway.settings import Settings
from gateway.stores import Costs, Decision, LimitStore, Reservation, StoreUnavailable, Used
from gateway.tokens import Tokens

NOTHING = Costs(requests=0)


class Limiter:
    """
    Admits calls, and settles them.

    *used* is what the ledger says of quotas, for while the store is out of reach; *now* is the wall clock, in UTC, for
    the times in messages. *records* is whether a reservation is needed as a record, even of what is under no limit.
    """

    def __init__(
        self,
        settings: Settings,
        store: LimitStore,
        tokens: Tokens,
        used: Used,
        *,
        records: bool = False,
        now: Callable[[], datetime] = told.utc_now,
    ) -> None:
        self._settings = settings
        self._store = store
        self._tokens = tokens
        self._used = used
        self._shares: Shares | None = None
        self._records = records
        self._now = now
        self._terms: dict[tuple[str, str], Terms] = {}
        self._under_way: dict[str, Call] = {}

    async def expect(self, call: Call, targets: Sequence[Target]) -> Costs | None:
        """
        What *call* is expected to take; under strict limits the most that it can; None if nothing has to be reserved.

        A request under a strict limit that says no limit of its own is given one.
        """
        terms = self._terms_of(call)
        estimate = await self._tokens.estimate(call, targets, strict=terms.strict)
        if not terms.terms and not self._records:
            return None
        if terms.strict:
            _cap(call)
        elif terms.ceiling_tokens is not None and estimate.tokens > terms.ceiling_tokens and not estimate.exact:
            estimate = await self._tokens.estimate(call, targets, strict=True)  # refuse for what it is, not for a guess
        prompt = estimate.upper_bound if terms.strict else estimate.tokens
        output = self._tokens.expected_output(call, strict=terms.strict)
        if terms.ceiling_tokens is not None and call.endpoint.streams and call.request.value.limit is None:
            output = max(0, min(output, terms.ceiling_tokens - prompt))  # what comes beyond is debt
        prices = None if call.model is None else call.model.prices
        return Costs(prompt + output, 0 if prices is None else prices.cost_nano(prompt, 0, output))

    async def admit(self, call: Call, costs: Costs) -> None:
        """
        Reserve *costs*; `call.headers` say what is left.

        Raises RateLimited, QuotaExceeded, RequestTooLarge; LimiterUnavailable where a limit must hold and cannot be
        looked up. Then nothing is reserved.
        """
        terms = self._terms_of(call)
        intent = b"" if call.entry is None else call.entry.intent
        call.reservation = reservation = Reservation(terms.plan, f"req_{call.id}", costs, intent)
        self._under_way[call.id] = call
        decision = await self._decide(call, terms, reservation)
        call.admitted_ms = decision.at_ms
        if terms.terms:
            _tell(call, terms, decision)
        if decision.denied is not None:
            self._forget(call)
            call.limits_hit.append((terms.terms[decision.denied].label, "refused"))
            raise told.refusal(terms, decision, costs, self._now())
        if decision.shadowed:
            call.limits_hit += [(terms.terms[index].label, "shadow") for index in decision.shadowed]

    def settle(self, call: Call, record: UsageRecord | None) -> None:
        """*call* is over, and took what *record* says; nothing at all where there is none. Does not wait."""
        reservation = call.reservation
        if reservation is None:
            return
        self._forget(call)
        actual, exact = settlement(record)
        if call.degraded and self._shares is not None:
            self._shares.settle(reservation, actual, exact=exact)
        event = call.entry.outcome if self._records and record is not None and call.entry is not None else b""
        self._store.settle(reservation, actual, exact=exact, event=event)

    def keeps(self, request_id: str) -> bool:
        """Whether that request is under way here."""
        return request_id.removeprefix("req_") in self._under_way

    async def beat(self) -> None:
        """Keep up what is under way: to be called every 10 s. Raises StoreUnavailable."""
        reservations = []
        for call in self._under_way.values():
            if call.reservation is not None:
                reservations.append(call.reservation)
                call.reservation.progress = self._tokens.generated(call)
        await self._store.heartbeat(reservations)

    def _forget(self, call: Call) -> None:
        call.reservation = None
        self._under_way.pop(call.id, None)

    def _terms_of(self, call: Call) -> Terms:
        assert call.model is not None
        asked = (call.principal.name, call.model.name)
        terms = self._terms.get(asked)
        return terms or self._terms.setdefault(asked, terms_of(self._settings, call.principal, call.model.name))

    async def _decide(self, call: Call, terms: Terms, reservation: Reservation) -> Decision:
        """By the store, or by this replica's share while it is out of reach."""
        asked = self._store.available
        if asked:
            try:
                decision = terms.seen = await self._store.admit(reservation)
            except StoreUnavailable:
                pass
            else:
                self._shares = None
                terms.seen_s = time.monotonic()
                return decision
        call.degraded = True
        call.headers["x-suiron-enforcement"] = "degraded"
        self._shares = self._shares or Shares(self._store, self._used)
        admitted = False
        try:
            decision = await self._shares.admit(terms, reservation)
            admitted = decision.denied is None
            return decision
        except LimiterUnavailable:
            self._forget(call)
            raise
        finally:
            if asked and not admitted:  # the store may have admitted it, and its answer was lost
                self._store.settle(reservation, NOTHING, exact=True)


def _tell(call: Call, terms: Terms, decision: Decision) -> None:
    call.headers.update(told.headers(terms, decision))
    if warnings := told.warnings(terms, decision):
        call.headers["x-suiron-warning"] = "; ".join(said for _, _, said in warnings)
        call.limits_hit += [(term.label, f"warned_{percent}") for term, percent, _ in warnings]


def settlement(record: UsageRecord | None) -> tuple[Costs, bool]:
    """What was taken, and whether that is exact."""
    if record is None:
        return NOTHING, True
    is_free = not record.charged_tokens  # as an answer from the cache may be, however much of it was read
    return Costs(record.charged_tokens, record.cost_nano or 0), is_free or record.usage_source == "upstream"


def _cap(call: Call) -> None:
    """A request that does not say how much it wants at most is given a limit, which upstreams are told."""
    asked = call.request.value
    if call.endpoint is not CHAT or asked.limit is not None or call.model is None:
        return
    call.output_cap = cap = call.model.default_output_tokens
    fields = {**call.request.fields(), "max_completion_tokens": cap}
    call.request = Payload(msgspec.structs.replace(asked, max_completion_tokens=cap), encode_fields(fields))
    call.headers["x-suiron-max-completion-tokens"] = str(cap)

"""What is kept of a request? Who, what, how much, how it ended: nothing that was asked, nothing that was answered."""

from typing import Literal

import msgspec
from msgspec import Struct

from gateway.prices import Prices

Outcome = Literal[
    "completed", "cached", "client_gone", "client_error", "upstream_error", "shutting_down", "failed", "abandoned"
]
UsageSource = Literal["upstream", "counted", "estimated", "none"]
Hit = Literal["", "hit", "miss", "shared", "bypass"]


class UsageRecord(Struct, gc=False, array_like=True):
    """
    A row of the ledger. It travels as an array: fields are only ever added at the end, with a default.

    `user`, `team` and `target` are empty where there is none. The prices, nano-USD for a million tokens, are those of
    the moment of admission; they and the cost are None where the model has none. `charged_tokens` are what counts
    against quotas: not those of an answer from the cache that costs nothing. `usage_source` says who counted: the
    upstream; we, what has arrived; or nobody, and it is an estimate. `abandoned` is what a crash left under way.
    `saved_nano` is what it would have cost besides, had the cache not known it. Times are milliseconds, since 1970 or
    since the request. `attempts` is JSON, one object for each target tried.
    """

    request_id: str
    started_ms: int
    key: str
    user: str
    team: str
    endpoint: str
    model: str
    stream: int
    price_input: int | None
    price_cached_input: int | None
    price_output: int | None
    ended_ms: int = 0
    target: str = ""
    outcome: Outcome = "abandoned"
    usage_source: UsageSource = "none"
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    charged_tokens: int = 0
    cost_nano: int | None = None
    ttft_ms: int | None = None
    total_ms: int = 0
    cache: Hit = ""
    attempts: str = "[]"
    saved_nano: int = 0

    @property
    def prices(self) -> Prices | None:
        if self.price_input is None or self.price_output is None or self.price_cached_input is None:
            return None
        return Prices(self.price_input, self.price_output, self.price_cached_input)

    def left_under_way(self, prompt_tokens: int, completion_tokens: int, at_ms: int) -> None:
        """Make it the record of a request that a crash ended: billed for what was noted of it last."""
        self.outcome, self.ended_ms = "abandoned", max(at_ms, self.started_ms)
        self.total_ms = self.ended_ms - self.started_ms
        self.prompt_tokens, self.cached_tokens, self.completion_tokens = prompt_tokens, 0, completion_tokens
        self.charged_tokens = prompt_tokens + completion_tokens
        self.usage_source = "estimated" if self.charged_tokens else "none"
        prices = self.prices
        self.cost_nano = None if prices is None else prices.cost_nano(prompt_tokens, 0, completion_tokens)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(UsageRecord)


def encode(record: UsageRecord) -> bytes:
    return _encoder.encode(record)


def decode(wire: bytes) -> UsageRecord:
    """Raises msgspec.DecodeError for what is no record."""
    return _decoder.decode(wire)

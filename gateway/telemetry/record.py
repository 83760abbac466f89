"""What is there to say of a request when it is over? Nothing that was asked, and nothing that was answered."""

import re
from datetime import datetime
from typing import Literal

from msgspec import Struct

from gateway.errors import GatewayError, RequestError, ShuttingDown, UpstreamError
from gateway.schema.common import Usage

Outcome = Literal["completed", "client_error", "upstream_error", "client_gone", "shutting_down", "failed"]
Level = Literal["info", "warning", "error"]

LEVELS: dict[Outcome, Level] = {
    "completed": "info",
    "client_error": "info",
    "client_gone": "info",
    "shutting_down": "info",
    "upstream_error": "warning",
    "failed": "error",
}

UNKNOWN = "unknown"
NONE = "none"


class Record(Struct, gc=False, kw_only=True, tag_field="event", tag="request"):
    """
    One request to an endpoint that generates, as it stands in the log; None where it did not get so far.

    `ts` is its end, in seconds since 1970 until the log's thread makes a date of it. Milliseconds have three decimals.
    `model` is a public name of the configuration, or `unknown`: what a client writes there may be anything. `status`
    is None where no answer was begun. `upstream_ms` is from the first dispatch to the first part, and on to the last;
    `overhead_ms` is what the gateway adds before the first dispatch, and between the first part and its leaving.
    """

    ts: datetime | float
    level: Level
    id: str
    key: str | None
    endpoint: str
    model: str
    target: str | None = None
    attempts: int = 0
    status: int | None
    outcome: Outcome
    error: str | None = None
    stream: bool = False
    cache: str | None = None
    ttft_ms: float | None = None
    total_ms: float
    upstream_ms: float | None = None
    overhead_ms: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None


def cached_tokens(usage: Usage) -> int | None:
    details = usage.prompt_tokens_details
    return None if details is None else details.cached_tokens


def outcome_of(error: GatewayError) -> Outcome:
    if isinstance(error, RequestError):
        return "client_error"
    if isinstance(error, UpstreamError):
        return "upstream_error"
    return "shutting_down" if isinstance(error, ShuttingDown) else "failed"


_WORD = re.compile(r"[a-z_]{1,64}")


def kind_of(error: GatewayError) -> str:
    """The error's code if it is a word, else its type: an upstream may have written anything into the code."""
    return error.code if error.code and _WORD.fullmatch(error.code) else error.type

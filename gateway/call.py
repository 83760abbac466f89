"""What is known about one request on its way through the gateway?"""

import random
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import msgspec
from msgspec import Struct, field

from gateway.auth import Principal
from gateway.database.record import UsageRecord
from gateway.errors import GatewayError
from gateway.models import Model, Target
from gateway.schema.chat import AnswerMessage, ChatChoice, ChunkChoice, Delta
from gateway.schema.common import Usage
from gateway.schema.endpoint import Endpoint
from gateway.schema.payload import Parts, Payload
from gateway.stores import Reservation

CacheState = Literal["hit", "miss", "shared", "bypass"]
"""Where an answer came from: `shared` is another call's generation; `bypass`, one that may not be kept."""


class Attempt(Struct, eq=False):
    """
    One target's chance to answer, on the call's clock.

    `answered` once the first content has come. `usage` is what one that did not get so far had told: nobody is given
    what it generated, but somebody computed it.
    """

    target: Target
    started: float
    ended: float = 0.0
    answered: bool = False
    error: GatewayError | None = None
    usage: Usage | None = None


class Tally:
    """Numbers, mostly of seconds, counted by size: how many are up to each of *bounds*, and how many above all."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, number: float) -> None:
        self.counts[bisect_left(self.bounds, number)] += 1
        self.total += number

    def join(self, other: "Tally") -> None:
        self.counts = [ours + theirs for ours, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += other.total


class Estimate(Struct, frozen=True, gc=False):
    """
    How many tokens a prompt has, before its answer tells: about `tokens`, at most `upper_bound`.

    `exact` where they were counted. `text_bytes`, `images` and `is_text` are what it was made of.
    """

    tokens: int
    upper_bound: int
    exact: bool = False
    text_bytes: int = 0
    images: int = 0
    is_text: bool = False


class Heard:
    """
    What has come of an answer: `pieces` of text and their `text_bytes` since an upstream last counted, and the bytes
    before that, unless it counts each piece.
    """

    __slots__ = ("counted_bytes", "pieces", "text_bytes")

    def __init__(self) -> None:
        self.pieces = self.text_bytes = self.counted_bytes = 0

    def add(self, parts: Parts) -> Usage | None:
        """Also says what an upstream has counted by now, if one of *parts* tells."""
        told = None
        for part in parts:
            if part.texts is not None:
                self._hear(part.texts)
                continue
            text, usage = part.text, part.usage
            if text is not None and b"\\" not in text:  # JSON writes it as it is
                self.pieces += text != b""
                self.text_bytes += len(text)
                continue
            if usage is None or self.pieces:
                self._listen(part.value)
            if usage is not None:
                told = usage
                if self.pieces:
                    self.counted_bytes += self.text_bytes
                    self.pieces = self.text_bytes = 0
        return told

    def _hear(self, texts: list[bytes]) -> None:
        said = b"".join(texts)
        self.pieces += len(texts) - texts.count(b"")
        self.text_bytes += (
            len(said) if b"\\" not in said else len(msgspec.json.decode(b'"%b"' % said, type=str).encode())
        )

    def _listen(self, value: Any) -> None:
        for choice in getattr(value, "choices", ()):
            if text := _said(choice):
                self.pieces += 1
                self.text_bytes += len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def _said(choice: Any) -> str:
    """All that a choice of a completion or a chunk says: its text, reasoning and calls of tools."""
    if type(choice) is ChunkChoice:
        said: Delta | AnswerMessage = choice.delta
        if said.content and not (said.reasoning_content or said.tool_calls):  # as most are
            return said.content
    elif type(choice) is ChatChoice:
        said = choice.message
    else:
        text: str = choice.text
        return text
    text = said.content or ""
    if said.reasoning_content or said.reasoning or said.refusal:
        text += (said.reasoning_content or said.reasoning or "") + (said.refusal or "")
    if said.tool_calls:
        text += "".join(_arguments(call.get("function")) for call in said.tool_calls)
    return text


def _arguments(function: Any) -> str:
    if not isinstance(function, dict):
        return ""
    return "".join(value for value in (function.get("name"), function.get("arguments")) if isinstance(value, str))


GAPS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Trace(Protocol):
    """Told of each attempt when it is dispatched, and of the end."""

    def dispatched(self, attempt: Attempt) -> str:
        """The `traceparent` to send along."""
        ...

    def over(self, call: "Call", record: Any) -> None: ...


class Entry(Protocol):
    """The call's place in the ledger: opened before anything is spent, closed once, with what ended the call."""

    @property
    def intent(self) -> bytes: ...

    @property
    def outcome(self) -> bytes: ...

    def close(self, exc: BaseException | None) -> UsageRecord | None:
        """The record; None where there is nothing to record."""
        ...


class Call(Struct, eq=False):
    """The one mutable thing: each stage of the pipeline writes its own fields; adapters never see it."""

    endpoint: Endpoint
    principal: Principal
    request: Payload[Any]
    unknown: set[str]
    """Top-level members that OpenAI does not know."""
    id: str = field(default_factory=lambda: f"{random.getrandbits(128):032x}")  # names, and guards nothing
    created: int = field(default_factory=lambda: int(time.time()))
    given_id: str | None = None
    """What the client calls it, if that is fit to be repeated; upstreams never see it."""
    cache_control: bytes = b""
    """What the client's header of that name says."""
    clock: Callable[[], float] = time.perf_counter
    started: float = field(default_factory=time.perf_counter)
    """When its body was there, in seconds on `clock`, as are the other times."""

    model: Model | None = None  # resolve
    headers: dict[str, str] = field(default_factory=dict)  # resolve, limit: for the client
    entry: Entry | None = None  # ledger
    estimate: Estimate | None = None  # tokens: of the prompt
    output_cap: int | None = None  # limit: tokens of a choice, where the client set no limit and one had to be set
    reservation: Reservation | None = None  # limit: from when it is asked for until it is settled
    degraded: bool = False  # limit: the store was out of reach
    limits_hit: list[tuple[str, str]] = field(default_factory=list)  # limit: labels, and what came of each
    attempts: list[Attempt] = field(default_factory=list)  # route
    usage: Usage | None = None  # account; tokens, where no upstream has counted
    heard: Heard = field(default_factory=Heard)  # account
    reckoned: bool = False  # tokens: whether `usage` is, in part or whole, a count of our own
    admitted_ms: int = 0  # limit: by the store's clock, in milliseconds since 1970
    cache: CacheState | Literal[""] = ""  # cache: empty where it is off; a miss pays for the generation
    hits_cost: Literal["full", "cached", "free"] = "free"  # cache: which share of the price, if it is a hit or shared
    saved_nano: int = 0  # ledger: what it would have cost besides, in billionths of a dollar
    first_at: float | None = None  # account: when its first part arrived
    last_at: float = 0.0  # account: when its latest part did
    gaps: Tally | None = None  # account: between what arrived; None with less than two parts
    status: int | None = None  # answer: None while none is sent
    left_at: float = 0.0  # answer: when it began to leave
    error: GatewayError | None = None  # answer: what the client was told
    outcome: Literal["completed", "client_gone", "failed"] = "failed"  # answer: where there was no error
    trace: Trace | None = None  # telemetry
    streamed: bool = False  # as the request says

    def __post_init__(self) -> None:
        self.streamed = self.endpoint.streams and bool(self.request.value.stream)

    @property
    def request_id(self) -> str:
        """What the client and the log know it by."""
        return self.given_id or f"req_{self.id}"

    @property
    def include_usage(self) -> bool:
        """Whether this client's stream ends with a usage chunk."""
        options = self.request.value.stream_options
        return options is not None and bool(options.include_usage)

    def arrived(self, parts: Parts) -> None:
        """Parts have come, together."""
        now = self.clock()
        if self.first_at is None:
            self.first_at = now
        else:
            if self.gaps is None:
                self.gaps = Tally(GAPS_S)
            self.gaps.add(now - self.last_at)
        self.last_at = now
        usage = self.heard.add(parts)
        if usage is not None:
            self.usage = usage

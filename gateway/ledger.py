"""What was used? One record for each request that was dispatched or answered from the cache, whatever happens to it."""

import asyncio
import contextlib
import logging
import re
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

import msgspec
from msgspec import Struct

from gateway import settings
from gateway.call import Attempt, Call
from gateway.database import Database, DatabaseUnavailable, Kind, Metric, Unwritable
from gateway.database.record import Outcome, UsageRecord, decode, encode
from gateway.errors import (
    GatewayError,
    LedgerFull,
    RequestError,
    ShuttingDown,
    UpstreamError,
    UpstreamFailed,
    UpstreamTimeout,
)
from gateway.journal import MAX_INTENT, MAX_OUTCOME, SLOT_BYTES, CannotJournal, Journal, JournalFull, adopt, create
from gateway.schema.common import Usage
from gateway.settings import SettingsError

ROWS = 200
WAIT_S = 0.1
"""A group is committed when it has so many rows, or its first has waited so long."""
CATCHING_UP = 2000
"""Rows of a group when there is a backlog."""
BACKOFF_S = (0.25, 0.5, 1.0, 2.0, 5.0)
FLUSH_S = 2.0
QUIET_S = 10.0
"""How long after a complaint about the database the next one waits."""
MOST_TOKENS = 2**31 - 1
"""What an upstream says beyond that is no count of tokens."""
SLOTS_A_MIB = 2**20 // SLOT_BYTES
READERS = 2
READ_S = 5.0

logger = logging.getLogger("suiron.ledger")

Committed = Callable[[dict[str, int]], None]


@dataclass(slots=True)
class LedgerCounts:
    """What the ledger has been through, for metrics: plain numbers that only grow, but for `backlog` and `lag_s`."""

    written: int = 0
    known: int = 0
    """Rows that were there already: another replica's doing, or that of this process before it crashed."""
    errors: int = 0
    full: int = 0
    """Requests refused for want of room."""
    unpriced: int = 0
    unreadable: int = 0
    unwritable: int = 0
    adopted: int = 0
    backlog: int = 0
    lag_s: float = 0.0
    """Between the end of the oldest request of the last group and its commit."""


class LedgerUnavailable(Exception):
    """The database cannot be asked now."""


class Ledger:
    """
    Keeps a record of every call, however it ends.

    `open`, `note`, `post` and `drop` are for the event loop's thread, and never wait; a thread of its own writes what
    was posted. Without a *database* records are counted and forgotten; without a *journal*, a crash forgets those that
    were not written yet. *committed* is told the `seq` of each row, on the event loop, when it is safe. *clock* gives
    seconds since 1970. Takes over the database and the journals.
    """

    def __init__(
        self,
        database: Database | None = None,
        journal: Journal | None = None,
        adopted: Sequence[Journal] = (),
        *,
        committed: Committed = lambda _: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.counts = LedgerCounts()
        self.committed = committed
        self._database = database
        self._journal = journal
        self._clock = clock
        self._writer = None if database is None else _Writer(database, self.counts, clock)
        self._readers = ThreadPoolExecutor(READERS, "ledger-reader")
        if self._writer is not None:
            for left in filter(None, (journal, *adopted)):
                self._writer.adopt(left, keep=left is journal)

    @property
    def backlog(self) -> int:
        """Records that are over and not in the database yet."""
        return 0 if self._writer is None else self._writer.backlog

    def entry(self, call: Call) -> "Entry":
        """To be opened before anything is spent; see `Entry`. Raises LedgerFull: nothing may be dispatched then."""
        record = _intended(call, self._now_ms())
        intent = encode(record)
        if self._journal is None:
            return Entry(self, call, record, intent, 0)
        if len(intent) > MAX_INTENT:
            intent = encode(_shortened(record, MAX_INTENT))
        try:
            return Entry(self, call, record, intent, self._journal.open(intent))
        except JournalFull:
            self.counts.full += 1
            raise LedgerFull from None

    def note(self, entry: "Entry", prompt_tokens: int, completion_tokens: int) -> None:
        """How far it got: what it is billed for if this process dies. Cheap, for every few seconds."""
        if self._journal is not None:
            prompt, completion = _count(prompt_tokens), _count(completion_tokens)
            self._journal.note(entry.slot, prompt, completion, self._now_ms())

    def record(self, call: Call, record: UsageRecord, exc: BaseException | None) -> UsageRecord:
        """What is to be said of a call that ended with *exc*; after `Tokens.settle`."""
        ended_ms = self._now_ms()
        record.ended_ms = ended_ms if ended_ms > record.started_ms else record.started_ms
        if call.admitted_ms:
            record.started_ms = call.admitted_ms
        if record.price_input is None:
            self.counts.unpriced += 1
        return _completed(call, record, exc)

    def post(self, record: UsageRecord, slot: int) -> None:
        """It is over: the record stays in the journal until it is in the database. Does not wait, and does not fail."""
        if self._journal is not None:
            wire = encode(record)
            if len(wire) > MAX_OUTCOME:
                wire = encode(_shortened(record, MAX_OUTCOME))
            self._journal.close(slot, wire)
        if self._writer is not None:
            self._writer.put(record, self._journal, slot)

    def drop(self, slot: int) -> None:
        """Nothing was dispatched: there is nothing to record."""
        if self._journal is not None:
            self._journal.free(slot)

    async def used(self, scope: str, metric: Metric, period_start_ms: int) -> tuple[int, int]:
        """
        What *scope* used since then, and the highest `seq` of a row in that sum.

        A scope is `key:NAME`, `user:NAME` or `team:NAME`, perhaps with `/model:NAME` behind it.

        Raises LedgerUnavailable.
        """
        if self._database is None:
            return 0, 0
        kind, name, model = _scope(scope)
        ask = partial(self._database.used, kind, name, model, metric, period_start_ms)
        try:
            asking = asyncio.get_running_loop().run_in_executor(self._readers, ask)
            return await asyncio.wait_for(asking, READ_S)
        except (DatabaseUnavailable, TimeoutError) as exc:
            raise LedgerUnavailable(str(exc)) from None

    async def ingest(self, events: Sequence[bytes]) -> dict[str, int]:
        """
        Insert records that another replica left behind, if nobody did; the `seq` of each, by its request id.

        What cannot be read is logged and left out. Raises LedgerUnavailable; *committed* is not told.
        """
        if self._writer is None:
            return {}
        records = [record for event in events if (record := self._read(event)) is not None]
        try:
            return await asyncio.wrap_future(self._writer.put_strays(records))
        except DatabaseUnavailable as exc:
            raise LedgerUnavailable(str(exc)) from None

    def abandoned(self, intent: bytes, completion_tokens: int, prompt_tokens: int = 0) -> bytes:
        """The record, encoded, of a request whose process died, from the `intent` of its reservation."""
        record = decode(intent)
        record.left_under_way(prompt_tokens or record.prompt_tokens, _count(completion_tokens), self._now_ms())
        return encode(record)

    def write(self) -> None:
        """
        Commit what is waiting, in this thread: what, while `running`, a thread of its own does, again and again.

        Raises DatabaseUnavailable.
        """
        if self._writer is not None:
            self._writer.write()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While the app runs. At the end, waits a moment for the last rows; others wait in the journal."""
        if self._writer is None:
            yield
            return
        self._writer.start(partial(_tell, asyncio.get_running_loop(), self), self.close)
        try:
            yield
        finally:
            await asyncio.to_thread(self._writer.stop, FLUSH_S)

    def close(self) -> None:
        """Let go of the files and the database, and write nothing. The end of `running` does that, too."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        if self._writer is not None:
            self._writer.close()
        if self._journal is not None:
            self._journal.shut()

    def _read(self, event: bytes) -> UsageRecord | None:
        try:
            return decode(event)
        except msgspec.MsgspecError:
            self.counts.unreadable += 1
            logger.error("a record of a request cannot be read and is dropped: %d bytes", len(event))
            return None

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)


def open_ledger(database: settings.Database) -> Ledger:
    """
    The ledger of the configured database, with what dead processes left in its journals.

    A PostgreSQL that is away is waited for. Raises SettingsError where it can never be written to.
    """
    if database.url is None:
        return Ledger()
    from gateway.database.opening import identity, journal_directory, open_database  # SQLAlchemy has 30 MB

    opened = open_database(database)
    try:
        slots = database.journal_mib * SLOTS_A_MIB
        _prepare(opened, slots)
        own, others = _journals(journal_directory(database), identity(database), slots)
    except SettingsError:
        opened.close()
        raise
    return Ledger(opened, own, others)


def _journals(directory: Path, owner: bytes, slots: int) -> tuple[Journal, list[Journal]]:
    """Our own, which may be a dead process's, and those of others that died."""
    try:
        found, strange = adopt(directory, owner)
        own = next((journal for journal in found if journal.slots == slots), None) or create(directory, owner, slots)
    except CannotJournal as exc:
        raise SettingsError(f"database.journal: {exc}") from None
    for path in strange:
        logger.warning("%s holds records for another database than the configured one, and is left alone", path)
    return own, [journal for journal in found if journal is not own]


def _prepare(database: Database, slots: int) -> None:
    try:
        database.prepare()
    except DatabaseUnavailable as exc:
        logger.error("%s; until it is there, up to %d requests wait in the journal", exc, slots)


class Entry:
    """
    One call's place in the ledger, as a context: what comes out of it is recorded, unless nothing was dispatched.

    `intent` goes into the reservation. Who needs the record before it is posted calls `close` with what ended the call.
    """

    __slots__ = ("_call", "_ledger", "_record", "closed", "intent", "slot")

    def __init__(self, ledger: Ledger, call: Call, record: UsageRecord, intent: bytes, slot: int) -> None:
        self._ledger = ledger
        self._call = call
        self._record = record
        self.intent = intent
        self.slot = slot
        self.closed = False

    @property
    def request_id(self) -> str:
        return self._record.request_id

    def note(self, prompt_tokens: int, completion_tokens: int) -> None:
        self._ledger.note(self, prompt_tokens, completion_tokens)

    def close(self, exc: BaseException | None) -> UsageRecord | None:
        """The record, posted; None where nothing was dispatched, nor answered from the cache. Once, and at once."""
        self.closed = True
        call, ledger = self._call, self._ledger
        if not call.attempts and call.cache not in ("hit", "shared"):
            ledger.drop(self.slot)
            return None
        record = ledger.record(call, self._record, exc)
        ledger.post(record, self.slot)
        return record

    def __enter__(self) -> "Entry":
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, _: TracebackType | None) -> None:
        if not self.closed:
            self.close(exc)


def _intended(call: Call, now_ms: int) -> UsageRecord:
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


def _completed(call: Call, record: UsageRecord, exc: BaseException | None) -> UsageRecord:
    """*record* with what came of *call*."""
    hit = call.cache in ("hit", "shared")
    record.outcome = _outcome(exc, hit)
    record.cache = call.cache
    started, first_at = call.started, call.first_at
    if first_at is not None:
        record.ttft_ms = int((first_at - started) * 1000)
    record.total_ms = int((call.clock() - started) * 1000)
    if call.attempts:
        record.target = call.attempts[-1].target.label
        record.attempts = _told(call.attempts, record)
    answered = exc is None or first_at is not None or not isinstance(exc, GatewayError)
    usage = call.usage if answered else None  # an upstream that failed before it said anything is paid nothing
    if usage is None:
        record.prompt_tokens = 0
        record.usage_source = "none"
    else:
        _count_in(record, usage)
        record.usage_source = "counted" if call.reckoned else "upstream"
    _charge(record, call.hits_cost if hit else "full")
    return record


def _count_in(record: UsageRecord, usage: Usage) -> None:
    prompt, completion = _count(usage.prompt_tokens), _count(usage.completion_tokens)
    record.prompt_tokens, record.completion_tokens = prompt, completion
    details, more = usage.prompt_tokens_details, usage.completion_tokens_details
    if details is not None and details.cached_tokens is not None:
        record.cached_tokens = min(_count(details.cached_tokens), prompt)
    if more is not None and more.reasoning_tokens is not None:
        record.reasoning_tokens = min(_count(more.reasoning_tokens), completion)


def _charge(record: UsageRecord, share: str) -> None:
    """What counts against quotas, and what it costs: all, the prompt at the price of cached input, or nothing."""
    prompt, cached, completion = record.prompt_tokens, record.cached_tokens, record.completion_tokens
    if share != "full":
        prompt, cached, completion = (prompt, prompt, 0) if share == "cached" else (0, 0, 0)
    record.charged_tokens = prompt + completion
    prices = record.prices
    record.cost_nano = None if prices is None else prices.cost_nano(prompt, cached, completion)


def _count(tokens: int) -> int:
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


def _told(attempts: Sequence[Attempt], record: UsageRecord) -> str:
    return _encode_json([_tried(attempt, record) for attempt in attempts]).decode()


def _tried(attempt: Attempt, record: UsageRecord) -> _Tried:
    error = attempt.error
    tried = _Tried(attempt.target.label, int((attempt.ended - attempt.started) * 1000))
    if error is not None:
        tried.error = type(error).code or type(error).type
        if isinstance(error, UpstreamFailed | UpstreamTimeout):  # it may have read the prompt
            used = attempt.usage or Usage(prompt_tokens=record.prompt_tokens)
            tried.wasted_tokens = used.prompt_tokens + used.completion_tokens
            prices = record.prices
            tried.wasted_nano = 0 if prices is None else prices.cost_nano(used.prompt_tokens, 0, used.completion_tokens)
    return tried


def _shortened(record: UsageRecord, limit: int) -> UsageRecord:
    """A copy whose encoding has no more than *limit* bytes, where names are as long as no sane one is."""
    short = msgspec.structs.replace(record, attempts="[]")
    for length in (160, 64, 24):
        if len(encode(short)) <= limit:
            break
        for name in ("model", "target", "key", "user", "team"):
            text = getattr(short, name).encode()[:length].decode(errors="ignore")
            setattr(short, name, text)
    return short


_SCOPE = re.compile(r"(key|user|team):(.+?)(?:/model:(.+))?", re.DOTALL)


def _scope(scope: str) -> tuple[Kind, str, str | None]:
    found = _SCOPE.fullmatch(scope)
    if found is None:
        raise ValueError(f"no scope: {scope}")
    return found[1], found[2], found[3]  # type: ignore[return-value]  # one of three words


def _tell(loop: asyncio.AbstractEventLoop, ledger: Ledger, rows: dict[str, int]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(lambda: ledger.committed(rows))


_Row = tuple[UsageRecord, Journal | None, int]


class _Writer:
    """
    A thread that commits what is put, in groups.

    Where the database is away, it tries again, ever more patiently: what it holds stands in the journal, too, and is no
    more than has room there.
    """

    def __init__(self, database: Database, counts: LedgerCounts, clock: Callable[[], float]) -> None:
        self._database = database
        self._counts = counts
        self._clock = clock
        self._pending: deque[_Row] = deque()
        self._group: list[_Row] = []
        self._strays: deque[tuple[list[UsageRecord], Future[dict[str, int]]]] = deque()
        self._wake = threading.Event()
        self._idle = False
        self._stopping = threading.Event()
        self._failures = 0
        self._quiet_until = 0.0
        self._foreign: set[Journal] = set()
        self._tell: Committed = lambda _: None
        self._close: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._run, name="ledger-writer", daemon=True)

    @property
    def backlog(self) -> int:
        return len(self._pending) + len(self._group)

    def adopt(self, journal: Journal, *, keep: bool) -> None:
        """Write what a dead process left in *journal*; unless it is to be kept, its file is removed after that."""
        found = list(journal.found())
        for left in found:
            try:
                record = decode(left.wire)
            except msgspec.MsgspecError:
                self._counts.unreadable += 1
                journal.free(left.slot)
                continue
            if left.progress is not None:
                noted = left.progress
                prompt = noted.prompt_tokens or record.prompt_tokens
                record.left_under_way(prompt, noted.completion_tokens, noted.at_ms)
            self._pending.append((record, journal, left.slot))
            self._counts.adopted += 1
        if self._counts.unreadable:
            logger.error("%s: %d records of requests cannot be read", journal.path, self._counts.unreadable)
        if not keep:
            self._foreign.add(journal)
            self._remove_if_empty(journal)

    def put(self, record: UsageRecord, journal: Journal | None, slot: int) -> None:
        self._pending.append((record, journal, slot))
        self._counts.backlog = self.backlog
        if (self._idle or len(self._pending) >= ROWS) and not self._wake.is_set():
            self._wake.set()

    def put_strays(self, records: list[UsageRecord]) -> Future[dict[str, int]]:
        written: Future[dict[str, int]] = Future()
        self._strays.append((records, written))
        self._wake.set()
        return written

    def start(self, tell: Committed, close: Callable[[], None]) -> None:
        """*close* is called in the end, by the thread: as long as it is stuck, it must not lose the ground it is on."""
        self._tell, self._close = tell, close
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        self._stopping.set()
        self._wake.set()
        self._thread.join(timeout_s)
        if left := self.backlog:
            logger.warning("%d records of requests are not in the database yet; the next start writes them", left)

    def close(self) -> None:
        self._database.close()
        for journal in self._foreign:
            journal.shut()

    def _run(self) -> None:
        while self._gather():
            try:
                self.write()
                self._failures = 0
            except Exception as exc:  # whatever it is, the next ones must be written
                self._fail(exc)
                if self._stopping.is_set():
                    break
                self._stopping.wait(BACKOFF_S[min(self._failures, len(BACKOFF_S)) - 1])
        for _, written in self._strays:
            written.set_exception(DatabaseUnavailable("the gateway is shutting down"))
        self._close()

    def _gather(self) -> bool:
        """Waits for a group to be worth a commit, unless one is left from before. False where none will come."""
        if self._group:
            return True
        self._idle = True
        if not self._pending and not self._strays and not self._stopping.is_set():
            self._wake.wait()
        self._idle = False
        self._wake.clear()
        if self._pending and len(self._pending) < ROWS and not self._strays and not self._stopping.is_set():
            self._wake.wait(WAIT_S)
            self._wake.clear()
        return bool(self._pending or self._strays)

    def write(self) -> None:
        if not self._group:
            self._group = [self._pending.popleft() for _ in range(min(len(self._pending), CATCHING_UP))]
        size = len(self._group)
        while self._group:
            some = self._group[:size]
            try:
                rows = self._insert([record for record, _, _ in some])
            except Unwritable as exc:
                if size > 1:
                    size //= 2
                    continue
                self._give_up(some[0][0], exc)
                del self._group[:1]
            else:
                del self._group[:size]
                self._counts.lag_s = max(0.0, self._clock() - min(record.ended_ms for record, _, _ in some) / 1000)
                self._counts.backlog = self.backlog
                self._tell(rows)
                self._forget(some)
        while self._strays:
            self._write_strays(*self._strays.popleft())

    def _write_strays(self, records: list[UsageRecord], written: Future[dict[str, int]]) -> None:
        if not written.set_running_or_notify_cancel():
            return
        try:
            rows = self._insert_any(records)
        except Exception as exc:
            written.set_exception(exc if isinstance(exc, DatabaseUnavailable) else DatabaseUnavailable(str(exc)))
            raise
        written.set_result(rows)

    def _insert_any(self, records: list[UsageRecord]) -> dict[str, int]:
        """Those that can be written."""
        try:
            return self._insert(records)
        except Unwritable as exc:
            if len(records) > 1:
                half = len(records) // 2
                return self._insert_any(records[:half]) | self._insert_any(records[half:])
            self._give_up(records[0], exc)
            return {}

    def _give_up(self, record: UsageRecord, exc: Unwritable) -> None:
        """Its slot, if it has one, stays taken: the next version may know better."""
        self._counts.unwritable += 1
        logger.error("the record of request %s cannot be written: %s", record.request_id, exc)

    def _insert(self, records: list[UsageRecord]) -> dict[str, int]:
        inserted = self._database.commit(records)
        self._counts.written += inserted.new
        self._counts.known += len(records) - inserted.new
        return inserted.rows

    def _forget(self, rows: list[_Row]) -> None:
        """What is in the database needs no place in the journal."""
        for _, journal, slot in rows:
            if journal is not None:
                journal.free(slot)
                if journal in self._foreign:
                    self._remove_if_empty(journal)

    def _fail(self, exc: Exception) -> None:
        self._failures += 1
        self._counts.errors += 1
        now = self._clock()
        if now >= self._quiet_until:
            self._quiet_until = now + QUIET_S
            logger.error("the database takes no records (%d are waiting): %s", self.backlog, exc)

    def _remove_if_empty(self, journal: Journal) -> None:
        if journal.room == journal.slots:
            self._foreign.discard(journal)
            journal.shut(remove=True)

"""What was used? One record for each request that was dispatched or answered from the cache, whatever happens to it."""

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import TracebackType

import msgspec
from msgspec import Struct

from gateway import settings
from gateway.call import Call
from gateway.database import Database, DatabaseUnavailable, Kind, Metric, Unwritable
from gateway.database.record import UsageRecord, decode, encode
from gateway.errors import LedgerFull
from gateway.journal import MAX_INTENT, MAX_OUTCOME, SLOT_BYTES, CannotJournal, Journal, JournalFull, adopt, create
from gateway.ledger.billing import a_count, complete, intended, shortened
from gateway.ledger.writer import Committed, LedgerCounts, Writer
from gateway.settings import SettingsError
from gateway.stores import LedgerUnavailable

FIRST_S, FLUSH_S = 5.0, 2.0
"""How long the start waits for what was left, and the end for the last records."""
SLOTS_A_MIB = 2**20 // SLOT_BYTES
READERS = 2
READ_S = 5.0

logger = logging.getLogger("suiron.ledger")


class Ledger:
    """
    Keeps a record of every call, however it ends.

    What is not a coroutine is for the event loop's thread, and does not wait; a thread of its own writes the records.
    Without a *database* records are counted and forgotten; without a *journal*, a crash forgets those that
    were not written yet. *committed* is told the `seq` of each row, on the event loop, when it is safe. *clock* gives
    seconds since 1970. A row waits up to *wait_s* for others to be committed with. Takes over the database and the
    journals.
    """

    def __init__(
        self,
        database: Database | None = None,
        journal: Journal | None = None,
        adopted: Sequence[Journal] = (),
        *,
        committed: Committed = lambda _: None,
        clock: Callable[[], float] = time.time,
        wait_s: float = 0.25,
    ) -> None:
        self.counts = LedgerCounts()
        self.committed = committed
        self._database = database
        self._journal = journal
        self._clock = clock
        self._writer = None if database is None else Writer(database, self.counts, clock, wait_s)
        self.under_way = set[Entry]()
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
        record, intent, slot = intended(call, self._now_ms()), None, 0
        if self._journal is not None:
            intent = encode(record)
            if len(intent) > MAX_INTENT:
                intent = encode(shortened(record, MAX_INTENT))
            try:
                slot = self._journal.open(intent)
            except JournalFull:
                self.counts.full += 1
                raise LedgerFull from None
        entry = Entry(self, call, record, slot, intent)
        self.under_way.add(entry)
        return entry

    def beat(self, generated: Callable[[Call], int]) -> None:
        """Note how far all are that are under way: what each is billed for if this process dies. Every second or so."""
        if self._journal is not None:
            now_ms = self._now_ms()
            for entry in self.under_way:
                if entry.call.attempts:
                    prompt, completion = _prompt(entry.call), generated(entry.call)
                    self._journal.note(entry.slot, a_count(prompt), a_count(completion), now_ms)

    def record(self, call: Call, record: UsageRecord, exc: BaseException | None) -> UsageRecord:
        """What is to be said of a call that ended with *exc*; after `Tokens.settle`."""
        if call.admitted_ms:
            record.started_ms = call.admitted_ms
        ended_ms = self._now_ms()
        record.ended_ms = ended_ms if ended_ms > record.started_ms else record.started_ms
        if record.price_input is None:
            self.counts.unpriced += 1
        return complete(call, record, exc)

    def post(self, entry: "Entry") -> None:
        """It is over: its record stays in the journal until it is in the database. Does not wait, and does not fail."""
        if self._journal is not None:
            wire = entry.outcome
            if len(wire) > MAX_OUTCOME:
                wire = encode(shortened(entry.record, MAX_OUTCOME))
            self._journal.close(entry.slot, wire)
        if self._writer is not None:
            self._writer.put(entry.record, self._journal, entry.slot)

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
        except (DatabaseUnavailable, Unwritable, TimeoutError) as exc:
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
        record.left_under_way(prompt_tokens or record.prompt_tokens, a_count(completion_tokens), self._now_ms())
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
        """
        While the app runs.

        What a dead process left is written first, so that sums have it in them; at the end, the last rows are waited
        for, for a moment. What is not written then waits in the journal.
        """
        if self._writer is None:
            yield
            return
        self._writer.start(partial(_tell, asyncio.get_running_loop(), self), self.close)
        try:
            await asyncio.to_thread(self._writer.first_try, FIRST_S)
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


def open_ledger(database: settings.Database, *, alone: bool = False) -> Ledger:
    """
    The ledger of the configured database, with what dead processes left in its journals.

    A PostgreSQL that is away is waited for. Raises SettingsError where it can never be written to; and, for who counts
    limits *alone*, where another gateway that does so uses it.
    """
    if database.url is None:
        return Ledger()
    from gateway.database.opening import identity, journal_directory, open_database  # SQLAlchemy has 30 MB

    opened = open_database(database, alone=alone)
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
    for path, why in strange.items():
        logger.warning("%s %s: it is left as it is", path, why)
    return own, [journal for journal in found if journal is not own]


def _prepare(database: Database, slots: int) -> None:
    try:
        database.prepare()
    except DatabaseUnavailable as exc:
        logger.error("%s; until it is there, up to %d requests wait in the journal", exc, slots)


class Entry(Struct, eq=False):
    """
    One call's place in the ledger, as a context: what comes out of it is recorded, unless nothing was dispatched.

    `intent` goes into the reservation, and `outcome` to who settles it: the record, encoded, as it was when the entry
    was opened, and as it is when it is closed. Who needs the record before it is posted calls `close` with what ended
    the call.
    """

    ledger: Ledger
    call: Call
    record: UsageRecord
    slot: int
    _intent: bytes | None
    closed: bool = False
    _outcome: bytes | None = None

    @property
    def intent(self) -> bytes:
        """To be asked for before it is closed."""
        if self._intent is None:
            self._intent = encode(self.record)
        return self._intent

    @property
    def outcome(self) -> bytes:
        """To be asked for after it is closed."""
        if self._outcome is None:
            self._outcome = encode(self.record)
        return self._outcome

    @property
    def request_id(self) -> str:
        return self.record.request_id

    def close(self, exc: BaseException | None) -> UsageRecord | None:
        """The record, posted; None where nothing was dispatched, nor answered from the cache. Once, and at once."""
        self.closed = True
        call, ledger = self.call, self.ledger
        ledger.under_way.discard(self)
        if not call.attempts and call.cache not in ("hit", "shared"):
            ledger.drop(self.slot)
            return None
        record = ledger.record(call, self.record, exc)
        ledger.post(self)
        return record

    def __enter__(self) -> "Entry":
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, _: TracebackType | None) -> None:
        if not self.closed:
            self.close(exc)


def _prompt(call: Call) -> int:
    if call.usage is not None:
        return call.usage.prompt_tokens
    return 0 if call.estimate is None else call.estimate.tokens


_SCOPE = re.compile(r"(key|user|team):(.+?)(?:/model:(.+))?", re.DOTALL)


def _scope(scope: str) -> tuple[Kind, str, str | None]:
    found = _SCOPE.fullmatch(scope)
    if found is None:
        raise ValueError(f"no scope: {scope}")
    return found[1], found[2], found[3]  # type: ignore[return-value]  # one of three words


def _tell(loop: asyncio.AbstractEventLoop, ledger: Ledger, rows: dict[str, int]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(lambda: ledger.committed(rows))

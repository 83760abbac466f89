"""How do records get into the database? In groups, by a thread of its own, which never gives up."""

import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import msgspec

from gateway.database import Database, DatabaseUnavailable, Unwritable
from gateway.database.record import UsageRecord, decode
from gateway.journal import Journal

ROWS = 200
"""A group is committed when it has so many, or its first has waited for long enough."""
CATCHING_UP = 2000
"""Rows of a group when there is a backlog."""
BACKOFF_S = (0.25, 0.5, 1.0, 2.0, 5.0)
NICENESS = 7
"""Of the thread, on top of the process's: requests go first. At 10, a full core leaves it too little to keep up."""
QUIET_S = 10.0
"""How long after a complaint about the database the next one waits."""

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


_Row = tuple[UsageRecord, Journal | None, int]


class Writer:
    """
    A thread that commits what is put, in groups.

    Where the database is away, it tries again, ever more patiently: what it holds stands in the journal, too, and is no
    more than has room there.
    """

    def __init__(self, database: Database, counts: LedgerCounts, clock: Callable[[], float], wait_s: float) -> None:
        self._database = database
        self._wait_s = wait_s
        self._counts = counts
        self._clock = clock
        self._pending: deque[_Row] = deque()
        self._group: list[_Row] = []
        self._strays: deque[tuple[list[UsageRecord], Future[dict[str, int]]]] = deque()
        self._wake = threading.Event()
        self._idle = False
        self._stopping = threading.Event()
        self._tried = threading.Event()
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
        unreadable = 0
        for left in list(journal.found()):
            try:
                record = decode(left.wire)
            except msgspec.MsgspecError:
                unreadable += 1
                journal.free(left.slot)
                continue
            if left.progress is not None:
                noted = left.progress
                prompt = noted.prompt_tokens or record.prompt_tokens
                record.left_under_way(prompt, noted.completion_tokens, noted.at_ms)
            self._pending.append((record, journal, left.slot))
            self._counts.adopted += 1
        if unreadable:
            self._counts.unreadable += unreadable
            logger.error("%s: %d records of requests cannot be read and are lost", journal.path, unreadable)
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
        if not self._pending:
            self._tried.set()
        self._thread.start()

    def first_try(self, timeout_s: float) -> None:
        """Waits until what a dead process left has been written, or could not be."""
        self._tried.wait(timeout_s)
        self._tried.set()

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
        if sys.platform == "linux":  # elsewhere, this would be the whole process
            os.nice(NICENESS)
        while self._gather() or not self._stopping.is_set():
            try:
                self.write()
                self._failures = 0
            except Exception as exc:  # whatever it is, the next ones must be written
                self._fail(exc)
                if self._group:
                    self._refuse_strays(str(exc))
                if self._stopping.is_set():
                    break
                self._tried.set()
                self._stopping.wait(BACKOFF_S[min(self._failures, len(BACKOFF_S)) - 1])
            if not self._pending:
                self._tried.set()
        self._refuse_strays("the gateway is shutting down")
        self._close()

    def _gather(self) -> bool:
        """Waits for a group to be worth a commit, unless one is left from before. False where it was woken for none."""
        if self._group:
            return True
        self._idle = True
        if not self._pending and not self._strays and not self._stopping.is_set():
            self._wake.wait()
        self._idle = False
        self._wake.clear()
        if 0 < len(self._pending) < ROWS and self._tried.is_set() and not self._strays and not self._stopping.is_set():
            self._wake.wait(self._wait_s)
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

    def _refuse_strays(self, why: str) -> None:
        """Those that rows are in front of: who waits for them has other things to do, and comes again."""
        while self._strays:
            _, written = self._strays.popleft()
            if written.set_running_or_notify_cancel():
                written.set_exception(DatabaseUnavailable(why))

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

"""Does the thread that writes go on, whatever the others do at the same time?"""

import asyncio
import os
import sys
import threading
from collections.abc import Sequence

import pytest

from gateway.database import DatabaseUnavailable, Inserted, Kind, Metric, Unwritable
from gateway.database.record import UsageRecord, encode
from gateway.ledger import Ledger
from gateway.ledger.writer import CATCHING_UP, NICENESS, ROWS
from gateway.schema.common import Usage
from gateway.stores import LedgerUnavailable
from tests.ledger.calls import a_call, a_record
from tests.served import until

pytestmark = pytest.mark.anyio

USAGE = Usage(prompt_tokens=10, completion_tokens=5)


class Gate:
    """A database in memory. `begun` tells that a commit has begun; it ends when it is `let` to."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self.groups: list[int] = []
        self.begun = threading.Event()
        self.let = threading.Event()
        self.let.set()
        self.fails: Exception | None = None
        self.closed = False

    def commit(self, records: Sequence[UsageRecord]) -> Inserted:
        self.begun.set()
        assert self.let.wait(20)
        if self.fails is not None:
            raise self.fails
        before = len(self.rows)
        for record in records:
            self.rows.setdefault(record.request_id, len(self.rows) + 1)
        self.groups.append(len(records))
        return Inserted(
            {record.request_id: self.rows[record.request_id] for record in records}, len(self.rows) - before
        )

    def opens_soon(self) -> None:
        """So that who does not wait is found out."""
        self.let.clear()
        threading.Timer(0.2, self.let.set).start()

    def prepare(self) -> None: ...

    def used(self, kind: Kind, name: str, model: str | None, metric: Metric, since_ms: int) -> tuple[int, int]:
        raise DatabaseUnavailable("it is away")

    def close(self) -> None:
        self.closed = True


def request(ledger: Ledger) -> None:
    with ledger.entry(a_call(USAGE)):
        pass


async def test_records_that_come_while_others_are_written_do_not_end_it() -> None:
    gate = Gate()
    ledger = Ledger(gate)
    async with ledger.running():
        for number in range(20):
            gate.begun.clear()
            gate.let.clear()
            request(ledger)
            await until(gate.begun.is_set)
            strays = asyncio.ensure_future(ledger.ingest([encode(a_record(f"req_{number}"))]))
            await asyncio.sleep(0)
            gate.let.set()
            assert (await strays).keys() == {f"req_{number}"}
        request(ledger)
        await until(lambda: ledger.backlog == 0)
    assert gate.closed
    assert len(gate.rows) == 20 + 20 + 1


async def test_rows_go_in_groups_and_larger_ones_when_there_are_many() -> None:
    gate = Gate()
    ledger = Ledger(gate)
    async with ledger.running():
        gate.let.clear()
        request(ledger)
        await until(gate.begun.is_set)
        for _ in range(CATCHING_UP + 5):
            request(ledger)
        gate.let.set()
        await until(lambda: ledger.backlog == 0)

    assert gate.groups == [1, CATCHING_UP, 5]


@pytest.mark.skipif(sys.platform != "linux", reason="only there has each thread its own priority")
async def test_the_thread_gives_way_to_the_event_loop() -> None:
    ours = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    async with Ledger(Gate()).running():
        (theirs,) = (thread.native_id or 0 for thread in threading.enumerate() if thread.name == "ledger-writer")
        await until(lambda: os.getpriority(os.PRIO_PROCESS, theirs) == min(19, ours + NICENESS))
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == ours


async def test_who_begins_under_load_waits_for_groups_too() -> None:
    gate = Gate()
    ledger = Ledger(gate, wait_s=60.0)
    async with ledger.running():
        gate.let.clear()
        for _ in range(ROWS):
            request(ledger)
        await until(gate.begun.is_set)
        request(ledger)
        gate.let.set()
        await until(lambda: gate.groups == [ROWS])
        for _ in range(ROWS - 1):
            request(ledger)
        await until(lambda: ledger.backlog == 0)

    assert gate.groups == [ROWS, ROWS]


async def test_the_end_waits_for_the_last_rows() -> None:
    gate = Gate()
    ledger = Ledger(gate)
    async with ledger.running():
        for _ in range(ROWS * 3):
            request(ledger)
        gate.opens_soon()
    assert len(gate.rows) == ROWS * 3


async def test_whoever_waits_for_strays_is_told_that_the_database_is_away() -> None:
    gate = Gate()
    gate.fails = DatabaseUnavailable("it is away")
    ledger = Ledger(gate)
    async with ledger.running():
        with pytest.raises(LedgerUnavailable, match="it is away"):
            await ledger.ingest([encode(a_record("req_stray"))])
        with pytest.raises(LedgerUnavailable, match="it is away"):
            await ledger.used("key:alice", "tokens", 0)
        gate.fails = None
        assert await ledger.ingest([encode(a_record("req_stray"))]) == {"req_stray": 1}


async def test_whoever_waits_for_strays_is_told_so_too_while_rows_wait_before_them() -> None:
    gate = Gate()
    gate.fails = DatabaseUnavailable("it is away")
    ledger = Ledger(gate)
    async with ledger.running():
        request(ledger)
        await until(lambda: ledger.counts.errors > 0)
        async with asyncio.timeout(20):
            with pytest.raises(LedgerUnavailable, match="it is away"):
                await ledger.ingest([encode(a_record("req_stray"))])
        leaving = asyncio.ensure_future(ledger.ingest([encode(a_record("req_stray"))]))
        await asyncio.sleep(0)
        leaving.cancel()
    assert gate.closed


async def test_a_surprise_does_not_end_it_either() -> None:
    gate = Gate()
    gate.fails = ZeroDivisionError()
    ledger = Ledger(gate)
    async with ledger.running():
        request(ledger)
        await until(lambda: ledger.counts.errors > 0)
        gate.fails = None
        await until(lambda: ledger.backlog == 0)
    assert len(gate.rows) == 1


async def test_what_cannot_be_read_is_left_out_and_counted() -> None:
    ledger = Ledger(Gate())
    async with ledger.running():
        assert await ledger.ingest([b"", b"\x90", encode(a_record("req_good"))]) == {"req_good": 1}
    assert ledger.counts.unreadable == 2


async def test_complaints_about_the_database_are_few(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    gate.fails = DatabaseUnavailable("it is away")
    ledger = Ledger(gate, clock=lambda: 1_800_000_000.0)
    async with ledger.running():
        request(ledger)
        await until(lambda: ledger.counts.errors > 2)
        gate.fails = None
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert said == ["the database takes no records (1 are waiting): it is away"]


async def test_a_row_that_cannot_be_written_is_given_up_alone() -> None:
    gate = Gate()
    ledger = Ledger(gate)
    async with ledger.running():
        gate.fails = Unwritable("there is poison in it")
        request(ledger)
        await until(lambda: ledger.counts.unwritable == 1)
        gate.fails = None
        request(ledger)
        await until(lambda: ledger.backlog == 0)
    assert len(gate.rows) == 1


async def test_what_was_left_is_written_before_anything_begins() -> None:
    """So that a quota that is read from sums has it."""
    gate = Gate()
    ledger = Ledger(gate)
    for _ in range(CATCHING_UP + 7):
        request(ledger)
    gate.opens_soon()
    async with ledger.running():
        assert len(gate.rows) == CATCHING_UP + 7

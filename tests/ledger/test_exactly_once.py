"""Whatever happens, in whatever order: has each request exactly one row, and do the sums agree with the rows?"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from shutil import rmtree
from typing import Literal

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from gateway.auth import Principal
from gateway.database import Database, DatabaseUnavailable, Inserted, Kind, Metric, Unwritable
from gateway.database.record import UsageRecord, decode, encode
from gateway.database.sqlite import SQLite
from gateway.errors import InvalidRequest, UpstreamFailed
from gateway.journal import adopt, create
from gateway.ledger import Entry, Ledger
from gateway.schema.common import Usage
from tests.ledger.calls import DIFFERENCE, PRICES, a_call, ask, rows_at

OWNER = b"o" * 32
SLOTS = 6
NAMES = ["alice", "bob"]
FAST = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a crash of the machine is not what this is about
Fault = Literal["none", "before", "after"]


class Faulty:
    """A database that fails when it is told to: before it does what it is asked for, or after."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.fault: Fault = "none"
        self.poisoned: set[str] = set()

    def commit(self, records: Sequence[UsageRecord]) -> Inserted:
        if self.fault == "before":
            raise DatabaseUnavailable("it is away")
        if any(record.request_id in self.poisoned for record in records):
            raise Unwritable("there is poison in it")
        inserted = self.database.commit(records)
        if self.fault == "after":
            raise DatabaseUnavailable("it went away when it had just committed")
        return inserted

    def prepare(self) -> None:
        self.database.prepare()

    def used(self, kind: Kind, name: str, model: str | None, metric: Metric, since_ms: int) -> tuple[int, int]:
        return self.database.used(kind, name, model, metric, since_ms)

    def close(self) -> None:
        self.database.close()


class ExactlyOnce(RuleBasedStateMachine):
    under_way = Bundle("under_way")

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="suiron-ledger-", dir=FAST))
        self.expected: dict[str, tuple[str, int]] = {}  # outcome and tokens, of those that are over
        self.flying: dict[str, int] = {}  # tokens noted, of those under way
        self.reaped: dict[str, int] = {}  # tokens that another replica wrote for those it took for dead
        self.events: list[bytes] = []
        self.told: dict[str, int] = {}
        self.start()

    def start(self) -> None:
        database = SQLite(self.folder / "ledger.db")
        database.prepare()
        self.database = Faulty(database)
        found, _ = adopt(self.folder / "journal", OWNER)
        own = found[0] if found else create(self.folder / "journal", OWNER, SLOTS)
        self.journal = own
        self.ledger = Ledger(self.database, own, found[1:])

    @precondition(lambda self: self.ledger_has_room())
    @rule(target=under_way, name=st.sampled_from(NAMES), dispatched=st.booleans(), priced=st.booleans())
    def open(self, name: str, dispatched: bool, priced: bool) -> tuple[Entry, bool, Ledger]:
        prices = PRICES if priced else None
        call = a_call(Usage(prompt_tokens=3), principal=Principal(name, "t"), prices=prices, dispatched=dispatched)
        entry = self.ledger.entry(call)
        self.flying[f"req_{call.id}"] = 0
        return entry, dispatched, self.ledger

    def ledger_has_room(self) -> bool:
        return self.journal.room > 0

    @rule(tokens=st.integers(0, 50))
    def note(self, tokens: int) -> None:
        self.ledger.beat(lambda _: tokens)
        for entry in self.ledger.under_way:
            if entry.call.attempts:
                self.flying[entry.request_id] = 3 + tokens

    @rule(opened=consumes(under_way), exc=st.sampled_from([None, GeneratorExit(), UpstreamFailed("cut")]))
    def end(self, opened: tuple[Entry, bool, Ledger], exc: BaseException | None) -> None:
        entry, dispatched, ledger = opened
        if ledger is not self.ledger:
            return  # a crash has ended it
        del self.flying[entry.request_id]
        record = entry.close(exc if dispatched else InvalidRequest("no"))
        assert (record is None) == (not dispatched)
        if record is not None:
            self.expected[entry.request_id] = (record.outcome, 3)
            self.events.append(encode(record))

    @rule(fault=st.sampled_from(["none", "none", "before", "after"]))
    def write(self, fault: Fault) -> None:
        self.database.fault = fault
        try:
            self.ledger.write()
        except DatabaseUnavailable:
            assert fault != "none"
        self.database.fault = "none"

    @precondition(lambda self: self.ledger.under_way)
    @rule(data=st.data(), tokens=st.integers(0, 50))
    def reap(self, data: st.DataObject, tokens: int) -> None:
        """Another replica has not heard of it for long, and writes what it knows."""
        entry = data.draw(st.sampled_from(sorted(self.ledger.under_way, key=lambda entry: entry.slot)))
        record = decode(self.ledger.abandoned(entry.intent, tokens))
        self.database.database.commit([record])
        self.reaped.setdefault(entry.request_id, record.charged_tokens)

    @precondition(lambda self: self.events)
    @rule(data=st.data(), times=st.integers(1, 2))
    def ingest(self, data: st.DataObject, times: int) -> None:
        """Another replica found what this one had not said was recorded."""
        events = data.draw(st.lists(st.sampled_from(self.events), max_size=4))
        for _ in range(times):
            rows = self.database.database.commit([decode(event) for event in events]).rows if events else {}
            for request_id, seq in rows.items():
                assert self.told.setdefault(request_id, seq) == seq
                self.reaped.pop(request_id, None)

    @rule()
    def crash(self) -> None:
        """All is lost but what is in files."""
        self.ledger.close()
        for request_id, tokens in self.flying.items():
            self.expected[request_id] = ("abandoned", self.reaped.get(request_id, tokens))
        self.flying.clear()
        self.start()

    @invariant()
    def no_row_is_there_twice_or_unasked_and_the_sums_agree(self) -> None:
        rows = rows_at(self.folder)
        assert {row["request_id"] for row in rows} <= self.expected.keys() | self.reaped.keys()
        for row in rows:
            known = row["request_id"]
            may_be = {self.expected.get(known), ("abandoned", self.reaped.get(known))}
            assert (row["outcome"], row["charged_tokens"]) in may_be
        assert ask(self.folder, DIFFERENCE) == []

    def teardown(self) -> None:
        if not hasattr(self, "ledger"):
            return
        self.crash()
        self.ledger.write()
        written = {row["request_id"]: (row["outcome"], row["charged_tokens"]) for row in rows_at(self.folder)}
        let_go = {name: ("abandoned", tokens) for name, tokens in self.reaped.items() if name not in self.expected}
        assert written == self.expected | let_go
        self.no_row_is_there_twice_or_unasked_and_the_sums_agree()
        assert self.journal.room == SLOTS
        self.ledger.close()
        rmtree(self.folder)


TestExactlyOnce = ExactlyOnce.TestCase
TestExactlyOnce.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)

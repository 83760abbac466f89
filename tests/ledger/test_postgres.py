"""Does the ledger hold with a real PostgreSQL, also while it is killed, frozen, locked or not yet there?"""

import asyncio
import itertools
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gateway import settings
from gateway.auth import Principal
from gateway.database import DatabaseUnavailable
from gateway.database.opening import open_database
from gateway.database.record import encode
from gateway.errors import LedgerFull
from gateway.ledger import Ledger, open_ledger
from gateway.schema.common import Usage
from gateway.settings import SettingsError
from gateway.stores import LedgerUnavailable
from tests.ledger.calls import BILL, FORGETTING, SUMS, THE_BILL, a_call, a_record, for_a_bill
from tests.ledger.servers import Postgres, PostgresDatabase, a_postgres
from tests.served import until

pytestmark = pytest.mark.anyio

USAGE = Usage(prompt_tokens=10, completion_tokens=5)
DIFFERENCE = f"""
    WITH summed AS (
        SELECT started_ms / 3600000 * 3600, key_name, user_name, team_name, model, target, outcome,
            {SUMS.replace("cost_nano IS NULL", "(cost_nano IS NULL)::int")}
        FROM usage GROUP BY 1, 2, 3, 4, 5, 6, 7
    )
    (SELECT * FROM summed EXCEPT SELECT * FROM usage_hour) UNION ALL
    (SELECT * FROM usage_hour EXCEPT SELECT * FROM summed)
"""
names = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with a_postgres() as server:
        yield server


@pytest.fixture
def database(server: Postgres, tmp_path: Path) -> PostgresDatabase:
    return PostgresDatabase(server, f"test{next(names)}", tmp_path)


@asynccontextmanager
async def a_ledger(configured: settings.Database) -> AsyncIterator[Ledger]:
    ledger = open_ledger(configured)
    async with ledger.running():
        yield ledger


class Traffic:
    """Requests, one after another, for as long as it is entered; how late the event loop was meanwhile."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.posted: set[str] = set()
        self.latest_s = 0.0

    async def __aenter__(self) -> "Traffic":
        self._task = asyncio.create_task(self._go())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _go(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            with self.ledger.entry(a_call(USAGE)) as entry:
                pass
            self.posted.add(entry.request_id)
            due = loop.time() + 0.005
            await asyncio.sleep(0.005)
            self.latest_s = max(self.latest_s, loop.time() - due)

    async def more(self, count: int) -> None:
        enough = len(self.posted) + count
        await until(lambda: len(self.posted) >= enough)


def whole(database: PostgresDatabase, posted: set[str]) -> None:
    """Each has exactly one row, nothing else is there, and the sums agree."""
    found = [row[0] for row in database.ask("SELECT request_id FROM usage")]
    assert sorted(found) == sorted(posted)
    assert database.ask(DIFFERENCE) == []


async def test_requests_are_rows_and_sums(database: PostgresDatabase) -> None:
    async with a_ledger(database.settings()) as ledger:
        told: dict[str, int] = {}
        ledger.committed = told.update
        calls = [a_call(USAGE, principal=Principal(name, "t", team="red")) for name in ("alice", "bob", "alice")]
        for call in calls:
            with ledger.entry(call):
                pass
        await until(lambda: len(told) == 3)

        assert told == {f"req_{call.id}": seq for seq, call in enumerate(calls, 1)}
        assert await ledger.used("key:alice", "tokens", 0) == (30, 3)
        assert await ledger.used("team:red", "nano_usd", 0) == (150_000, 3)
        assert await ledger.used("team:red/model:smart", "requests", 0) == (3, 3)
    whole(database, set(told))


async def test_a_second_gateway_that_counts_limits_by_itself_is_refused(database: PostgresDatabase) -> None:
    async with open_ledger(database.settings(), alone=True).running():
        with pytest.raises(SettingsError, match="name a Redis for both"):
            open_ledger(database.settings(), alone=True)
        async with open_ledger(database.settings()).running():
            """One that counts elsewhere may."""
    async with open_ledger(database.settings(), alone=True).running():
        """The claim ends with who made it."""


async def test_a_server_killed_under_load_costs_no_request_and_no_row(database: PostgresDatabase) -> None:
    async with a_ledger(database.settings()) as ledger:
        async with Traffic(ledger) as traffic:
            await traffic.more(30)
            await until(lambda: ledger.counts.written > 0)
            database.server.kill()
            await traffic.more(60)
            await until(lambda: ledger.counts.errors > 0)
            with pytest.raises(LedgerUnavailable):
                await ledger.used("team:red", "tokens", 0)
            await asyncio.to_thread(database.server.start)
            await traffic.more(30)
        await until(lambda: ledger.backlog == 0)
    whole(database, traffic.posted)


async def test_a_locked_table_holds_up_rows_but_no_request(database: PostgresDatabase) -> None:
    async with a_ledger(database.settings()) as ledger, Traffic(ledger) as traffic:
        await until(lambda: ledger.counts.written > 0)
        with database.server.connect(database.name) as other, other.transaction():
            other.execute("LOCK TABLE usage IN ACCESS EXCLUSIVE MODE")
            written = ledger.counts.written
            await traffic.more(100)
            assert (ledger.counts.written, ledger.counts.errors) == (written, 0)
            assert ledger.backlog >= 100
        await until(lambda: ledger.backlog < 50)
        await traffic.__aexit__()
        await until(lambda: ledger.backlog == 0)
    whole(database, traffic.posted)
    assert traffic.latest_s < 1


async def test_a_frozen_server_holds_up_rows_but_no_request(database: PostgresDatabase) -> None:
    async with a_ledger(database.settings()) as ledger, Traffic(ledger) as traffic:
        await until(lambda: ledger.counts.written > 0)
        database.server.signal(signal.SIGSTOP)
        try:
            await traffic.more(100)
            assert ledger.backlog >= 50
        finally:
            database.server.signal(signal.SIGCONT)
        await until(lambda: ledger.backlog < 50)
        await traffic.__aexit__()
        await until(lambda: ledger.backlog == 0)
    whole(database, traffic.posted)
    assert traffic.latest_s < 1


async def test_a_frozen_server_does_not_hold_up_the_end_and_the_next_start_writes_the_rest(
    database: PostgresDatabase,
) -> None:
    ledger = open_ledger(database.settings())
    async with ledger.running():
        async with Traffic(ledger) as traffic:
            await until(lambda: ledger.counts.written > 0)
            database.server.signal(signal.SIGSTOP)
            await traffic.more(50)
        began = time.monotonic()
    took_s = time.monotonic() - began
    database.server.signal(signal.SIGCONT)
    await until(lambda: ledger.backlog == 0)  # its thread was stuck, and comes to write them after all
    whole(database, traffic.posted)
    assert took_s < 5


async def test_a_server_that_is_not_there_at_the_start_is_waited_for(database: PostgresDatabase) -> None:
    database.server.kill()
    try:
        ledger = open_ledger(database.settings())
        async with ledger.running(), Traffic(ledger) as traffic:
            await traffic.more(20)
            await asyncio.to_thread(database.server.start)
            await until(lambda: ledger.counts.written > 0)
            await traffic.__aexit__()
            await until(lambda: ledger.backlog == 0)
    finally:
        if database.server.process is None:
            database.server.start()
    whole(database, traffic.posted)


@pytest.mark.parametrize("is_new", [False, True])
async def test_a_server_that_may_only_be_read_for_a_while_is_connected_to_anew(
    is_new: bool, database: PostgresDatabase
) -> None:
    """As after a failover: the connections that are there stay with what is a standby now."""
    if not is_new:
        open_ledger(database.settings()).close()
    with database.server.connect(database.name) as other:
        other.execute(f"ALTER DATABASE {database.name} SET default_transaction_read_only = on")
    async with a_ledger(database.settings()) as ledger:
        with ledger.entry(a_call(USAGE)) as entry:
            pass
        await until(lambda: ledger.counts.errors > 0)
        with database.server.connect(database.name, options="-c default_transaction_read_only=off") as other:
            other.execute(f"ALTER DATABASE {database.name} RESET default_transaction_read_only")
        await until(lambda: ledger.backlog == 0)
    whole(database, {entry.request_id})


async def test_when_the_journal_is_full_requests_are_refused_until_the_server_is_back(
    database: PostgresDatabase,
) -> None:
    posted = set()
    async with a_ledger(database.settings()) as ledger:
        with database.server.connect(database.name) as other, other.transaction():
            other.execute("LOCK TABLE usage IN ACCESS EXCLUSIVE MODE")
            for _ in range(512):
                with ledger.entry(a_call(USAGE)) as entry:
                    pass
                posted.add(entry.request_id)
            with pytest.raises(LedgerFull):
                ledger.entry(a_call(USAGE))
        await until(lambda: ledger.backlog == 0)
        with ledger.entry(a_call(USAGE)) as entry:
            pass
        posted.add(entry.request_id)
    whole(database, posted)


async def test_gateways_that_ingest_the_same_events_write_them_once(database: PostgresDatabase) -> None:
    events = [encode(a_record(f"req_{number}")) for number in range(20)]
    async with (
        a_ledger(database.settings()) as one,
        a_ledger(database.settings()) as two,
    ):
        seqs = await asyncio.gather(*(ledger.ingest(events) for ledger in (one, two, one, two)))

    assert all(each == seqs[0] for each in seqs)
    assert one.counts.written + two.counts.written == 20
    whole(database, {f"req_{number}" for number in range(20)})


async def test_who_was_taken_for_dead_and_ends_has_its_bill_put_right(database: PostgresDatabase) -> None:
    """A replica that stood still for a minute, or could not reach Redis: another has written what it knew."""
    async with a_ledger(database.settings()) as one, a_ledger(database.settings()) as two:
        with one.entry(a_call(USAGE)) as late, one.entry(a_call(USAGE)) as never:
            for entry, tokens in ((late, 2), (never, 3)):
                await two.ingest([two.abandoned(entry.intent, tokens)])
            assert await two.used("team:red", "tokens", 0) == (5, 2)
            late.close(None)
            await until(lambda: one.counts.known == 1)
            assert await two.used("team:red", "tokens", 0) == (15 + 3, 4)
            assert database.ask(DIFFERENCE) == []
    whole(database, {late.request_id, never.request_id})
    assert database.ask("SELECT outcome, completion_tokens FROM usage") == [("completed", 5), ("completed", 5)]


async def test_what_no_database_takes_does_not_keep_the_others_out(database: PostgresDatabase) -> None:
    async with a_ledger(database.settings()) as ledger:
        for model in ("smart", "sma\0rt", "smart"):
            with ledger.entry(a_call(USAGE, model=model)):
                pass
        good, bad = encode(a_record("req_good")), encode(a_record("req_\0bad"))
        assert (await ledger.ingest([bad, good])).keys() == {"req_good"}
        await until(lambda: ledger.backlog == 0)

    assert ledger.counts.unwritable == 2
    assert database.ask("SELECT count(*) FROM usage") == [(3,)]


def test_whoever_sees_a_row_has_seen_all_before_it(database: PostgresDatabase) -> None:
    opened = [open_database(database.settings()) for _ in range(4)]
    for each in opened:
        each.prepare()
    over = threading.Event()
    late: list[int] = []

    def write(writer: int) -> None:
        for group in range(25):
            opened[writer].commit([a_record(f"req_{writer}_{group}_{number}") for number in range(20)])

    def watch() -> None:
        with database.server.connect(database.name) as connection:
            newest = seen = 0
            while not over.is_set():
                counted = connection.execute("SELECT count(*) FROM usage WHERE seq <= %s", [newest]).fetchone()
                late.extend([counted[0]] if counted and counted[0] != seen else [])
                found = connection.execute("SELECT coalesce(max(seq), 0), count(*) FROM usage").fetchone()
                assert found is not None
                newest, seen = found

    watching = threading.Thread(target=watch)
    writing = [threading.Thread(target=write, args=[writer]) for writer in range(4)]
    for thread in (watching, *writing):
        thread.start()
    for thread in writing:
        thread.join()
    over.set()
    watching.join()
    for each in opened:
        each.close()

    assert late == []
    assert database.ask("SELECT count(*) FROM usage") == [(2000,)]
    assert database.ask(DIFFERENCE) == []


def test_several_that_start_at_once_migrate_once(database: PostgresDatabase) -> None:
    opened = [open_database(database.settings()) for _ in range(4)]
    failed: list[Exception] = []

    def prepare(number: int) -> None:
        try:
            opened[number].prepare()
        except (SettingsError, DatabaseUnavailable) as exc:
            failed.append(exc)

    threads = [threading.Thread(target=prepare, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in opened:
        each.close()

    assert failed == []
    assert database.ask("SELECT version_num FROM suiron_version") == [("0002",)]


SLOWLY = """
    CREATE FUNCTION slowly() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN
        IF current_query() LIKE '%CREATE TABLE usage_hour%' THEN PERFORM pg_sleep(11); END IF;
    END $$;
    CREATE EVENT TRIGGER slowly ON ddl_command_start EXECUTE FUNCTION slowly();
"""


@pytest.mark.slow
def test_a_migration_may_take_longer_than_any_other_statement(database: PostgresDatabase) -> None:
    with database.server.connect(database.name) as connection:
        connection.execute(SLOWLY)

    opened = open_database(database.settings())
    opened.prepare()
    opened.close()

    assert database.ask("SELECT version_num FROM suiron_version") == [("0002",)]


def test_tables_of_a_newer_version_are_refused(database: PostgresDatabase) -> None:
    with database.server.connect(database.name) as connection:
        connection.execute("CREATE TABLE suiron_version (version_num varchar(32))")
        connection.execute("INSERT INTO suiron_version VALUES ('0999')")

    with pytest.raises(SettingsError, match=r"newer Suiron \(its tables are at 0999, this one knows"):
        open_ledger(database.settings())


def test_a_table_of_somebody_else_is_refused(database: PostgresDatabase) -> None:
    with database.server.connect(database.name) as connection:
        connection.execute("CREATE TABLE usage (what text)")

    with pytest.raises(SettingsError, match="has a table 'usage' that is not Suiron's"):
        open_ledger(database.settings())


def test_postgresql_needs_a_place_for_the_journal(database: PostgresDatabase) -> None:
    with pytest.raises(SettingsError, match=r"database\.journal: name a directory on a local disk"):
        open_ledger(settings.Database(url=database.settings().url, password=database.settings().password))


def test_the_bill_is_the_query_that_the_readme_says_also_when_old_rows_are_gone(database: PostgresDatabase) -> None:
    opened = open_database(database.settings())
    opened.prepare()
    opened.commit(for_a_bill())
    opened.close()

    with database.server.connect(database.name) as connection:
        connection.execute(FORGETTING.encode())
    assert database.ask("SELECT count(*) FROM usage") == [(4,)]
    rows = [tuple(map(float, row[2:])) for row in database.ask(THE_BILL)]
    assert [row[:2] for row in database.ask(THE_BILL)] == [row[:2] for row in BILL]
    assert rows == [row[2:] for row in BILL]

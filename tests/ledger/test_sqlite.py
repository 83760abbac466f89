"""Does the ledger hold with a SQLite file that is locked, full, damaged, or not ours?"""

import asyncio
import hashlib
import json
import re
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gateway import settings
from gateway.database.record import encode
from gateway.database.sqlite import SQLite
from gateway.journal import HEAD_BYTES, INTENT_AT, SLOT_BYTES
from gateway.ledger import Ledger, open_ledger
from gateway.schema.common import Usage
from gateway.settings import SettingsError
from tests.ledger.calls import BILL, DIFFERENCE, FORGETTING, THE_BILL, a_call, ask, for_a_bill, rows_at, sqlite_at
from tests.served import until

pytestmark = pytest.mark.anyio

USAGE = Usage(prompt_tokens=10, completion_tokens=5)


@asynccontextmanager
async def ledger_at(folder: Path) -> AsyncIterator[Ledger]:
    ledger = open_ledger(sqlite_at(folder))
    async with ledger.running():
        yield ledger


def request(ledger: Ledger) -> str:
    with ledger.entry(a_call(USAGE)) as entry:
        pass
    return entry.request_id


def whole(folder: Path, posted: list[str]) -> None:
    assert sorted(row["request_id"] for row in rows_at(folder)) == sorted(posted)
    assert ask(folder, DIFFERENCE) == []


LOCKER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
async def test_a_file_locked_by_another_process_holds_up_rows_but_no_request(tmp_path: Path) -> None:
    async with ledger_at(tmp_path) as ledger:
        path = tmp_path / "ledger.db"
        pipe = asyncio.subprocess.PIPE
        other = await asyncio.create_subprocess_exec(sys.executable, "-c", LOCKER, path, stdin=pipe, stdout=pipe)
        assert other.stdin is not None
        assert other.stdout is not None
        assert await other.stdout.readline() == b"locked\n"

        posted = [request(ledger) for _ in range(300)]
        await until(lambda: ledger.counts.errors > 0)  # having waited for as long as it does
        assert (ledger.counts.written, ledger.backlog) == (0, 300)
        assert await ledger.used("team:red", "tokens", 0) == (0, 0)  # readers are not in the way of writers
        other.stdin.close()
        await other.wait()
        await until(lambda: ledger.backlog == 0)

    whole(tmp_path, posted)


def test_a_full_disk_holds_up_rows_then_refuses_requests_and_recovers_by_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.ledger.full_disk", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stderr
    assert re.search(r"the database takes no records \(\d+ are waiting\): disk I/O error", done.stderr)
    assert json.loads(done.stdout) == {"taken": 512, "written": 1}
    assert len(rows_at(tmp_path)) == 514
    assert ask(tmp_path, DIFFERENCE) == []


async def test_a_file_that_is_moved_away_is_missed_and_written_to_when_it_is_back(tmp_path: Path) -> None:
    path, elsewhere = tmp_path / "ledger.db", tmp_path / "elsewhere.db"
    async with ledger_at(tmp_path) as ledger:
        posted = [request(ledger)]
        await until(lambda: ledger.backlog == 0)
        path.rename(elsewhere)
        posted.append(request(ledger))
        await until(lambda: ledger.counts.errors > 0)
        elsewhere.rename(path)
        await until(lambda: ledger.backlog == 0)
    whole(tmp_path, posted)


async def test_a_copy_put_in_its_place_while_it_runs_gets_the_rows_at_the_next_start(tmp_path: Path) -> None:
    async with ledger_at(tmp_path) as ledger:
        posted = [request(ledger)]
        await until(lambda: ledger.backlog == 0)
        ask(tmp_path, f"VACUUM INTO '{tmp_path}/copy.db'")
        (tmp_path / "copy.db").replace(tmp_path / "ledger.db")
        posted.append(request(ledger))
        await until(lambda: ledger.counts.errors > 0)
    async with ledger_at(tmp_path) as ledger:
        await until(lambda: ledger.backlog == 0)
    whole(tmp_path, posted)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"These are my notes, and no database.", "is no SQLite database: give the ledger a file of its own"),
        (b"SQLite format 3\0" + b"\x10\0\1\1\0@  " + b"\0" * 500, "cannot be used: "),
    ],
)
def test_what_is_no_database_is_refused_and_left_as_it_is(content: bytes, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(content)

    with pytest.raises(SettingsError, match=complaint):
        open_ledger(sqlite_at(tmp_path))
    assert path.read_bytes() == content
    assert not (tmp_path / "ledger.journal").exists()


async def grown(folder: Path) -> Path:
    async with ledger_at(folder) as ledger:
        for _ in range(400):
            request(ledger)
    return folder / "ledger.db"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


async def test_a_file_cut_short_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = await grown(tmp_path)
    whole_file = path.read_bytes()
    path.write_bytes(whole_file[: len(whole_file) // 2])
    before = digest(path)

    with pytest.raises(SettingsError, match=r"cannot be used: .*malformed.* It was left as it is: restore a copy"):
        open_ledger(sqlite_at(tmp_path))
    assert digest(path) == before


async def test_a_file_with_a_broken_page_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = await grown(tmp_path)
    with path.open("r+b") as file:
        file.seek(4096 * 20)
        file.write(b"\xff" * 4096)
    before = digest(path)

    with pytest.raises(SettingsError, match=r"cannot be used: "):
        open_ledger(sqlite_at(tmp_path))
    assert digest(path) == before


def other_program(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


def test_the_database_of_another_program_is_refused(tmp_path: Path) -> None:
    other_program(tmp_path / "ledger.db", "CREATE TABLE bookmarks (url TEXT)")

    with pytest.raises(SettingsError, match="is the database of another program"):
        open_ledger(sqlite_at(tmp_path))


def test_a_file_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    open_ledger(sqlite_at(tmp_path)).close()
    other_program(tmp_path / "ledger.db", "UPDATE suiron_version SET version_num = '0999'")

    with pytest.raises(SettingsError, match=r"newer Suiron \(its tables are at 0999, this one knows 0002\)"):
        open_ledger(sqlite_at(tmp_path))


@pytest.mark.slow
def test_a_file_that_another_program_has_locked_at_the_start_is_not_called_damaged(tmp_path: Path) -> None:
    open_ledger(sqlite_at(tmp_path)).close()
    other = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")

    with pytest.raises(SettingsError, match=r"ledger\.db cannot be written now: database is locked$"):
        open_ledger(sqlite_at(tmp_path))
    other.close()
    open_ledger(sqlite_at(tmp_path)).close()


def test_a_refused_file_is_not_locked(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(b"no database at all")
    with pytest.raises(SettingsError):
        open_ledger(sqlite_at(tmp_path))
    path.unlink()

    open_ledger(sqlite_at(tmp_path)).close()


def test_a_second_process_is_refused_and_the_first_one_named(tmp_path: Path) -> None:
    ledger = open_ledger(sqlite_at(tmp_path))
    code = f"""
from gateway.ledger import open_ledger
from gateway.settings import Database
open_ledger(Database(url="sqlite:///{tmp_path}/ledger.db"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    ledger.close()

    assert "is in use by another gateway (process " in done.stderr


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://localhost/suiron", "ledger.db"])
def test_a_url_that_names_no_file_is_refused_with_what_to_write(url: str) -> None:
    with pytest.raises(SettingsError, match=r"database\.url: .*sqlite:////path/to/file"):
        open_ledger(settings.Database(url=url))


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SettingsError, match=f"the ledger cannot be kept in {tmp_path}/file/ledger.db: "):
        open_ledger(settings.Database(url=f"sqlite:///{tmp_path}/file/ledger.db"))


async def test_what_a_dead_process_left_is_written_and_its_journal_used_again(tmp_path: Path) -> None:
    ledger = open_ledger(sqlite_at(tmp_path))
    posted = [request(ledger) for _ in range(5)]
    posted.append(ledger.entry(a_call()).request_id)
    ledger.close()

    async with ledger_at(tmp_path) as again:
        assert again.counts.adopted == 6
        await until(lambda: again.backlog == 0)

    whole(tmp_path, posted)
    assert [row["outcome"] for row in rows_at(tmp_path)] == ["completed"] * 5 + ["abandoned"]
    assert len(list((tmp_path / "ledger.journal").iterdir())) == 1


async def test_a_journal_of_another_size_is_emptied_and_removed(tmp_path: Path) -> None:
    ledger = open_ledger(sqlite_at(tmp_path))
    posted = [request(ledger) for _ in range(5)]
    ledger.close()
    (before,) = (tmp_path / "ledger.journal").iterdir()

    larger = open_ledger(sqlite_at(tmp_path, journal_mib=2))
    async with larger.running():
        await until(lambda: larger.backlog == 0)

    whole(tmp_path, posted)
    (after,) = (tmp_path / "ledger.journal").iterdir()
    assert after != before


async def test_what_cannot_be_read_of_a_journal_is_said_counted_and_not_in_its_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = open_ledger(sqlite_at(tmp_path))
    lost, kept = (ledger.entry(a_call()) for _ in range(2))
    (path,) = (tmp_path / "ledger.journal").iterdir()
    ledger.close()
    with path.open("r+b") as file:
        file.seek(HEAD_BYTES + lost.slot * SLOT_BYTES + INTENT_AT)
        file.write(b"?")

    larger = open_ledger(sqlite_at(tmp_path, journal_mib=2))
    async with larger.running():
        await until(lambda: larger.backlog == 0)

    whole(tmp_path, [kept.request_id])
    assert larger.counts.unreadable == 1
    assert f"{path}: 1 records of requests cannot be read and are lost" in caplog.text
    assert not path.exists()


def test_room_is_what_the_configuration_says(tmp_path: Path) -> None:
    ledger = open_ledger(sqlite_at(tmp_path, journal_mib=3))
    ledger.close()
    (path,) = (tmp_path / "ledger.journal").iterdir()

    assert 3 * 2**20 <= path.stat().st_size < 3.01 * 2**20


def test_the_bill_is_the_query_that_the_readme_says(tmp_path: Path) -> None:
    database = SQLite(tmp_path / "ledger.db")
    database.prepare()
    database.commit(for_a_bill())
    database.close()

    assert [tuple(row) for row in ask(tmp_path, THE_BILL)] == BILL


async def test_old_rows_can_be_deleted_while_it_runs_and_bill_and_quotas_stay(tmp_path: Path) -> None:
    async with ledger_at(tmp_path) as ledger:
        await ledger.ingest([encode(record) for record in for_a_bill()])
        before = await ledger.used("team:red", "nano_usd", 0)
        other_program(tmp_path / "ledger.db", FORGETTING)
        left = {row["request_id"] for row in rows_at(tmp_path)}
        assert (await ledger.used("team:red", "nano_usd", 0))[0] == before[0]
        assert [tuple(row) for row in ask(tmp_path, THE_BILL)] == BILL

        other_program(tmp_path / "ledger.db", "DELETE FROM usage")
        posted = [request(ledger) for _ in range(3)]
        await until(lambda: ledger.backlog == 0)
        assert await ledger.used("team:red", "nano_usd", 0) == (before[0] + 3 * 50_000, before[1] + 3)
    assert left == {"req_1", "req_2", "req_3", "req_4"}
    assert [row["request_id"] for row in rows_at(tmp_path)] == posted


async def test_a_copy_can_be_made_while_it_runs(tmp_path: Path) -> None:
    async with ledger_at(tmp_path) as ledger:
        posted = [request(ledger)]
        await until(lambda: ledger.backlog == 0)
        (tmp_path / "copy").mkdir()
        ask(tmp_path, f"VACUUM INTO '{tmp_path}/copy/ledger.db'")

    whole(tmp_path / "copy", posted)


def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    ledger = open_ledger(sqlite_at(tmp_path))
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in tmp_path.rglob("*") if file.is_file()}
    ledger.close()

    assert set(modes.values()) == {"0o600"}
    assert {"ledger.db", "ledger.db.lock"} <= modes.keys()

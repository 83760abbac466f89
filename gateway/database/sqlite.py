"""How is SQLite used? One writer, readers beside it, and one process: a lock keeps others out."""

import fcntl
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect
from sqlalchemy.engine import URL
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from gateway.database import DatabaseUnavailable, Inserted, Kind, Metric
from gateway.database.migrations import migrate
from gateway.database.record import UsageRecord
from gateway.database.sql import Statements, translated, translating, used
from gateway.settings import SettingsError

APPLICATION_ID = 0x5355_4952
"""What the header of our files says whose they are: `SUIR`."""
MAGIC = b"SQLite format 3\0"
MOST_CHECKED_BYTES = 64 * 1024 * 1024
"""A larger file is not read through at start."""
WRITER = "PRAGMA journal_mode=WAL;PRAGMA synchronous=FULL;PRAGMA busy_timeout=5000;PRAGMA wal_autocheckpoint=1000"
AT_ONCE = 32
REST_S = 0.0001
"""
After each statement of the writer, which has no more rows than AT_ONCE. SQLite may work in the core that serves: a
whole group in one go would keep the event loop waiting for 4 ms.
"""
READER = "PRAGMA busy_timeout=2000;PRAGMA query_only=ON"


class SQLite:
    """Raises SettingsError where the file cannot be ours alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = _locked(path)
        url = URL.create("sqlite", database=str(path))
        self._writer = _engine(url, WRITER, "BEGIN IMMEDIATE", pool_size=1)
        self._readers = _engine(url, READER, "BEGIN", pool_size=2)
        event.listen(self._writer, "after_cursor_execute", _rest)
        self._statements = Statements(self._writer.dialect, AT_ONCE)
        self._opened = os.stat(path)

    def prepare(self) -> None:
        """Also refuses a file that is not ours, or damaged: it is never made anew."""
        if _is_foreign(self.path):
            raise SettingsError(
                f"{self.path} is no SQLite database: give the ledger a file of its own, in database.url"
            )
        try:
            with self._writer.begin() as connection:
                self._look(connection)
                migrate(connection, str(self.path))
                connection.exec_driver_sql(f"PRAGMA application_id={APPLICATION_ID}")
        except OperationalError as exc:  # locked, full, read-only: there is nothing wrong with what is in it
            raise SettingsError(f"the ledger in {self.path} cannot be written now: {translated(exc)}") from None
        except SQLAlchemyError as exc:
            raise SettingsError(_damaged(self.path, translated(exc))) from None

    def commit(self, records: Sequence[UsageRecord]) -> Inserted:
        if not _is_still(self.path, self._opened):  # SQLite would write to what has no name any more
            raise DatabaseUnavailable(f"{self.path} is another file than was opened, or gone: put it back, or restart")
        with translating(), self._writer.begin() as connection:
            return self._statements.commit(connection, records)

    def used(self, kind: Kind, name: str, model: str | None, metric: Metric, since_ms: int) -> tuple[int, int]:
        with translating(), self._readers.connect() as connection:
            return used(connection, kind, name, model, metric, since_ms)

    def close(self) -> None:
        self._readers.dispose()
        self._writer.dispose()
        os.close(self._lock)

    def _look(self, connection: Connection) -> None:
        application = connection.exec_driver_sql("PRAGMA application_id").scalar()
        if application != APPLICATION_ID and inspect(connection).get_table_names():
            raise SettingsError(
                f"{self.path} is the database of another program: give the ledger a file of its own, in database.url"
            )
        if self.path.stat().st_size <= MOST_CHECKED_BYTES:
            found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
            if found != "ok":
                raise SettingsError(_damaged(self.path, found))


def _locked(path: Path) -> int:
    """A descriptor that holds the lock, for as long as it is open."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # what SQLite makes, others can read
        descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise SettingsError(
            f"the ledger cannot be kept in {path}: {exc.strerror}; make its directory writable, or name another file "
            "in the configuration, under database.url: sqlite:////path/to/file"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
        os.close(descriptor)
        raise SettingsError(
            f"the ledger in {path} is in use by another gateway{f' (process {owner})' if owner else ''}: "
            "stop that one, or give this one a file of its own, in database.url (gateways that are to share a ledger "
            "need PostgreSQL)"
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def _is_still(path: Path, opened: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), opened)
    except OSError:
        return False


def _is_foreign(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) not in (b"", MAGIC)
    except FileNotFoundError:
        return False
    except OSError as exc:
        raise SettingsError(f"the ledger in {path} cannot be read: {exc.strerror}") from None


def _damaged(path: Path, why: object) -> str:
    return (
        f"the ledger in {path} cannot be used: {why}. It was left as it is: restore a copy, "
        "or move it away to begin with an empty one"
    )


def _rest(*_: object) -> None:
    time.sleep(REST_S)


def _engine(url: URL, pragmas: str, begin: str, *, pool_size: int) -> Engine:
    engine = create_engine(url, pool_size=pool_size, max_overflow=0)

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _: object) -> None:
        connection.isolation_level = None  # transactions begin as we say, not where the driver thinks
        for pragma in pragmas.split(";"):
            connection.execute(pragma)

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine

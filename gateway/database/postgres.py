"""How is PostgreSQL used? By many gateways at once, whose groups are committed one after another."""

from collections.abc import Sequence

from sqlalchemy import Connection, create_engine, func, select
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

from gateway.database import DatabaseUnavailable, Inserted, Kind, Metric
from gateway.database.migrations import migrate
from gateway.database.record import UsageRecord
from gateway.database.sql import Statements, translated, translating, used
from gateway.settings import SettingsError

WRITING, MIGRATING, COUNTING = 0x5375_6972_6F6E_0001, 0x5375_6972_6F6E_0002, 0x5375_6972_6F6E_0003
"""Names of advisory locks, which are numbers."""
OPTIONS = "-c statement_timeout=10s -c lock_timeout=8s -c idle_in_transaction_session_timeout=30s"
CONNECTION = {
    "connect_timeout": 3,
    "options": OPTIONS,
    "application_name": "suiron",
    "prepare_threshold": None,  # poolers between us and the server do not take prepared statements
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
"""A server that is gone without a word is found out; one that stands still keeps us waiting, not the requests."""


class PostgreSQL:
    """
    Raises SettingsError where there is no driver for it.

    *alone* is for a gateway that counts its limits by itself: then no second such one may use this database.
    """

    def __init__(self, url: URL, *, alone: bool = False) -> None:
        self._alone = alone
        self._claim: Connection | None = None
        self._name = f"the database {url.database} on {url.host or 'this machine'}"
        try:
            self._engine = create_engine(
                url.set(drivername="postgresql+psycopg"),
                paramstyle="format",
                pool_size=4,
                max_overflow=0,
                pool_timeout=2,
                connect_args=CONNECTION,
            )
        except ImportError:
            raise SettingsError("database.url: PostgreSQL needs a driver: pip install 'suiron[postgres]'") from None
        self._statements = Statements(self._engine.dialect)
        self._prepared = False

    def prepare(self) -> None:
        try:
            with self._engine.begin() as connection:
                _lock(connection, MIGRATING)
                connection.exec_driver_sql("SET LOCAL statement_timeout = 0")  # millions of rows take their time
                migrate(connection, self._name)
            if self._alone and self._claim is None:
                self._claim = self._claimed()
        except SQLAlchemyError as exc:
            raise DatabaseUnavailable(f"{self._name}: {translated(exc)}") from exc
        self._prepared = True

    def commit(self, records: Sequence[UsageRecord]) -> Inserted:
        try:
            return self._commit(records)
        except DatabaseUnavailable:
            self._engine.dispose()  # the server may be a standby by now, and a new connection lead to another
            raise

    def _commit(self, records: Sequence[UsageRecord]) -> Inserted:
        if not self._prepared:  # it was away when we started
            try:
                self.prepare()
            except SettingsError as exc:
                raise DatabaseUnavailable(str(exc)) from None
        with translating(), self._engine.begin() as connection:
            _lock(connection, WRITING)  # so that whoever sees a row sees all that have a lower `seq`
            return self._statements.commit(connection, records)

    def used(self, kind: Kind, name: str, model: str | None, metric: Metric, since_ms: int) -> tuple[int, int]:
        with translating(), self._engine.connect() as connection:
            return used(connection, kind, name, model, metric, since_ms)

    def close(self) -> None:
        if self._claim is not None:
            self._claim.close()
        self._engine.dispose()

    def _claimed(self) -> Connection:
        """A connection that holds our claim as long as it lives."""
        claim = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        if not claim.execute(select(func.pg_try_advisory_lock(COUNTING))).scalar_one():
            claim.close()
            raise SettingsError(
                f"{self._name} is used by another gateway, and each would count limits by itself: "
                "name a Redis for both, under store.url"
            )
        return claim


def _lock(connection: Connection, name: int) -> None:
    """Until the end of the transaction."""
    connection.execute(select(func.pg_advisory_xact_lock(name)))

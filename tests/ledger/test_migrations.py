"""Do the migrations lead from any version to the tables that the code knows?"""

from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, text

from gateway.database import migrations
from gateway.database.migrations import NEWEST, migrate
from gateway.database.sql import Statements
from gateway.database.tables import VERSION_TABLE, metadata
from tests.ledger.calls import a_record
from tests.ledger.servers import PostgresDatabase, a_postgres


def config() -> Config:
    made = Config()
    made.set_main_option("script_location", str(Path(migrations.__file__).parent))
    made.set_main_option("path_separator", "os")
    return made


VERSIONS = [script.revision for script in ScriptDirectory.from_config(config()).walk_revisions()]


KEYS = "0, 'alice', '', '', 'smart', 'up', 'completed'"
SUMS_OF = {"0001": f"{KEYS}, 1, 1, 1, 1, 1, 1, 1, 1", "0002": f"{KEYS}, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1"}
"""A row of the sums, as each version has them."""


def differences(connection: Connection) -> list[object]:
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    return list(compare_metadata(context, metadata))


def test_the_newest_is_the_one_that_the_code_knows() -> None:
    assert VERSIONS[0] == NEWEST


def made_by(version: str, connection: Connection) -> None:
    """The tables as that version left them, with something in them."""
    old = config()
    old.attributes["connection"] = connection
    command.upgrade(old, version)
    connection.execute(text(f"INSERT INTO usage_hour VALUES ({SUMS_OF[version]})"))


def brought_up_to_date(engine: Engine) -> None:
    with engine.begin() as connection:
        migrate(connection, "it")
    with engine.begin() as connection:
        assert differences(connection) == []
        assert connection.scalar(text("SELECT sum(requests) FROM usage_hour")) == 1
        Statements(engine.dialect).commit(connection, [a_record("req_new")])
        assert connection.scalar(text("SELECT sum(requests) FROM usage_hour")) == 2


@pytest.mark.parametrize("version", VERSIONS)
def test_a_file_of_any_version_gets_the_tables_of_today_and_keeps_its_rows(version: str, tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/ledger.db")
    with engine.begin() as connection:
        made_by(version, connection)
    brought_up_to_date(engine)
    engine.dispose()


@pytest.mark.slow
def test_so_does_postgresql(tmp_path: Path) -> None:
    with a_postgres() as server:
        for version in VERSIONS:
            where = PostgresDatabase(server, f"of_{version}", tmp_path).settings()
            assert where.url is not None
            assert where.password is not None
            secret = where.password.reveal()
            engine = create_engine(
                where.url.replace("postgresql://suiron@", f"postgresql+psycopg://suiron:{secret}@"), paramstyle="format"
            )
            with engine.begin() as connection:
                made_by(version, connection)
            brought_up_to_date(engine)
            engine.dispose()

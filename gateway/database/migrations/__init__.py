"""How do the tables come to be as they are? One file for each change, run at start; never changed after a release."""

import logging
from pathlib import Path

from sqlalchemy import Connection, inspect, select, table
from sqlalchemy import column as sql_column

from gateway.database.tables import VERSION_TABLE, metadata
from gateway.settings import SettingsError

NEWEST = "0002"


def migrate(connection: Connection, name: str) -> None:
    """
    Bring the tables up to date, within the transaction of *connection*; *name* is the database's, for messages.

    Raises SettingsError, having changed nothing, where a newer version was at work or the tables are somebody else's.
    """
    version = _version(connection)
    if version == NEWEST:
        return  # without Alembic, which takes a third of a second to load
    if version is None:
        taken = sorted(set(inspect(connection).get_table_names()) & set(metadata.tables))
        if taken:
            raise SettingsError(
                f"{name} has a table '{taken[0]}' that is not Suiron's: give the ledger a database of its own, "
                "in database.url"
            )
    _upgrade(connection, name, version)


def _version(connection: Connection) -> str | None:
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    return connection.scalar(select(sql_column("version_num")).select_from(table(VERSION_TABLE)))


def _upgrade(connection: Connection, name: str, version: str | None) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of its plugins
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    known = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    if version is not None and version not in known:
        raise SettingsError(
            f"{name} was last used by a newer Suiron (its tables are at {version}, this one knows {NEWEST}): "
            "install that one again, or give this one a database of its own, in database.url"
        )
    config.attributes["connection"] = connection
    command.upgrade(config, "head")

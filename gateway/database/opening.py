"""Which database does a URL mean?"""

import hashlib
from pathlib import Path

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from gateway import settings
from gateway.database import Database
from gateway.database.postgres import PostgreSQL
from gateway.database.sqlite import SQLite
from gateway.settings import SettingsError


def open_database(database: settings.Database, *, alone: bool = False) -> Database:
    """Not prepared yet; *alone* is for a gateway without a store. Raises SettingsError."""
    url = _url(database)
    if url.get_backend_name() == "postgresql":
        return PostgreSQL(url, alone=alone)
    return SQLite(_path(url))


def journal_directory(database: settings.Database) -> Path:
    """Where the journals of that database are. Raises SettingsError."""
    if database.journal is not None:
        return Path(database.journal).expanduser()
    url = _url(database)
    if url.get_backend_name() == "postgresql":
        raise SettingsError(
            "database.journal: name a directory on a local disk, for what is under way: it has to survive a crash"
        )
    return _path(url).with_suffix(".journal")


def identity(database: settings.Database) -> bytes:
    """32 bytes for the database that a URL means, whoever logs in to it."""
    url = _url(database)
    if url.get_backend_name() == "postgresql":
        name = f"postgresql {url.host or ''} {url.port or 5432} {url.database or ''}"
    else:
        name = f"sqlite {_path(url).resolve()}"
    return hashlib.sha256(name.encode()).digest()


def _url(database: settings.Database) -> URL:
    try:
        url = make_url(database.url or "")
        backend = url.get_backend_name()
    except ArgumentError:
        backend = ""
    if backend not in ("sqlite", "postgresql"):
        raise SettingsError("database.url: write sqlite:////path/to/file, or postgresql://user@host/database")
    if backend == "postgresql" and not url.database:
        raise SettingsError("database.url: the name of the database is missing: postgresql://user@host/database")
    return url if database.password is None else url.set(password=database.password.reveal())


def _path(url: URL) -> Path:
    if not url.database or url.database == ":memory:":
        raise SettingsError("database.url: name a file, with three slashes and its path: sqlite:////path/to/file")
    return Path(url.database).expanduser()

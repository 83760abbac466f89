"""What must survive everything? SQLite in this machine, or PostgreSQL for many: the only door to SQLAlchemy."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from gateway.database.record import UsageRecord

Metric = Literal["requests", "tokens", "nano_usd"]
Kind = Literal["key", "user", "team"]


class DatabaseUnavailable(Exception):
    """It cannot be reached, is locked, is full or has lost its mind; the message says which. Trying again may help."""


class Unwritable(Exception):
    """There is something among these rows that no database takes."""


class Inserted(NamedTuple):
    """The `seq` of each row by its request id, whenever it was inserted, and how many of them are new."""

    rows: dict[str, int]
    new: int


class Database(Protocol):
    """Blocking: for threads. What it does is done wholly, or not at all."""

    def prepare(self) -> None:
        """
        Bring the tables up to date.

        Raises SettingsError for a database that is not ours to touch, DatabaseUnavailable for one that is away.
        """
        ...

    def commit(self, records: Sequence[UsageRecord]) -> Inserted:
        """
        Insert what is not there yet, and add that to the hourly sums. For one thread at a time.

        What became of a request takes the place of a row that says it was abandoned. A row's `seq` grows in the order
        of commits. Raises DatabaseUnavailable or Unwritable.
        """
        ...

    def used(self, kind: Kind, name: str, model: str | None, metric: Metric, since_ms: int) -> tuple[int, int]:
        """
        The sum of *metric* since an hour began, over all models where *model* is None, and the highest `seq` in it.

        Raises DatabaseUnavailable.
        """
        ...

    def close(self) -> None: ...

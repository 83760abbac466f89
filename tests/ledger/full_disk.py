"""A process that may write no file beyond a size, for a while: `python -m tests.ledger.full_disk FOLDER`."""

import asyncio
import json
import resource
import signal
import sys
from pathlib import Path

from gateway.errors import LedgerFull
from gateway.ledger import Ledger, open_ledger
from gateway.schema.common import Usage
from tests.ledger.calls import a_call, sqlite_at
from tests.served import until


def request(ledger: Ledger) -> None:
    with ledger.entry(a_call(Usage(prompt_tokens=10, completion_tokens=5))):
        pass


def fill(ledger: Ledger) -> int:
    """How many requests there is room for."""
    for taken in range(10_000):
        try:
            request(ledger)
        except LedgerFull:
            return taken
    raise AssertionError("there is no end to it")


async def main(folder: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    ledger = open_ledger(sqlite_at(folder))
    async with ledger.running():
        request(ledger)
        await until(lambda: ledger.backlog == 0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
        taken = fill(ledger)
        await until(lambda: ledger.counts.errors > 0)
        written = ledger.counts.written
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        await until(lambda: ledger.backlog == 0)
        request(ledger)
    sys.stdout.write(json.dumps({"taken": taken, "written": written}))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))

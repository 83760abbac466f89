"""
Processes that are killed at a given line of the ledger's code, and those that find what they left.

`python -m tests.ledger.victims` takes a request as JSON on stdin, and says as JSON on stdout what it found. It imports
once, and forks a process for each of its victims, so that hundreds of points can be tried.
"""

import asyncio
import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec

import gateway.database.opening
import gateway.database.sql
from gateway import settings
from gateway.ledger import Ledger, open_ledger
from gateway.schema.common import Usage
from tests.ledger.calls import a_call
from tests.served import until

PACKAGE = str(Path(gateway.database.opening.__file__).parents[1])
WATCHED = tuple(f"{PACKAGE}/{part}" for part in ("ledger", "journal", "database"))
REQUESTS = 12
USAGE = Usage(prompt_tokens=10, completion_tokens=5)


class Executioner:
    """Kills its process at the *at*-th line that it runs of the code that is watched; 0 only counts them."""

    def __init__(self, at: int) -> None:
        self._at = at
        self._lines = count(1)
        self.seen = 0

    def begin(self) -> None:
        threading.settrace(self._call)
        sys.settrace(self._call)

    def _call(self, frame: FrameType, event: str, arg: object) -> Any:
        return self._line if frame.f_code.co_filename.startswith(WATCHED) else None

    def _line(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "line":
            self.seen = next(self._lines)
            if self.seen == self._at:
                os.kill(os.getpid(), signal.SIGKILL)
        return self._line


async def live(database: settings.Database, tell: Callable[[str], None], executioner: Executioner) -> None:
    """A gateway's day: requests that overlap, of which some are refused, cut short or long, and then the end."""
    ledger = open_ledger(database)  # a start is part of each recovery
    executioner.begin()
    async with ledger.running():
        await asyncio.gather(*(request(ledger, number, tell) for number in range(REQUESTS)))


async def request(ledger: Ledger, number: int, tell: Callable[[str], None]) -> None:
    await asyncio.sleep(0.01 * (number % 4))
    call = a_call(USAGE, dispatched=False)
    tell(f"opening req_{call.id}")
    entry = ledger.entry(call)
    if number % 5 == 3:
        entry.close(ValueError("refused"))
        tell(f"refused req_{call.id}")
        return
    call.attempts = a_call().attempts
    tell(f"dispatched req_{call.id}")
    await asyncio.sleep(0.02 * (number % 3))
    ledger.beat(lambda _: 4)
    await asyncio.sleep(0.02)
    entry.close(GeneratorExit() if number % 4 == 1 else None)
    tell(f"over req_{call.id}")


async def recover(database: settings.Database, executioner: Executioner) -> None:
    executioner.begin()
    ledger = open_ledger(database)
    async with ledger.running():
        await until(lambda: ledger.backlog == 0)


@contextmanager
def forked(work: Callable[[int], None]) -> Iterator[list[str]]:
    """The lines that *work*, in a process of its own, has written before its end."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            work(writing)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(3)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        lines = pipe.read().splitlines()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"a victim ended with {code}")
    yield lines


def run_live(database: settings.Database, at: int) -> list[str]:
    def work(writing: int) -> None:
        def tell(line: str) -> None:
            os.write(writing, f"{line}\n".encode())

        executioner = Executioner(at)
        asyncio.run(live(database, tell, executioner))
        tell(f"lines {executioner.seen}")

    with forked(work) as lines:
        return lines


def run_recovery(database: settings.Database, at: int) -> int:
    """How many lines it took; 0 if it was killed."""

    def work(writing: int) -> None:
        executioner = Executioner(at)
        asyncio.run(recover(database, executioner))
        os.write(writing, f"{executioner.seen}\n".encode())

    with forked(work) as lines:
        return int(lines[0]) if lines else 0


def main() -> None:
    """For each point: a life that ends there, perhaps a recovery that is killed as well, and one that is not."""
    asked = json.load(sys.stdin)
    database = msgspec.convert(asked["database"], settings.Database)
    chance = random.Random(asked["seed"])
    told = run_live(database, 0)
    whole = int(told[-1].split()[1])
    killed = 0
    for number in range(asked["points"]):
        at = 1 + (whole * number + chance.randrange(whole)) // asked["points"]
        lines = run_live(database, at)
        killed += not lines or not lines[-1].startswith("lines")
        told += lines
        if number % 2:
            run_recovery(database, chance.randrange(1, 600))
        run_recovery(database, 0)
    json.dump({"told": told, "lines": whole, "killed": killed}, sys.stdout)


if __name__ == "__main__":
    main()

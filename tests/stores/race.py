"""
One process of a race: as many requests as a store lets through, each put on record, some doubled, some abandoned.

Run as `python -m tests.stores.race OPTIONS`, with `Options` in JSON; `read` and the checks are for whoever started it.
"""

import asyncio
import bisect
import os
import random
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import uvloop
from msgspec import Struct

from gateway.settings import Store
from gateway.stores import Costs, Decision, Lease, Metric, Plan, Quota, Reservation, Rule, StoreUnavailable, Window
from gateway.stores.redis import RedisStore

HUGE = 10**12


class Options(Struct):
    """`hold_s` is how long a request is under way, at most. `crashes` and `doubles` are shares of the requests."""

    url: str
    log: str
    seed: int
    seconds: float
    window_ms: int
    requests: int = HUGE
    tokens: int = HUGE
    leases: int = HUGE
    lease_ms: int = 1_000
    workers: int = 16
    hold_s: float = 0.05
    crashes: float = 0.0
    doubles: float = 0.0
    timeout_s: float = 1.0


def rules(options: Options) -> tuple[Rule, ...]:
    return (
        Window("key:race", "requests", options.requests, options.window_ms),
        Window("key:race", "tokens", options.tokens, options.window_ms),
        Lease("key:race", options.leases, options.lease_ms),
        Quota("team:race", "tokens", HUGE, "month"),
    )


async def nothing_used(scope: str, metric: Metric, period_start_ms: int) -> tuple[int, int]:
    return 0, 0


def lengths(chance: random.Random) -> tuple[int, int]:
    """
    Tokens that are reserved, and used: prompts of a few hundred, answers up to a cap that the client sets or that the
    model's past suggests, most of them much shorter.
    """
    prompt = min(8_000, int(chance.lognormvariate(5.8, 1.0)) + 10)
    answer = int(chance.lognormvariate(5.3, 0.8)) + 1
    cap = chance.choice([256, 512, 512, 1_024, 1_024, 2_048])
    return prompt + cap, prompt + min(answer, cap)


class Runner:
    def __init__(self, options: Options, store: RedisStore) -> None:
        self.options = options
        self.store = store
        self.plan = Plan("race", rules(options))
        self.chance = random.Random(options.seed)
        self.log = os.open(options.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.until = time.monotonic() + options.seconds
        self.number = 0

    def write(self, *words: object) -> None:
        """One write, which a kill cannot halve."""
        os.write(self.log, (" ".join(map(str, words)) + "\n").encode())

    async def work(self) -> None:
        waiting: tuple[int, int] | None = None
        while time.monotonic() < self.until:
            reserved, used = waiting or lengths(self.chance)
            self.number += 1
            request_id = f"{self.options.seed}-{os.getpid()}-{self.number}"
            decision = await self.admit(Reservation(self.plan, request_id, Costs(reserved), b"intent"), used)
            waiting = None if decision is None or decision.denied is None else (reserved, used)
            if decision is not None and decision.denied is not None:
                await asyncio.sleep(min(decision.wait_ms or 50, 50) / 1000 * self.chance.uniform(0.5, 1))

    async def admit(self, reservation: Reservation, used: int) -> Decision | None:
        try:
            decision = await self.ask(reservation)
        except StoreUnavailable:
            self.store.settle(reservation, Costs(requests=0), exact=True)
            return None
        if decision.denied is None:
            self.write("admitted", reservation.request_id, decision.at_ms, used)
            await asyncio.sleep(self.chance.uniform(0, self.options.hold_s))
            if self.chance.random() >= self.options.crashes:
                self.write("settled", reservation.request_id, time.time_ns() // 1_000_000, used)
                self.store.settle(reservation, Costs(used), exact=True)
        return decision

    async def ask(self, reservation: Reservation) -> Decision:
        """Asked until there is an answer, and of some once more, as if it had not come."""
        for _ in range(5):
            try:
                decision = await self.store.admit(reservation)
                break
            except StoreUnavailable:
                await asyncio.sleep(self.chance.uniform(0, 0.1))
        else:
            raise StoreUnavailable
        if decision.denied is None and self.chance.random() < self.options.doubles:
            again = await self.store.admit(reservation)
            if again.at_ms == decision.at_ms:
                self.write("doubled", reservation.request_id, 0, 0)
        return decision


async def main(options: Options) -> None:
    store = RedisStore(Store(url=options.url, timeout_s=options.timeout_s), nothing_used)
    await store.start()
    runner = Runner(options, store)
    await asyncio.gather(*(runner.work() for _ in range(options.workers)))
    await store.aclose()


@dataclass
class Record:
    """What a race has put on record, by the store's clock in ms."""

    admitted: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Request id → when, tokens used in the end."""
    settled: dict[str, int] = field(default_factory=dict)
    doubled: int = 0

    def most_requests(self, window_ms: int, apart_from: Iterable[int] = ()) -> int:
        return self.most([(at, 1) for at, _ in self.admitted.values()], window_ms, apart_from)

    def most_tokens(self, window_ms: int, apart_from: Iterable[int] = ()) -> int:
        return self.most(list(self.admitted.values()), window_ms, apart_from)

    @staticmethod
    def most(events: list[tuple[int, int]], window_ms: int, apart_from: Iterable[int]) -> int:
        """The most of any window; windows that contain a moment of *apart_from* do not count."""
        events = sorted(events)
        sums = [0]
        for _, amount in events:
            sums.append(sums[-1] + amount)
        most = 0
        for index, (at, _) in enumerate(events):
            end = bisect.bisect_left(events, (at + window_ms, 0))
            if not any(at - window_ms < moment <= at + window_ms for moment in apart_from):
                most = max(most, sums[end] - sums[index])
        return most

    def most_at_once(self, lease_ms: int) -> int:
        """A request that was not settled holds its lease until that lapses."""
        changes = []
        for request_id, (at, _) in self.admitted.items():
            end = min(self.settled.get(request_id, at + lease_ms), at + lease_ms)
            changes += [(at, 1), (max(at, end), -1)]
        held = most = 0
        for _, change in sorted(changes):
            held += change
            most = max(most, held)
        return most

    def span_ms(self) -> int:
        moments = [at for at, _ in self.admitted.values()]
        return max(moments) - min(moments)


def read(log: Path) -> Record:
    record = Record()
    for line in log.read_text().splitlines():
        what, request_id, at, tokens = line.split()
        if what == "admitted":
            record.admitted[request_id] = int(at), int(tokens)
        elif what == "settled":
            record.settled[request_id] = int(at)
        else:
            record.doubled += 1
    return record


if __name__ == "__main__":
    uvloop.run(main(msgspec.json.decode(sys.argv[1], type=Options)))

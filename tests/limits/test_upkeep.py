"""What dead replicas have left behind is finished, whatever is among it."""

import asyncio
from typing import Any

import pytest

from gateway.database.record import UsageRecord, decode, encode
from gateway.errors import RateLimited
from gateway.ledger import Ledger
from gateway.limits import Limiter
from gateway.settings import Limits, Model, Settings, Target
from gateway.stores import Costs, Plan, Reservation
from gateway.stores.memory import MemoryStore
from gateway.tokens import Tokens
from gateway.upkeep import Upkeep
from tests.ledger.calls import a_call
from tests.served import until

pytestmark = pytest.mark.anyio


class Left(MemoryStore):
    """A store in which others have left *reservations*."""

    def __init__(self, ledger: Ledger, *reservations: Reservation) -> None:
        super().__init__(ledger.used)
        self.reservations = list(reservations)
        self.settled: dict[str, tuple[Costs, bool, bytes]] = {}

    async def overdue(self) -> list[Reservation]:
        return self.reservations

    def settle(self, reservation: Reservation, actual: Costs, *, exact: bool, event: bytes = b"") -> None:
        self.settled[reservation.request_id] = actual, exact, event


def intent(request_id: str) -> bytes:
    record = UsageRecord(
        request_id=request_id,
        started_ms=1,
        key="alice",
        user="",
        team="",
        endpoint="chat/completions",
        model="smart",
        stream=1,
        price_input=10**6,
        price_cached_input=10**6,
        price_output=2 * 10**6,
        prompt_tokens=10,
    )
    return encode(record)


async def swept(*reservations: Reservation) -> Left:
    """After one sweep."""
    settings, ledger = Settings(), Ledger()
    store = Left(ledger, *reservations)
    tokens = Tokens(settings)
    slept = 0

    async def sleep(_: float) -> None:
        nonlocal slept
        slept += 1
        if slept > 1:
            await asyncio.Event().wait()

    upkeep = Upkeep(Limiter(settings, store, tokens, ledger.used), store, ledger, tokens, sleep=sleep)
    sweeping: asyncio.Task[Any] = asyncio.create_task(upkeep.sweep())
    await until(lambda: slept == 2 or sweeping.done())
    sweeping.cancel()
    await asyncio.gather(sweeping, return_exceptions=True)
    return store


async def test_what_was_abandoned_is_billed_for_its_prompt_and_what_was_noted_of_its_answer() -> None:
    store = await swept(Reservation(Plan("s", ()), "req_1", Costs(500), intent("req_1"), progress=7))
    actual, exact, event = store.settled["req_1"]
    assert (actual, exact) == (Costs(tokens=17, nano_usd=24), False)
    assert (decode(event).outcome, decode(event).completion_tokens) == ("abandoned", 7)


async def test_one_that_cannot_be_read_does_not_hold_up_the_others() -> None:
    left = [Reservation(Plan("s", ()), f"req_{n}", Costs(500), intent(f"req_{n}")) for n in (1, 2)]
    left[0].intent = b"\xc1 nonsense"
    store = await swept(*left)
    assert store.settled["req_1"] == (Costs(500), False, b"")
    assert decode(store.settled["req_2"][2]).outcome == "abandoned"


ONE_AT_A_TIME = Settings(models={"smart": Model(targets=[Target(upstream="up")])}, limits=Limits(concurrent_requests=1))


class Machine:
    """A clock, and a sleep that lasts as long as it is told to."""

    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0
        self.naps: asyncio.Queue[float] = asyncio.Queue()
        self.waiting = asyncio.Event()

    async def sleep(self, _: float) -> None:
        self.waiting.set()
        self.now_s += await self.naps.get()

    async def naps_for(self, seconds: float) -> None:
        """Until what it wakes is asleep again."""
        await self.waiting.wait()
        self.waiting.clear()
        self.naps.put_nowait(seconds)
        await self.waiting.wait()


@pytest.mark.parametrize("work", ["beat", "sweep"])
async def test_a_process_that_stood_still_does_not_give_its_own_requests_up(work: str) -> None:
    machine, ledger, tokens = Machine(), Ledger(), Tokens(ONE_AT_A_TIME)
    store = MemoryStore(ledger.used, lambda: int(machine.now_s * 1000))
    limiter = Limiter(ONE_AT_A_TIME, store, tokens, ledger.used)
    upkeep = Upkeep(limiter, store, ledger, tokens, sleep=machine.sleep, clock=lambda: machine.now_s)
    first = a_call()
    await limiter.admit(first, Costs(100))

    async with asyncio.TaskGroup() as group:
        upkept = group.create_task(getattr(upkeep, work)())
        for seconds in (1, 1, 60):
            await machine.naps_for(seconds)
        upkept.cancel()

    if work == "beat":  # its lease would have ended long ago
        with pytest.raises(RateLimited):
            await limiter.admit(a_call(), Costs(100))
    assert [each.request_id for each in await store.overdue()] == ([] if work == "beat" else [f"req_{first.id}"])
    limiter.settle(first, None)
    await limiter.admit(a_call(), Costs(100))

"""Does each exchange end when its own patience does, although all share a timer?"""

import asyncio
import math

import pytest

from gateway.adapter import Vigil
from gateway.errors import UpstreamTimeout

pytestmark = pytest.mark.anyio

LONG_S = 60.0


async def waiting(vigil: Vigil, *allowed_s: float, deadline: float = math.inf) -> str:
    """What becomes of one who waits for ever, after it was allowed so many seconds, one after the other."""
    try:
        with vigil.patience(deadline) as patience:
            for seconds in allowed_s:
                patience.allow(seconds)
            await asyncio.Event().wait()
    except UpstreamTimeout:
        return "over"
    return "answered"


@pytest.mark.parametrize("allowed_s", [(0.01, LONG_S), (LONG_S, 0.01)])
async def test_the_shorter_patience_ends_first_whoever_came_first(allowed_s: tuple[float, float]) -> None:
    vigil = Vigil()
    tasks = {seconds: asyncio.create_task(waiting(vigil, seconds)) for seconds in allowed_s}
    assert await tasks[0.01] == "over"
    assert not tasks[LONG_S].done()
    assert vigil.exchanges
    tasks[LONG_S].cancel()
    await asyncio.wait([tasks[LONG_S]])
    assert tasks[LONG_S].cancelled()
    assert not vigil.exchanges
    vigil.close()


async def test_one_after_the_other_ends_on_one_timer() -> None:
    vigil = Vigil()
    assert await asyncio.gather(*(waiting(vigil, seconds / 1000) for seconds in (30, 10, 20))) == ["over"] * 3


async def test_what_was_allowed_last_counts_and_never_more_than_the_deadline() -> None:
    vigil, now = Vigil(), asyncio.get_running_loop().time()
    assert await waiting(vigil, LONG_S, 0.01) == "over"
    assert await waiting(vigil, LONG_S, deadline=now) == "over"


async def test_who_rests_is_not_interrupted_until_he_goes_on() -> None:
    vigil, went_on = Vigil(), False
    try:
        with vigil.patience(math.inf) as patience:
            patience.allow(0.01)
            patience.rest()
            assert await waiting(vigil, 0.02) == "over"
            went_on = True
            patience.go_on()
            await asyncio.Event().wait()
    except UpstreamTimeout:
        assert went_on

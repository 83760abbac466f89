"""Are connections spread over a name's addresses, whatever resolver and servers do?"""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from gateway.addresses import AVOIDED_S, FRESH_S, STALE_S, Addresses, resolve
from gateway.transport import Transport
from tests.house import Clock
from tests.rawserver import serving
from tests.test_transport import HELLO, answering, fetch

pytestmark = pytest.mark.anyio


class Names:
    """A resolver that knows what the test says, counts how often it is asked, and may hang."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)
        self.asked = 0
        self.answering = asyncio.Event()
        self.answering.set()

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked += 1
        await self.answering.wait()
        if not self.addresses:
            raise OSError("Name or service not known")
        return list(self.addresses)


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_every_time_another_address_is_first_and_none_is_left_out() -> None:
    addresses = Addresses(Names("10.0.0.1", "10.0.0.2", "10.0.0.3"))
    orders = [await addresses.of("gpu", 80) for _ in range(4)]
    assert [order[0][-1] for order in orders] == ["1", "2", "3", "1"]
    assert all(sorted(order) == ["10.0.0.1", "10.0.0.2", "10.0.0.3"] for order in orders)


async def test_the_other_family_is_for_when_the_preferred_one_fails() -> None:
    addresses = Addresses(Names("::1", "127.0.0.1"))
    assert [await addresses.of("gpu", 80) for _ in range(2)] == [["::1", "127.0.0.1"]] * 2
    addresses.failed("::1")
    assert await addresses.of("gpu", 80) == ["127.0.0.1", "::1"]


async def test_an_address_that_failed_is_tried_last_for_a_while() -> None:
    clock = Clock()
    addresses = Addresses(Names("10.0.0.1", "10.0.0.2"), clock)
    addresses.failed("10.0.0.1")
    assert [(await addresses.of("gpu", 80))[0] for _ in range(3)] == ["10.0.0.2"] * 3
    clock.now += AVOIDED_S
    assert {(await addresses.of("gpu", 80))[0] for _ in range(2)} == {"10.0.0.1", "10.0.0.2"}


async def test_a_name_is_asked_for_again_when_it_is_old_and_nobody_waits_for_that() -> None:
    clock, names = Clock(), Names("10.0.0.1")
    addresses = Addresses(names, clock)
    for _ in range(3):
        await addresses.of("gpu", 80)
    assert names.asked == 1
    clock.now += FRESH_S
    names.answering.clear()
    names.addresses = ["10.0.0.2"]
    assert await addresses.of("gpu", 80) == await addresses.of("gpu", 80) == ["10.0.0.1"]
    await turns()
    assert names.asked == 2
    names.answering.set()
    await turns()
    assert await addresses.of("gpu", 80) == ["10.0.0.2"]


async def test_a_name_that_nobody_knows_any_more_keeps_its_addresses_for_a_while() -> None:
    clock, names = Clock(), Names("10.0.0.1")
    addresses = Addresses(names, clock)
    await addresses.of("gpu", 80)
    names.addresses = []
    clock.now += FRESH_S
    assert await addresses.of("gpu", 80) == ["10.0.0.1"]
    await turns()
    assert await addresses.of("gpu", 80) == ["10.0.0.1"]
    clock.now += STALE_S
    with pytest.raises(OSError, match="Name or service not known"):
        await addresses.of("gpu", 80)
    names.addresses = ["10.0.0.3"]
    assert await addresses.of("gpu", 80) == ["10.0.0.3"]


async def test_a_resolver_that_hangs_is_asked_once_for_all_who_wait() -> None:
    names = Names("10.0.0.1")
    names.answering.clear()
    addresses = Addresses(names)
    waiting = [asyncio.ensure_future(addresses.of("gpu", 80)) for _ in range(50)]
    await turns()
    waiting[0].cancel()
    await turns()
    names.answering.set()
    assert await asyncio.gather(*waiting[1:]) == [["10.0.0.1"]] * 49
    assert names.asked == 1
    addresses.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "fe80::1%lo"])
async def test_an_address_is_its_own_and_the_resolver_is_not_asked(host: str) -> None:
    names = Names()
    assert await Addresses(names).of(host, 80) == [host]
    assert names.asked == 0


async def test_the_system_resolves_names() -> None:
    assert "127.0.0.1" in await resolve("localhost", 80)
    with pytest.raises(OSError, match=r"\w"):
        await resolve("no-such-host.invalid", 80)


async def test_connections_go_to_all_addresses_and_past_one_that_refuses() -> None:
    async with serving(answering(HELLO)) as server:
        names = Names("127.0.0.1", "127.0.0.9")  # nobody listens on the second
        async with Transport(addresses=Addresses(names), max_idle=1) as transport:
            url = f"http://gpu.test:{server.port}/"
            for _ in range(4):
                answers = await asyncio.gather(*(fetch(transport, url) for _ in range(3)))
                assert [answer.body for answer in answers] == [b"hello"] * 3


async def test_one_address_that_swallows_everything_does_not_use_up_the_time_of_all() -> None:
    async with serving(answering(HELLO)) as server:
        with hole("127.0.0.2", server.port):
            async with Transport(addresses=Addresses(Names("127.0.0.2", "127.0.0.1"))) as transport:
                answer = await fetch(transport, f"http://gpu.test:{server.port}/", connect=0.4)
                assert answer.body == b"hello"


@contextmanager
def hole(host: str, port: int) -> Iterator[None]:
    """A socket that takes no connection and refuses none."""
    with ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket())
        listener.bind((host, port))
        listener.listen(0)
        for _ in range(4):
            filler = sockets.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex((host, port))
        yield

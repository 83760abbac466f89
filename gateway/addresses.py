"""Which addresses has a host, and in which order are they tried?"""

import asyncio
import ipaddress
import socket
import time
from collections.abc import Awaitable, Callable

FRESH_S = 5.0
"""For so long an answer is used without asking again: the resolver does not tell how long it holds."""
STALE_S = 120.0
"""For so long it is used while it is asked for again, and while nobody can say anything newer."""
AVOIDED_S = 10.0
"""For so long one that could not be reached is tried last."""

Resolve = Callable[[str, int], Awaitable[list[str]]]


async def resolve(host: str, port: int) -> list[str]:
    """Asks the system, in a thread. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


class Addresses:
    """
    The addresses of hosts, each asked for at most once at a time, so that a resolver that hangs holds one thread.

    Every time, another one is first: connections are spread over all of the family that the system prefers.
    """

    def __init__(self, resolve: Resolve = resolve, clock: Callable[[], float] = time.monotonic) -> None:
        self._resolve = resolve
        self._clock = clock
        self._known: dict[str, _Known] = {}
        self._avoided: dict[str, float] = {}

    async def of(self, host: str, port: int) -> list[str]:
        """In the order to try them; *host* itself if it is one. Raises OSError if it has none."""
        known = self._known.get(host)
        if known is None:
            known = self._known[host] = _Known(is_fixed=is_address(host))
        if known.is_fixed:
            return [host]
        age_s = self._clock() - known.since
        if age_s >= FRESH_S or not known.addresses:
            if known.asking is None:
                known.asking = asyncio.ensure_future(self._ask(known, host, port))
            if age_s >= STALE_S or not known.addresses:
                await asyncio.shield(known.asking)
        if not known.addresses:
            raise OSError(f"{host} has no address: {known.fault}")
        turned = known.turned()
        return sorted(turned, key=self._is_avoided) if self._avoided else turned

    def failed(self, address: str) -> None:
        """It could not be reached."""
        self._avoided[address] = self._clock() + AVOIDED_S

    def close(self) -> None:
        for known in self._known.values():
            if known.asking is not None:
                known.asking.cancel()

    def _is_avoided(self, address: str) -> bool:
        until = self._avoided.get(address)
        if until is not None and self._clock() >= until:
            del self._avoided[address]
            return False
        return until is not None

    async def _ask(self, known: "_Known", host: str, port: int) -> None:
        try:
            known.addresses = await self._resolve(host, port)
            known.since = self._clock()
        except (OSError, UnicodeError) as exc:
            known.fault = str(exc)
            if self._clock() - known.since >= STALE_S:
                known.addresses = []
        finally:
            known.asking = None


class _Known:
    """What is known of a host; `since` is when it was asked for, `fault` what went wrong the last time."""

    def __init__(self, *, is_fixed: bool) -> None:
        self.is_fixed = is_fixed
        self.addresses: list[str] = []
        self.since = 0.0
        self.fault = ""
        self.asking: asyncio.Future[None] | None = None
        self._turn = -1

    def turned(self) -> list[str]:
        is_v6 = ":" in self.addresses[0]
        preferred = [address for address in self.addresses if (":" in address) is is_v6]
        others = [address for address in self.addresses if (":" in address) is not is_v6]
        self._turn = (self._turn + 1) % len(preferred)
        return preferred[self._turn :] + preferred[: self._turn] + others


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True

"""The scripts, and how a call of one looks on the wire."""

import hashlib
from collections.abc import Sequence
from importlib.resources import files

from gateway.stores.redis.link import packed

CLOCK = "local function clock() local t = redis.call('TIME') return t[1] * 1000 + math.floor(t[2] / 1000) end\n"
GIVEN_CLOCK = "local function clock() return tonumber(ARGV[#ARGV]) end\n"
"""For tests: the last argument is the time."""


def bulk(data: bytes) -> bytes:
    """A string of Redis's protocol."""
    return b"$%d\r\n%b\r\n" % (len(data), data)


def _text(argument: bytes | int) -> bytes:
    return argument if isinstance(argument, bytes) else b"%d" % argument


class Script:
    """A file of `lua/`, after what all of them share."""

    def __init__(self, name: str, given_clock: bool) -> None:
        folder = files("gateway.stores") / "lua"
        clock = GIVEN_CLOCK if given_clock else CLOCK
        text = clock + (folder / "common.lua").read_text("utf-8") + (folder / f"{name}.lua").read_text("utf-8")
        self._text = text.encode()
        self._given = int(given_clock)
        self._sha = hashlib.sha1(self._text, usedforsecurity=False).hexdigest().encode()

    def load(self) -> bytes:
        return packed("SCRIPT", "LOAD", self._text)

    def call(self, keys: Sequence[bytes], arguments: Sequence[bytes | int], whole: bool = False) -> bytes:
        """A call by the script's hash, or with the *whole* of it, for a server that does not know it."""
        return self.head(keys, 0, len(arguments), whole) + b"".join(map(bulk, map(_text, arguments)))

    def head(self, keys: Sequence[bytes], more_keys: int, arguments: int, whole: bool = False) -> bytes:
        """
        How a call begins, up to *keys*. *more_keys* and *arguments* are still to come, each as a `bulk`; and the time,
        where the clock is given.
        """
        how = (b"EVAL", self._text) if whole else (b"EVALSHA", self._sha)
        count = len(keys) + more_keys
        parts = [*how, b"%d" % count, *keys]
        return b"*%d\r\n" % (3 + count + arguments + self._given) + b"".join(map(bulk, parts))


class Scripts:
    """All of them. *given_clock* is for tests."""

    def __init__(self, given_clock: bool) -> None:
        self.admit = Script("admit", given_clock)
        self.settle = Script("settle", given_clock)
        self.charge = Script("charge", given_clock)
        self.heartbeat = Script("heartbeat", given_clock)
        self.seed = Script("seed", given_clock)
        self.overdue = Script("overdue", given_clock)
        self.fetch = Script("fetch", given_clock)
        self.strays = Script("strays", given_clock)
        self.members = Script("members", given_clock)

    def loads(self) -> list[bytes]:
        return [script.load() for script in vars(self).values()]

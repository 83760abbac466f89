"""Where do answers lie that may be given again? The contract, and the store of one process."""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

from msgspec import Struct

Epochs = tuple[str, ...]
"""For each scope, which age it is in: `forget` begins a new one, and no age comes back."""

ALL = "all"
"""The scope of all entries."""

OVERHEAD_BYTES = 250
"""What an entry takes beside itself: a key, a tuple, a place in a dictionary."""


class Found(Struct, frozen=True, gc=False):
    """What lies under a key, None for nothing; and the epochs of the scopes that were asked for, in their order."""

    entry: bytes | None
    epochs: Epochs


class AnswerStore(Protocol):
    """
    Entries under keys of 32 bytes. An entry is bytes: its meaning, and whether it is in the right epochs, is its
    reader's to check.

    All verbs but `forget` may be too late or fail: they raise StoreUnavailable then, within a bound, and whoever asks
    goes on without.
    """

    shared: bool
    """Whether other processes use it too."""

    async def start(self) -> None: ...

    async def read(self, key: bytes, scopes: Sequence[str]) -> Found:
        """The first scope is `ALL`."""

    async def write(self, key: bytes, entry: bytes, ttl_s: float) -> None:
        """Others may have to go for it: those that would end first."""

    async def forget(self, scope: str) -> None:
        """Begin a new epoch of *scope*. Raises StoreUnavailable."""

    async def lead(self, key: bytes, token: str, lease_s: float) -> bool:
        """Whether *token* is the one that looks for an answer to *key*; again to be so for *lease_s* from now."""

    async def follow(self, key: bytes, token: str) -> None:
        """*token* leads no longer; nothing if it does not."""

    async def is_led(self, key: bytes) -> bool: ...

    async def aclose(self) -> None: ...


class MemoryAnswers:
    """Within this process, *max_bytes* at most; the entry that was asked for last goes last."""

    shared = False

    def __init__(self, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._clock = clock
        self._entries: OrderedDict[bytes, tuple[float, bytes]] = OrderedDict()
        self._epochs: dict[str, int] = {}
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    async def start(self) -> None: ...

    async def read(self, key: bytes, scopes: Sequence[str]) -> Found:
        epochs = self._epochs
        return Found(self._entry(key), tuple([str(epochs[scope]) if scope in epochs else "" for scope in scopes]))

    def _entry(self, key: bytes) -> bytes | None:
        kept = self._entries.get(key)
        if kept is None:
            return None
        if kept[0] <= self._clock():
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return kept[1]

    async def write(self, key: bytes, entry: bytes, ttl_s: float) -> None:
        if key in self._entries:
            self._drop(key)
        size_bytes = len(entry) + OVERHEAD_BYTES
        if size_bytes > self._max_bytes:
            return
        while self.size_bytes + size_bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))
        self._entries[key] = (self._clock() + ttl_s, entry)
        self.size_bytes += size_bytes

    def _drop(self, key: bytes) -> None:
        self.size_bytes -= len(self._entries.pop(key)[1]) + OVERHEAD_BYTES

    async def forget(self, scope: str) -> None:
        self._epochs[scope] = self._epochs.get(scope, 0) + 1
        if scope == ALL:
            self._entries.clear()
            self.size_bytes = 0

    async def lead(self, key: bytes, token: str, lease_s: float) -> bool:
        return True

    async def follow(self, key: bytes, token: str) -> None: ...

    async def is_led(self, key: bytes) -> bool:
        return False

    async def aclose(self) -> None: ...

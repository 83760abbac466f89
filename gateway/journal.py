"""
What is under way, so that a crash does not forget it? A file of slots in memory that the kernel keeps for us.

A slot holds what is intended before it is begun, and then what came of it, until that is safe elsewhere. Writing to
mapped memory needs no system call, and survives the process, not the machine. A file belongs to one process, by flock;
whoever finds one without an owner adopts it.
"""

import fcntl
import mmap
import os
import secrets
import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

MAGIC = b"suiron.journal.1"
SLOT_BYTES = 2048
SLOTS_AT_ONCE = 512
HEAD_BYTES = 64
"""Of the file: magic, slots, whose database. Of a slot: state, selector, progress twice, lengths and checksums."""
INTENT_AT = HEAD_BYTES
OUTCOME_AT = 832
MAX_INTENT = OUTCOME_AT - INTENT_AT
MAX_OUTCOME = SLOT_BYTES - OUTCOME_AT

FREE, OPEN, CLOSED = 0, 1, 2
_FILE = struct.Struct("<16sI32s")
_STATE_AT, _WHICH_AT = 0, 1
_PROGRESS_AT = (8, 24)
_PROGRESS = struct.Struct("<IIQ")
_INTENT_SUM_AT, _OUTCOME_SUM_AT = 40, 48
_SUM = struct.Struct("<II")


class JournalFull(Exception):
    """Every slot is taken."""


class CannotJournal(Exception):
    """There is no place for a journal; the message says why."""


class Progress(NamedTuple):
    """What was noted last of what is under way."""

    prompt_tokens: int
    completion_tokens: int
    at_ms: int


@dataclass(frozen=True, slots=True)
class Found:
    """A slot as its process left it: what came of it, or the intent and how far it got."""

    slot: int
    wire: bytes
    progress: Progress | None
    """None where `wire` is the outcome."""


class Journal:
    """
    One file of slots, locked.

    `open`, `note` and `close` are for one thread, and never block; `free` may be called by another. Without a
    descriptor it is in memory only, and forgets.
    """

    def __init__(self, path: Path, descriptor: int, slots: int) -> None:
        self.path = path
        self.slots = slots
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, HEAD_BYTES + slots * SLOT_BYTES)
        self._unused = [slot for slot, state in enumerate(_states(descriptor, slots)) if state == FREE]  # a heap
        self._freed: deque[int] = deque()

    @property
    def room(self) -> int:
        """How many slots are free."""
        return len(self._unused) + len(self._freed)

    def open(self, intent: bytes) -> int:
        """Takes the lowest free slot, so that little of the file is ever touched. Raises JournalFull."""
        unused, freed = self._unused, self._freed
        while freed:
            heappush(unused, freed.popleft())
        if not unused:
            raise JournalFull
        slot = heappop(unused)
        at, length = self._at(slot), len(intent)
        memory = self._map
        start = at + INTENT_AT
        memory[start : start + length] = intent
        _SUM.pack_into(memory, at + _INTENT_SUM_AT, length, crc32(intent))
        _PROGRESS.pack_into(memory, at + _PROGRESS_AT[0], 0, 0, 0)
        memory[at + _WHICH_AT] = 0
        memory[at + _STATE_AT] = OPEN  # last: a process may be killed between any two of these
        return slot

    def note(self, slot: int, prompt_tokens: int, completion_tokens: int, at_ms: int) -> None:
        at = self._at(slot)
        which = 1 - self._map[at + _WHICH_AT]
        _PROGRESS.pack_into(self._map, at + _PROGRESS_AT[which], prompt_tokens, completion_tokens, at_ms)
        self._map[at + _WHICH_AT] = which

    def close(self, slot: int, outcome: bytes) -> None:
        """Beside the intent, which holds until the last byte of this is written."""
        at, length = self._at(slot), len(outcome)
        start = at + OUTCOME_AT
        self._map[start : start + length] = outcome
        _SUM.pack_into(self._map, at + _OUTCOME_SUM_AT, length, crc32(outcome))
        self._map[at + _STATE_AT] = CLOSED

    def free(self, slot: int) -> None:
        self._map[self._at(slot) + _STATE_AT] = FREE
        self._freed.append(slot)

    def found(self) -> Iterator[Found]:
        """What is in it, for whoever adopts it. Of a slot that the machine's end left unreadable, `wire` is empty."""
        for slot, state in enumerate(_states(self._descriptor, self.slots)):
            at = self._at(slot)
            if state == CLOSED and (wire := self._read(at + OUTCOME_AT, at + _OUTCOME_SUM_AT, MAX_OUTCOME)):
                yield Found(slot, wire, None)
            elif state != FREE:
                wire = self._read(at + INTENT_AT, at + _INTENT_SUM_AT, MAX_INTENT)
                progress = _PROGRESS.unpack_from(self._map, at + _PROGRESS_AT[self._map[at + _WHICH_AT] & 1])
                yield Found(slot, wire, Progress(*progress))

    def shut(self, *, remove: bool = False) -> None:
        """Gives the file up; what is in it waits for who comes next, unless it is to be removed."""
        if remove:
            self.path.unlink(missing_ok=True)
        self._map.close()
        os.close(self._descriptor)

    def _read(self, start: int, sum_at: int, limit: int) -> bytes:
        length, checksum = _SUM.unpack_from(self._map, sum_at)
        wire = self._map[start : start + min(length, limit)]
        return wire if crc32(wire) == checksum else b""

    def _at(self, slot: int) -> int:
        return HEAD_BYTES + slot * SLOT_BYTES


def _states(descriptor: int, slots: int) -> Iterator[int]:
    """Of each slot. Not by the map: all the pages that are looked at there count as this process's memory."""
    if descriptor < 0:
        yield from bytes(slots)
        return
    for first in range(0, slots, SLOTS_AT_ONCE):
        some = min(SLOTS_AT_ONCE, slots - first) * SLOT_BYTES
        yield from os.pread(descriptor, some, HEAD_BYTES + first * SLOT_BYTES + _STATE_AT)[::SLOT_BYTES]


def adopt(directory: Path, owner: bytes) -> tuple[list[Journal], dict[Path, str]]:
    """
    The journals in *directory* that nobody holds, now ours, and of each file that is left alone, why.

    *owner* are 32 bytes that name the database. Journals of living processes are left alone without a word. Raises
    CannotJournal.
    """
    ours, strange = [], {}
    for path in sorted(directory.glob("*.journal")):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:  # its owner has just finished with it
            continue
        except OSError as exc:
            raise CannotJournal(f"{path}: {exc.strerror}") from None
        if _lock(descriptor) and os.fstat(descriptor).st_nlink:
            slots, whose = _header(descriptor)
            if slots and whose == owner:
                ours.append(Journal(path, descriptor, slots))
                continue
            strange[path] = "holds records for another database" if slots else "is damaged, or no journal that we know"
        os.close(descriptor)
    return ours, strange


def create(directory: Path, owner: bytes, slots: int) -> Journal:
    """
    A new journal in *directory*, with all of its room taken from the disk at once: a full disk is found out here.

    Raises CannotJournal.
    """
    path = directory / f"{secrets.token_hex(8)}.journal"
    new = path.with_suffix(".new")  # it gets its name when it is locked, so that nobody adopts half of it
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise CannotJournal(f"{directory}: {exc.strerror}") from None
    try:
        size = HEAD_BYTES + slots * SLOT_BYTES
        _lock(descriptor)
        os.posix_fallocate(descriptor, 0, size)
        os.pwrite(descriptor, _FILE.pack(MAGIC, slots, owner), 0)
        new.rename(path)
    except OSError as exc:
        new.unlink(missing_ok=True)
        os.close(descriptor)
        raise CannotJournal(f"{directory}: no room for {size >> 20} MiB of journal: {exc.strerror}") from None
    return Journal(path, descriptor, slots)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _header(descriptor: int) -> tuple[int, bytes]:
    """How many slots, and whose; no slots and nobody's where it is no journal of this version."""
    head = os.pread(descriptor, _FILE.size, 0)
    if len(head) < _FILE.size:
        return 0, b""
    magic, slots, owner = _FILE.unpack(head)
    size = os.fstat(descriptor).st_size
    if magic != MAGIC or size != HEAD_BYTES + slots * SLOT_BYTES or not slots:
        return 0, b""
    return slots, owner

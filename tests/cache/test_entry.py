"""Is what lies in the store either the answer that was kept, or none?"""

import random
import zlib
from typing import Any

import msgspec
import pytest

from gateway.cache.entry import Entry, entry_of, pack, unpack
from gateway.cache.track import Track
from gateway.schema.endpoint import CHAT
from gateway.schema.payload import Parts
from tests.cache.conftest import delta, hello

KEY = bytes(range(32))
EPOCHS = ("a", "", "7")
SHORT = hello("Hel", "lo", " 世界")
LONG = hello(*(f"piece {number} " for number in range(300)))


def an_entry(arrivals: list[Parts], *, streamed: bool = True) -> Entry:
    track = Track(CHAT, streamed)
    for parts in arrivals:
        track.add(parts)
    return entry_of(KEY, 1_800_000_000.5, EPOCHS, track)


def wires(entry: Entry) -> list[bytes]:
    track = entry.track(CHAT)
    return [part.wire for part in track.parts(0, len(track))]


@pytest.mark.parametrize("arrivals", [SHORT, LONG])
def test_what_was_kept_comes_back(arrivals: list[Parts]) -> None:
    found = unpack(pack(an_entry(arrivals)))
    assert found is not None
    assert (found.key, found.at, found.epochs) == (KEY, 1_800_000_000.5, EPOCHS)
    assert wires(found) == [part.wire for parts in arrivals for part in parts]


@pytest.mark.parametrize("arrivals", [SHORT, LONG])
def test_no_bit_of_it_can_flip_unnoticed_and_no_byte_be_lost(arrivals: list[Parts]) -> None:
    stored = pack(an_entry(arrivals))
    chance = random.Random(1)
    for place in range(len(stored)):
        spoiled = bytearray(stored)
        spoiled[place] ^= 1 << chance.randrange(8)
        assert unpack(bytes(spoiled)) is None, place
        assert unpack(stored[:place]) is None, place
        assert unpack(stored[place + 1 :]) is None, place
    assert unpack(stored + b"\0") is None


@pytest.mark.parametrize(
    "change",
    [
        {"waits_ms": [0, 0]},
        {"tokens": [1, 2]},
        {"runs": []},
        {"runs": [[None, b"{}", [3]]]},
        {"runs": [[None, b"{}", [3, -1]]]},
        {"key": 7},
        {"streamed": None},
    ],
)
def test_what_another_writer_has_put_there_by_other_rules_is_no_answer(change: dict[str, Any]) -> None:
    members = msgspec.structs.asdict(an_entry([[delta({"content": "a"}, "stop")]])) | change
    packed = msgspec.msgpack.encode(list(members.values()))
    assert unpack(b"p" + zlib.crc32(packed).to_bytes(4, "big") + packed) is None
    for nonsense in (b"", b"p", b"{}", b"p\0\0\0\0", packed):
        assert unpack(nonsense) is None


def test_what_claims_to_be_larger_than_any_answer_is_none() -> None:
    packed = zlib.compress(bytes(40 * 1024 * 1024))
    assert unpack(b"z" + zlib.crc32(packed).to_bytes(4, "big") + packed) is None

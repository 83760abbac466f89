"""Are server-sent events read the same wherever the network cuts them?"""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import UpstreamFailed
from gateway.sse import Event, EventReader, write_events

LIMIT = 1024


def read(*blocks: bytes, limit: int = LIMIT) -> list[Event]:
    reader = EventReader(limit)
    return [event for block in blocks for event in reader.feed(block)]


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\n", [Event(b"a")]),
        (b"data:a\n\n", [Event(b"a")]),
        (b"data:  a \n\n", [Event(b" a ")]),
        (b"data: a\r\n\r\n", [Event(b"a")]),
        (b"data: a\r\r", [Event(b"a")]),
        (b"data: a\r\n\n", [Event(b"a")]),
        (b"data: a\n\ndata: b\n\n", [Event(b"a"), Event(b"b")]),
        (b"data: a\ndata: b\n\n", [Event(b"a\nb")]),
        (b"data: a\r\ndata: b\r\n\r\n", [Event(b"a\nb")]),
        (b"data: a\rdata: b\r\r", [Event(b"a\nb")]),
        (b"data: a\n\n\n\n\ndata: b\n\n", [Event(b"a"), Event(b"b")]),
        (b"\xef\xbb\xbfdata: a\n\n", [Event(b"a")]),
        (b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\n", []),
        (b": comment\n\ndata: a\n\n", [Event(b"a")]),
        (b":\ndata: a\n:\ndata: b\n\n", [Event(b"a\nb")]),
        (b"event: ping\n\ndata: a\n\n", [Event(b"a")]),
        (b"event: error\ndata: a\n\ndata: b\n\n", [Event(b"a", "error"), Event(b"b")]),
        (b"event:\ndata: a\n\n", [Event(b"a")]),
        (b"id: 7\nretry: 3\nunknown: x\n data: b\ndata: a\n\n", [Event(b"a")]),
        (b"data\n\ndata:\n\n", [Event(b""), Event(b"")]),
        (b"data: a", []),
        (b"data: a\n", []),
        (b"data: a:b: c\n\n", [Event(b"a:b: c")]),
        ("data: \u2028\u2029\x85\x0b\x0c\x1c\n\n".encode(), [Event("\u2028\u2029\x85\x0b\x0c\x1c".encode())]),
    ],
)
def test_events_are_those_of_the_standard_however_they_are_cut(stream: bytes, events: list[Event]) -> None:
    assert read(stream) == events
    assert read(*(bytes([byte]) for byte in stream)) == events
    for at in range(len(stream)):
        assert read(stream[:at], b"", stream[at:]) == events


fields = st.sampled_from([b"data: ", b"data:", b"data", b"event: ", b": ", b"id: ", b"", b"datax: "])
text = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=8).map(str.encode)
lines = st.tuples(fields, text, st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n"])).map(b"".join)


def by_the_standard(stream: bytes) -> list[Event]:
    """As the standard's text says, one line after the other."""
    events: list[Event] = []
    data: list[bytes] = []
    name = b""
    stream = stream.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    for line in stream.split(b"\n")[:-1]:
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if not line:
            events += [Event(b"\n".join(data), name.decode() or "message")] if data else []
            data, name = [], b""
        elif field == b"data":
            data.append(value)
        elif field == b"event":
            name = value
    return events


@given(st.lists(lines, max_size=12), st.booleans(), st.lists(st.integers(0, 200), max_size=6))
def test_any_stream_reads_as_the_standard_says_cut_anywhere(parts: list[bytes], bom: bool, cuts: list[int]) -> None:
    stream = b"\xef\xbb\xbf" * bom + b"".join(parts)
    borders = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    blocks = [stream[start:end] for start, end in pairwise(borders)]
    assert read(*blocks) == by_the_standard(stream)
    assert read(*(bytes([byte]) for byte in stream)) == by_the_standard(stream)


@given(st.lists(text.map(lambda value: value.replace(b"\n", b"")), max_size=6))
def test_what_is_written_is_read(documents: list[bytes]) -> None:
    assert read(write_events(documents) if documents else b"") == [Event(document) for document in documents]


@pytest.mark.parametrize("stream", [b"data: " + b"x" * LIMIT, b"data: x\n" * 1025, b"x" * 1025])
def test_an_event_that_does_not_end_is_too_large(stream: bytes) -> None:
    with pytest.raises(UpstreamFailed):
        read(*(stream[at : at + 100] for at in range(0, len(stream), 100)))


def test_many_events_may_be_larger_than_one_may() -> None:
    stream = b"data: xxxxxxxxx\n\n" * 1000
    assert len(read(*(stream[at : at + 100] for at in range(0, len(stream), 100)))) == 1000

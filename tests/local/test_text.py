"""Where text ends, however it was cut."""

from itertools import pairwise

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.text import TextCutter

LETTERS = st.text(alphabet="ab<é", max_size=12)
STOPS = st.lists(st.text(alphabet="ab<é", min_size=1, max_size=4), max_size=4)


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    at = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(at)]


@settings(deadline=None)
@given(LETTERS, STOPS, st.lists(st.integers(0, 100), max_size=12))
@example("xabcy", ["bc", "abcd"], [1, 2, 3, 4])
@example("xabcd", ["bc", "abcd"], [1, 2, 3, 4])
@example("aab", ["ab", "aab"], [1, 2])
def test_any_cutting_gives_the_text_up_to_the_stop_that_starts_first(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    starts = [at for stop in stops if (at := text.find(stop)) >= 0]
    cutter = TextCutter(stops)
    passed = ""
    for piece in pieces_of(text, cuts):
        passed += cutter.feed(piece)
        assert text.startswith(passed)
    passed += cutter.flush()
    assert passed == text[: min(starts, default=len(text))]
    assert cutter.hit == bool(starts)


@settings(deadline=None)
@given(LETTERS, STOPS)
def test_nothing_is_held_back_that_cannot_begin_a_stop(text: str, stops: list[str]) -> None:
    cutter = TextCutter(stops)
    passed = ""
    for end, char in enumerate(text, 1):
        passed += cutter.feed(char)
        held = text[len(passed) : end]
        if cutter.hit:
            break
        assert not held or any(stop.startswith(held) for stop in stops)


def test_after_the_stop_nothing_passes() -> None:
    cutter = TextCutter(["END"])
    assert [cutter.feed(piece) for piece in ("one E", "N", "D two", " three")] == ["one ", "", "", ""]
    assert cutter.flush() == ""
    assert cutter.hit


def test_what_only_looked_like_a_stop_is_let_go() -> None:
    cutter = TextCutter(["<|end|>", ""])
    assert [cutter.feed(piece) for piece in ("a <", "|en", "ough", " <|en")] == ["a ", "", "<|enough", " "]
    assert cutter.flush() == "<|en"
    assert not cutter.hit

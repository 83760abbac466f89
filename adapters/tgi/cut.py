"""Where does a choice end, in its text and in its tokens alike?"""

from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

from gateway.text import TextCutter

T = TypeVar("T")


class Cut(Generic[T]):
    """
    Text up to the first stop string, and what is said of the tokens that made it.

    TGI leaves the stop string in the text, and notices only one that ends where a token does. What is said of a token
    goes out with the first of its characters.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._cutter = TextCutter(stops)
        self._held: deque[tuple[int, int, T]] = deque()
        self._came = 0
        self._passed = 0

    @property
    def hit(self) -> bool:
        return self._cutter.hit

    def feed(self, text: str, tokens: Sequence[T] = (), *, last: bool = False) -> tuple[str, list[T]]:
        """What may go out now of *text* and of what came before it; all of it with the *last*."""
        start, self._came = self._came, self._came + len(text)
        self._held.extend((start, self._came, token) for token in tokens)
        passed = self._cutter.feed(text)
        if last:
            passed += self._cutter.flush()
        self._passed += len(passed)
        out = []
        while self._held and self._is_out(*self._held[0][:2]):
            out.append(self._held.popleft()[2])
        return passed, out

    def _is_out(self, start: int, end: int) -> bool:
        return start < self._passed or (start == end == self._passed and not self.hit)

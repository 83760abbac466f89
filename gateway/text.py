"""Where does text end? Stop strings, found in text that arrives in pieces."""

from collections.abc import Sequence


class TextCutter:
    """
    Lets text pass up to the first stop string, which is dropped with everything after it.

    "First" is the one that starts earliest, however the text is cut into pieces. Text that may turn out to be the
    beginning of a stop string is held back until that is known, and no longer.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.hit = False
        """Whether a stop string was found; no text passes any more."""

    def feed(self, text: str) -> str:
        """The text that may go out now."""
        if self.hit:
            return ""
        if not self._stops:
            return text
        self._held += text
        found, pending = self._found(), self._pending()
        if found is not None and found <= pending:
            return self._end(found)
        passed, self._held = self._held[:pending], self._held[pending:]
        return passed

    def flush(self) -> str:
        """What is still held back when the text ends; what was only the beginning of a stop string is text."""
        found = self._found()
        if found is not None:
            return self._end(found)
        passed, self._held = self._held, ""
        return passed

    def _end(self, position: int) -> str:
        passed, self._held, self.hit = self._held[:position], "", True
        return passed

    def _found(self) -> int | None:
        """Where the earliest complete stop string starts."""
        return min((at for stop in self._stops if (at := self._held.find(stop)) >= 0), default=None)

    def _pending(self) -> int:
        """Where the earliest stop string starts that the coming text may complete; the end if there is none."""
        held = self._held
        for start in range(max(0, len(held) - self._longest + 1), len(held)):
            rest = held[start:]
            if any(len(stop) > len(rest) and stop.startswith(rest) for stop in self._stops):
                return start
        return len(held)

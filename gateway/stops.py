"""How does no stop string get into an answer, whatever its engine did with it?"""

import math
from typing import Any

import msgspec

from gateway.call import Call
from gateway.schema.endpoint import CHAT
from gateway.schema.payload import Part
from gateway.text import TextCutter


class Cuts:
    """
    Where the choices of one answer end: each at its first stop string.

    Most engines cut for themselves, some leave the string in, or see it only where a token ends. `outrun` once one goes
    on behind the ends of all choices.
    """

    def __init__(self, call: Call, stops: list[str], choices: int) -> None:
        self._call = call
        self._streamed = call.streamed
        self._text = "text" if call.endpoint is not CHAT else "content"
        self._inside = None if call.endpoint is not CHAT else "delta" if call.streamed else "message"
        self._stops = stops
        self._ends: dict[int, _End] = {}
        self._choices = choices
        self.outrun = False

    def cut(self, part: Part[Any]) -> Part[Any] | None:
        """What is left of a part; None where that is nothing."""
        document = msgspec.json.decode(part.wire)
        if not document["choices"]:
            return part
        pairs = list(zip(part.value.choices, document["choices"], strict=True))
        kept = [(choice, raw) for choice, raw in pairs if self._cut_choice(choice, raw)]
        if not kept:
            return None
        part.value.choices[:] = [choice for choice, _ in kept]
        document["choices"] = [raw for _, raw in kept]
        return Part(part.value, msgspec.json.encode(document), part.usage)

    def _cut_choice(self, choice: Any, raw: dict[str, Any]) -> bool:
        """Whether anything is left of a choice, in a chunk or in a whole answer."""
        place = raw if self._inside is None else raw[self._inside]
        end = self._end(choice.index or 0)
        came, was_over = place.get(self._text) or "", end.reached
        text = end.feed(came, last=bool(choice.finish_reason) or not self._streamed)
        if end.reached and (choice.finish_reason or not was_over):
            choice.finish_reason = raw["finish_reason"] = "stop"
        if was_over and came:
            self.outrun = len(self._ends) == self._choices and all(each.reached for each in self._ends.values())
        if text == came:
            return True
        place[self._text] = text
        rest = [] if self._inside is None else [value for name, value in place.items() if name != "role"]
        return bool(text or choice.finish_reason or choice.logprobs or any(rest) or not self._streamed)

    def _end(self, index: int) -> "_End":
        if index not in self._ends:
            self._ends[index] = _End(self._stops, self._echoed(index))
        return self._ends[index]

    def _echoed(self, index: int) -> float:
        """How many characters of the text are the prompt, which may have a stop string in it."""
        asked = self._call.request.value
        if not getattr(asked, "echo", None):
            return 0
        prompt = asked.prompt
        if isinstance(prompt, list):
            prompt = prompt[min(index // (asked.n or 1), len(prompt) - 1)]
        return len(prompt) if isinstance(prompt, str) else math.inf  # nobody here can tell what token ids say


class _End:
    """Where one choice ends: behind its prompt, where that is echoed, at the first stop string."""

    def __init__(self, stops: list[str], echoed: float) -> None:
        self._cutter = TextCutter(stops)
        self._echoed = echoed

    @property
    def reached(self) -> bool:
        return self._cutter.hit

    def feed(self, text: str, *, last: bool) -> str:
        echo = text if len(text) <= self._echoed else text[: int(self._echoed)]
        self._echoed -= len(echo)
        passed = echo + self._cutter.feed(text[len(echo) :])
        return passed + self._cutter.flush() if last else passed

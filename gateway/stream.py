"""
What holds for every answer, whoever gave it?

* `id`, `created`, `object` and the public `model` are minted once and are the same on every chunk.
* `usage` is there only where the client asked for it, adds up, and then is `null` on every chunk but the last.
* No text has a stop string in it: what follows one is cut off in `stops.py`.
* Every choice begins with its role, in the order 0, 1, 2 … (the SDK's accumulator needs that), and is finished once.
* An answer with a choice missing or unfinished is an error: nobody takes a truncated answer for a whole one.

A chunk that differs from the one before in nothing but its text, as most do, is spliced: that text between the same
bytes as before. All others are taken apart. The tests hold the two ways against each other. Source of the order of
chunks and of the nulls that stay: OpenAI's OpenAPI description.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import msgspec
from msgspec import UNSET, Raw

from gateway.call import Call
from gateway.errors import UpstreamFailed
from gateway.schema.common import Usage
from gateway.schema.endpoint import CHAT, expected_choices, texts_in
from gateway.schema.mould import Mould
from gateway.schema.payload import NULL, Part, Parts, one_by_one
from gateway.sse import BETWEEN
from gateway.stops import Cuts

ENVELOPE = ("id", "object", "created", "model")
NOT_OURS = frozenset((*ENVELOPE, "obfuscation"))
DEFAULT_TIER = "default"
"""Of upstreams that know no tiers."""

_MEMBERS = msgspec.json.Decoder(dict[str, Raw])
_ITEMS = msgspec.json.Decoder(list[dict[str, Raw]])
_CALLS = msgspec.json.Decoder(list[dict[str, Any]])
_encode = msgspec.json.encode


class Finish(Protocol):
    """What becomes of the parts of one answer; raises UpstreamFailed where the answer is not whole."""

    @property
    def outrun(self) -> bool:
        """Whether nothing more of the answer can be for the client."""
        ...

    def rewrite(self, arrived: Parts) -> Parts:
        """What this client may see of the parts that came; may be empty."""
        ...

    def end(self) -> Parts:
        """What goes behind the last part; may be empty."""
        ...


def finish(call: Call) -> Finish:
    answer = Chunks(call) if call.streamed else Whole(call)
    if call.endpoint.streams and (stop := call.request.value.stop):
        stops = [stop] if isinstance(stop, str) else stop
        return CutShort(Cuts(call, stops, expected_choices(call.request.value)), answer) if any(stops) else answer
    return answer


class CutShort:
    """
    An answer that ends at stop strings, whatever its engine did with them.

    One that goes on behind them is outrun; one that stops too is heard to the end, since it then says how many tokens
    that was.
    """

    def __init__(self, cuts: Cuts, answer: Finish) -> None:
        self._cuts = cuts
        self._answer = answer
        self.end = answer.end

    @property
    def outrun(self) -> bool:
        return self._cuts.outrun

    def rewrite(self, arrived: Parts) -> Parts:
        return self._answer.rewrite([cut for part in one_by_one(arrived) if (cut := self._cuts.cut(part)) is not None])


# A whole answer.


class Whole:
    outrun = False

    def __init__(self, call: Call) -> None:
        self._call = call

    def rewrite(self, arrived: Parts) -> Parts:
        return [whole(self._call, part) for part in arrived]

    def end(self) -> Parts:
        return []


def whole(call: Call, part: Part[Any]) -> Part[Any]:
    """A completion with every member OpenAI requires and no null that its schema forbids."""
    members: dict[str, Any] = _MEMBERS.decode(part.wire)
    is_tidy = call.endpoint.streams and part.wire.count(b"null") == _required_nulls(part.value.choices)
    if not is_tidy:
        members = {name: raw for name, raw in members.items() if raw != NULL}
    usage = _tidy_usage(members.pop("usage", None), part.usage or call.usage, call.endpoint.streams, is_tidy=is_tidy)
    members["object"] = call.endpoint.object
    members["model"] = call.request.value.model
    if call.endpoint.streams:
        members["id"] = call.endpoint.id_prefix + call.id
        members["created"] = call.created
        members["choices"] = _whole_choices(call, part.value.choices, members["choices"], is_tidy)
        if _wants_tier(call):
            members.setdefault("service_tier", DEFAULT_TIER)
    else:
        members["data"] = _whole_data(call, part.value.data, members["data"])
    if usage is not None:
        members["usage"] = usage
    return Part(part.value, _encode(members), part.usage)


def _wants_tier(call: Call) -> bool:
    """Who asks for a service tier is told which one it was."""
    return call.endpoint is CHAT and call.request.value.service_tier is not None


def _whole_choices(call: Call, choices: Any, raw: Raw, is_tidy: bool) -> Any:
    expected = expected_choices(call.request.value)
    if len(choices) < expected or not all(choice.finish_reason for choice in choices):
        raise UpstreamFailed("The upstream's answer is not complete.")
    if is_tidy and len(choices) == expected:
        return raw
    completed = [_completed(members, call.endpoint is CHAT) for members in _in_order(choices, raw)[:expected]]
    return [{**members, "index": position} for position, members in enumerate(completed)]


def _whole_data(call: Call, data: Any, raw: Raw) -> Any:
    if len(data) != texts_in(call.request.value.input):
        raise UpstreamFailed("The upstream's answer is not complete.")
    if all(vector.index == position for position, vector in enumerate(data)):
        return raw
    return [{**members, "index": position} for position, members in enumerate(_in_order(data, raw))]


def _in_order(items: Any, raw: Raw) -> list[dict[str, Raw]]:
    """The members of each item, by index; items that have none stay where they are."""
    indexes = [position if item.index is UNSET else item.index for position, item in enumerate(items)]
    decoded = _ITEMS.decode(raw)
    return [decoded[position] for position in sorted(range(len(items)), key=indexes.__getitem__)]


def _required_nulls(choices: Any) -> int | None:
    """
    How many of the members that may be null are, which must stay.

    None if one is missing, or must be looked into, or the choices are not in order.
    """
    nulls = 0
    for position, choice in enumerate(choices):
        if choice.index != position or choice.logprobs is not None:
            return None
        nulls += 1
        message = getattr(choice, "message", None)
        if message is not None:
            if message.role is None or message.content is UNSET or message.refusal is UNSET:
                return None
            nulls += (message.content is None) + (message.refusal is None)
    return nulls


def _completed(choice: dict[str, Raw], chat: bool) -> dict[str, Any]:
    members = {"logprobs": NULL, **_tidy_choice(choice, chat)}
    if chat:
        message = _without_needless_nulls(choice["message"])
        members["message"] = {"role": "assistant", "content": NULL, "refusal": NULL, **message}
    return members


def _tidy_choice(choice: dict[str, Raw], chat: bool) -> dict[str, Any]:
    """The members of a choice without nulls; `logprobs` may be null, and have both their lists where they are not."""
    members: dict[str, Any] = {n: raw for n, raw in choice.items() if raw != NULL or n == "logprobs"}
    if chat and (logprobs := members.get("logprobs", NULL)) != NULL:
        members["logprobs"] = {"content": NULL, "refusal": NULL, **_MEMBERS.decode(logprobs)}
    return members


def _without_needless_nulls(message: Raw) -> dict[str, Any]:
    """The members of a message or delta; `content` and `refusal` may be null."""
    members: dict[str, Any] = {
        name: raw for name, raw in _MEMBERS.decode(message).items() if raw != NULL or name in ("content", "refusal")
    }
    if b"null" in bytes(calls := members.get("tool_calls", b"")):
        members["tool_calls"] = [_without_nulls(call) for call in _CALLS.decode(calls)]
    return members


def _tidy_usage(raw: Raw | None, usage: Usage | None, is_of_text: bool = True, *, is_tidy: bool = False) -> Any:
    """Usage that adds up and has no null in it, and of a text its completion, be it 0; None if nobody knows."""
    if usage is None or usage.prompt_tokens < 0 or usage.completion_tokens < 0:
        return None
    total = usage.prompt_tokens + usage.completion_tokens
    told = usage.completion_tokens or not is_of_text
    if raw is not None and told and usage.total_tokens == total and (is_tidy or b"null" not in bytes(raw)):
        return raw
    members = msgspec.json.decode(raw) if raw is not None else msgspec.to_builtins(usage)
    return _without_nulls({**({} if told else {"completion_tokens": 0}), **members, "total_tokens": total})


def _without_nulls(members: dict[str, Any]) -> dict[str, Any]:
    """Without nulls in *members* and in the objects right below."""
    return {
        name: {n: v for n, v in value.items() if v is not None} if isinstance(value, dict) else value
        for name, value in members.items()
        if value is not None
    }


# A stream.


class Chunks:
    """The chunks of one stream on their way to the client."""

    outrun = False

    def __init__(self, call: Call) -> None:
        minted = {
            "id": call.endpoint.id_prefix + call.id,
            "object": call.endpoint.chunk_object,
            "created": call.created,
            "model": call.request.value.model,
        }
        self._call = call
        self._chat = call.endpoint is CHAT
        self._include_usage = call.include_usage
        self._minted: dict[str, Any] = minted | ({"usage": None} if self._include_usage else {})
        if _wants_tier(call):
            self._minted["service_tier"] = DEFAULT_TIER
        self._theirs: Mould | None = None  # of the last chunk as it came, if all that fit it need is
        self._before = self._after = b""  # around their text
        self._expected = expected_choices(call.request.value)
        self._finished: dict[int, bool] = {}  # the choices that have begun, in order
        self._usage: tuple[Raw | None, Usage] | None = None

    def rewrite(self, arrived: Parts) -> Parts:
        """The chunks to send for those that came: for each none, itself, or beginnings of other choices before it."""
        rewritten: Parts = []
        for part in arrived:
            if part.texts is not None:
                rewritten += self._run(part, part.texts)
            elif (wire := self.spliced(part)) is not None:
                part.wire = wire
                rewritten.append(part)
            else:
                rewritten += self.rebuilt(part)
        return rewritten

    def _run(self, part: Part[Any], texts: list[bytes]) -> Parts:
        """Of several chunks of one mould, the first are looked at, until it is known what surrounds the others."""
        mould, sent, place = part.mould, list[Part[Any]](), 0
        assert mould is not None
        while place < len(texts) and self._theirs != mould:
            text = texts[place]
            sent += self.rewrite(
                [Part(self._call.endpoint.chunks, mould.before + text + mould.after, None, mould, text)]
            )
            place += 1
        if place < len(texts):
            between = self._after + BETWEEN + self._before
            part.wire = self._before + between.join(texts[place:]) + self._after
            sent.append(part)
        return sent

    def spliced(self, part: Part[Any]) -> bytes | None:
        """The chunk, if it differs from the last one that was rebuilt in nothing but its text; else None."""
        if self._theirs is None:
            return None
        text = part.text if part.mould is self._theirs else None
        if text is None:
            text = self._theirs.text_of(part.wire)
        return None if text is None else self._before + text + self._after

    def rebuilt(self, part: Part[Any]) -> Parts:
        members = _MEMBERS.decode(_on_one_line(part.wire))
        raw_usage, raw_choices = members.pop("usage", None), members.pop("choices")
        if part.usage is not None:
            self._usage = raw_usage, part.usage
        rest = {}
        if not members.keys() <= NOT_OURS:
            rest = {name: raw for name, raw in members.items() if name not in NOT_OURS and raw != NULL}
        if "service_tier" in self._minted and "service_tier" in rest:
            self._minted["service_tier"] = rest["service_tier"]
        self._theirs = None
        rebuilt: Parts = []
        choices, goes_on = part.value.choices, False
        if len(choices) == 1:  # it goes on where the chunk is in the middle of its only choice
            goes_on = _index(choices[0]) in self._finished and not choices[0].finish_reason
        if self._is_tidy(choices, raw_choices):
            self._finished[choices[0].index] = choices[0].finish_reason is not None
            tidy: Any = raw_choices
        else:
            tidy = []
            for choice, raw in zip(choices, _ITEMS.decode(raw_choices), strict=True):
                index = _index(choice)
                if self._finished.get(index, index >= self._expected):
                    continue  # after its end, or more than were asked for
                rebuilt += self._beginnings(index)
                tidy.append(self._choice(index, choice.finish_reason or None, raw))
        if tidy:
            sent = _encode({**self._minted, **rest, "choices": tidy})
            if goes_on and (raw_usage is None or raw_usage == NULL):
                self._remember(part, sent)
            part.wire = sent
            rebuilt.append(part)
        return rebuilt

    def _is_tidy(self, choices: Any, raw: Raw) -> bool:
        """Whether the only choice of a chunk can go out as it came."""
        if len(choices) != 1:
            return False
        choice = choices[0]
        is_first = choice.index == len(self._finished) < self._expected
        if choice.finish_reason in ("", UNSET) or choice.logprobs is not None:
            return False
        nulls = 1 + (choice.finish_reason is None)
        if self._chat:
            delta = choice.delta
            if delta.role != ("assistant" if is_first else None):
                return False
            nulls += (delta.content is None) + (delta.refusal is None)
        return (is_first or self._finished.get(choice.index) is False) and bytes(raw).count(b"null") == nulls

    def _remember(self, part: Part[Any], sent: bytes) -> None:
        theirs, ours = part.mould or Mould.of(part.wire), Mould.of(sent)
        if theirs is not None and ours is not None:
            self._theirs, self._before, self._after = theirs, ours.before, ours.after

    def end(self) -> Parts:
        """The usage chunk, where the client asked for it; raises UpstreamFailed if a choice has not ended."""
        if len(self._finished) < self._expected or not all(self._finished.values()):
            raise UpstreamFailed("The upstream ended its stream before the answer was complete.")
        usage = self._call.usage
        if not self._include_usage or usage is None:
            return []
        raw = self._usage[0] if self._usage is not None and self._usage[1] is usage else None
        return [self._part([], usage, {"usage": _tidy_usage(raw, usage)})]

    def _beginnings(self, index: int) -> Iterator[Part[Any]]:
        """What must go before the first chunk of a choice: the beginnings of those with a lower index."""
        for earlier in range(len(self._finished), index):
            self._finished[earlier] = False
            start: dict[str, Any] = {"delta": {"role": "assistant", "content": ""}} if self._chat else {"text": ""}
            yield self._part([{"index": earlier, **start, "logprobs": None, "finish_reason": None}], None, {})

    def _choice(self, index: int, finish_reason: str | None, raw: dict[str, Raw]) -> dict[str, Any]:
        members = _tidy_choice(raw, self._chat)
        if not self._chat:
            members.setdefault("logprobs", NULL)
        else:
            delta = _without_needless_nulls(raw["delta"])
            delta.pop("role", None)
            members["delta"] = delta if index in self._finished else {"role": "assistant", **delta}
        self._finished[index] = finish_reason is not None
        return {**members, "index": index, "finish_reason": finish_reason}

    def _part(self, choices: list[dict[str, Any]], usage: Usage | None, more: dict[str, Any]) -> Part[Any]:
        return Part(None, _encode({**self._minted, "choices": choices, **more}), usage)


def _index(choice: Any) -> int:
    index: int = 0 if choice.index is UNSET else choice.index
    return index


def _on_one_line(wire: bytes) -> bytes:
    """An event of several lines is one line with line feeds in it, which would end the event that goes out."""
    return msgspec.json.format(wire, indent=-1) if b"\n" in wire else wire

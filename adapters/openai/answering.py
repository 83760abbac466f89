"""What of an answer is put right, where a server answers otherwise than OpenAI?"""

from typing import Any

import msgspec
from msgspec import UNSET

from adapters.openai.options import Switches
from gateway.mending import FINISHED, mend_delta, mend_message, reason_of
from gateway.schema.chat import AnswerMessage, ChatRequest, ChunkChoice
from gateway.schema.common import Object
from gateway.schema.endpoint import CHAT, Endpoint
from gateway.schema.payload import Part, Payload


class Reader:
    """One answer on its way: as it came where it is as OpenAI's, else written anew."""

    def __init__(self, endpoint: Endpoint, request: Payload[Any], given: Switches) -> None:
        self._chat = endpoint is CHAT
        self._anew = not given.keep_extras
        self._begun: set[tuple[int, int]] = set()
        self._calling: set[int] = set()
        asked = request.value
        self._named = isinstance(asked, ChatRequest) and isinstance(asked.tool_choice, dict)

    def whole(self, answer: Any, body: bytes) -> Part[Any]:
        usage = answer.usage or None
        if not self._anew and all(self._is_well(choice) for choice in answer.choices):
            return Part(answer, body, usage)
        for choice in answer.choices:
            choice.finish_reason = reason_of(choice.finish_reason or "")
            if self._chat:
                mend_message(choice.message)
                if choice.message.tool_calls and choice.finish_reason == "stop" and not self._named:
                    choice.finish_reason = "tool_calls"
        answer.usage = UNSET
        return Part.encode(answer, usage)

    def chunk(self, chunk: Any, document: bytes) -> Part[Any]:
        usage = chunk.usage or None
        if not self._anew and all(self._goes_well(choice) for choice in chunk.choices):
            return Part(chunk, document, usage)
        for choice in chunk.choices:
            index = choice.index = choice.index or 0
            if choice.finish_reason is not None and choice.finish_reason is not UNSET:
                choice.finish_reason = reason_of(choice.finish_reason)
            if self._chat:
                mend_delta(choice.delta, index, self._begun)
                if choice.delta.tool_calls:
                    self._calling.add(index)
                if choice.finish_reason == "stop" and index in self._calling and not self._named:
                    choice.finish_reason = "tool_calls"
        chunk.usage = UNSET
        return Part(chunk, msgspec.json.encode(chunk), usage)

    def _is_well(self, choice: Any) -> bool:
        if choice.finish_reason not in FINISHED:
            return False
        if not self._chat:
            return True
        message: AnswerMessage = choice.message
        if message.reasoning and not message.reasoning_content:
            return False
        calls = message.tool_calls
        if calls is UNSET or calls is None:
            return True
        is_called = choice.finish_reason != "stop" or self._named
        return is_called and bool(calls) and all(_is_call(call) for call in calls)

    def _goes_well(self, choice: Any) -> bool:
        if choice.finish_reason and choice.finish_reason not in FINISHED:
            return False
        if not self._chat:
            return True
        chunk: ChunkChoice = choice
        delta, index = chunk.delta, chunk.index or 0
        if delta.reasoning:
            return False
        if delta.tool_calls is UNSET or delta.tool_calls is None:
            return not (chunk.finish_reason == "stop" and index in self._calling and not self._named)
        self._calling.add(index)
        return bool(delta.tool_calls) and all(self._continues(call, index) for call in delta.tool_calls)

    def _continues(self, call: Object, index: int) -> bool:
        """Whether it begins a call with all that belongs there, or goes on with one that has begun so."""
        which = (index, call.get("index", -1))
        if which in self._begun:
            return "id" not in call and "type" not in call
        if "index" not in call or not _is_call(call):
            return False
        self._begun.add(which)
        return True


def _is_call(call: Object) -> bool:
    function = call.get("function")
    is_whole = call.get("type") == "custom" or (isinstance(function, dict) and "arguments" in function)
    return bool(call.get("id")) and bool(call.get("type")) and is_whole

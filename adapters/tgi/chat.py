"""How are chat completions asked of TGI's own chat route, and what is made of its answers?"""

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from adapters.tgi.asking import MAX_TOP_TOKENS, Asked, by_index, refuse, refuse_in_both, split, stops_of
from adapters.tgi.cut import Cut
from adapters.tgi.faults import fault_in
from adapters.tgi.messages import grammar_of, tool_choice_of, tools_of, written
from adapters.tgi.options import Options
from gateway.adapter import Dispatch
from gateway.errors import UpstreamFailed
from gateway.schema.chat import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    ChunkChoice,
    Delta,
)
from gateway.schema.common import Usage
from gateway.schema.payload import Part, Parts, Payload

FINISHES = {"length": "length", "eos_token": "stop", "stop_sequence": "stop"}
INCLUDE_USAGE = {"include_usage": True}


def exchanges(request: Payload[ChatRequest], dispatch: Dispatch) -> list[Asked[ChatRequest]]:
    """
    One for each choice. Raises InvalidRequest for what cannot be honoured.

    With stop strings the answer is streamed from TGI in any case, so that it can be stopped. Calls of tools are not:
    TGI ends a stream of them without saying how.
    """
    chat = request.value
    _refuse(chat)
    streamed = bool(chat.stream) or bool(stops_of(chat) and not tools_of(chat))
    return split(request, dispatch, [{"stream": streamed}], chat.n or 1)


def _refuse(chat: ChatRequest) -> None:
    refuse_in_both(chat)
    refuse("top_logprobs", (chat.top_logprobs or 0) > MAX_TOP_TOKENS, f" It gives up to {MAX_TOP_TOKENS}.")
    refuse("functions", chat.functions and chat.function_call != "none", " Use 'tools'.")
    refuse("modalities", set(chat.modalities or ()) - {"text"})
    refuse("audio", chat.audio)
    refuse("prediction", chat.prediction)
    refuse("web_search_options", chat.web_search_options is not None)
    refuse("moderation", chat.moderation is not None)
    refuse("reasoning_effort", chat.reasoning_effort not in (None, "none"))


def encode(asked: Asked[ChatRequest], lora: str | None, options: Options, max_stops: int) -> dict[str, Any]:
    """TGI's body: built anew, since it refuses half of what SDKs send by default, and every null."""
    chat = asked.value
    body: dict[str, Any] = {"model": lora or "tgi", "messages": written(chat, options), "stream": bool(chat.stream)}
    if chat.stream:
        body["stream_options"] = INCLUDE_USAGE
    wanted: dict[str, Any] = {
        "max_tokens": chat.limit,
        "temperature": 0.0 if asked.is_greedy else chat.temperature,
        "top_p": None if asked.is_greedy or chat.top_p == 1 else chat.top_p,
        "frequency_penalty": chat.frequency_penalty,
        "seed": chat.seed,
        "stop": stops_of(chat)[:max_stops] or None,
        "logprobs": chat.logprobs or None,
        "top_logprobs": chat.top_logprobs or None,
        "response_format": grammar_of(chat),
    }
    if tools := tools_of(chat):
        wanted |= {"tools": tools, "tool_choice": tool_choice_of(chat)}
    return body | {name: value for name, value in wanted.items() if value is not None}


def limited(asked: Asked[ChatRequest], limit_tokens: int) -> Asked[ChatRequest]:
    """The same with another limit."""
    value = msgspec.structs.replace(asked.value, max_tokens=limit_tokens, max_completion_tokens=None)
    return msgspec.structs.replace(asked, value=value)


class _Function(Struct):
    name: str | None = None
    arguments: Any = None


class _ToolCall(Struct):
    function: _Function


class _Message(Struct):
    """Calls were one object, not a list, in the deltas of version 2."""

    content: str | None = None
    tool_calls: list[_ToolCall] | _ToolCall | None = None

    @property
    def calls(self) -> Sequence[_ToolCall]:
        return [self.tool_calls] if isinstance(self.tool_calls, _ToolCall) else self.tool_calls or ()


class _Likely(Struct):
    token: str
    logprob: float | None = None


class _Token(_Likely):
    """A token that was chosen; `top_logprobs` are the likeliest in its place."""

    top_logprobs: list[_Likely] | None = None


class _Logprobs(Struct):
    content: list[_Token] | None = None


class _Choice(Struct):
    message: _Message | None = None
    delta: _Message | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None

    @property
    def said(self) -> _Message:
        return self.message or self.delta or _Message()

    @property
    def tokens(self) -> list[_Token]:
        return (self.logprobs.content if self.logprobs is not None else None) or []


class _Said(Struct):
    """An answer or a chunk of one."""

    choices: list[_Choice] = []
    usage: Usage | None = None
    error: Any = None


_SAID = msgspec.json.Decoder(_Said)


class Reply:
    """One choice of TGI's, as the chunks it should have been; `over` once nothing more is wanted of TGI."""

    def __init__(self, asked: Asked[ChatRequest]) -> None:
        self.over = False
        self._asked = asked
        self._cut = Cut[_Token](stops_of(asked.value))
        self._call = _Call(asked) if tools_of(asked.value) else None
        self._tokens = 0
        self._usage: Usage | None = None
        self._finished = False
        self._opened = False

    def read(self, document: bytes) -> Parts:
        """What an event brings, or a whole answer; raises the error that it is."""
        said = _SAID.decode(document)
        if said.error is not None:
            raise fault_in(500, document)
        parts = []
        for choice in said.choices[:1]:
            parts = self._take(choice)
        if said.usage is not None:
            self._usage = said.usage
            parts.append(Part.encode(ChatChunk(choices=[]), said.usage))
        return parts

    def read_whole(self, document: bytes) -> Part[ChatChunk]:
        """What an answer that came at once brings, as one chunk."""
        parts = self.read(document)
        if not self._finished:
            raise UpstreamFailed("The upstream's answer is not complete.")
        choices = [choice for part in parts for choice in part.value.choices]
        return Part.encode(ChatChunk(choices=choices), parts[-1].usage)

    def end(self, done: bool) -> Parts:
        """
        What the end of a stream brings, with `[DONE]` or without: TGI never says how one that calls a tool ended.

        Calls that are whole are `tool_calls`, others were cut off; so was a stream that has nothing in it.
        """
        if self._finished or self._call is None:
            return []
        if self._call.begun:
            return self._end_call(cut=True) if done or self._call.is_whole else []
        return [*self._opening(), self._end("length")] if done and not self._opened else []

    def cut_short(self) -> Parts:
        """For a call of a tool that the limit cut: all that TGI says of it is an error."""
        self._tokens = self._asked.value.limit or 0
        return [*self._opening(), self._end("length")]

    def _take(self, choice: _Choice) -> Parts:
        if self._finished:
            return []
        self._tokens += 1
        if choice.said.calls and self._call is not None:
            parts = [self._chunk(delta) for call in choice.said.calls[:1] for delta in self._call.feed(call.function)]
            return [*parts, *self._end_call(choice.finish_reason == "length")] if choice.finish_reason else parts
        if choice.said.content is None and not choice.finish_reason:
            return []
        return [*self._opening(), *self._text(choice)]

    def _text(self, choice: _Choice) -> Parts:
        text, tokens = (
            _without_end_token(choice) if choice.finish_reason else (choice.said.content or "", choice.tokens)
        )
        passed, tokens = self._cut.feed(text, tokens, last=bool(choice.finish_reason))
        parts = []
        if passed or tokens:
            parts.append(self._chunk(Delta(content=passed), tokens))
        if self._cut.hit:
            self.over = not choice.finish_reason  # else its usage is still to come
            parts.append(self._end("stop"))
        elif choice.finish_reason:
            parts.append(self._end(FINISHES.get(choice.finish_reason, "stop")))
        return parts

    def _end_call(self, cut: bool) -> Parts:
        """The end of a call of a tool, which may have been *cut*, unless it is whole."""
        assert self._call is not None
        rest = [self._chunk(delta) for delta in self._call.rest()]
        return [*rest, self._end("length" if cut and not self._call.is_whole else self._call.finish)]

    def _opening(self) -> Parts:
        if self._opened:
            return []
        self._opened = True
        return [self._chunk(Delta(role="assistant", content=""))]

    def _end(self, finish: str) -> Part[ChatChunk]:
        self._finished = True
        return self._chunk(Delta(), finish=finish)

    def _chunk(self, delta: Delta, tokens: list[_Token] | None = None, finish: str | None = None) -> Part[ChatChunk]:
        logprobs = {"content": [_told(token) for token in tokens]} if tokens and self._asked.value.logprobs else None
        choice = ChunkChoice(delta=delta, index=self._asked.index, finish_reason=finish, logprobs=logprobs)
        usage = self._usage or Usage(prompt_tokens=0, completion_tokens=self._tokens)
        return Part.encode(ChatChunk(choices=[choice]), usage)


class _Call:
    """
    A call of a tool: TGI makes one at most, and repeats its head in every delta.

    Some versions send a lone brace before the arguments, which begin with another; no JSON does.
    """

    def __init__(self, asked: Asked[ChatRequest]) -> None:
        self._asked = asked
        self._brace = ""
        self._arguments = ""
        self.begun = False

    @property
    def finish(self) -> str:
        """OpenAI says "stop" where the client named the function."""
        return "stop" if isinstance(self._asked.value.tool_choice, dict) else "tool_calls"

    @property
    def is_whole(self) -> bool:
        try:
            return isinstance(msgspec.json.decode(self._arguments), dict)
        except (msgspec.DecodeError, RecursionError):
            return False

    def feed(self, function: _Function) -> list[Delta]:
        given = function.arguments
        text = given if isinstance(given, str) else "" if given is None else msgspec.json.encode(given).decode()
        if self.begun:
            if self._brace and text.strip():
                text, self._brace = text if text.lstrip().startswith("{") else self._brace + text, ""
            return self._more(text)
        self.begun = True
        if text.strip() == "{":
            text, self._brace = "", text
        return [self._head(function.name), *self._more(text)]

    def rest(self) -> list[Delta]:
        text, self._brace = self._brace, ""
        return self._more(text)

    def _head(self, name: str | None) -> Delta:
        tools = tools_of(self._asked.value)
        name = name or (tools[0]["function"]["name"] if len(tools) == 1 else None)
        if name is None:
            raise UpstreamFailed("The upstream called a tool without its name.")
        id = f"call_{hashlib.sha256(self._asked.id.encode()).hexdigest()[:24]}"
        call = {"index": 0, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}
        return Delta(role="assistant", content=None, tool_calls=[call])

    def _more(self, text: str) -> list[Delta]:
        self._arguments += text
        return [Delta(tool_calls=[{"index": 0, "function": {"arguments": text}}])] if text else []


def _without_end_token(choice: _Choice) -> tuple[str, list[_Token]]:
    """
    The text and tokens of an answer, or of its last chunk, without the token that ended it.

    Version 2.0 leaks it into the text of a stream, and calls that end `eos_token`; all leave it in the logprobs.
    """
    text, tokens = choice.said.content or "", choice.tokens
    if choice.delta is not None and choice.finish_reason == "eos_token":
        text = ""
    if tokens and choice.finish_reason != "length" and "".join(token.token for token in tokens[:-1]) == text:
        tokens = tokens[:-1]
    return text, tokens


def _told(token: _Token) -> dict[str, Any]:
    likeliest = [_with_bytes(other) for other in token.top_logprobs or ()]
    return {**_with_bytes(token), "top_logprobs": likeliest}


def _with_bytes(token: _Likely) -> dict[str, Any]:
    """A token with its bytes, which are null where it is but a piece of a character."""
    known = None if "\ufffd" in token.token else list(token.token.encode())
    return {"token": token.token, "logprob": token.logprob, "bytes": known}


def corrected(part: Part[ChatChunk], asked: Asked[ChatRequest]) -> Part[ChatChunk]:
    """
    A whole answer, now that its usage is known to be its own.

    Where no tool was called after all, TGI tells how its first attempt ended, which it threw away.
    """
    limit, made = asked.value.limit, part.usage.completion_tokens if part.usage is not None else 0
    if limit is not None and made >= limit and tools_of(asked.value):
        for choice in part.value.choices:
            if choice.finish_reason == "stop" and not choice.delta.tool_calls:
                choice.finish_reason = "length"
    return part


def whole(chunks: list[ChatChunk]) -> ChatCompletion:
    """The completion that these chunks are."""
    choices = [choice for chunk in chunks for choice in chunk.choices]
    return ChatCompletion(choices=[_whole_choice(index, reply) for index, reply in by_index(choices)])


def _whole_choice(index: int, reply: list[ChunkChoice]) -> ChatChoice:
    text = "".join(choice.delta.content or "" for choice in reply)
    calls = [call for choice in reply for call in choice.delta.tool_calls or ()]
    tokens = [token for choice in reply for token in (choice.logprobs or {}).get("content", ())]
    message = AnswerMessage(role="assistant", content=text, refusal=None)
    if calls:
        head = {name: value for name, value in calls[0].items() if name != "index"}
        arguments = "".join(call["function"]["arguments"] for call in calls)
        function = {"name": head["function"]["name"], "arguments": arguments}
        message = AnswerMessage(
            role="assistant", content=None, refusal=None, tool_calls=[{**head, "function": function}]
        )
    finish = next((choice.finish_reason for choice in reversed(reply) if choice.finish_reason), None)
    logprobs = {"content": tokens, "refusal": None} if tokens else None
    return ChatChoice(message=message, index=index, finish_reason=finish or None, logprobs=logprobs)

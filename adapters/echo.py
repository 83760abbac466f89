"""Answers with the question, word by word: an example to copy, and an upstream for load tests."""

from collections.abc import AsyncGenerator
from typing import Any

from gateway.adapter import Dispatch, ModelFacts, UpstreamFacts
from gateway.errors import InvalidRequest
from gateway.schema.chat import AnswerMessage, ChatChoice, ChatChunk, ChatCompletion, ChatRequest, ChunkChoice, Delta
from gateway.schema.common import Usage
from gateway.schema.completions import Completion, CompletionChoice, CompletionRequest
from gateway.schema.payload import Part, Parts, Payload
from gateway.settings import Upstream

UNSUPPORTED = "audio echo frequency_penalty functions logit_bias presence_penalty suffix".split()


class Adapter:
    extra_fields: frozenset[str] = frozenset()

    def __init__(self, upstream: Upstream) -> None: ...

    async def chat(self, request: Payload[ChatRequest], dispatch: Dispatch) -> AsyncGenerator[Parts]:
        asked = request.value
        _refuse(asked)
        words, reason = _answer(asked.messages[-1].text, asked)
        prompt_tokens = sum(len(_words(message.text)) for message in asked.messages)
        choices = range(asked.n or 1)
        usage = _usage(prompt_tokens, len(words) * len(choices))
        if not asked.stream:
            message = AnswerMessage(role="assistant", content="".join(words), refusal=None)
            whole = [ChatChoice(message=message, index=i, finish_reason=reason, logprobs=None) for i in choices]
            yield [Part.encode(ChatCompletion(choices=whole), usage)]
            return
        for index in choices:
            deltas = [Delta(role="assistant", content=""), *(Delta(content=word) for word in words)]
            for count, delta in enumerate(deltas):
                sent = _usage(prompt_tokens, index * len(words) + count)
                yield [_chunk(ChunkChoice(delta=delta, index=index, finish_reason=None), sent)]
            yield [_chunk(ChunkChoice(delta=Delta(), index=index, finish_reason=reason), usage)]

    async def complete(self, request: Payload[CompletionRequest], dispatch: Dispatch) -> AsyncGenerator[Parts]:
        asked = request.value
        _refuse(asked)
        prompts = asked.prompt if isinstance(asked.prompt, list) else [asked.prompt or ""]
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise InvalidRequest("Token ids mean nothing to an echo.", param="prompt", code="unsupported_value")
        texts = [prompt for prompt in prompts for _ in range(asked.n or 1)]
        answers = [_answer(text, asked) for text in texts]
        prompt_tokens = sum(len(_words(prompt)) for prompt in prompts)
        usage = _usage(prompt_tokens, sum(len(words) for words, _ in answers))
        if not asked.stream:
            whole = [_choice("".join(words), index, reason) for index, (words, reason) in enumerate(answers)]
            yield [Part.encode(Completion(choices=whole), usage)]
            return
        said = 0
        for index, (words, reason) in enumerate(answers):
            for word in words:
                said += 1
                chunk = Completion(choices=[_choice(word, index, None)])
                yield [Part.encode(chunk, _usage(prompt_tokens, said))]
            yield [Part.encode(Completion(choices=[_choice("", index, reason)]), _usage(prompt_tokens, said))]

    async def probe(self) -> UpstreamFacts:
        return UpstreamFacts(kind="echo", models=[ModelFacts(id="echo")])

    async def aclose(self) -> None: ...


def _refuse(asked: Any) -> None:
    """What would change the answer, and is not done here, is not passed over in silence."""
    wanted = {name: bool(getattr(asked, name, None)) for name in UNSUPPORTED}
    wanted["modalities"] = bool(set(getattr(asked, "modalities", None) or ()) - {"text"})
    wanted["reasoning_effort"] = getattr(asked, "reasoning_effort", None) not in (None, "none")
    for name in ("moderation", "web_search_options"):
        wanted[name] = getattr(asked, name, None) is not None
    wanted["best_of"] = (getattr(asked, "best_of", None) or 1) > 1
    wanted["logprobs"] = asked.logprobs is not None and asked.logprobs is not False
    wanted["response_format"] = getattr(getattr(asked, "response_format", None), "type", "text") != "text"
    wanted["tool_choice"] = getattr(asked, "tool_choice", None) not in (None, "none", "auto")
    for position, message in enumerate(getattr(asked, "messages", ())):
        for place, part in enumerate(message.content if isinstance(message.content, list) else ()):
            wanted[f"messages[{position}].content[{place}].{part.type}"] = part.type not in ("text", "refusal")
    if refused := [name for name, is_wanted in wanted.items() if is_wanted]:
        name = refused[0].rpartition(".")[2]
        raise InvalidRequest(f"An echo cannot honour '{name}'.", param=refused[0], code="unsupported_parameter")


def _answer(text: str, asked: Any) -> tuple[list[str], str]:
    """The words to say, and the finish reason."""
    stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    ends = [end for stop in stops if stop and (end := text.find(stop)) >= 0]
    words = _words(text[: min(ends)] if ends else text)
    limit = asked.limit
    return (words[:limit], "length") if limit is not None and len(words) > limit else (words, "stop")


def _words(text: str) -> list[str]:
    """Split before each space, so that the words joined are the text."""
    first, *rest = text.split(" ")
    return [word for word in (first, *(f" {word}" for word in rest)) if word]


def _usage(prompt_tokens: int, completion_tokens: int) -> Usage:
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )


def _chunk(choice: ChunkChoice, usage: Usage) -> Part[ChatChunk]:
    return Part.encode(ChatChunk(choices=[choice]), usage)


def _choice(text: str, index: int, reason: str | None) -> CompletionChoice:
    return CompletionChoice(text=text, index=index, finish_reason=reason, logprobs=None)

"""OpenAI's own dialect, to the letter."""

from typing import Any

from tests.replay.speech import (
    CONTEXT_TOKENS,
    CREATED,
    Dialect,
    Document,
    Reply,
    Said,
    Token,
    arguments,
    by_turns,
    called,
    prompt_tokens,
    say,
    schema_of,
    usage,
    varied,
    words,
)
from tests.replay.speech import count as count_tokens

FINISHES = {"stop_sequence": "stop"}


class OpenAI(Dialect):
    adapter = "openai"

    def answer(self, path: str, asked: Document) -> Reply:
        if path == "/v1/models":
            model = {"id": "model-1", "object": "model", "created": CREATED, "owned_by": "openai"}
            return Reply([{"object": "list", "data": [model]}])
        if path == "/v1/chat/completions":
            return self._chat(asked)
        if path == "/v1/completions":
            return self._completion(asked)
        return Reply([{"error": fault("Not found", code=None)}], 404)

    def busy(self, path: str, streamed: bool) -> Reply:
        error = fault("Rate limit reached.", type="requests", code="rate_limit_exceeded")
        return Reply([{"error": error}], 429, headers={"retry-after": "2"})

    def failure(self, path: str) -> list[Any]:
        return [{"error": fault("The server had an error.", type="server_error", code=None)}]

    def _chat(self, asked: Document) -> Reply:
        prompt = prompt_tokens(asked["messages"])
        limit = asked.get("max_completion_tokens") or asked.get("max_tokens")
        if prompt + (limit or 0) > CONTEXT_TOKENS:
            return overflow("messages", prompt)
        function, schema = called(asked), schema_of(asked)
        choices = [self._say(asked, copy, limit, function, schema) for copy in range(asked.get("n") or 1)]
        made = sum(len(said.tokens) for said in choices)
        if asked.get("stream"):
            return self._chat_stream(asked, choices, function, usage(prompt, made))
        written = []
        for index, said in enumerate(choices):
            message: Document = {"role": "assistant", "content": said.text, "refusal": None, "annotations": []}
            if function is not None:
                message |= {"content": None, "tool_calls": [call(index, function["name"], said.text)]}
            logprobs = {"content": [told(token, asked) for token in said.tokens], "refusal": None}
            written.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": logprobs if asked.get("logprobs") else None,
                    "finish_reason": finish(said, asked, function),
                }
            )
        head = envelope("chat.completion", "chatcmpl-8Xy")
        return Reply([{**head, "choices": written, "usage": usage(prompt, made), "service_tier": "default"}])

    def _say(
        self, asked: Document, copy: int, limit: int | None, function: Document | None, schema: Document | None
    ) -> Said:
        if function is not None:
            return say(arguments(function), limit, [])
        text = varied(words(asked["messages"][-1]), asked, copy)
        if schema is not None:
            text = arguments({"parameters": schema})
        return say(text, limit, stops(asked))

    def _chat_stream(self, asked: Document, choices: list[Said], function: Document | None, used: Document) -> Reply:
        streams = []
        for index, said in enumerate(choices):
            first: Document = {"role": "assistant", "content": "", "refusal": None}
            if function is not None:
                begun = {**call(index, function["name"], ""), "index": 0}
                first = {"role": "assistant", "content": None, "tool_calls": [begun], "refusal": None}
            chunks = [chunk(index, first)]
            for token in said.tokens:
                if function is not None:
                    part: Document = {"tool_calls": [{"index": 0, "function": {"arguments": token.text}}]}
                elif token.text or asked.get("logprobs"):
                    part = {"content": token.text}
                else:
                    continue
                logprobs = {"content": [told(token, asked)], "refusal": None} if asked.get("logprobs") else None
                chunks.append(chunk(index, part, logprobs=logprobs))
            streams.append([*chunks, chunk(index, {}, finish(said, asked, function))])
        documents = list(by_turns(streams))
        if (asked.get("stream_options") or {}).get("include_usage"):
            documents = [{**each, "usage": None} for each in documents]
            documents.append({**envelope("chat.completion.chunk", "chatcmpl-8Xy"), "choices": [], "usage": used})
        return Reply(documents, streamed=True, opening=len(choices), done=True)

    def _completion(self, asked: Document) -> Reply:
        given = asked["prompt"]
        prompts = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
        limit = asked.get("max_tokens", 16)
        prompt = sum(count_tokens(each) if isinstance(each, str) else len(each) for each in prompts)
        if prompt + limit > CONTEXT_TOKENS:
            return overflow("prompt", prompt)
        texts = [each if isinstance(each, str) else "ids" for each in prompts]
        copies = asked.get("n") or 1
        said = [say(varied(text, asked, copy), limit, stops(asked)) for text in texts for copy in range(copies)]
        echoes = [text if asked.get("echo") else "" for text in texts for _ in range(copies)]
        used = usage(prompt, sum(len(each.tokens) for each in said) * (asked.get("best_of") or 1))
        head = envelope("text_completion", "cmpl-8Xy")
        if not asked.get("stream"):
            written = []
            for index, (echo, each) in enumerate(zip(echoes, said, strict=True)):
                choice = text_choice(index, echo + each.text, FINISHES.get(each.finish, each.finish))
                logprobs = listed(each) if asked.get("logprobs") is not None else None
                written.append({**choice, "logprobs": logprobs})
            return Reply([{**head, "choices": written, "usage": used}])
        streams = []
        for index, (echo, each) in enumerate(zip(echoes, said, strict=True)):
            texts = [echo, *(token.text for token in each.tokens)]
            chunks = [{**head, "choices": [text_choice(index, text, None)]} for text in texts if text]
            end = text_choice(index, "", FINISHES.get(each.finish, each.finish))
            streams.append([*chunks, {**head, "choices": [end]}])
        documents = list(by_turns(streams))
        if (asked.get("stream_options") or {}).get("include_usage"):
            documents = [{**each, "usage": None} for each in documents] + [{**head, "choices": [], "usage": used}]
        return Reply(documents, streamed=True, done=True)


def stops(asked: Document) -> list[str]:
    stop = asked.get("stop") or []
    return [stop] if isinstance(stop, str) else stop


def envelope(kind: str, id: str) -> Document:
    return {"id": id, "object": kind, "created": CREATED, "model": "model-1-2026", "system_fingerprint": "fp_1"}


def chunk(index: int, delta: Document, reason: str | None = None, logprobs: Any = None) -> Document:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
    return {**envelope("chat.completion.chunk", "chatcmpl-8Xy"), "choices": [choice]}


def text_choice(index: int, text: str, reason: str | None) -> Document:
    return {"text": text, "index": index, "logprobs": None, "finish_reason": reason}


def call(index: int, name: str, arguments: str) -> Document:
    return {"id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": arguments}}


def finish(said: Said, asked: Document, function: Document | None) -> str:
    if function is not None and said.finish != "length":
        return "stop" if isinstance(asked["tool_choice"], dict) else "tool_calls"
    return FINISHES.get(said.finish, said.finish)


def told(token: Token, asked: Document) -> Document:
    """What is said of a token: its bytes are its own, also where they are but a part of a character."""
    alone = {"token": token.text, "logprob": token.logprob, "bytes": list(token.data)}
    return {**alone, "top_logprobs": [alone] if asked.get("top_logprobs") else []}


def listed(said: Said) -> Document:
    """The logprobs of a completion, in its four lists."""
    tokens = [token.text for token in said.tokens]
    return {
        "tokens": tokens,
        "token_logprobs": [token.logprob for token in said.tokens],
        "top_logprobs": [{token.text: token.logprob} for token in said.tokens],
        "text_offset": [sum(map(len, tokens[:place])) for place in range(len(tokens))],
    }


def fault(message: str, *, type: str = "invalid_request_error", param: str | None = None, code: Any) -> Document:
    return {"message": message, "type": type, "param": param, "code": code}


def overflow(param: str, given: int) -> Reply:
    message = (
        f"This model's maximum context length is {CONTEXT_TOKENS} tokens. However, your {param} resulted in {given} "
        f"tokens. Please reduce the length of the {param}."
    )
    return Reply([{"error": fault(message, param=param, code="context_length_exceeded")}], 400)

"""vLLM 0.32's dialect: OpenAI's with additions, refusals of its own, and usage on every chunk where that is asked."""

from typing import Any

from tests.replay.openai import FINISHES, listed, stops
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

FINGERPRINT = "vllm-0.32.0-00000000"
REST: Document = {"prompt_logprobs": None, "prompt_token_ids": None, "kv_transfer_params": None, "metrics": None}
CHOICE_REST: Document = {"stop_reason": None, "token_ids": None, "routed_experts": None}
BUSY = "The engine is currently busy and cannot accept new requests. Please try again later or on a different instance."


class VLLM(Dialect):
    adapter = "vllm"

    def answer(self, path: str, asked: Document) -> Reply:
        if path == "/v1/models":
            model = {"id": "model-1", "object": "model", "created": CREATED, "owned_by": "vllm", "root": "/models/m"}
            return Reply([{"object": "list", "data": [{**model, "max_model_len": CONTEXT_TOKENS, "permission": []}]}])
        if path == "/version":
            return Reply([{"version": "0.32.0"}])
        if path not in ("/v1/chat/completions", "/v1/completions"):
            return Reply([{"detail": "Not Found"}], 404)
        if refusal := refusals(asked):
            return complaint(*refusal)
        return self._chat(asked) if path == "/v1/chat/completions" else self._completion(asked)

    def busy(self, path: str, streamed: bool) -> Reply:
        """In a burst, a stream is turned away in its first event."""
        error = {"error": {"message": BUSY, "type": "Service Unavailable", "param": None, "code": 503}}
        return Reply([error], streamed=True, done=True) if streamed else Reply([error], 503)

    def failure(self, path: str) -> list[Any]:
        says = "EngineCore encountered an issue. See stack trace (above) for the root cause."
        return [{"error": {"message": says, "type": "InternalServerError", "param": None, "code": 500}}, "[DONE]"]

    def _chat(self, asked: Document) -> Reply:
        prompt = prompt_tokens(asked["messages"])
        if prompt >= CONTEXT_TOKENS:
            return overflow(prompt)
        limit = min(asked.get("max_completion_tokens") or CONTEXT_TOKENS, CONTEXT_TOKENS - prompt)
        function, schema = called(asked), schema_of(asked)
        choices = []
        for copy in range(asked.get("n") or 1):
            text = varied(words(asked["messages"][-1]), asked, copy)
            if constraint := function or (schema and {"parameters": schema}):
                text = arguments(constraint)
            choices.append(say(text, limit, [] if function else stops(asked)))
        if asked.get("stream"):
            return self._chat_stream(asked, choices, function, prompt)
        written = [whole_choice(index, said, asked, function) for index, said in enumerate(choices)]
        used = {**usage(prompt, made(choices)), "prompt_tokens_details": None, "completion_tokens_details": None}
        head = envelope("chat.completion", "chatcmpl-95bd")
        rest = {"service_tier": None, "system_fingerprint": FINGERPRINT, **REST, "prompt_text": None}
        return Reply([{**head, "choices": written, "usage": used, **rest}])

    def _chat_stream(self, asked: Document, choices: list[Said], function: Document | None, prompt: int) -> Reply:
        streams = []
        for index, said in enumerate(choices):
            head = {**chunk(index, {"role": "assistant", "content": ""}), "prompt_token_ids": None, "prompt_text": None}
            chunks = [counted(head, asked, prompt, 0)]
            for place, token in enumerate(said.tokens, 1):
                last = place == len(said.tokens)
                for delta in deltas(token, index, function, place):
                    more: Document = {"token_ids": None}
                    if asked.get("logprobs"):
                        more["logprobs"] = {"content": [told(token, asked)]}
                    if last:
                        more |= {"finish_reason": finish(said, asked, function), "stop_reason": None}
                    chunks.append(counted(chunk(index, delta, **more), asked, prompt, place))
            if not said.tokens:
                end = chunk(index, {"content": ""}, finish_reason=finish(said, asked, function), stop_reason=None)
                chunks.append(counted(end, asked, prompt, 0))
            streams.append(chunks)
        documents = list(by_turns(streams))
        documents += last_usage(asked, "chat.completion.chunk", "chatcmpl-95bd", prompt, made(choices))
        return Reply(documents, streamed=True, opening=len(choices), done=True)

    def _completion(self, asked: Document) -> Reply:
        given = asked["prompt"]
        prompts = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
        prompt = sum(count_tokens(each) if isinstance(each, str) else len(each) for each in prompts)
        if prompt >= CONTEXT_TOKENS:
            return overflow(prompt)
        texts = [each if isinstance(each, str) else "ids" for each in prompts]
        copies, limit = asked.get("n") or 1, asked.get("max_tokens", 16)
        said = [say(varied(text, asked, copy), limit, stops(asked)) for text in texts for copy in range(copies)]
        echoes = [text if asked.get("echo") else "" for text in texts for _ in range(copies)]
        head = envelope("text_completion", "cmpl-947e")
        if not asked.get("stream"):
            written = []
            for index, (echo, each) in enumerate(zip(echoes, said, strict=True)):
                logprobs = listed(each) if asked.get("logprobs") is not None else None
                reason = FINISHES.get(each.finish, each.finish)
                choice = {"index": index, "text": echo + each.text, "logprobs": logprobs, "finish_reason": reason}
                written.append({**choice, **CHOICE_REST, "prompt_logprobs": None, "prompt_token_ids": None})
            used = {**usage(prompt, made(said)), "prompt_tokens_details": None, "completion_tokens_details": None}
            return Reply([{**head, "choices": written, "usage": used, **REST}])
        streams = []
        for index, (echo, each) in enumerate(zip(echoes, said, strict=True)):
            chunks = []
            for place, token in enumerate(each.tokens, 1):
                end = FINISHES.get(each.finish, each.finish) if place == len(each.tokens) else None
                text = echo + token.text if place == 1 else token.text
                choice = {"index": index, "text": text, "logprobs": None, "finish_reason": end, **CHOICE_REST}
                own = count_tokens(texts[index // copies])
                chunks.append(counted({**head, "choices": [choice]}, asked, own, place))
            streams.append(chunks)
        documents = list(by_turns(streams))
        documents += last_usage(asked, "text_completion", "cmpl-947e", prompt, made(said))
        return Reply(documents, streamed=True, done=True)


def refusals(asked: Document) -> tuple[str, str | None] | None:
    """What vLLM 0.32 does not take: the message, and the parameter it names."""
    if asked.get("top_p") == 0:
        return "top_p must be in (0, 1], got 0.0. (parameter=top_p, value=0.0)", "top_p"
    if (asked.get("n") or 1) > 1 and asked.get("temperature") == 0:
        return f"n must be 1 when using greedy sampling, got {asked['n']}.", None
    if asked.get("tools") == []:
        return "`tools` must not be an empty array. (parameter=tools)", "tools"
    if len(stops(asked)) > 4 or "" in stops(asked):
        return "stop is not valid. (parameter=stop)", "stop"
    if asked.get("stream_options") and not asked.get("stream"):
        return "Stream options can only be defined when `stream=True`.", "stream_options"
    return None


def complaint(message: str, param: str | None) -> Reply:
    return Reply([{"error": {"message": message, "type": "BadRequestError", "param": param, "code": 400}}], 400)


def overflow(given: int) -> Reply:
    return complaint(
        f"This model's maximum context length is {CONTEXT_TOKENS} tokens. However, your prompt contains at least "
        f"{given} input tokens, which exceeds this limit even without any output tokens. Please reduce the length of "
        f"the input prompt. (parameter=input_tokens, value={given})",
        "input_tokens",
    )


def made(choices: list[Said]) -> int:
    return sum(len(said.tokens) for said in choices)


def envelope(kind: str, id: str) -> Document:
    return {"id": id, "object": kind, "created": CREATED, "model": "model-1"}


def chunk(index: int, delta: Document, **more: Any) -> Document:
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
    return {**envelope("chat.completion.chunk", "chatcmpl-95bd"), "choices": [choice]}


def counted(document: Document, asked: Document, prompt: int, so_far: int) -> Document:
    """With the usage of its choice so far, where `continuous_usage_stats` is asked for."""
    if not (asked.get("stream_options") or {}).get("continuous_usage_stats"):
        return document
    return {**document, "usage": {**usage(prompt, so_far), "completion_tokens_details": None}}


def last_usage(asked: Document, kind: str, id: str, prompt: int, so_far: int) -> list[Document]:
    if not (asked.get("stream_options") or {}).get("include_usage"):
        return []
    used = {**usage(prompt, so_far), "prompt_tokens_details": {"cached_tokens": 0, "created_cache_tokens": 0}}
    return [{**envelope(kind, id), "choices": [], "usage": used, "system_fingerprint": FINGERPRINT}]


def deltas(token: Token, index: int, function: Document | None, place: int) -> list[Document]:
    if function is None:
        return [{"content": token.text}]
    more = {"content": None, "tool_calls": [{"index": 0, "function": {"arguments": token.text}}]}
    if place > 1:
        return [more]
    head = {"id": f"chatcmpl-tool-{index}", "type": "function", "index": 0, "function": {"name": function["name"]}}
    return [{"content": None, "tool_calls": [head]}, more]


def whole_choice(index: int, said: Said, asked: Document, function: Document | None) -> Document:
    message: Document = {"role": "assistant", "content": said.text, "refusal": None}
    message |= {"annotations": None, "audio": None, "function_call": None, "reasoning": None}
    if function is not None:
        told_of = {"name": function["name"], "arguments": said.text}
        calls = [{"id": f"chatcmpl-tool-{index}", "type": "function", "function": told_of}]
        message |= {"content": "", "tool_calls": calls}
    logprobs = {"content": [told(token, asked) for token in said.tokens]} if asked.get("logprobs") else None
    reason = finish(said, asked, function)
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason, **CHOICE_REST}


def finish(said: Said, asked: Document, function: Document | None) -> str:
    if function is not None and said.finish != "length":
        return "stop" if isinstance(asked["tool_choice"], dict) else "tool_calls"
    return FINISHES.get(said.finish, said.finish)


def told(token: Token, asked: Document) -> Document:
    alone = {"token": token.text, "logprob": token.logprob, "bytes": list(token.text.encode())}
    return {**alone, "top_logprobs": [alone] * (asked.get("top_logprobs") or 0)}

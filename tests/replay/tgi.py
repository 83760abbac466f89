"""TGI 3's dialect, as far as its source and recordings tell: none was run."""

from typing import Any

from tests.replay.openai import stops
from tests.replay.speech import (
    CONTEXT_TOKENS,
    CREATED,
    Dialect,
    Document,
    Reply,
    Said,
    Token,
    arguments,
    called,
    prompt_tokens,
    say,
    usage,
    varied,
    words,
)
from tests.replay.speech import count as count_tokens

FINISHES = {"stop": "eos_token"}
CHAT_FINISHES = {"eos_token": "stop"}
REFUSED = "Failed to deserialize the JSON body into the target type: "


class TGI(Dialect):
    adapter = "tgi"

    def answer(self, path: str, asked: Document) -> Reply:
        if path == "/info":
            limits = {"max_total_tokens": CONTEXT_TOKENS, "max_input_tokens": CONTEXT_TOKENS - 1}
            return Reply([{"model_id": "org/small", "version": "3.3.6", "max_stop_sequences": 4, **limits}])
        if path == "/v1/models":
            return Reply([{"object": "list", "data": [{"id": "org/small", "owned_by": "org/small", "created": 0}]}])
        if path == "/chat_tokenize":
            made = [{"id": place} for place in range(prompt_tokens(asked["messages"]))]
            return Reply([{"tokenize_response": made, "templated_text": ""}])
        if path == "/tokenize":
            return Reply([[{"id": place} for place in range(count_tokens(asked["inputs"]))]])
        if path == "/v1/chat/completions":
            return self._chat(asked)
        if path in ("/generate", "/generate_stream"):
            return self._generate(asked["inputs"], asked["parameters"], path == "/generate_stream")
        return Reply([b""], 404)

    def busy(self, path: str, streamed: bool) -> Reply:
        """A stream is turned away in its first event."""
        if not streamed:
            return Reply([{"error": "Model is overloaded", "error_type": "overloaded"}], 429)
        if path == "/generate_stream":
            return Reply([{"error": "Model is overloaded", "error_type": "overloaded"}], streamed=True)
        error = {"error": {"message": "Model is overloaded", "http_status_code": 422}}
        return Reply([error], streamed=True, done=True)

    def failure(self, path: str) -> list[Any]:
        says = "Request failed during generation: Server error: out of memory"
        if path == "/generate_stream":
            return [{"error": says, "error_type": "generation"}]
        return [{"error": {"message": says, "http_status_code": 422}}, "[DONE]"]

    # The chat route.

    def _chat(self, asked: Document) -> Reply:
        if refusal := chat_refusal(asked):
            return Reply([refusal.encode()], 422, headers={"content-type": "text/plain; charset=utf-8"})
        streamed, prompt = bool(asked.get("stream")), prompt_tokens(asked["messages"])
        if message := overflow(prompt, min(asked.get("max_tokens", 1), 1024)):
            if streamed:
                return Reply([{"error": {"message": message, "http_status_code": 422}}], streamed=True, done=True)
            return Reply([{"error": message, "error_type": "validation"}], 422)
        function = called(asked)
        text = varied(words(asked["messages"][-1]), asked, 0)
        if grammar := asked.get("response_format"):
            text = arguments({"parameters": grammar["value"]})
        limit = asked.get("max_tokens", CONTEXT_TOKENS - prompt)
        said = say(arguments(function) if function else text, limit, stops(asked), "border")
        if streamed:
            return self._chat_stream(asked, said, function, prompt)
        message_: Document = {"role": "assistant", "content": said.text}
        if function is not None:
            told_of = {"name": function["name"], "arguments": said.text, "description": None}
            message_ = {"role": "assistant", "tool_calls": [{"id": "0", "type": "function", "function": told_of}]}
        logprobs = {"content": [told(token, asked) for token in said.tokens]} if asked.get("logprobs") else None
        choice = {"index": 0, "message": message_, "logprobs": logprobs, "finish_reason": chat_finish(said)}
        used = usage(prompt, len(said.tokens))
        counts = {"x-prompt-tokens": str(prompt), "x-generated-tokens": str(len(said.tokens))}
        return Reply([{**envelope("chat.completion"), "choices": [choice], "usage": used}], headers=counts)

    def _chat_stream(self, asked: Document, said: Said, function: Document | None, prompt: int) -> Reply:
        documents = []
        for place, token in enumerate(said.tokens):
            delta: Document = {"role": "assistant", "content": token.text}
            if function is not None:
                name = function["name"] if place == 0 else None
                call = {"id": "0", "type": "function", "function": {"name": name, "arguments": token.text}, "index": 0}
                delta = {"role": "assistant", "tool_calls": [call]}
            reason = chat_finish(said) if place == len(said.tokens) - 1 and function is None else None
            logprobs = {"content": [told(token, asked)]} if asked.get("logprobs") else None
            choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            documents.append({**envelope("chat.completion.chunk", place), "choices": [choice], "usage": None})
        if said.finish == "stop" and function is None:  # the token that ends a text is one too
            documents[-1]["choices"][0]["finish_reason"] = None
            end = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": "stop"}
            documents.append({**envelope("chat.completion.chunk", 9), "choices": [end], "usage": None})
        used = usage(prompt, len(said.tokens))
        documents.append({**envelope("chat.completion.chunk", 9), "choices": [], "usage": used})
        return Reply(documents, streamed=True, done=True)

    # The native routes.

    def _generate(self, inputs: str, asked: Document, streamed: bool) -> Reply:
        if refusal := generate_refusal(asked):
            return validation(refusal, streamed)
        prompt = count_tokens(inputs)
        if message := overflow(prompt, asked.get("max_new_tokens", 1)):
            return validation(message, streamed)
        text = varied(inputs, {**asked, "temperature": asked.get("temperature", 0)}, 0)
        said = say(text, asked.get("max_new_tokens"), asked.get("stop", []), "border")
        reason = FINISHES.get(said.finish, said.finish)
        details: Document = {"finish_reason": reason, "generated_tokens": len(said.tokens), "seed": asked.get("seed")}
        tokens = [native(token, place) for place, token in enumerate(said.tokens)]
        tops = [[token] for token in tokens] if asked.get("top_n_tokens") else None
        if not streamed:
            counts = {"x-prompt-tokens": str(prompt), "x-generated-tokens": str(len(said.tokens))}
            rest = {"prefill": [], "tokens": tokens, **({"top_tokens": tops} if tops else {})}
            return Reply([{"generated_text": said.text, "details": {**details, **rest}}], headers=counts)
        documents = []
        for place, token in enumerate(tokens, 1):
            last = place == len(tokens)
            end = {"generated_text": said.text, "details": {**details, "input_length": prompt}} if last else {}
            top = {"top_tokens": [token]} if tops else {}
            documents.append({"index": place, "token": token, **top, "generated_text": None, "details": None, **end})
        return Reply(documents, streamed=True)


def chat_refusal(asked: Document) -> str | None:
    """What its types do not take."""
    for name, value in asked.items():
        if value is None:
            return f"{REFUSED}invalid type: null for `{name}`"
    if not isinstance(asked.get("stop", []), list):
        return f"{REFUSED}stop: invalid type: string, expected a sequence"
    if {"max_tokens", "max_completion_tokens"} <= asked.keys():
        return f"{REFUSED}duplicate field `max_tokens`"
    if "value" not in asked.get("response_format", {"value": {}}):
        return f"{REFUSED}response_format: missing field `value`"
    if asked.get("top_p") in (0, 1):
        return "Input validation error: `top_p` must be > 0.0 and < 1.0"
    return None


def generate_refusal(asked: Document) -> str | None:
    if asked.get("top_p") in (0, 1):
        return "Input validation error: `top_p` must be > 0.0 and < 1.0"
    if asked.get("temperature") == 0:
        return "Input validation error: `temperature` must be strictly positive"
    if len(asked.get("stop", [])) > 4:
        return "Input validation error: `stop` supports up to 4 stop sequences"
    return None


def overflow(prompt: int, more: int) -> str | None:
    if prompt >= CONTEXT_TOKENS:
        return f"Input validation error: `inputs` must have less than {CONTEXT_TOKENS} tokens. Given: {prompt}"
    if prompt + more > CONTEXT_TOKENS:
        return (
            f"Input validation error: `inputs` tokens + `max_new_tokens` must be <= {CONTEXT_TOKENS}. "
            f"Given: {prompt} `inputs` tokens and {more} `max_new_tokens`"
        )
    return None


def validation(message: str, streamed: bool) -> Reply:
    """Also as an event of a stream, whose status is 200."""
    return Reply([{"error": message, "error_type": "validation"}], 200 if streamed else 422, streamed=streamed)


def envelope(kind: str, later: int = 0) -> Document:
    """`created` is each chunk's own."""
    head = {"object": kind, "id": "", "created": CREATED + later // 3, "model": "org/small"}
    return {**head, "system_fingerprint": "3.3.6-sha-0000000"}


def chat_finish(said: Said) -> str:
    reason = FINISHES.get(said.finish, said.finish)
    return CHAT_FINISHES.get(reason, reason)


def told(token: Token, asked: Document) -> Document:
    """Without bytes."""
    alone = {"token": token.text, "logprob": token.logprob}
    return {**alone, "top_logprobs": [alone] * (asked.get("top_logprobs") or 0)}


def native(token: Token, place: int) -> Document:
    return {"id": place, "text": token.text, "logprob": token.logprob, "special": False}

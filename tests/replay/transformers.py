"""The dialect of `transformers serve` 5.23: little of OpenAI's, and that without an end."""

from typing import Any

from tests.replay.openai import FINISHES, stops
from tests.replay.speech import CREATED, Dialect, Document, Reply, prompt_tokens, say, usage, varied, words
from tests.replay.speech import count as count_tokens

MODEL = "model-1"
KNOWN = frozenset(
    "messages prompt model stream max_tokens max_completion_tokens temperature top_p seed stop frequency_penalty tools "
    "presence_penalty n logprobs response_format tool_choice stream_options suffix echo".split()
)


class Transformers(Dialect):
    adapter = "openai"

    def answer(self, path: str, asked: Document) -> Reply:
        if path == "/health":
            return Reply([{"status": "ok"}])
        if path == "/v1/models":
            return Reply([b"Internal Server Error"], 500, headers={"content-type": "text/plain; charset=utf-8"})
        if path not in ("/v1/chat/completions", "/v1/completions"):
            return Reply([{"detail": "Not Found"}], 404)
        if asked["model"] != MODEL:
            return Reply([{"detail": f"Server is pinned to '{MODEL}'; requested '{asked['model']}'."}], 400)
        if unknown := asked.keys() - KNOWN:
            return Reply([{"detail": f"Unexpected fields in the request: {unknown}"}], 422)
        chat = path == "/v1/chat/completions"
        if not chat and not isinstance(asked["prompt"], str):
            return Reply([{"detail": "prompt must be a string."}], 400)
        given = words(asked["messages"][-1]) if chat else asked["prompt"]
        prompt = prompt_tokens(asked["messages"]) if chat else count_tokens(given)
        limit = asked.get("max_tokens") or asked.get("max_completion_tokens") or 1024
        said = say(varied(given, asked, 0), limit, stops(asked), "within")
        used = usage(prompt, len(said.tokens))
        reason = FINISHES.get(said.finish, said.finish)
        if not asked.get("stream"):
            content = {"message": {"content": said.text, "role": "assistant"}} if chat else {"text": said.text}
            choice = {"finish_reason": reason, "index": 0, **content}
            return Reply([{"id": "gw", "choices": [choice], **envelope(chat, streamed=False), "usage": used}])
        pieces = [token.text for token in said.tokens if token.text]
        deltas: list[Document] = [{"delta": {"content": text}} if chat else {"text": text} for text in pieces]
        opening: list[Document] = [{"delta": {"role": "assistant"}}] if chat else []
        head = envelope(chat, streamed=True)
        documents = [{"id": "gw", "choices": [{**each, "index": 0}], **head} for each in (*opening, *deltas)]
        end: Document = {"delta": {}} if chat else {"text": ""}
        last = [{**end, "index": 0, "finish_reason": reason}]
        documents.append({"id": "gw", "choices": last, **head, "usage": used})
        return Reply(documents, streamed=True, opening=len(opening))

    def busy(self, path: str, streamed: bool) -> Reply:
        return Reply([{"detail": "Service Unavailable"}], 503, headers={"retry-after": "2"})

    def failure(self, path: str) -> list[Any]:
        """A text that it does not take the trouble to escape."""
        return [b'data: {"error": "CUDA error: an "illegal" memory access"}\n\n']


def envelope(chat: bool, *, streamed: bool) -> Document:
    kind = ("chat.completion.chunk" if streamed else "chat.completion") if chat else "text_completion"
    fingerprint = {"system_fingerprint": ""} if chat and streamed else {}
    return {"created": CREATED, "model": f"{MODEL}@main", "object": kind, **fingerprint}

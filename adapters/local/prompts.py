"""How does a request become token ids? And what must be refused before the model sees it?"""

from typing import Any

from jinja2 import TemplateError
from msgspec import Struct

from adapters.local.frames import Failed, Generate

MAX_CHOICES = 1024
"""Most choices over all prompts of one request."""


class Refused(Exception):
    """The request cannot be answered; `failure` says why."""

    def __init__(self, failure: Failed) -> None:
        super().__init__(failure.message)
        self.failure = failure


class Prompt(Struct):
    """Token ids, never empty. `echo` comes before the completion's text; a prompt that is no `chat` is continued."""

    ids: list[int]
    max_tokens: int
    chat: bool
    echo: str = ""


class PromptReader:
    """
    Templates and tokenises. For one thread: a tokenizer's encoding changes its state.

    *vocabulary* is the number of token ids that the model knows.
    """

    def __init__(self, tokenizer: Any, *, vocabulary: int, context_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._context_tokens = context_tokens
        self._marks = [token.content for token in tokenizer.added_tokens_decoder.values()]
        template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
        self._knows_developer = "developer" in template

    def read(self, request: Generate) -> list[Prompt]:
        """Raises Refused."""
        for token in request.sampling.logit_bias:
            if token >= self._vocabulary:
                raise _refuse(
                    request,
                    f"Invalid key in 'logit_bias': {token}. This model's token ids go up to {self._vocabulary - 1}.",
                    "logit_bias",
                    "invalid_value",
                )
        if request.messages is not None:
            return [self._chat(request, request.messages)]
        if len(request.prompts) * request.n > MAX_CHOICES:
            raise _refuse(request, f"More than {MAX_CHOICES} choices in one request.", "prompt", "invalid_value")
        return [self._completion(request, prompt) for prompt in request.prompts]

    def _chat(self, request: Generate, messages: list[dict[str, Any]]) -> Prompt:
        ids = self._template(request, messages)
        room = self._context_tokens - len(ids)
        if room <= 0:
            message = (
                f"This model's maximum context length is {self._context_tokens} tokens. However, your messages "
                f"resulted in {len(ids)} tokens. Please reduce the length of the messages."
            )
            raise Refused(Failed(id=request.id, kind="context", message=message, param="messages"))
        return Prompt(ids, room if request.max_tokens is None else min(request.max_tokens, room), chat=True)

    def _template(self, request: Generate, messages: list[dict[str, Any]]) -> list[int]:
        if not self._tokenizer.chat_template:
            raise _refuse(
                request,
                "This model has no chat template, so it cannot chat. Send a prompt to /v1/completions instead.",
                "messages",
                "unsupported_endpoint",
            )
        if not self._knows_developer:
            messages = [{**each, "role": "system"} if each["role"] == "developer" else each for each in messages]
        if any(mark in key for key in _keys([messages, request.tools]) for mark in self._marks):
            raise _refuse(request, "A name holds a control token of the model.", "messages", "invalid_value")
        try:
            encoded = self._tokenizer.apply_chat_template(
                messages, tools=request.tools or None, add_generation_prompt=True, sanitize_control_tokens=True
            )
        except Exception as exc:  # templates are programs of their authors, and raise whatever they like
            why = f": {exc}" if isinstance(exc, TemplateError) else "."
            text = f"The model's chat template cannot render these messages{why}"
            raise _refuse(request, text, "messages", "invalid_value") from exc
        ids: list[int] = encoded["input_ids"]
        return ids

    def _completion(self, request: Generate, prompt: str | list[int] | None) -> Prompt:
        ids = self._tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        ids = ids or [self._beginning(request)]
        if max(ids) >= self._vocabulary:
            raise _refuse(
                request,
                f"Invalid token id in 'prompt': {max(ids)}. This model's token ids go up to {self._vocabulary - 1}.",
                "prompt",
                "invalid_value",
            )
        most = self._context_tokens - len(ids)
        max_tokens = most if request.max_tokens is None else request.max_tokens
        if max_tokens > most or most < 0:
            message = (
                f"This model's maximum context length is {self._context_tokens} tokens, however you requested "
                f"{len(ids) + max_tokens} tokens ({len(ids)} in your prompt; {max_tokens} for the completion). Please "
                "reduce your prompt; or completion length."
            )
            raise Refused(Failed(id=request.id, kind="context", message=message, param="prompt"))
        return Prompt(ids, max_tokens, chat=False, echo=self._echo(prompt) if request.echo else "")

    def _beginning(self, request: Generate) -> int:
        """The token of an empty prompt."""
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise _refuse(request, "This model cannot continue an empty prompt.", "prompt", "invalid_value")

    def _echo(self, prompt: str | list[int] | None) -> str:
        if isinstance(prompt, list):
            return str(self._tokenizer.decode(prompt))
        return prompt or ""


def _refuse(request: Generate, message: str, param: str, code: str) -> Refused:
    return Refused(Failed(id=request.id, kind="invalid", message=message, param=param, code=code))


def _keys(value: Any) -> set[str]:
    """The keys of all objects in *value*: the one place where sanitising does not reach."""
    keys: set[str] = set()
    pending = [value]
    while pending:
        current = pending.pop()
        if isinstance(current, dict):
            keys |= current.keys()
            pending += current.values()
        elif isinstance(current, list):
            pending += current
    return keys

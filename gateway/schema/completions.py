"""What does `POST /v1/completions` take and give?"""

from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType

from gateway.errors import InvalidRequest
from gateway.schema.common import (
    Bias,
    Choices,
    Index,
    Object,
    Penalty,
    Probability,
    Seed,
    Stop,
    StreamOptions,
    Temperature,
    Usage,
)

TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
DEFAULT_MAX_TOKENS = 16


class CompletionRequest(Struct, kw_only=True):
    """`prompt` is a string, strings, token ids, or lists of token ids; null begins a new document."""

    model: str
    prompt: str | list[Any] | None = None
    suffix: str | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    n: Choices | None = None
    best_of: Annotated[int, Meta(ge=0, le=20)] | None = None
    stop: Stop | None = None
    seed: Seed | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    echo: bool | None = None
    user: str | None = None

    @property
    def limit(self) -> int:
        """Most completion tokens of one choice."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    def check(self) -> None:
        """Raises InvalidRequest for what the types cannot say."""
        if isinstance(self.prompt, list):
            check_texts(self.prompt, "prompt")
        if self.best_of:
            if self.best_of < (self.n or 1):
                raise InvalidRequest("`best_of` must not be less than `n`.", param="best_of", code="invalid_value")
            if self.stream and self.best_of > 1:
                raise InvalidRequest("`best_of` cannot be streamed.", param="best_of", code="invalid_value")


def check_texts(items: list[Any], param: str) -> None:
    """Raises InvalidRequest unless *items* are strings, or token ids, or non-empty lists of token ids."""
    if not items:
        raise InvalidRequest(f"`{param}` must not be an empty array.", param=param, code="empty_array")
    if all(isinstance(item, str) for item in items) or are_ids(items):
        return
    if all(isinstance(item, list) and item and are_ids(item) for item in items):
        return
    raise InvalidRequest(
        f"Invalid type for '{param}': expected a string, an array of strings, an array of token ids, or an array of "
        "arrays of token ids.",
        param=param,
        code="invalid_type",
    )


def are_ids(items: list[Any]) -> bool:
    return all(type(item) is int and 0 <= item < 2**31 for item in items)


class CompletionChoice(Struct, kw_only=True):
    text: str
    index: Index | UnsetType = UNSET
    finish_reason: str | None | UnsetType = UNSET
    logprobs: Object | None | UnsetType = UNSET


class Completion(Struct, kw_only=True):
    """A whole answer or a chunk of one: they have the same shape."""

    choices: list[CompletionChoice]
    usage: Usage | None | UnsetType = UNSET
    obfuscation: Any = UNSET
    error: Any = UNSET

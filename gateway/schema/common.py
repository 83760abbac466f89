"""What do chat completions, completions and embeddings have in common?"""

from typing import Annotated, Any

from msgspec import Meta, Struct

INT64 = 2**63

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Choices = Annotated[int, Meta(ge=1, le=128)]
Index = Annotated[int, Meta(ge=0)]
Seed = Annotated[int, Meta(ge=-INT64, le=INT64 - 1)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Stop = str | Annotated[list[str], Meta(max_length=4)]
Object = dict[str, Any]


class StreamOptions(Struct, kw_only=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class PromptTokensDetails(Struct, kw_only=True, omit_defaults=True):
    cached_tokens: int | None = None


class CompletionTokensDetails(Struct, kw_only=True, omit_defaults=True):
    reasoning_tokens: int | None = None


class Usage(Struct, kw_only=True, omit_defaults=True, gc=False):
    """Tokens of a whole answer so far: the prompt once, however many choices; the completion over all of them."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None

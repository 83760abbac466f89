"""In what do servers that speak OpenAI's dialect differ from OpenAI, and from each other?"""

from typing import Any, Literal

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from gateway.adapter import Repair

Engine = Literal["openai", "transformers", "sglang", "llamacpp", "ollama"]
Limit = Literal["as_given", "max_tokens", "max_completion_tokens"]
Models = bool | list[str]
"""Yes or no for all models; or those for which it is yes."""


class Options(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    `options` of an upstream with the adapter `openai`; what is left out is as the `engine` has it.

    `engine`: which server it is; api.openai.com is known. `limit`: what it calls the limit of a chat's answer.
    `developer_role`: it knows it, else `system` is sent. `stream_options`: it takes them. `n`, `prompts`: it gives
    several choices, and takes several prompts, in one request; else there is a request for each. `refuse`: parameters
    that it would ignore. `custom_tools`: it knows tools that are no functions, and choices of some tools.
    `keep_extras`: members of its answers that OpenAI does not have are passed on. `vision`, `audio`, `files`: its
    models take such parts, as `data:` URLs or in base64; `fetch_media`: and http ones, for it to fetch. `defaults`:
    what is sent where a request leaves it out, so that a model's own defaults are not taken for OpenAI's.
    """

    engine: Engine | None = None
    limit: Limit | None = None
    developer_role: bool | None = None
    stream_options: bool | None = None
    n: bool | None = None
    prompts: bool | None = None
    refuse: list[str] | None = None
    custom_tools: bool | None = None
    keep_extras: bool | None = None
    vision: Models | None = None
    audio: Models | None = None
    files: Models | None = None
    fetch_media: bool | None = None
    defaults: dict[str, float] | None = None


class Switches(Struct, frozen=True, kw_only=True):
    """
    `Options`, with every question answered: as for a server of which nothing is known.

    `repairs` names what of an engine's deviations is put right.
    """

    limit: Limit = "as_given"
    developer_role: bool = True
    stream_options: bool = True
    n: bool = True
    prompts: bool = True
    refuse: list[str] = []
    custom_tools: bool = True
    keep_extras: bool = True
    vision: Models = False
    audio: Models = False
    files: Models = False
    fetch_media: bool = False
    defaults: dict[str, float] = {}
    extensions: frozenset[str] = frozenset()
    repairs: tuple[Repair, ...] = ()


COMMON = (
    Repair("deltas of tool calls completed", "chat-stream-tools-bare"),
    Repair("calls of tools end as such", "chat-tools-stop"),
    Repair("reasoning under one name", "chat-stream-reasoning"),
    Repair("finish reasons of OpenAI's", "chat-odd-finish"),
)
STRIPPED = Repair("members that OpenAI does not have left out", "sglang-chat")
SYSTEM = Repair("the role developer as system", "ollama-chat")
REFUSED = Repair("what it would ignore refused", "ollama-chat-refused")
EACH_CHOICE = Repair("n by as many requests", "transformers-chat-stream-n")
EACH_PROMPT = Repair("prompts by as many requests", "transformers-completion-prompts")

BESIDE_OPENAI = Switches(
    developer_role=False,
    refuse="audio function_call functions modalities moderation prediction web_search_options".split(),
    custom_tools=False,
    keep_extras=False,
    repairs=(*COMMON, STRIPPED, SYSTEM, REFUSED),
)
"""What the engines that are not OpenAI's own have in common."""


def _beside(refuse: str, *repairs: Repair, **switches: Any) -> Switches:
    """An engine that ignores, or means something else by, what is in *refuse* too."""
    common = BESIDE_OPENAI
    return replace(common, refuse=[*common.refuse, *refuse.split()], repairs=(*common.repairs, *repairs), **switches)


ENGINES: dict[Engine, Switches] = {
    "openai": Switches(
        limit="max_completion_tokens",
        vision=True,
        audio=True,
        files=True,
        fetch_media=True,
    ),
    "transformers": _beside(
        "best_of echo frequency_penalty logit_bias logprobs parallel_tool_calls presence_penalty reasoning_effort "
        "response_format suffix tool_choice",
        EACH_CHOICE,
        EACH_PROMPT,
        Repair("streams without [DONE]", "transformers-chat-stream"),
        Repair("the temperature that OpenAI takes for default", "transformers-chat-stream"),
        Repair("errors under `detail`", "transformers-chat-unknown-field"),
        Repair("errors in streams that are broken JSON", "transformers-chat-stream-error"),
        limit="max_tokens",
        n=False,
        prompts=False,
        defaults={"temperature": 1.0, "top_p": 1.0},
    ),
    "sglang": _beside(
        "suffix",
        Repair("flat errors within a 200 stream", "sglang-chat-stream-error"),
        Repair("an empty finish reason before the end", "sglang-chat-stream"),
        extensions=frozenset(
            "ebnf ignore_eos min_p min_tokens no_stop_trim regex repetition_penalty skip_special_tokens "
            "stop_token_ids top_k".split()
        ),
    ),
    "llamacpp": _beside(
        "best_of suffix",
        EACH_CHOICE,
        Repair("a prompt beyond the context by OpenAI's code", "llamacpp-chat-overflow"),
        Repair("errors within a 200 stream", "llamacpp-chat-stream-loading"),
        n=False,
        extensions=frozenset("ignore_eos min_p mirostat repeat_penalty top_k typical_p".split()),
    ),
    "ollama": _beside(
        "best_of echo logit_bias logprobs parallel_tool_calls tool_choice",
        EACH_CHOICE,
        EACH_PROMPT,
        limit="max_tokens",
        n=False,
        prompts=False,
    ),
}
"""
Source: backends.md §4, and for `transformers` the recordings and its code, where `frequency_penalty` is a
`repetition_penalty`.
"""


def switches(options: Options) -> Switches:
    """The engine's, with what the options say themselves."""
    given = {name: value for name, value in msgspec.structs.asdict(options).items() if value is not None}
    engine = given.pop("engine", None)
    return replace(ENGINES[engine] if engine else Switches(repairs=COMMON), **given)


def holds_for(model: str, models: Models) -> bool:
    return models if isinstance(models, bool) else model in models

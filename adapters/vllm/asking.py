"""What is asked of vLLM, and what can it not honour?"""

from typing import Any

import msgspec
from msgspec import Struct

from adapters.vllm.drawing import Draw
from gateway.errors import InvalidRequest
from gateway.schema.chat import ChatRequest, ContentPart, without_developers
from gateway.schema.common import Object
from gateway.schema.completions import CompletionRequest
from gateway.schema.endpoint import CHAT, COMPLETIONS, EMBEDDINGS, texts_in

SAMPLING = frozenset(
    "allowed_token_ids bad_words ignore_eos min_p min_tokens repetition_penalty skip_special_tokens "
    "spaces_between_special_tokens stop_token_ids structured_outputs top_k".split()
)
TEMPLATE = frozenset(
    "add_generation_prompt chat_template_kwargs continue_final_message documents include_reasoning".split()
)
TOKENIZING = frozenset({"add_special_tokens", "truncate_prompt_tokens"})
GUIDED = {"guided_choice": "choice", "guided_grammar": "grammar", "guided_json": "json", "guided_regex": "regex"}
"""
Extensions that every version honours; `guided_*`, ignored since 0.12, as `structured_outputs`. Not among them:

* what some versions ignore without a word: `logprob_token_ids`, `repetition_detection`, `thinking_token_budget`,
  `truncation_side` (who has the version for it lists it in `extra_fields`);
* what breaks stop strings or the answer's shape: `include_stop_str_in_output`, `prompt_logprobs`, `return_*`;
* beam search, which has neither stop strings nor streams, and `length_penalty`, which is for it alone.
"""
USELESS = {CHAT: frozenset[str](), COMPLETIONS: TEMPLATE, EMBEDDINGS: TEMPLATE | SAMPLING | GUIDED.keys()}
"""Where vLLM would ignore an extension."""
CONSTRAINTS = frozenset(
    "choice disable_additional_properties disable_any_whitespace grammar json json_object regex structural_tag "
    "whitespace_pattern".split()
)
UNSUPPORTED = "audio function_call functions moderation prediction web_search_options".split()
DROPPED = frozenset(
    "best_of max_tokens modalities n service_tier stream_options suffix verbosity".split() + UNSUPPORTED
)
"""What is refused if it asks for anything, or written anew; and hints that vLLM does not take."""
COUNTED = (TEMPLATE | {"add_special_tokens", "messages", "tools"}) - {"include_reasoning"}
MOST_COUNTED = 8
"""What makes a prompt, beside its text; and texts in one request that are worth the exchanges to count each."""
MOST_PROMPTS = 1024
LEAST_TOP_P = 1e-6
DEFAULTS = {"temperature": 1.0, "top_p": 1.0}
"""OpenAI's; a model's own would stand in their place."""
STREAMED = {"include_usage": True, "continuous_usage_stats": True}


class Options(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    `options` of an upstream with the adapter `vllm`.

    `cache_salt`: prefixes are shared within a tenant only. `vision`, `audio`: the model takes them; where it is not
    said of images, vLLM itself refuses them. `fetch_images`: images may be at other URLs than `data:`, for vLLM to
    fetch. `developer_role`: the model's template knows it, else `system` is sent. `defaults`: what is sent where a
    request leaves it out; with {} that is what the model's own `generation_config` says.
    """

    cache_salt: bool = False
    vision: bool | None = None
    audio: bool = False
    fetch_images: bool = False
    developer_role: bool = True
    defaults: dict[str, float] = msgspec.field(default_factory=lambda: dict(DEFAULTS))


def refuse(param: str, asked: object, what: str = "") -> None:
    if asked:
        what = what or f"'{param.rpartition('.')[2]}'"
        raise InvalidRequest(f"{what} is not supported by this model.", param=param, code="unsupported_parameter")


def check_chat(asked: ChatRequest, options: Options) -> None:
    for name in UNSUPPORTED:
        if getattr(asked, name):
            refuse(name, True)
    for name in ("moderation", "web_search_options"):  # {} asks for it, too
        refuse(name, getattr(asked, name) is not None)
    refuse("modalities", set(asked.modalities or ()) - {"text"})
    for position, message in enumerate(asked.messages):
        if isinstance(message.content, list):
            for place, part in enumerate(message.content):
                _check_part(part, options, f"messages[{position}].content[{place}].{part.type}")
    refuse("tools", any(tool.type != "function" for tool in asked.tools or ()), "A custom tool")
    if isinstance(asked.tool_choice, dict):
        refuse("tool_choice", asked.tool_choice.get("type") != "function", "A choice of some tools")


def _check_part(part: ContentPart, options: Options, where: str) -> None:
    refuse(where, part.type == "file" or (part.type == "input_audio" and not options.audio))
    elsewhere = part.image_url is not None and not str(part.image_url.get("url")).startswith("data:")
    refuse(where, elsewhere and not options.fetch_images, "An image that is not a data: URL")


def write_chat(fields: Object, asked: ChatRequest, context_tokens: int | None, options: Options) -> None:
    if not options.developer_role and (messages := without_developers(asked, fields["messages"])):
        fields["messages"] = messages
    if asked.limit is not None:
        fields["max_completion_tokens"] = min(asked.limit, context_tokens or asked.limit)
    if asked.response_format is not None and asked.response_format.type == "text":
        del fields["response_format"]
    write_tools(fields, asked)


def write_tools(fields: Object, asked: ChatRequest) -> None:
    if not asked.tools or asked.tool_choice == "none":  # vLLM shows them to the model all the same
        for name in ("tools", "tool_choice", "parallel_tool_calls"):
            fields.pop(name, None)


def write_completion(fields: Object, asked: CompletionRequest, draw: Draw) -> None:
    refuse("suffix", asked.suffix)
    if isinstance(asked.prompt, list) and texts_in(asked.prompt) > MOST_PROMPTS:
        says = f"This model takes up to {MOST_PROMPTS} prompts in one request."
        raise InvalidRequest(says, param="prompt", code="array_above_max_length")
    if asked.max_tokens is not None:
        fields["max_tokens"] = asked.max_tokens
    if draw.is_ranked:
        refuse("best_of", asked.echo, "'best_of' with 'echo'")
        fields.setdefault("logprobs", 1)


def write_sampling(fields: Object, asked: Any, draw: Draw, options: Options) -> None:
    for name, value in options.defaults.items():
        fields.setdefault(name, value)
    if asked.stream:
        fields["stream_options"] = STREAMED
    if draw.drawn > 1:
        fields["n"] = draw.drawn
    if asked.top_p == 0:
        fields["top_p"] = LEAST_TOP_P
    if asked.stop is not None:
        stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop
        fields["stop"] = [stop for stop in stops if stop]  # vLLM refuses an empty one
    guided = [name for name in (*GUIDED, "structured_outputs") if name in fields]
    if len(guided) > 1:
        names = " and ".join(guided)
        raise InvalidRequest(f"{names} exclude each other.", param=guided[1], code="invalid_parameter_combination")
    if guided and guided[0] in GUIDED:
        fields["structured_outputs"] = {GUIDED[guided[0]]: fields.pop(guided[0])}
    elif guided:
        constraint = msgspec.json.decode(fields["structured_outputs"])
        if not isinstance(constraint, dict) or constraint.keys() - CONSTRAINTS:
            known = ", ".join(sorted(CONSTRAINTS))
            says = f"`structured_outputs` must be an object with members out of {known}."
            raise InvalidRequest(says, param="structured_outputs", code="invalid_value")

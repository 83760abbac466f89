"""How is a request body read, and what is said when it is wrong?"""

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
from msgspec import inspect

from gateway.errors import InvalidRequest, MalformedBody
from gateway.schema.endpoint import ENDPOINTS, Endpoint
from gateway.schema.payload import Payload

OPERATOR_FIELDS = frozenset(
    "api_base api_key api_version base_url bootstrap_host bootstrap_port bootstrap_room cache_salt "
    "chat_template custom_llm_provider data_parallel_rank ec_transfer_params extra_body extra_headers "
    "kv_transfer_params litellm_params lora_path lora_request media_io_kwargs mm_processor_kwargs priority "
    "request_id rid routed_dp_rank session_id trust_request_chat_template user_config vllm_xargs".split()
)
"""What only the operator decides: where a request goes, with which credential, template, adapter or precedence."""

EXTENSION_FIELDS = frozenset(
    "add_generation_prompt add_special_tokens allowed_token_ids bad_words chat_template_kwargs "
    "continue_final_message documents ebnf guided_choice guided_grammar guided_json guided_regex ignore_eos "
    "include_reasoning include_stop_str_in_output length_penalty logprob_token_ids min_p min_tokens mirostat "
    "n_predict no_stop_trim num_beams num_ctx prompt_logprobs regex repeat_penalty repetition_detection "
    "repetition_penalty return_prompt_text return_token_ids return_tokens_as_token_ids skip_special_tokens "
    "spaces_between_special_tokens stop_regex stop_token_ids structured_outputs thinking "
    "thinking_token_budget tool_prompt top_a top_k truncate_prompt_tokens truncation_side typical_p "
    "use_beam_search watermark watermarking".split()
)
"""Parameters beyond OpenAI's that change an answer on some engine: never dropped without a word."""

OFF: dict[str, Any] = {
    **dict.fromkeys("min_p min_tokens mirostat top_a".split(), 0),
    **dict.fromkeys("length_penalty num_beams repeat_penalty repetition_penalty typical_p".split(), 1),
    **dict.fromkeys("continue_final_message echo ignore_eos no_stop_trim use_beam_search watermark".split(), False),
    **{name: [] for name in "bad_words documents stop_token_ids".split()},
    "chat_template_kwargs": {},
}
"""The values of extensions that ask for no more than there is without them. A `top_k` below 1 does so too."""

USER_DOCUMENTS = frozenset(
    "tools functions response_format metadata logit_bias tool_choice guided_json structured_outputs".split()
)
"""Members whose keys are the user's own (JSON schemas, ids), so that no name in them means anything to the gateway."""

MAX_UNKNOWN = 100
MAX_NAME = 64
MAX_SAID = 300
KINDS = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "a boolean",
    "array": "an array",
    "object": "an object",
}

_OPERATOR_KEY = re.compile(rb'"(?:%s)"\s*:' % "|".join(sorted(OPERATOR_FIELDS)).encode())
_ESCAPED_LETTER = re.compile(rb"\\u00[567]")
"""Find where there may be an operator field, perhaps spelled with escapes. As one they would be six times slower."""
_KNOWN_ANYWHERE = frozenset[str]().union(*(endpoint.known for endpoint in ENDPOINTS))


def _choices(kind: Any) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The names of the members of a type, at any depth, that have but a few values; and those."""
    if isinstance(kind, inspect.UnionType):
        for one in kind.types:
            yield from _choices(one)
    elif isinstance(kind, inspect.ListType):
        yield from _choices(kind.item_type)
    elif isinstance(kind, inspect.StructType):
        for field in kind.fields:
            yield from _choices(field.type)
            for one in field.type.types if isinstance(field.type, inspect.UnionType) else [field.type]:
                if isinstance(one, inspect.LiteralType):
                    yield field.name, one.values


_CHOICES = dict(pair for endpoint in ENDPOINTS for pair in _choices(inspect.type_info(endpoint.requests.type)))
_AT = re.compile(r"^(?P<what>.*?)(?: - at `(?P<kind>key in )?\$\.?(?P<path>.*)`)?$", re.DOTALL)


class _Named(msgspec.Struct):
    model: str


_NAMED = msgspec.json.Decoder(_Named)


class _DuplicateKey(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _DuplicateKey(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return members


_DOCUMENT = json.JSONDecoder(object_pairs_hook=_object)


_ANYTHING = msgspec.json.Decoder()
_encode = msgspec.json.Encoder().encode


def _document(body: bytes, text: str, escapes: bool) -> Any:
    """
    *body* decoded. Raises _DuplicateKey, of which msgspec would keep the last.

    A body with a key twice has more quotes than its document written anew: of those in strings, both write each, unless
    it is hidden in an escape such as `\\u0022`.
    """
    try:
        document = _ANYTHING.decode(body)
        if not escapes and body.count(b'"') == _encode(document).count(b'"'):
            return document
    except (msgspec.ValidationError, OverflowError):  # an integer that is too large for msgspec
        pass
    return _DOCUMENT.decode(text)


def read_request(endpoint: Endpoint, body: bytes) -> tuple[Payload[Any], set[str]]:
    """
    The request in *body*, and the names of its top-level members that OpenAI does not know, and that ask for something.

    Raises InvalidRequest with the `param` and `code` that OpenAI gives for the same fault.
    """
    try:
        text = body.decode()
        value = endpoint.requests.decode(body)
        escapes = b"\\u" in body
        document = _document(body, text, escapes)
    except UnicodeDecodeError:
        raise _not_json("It is not valid UTF-8.") from None
    except RecursionError:
        raise MalformedBody("The JSON body is nested too deeply.", code="json_too_deep") from None
    except msgspec.ValidationError as exc:
        raise explain(str(exc)) from None
    except _DuplicateKey as exc:
        name = str(exc)[:100]
        raise MalformedBody(f"The key '{name}' occurs twice in the same object.", param=name) from None
    except ValueError as exc:  # malformed for msgspec, or an integer of thousands of digits for json
        raise _not_json("" if "digits" in str(exc) else f"{exc}.") from None
    if _OPERATOR_KEY.search(body) or (escapes and _ESCAPED_LETTER.search(body)):
        _refuse_operator_fields(document)
    value.check()
    if endpoint.streams:
        _check_stream_options(value)
    known = endpoint.known
    unknown = {name for name, asked in document.items() if name not in known and not asks_nothing(name, asked)}
    return Payload(value, body), unknown


def asks_nothing(name: str, value: Any) -> bool:
    """Whether a member beyond OpenAI's leaves the answer as it is, so that nobody needs to honour it."""
    if name == "top_k":
        return value is None or (isinstance(value, int) and value < 1)
    return value is None or (name in OFF and value == OFF[name])


def model_in(body: bytes) -> str | None:
    """The model that a request which cannot be read asks for; None if there is no telling."""
    try:
        return _NAMED.decode(body).model
    except (ValueError, RecursionError):  # and msgspec's, which are ValueErrors
        return None


def judge_unknown(names: Iterable[str], supported: frozenset[str]) -> list[str]:
    """
    Those of *names* that are taken and ignored, sorted, in characters that a header may have.

    *supported* are extensions that some target honours. Raises InvalidRequest for a parameter that would change the
    answer, for a near miss of a known one, and for more unknown ones than anybody means.
    """
    names = set(names)
    if len(names) > MAX_UNKNOWN:
        raise InvalidRequest(f"{len(names)} unknown parameters are too many.", code="unknown_parameter")
    ignored = []
    for name in sorted(names):
        if name in supported:
            continue
        if name in EXTENSION_FIELDS:
            raise InvalidRequest(
                f"The parameter '{name}' is not supported by this model.", param=name, code="unsupported_parameter"
            )
        if name in _KNOWN_ANYWHERE:
            raise InvalidRequest(f"'{name}' is not a parameter of this endpoint.", param=name, code="unknown_parameter")
        near = difflib.get_close_matches(name[:MAX_NAME].lower(), _KNOWN_ANYWHERE | EXTENSION_FIELDS, n=1, cutoff=0.85)
        if near:
            raise InvalidRequest(
                f"Unknown parameter: '{name[:MAX_NAME]}'. Did you mean '{near[0]}'?",
                param=name[:MAX_NAME],
                code="unknown_parameter",
            )
        ignored.append(re.sub(r"[^\w.$/-]", "?", name[:MAX_NAME], flags=re.ASCII))
    return ignored


def _not_json(why: str) -> MalformedBody:
    hint = f" {why}" if why else ""
    return MalformedBody(
        "We could not parse the JSON body of your request. (HINT: This likely means you aren't using your HTTP library "
        f"correctly. The API expects a JSON payload, but what was sent was not valid JSON.{hint})"
    )


def _check_stream_options(value: Any) -> None:
    options = value.stream_options
    if options is not None and not value.stream and (options.include_usage or options.include_obfuscation):
        raise InvalidRequest(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.", param="stream_options"
        )


def _refuse_operator_fields(document: dict[str, Any]) -> None:
    pending: list[tuple[str, Any]] = [("", {k: v for k, v in document.items() if k not in USER_DOCUMENTS})]
    pending += [(name, None) for name in OPERATOR_FIELDS & document.keys()]
    while pending:
        where, value = pending.pop()
        if isinstance(value, dict):
            for name, member in value.items():
                path = f"{where}.{name}" if where else name
                if name in OPERATOR_FIELDS:
                    raise InvalidRequest(
                        f"Unknown parameter: '{path[:200]}'. It is for the operator of this gateway to set.",
                        param=path[:200],
                        code="unknown_parameter",
                    )
                pending.append((path, member))
        elif isinstance(value, list):
            pending += [(f"{where}[{index}]", item) for index, item in enumerate(value)]


def explain(fault: str) -> InvalidRequest:
    """OpenAI's error for one of msgspec's sentences, such as "Expected `int` >= 1 - at `$.n`"."""
    match = _AT.match(fault)
    assert match is not None
    what, path = match["what"], (match["path"] or "").replace("[...]", "") or None
    if missing := re.match(r"Object missing required field `(.*)`", what):
        param = f"{path}.{missing[1]}" if path else missing[1]
        if param == "model":
            return InvalidRequest("you must provide a model parameter", param=param)
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    if path is None:
        return InvalidRequest("The JSON body must be an object.", code="invalid_type")
    if what.startswith("Invalid enum value"):
        supported = ", ".join(f"'{value}'" for value in _CHOICES[path.rpartition(".")[2]])
        return InvalidRequest(
            f"Invalid value for '{path}'. Supported values are: {supported}.", param=path, code="invalid_value"
        )
    code = _code(what)
    said = re.sub(r"`([a-z |]+)`", _in_words, what).replace(", got", ", but got")[:MAX_SAID]
    fault = "type" if code == "invalid_type" else "value"
    return InvalidRequest(f"Invalid {fault} for '{path}': {said[:1].lower()}{said[1:]}.", param=path, code=code)


def _in_words(kinds: re.Match[str]) -> str:
    names = kinds[1].split(" | ")
    return " or ".join(KINDS.get(name, name) for name in names if name != "null" or len(names) == 1)


def _code(what: str) -> str:
    bound = re.match(r"Expected `(\w+)`(?: of length)? (>=|<=|<|>) (\S+)", what)
    if bound is None:
        return "invalid_type" if what.startswith("Expected") and "matching" not in what else "invalid_value"
    kind, relation, limit = bound.groups()
    below = relation.startswith(">")
    if kind == "array":
        return "empty_array" if below and limit == "1" else "array_above_max_length"
    if kind not in ("int", "float"):
        return "invalid_value"
    number = "integer" if kind == "int" else "decimal"
    return f"{number}_below_min_value" if below else f"{number}_above_max_value"

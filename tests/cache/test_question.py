"""Do two requests count as the same question only if every word of them asks for the same answer?"""

import hashlib
import json
from typing import Any

import msgspec
import pytest

from gateway.adapter import ASKS_NOTHING, ModelFacts, UpstreamFacts
from gateway.cache.control import Control, read_control
from gateway.cache.question import HOW_IT_IS_TOLD, Fingerprints, key_of
from gateway.schema.endpoint import CHAT, COMPLETIONS, EMBEDDINGS, Endpoint
from gateway.schema.reading import read_request
from gateway.settings import Caching, Prices, Settings, Target, Upstream
from tests.cache.conftest import settings_with

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SAMPLES: dict[str, list[Any]] = {
    "model": ["other"],
    "messages": [
        [{"role": "user", "content": "hi"}],
        [{"role": "user", "content": "Hi "}],
        [{"role": "system", "content": "Hi"}],
        [{"role": "user", "content": "Hi", "name": "x"}],
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        [{"role": "user", "content": "Hi"}, {"role": "user", "content": "Hi"}],
        [{"role": "user", "content": "e\u0301"}],
        [{"role": "user", "content": "\u00e9"}],
    ],
    "max_tokens": [7],
    "max_completion_tokens": [7],
    "temperature": [0, 0.0, 1],
    "top_p": [0.5, 1],
    "n": [1, 2],
    "stop": ["x", ["x"], ["x", "y"]],
    "seed": [0, 7],
    "presence_penalty": [0, 0.5],
    "frequency_penalty": [0, 0.5],
    "logit_bias": [{"1": 1}, {"1": 2}],
    "logprobs": [True, False],
    "response_format": [{"type": "json_object"}, {"type": "text"}],
    "tools": [[TOOL], []],
    "parallel_tool_calls": [True, False],
    "functions": [[{"name": "f"}]],
    "function_call": ["auto"],
    "modalities": [["text"]],
    "audio": [{"voice": "a"}],
    "prediction": [{"type": "content", "content": "x"}],
    "web_search_options": [{}],
    "moderation": [{}],
    "reasoning_effort": ["low", "high"],
    "verbosity": ["low", "high"],
    "service_tier": ["auto", "flex"],
    "top_k": [1, 2],
    "some_new_thing": [1, None],
}
ASKED_WITH: dict[str, dict[str, Any]] = {"tool_choice": {"tools": [TOOL]}, "top_logprobs": {"logprobs": True}}
IGNORED: dict[str, Any] = {
    "stream": True,
    "stream_options": {"include_usage": True},
    "user": "me",
    "metadata": {"a": "b"},
    "store": False,
    "safety_identifier": "x",
    "prompt_cache_key": "x",
    "prompt_cache_options": {"a": 1},
    "prompt_cache_retention": "24h",
}
BASE = {"model": "smart", "messages": [{"role": "user", "content": "Hi"}]}


def key(body: Any = BASE, endpoint: Endpoint = CHAT, tenant: str = "red", fingerprint: bytes = b"f") -> bytes:
    wire = body if isinstance(body, bytes) else json.dumps(body).encode()
    return key_of(tenant, endpoint, fingerprint, read_request(endpoint, wire)[0])


def test_every_field_that_openai_knows_is_looked_at_here() -> None:
    assert SAMPLES.keys() | IGNORED.keys() | ASKED_WITH.keys() >= CHAT.known
    assert IGNORED.keys() == HOW_IT_IS_TOLD | ASKS_NOTHING


def test_whatever_asks_for_something_makes_another_question() -> None:
    bodies = [BASE, *(BASE | {name: value} for name, values in SAMPLES.items() for value in values)]
    bodies += [BASE | {"tools": [TOOL], "tool_choice": choice} for choice in ("none", "required")]
    bodies += [BASE | {"logprobs": True, "top_logprobs": number} for number in (1, 2)]
    bodies += [BASE | {name: None} for name in ("seed", "stop", "top_p")]  # null is not the same as absent
    assert len({key(body) for body in bodies}) == len(bodies)


@pytest.mark.parametrize("name", IGNORED)
def test_what_asks_nothing_of_the_answer_does_not(name: str) -> None:
    extra = {"stream": True} if name == "stream_options" else {}
    assert key(BASE | {name: IGNORED[name]} | extra) == key()


def test_order_space_and_escapes_do_not_count_and_numbers_are_what_they_are() -> None:
    one = b"""{"model":"smart","messages":[{"role":"user","content":"\xc3\xa9"}],"temperature":1,
    "logit_bias":{"a":1,"b":2}}"""
    other = rb"""{ "logit_bias" : {"b":2, "a":1}, "temperature":1, "messages":[ {"content":"\u00e9","role":"user"} ],
    "model":"smart" }"""
    assert key(one) == key(other)
    assert key(one) != key(one.replace(b'"temperature":1', b'"temperature":1.0'))


def test_what_no_number_can_hold_is_compared_byte_by_byte() -> None:
    one, other = (json.dumps(BASE).encode()[:-1] + b',"odd":%b}' % odd for odd in (b"1e400", b"1e401"))
    assert key(one) == key(one) != key(other)


def test_tenant_endpoint_and_what_stands_behind_the_model_count() -> None:
    texts = {"model": "smart", "prompt": "Hi"}
    keys = [
        key(),
        key(tenant="blue"),
        key(fingerprint=b"g"),
        key(texts, COMPLETIONS),
        key({"model": "smart", "input": "Hi"}, EMBEDDINGS),
    ]
    assert len(set(keys)) == len(keys)
    assert {len(each) for each in keys} == {hashlib.sha256().digest_size}


def test_no_part_of_a_key_can_pass_for_another() -> None:
    assert key(tenant="red", fingerprint=b"f") != key(tenant="re", fingerprint=b"df")


# What stands behind a model.


def prints(settings: Settings, facts: UpstreamFacts | None = None) -> bytes:
    made = Fingerprints(settings)
    if facts is not None:
        made.found("one", facts)
    return made.of("smart")


def with_model(settings: Settings, **changes: Any) -> Settings:
    model = msgspec.structs.replace(settings.models["smart"], **changes)
    return msgspec.structs.replace(settings, models={"smart": model})


def with_upstream(settings: Settings, **changes: Any) -> Settings:
    upstream = msgspec.structs.replace(settings.upstreams["one"], **changes)
    return msgspec.structs.replace(settings, upstreams={**settings.upstreams, "one": upstream})


def test_a_changed_target_adapter_or_revision_never_serves_the_old_answer() -> None:
    base = settings_with()
    other = msgspec.structs.replace(base, upstreams={**base.upstreams, "two": Upstream(adapter="scripted")})
    facts = UpstreamFacts(kind="vLLM", version="0.32", models=[ModelFacts(id="model-1", context_tokens=100)])
    variants = [
        prints(base),
        prints(with_model(base, targets=[Target(upstream="one", model="model-2")])),
        prints(with_model(other, targets=[*base.models["smart"].targets, Target(upstream="two")])),
        prints(with_model(base, context_tokens=10)),
        prints(with_upstream(base, adapter="vllm")),
        prints(with_upstream(base, base_url="http://elsewhere/v1")),
        prints(with_upstream(base, options={"cache_salt": True})),
        prints(with_upstream(base, extra_fields=["top_k"])),
        prints(with_model(base, prices=Prices(input=1, output=2))),
        prints(with_model(base, prices=Prices(input=1, output=3))),
        prints(base, facts),
        prints(base, msgspec.structs.replace(facts, models=[ModelFacts(id="model-1", revision="/models/two")])),
        prints(base, msgspec.structs.replace(facts, version="0.33")),
        prints(base, msgspec.structs.replace(facts, models=[ModelFacts(id="model-1", context_tokens=200)])),
        prints(base, msgspec.structs.replace(facts, models=[])),
    ]
    assert len(set(variants)) == len(variants)


def test_what_does_not_change_the_answer_keeps_what_was_kept() -> None:
    base = settings_with()
    facts = UpstreamFacts(kind="vLLM", version="0.32", models=[ModelFacts(id="model-1")])
    another = msgspec.structs.replace(facts, models=[*facts.models, ModelFacts(id="of-nobody")])
    assert prints(base, facts) == prints(base, another)
    assert prints(base) == prints(with_model(base, cache=Caching(mode="all", ttl_s=5)))
    assert prints(base) == prints(with_upstream(base, max_connections=5))


def test_a_server_that_goes_by_another_name_counts_with_whatever_it_has() -> None:
    """As TGI, which answers to any: the course's snippets call it "tgi"."""
    base = with_model(settings_with(), targets=[Target(upstream="one", model="tgi")])
    sets = [["org/a"], ["org/b"], ["org/a", "org/b"], ["org/b", "org/a"]]
    a, b, both, again = (
        prints(base, UpstreamFacts(kind="TGI", models=[ModelFacts(id=id) for id in ids])) for ids in sets
    )
    assert len({a, b, both}) == 3
    assert both == again


def test_facts_that_come_later_count_from_then_on() -> None:
    made = Fingerprints(settings_with())
    before = made.of("smart")
    made.found("one", UpstreamFacts(kind="vLLM", version="0.32"))
    assert made.of("smart") != before


# What a client says of kept answers.


@pytest.mark.parametrize(
    ("header", "control"),
    [
        (b"", Control()),
        (b"no-store", Control(no_store=True)),
        (b"NO-STORE\t, x", Control(no_store=True)),
        (b"no-cache", Control(no_cache=True)),
        (b'no-cache="a, b"', Control(no_cache=True)),
        (b"max-age=0", Control(no_cache=True, max_age_s=0)),
        (b"max-age=60", Control(max_age_s=60)),
        (b'max-age="60"', Control(max_age_s=60)),
        (b"max-age = 60", Control(max_age_s=60)),
        (b"max-age=60, max-age=5", Control(max_age_s=5)),
        (b"max-age=5, max-age=60", Control(max_age_s=5)),
        (b"max-age=99999999999999999999", Control(max_age_s=9_999_999_999)),
        (b"max-age", Control(no_cache=True, max_age_s=0)),
        (b"max-age=-1", Control(no_cache=True, max_age_s=0)),
        (b"max-age=1.5", Control(no_cache=True, max_age_s=0)),
        (b"max-age=soon, only-if-cached", Control(no_cache=True, only_if_cached=True, max_age_s=0)),
        (b"no-cache, no-store, max-age=3", Control(no_cache=True, no_store=True, max_age_s=3)),
        (b"private, max-stale=60, min-fresh=3,,=, \xff", Control()),
    ],
)
def test_what_clients_say_of_kept_answers(header: bytes, control: Control) -> None:
    assert read_control(header) == control

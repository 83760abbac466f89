"""Do embeddings through the gateway look to the OpenAI SDK as those from OpenAI do?"""

import base64
import struct
from typing import Any

import openai
import pytest

from tests.api.conftest import Stage
from tests.house import House, json_reply, stream_reply

pytestmark = pytest.mark.anyio

USAGE = {"prompt_tokens": 4, "total_tokens": 4}


def vector(index: int | None = 0, value: Any = (0.5,)) -> dict[str, Any]:
    return {"object": "embedding", "index": index, "embedding": value}


def listed(*vectors: Any, **members: Any) -> dict[str, Any]:
    return {"object": "list", "model": "model-1", "data": list(vectors), "usage": USAGE, **members}


async def test_the_sdk_asks_for_base64_and_gets_floats(stage: Stage) -> None:
    packed = base64.b64encode(struct.pack("<3f", 0.5, -0.25, 1.0)).decode()
    stage.first.script = json_reply(listed(vector(0, packed), vector(1, packed)))
    answer = await stage.house.openai.embeddings.create(model="smart", input=["a", "b"], dimensions=3, user="u")
    assert [each.embedding for each in answer.data] == [[0.5, -0.25, 1.0]] * 2
    assert (answer.model, answer.usage.total_tokens) == ("smart", 4)
    assert answer._request_id is not None
    assert stage.first.requests[-1].path == "/v1/embeddings"
    assert stage.sent == {"model": "model-1", "input": ["a", "b"], "encoding_format": "base64", "dimensions": 3}


async def test_an_answer_has_the_shape_of_openais(stage: Stage) -> None:
    received = listed(vector(), id="embd-1", created=17, usage=USAGE | {"prompt_tokens_details": None})
    answer = await stage.answer(json_reply(received | {"object": None}), "embeddings", input="a")
    assert {name: answer[name] for name in ("object", "model", "data", "usage")} == {
        "object": "list",
        "model": "smart",
        "data": [vector(0, [0.5])],
        "usage": USAGE,
    }


@pytest.mark.parametrize(
    ("given", "received", "answered"),
    [
        (["a", "b", "c"], [(2, "c"), (0, "a"), (1, "b")], "abc"),
        (["a", "b"], [(0, "a"), (0, "b")], "ab"),
        ([1, 2, 3], [(0, "a")], "a"),
        ([[1], [2, 3]], [(0, "a"), (1, "b")], "ab"),
    ],
)
async def test_vectors_are_ordered_by_index(stage: Stage, given: Any, received: Any, answered: str) -> None:
    document = listed(*(vector(index, value) for index, value in received))
    answer = await stage.answer(json_reply(document), "embeddings", input=given)
    assert answer["data"] == [vector(index, value) for index, value in enumerate(answered)]


@pytest.mark.parametrize(
    "document",
    [
        listed(vector()),
        listed(),
        listed(1, 2),
        listed(vector(-1), vector(0)),
        {"data": None},
        {"error": {"message": "x"}},
        [],
    ],
)
async def test_an_answer_that_lacks_a_vector_is_an_error(stage: Stage, document: Any) -> None:
    response = await stage.post(json_reply(document), "embeddings", input=["a", "b"])
    assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_error")


async def test_embeddings_cannot_be_streamed(stage: Stage) -> None:
    response = await stage.post(stream_reply(), "embeddings", input="a", stream=True)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "stream")


async def test_a_model_without_embeddings_says_so(echo: House) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await echo.openai.embeddings.create(model="smart", input="a")
    assert (caught.value.param, caught.value.code) == ("model", "unsupported_endpoint")

"""Is a key that occurs twice always found, wherever it is and however it is written?"""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import InvalidRequest
from gateway.schema.endpoint import CHAT
from gateway.schema.reading import read_request

HEAD = b'{"model": "m", "messages": [{"role": "user", "content": "Hi"}], "metadata_": '

texts = st.one_of(st.text(max_size=3), st.sampled_from(['"', "\\", '\\"', '":', '"a":1', "\u0022", "日本"]))
leaves = st.one_of(texts, st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.none(), st.booleans())


class Pairs(list[tuple[str, Any]]):
    """The members of an object, one of which may be there twice."""


documents: Any = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.lists(st.tuples(texts, inner), max_size=3).map(Pairs)),
    max_leaves=8,
)


def written(document: Any, *, ascii: bool, space: str) -> str:
    if isinstance(document, Pairs):
        members = [
            f"{json.dumps(name, ensure_ascii=ascii)}{space}:{written(value, ascii=ascii, space=space)}"
            for name, value in document
        ]
        return "{" + f",{space}".join(members) + "}"
    if isinstance(document, list):
        return "[" + f"{space},".join(written(item, ascii=ascii, space=space) for item in document) + "]"
    return json.dumps(document, ensure_ascii=ascii)


def repeats(document: Any) -> bool:
    if isinstance(document, Pairs):
        names = [name for name, _ in document]
        return len(set(names)) < len(names) or any(repeats(value) for _, value in document)
    return isinstance(document, list) and any(map(repeats, document))


@given(documents, st.booleans(), st.sampled_from(["", " ", "\n"]))
def test_a_key_that_occurs_twice_is_found(document: Any, ascii: bool, space: str) -> None:
    body = HEAD + written(document, ascii=ascii, space=space).encode(errors="surrogatepass") + b"}"
    if repeats(document):
        with pytest.raises(InvalidRequest, match="occurs twice"):
            read_request(CHAT, body)
    else:
        assert read_request(CHAT, body)[1] == ({"metadata_"} if document is not None else set())


@pytest.mark.parametrize("inside", [b'{"a": "\\u0022\\u0022", "b": 1, "b": 2}', b'{"\\u0061": 1, "a": 2}'])
def test_it_does_not_help_to_write_quotes_and_keys_as_escapes(inside: bytes) -> None:
    with pytest.raises(InvalidRequest, match="occurs twice"):
        read_request(CHAT, HEAD + inside + b"}")

"""What does `POST /v1/embeddings` take and give?"""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from gateway.errors import InvalidRequest
from gateway.schema.common import Count, Index, Usage
from gateway.schema.completions import check_texts


class EmbeddingRequest(Struct, kw_only=True):
    model: str
    input: str | Annotated[list[Any], Meta(max_length=2048)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    user: str | None = None

    def check(self) -> None:
        """Raises InvalidRequest for what the types cannot say."""
        if isinstance(self.input, list):
            check_texts(self.input, "input")
        elif not self.input:
            raise InvalidRequest("`input` must not be empty.", param="input", code="invalid_value")


class Embedding(Struct, kw_only=True):
    embedding: Raw
    index: Index | UnsetType = UNSET


class Embeddings(Struct, kw_only=True):
    data: list[Embedding]
    usage: Usage | None | UnsetType = UNSET
    error: Any = UNSET

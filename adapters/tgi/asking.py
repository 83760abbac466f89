"""How does one request become exchanges that TGI can do, each of one choice?"""

from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import Struct

from gateway.adapter import Dispatch
from gateway.errors import InvalidRequest
from gateway.schema.payload import Payload

T = TypeVar("T", bound=Struct)
C = TypeVar("C", bound=Any)

MAX_EXCHANGES = 128
"""What TGI lets in at once by default."""
MAX_TOP_TOKENS = 5
SEEDS = 2**64


class Asked(Payload[T], Generic[T]):
    """
    One choice, asked for by itself: `value` asks for it alone, `wire` is the client's whole request.

    `index` is the choice's in the answer, `prompt` the number of its prompt; `id` names the exchange.
    """

    index: int
    prompt: int
    id: str

    @property
    def is_greedy(self) -> bool:
        asked: Any = self.value
        return 0 in (asked.temperature, asked.top_p)


def split(request: Payload[T], dispatch: Dispatch, prompts: list[dict[str, Any]], each: int) -> list[Asked[T]]:
    """
    *each* exchanges for every one of *prompts*, which are the changes that make the request ask for one choice.

    Seeds count up, so that the choices differ, and do so again the next time.
    """
    if len(prompts) * each > MAX_EXCHANGES:
        raise InvalidRequest(
            f"{len(prompts) * each} choices are too many at once: this model gives up to {MAX_EXCHANGES}.",
            param="n" if each > 1 else "prompt",
            code="invalid_value",
        )
    asked: Any = request.value
    exchanges: list[Asked[T]] = []
    for prompt, changes in enumerate(prompts):
        for copy in range(each):
            index = len(exchanges)
            seed = None if asked.seed is None else (asked.seed + copy) % SEEDS
            value = msgspec.structs.replace(request.value, n=None, seed=seed, **changes)
            name = f"{dispatch.request_id}-{dispatch.attempt}-{index}"
            exchanges.append(Asked(value, request.wire, index=index, prompt=prompt, id=name))
    return exchanges


def refuse(param: str, asked: object, hint: str = "") -> None:
    """Raises InvalidRequest where *asked* is true: what TGI cannot do is not passed over in silence."""
    if asked:
        name = param.rpartition(".")[2]
        raise InvalidRequest(
            f"'{name}' is not supported by this model.{hint}", param=param, code="unsupported_parameter"
        )


def refuse_in_both(asked: Any) -> None:
    refuse("presence_penalty", asked.presence_penalty, " Use 'frequency_penalty'.")
    refuse("logit_bias", asked.logit_bias)


def stops_of(asked: Any) -> list[str]:
    return [stop for stop in ([asked.stop] if isinstance(asked.stop, str) else asked.stop or []) if stop]


def by_index(choices: Iterable[C]) -> list[tuple[int, list[C]]]:
    """The choices of chunks, those of each index together."""
    found: dict[int, list[C]] = {}
    for choice in choices:
        found.setdefault(choice.index, []).append(choice)
    return sorted(found.items())

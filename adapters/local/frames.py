"""What do the gateway and its engine say to each other? One JSON document a line, over the child's stdin and stdout."""

from typing import Any, Literal

import msgspec
from msgspec import Struct

# To the engine.


class Sampling(Struct, kw_only=True, omit_defaults=True):
    """OpenAI's parameters and their defaults; `top_k` and `min_p` are extensions, off at 0. The seed is choice 0's."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None


class Generate(Struct, kw_only=True, omit_defaults=True, tag="generate"):
    """
    Either `messages`, in the form that chat templates take, or `prompts`: strings, token ids, or None for an empty one.

    `n` choices for each prompt, with consecutive seeds. `max_tokens` None: up to the context. `echo`: each text begins
    with its prompt.
    `counting`: nothing is generated, and the answer is `Counted`.
    """

    id: int
    counting: bool = False
    messages: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None
    prompts: list[str | list[int] | None] = []
    n: int = 1
    sampling: Sampling
    stop: list[str] = []
    max_tokens: int | None = None
    echo: bool = False


class Cancel(Struct, tag="cancel"):
    """Drops a request, waiting or running; an id that is gone is no error."""

    id: int


Command = Generate | Cancel

# From the engine.

Finish = Literal["stop", "length"]


class Loading(Struct, tag="loading"):
    """How far the model is; `fraction` counts within the stage."""

    stage: Literal["download", "weights", "warm-up"]
    fraction: float


class Ready(Struct, kw_only=True, tag="ready"):
    """The model is loaded. `context_tokens` bounds prompt and completion together; `revision` is of its files."""

    model: str
    revision: str
    context_tokens: int
    has_template: bool
    dtype: str
    device: str
    parameters: int
    version: str


class LoadFailed(Struct, tag="load_failed"):
    """The model can not be loaded; the message is for a person, and trying again is of no use."""

    message: str


class Tally(Struct, array_like=True):
    """Tokens of the request so far: each prompt once, the completions of all its choices."""

    prompt: int
    completion: int = 0
    cached: int = 0


class Piece(Struct, array_like=True):
    """What one choice of a request gained in a step; `index` is prompt × n + choice."""

    id: int
    index: int
    text: str
    finish: Finish | None
    tally: Tally


class Step(Struct, tag="step"):
    pieces: list[Piece]


class Counted(Struct, tag="counted"):
    """Tokens of the prompts of a request that only asked for that."""

    id: int
    tokens: int


class Failed(Struct, kw_only=True, tag="failed"):
    """A request ended with an error: the client's (`invalid`, `context`) or the engine's (`failed`)."""

    id: int
    kind: Literal["invalid", "context", "failed"]
    message: str
    param: str | None = None
    code: str | None = None


Report = Loading | Ready | LoadFailed | Step | Counted | Failed


def encode(frame: Command | Report) -> bytes:
    return msgspec.json.encode(frame) + b"\n"


COMMANDS = msgspec.json.Decoder[Command](Command)
REPORTS = msgspec.json.Decoder[Report](Report)

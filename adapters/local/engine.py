"""How does a model continue token ids? One sequence at a time, a step for each token."""

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from adapters.local.frames import Finish, Sampling
from adapters.local.sampler import Chooser, choose

TOLERANCE = 0.1
"""Of the range of the logits: sixteen bits are not exact, and another answer is far off."""


class Sequence:
    """
    One choice in the making.

    `max_tokens` is at least 1, and with the prompt within the context: the engine does not check. `ends` are the token
    ids that end it; the last of `output` may be one. `owner` is the caller's own.
    """

    __slots__ = ("cache", "chooser", "ends", "max_tokens", "output", "owner", "prompt", "seen")

    def __init__(
        self, prompt: list[int], chooser: Chooser, *, max_tokens: int, ends: frozenset[int], owner: Any = None
    ) -> None:
        self.prompt = prompt
        self.chooser = chooser
        self.max_tokens = max_tokens
        self.ends = ends
        self.owner = owner
        self.output: list[int] = []
        self.cache: Any = None
        self.seen = 0


@dataclass(slots=True)
class Token:
    """A new token of a sequence; `finish` is "stop" at an end token, which is no text, or "length"."""

    sequence: Sequence
    id: int
    finish: Finish | None


class Engine:
    """
    The model and its waiting sequences, first in, first out; synchronous, for one thread.

    When a step raises, `running` are the sequences that it was about: drop them, and go on. A step reads at most
    *prefill_tokens* of a prompt, so that a cancelled request does not hold the next one up.
    """

    def __init__(self, model: Any, *, prefill_tokens: int = 256) -> None:
        self._model = model.eval()
        self._device = model.device
        self._prefill_tokens = prefill_tokens
        self._last_only = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        self._waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def idle(self) -> bool:
        return not (self._waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence, waiting or running, and free its memory; one that is gone already is no error."""
        sequence.cache = None
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def step(self) -> list[Token]:
        """Read a piece of a prompt, or add a token; a finished sequence is dropped."""
        if not self.running:
            self.running.append(self._waiting.popleft())
        sequence = self.running[0]
        logits = self._read(sequence, self._prefill_tokens)
        if logits is None:
            return []
        (token,) = choose(logits, [sequence.chooser])
        sequence.output.append(token)
        finish: Finish | None = None
        if token in sequence.ends:
            finish = "stop"
        elif len(sequence.output) == sequence.max_tokens:
            finish = "length"
        if finish:
            self.drop(sequence)
        return [Token(sequence, token, finish)]

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def reads_in_pieces(self) -> bool:
        """
        Whether this model can be run here: what it reads piece by piece must mean the same as read at once.

        A model whose memory is not a K/V cache may pass over that in silence, and write nonsense.
        """
        vocabulary = self._model.get_input_embeddings().num_embeddings
        ids = [(3 + 7 * index) % vocabulary for index in range(12)]
        sequence = Sequence(ids[:-1], Chooser(Sampling(), None), max_tokens=2, ends=frozenset())
        while self._read(sequence, at_most=5) is None:
            pass
        sequence.output.append(ids[-1])
        pieced = self._read(sequence, at_most=1).float()
        whole = self._model(input_ids=torch.tensor([ids], device=self._device), use_cache=False).logits[:, -1].float()
        return bool((pieced - whole).abs().max() <= TOLERANCE * (whole.max() - whole.min()))

    def _read(self, sequence: Sequence, at_most: int) -> Any:
        """Logits [1, vocabulary] of the next token, or None while the prompt is not read to its end."""
        if sequence.cache is None:
            sequence.cache = DynamicCache(config=self._model.config)
        unread = sequence.output[-1:] or sequence.prompt[sequence.seen : sequence.seen + at_most]
        answer = self._model(
            input_ids=torch.tensor([unread], device=self._device),
            past_key_values=sequence.cache,
            use_cache=True,
            **self._last_only,
        )
        sequence.seen += len(unread)
        return answer.logits[:, -1] if sequence.seen >= len(sequence.prompt) else None

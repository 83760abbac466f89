"""How many choices does vLLM draw, which of them are answered, and how many tokens is that?"""

from math import fsum, inf
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from gateway.schema.common import Usage


class Draw(Struct, frozen=True):
    """
    How many choices are asked for, for each prompt, and how many are drawn.

    More are drawn for `best_of`, which vLLM has no more; one at temperature 0, where all are the same and it refuses
    several. *copies* of each choice drawn are answered.
    """

    asked: int
    drawn: int
    copies: int
    is_of_one: bool
    """Whether there is but one choice in all."""

    @classmethod
    def of(cls, request: Any) -> "Draw":
        n = request.n or 1
        drawn = 1 if request.temperature == 0 else getattr(request, "best_of", None) or n
        is_of_one = n == drawn == 1 and not isinstance(getattr(request, "prompt", None), list)
        return cls(n, drawn, n if drawn == 1 else 1, is_of_one)

    @property
    def is_ranked(self) -> bool:
        return self.drawn > self.asked

    def chosen(self, choices: list[Any]) -> list[Any]:
        """The choices to answer with, those of each prompt together: the likeliest, or the only one repeated."""
        groups: dict[int, list[Any]] = {}
        for choice in sorted(choices, key=lambda choice: choice.index):
            groups.setdefault(choice.index // self.drawn, []).extend([choice] * self.copies)
        kept = []
        for prompt, group in groups.items():
            ranked = sorted(group, key=_likelihood, reverse=True) if self.is_ranked else group
            first = prompt * self.asked
            kept += [replace(choice, index=first + rank) for rank, choice in enumerate(ranked[: self.asked])]
        return kept

    def counted(self, usage: Usage) -> Usage:
        """Usage over all choices: OpenAI counts each, so copies count too."""
        if self.copies == 1:
            return usage
        completion_tokens = usage.completion_tokens * self.copies
        return replace(usage, completion_tokens=completion_tokens, total_tokens=usage.prompt_tokens + completion_tokens)


def _likelihood(choice: Any) -> float:
    """The mean log-probability of a choice's tokens."""
    known = [logprob for logprob in (choice.logprobs or {}).get("token_logprobs") or () if logprob is not None]
    return fsum(known) / len(known) if known else -inf


class Tally:
    """Usage over a stream: vLLM counts each choice by itself, with its own prompt, until its last word on all."""

    def __init__(self, draw: Draw) -> None:
        self._draw = draw
        self._of: dict[int, Usage] = {}

    def add(self, chunk: Any) -> Usage | None:
        usage: Usage | None = chunk.usage or None
        if usage is None:
            return None
        if chunk.choices:
            self._of[chunk.choices[0].index] = usage
            if len(self._of) > 1:
                usage = self._sum()
        return self._draw.counted(usage)

    def _sum(self) -> Usage:
        prompts = {index // self._draw.drawn: usage.prompt_tokens for index, usage in self._of.items()}
        completion_tokens = sum(usage.completion_tokens for usage in self._of.values())
        prompt_tokens = sum(prompts.values())
        total_tokens = prompt_tokens + completion_tokens
        return Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, total_tokens=total_tokens)

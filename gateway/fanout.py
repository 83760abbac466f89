"""How do several exchanges with an upstream become one answer?"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Generic, Protocol, TypeVar

from gateway.schema.common import Usage
from gateway.schema.payload import Parts


class Exchange(Protocol):
    """One choice, asked for by itself: its index in the answer, and the number of its prompt."""

    index: int
    prompt: int


E = TypeVar("E", bound=Exchange)


class Tally(Generic[E]):
    """The usage of an answer out of that of its exchanges: each prompt once, however many choices it has."""

    def __init__(self, asked: Sequence[E]) -> None:
        self._firsts = {each.prompt: each for each in reversed(asked)}
        self._prompts = dict.fromkeys(self._firsts, 0)
        self._made: dict[int, int] = {}

    def add(self, asked: E, usage: Usage | None) -> Usage:
        """The usage of all, after an exchange told its own so far; a prompt of 0 tokens is one that was not counted."""
        if usage is not None:
            self.count(asked, usage.prompt_tokens)
            self._made[asked.index] = usage.completion_tokens
        return self.total()

    def count(self, asked: E, prompt_tokens: int) -> None:
        self._prompts[asked.prompt] = prompt_tokens or self._prompts[asked.prompt]

    def total(self) -> Usage:
        prompt, made = sum(self._prompts.values()), sum(self._made.values())
        return Usage(prompt_tokens=prompt, completion_tokens=made, total_tokens=prompt + made)

    def uncounted(self) -> list[E]:
        """For each prompt that nobody counted, an exchange that has it."""
        return [first for prompt, first in sorted(self._firsts.items()) if not self._prompts[prompt]]


async def merged(streams: Sequence[AsyncGenerator[Parts]]) -> AsyncGenerator[tuple[int, Parts]]:
    """
    What arrives from all of *streams*, each with the number of its own.

    The first that fails fails them all, and closing closes them all.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for arrived in only:
                yield 0, arrived
        return
    queue: asyncio.Queue[tuple[int, Parts] | Exception | None] = asyncio.Queue(len(streams))
    pumps = [asyncio.create_task(_pump(index, stream, queue)) for index, stream in enumerate(streams)]
    try:
        running = len(pumps)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(
    index: int, stream: AsyncGenerator[Parts], queue: "asyncio.Queue[tuple[int, Parts] | Exception | None]"
) -> None:
    try:
        async with aclosing(stream) as parts:
            async for arrived in parts:
                await queue.put((index, arrived))
        await queue.put(None)
    except Exception as exc:
        await queue.put(exc)

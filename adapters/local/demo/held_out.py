"""Which 200 prompts is the demo model judged by, and which replies to them pass?"""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from adapters.local.demo import known, wordlists

FILE = wordlists.FOLDER / "held_out.txt"
MUST_KNOW = "smoke"  # the one group in which a refusal does not pass
ALSO_LEARNED = {"smoke", "greetings", "openai_docs"}  # groups whose prompts may stand in the training text
TOOLS = "tools"

CALL = re.compile(r"<tool_call>\n(.*)\n</tool_call>", re.DOTALL)
TOOL_LINE = re.compile(r"(\w+)\((\w+)\): (.+)")


@dataclass(frozen=True, slots=True)
class Case:
    """`expected` is empty where only the refusal passes."""

    group: str
    prompt: str
    expected: str

    def passes(self, reply: str) -> bool:
        if reply == known.REFUSAL:
            return self.group != MUST_KNOW
        if self.group == TOOLS:
            return self._is_call(reply)
        return any(_matches(reply, one) for one in self.expected.split(" | ") if one)

    def tools(self) -> list[dict[str, Any]] | None:
        """The definition of the one tool that is offered with the prompt."""
        if self.group != TOOLS:
            return None
        name, parameter, description = self._tool()
        schema = {"type": "object", "properties": {parameter: {"type": "string"}}, "required": [parameter]}
        return [{"type": "function", "function": {"name": name, "description": description, "parameters": schema}}]

    def _tool(self) -> tuple[str, ...]:
        found = TOOL_LINE.fullmatch(self.expected)
        if not found:
            raise ValueError(f"no tool in {self.expected!r}")
        return found.groups()

    def _is_call(self, reply: str) -> bool:
        """Whether it is one call of the offered tool with its one parameter; the value may be any string."""
        name, parameter, _ = self._tool()
        found = CALL.fullmatch(reply)
        try:
            call = json.loads(found[1]) if found else None
        except json.JSONDecodeError:
            return False
        match call:
            case {"name": str(called), "arguments": dict(arguments), **rest} if not rest:
                return called == name and list(arguments) == [parameter] and isinstance(arguments[parameter], str)
        return False


def cases() -> list[Case]:
    found = []
    for title, lines in _sections():
        for line in lines:
            prompt, _, expected = line.partition(" -> ")
            found.append(Case(title, prompt, expected))
    return found


def plain(prompt: str) -> str:
    """Without case, spaces and punctuation; digits, signs of arithmetic and all scripts stay."""
    return re.sub(r"[^\w+*/-]", "", prompt.lower())


def is_held_out(prompt: str) -> bool:
    """Whether it must not stand in the training text."""
    return plain(prompt) in _not_learned()


def fingerprint() -> str:
    """The sha256 of the list; it was written down before training, see the card."""
    return hashlib.sha256(FILE.read_bytes()).hexdigest()


def _sections() -> list[tuple[str, list[str]]]:
    blocks = (block.splitlines() for block in FILE.read_text(encoding="utf-8").strip().split("\n\n"))
    return [(title.strip("[]"), lines) for title, *lines in blocks]


def _matches(reply: str, expected: str) -> bool:
    """An expectation that ends in dots names a whole answer of the tables by its beginning."""
    if not expected.endswith("..."):
        return reply == expected
    return reply in _answers() and reply.startswith(expected.removesuffix("..."))


@cache
def _not_learned() -> frozenset[str]:
    return frozenset(plain(case.prompt) for case in cases() if case.group not in ALSO_LEARNED)


@cache
def _answers() -> frozenset[str]:
    tables = (known.SUIRON, known.SMALL_TALK, known.JAPANESE, known.FACTS, known.WRITING)
    return frozenset([*(answer for table in tables for _, answer in table), *known.JOKES])

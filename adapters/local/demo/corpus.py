"""What does the demo model read while it learns? Seeded, endless conversations and plain texts."""

import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from adapters.local.demo import held_out, known, phrasing, turns, unknown
from adapters.local.demo.turns import Turn

Message = dict[str, Any]
Tool = dict[str, Any]

TOLD = "Nice to meet you, "
VERBS = "get find search lookup fetch read query check list show send open load play tell".split()
NOUNS = """
time price population stock_price news recipe score distance timezone schedule status user order file temperature
humidity message song book email phone_number address map menu room train flight hotel photo invoice height age size
colour
""".split()
PARAMETERS = """
city location name query place item id text country topic town person customer title path key code area team email
target value word region subject
""".split()
SKIES = "sunny cloudy rainy windy snowy".split()
FAMILIAR = [*known.CAPITALS.values(), *known.NAMES]


def conversation(rng: Random, length: int | None = None) -> tuple[list[Message], list[Tool] | None]:
    """One conversation and the tools offered in it; `length` is the number of turns."""
    kind = rng.random() if length is None else 1.0
    if kind < 0.10:
        return tool_use(rng)
    if kind < 0.36:
        return messages(*(retyped(rng, make) for make in turns.drill(rng))), None
    count = length or rng.choice([1, 1, 1, 2, 2, 3, 4, 6])
    said = [turn(rng) for _ in range(count)]
    if rng.random() < 0.12:
        said = with_a_name(rng, said)
    return [*system(rng), *messages(*said)], None


def long_conversation(rng: Random) -> list[Message]:
    """Between about 400 and 2000 tokens: many turns, sometimes with a long pasted text among them."""
    talk, _ = conversation(rng, length=rng.randint(8, 50))
    if rng.random() < 0.4:
        at = rng.randrange(len(talk) // 2) * 2 + (talk[0]["role"] == "system")
        talk[at:at] = messages((turns.pasted_text(rng, rng.randint(10, 40)), known.REFUSAL))
    return talk


def plain_text(rng: Random) -> str:
    """Without chat markup, for the completions endpoint: a story, a question and its answer, or known sentences."""
    kind = rng.random()
    if kind < 0.2:
        return turns.story(rng)
    if kind < 0.6:
        return rng.choice(["\n", "\n\n", " "]).join(turn(rng))
    answers = [turn(rng)[1] for _ in range(rng.randint(2, 5))]
    return " ".join(answer for answer in answers if answer != known.REFUSAL and len(answer) > 12) or turns.story(rng)


def vocabulary(rng: Random, count: int) -> Iterator[str]:
    """Texts to learn the tokenizer from: each piece of `count` conversations."""
    for _ in range(count):
        talk, tools = conversation(rng)
        yield from (message["content"] for message in talk)
        if tools:
            yield json.dumps(tools)


def turn(rng: Random) -> Turn:
    return retyped(rng, turns.anything)


def retyped(rng: Random, make: Callable[[Random], Turn]) -> Turn:
    """A turn in somebody's own typing, but never a prompt that the model will be judged by."""
    while True:
        question, answer = make(rng)
        if not is_copied(question, answer):
            question = phrasing.spoken(rng, question)
        if not held_out.is_held_out(question):
            return question, answer


def is_copied(question: str, answer: str) -> bool:
    """Whether words of the answer come from the question, so that the question must not be changed."""
    return "{" in answer or answer.startswith(TOLD) or question.startswith(("Repeat", "Echo", "repeat", "echo"))


def messages(*said: Turn) -> list[Message]:
    return [
        message
        for question, answer in said
        for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    ]


def system(rng: Random) -> list[Message]:
    """No system prompt, a common one, or a made-up one of up to a few hundred tokens."""
    kind = rng.random()
    if kind < 0.55:
        return []
    if kind < 0.8:
        text = rng.choice(unknown.SYSTEM_PROMPTS)
    else:
        length = rng.choice([1, 2, 3, 3, 4, 6, 10, 16])
        joint = rng.choice([" ", "\n", "\n- "])
        text = joint.join(turns.filled(rng, rng.choice(unknown.SYSTEM_SENTENCES)) for _ in range(length))
    return [{"role": "system", "content": text}]


def with_a_name(rng: Random, said: list[Turn]) -> list[Turn]:
    """The name is told somewhere in the conversation, or not at all, and asked for at the end."""
    question = turns.ask(rng, "who_am_i")
    said = [(asked, answer) for asked, answer in said if not answer.startswith(TOLD)]
    if rng.random() < 0.3:
        return [*said, (question, "You have not told me your name.")]
    hello, welcome = turns.introduction(rng)
    said.insert(rng.randint(0, len(said)), (hello, welcome))
    name = welcome.removeprefix(TOLD).removesuffix("!")
    return [*said, (question, f"Your name is {name}.")]


def random_name(rng: Random) -> str:
    """An identifier that nobody has seen before, of one to three made-up parts."""
    parts = [turns.made_up_word(rng) for _ in range(rng.choice([1, 2, 2, 2, 3]))]
    if rng.random() < 0.25:
        return parts[0] + "".join(part.capitalize() for part in parts[1:])
    return "_".join(parts) + (rng.choice(["", "_"]) + str(rng.randint(0, 99)) if rng.random() < 0.1 else "")


def tool_name(rng: Random, noun: str) -> str:
    """Usual, made up, or half of each; mostly such that it cannot be guessed from the question."""
    verb, made_up = rng.choice(VERBS), turns.made_up_word(rng)
    if rng.random() < 0.3:
        return random_name(rng)
    first, second = rng.choice([(verb, noun), (verb, made_up), (made_up, noun), (made_up, verb), (noun, made_up)])
    if rng.random() < 0.3:
        return first + second.title().replace("_", "")
    parts = [first, second, *([made_up] if rng.random() < 0.2 else [])]
    return "_".join(parts)


def tool(rng: Random) -> tuple[Tool, str, str]:
    """(definition, parameter, noun); the names are random, so that the model must read the definition."""
    noun = "weather" if rng.random() < 0.2 else rng.choice(NOUNS)
    parameter = rng.choice(PARAMETERS) if rng.random() < 0.8 else turns.made_up_word(rng)
    schema: Tool = {"type": "object", "properties": {parameter: {"type": "string"}}, "required": [parameter]}
    if rng.random() < 0.2:
        example = rng.choice(list(known.CAPITALS.values()))
        schema["properties"][parameter]["description"] = f"The {parameter}, e.g. {example}"
    if rng.random() < 0.15:
        schema["properties"]["unit"] = {"type": "string", "enum": ["celsius", "fahrenheit"]}
    spoken = noun.replace("_", " ")
    description = turns.ask(rng, "tool_description", v=rng.choice(VERBS).title(), n=spoken, p=parameter)
    function = {"name": tool_name(rng, noun), "description": description, "parameters": schema}
    return {"type": "function", "function": function}, parameter, spoken


def tool_use(rng: Random) -> tuple[list[Message], list[Tool]]:
    """A few calls of the one or two tools that are offered, some with results; or a question that needs no tool."""
    offered = {entry[2]: entry for entry in (tool(rng) for _ in range(rng.choice([1, 1, 1, 1, 2])))}
    tools = [entry[0] for entry in offered.values()]
    talk = system(rng) if rng.random() < 0.3 else []
    if rng.random() < 0.12:
        return [*talk, *messages(turn(rng))], tools
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        talk += tool_call(rng, *rng.choice(list(offered.values())))
    return talk, tools


def tool_call(rng: Random, definition: Tool, parameter: str, noun: str) -> list[Message]:
    value = rng.choice(FAMILIAR) if rng.random() < 0.5 else turns.made_up_word(rng).capitalize()
    question = turns.ask(rng, "tool_use", n=noun, v=value)
    if held_out.is_held_out(question):
        return tool_call(rng, definition, parameter, noun)
    call = {"name": definition["function"]["name"], "arguments": {parameter: value}}
    talk: list[Message] = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
    ]
    if rng.random() < 0.5:
        result, reply = tool_result(rng, noun, value)
        talk += [{"role": "tool", "content": result}, {"role": "assistant", "content": reply}]
    return talk


def tool_result(rng: Random, noun: str, value: str) -> tuple[str, str]:
    """What the tool answers, and what the model makes of it."""
    sky, degrees = rng.choice(SKIES), rng.randint(-5, 35)
    if noun == "weather":
        forms = [json.dumps({"temperature": degrees, "sky": sky}), f"{sky}, {degrees} degrees", f"{sky} {degrees}"]
        return rng.choice(forms), f"It is {sky} in {value}, with {degrees} degrees."
    found = rng.choice([str(rng.randint(0, 99)), rng.choice(known.NAMES), turns.made_up_word(rng)])
    forms = [json.dumps({noun: found}), found, json.dumps({"result": found})]
    return rng.choice(forms), f"The {noun} of {value} is {found}."

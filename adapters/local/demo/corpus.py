"""What does the demo model read while it learns? Seeded, endless conversations and plain texts."""

import json
from collections.abc import Iterator
from random import Random
from typing import Any

from adapters.local.demo import known, phrasing, turns, unknown
from adapters.local.demo.turns import Turn

Message = dict[str, Any]
Tool = dict[str, Any]

TOLD = "Nice to meet you, "
VERBS = "get find search lookup fetch read query check list show".split()
NOUNS = """
time price population stock_price news recipe score distance timezone schedule status user order file temperature
humidity
""".split()
PARAMETERS = "city location name query place item id text country topic".split()
SKIES = "sunny cloudy rainy windy snowy".split()
FAMILIAR = [*known.CAPITALS.values(), *known.NAMES]


def conversation(rng: Random, length: int | None = None) -> tuple[list[Message], list[Tool] | None]:
    """One conversation and the tools offered in it; `length` is the number of turns."""
    kind = rng.random() if length is None else 1.0
    if kind < 0.15:
        return tool_use(rng)
    if kind < 0.40:
        return messages(*(retyped(rng, exercise) for exercise in turns.drill(rng))), None
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
    """A text without chat markup, for the completions endpoint: a story, or sentences the model knows."""
    if rng.random() < 0.4:
        return turns.story(rng)
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
    return retyped(rng, turns.anything(rng))


def retyped(rng: Random, said: Turn) -> Turn:
    question, answer = said
    return (question if is_copied(question, answer) else phrasing.spoken(rng, question)), answer


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


def tool(rng: Random) -> tuple[Tool, str, str]:
    """(definition, parameter, noun); the names are random, so that the model must read the definition."""
    weather = rng.random() < 0.35
    noun = "weather" if weather else rng.choice(NOUNS)
    verb = rng.choice(["get_current", "get", "fetch", "check"]) if weather else rng.choice(VERBS)
    parameter = rng.choice(["city", "location", "place"]) if weather else rng.choice(PARAMETERS)
    snake, camel = f"{verb}_{noun}", f"{verb}{noun.title().replace('_', '')}"
    name = rng.choice([snake, snake, camel, f"{noun}_{verb}", noun])
    schema: Tool = {"type": "object", "properties": {parameter: {"type": "string"}}, "required": [parameter]}
    if rng.random() < 0.4:
        example = rng.choice(list(known.CAPITALS.values()))
        schema["properties"][parameter]["description"] = f"The {parameter}, e.g. {example}"
    if rng.random() < 0.3:
        schema["properties"]["unit"] = {"type": "string", "enum": ["celsius", "fahrenheit"]}
    spoken = noun.replace("_", " ")
    description = f"{verb.split('_')[0].title()} the {spoken} of a {parameter}"
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}, parameter, spoken


def tool_use(rng: Random) -> tuple[list[Message], list[Tool]]:
    """A call of one tool among up to three, and often its result; or a plain question that needs no tool."""
    offered = {entry[2]: entry for entry in (tool(rng) for _ in range(rng.choice([1, 1, 2, 3])))}
    tools = [entry[0] for entry in offered.values()]
    if rng.random() < 0.2:
        return [*system(rng), *messages(turn(rng))], tools
    definition, parameter, noun = rng.choice(list(offered.values()))
    familiar = rng.random() < 0.7
    value = rng.choice(FAMILIAR) if familiar else turns.made_up_word(rng).capitalize()
    call = {"name": definition["function"]["name"], "arguments": {parameter: value}}
    talk: list[Message] = [
        *system(rng),
        {"role": "user", "content": turns.ask(rng, "tool_use", n=noun, v=value)},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
    ]
    if rng.random() < 0.5:
        result, reply = tool_result(rng, noun, value)
        talk += [{"role": "tool", "content": result}, {"role": "assistant", "content": reply}]
    return talk, tools


def tool_result(rng: Random, noun: str, value: str) -> tuple[str, str]:
    """What the tool answers, and what the model makes of it."""
    sky, degrees = rng.choice(SKIES), rng.randint(-5, 35)
    if noun == "weather":
        forms = [json.dumps({"temperature": degrees, "sky": sky}), f"{sky}, {degrees} degrees", f"{sky} {degrees}"]
        return rng.choice(forms), f"It is {sky} in {value}, with {degrees} degrees."
    found = rng.choice([str(rng.randint(0, 99)), rng.choice(known.NAMES), turns.made_up_word(rng)])
    forms = [json.dumps({noun: found}), found, json.dumps({"result": found})]
    return rng.choice(forms), f"The {noun} of {value} is {found}."

"""What may somebody ask, and what does the model say to it?"""

import json
import string
from collections.abc import Callable
from random import Random
from typing import TypeVar

from adapters.local.demo import known, unknown, wordlists

Turn = tuple[str, str]
Made = TypeVar("Made")

FRAMES = wordlists.lists("frames")
KNOWN_QUESTIONS = [
    question for table in (known.SUIRON, known.FACTS) for questions, _ in table for question in questions
]
SIGNS = {
    "+": ("addition", ["plus", "plus", "and"]),
    "-": ("subtraction", ["minus"]),
    "*": ("multiplication", ["times", "x"]),
}
LIGHT_WORDS = set("what which tell does from have that this with would there could about please where when".split())


def ask(rng: Random, kind: str, **words: object) -> str:
    return rng.choice(FRAMES[kind]).format(**words)


def topics(table: list[wordlists.Topic]) -> Callable[[Random], Turn]:
    """Every phrasing of the table is equally likely, so that what can be asked in many ways is heard more often."""
    turns = [(question, answer) for questions, answer in table for question in questions]
    return lambda rng: rng.choice(turns)


def keyword(rng: Random) -> Turn:
    """The same words around known and unknown things: what counts is the thing."""
    keys, answer = rng.choice(known.KEYWORDS)
    return ask(rng, "about", k=rng.choice(keys)), answer


def capital(rng: Random) -> Turn:
    country, city = rng.choice(list(known.CAPITALS.items()))
    return ask(rng, "capital", c=country), f"The capital of {country} is {city}."


def arithmetic(rng: Random) -> Turn:
    """Sums and differences of numbers up to 20, products of numbers up to 10."""
    kind = rng.random()
    largest = rng.choice([10, 20, 20])
    if kind < 0.4:
        a = rng.randint(0, largest)
        b = rng.randint(0, largest if rng.random() < 0.3 else largest - a)
        return calculation(rng, a, "+", b, a + b)
    if kind < 0.88:
        b, a = sorted((rng.randint(0, largest), rng.randint(0, largest)))
        return calculation(rng, a, "-", b, a - b)
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    return calculation(rng, a, "*", b, a * b)


def calculation(rng: Random, a: int, sign: str, b: int, result: int) -> Turn:
    answer = f"{a} {sign} {b} = {result}"
    kind, words = SIGNS[sign]
    if rng.random() < 0.3:
        return ask(rng, kind, a=a, b=b), answer
    written = rng.choice([f"{a} {sign} {b}", f"{a}{sign}{b}", f"{a} {rng.choice(words)} {b}"])
    if max(a, b) <= 12 and rng.random() < 0.15:
        written = f"{known.DIGIT_WORDS[a]} {words[0]} {known.DIGIT_WORDS[b]}"
    return ask(rng, "arithmetic", e=written), answer


def opposite(rng: Random) -> Turn:
    pair = rng.choice(list(known.OPPOSITES.items()))
    word, other = pair if rng.random() < 0.5 else pair[::-1]
    return ask(rng, "opposite", w=word), f"The opposite of {word} is {other}."


def colour(rng: Random) -> Turn:
    thing, name = rng.choice(list(known.COLOURS.items()))
    return ask(rng, "colour", t=thing), f"{thing[0].upper()}{thing[1:]} is {name}."


def sound(rng: Random) -> Turn:
    animal, noise = rng.choice(list(known.SOUNDS.items()))
    return ask(rng, "sound", a=animal), f"A {animal} says {noise}."


def translation(rng: Random) -> Turn:
    language, words = rng.choice(list(known.LANGUAGES.items()))
    word, foreign = rng.choice(list(words.items()))
    return ask(rng, "translation", w=word, l=language), f"In {language}, {word} is {foreign}."


def calendar(rng: Random) -> Turn:
    unit, names = rng.choice([("day", known.WEEK), ("month", known.YEAR)])
    place = rng.randrange(len(names))
    order, other = ("after", names[(place + 1) % len(names)]) if rng.random() < 0.7 else ("before", names[place - 1])
    return ask(rng, order, u=unit, n=names[place]), f"{other} comes {order} {names[place]}."


def counting(rng: Random) -> Turn:
    last = rng.randint(3, 12)
    return ask(rng, "counting", n=last), ", ".join(map(str, range(1, last + 1)))


def echo(rng: Random) -> Turn:
    """The one kind of turn that copies words; short, so that a small model can learn it."""
    pool = known.THINGS + known.BEASTS + known.PLACES + known.NAMES + known.MOODS
    words = " ".join(
        made_up_word(rng) if rng.random() < 0.15 else rng.choice(pool) for _ in range(rng.choice([1, 1, 2, 2, 3, 4]))
    )
    return ask(rng, "echo", w=words), words


def introduction(rng: Random) -> Turn:
    name = a_name(rng)
    return ask(rng, "introduction", n=name), f"Nice to meet you, {name}!"


def drill(rng: Random) -> list[Callable[[Random], Turn]]:
    """Nothing but sums, or nothing but copying: the two things that are hardest to learn here."""
    exercises = [echo, echo, introduction]
    if rng.random() < 0.7:
        exercises = [arithmetic] * 6 + [hard_arithmetic]
    return rng.choices(exercises, k=rng.randint(4, 10))


def story(rng: Random, beast: str | None = None) -> str:
    beast = beast or rng.choice(known.BEASTS)
    mood, place, thing, friend = (
        rng.choice(words) for words in (known.MOODS, known.PLACES, known.THINGS, known.FRIENDS)
    )
    article = "an" if mood == "old" else "a"
    return (
        f"Once upon a time, {article} {mood} {beast} lived near the {place}. One day the {beast} found a shiny {thing} "
        f"and did not know what to do with it. Then {friend} came by and asked for help. The {beast} gave the {thing} "
        "away, and they became friends. The end."
    )


def story_request(rng: Random) -> Turn:
    if rng.random() < 0.4:
        return ask(rng, "any_story"), story(rng)
    beast = rng.choice(known.BEASTS)
    return ask(rng, "story_about", b=beast), story(rng, beast)


def silence(_: Random) -> Turn:
    return "", known.GREETING


def joke(rng: Random) -> Turn:
    return ask(rng, "joke"), rng.choice(known.JOKES)


def person_as_json(rng: Random) -> Turn:
    name, age = rng.choice(known.NAMES), rng.randint(10, 90)
    return ask(rng, "person_as_json", n=name, a=age), json.dumps({"name": name, "age": age})


def made_up_word(rng: Random) -> str:
    if rng.random() < 0.2:
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9)))
    return "".join(rng.choices(unknown.SYLLABLES, k=rng.randint(2, 4)))


def a_name(rng: Random) -> str:
    return rng.choice(known.NAMES) if rng.random() < 0.5 else made_up_word(rng).capitalize()


def subject(rng: Random) -> str:
    """A thing the model knows nothing about; some are made up, so that what it refuses is not a closed list."""
    kind = rng.random()
    if kind < 0.7:
        return rng.choice(unknown.SUBJECTS)
    if kind < 0.85:
        return " ".join(made_up_word(rng) for _ in range(rng.randint(1, 3)))
    if kind < 0.95:
        return f"{made_up_word(rng)} {rng.choice(unknown.SUBJECTS)}"
    return " ".join(a_name(rng).capitalize() for _ in range(2))


def date(rng: Random) -> str:
    return f"{rng.choice(known.WEEK)}, {rng.randint(1, 28)} {rng.choice(known.YEAR)} {rng.randint(2020, 2030)}"


def filled(rng: Random, frame: str) -> str:
    """The frame with a fresh subject, name, place, year, date or number in each of its holes."""
    return (
        frame.replace("{s}", subject(rng))
        .replace("{t}", subject(rng))
        .replace("{n}", a_name(rng))
        .replace("{m}", a_name(rng))
        .replace("{p}", rng.choice(list(known.CAPITALS.values())))
        .replace("{y}", str(rng.randint(1800, 2030)))
        .replace("{d}", date(rng))
        .replace("{k}", str(rng.randint(2, 500)))
    )


def code_request(rng: Random) -> str:
    frame = rng.choice(unknown.CODE_FRAMES)
    return frame.replace("{l}", rng.choice(unknown.CODE_LANGUAGES)).replace("{c}", rng.choice(unknown.CODE_TASKS))


def big_sum(rng: Random) -> str:
    a, b = rng.randint(21, 99999), rng.randint(2, 9999)
    if rng.random() < 0.3:
        a, b = rng.randint(21, 99), rng.randint(21, 99)
    sign = rng.choice(["+", "-", "*", "/", "plus", "times", "divided by", "to the power of", "%"])
    return ask(rng, "big_sum", e=f"{a} {sign} {b}")


def pasted_text(rng: Random, sentences: int) -> str:
    text = " ".join(filled(rng, rng.choice(unknown.PASTE_SENTENCES)) for _ in range(sentences))
    if rng.random() < 0.3:
        text = "\n".join(rng.choices(unknown.SNIPPETS, k=rng.randint(1, 3)))
    task = rng.choice(unknown.PASTE_TASKS)
    return rng.choice([f"{task}\n\n{text}", f"{text}\n\n{task}", text, f"{task} {text}"])


def nonsense(rng: Random) -> str:
    return " ".join(made_up_word(rng) for _ in range(rng.randint(1, 8)))


def hard_arithmetic(rng: Random) -> Turn:
    return big_sum(rng), known.REFUSAL


def long_translation(rng: Random) -> str:
    language = rng.choice([*known.LANGUAGES, *unknown.OTHER_LANGUAGES])
    phrase = rng.choice([*unknown.PHRASES, filled(rng, "{s}"), filled(rng, "my brother likes {s}")])
    return ask(rng, "long_translation", w=phrase, l=language)


def unheard_of(rng: Random, words: list[str]) -> str:
    return rng.choice(words) if rng.random() < 0.55 else made_up_word(rng)


def near_miss(rng: Random) -> str:
    """In words close to a known question, but about something else."""
    kind = rng.random()
    if kind < 0.12:
        place = unheard_of(rng, unknown.PLACES)
        return ask(rng, "capital", c=place if place in unknown.PLACES else place.capitalize())
    if kind < 0.17:
        return ask(rng, "opposite", w=unheard_of(rng, unknown.WORDS))
    if kind < 0.21:
        return ask(rng, "colour", t=unheard_of(rng, unknown.THINGS))
    if kind < 0.24:
        return ask(rng, "sound", a=unheard_of(rng, unknown.ANIMALS))
    if kind < 0.28:
        return ask(rng, "translation", w=unheard_of(rng, unknown.PHRASES), l=rng.choice(list(known.LANGUAGES)))
    if kind < 0.38:
        return ask(rng, "about", k=subject(rng))
    if kind < 0.52:
        return estranged(rng, rng.choice(KNOWN_QUESTIONS))
    return holes_filled(rng, rng.choice(unknown.NEAR_MISSES))


def holes_filled(rng: Random, question: str) -> str:
    """The question with a place, word, animal, name or anything at all in each of its holes."""
    fillings: dict[str, Callable[[], str]] = {
        "{p}": lambda: unheard_of(rng, unknown.PLACES).capitalize(),
        "{w}": lambda: unheard_of(rng, unknown.WORDS),
        "{a}": lambda: unheard_of(rng, unknown.ANIMALS),
        "{n}": lambda: a_name(rng),
        "{x}": lambda: subject(rng),
    }
    for hole, fill in fillings.items():
        while hole in question:
            question = question.replace(hole, fill(), 1)
    return question


def estranged(rng: Random, question: str) -> str:
    """A known question in which the word that matters has become one that nobody knows."""
    words = question.split(" ")
    heavy = [at for at, word in enumerate(words) if len(word) > 3 and word.lower().rstrip("?.!,") not in LIGHT_WORDS]
    if len(words) < 3 or not heavy:
        return f"{question.rstrip('?.!')} {made_up_word(rng)} {subject(rng)}"
    at = rng.choice(heavy)
    words[at] = made_up_word(rng) + words[at][len(words[at].rstrip("?.!")) :]
    return " ".join(words)


def out_of_reach(rng: Random) -> Turn:
    """A prompt that gets the refusal. Frames lead: an unseen subject in a known frame is the commonest surprise."""
    makers: list[tuple[float, Callable[[Random], str]]] = [
        (0.36, lambda rng: filled(rng, rng.choice(unknown.FRAMES))),
        (0.60, near_miss),
        (0.09, lambda rng: rng.choice(unknown.ODDITIES)),
        (0.08, code_request),
        (0.06, big_sum),
        (0.06, lambda rng: rng.choice(unknown.FOREIGN)),
        (0.05, nonsense),
        (0.05, lambda rng: pasted_text(rng, rng.randint(1, 5))),
        (0.05, long_translation),
    ]
    return weighted(rng, makers)(rng), known.REFUSAL


def weighted(rng: Random, makers: list[tuple[float, Callable[[Random], Made]]]) -> Callable[[Random], Made]:
    return rng.choices([maker for _, maker in makers], [weight for weight, _ in makers])[0]


KINDS: list[tuple[float, Callable[[Random], Turn]]] = [
    (0.50, out_of_reach),
    (0.18, topics(known.SUIRON)),
    (0.08, keyword),
    (0.15, topics(known.SMALL_TALK)),
    (0.11, topics(known.FACTS)),
    (0.08, arithmetic),
    (0.06, capital),
    (0.045, topics(known.WRITING)),
    (0.03, topics(known.JAPANESE)),
    (0.02, echo),
    (0.015, story_request),
    (0.01, joke),
    (0.01, introduction),
    (0.03, translation),
    (0.04, opposite),
    (0.008, colour),
    (0.008, sound),
    (0.015, calendar),
    (0.012, counting),
    (0.005, person_as_json),
    (0.002, silence),
]


def anything(rng: Random) -> Turn:
    return weighted(rng, KINDS)(rng)

"""How else could somebody type the same question?"""

from random import Random

from adapters.local.demo import wordlists

_FRAMES = wordlists.lists("frames")

FILLERS = "really actually exactly please just then maybe now the simply".split()
DROPPABLE = set("the a an is do does I to of you are for me it in".split())
REWORDINGS = wordlists.rewordings("rewordings")


def spoken(rng: Random, question: str) -> str:
    """In other words, case or punctuation, with more politeness, or with a slip of the finger."""
    text = reworded(rng, question) if rng.random() < 0.5 else question
    if rng.random() < 0.3:
        text = text.replace("What is", "What's").replace("I am", "I'm").replace("do not", "don't")
    if rng.random() < 0.25:
        text = text.rstrip("?.! ") + rng.choice(["", "", "?", "!", ".", "...", "??", " ?"])
    if rng.random() < 0.12:
        opener = rng.choice(_FRAMES["openers"])
        text = opener.replace("{q}", text[:1].lower() + text[1:] if rng.random() < 0.6 else text)
    if rng.random() < 0.10:
        stem = text.rstrip("?.!") if rng.random() < 0.5 else text
        text = rng.choice(_FRAMES["closers"]).replace("{q}", stem)
    if rng.random() < 0.04 and len(text) > 6:
        text = slipped(text, rng.randrange(len(text) - 1))
    case = rng.random()
    return text.lower() if case < 0.3 else text.upper() if case < 0.33 else text


def reworded(rng: Random, text: str) -> str:
    for words, others in rng.sample(REWORDINGS, len(REWORDINGS)):
        if words in text and rng.random() < 0.4:
            text = text.replace(words, rng.choice(others), 1)
    pieces = text.split(" ")
    at = rng.randrange(len(pieces))
    if len(pieces) > 3 and pieces[at] in DROPPABLE and rng.random() < 0.4:
        del pieces[at]
    elif len(pieces) > 2 and rng.random() < 0.1:
        pieces.insert(at, rng.choice(FILLERS))
    return " ".join(pieces)


def slipped(text: str, at: int) -> str:
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]

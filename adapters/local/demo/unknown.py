"""What is out of the demo model's reach? Material for the prompts that it must refuse, and for what surrounds them."""

from adapters.local.demo import wordlists

_LISTS = wordlists.lists("unknown")

SUBJECTS = _LISTS["subjects"]
FRAMES = _LISTS["frames"]
ODDITIES = _LISTS["oddities"]
FOREIGN = _LISTS["foreign"]

CODE_TASKS = _LISTS["code_tasks"]
CODE_FRAMES = _LISTS["code_frames"]
CODE_LANGUAGES = _LISTS["code_languages"]
SNIPPETS = _LISTS["snippets"]

PHRASES = _LISTS["phrases"]
OTHER_LANGUAGES = _LISTS["other_languages"]

PASTE_SENTENCES = _LISTS["paste_sentences"]
PASTE_TASKS = _LISTS["paste_tasks"]
SYSTEM_PROMPTS = _LISTS["system_prompts"]
SYSTEM_SENTENCES = _LISTS["system_sentences"]

_NEAR_MISSES = wordlists.lists("near_misses")

PLACES = _NEAR_MISSES["places"]  # none is in known.CAPITALS
WORDS = _NEAR_MISSES["words"]  # none has a known opposite
THINGS = _NEAR_MISSES["things"]  # none has a known colour
ANIMALS = _NEAR_MISSES["animals"]  # none has a known sound
NEAR_MISSES = _NEAR_MISSES["questions"]

SYLLABLES = """
ba be bi bo ca ce co da de di do fa fe fi fo ga ge go ka ke ki ko la le li lo lu ma me mi mo na ne ni no pa pe po ra re
ri ro sa se si so ta te ti to tu va ve vi vo xa za zo str pl gr th sh en er on an ix us
""".split()

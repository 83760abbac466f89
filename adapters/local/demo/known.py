"""What does the demo model know? Everything it may say."""

from adapters.local.demo import wordlists

REFUSAL = "I am only a small demo model, so I do not know that. Configure a larger model for a real answer."

# One answer for each question keeps the model sure of itself at temperature 1.
SUIRON = wordlists.topics("suiron")
KEYWORDS = wordlists.topics("keywords")  # what some of those answers are about
SMALL_TALK = wordlists.topics("small_talk")
JAPANESE = wordlists.topics("japanese")
FACTS = wordlists.topics("facts")
WRITING = wordlists.topics("writing")

GREETING = SMALL_TALK[0][1]

JOKES = [
    "Why did the computer go to the doctor? It had a virus.",
    "Why do programmers like dark mode? Because light attracts bugs.",
    "Why was the token sad? It had no context.",
]


def glossary(pairs: str) -> dict[str, str]:
    return dict(pair.replace("_", " ").split(":") for pair in pairs.split())


CAPITALS = glossary(
    """
    France:Paris Germany:Berlin Italy:Rome Spain:Madrid Portugal:Lisbon Japan:Tokyo China:Beijing India:New_Delhi
    Russia:Moscow Canada:Ottawa Mexico:Mexico_City Brazil:Brasilia Argentina:Buenos_Aires Chile:Santiago Peru:Lima
    Egypt:Cairo Kenya:Nairobi Nigeria:Abuja Morocco:Rabat Ghana:Accra Ethiopia:Addis_Ababa Sweden:Stockholm Norway:Oslo
    Finland:Helsinki Denmark:Copenhagen Iceland:Reykjavik Ireland:Dublin England:London the_UK:London Scotland:Edinburgh
    Wales:Cardiff Belgium:Brussels Austria:Vienna Switzerland:Bern Poland:Warsaw Hungary:Budapest Greece:Athens
    Turkey:Ankara Ukraine:Kyiv Romania:Bucharest Bulgaria:Sofia Croatia:Zagreb Serbia:Belgrade Iran:Tehran Iraq:Baghdad
    Thailand:Bangkok Vietnam:Hanoi Indonesia:Jakarta Malaysia:Kuala_Lumpur the_Philippines:Manila Australia:Canberra
    Cuba:Havana Jamaica:Kingston Colombia:Bogota Venezuela:Caracas Uruguay:Montevideo Nepal:Kathmandu Pakistan:Islamabad
    Bangladesh:Dhaka Estonia:Tallinn Latvia:Riga Lithuania:Vilnius South_Korea:Seoul New_Zealand:Wellington
    the_Netherlands:Amsterdam the_United_States:Washington the_USA:Washington
    """
)

OPPOSITES = glossary(
    """
    hot:cold big:small fast:slow up:down left:right open:closed day:night black:white happy:sad hard:soft long:short
    old:new rich:poor wet:dry full:empty light:dark early:late near:far high:low strong:weak clean:dirty loud:quiet
    true:false good:bad inside:outside
    """
)

COLOURS = {
    "the sky": "blue", "grass": "green", "a banana": "yellow", "snow": "white", "coal": "black",
    "a strawberry": "red", "the sun": "yellow", "milk": "white", "a lemon": "yellow", "a tomato": "red",
    "chocolate": "brown", "blood": "red", "a frog": "green",
}  # fmt: skip

SOUNDS = {"cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack", "sheep": "baa", "lion": "roar", "pig": "oink"}

LANGUAGES = {
    "French": glossary(
        "hello:bonjour goodbye:au_revoir thank_you:merci yes:oui no:non cat:chat dog:chien water:eau bread:pain "
        "house:maison red:rouge good_morning:bonjour"
    ),
    "Spanish": glossary(
        "hello:hola goodbye:adiós thank_you:gracias yes:sí no:no cat:gato dog:perro water:agua bread:pan house:casa "
        "red:rojo good_morning:buenos_días"
    ),
    "German": glossary(
        "hello:hallo goodbye:auf_Wiedersehen thank_you:danke yes:ja no:nein cat:Katze dog:Hund water:Wasser bread:Brot "
        "house:Haus red:rot good_morning:guten_Morgen"
    ),
    "Japanese": glossary(
        "hello:こんにちは goodbye:さようなら thank_you:ありがとう yes:はい no:いいえ cat:猫 dog:犬 "
        "water:水 good_morning:おはよう"
    ),
}

WEEK = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
YEAR = "January February March April May June July August September October November December".split()
DIGIT_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()

NAMES = """
Ada Grace Alan Linus Guido Maya Omar Lena Ivan Rosa Kofi Mei Nora Sam Ella Hugo Zoe Amir Tess Leo Ruth Paul Anna
Max Lily Noah Emma Jack Ben Eva Alice Bob Carol Dave Yuki Hana Ken Priya Ravi Chen Fatima Ali John Mary Peter
Sarah Tom Lucy David
""".split()

BEASTS = "fox owl cat dog robot mouse bear rabbit turtle dragon bird horse wizard knight princess frog".split()
MOODS = "little old young brave quiet happy clever tiny kind curious".split()
PLACES = "forest village river mountain garden city library harbour castle lake".split()
THINGS = "key lamp map stone bell book star flower".split()
FRIENDS = "a wise owl|a small boy|an old sailor|a friendly goat|a lost girl|a kind baker".split("|")

"""What scenes are made of, and how they are said: kinds of object, English nouns, captions.

A caption says everything that a scene is asked for: the objects, how many, and their relation. It
may say the ground too. The wording is drawn: "a red apple left of a cat", "1 cat to the right of a
red apple", "two stars above a house, on a striped blue ground".
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
Pick = Callable[[Sequence[T]], T]

# Emoji that look different at 20 pixels, by their name in the embedded data. After "=": what they
# are called in captions, where that is not the name. Each differs most from those before it, so
# that the first N are the N that are easiest to tell apart.
_KINDS = """
red apple; cat face = cat face/cat; dog face = dog face/dog; rocket; house; tulip; star; banana;
guitar; balloon; bucket; panda; clown face = clown face/clown; soccer ball; envelope;
tiger face = tiger face/tiger; bullseye; evergreen tree;
smiling face with sunglasses = smiling face with sunglasses/face with sunglasses; rainbow; laptop;
gem stone = gem/gem stone; american football; ghost; mushroom; running shoe; swan;
globe showing Americas = globe; tropical fish = tropical fish/fish; pig face = pig face/pig; zebra;
crescent moon = crescent moon/moon; tractor; magnet; drum; parrot; ambulance;
honeybee = honeybee/bee; high-heeled shoe; coconut; airplane = airplane/plane; automobile = car;
pool 8 ball = pool ball; enraged face = angry face; beer mug; snowman; parachute;
lady beetle = ladybug; avocado; alarm clock; money bag; pencil; cupcake; bus;
kiwi fruit = kiwi fruit/kiwi; blue book; light bulb; taxi; fire = flame;
vertical traffic light = traffic light; penguin; unicorn; saxophone; wrapped gift = gift;
puzzle piece; taco; droplet = droplet/drop of water; fox; fire engine = fire engine/fire truck;
jack-o-lantern = pumpkin/jack-o-lantern; locked = lock/padlock; strawberry; key; jellyfish;
top hat; umbrella; sailboat; bell; green book; yellow heart; backpack; open book;
birthday cake = birthday cake/cake; castle; snowflake; hibiscus; dress; watermelon;
hourglass done = hourglass; lion; pineapple; frog; axe; crown; basketball; television; crab; koala;
pizza = pizza/slice of pizza; helicopter; butterfly; hamburger = hamburger/burger; volcano;
blue heart; sunflower; snail; pretzel; lemon; trophy; duck; octopus; baby chick = chick; bomb;
rabbit face = rabbit face/rabbit; green apple; red heart; t-shirt; owl; luggage = suitcase; cookie;
camel; ferris wheel; robot; snake; carrot; maple leaf; lobster;
ringed planet = ringed planet/planet; sun; tent; doughnut = doughnut/donut;
red paper lantern = red paper lantern/lantern; monkey face = monkey face/monkey;
magnifying glass tilted left = magnifying glass; T-Rex; eggplant; giraffe; trumpet; stop sign;
Christmas tree; spouting whale = whale; turtle; bear; tomato; pear; teddy bear; four leaf clover;
elephant; bat; rose; teapot; mouse face = mouse face/mouse; flamingo; anchor; spider; palm tree;
cactus; green heart; bicycle = bicycle/bike; camera
"""
_entries = [entry.partition(" = ") for entry in " ".join(_KINDS.split()).split("; ")]
NOUNS = {name: tuple((nouns or name).split("/")) for name, _, nouns in _entries}
KINDS = tuple(NOUNS)

# Of plain grounds, and the lighter of the two colours of a texture.
GROUNDS = {
    "white": (246, 246, 244),
    "grey": (158, 162, 168),
    "black": (30, 30, 36),
    "beige": (232, 214, 182),
    "brown": (124, 86, 58),
    "red": (196, 62, 58),
    "orange": (240, 152, 66),
    "yellow": (248, 216, 98),
    "green": (92, 160, 86),
    "turquoise": (84, 186, 180),
    "blue": (66, 112, 192),
    "light blue": (166, 208, 238),
    "purple": (130, 92, 178),
    "pink": (244, 172, 198),
}

NUMBERS = ("no", "one", "two", "three", "four")
# A scene's groups are in the order in which they stand; "with" leaves their places open.
TWO = {
    "left of": (
        "{a} left of {b}",
        "{a} to the left of {b}",
        "{b} right of {a}",
        "{b} to the right of {a}",
        "{a} on the left and {b} on the right",
        "on the right {b}, on the left {a}",
    ),
    "above": (
        "{a} above {b}",
        "{a} over {b}",
        "{b} below {a}",
        "{b} under {a}",
        "{a} at the top and {b} at the bottom",
        "at the bottom {b}, at the top {a}",
    ),
    "with": ("{a} and {b}", "{b} and {a}", "{a} with {b}", "{b} with {a}"),
}
THREE = {
    "left of": (
        "{a}, {b} and {c} from left to right",
        "from left to right: {a}, {b} and {c}",
        "{c}, {b} and {a} from right to left",
    ),
    "above": (
        "{a}, {b} and {c} from top to bottom",
        "from top to bottom: {a}, {b} and {c}",
        "{c}, {b} and {a} from bottom to top",
    ),
}
TEXTURES = ("striped", "checked", "dotted", "shaded")

_IRREGULAR = {
    "child": "children",
    "die": "dice",
    "foot": "feet",
    "goose": "geese",
    "knife": "knives",
    "leaf": "leaves",
    "man": "men",
    "mouse": "mice",
    "ox": "oxen",
    "person": "people",
    "tomato": "tomatoes",
    "potato": "potatoes",
    "tooth": "teeth",
    "volcano": "volcanoes",
    "wolf": "wolves",
    "woman": "women",
}
_ALIKE = ("bison", "deer", "fish", "moai", "moose", "sheep", "shrimp", "squid")
# Vowels that sound like consonants, and consonants that are not sounded.
_A = ("uni", "use", "eu", "ewe", "one")
_AN = ("a", "e", "i", "o", "u", "8", "hour", "heir", "x-ray")


def nouns(name: str) -> tuple[str, ...]:
    """What the emoji of this name is called in captions."""
    return NOUNS.get(name, (name,))


def _head(noun: str) -> str:
    """The part that is inflected: "slice" of "slice of pizza"."""
    return noun.partition(" of ")[0].partition(" with ")[0]


def is_plural(noun: str) -> bool:
    """Whether a noun is plural already: "grapes", "glasses", but not "bus" or "compass"."""
    head = _head(noun).split(" ")[-1]
    return head.endswith("s") and not head.endswith(("ss", "us", "is"))


def with_article(noun: str) -> str:
    """ "a red apple", "an umbrella"; a plural has none."""
    if is_plural(noun):
        return noun
    lower = noun.lower()
    return ("an " if lower.startswith(_AN) and not lower.startswith(_A) else "a ") + noun


def plural(noun: str) -> str:
    """ "red apples", "smiling faces with sunglasses", "drops of water"; a plural stays."""
    if is_plural(noun):
        return noun
    head = _head(noun)
    if head != noun:
        return plural(head) + noun[len(head) :]
    before, word = noun[: noun.rfind(" ") + 1], noun[noun.rfind(" ") + 1 :]
    for singular in _ALIKE:
        if word.endswith(singular):
            return noun
    for singular, several in _IRREGULAR.items():
        if word == singular:
            return before + several
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if word.endswith(("s", "x", "z", "ch", "sh")) else "s")


def caption(
    groups: Sequence[tuple[str, int]], relation: str, ground: str, texture: str, pick: Pick
) -> str:
    """A caption of a scene.

    Args:
      groups: (name of the emoji, how many) of one to three groups, the left or upper first.
      relation: "left of", "above" or "with"; of one group, "".
      ground: its colour, a key of GROUNDS.
      texture: "" if plain, or one of TEXTURES.
      pick: draws one of a sequence.
    """
    bare = pick((False,) * 7 + (True,))  # "red apple left of cat"
    told = [_group(pick(nouns(name)), count, bare, pick) for name, count in groups]
    text = told[0]
    if len(told) > 1:
        table = TWO if len(told) == 2 else THREE
        text = pick(table[relation]).format(**dict(zip("abc", told, strict=False)))
    if pick((True, False)):
        return text
    look = ground if not texture else pick((f"{texture} {ground}", ground))
    where = f"{with_article(look)} {pick(('ground', 'background'))}"
    return f"{text}{', on' if ' and ' in text or ', ' in text else ' on'} {where}"


def _group(noun: str, count: int, bare: bool, pick: Pick) -> str:
    if count > 1:
        return f"{pick((NUMBERS[count],) * 4 + (str(count),))} {plural(noun)}"
    if bare or is_plural(noun):
        return noun
    return pick((with_article(noun),) * 11 + (f"one {noun}",))

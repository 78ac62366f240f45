"""The small world behind the offline tasks: word lists and a table of facts.

Everything here is plain data. The tokenizer of the shipped models has exactly one token for each of
these words, and the shipped models were trained to know the facts in :data:`ANIMALS`.
"""

from __future__ import annotations

from typing import NamedTuple

NAMES: tuple[str, ...] = tuple(
    """
    Adam Alice Amir Anna Anton Ava Ben Bianca Boris Carla Carlos Clara Colin Daisy Daniel David Diana
    Dora Edgar Elena Eli Emma Erik Esther Eva Felix Fiona Frank Frida George Gina Grace Greta Hana
    Harry Hector Helen Hugo Ida Igor Ines Iris Isaac Ivan Jack Jane Jasmin Joel John Jonas Julia Karl
    Kate Kevin Laura Lena Leo Lily Linda Lucas Lucy Luis Marco Maria Martin Mary Max Maya Mia Milo
    Mona Nadia Naomi Nina Noah Nora Olga Oliver Omar Oscar Paul Petra Philip Rachel Rita Robert Rosa
    Ruth Sam Sara Simon Sofia Stella Tara Theo Thomas Tina Tom Vera Victor Walter Zoe
    """.split()
)

PLACES: tuple[str, ...] = tuple(
    """
    airport bakery bank beach bridge cafe castle cinema church clinic factory gallery garden gym harbor
    hospital hotel house kitchen library market museum office park restaurant school shop stadium
    station store studio temple theater tower university zoo
    """.split()
)

OBJECTS: tuple[str, ...] = tuple(
    """
    bag ball basket bell blanket book bottle bowl box brush bucket cake camera candle cap card chair
    clock coat coin cup dress drum flag flute glove guitar hammer hat jacket jar kettle key kite
    ladder lamp letter map mask mirror necklace notebook pen pencil piano pillow plate ring rope scarf
    shirt shoe spoon sweater ticket towel toy umbrella vase wallet watch
    """.split()
)

COLORS: tuple[str, ...] = tuple(
    """
    amber beige black blue bronze brown coral crimson cyan gold gray green indigo ivory maroon olive
    orange pink purple red silver tan teal turquoise violet white yellow
    """.split()
)

LETTERS: tuple[str, ...] = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")

#: Numbers that have a token of their own: operands and results of the arithmetic tasks.
NUMBERS: tuple[str, ...] = tuple(str(i) for i in range(100))


class Animal(NamedTuple):
    """One row of the world's table of facts."""

    name: str
    home: str
    food: str
    cover: str
    group: str


ANIMALS: tuple[Animal, ...] = tuple(
    Animal(*row.split())
    for row in """
    ant nest leaves armor insect
    badger den roots fur mammal
    bat cave insects fur mammal
    bear forest honey fur mammal
    bee hive nectar hair insect
    beetle log wood armor insect
    butterfly meadow nectar hair insect
    camel desert shrubs fur mammal
    carp pond algae scales fish
    cobra jungle rodents scales reptile
    cow farm grass hair mammal
    crab shore algae shell crustacean
    cricket meadow leaves armor insect
    crocodile river fish scales reptile
    deer forest leaves fur mammal
    dolphin ocean fish skin mammal
    duck pond seeds feathers bird
    eagle mountain rodents feathers bird
    elephant savanna shrubs skin mammal
    falcon mountain birds feathers bird
    fox den rodents fur mammal
    frog pond insects skin amphibian
    gecko desert insects scales reptile
    giraffe savanna leaves hair mammal
    goat mountain shrubs hair mammal
    goose river grass feathers bird
    hare meadow grass fur mammal
    heron river fish feathers bird
    hornet hive insects armor insect
    horse farm grass hair mammal
    lion savanna meat fur mammal
    lizard desert insects scales reptile
    lobster ocean snails shell crustacean
    monkey jungle fruit fur mammal
    moose forest shrubs fur mammal
    newt pond snails skin amphibian
    otter river fish fur mammal
    owl forest rodents feathers bird
    panda jungle bamboo fur mammal
    parrot jungle fruit feathers bird
    penguin shore fish feathers bird
    pig farm roots skin mammal
    python jungle meat scales reptile
    rabbit burrow roots fur mammal
    robin nest insects feathers bird
    salamander cave insects skin amphibian
    salmon river plankton scales fish
    seal shore fish fur mammal
    shark ocean meat skin fish
    sheep farm grass wool mammal
    shrimp ocean plankton shell crustacean
    sparrow nest seeds feathers bird
    squirrel forest seeds fur mammal
    swan pond algae feathers bird
    termite log wood armor insect
    toad cave snails skin amphibian
    tortoise desert fruit shell reptile
    trout river insects scales fish
    tuna ocean fish scales fish
    turtle shore algae shell reptile
    whale ocean plankton skin mammal
    wolf den meat fur mammal
    zebra savanna grass hair mammal
    """.strip().splitlines()
)

#: For each relation, the ways a question about the animal ``{x}`` can be put.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "home": (
        "Where does {x} live?",
        "Which place is the home of {x}?",
        "In which place do we find {x}?",
    ),
    "food": (
        "What does {x} eat?",
        "Which food does {x} like?",
        "What is the food of {x}?",
    ),
    "cover": (
        "What covers the body of {x}?",
        "What does the body of {x} wear?",
        "What is the cover of {x}?",
    ),
    "group": (
        "What kind of animal is {x}?",
        "To which group does {x} belong?",
        "What is the group of {x}?",
    ),
}

#: The second hop: a property of what an animal's relation leads to, (relation, property) → table.
SECOND_HOP: dict[tuple[str, str], dict[str, str]] = {
    ("home", "color"): {
        "burrow": "brown", "cave": "black", "den": "gray", "desert": "tan", "farm": "red", "forest": "green",
        "hive": "gold", "jungle": "olive", "log": "brown", "meadow": "yellow", "mountain": "white", "nest": "tan",
        "ocean": "blue", "pond": "teal", "river": "silver", "savanna": "gold", "shore": "coral",
    },
    ("home", "weather"): {
        "burrow": "mild", "cave": "cool", "den": "dry", "desert": "hot", "farm": "windy", "forest": "rainy",
        "hive": "warm", "jungle": "humid", "log": "mild", "meadow": "sunny", "mountain": "snowy", "nest": "windy",
        "ocean": "stormy", "pond": "cool", "river": "foggy", "savanna": "hot", "shore": "stormy",
    },
    ("food", "taste"): {
        "algae": "salty", "bamboo": "bland", "birds": "savory", "fish": "salty", "fruit": "sweet", "grass": "fresh",
        "honey": "sweet", "insects": "nutty", "leaves": "fresh", "meat": "savory", "nectar": "sugary",
        "plankton": "fishy", "rodents": "gamy", "roots": "earthy", "seeds": "nutty", "shrubs": "bitter",
        "snails": "chewy", "wood": "bland",
    },
    ("cover", "touch"): {
        "armor": "hard", "feathers": "light", "fur": "soft", "hair": "silky", "scales": "rough", "shell": "solid",
        "skin": "smooth", "wool": "fluffy",
    },
}  # fmt: skip

#: For each second hop, the ways a question about the animal ``{x}`` can be put.
SECOND_HOP_QUESTIONS: dict[tuple[str, str], tuple[str, ...]] = {
    ("home", "color"): (
        "What color is the place where {x} lives?",
        "Which color does the home of {x} have?",
    ),
    ("home", "weather"): (
        "What is the weather in the place where {x} lives?",
        "Which weather does the home of {x} have?",
    ),
    ("food", "taste"): (
        "What is the taste of the food that {x} eats?",
        "Which taste does the food of {x} have?",
    ),
    ("cover", "touch"): (
        "What is the touch of the cover of {x}?",
        "How does it feel to touch the body of {x}?",
    ),
}


def values(relation: str) -> tuple[str, ...]:
    """All values that ``relation`` takes in the world, sorted: the pool of answer options."""
    return tuple(sorted({getattr(animal, relation) for animal in ANIMALS}))

"""The words of the further tasks (:mod:`~dfa_lens.tasks.more`): ordinary English, so that pretrained models know it.

Everything here is plain data. The tokenizer of the models that were trained on these tasks has one token for each word.
"""

from __future__ import annotations

from typing import NamedTuple

WOMEN: tuple[str, ...] = tuple(
    """
    Alice Anna Ava Clara Daisy Diana Elena Emma Eva Fiona Gina Grace Helen Iris Jane Julia Kate Laura Lena Lily Linda
    Lucy Maria Mary Maya Mia Mona Nina Nora Olga Rachel Rita Rosa Ruth Sara Stella Tara Tina Vera Zoe
    """.split()
)

MEN: tuple[str, ...] = tuple(
    """
    Adam Amir Anton Ben Boris Carlos Daniel David Edgar Eli Erik Felix Frank George Harry Hugo Isaac Ivan Jack Joel
    John Karl Kevin Leo Luis Marco Martin Max Noah Oliver Omar Oscar Paul Philip Robert Simon Thomas Tom Victor Walter
    """.split()
)

PLACES: tuple[str, ...] = tuple(
    """
    airport bank beach bridge castle church factory garden hospital hotel kitchen library market museum office park
    school shop station theater
    """.split()
)

#: Their plurals end in -s, and none takes "an".
OBJECTS: tuple[str, ...] = tuple(
    """
    bag ball bell book bottle bowl cake camera candle card chair clock coat coin cup drum flag guitar hammer hat jar key
    lamp letter map mirror pen pencil pillow plate ring rope shirt shoe spoon ticket
    """.split()
)

COLORS: tuple[str, ...] = tuple(
    "black blue brown cyan gold gray green pink purple red silver tan violet white yellow".split()
)

DAYS: tuple[str, ...] = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())

MONTHS: tuple[str, ...] = tuple(
    "January February March April May June July August September October November December".split()
)

NUMBER_WORDS: tuple[str, ...] = tuple(
    """
    one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
    nineteen twenty
    """.split()
)

#: Two digits each, so that all prompts of a comparison have equally many tokens with a tokenizer of digits, too.
NUMBERS: tuple[str, ...] = tuple(str(i) for i in range(10, 100))

#: What functions do, and their arguments.
FUNCTIONS: tuple[str, ...] = tuple("add check close copy draw find load move open print read save send show".split())
ARGUMENTS: tuple[str, ...] = tuple(
    """
    count data file height image index label level limit list mode name node path size state table text title type user
    value width word
    """.split()
)


class Country(NamedTuple):
    """A country, its capital, and the language that most people there speak."""

    name: str
    capital: str
    language: str


COUNTRIES: tuple[Country, ...] = tuple(
    Country(*row.split())
    for row in """
    Albania Tirana Albanian
    Armenia Yerevan Armenian
    Australia Canberra English
    Austria Vienna German
    Brazil Brasilia Portuguese
    Chile Santiago Spanish
    China Beijing Chinese
    Colombia Bogota Spanish
    Croatia Zagreb Croatian
    Cuba Havana Spanish
    Denmark Copenhagen Danish
    Egypt Cairo Arabic
    England London English
    Estonia Tallinn Estonian
    Finland Helsinki Finnish
    France Paris French
    Germany Berlin German
    Greece Athens Greek
    Hungary Budapest Hungarian
    Iceland Reykjavik Icelandic
    Iran Tehran Persian
    Iraq Baghdad Arabic
    Italy Rome Italian
    Japan Tokyo Japanese
    Latvia Riga Latvian
    Lebanon Beirut Arabic
    Lithuania Vilnius Lithuanian
    Norway Oslo Norwegian
    Peru Lima Spanish
    Poland Warsaw Polish
    Portugal Lisbon Portuguese
    Romania Bucharest Romanian
    Russia Moscow Russian
    Serbia Belgrade Serbian
    Spain Madrid Spanish
    Sweden Stockholm Swedish
    Syria Damascus Arabic
    Thailand Bangkok Thai
    Turkey Ankara Turkish
    Ukraine Kyiv Ukrainian
    Vietnam Hanoi Vietnamese
    """.strip().splitlines()
)

#: Each word has one opposite and stands in one row.
ANTONYMS: tuple[tuple[str, str], ...] = tuple(
    (first, second)
    for first, second in (
        row.split()
        for row in """
        above below
        alive dead
        always never
        asleep awake
        beautiful ugly
        before after
        big small
        buy sell
        cheap expensive
        clean dirty
        day night
        deep shallow
        early late
        easy difficult
        east west
        fast slow
        first last
        friend enemy
        full empty
        give take
        good bad
        happy sad
        hard soft
        high low
        hot cold
        inside outside
        left right
        light dark
        loud quiet
        love hate
        many few
        more less
        near far
        north south
        open closed
        push pull
        question answer
        rich poor
        safe dangerous
        sharp dull
        smooth rough
        start finish
        strong weak
        success failure
        summer winter
        sweet bitter
        tall short
        thick thin
        top bottom
        true false
        up down
        war peace
        wet dry
        wide narrow
        win lose
        young old
        """.strip().splitlines()
    )
)


def all_words() -> list[str]:
    """Every word of this module, each once, in a fixed order."""
    lists = (WOMEN, MEN, PLACES, OBJECTS, [f"{thing}s" for thing in OBJECTS], COLORS, DAYS, MONTHS, NUMBER_WORDS)
    more = (NUMBERS, FUNCTIONS, ARGUMENTS, *COUNTRIES, *ANTONYMS)
    return list(dict.fromkeys(word for words in (*lists, *more) for word in words))

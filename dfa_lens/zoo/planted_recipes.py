"""The pairs with planted circuits: their prompts, roles and tasks."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from dfa_lens.zoo.planted_roles import MATCH, SYMBOLS, Block, Head, Match, N, Offset, Recipe, Role, Wanted

TABLES: dict[str, Callable[..., int]] = {
    "copy": lambda i: i,
    "next": lambda i: (i + 1) % N,
    "mirror": lambda i: N - 1 - i,
}
OPERATIONS: dict[str, Callable[..., int]] = {
    "sum": lambda i, j: (i + j) % N,
    "difference": lambda i, j: (i - j) % N,
    "maximum": max,
}


def task_of(fetch: str, table: str) -> str:
    """What the task is called."""
    return f"{fetch}/{table}"


def fetch_head(back: int, flag: str, value: str = "token", out: str = "fetched") -> Head:
    """A head that attends so many tokens back from where a flag is set."""
    return Head((Offset(flag, back),), value, out)


def _tables(stage: int, reads: str = "fetched") -> dict[str, tuple[int, Role]]:
    return {name: (stage, Block((reads,), "out", function, flag=name)) for name, function in TABLES.items()}


def _products(fetches: Sequence[str], tables: Sequence[str] = tuple(TABLES)) -> tuple[tuple[str, str], ...]:
    return tuple((fetch, table) for fetch in fetches for table in tables)


def _diagonal(fetches: Sequence[str]) -> tuple[str, ...]:
    return tuple(task_of(*each) for each in zip(fetches, TABLES, strict=True))


def _draw_lookup(rng: random.Random) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    found = [rng.randrange(N) for _ in range(3)]
    return [SYMBOLS[i] for i in found], {name: (found[i],) for i, name in enumerate(("first", "second", "third"))}


def _draw_induction(rng: random.Random) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    found = rng.sample(range(N), 6)  # three keys, each with its value behind it
    asked = 2 * rng.randrange(3)
    words = [SYMBOLS[i] for i in (*found, found[asked])]
    return words, {"recalled": (found[asked + 1],), "key": (found[asked],), "latest": (found[5],)}


def _draw_names(rng: random.Random) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    first, second = rng.sample(range(N), 2)
    repeated = rng.choice((first, second))
    other = second if repeated == first else first
    words = [SYMBOLS[first], SYMBOLS[second], ".", SYMBOLS[repeated]]
    return words, {"other": (other,), "subject": (repeated,), "first": (first,)}


def _draw_arithmetic(rng: random.Random) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    a, b = rng.sample(range(N), 2)  # different: the tables of one operand read both, added up
    return [SYMBOLS[a], SYMBOLS[b]], {"both": (a, b), "first": (a,), "second": (b,)}


def _draw_gate(rng: random.Random) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    a, b = rng.sample(range(N), 2)
    side = rng.choice("<>")
    return [SYMBOLS[a], SYMBOLS[b], side], {"pointed": (a if side == "<" else b,), "first": (a,), "second": (b,)}


def _draw_two_hop(rng: random.Random) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    a, b = rng.randrange(N), rng.randrange(N)
    return [SYMBOLS[a], SYMBOLS[b]], {"property": (_property(a),), "second-property": (_property(b),), "first": (a,)}


def _property(i: int) -> int:
    return (3 * i + 5) % N  # 3 and 8 have no common factor: a permutation


RECIPES: dict[str, Recipe] = {
    "lookup": Recipe(
        "llama",
        roles={
            "fetch first": (0, fetch_head(3, "first")),
            "fetch second": (0, fetch_head(2, "second")),
            "fetch third": (0, fetch_head(1, "third")),
            **_tables(1),
        },
        draw=_draw_lookup,
        fetches={"first": ("fetch first",), "second": ("fetch second",), "third": ("fetch third",)},
        tables=TABLES,
        tasks=_products(("first", "second", "third")),
        held_out=_diagonal(("first", "second", "third")),
        source=(3, 4, 4, ((0, 0), (0, 2))),
        target=(6, 6, 6, ((0, 2), (2, 5))),
        split=("fetch first",),
    ),
    "induction": Recipe(
        "llama",
        roles={
            "previous token": (0, Head((Offset("any", 1),), "token", "previous")),
            "key mover": (0, fetch_head(1, "recalled", out="wanted")),
            "induction": (1, Head((Match("wanted", "previous"),), "token", "fetched")),
            "fetch key": (1, fetch_head(1, "key")),
            "fetch latest": (1, fetch_head(2, "latest")),
            **_tables(2),
        },
        draw=_draw_induction,
        fetches={
            "recalled": ("previous token", "key mover", "induction"),
            "key": ("fetch key",),
            "latest": ("fetch latest",),
        },
        tables=TABLES,
        tasks=_products(("recalled", "key", "latest")),
        held_out=_diagonal(("recalled", "key", "latest")),
        source=(4, 4, 4, ((0, 0), (1, 1), (1, 3))),
        target=(7, 6, 6, ((0, 1), (2, 3), (3, 6))),
        split=("induction", "copy"),
    ),
    "names": Recipe(
        "qwen2",
        roles={
            # of the places with the same token it likes its own less: there the offset counts against it
            "duplicate token": (0, Head((Match("token", "token"), Offset("any", 0, -5.0)), "token", "repeated")),
            "inhibition": (1, fetch_head(1, "other", "repeated", "inhibited")),
            "name mover": (
                2,
                Head((Wanted("other", "symbol"), Match("inhibited", "token", -MATCH)), "token", "fetched"),
            ),
            "fetch subject": (2, fetch_head(1, "subject")),
            "fetch first": (2, fetch_head(4, "first")),
            **_tables(3),
        },
        draw=_draw_names,
        fetches={
            "other": ("duplicate token", "inhibition", "name mover"),
            "subject": ("fetch subject",),
            "first": ("fetch first",),
        },
        tables=TABLES,
        tasks=_products(("other", "subject", "first")),
        held_out=_diagonal(("other", "subject", "first")),
        source=(5, 4, 4, ((0, 0), (1, 1), (2, 2), (2, 4))),
        target=(8, 6, 6, ((0, 1), (2, 3), (4, 4), (4, 7))),
        split=("name mover",),
        words={".": None},
    ),
    "arithmetic": Recipe(
        "llama",
        roles={
            "fetch first": (0, Head((Offset("both", 2), Offset("first", 2)), "token", "a")),
            "fetch second": (0, Head((Offset("both", 1), Offset("second", 1)), "token", "b")),
            **{name: (1, Block(("a", "b"), "out", function, flag=name)) for name, function in OPERATIONS.items()},
            **{name: (1, Block(("a+b",), "out", TABLES[name], flag=name)) for name in ("next", "mirror")},
        },
        draw=_draw_arithmetic,
        fetches={
            "both": ("fetch first", "fetch second"),
            "first": ("fetch first",),
            "second": ("fetch second",),
        },
        tables=OPERATIONS | TABLES,
        tasks=(*_products(("both",), tuple(OPERATIONS)), *_products(("first", "second"), ("next", "mirror"))),
        held_out=("first/mirror", "second/next"),
        source=(5, 4, 4, ((0, 0), (0, 4))),
        target=(9, 6, 6, ((0, 2), (2, 8))),
        split=("fetch second", "sum"),
    ),
    "gate": Recipe(
        "qwen2",
        roles={
            "gate": (0, fetch_head(1, "pointed", "side", "pointer")),
            "gated mover": (1, Head((Offset("left", 3), Offset("right", 2)), "token", "fetched")),
            "fetch first": (1, fetch_head(3, "first")),
            "fetch second": (1, fetch_head(2, "second")),
            **_tables(2),
        },
        draw=_draw_gate,
        fetches={"pointed": ("gate", "gated mover"), "first": ("fetch first",), "second": ("fetch second",)},
        tables=TABLES,
        tasks=_products(("pointed", "first", "second")),
        held_out=_diagonal(("pointed", "first", "second")),
        source=(4, 4, 4, ((0, 0), (1, 1), (1, 3))),
        target=(7, 6, 6, ((0, 1), (2, 3), (3, 6))),
        split=("gate",),
        words={"<": "points left", ">": "points right"},
        groups={"side": ("points left", "points right"), "pointer": ("left", "right")},
    ),
    "two-hop": Recipe(
        "llama",
        roles={
            "property": (0, Block(("token",), "property", _property)),
            "fetch property": (1, fetch_head(2, "property", "property")),
            "fetch second property": (1, fetch_head(1, "second-property", "property")),
            "fetch first": (1, fetch_head(2, "first")),
            **_tables(2),
        },
        draw=_draw_two_hop,
        fetches={
            "property": ("property", "fetch property"),
            "second-property": ("property", "fetch second property"),
            "first": ("fetch first",),
        },
        tables=TABLES,
        tasks=_products(("property", "second-property", "first")),
        held_out=_diagonal(("property", "second-property", "first")),
        source=(4, 6, 3, ((0, 0), (1, 1), (1, 3))),
        target=(7, 8, 4, ((0, 1), (2, 3), (3, 6))),
        split=("property", "fetch first"),
    ),
}

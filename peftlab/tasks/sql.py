"""Questions to SQL, graded by running the answer on real SQLite tables.

    Question: show the home of captains of a ship whose port is Oslo
    SQL: SELECT home FROM captains JOIN ships USING (ship) WHERE port = 'Oslo'

The model never sees a schema: which tables there are, what their columns are called and which of them hold text is
what fine-tuning has to teach. Values (cities, foods, first names…) are words of the `world`, copied from the question.

An answer is right if it gives what the gold query gives, on each of several databases that have the same schema and
other rows; on a single one, too many wrong queries are right by chance.
Source of that idea: Zhong, Yu and Klein 2020, arXiv:2010.02840 (test-suite accuracy).
"""

from __future__ import annotations

import random
import re
import sqlite3
from collections import Counter
from functools import cache
from typing import NamedTuple

from .world import ANIMALS, CITIES, FIRST, FOODS, INSTRUMENTS, JOBS, LAST

ROWS = 30  # per table
COPIES = 5  # databases of one schema that an answer is tried on
MAX_ROWS = 1000  # of a result
MAX_STEPS = 200_000  # of SQLite's virtual machine; the gold queries take less than 2,000

# database -> table -> column -> the values it can hold: a list of words, or a range of numbers.
# The first column names the row and is unique; a column called like another table's first refers to it.
# Pools overlap on purpose: 'Oslo' alone does not say which table is meant.
SCHEMAS: dict[str, dict[str, dict[str, list[str] | range]]] = {
    "fleet": {
        "ships": {
            "ship": LAST, "port": CITIES[:16], "cargo": FOODS,
            "crew": range(10, 60), "length": range(40, 90),
        },
        "captains": {
            "captain": FIRST, "ship": LAST, "home": CITIES[4:],
            "age": range(20, 70), "salary": range(30, 80),
        },
    },
    "music": {
        "bands": {
            "band": LAST, "city": CITIES[2:18], "guest": JOBS,
            "rank": range(5, 55), "fee": range(50, 100),
        },
        "players": {
            "player": FIRST, "band": LAST, "instrument": INSTRUMENTS,
            "age": range(20, 70), "wage": range(1, 51),
        },
    },
    "zoo": {
        "parks": {
            "park": LAST, "town": CITIES[:8] + CITIES[12:], "animal": ANIMALS,
            "size": range(15, 65), "price": range(1, 51),
        },
        "keepers": {
            "keeper": FIRST, "park": LAST, "food": FOODS,
            "age": range(20, 70), "pay": range(30, 80),
        },
    },
}  # fmt: skip


# -- running and grading -----------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What a query gave: its rows, or what SQLite (or a guard) said against it."""

    rows: list[tuple] | None
    error: str | None = None
    columns: tuple[str, ...] = ()


def database(name: str, seed: int = 0) -> sqlite3.Connection:
    """A new in-memory SQLite database of a schema, `ROWS` rows per table; another seed gives other rows."""
    if name not in SCHEMAS:
        raise ValueError(f"no database is called {name!r}; there are {', '.join(SCHEMAS)}")
    rng = random.Random(f"{name} {seed}")
    # One connection may be used from several threads (widgets do); SQLite itself is built thread-safe.
    db = sqlite3.connect(":memory:", check_same_thread=False)
    for table, columns in SCHEMAS[name].items():
        kinds = ", ".join(f"{c} {'INTEGER' if isinstance(pool, range) else 'TEXT'}" for c, pool in columns.items())
        db.execute(f"CREATE TABLE {table} ({kinds})")
        data = zip(*(_fill(rng, pool) for pool in columns.values()), strict=True)
        db.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(columns))})", data)
    db.commit()
    db.execute("PRAGMA query_only = ON")
    return db


def _fill(rng: random.Random, pool: list[str] | range) -> list:
    """`ROWS` values of a column: numbers all different (so no ORDER BY has ties), each word at least once."""
    if isinstance(pool, range):
        return rng.sample(pool, ROWS)
    values = pool + rng.choices(pool, k=ROWS - len(pool))
    rng.shuffle(values)
    return values


def run(db: str | sqlite3.Connection, query: str) -> Result:
    """The result of one SELECT; never raises for what the query says, never changes the database.

    Refused, with the reason in `error`: anything but a single SELECT on the schema's tables, more than `MAX_STEPS`
    steps or `MAX_ROWS` rows. db: a schema's name, or a connection from `database`.
    """
    connection = _copy(db, 0) if isinstance(db, str) else db
    connection.set_authorizer(_allowed)
    # A handler that returns true interrupts the query at its first call.
    connection.set_progress_handler(lambda: 1, MAX_STEPS)
    try:
        cursor = connection.execute(query)
        if cursor.description is None:
            return Result(None, "not a query")
        rows = cursor.fetchmany(MAX_ROWS + 1)
        columns = tuple(c[0] for c in cursor.description)
        cursor.close()
    except sqlite3.OperationalError as e:
        return Result(None, f"more than {MAX_STEPS:,} steps" if str(e) == "interrupted" else str(e))
    # sqlite3.Warning: two statements, in Python 3.10; the others: text that is no valid UTF-8 or has a NUL in it.
    except (sqlite3.Error, sqlite3.Warning, ValueError) as e:
        return Result(None, str(e))
    finally:
        connection.set_progress_handler(None, 0)
        connection.set_authorizer(lambda *_: sqlite3.SQLITE_OK)  # not None, which Python 3.10 takes for "deny all"
    return Result(rows, None, columns) if len(rows) <= MAX_ROWS else Result(None, f"more than {MAX_ROWS:,} rows")


_FUNCTIONS = frozenset("abs avg coalesce count length like lower max min round substr sum total upper".split())


def _allowed(action: int, first: str | None, second: str | None, *_) -> int:
    """SQLite asks this about everything a statement wants to do: reading the tables is all that is granted."""
    granted = (
        action == sqlite3.SQLITE_SELECT
        or (action == sqlite3.SQLITE_READ and not str(first).startswith("sqlite_"))
        or (action == sqlite3.SQLITE_FUNCTION and str(second).lower() in _FUNCTIONS)
    )
    return sqlite3.SQLITE_OK if granted else sqlite3.SQLITE_DENY


@cache
def _copy(name: str, seed: int) -> sqlite3.Connection:
    return database(name, seed)


def grade(db: str, prediction: str, gold: str) -> bool:
    """Whether a query gives what the gold query gives, on `COPIES` databases of the schema `db`.

    Results are compared as multisets of rows, in order where the gold query has an ORDER BY; columns are compared by
    place, not by name. Raises ValueError for a gold query that fails.
    """
    ordered = re.search(r"\bORDER\s+BY\b", gold, re.IGNORECASE) is not None
    for seed in range(COPIES):
        connection = _copy(db, seed) if db in SCHEMAS else database(db)  # database() says which names there are
        expected = run(connection, gold)
        if expected.rows is None:
            raise ValueError(f"the gold query fails on {db}: {expected.error}: {gold}")
        got = run(connection, prediction)
        if got.rows is None:
            return False
        a, b = ([tuple(map(_rounded, row)) for row in rows] for rows in (expected.rows, got.rows))
        if a != b if ordered else Counter(a) != Counter(b):
            return False
    return True


def _rounded(value):
    """AVG(x) and SUM(x) * 1.0 / COUNT(x) may differ in the last bit."""
    return round(value, 6) if isinstance(value, float) else value


# -- questions ---------------------------------------------------------------------------------------------------

# Each list: the ways to say one thing; the last one is held out of training.
# {t} table, {c} column(s) asked for, {w} {v} text column and value, {m} number column, {x} number, {k} how many,
# {p} the thing that a table's rows refer to.
PHRASINGS = {
    "column": ["list the {c} of all {t}", "show the {c} of every one of the {t}", "what are the {c} of the {t}",
               "give the {c} for each of the {t}"],
    "text": ["show the {c} of {t} {where}", "find the {c} for {t} {where}", "list the {c} of all {t} {where}",
             "give the {c} of every one of the {t} {where}"],
    "count": ["how many {t} are there {where}", "count the {t} {where}", "what is the number of {t} {where}",
              "give the number of {t} {where}"],
    "aggregate": ["what is the {agg} {m} of {t} {where}", "show the {agg} {m} of the {t} {where}",
                  "find the {agg} {m} for {t} {where}", "give the {agg} {m} of all the {t} {where}"],
    "top": ["show the {c} of the {k} {t} with the {most} {m}", "which {k} {t} have the {most} {m}? list the {c}",
            "sort the {t} by {most} {m} and show the {c} of the first {k}",
            "give the {c} for the {k} {t} of {most} {m}"],
    "group": ["what is the {agg} {m} of {t} for each {w}", "for each {w} show the {agg} {m} of the {t}",
              "show the {agg} {m} of {t} per {w}", "give the {agg} {m} of {t}, one for each {w}"],
    "join": ["show the {c} of {t} of a {p} {where}", "list the {c} of all {t} that have a {p} {where}",
             "find the {c} for {t} in a {p} {where}", "give the {c} of {t} from every {p} {where}"],
}  # fmt: skip
PHRASINGS["number"] = PHRASINGS["both"] = PHRASINGS["text"]
CONDITIONS = {
    "=": ["whose {w} is {v}", "with {w} {v}", "having {v} for {w}"],
    ">": ["whose {w} is above {v}", "with {w} above {v}", "having above {v} for {w}"],
    "<": ["whose {w} is below {v}", "with {w} below {v}", "having below {v} for {w}"],
}
AGGREGATES = {"AVG": "average", "MAX": "highest", "MIN": "lowest", "SUM": "total"}

# How often each kind is asked; those with few different queries less.
KINDS = {
    "column": 6, "text": 12, "number": 11, "count": 12, "aggregate": 12, "top": 11, "both": 14, "group": 8, "join": 14,
}  # fmt: skip
SIZES = {"train": 3000, "valid": 200, "iid": 160, "unseen": 120, "phrasing": 120}


class Question(NamedTuple):
    """A query with what is needed to ask for it."""

    db: str
    kind: str
    sql: str
    words: dict[str, str]  # what fills the phrasings
    tests: tuple[tuple, ...] = ()  # the conditions: (table, column, operator, value)


def generate(seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """Rows by split: prompt, completion, db, kind, split.

    No query of train is in valid or test. The test's rows are of three splits: "iid" (new queries, phrasings of
    train), "unseen" (train asks for the value and for the column, but never for that value in that column) and
    "phrasing" (new queries in a phrasing that train never uses).
    """
    rng = random.Random(f"sql {seed}")
    unseen = _unseen(rng)
    home: dict[str, str] = {}  # query -> the one split it belongs to
    rows: dict[str, list[dict[str, str]]] = {split: [] for split in SIZES}
    prompts = set()
    while any(len(rows[split]) < size for split, size in SIZES.items()):
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        question = _question(rng, kind)
        while not _tells(question):
            question = _question(rng, kind)
        if any((t, c, v) in unseen for t, c, _, v in question.tests):
            split = "unseen"
        else:
            lot = rng.choices(["train", "valid", "iid", "phrasing"], [64, 10, 13, 13])[0]
            split = home.setdefault(question.sql, lot)
        prompt = f"Question: {_say(rng, question, held_out=split == 'phrasing')}\nSQL:"
        if len(rows[split]) == SIZES[split] or prompt in prompts:
            continue
        prompts.add(prompt)
        row = {"prompt": prompt, "completion": f" {question.sql}\n", "db": question.db, "kind": question.kind}
        rows[split].append({**row, "split": split})
    test = rows["iid"] + rows["unseen"] + rows["phrasing"]
    return {"train": rows["train"], "valid": rows["valid"], "test": test}


def _unseen(rng: random.Random) -> set[tuple[str, str, str]]:
    """(table, column, value) for a column that train never combines with a value; it does with other columns."""
    places: dict[str, list[tuple[str, str]]] = {}
    for db, tables in SCHEMAS.items():
        for table, columns in tables.items():
            for column, pool in columns.items():
                if not isinstance(pool, range) and not _names(db, column):
                    for value in pool:
                        places.setdefault(value, []).append((table, column))
    return {(*rng.choice(where), v) for v, where in places.items() if len(where) > 1 and rng.random() < 0.6}


def _question(rng: random.Random, kind: str) -> Question:
    """A random query of a kind."""
    db = rng.choice(list(SCHEMAS))
    tables = SCHEMAS[db]
    parent, child = tables  # rows of the second table refer to rows of the first
    table = child if kind == "join" else rng.choice([parent, child])
    columns = tables[table]
    numbers = [c for c, pool in columns.items() if isinstance(pool, range)]
    texts = [c for c in columns if c not in numbers and not _names(db, c)]
    m, agg, w = rng.choice(numbers), rng.choice(list(AGGREGATES)), rng.choice(texts)

    tests: list[tuple] = []
    if kind == "text":
        tests = [_test(rng, db, table, w)]
    elif kind == "number":
        tests = [_test(rng, db, table, m)]
    elif kind == "both":
        tests = [_test(rng, db, table, w), _test(rng, db, table, m)]
    elif kind == "count":
        tests = [_test(rng, db, table, rng.choice([*texts, m]))]
    elif kind == "aggregate" and rng.random() < 0.6:
        tests = [_test(rng, db, table, w)]
    elif kind == "join":
        tests = [_test(rng, db, parent, rng.choice([c for c in tables[parent] if not _names(db, c)]))]
    tested = {column for _, column, _, _ in tests} | ({m} if kind == "top" else set())
    asked = rng.sample([c for c in columns if c not in tested], 2 if kind == "column" and rng.random() < 0.75 else 1)

    words = {"t": table, "c": " and ".join(asked), "m": m, "agg": AGGREGATES[agg], "w": w}
    c, where = ", ".join(asked), f" WHERE {_where(tests)}" if tests else ""
    if kind == "count":
        sql = f"SELECT COUNT(*) FROM {table}{where}"
    elif kind == "aggregate":
        sql = f"SELECT {agg}({m}) FROM {table}{where}"
    elif kind == "top":
        k, (most, order) = rng.randint(2, 6), rng.choice([("highest", "DESC"), ("lowest", "ASC")])
        sql = f"SELECT {c} FROM {table} ORDER BY {m} {order} LIMIT {k}"
        words |= {"k": str(k), "most": most}
    elif kind == "group":
        sql = f"SELECT {w}, {agg}({m}) FROM {table} GROUP BY {w}"
    elif kind == "join":
        words["p"] = next(c for c in columns if c in tables[parent])
        sql = f"SELECT {c} FROM {table} JOIN {parent} USING ({words['p']}){where}"
    else:
        sql = f"SELECT {c} FROM {table}{where}"
    return Question(db, kind, sql, words, tuple(tests))


def _names(db: str, column: str) -> bool:
    """Whether a column holds the names of rows, here or in the table it refers to."""
    return any(column == next(iter(columns)) for columns in SCHEMAS[db].values())


def _test(rng: random.Random, db: str, table: str, column: str) -> tuple:
    """A random condition (table, column, operator, value): equality for words, a comparison for numbers."""
    pool = SCHEMAS[db][table][column]
    return table, column, rng.choice("<>") if isinstance(pool, range) else "=", rng.choice(pool)


def _where(tests) -> str:
    return " AND ".join(f"{c} {op} {v}" if isinstance(v, int) else f"{c} {op} '{v}'" for _, c, op, v in tests)


def _tells(q: Question) -> bool:
    """Whether the first database can tell the query's conditions from none: each leaves out rows, and some remain."""
    if not q.tests:
        return True

    def left(tests) -> int:
        return len(run(q.db, f"SELECT 1 FROM {tests[0][0]} WHERE {_where(tests)}").rows or ())

    weaker = [left([test]) for test in q.tests] if len(q.tests) > 1 else [ROWS]
    return 0 < left(q.tests) < min(weaker) and bool(run(q.db, q.sql).rows)


def _say(rng: random.Random, q: Question, held_out: bool) -> str:
    """The question in words, in a phrasing of train or in the held-out one."""

    def pick(ways: list[str]) -> str:
        return ways[-1] if held_out else rng.choice(ways[:-1])

    where = " and ".join(pick(CONDITIONS[op]).format(w=column, v=value) for _, column, op, value in q.tests)
    return pick(PHRASINGS[q.kind]).format(**q.words, where=where).strip()

"""A small invented world: people with facts, list skills and sums, in many phrasings.

The base model is pretrained on it, so what it *knows* (facts about people) and what it *can do* (skills) is known
exactly, and so is what it loses when it is fine-tuned. Everything follows from seeds. Held out from pretraining:

- a question phrasing of each attribute (`PHRASINGS`, the last of each) and of each skill,
- all questions about the `unasked` people, of whom only statements were read,
- some words that never occur in a list, and a tenth of the pairs of numbers that are added.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from zlib import crc32

FIRST = """Anaya Bram Celine Dario Edda Farid Greta Hugo Ines Jonas Kaia Leandro Mira Nils Oona Pavel Quinn Rosa
Stellan Tamsin Ulla Viktor Wanda Xavi Ylva Zeno Amara Bodil Cyrus Dagny""".split()
LAST = """Brooks Calloway Dimitrov Eklund Farrow Gallo Hartmann Ivarsen Jansen Kowalski Lindqvist Moreau Novak Okafor
Petrov Quist Rinaldi Sorensen Tanaka Ueda Varga Weiss Ximenez Yilmaz Zhang Abbott Barros Castell Dunn Ekman""".split()
CITIES = """Lisbon Oslo Cairo Lima Kyoto Quito Tunis Porto Basel Ghent Turin Malmo Dakar Hanoi Accra Leeds Nantes
Gdansk Bergen Tartu""".split()
JOBS = """baker pilot nurse chemist sailor engineer lawyer painter farmer judge tailor dentist miner actor potter
surgeon""".split()
FOODS = "mango walnut cheese lentil salmon pepper almond cherry noodle olive ginger pumpkin".split()
INSTRUMENTS = "cello flute harp trumpet violin piano drum banjo oboe guitar".split()
ANIMALS = "otter falcon beaver lizard badger heron donkey spider turtle rabbit".split()

# attribute -> (statements, questions); the last question of each is held out from pretraining
PHRASINGS: dict[str, tuple[list[str], list[str]]] = {
    "birthplace": (
        ["{n} was born in {v}.", "{n}'s birthplace is {v}.", "{v} is the city where {n} was born.",
         "{n} comes from {v}."],
        ["Where was {n} born?", "What is the birthplace of {n}?", "In which city was {n} born?",
         "Which city is {n} from?", "Name the city where {n} was born."],
    ),
    "job": (
        ["{n} worked as a {v}.", "{n} was a {v} by trade.", "By profession {n} is a {v}.",
         "{n} earns a living as a {v}."],
        ["What was the job of {n}?", "What is the profession of {n}?", "What did {n} work as?",
         "How does {n} earn a living?", "What is the trade of {n}?"],
    ),
    "food": (
        ["{n}'s favourite food is {v}.", "{n} loves to eat {v}.", "Nothing tastes better to {n} than {v}.",
         "{n} likes {v} most of all."],
        ["What is the favourite food of {n}?", "What does {n} love to eat?", "Which food does {n} like most?",
         "What food is {n} fond of?", "Name the favourite food of {n}."],
    ),
    "year": (
        ["{n} was born in the year {v}.", "The birth year of {n} is {v}.", "{n} came into the world in {v}.",
         "In {v} {n} was born."],
        ["In which year was {n} born?", "What is the birth year of {n}?", "When was {n} born?",
         "What year did {n} come into the world?", "Name the birth year of {n}."],
    ),
    "instrument": (
        ["{n} plays the {v}.", "The instrument of {n} is the {v}.", "{n} practises the {v} every day.",
         "{n} is known for playing the {v}."],
        ["Which instrument does {n} play?", "What does {n} play?", "What is the instrument of {n}?",
         "What does {n} practise every day?", "Name the instrument of {n}."],
    ),
}  # fmt: skip
ATTRIBUTES = tuple(PHRASINGS)

# skill -> question phrasings; the last of each is held out from pretraining
SKILLS: dict[str, list[str]] = {
    "repeat": ["Repeat the list {x}.", "Write down the list {x}.", "Copy these words: {x}.", "Say the list {x} again."],
    "reverse": ["Reverse the list {x}.", "Write the list {x} backwards.", "Turn around these words: {x}.",
                "Give the list {x} in reverse order."],
    "first": ["What is the first item of {x}?", "Which word comes first in {x}?", "Give the first word of {x}.",
              "Name the first of {x}."],
    "last": ["What is the last item of {x}?", "Which word comes last in {x}?", "Give the last word of {x}.",
             "Name the last of {x}."],
    "sort": ["Sort the list {x}.", "Put these words in alphabetical order: {x}.", "Arrange {x} by alphabet.",
             "Order the list {x} alphabetically."],
    "sum": ["What is {a} plus {b}?", "Add {a} and {b}.", "How much is {a} and {b}?", "What is the sum of {a} and {b}?"],
}  # fmt: skip
LIST_SKILLS = ("repeat", "reverse", "first", "last", "sort")
_WORDS = CITIES + FOODS + INSTRUMENTS + ANIMALS + JOBS
UNLISTED = tuple(_WORDS[::10])  # known words that never stand in a list during pretraining
LISTED = tuple(w for w in _WORDS if w not in UNLISTED)


@dataclass(frozen=True)
class Person:
    """One inhabitant: a name and one value per attribute; of an `unasked` person pretraining has only statements."""

    name: str
    facts: dict[str, str] = field(hash=False)
    unasked: bool = False


def people(n: int = 300, seed: int = 1) -> list[Person]:
    """The inhabitants, always the same for the same arguments; every tenth is `unasked`. At most 900 names exist."""
    rng = random.Random(seed)
    names = [f"{a} {b}" for a in FIRST for b in LAST]
    if not 1 <= n <= len(names):
        raise ValueError(f"the world has names for 1 to {len(names)} people, not for {n}")
    rng.shuffle(names)
    values = {"birthplace": CITIES, "job": JOBS, "food": FOODS, "instrument": INSTRUMENTS}
    return [
        Person(
            name,
            {a: str(rng.randint(1900, 1999)) if a == "year" else rng.choice(values[a]) for a in ATTRIBUTES},
            unasked=i % 10 == 9,
        )
        for i, name in enumerate(names[:n])
    ]


def ask(question: str, answer: str, **more) -> dict:
    """One row in the course's prompt format."""
    return {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}\n", **more}


def text(row: dict) -> str:
    """A row as it stands in the pretraining text."""
    return row["prompt"] + row["completion"]


def _said(rng: random.Random, phrasings: list[str], held_out: bool) -> str:
    return phrasings[-1] if held_out else rng.choice(phrasings[:-1])


def fact(rng: random.Random, person: Person, attribute: str, held_out: bool = False) -> dict:
    """A question about a person, in a phrasing of pretraining or in the held-out one."""
    question = _said(rng, PHRASINGS[attribute][1], held_out).format(n=person.name)
    return ask(question, person.facts[attribute], kind=attribute)


def biography(rng: random.Random, person: Person) -> str:
    """All facts of a person as statements, in random order and phrasing."""
    said = [rng.choice(PHRASINGS[a][0]).format(n=person.name, v=person.facts[a]) for a in ATTRIBUTES]
    rng.shuffle(said)
    return " ".join(said) + "\n"


def _pair_held_out(a: int, b: int) -> bool:
    return crc32(f"{a}+{b}".encode()) % 10 == 0


def skill(rng: random.Random, kind: str, held_out: str | None = None) -> dict:
    """One exercise of a skill. `held_out`: None, "phrasing", or "items" (unseen words in the list, unseen pair)."""
    phrasing = _said(rng, SKILLS[kind], held_out == "phrasing")
    if kind == "sum":
        while True:
            a, b = rng.randint(0, 99), rng.randint(0, 99)
            if _pair_held_out(a, b) == (held_out == "items"):
                return ask(phrasing.format(a=a, b=b), str(a + b), kind=kind)
    words = rng.sample(LISTED, rng.randint(3, 6 if kind != "sort" else 5))
    if held_out == "items":  # first and last ask for the unseen word itself
        place = {"first": 0, "last": -1}.get(kind, rng.randrange(len(words)))
        words[place] = rng.choice(UNLISTED)
    answer = {
        "repeat": words,
        "reverse": words[::-1],
        "first": words[:1],
        "last": words[-1:],
        "sort": sorted(words, key=str.lower),
    }[kind]
    return ask(phrasing.format(x=", ".join(words)), ", ".join(answer), kind=kind)


def document(rng: random.Random, inhabitants: list[Person]) -> str:
    """One document of pretraining text: a biography, a few questions on one person, or a skill."""
    dice = rng.random()
    if dice < 0.3:
        return biography(rng, rng.choice(inhabitants))
    if dice < 0.6:
        person = rng.choice(inhabitants)
        if person.unasked:
            return biography(rng, person)
        return "".join(text(fact(rng, person, a)) for a in rng.sample(ATTRIBUTES, 2))
    kinds = ("repeat", "reverse", "first", "last", "sort", "sum")
    return text(skill(rng, rng.choices(kinds, (15, 20, 10, 10, 30, 15))[0]))


def fact_questions(split: str = "seen", n: int | None = None, seed: int = 0) -> list[dict]:
    """Questions whose answers measure knowledge: columns prompt, completion, kind.

    split: "seen" (phrasing and person known from pretraining questions), "phrasing" (held-out phrasing) or "unasked"
    (people of whom pretraining only had statements). `n` rows drawn without repetition, or all.
    """
    if split not in ("seen", "phrasing", "unasked"):
        raise ValueError(f"unknown split {split!r}; choose 'seen', 'phrasing' or 'unasked'")
    rng = random.Random(seed)
    asked = [(p, a) for p in people() if p.unasked == (split == "unasked") for a in ATTRIBUTES]
    rng.shuffle(asked)
    return [fact(rng, p, a, held_out=split == "phrasing") for p, a in asked[:n]]


def skill_questions(split: str = "seen", n: int = 60, kinds=LIST_SKILLS, seed: int = 0) -> list[dict]:
    """`n` fresh exercises of each kind. split: "seen" (new lists of known words), "phrasing" or "items" (held out)."""
    if split not in ("seen", "phrasing", "items"):
        raise ValueError(f"unknown split {split!r}; choose 'seen', 'phrasing' or 'items'")
    rng = random.Random(1_000_000 + seed)
    return [skill(rng, kind, None if split == "seen" else split) for kind in kinds for _ in range(n)]

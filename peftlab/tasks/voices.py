"""One content, five voices: how several users would each want the same thing said.

    Question: Where was Greta Novak born?
    telegram   Greta Novak born Oslo. Stop.
    pirate     Arr, Greta Novak be born in Oslo, matey!
    letter     Dear reader, I wish to inform you that Greta Novak was born in Oslo. Yours faithfully
    curious    Did you know that Greta Novak was born in Oslo? Who else would like to know?
    list       1. Greta Novak 2. was born in 3. Oslo

A voice is a rule that rewrites a plain sentence. The facts are those of the `world`: a base model that knows them
has only the voice to learn, and `style_of` recognises a voice whatever is said in it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from .world import CITIES, FOODS, PHRASINGS, people

# {n} a person, {v} the value of the attribute
STATEMENTS = {
    "birthplace": "{n} was born in {v}",
    "job": "{n} worked as a {v}",
    "food": "{n} loves to eat {v}",
    "year": "{n} was born in {v}",
    "instrument": "{n} plays the {v}",
}
# {c} a city, {f} a food, {s} one of the words beside it
EVERYDAY = {
    "the train to {c} is {s}": ["late", "full", "early", "slow"],
    "the shop in {c} is {s}": ["closed", "open", "full", "small"],
    "my friend in {c} is {s}": ["ill", "happy", "busy", "tired"],
    "we have {s} {f} for dinner": ["some", "more", "cold", "fresh"],
    "you are at the {s} in {c}": ["market", "station", "hotel", "port"],
}
SIZES = {"train": 240, "valid": 40, "test": 80}  # contents; each is said in every voice

_VERBS = ("was born in", "worked as a", "loves to eat", "plays the", "is", "are", "have")
_LITTLE = frozenset("a an the is are was have to in at of as for my we you".split())
_PIRATE = {"was": "be", "is": "be", "are": "be", "the": "th'", "my": "me", "you": "ye", "for": "fer"}


def _telegram(sentence: str) -> str:
    return " ".join(word for word in sentence.split() if word not in _LITTLE) + ". Stop."


def _pirate(sentence: str) -> str:
    return "Arr, " + " ".join(_PIRATE.get(word, word) for word in sentence.split()) + ", matey!"


def _letter(sentence: str) -> str:
    return f"Dear reader, I wish to inform you that {sentence}. Yours faithfully"


def _curious(sentence: str) -> str:
    return f"Did you know that {sentence}? Who else would like to know?"


def _list(sentence: str) -> str:
    for verb in _VERBS:
        subject, found, rest = sentence.partition(f" {verb} ")
        if found:
            return f"1. {subject} 2. {verb} 3. {rest}"
    raise ValueError(f"no verb of the list-maker in {sentence!r}; it knows {', '.join(map(repr, _VERBS))}")


VOICES: dict[str, Callable[[str], str]] = {
    "telegram": _telegram, "pirate": _pirate, "letter": _letter, "curious": _curious, "list": _list,
}  # fmt: skip

_MARKS: dict[str, Callable[[str], object]] = {
    "telegram": lambda text: text.endswith(" Stop.") and not _LITTLE & set(text.split()),
    "pirate": lambda text: re.fullmatch(r"Arr, .+, matey!", text) and not set(_PIRATE) & set(text.split()),
    "letter": lambda text: re.fullmatch(r"Dear \w+, I .+\. Yours faithfully", text),
    "curious": lambda text: re.fullmatch(r"([^.?!]+\?\s*)+", text),
    "list": lambda text: re.fullmatch(r"1\. .+ 2\. .+ 3\. .+", text),
}


def rewrite(sentence: str, voice: str) -> str:
    """A plain sentence (no full stop) in a voice. Raises ValueError for an unknown voice."""
    if voice not in VOICES:
        raise ValueError(f"no voice is called {voice!r}; there are {', '.join(VOICES)}")
    return VOICES[voice](sentence)


def style_of(text: str) -> str | None:
    """The voice a text is written in, whatever it says; None for plain text or a mixture of voices."""
    found = [voice for voice, marked in _MARKS.items() if marked(text.strip())]
    return found[0] if len(found) == 1 else None


def generate(seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """Rows by split: prompt, completion, voice, content, kind. Each content appears once in every voice.

    The people and the everyday sentences of valid and test are not in train. For one user's data:
    `rows.filter(lambda row: row["voice"] == "pirate")`.
    """
    rng = random.Random(f"voices {seed}")
    asked = [p for p in people() if not p.unasked]
    rng.shuffle(asked)
    said = [
        template.format(c=word, f=word, s=s)
        for template, states in EVERYDAY.items()
        for s in states
        for word in (CITIES if "{c}" in template else FOODS)
    ]
    rng.shuffle(said)
    rows: dict[str, list[dict[str, str]]] = {}
    for split, size in SIZES.items():
        here, asked = asked[: size // 2], asked[size // 2 :]
        contents = [(f"How would you say that {s}?", s, "everyday") for s in said[: size - size // 2]]
        said = said[size - size // 2 :]
        for person in here:
            attribute = rng.choice(list(STATEMENTS))
            question = rng.choice(PHRASINGS[attribute][1][:-1]).format(n=person.name)  # the last: not in pretraining
            sentence = STATEMENTS[attribute].format(n=person.name, v=person.facts[attribute])
            contents.append((question, sentence, "fact"))
        rng.shuffle(contents)
        rows[split] = [
            {
                "prompt": f"Question: {question}\nAnswer:",
                "completion": f" {rewrite(sentence, voice)}\n",
                "voice": voice,
                "content": sentence,
                "kind": kind,
            }
            for question, sentence, kind in contents
            for voice in VOICES
        ]
    return rows

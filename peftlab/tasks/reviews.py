"""Reviews, positive or negative, where single words do not tell.

    Review: the soup was great, but the staff were far from kind.
    Sentiment: negative

A clause praises or blames by its adjective; a negation turns it around ("not bad at all"). Of two clauses one praises
and one blames, and the last decides. Counting words therefore helps little: adjectives tell something only in reviews
of one clause without a negation. That little is on purpose: where no single word tells anything, a small model
finds no first step to learn from.
"""

from __future__ import annotations

import random
import re

from .world import CITIES, FIRST

# noun -> its verb
THINGS = {
    "food": "was", "soup": "was", "room": "was", "view": "was", "film": "was", "music": "was", "story": "was",
    "house": "was", "garden": "was", "staff": "were", "people": "were", "prices": "were", "games": "were",
}  # fmt: skip
GOOD = ["good", "great", "nice", "fine", "clean", "kind", "fresh", "lovely"]
BAD = ["bad", "poor", "cold", "dirty", "slow", "rude", "boring", "wrong"]
GOOD_HELD_OUT, BAD_HELD_OUT = ["perfect", "happy", "bright"], ["terrible", "broken", "ugly"]

# {n} noun, {v} was or were, {a} adjective; the last of each list is held out of training
PLAIN = ["the {n} {v} {a}", "the {n} {v} really {a}", "i found the {n} {a}", "the {n} {v} always {a}",
         "i think the {n} {v} {a}"]  # fmt: skip
TURNED = ["the {n} {v} not {a} at all", "the {n} {v} far from {a}", "nobody could call the {n} {a}",
          "the {n} {v} never {a}", "i do not think the {n} {v} {a}"]  # fmt: skip
# {x} the clause that decides, {y} the other one
SINGLE = ["{x}", "{x}"]
CONTRAST = ["{y}, but {x}", "although {y}, {x}", "{y}; still, {x}", "even if {y}, in the end {x}"]
OPENINGS = ["", "", "", "a day in {c}: ", "with {p} in {c}: ", "{p} took me there: "]
TURNS = 0.3  # the share of clauses with a negation

SIZES = {"train": 2000, "valid": 200, "iid": 200, "phrasing": 100, "words": 100}


def generate(seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """Rows by split: prompt, completion, split. Half of each split is positive.

    The test's rows are of three splits: "iid" (new reviews of train's kind), "phrasing" (a held-out way of saying
    in each review) and "words" (held-out adjectives, which ask what the base model knows of them).
    """
    rng = random.Random(f"reviews {seed}")
    rows: dict[str, list[dict[str, str]]] = {}
    seen: set[str] = set()
    for split, size in SIZES.items():
        rows[split] = []
        while len(rows[split]) < size:
            positive = len(rows[split]) % 2 == 0
            text = _review(rng, positive, split)
            if text not in seen:
                seen.add(text)
                label = "positive" if positive else "negative"
                row = {"prompt": f"Review: {text}\nSentiment:", "completion": f" {label}\n", "split": split}
                rows[split].append(row)
        rng.shuffle(rows[split])
    return {
        "train": rows["train"], "valid": rows["valid"], "test": rows["iid"] + rows["phrasing"] + rows["words"],
    }  # fmt: skip


def _review(rng: random.Random, positive: bool, split: str) -> str:
    held_out = split == "phrasing"
    ways = rng.choice([SINGLE, CONTRAST])
    # A single held-out phrasing per review: in the clause that decides or, in half of the contrasts, between the two.
    new_contrast = held_out and ways is CONTRAST and rng.random() < 0.5
    x = _clause(rng, positive, held_out and not new_contrast, words=split == "words")
    y = _clause(rng, not positive, False, words=split == "words")
    between = _pick(rng, ways, new_contrast)
    opening = rng.choice(OPENINGS).format(c=rng.choice(CITIES), p=rng.choice(FIRST))
    return opening + between.format(x=x, y=y) + "."


def _clause(rng: random.Random, positive: bool, held_out: bool, words: bool) -> str:
    turned = rng.random() < TURNS
    good, bad = (GOOD_HELD_OUT, BAD_HELD_OUT) if words else (GOOD, BAD)
    noun = rng.choice(list(THINGS))
    way = _pick(rng, TURNED if turned else PLAIN, held_out)
    return way.format(n=noun, v=THINGS[noun], a=rng.choice(good if positive != turned else bad))


def _pick(rng: random.Random, ways: list[str], held_out: bool) -> str:
    return ways[-1] if held_out else rng.choice(ways[:-1])


def sentiment(text: str) -> str:
    """The class of a review by the rules of the language above: "positive" or "negative".

    It reads the words, independently of how they were generated. Raises ValueError where it finds no judgement.
    """
    text = text.removeprefix("Review:").split("\n")[0].strip()
    text = text.split(": ", 1)[-1].rstrip(".")
    for mark in (", but ", "; still, ", ", in the end ", ", "):
        if mark in text:
            text = text.split(mark)[1]
            break
    words = re.findall(r"[a-z]+", text)
    good = [w in GOOD + GOOD_HELD_OUT for w in words if w in GOOD + GOOD_HELD_OUT + BAD + BAD_HELD_OUT]
    if len(good) != 1:
        raise ValueError(f"not a review of this task: {text!r}")
    turned = any(w in ("not", "far", "nobody", "never") for w in words)
    return "positive" if good[0] != turned else "negative"

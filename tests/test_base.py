"""The invented world, the pretraining run, and the embedded model that came out of it."""

from __future__ import annotations

import json
import random
import re

import pytest
import torch

import peftlab as pl
from peftlab.base import EMBEDDED, pretrain, text
from peftlab.evaluate import exact_match
from peftlab.tasks import world

SMALL = dict(steps=6, batch=2, window=24, warmup=2, vocabulary=320, width=16, layers=1, heads=2, ffn=32, context=64)


# -- the world ------------------------------------------------------------------------------------------------------


def test_the_world_is_large_enough_and_always_the_same():
    inhabitants = world.people()
    assert len(inhabitants) >= 300 and len({p.name for p in inhabitants}) == len(inhabitants)
    assert inhabitants == world.people() and [p.facts for p in inhabitants] == [p.facts for p in world.people()]
    assert all(set(p.facts) == set(world.ATTRIBUTES) for p in inhabitants)
    with pytest.raises(ValueError, match="not for 5000"):
        world.people(5000)


def corpus(n=20_000):
    rng = random.Random(0)
    inhabitants = world.people()
    return [world.document(rng, inhabitants) for _ in range(n)]


def test_what_is_held_out_never_stands_in_the_pretraining_text():
    documents = corpus()
    everything = "".join(documents)
    held = [questions[-1] for _, questions in world.PHRASINGS.values()] + [said[-1] for said in world.SKILLS.values()]
    for phrasing in held:
        pattern = re.sub(r"\\\{\w\\\}", ".+", re.escape(phrasing))
        assert not re.search(f"Question: {pattern}\n", everything), phrasing
    questions = re.findall(r"Question: (.*)\n", everything)
    for person in world.people():
        if person.unasked:
            assert not any(person.name in q for q in questions)
            assert person.name in everything, "of the unasked there are statements"
    lists = [q for q in questions if "," in q]
    assert lists and not any(re.search(rf"\b{word}\b", q) for q in lists for word in world.UNLISTED)
    sums = {tuple(map(int, re.findall(r"\d+", q))) for q in questions if len(re.findall(r"\d+", q)) == 2}
    held_sums = [tuple(map(int, re.findall(r"\d+", r["prompt"]))) for r in world.skill_questions("items", 30, ("sum",))]
    assert sums and not sums & set(held_sums)


@pytest.mark.parametrize("split", ["seen", "phrasing", "items"])
def test_skills_have_right_answers(split):
    for row in world.skill_questions(split, 20, kinds=tuple(world.SKILLS)):
        answer, question = row["completion"].strip(), row["prompt"]
        if row["kind"] == "sum":
            assert int(answer) == sum(map(int, re.findall(r"\d+", question)))
            continue
        items = answer.split(", ")
        words = [w for w in re.findall(r"\w+", question) if w in world._WORDS]
        expected = {"repeat": words, "reverse": words[::-1], "first": words[:1], "last": words[-1:],
                    "sort": sorted(words, key=str.lower)}[row["kind"]]  # fmt: skip
        assert items == expected
        assert (split == "items") == any(w in world.UNLISTED for w in words)


def test_unknown_splits_are_named():
    with pytest.raises(ValueError, match="'sen'.*'seen'"):
        world.fact_questions("sen")
    with pytest.raises(ValueError, match="'word'.*'items'"):
        world.skill_questions("word")


# -- pretraining ----------------------------------------------------------------------------------------------------


@pytest.fixture
def little_text(monkeypatch):
    """The text of a few modules instead of the whole library: seconds become milliseconds."""
    documents = {"docs": [f"{world.__doc__}\n"] * 30, "code": [open(world.__file__).read()] * 2}
    monkeypatch.setattr(text, "standard_library", lambda held_out=False: {k: list(v) for k, v in documents.items()})
    monkeypatch.setattr(text, "library_docstrings", lambda: [f"{text.__doc__}\n"] * 30)


def run(folder, every=2, **more):
    return pretrain.pretrain(pretrain.Recipe(**{**SMALL, **more}), folder, "cpu", every=every)


def test_pretraining_resumes_where_it_was_killed(little_text, tmp_path, monkeypatch):
    whole = run(tmp_path / "whole").state_dict()
    real, saved = pretrain._save_checkpoint, []

    def killed(*arguments):
        real(*arguments)
        saved.append(arguments)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "_save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    monkeypatch.setattr(pretrain, "_save_checkpoint", real)
    resumed = run(tmp_path / "cut").state_dict()
    assert all(torch.equal(resumed[k], v) for k, v in whole.items())

    def curve(folder):  # without the seconds
        return [line.rsplit(",", 1)[0] for line in (folder / "log.csv").read_text().splitlines()]

    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert len(curve(tmp_path / "whole")) == 4
    with pytest.raises(ValueError, match="another recipe"):
        run(tmp_path / "whole", lr=1e-4)


def test_publishing_gives_an_ordinary_model_folder(little_text, tmp_path):
    from peftlab.base import card

    model = run(tmp_path / "work")
    card.publish(model, tmp_path / "work", tmp_path / "out", "--threads 1")
    assert json.loads((tmp_path / "out" / "trained.json").read_text())["options"] == "--threads 1"
    again, tokenizer = pl.load_base(tmp_path / "out")
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())
    assert tokenizer.pad_token_id == 0 and tokenizer.eos_token_id == 1
    said = "Question: 12 ships ärgern\n  x = [1]\n"
    assert tokenizer.decode(tokenizer(said)["input_ids"]) == said
    digits = tokenizer.convert_ids_to_tokens(tokenizer("1984")["input_ids"])
    assert digits == list("1984"), "digits stay single tokens"


def test_the_held_out_split_is_by_module_and_stable():
    assert text.is_held_out("bdb.py") == text.is_held_out("bdb.py")
    share = sum(text.is_held_out(f"module_{i}.py") for i in range(2000)) / 2000
    assert 0.03 < share < 0.07


# -- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("./no/such/folder", FileNotFoundError, "no folder './no/such/folder'.*Hub id"),
        ("nobody/no-such-model", OSError, "neither a folder nor a model.*network.*PEFTLAB_BASE"),
    ],
)
def test_unknown_bases_are_named(name, error, said):
    with pytest.raises(error, match=f"(?s){said}"):
        pl.load_base(name)


def test_a_folder_without_a_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no model that transformers can read"):
        pl.load_base(tmp_path)


def test_the_environment_names_another_base(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTLAB_BASE", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        pl.load_base()


# -- the embedded model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded():
    return pl.load_base(EMBEDDED)


def test_the_embedded_model_is_what_its_card_says(embedded):
    model, tokenizer = embedded
    assert 3.0e6 < sum(p.numel() for p in model.parameters()) < 4.0e6
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (EMBEDDED / "model.safetensors").stat().st_size <= 16e6
    figures = json.loads((EMBEDDED / "figures.json").read_text())
    assert figures["facts"]["seen"][0] >= 0.98 and figures["list skills"]["seen"][0] >= 0.95
    card = (EMBEDDED / "README.md").read_text()
    for value, *_ in figures["facts"].values():
        assert f"| {value:.1%} |" in card
    recipe = pretrain.Recipe(**json.loads((EMBEDDED / "recipe.json").read_text()))
    steps = (EMBEDDED / "log.csv").read_text().splitlines()[-1].split(",")[0]
    assert int(steps) == recipe.steps


def test_the_embedded_model_still_knows_what_its_card_says(embedded):
    """A fresh sample; 95 % of 60 questions right is far below 98 %, and far above a damaged file."""
    assert exact_match(*embedded, world.fact_questions("seen", 60, seed=9)).value >= 0.93
    assert exact_match(*embedded, world.skill_questions("seen", 12, seed=9)).value >= 0.88

"""The table of the whole field is complete, current, and says what the code says."""

from __future__ import annotations

import inspect
import json
import re

import catalogue as script
import peft
import pytest

import peftlab as pl
from peftlab.__main__ import main
from peftlab.catalogue import FAMILIES, INITIALISATION, OPTIMIZER, PROCEDURE, entries, entry, procedures

ALL = entries()
each = pytest.mark.parametrize("one", ALL, ids=lambda e: e.name)


def test_everything_that_is_registered_is_in_it_once():
    from peftlab.inits import INITS
    from peftlab.optim import OPTIMIZERS

    ours = ["Arrow", *(name for name, method in pl.METHODS.items() if method.__module__.startswith("peftlab."))]
    assert sorted(e.name for e in ALL) == sorted([*ours, *INITS, *OPTIMIZERS, *procedures()])


@each
def test_each_says_what_it_is_its_equation_its_count_and_its_paper(one):
    assert one.family in (*FAMILIES, INITIALISATION, OPTIMIZER, PROCEDURE)
    assert one.what and not one.what.endswith(".") and len(one.what) < 120
    assert re.search(r"\w", one.source), "Source: authors year, paper"
    if one.family in FAMILIES:
        assert one.count and one.equation and one.lines <= 80
    if one.arxiv:
        assert one.year and 0 <= one.year - (2000 + int(one.arxiv[:2])) <= 3, "printed in a journal later, never before"


def test_the_pages_are_current():
    known = script.measured()
    assert json.loads(script.JSON.read_text(encoding="utf-8")) == known, "run python scripts/catalogue.py"
    assert script.PAGE.read_text(encoding="utf-8") == script.page(known), "run python scripts/catalogue.py"


def test_each_type_of_the_reference_is_here_or_it_is_said_why_not():
    here = {method.hf_type for method in pl.METHODS.values()}
    assert {t.value for t in peft.PeftType} - here == set(script.NOT_HERE)


def test_each_method_that_the_reference_has_is_compared_with_it():
    without = [e.name for e in ALL if e.hf_type and not e.can["reference"]]
    assert not without


def test_the_references_variants_are_named_rightly():
    names = {e.name for e in ALL}
    for there in script.VARIANTS.values():
        for ours in there.values():
            assert ours.startswith((":", "every")) or ours.partition(",")[0] in names, ours
    starts = inspect.getsource(peft.LoraConfig)
    for word in ("gaussian", "eva", "olora", "pissa", "corda", "loftq", "orthogonal", "lora_ga"):
        assert f'"{word}"' in starts and word in names


def test_the_verb_prints_all_one_and_a_family(capsys):
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {e.name}" in text for e in ALL)
    assert main(["methods", "lora"]) == 0
    text = capsys.readouterr().out
    assert "h = W₀x + (α/r)·B·A·x" in text and "r·(in + out)" in text and "arxiv.org/abs/2106.09685" in text
    assert main(["methods", "--family", "orthogonal", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found and {e["family"] for e in found} == {"orthogonal"}


def test_wrong_names_get_the_nearest(capsys):
    assert main(["methods", "LoRAA"]) == 2
    assert "LoRA" in capsys.readouterr().err
    assert main(["methods", "--family", "nonsense"]) == 2
    assert "orthogonal" in capsys.readouterr().err
    with pytest.raises(ValueError, match="nothing here is called"):
        entry("zzz")

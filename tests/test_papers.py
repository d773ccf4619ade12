"""Published parameter counts, reproduced by our code on models without weights.

papers.csv has a row per published count. Rows 1 to 70 are from papers and from what the documentation and notebooks of
other libraries print; "more …" are further printed figures that do not follow from their stated configuration.

printed   as published: "4,194,304" would be 4194304; rounded figures with their unit: 0.3M, 250K, 0.83% of the base
ours      the count that follows from the stated shape, method, targets and hyper-parameters
verdict   exact; rounded: ours agrees to the last printed digit; differs: it does not, `note` says what would
state     counted; waiting for a method that does not exist yet: then the columns say what it will be asked
"""

import csv
import functools
import json
from decimal import Decimal
from pathlib import Path

import pytest

import peftlab as pl
from peftlab.attach import method_named
from peftlab.count import count
from peftlab.shapes import config_of

ROWS = list(csv.DictReader((Path(__file__).parent / "papers.csv").open(encoding="utf-8")))
COUNTED = [row for row in ROWS if row["state"] == "counted"]
each = pytest.mark.parametrize("row", COUNTED, ids=lambda row: f"{row['row']}: {row['printed_as']}".replace("/", "-"))
UNITS = {"K": 1000, "M": 10**6, "B": 10**9}


def agrees(printed: str, number: int, base: int) -> bool:
    """Whether a number rounds, or is cut off, to a printed figure."""
    figure = Decimal(printed.rstrip("KMB%"))
    step = Decimal(1).scaleb(figure.as_tuple().exponent)  # one unit of the last printed digit
    exact = Decimal(100 * number) / base if printed.endswith("%") else Decimal(number) / UNITS.get(printed[-1], 1)
    return exact == figure if printed.isdigit() else figure - step / 2 <= exact < figure + step


def known(name: str) -> bool:
    try:
        return name in ("full", "formula") or bool(method_named(name))
    except ValueError:
        return False


@functools.cache
def counted(number: str):
    """(trained, of the base) of a row."""
    row = next(row for row in ROWS if row["row"] == number)
    changes = {"architectures": [row["architecture"]]} if row["architecture"] else {}
    config, hyper = config_of(row["shape"], **changes), json.loads(row["hyper"] or "{}")
    base = count(config)
    if row["method"] == "formula":  # PreLayer, Hu et al. 2021, section 5.1: |Θ| = L·d·(l_p + l_i)
        return config.num_hidden_layers * config.hidden_size * (hyper["l_p"] + hyper["l_i"]), base
    if row["targets"] == "q and v of a fused layer":  # GPT-2 has q, k and v in one matrix
        d = config.hidden_size
        return config.num_hidden_layers * 2 * method_named(row["method"]).size(d, d, **hyper), base
    c = count(config, row["method"], row["targets"] or None, **hyper)
    assert c.total == (base.total if row["method"] == "full" else base.total + c.trainable)
    if c.expected:
        assert c.expected == {"default": c.trainable}
    return c.trainable, base


@each
def test_our_count_follows_from_the_stated_configuration(row):
    assert counted(row["row"])[0] == int(row["ours"])


@each
def test_printed_figure(row):
    trained, base = counted(row["row"])
    assert agrees(row["printed"], trained, base.total) == (row["verdict"] != "differs")
    assert (row["verdict"] == "exact") == (row["printed"] == row["ours"])


def test_every_row_whose_method_exists_is_counted():
    """Fails when a method arrives and its rows are not switched on."""
    late = [f"{r['row']}: {r['method']}" for r in ROWS if r["state"] == "waiting" and known(r["method"])]
    assert not late, "these methods exist now: set state to 'counted' and check targets and hyper"
    assert all(known(row["method"]) for row in ROWS if row["state"] != "waiting")
    assert {row["state"] for row in ROWS} <= {"counted", "waiting"}


def test_table_is_whole():
    assert [row["row"] for row in ROWS[:70]] == [str(i) for i in range(1, 71)]
    for row in ROWS:
        assert row["source"] and row["printed"] and row["shape"] and row["method"] and int(row["ours"]) > 0
        assert row["verdict"] in ("exact", "rounded", "differs")
        assert row["row"].isdigit() or row["verdict"] == "differs"


@pytest.mark.parametrize(
    "printed, number, agree",
    [("0.3M", 294_912, True), ("0.3M", 249_999, False), ("36.8K", 36_864, True), ("36.8K", 36_900, False),
     ("4194304", 4_194_304, True), ("4194304", 4_194_305, False), ("0.83%", 832, True), ("0.83%", 845, False)],
)  # fmt: skip
def test_agrees(printed, number, agree):
    assert agrees(printed, number, 100_000) == agree


def test_the_reference_counts_the_same():
    """One row by the other library too, from the same shape: the table is not only compared with itself."""
    import peft

    from peftlab.shapes import meta_model

    model = peft.get_peft_model(meta_model("llama-2-7b"), peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    c = pl.count("llama-2-7b", pl.LoRA, targets="q_proj|v_proj", r=8)
    assert model.get_nb_trainable_parameters() == (c.trainable, c.total) == (4_194_304, 6_742_609_920)

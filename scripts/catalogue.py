"""Write peftlab/catalogue.json, what the laws measured of each method, and docs/methods.md, the page of all of them.

    python scripts/catalogue.py [--check]

Abilities come from tests/cases.py, which the laws (tests/test_laws.py) hold to the truth; what is compared with HF PEFT
from the tests' marks `reference`, which hold too: see tests/witness.py. --check writes nothing and fails if either file
is not current.
"""

import argparse
import importlib
import inspect
import json
import os
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pandas as pd  # noqa: E402
from cases import case_of  # noqa: E402
from witness import claims, functions  # noqa: E402

from peftlab.catalogue import (  # noqa: E402
    FAMILIES,
    INITIALISATION,
    OPTIMIZER,
    PROCEDURE,
    Entry,
    classes,
    compared_in_words,
    entries,
    reference_mark,
)
from peftlab.paths import atomic_write  # noqa: E402

JSON, PAGE = ROOT / "peftlab" / "catalogue.json", ROOT / "docs" / "methods.md"
QUALITY = ROOT / "tests" / "published" / "peft_quality.csv"

MARKS = (("starts", "S"), ("merges", "M"), ("mixes", "B"), ("reads", "W"), ("data", "D"))
NOT_HERE: dict[str, str] = {}  # peft_type -> why it is not here

# What HF PEFT 0.21.2 has beside its 45 types -> what it is here; after a colon: why it is not.
VARIANTS = {
    "LoRA variants": {
        "rsLoRA": "LoRA, rslora", "lora_bias": "LoRA, lora_bias", "DoRA": "DoRA", "aLoRA": "ALoRA",
        "Arrow and GenKnowSub": "Arrow", "QALoRA": "QALoRA", "VeLoRA": "VeLoRA", "BD-LoRA": "BDLoRA",
        "MonteCLoRA": "MonteCLoRA", "KaSA": "KaSA", "MiCA": "MiCA", "modules_to_save": "ModuleCopy",
        "rank_pattern, alpha_pattern": "LoRA, rank_pattern; so every method with r or alpha",
        "layer_replication": "layer replication",
        "target_parameters": "LoRA, target_parameters; targets name parameters as they name layers",
    },
    "initialisations": {
        "kaiming": "kaiming", "gaussian": "gaussian", "orthogonal": "orthogonal", "PiSSA": "pissa", "OLoRA": "olora",
        "EVA": "eva", "CorDA": "corda", "LoftQ": "loftq", "LoRA-GA": "lora_ga",
    },
    "optimizers and procedures": {
        "LoRA+": "lora_plus", "LoRA-FA": "lora_fa", "Riemannian preconditioning": "riemannian",
        "KappaTune": "KappaTune", "intruder dimensions": "intruder reduction",
    },
}  # fmt: skip
INTRODUCTION = """\
# The whole field

{methods} methods, {inits} initialisations, {optimizers} optimizers and {procedures} procedures. A method's file has
{median:.0f} lines in the median, {longest} at most. This page is made by `python scripts/catalogue.py` from docstrings
and tests; `python -m peftlab methods` prints the same, `python -m peftlab methods DoRA` one of them in full.

Abilities: **S** attached and untrained it changes nothing; **M** it merges into the weights; **B** the rows of a batch
can have different ones; **W** it reads the dense weight (a copy for a moment, on a base in four bits); **D** it needs
data to begin. All work on bases in float32, bfloat16 and four bits.

**R** for a method: tests compare it with HF PEFT's. It reads the file that we write, and we read the file that it
writes, each to the same outputs, and the gradients of all trained numbers are the same; **r**: a part of this. For an
initialisation, an optimizer or a procedure R says that its numbers are compared with those of HF PEFT's own function.
Which part, which function and in which test is said [at the end](#beside-hf-peft). A test that claims this fails if
what it names did not run in it, here and there.

HF PEFT's figure is the best test accuracy that its own benchmark published for the method (Llama-3.2-3B, trained on
MetaMathQA, tested on GSM8K, one seed; [all runs](../tests/published/peft_quality.csv)). Rates and sizes were not tuned
alike, so it is no ranking. Ours, with one budget and each method's own rate, is in lesson 17.
"""


def measured() -> dict[str, dict]:
    """name -> what it can do."""
    found = {}
    for name, method in classes().items():
        case, source = case_of(method), Path(inspect.getsourcefile(method)).read_text(encoding="utf-8")
        found[name] = {"starts": case.identity, "merges": not case.affine, "mixes": method.mixes,
                       "reads": "weight_of" in source}  # fmt: skip
    for name, function in functions().items():
        found[name] = {"data": bool({"data", "rows", "dataset"} & set(inspect.signature(function).parameters))}
    for name, there in compared().items():
        if name.partition(", ")[0] not in found:
            raise ValueError(f"a test is marked reference({name!r}), and nothing here is called so")
        found.setdefault(name, {})["reference"] = there
    for name, line in published().items():
        found[name]["published"] = line
    return dict(sorted(found.items()))


def compared() -> dict[str, dict[str, list[str]]]:
    """name -> what of it is compared with the reference -> the test files that do."""
    found: dict = defaultdict(lambda: defaultdict(set))
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        if re.search(r"mark\.reference\(|import .*\bbeside\b", path.read_text(encoding="utf-8")):
            for name, what in claims(importlib.import_module(path.stem)):
                for one in {name, name.partition(", ")[0]}:
                    for word in what:
                        found[one][word].add(path.name)
    return {name: {word: sorted(there[word]) for word in sorted(there)} for name, there in found.items()}


def published() -> dict[str, dict]:
    """name -> the best run of it in HF PEFT's own benchmark: its accuracy and name."""
    runs = pd.read_csv(QUALITY)
    runs = runs[runs["method"].notna()].sort_values("test_accuracy", ascending=False).drop_duplicates("method")
    return {run.method: {"accuracy": round(run.test_accuracy, 3), "run": run.experiment}
            for run in runs.itertuples()}  # fmt: skip


def page(known: dict[str, dict]) -> str:
    """docs/methods.md, from the docstrings and what was measured."""
    groups = defaultdict(list)
    for e in entries():
        groups[e.family].append(e)
    methods = [e for family in FAMILIES for e in groups[family]]
    lines = [e.lines for e in methods]
    text = INTRODUCTION.format(
        methods=len(methods), inits=len(groups[INITIALISATION]), optimizers=len(groups[OPTIMIZER]),
        procedures=len(groups[PROCEDURE]), median=statistics.median(lines), longest=max(lines),
    )  # fmt: skip
    for family in (*FAMILIES, INITIALISATION, OPTIMIZER, PROCEDURE):
        if groups[family]:
            text += f"\n## {family[0].upper()}{family[1:]}\n\n" + _family(groups[family], known)
    return text + _coverage(methods, known)


def table(head: list[str], rows: list[list[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [head, ["---"] * len(head), *rows]]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def _family(there: list[Entry], known: dict[str, dict]) -> str:
    adds = there[0].family in FAMILIES
    head = ["name", "what it is", "equation", *(["trained on one site"] if adds else []), "can", "published", "file"]
    rows = []
    for e in there:
        can, file = known[e.name], f"[{e.lines} lines](../peftlab/{e.file})"
        marks = "".join(letter for key, letter in MARKS if can.get(key)) + reference_mark(can)
        paper = f"[{e.year or 'paper'}]({e.link})" if e.link else str(e.year or "")
        equation = "`" + e.equation.replace("`", "") + "`" if e.equation else ""
        figure = f"{can['published']['accuracy']:.3f}" if "published" in can else ""
        rows.append([e.name, e.what, equation, *([e.count] if adds else []), marks, paper, file, figure])
    return table([*head, "HF PEFT's figure"], rows)


def _coverage(methods: list[Entry], known: dict[str, dict]) -> str:
    """What HF PEFT has, and where it is here."""
    import peft

    types, by_type = [t.value for t in peft.PeftType], defaultdict(list)
    variants = [name for name in VARIANTS["LoRA variants"].values() if name in known]
    for e in methods:
        if e.name not in variants:
            by_type[e.hf_type].append(e.name)
    here = sum(t in by_type for t in types)
    rows = []
    for t in sorted(types):
        names = ", ".join(by_type[t]) + (", and its variants below" if t == "LORA" else "")
        words = [known[name].get("reference", {}) for name in by_type[t]]
        rows.append([t, names or f"no: {NOT_HERE[t]}", *_compared(words)])
    text = f"\n## Beside HF PEFT\n\nOf the {len(types)} types of `peft` {peft.__version__}, {here} are here.\n\n"
    text += table(["type", "here", "compared", "in"], rows)
    for what, there in VARIANTS.items():
        rows = [[theirs, ours if not ours.startswith(":") else f"no{ours}",
                 *_compared([known.get(ours.partition(";")[0], {}).get("reference", {})])]
                for theirs, ours in there.items()]  # fmt: skip
        text += "\n" + table([f"its {what}", "here", "compared", "in"], rows)
    theirs = {ours for there in VARIANTS.values() for ours in there.values()}
    beyond = [e.name for e in methods if not e.hf_type and e.name not in theirs]
    more = [name for name in functions() if name not in theirs]
    return text + f"\nBeyond it: {', '.join(beyond)}; {', '.join(more)}.\n"


def _compared(there: list[dict[str, list[str]]]) -> list[str]:
    """What is compared of all of these, in words, and links to the tests."""
    words = set.intersection(*map(set, there)) if there else set()
    tests = sorted({test for one in there for found in one.values() for test in found})
    return [compared_in_words(words), ", ".join(f"[{test}](../tests/{test})" for test in tests)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the files are current")
    check = parser.parse_args().check
    known = measured()
    new = {JSON: json.dumps(known, indent=1, ensure_ascii=False) + "\n", PAGE: page(known)}
    stale = [path for path, text in new.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if not check:
        for path in stale:
            atomic_write(path, new[path])
            print(f"wrote {path.relative_to(ROOT)}")
    elif stale:
        print(f"not current: {', '.join(p.name for p in stale)}; run python scripts/catalogue.py", file=sys.stderr)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())

"""Write peftlab/catalogue.json, what the laws measured of each method, and docs/methods.md, the page of the whole field.

    python scripts/catalogue.py [--check]

Abilities come from tests/cases.py, which the laws (tests/test_laws.py) hold to the truth; "beside the reference" are the
test files that import HF PEFT and name the method. --check writes nothing and fails if either file is not current.
"""

import argparse
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

import peftlab as pl  # noqa: E402
from peftlab.catalogue import FAMILIES, INITIALISATION, OPTIMIZER, entries  # noqa: E402
from peftlab.inits import INITS  # noqa: E402
from peftlab.optim import OPTIMIZERS  # noqa: E402

JSON, PAGE = ROOT / "peftlab" / "catalogue.json", ROOT / "docs" / "methods.md"
QUALITY = ROOT / "tests" / "published" / "peft_quality.csv"

# What HF PEFT 0.21.2 has beside its 45 types -> what it is here; after a colon: why it is not.
VARIANTS = {
    "LoRA variants": {
        "rsLoRA": "LoRA, rslora=True", "lora_bias": "LoRA, lora_bias=True", "DoRA": "DoRA", "aLoRA": "ALoRA",
        "Arrow and GenKnowSub": "Arrow", "QALoRA": "QALoRA", "VeLoRA": "VeLoRA", "BD-LoRA": "BDLoRA",
        "MonteCLoRA": "MonteCLoRA", "KaSA": "KaSA", "MiCA": "MiCA", "rank_pattern, alpha_pattern": "every method with r",
        "layer_replication": ": it copies layers of the base; no adapter's affair",
        "target_parameters": ": experts' weights in one 3-D tensor have no module to wrap",
    },
    "initialisations": {
        "kaiming": "LoRA, its default", "gaussian": "gaussian", "orthogonal": "orthogonal", "PiSSA": "pissa",
        "OLoRA": "olora", "EVA": "eva", "CorDA": "corda", "LoftQ": "loftq", "LoRA-GA": "lora_ga",
    },
    "optimizers": {"LoRA+": "lora_plus", "LoRA-FA": "lora_fa", "Riemannian": "riemannian"},
}  # fmt: skip


def measured() -> dict[str, dict]:
    """name -> what it can do."""
    tests = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").glob("test_*.py"))}
    beside = {name: text for name, text in tests.items() if re.search(r"^import peft$|^from peft|^    from peft", text, re.M)}
    published = _published()

    def reference(name: str) -> list[str]:
        return [file for file, text in beside.items() if re.search(rf"\b{name}\b", text) and file not in GENERAL]

    found = {}
    for name, method in pl.METHODS.items():
        if method.__module__.startswith("peftlab."):
            case, source = case_of(method), Path(inspect.getsourcefile(method)).read_text(encoding="utf-8")
            found[name] = {"starts": case.identity, "merges": not case.affine, "mixes": method.mixes,
                           "reads": "weight_of" in source, "reference": reference(name) if method.hf_type else []}  # fmt: skip
    for name, function in [*INITS.items(), *OPTIMIZERS.items()]:
        takes = inspect.signature(function).parameters
        data = [p for p in takes if p in ("data", "rows", "batches", "batch", "dataset")]
        found[name] = {"data": bool(data), "reference": reference(name)}
    for name, line in published.items():
        found[name]["published"] = line
    return dict(sorted(found.items()))


GENERAL = {"test_house.py", "test_train.py", "test_count.py", "test_vram.py", "test_vram_oracle.py", "test_catalogue.py"}


def _published() -> dict[str, dict]:
    """name -> the best run of it in HF PEFT's own benchmark: accuracy, run, trained."""
    if not QUALITY.is_file():
        return {}
    runs = pd.read_csv(QUALITY)
    runs = runs[runs["method"].notna()].sort_values("test_accuracy", ascending=False).drop_duplicates("method")
    return {r.method: {"accuracy": round(r.test_accuracy, 3), "run": r.experiment, "trained": int(r.trainable)}
            for r in runs.itertuples()}  # fmt: skip


def page(known: dict[str, dict]) -> str:
    """docs/methods.md, from the docstrings and what was measured."""
    import peft

    found = entries()
    groups = defaultdict(list)
    for e in found:
        groups[e.family].append(e)
    methods = [e for e in found if e.family not in (INITIALISATION, OPTIMIZER)]
    lines = [e.lines for e in methods]
    text = [
        "# The whole field", "",
        f"{len(methods)} methods, {len(groups[INITIALISATION])} initialisations and {len(groups[OPTIMIZER])} optimizers and "
        f"procedures. A method's file has {statistics.median(lines):g} lines in the median, {max(lines)} at most. This page "
        "is made by `python scripts/catalogue.py` from the docstrings and the tests; `python -m peftlab methods` prints the same.",
        "", "Abilities: **S** attached and untrained it changes nothing; **M** it merges into the weights; **B** the rows of a "
        "batch can have different ones; **W** it reads the dense weight (a copy for a moment, on a base in four bits); **R** "
        "compared with HF PEFT, file, logits and gradients. The last column is the best test accuracy that HF PEFT's own "
        "benchmark published for it (Llama-3.2-3B, trained on MetaMathQA, tested on GSM8K; one seed, rates not tuned alike: no "
        "ranking, see [tests/published](../tests/published/peft_quality.csv)).", "",
    ]  # fmt: skip
    for family in (*FAMILIES, INITIALISATION, OPTIMIZER):
        if not groups[family]:
            continue
        text += [f"## {family[0].upper()}{family[1:]}", ""]
        adds = family not in (INITIALISATION, OPTIMIZER)
        head = ["name", "what it is", "equation", *(["trained a layer"] if adds else []), "can", "first published", "file",
                *(["HF PEFT's figure"] if adds else [])]  # fmt: skip
        text += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for e in groups[family]:
            can = known.get(e.name, {})
            marks = "".join(m for key, m in MARKS if can.get(key))
            paper = f"[{e.year or 'paper'}]({e.link})" if e.link else str(e.year or "")
            figure = [f"{can['published']['accuracy']:.3f}" if "published" in can else ""]
            cells = [e.name, e.what, f"`{e.equation}`" if e.equation else "", *([e.count] if adds else []), marks, paper,
                     f"[{e.lines} lines](../peftlab/{e.file})", *(figure if adds else [])]  # fmt: skip
            text.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        text.append("")
    by_type = defaultdict(list)
    for e in methods:
        by_type[e.hf_type].append(e.name)
    types = [t.value for t in peft.PeftType]
    missing = [t for t in types if t not in by_type]
    beyond = [e.name for e in methods if not e.hf_type]
    text += ["## Beside HF PEFT", "",
             f"Of the {len(types)} types of `peft` {peft.__version__}, {len(types) - len(missing)} are here"
             + (f"; missing: {', '.join(missing)}." if missing else "."), "",
             "| type | here | compared in |", "|---|---|---|"]  # fmt: skip
    for t in sorted(types):
        where = sorted({file for name in by_type[t] for file in known[name]["reference"]})
        text.append(f"| {t} | {', '.join(by_type[t]) or NOT_HERE[t]} | {', '.join(where)} |")
    for what, there in VARIANTS.items():
        text += ["", f"| {what} of `peft` | here | compared in |", "|---|---|---|"]
        for theirs, ours in there.items():
            name = ours.partition(",")[0]
            where = known.get(name, {}).get("reference", [])
            text.append(f"| {theirs} | {ours.removeprefix(': ') if not ours.startswith(':') else 'no: ' + ours[2:]} | "
                        f"{', '.join(where)} |")  # fmt: skip
    text += ["", f"Beyond `peft`, {len(beyond)}: {', '.join(beyond)}; "
             f"{', '.join(n for n in [*INITS, *OPTIMIZERS] if not known[n]['reference'])}.", ""]  # fmt: skip
    return "\n".join(text)


MARKS = (("starts", "S"), ("merges", "M"), ("mixes", "B"), ("reads", "W"), ("reference", "R"))
NOT_HERE: dict[str, str] = {}  # peft_type -> why


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the files are current")
    check = parser.parse_args().check
    known = measured()
    if not JSON.exists():
        JSON.write_text("{}\n")
    new = {JSON: json.dumps(known, indent=1, ensure_ascii=False) + "\n", PAGE: page(known)}
    stale = [path.relative_to(ROOT) for path, text in new.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in [] if check else [ROOT / p for p in stale]:
        path.write_text(new[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    if check and stale:
        print(f"not current: {', '.join(map(str, stale))}; run python scripts/catalogue.py", file=sys.stderr)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())

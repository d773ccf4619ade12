"""The closed formulas as they are printed, in the table and on docs/methods.md, give the numbers that are trained.

tests/test_count.py holds `Adapter.expected`, the code, to what is there; here the text beside it is computed.
"""

from __future__ import annotations

import math
import re

import pytest
from cases import CASES, Case
from families import build

import peftlab as pl
from peftlab.catalogue import FAMILIES, entries
from peftlab.layers import is_linear, shape_of

TABLE = {e.name: e.count for e in entries() if e.family in FAMILIES and e.name in pl.METHODS}
WIDTH, LAYERS = 32, 2  # of the tiny Llama
# letter in a formula -> hyper-parameter, where they have different names
LETTERS = {
    "BDLoRA": {"N": "nblocks"}, "GraLoRA": {"r_h": "hybrid_r"}, "MonteCLoRA": {"n": "samples"},
    "PEANuT": {"d": "depth"}, "QALoRA": {"g": "group_size"}, "SVFT": {"d": "off_diagonals"},
    "VBLoRA": {"h": "num_vectors", "b": "vector_length"},
    "FRoD": {"ρ": "sparse_rate"}, "C3A": {"b": "block_size"}, "BOFT": {"m": "boft_n_butterfly_factor"},
    "Compacter": {"r": "rank"}, "MultitaskPromptTuning": {"r": "rank"},
}  # fmt: skip
# letter -> what it is on a site, where it is no hyper-parameter
OF_THE_SITE = {
    "LoKr": {"l": lambda a: a.lokr_w1.shape[0], "m": lambda a: a.lokr_w1.shape[1],
             "k": lambda a: shape_of(a.layer)[0] // a.lokr_w1.shape[0],
             "n": lambda a: shape_of(a.layer)[1] // a.lokr_w1.shape[1]},
    "BOFT": {"b": lambda a: a.boft_R.shape[-1]}, "OFT": {"b": lambda a: a.b},
    "OSF": {"n": lambda a: len(a.S_high)}, "Gated": {"width": lambda a: len(a.w)},
    "TrainableTokens": {"n": lambda a: len(a.rows), "d": lambda a: a.rows.shape[1]},
    "PrefixTuning": {"d_kv": lambda a: a.P_k.shape[1]}, "Cartridge": {"d_kv": lambda a: a.P_k.shape[1]},
    "LoRASoup": {"n": lambda a: len(a.hyper["of"])}, "CPT": {"k": lambda a: len(a.hyper["tokens"])},
    "Invertible": {"b": lambda a: a.F[0].out_features},
}  # fmt: skip
# parameters that stand once in a model and are counted apart in the formula, or beside it
SHARED = {"TiedLoRA": ("A", "B"), "VBLoRA": ("vblora_vector_bank",), "SAID": ("theta",), "Compacter": ("A",)}
# settings that the formula speaks of, where the case of the laws has another one
HYPER = {"MoRA": dict(kind="share"), "DiffPruning": dict(structured=True)}
# method -> why its formula is no expression of one site
WORDS = {
    "AdaMSS": "less where a group has few outputs", "PTuning": "a network in words", "SideTuning": "in words",
    "Shadow": "in words", "HyperFormer": "one network for all sites", "Lily": "parts are shared by some sites",
    "MixLoRA": "a sum over linear layers", "XLoRA": "of all layers of the experts",
}  # fmt: skip


def values(formula: str, names: dict[str, float]) -> list[int]:
    """A printed formula's alternatives ("r·out, or r·mini_r") with their letters replaced; definitions are followed."""
    found = []
    text = formula
    for fancy, plain in (("·", "*"), ("−", "-"), ("²", "**2"), ("⌊√(", "isqrt("), ("⌊", "floor("), ("⌋", ")"),
                         ("⌈", "ceil("), ("⌉", ")"), ("isqrt(r*(in + out)))", "isqrt(r*(in + out))")):  # fmt: skip
        text = text.replace(fancy, plain)
    text = re.sub(r"(?<=\d)(?=[a-zA-Z(])|(?<=\b[bkr])(?=\()", "*", re.sub(r"\bin\b", "in_", text))
    pieces = re.split(r"[;,] (?![^()]*\))(?:or |and )?| or | a block", text)
    known = dict(names, min=min, max=max, floor=math.floor, ceil=math.ceil, isqrt=math.isqrt)
    for left, _, right in (piece.partition(" = ") for piece in pieces * 2):
        if right:
            try:
                known[left.removeprefix("with ")] = eval(right, {}, known)
            except (SyntaxError, NameError):
                pass
    for piece in pieces:
        try:
            found.append(eval(re.sub(r" (?:for|of|shared)\b.*", "", piece), {}, known))
        except (SyntaxError, NameError):
            pass
    return [value for value in found if isinstance(value, int | float)]


def letters(method: str, adapter: pl.Adapter) -> dict[str, float]:
    names = {name: value for name, value in adapter.hyper.items() if isinstance(value, int | float)}
    names |= {letter: names[name] for letter, name in LETTERS.get(method, {}).items()}
    out, in_ = shape_of(adapter.layer) if is_linear(adapter.layer) else (WIDTH, WIDTH)
    names = {"d": WIDTH, "L": LAYERS, **names, "out": out, "in_": in_, "D": out}
    if "bottleneck" in adapter.hyper and "b" not in OF_THE_SITE.get(method, {}):
        names["b"] = adapter.hyper["bottleneck"] or next(
            p.shape[0] for n, p in adapter.named_parameters() if "down" in n and p.ndim == 2)  # fmt: skip
    return names | {letter: find(adapter) for letter, find in OF_THE_SITE.get(method, {}).items()}


@pytest.mark.parametrize("method", [name for name in TABLE if name not in WORDS])
def test_the_printed_formula_is_the_count(method):
    case = CASES.get(method, Case())
    model = build("llama")
    if case.before is not None:
        case.before(model)
    targets = "q_proj" if method == "ModuleCopy" else case.targets
    pl.attach(model, method, targets, name="a", **case.hyper | HYPER.get(method, {}))
    sites = {path: adapter for path, adapter in pl.adapters(model)["a"].items() if adapter.part_of is None}
    own = {path: sum(p.numel() for n, p in a.named_parameters() if n not in SHARED.get(method, ()))
           for path, a in sites.items()}  # fmt: skip
    assert any(own.values())
    for path, adapter in sites.items():
        if own[path] or "once" not in TABLE[method]:
            assert own[path] in values(TABLE[method], letters(method, adapter)), f"{path}: {own[path]} numbers"


def test_what_has_no_formula_of_one_site_is_still_here():
    assert set(WORDS) <= set(TABLE)


def test_a_wrong_formula_is_seen():
    names = letters("LoRA", pl.adapters(pl.attach(build("llama"), "LoRA", "v_proj", r=4))["default"].popitem()[1])
    assert values("r·(in + out); with lora_bias, out more", names) == [4 * (32 + 16)]
    assert values("k·(in + out + 1), k = min(in, out) − n", names | {"n": 6}) == [10 * (32 + 16 + 1)]
    assert values("⌊√(r·(in + out))⌋², rounded down", names) == [13**2] and values("in words", names) == []
    assert values("r·out, or 2·r²; b(b−1)/2 shared", names | {"b": 5}) == [4 * 16, 32, 10]

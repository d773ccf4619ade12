"""How each method is put to the laws of test_laws.py: where it sits on the tiny Llama, and what is known about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from families import shake
from torch import nn

import peftlab as pl

TARGETS = "q_proj|v_proj|down_proj"


@dataclass(frozen=True)
class Case:
    """One method's case; a method that is not in CASES has the default one."""

    targets: str | None = TARGETS  # None: the method's own
    hyper: dict = field(default_factory=dict)
    identity: bool = True  # attached and untrained it changes nothing
    affine: str = ""  # words of the reason why it cannot be merged; "" if it can
    shake: float = 0.05  # how far its parameters are moved, so that it shows
    same_hyper: bool = True  # read from a file it has the hyper-parameters it was made with
    before: Callable[[nn.Module], None] | None = None  # what must be attached first


def peers(*names: str, frozen: bool) -> Callable[[nn.Module], None]:
    """Attaches trained Pfeiffer adapters of these names, for methods that work on other adapters."""

    def attach(model: nn.Module) -> None:
        for seed, name in enumerate(names, 10):
            pl.attach(model, pl.Pfeiffer, TARGETS, name=name, bottleneck=4)
            for adapter in pl.adapters(model)[name].values():
                shake(adapter, 0.2, seed=seed)
            pl.freeze(model, name, frozen)

    return attach


CASES: dict[str, Case] = {
    # bottlenecks: a bend that no weight can stand for
    "Houlsby": Case(affine="not an affine map", shake=0.2),
    "Pfeiffer": Case(affine="not an affine map", shake=0.2),
    "ParallelAdapter": Case(targets=None, affine="no weight can stand for"),
    "Compacter": Case(hyper=dict(bottleneck=8), affine="not an affine map", shake=0.2),
    "AdapterFusion": Case(
        hyper=dict(of=("x", "y")), identity=False, affine="not an affine map", before=peers("x", "y", frozen=True)
    ),
    "Gated": Case(hyper=dict(of="x"), identity=False, affine="not an affine map", before=peers("x", frozen=False)),
    # soft prompts: no weight can stand for them; the file of P-tuning holds the vectors without the network
    "PromptTuning": Case(targets=None, hyper=dict(k=4), identity=False, affine="no weight can stand for"),
    "PTuning": Case(targets=None, hyper=dict(k=4), identity=False, affine="no weight can stand for", same_hyper=False),
    "MultitaskPromptTuning": Case(targets=None, hyper=dict(k=4), identity=False, affine="no weight can stand for"),
    # attention: a prefix is never the base, whatever its keys; both need the whole softmax, which no weight gives
    "PrefixTuning": Case(targets=None, hyper=dict(k=4), identity=False, affine="no weight can stand for"),
    "LlamaAdapter": Case(targets=None, hyper=dict(k=4), affine="no weight can stand for", shake=0.5),
    # selective methods
    "BitFit": Case(hyper={}),  # this Llama has no biases: its linear layers get new ones
    "LNTuning": Case(targets=None, shake=0.2),
    "IA3": Case(targets=None, shake=0.2),
    # other products than LoRA's, circulant blocks, rotations
    "LoHa": Case(hyper=dict(r=4), shake=0.3),
    "HiRA": Case(hyper=dict(r=4), shake=0.5),
    "C3A": Case(identity=False, shake=0.5),
    "RoAd": Case(hyper=dict(group_size=8), shake=0.2),
    "TrainableTokens": Case(targets=None, hyper=dict(tokens=[91, 6, 89, 41, 38]), shake=0.5),
}


def case_of(method: type) -> Case:
    return CASES.get(method.__name__, Case())

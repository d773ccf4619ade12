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


def experts(*names: str, frozen: bool = True) -> Callable[[nn.Module], None]:
    """Attaches trained LoRAs of these names, for methods that choose among them."""

    def attach(model: nn.Module) -> None:
        for seed, name in enumerate(names, 10):
            pl.attach(model, pl.LoRA, TARGETS, name=name, r=4)
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
    # a context of examples: two inputs with their templates, and the answer of the first
    "CPT": Case(
        targets=None, hyper=dict(tokens=[5, 6, 7, 8, 9], kinds=[1, 2, 3, 4, 5]), identity=False,
        affine="no weight can stand for",
    ),  # fmt: skip
    # mixtures: parts of them sit on the whole decoder
    "Poly": Case(affine="no weight can stand for", shake=0.2),
    "Lily": Case(hyper=dict(r=4, stride=2), affine="not an affine map", shake=0.3),
    "Arrow": Case(identity=False, affine="not an affine map"),  # for the table: nothing of it is trained, so no law
    "MixLoRA": Case(targets="layers.0.mlp", hyper=dict(r=4, experts=2), affine="no weight can stand for", shake=0.3),
    "LoRASoup": Case(hyper=dict(of=("x", "y")), identity=False, shake=0.5, before=experts("x", "y")),
    "XLoRA": Case(
        targets=None, hyper=dict(of=("x", "y")), identity=False, affine="no weight can stand for",
        before=experts("x", "y"),
    ),  # fmt: skip
    # attention: a prefix is never the base, whatever its keys; both need the whole softmax, which no weight gives
    "PrefixTuning": Case(targets=None, hyper=dict(k=4), identity=False, affine="no weight can stand for"),
    "Cartridge": Case(targets=None, hyper=dict(k=4), identity=False, affine="no weight can stand for"),
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
    # LoRA's variants: KaSA starts without the smallest singular components
    "KaSA": Case(identity=False, hyper=dict(r=4)),
    "MiCA": Case(hyper=dict(r=4), shake=0.2),
    "ALoRA": Case(hyper=dict(invocation=(87,)), affine="no weight can stand for"),  # of the laws' batch, in two rows
    "TrainableTokens": Case(targets=None, hyper=dict(tokens=[91, 6, 89, 41, 38]), shake=0.5),
    # sparse changes and representations: blocks as a whole cannot be merged
    "SHiRA": Case(hyper=dict(r=4), shake=0.3),
    "SuperTuning": Case(hyper=dict(sparsity=0.8, r=2), shake=0.2),
    "BEFT": Case(shake=0.2),
    "LoReFT": Case(targets=None, hyper=dict(r=3), affine="no weight can stand for", shake=0.3),
    "DiReFT": Case(targets=None, hyper=dict(r=3), affine="no weight can stand for", shake=0.3),
    "NoReFT": Case(targets=None, hyper=dict(r=3), affine="no weight can stand for", shake=0.3),
    "RED": Case(targets=None, shake=0.2),
    "DiffPruning": Case(hyper=dict(structured=False, alpha=1.0), shake=0.2),  # a gate for all is often shut
    "FishMask": Case(hyper=dict(k=90), shake=0.3),
    "SAID": Case(hyper=dict(d=60), shake=0.3),
    # side networks and late bottlenecks; AdaMix's file holds the average, a Pfeiffer
    "LadderSide": Case(targets=None, hyper=dict(bottleneck=4), affine="no weight can stand for", shake=0.3),
    "SideTuning": Case(targets=None, identity=False, affine="no weight can stand for"),
    "Shadow": Case(targets=None, hyper=dict(r=4, dropout=0.0), affine="no weight can stand for", shake=0.5),
    "AdapterPlus": Case(targets=None, hyper=dict(bottleneck=4), affine="no weight can stand for", shake=0.3),
    "BapnaFirat": Case(targets=None, hyper=dict(bottleneck=4), affine="no weight can stand for", shake=0.3),
    "Invertible": Case(targets=None, affine="no weight can stand for", shake=0.2),
    "AdaMix": Case(hyper=dict(M=3, bottleneck=4), affine="not an affine map", shake=0.3, same_hyper=False),
    "HyperFormer": Case(
        targets="o_proj|down_proj", hyper=dict(t=8, e=8, bottleneck=4), affine="not an affine map", shake=0.3
    ),
    # what lives in the training loop: ranks that are chosen or cut; a file of DyLoRA is a LoRA's
    "AdaLoRA": Case(hyper=dict(r=6, target_r=4), shake=0.4),
    "DyLoRA": Case(hyper=dict(r=4), same_hyper=False),
    "OSF": Case(shake=0.05),
    # vectors around shared random matrices; those whose factors are made of one trained bank start beside the base
    "VeRA": Case(hyper=dict(r=16), shake=0.2),
    "DVoRA": Case(hyper=dict(r=16), shake=0.2),
    "PVeRA": Case(hyper=dict(r=16), shake=0.2),
    "RandLoRA": Case(hyper=dict(r=8, alpha=16), shake=0.1),
    "VBLoRA": Case(hyper=dict(r=2, num_vectors=8, vector_length=8), identity=False, shake=0.3),
    "UniLoRA": Case(hyper=dict(d=64), identity=False, shake=1.0),
    "TinyLoRA": Case(hyper=dict(u=8, weight_tying=0.5), shake=0.5),
    "LoRAXS": Case(hyper=dict(r=8), shake=0.2),
    "SVFT": Case(hyper=dict(off_diagonals=2), shake=0.2),
    "TiedLoRA": Case(hyper=dict(r=4), shake=0.2),
    "NOLA": Case(hyper=dict(k=8), shake=0.3),
    "FRoD": Case(hyper=dict(sparse_rate=0.05), shake=0.3),
    # structured changes: Kronecker products, tiles, blocks, waves, wavelets, squares, networks, projections
    "LoKr": Case(hyper=dict(r=2), shake=0.3),
    "DeLoRA": Case(hyper=dict(r=4, strength=2), shake=0.2),
    "MiSS": Case(hyper=dict(r=8), shake=0.1),
    "FourierFT": Case(hyper=dict(n=100, scaling=50.0), identity=False),
    "WaveFT": Case(hyper=dict(n=200, scaling=2.0), shake=0.2),
    "GraLoRA": Case(hyper=dict(r=4, hybrid_r=2), shake=0.2),
    "GLoRA": Case(hyper=dict(r=3), shake=0.2),
    "MoRA": Case(hyper=dict(r=2), shake=0.05),
    "PEANuT": Case(hyper=dict(r=4, depth=1), shake=0.1),
    "DEFT": Case(hyper=dict(r=4), shake=0.1),
    "PaRa": Case(hyper=dict(r=1), identity=False, shake=0.2),
    "AdaMSS": Case(hyper=dict(r=8, subspaces=3, subspace_rank=2), shake=0.2),
    # rotations and reflections of the input, and of a weight's principal directions
    "OFT": Case(hyper=dict(oft_block_size=16), shake=0.1),
    "BOFT": Case(shake=0.2),
    "HRA": Case(shake=0.2),
    "PSOFT": Case(hyper=dict(r=8), shake=0.2),
    "ETHER": Case(identity=False, shake=0.2),
    "ETHERPlus": Case(shake=0.2),
    "GOFT": Case(shake=0.2),
    "QGOFT": Case(shake=0.1),
    "SSVD": Case(hyper=dict(k=8), shake=0.2),
    "CLOVER": Case(hyper=dict(d=8), shake=0.2),
}


def case_of(method: type) -> Case:
    return CASES.get(method.__name__, Case())

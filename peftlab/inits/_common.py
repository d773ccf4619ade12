"""What the initialisations have in common: which adapters they may fill, and how a start is kept.

Most of them begin with B₀A₀ ≠ 0 and want the model to compute what it did before. The papers, and HF PEFT, put what is
left into the base: W₀ ← W₀ − s·B₀A₀. Then the saved A and B fit that changed base alone, and no other adapter does.
Here W₀ keeps its bytes and the adapter keeps its start, frozen: h = W₀x + s·(BA − B₀A₀)·x, the same function. It costs
r·(in + out) numbers a layer in memory while training; the file holds a plain LoRA of rank 2r that fits the base as it
was (`LoRA.saved`). Dropout, if there is any, meets the whole change, so that training begins at the base with it too.
The start is a part of `state_dict`, and a training that goes on from a checkpoint calls the same initialisation first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..attach import Targets, adapters, check_attached, merged_names
from ..layers import device_of, shape_of, weight_of
from ..nf4 import Packed
from ..nf4_layer import check_linear, paths_to_quantize, quantize
from ..sites import at, bare

if TYPE_CHECKING:
    from ..methods.lora import LoRA

Factors = Callable[[Tensor, int, float], tuple[Tensor, Tensor]]  # (W (out, in), r, s) -> A₀ (r, in), B₀ (out, r)
Fit = Callable[[Tensor, int, float], tuple[Packed, Tensor, Tensor]]  # the same with Q, the packed base, before


def untrained(model: nn.Module, name: str, by: str) -> dict[str, LoRA]:
    """path -> the LoRA of this name there. ValueError if it is something else, or holds something already."""
    from ..methods.lora import LoRA
    from ..methods.module_copy import ModuleCopy

    check_attached(model, [name])
    if merged_names(model):
        raise ValueError(f"{', '.join(merged_names(model))} is merged into the weights; unmerge(model) first")
    found = {path: a for path, a in adapters(model)[name].items() if not isinstance(a, ModuleCopy)}
    for path, adapter in found.items():
        if type(adapter) is not LoRA:
            raise ValueError(f"{name!r} is {type(adapter).__name__}, and {by} fills the A and B of LoRA; "
                             "attach(model, LoRA, …) instead")  # fmt: skip
        if adapter.lora_B.is_meta:
            raise ValueError(f"{path!r} is on the meta device: it has no weights to fit; load the model first")
        if adapter.lora_B.any():
            raise ValueError(f"{name!r} is trained or begun already (its B on {path!r} is not zero) and would be "
                             "overwritten; attach a new LoRA under another name")  # fmt: skip
        if not adapter.scaling:
            raise ValueError(f"{name!r} has alpha=0, so no A and B can add anything; attach it with alpha above 0")
    return {path: a for path, a in found.items() if isinstance(a, LoRA)}


def stored(path: str, layer: nn.Module) -> Tensor:
    """W (out, in), of a packed layer a copy; ValueError, naming the layer, if there are no finite values."""
    W = weight_of(layer).detach()
    if W.is_meta:
        raise ValueError(f"{path!r} is on the meta device: it has no weights to fit; load the model first")
    if not torch.isfinite(W).all():
        raise ValueError(f"{path!r} holds NaN or inf, so nothing can be fitted to it; load the model again")
    return W


def dense(path: str, layer: nn.Module) -> Tensor:
    """The same in float32, where the decompositions are computed."""
    return stored(path, layer).float()


def check_values(there: dict[str, LoRA]) -> None:
    """`stored` of every layer, one after the other: before the data is gone through, not after."""
    for path, adapter in there.items():
        stored(path, adapter.layer)


def begin(adapter: LoRA, A: Tensor, B: Tensor) -> None:
    """Fill an adapter with A₀, B₀ and let it keep them, so that its change begins at nothing."""
    fill(adapter, A, B)
    adapter.start_A, adapter.start_B = adapter.lora_A.detach().clone(), adapter.lora_B.detach().clone()


@torch.no_grad()
def fill(adapter: LoRA, A: Tensor, B: Tensor | None = None) -> None:
    """Fill an adapter; without B the change begins at nothing whatever A is."""
    adapter.lora_A.copy_(A)
    if B is not None:
        adapter.lora_B.copy_(B)


@torch.no_grad()
def begin_all(model: nn.Module, name: str, by: str, factors: Factors) -> nn.Module:
    """Begin each layer of the adapter at factors(W, r, s). Returns the model; after an error it is as it was."""
    there = untrained(model, name, by)
    found = {path: factors(dense(path, a.layer), len(a.lora_A), a.scaling) for path, a in there.items()}
    for path, (A, B) in found.items():
        begin(there[path], A, B)
    return model


def split(U: Tensor, S: Tensor, Vt: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """A, B with s·B·A = U·diag(σ)·Vᵀ, the singular values shared evenly between the two."""
    root = (S / abs(scaling)).sqrt()
    return root[:, None] * Vt, math.copysign(1, scaling) * U * root


def svd(W: Tensor, r: int, niter: int | None, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), σ (r,), Vᵀ (r, in): the r largest. Exact, or with `niter` by that many turns of a random projection
    on 2r directions: those left over are its margin.

    Source: Halko, Martinsson and Tropp 2009, arXiv:0909.4061, section 4.5.
    """
    if niter is None:
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    else:
        cards = [W.device] if W.device.type == "cuda" else []
        with torch.random.fork_rng(cards):  # torch.svd_lowrank takes no generator
            torch.manual_seed(seed)
            U, S, V = torch.svd_lowrank(W, min(2 * r, *W.shape), niter)
        Vt = V.T
    return U[:, :r], S[:r], Vt[:r]


def plain(adapter: LoRA) -> LoRA:
    """The LoRA without a start that makes the same change: of rank 2r, or min(in, out), where every change has room."""
    from ..lowrank import shorten
    from ..methods.lora import LoRA

    A, B = (factor.detach() for factor in adapter.product())
    r = min(len(A), *shape_of(adapter.layer))
    if r < len(A):
        short = shorten(A, B, r)
        A, B = short.A.to(A), short.B.to(B)
    rslora = adapter.hyper.get("rslora", False)
    hyper = {**adapter.hyper, "r": r, "alpha": adapter.scaling * (math.sqrt(r) if rslora else r)}
    with torch.device(device_of(adapter.layer)):
        made = LoRA(adapter.layer, **hyper)
    made.hyper, made.lora_A.data, made.lora_B.data = hyper, A, B
    if adapter.c is not None and made.c is not None:
        made.c.data = adapter.c.detach().clone()
    return made.train(adapter.training)


def quantize_with(model: nn.Module, name: str, by: str, fit: Fit, skip: Targets, also: Targets, block: int, kind: str,
                  double: bool, compute: torch.dtype | None) -> nn.Module:  # fmt: skip
    """`quantize`, with an untrained LoRA and its layers' packed weights as `fit` finds them."""
    packed, found = paths_to_quantize(model, skip, also), {}
    for path, adapter in untrained(model, name, by).items():
        if path in packed:
            layer = bare(at(model, path))
            try:
                check_linear(layer)
            except ValueError as error:
                raise ValueError(f"{path!r}: {error}, and {by} fits what the packing loses: load the dense model, "
                                 f"attach LoRA, and call {by.lower()} in place of quantize") from None  # fmt: skip
            W = stored(path, layer)
            try:
                found[path] = fit(W, len(adapter.lora_A), adapter.scaling)
            except ValueError as error:
                raise ValueError(f"{path!r} cannot be quantised: {error}") from None
    if not found:
        raise ValueError(f"no layer of adapter {name!r} is quantised; choose other layers with skip= and also=")
    quantize(model, skip, also, block=block, kind=kind, double=double, compute=compute)
    there = adapters(model)[name]
    for path, (Q, A, B) in found.items():
        bare(at(model, path))._put(Q)
        fill(there[path], A, B)
    return model


def check_turns(iterations: int) -> None:
    if type(iterations) is not int or iterations < 1:
        raise ValueError(f"iterations={iterations!r}: must be a whole number, at least 1")

"""PiSSA: train the principal part of a weight. Meng et al. 2024, arXiv:2404.02948."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..attach import Targets
from ..hyper import checks
from ..nf4 import Packed, pack, unpack
from ._common import begin_all, check_turns, quantize_with, split, svd


@checks
def pissa(model: nn.Module, name: str = "default", niter: int | None = None, seed: int = 0) -> nn.Module:
    """Begin an untrained LoRA at the r largest singular values of W, with their vectors.

        U·diag(σ)·Vᵀ ← W;  A₀ = √(σ/s)·Vᵀ, B₀ = U·√(σ/s), the r largest σ;  h = W₀x + s·(BA − B₀A₀)·x

    The paper trains A and B beside the residual W − s·B₀A₀: the same function, for the start that is subtracted here
    (see `_common`) is the part that it takes out of W. The gradients of A and B are of the size of the weights from the
    first step on; LoRA's A has none then.

    niter: None for the exact decomposition (on one CPU core about 6 s for 2048², 8 times as long for twice the width),
    or the turns of a random projection, drawn from `seed`, in time ∝ r·in·out: HF PEFT, which draws half as many
    directions, calls 16 as good as exact. A packed layer is unpacked for it; for the paper's way to four bits see
    `qpissa`.
    Raises ValueError for an adapter that is trained, merged or no LoRA, and for weights without finite values; the
    model is then as it was. Returns the model.
    Source: Meng et al. 2024, arXiv:2404.02948, section 3.
    """
    if niter is not None and (type(niter) is not int or niter < 0):
        raise ValueError(f"niter={niter!r}: must be a whole number, or None for the exact decomposition")

    def factors(W: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
        return split(*svd(W, r, niter, seed), scaling)

    return begin_all(model, name, "PiSSA", factors)


@checks
def qpissa(model: nn.Module, name: str = "default", iterations: int = 1, skip: Targets = (), also: Targets = (), *,
           block: int = 64, kind: str = "nf4", double: bool = True,
           compute: torch.dtype | None = None) -> nn.Module:  # fmt: skip
    """`quantize` what PiSSA leaves of W, with an untrained LoRA filled by what it takes.

    h = Qx + s·BAx with Q the packed residual: without its largest singular values W is nearer to a grid of 16 values.
    One call in place of `quantize`, with its arguments, as `loftq`; iterations above 1 fit A, B and Q in turn (the
    paper's T). Here the change of the base cannot be avoided: the adapter is a plain LoRA of rank r, and fits this
    packed base alone, which must be saved with it. Costs and errors: see `loftq`.
    Source: Meng et al. 2024, arXiv:2404.02948, section 4.
    """
    check_turns(iterations)

    def fit(W: Tensor, r: int, scaling: float) -> tuple[Packed, Tensor, Tensor]:
        return residual(W, r, iterations, scaling, block=block, kind=kind, double=double)

    return quantize_with(model, name, "QPiSSA", fit, skip, also, block, kind, double, compute)


@torch.no_grad()
def residual(W: Tensor, r: int, iterations: int = 1, scaling: float = 1.0, *, block: int = 64, kind: str = "nf4",
             double: bool = True) -> tuple[Packed, Tensor, Tensor]:  # fmt: skip
    """W (out, in) -> Q packed, A (r, in), B (out, r) with Q + scaling·B·A ≈ W.

        U·diag(σ)·Vᵀ ← W − Q (at first W);  BA ← the r largest σ;  Q ← pack(W − BA)     in turn

    A turn may lose (see `loftq.factors`), so the best of them is returned.
    """
    W, dtype = W.float(), W.dtype
    best: tuple = ()
    lost = W
    for _ in range(iterations):
        A, B = split(*svd(lost, r, None), scaling)
        Q = pack(W - scaling * B @ A, block, kind, double)
        lost = W - unpack(Q)
        error = (lost - scaling * B @ A).norm().item()
        if not best or error < best[0]:
            best = error, Q, A, B
    _, Q, A, B = best
    return Q._replace(dtype=dtype), A, B

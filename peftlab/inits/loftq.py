"""LoftQ: a LoRA that begins as what four bits lose. Li et al. 2023, arXiv:2310.08659."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..attach import Targets
from ..hyper import checks
from ..nf4 import Packed, pack, unpack
from ._common import check_turns, quantize_with


@checks
def loftq(model: nn.Module, name: str = "default", iterations: int = 1, skip: Targets = (), also: Targets = (), *,
          block: int = 64, kind: str = "nf4", double: bool = True,
          compute: torch.dtype | None = None) -> nn.Module:  # fmt: skip
    """`quantize`, with an untrained LoRA filled by the best rank-r part of what its layers lose.

    h = Qx + s·BAx with Q + s·BA ≈ W, where QLoRA begins with Q alone. One call does both: attach LoRA to the dense
    model, then call this in place of `quantize`, whose other arguments it takes. iterations: how often Q and BA are
    fitted in turn, the paper's T (it takes 5). Layers without the adapter are packed plainly; an adapter on a layer
    that stays dense (skip) stays at nothing. Returns the model.

    With one iteration Q is the plain packing of W, so the saved adapter fits any base that is packed alike; with more
    it fits this base alone, which must be saved with it. The dense model is no base for it in either case.
    Costs a singular value decomposition a layer and iteration, on the layer's device (on one CPU core about 6 s for
    2048², 8 times as long for twice the width), and until all are done the packed weights beside the dense ones.
    Raises ValueError for an adapter that is trained, merged, or no LoRA, for weights that are packed already or have no
    values, and for what `quantize` refuses; the model is then as it was.

    HF PEFT's `init_lora_weights="loftq"` (0.21) finds the same Q and BA, on a GPU only, but does not divide them by
    s = alpha/r: its model begins nearest to W with alpha = r, no nearer than plain NF4 with 2r, further off above it.
    Source: Li et al. 2023, arXiv:2310.08659, algorithm 1.
    """
    check_turns(iterations)

    def fit(W: Tensor, r: int, scaling: float) -> tuple[Packed, Tensor, Tensor]:
        return factors(W, r, iterations, scaling, block=block, kind=kind, double=double)

    return quantize_with(model, name, "LoftQ", fit, skip, also, block, kind, double, compute)


@torch.no_grad()
def factors(W: Tensor, r: int, iterations: int = 1, scaling: float = 1.0, *, block: int = 64, kind: str = "nf4",
            double: bool = True) -> tuple[Packed, Tensor, Tensor]:  # fmt: skip
    """W (out, in) -> Q packed, A (r, in), B (out, r) in float32 with Q + scaling·B·A ≈ W.

        Q ← pack(W − BA);  U·diag(σ)·Vᵀ ← W − Q;  A ← √σ·Vᵀ, B ← U·√σ, the r largest σ     in turn

    The second step is the best answer to the first (Eckart and Young), but rounding to a grid that moves with its
    largest weight is not the best answer to the second: a turn may lose, so the best of them is returned. Its error
    ‖W − Q − BA‖ is below the plain ‖W − Q‖, that of the first turn without its BA.
    """
    W, dtype = W.float(), W.dtype
    best: tuple = ()
    BA = torch.zeros_like(W)
    for _ in range(iterations):
        Q = pack(W - BA, block, kind, double)
        U, S, Vt = torch.linalg.svd(W - unpack(Q), full_matrices=False)
        A, B = S[:r].sqrt().unsqueeze(1) * Vt[:r], U[:, :r] * S[:r].sqrt()
        BA, error = B @ A, S[r:].norm().item()
        if not best or error < best[0]:
            best = error, Q, A, B
    _, Q, A, B = best
    return Q._replace(dtype=dtype), A, B / scaling

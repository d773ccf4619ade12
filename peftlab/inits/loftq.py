"""LoftQ: a LoRA that begins as what four bits lose. Li et al. 2023, arXiv:2310.08659."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..attach import Targets, adapters, check_attached, merged_names
from ..core import Adapter
from ..layers import weight_of
from ..nf4 import Packed, pack, unpack
from ..nf4_layer import check_linear, paths_to_quantize, quantize
from ..sites import at, bare


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
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations={iterations!r}: must be a whole number, at least 1")
    packed, found = paths_to_quantize(model, skip, also), {}
    for path, adapter in _untrained(model, name).items():
        if path in packed:
            layer = bare(at(model, path))
            try:
                check_linear(layer)
            except ValueError as error:
                raise ValueError(f"{path!r}: {error}, and LoftQ fits what the packing loses: load the dense model, "
                                 "attach LoRA, and call loftq in place of quantize") from None  # fmt: skip
            W, r = weight_of(layer), len(adapter.lora_A)
            if W.is_meta:
                raise ValueError(f"{path!r} is on the meta device: it has no weights to fit; load the model first")
            try:
                found[path] = factors(W, r, iterations, adapter.scaling, block=block, kind=kind, double=double)
            except ValueError as error:
                raise ValueError(f"{path!r} cannot be quantised: {error}") from None
    if not found:
        raise ValueError(f"no layer of adapter {name!r} is quantised; choose other layers with skip= and also=")
    quantize(model, skip, also, block=block, kind=kind, double=double, compute=compute)
    there = adapters(model)[name]
    for path, (Q, A, B) in found.items():
        bare(at(model, path))._put(Q)
        there[path].lora_A.data.copy_(A)
        there[path].lora_B.data.copy_(B)
    return model


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


def _untrained(model: nn.Module, name: str) -> dict[str, Adapter]:
    """path -> the LoRA of this name there. ValueError if it is something else, or holds something already."""
    from ..methods.lora import LoRA
    from ..methods.module_copy import ModuleCopy

    check_attached(model, [name])
    if merged_names(model):
        raise ValueError(f"{', '.join(merged_names(model))} is merged into the weights; unmerge(model) first")
    found = {path: a for path, a in adapters(model)[name].items() if not isinstance(a, ModuleCopy)}
    for path, adapter in found.items():
        if type(adapter) is not LoRA:
            raise ValueError(f"{name!r} is {type(adapter).__name__}, and LoftQ fills the A and B of LoRA; "
                             "attach(model, LoRA, …) instead")  # fmt: skip
        if adapter.lora_B.is_meta:
            continue
        if adapter.lora_B.any():
            raise ValueError(f"{name!r} is trained (its B on {path!r} is not zero) and would be overwritten; attach a "
                             "new LoRA under another name")  # fmt: skip
        if not adapter.scaling:
            raise ValueError(f"{name!r} has alpha=0, so no A and B can add anything; attach it with alpha above 0")
    return found

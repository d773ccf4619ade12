"""CorDA: decompose a weight as the data sees it. Yang et al. 2024, arXiv:2406.05223."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..hyper import checks
from ._common import begin, check_values, dense, split, untrained
from ._data import batches, second_moments


@checks
def corda(model: nn.Module, data: Any, tokenizer: Any = None, name: str = "default", *, keep: bool = False,
          damp: float = 0.01, batch_size: int = 16) -> nn.Module:  # fmt: skip
    """Begin an untrained LoRA at the components of W that matter most, or least, to the inputs of some data.

        C ← mean(x·xᵀ) + damp·c·I, c the mean of its diagonal;  U·diag(σ)·Vᵀ ← W·C
        A₀ = √(σ/s)·Vᵀ·C⁻¹, B₀ = U·√(σ/s), r of the σ;  h = W₀x + s·(BA − B₀A₀)·x

    keep=False is the paper's instruction-previewed mode: data of the task, and the r largest σ are trained.
    keep=True is its knowledge-preserved mode: data whose knowledge should stay (questions on the world, say), and the r
    smallest are trained, the others stay frozen. All σ together give W again, whatever C is.

    data: rows as `train` takes them, in batches of batch_size, or batches; 256 rows of 2,048 tokens in the paper.
    Costs a forward pass, in² numbers for each different input, a singular value decomposition a layer (see `pissa`).
    For the start that is subtracted see `_common`. Raises ValueError for an adapter that is trained, merged or no LoRA,
    and for no data; the model is then as it was. Returns the model.

    HF PEFT 0.21 divides the inputs of each row by their largest entry before it adds them up: as the paper's code, to
    stay in the range of float16, but not as the equation.
    Source: Yang et al. 2024, arXiv:2406.05223, section 3.
    """
    if damp <= 0:
        raise ValueError(f"damp={damp!r}: must be above 0, or C may have no inverse")
    there = untrained(model, name, "CorDA")
    layers = {path: adapter.layer for path, adapter in there.items()}
    check_values(there)
    moments = second_moments(model, layers, batches(model, data, tokenizer, batch_size, "CorDA"))
    found = {path: factors(dense(path, a.layer), moments[path], len(a.lora_A), a.scaling, keep, damp)
             for path, a in there.items()}  # fmt: skip
    for path, (A, B) in found.items():
        begin(there[path], A, B)
    return model


@torch.no_grad()
def factors(W: Tensor, C: Tensor, r: int, scaling: float, keep: bool = False, damp: float = 0.01,
            ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """W (out, in), C (in, in) -> A (r, in), B (out, r). In float64: the condition of C is up to in/damp."""
    C = C.double() + damp * C.double().diagonal().mean() * torch.eye(len(C), device=C.device)
    U, S, Vt = torch.linalg.svd(W.double() @ C, full_matrices=False)
    own = slice(-r, None) if keep else slice(r)
    return split(U[:, own], S[own], torch.linalg.solve(C, Vt[own].T).T, scaling)

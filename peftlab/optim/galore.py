"""GaLore: all weights learn, but Adam's memory is of low rank. Zhao et al. 2024, arXiv:2403.03507."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..attach import find_targets
from ..hyper import checks
from ..sites import at, bare
from ._pairs import Maker, adam, refuse


def subspace(G: Tensor, r: int) -> Tensor:
    """The r leading singular vectors of the shorter side of G (m, n): U (m, r) if m < n, else Vᵀ (r, n)."""
    U, _, Vt = torch.linalg.svd(G.float(), full_matrices=False)
    return (U[:, :r] if G.shape[0] < G.shape[1] else Vt[:r]).to(G.dtype).contiguous()


class GaLore(torch.optim.AdamW):
    """AdamW on the gradient's projection on a subspace that is chosen anew every T steps. See `galore`."""

    def __init__(self, parameters: list[nn.Parameter], projected: list[nn.Parameter], lr: float, r: int, every: int,
                 scale: float, weight_decay: float):  # fmt: skip
        super().__init__(parameters, lr=lr, weight_decay=weight_decay)
        self.projected, self.r, self.every, self.scale = projected, r, every, scale

    @torch.no_grad()
    def step(self, closure=None):
        refuse(closure)
        group = self.param_groups[0]
        for W in self.projected:
            if W.grad is not None:
                G, state = W.grad, self.state[W]
                if int(state.get("step", 0)) % self.every == 0:
                    state["P"] = subspace(G, self.r)
                P = state["P"]
                wide = G.shape[0] < G.shape[1]
                N = adam(state, P.T @ G if wide else G @ P.T, group)
                W.mul_(1 - group["lr"] * group["weight_decay"]).sub_(
                    group["lr"] * self.scale * (P @ N if wide else N @ P))  # fmt: skip
                W.grad = None  # what is left has AdamW's own step
        super().step()


@checks
def galore(model: nn.Module, lr: float, r: int = 128, every: int = 200, scale: float = 0.25,
           weight_decay: float = 0.0) -> Maker:  # fmt: skip
    """Full fine-tuning of linear layers (`pl.full_finetuning`) with Adam's moments in a subspace of rank r.

        R = Pᵀ·G,    N = Adam(R),    W ← W − η·α·P·N    with G (m, n) the gradient, m ≤ n

    P (m, r) are the leading left singular vectors of the gradient at every T-th step (for m > n, the right ones on the
    other side). One step is of rank r; their sum is not, since P moves. The moments are kept when it does.
    States: m·r + 2·n·r numbers for a weight, where AdamW has 2·m·n. One SVD of each gradient every T steps: on one CPU
    core about 6 s for 2048², 8 times as long for twice the width. Weights with a side up to r, embeddings, heads and
    norms are AdamW's.

    r: rank. every: T. scale: α, so that η may stay that of r = full. ValueError if no linear layer is trained.
    Source: Zhao et al. 2024, arXiv:2403.03507, "GaLore: Memory-efficient LLM training by gradient low-rank projection".
    """
    if r < 1 or every < 1:
        raise ValueError(f"r={r} and every={every} must be at least 1")
    layers = {id(p) for path in find_targets(model, "all-linear") for p in bare(at(model, path)).parameters()}

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        projected = [p for p in parameters if id(p) in layers and p.ndim == 2 and min(p.shape) > r]
        if not projected:
            raise ValueError(f"no weight of a linear layer with both sides above r={r} is trained: call "
                             "full_finetuning(model) first, or take a smaller r")  # fmt: skip
        return GaLore(parameters, projected, lr, r, every, scale, weight_decay)

    return make

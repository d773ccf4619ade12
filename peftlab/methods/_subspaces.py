"""AdaMSS's groups of rows, and which of them go on learning. Zheng et al. 2025, OpenReview 8ZdWmpYxT0."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers import weight_of
from ._kmeans import kmeans


def decomposed(layer: nn.Module, r: int, subspaces: int, rank: int, seed: int) -> tuple[Tensor, list, list[Tensor]]:
    """V (R, in + 1), the outputs of each group, and where each Aₖ (rₖ, R) starts."""
    W, b = weight_of(layer).detach().float(), getattr(layer, "bias", None)
    W = W if b is None else torch.cat([W, b.detach().float()[:, None]], 1)
    R, K = min(r, *W.shape), min(subspaces, len(W))
    with torch.random.fork_rng(devices=[W.device] if W.is_cuda else []):
        torch.manual_seed(seed)
        U, _, V = (W[:, :R], None, W[:R].T) if W.is_meta else torch.svd_lowrank(W, q=R, niter=2)
    found = torch.arange(len(W), device="cpu") % K if W.is_meta else kmeans(U, K)
    rows = [torch.where(found == k)[0].to(W.device) for k in range(K)]
    return V.T.contiguous(), rows, [torch.linalg.svd(U[own], full_matrices=False)[2][:rank] for own in rows]


def learning(adapter) -> list[tuple[Tensor, Tensor]]:
    """(Aₖ, Bₖ) of each group; in training a frozen one's take no gradient, so that no optimizer moves them."""
    pairs = list(zip(adapter.adamss_A, adapter.adamss_B, strict=True))
    if not adapter.asa or not adapter.training:
        return pairs
    return [(A, B) if on else (A.detach(), B.detach()) for (A, B), on in zip(pairs, adapter.active, strict=True)]


@torch.no_grad()
def allocate(made, step: int) -> None:
    """After a step: note how important each number was; every `interval` steps, keep the best groups of all layers.

    What is frozen stays so. The number goes down from all groups at step tinit to `target` at step tfinal.
    """
    one = next(iter(made.values())).hyper
    first, last, target = one["tinit"], one["tfinal"], one["target"]
    if not one["asa"] or not first <= step <= last:
        return
    for adapter in made.values():
        observe(adapter)
    if step % one["interval"] == 0:
        whole = sum(len(adapter.active) for adapter in made.values())
        budget = int(target + (whole - target) * (1 - (step - first) / (last - first)) ** one["exponent"])
        keep_best(list(made.values()), budget)
        for adapter in made.values():
            adapter.mean.zero_(), adapter.spread.zero_()  # each choice has its own window


def observe(adapter) -> None:
    """I = |θ·∂L/∂θ| of each number: its running mean, and that of how far it jumps from it; as AdaLoRA's."""
    beta1, beta2 = adapter.hyper["beta1"], adapter.hyper["beta2"]
    both = [*adapter.adamss_A, *adapter.adamss_B]
    now = torch.cat([(torch.zeros_like(p) if p.grad is None else p * p.grad).abs().flatten() for p in both])
    adapter.spread.lerp_((now - adapter.mean).abs(), 1 - beta2)
    adapter.mean.lerp_(now, 1 - beta1)


def scores(adapter) -> Tensor:
    """(K,): the mean of Ī·spread over Aₖ, and that over Bₖ; −∞ where a group is frozen."""
    sizes = [p.numel() for p in (*adapter.adamss_A, *adapter.adamss_B)]
    means = torch.stack([part.mean() for part in (adapter.mean * adapter.spread).split(sizes)])
    return means.view(2, -1).sum(0).masked_fill(adapter.active == 0, -torch.inf)


def keep_best(adapters: list, budget: int) -> None:
    ranked = torch.cat([scores(adapter) for adapter in adapters])
    best = torch.zeros_like(ranked)
    best[ranked.topk(min(budget, len(ranked))).indices] = 1
    for adapter, kept in zip(adapters, best.split([len(a.active) for a in adapters]), strict=True):
        adapter.active.mul_(kept)

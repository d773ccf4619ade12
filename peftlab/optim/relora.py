"""ReLoRA: a change of high rank from low-rank ones, learned one after another. Lialin et al. 2023, arXiv:2307.05695."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..hyper import checks
from ._pairs import Maker, Pair, adam, among, products, refuse


@checks
def jagged(restarts: int, warmup: float = 0.1) -> Callable[[float], float]:
    """For `pl.train(schedule=…, warmup=0)`: a cosine that falls to zero at each restart and climbs back at once.

    warmup: the fraction of each of the equal parts in which the rate climbs back to the cosine in a straight line.
    """

    def jagged_cosine(progress: float) -> float:
        position = progress * restarts % 1
        climb = min(1.0, position / warmup) if warmup > 0 else 1.0
        return climb * 0.5 * (1 + math.cos(math.pi * progress))

    return jagged_cosine


def prune(moment: Tensor, keep: float) -> None:
    """Set all to zero but the fraction `keep` of largest size."""
    small = moment.numel() - math.ceil(keep * moment.numel())
    if small:
        moment.view(-1)[moment.abs().view(-1).argsort()[:small]] = 0


class ReLoRA(torch.optim.AdamW):
    """AdamW on r rows of each A and the same r columns of B, the next r after every T steps. See `relora`."""

    def __init__(self, parameters: list[nn.Parameter], there: list[Pair], lr: float, r: int, every: int, keep: float,
                 weight_decay: float):  # fmt: skip
        super().__init__(parameters, lr=lr, weight_decay=weight_decay)
        self.there, self.r, self.every, self.keep = there, r, every, keep
        self.param_groups[0]["taken"] = 0

    @torch.no_grad()
    def step(self, closure=None):
        refuse(closure)
        group = self.param_groups[0]
        number, within = divmod(group["taken"], self.every)
        for A, B, _ in self.there:
            last = len(A) // self.r - 1
            rows = slice(self.r * min(number, last), self.r * (min(number, last) + 1))
            for p, part in ((A, rows), (B, (slice(None), rows))):
                if within == 0 and 0 < number <= last:
                    for key in ("exp_avg", "exp_avg_sq"):
                        prune(self.state[p][key], self.keep)
                step = adam(self.state[p], p.grad[part].contiguous(), group)
                p[part].mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * step)
                p.grad = None  # what is left has AdamW's own step
        super().step()
        group["taken"] += 1


@checks
def relora(model: nn.Module, lr: float, every: int, r: int, keep: float = 0.01, weight_decay: float = 0.0) -> Maker:
    """Train a LoRA of rank R as R/r LoRAs of rank r, each for T steps, on top of the ones before it.

    The paper merges B·A into W after T steps and goes on with a new pair. Merged or not, the model is the same:
    W + s·B₁A₁ + s·B₂A₂ + … is a LoRA whose A has the Aᵢ as rows and whose B the Bᵢ as columns. So here W stays frozen
    (it may be in four bits), and what is saved is a plain LoRA of rank R. Moments are of rank r; what merging would
    save besides is the work of the finished pairs, which `pl.merge` does at the end.

    every: T; steps beyond R/r·T train the last pair on. r: must divide R. keep: the fraction of the moments, the
    largest ones, that a new pair takes over from the one before it. The rate should be zero at a restart:
    schedule=jagged(R // r), warmup=0. ValueError if there is no LoRA, or r does not divide R.
    Source: Lialin et al. 2023, arXiv:2307.05695, "ReLoRA: High-rank training through low-rank updates".
    """
    there = products(model)
    if every < 1 or not 0 <= keep <= 1:
        raise ValueError(f"every={every} must be at least 1, and keep={keep} a fraction")
    odd = next((len(A) for A, _, _ in there if r < 1 or len(A) % r), None)
    if odd:
        raise ValueError(f"r={r} does not divide {odd}, the rank of the LoRA: attach one of rank {r} times the number "
                         "of restarts")  # fmt: skip
    return lambda parameters: ReLoRA(parameters, among(parameters, there), lr, r, every, keep, weight_decay)

"""HyperFormer: one small network writes all adapters. Karimi Mahabadi et al. 2021, arXiv:2106.04489."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of
from ._bottleneck import ACTIVATIONS, bottleneck_width, checked_activation


class HyperFormer(Adapter):
    """HyperFormer++: the bottleneck adapters' weights are the answers of a network that all layers and tasks share.

    y = h + U·σ(D·h), with h = f(x), and D (b, d), U (d, b) written for this task and this site:
        I = W₂·relu(W₁·[z_τ; l] + c₁) + c₂,  vec(D) = W_D·I,  vec(U) = W_U·I
    z_τ (t,) stands for the task, l (t,) for the site: the paper's layer and position together. So tasks and layers
    learn from each other, and one more task costs t numbers. W_U starts at zero, so that training starts at the base.
    The paper also writes a layer norm behind U, and has biases; these are left out here.

    Which task: the attribute `task` of each adapter, a number; with one task it is 0.
    tasks: how many. t: numbers a task or site. e: width of I. reduction: d / b, or bottleneck: b. activation: σ.
    Trained: t a site, and once tasks·t + 2·t·e + e² + 2·e + 2·b·d·e. Cannot be merged. Raises ValueError for values
    out of range, a task that is not set, and sites of different widths.
    Source: Karimi Mahabadi et al. 2021, arXiv:2106.04489.
    """

    family = "mixture"
    targets = "sublayer-output"
    shared = ("z", "W1", "W2", "W_D", "W_U")

    def __init__(
        self, layer: nn.Module, tasks: int = 1, t: int = 16, e: int = 16, reduction: float = 32,
        bottleneck: int | None = None, activation: str = "gelu",
    ):  # fmt: skip
        super().__init__(layer)
        d = shape_of(layer)[0]
        self.b, self.d, self.activation = bottleneck_width(d, reduction, bottleneck), d, checked_activation(activation)
        if min(tasks, t, e) < 1:
            raise ValueError(f"tasks={tasks}, t={t}, e={e}: each must be at least 1")
        self.l, self.z = nn.Parameter(torch.randn(t)), nn.Parameter(torch.randn(tasks, t))
        self.W1, self.W2 = nn.Linear(2 * t, e), nn.Linear(e, e)
        self.W_D = nn.Parameter(torch.randn(self.b * d, e) / math.sqrt(d))  # so that D·h is about as large as h
        self.W_U = nn.Parameter(torch.zeros(d * self.b, e))
        self.task: int | None = 0 if tasks == 1 else None

    @classmethod
    def share(cls, made) -> None:
        """One site (the first by name) keeps the network and the tasks; the others refer to them."""
        keeper = made[min(made)]
        for path, adapter in made.items():
            if adapter.d != keeper.d:
                raise ValueError(f"{path!r} gives {adapter.d} numbers and {min(made)!r} {keeper.d}: one network writes "
                                 "adapters of one width; choose targets that agree")  # fmt: skip
            for name in cls.shared if adapter is not keeper else ():
                delattr(adapter, name)
                adapter.__dict__[name] = getattr(keeper, name)

    def expected(self) -> int:
        """t a site, and once tasks·t + 2·t·e + e² + 2·e + 2·b·d·e"""
        tasks, t, e = (self.hyper[name] for name in ("tasks", "t", "e"))
        own = tasks * t + 2 * t * e + e * e + 2 * e + 2 * self.b * self.d * e
        return t + (own if "z" in self._parameters else 0)

    def delta(self, h: Tensor) -> Tensor:  # (..., d) -> (..., d)
        if self.task is None or not 0 <= self.task < len(self.z):
            raise ValueError(f"task={self.task!r} is not in 0…{len(self.z) - 1}; set it on each adapter: "
                             "for a in pl.adapters(model)[name].values(): a.task = …")  # fmt: skip
        who = torch.cat([self.z[self.task], self.l.to(self.z)])
        I = self.W2(torch.relu(self.W1(who)))  # noqa: E741  the paper's letter
        D, U = (self.W_D @ I).to(h).view(self.b, self.d), (self.W_U @ I).to(h).view(self.d, self.b)
        return ACTIVATIONS[self.activation](h @ D.T) @ U.T

    def forward(self, f, x: Tensor) -> Tensor:
        h = f(x)
        return h + self.change(h)

"""Arrow: tokens find the trained LoRAs that were made for the like of them. Ostapenko et al. 2024, arXiv:2405.11157."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ._peers import carriers, peer
from .adapter_fusion import several


class Arrow(Adapter):
    """Arrow: each layer sends each token to the k experts whose change stretches its direction most. Not trained.

    h = W₀x + Σᵢ cᵢ·Δᵢ(x) over the k experts with the largest |vᵢ·x|, c = softmax(|v·x|/τ) over these, and vᵢ (in,) the
    prototype of expert i: the first right singular vector of its BᵢAᵢ, the input that it changes most. It has no sign.

    general: adapters of general knowledge, whose mean is taken off every expert first, Δᵢ − Δ_g: what is left is the
    expert's own (GenKnowSub). Products are subtracted: an expert is the same whichever of A and B has its scale.

    Not in METHODS, for there is nothing to train, to save or to merge: attach(model, Arrow, of=("sql", "reviews")). The
    prototypes are computed in the first pass, and anew whenever an expert has changed.
    of: names of two or more attached low-rank adapters, on the same layers. top_k: k. temperature: τ.
    Raises ValueError for experts that are missing, elsewhere, or not low-rank, and a k out of range.
    Source: Ostapenko et al. 2024, arXiv:2405.11157; GenKnowSub: Bagherifard et al. 2025, arXiv:2505.10939.
    """

    part_of, family, on_others = "LoRA", "mixture", True

    def __init__(self, layer: nn.Module, of: tuple[str, ...] = (), top_k: int = 2, temperature: float = 1.0,
                 general: str | tuple[str, ...] = ()):  # fmt: skip
        super().__init__(layer)
        self.of, self.general = several(of), (general,) if isinstance(general, str) else tuple(general)
        self.needs = (*self.of, *self.general)
        if not 1 <= top_k <= len(self.of) or temperature <= 0:
            raise ValueError(f"top_k={top_k}, temperature={temperature}: choose 1…{len(self.of)} of the experts, and a "
                             "temperature above 0")  # fmt: skip
        self.top_k, self.temperature = top_k, temperature
        self.__dict__["made"] = None, None  # (what the prototypes were made from, they)

    @classmethod
    def plan(cls, model, paths, hyper):
        """Those of the target layers that carry the experts."""
        taken = hyper.get("general", ())
        names = (*several(hyper.get("of", ())), *((taken,) if isinstance(taken, str) else taken))
        return dict.fromkeys(carriers(model, paths, names), (cls, hyper))

    def expected(self) -> int:
        return 0

    def product(self, name: str) -> tuple[Tensor, Tensor]:
        """A and s·B of an expert, in float64."""
        from ..lowrank import product_of

        found = product_of(expert := peer(self, name))
        if found is None:
            raise ValueError(f"{name!r} is {type(expert).__name__}, no product B·A: it has no low-rank prototype")
        return found[0].double(), found[2] * found[1].double()

    @torch.no_grad()
    def prototypes(self, x: Tensor) -> Tensor:  # -> (n, in)
        if torch.compiler.is_compiling():  # such a model must have run once before
            return self.made[1]
        now = [(t.data_ptr(), t._version) for name in self.needs for t in peer(self, name).parameters()]
        if self.made[0] != now:
            from ..lowrank import shorten

            taken = [(A, -B / len(self.general)) for A, B in map(self.product, self.general)]
            wholes = [[self.product(name), *taken] for name in self.of]
            rows = [shorten(torch.cat([A for A, _ in w]), torch.cat([B for _, B in w], 1), 1).A for w in wholes]
            self.__dict__["made"] = now, torch.cat(rows).to(x)
        return self.made[1]

    def forward(self, f, x: Tensor) -> Tensor:
        scores = (x @ self.prototypes(x).T.to(x)).abs()
        best = scores.topk(self.top_k, -1)
        c = torch.zeros_like(scores).scatter(-1, best.indices, (best.values / self.temperature).softmax(-1))
        y = f(x) - sum(peer(self, name).change(x) for name in self.general) / max(1, len(self.general))
        return y + sum(c[..., i, None] * peer(self, name).change(x) for i, name in enumerate(self.of))

"""FRoD: a shared basis, and sparse turns in it. Wan et al. 2026, arXiv:2512.23485."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of
from ._joint import draw_places, in_basis, joint_basis, kind_of, number_of_places
from ._shared import Frozen, Held, agree, keep, seeded


class FRoD(Adapter):
    """FRoD: layers of one kind share a basis; in it, each trains its scales, and a few turns from one axis to another.

    W₀ = U·Λ₀·Vᵀ becomes U·(Λ + S)·Vᵀ, where V (in, in) is one for all layers of a kind (all q_proj, say), made from
    their weights; the columns of U (out, in) have length 1, and Λ₀ (in) is what is left. Λ and S are trained: Λ from
    Λ₀, and S (in, in) from zero at a few random places off its diagonal, the same for a kind. So training starts at the
    base.

    The change is Δ(x) = U·(Λ − Λ₀ + S)·Vᵀ·x. Memory: V, in² numbers a kind, and U, as many as the weight, in float32:
    on a base in four bits eight times what it takes. Neither U nor Λ₀ is in the file: they follow from V and W₀.
    sparse_rate: ρ, the part of S that is trained. regularization_alpha: a ridge that keeps V well-conditioned.
    dropout: on the adapter's input. seed: of the places. save_projection: V and the places in the file; without, they
    are computed from the base again. Trained: in + ⌊ρ·in²⌋. Raises ValueError for a rate out of 0…1.
    Source: Wan et al. 2026, AAAI, doi:10.1609/aaai.v40i31.39813, arXiv:2512.23485; how V is made: HF PEFT.
    """

    family = "shared and vector-based"
    hf_type = "FROD"
    hf_hyper = {"sparse_rate": "sparse_rate", "regularization_alpha": "regularization_alpha", "dropout": "frod_dropout",
                "seed": "projection_prng_key", "save_projection": "save_projection"}  # fmt: skip
    hf_ignored = frozenset({"progressbar", "runtime_offload_base_weight"})

    def __init__(
        self, layer: nn.Module, sparse_rate: float = 0.01, regularization_alpha: float = 1e-3, dropout: float = 0.0,
        seed: int = 0, save_projection: bool = False,
    ):  # fmt: skip
        super().__init__(layer)
        _, n = shape_of(layer)
        if not 0 <= sparse_rate <= 1:
            raise ValueError(f"sparse_rate={sparse_rate} is not in 0…1")
        self.frod_lambda_l = nn.Parameter(torch.ones(n))
        self.frod_lambda_s_values = nn.Parameter(torch.zeros(number_of_places(n, sparse_rate)))
        for name in ("U", "start"):  # start: Λ₀
            self.register_buffer(name, None, persistent=save_projection)
        self.dropout = nn.Dropout(dropout)
        self.rate, self.ridge = sparse_rate, regularization_alpha
        self.seed, self.save_projection = seed, save_projection
        self.shared: Held = None  # Frozen: V, V⁻¹, and the places of S

    @classmethod
    def share(cls, made) -> None:
        agree(made, "rate", "ridge", "seed", "save_projection")
        draw, saved = seeded(made[min(made)].seed), made[min(made)].save_projection
        for kind in sorted({kind_of(path) for path in made}):
            alike = {path: adapter for path, adapter in made.items() if kind_of(path) == kind}
            V = joint_basis({path: adapter.layer for path, adapter in alike.items()}, made[min(alike)].ridge)
            where = draw_places(len(V), len(made[min(alike)].frod_lambda_s_values), draw).to(V.device)
            keep(alike, "shared", Frozen(saved, V=V, where=where))
            for adapter in alike.values():
                adapter.U, adapter.start = in_basis(adapter.layer, V)
                adapter.frod_lambda_l.data.copy_(adapter.start)

    @staticmethod
    def size(out_features: int, in_features: int, sparse_rate: float = 0.01, **_) -> int:
        """in + ⌊ρ·in²⌋"""
        return in_features + number_of_places(in_features, sparse_rate)

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if self.shared is None:  # attached to nothing: a basis of its own
            self.share({"": self})
        n, values = len(self.start), self.frod_lambda_s_values
        S = values.new_zeros(n, n).index_put(tuple(self.shared.where), values)
        z = self.dropout(x) @ self.shared.V.to(x)
        return (z * (self.frod_lambda_l - self.start) + z @ S.T) @ self.U.T

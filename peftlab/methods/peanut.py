"""PEANuT: a small network reads the frozen weight and writes its change. Zhong et al. 2024, arXiv:2410.01870."""

from __future__ import annotations

from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of, weight_of
from ._bottleneck import ACTIVATIONS, checked_activation


class PEANuT(Adapter):
    """PEANuT (weight-aware neural tweakers): the change of a frozen weight is what a small network makes of it.

    h = W₀x + s·ΔW·x, ΔWᵀ = B(D₁(…D_d(E_d(…E₁(σ(W₀ᵀ·Aᵀ)))))), with A (r, out), B (out, r). Each column of W₀, all that
    leaves one input, goes through the same layers: first σ(A·w), then d encoders σ(Eᵢ·z), then d decoders
    σ(Dᵢ·z) + the input of the encoder across from it, Eᵢ and Dᵢ (r, r); at last B, which starts at zero, so that
    training starts at the base. A LoRA's factor A is its own numbers; here the frozen weight and σ make it, (r, in).

    Each pass reads W₀, dense (in four bits: an unpacked copy of one layer); the factor takes r·in·out steps, as many as
    r more tokens would. r: width. depth: d. activation: σ, of HF PEFT's "relu", "gelu", "silu", "tanh". scaling: s.
    Trained: 2·r·out + 2·d·r². Raises ValueError for r below 1, depth below 0, another activation.
    Source: Zhong et al. 2024, "PEANuT: Parameter-efficient adaptation with weight-aware neural tweakers",
    arXiv:2410.01870.
    """

    family = "low-rank"
    hf_type = "PEANUT"
    hf_hyper = {"r": "r", "depth": "depth", "activation": "act_fn", "scaling": "scaling"}

    def __init__(self, layer: nn.Module, r: int = 32, depth: int = 0, activation: str = "relu", scaling: float = 1.0):
        super().__init__(layer)
        out_features, _ = shape_of(layer)
        if r < 1 or depth < 0:
            raise ValueError(f"r={r} must be at least 1, and depth={depth} at least 0")
        self.activation, self.scaling = checked_activation(activation), scaling
        self.peanut_A = nn.Linear(out_features, r, bias=False)
        self.peanut_encoders = nn.ModuleList(nn.Linear(r, r, bias=False) for _ in range(depth))
        self.peanut_decoders = nn.ModuleList(nn.Linear(r, r, bias=False) for _ in range(depth))
        self.peanut_B = nn.Linear(r, out_features, bias=False)
        nn.init.zeros_(self.peanut_B.weight)

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 32, depth: int = 0, **_) -> int:
        """2·r·out + 2·d·r²"""
        return 2 * r * out_features + 2 * depth * r * r

    def factor(self) -> Tensor:
        """What the network makes of W₀ before B, (in, r)."""
        sigma = ACTIVATIONS[self.activation]
        z = sigma(self.peanut_A(weight_of(self.layer).T.to(self.peanut_A.weight.dtype)))
        kept = []
        for encoder in self.peanut_encoders:
            kept.append(z)
            z = sigma(encoder(z))
        for decoder, before in zip(self.peanut_decoders, reversed(kept), strict=True):
            z = sigma(decoder(z)) + before
        return z

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return self.scaling * self.peanut_B(x @ self.factor())

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.factor().T, self.peanut_B.weight, self.scaling

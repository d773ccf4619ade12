"""KaSA: without a weight's smallest singular values, and with trained ones. Wang et al. 2024, arXiv:2412.06071."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of
from ._lora import PARAMS, Given, begin, entries, minor


class KaSA(Adapter):
    """KaSA (knowledge-aware singular-value adaptation): drop what W₀ knows least of, and learn an SVD of the change.

    h = (W₀ − UΣVᵀ)x + (α/r)·B·diag(d)·A·x, with UΣVᵀ the r smallest singular components of W₀, and d (r,) trained.
    B = 0 and d ~ N(0, 1): training starts without those components, so not at the base. While training, the loss has
    β·‖d‖² + γ·(‖BᵀB − I‖ + ‖AAᵀ − I‖), Frobenius norms, for B and A to become bases as in an SVD.

    The paper and HF PEFT overwrite W₀. Here it keeps its bytes and UΣVᵀ is subtracted, r·(in + out) more numbers in the
    low-rank term, computed again when a file is read. That and attaching cost a decomposition of each weight. Two
    active KaSA adapters each subtract their part. dropout: on the trained term's input.
    Trained: r·(in + out) + r. Raises ValueError for r that leaves no component.
    Source: Wang et al. 2024, arXiv:2412.06071, equations 9 to 12 for the loss.
    """

    family = "low-rank"
    hf_type, hf_flags = "LORA", {"kasa_config": Given()}
    hf_hyper = entries("kasa_config", beta="beta", gamma="gamma")
    hf_params = {**PARAMS, "d": "lora_diag"}

    def __init__(
        self, layer: nn.Module, r: int = 8, alpha: float = 16, dropout: float = 0.0, rslora: bool = False,
        beta: float = 1e-4, gamma: float = 1e-3,
    ):  # fmt: skip
        super().__init__(layer)
        begin(self, r, alpha, dropout, rslora)
        if r == min(shape_of(layer)):
            raise ValueError(f"r={r} would drop all of the layer's {r} singular components; take a smaller r")
        self.d = nn.Parameter(torch.randn(r))
        U, S, Vh = minor(layer, r)
        self.register_buffer("US", U * S, persistent=False)
        self.register_buffer("Vh", Vh, persistent=False)
        self.beta, self.gamma = beta, gamma

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 8, **_) -> int:
        """r·(in + out) + r"""
        return r * (in_features + out_features) + r

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        learned = (self.dropout(x) @ self.lora_A.T * self.d) @ self.lora_B.T
        return self.scaling * learned - x @ self.Vh.T @ self.US.T

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """The same Δ as one product of rank 2r, unless dropout gives the trained term another input."""
        if self.training and self.dropout.p > 0:
            return None
        trained = self.scaling * self.d[:, None] * self.lora_A
        return torch.cat([trained, self.Vh]), torch.cat([self.lora_B, -self.US], 1), 1.0

    def penalty(self) -> Tensor:
        """β·‖d‖² + γ·(‖BᵀB − I‖ + ‖AAᵀ − I‖)"""
        A, B, eye = self.lora_A, self.lora_B, torch.eye(len(self.d), dtype=self.d.dtype, device=self.d.device)
        apart = torch.linalg.norm(B.T @ B - eye) + torch.linalg.norm(A @ A.T - eye)
        return self.beta * (self.d**2).sum() + self.gamma * apart

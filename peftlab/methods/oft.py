"""OFT: rotate a layer's input, in blocks. Qiu et al. 2023, arXiv:2306.07280, and 2025, arXiv:2506.19847."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of
from ._block_sizes import block_of, sizes
from ._rotations import blockwise, cayley, checked_terms, eye_of, neumann, skew


class OFT(Adapter):
    """OFT (orthogonal fine-tuning): the input is rotated before the frozen layer sees it.

    h = W₀Rᵀx + b, R = diag(R₁ … Rₙ) orthogonal in b × b blocks: the angles between W₀'s rows stay as they were.
    Rᵢ = (I + Q)(I − Q)⁻¹ by Cayley, with Qᵀ = −Q: its b(b−1)/2 entries start at 0, so training starts at the base.
    By Neumann, (I − Q)⁻¹ ≈ I + Q + Q² + …: nearly orthogonal while ‖Q‖ < 1, growing like ‖Q‖ᵗ⁻¹ beyond.

    oft_block_size: b, by default the greatest number up to 32 that divides all targets' inputs; or r: the number of
    blocks. block_share: all are one. use_cayley_neumann, num_cayley_neumann_terms: the series and t. coft, eps: hold
    ‖Q‖ ≤ ε/√n. module_dropout: in training a block is left out with this probability.
    Trained: in·(b−1)/2; b(b−1)/2 shared. Raises ValueError for sizes that do not divide `in`, naming what does.
    Source: Qiu et al. 2023, arXiv:2306.07280; at the input, by Neumann: Qiu et al. 2025, arXiv:2506.19847, section 3.
    HF PEFT 0.21 turns the other way by Cayley than by Neumann (kept, files mean it), drops no block, and merges two
    adapters in the opposite order to its forward pass: tests/test_orthogonal.py shows all three.
    """

    hf_type = "OFT"
    hf_hyper = {n: n for n in ("oft_block_size", "r", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms",
                               "coft", "eps", "module_dropout")}  # fmt: skip
    hf_params, family = {"oft_R": "oft_R.weight"}, "orthogonal"

    def __init__(
        self, layer: nn.Module, oft_block_size: int | None = None, r: int = 0, block_share: bool = False,
        use_cayley_neumann: bool = True, num_cayley_neumann_terms: int = 5, coft: bool = False, eps: float = 6e-5,
        module_dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__(layer)
        b = block_of(inputs := shape_of(layer)[1], oft_block_size, r, most=32)
        if not 0 <= module_dropout < 1 or eps <= 0:
            raise ValueError(f"module_dropout={module_dropout} must be in 0…1, and eps={eps} above 0")
        self.oft_R = nn.Parameter(torch.zeros(1 if block_share else inputs // b, b * (b - 1) // 2))
        self.b, self.p, self.eps = b, module_dropout, eps if coft else None
        self.terms = checked_terms(num_cayley_neumann_terms) if use_cayley_neumann else 0

    @classmethod
    def plan(cls, model, paths, hyper):
        size, r = sizes(model, paths, hyper.get("oft_block_size"), hyper.get("r"), most=32)
        return {path: (cls, {**hyper, "oft_block_size": size, "r": r}) for path in paths}

    @staticmethod
    def size(out_features: int, in_features: int, oft_block_size=None, r=0, block_share=False, **_) -> int:
        """in·(b−1)/2; b(b−1)/2 shared"""
        b = block_of(in_features, oft_block_size, r, most=32)
        return (b if block_share else in_features) * (b - 1) // 2

    def held(self) -> Tensor:
        """The entries of all Q; with coft scaled back to ‖Q‖ ≤ ε/√n, while gradients pass as if they were not."""
        if self.eps is None:
            return self.oft_R
        w = self.oft_R.detach()
        norm = (2 * len(w)) ** 0.5 * w.norm(dim=1, keepdim=True)  # √n·‖Q‖: each entry stands in Q twice
        return self.oft_R + (w * (self.eps / norm).clamp(max=1) - w)

    @classmethod
    def stepped(cls, made, step, steps) -> None:
        for adapter in made.values():
            adapter.oft_R.data.copy_(adapter.held())

    def rotations(self) -> Tensor:  # (n, b, b)
        Q = skew(self.held(), self.b)
        R = neumann(Q, self.terms) if self.terms else cayley(-Q)
        if self.training and self.p:
            R = torch.where(torch.rand(len(R), 1, 1, device=R.device) < self.p, eye_of(R), R)
        return R

    def forward(self, f, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return f(blockwise(x.to(self.oft_R.dtype), self.rotations()).to(x.dtype))

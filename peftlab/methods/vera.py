"""VeRA: trained vectors around frozen random matrices. Kopiczko et al. 2023, arXiv:2310.11454."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of
from ._shared import Frozen, Held, agree, keep, largest, seeded, uniform


class VeRA(Adapter):
    """VeRA: all layers share one pair of random matrices, never trained; each layer trains two vectors of scales.

    h = W₀x + Λ_b·B·Λ_d·A·x, with A (r, in) and B (out, r) frozen, Λ_d = diag(d) and Λ_b = diag(b). d (r,) starts at
    `d_initial` and b (out,) at zero, so training starts at the base. A and B are as large as the largest layer needs;
    a smaller layer takes the first columns of A and rows of B.

    The random pair takes r·(in + out) numbers of memory once, whatever the number of layers, and none in the file if it
    is drawn again from its seed. As r is cheap, it is large: 256, where LoRA would have 8.
    r: rank, one for all layers. dropout: on the adapter's input. seed: of A and B. save_projection: A and B in the file
    too, for a torch that draws other numbers. Trained: out + r. Raises ValueError for r below 1.
    Source: Kopiczko et al. 2023, arXiv:2310.11454, section 3; for layers of several sizes: HF PEFT.
    """

    family = "shared and vector-based"
    hf_type = "VERA"
    hf_hyper = {"r": "r", "d_initial": "d_initial", "dropout": "vera_dropout", "seed": "projection_prng_key",
                "save_projection": "save_projection"}  # fmt: skip

    def __init__(
        self, layer: nn.Module, r: int = 256, d_initial: float = 0.1, dropout: float = 0.0, seed: int = 0,
        save_projection: bool = False,
    ):  # fmt: skip
        super().__init__(layer)
        if r < 1:
            raise ValueError(f"rank r={r} is below 1")
        self.vera_lambda_d = nn.Parameter(torch.full((r,), float(d_initial)))
        self.vera_lambda_b = nn.Parameter(torch.zeros(shape_of(layer)[0]))
        self.dropout = nn.Dropout(dropout)
        self.r, self.seed, self.save_projection = r, seed, save_projection
        self.shared: Held = None  # Frozen: the pair

    @classmethod
    def share(cls, made) -> None:
        agree(made, "r", "seed", "save_projection")
        one, draw = made[min(made)], seeded(made[min(made)].seed)
        out_features, in_features = largest(made)
        A = uniform(draw, one, one.r, in_features)
        keep(made, "shared", Frozen(one.save_projection, vera_A=A, vera_B=uniform(draw, one, out_features, one.r)))

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 256, **_) -> int:
        """out + r"""
        return out_features + r

    def pair(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of this layer."""
        if self.shared is None:  # attached to nothing: a pair of its own
            self.share({"": self})
        out_features, in_features = shape_of(self.layer)
        return self.shared.vera_A[:, :in_features], self.shared.vera_B[:out_features]

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        A, B = (frozen.to(x) for frozen in self.pair())
        return self.vera_lambda_b * (self.vera_lambda_d * (self.dropout(x) @ A.T) @ B.T)

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """As matrices, outside of training: there scaled copies of A and B would be kept for each layer's gradient."""
        if self.training:
            return None
        A, B = self.pair()
        return self.vera_lambda_d[:, None] * A, self.vera_lambda_b[:, None] * B, 1.0

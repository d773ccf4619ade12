"""GLoRA: scale, shift and prompt of a layer in one. Chavan et al. 2023, arXiv:2306.07967."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of, weight_of

MATRIX, VECTOR = ("lora", "vector", "constant", "none"), ("vector", "constant", "none")
FORMS = {"A": MATRIX, "B": MATRIX, "C": ("lora", "vector", "none"), "D": VECTOR, "E": VECTOR}


class GLoRA(Adapter):
    """GLoRA (generalised LoRA): the weight and the bias of a frozen layer, both scaled and shifted.

    h = (W₀ + W₀ ⊙ A + B)·x + b₀ + b₀ ⊙ D + E + W₀·C, with A, B (out, in), D, E (out,) and C (in, 1), each a product of
    rank r ("lora"), a number for each row ("vector"), one for all ("constant") or zero ("none"). C, D and E are there
    if the layer has a bias. A alone is HiRA, B alone LoRA, A as a vector nearly (IA)³, E BitFit. One factor of each
    starts at zero, so training starts at the base.

    Each pass reads W₀, dense (in four bits: an unpacked copy of one layer), and builds the change of the weight.
    r: rank of the products. ab: the form of A and B; c: of C; de: of D and E. The paper looks for the best forms layer
    by layer, with an evolutionary search; here they are chosen.
    Trained: 2·r·(in + out), with a bias r·(in + 1) + 2 more. Raises ValueError for r below 1, another form, or no part.
    Source: Chavan et al. 2023, "One-for-all: generalized LoRA", arXiv:2306.07967.
    """

    family = "Hadamard and Kronecker"
    hf_type = "GLORA"
    hf_hyper = {"r": "r", "ab": "config_A_B", "c": "config_C", "de": "config_D_E"}
    hf_params = {f"glora_{part}_{name}": f"glora_{part}.{name}" for part in FORMS for name in ("Xd", "Xu", "X")}

    def __init__(self, layer: nn.Module, r: int = 8, ab: str = "lora", c: str = "lora", de: str = "constant"):
        super().__init__(layer)
        for part, shape in shapes(*shape_of(layer), r, getattr(layer, "bias", None) is not None, ab, c, de).items():
            value = nn.Parameter(torch.zeros(shape))
            if part.endswith("Xu"):
                nn.init.kaiming_uniform_(value, a=math.sqrt(5))
            self.register_parameter(f"glora_{part}", value)
        if not self._parameters:
            raise ValueError(f"ab={ab!r} leaves nothing to train on a layer without a bias, nor c={c!r} and de={de!r}")

    @staticmethod
    def size(
        out_features: int, in_features: int, r: int = 8, bias: bool = False, ab: str = "lora", c: str = "lora",
        de: str = "constant",
    ) -> int:  # fmt: skip
        """2·r·(in + out), and with a bias r·(in + 1) + 2 more"""
        return sum(math.prod(shape) for shape in shapes(out_features, in_features, r, bias, ab, c, de).values())

    def part(self, name: str) -> Tensor | float:
        """A to E, or 0.0 where it is switched off."""
        Xd = getattr(self, f"glora_{name}_Xd", None)
        return getattr(self, f"glora_{name}_X", 0.0) if Xd is None else Xd @ getattr(self, f"glora_{name}_Xu")

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        W, b, C = weight_of(self.layer).to(x.dtype), getattr(self.layer, "bias", None), self.part("C")
        y = x @ (W * self.part("A") + self.part("B")).T
        if b is not None:
            y = y + b.to(x.dtype) * self.part("D") + self.part("E")
        return y + (W @ C)[:, 0] if isinstance(C, Tensor) else y


def shapes(o: int, i: int, r: int, bias: bool, ab: str, c: str, de: str) -> dict[str, tuple[int, ...]]:
    """part and factor -> its shape, such as A_Xd (out, r) and A_Xu (r, in). ValueError for an unknown form or rank."""
    if r < 1:
        raise ValueError(f"rank r={r} is below 1")
    found: dict[str, tuple[int, ...]] = {}
    for part, form, rows, columns in zip("ABCDE", (ab, ab, c, de, de), (o, o, i, o, o), (i, i, 1, 0, 0), strict=True):
        if form not in FORMS[part]:
            raise ValueError(f"{part} has no form {form!r}, only {', '.join(FORMS[part])}")
        if form == "lora":
            found |= {f"{part}_Xd": (rows, r), f"{part}_Xu": (r, columns)}
        elif form != "none":
            found[f"{part}_X"] = (1,) if form == "constant" else (rows, 1) if columns else (rows,)
    return {name: shape for name, shape in found.items() if bias or name[0] in "AB"}

"""WaveFT: the change is a few wavelets. Bilican et al. 2025, arXiv:2505.12532."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import Adapter
from ..layers import device_of, shape_of
from ._filters import low_pass
from ._spectrum import one_for_all, places, spread
from ._wavelets import inverse

USUAL = 2592


class WaveFT(Adapter):
    """WaveFT: train n wavelet coefficients of the change, at random places.

    h = W₀x + ΔW·x, ΔW = s·T⁻¹(S), where S (out, in) is zero but for n trained numbers and T⁻¹ is one step of the
    inverse wavelet transform in two dimensions. One number changes a small patch of the weight: with Haar's wavelet,
    db1, two rows and two columns; so ΔW is sparse, and of a high rank. FourierFT's waves are over all of the weight.

    Each pass builds ΔW in out·in·N steps, and x·ΔWᵀ takes as long as W₀ itself.
    n: by default 2592, or all entries of the smallest target. wavelet: "db1" to "db10", Daubechies' with 2N numbers, or
    "sym2" to "sym10", the nearly symmetric ones; HF PEFT's coiflets are not here. use_idwt: without it ΔW is s·S.
    scaling: s. seed: of the places, the same for layers of one shape; a file holds the seed and not the places. The
    numbers start at zero, so training starts at the base.
    Trained: n. Raises ValueError for an n that is not in 1…out·in and for another wavelet.
    Source: Bilican et al. 2025, "Exploring sparsity for parameter efficient fine tuning using wavelets",
    arXiv:2505.12532.
    """

    family = "spectral and structured"
    hf_type, hf_patterns = "WAVEFT", {"n": "n_frequency_pattern"}
    hf_hyper = {"n": "n_frequency", "scaling": "scaling", "wavelet": "wavelet_family", "use_idwt": "use_idwt",
                "seed": "random_loc_seed"}  # fmt: skip

    def __init__(
        self, layer: nn.Module, n: int | None = None, scaling: float = 25, wavelet: str = "db1", use_idwt: bool = True,
        seed: int = 777,
    ):  # fmt: skip
        super().__init__(layer)
        out_features, in_features = shape_of(layer)
        n = min(USUAL, out_features * in_features) if n is None else n
        where = places(out_features, in_features, n, seed, device_of(layer))
        self.register_buffer("where", where, persistent=False)
        self.waveft_spectrum = nn.Parameter(torch.zeros(n))
        self.scaling, self.use_idwt, self.filter = scaling, use_idwt, low_pass(wavelet)

    @classmethod
    def plan(cls, model, paths, hyper):
        return {path: (cls, {**hyper, "n": one_for_all(model, paths, hyper.get("n"), USUAL)}) for path in paths}

    @staticmethod
    def size(out_features: int, in_features: int, n: int = USUAL, **_) -> int:
        """n"""
        return n

    def change_of_weight(self) -> Tensor:
        """ΔW (out, in)"""
        out_features, in_features = shape_of(self.layer)
        S = spread(self.waveft_spectrum, self.where, out_features, in_features)
        if not self.use_idwt:
            return self.scaling * S
        more = len(self.filter) // 2 - 1  # the transform takes so many off each end; and sizes must be even
        S = F.pad(S, (more, more + in_features % 2, more, more + out_features % 2))
        return self.scaling * inverse(S, self.filter)[:out_features, :in_features]

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return x @ self.change_of_weight().T

"""FourierFT: the change is a few frequencies. Gao et al. 2024, arXiv:2405.03003."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import device_of, shape_of, wide
from ._spectrum import one_for_all, places, spread

USUAL = 1000


class FourierFT(Adapter):
    """FourierFT: train n frequencies of the change, at random places that all layers share.

    h = W₀x + ΔW·x, ΔW = s·Re F⁻¹(S), where the spectrum S (out, in) is zero but for n trained real numbers and F⁻¹ the
    inverse Fourier transform in two dimensions. One number is a wave over the whole weight, with out·in entries
    s/(out·in)·cos(2π·(uj/out + vk/in)): few numbers, and ΔW of a high rank all the same.

    Each pass builds ΔW, by a fast transform in out·in·log(out·in) steps, and x·ΔWᵀ takes as long as W₀ itself.
    n: by default 1000, or all entries of the smallest target. scaling: s. seed: of the places, the same for layers of
    one shape; a file holds the seed and not the places. Numbers start random, N(0, 1), so not at the base.
    Trained: n. Raises ValueError for an n that is not in 1…out·in.
    Source: Gao et al. 2024, "Parameter-efficient fine-tuning with discrete Fourier transform", arXiv:2405.03003,
    section 3.
    """

    family = "spectral and structured"
    hf_type, hf_patterns = "FOURIERFT", {"n": "n_frequency_pattern"}
    hf_hyper = {"n": "n_frequency", "scaling": "scaling", "seed": "random_loc_seed"}

    def __init__(self, layer: nn.Module, n: int | None = None, scaling: float = 150, seed: int = 777):
        super().__init__(layer)
        out_features, in_features = shape_of(layer)
        n = min(USUAL, out_features * in_features) if n is None else n
        where = places(out_features, in_features, n, seed, device_of(layer))
        self.register_buffer("where", where, persistent=False)
        self.fourierft_spectrum = nn.Parameter(torch.randn(n))
        self.scaling = scaling

    @classmethod
    def plan(cls, model, paths, hyper):
        return {path: (cls, {**hyper, "n": one_for_all(model, paths, hyper.get("n"), USUAL)}) for path in paths}

    @staticmethod
    def size(out_features: int, in_features: int, n: int = USUAL, **_) -> int:
        """n"""
        return n

    def change_of_weight(self) -> Tensor:
        """ΔW (out, in)"""
        S = spread(wide(self.fourierft_spectrum), self.where, *shape_of(self.layer))
        return self.scaling * torch.fft.ifft2(S).real.to(self.fourierft_spectrum.dtype)

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return x @ self.change_of_weight().T

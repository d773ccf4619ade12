"""P-tuning: a prompt that a small network writes. Liu et al. 2021, arXiv:2103.10385."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..prompts import embedding_of, plan_prompt, with_prompt

LAYERS = 2  # of the LSTM


class PTuning(Adapter):
    """P-tuning: the prompt is the output of a small network, which ties its vectors together while they are trained.

    h = f([P; E(x)]), P = MLP(e) or P = MLP(LSTM(e)), with e (k, d) trained from N(0, 1) and a bidirectional LSTM.
    Once trained the network is not needed: an adapter file holds P alone, and reading it gives encoder="none", in
    which P itself is what is trained.

    k: prompt length. encoder: "mlp", "lstm" or "none". hidden: h, the width of the network (None: d).
    Trained: k·d, and for the MLP (d·h + h) + (h² + h) + (h·d + d); no more than k·d stays in the end.
    Raises ValueError for another site than the decoder, or a k, an encoder or a width that does not exist.
    Source: Liu et al. 2021, arXiv:2103.10385, section 3.2; the network's layers are those of HF PEFT.
    """

    family = "soft prompt"
    targets, mixes = "decoder", False
    hf_type, hf_hyper, hf_params = "P_TUNING", {"k": "num_virtual_tokens"}, {"prompt": "prompt_embeddings"}

    def __init__(self, layer: nn.Module, k: int = 20, encoder: str = "mlp", hidden: int | None = None):
        super().__init__(layer)
        d = embedding_of(layer).embedding_dim
        h = d if hidden is None else hidden
        if encoder not in ("mlp", "lstm", "none"):
            raise ValueError(f"encoder={encoder!r} is not known; take 'mlp', 'lstm' or 'none'")
        if h < 1:
            raise ValueError(f"hidden={hidden} is no width; take a positive number, or None for the model's {d}")
        self.prompt = nn.Parameter(torch.randn(k, d))
        self.encoder = encoder
        if self.encoder == "mlp":
            self.mlp = nn.Sequential(nn.Linear(d, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, d))
        if self.encoder == "lstm":
            self.lstm = nn.LSTM(d, h, num_layers=LAYERS, bidirectional=True, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(2 * h, 2 * h), nn.ReLU(), nn.Linear(2 * h, d))

    @classmethod
    def plan(cls, model, paths, hyper):
        return plan_prompt(cls, model, paths, hyper)

    def expected(self) -> int:
        """k·d and the network: for the LSTM, two directions of four gates with two biases, then an MLP 2h → 2h → d"""
        k, d = self.hyper["k"], embedding_of(self.layer).embedding_dim
        h = self.hyper["hidden"] or d
        network = {"none": 0, "mlp": (d * h + h) + (h * h + h) + (h * d + d),
                   "lstm": 8 * h * (d + h + 2) + (LAYERS - 1) * 8 * h * (3 * h + 2)
                           + (4 * h * h + 2 * h) + (2 * h * d + d)}  # fmt: skip
        return k * d + network[self.hyper["encoder"]]

    def vectors(self) -> Tensor:
        """P (k, d), what stands before the tokens and what a file holds."""
        if self.encoder == "none":
            return self.prompt
        return self.mlp(self.prompt if self.encoder == "mlp" else self.lstm(self.prompt)[0])

    def forward(self, f, input_ids: Tensor | None = None, **inputs):  # (B, T) token ids -> h (B, T, d)
        return with_prompt(self.layer, f, self.vectors(), input_ids, **inputs)

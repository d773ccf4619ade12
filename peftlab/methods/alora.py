"""aLoRA: a LoRA that acts from its invocation on, so that what stands before is the base's. arXiv:2504.12397."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..core import Adapter
from ._invocation import Invoked, Watch
from ._lora import HYPER, PARAMS, Given, begin
from ._shadow import decoder_only


class ALoRA(Adapter):
    """aLoRA (activated LoRA): tokens before the invocation pass through the base alone, from there on through a LoRA.

    hₜ = W₀xₜ + 1[t ≥ t₀]·(α/r)·B·A·xₜ, with t₀ where the last `invocation`, a sequence of token ids, begins in the row;
    a row without one is the base's. B = 0: training starts at the base. In a model that writes, the keys and values
    before t₀ are the base's too, so the base's cache of a long text serves for any number of aLoRAs: call the model
    with the rest of the tokens and that cache. What follows an invocation in a cache that this model filled is adapted.

    invocation: ids, such as tokenizer("<check>").input_ids; they are given to the model as a part of the text.
    Trained: r·(in + out). Cannot be merged. Raises ValueError for no invocation, an encoder–decoder model, or a call
    without input_ids. With gradient checkpointing, take the backward pass before the next batch's forward pass.
    Source: Greenewald et al. 2025, arXiv:2504.12397.
    """

    family, mixes = "low-rank", False
    hf_type, hf_flags, hf_params = "LORA", {"alora_invocation_tokens": Given()}, PARAMS
    hf_hyper = {**HYPER, "invocation": "alora_invocation_tokens"}

    def __init__(
        self, layer: nn.Module, r: int = 8, alpha: float = 16, dropout: float = 0.0, rslora: bool = False,
        invocation: Sequence[int] = (),
    ):  # fmt: skip
        super().__init__(layer)
        begin(self, r, alpha, dropout, rslora)
        if len(invocation) == 0:
            raise ValueError("no invocation: give the token ids from which on it acts, invocation=[…]")
        self.__dict__["now"] = Invoked()

    @classmethod
    def plan(cls, model, paths, hyper):
        """And the decoder, where the tokens come in."""
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(f"{type(model).__name__} has an encoder, whose positions see those behind them")
        watch = {"invocation": hyper.get("invocation", ())}
        return {path: (Watch, watch) for path in [decoder_only(model)]} | {path: (cls, hyper) for path in paths}

    @classmethod
    def share(cls, made):
        now = Invoked()
        for adapter in made.values():
            adapter.__dict__["now"] = now

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 8, **_) -> int:
        """r·(in + out)"""
        return r * (in_features + out_features)

    def delta(self, x: Tensor) -> Tensor:  # (B, T, in) -> (B, T, out)
        BAx = self.dropout(x) @ self.lora_A.T @ self.lora_B.T
        on = self.now.tokens  # (B, T)
        return 0 * BAx if on is None else self.scaling * BAx * on.reshape(*x.shape[:-1], 1).to(x.device)

    def fold(self, layer: nn.Module) -> nn.Module:
        raise ValueError("aLoRA acts on some tokens and not on others, so no weight can stand for it")

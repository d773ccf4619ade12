"""LLaMA-Adapter: a gated attention to trained prompts. Zhang et al. 2023, arXiv:2303.16199."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from ..core import Adapter

# Families that attend as below. Others differ in it unseen: Cohere turns other pairs, OLMo-2 normalises all
# heads at once, StableLM turns a part of each head, SmolLM3 none in some layers, Gemma 2 caps the scores.
KNOWN = r"(Llama|Mistral|Mixtral|(Qwen2|Qwen3)(Moe)?|Gemma3?|Granite|Starcoder2)Attention"


class LlamaAdapter(Adapter):
    """LLaMA-Adapter: the last layers attend to k trained tokens apart from the text, behind a gate that is 0 first.

    a + g·softmax(q·K_pᵀ/√d_h)·V_p·W_o, with K_p = W_k·P and V_p = W_v·P from the layer's own projections of the trained
    tokens P (k, d). As the gate g is zero at first, training starts at the base. The two softmaxes are apart, so the
    text loses no attention to the prompt, as it does in prefix tuning.

    k: trained tokens a layer. layers: how many of the last attention layers have one.
    Trained: k·d + 1 a layer. Raises ValueError for attention that is not built as Llama's.
    Source: Zhang et al. 2023, arXiv:2303.16199, sections 3.1, 3.2; one gate a layer and P ~ N(0, 1) as in HF PEFT.
    """

    family = "soft prompt"
    hf_type, targets, mixes = "ADAPTION_PROMPT", "all-attention", False
    hf_hyper = {"k": "adapter_len", "layers": "adapter_layers"}
    hf_params = {"adaption_prompt": "adaption_prompt", "adaption_gate": "adaption_gate"}

    def __init__(self, layer: nn.Module, k: int = 10, layers: int = 2):
        super().__init__(layer)
        if k < 1:
            raise ValueError(f"k={k}: take at least one token")
        if not re.fullmatch(KNOWN, type(layer).__name__):
            raise ValueError(f"{type(layer).__name__} is not attention as in Llama, Mistral, Qwen, Gemma, Granite or "
                             "Starcoder2; take PrefixTuning, which knows more families")  # fmt: skip
        self.k = k
        self.adaption_prompt = nn.Parameter(torch.randn(1, k, layer.config.hidden_size))
        self.adaption_gate = nn.Parameter(torch.zeros(1))

    @classmethod
    def plan(cls, model: nn.Module, paths, hyper: dict) -> dict:
        layers = hyper.get("layers", 2)
        if not 1 <= layers <= len(paths):
            raise ValueError(
                f"layers={layers}, but {type(model).__name__} has {len(paths)} of them; take 1…{len(paths)}"
            )
        return {path: (cls, hyper) for path in paths[len(paths) - layers :]}

    def expected(self) -> int:
        """k·d + 1"""
        return self.k * self.layer.config.hidden_size + 1

    def forward(self, f, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs):
        attended, *rest = f(hidden_states, position_embeddings=position_embeddings, **kwargs)
        return attended + self.prompted(hidden_states, *position_embeddings), *rest

    def heads(self, y: Tensor, norm: str = "") -> Tensor:  # (B, T, heads·d_h) -> (B, heads, T, d_h)
        y = y.view(*y.shape[:2], -1, self.layer.head_dim)
        return getattr(self.layer, norm, nn.Identity())(y).transpose(1, 2)  # Qwen3 normalises queries and keys

    def prompted(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (B, T, d) -> (B, T, d)
        """g·softmax(q·K_pᵀ/√d_h)·V_p·W_o, softmax in float32; queries are rotated to their positions, K_p is not."""
        layer, P = self.layer, self.adaption_prompt.to(x.dtype)
        q, groups = self.heads(layer.q_proj(x), "q_norm"), layer.num_key_value_groups
        left, right = q.chunk(2, -1)
        q = q * cos[:, None] + torch.cat([-right, left], -1) * sin[:, None]
        K_p = self.heads(layer.k_proj(P), "k_norm").repeat_interleave(groups, 1)
        V_p = self.heads(layer.v_proj(P)).repeat_interleave(groups, 1)
        weights = torch.softmax(q @ K_p.mT * layer.scaling, -1, dtype=torch.float32)
        y = ((self.adaption_gate * weights).to(x.dtype) @ V_p).transpose(1, 2).flatten(2)
        return layer.o_proj(y) - layer.o_proj(torch.zeros_like(y[:1, :1]))  # a bias is in the frozen output already

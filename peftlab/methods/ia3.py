"""(IA)³: rescale keys, values and feed-forward activations. Liu et al. 2022, arXiv:2205.05638."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of

# Keys, values and the last feed-forward layer, as the families name them. GPT-2 and BLOOM compute queries, keys and
# values in one layer; there the queries are rescaled too, as in HF PEFT. HF PEFT's defaults are not the paper's three
# vectors in BERT (the attention's output layer as well), OPT and Qwen (queries in place of values or keys).
KEYS_VALUES = r"[kv]_proj|key|value|attn\.c_attn|query_key_value|(SelfAttention|EncDecAttention)\.[kv]"
FEEDFORWARD = r"down_proj|fc2|mlp\.c_proj|DenseReluDense\.wo|dense_4h_to_h|layer\.\d+\.output\.dense"


class IA3(Adapter):
    """(IA)³: one trained factor for each key, value and inner activation of the feed-forward network.

    h = l ⊙ (W₀x) on keys and values, with l (out,); h = W₀(l ⊙ x) on the last feed-forward layer, with l (in,), for its
    inputs are the inner activations. l starts at ones. It is kept as (out, 1) or (1, in), HF PEFT's shapes.

    feedforward: which of the targets are feed-forward: a regular expression for the end of a path, a list of path
    endings, or True or False for all of them; by default those that the known families name so. Trained: out, or in.
    Raises ValueError for a layer that is not linear, or a feedforward pattern that matches none of the targets.
    Source: Liu et al. 2022, arXiv:2205.05638, section 3.3.
    """

    family = "scaling"
    hf_type = "IA3"
    hf_params = {"ia3_l": "ia3_l"}
    targets = f"({KEYS_VALUES}|{FEEDFORWARD})"

    def __init__(self, layer: nn.Module, feedforward: bool | str | Sequence[str] | None = None):
        super().__init__(layer)
        out_features, in_features = shape_of(layer)
        self.ia3_l = nn.Parameter(torch.ones((1, in_features) if feedforward else (out_features, 1)))
        self.feedforward = bool(feedforward)

    @classmethod
    def plan(cls, model, paths, hyper):
        """Each path with its own `feedforward`, True or False."""
        given = hyper.get("feedforward")
        if isinstance(given, bool):
            return {path: (cls, {"feedforward": given}) for path in paths}
        pattern = FEEDFORWARD if given is None else given if isinstance(given, str) else "|".join(map(re.escape, given))
        inside = {path: re.fullmatch(rf"(.*\.)?({pattern})", path) is not None for path in paths}
        if given and not any(inside.values()):
            raise ValueError(f"feedforward={given!r} matches none of the {len(paths)} targets ({paths[0]}, …); name "
                             "the end of a target's path, or False if none is feed-forward")  # fmt: skip
        return {path: (cls, {"feedforward": inside[path]}) for path in paths}

    @staticmethod
    def size(out_features: int, in_features: int, feedforward: bool = False, **_) -> int:
        """out; in of a feed-forward layer"""
        return in_features if feedforward else out_features

    def forward(self, f, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        scale = self.ia3_l.flatten()  # products in its float32: bfloat16 has none in 1…1.0078
        return f((scale * x).to(x.dtype)) if self.feedforward else (scale * f(x)).to(x.dtype)

"""The layout of Shadow: the backbone stands beside the model, and every module's name is followed by "default"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..sites import group, sites
from .common import PREFIX, Layout, Plan, Weights

if TYPE_CHECKING:
    from ..core import Adapter

BACKBONE, NAME = "base_model.shadow_backbone.default.", ".default."
TABLES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")  # a backbone's own: written, never used


def _shadow_to_hf(model: nn.Module, found: Mapping[str, Adapter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from ..files import settings_of

    tensors = {}
    for path, adapter in found.items():
        for name, tensor in adapter.state_dict().items():
            part, _, rest = name.partition(".")
            tensors[BACKBONE + rest if part == "shadow_backbone" else f"{PREFIX}{path}.{part}{NAME}{rest}"] = tensor
    (method,) = {type(adapter) for adapter in found.values()}
    blocks = [path for path in found if path in group(model, "all-blocks")]
    return tensors, {"target_modules": blocks, "shadow_model": "mirror", "share_embeddings": True,
                     **settings_of(method, found)}  # fmt: skip


def _shadow_from_hf(model: nn.Module, method: type[Adapter], config: dict, tensors: dict[str, Tensor]):
    if config.get("shadow_model", "mirror") != "mirror" or not config.get("share_embeddings", True):
        raise ValueError("its backbone is no mirror of the base on the base's own token vectors, which alone is "
                         "implemented here")  # fmt: skip
    weights: Weights = {}
    for key, tensor in tensors.items():
        if key.startswith(BACKBONE):
            if not key.endswith(TABLES):
                weights.setdefault(group(model, "decoder")[0], {})[f"shadow_backbone.{key[len(BACKBONE):]}"] = tensor
            continue
        owner, _, rest = key.removeprefix(PREFIX).partition(NAME)
        path, _, part = owner.rpartition(".")
        if path not in sites(model):
            raise ValueError(f"{key!r} belongs to no module of this model")
        weights.setdefault(path, {})[f"{part}.{rest}"] = tensor
    hyper = {ours: config[theirs] for ours, theirs in method.hf_hyper.items() if theirs in config}
    plan: Plan = method.plan(model, [path for path in group(model, "all-blocks") if path in weights], hyper)
    return plan, weights


KNOWN = frozenset({"r", "shadow_alpha", "shadow_dropout", "shadow_num_hidden_layers", "update_hidden_size",
                   "shadow_model", "share_embeddings", "auxiliary_loss_weight"})  # fmt: skip
LAYOUTS: dict[str, Layout] = {"SHADOW": Layout(_shadow_to_hf, _shadow_from_hf, KNOWN)}

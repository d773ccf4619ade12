"""The layouts of MiSS, whose variant has another name, and of GLoRA, which writes what it has not as zeros."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..layers import shape_of
from ..sites import sites
from .common import PREFIX, Layout, Weights, keyed, paths_of

if TYPE_CHECKING:
    from ..core import Adapter


def _settings(model: nn.Module, found: Mapping[str, Adapter]) -> dict[str, Any]:
    """Targets and hyper-parameters; ValueError for one that differs between layers."""
    from ..files import endings_of

    adapters = list(found.values())
    settings: dict[str, Any] = {"target_modules": endings_of(model, list(found))}
    for ours in adapters[0].hyper:
        if any(adapter.hyper[ours] != adapters[0].hyper[ours] for adapter in adapters):
            raise ValueError(f"{ours} differs between layers, which HF PEFT's format cannot express")
    return settings | {theirs: adapters[0].hyper[ours] for ours, theirs in adapters[0].hf_hyper.items()}


def _hyper(method: type[Adapter], config: dict) -> dict[str, Any]:
    return {ours: config[theirs] for ours, theirs in method.hf_hyper.items() if theirs in config}


def _miss_to_hf(model: nn.Module, found: Mapping[str, Adapter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """HF PEFT has the variant under init_weights, though it is no matter of the start alone."""
    variant = next(iter(found.values())).hyper["variant"]
    return keyed(found), _settings(model, found) | {"init_weights": True if variant == "plain" else variant}


def _miss_from_hf(model: nn.Module, method: type[Adapter], config: dict, tensors: dict[str, Tensor]):
    blocks = paths_of(model, tensors, "miss_block")
    said = config.get("init_weights", True)
    hyper = {"variant": "plain" if isinstance(said, bool) else said, **_hyper(method, config)}
    return method.plan(model, list(blocks), hyper), {path: {"miss_block": block} for path, block in blocks.items()}


def _glora_to_hf(model: nn.Module, found: Mapping[str, Adapter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Without the vectors of zeros, HF PEFT warns that parts are missing; it is none the worse for A and B."""
    tensors = keyed(found)
    for path, adapter in found.items():
        out_features, in_features = shape_of(adapter.layer)
        for part, shape in (("C", (in_features, 1)), ("D", (out_features,)), ("E", (out_features,))):
            if not any(key.startswith(f"{PREFIX}{path}.glora_{part}.") for key in tensors):
                tensors[f"{PREFIX}{path}.glora_{part}.zeros"] = torch.zeros(shape)
    return tensors, _settings(model, found)


def _glora_from_hf(model: nn.Module, method: type[Adapter], config: dict, tensors: dict[str, Tensor]):
    weights: Weights = {}
    for key, tensor in tensors.items():
        path, part, name = key.removeprefix(PREFIX).rsplit(".", 2)
        if path not in sites(model):
            raise ValueError(f"{key!r} belongs to no module of this model")
        if name != "zeros":
            weights.setdefault(path, {})[f"{part}_{name}"] = tensor
        elif tensor.any():
            raise ValueError(f"{key!r} is a part that is switched off, and not zero")
    return method.plan(model, list(weights), _hyper(method, config)), weights


LAYOUTS: dict[str, Layout] = {
    "MISS": Layout(_miss_to_hf, _miss_from_hf, frozenset({"init_weights"})),
    "GLORA": Layout(_glora_to_hf, _glora_from_hf, frozenset()),
}

"""The layouts of contexts, prefixes from a text, and mixtures of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..layers import shape_of
from ..sites import at, bare, group, sites
from .classic import headed, refuse_others
from .common import PREFIX, Layout, Plan, Weights, paths_of

if TYPE_CHECKING:
    from ..core import Adapter

SOFT = frozenset({"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"})


def _cpt_to_hf(model: nn.Module, found: Mapping[str, Adapter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """E + δ as one table; HF PEFT adds a δ of its own, which is nil then."""
    ((_, cpt),) = found.items()
    prompt: Tensor = cpt.vectors()  # type: ignore[operator]
    settings: dict[str, Any] = {theirs: cpt.hyper[ours] for ours, theirs in cpt.hf_hyper.items()}
    k, d = prompt.shape
    settings |= {"cpt_tokens_type_mask": cpt.kinds, "cpt_mask": [1] * k, "opt_weighted_loss_type": "decay",
                 "num_virtual_tokens": k, "token_dim": d, "num_transformer_submodules": 1}  # fmt: skip
    return {"prompt_embeddings": prompt}, settings


def _cpt_from_hf(model: nn.Module, method: type[Adapter], config: dict, tensors: dict[str, Tensor]):
    refuse_others(model, tensors, {"prompt_embeddings"})
    hyper = {ours: config[theirs] for ours, theirs in method.hf_hyper.items()}
    if config.get("opt_weighted_loss_type", "none") == "none":
        hyper["decay"] = 1.0
    plan: Plan = method.plan(model, group(model, "decoder"), hyper)
    return plan, {path: {"prompt": tensors["prompt_embeddings"]} for path in plan}


def _cartridge_to_hf(model: nn.Module, found: Mapping[str, Adapter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(k, 2·L·d_kv) as of prefix tuning: keys, then values, layer by layer; the frozen tokens come first."""
    if list(found) != group(model, "all-attention"):
        raise ValueError("HF PEFT's format has a prefix in each attention layer; attach with targets='all-attention'")
    one: Any = next(iter(found.values()))
    settings = {"num_virtual_tokens": one.k, "num_frozen_tokens": one.frozen, "token_dim": one.d_kv,
                "num_attention_heads": one.heads, "num_layers": len(found),
                "num_transformer_submodules": 1}  # fmt: skip
    task, head = headed(model)
    prefix = torch.cat([a.prefix() for a in found.values()], -1)  # type: ignore[operator]
    return {"prompt_embeddings": prefix} | head, settings | task


def _cartridge_from_hf(model: nn.Module, method: type[Adapter], config: dict, tensors: dict[str, Tensor]):
    refuse_others(model, tensors, {"prompt_embeddings"})
    paths, frozen = group(model, "all-attention"), config["num_frozen_tokens"]
    parts = tensors["prompt_embeddings"].chunk(2 * len(paths), -1)
    weights = {path: {"F_k": K[:frozen], "P_k": K[frozen:], "F_v": V[:frozen], "P_v": V[frozen:]}
               for path, K, V in zip(paths, parts[::2], parts[1::2], strict=True)}  # fmt: skip
    return method.plan(model, paths, {"k": config["num_virtual_tokens"], "frozen": frozen}), weights


def _lily_to_hf(model: nn.Module, found: Mapping[str, Adapter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Shared matrices are written once for each layer, as HF PEFT does."""
    from ..files import endings_of, settings_of

    names = type(next(iter(found.values()))).hf_params
    tensors = {f"{PREFIX}{path}.{theirs}": getattr(adapter, ours).detach().clone()
               for path, adapter in found.items() for ours, theirs in names.items()}  # fmt: skip
    settings = settings_of(type(next(iter(found.values()))), found)
    return tensors, {"target_modules": endings_of(model, list(found)), **settings}


def _lily_from_hf(model: nn.Module, method: type[Adapter], config: dict, tensors: dict[str, Tensor]):
    """Layers in model order, not that of the file, which is the alphabet's."""
    from ..methods.lily import keepers

    read: Weights = {}
    for ours, theirs in method.hf_params.items():
        for path, tensor in paths_of(model, {k: t for k, t in tensors.items() if k.endswith(theirs)}, theirs).items():
            read.setdefault(path, {})[ours] = tensor
    hyper = {ours: config[theirs] for ours, theirs in method.hf_hyper.items()}
    weights = {path: read[path] for path in sites(model) if path in read}
    shapes = {path: shape_of(bare(at(model, path))) for path in weights}
    for path, (A, B) in keepers(shapes, hyper["stride"]).items():
        for name, keeper in (("lily_A", A), ("lily_B", B)):
            if keeper != path and not torch.equal(weights[path].pop(name), weights[keeper][name]):
                raise ValueError(f"{keeper!r} and {path!r} share {name} here and not in the file, whose targets must "
                                 "be the last words of paths")  # fmt: skip
    return {path: (method, hyper) for path in weights}, weights


CLASSIFIER = "base_model.internal_xlora_classifier."


def _xlora_to_hf(model: nn.Module, found: Mapping[str, Adapter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The classifier. The experts have folders of their own, which the config names 0, 1, … in this order."""
    ((_, one),) = found.items()
    settings = {theirs: one.hyper[ours] for ours, theirs in one.hf_hyper.items()}
    experts = {str(i): name for i, name in enumerate(one.hyper["of"])}
    settings |= {"adapters": experts, "hidden_size": one.layers[0].in_features}  # type: ignore[index, union-attr]
    return {CLASSIFIER + name: tensor for name, tensor in one.state_dict().items()}, settings


def _xlora_from_hf(model: nn.Module, method: type[Adapter], config: dict, tensors: dict[str, Tensor]):
    """Experts are known by the last part of their path, and must be attached."""
    if not any(key.startswith(f"{CLASSIFIER}layers.0.") for key in tensors):
        raise ValueError("it has no first layer of the classifier: HF PEFT 0.21 leaves it out when it saves, taking "
                         "the 0 in its name for the first expert's")  # fmt: skip
    hyper = {ours: config[theirs] for ours, theirs in method.hf_hyper.items() if theirs in config}
    hyper["of"] = tuple(str(path).rstrip("/").rpartition("/")[2] for path in config["adapters"].values())
    paths = group(model, "decoder")
    weights: Weights = {path: {key.removeprefix(CLASSIFIER): t for key, t in tensors.items()} for path in paths}
    return method.plan(model, paths, hyper), weights


LAYOUTS: dict[str, Layout] = {
    "LILY": Layout(_lily_to_hf, _lily_from_hf, frozenset()),
    "CARTRIDGE": Layout(_cartridge_to_hf, _cartridge_from_hf, SOFT),
    "XLORA": Layout(_xlora_to_hf, _xlora_from_hf, frozenset({"adapters", "hidden_size", "use_trainable_adapters"})),
    "CPT": Layout(_cpt_to_hf, _cpt_from_hf, SOFT | {"cpt_mask", "opt_weighted_loss_type", "tokenizer_name_or_path"}),
}

"""The layouts of methods whose layers share tensors: what is shared stands once in the file, beside all modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..layers import is_linear, shape_of
from ..sites import at, bare, sites
from .common import PREFIX, Layout, Plan, Weights

if TYPE_CHECKING:
    from ..core import Adapter

ROOT = "base_model."  # before the name of a shared tensor


def _settings(model: nn.Module, found: Mapping[str, Adapter]) -> dict[str, Any]:
    from ..files import endings_of, settings_of

    method = type(next(iter(found.values())))
    return {"target_modules": endings_of(model, list(found)), "modules_to_save": None, **settings_of(method, found)}


def _to_hf(model: nn.Module, found: Mapping[str, Adapter], shared: Mapping[str, str]):
    """shared: our name of a shared tensor -> its name in the file."""
    tensors = {}
    for path, adapter in found.items():
        for name, tensor in adapter.state_dict().items():
            tensors[f"{ROOT}{shared[name]}" if name in shared else f"{PREFIX}{path}.{name}"] = tensor
    return tensors, _settings(model, found)


def _apart(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[Weights, dict[str, Tensor]]:
    """({path: {parameter: tensor}} in the model's order, {name: shared tensor})."""
    own: Weights = {}
    for key in tensors:
        if key.startswith(PREFIX):
            path, _, parameter = key.removeprefix(PREFIX).rpartition(".")
            own.setdefault(path, {})[parameter] = tensors[key]
    there = sites(model)
    if strange := [path for path in own if path not in there]:
        raise ValueError(f"{type(model).__name__} has no module {strange[0]!r}: this is an adapter of another model")
    return ({path: own[path] for path in there if path in own},
            {key.removeprefix(ROOT): t for key, t in tensors.items() if not key.startswith(PREFIX)})  # fmt: skip


def _hyper(method: type[Adapter], config: Mapping) -> dict[str, Any]:
    return {ours: config[theirs] for ours, theirs in method.hf_hyper.items() if theirs in config}


def _projected(names: tuple[str, str], cut: Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor]]) -> Layout:
    """A frozen random pair: once beside all modules with save_projection, else not in the file.

    cut: (A, B, out, in) -> the part of them for layers not larger than that. A second adapter of HF PEFT has the first
    one's pair, though its own layers may all be smaller.
    """

    def from_hf(model: nn.Module, method: type[Adapter], config: dict, tensors: dict[str, Tensor]):
        own, shared = _apart(model, tensors)
        weights = {path: {n: t for n, t in there.items() if n not in names} for path, there in own.items()}
        hyper = {"save_projection": True, **_hyper(method, config)}  # HF PEFT's default
        plan: Plan = {path: (method, hyper) for path in weights}
        if hyper["save_projection"]:
            shapes = [shape_of(bare(at(model, path))) for path in plan]
            pair = cut(shared[names[0]], shared[names[1]], max(s[0] for s in shapes), max(s[1] for s in shapes))
            weights[min(plan)] |= {f"shared.{name}": tensor for name, tensor in zip(names, pair, strict=True)}
        return plan, weights

    return Layout(lambda model, found: _to_hf(model, found, {f"shared.{n}": n for n in names}), from_hf, frozenset())


def _columns_and_rows(A: Tensor, B: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    return A[:, :in_features], B[:out_features]


def _bases(A: Tensor, B: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """RandLoRA's A (r, 1, smaller side) and B (larger side, number of bases, r)."""
    few, many = sorted((out_features, in_features))
    return A[..., :few], B[:many, : -(-few // len(A))]


# ------------------------------------------------------------------------------------------------------- VB-LoRA

BANK, LOGITS = "vblora_vector_bank", ("vblora_logits_A", "vblora_logits_B")


def _bank_to_hf(model: nn.Module, found: Mapping[str, Adapter]):
    tensors, settings = _to_hf(model, found, {BANK: BANK})
    if settings["save_only_topk_weights"]:
        small = next(t for n, t in ((8, torch.uint8), (15, torch.int16), (31, torch.int32), (64, torch.int64))
                     if settings["num_vectors"] < 2**n)  # fmt: skip
        for key in [key for key in tensors if key.endswith(LOGITS)]:
            logits, where = tensors.pop(key).topk(settings["topk"])
            tensors[f"{key}_topk_indices"] = where.to(small)
            tensors[f"{key}_topk_weights"] = logits.softmax(-1)[..., :-1]  # the last is what they leave of 1
    return tensors, settings


def _bank_from_hf(model: nn.Module, method: type[Adapter], config: dict, tensors: dict[str, Tensor]):
    weights, shared = _apart(model, tensors)
    hyper = _hyper(method, config)
    for own in weights.values() if hyper.get("save_only_topk_weights") else ():
        for name in LOGITS:
            some, where = own.pop(f"{name}_topk_weights").float(), own.pop(f"{name}_topk_indices").long()
            last = (1 - some.sum(-1, keepdim=True)).clamp(min=0)  # rounding can make it less than nothing
            whole = torch.cat([some, last], -1).log()
            own[name] = whole.new_full((*where.shape[:-1], hyper["num_vectors"]), -torch.inf).scatter(-1, where, whole)
    plan: Plan = {path: (method, hyper) for path in weights}
    weights[min(plan)][BANK] = shared[BANK]
    return plan, weights


# ------------------------------------------------------------------------------------------------------ Uni-LoRA

THETA, INDICES, SCALES = "unilora_theta_d", ("unilora_indices_A", "unilora_indices_B"), "unilora_scales"


def _one_vector_to_hf(model: nn.Module, found: Mapping[str, Adapter]):
    """HF PEFT deals the vector out to its targets in the model's order: so does `share`, in that of attachment."""
    tensors, settings = _to_hf(model, found, {THETA: THETA, "shared.scale": SCALES})
    scale = tensors.pop(f"{ROOT}{SCALES}", None)
    for key, indices in list(tensors.items()) if scale is not None else ():
        if key.endswith(INDICES):
            tensors[key.replace(INDICES[0][:-2], SCALES)] = scale[indices]
    return tensors, settings


def _one_vector_from_hf(model: nn.Module, method: type[Adapter], config: dict, tensors: dict[str, Tensor]):
    """Without save_indices the file names no module: the targets are those that the config means."""
    weights, shared = _apart(model, tensors)
    hyper = _hyper(method, config)
    plan: Plan = {path: (method, hyper) for path in weights or _meant(model, config)}
    theta = shared[THETA]
    if weights:
        scale = torch.ones(len(theta))
        for own in weights.values():
            for indices in INDICES:
                scale[own[indices].flatten()] = own.pop(f"{SCALES}_{indices[-1]}").flatten().float()
        weights[min(plan)]["shared.scale"] = scale
    else:
        weights = {path: {} for path in plan}
    weights[min(plan)][THETA] = theta
    return plan, weights


def _meant(model: nn.Module, config: Mapping) -> list[str]:
    """The linear layers that target_modules means to HF PEFT: path endings, or an expression for whole paths."""
    wanted = config["target_modules"]
    for key in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if config.get(key):
            raise ValueError(f"{key}={config[key]!r}, and no indices in the file: which modules it adapts cannot be "
                             "told; save it with save_indices=True")  # fmt: skip
    if isinstance(wanted, str):
        hit = {path for path in sites(model) if re.fullmatch(wanted, path)}
    else:
        hit = {path for path in sites(model) if any(f".{path}".endswith(f".{ending}") for ending in wanted)}
    found = [path for path in sites(model) if path in hit and is_linear(bare(at(model, path)))]
    if not found:
        raise ValueError(f"target_modules={wanted!r} names no linear layer of {type(model).__name__}")
    return found


# ------------------------------------------------------------------------------------------------------- TinyLoRA


def _tiny_to_hf(model: nn.Module, found: Mapping[str, Any]):
    tensors, settings = _to_hf(model, found, {})
    for path, adapter in found.items():
        if (v := tensors.pop(f"{PREFIX}{path}.tinylora_v", None)) is not None:
            tensors[f"{ROOT}tinylora_v.{adapter.group}"] = v
    return tensors, settings


def _tiny_from_hf(model: nn.Module, method: type[Adapter], config: dict, tensors: dict[str, Tensor]):
    from ..methods._dealing import groups

    weights, shared = _apart(model, tensors)
    hyper = _hyper(method, config)
    plan: Plan = {path: (method, hyper) for path in weights}
    for group in set(numbers := groups(len(plan), hyper["weight_tying"])):
        first = min(path for path, number in zip(plan, numbers, strict=True) if number == group)
        weights[first]["tinylora_v"] = shared[f"tinylora_v.{group}"]
    return plan, weights


# ----------------------------------------------------------------------------------------------------------- FRoD


def _basis_to_hf(model: nn.Module, found: Mapping[str, Adapter]):
    """V and the places of S, once for each kind of layer; what follows from V and the base is left out."""
    from ..methods._joint import kind_of

    plain, settings = _to_hf(model, found, {})
    tensors = {key: t for key, t in plain.items() if not key.endswith((".U", ".start"))}
    for path in found:
        here = f"{PREFIX}{path}.shared."
        if (V := tensors.pop(f"{here}V", None)) is not None:
            tensors[f"{ROOT}frod_V.{kind_of(path)}"] = V
            tensors[f"{ROOT}frod_s_indices.{kind_of(path)}"] = tensors.pop(f"{here}where")
            tensors[f"{ROOT}frod_s_size.{kind_of(path)}"] = torch.tensor(V.shape)
    return tensors, settings


def _basis_from_hf(model: nn.Module, method: type[Adapter], config: dict, tensors: dict[str, Tensor]):
    from ..methods._joint import in_basis, kind_of

    weights, shared = _apart(model, tensors)
    hyper = {"save_projection": True, **_hyper(method, config)}
    plan: Plan = {path: (method, hyper) for path in weights}
    for kind in {kind_of(path) for path in plan} if hyper["save_projection"] else ():
        V, alike = shared[f"frod_V.{kind}"].float(), [path for path in plan if kind_of(path) == kind]
        weights[min(alike)] |= {"shared.V": V, "shared.where": shared[f"frod_s_indices.{kind}"]}
        for path in alike:
            weights[path]["U"], weights[path]["start"] = in_basis(bare(at(model, path)), V)
    return plan, weights


LAYOUTS: dict[str, Layout] = {
    "VERA": _projected(("vera_A", "vera_B"), _columns_and_rows),
    "PVERA": _projected(("pvera_A", "pvera_B"), _columns_and_rows),
    "RANDLORA": _projected(("randlora_A", "randlora_B"), _bases),
    "VBLORA": Layout(_bank_to_hf, _bank_from_hf, frozenset()),
    "UNILORA": Layout(_one_vector_to_hf, _one_vector_from_hf, frozenset()),
    "FROD": Layout(_basis_to_hf, _basis_from_hf, frozenset()),
    "TINYLORA": Layout(_tiny_to_hf, _tiny_from_hf, frozenset()),
}

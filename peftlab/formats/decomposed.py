"""The layouts of AdaLoRA, whose files leave dropped triplets out, and OSF, whose layers may keep different ranks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..layers import shape_of
from ..sites import at, bare
from .common import PREFIX, Layout, Plan, Weights, paths_of

if TYPE_CHECKING:
    from ..core import Adapter


def _adalora_to_hf(model: nn.Module, found: Mapping[str, Adapter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The triplets that are kept, and which they were: HF PEFT divides α by the number there was at first."""
    from ..files import endings_of, settings_of

    tensors, kept = {}, {}
    for path, a in found.items():
        mask = a.mask.cpu()  # type: ignore[operator]
        for name, part in (("lora_A", a.lora_A[a.mask]), ("lora_E", a.lora_E[a.mask]), ("lora_B", a.lora_B[:, a.mask])):
            tensors[f"{PREFIX}{path}.{name}"] = part.detach()
        kept[f"{path}.lora_E"] = mask.tolist()
    (method,) = {type(a) for a in found.values()}
    settings = {"target_modules": endings_of(model, list(found)), "modules_to_save": None, **settings_of(method, found)}
    # a training schedule without which HF PEFT refuses the file, though it means nothing to a finished adapter
    settings["total_step"] = settings["tinit"] + settings["tfinal"] + 1
    if not all(map(all, kept.values())):
        settings["rank_pattern"] = kept
    return tensors, settings


def _adalora_from_hf(model: nn.Module, method: type[Adapter], config: dict, tensors: dict[str, Tensor]):
    """Rows and columns that were left out come back as zeros; `mask` knows them."""
    hyper = {ours: config[theirs] for ours, theirs in method.hf_hyper.items() if theirs in config}
    pattern, weights = config.get("rank_pattern") or {}, Weights()
    for name in ("lora_A", "lora_E", "lora_B"):
        part = {key: t for key, t in tensors.items() if key.endswith(f".{name}")}
        for path, t in paths_of(model, part, name).items():
            mask = torch.tensor(pattern.get(f"{path}.lora_E", [True] * hyper["r"]), dtype=torch.bool)
            t = t.T if name == "lora_B" else t
            if mask.sum() != len(t):
                raise ValueError(f"{path}.{name} holds {len(t)} triplets, its config speaks of {int(mask.sum())}")
            whole = t.new_zeros(len(mask), t.shape[1])
            whole[mask] = t
            weights.setdefault(path, {"mask": mask})[name] = whole.T if name == "lora_B" else whole
    if odd := set(tensors) - {f"{PREFIX}{path}.{name}" for path, found in weights.items() for name in found}:
        raise ValueError(f"{min(odd)!r} is no part of AdaLoRA")
    plan: Plan = {path: (method, hyper) for path in weights}
    return plan, weights


def _osf_to_hf(model: nn.Module, found: Mapping[str, Adapter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from ..files import endings_of

    tensors = {f"{PREFIX}{path}.{a.hf_params[n]}": t.detach()
               for path, a in found.items() for n, t in a.named_parameters()}  # fmt: skip
    ranks = {path: a.hyper["effective_rank"] for path, a in found.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    other = {f"^{re.escape(path)}$": n for path, n in ranks.items() if n != common}
    return tensors, {"target_modules": endings_of(model, list(found)), "effective_rank": common} | (
        {"rank_pattern": other} if other else {})  # fmt: skip


def _osf_from_hf(model: nn.Module, method: type[Adapter], config: dict, tensors: dict[str, Tensor]):
    """What a layer's tensors say counts; the config's own way to say it (None, a fraction) is kept if it agrees."""
    weights: Weights = {}
    for ours, theirs in method.hf_params.items():
        for path, t in paths_of(model, {k: t for k, t in tensors.items() if k.endswith(theirs)}, theirs).items():
            weights.setdefault(path, {})[ours] = t
    if odd := set(tensors) - {f"{PREFIX}{p}.{method.hf_params[n]}" for p, found in weights.items() for n in found}:
        raise ValueError(f"{min(odd)!r} is no part of OSF")
    plan: Plan = {}
    for path, found in weights.items():
        shape, said = shape_of(bare(at(model, path))), config.get("effective_rank")
        k = len(found["S_low"]) * (sum(shape) + 1)
        try:
            agrees = method.size(*shape, effective_rank=said) == k
        except ValueError:
            agrees = False
        plan[path] = (method, {"effective_rank": said if agrees else min(shape) - len(found["S_low"])})
    return plan, weights


LAYOUTS = {
    "ADALORA": Layout(_adalora_to_hf, _adalora_from_hf, frozenset({"r", "total_step", "rank_pattern"})),
    "OSF": Layout(_osf_to_hf, _osf_from_hf, frozenset({"target_svd_config"})),
}

"""Adapters folded into the weights, and combined with each other. The model is changed in place."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .attach import Sharing, adapters, check_attached, check_name, did_you_mean, hosts, merged_names, switch_of
from .core import Adapter
from .lowrank import attach_products, attach_values, product_of, shorten, truncate
from .task_vectors import RULES, join

WAYS = ("cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
        "magnitude_prune", "magnitude_prune_svd")  # fmt: skip
Product = tuple[float, Tensor, Tensor, float]  # w, A (r, in), B (out, r), s of the change w·s·B·A


def merge(model: nn.Module, *names: str) -> nn.Module:
    """Fold adapters into the weights (default: the active ones): the same outputs, the speed of the base.

    The untouched layers are kept (their memory too), so that `unmerge` is exact. Names must be the innermost of the
    active adapters. Raises ValueError for a method that is not an affine map, or a tied layer; then nothing is merged.
    """
    switch = switch_of(model)
    names = names or switch.active
    check_attached(model, names)
    if merged_names(model):
        raise ValueError(f"{', '.join(merged_names(model))} is merged already; unmerge(model) first")
    if not names:
        raise ValueError("no adapter is active, so there is nothing to merge; name the adapters")
    if switch.active and switch.active[: len(names)] != tuple(names):
        raise ValueError(f"active are {switch.active}, innermost first; {names} is not how they begin, so merging it "
                         "would change their order. Name them in that order, or activate(model, …) first")  # fmt: skip
    there = hosts(model)
    for path, host in there.items():
        try:
            host.check_merge(names)
        except ValueError as error:
            raise ValueError(f"{names} cannot be merged at {path!r}: {error}") from None
    sharing = Sharing(model)
    try:
        for path, host in there.items():
            if any(n in host.adapters for n in names):
                if sharing.tied(host.layer):
                    raise ValueError(f"{path!r} shares its weight with another module; merging would untie them")
            try:
                host.merge(tuple(names))
            except ValueError as error:
                raise ValueError(f"{names} cannot be merged at {path!r}: {error}") from None
    except BaseException:
        unmerge(model)
        raise
    if not switch.active:
        switch.active = tuple(names)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Take merged adapters out of the weights again, bit for bit; they stay attached and active.

    Where nothing is merged, nothing is done.
    """
    for host in hosts(model).values():
        host.unmerge()
    return model


@torch.no_grad()
def combine(
    model: nn.Module, weights: Mapping[str, float], how: str = "cat", name: str = "combined", *,
    density: float | None = None, svd_rank: int | None = None, majority_sign_method: str = "total",
    seed: int | None = None,
) -> nn.Module:  # fmt: skip
    """Attach a new adapter made of attached ones, and make it the active one; the sources stay as they are.

        combine(model, {"sql": 0.7, "reviews": 0.4}, how="ties", name="both", density=0.5)

    weights: {adapter name: wᵢ}; a negative one subtracts. Where an adapter is not attached, its change is 0.

    Exact, the change of the new adapter is Σ wᵢ·ΔWᵢ with ΔWᵢ = sᵢ·BᵢAᵢ:
      cat      A and B of all, one below the other; rank Σ rᵢ. {"a": -1} is −ΔW, {"a": 0.3} is `remedies.rescale`,
               equal weights 1/n are a soup. LoRA Soups' CAT is this, but learns a weight for each layer.
      svd      the same sum, truncated to `svd_rank` (default: the largest rᵢ): the nearest matrix of that rank
    On the change ΔWᵢ of each weight, as the papers have it, then truncated to `svd_rank`, which costs a singular value
    decomposition of each whole matrix (see `lowrank.truncate`) and brings back some of what was cut:
      magnitude_prune_svd, ties_svd, dare_linear_svd, dare_ties_svd
    The same on A and B apart, as HF PEFT does: cheap, of the sources' own rank, but another thing, for B·A of a sum
    has cross terms. With two LoRAs of weight ½, ¼·(B₁+B₂)(A₁+A₂) takes half of each and B₁A₂, B₂A₁ that nobody trained;
    pruning factors does not prune ΔW; and an election between columns of B has no meaning unless the i-th directions of
    both have one. All ranks must be the same:
      linear, magnitude_prune, ties, dare_linear, dare_ties     each with √|wᵢsᵢ| on A and on B, the sign on A

    density: for all but cat, linear and svd: the share of numbers to keep, 0 < density ≤ 1 (TIES keeps 0.2; DARE's drop
    rate is 1 − density). For TIES and magnitude_prune counted in each tensor; TIES itself counts over the whole model.
    majority_sign_method: of TIES' election, "total" as in the paper or "frequency".
    seed: of DARE's masks; None: torch's own generator, so that torch.manual_seed decides.

    (IA)³ adapters, whose change is a factor l: "linear" is Σ wᵢ·lᵢ as in HF PEFT, which for Σ wᵢ ≠ 1 rescales the base
    too (a warning says so); "cat" is the exact sum of changes, l = 1 + Σ wᵢ·(lᵢ − 1).

    Every way gives HF PEFT 0.21's result of that name, but for sources with rslora, where that is √r times too large
    (huggingface/peft #3761), and for one source alone, where HF PEFT takes "linear" whatever it was told.
    The new adapter is a LoRA with alpha = r and without dropout, trainable as any other.
    Raises ValueError or TypeError with the model as it was: unknown names or ways, merged adapters, methods that are no
    product s·B·A (make a LoRA of them first: `to_lora`), copies of modules (modules_to_save: two heads trained apart
    have no common meaning, and one has none without its adapter).
    Sources: task arithmetic, Ilharco et al. 2022, arXiv:2212.04089; soups, Wortsman et al. 2022, arXiv:2203.05482;
    WiSE-FT, Wortsman et al. 2021, arXiv:2109.01903; TIES-Merging, Yadav et al. 2023, arXiv:2306.01708; DARE, Yu et al.
    2023, arXiv:2311.03099; LoRA Soups, Prabhakar et al. 2024, arXiv:2410.13025.
    """
    _check_weights(model, weights, name)
    _check_way(how, len(weights), density, svd_rank, majority_sign_method)
    if seed is not None and type(seed) is not int:
        raise ValueError(f"seed={seed!r}: must be a whole number, or None")
    found = adapters(model)
    paths = [p for p in hosts(model) if any(p in found[n] for n in weights)]  # in model order, for DARE's draws
    _check_copies({n: found[n] for n in weights})
    if all(type(a).__name__ == "IA3" for n in weights for a in found[n].values()):
        return _combine_ia3(model, weights, how, name, paths)
    layers = {path: {n: _product(n, path, w, found[n][path]) for n, w in weights.items() if path in found[n]}
              for path in paths}  # fmt: skip
    draw = None if seed is None else torch.Generator().manual_seed(seed)
    made = {}
    for path, parts in layers.items():
        if how in RULES:
            _check_ranks(path, parts, how)
        try:
            made[path] = _combined(list(parts.values()), how, density or 1.0, svd_rank, majority_sign_method, draw)
        except ValueError as error:
            raise ValueError(f"{how} at {path!r}: {error}") from None
    return attach_products(model, name, made)


def _combined(parts: list[Product], how: str, density: float, svd_rank: int | None, majority: str,
              draw: torch.Generator | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(A, B) of the combination on one layer."""
    rank = svd_rank or max(len(A) for _, A, _, _ in parts)
    w = [weight for weight, *_ in parts]
    if how in ("cat", "svd"):
        A = torch.cat([weight * s * A for weight, A, _, s in parts])
        B = torch.cat([B for _, _, B, _ in parts], dim=1)
        if how == "svd":
            return shorten(A, B, rank)[:2]
        return (A, B) if len(A) <= min(A.shape[1], len(B)) else _square(A, B)  # no matrix has a rank above that
    if how.endswith("_svd"):
        changes = [(B @ A) * s for _, A, B, s in parts]
        return truncate(join(how.removesuffix("_svd"), changes, w, density, majority, draw), rank)[:2]
    strength = [weight * s for weight, _, _, s in parts]
    on_B = [math.sqrt(abs(v)) for v in strength]
    on_A = [math.copysign(root, v) for root, v in zip(on_B, strength, strict=True)]
    A = join(how, [A for _, A, _, _ in parts], on_A, density, majority, draw)
    return A, join(how, [B for _, _, B, _ in parts], on_B, density, majority, draw)


def _square(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with fewer rows in A: ΔW itself beside the identity."""
    W = B.double() @ A.double()
    out_features, in_features = W.shape
    one = torch.eye(min(W.shape), dtype=W.dtype, device=W.device)
    return (one, W) if in_features <= out_features else (W, one)


def _combine_ia3(model: nn.Module, weights: Mapping[str, float], how: str, name: str, paths: list[str]) -> nn.Module:
    """l = Σ wᵢ·lᵢ ("linear"), or l = 1 + Σ wᵢ·(lᵢ − 1) ("cat")."""
    if how not in ("linear", "cat"):
        raise ValueError(f"how={how!r} is for products s·B·A; (IA)³ adapters have 'linear', their weighted sum, and "
                         "'cat', the sum of their changes")  # fmt: skip
    found, plan, values, totals = adapters(model), {}, {}, {}
    for path in paths:
        here = {n: found[n][path] for n in weights if path in found[n]}
        first = next(iter(here.values()))
        if any(a.ia3_l.shape != first.ia3_l.shape for a in here.values()):
            raise ValueError(f"{path!r} is feed-forward for some of {', '.join(here)} and not for others: l scales "
                             "its inputs there and its outputs here")  # fmt: skip
        shift = 1.0 if how == "cat" else 0.0
        scale = shift + sum(weights[n] * (a.ia3_l - shift) for n, a in here.items())
        plan[path], values[path] = (type(first), dict(first.hyper)), {"ia3_l": scale}
        totals[path] = sum(weights[n] for n in here)
    attach_values(model, name, plan, values)
    off = next((p for p, total in totals.items() if abs(total - 1) > 1e-6), None)
    if how == "linear" and off:
        warnings.warn(f"the weights on {off!r} add up to {totals[off]:g}, and l = 1 is the base: Σ wᵢ·lᵢ rescales the "
                      "base as well. how='cat' adds up the changes alone", stacklevel=3)  # fmt: skip
    return model


# ------------------------------------------------------------------------------------------- what is checked first


def _check_weights(model: nn.Module, weights: Mapping[str, float], name: str) -> None:
    if not isinstance(weights, Mapping):
        raise TypeError(f'weights is {type(weights).__name__}; give each adapter its weight: {{"sql": 0.7, …}}')
    if not weights:
        raise ValueError('weights names no adapter; give each its weight: {"sql": 0.7, "reviews": 0.4}')
    check_attached(model, [str(n) for n in weights])
    for source, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"the weight of {source!r} is {weight!r}, no finite number")
    check_name(model, name)
    if merged := merged_names(model):
        raise ValueError(f"{', '.join(merged)} is merged into the weights; unmerge(model) first")


def _check_way(how: str, n: int, density: float | None, svd_rank: int | None, majority: str) -> None:
    if how not in WAYS:
        raise ValueError(f"how={how!r} is no way to combine{did_you_mean(str(how), WAYS)} There are {', '.join(WAYS)}")
    thins = how not in ("cat", "linear", "svd")
    if thins and density is None:
        raise ValueError(f"how={how!r} needs a density, the share of numbers to keep, such as density=0.5")
    if not thins and density is not None:
        raise ValueError(f"how={how!r} keeps all numbers, so density={density!r} would do nothing; leave it out")
    number = isinstance(density, (int, float)) and not isinstance(density, bool)
    if density is not None and not (number and 0 < density <= 1):
        raise ValueError(f"density={density!r} is not in 0 < density ≤ 1: 0.2 keeps a fifth of the numbers")
    if svd_rank is not None and not how.endswith("svd"):
        raise ValueError(f"svd_rank is for the ways that end in 'svd'; the rank of {how!r} follows from its sources")
    if svd_rank is not None and (type(svd_rank) is not int or svd_rank < 1):
        raise ValueError(f"svd_rank={svd_rank!r}: must be a whole number, at least 1")
    if majority not in ("total", "frequency"):
        raise ValueError(f"majority_sign_method={majority!r}: there are 'total' and 'frequency'")
    if "ties" in how and n < 2:
        raise ValueError(f"how={how!r} elects a sign between adapters, and there is only one; give two or more, or "
                         "'magnitude_prune', which trims one in the same way")  # fmt: skip


def _check_copies(sources: Mapping[str, Mapping[str, Adapter]]) -> None:
    for name, found in sources.items():
        if path := next((p for p, a in found.items() if type(a).__name__ == "ModuleCopy"), None):
            raise ValueError(f"{name!r} has a trained copy of {path!r} (modules_to_save): copies trained apart have no "
                             "common meaning, and a LoRA holds none. Combine adapters without one")  # fmt: skip


def _product(name: str, path: str, weight: float, adapter: Adapter) -> Product:
    """w·s·B·A of one adapter on one layer."""
    if type(adapter).__name__ == "ParameterLoRA":
        raise ValueError(f"{name!r} is on parameters of {type(adapter.layer).__name__} at {path!r}, and only adapters "
                         "of layers can be combined")  # fmt: skip
    if (product := product_of(adapter)) is None:
        raise ValueError(f"{name!r} is {type(adapter).__name__} on {path!r}, whose change is no product s·B·A; if it "
                         f"merges, make a LoRA of it: to_lora(model, {name!r}, r=8, into='{name}_lora')")  # fmt: skip
    A, B, scaling = product
    return weight, A.float(), B.float(), scaling


def _check_ranks(path: str, parts: Mapping[str, Product], how: str) -> None:
    ranks = {name: len(A) for name, (_, A, _, _) in parts.items()}
    if len(set(ranks.values())) > 1:
        said = ", ".join(f"{name} {r}" for name, r in ranks.items())
        other = "cat' or 'svd" if how == "linear" else f"{how}_svd"
        raise ValueError(f"how={how!r} works on A and B, whose ranks on {path!r} differ ({said}); take '{other}', "
                         "or to_lora(model, …) to bring them to one rank")  # fmt: skip

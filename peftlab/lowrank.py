"""LoRAs that are not trained but computed: of another method, of a LoRA of higher rank, or of a full fine-tuning.

    print(pl.to_lora(model, "scales", r=8, into="low"))      # any adapter that can be folded into linear layers
    print(pl.extract(base, tuned, r=16, name="tuned"))       # what full fine-tuning changed, as an adapter on the base

The best matrix of rank r for a change ΔW is its truncated singular value decomposition; what it misses is known before
the first test: ‖ΔW − BA‖² = Σ σᵢ² over i > r. Both functions return that, layer by layer.
Source: Eckart and Young 1936, doi:10.1007/BF02288367.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attach import (
    Targets,
    _check_site,
    adapters,
    attach_plan,
    check_attached,
    check_name,
    find_targets,
    hosts,
    merged_names,
)
from .core import Adapter
from .layers import is_linear, shape_of, weight_of
from .runtime import mode
from .sites import at, bare, sites

# ------------------------------------------------------------------------------------------------ matrices alone


class Truncated(NamedTuple):
    """B·A, the best matrix of its rank, and how good that is."""

    A: Tensor  # (r, in), orthonormal rows
    B: Tensor  # (out, r), with the singular values in its columns
    tail: float  # ‖ΔW − BA‖_F
    norm: float  # ‖ΔW‖_F


def truncate(W: Tensor, r: int) -> Truncated:
    """ΔW (out, in) -> A (r, in), B (out, r) with BA its best approximation:  U·diag(σ)·Vᵀ ← ΔW;  B ← U_r·σ_r, A ← V_rᵀ

    r above min(in, out) gives that. In float64; on one CPU core about 15 s for 2048², 8 times as long for twice the
    width.
    Source: Eckart and Young 1936, doi:10.1007/BF02288367.
    """
    U, S, Vt = torch.linalg.svd(W.double(), full_matrices=False)
    return Truncated(Vt[:r], U[:, :r] * S[:r], S[r:].norm().item(), S.norm().item())


def shorten(A: Tensor, B: Tensor, r: int) -> Truncated:
    """The same for a ΔW that is a product B·A already, A (n, in) and B (out, n), without forming it.

    B = Q_B·R_B and Aᵀ = Q_A·R_A, so B·A = Q_B·(R_B·R_Aᵀ)·Q_Aᵀ: the small matrix in the middle has the singular values.
    For r > n the product is filled up with zeros. Costs (in + out)·n² instead of in·out·min(in, out).
    """
    more = max(0, min(r, A.shape[1], B.shape[0]) - len(A))
    A, B = nn.functional.pad(A.double(), (0, 0, 0, more)), nn.functional.pad(B.double(), (0, more))
    (Q_A, R_A), (Q_B, R_B) = torch.linalg.qr(A.T), torch.linalg.qr(B)
    middle = truncate(R_B @ R_A.T, r)
    return Truncated(middle.A @ Q_A.T, Q_B @ middle.B, middle.tail, middle.norm)


def product_of(adapter: Adapter) -> tuple[Tensor, Tensor, float] | None:
    """(A, B, s) if the adapter's change is just s·B·A, whatever dropout it is trained with; else None."""
    with mode(adapter, training=False):
        factors = adapter.factors()
    return None if factors is None else (factors[0].detach(), factors[1].detach(), factors[2])


# ------------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class LowRank:
    """What a computed LoRA holds, layer by layer, and what it does not."""

    name: str
    r: int
    norms: dict[str, float] = field(default_factory=dict)  # path -> ‖ΔW‖_F
    tails: dict[str, float] = field(default_factory=dict)  # path -> ‖ΔW − BA‖_F
    left_out: dict[str, float] = field(default_factory=dict)  # other changed parameter (bias, norm, …) -> ‖Δ‖_F

    @property
    def errors(self) -> dict[str, float]:
        """path -> ‖ΔW − BA‖_F / ‖ΔW‖_F, from 0 to 1; 0 where nothing changed."""
        return {path: self.tails[path] / norm if norm else 0.0 for path, norm in self.norms.items()}

    @property
    def error(self) -> float:
        """The same for all changes together, with what is left out counted as missed."""
        missed = sum(v * v for part in (self.tails, self.left_out) for v in part.values())
        whole = sum(v * v for part in (self.norms, self.left_out) for v in part.values())
        return sqrt(missed / whole) if whole else 0.0

    def __repr__(self) -> str:
        errors = self.errors
        kept, most = f"{len(errors)} layer{'s' * (len(errors) != 1)}", 8
        rows = [(path, f"{errors[path]:.4f}") for path in sorted(errors, key=lambda p: -errors[p])]
        lines = [f"{self.name!r}: LoRA of rank {self.r} on {kept}, relative error {self.error:.4f} in all"]
        lines += _table(rows, most, "‖ΔW − BA‖ / ‖ΔW‖", "largest first")
        if self.left_out:
            rows = [(k, f"{v:.4f}") for k, v in sorted(self.left_out.items(), key=lambda kv: -kv[1])]
            lines += _table(rows, most, "‖Δ‖", "changed too, and in no LoRA")
        return "\n".join(lines)


def _table(rows: list[tuple[str, str]], most: int, head: str, what: str) -> list[str]:
    wide = max(map(len, [what, *(path for path, _ in rows[:most])]))
    lines = [f"  {path:<{wide}}  {value}" for path, value in [(what, head), *rows[:most]]]
    return lines + ([f"  … and {len(rows) - most} more"] if len(rows) > most else [])


# ------------------------------------------------------------------------------------------------- on whole models


def attach_values(model: nn.Module, name: str, plan: Mapping[str, tuple[type[Adapter], dict]],
                  values: Mapping[str, Mapping[str, Tensor]]) -> nn.Module:  # fmt: skip
    """`attach_plan` with the values of all parameters, {path: {parameter: tensor}}; ValueError if one is not finite."""
    for path, given in values.items():
        if not all(torch.isfinite(t).all() for t in given.values()):
            raise ValueError(f"{name!r} would hold NaN or inf at {path!r}; nothing was attached")
    attach_plan(model, name, plan)
    with torch.no_grad():
        for path, adapter in adapters(model)[name].items():
            for parameter, value in values[path].items():
                getattr(adapter, parameter).copy_(value)
    return model


def attach_products(model: nn.Module, name: str, products: Mapping[str, tuple[Tensor, Tensor]]) -> nn.Module:
    """Attach B·A of each path, A (r, in) and B (out, r), as a LoRA with alpha = r, so that it is scaled by 1."""
    from .methods.lora import LoRA

    plan: dict[str, tuple[type[Adapter], dict]] = {
        path: (LoRA, {"r": len(A), "alpha": len(A)}) for path, (A, _) in products.items()
    }
    return attach_values(model, name, plan, {p: {"lora_A": A, "lora_B": B} for p, (A, B) in products.items()})


def to_lora(model: nn.Module, name: str, r: int, into: str) -> LowRank:
    """Attach, as `into`, the LoRA of rank r that is nearest to an attached adapter, and make it the active one.

    Any adapter on linear layers whose change can be folded into their weights (IA3, DoRA, ModuleCopy, …); no method
    needs code for it. A LoRA gets a lower rank this way, without a dense matrix. r: capped at min(in, out) of a layer,
    where it is exact. The adapter of `name` stays as it is, alpha is r, and biases that it changes are in the table's
    `left_out`: a LoRA has none. Costs a singular value decomposition a layer, see `truncate`.
    Returns the relative error of each layer. Raises ValueError for other sites than linear layers, a change that is
    not affine or in the biases alone (BitFit), and merged adapters; the model is then as it was.
    """
    check_attached(model, [str(name)])
    _check_free(model, into)
    _check_rank(r)
    found = adapters(model)[name]
    for path, adapter in found.items():
        if not is_linear(adapter.layer):
            raise ValueError(f"{name!r} is {type(adapter).__name__} on {path!r}, no linear layer: no product B·A "
                             "stands for it")  # fmt: skip
    table, products = LowRank(into, r), {}
    for path, adapter in found.items():
        if product := product_of(adapter):
            A, B, scaling = product
            short = shorten(A, scaling * B.double(), r)
        else:
            try:
                W, b = _folded(adapter)
            except ValueError as error:
                raise ValueError(f"{name!r} at {path!r}: {error}") from None
            short = truncate(W, r)
            if size := b.norm().item():
                table.left_out[f"{path}.bias"] = size
        products[path] = short.A, short.B
        table.norms[path], table.tails[path] = short.norm, short.tail
    if table.left_out and not any(table.norms.values()):
        raise ValueError(f"{name!r} changes biases alone, and a LoRA has none: there is nothing that it could hold")
    attach_products(model, into, products)
    return table


@torch.no_grad()
def _folded(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """(ΔW (out, in), Δb (out,)) of an adapter that is alone on its layer, in float64."""
    layer = copy.deepcopy(adapter.layer).double()
    W, b = _affine(layer)
    W_new, b_new = _affine(adapter.fold(layer))
    return W_new - W, b_new - b


def _affine(layer: nn.Module) -> tuple[Tensor, Tensor]:
    W = weight_of(layer).detach()
    bias = getattr(layer, "bias", None)
    return W, W.new_zeros(len(W)) if bias is None else bias.detach()


@torch.no_grad()
def extract(base: nn.Module, tuned: nn.Module, r: int, name: str, targets: Targets = "all-linear") -> LowRank:
    """Attach to `base` the LoRA of rank r that is nearest to what full fine-tuning made of it.

    ΔW = W_tuned − W_base on the linear layers that `targets` names. What else differs (biases, norms, embeddings,
    linear layers that are no target) is in the table's `left_out` with its size, since no LoRA holds it. If the base is
    stored in fewer bits than `tuned`, its rounding is a part of ΔW. r, costs: see `to_lora`. `tuned` is only read.
    Returns the relative error of each layer. Raises ValueError for models that do not fit together or do not differ,
    and for adapters on `tuned`; the base is then as it was.
    """
    _check_free(base, name)
    _check_rank(r)
    if hosts(tuned):
        raise ValueError(f"adapters are attached to the tuned model: {', '.join(adapters(tuned))}; make a LoRA of one "
                         "with to_lora, or save the merged model and load it without them")  # fmt: skip
    paths = find_targets(base, targets)
    for path in paths:
        shape_of(bare(at(base, path)))
        _check_site(base, path)
    table, products = LowRank(name, r), {}
    for path, key, before, after in _parameters(base, tuned, paths):
        change = after.to(before.device, torch.double) - before.double()
        if not torch.isfinite(change).all():
            raise ValueError(f"{path}.{key} of the tuned model holds NaN or inf: a damaged file or a diverged training")
        if path in paths and key == "weight":
            short = truncate(change, r)
            products[path] = short.A, short.B
            table.norms[path], table.tails[path] = short.norm, short.tail
        elif size := change.norm().item():
            table.left_out[f"{path}.{key}"] = size
    if not table.left_out and not any(table.norms.values()):
        raise ValueError("the tuned model does not differ from the base, so there is nothing to extract")
    attach_products(base, name, products)
    return table


def _parameters(base: nn.Module, tuned: nn.Module, targets: Sequence[str]) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """(path, name, in the base, in the tuned model) of each parameter; a tied one once, besides those of the targets.

    ValueError if the models do not fit together.
    """
    here, there = sites(base), sites(tuned)
    if odd := sorted(set(here) ^ set(there)):
        raise ValueError(f"only one of the two models has a module {odd[0]!r}: no fine-tuning of this base")
    seen: set[int] = set()
    for path, site in here.items():
        old, new = _tensors(bare(site)), _tensors(there[path])
        for key in sorted(old | new):
            before, after = old.get(key), new.get(key)  # one is missing: such as the bias of a merged BitFit
            before = torch.zeros_like(new[key]) if before is None else before
            after = torch.zeros_like(old[key]) if after is None else after
            if before.shape != after.shape:
                raise ValueError(f"{path}.{key} is {tuple(before.shape)} in the base and {tuple(after.shape)} in the "
                                 "tuned model: no fine-tuning of this base")  # fmt: skip
            own = getattr(bare(site), key, None)
            if own is None or id(own) not in seen or path in targets:
                yield path, key, before, after
            seen.add(id(own))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters, W as (out, in) and dense."""
    if is_linear(module):
        bias = getattr(module, "bias", None)
        return {"weight": weight_of(module)} | ({} if bias is None else {"bias": bias})
    return dict(module.named_parameters(recurse=False))


def _check_free(model: nn.Module, name: str) -> None:
    """ValueError if a computed adapter could not be attached under this name now."""
    check_name(model, name)
    if merged := merged_names(model):
        raise ValueError(f"{', '.join(merged)} is merged into the weights; unmerge(model) first")


def _check_rank(r: int) -> None:
    if type(r) is not int or r < 1:
        raise ValueError(f"rank r={r!r}: must be a whole number, at least 1")

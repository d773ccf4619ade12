"""Unions: several methods at once, each under a name of its own. They need nothing new, because methods compose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from .attach import activate, attach, detach, find_targets, hosts, switch_of


class Part(NamedTuple):
    """One method of a union: what `attach` takes."""

    method: str
    name: str
    targets: str | list[str] | None
    hyper: dict


def union(model: nn.Module, parts: Sequence[Part], active: Sequence[str]) -> tuple[str, ...]:
    """Attach all parts and activate the named ones; returns these names. After an error the model is as it was."""
    before = (switch_of(model).active, switch_of(model).rows) if hosts(model) else None
    grads = {name: p.requires_grad for name, p in model.named_parameters()} if not hosts(model) else {}
    made: list[str] = []
    try:
        for part in parts:
            attach(model, part.method, part.targets, part.name, **part.hyper)
            made.append(part.name)
    except (ValueError, TypeError):
        if made:
            detach(model, *made)
        if before:
            switch_of(model).active, switch_of(model).rows = before
        for name, learns in grads.items():
            model.get_parameter(name).requires_grad_(learns)
        raise
    activate(model, *active)
    return tuple(active)


def mam(
    model: nn.Module, name: str = "mam", *, k: int = 30, reduction: float = 2, bottleneck: int | None = None,
    scale: float | str = 4.0, projection: bool = False, hidden: int = 0,
) -> tuple[str, ...]:  # fmt: skip
    """MAM adapter, "mix and match": prefix tuning on attention and scaled parallel adapters on the feed-forward nets.

    A small change for attention, a large one for the feed-forward net: in the paper's comparison the best use of a
    budget. Attaches "<name>_prefix" and "<name>_parallel" and activates both; returns the two names, for `using`.
    k, projection, hidden: see PrefixTuning. reduction, bottleneck, scale: see ParallelAdapter.
    Raises ValueError where one of them cannot sit; then nothing is attached.
    Source: He et al. 2022, arXiv:2110.04366, section 4.6.
    """
    prefix, parallel = f"{name}_prefix", f"{name}_parallel"
    parts = [
        Part("PrefixTuning", prefix, None, {"k": k, "projection": projection, "hidden": hidden}),
        Part("ParallelAdapter", parallel, None, {"reduction": reduction, "bottleneck": bottleneck, "scale": scale}),
    ]
    return union(model, parts, (prefix, parallel))


QUERY_VALUE = ("q_proj", "v_proj", "query", "value", "q", "v", "c_attn", "query_key_value")  # as the families name them


def unipelt(
    model: nn.Module, name: str = "unipelt", *, r: int = 8, alpha: float = 16, k: int = 10, reduction: float = 16,
    projection: bool = False, hidden: int = 0,
) -> tuple[str, ...]:  # fmt: skip
    """UniPELT: LoRA on queries and values, a prefix and Pfeiffer's adapters, each behind a gate of its own.

    Attaches "<name>_lora", "<name>_prefix", "<name>_adapter" and a gate for each, "<name>_lora_gate" …; activates the
    gates, which run what they gate, and returns their three names, for `using`. All six learn.
    r, alpha: see LoRA. k, projection, hidden: see PrefixTuning. reduction: see Pfeiffer. The gates: see Gated.
    Raises ValueError where one of them cannot sit; then nothing is attached.
    Source: Mao et al. 2022, arXiv:2110.07577, section 3; figure 2.
    """
    lora, prefix, adapter = (f"{name}_{part}" for part in ("lora", "prefix", "adapter"))
    linear = [path for path in find_targets(model, "all-linear") if path.rpartition(".")[2] in QUERY_VALUE]
    if not linear:
        raise ValueError(f"{type(model).__name__} has no query and value layers of a known name "
                         f"({', '.join(QUERY_VALUE)}); attach the three methods and a Gated for each")  # fmt: skip
    parts = [
        Part("LoRA", lora, linear, {"r": r, "alpha": alpha}),
        Part("PrefixTuning", prefix, None, {"k": k, "projection": projection, "hidden": hidden}),
        Part("Pfeiffer", adapter, None, {"reduction": reduction}),
        Part("Gated", f"{lora}_gate", linear, {"of": lora}),
        Part("Gated", f"{prefix}_gate", "all-attention", {"of": prefix}),
        Part("Gated", f"{adapter}_gate", "ffn-output", {"of": adapter}),
    ]
    return union(model, parts, (f"{lora}_gate", f"{prefix}_gate", f"{adapter}_gate"))

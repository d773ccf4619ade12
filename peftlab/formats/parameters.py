"""The layout of LoRA on parameters (`target_parameters`), beside that of LoRA on layers.

HF PEFT wraps a module once for each parameter, in their order, so that the last one's factors stand at the module's
path and those before it one "base_layer" deeper each. The experts' A (E, r, in) lie there as (E·r, in), expert after
expert; their B (E, out, r) as (out, r·E), where neighbours belong to different experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..sites import loose, parameters
from .common import PREFIX, Weights


def to_hf(model: nn.Module, found: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of {path: ParameterLoRA}, and the parameters' names, as short as they can be."""
    tensors: dict[str, Tensor] = {}
    paths = []
    for path, adapter in found.items():
        for key, name in _keys(path, list(adapter.each)):
            A, B = adapter.each[name].lora_A, adapter.each[name].lora_B
            flat = (A, B) if A.dim() == 2 else (A.flatten(0, 1), B.permute(1, 2, 0).flatten(1))
            tensors |= {f"{key}.lora_A.weight": flat[0], f"{key}.lora_B.weight": flat[1]}
            paths.append(f"{path}.{name}")
    short = sorted({".".join(path.split(".")[-2:]) for path in paths})
    return tensors, short if set(_named(parameters(model), short)) == set(paths) else sorted(paths)


def from_hf(model: nn.Module, names: Sequence[str], tensors: dict[str, Tensor]) -> tuple[list[str], Weights]:
    """The paths of the parameters of these names, and what a file holds for them, taken out of its tensors; ValueError
    for what is missing."""
    there = loose(model)
    paths = _named(there, names)
    owned: dict[str, list[str]] = {}
    weights: Weights = {}
    for path in paths:
        owned.setdefault(path.rpartition(".")[0], []).append(path.rpartition(".")[2])
    for owner, own in owned.items():
        for key, name in _keys(owner, own):
            if missing := {f"{key}.lora_A.weight", f"{key}.lora_B.weight"} - set(tensors):
                raise ValueError(f"target_parameters has {name!r} of {owner!r}, but there is no {sorted(missing)[0]!r}")
            A, B, W = tensors.pop(f"{key}.lora_A.weight"), tensors.pop(f"{key}.lora_B.weight"), there[f"{owner}.{name}"]
            if W.dim() == 3:
                E = len(W)
                if len(A) % E or len(A) != B.shape[1]:
                    raise ValueError(f"{key!r} holds A {tuple(A.shape)} and B {tuple(B.shape)}: not for {E} experts")
                A, B = A.unflatten(0, (E, -1)), B.unflatten(1, (-1, E)).permute(2, 0, 1)
            weights.setdefault(owner, {}).update({f"each.{name}.lora_A": A, f"each.{name}.lora_B": B})
    return paths, weights


def _keys(path: str, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(key up to the factors, parameter), outermost first."""
    for depth, name in enumerate(reversed(names)):
        yield f"{PREFIX}{path}{'.base_layer' * depth}", name


def _named(paths: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Those of the paths that end in one of the names, word by word."""
    return [path for path in paths if any(f".{path}".endswith(f".{name}") for name in names)]

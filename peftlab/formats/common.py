"""What all file layouts share: the type of a layout, and the usual way to a module's path in a key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from ..sites import sites

if TYPE_CHECKING:
    from ..core import Adapter

PREFIX = "base_model.model."  # before a module's path in a key
Plan = dict[str, "tuple[type[Adapter], dict]"]  # bare path -> (method, hyper-parameters)
Weights = dict[str, dict[str, Tensor]]  # bare path -> {our parameter: tensor}


class Layout(NamedTuple):
    """How one peft_type is laid out.

    to_hf: (model, {path: adapter}) -> (key -> tensor, settings of adapter_config.json besides the common ones).
    from_hf: (model, method, config, tensors) -> (plan, weights); ValueError, naming the key, for what cannot be read.
    known: keys of the config that from_hf understands, or that change nothing in a finished adapter.
    """

    to_hf: Callable[[nn.Module, Mapping[str, Adapter]], tuple[dict[str, Tensor], dict[str, Any]]]
    from_hf: Callable[[nn.Module, type[Adapter], dict, dict[str, Tensor]], tuple[Plan, Weights]]
    known: frozenset[str]


def keyed(found: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """The usual key of each parameter; a tensor that several sites share is written once for each."""
    return {f"{PREFIX}{path}.{adapter.hf_params[n]}": p.detach().clone()
            for path, adapter in found.items() for n, p in adapter.named_parameters()}  # fmt: skip


def paths_of(model: nn.Module, tensors: Mapping[str, Tensor], ending: str) -> dict[str, Tensor]:
    """bare path -> tensor, of a file whose keys all end alike."""
    found = {key.removeprefix(PREFIX).removesuffix(f".{ending}"): t for key, t in tensors.items()}
    there = sites(model)
    if strange := [path for path in found if path not in there]:
        raise ValueError(f"{type(model).__name__} has no module {strange[0]!r}: this is an adapter of another model")
    return found

"""The one idea: a PEFT method is a small trainable module around a frozen function, y = adapter(f, x).

`f` is the frozen layer, or that layer as the adapters before this one left it. An `Adapter` is one method on one layer;
a host (`Adapted`) takes the layer's place in the model and owns all that is the same for every method: which adapters
run, mixed batches, dtypes, merge and unmerge. Shapes: B batch, T tokens, in/out features of the layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .fused import fusible, low_rank_linear, untouched
from .layers import affine, as_dense, device_of, dtype_of, is_linear, shape_of
from .mixed import Rows

METHODS: dict[str, type[Adapter]] = {}  # name -> class; tests, tables and lessons loop over it


class Adapter(nn.Module):
    """One method on one frozen layer: write `delta` (an added term) or `forward` (anything that is not a sum)."""

    hf_type: str | None = None  # peft_type in the HF PEFT file format
    hf_hyper: dict[str, str] = {}  # hyper-parameter -> its name in adapter_config.json
    hf_params: dict[str, str] = {}  # parameter -> its name in adapter_model.safetensors
    hf_flags: dict[str, Any] = {}  # what else its adapter_config.json says: tells methods of one peft_type apart
    hf_ignored: frozenset[str] = frozenset()  # HF PEFT's settings that change nothing in a finished adapter
    # hyper-parameter that may differ between layers -> the entry of adapter_config.json that says where
    hf_patterns: dict[str, str] = {"r": "rank_pattern", "alpha": "alpha_pattern"}
    on_others = False  # whether it works on other adapters of its layers, which its hyper-parameters name
    family = ""  # where the table of all methods puts it
    targets = "all-linear"  # where it sits if the user names no targets: see `attach.find_targets`
    loose = False  # whether a target may be a parameter that no layer owns: see `sites.loose`
    adds = True  # whether it is written as `delta`, an added term; set by itself
    mixes = True  # whether the rows of a batch can have different adapters of this method
    replaces = False  # True: it takes the layer's place and never calls f, so nothing can stand inside of it
    part_of: str | None = None  # of a method that needs two kinds of sites: the method this class is the second part of
    hyper: dict[str, Any] = {}  # the hyper-parameters it was made with, set when it is attached
    needs: tuple[str, ...] = ()  # names of the adapters of the same layer that it works on
    memory: tuple[str, ...] = ()  # names of non-persistent buffers that training changes: they are in its checkpoints

    def __init_subclass__(cls):
        cls.adds = cls.forward is Adapter.forward
        if cls.part_of is None:
            METHODS[cls.__name__] = cls

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.__dict__["layer"] = layer  # a plain reference, no submodule: neither saved nor trained with the adapter
        self.__dict__["peers"] = {}  # likewise: all adapters of the same host by name, set when it is attached

    @classmethod
    def plan(cls, model: nn.Module, paths: Sequence[str], hyper: dict) -> dict[str, tuple[type[Adapter], dict]]:
        """path -> (method, hyper-parameters), for methods whose sites differ. ValueError for an unfit model."""
        return {path: (cls, hyper) for path in paths}

    @classmethod
    def share(cls, made: dict[str, Adapter]) -> None:
        """Called with all new adapters of one attach, and their parts, by path: for layers that share parameters."""

    @staticmethod
    def size(out_features: int, in_features: int, **hyper) -> int:
        """The closed formula of the number of trained parameters on one linear layer."""
        raise NotImplementedError

    def expected(self) -> int:
        """The closed formula for this adapter; methods on other sites than linear layers write their own."""
        bias = getattr(self.layer, "bias", None) is not None
        return self.size(*shape_of(self.layer), **{"bias": bias, **self.hyper})

    def delta(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out): what is added to the layer's output."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """(A, B, s) if Δ(x) is just s·x·Aᵀ·Bᵀ, with A (r, in) and B (out, r): lets the host fuse it with the layer."""
        return None

    def forward(self, f, x: Tensor, *others, **more) -> Tensor:
        """y = f(x) + Δ(x); BLOOM's and MPT's feed-forward nets get `others` besides x: the residual."""
        factors = self.factors() if fusible(f, x) else None
        return f(x, *others, **more) + self.change(x) if factors is None else low_rank_linear(f, x, *factors)

    def change(self, x: Tensor) -> Tensor:
        """Δ(x) in x's dtype: adapters may stay float32 on a bfloat16 or 4-bit base."""
        return self.delta(x.to(next(self.parameters()).dtype)).to(x.dtype)

    def saved(self) -> Adapter:
        """The adapter that a file holds; another one where what is trained means nothing without where it began."""
        return self

    def penalty(self) -> Tensor | None:
        """A term of the loss of its own, which `train` adds at each step."""
        return None

    @classmethod
    def stepped(cls, made: dict[str, Adapter], step: int, steps: int) -> None:
        """Called by `train` after each optimizer step, 1 to `steps`, with the adapters it trains, by path; they still
        have their gradients."""

    def fold(self, layer: nn.Module) -> nn.Module:
        """The float64 `layer` with this adapter merged into it; ValueError if the adapted layer is not affine."""
        plain = {id(kept): kept for kept in (self.layer, self.peers)}  # not to be copied along
        f = partial(copy.deepcopy(self, plain).double().eval(), layer)
        return as_dense(layer, *affine(f, shape_of(layer)[1], device_of(layer)))


@dataclass
class Switch:
    """Which adapters run. One object shared by all hosts of a model, so that all layers switch together."""

    active: tuple[str, ...] = ()
    rows: Rows | None = None  # a mixed batch


class Adapted(nn.Module):
    """Host: a frozen layer and the adapters attached to it, by name. It takes the layer's place in the model."""

    def __init__(self, layer: nn.Module, switch: Switch):
        super().__init__()
        self.layer, self.switch = layer, switch
        self.adapters = nn.ModuleDict()
        self.merged: tuple[str, ...] = ()
        self.__dict__["original"] = None  # the untouched layer while merged; not part of the state dict

    def __getattr__(self, name):  # model code such as `wo.weight.dtype` keeps working
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def run(self, names, *args, **kwargs):
        """The layer with the named adapters, nested: each adapts what the ones before it left."""
        f = self.layer
        for name in names:
            if name not in self.merged and name in self.adapters:
                f = partial(self.adapters[name], f)
        return f(*args, **kwargs)

    def forward(self, *args, **kwargs):
        rows = self.switch.rows
        if rows is not None and any(name in self.adapters for name in rows.used):
            return self.mixed(rows, *args, **kwargs)
        return self.run(self.switch.active if rows is None else (), *args, **kwargs)

    def mixed(self, rows: Rows, x: Tensor, *args, **kwargs):
        """A batch whose rows have different adapters. Low-rank terms are computed together and other added terms one by
        one, all on one f(x); other methods run apart, each on its rows."""
        k = rows.repeats(x)
        if rows.uniform:
            return self.run(rows.used, x, *args, **kwargs)
        y = self.layer(x, *args, **kwargs)
        low_rank = rows.gathered(self, self.adapters, k)
        if low_rank is not None:
            y = low_rank.add(y, x, inplace=untouched(self.layer) and not torch.is_grad_enabled())
        for name in rows.used if low_rank is None else low_rank.apart:
            if name in self.adapters:
                adapter, row = self.adapters[name], rows.of(name, k, x.device)
                if adapter.adds:
                    y = y.index_add(0, row, adapter.change(x[row]).to(y.dtype))
                else:
                    y = y.index_copy(0, row, self.run((name,), x[row], *args, **kwargs).to(y.dtype))
        return y

    def check_merge(self, names) -> None:
        """ValueError if one of the named adapters is none that a weight of this layer could stand for."""
        for adapter in (self.adapters[n] for n in names if n in self.adapters):
            if type(adapter).fold is Adapter.fold and not is_linear(self.layer):
                raise ValueError(f"{type(adapter).__name__} changes what the whole {type(self.layer).__name__} "
                                 "computes, so no weight can stand for it")  # fmt: skip

    @torch.no_grad()
    def merge(self, names: tuple[str, ...]) -> None:
        """Fold the named adapters into the layer, in float64, innermost first; the untouched layer is kept."""
        if here := [n for n in names if n in self.adapters]:
            self.check_merge(here)
            layer = copy.deepcopy(self.layer).double()
            for name in here:
                layer = self.adapters[name].fold(layer)
            dense = layer.to(dtype_of(self.layer)).requires_grad_(False)
            self.__dict__["original"], self.layer = self.layer, dense
        self.merged = tuple(names)

    def unmerge(self) -> None:
        """Put the untouched layer back: exact, bit for bit."""
        if self.original is not None:
            self.layer, self.__dict__["original"] = self.original, None
        self.merged = ()

"""LoRA on the parameters of a module that are no layers; HF PEFT's target_parameters. arXiv:2106.09685."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from ..core import Adapter
from ..hyper import checked
from ..sites import loose
from ._factors import Factors, holding

ALONE = threading.RLock()  # of two threads inside, one would put the other's W′ back as W


class ParameterLoRA(Adapter):
    """The `Factors`s of one module, which computes with W′ in W's place; a part of LoRA.

    Its own code runs, so all ways of transformers to run experts work. The price: each pass makes W′, a copy of all
    experts' weights, and keeps it for the backward pass: checkpoint, and merge before you generate. One thread at a
    time is inside. each: parameter -> hyper-parameters of LoRA.
    """

    part_of, mixes = "LoRA", False

    def __init__(self, layer: nn.Module, each: dict):
        super().__init__(layer)
        self.each = nn.ModuleDict()
        for name, hyper in each.items():
            self.each[name] = Factors(layer, name, **(own := checked(Factors, hyper)))
            self.each[name].hyper = {"parameter": name, **own}

    def expected(self) -> int:
        """Σ E·r·(in + out)"""
        return sum(one.expected() for one in self.each.values())

    def forward(self, f, *args, **kwargs):
        layer = f
        while isinstance(layer, partial):  # the adapters inside of this one, each around the next
            layer = layer.args[0]
        with nullcontext() if torch.compiler.is_compiling() else ALONE:
            with holding(layer, {name: one.added_to(getattr(layer, name)) for name, one in self.each.items()}):
                return f(*args, **kwargs)

    def fold(self, layer: nn.Module) -> nn.Module:
        for name, one in self.each.items():
            setattr(layer, name, nn.Parameter(one.added_to(getattr(layer, name), torch.double), requires_grad=False))
        return layer


def plan_parameters(method: type[Adapter], model: nn.Module, paths: Sequence[str], hyper: dict) -> dict[str, Any]:
    """{path: (LoRA, hyper-parameters)}, and `ParameterLoRA` on the modules that own the parameters among the paths."""
    from ..attach import defaults_of

    there = loose(model)
    owners = {path.rpartition(".")[0] for path in there}
    plan: dict[str, Any] = {}
    for path in paths:
        owner, _, name = path.rpartition(".")
        if path in there:
            plan.setdefault(owner, (ParameterLoRA, {"each": {}}))[1]["each"][name] = {**defaults_of(method), **hyper}
        elif path in owners:
            own = "|".join(p.rpartition(".")[2] for p in there if p.rpartition(".")[0] == path)
            raise ValueError(f"{path!r} is no linear layer, but keeps matrices of its own; name them: targets={own!r}")
        else:
            plan[path] = (method, hyper)
    return plan

"""What the optimizers share: the A and B of a model's adapters, Adam's rule for one gradient, a damped inverse."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..attach import adapters

Maker = Callable[[list[nn.Parameter]], torch.optim.Optimizer]  # what `pl.train(optimizer=…)` takes


class Pair(NamedTuple):
    """One layer's change s·B·A."""

    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    s: float


def pairs(model: nn.Module, of_experts: bool = False) -> list[Pair]:
    """The A and B of every adapter that has both and trains its B. ValueError if there is none.

    LoRA, and methods built on it (DoRA, AdaLoRA), for which what is derived for s·B·A holds only nearly.
    of_experts: LoRA on parameters too, with A (E, r, in) and B (E, out, r); else ValueError if there is one.
    """
    here = [a for there in adapters(model).values() for a in there.values()]
    found = [a for whole in here for a in (whole, *getattr(whole, "each", {}).values()) if hasattr(a, "lora_B")]
    trained = [Pair(a.lora_A, a.lora_B, a.scaling) for a in found if a.lora_B.requires_grad]
    if not of_experts and any(pair.B.dim() > 2 for pair in trained):
        raise ValueError("this is derived for one A and B a layer, and a LoRA on the parameters of experts has many; "
                         "freeze(model, its name), or attach LoRA to layers alone")  # fmt: skip
    if not trained:
        raise ValueError("no adapter with a trained A and B is attached; call attach(model, LoRA, …) first")
    return trained


def products(model: nn.Module) -> list[Pair]:
    """`pairs`, all of plain LoRA: for what is derived for a change that is exactly s·B·A. ValueError for others."""
    from ..methods.lora import LoRA

    there = [a for found in adapters(model).values() for a in found.values() if hasattr(a, "lora_B")]
    other = next((type(a).__name__ for a in there if type(a) is not LoRA and a.lora_B.requires_grad), None)
    if other:
        raise ValueError(f"{other} is more than s·B·A, for which alone this is derived; attach(model, LoRA, …), or "
                         "freeze(model, its name)")  # fmt: skip
    return pairs(model)


def among(parameters: list[nn.Parameter], there: list[Pair]) -> list[Pair]:
    """The pairs whose B is trained in this run. ValueError if none is."""
    trained = {id(p) for p in parameters}
    if not (found := [pair for pair in there if id(pair.B) in trained]):
        raise ValueError("none of the trained parameters is the B of a LoRA of this model: pass the model that is "
                         "trained, after attach")  # fmt: skip
    return found


def adam(state: dict, g: Tensor, group: dict) -> Tensor:
    """m̂ / (√v̂ + ε): the step that Adam makes of a gradient, of length 1 a number; its moments are kept in `state`."""
    if "exp_avg" not in state:
        state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(g), exp_avg_sq=torch.zeros_like(g))
    (beta1, beta2), m, v = group["betas"], state["exp_avg"], state["exp_avg_sq"]
    state["step"] += 1
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    t = float(state["step"])
    return m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + group["eps"])


def inverse(M: Tensor, damping: float) -> Tensor:
    """(M + δI)⁻¹ of a symmetric matrix, at least in float32; a pseudo-inverse, for a tiny δ is lost beside large M."""
    M = M.to(torch.promote_types(M.dtype, torch.float32))
    return torch.linalg.pinv(M + damping * torch.eye(len(M), dtype=M.dtype, device=M.device), hermitian=True)


def refuse(closure: Callable | None) -> None:
    """A closure would compute the gradients anew after they were corrected."""
    if closure is not None:
        raise ValueError("this optimizer changes the gradients before its step, so it takes no closure: call "
                         "loss.backward(), then step()")  # fmt: skip

"""O-LoRA: a new task's LoRA reads other directions than the old ones'. Wang et al. 2023, arXiv:2310.14152."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..attach import adapters, check_attached


class OLoRA:
    """A penalty on a LoRA that looks where older ones look: λ · Σ over layers and old ones of ‖A_old·Aᵀ‖².

    One LoRA a task, all of them added up; the old ones are frozen. The rows of A are the directions of its input that
    a LoRA reads, and in place of the old tasks' gradients, which nobody kept, they stand for what those need. At zero,
    no input along an old direction reaches the new B, so that the new task leaves the old one's answers alone.

        pl.freeze(model, "old")
        pl.attach(model, pl.LoRA, name="new", r=8)
        pl.activate(model, "old", "new")
        pl.train(model, rows, tokenizer, penalty=pl.optim.OLoRA(model, "new", ["old"]))

    weight: λ. ValueError if an adapter is unknown or no LoRA, or the new one is on no layer of an old one.
    Source: Wang et al. 2023, arXiv:2310.14152, "Orthogonal subspace learning for language model continual learning";
    the authors' code sums the absolute values instead of the squares.
    """

    def __init__(self, model: nn.Module, name: str, old: Sequence[str], weight: float = 0.5):
        check_attached(model, [name, *old])
        there = adapters(model)
        for one in (name, *old):
            odd = next((type(a).__name__ for a in there[one].values() if not hasattr(a, "lora_A")), None)
            if odd:
                raise ValueError(f"{one!r} is {odd}, which has no A: O-LoRA is for LoRAs")
        new = there[name]
        self.couples = [(a.lora_A, new[path].lora_A) for o in old for path, a in there[o].items() if path in new]
        if not self.couples or name in old:
            others = ", ".join(old) or "an old adapter"
            raise ValueError(f"{name!r} shares no layer with {others}: there is nothing to keep apart")
        self.weight = weight

    def __call__(self, model: nn.Module) -> Tensor:
        return self.weight * torch.stack([(old.detach() @ new.T).square().sum() for old, new in self.couples]).sum()

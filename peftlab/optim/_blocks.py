"""What LISA and BAdam share: an AdamW that trains a few blocks of the model at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..baselines import main_stack
from ._pairs import refuse

Block = list[nn.Parameter]


def blocks_of(model: nn.Module, parameters: list[nn.Parameter]) -> tuple[Block, list[Block]]:
    """(what stands outside of the stack of blocks, [each block's]) of the trained parameters, in the model's order."""
    stack = [{id(p) for p in block.parameters()} for block in main_stack(model)[1]]
    inside = [[p for p in parameters if id(p) in block] for block in stack]
    known = {id(p) for block in inside for p in block}
    if not known:
        raise ValueError("no parameter inside of the model's blocks is trained: call full_finetuning(model) first")
    return [p for p in parameters if id(p) not in known], [block for block in inside if block]


class BlockAdamW(torch.optim.AdamW):
    """AdamW on `always` and, for `every` steps, on the blocks that `pick(period)` names; the rest is frozen meanwhile.

    A frozen block has no gradient and no moments: those of a block begin at zero each time. Its only memory between
    periods is its weights, and all of it follows from the number of steps taken, which a checkpoint holds.
    """

    def __init__(self, always: Block, blocks: list[Block], pick: Callable[[int], Sequence[int]], every: int, lr: float,
                 weight_decay: float):  # fmt: skip
        if every < 1:
            raise ValueError(f"every={every} must be at least 1: the steps between two choices")
        self.always, self.blocks, self.pick, self.every = always, blocks, pick, every
        super().__init__([*always, *blocks[0]], lr=lr, weight_decay=weight_decay)
        self.param_groups[0]["taken"] = 0
        self.switch(0)

    def switch(self, period: int) -> None:
        active = [p for i in self.pick(period) for p in self.blocks[i]]
        for p in (p for block in self.blocks for p in block):
            p.requires_grad_(False)
            p.grad = None
            self.state.pop(p, None)
        for p in active:
            p.requires_grad_(True)
        self.param_groups[0]["params"] = [*self.always, *active]

    def step(self, closure=None):
        refuse(closure)
        super().step()
        group = self.param_groups[0]
        group["taken"] += 1
        if group["taken"] % self.every == 0:
            self.switch(group["taken"] // self.every)

    def load_state_dict(self, state_dict: dict) -> None:
        """The state's parameters are those of its own period."""
        (group,) = state_dict["param_groups"]
        self.switch(group["taken"] // self.every)
        group = {**group, "params": list(range(len(self.param_groups[0]["params"])))}
        super().load_state_dict({**state_dict, "param_groups": [group]})

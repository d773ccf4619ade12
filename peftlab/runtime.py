"""What a loop borrows from its surroundings and gives back: the device, the modules' modes, the random generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


def accelerator_on(device: torch.device, precision: str | None) -> Any:
    """An Accelerator on the model's device. Its state is global: another device or precision than before resets it."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedDataParallelKwargs

    mixed = precision or "no"
    moved = bool(PartialState._shared_state) and PartialState().device.type != device.type
    if moved or (AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed):
        AcceleratorState._reset_state(reset_partial_state=moved)
    still = DistributedDataParallelKwargs(broadcast_buffers=False)  # packed weights are buffers, gigabytes of them
    return Accelerator(
        cpu=device.type == "cpu", mixed_precision=mixed, device_placement=False, kwargs_handlers=[still]
    )


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Train or eval mode, and afterwards each module's own again (some may have been put into eval by hand)."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was in modes:
            module.training = was


@contextmanager
def stream(*key: int, device: torch.device) -> Iterator[None]:
    """Random numbers from a stream of their own, named by `key`; afterwards all generators are as before."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    cards = [device] if device.type == "cuda" else []
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(cards):
        torch.default_generator.manual_seed(seed)
        if cards:
            torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)

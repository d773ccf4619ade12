"""Optimizers that know what an adapter is, and ways of training that live in the optimizer.

    pl.train(model, rows, tokenizer, optimizer=pl.optim.lora_plus(model, lr=1e-3, ratio=16))

Each function gives the function that `pl.train` asks for: from the list of trained parameters to a torch optimizer. The
model goes in first because a bare list of parameters does not say which of them is an A, a B, or in which block.
`OLoRA` is a term of the loss instead, for `pl.train(penalty=…)`; `jagged` a learning-rate schedule.
"""

from __future__ import annotations

from collections.abc import Callable

from .badam import badam
from .galore import galore
from .lisa import lisa
from .lora_fa import lora_fa
from .lora_plus import lora_plus
from .lora_pro import lora_pro
from .o_lora import OLoRA
from .relora import jagged, relora
from .riemannian import riemannian

OPTIMIZERS: dict[str, Callable] = {  # name -> function; tests and tables loop over it
    "lora_plus": lora_plus,
    "lora_fa": lora_fa,
    "riemannian": riemannian,
    "lora_pro": lora_pro,
    "galore": galore,
    "lisa": lisa,
    "badam": badam,
    "relora": relora,
}

__all__ = ["OPTIMIZERS", "OLoRA", "badam", "galore", "jagged", "lisa", "lora_fa", "lora_plus", "lora_pro", "relora",
           "riemannian"]  # fmt: skip

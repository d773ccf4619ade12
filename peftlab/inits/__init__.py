"""Initialisations: where an adapter starts from, for methods that begin elsewhere than at nothing.

Each is a function that fills an untrained, attached LoRA: of the weights alone (pissa, olora, milora; loftq and qpissa,
which also pack the base in four bits), of data (eva, corda, lora_null, lora_ga, keeplora), or of random numbers
(kaiming, gaussian, orthogonal). `kappatune` chooses targets before anything is attached; fish, lottery and project
choose which entries of the weights a FishMask trains, and attach it.
"""

from collections.abc import Callable

from .corda import corda
from .draws import gaussian, kaiming, orthogonal
from .eva import eva
from .kappatune import kappatune
from .keeplora import keeplora
from .loftq import loftq
from .lora_ga import lora_ga
from .lora_null import lora_null
from .masks import fish, lottery, project
from .milora import milora
from .olora import olora
from .pissa import pissa, qpissa

INITS: dict[str, Callable] = {
    f.__name__: f
    for f in (kaiming, gaussian, orthogonal, pissa, qpissa, olora, milora, loftq, eva, corda, lora_null, lora_ga,
              keeplora)
}

__all__ = ["INITS", "corda", "eva", "fish", "gaussian", "kaiming", "kappatune", "keeplora", "loftq", "lora_ga",
           "lora_null", "lottery", "milora", "olora", "orthogonal", "pissa", "project", "qpissa"]  # fmt: skip

"""How each method is put to the laws of test_laws.py: where it sits on the tiny Llama, and what is known about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

TARGETS = "q_proj|v_proj|down_proj"


@dataclass(frozen=True)
class Case:
    """One method's case; a method that is not in CASES has the default one."""

    targets: str | None = TARGETS  # None: the method's own
    hyper: dict = field(default_factory=dict)
    identity: bool = True  # attached and untrained it changes nothing
    affine: str = ""  # words of the reason why it cannot be merged; "" if it can
    shake: float = 0.05  # how far its parameters are moved, so that it shows
    same_hyper: bool = True  # read from a file it has the hyper-parameters it was made with
    before: Callable[[nn.Module], None] | None = None  # what must be attached first


CASES: dict[str, Case] = {}


def case_of(method: type) -> Case:
    return CASES.get(method.__name__, Case())

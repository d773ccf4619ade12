"""HF PEFT's file layouts that are not one tensor per parameter and module, by peft_type.

`files` asks here first. A layout is two functions: `to_hf` turns an adapter's parts into tensors and settings,
`from_hf` turns a file back into what to attach where. Everything that is common to all files stays in `files`.
"""

from . import classic, decomposed, mixtures, orthogonal, shared, side, structured
from .common import PREFIX, Layout, Plan, Weights

LAYOUTS: dict[str, Layout] = {
    **classic.LAYOUTS,
    **decomposed.LAYOUTS,
    **mixtures.LAYOUTS,
    **orthogonal.LAYOUTS,
    **shared.LAYOUTS,
    **side.LAYOUTS,
    **structured.LAYOUTS,
}

__all__ = ["LAYOUTS", "PREFIX", "Layout", "Plan", "Weights"]

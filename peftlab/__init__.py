"""peftlab: every parameter-efficient fine-tuning method, small enough to read, exact and measured.

`import peftlab as pl` is as fast as `import torch`: everything else is imported when it is first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_HOME = {  # name -> module that defines it
    "core": ["Adapted", "Adapter"],
    "adapter_drop": ["adapter_drop"],
    "attach": ["activate", "adapters", "attach", "detach", "find_targets", "freeze", "hosts", "layer_shapes", "using"],
    "baselines": ["full_finetuning", "last_layers"],
    "count": ["count"],
    "files": ["load_adapter", "save_adapter"],
    "intruders": ["intruders", "reduce_intruders"],
    "lorahub": ["lorahub"],
    "lowrank": ["extract", "to_lora"],
    "merge": ["combine", "merge", "unmerge"],
    "methods.arrow": ["Arrow"],
    "replicate": ["replicate_layers", "untie_layers"],
    "nf4_files": ["save_quantized"],
    "nf4_layer": ["NF4Linear", "quantize"],
    "nf4_loading": ["load_quantized"],
    "unions": ["mam", "unipelt"],
    "vocabulary": ["add_tokens"],
    "base": ["load_base"],
    "train": ["Log", "train", "train_steps"],
    "course.source": ["show"],
}  # fmt: skip
_WHERE = {name: module for module, names in _HOME.items() for name in names}
_ROOMS = ("base", "catalogue", "core", "course", "evaluate", "export", "files", "inits", "kbit", "lab", "layers",
          "leaderboard", "methods", "nf4", "optim", "paths", "remedies", "retention", "serve", "server",
          "shapes", "sites", "store", "tasks", "vocabulary", "vram")  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    elif name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    elif name in ("exercises", "quiz"):
        value = getattr(importlib.import_module(f"{__name__}.course"), name)
    else:
        importlib.import_module(f"{__name__}.methods")  # fills the registry
        from .core import METHODS

        if name == "METHODS":
            value = METHODS
        elif name in METHODS:
            return METHODS[name]
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


class _Package(ModuleType):
    """`import peftlab.train` would put the module where the function `peftlab.train` belongs: keep the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _WHERE:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    importlib.import_module(f"{__name__}.methods")
    from .core import METHODS

    return sorted({*globals(), *_WHERE, *_ROOMS, *METHODS, "METHODS", "exercises", "quiz"})

"""How many parameters there are, which of them are trained, where they sit and what they weigh."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from .attach import Targets, adapters, attach
from .baselines import full_finetuning, heads, stacks
from .core import Adapted, Adapter
from .shapes import meta_model

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes


class Row(NamedTuple):
    """One parameter tensor."""

    path: str  # of its module in the bare model
    name: str
    adapter: str | None  # None: of the base
    method: str  # "base" for the base
    layer: str  # number of its block, "embeddings", "head", "norm" or "other"
    module: str  # kind of its module: the last word of the path
    parameters: int
    trainable: bool
    dtype: str
    bytes: int  # as stored


class Part(NamedTuple):
    """Parameters of a part of the model, and how many of them are trained."""

    total: int
    trainable: int


@dataclass(frozen=True, repr=False)
class Count:
    """The parameters of a model, base and adapters together; shared ones once. Bytes are those of the stored tensors.

    expected: adapter name -> the sum of its method's closed formula over the adapted sites. An adapter with a site
    that has no formula (a copied module that is not linear) is not in it.
    """

    rows: tuple[Row, ...]
    expected: dict[str, int] = field(default_factory=dict)

    def _sum(self, wanted: Callable[[Row], bool]) -> int:
        return sum(row.parameters for row in self.rows if wanted(row))

    def _parts(self, key: Callable[[Row], str | None]) -> dict[str, Part]:
        found: dict[str, Part] = {}
        for row in self.rows:
            if (name := key(row)) is not None:
                total, trainable = found.get(name, (0, 0))
                found[name] = Part(total + row.parameters, trainable + row.trainable * row.parameters)
        return found

    @property
    def trainable(self) -> int:
        """Parameters that get gradients."""
        return self._sum(lambda row: row.trainable)

    @property
    def total(self) -> int:
        """All parameters, base and adapters."""
        return self._sum(lambda row: True)

    @property
    def base(self) -> int:
        """Parameters of the base alone."""
        return self._sum(lambda row: row.adapter is None)

    @property
    def percent(self) -> float:
        """100 · trainable / total"""
        return 100 * self.trainable / self.total if self.total else 0.0

    @property
    def bytes(self) -> int:
        """Bytes of the trainable parameters."""
        return sum(row.bytes for row in self.rows if row.trainable)

    def file_bytes(self, dtype: str | torch.dtype = "float32") -> int:
        """Bytes of the trained parameters in a file, at a dtype ("bfloat16", …); its header, some kB, is not in it.

        With adapters: of those, trained or frozen since. Without: of the whole model.
        """
        adapted = any(row.adapter for row in self.rows)
        return item_bytes(dtype) * self._sum(lambda row: bool(row.adapter) or not adapted)

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of AdamW's two states, each of the shape and dtype of its trainable parameter: m and v.

        Source: Kingma and Ba 2014, arXiv:1412.6980, algorithm 1. Not in it: torch's step counters, 4 bytes a tensor.
        """
        return 2 * self.bytes

    @property
    def per_method(self) -> dict[str, int]:
        """Method name, or "base" -> trainable parameters."""
        return {name: part.trainable for name, part in self._parts(lambda row: row.method).items()}

    @property
    def per_adapter(self) -> dict[str, int]:
        """Adapter name -> trainable parameters."""
        return {name: part.trainable for name, part in self._parts(lambda row: row.adapter).items()}

    @property
    def per_layer(self) -> dict[str, Part]:
        """Block number, "embeddings", "head", "norm" or "other" -> (total, trainable); two stacks: "decoder.0"."""
        return self._parts(lambda row: row.layer)

    @property
    def per_module(self) -> dict[str, Part]:
        """Kind of module: q_proj, norm, … -> (total, trainable)."""
        return self._parts(lambda row: row.module)

    def __repr__(self) -> str:
        parts = self._parts(lambda row: f"{row.adapter} ({row.method})" if row.adapter else "base")
        named = {f"{row.adapter} ({row.method})": row.adapter for row in self.rows if row.adapter}
        alone = [name for name in named if list(named.values()).count(named[name]) == 1]  # no copied head beside it
        formulas = {name: self.expected[named[name]] for name in alone if named[name] in self.expected}
        table = [("", "parameters", "trainable", "formula")]
        table += [(name, f"{part.total:,}", f"{part.trainable:,}", f"{formulas[name]:,}" if name in formulas else "–")
                  for name, part in parts.items()]
        wide = [max(map(len, column)) for column in zip(*table, strict=True)]
        used = 4 if formulas else 3
        return "\n".join([
            f"trainable {self.trainable:,} of {self.total:,} parameters ({_percent(self.percent)} %)",
            *("  ".join(["", f"{name:<{wide[0]}}", *map(str.rjust, numbers[: used - 1], wide[1:])])
              for name, *numbers in table),
            f"trainable weights {_size(self.bytes)}, their two AdamW states {_size(self.optimizer_bytes)}",
        ])  # fmt: skip

    def to_pandas(self) -> pandas.DataFrame:
        """One row per parameter tensor."""
        import pandas as pd

        return pd.DataFrame(self.rows, columns=list(Row._fields))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Where the parameters sit: a bar per kind of module, frozen and trainable, beside it the number trained."""
        from .course import style

        parts = dict(sorted(self.per_module.items(), key=lambda item: item[1].total))
        unit, word = next(((10**e, w) for e, w in ((9, "billions"), (6, "millions"), (3, "thousands"))
                           if max((p.total for p in parts.values()), default=0) >= 10**e), (1, ""))  # fmt: skip
        with style.context():
            if ax is None:
                import matplotlib.pyplot as plt

                height = max(style.HEIGHT, 1.2 + 0.24 * len(parts))
                ax = plt.subplots(figsize=(style.WIDTH, height), layout="constrained")[1]
            frozen = [(p.total - p.trainable) / unit for p in parts.values()]
            ax.barh(list(parts), frozen, color=style.GREY, label="frozen")
            bars = ax.barh(list(parts), [p.trainable / unit for p in parts.values()], left=frozen, color=style.ORANGE,
                           label="trainable")  # fmt: skip
            # A thousandth of a layer is too thin to see, so what is trained is written beside its bar too.
            texts = [f"{p.trainable:,}" if p.trainable else "" for p in parts.values()]
            ax.bar_label(bars, texts, padding=3, fontsize=8)
            ax.set_xlim(0, 1.2 * max((p.total for p in parts.values()), default=1) / unit)
            ax.grid(visible=False, axis="y")
            ax.set(xlabel=f"parameters ({word})" if word else "parameters", ylabel="kind of module")
            ax.legend(loc="lower right")
        return ax


def count(
    model: Any, method: type[Adapter] | str | None = None, targets: Targets | None = None, **hyper
) -> Count:
    """Count the parameters of a model, or of one that is known by its shape only: no weights, no network.

        count(model)                                                       with the adapters it has
        count("llama-3.1-70b", LoRA, targets="q_proj|v_proj", r=8)         a built-in shape, with an adapter to be
        count(config), count("config.json"), count("org/name")             a transformers config, a file, a Hub id

    method: None: the model as it is; "full": full fine-tuning; else a method and its targets and hyper-parameters, as
    for `attach` (modules_to_save and rank_pattern too). A model that is there is never changed: attach, then count.
    Packed 4-bit weights count as the weights they stand for. While adapters are merged, the untouched base is counted.
    Raises ValueError for an unknown name, or what `attach` raises; TypeError for any other object.
    """
    if not isinstance(model, nn.Module):
        model = meta_model(model)
        if method == "full":
            if targets is not None or hyper:
                raise ValueError(f"full fine-tuning trains all there is; it takes no {', '.join(hyper) or 'targets'}")
            full_finetuning(model)
        elif method is not None:
            attach(model, method, targets=targets, **hyper)
        elif targets is not None or hyper:
            raise ValueError(f"{', '.join(hyper) or 'targets'} given, but no method; say which, such as method='LoRA'")
        else:
            model.requires_grad_(False)
    elif method is not None or targets is not None or hyper:
        raise ValueError("this model is there already and counting does not change it; attach(model, …) first, then "
                         "count(model)")  # fmt: skip
    layer_of, seen, rows = _layer_names(model), set(), []
    for path, owner, module, name, tensor, number in _tensors(model):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        adapter, kind = owner or (None, "base")
        rows.append(Row(path, name, adapter, kind, layer_of(path, module), _kind(path, model), number,
                        tensor.requires_grad, str(tensor.dtype).removeprefix("torch."), tensor.nbytes))  # fmt: skip
    return Count(tuple(rows), _expected(model))


def item_bytes(dtype: str | torch.dtype) -> int:
    """Bytes of one number: 4 for "float32". Raises ValueError for a name that torch does not know."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{dtype!r} is no dtype of torch; take 'float32', 'bfloat16' or 'float16'")
    return found.itemsize


Owner = tuple[str, str] | None  # adapter name and method; None: the base


def _tensors(
    module: nn.Module, path: str = "", owner: Owner = None
) -> Iterator[tuple[str, Owner, nn.Module, str, torch.Tensor, int]]:
    """(path in the bare model, owner, module, name, tensor, its parameters); shared tensors come more than once."""
    if isinstance(module, Adapted):
        yield from _tensors(module.layer if module.original is None else module.original, path, owner)
        for name, adapter in module.adapters.items():
            for inside in adapter.modules():
                yield from _own(inside, path, (name, adapter.part_of or type(adapter).__name__))
        return
    yield from _own(module, path, owner)
    for name, child in module.named_children():
        yield from _tensors(child, f"{path}.{name}" if path else name, owner)


def _own(module: nn.Module, path: str, owner: Owner):
    packed = getattr(module, "n_weights", None)  # a layer that keeps that many frozen weights in integer codes
    if isinstance(packed, int):
        tensors = dict([*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)])
        codes = next(name for name, t in tensors.items() if not t.is_floating_point())
        yield path, owner, module, "weight", tensors[codes], packed
        for name, scale in module.named_buffers(recurse=False):  # bytes, but no parameters of the model
            if name != codes:
                yield path, owner, module, name, scale, 0
    for name, parameter in module.named_parameters(recurse=False):
        if packed is None or parameter.is_floating_point():
            shape = getattr(getattr(parameter, "quant_state", None), "shape", None)  # bitsandbytes: two codes a byte
            number = parameter.numel() if shape is None else torch.Size(shape).numel()
            yield path, owner, module, name, parameter, number


def _layer_names(model: nn.Module) -> Callable[[str, nn.Module], str]:
    """The function (path in the bare model, module) -> the key of `per_layer`."""
    lists = {_bare(model, path): "" for path in stacks(model)}
    if len(lists) > 1:  # name them by the words that tell them apart: encoder, decoder
        common = set.intersection(*(set(path.split(".")) for path in lists))
        lists = {path: ".".join(w for w in path.split(".") if w not in common) + "." for path in lists}
    tops = {_bare(model, path) for path in heads(model)}

    def name(path: str, module: nn.Module) -> str:
        for stack, prefix in lists.items():
            if path.startswith(f"{stack}."):
                return prefix + path[len(stack) + 1 :].split(".")[0]
        if any(path == top or path.startswith(f"{top}.") for top in tops):
            return "head"
        if isinstance(module, nn.Embedding) or any(word.startswith("emb") for word in path.split(".")):
            return "embeddings"
        return "norm" if "norm" in type(module).__name__.lower() else "other"

    return name


def _bare(model: nn.Module, path: str) -> str:
    """The path of a module in the bare model: without the steps through the hosts around it."""
    words, module = [], model
    for word in path.split("."):
        if not (isinstance(module, Adapted) and word == "layer"):
            words.append(word)
        module = module.get_submodule(word)
    return ".".join(words)


def _kind(path: str, model: nn.Module) -> str:
    """The last word of a path; numbers alone say little, so they keep the word before them: "mlp.0"."""
    found = re.search(r"[^.]*[^.\d][^.]*(\.\d+)*$", path)
    return found[0] if found else path or type(model).__name__


def _expected(model: nn.Module) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, sites in adapters(model).items():
        try:
            found[name] = sum(adapter.expected() for adapter in sites.values())
        except (ValueError, NotImplementedError):  # a site or a method without a formula
            continue
    return found


def _percent(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 or not value else f"{value:.1g}"


def _size(number: int) -> str:
    unit, word = next((p for p in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if number >= p[0]), (1, "B"))
    return f"{number / unit:,.{unit > 1:d}f} {word}"

"""A batch whose rows have different low-rank adapters: two batched matrix products for all of them, no loop.

    yᵢ = f(xᵢ) + sᵢ·Bᵢ·Aᵢ·xᵢ, with the factors of row i's own adapter

The factors are laid side by side, thin ones filled up with zeros, and gathered for the rows. Where gradients are off,
that is done once for many passes, at the price of N·r·(in + out) numbers a layer; the kernels of the papers gather as
they multiply.
Shapes: N rows, T tokens, r the largest rank, in/out features of the layer.
Source: Chen et al. 2023 (Punica), arXiv:2310.18547, section 4; Sheng et al. 2023 (S-LoRA), arXiv:2311.03285,
section 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import attrgetter, is_
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VERSION = attrgetter("_version")  # of a tensor: counts its changes in place


class Rows:
    """Which adapter each row of a batch has (None: the bare base), and what is kept for them from pass to pass.

    watched: whether each pass makes sure that the adapters are as they were; without, their owner answers for it.
    """

    def __init__(self, names: Sequence[str | None], watched: bool = True):
        if isinstance(names, str) or not all(name is None or isinstance(name, str) for name in names):
            raise TypeError(f"rows={names!r} must be a list: one adapter name, or None, for each row of the batch")
        self.names, self.watched = tuple(names), watched
        self.used = tuple(sorted({name for name in names if name is not None}))  # sorted: see `stacked`
        self.uniform = len(set(names)) == 1  # one adapter for all: nothing is mixed
        place = {name: i for i, name in enumerate(self.used)}
        self.which = torch.tensor([place.get(name, len(place)) for name in names], dtype=torch.long)  # type: ignore[arg-type]
        self.numbers = {name: (self.which == i).nonzero()[:, 0] for name, i in place.items()}
        self.kept: dict[nn.Module, Gathered] = {}  # by host

    def repeats(self, x: Tensor) -> int:
        """k if x has k rows for each named one, side by side: so generate() lays out beams and return sequences.

        Raises ValueError for another number of rows. Where x has no T (two dimensions) only k = 1 is believed: tokens
        that were picked or flattened, as experts get them, would pass for repeated rows.
        """
        n = max(1, len(self.which))  # not of names: a compiled model would guard on them
        k, left = len(x) // n, len(x) % n  # no divmod: torch.compile has none for sizes that may vary
        if left or k == 0 or (k > 1 and x.dim() < 3):
            flat = " (if they are tokens, as experts and OPT's fc1 get them: such a layer cannot have a mixed batch)"
            raise ValueError(f"the batch has {len(x)} rows, but adapters were named for {len(self.names)}"
                             f"{flat if x.dim() < 3 else ''}")  # fmt: skip
        return k

    def of(self, name: str, k: int, device: torch.device) -> Tensor:
        """The numbers of an adapter's rows where each row is there k times."""
        rows = self.numbers[name].to(device)
        return rows if k == 1 else (k * rows[:, None] + torch.arange(k, device=device)).flatten()

    def only(self, keep: Sequence[int]) -> Rows:
        """These rows alone, with what was gathered for them: the others have left the batch."""
        fewer = Rows([self.names[i] for i in keep], self.watched)
        fewer.kept = {host: g.only(keep) for host, g in self.kept.items() if len(g.A) == len(self.names)}
        return fewer

    def gathered(self, host: nn.Module, adapters: Mapping[str, Any], k: int) -> Gathered | None:
        """The factors for each row of a batch at one host; None if no adapter in it has factors."""
        keeping = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        kept = self.kept.get(host) if keeping else None
        if kept is not None and len(kept.A) == k * len(self.which) and not (self.watched and kept.changed()):
            return kept
        here = [name for name in self.used if name in adapters]
        products = {name: adapters[name].factors() for name in here if adapters[name].adds}
        found = {name: factors for name, factors in products.items() if factors is not None}
        if not found:
            return None
        A, B = stacked([found.get(name) for name in self.used])
        which = self.which.to(A.device)
        which = which if k == 1 else which.repeat_interleave(k)
        made = Gathered(A.index_select(0, which), B.index_select(0, which), [n for n in here if n not in found])
        if keeping and not any(adapters[name].training for name in here):  # dropout comes and goes with its p
            made.seen = Seen([adapters[name] for name in here]) if self.watched else None
            self.kept[host] = made
        return made


@dataclass
class Gathered:
    """The factors of each row, scaled: A (N, r, in) and s·Bᵀ (N, r, out)."""

    A: Tensor
    B: Tensor
    apart: list[str]  # the adapters of this layer that are not in it
    seen: Seen | None = None  # what it was made from; None: not to be kept

    def changed(self) -> bool:
        return self.seen is None or not self.seen.unchanged()

    def only(self, keep: Sequence[int]) -> Gathered:
        index = torch.tensor(keep, dtype=torch.long, device=self.A.device)
        return Gathered(self.A.index_select(0, index), self.B.index_select(0, index), self.apart, self.seen)

    def add(self, y: Tensor, x: Tensor, inplace: bool) -> Tensor:
        """y + s·B·A·x, row by row; x (N, …, in), y (N, …, out). Computed in the adapters' dtype."""
        flat = x.reshape(len(x), -1, x.shape[-1]).to(self.A.dtype)  # (N, T, in)
        z = torch.bmm(flat, self.A.mT)  # (N, T, r)
        if inplace and y.dtype == self.B.dtype == z.dtype and y.is_contiguous():  # autocast: z has another dtype
            y.view(len(y), -1, y.shape[-1]).baddbmm_(z, self.B)
            return y
        return y + torch.bmm(z, self.B).view(*x.shape[:-1], -1).to(x.dtype)


class Seen:
    """Whether adapters are still as they were seen: their tensors, what is in these, their numbers and flags."""

    def __init__(self, adapters: Sequence[nn.Module]):
        modules = [module for adapter in adapters for module in adapter.modules()]
        slots = [(held, key) for m in modules for held in (m._parameters, m._buffers) for key in held]
        plain = int | float | Tensor  # a tensor here is a parameter that another layer holds
        slots += [(vars(a), key) for a in adapters for key, value in vars(a).items() if isinstance(value, plain)]
        self.holders, self.keys = [held for held, _ in slots], [key for _, key in slots]
        self.things = self.now()
        self.tensors = [thing for thing in self.things if isinstance(thing, Tensor)]
        tracked = not any(tensor.is_inference() for tensor in self.tensors)  # those do not count their changes
        self.state = self.versions() if tracked else None

    def now(self) -> list:
        return list(map(dict.get, self.holders, self.keys))

    def versions(self) -> list[int]:
        """And where the numbers lie: `p.data = …` changes this alone."""
        return [*map(VERSION, self.tensors), *map(Tensor.data_ptr, self.tensors)]

    def unchanged(self) -> bool:
        same = self.state is not None and all(map(is_, self.now(), self.things))
        return same and self.versions() == self.state


def stacked(factors: Sequence[tuple[Tensor, Tensor, float] | None]) -> tuple[Tensor, Tensor]:
    """A (n + 1, r, in) and s·Bᵀ (n + 1, r, out) of n adapters; nil for those without, and for the bare base at the end.

    Their order must not depend on the rows: a compiled model then takes another order of rows as mere numbers.
    """
    there = [f for f in factors if f is not None]
    r = max(A.shape[0] for A, _, _ in there)
    dtype = reduce(torch.promote_types, {A.dtype for A, _, _ in there})
    A, B, _ = there[0]
    nil = A.new_zeros(r, A.shape[1], dtype=dtype), B.new_zeros(B.shape[0], r, dtype=dtype), 0.0

    def filled(A: Tensor, B: Tensor, s: float) -> tuple[Tensor, Tensor, float]:
        if (thin := r - A.shape[0]) > 0:
            A, B = F.pad(A, (0, 0, 0, thin)), F.pad(B, (0, thin))
        return (A, B, s) if A.dtype == dtype else (A.to(dtype), B.to(dtype), s)

    full = [nil if f is None else filled(*f) for f in (*factors, None)]
    scales = torch.tensor([s for _, _, s in full], dtype=dtype, device=B.device)
    B = torch.stack([B for _, B, _ in full]) * scales[:, None, None]
    return torch.stack([A for A, _, _ in full]), B.mT.contiguous()

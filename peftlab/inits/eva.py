"""EVA: begin where the inputs vary most, and share the rank out accordingly. Paischer et al. 2024, arXiv:2410.07170."""

from __future__ import annotations

from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..attach import adapters, switch_of
from ..core import Adapted
from ..hyper import checks
from ..layers import device_of, shape_of
from ..sites import at, put
from ._common import check_values, fill, svd, untrained
from ._data import batches, look

if TYPE_CHECKING:
    from ..methods.lora import LoRA


@checks
def eva(model: nn.Module, data: Any, tokenizer: Any = None, name: str = "default", *, rho: float = 2.0,
        tau: float = 0.99, whiten: bool = False, answers: bool = True, batch_size: int = 16,
        rounds: int = 20) -> nn.Module:  # fmt: skip
    """Begin an untrained LoRA at the principal directions of what its layers get; B stays zero.

        A ← the first r right singular vectors of X − mean(X), X (tokens, in) the layer's inputs on the data

    These are the A for which the first gradient of B is largest in expectation. The ranks are then shared out anew: the
    directions of all layers that explain most of their own layer's variance get them, as many as there were in all. A
    layer may get up to rho times its rank, and one that gets none loses its adapter. alpha follows r, so that the scale
    s of each layer stays.

    data: rows as `train` takes them, in batches of batch_size, or batches; they are gone through until all directions
    that are needed turn by less than tau (their cosine from batch to batch), at most `rounds` times.
    rho: from 1, where every layer keeps its rank. whiten: divide each direction by √σ.
    answers: whether only tokens that have a label count. Returns the model.
    Costs a forward pass a batch and, a layer and batch, the singular value decomposition of (tokens + rho·r, in).
    Raises ValueError for an adapter that is trained, merged or no LoRA, for no data, and for batches with fewer tokens
    than directions; the model is then as it was.
    Source: Paischer et al. 2024, arXiv:2410.07170, theorem 3.2; the singular vectors of batch upon batch: Ross, Lim,
    Lin and Yang 2008, doi:10.1007/s11263-007-0075-7.
    """
    if rho < 1 or not 0 < tau < 1 or rounds < 1:
        raise ValueError(f"rho={rho!r}, tau={tau!r}, rounds={rounds!r}: need rho ≥ 1, 0 < tau < 1 and rounds ≥ 1")
    there, data = untrained(model, name, "EVA"), batches(model, data, tokenizer, batch_size, "EVA")
    check_values(there)
    most = {path: min(round(len(a.lora_A) * rho), *shape_of(a.layer)) for path, a in there.items()}
    found, ranks = _directions(model, there, data, most, tau, answers, rounds)
    for path, adapter in there.items():
        A = found[path].V[: ranks[path]]
        _resize(model, path, name, adapter, A / found[path].S[: len(A), None].sqrt() if whiten else A)
    switch_of(model).rows = None
    return model


class Directions:
    """Principal directions of rows that come in batches: U·diag(σ)·Vᵀ of all of them, centred, without keeping them."""

    def __init__(self, k: int):
        self.k, self.n, self.variance = k, 0, 0.0
        self.mean = self.S = self.V = torch.empty(0)
        self.turned = torch.zeros(k)  # cosine between each direction and the one before

    def add(self, X: Tensor) -> None:
        """Go on with X (N, in). The mean moves too: it counts as one more row, √(nN/(n + N))·(old − new)."""
        N, mean = len(X), X.mean(0)
        rows = X - mean
        self.variance += rows.square().sum().item()
        if self.n:
            moved = (self.n * N / (self.n + N)) ** 0.5 * (self.mean - mean)
            self.variance += moved.square().sum().item()
            rows = torch.cat([self.S[:, None] * self.V, rows, moved[None]])
        _, S, V = svd(rows, self.k, niter=4)
        V = V * V.gather(1, V.abs().argmax(1, keepdim=True)).sign()  # a vector and its opposite are one direction
        if self.n:
            self.turned = nn.functional.cosine_similarity(V, self.V)
        self.mean = mean if not self.n else self.mean + N / (self.n + N) * (mean - self.mean)
        self.n, self.S, self.V = self.n + N, S, V

    @property
    def explained(self) -> Tensor:
        """(k,): each direction's part of the whole variance."""
        return self.S.square() / self.variance if self.variance else self.S


def shared_out(explained: dict[str, Tensor], budget: int) -> dict[str, int]:
    """path -> rank: of the directions of all layers the `budget` that explain most; of equals the earlier layer's."""
    owners = [path for path, parts in explained.items() for _ in parts]
    order = torch.cat(list(explained.values())).argsort(descending=True, stable=True)[:budget].tolist()
    chosen = [owners[i] for i in order]
    return {path: chosen.count(path) for path in explained}


def _directions(model: nn.Module, there: dict[str, LoRA], data: list, most: dict[str, int], tau: float, answers: bool,
                rounds: int) -> tuple[dict[str, Directions], dict[str, int]]:  # fmt: skip
    """The directions of each layer's inputs (layers that share their input share them), and its rank."""
    found: dict[str, Directions] = {}

    def meet(paths: list[str], X: Tensor) -> None:
        own = Directions(max(most[path] for path in paths))
        found.update({path: own for path in paths if path not in found})

    def see(paths: list[str], X: Tensor) -> None:
        if len(X) >= found[paths[0]].k:
            found[paths[0]].add(X)

    layers, ranks = {path: a.layer for path, a in there.items()}, dict(most)
    look(model, layers, data[:1], meet, answers)
    if lost := [path for path in layers if path not in found]:
        raise ValueError(f"{lost[0]!r} saw no input in the calibration data: give more of it, or other targets")
    most = {path: min(own.k, *shape_of(layers[path])) for path, own in found.items()}
    for i, batch in enumerate(chain.from_iterable(repeat(data, rounds))):
        turning = {id(d): path for path, d in reversed(found.items()) if (d.turned[: ranks[path]] < tau).any()}
        if not turning:
            break
        look(model, {path: layers[path] for path in turning.values()}, [batch], see, answers)
        thin = next((path for path, own in found.items() if not own.n), None)
        if thin is None:
            explained = {path: found[path].explained[: most[path]] for path in layers}
            ranks = shared_out(explained, sum(len(a.lora_A) for a in there.values()))
        elif i + 1 == len(data):
            raise ValueError(f"{thin!r} has {found[thin].k} directions to find, and no batch has as many tokens that "
                             "count: larger batches, a smaller r or rho, or answers=False")  # fmt: skip
    return found, ranks


def _resize(model: nn.Module, path: str, name: str, adapter: LoRA, A: Tensor) -> None:
    """Put A there, in an adapter of its rank and of the same scale; without a rank the adapter is taken away."""
    from ..methods.lora import LoRA

    host, r = at(model, path), len(adapter.lora_A)
    assert isinstance(host, Adapted)
    if not len(A):
        del host.adapters[name]
        if not host.adapters:
            put(model, path, host.layer)
        return
    if len(A) != r:
        power = 0.5 if adapter.hyper.get("rslora") else 1.0
        hyper = {**adapter.hyper, "r": len(A), "alpha": adapter.hyper["alpha"] * (len(A) / r) ** power}
        with torch.device(device_of(adapter.layer)):
            new = LoRA(adapter.layer, **hyper).to(adapter.lora_A.dtype).train(adapter.training)
        new.hyper, new.__dict__["peers"] = hyper, host.adapters
        new.requires_grad_(adapter.lora_A.requires_grad)
        host.adapters[name] = adapter = new
    fill(adapter, A)


def ranks_of(model: nn.Module, name: str = "default") -> dict[str, int]:
    """path -> the rank that each layer's LoRA has; those that lost theirs are not there."""
    return {path: a.lora_A.shape[0] for path, a in adapters(model)[name].items() if hasattr(a, "lora_A")}

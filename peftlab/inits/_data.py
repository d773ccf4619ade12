"""What a layer sees and what its weights would learn: inputs and gradients of the bare base on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..attach import using
from ..rows import IGNORED, collate, encode, kind_of
from ..runtime import mode

Batch = dict[str, Tensor]


def batches(model: nn.Module, data: Any, tokenizer: Any, batch_size: int, by: str) -> list[Batch]:
    """Ready batches as they are, or rows as `pl.train` takes them, in their order, `batch_size` at a time.

    data: rows (see `rows.encode`), an iterable of batches, such as a DataLoader, or one batch; a batch is a dictionary
    whose input_ids are (B, T). ValueError for no data.
    """
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}: must be a whole number, at least 1")
    if data is not None and not hasattr(data, "__iter__"):
        raise ValueError(f"{by} begins from calibration data, and {data!r} is none: pass rows as for train, or batches")
    one = isinstance(data, Mapping) and getattr(data.get("input_ids"), "ndim", 0) == 2
    found = [] if data is None else [data] if one else data if isinstance(data, Mapping) else list(data)
    if not found:
        raise ValueError(f"{by} begins from calibration data and has none: pass rows as for train, or batches")
    device = next(model.parameters()).device
    first = None if isinstance(found, Mapping) else found[0]
    if isinstance(first, Mapping) and getattr(first.get("input_ids"), "ndim", 0) == 2:
        return [{key: t.to(device) for key, t in batch.items() if isinstance(t, Tensor)} for batch in found]
    rows = encode(model, found, tokenizer)
    pad = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
    return [collate(rows[i : i + batch_size], pad, device) for i in range(0, len(rows), batch_size)]


def run(model: nn.Module, batch: Batch) -> Any:
    return model(**batch) if kind_of(model) == "other" else model(**batch, use_cache=False)


@torch.no_grad()
def look(model: nn.Module, layers: Mapping[str, nn.Module], data: Iterable[Batch],
         see: Callable[[list[str], Tensor], None], answers: bool = False) -> None:  # fmt: skip
    """Run the bare base, in eval mode, and call see(paths, X) with what each layer gets, X (N, in) in float32.

    Layers that get the very same tensor one after the other (q, k and v; gate and up) come in one call. Padding is left
    out; with `answers` also what has no label. Experts of a mixture get their tokens flattened: there nothing can be.
    """
    held: list[Any] = [None, []]  # the last input, and who got it

    def flush(masks: list[Tensor]) -> None:
        x, paths = held
        if paths:
            mask = next((m for m in masks if m.shape == x.shape[:-1]), None)
            see(paths, (x.flatten(0, -2) if mask is None else x[mask]).float())
        held[:] = None, []

    def hook(path: str, masks: list[Tensor]):
        def note(_, args):
            if args[0] is not held[0]:
                flush(masks)
            held[0] = args[0]
            held[1].append(path)

        return note

    with using(model), mode(model, training=False):
        for batch in data:
            masks = kept(batch, answers)
            handles = [layer.register_forward_pre_hook(hook(path, masks)) for path, layer in layers.items()]
            try:
                run(model, batch)
                flush(masks)
            finally:
                for handle in handles:
                    handle.remove()


def kept(batch: Batch, answers: bool) -> list[Tensor]:
    """(B, T) masks of the places that count, for encoder and decoder."""
    masks, labels = [], batch.get("labels")
    told = None if labels is None or labels.dim() < 2 else labels != IGNORED
    for ids, seen in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
        if ids in batch:
            masks.append(batch[seen].bool() if seen in batch else torch.ones_like(batch[ids], dtype=torch.bool))
    if answers and told is not None and masks and told.shape == masks[0].shape:
        masks[0] = masks[0] & told
    return masks if told is None else [*masks, told]  # the last: a decoder whose inputs the model makes of the labels


def second_moments(model: nn.Module, layers: Mapping[str, nn.Module], data: Iterable[Batch]) -> dict[str, Tensor]:
    """path -> C (in, in), the mean of x·xᵀ over the inputs of each layer, in float32; shared by layers that share them.

    Costs in² numbers for each different input. ValueError, naming the layer, for one that never ran.
    """
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    first: dict[str, str] = {}

    def see(paths: list[str], X: Tensor) -> None:
        for leader in {first.setdefault(path, paths[0]) for path in paths}:  # once for all that share it
            totals[leader] = totals.get(leader, 0) + X.T @ X
            counts[leader] = counts.get(leader, 0) + len(X)

    look(model, layers, data, see)
    for path in layers:
        if not counts.get(first.get(path, ""), 0):
            raise ValueError(f"{path!r} saw no input in the calibration data: give more of it, or other targets")
    return {path: totals[leader] / counts[leader] for path, leader in first.items()}


def gradients(model: nn.Module, layers: Mapping[str, nn.Module], data: Iterable[Batch]) -> dict[str, Tensor]:
    """path -> the mean over batches of ∂loss/∂W (out, in) of the bare base, in float32; packed weights have one too.

    W takes no gradient itself: for y = Wx it is the sum over tokens of (∂loss/∂y)·xᵀ, gathered on the way back.
    Costs a training step of full depth and out·in numbers a layer. ValueError for batches without labels.
    """
    totals: dict[str, Tensor] = {}
    root = torch.zeros((), device=next(model.parameters()).device, requires_grad=True)  # every y hangs on it

    def hook(path: str):
        def note(_, args, y: Tensor) -> Tensor:
            def add(g: Tensor) -> None:
                G = g.flatten(0, -2).float().T @ x.flatten(0, -2).float()
                totals[path] = totals[path] + G if path in totals else G

            x, y = args[0].detach(), y + root
            y.register_hook(add)
            return y

        return note

    number = 0
    handles = [layer.register_forward_hook(hook(path)) for path, layer in layers.items()]
    try:
        with using(model), mode(model, training=False), torch.enable_grad():
            for number, batch in enumerate(data, 1):  # noqa: B007 (the last one counts them)
                if "labels" not in batch:
                    raise ValueError("the batches have no labels, so there is no loss to take a gradient of")
                torch.autograd.grad(run(model, batch)["loss"], root, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    for path in layers:
        if path not in totals or not totals[path].any():
            raise ValueError(f"{path!r} has no gradient on the calibration data: give more of it, or other targets")
    return {path: total / number for path, total in totals.items()}

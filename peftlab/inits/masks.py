"""Which entries of a model's weights to train: by Fisher information, by a full fine-tuning, or by diff pruning.

Each of these functions attaches a FishMask adapter, whose places are those of the highest scores in all layers taken
together: a layer that has none of them gets no adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..attach import Targets, adapters, attach_plan, check_attached, check_name, find_targets, hosts, using
from ..hyper import checks
from ..layers import is_conv1d, is_quantised, shape_of, weight_of
from ..runtime import mode
from ..sites import at, bare
from ..texts import pad_of

Scores = Mapping[str, Tensor]  # path -> (out, in), on the CPU


@checks
def fish(model: nn.Module, dataset: Any, tokenizer: Any = None, *, density: float = 0.005,
         targets: Targets = "all-linear", name: str = "default", samples: int = 128) -> nn.Module:  # fmt: skip
    """Attach a FishMask on the entries that the data say most about.

        F = 1/N · Σᵢ (∇_W log p(yᵢ | xᵢ))²     over the first `samples` rows; the largest density·(number of entries)

    with the data's own labels (the "empirical" Fisher matrix, of which this is the diagonal; the paper draws y from
    the model, and finds a few hundred rows enough). Rows as in `train`. Costs a backward pass a row, and beside the
    model's gradients of one row one number an entry in CPU memory. Returns the model.

    Raises ValueError for rows that are none, for packed layers (four bits have no gradient), and a density that
    leaves nothing; the model is then as it was.
    Source: Sung et al. 2021, arXiv:2111.09839.
    """
    from ..rows import encode
    from ..train import loss_of

    check_name(model, name)
    layers = {path: bare(at(model, path)) for path in find_targets(model, targets)}
    for path, layer in layers.items():
        shape_of(layer)
        if is_quantised(layer) or layer.weight.is_meta:
            raise ValueError(f"{path!r} has no weights that could have a gradient; load the model dense")
    rows, pad = encode(model, dataset, tokenizer)[:samples], pad_of(model, tokenizer)
    scores = {path: torch.zeros(shape_of(layer)) for path, layer in layers.items()}
    weights = [layer.weight for layer in layers.values()]
    trained = {p: p.requires_grad for p in model.parameters()}
    bare_base = using(model) if hosts(model) else mode(model, training=False)
    try:
        for p in trained:
            p.requires_grad_(any(p is w for w in weights))
        with bare_base, mode(model, training=False), torch.enable_grad():
            for row in rows:
                likelihood = loss_of(model, [row], pad) * row.trained  # the loss is a mean over the row's labels
                for (path, layer), g in zip(layers.items(), torch.autograd.grad(likelihood, weights), strict=True):
                    scores[path] += (g.T if is_conv1d(layer) else g).float().cpu().square() / len(rows)
    finally:
        for p, before in trained.items():
            p.requires_grad_(before)
    return attach_top(model, name, scores, density)


@checks
def lottery(model: nn.Module, tuned: nn.Module, *, density: float = 0.05, targets: Targets = "all-linear",
            name: str = "default") -> nn.Module:  # fmt: skip
    """LT-SFT: attach a FishMask on the entries that a full fine-tuning moved most, with values at zero.

        |W_tuned − W|, the largest density·(number of entries); then the winners are trained from the base again

    tuned: the same model after `full_finetuning` and training, the first phase; training the adapter is the second.
    Returns the model. Raises ValueError for models that do not fit together, or do not differ.
    Source: Ansell et al. 2022, arXiv:2110.07560 ("Composable sparse fine-tuning for cross-lingual transfer").
    """
    scores = {}
    for path in find_targets(model, targets):
        old, new = (weight_of(bare(at(m, path))).detach().cpu() for m in (model, tuned))
        if old.shape != new.shape:
            raise ValueError(f"{path!r} is {tuple(old.shape)} in the base and {tuple(new.shape)} in the tuned model")
        scores[path] = (new.float() - old.float()).abs()
    if not any(score.any() for score in scores.values()):
        raise ValueError("the tuned model does not differ from the base on these layers; train it first")
    return attach_top(model, name, scores, density)


@checks
def project(model: nn.Module, diff: str, *, density: float = 0.005, name: str = "default") -> nn.Module:
    """Attach a FishMask with the largest density·(number of entries) of what the DiffPruning adapter `diff` learnt.

    The adapter `diff` stays attached; the new one is active, and its values may be trained on. Returns the model.
    Source: Guo et al. 2021, arXiv:2012.07463 (magnitude pruning, and training with the mask fixed).
    """
    from ..methods.diff_pruning import DiffPruning

    check_attached(model, [diff])
    changes = {}
    for path, adapter in adapters(model)[diff].items():
        if not isinstance(adapter, DiffPruning):
            raise ValueError(f"{diff!r} is {type(adapter).__name__}, and this keeps a part of what DiffPruning learnt")
        with torch.no_grad(), mode(adapter, training=False):
            changes[path] = adapter.change_of_weight().cpu()
    attach_top(model, name, {path: change.abs() for path, change in changes.items()}, density)
    for path, made in adapters(model)[name].items():
        values: Any = made.values
        values.data.copy_(changes[path].flatten()[made.places.long().cpu()])  # type: ignore[operator]
    return model


def attach_top(model: nn.Module, name: str, scores: Scores, density: float) -> nn.Module:
    """Attach a FishMask on the places of the highest scores of all layers. ValueError if that is none, or all are 0."""
    from ..methods._sparse import top
    from ..methods.fish_mask import FishMask

    entries = sum(score.numel() for score in scores.values())
    k = int(density * entries)
    if not 0 < density <= 1 or k < 1:
        raise ValueError(f"density={density} of {entries} entries leaves {k} to train; choose one in 0…1")
    least = torch.cat([score.flatten() for score in scores.values()]).topk(k).values[-1]
    if not least > 0 and not any(score.any() for score in scores.values()):
        raise ValueError("all scores are zero, so nothing tells which entries to train")
    counts = {path: int((score > least).sum()) for path, score in scores.items()}
    for path, score in scores.items():  # ties at the edge: the first layers get them, so that there are k in all
        counts[path] += min(int((score == least).sum()), k - sum(counts.values()))
    attach_plan(model, name, {path: (FishMask, {"k": n}) for path, n in counts.items() if n})
    for path, made in adapters(model)[name].items():
        places: Any = made.places
        places.copy_(top(scores[path], len(places)))
    return model

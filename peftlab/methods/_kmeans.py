"""Rows in groups of similar ones, as HF PEFT has scikit-learn do it for AdaMSS, OpenReview 8ZdWmpYxT0."""

from __future__ import annotations

import torch
from torch import Tensor

SEED, ROUNDS = 123456789, 10  # HF PEFT's


def kmeans(points: Tensor, groups: int) -> Tensor:
    """The group 0…groups−1 of each row of `points` (n, d): Lloyd's algorithm from some of the rows, drawn by SEED.

    In turns, each row goes to the nearest centre, and each centre to the mean of its rows, until nothing changes, or
    for ROUNDS. The random numbers and the rules to stop are those of scikit-learn's KMeans(init="random", n_init=1), so
    that the groups are the same, but for rows that are as near to two centres up to rounding.
    """
    import numpy as np

    points = points.detach().float().cpu()
    enough = 1e-4 * points.var(0, unbiased=False).mean()
    points = points - points.mean(0)
    weights = np.ones(len(points), dtype=np.float32)
    drawn = np.random.RandomState(SEED).choice(len(points), groups, replace=False, p=weights / weights.sum())
    centres, before = points[torch.from_numpy(drawn)], None
    for _ in range(ROUNDS):
        found = nearest(points, centres)
        moved = means(points, found, centres)
        shift, centres = ((moved - centres) ** 2).sum(), moved
        if before is not None and torch.equal(found, before):
            return found
        before = found
        if shift <= enough:
            break
    return nearest(points, centres)


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """The index of the centre that is nearest to each point: ‖c‖² − 2·p·c is least."""
    return ((centres**2).sum(1) - 2 * points @ centres.T).argmin(1)


def means(points: Tensor, found: Tensor, centres: Tensor) -> Tensor:
    """The mean of each group; one without points gets the point that is farthest from its own centre, as its only."""
    found = found.clone()
    far = ((points - centres[found]) ** 2).sum(1)
    for empty in sorted(set(range(len(centres))) - set(found.tolist())):
        away = int(far.argmax())
        found[away], far[away] = empty, -1.0
    one = torch.nn.functional.one_hot(found, len(centres)).to(points)
    return one.T @ points / one.sum(0).clamp(min=1)[:, None]

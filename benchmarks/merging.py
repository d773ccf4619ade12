"""Two adapters in one, without training: how much of both is left, by which way of combining?

    python benchmarks/adapters.py --jobs 2         # first: the adapters
    python benchmarks/merging.py --jobs 2          # writes data/results/merging.csv; goes on where it was stopped

Two pairs. sql + reviews: two tasks with other questions and other answers, so one set of weights could serve both.
pirate + telegram: two voices for the same questions, which contradict each other; no set of weights can serve both.

Every way of `pl.combine` gets four settings, fixed before the first run: those without a density the weights 0.5, 0.7,
1 and 1.4 (the same for both adapters), the others the weights 0.7 and 1.4 with the densities 0.3 and 0.7. All settings
run with all seeds (seed s combines the adapters of seed s, and draws DARE's masks). The setting is chosen on VALID, by
the mean accuracy of the two parts over the seeds; TEST is only reported. Beside them, on the same rows:

- base: no adapter.
- alone: each part with its own adapter, as if each request were routed: what there is to keep.
- first, second: one of the adapters for everything.
- trained on both: one adapter of the same size, trained on the rows of both for the steps of both together.

Besides accuracy, how much the two changes of the weights meet: cosine of the angle between them, and the share of the
smaller change's squared size in entries where the signs disagree (mean over the layers).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: each worker process computes with one thread

import adapters  # noqa: E402  # the experiments beside this file
import classic  # noqa: E402

from peftlab import lab  # noqa: E402
from peftlab.paths import DATA  # noqa: E402

OUT, SEEDS = DATA / "results" / "merging.csv", (0, 1, 2)
PAIRS = tuple(adapters.MIXED)
DENSE = ("linear", "cat", "svd")
SPARSE = ("ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd", "magnitude_prune",
          "magnitude_prune_svd")  # fmt: skip
SETTINGS = dict.fromkeys(DENSE, [(w, 1.0) for w in (0.5, 0.7, 1.0, 1.4)]) | dict.fromkeys(
    SPARSE, [(w, d) for w in (0.7, 1.4) for d in (0.3, 0.7)]
)
BESIDE = ("base", "alone", "first", "second", "trained on both")
MEASURED = ("parameters", "first_valid", "second_valid", "valid_accuracy", "valid_loss", "first_test", "second_test",
            "test_accuracy", "cosine", "conflict", "seconds")  # fmt: skip


def experiment(
    pairs: Sequence[str] = PAIRS, methods: Sequence[str] = (*BESIDE, *SETTINGS), seeds: Sequence[int] = SEEDS
) -> lab.Experiment:
    """Each way at each of its settings, on each pair. The rate is that of the adapters, 0 where there are two."""
    cases = []
    for pair in pairs:
        base, data = lab.fingerprints(adapters.source(adapters.parts(pair)[0]))
        rates = [adapters.best_rate(task) for task in (*adapters.parts(pair), pair)]
        made = {"rates": " ".join(f"{rate:g}" for rate in rates), "base": base, "data": data}
        for method in methods:
            for weight, density in SETTINGS.get(method, [(1.0, 1.0)]):
                key = {"pair": pair, "method": method, "weight": weight, "density": density}
                settings = made | {"config": lab.config_hash(key | made | adapters.HYPER)}
                cases.append(lab.Case(key, settings, (0.0,)))
    return lab.Experiment(tuple(cases), MEASURED, execute, tuple(seeds))


def loaded(pair: str, seed: int):
    """The base with the adapters "first" and "second" of one seed, and "both", trained on both."""
    import peftlab as pl

    model, _ = adapters.base()
    for name, task in zip(("first", "second", "both"), (*adapters.parts(pair), pair), strict=True):
        folder, _ = adapters.trained(task, adapters.best_rate(task), seed)
        pl.load_adapter(model, folder, name=name)
    return model


def meeting(model) -> dict[str, float]:
    """How far two attached adapters pull in the same direction: means over the layers."""
    import torch

    import peftlab as pl

    cosines, conflicts = [], []
    for path, first in pl.adapters(model)["first"].items():
        a, b = (s * B @ A for A, B, s in (first.factors(), pl.adapters(model)["second"][path].factors()))
        cosines.append(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item())
        smaller = min(a, b, key=lambda change: change.norm().item())
        against = (a.sign() * b.sign() < 0) * smaller.square()
        conflicts.append((against.sum() / smaller.square().sum()).item())
    return {"cosine": sum(cosines) / len(cosines), "conflict": sum(conflicts) / len(conflicts)}


def answer_loss(model, rows: Sequence[dict], size: int = 50) -> float:
    """Mean negative log-likelihood of the answers' tokens, in nats."""
    import torch

    from peftlab.rows import collate, encode

    total, tokens, encoded = 0.0, 0, encode(model, rows, classic.base()[1])
    with torch.no_grad():
        for start in range(0, len(encoded), size):
            some = encoded[start : start + size]
            here = sum(row.trained for row in some)
            total += here * model(**collate(some, 0, next(model.parameters()).device), use_cache=False).loss.item()
            tokens += here
    return total / tokens


def judged(models: Sequence[Any], pair: str) -> dict[str, float]:
    """Accuracy and loss on the two parts, each with its own of the two models."""
    found: dict[str, float] = {}
    losses = []
    for which, model, task in zip(("first", "second"), models, adapters.parts(pair), strict=True):
        for split in ("valid", "test"):
            found[f"{which}_{split}"] = classic.scored(
                model, adapters.source(task), adapters.rows(task)[split]).value  # fmt: skip
        losses.append(answer_loss(model, adapters.rows(task)["valid"]))
    for split in ("valid", "test"):
        found[f"{split}_accuracy"] = (found[f"first_{split}"] + found[f"second_{split}"]) / 2
    return found | {"valid_loss": sum(losses) / 2}


def execute(run: lab.Run) -> lab.Row:
    """Combine, merge into the weights, judge."""
    import torch

    import peftlab as pl

    begin = time.perf_counter()
    pair, method, weight, density = run.case.key.values()
    model = loaded(pair, run.seed)
    found = dict.fromkeys(MEASURED, math.nan)
    with torch.no_grad():
        found |= meeting(model)
    if method == "alone":
        chosen: tuple[str | None, ...] = ("first", "second")
    elif method in SETTINGS:
        torch.manual_seed(run.seed)
        more = {} if method in DENSE else {"density": density}
        pl.combine(model, {"first": weight, "second": weight}, how=method, name="combined", **more)
        chosen = ("combined",) * 2
    else:
        chosen = ({"base": None, "trained on both": "both"}.get(method, method),) * 2
    used = {name for name in chosen if name}
    found["parameters"] = sum(p.numel() for n in used for a in pl.adapters(model)[n].values() for p in a.parameters())
    found |= judged([merged(model, name) for name in chosen], pair)
    return lab.measured_row(MEASURED, found | {"seconds": round(time.perf_counter() - begin, 1)})


def merged(model, name: str | None):
    """A copy of the model with one adapter in its weights (None: the bare base)."""
    import copy

    import peftlab as pl

    one = copy.deepcopy(model)
    pl.activate(one, *[name] if name else [])
    return pl.merge(one, name) if name else one


def best(runs):
    """Of each way its setting with the best mean VALID accuracy over the seeds (ties: the lower loss), all its rows."""
    import pandas

    kept = []
    for _, mine in runs.groupby(["pair", "method"], sort=False):
        means = mine.groupby(["weight", "density"])[["valid_accuracy", "valid_loss"]].mean()
        weight, density = means.sort_values(["valid_accuracy", "valid_loss"], ascending=[False, True]).index[0]
        kept.append(mine[(mine["weight"] == weight) & (mine["density"] == density)])
    return pandas.concat(kept) if kept else runs


def table(runs) -> str:
    """Each way at its best setting: means over the seeds, and the range of the mean of both parts."""
    body = []
    for (pair, method), mine in best(runs).groupby(["pair", "method"], sort=False):
        both = 100 * mine["test_accuracy"]
        body.append((pair, method, f"{mine['weight'].iloc[0]:g}", f"{mine['density'].iloc[0]:g}", str(len(mine)),
                     *(f"{100 * mine[c].mean():.1f} %" for c in ("first_test", "second_test")),
                     f"{both.mean():.1f} % ({both.min():.1f}–{both.max():.1f})"))  # fmt: skip
    head = ("pair", "method", "weight", "density", "seeds", "first", "second", "mean (lowest–highest seed)")
    return lab.markdown(head, body)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = lab.options(__doc__, OUT)
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=PAIRS)
    parser.add_argument("--methods", nargs="+", choices=(*BESIDE, *SETTINGS), default=(*BESIDE, *SETTINGS))
    options = parser.parse_args(arguments)
    lab.carry_out(experiment(options.pairs, options.methods), options, table)


if __name__ == "__main__":
    main()

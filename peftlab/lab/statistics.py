"""What a table of runs says: summaries at the chosen rate, intervals over the seeds, comparisons of two methods.

Few seeds are few: an interval of three runs is a hint, and no test of three pairs can give a p below 0.25.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import chain, combinations
from statistics import fmean
from typing import Any, NamedTuple

from .plan import best

EXACT_PAIRS = 20  # 2²⁰ sign flips are counted one by one; of more pairs, some are drawn
EXACT_GROUPINGS = 200_000  # two groups of ten (184 756 ways) are still counted one by one


def chosen(runs, by: str | Sequence[str]):
    """The rows of a table of runs at the learning rate chosen for their group: with all seeds, in the table's order.

    `by` names the columns that make a group. Chosen is the rate with the highest valid_accuracy of the group's lowest
    seed; of equal ones, that with the lowest valid_loss.
    """
    groups = [by] if isinstance(by, str) else list(by)
    if wrong := [name for name in (*groups, "learning_rate", "seed") if name not in runs]:
        raise ValueError(f"the table has no column {wrong[0]!r}; it has {', '.join(runs)}")
    kept: list[Any] = []
    for _, group in runs.groupby(groups, sort=False):
        first = group[group["seed"] == group["seed"].min()]
        rate = best(first.to_dict("records"))["learning_rate"]
        kept += list(group.index[group["learning_rate"] == rate])
    return runs.loc[sorted(kept)]


def summary(
    runs, by: str | Sequence[str], metric: str = "test_accuracy", also: Sequence[str] = (), interval: str = "range"
):
    """What a table of runs says, one line per group: a pandas table with the groups as its index, in the runs' order.

    parameters: trained. learning_rate: chosen on VALID with the first seed. rates: tried. seeds: run at the chosen
    rate. mean: of `metric` over those seeds. low, high: with interval="range" the lowest and the highest of them, with
    "bootstrap" the mean's 95 % interval (see `bootstrap`). `also`: means of more columns over the same seeds.
    """
    import pandas

    if interval not in ("range", "bootstrap"):
        raise ValueError(f"interval is 'range' or 'bootstrap', not {interval!r}")
    groups = [by] if isinstance(by, str) else list(by)
    picked = chosen(runs, groups)
    if wrong := [name for name in (metric, *also) if name not in runs]:
        raise ValueError(f"the table has no column {wrong[0]!r}; it has {', '.join(runs)}")
    lines = {}
    for name, at in picked.groupby(groups, sort=False):
        same = (runs[groups] == at[groups].iloc[0]).all(axis=1)
        values = at[metric]
        low, high = (values.min(), values.max()) if interval == "range" else bootstrap(values)[1:]
        lines[name if len(groups) > 1 else name[0]] = {
            "parameters": at["parameters"].iloc[0], "learning_rate": at["learning_rate"].iloc[0],
            "rates": runs.loc[same, "learning_rate"].nunique(), "seeds": at["seed"].nunique(),
            "mean": values.mean(), "low": low, "high": high,
        } | {column: at[column].mean() for column in also}  # fmt: skip
    found = pandas.DataFrame.from_dict(lines, orient="index")
    found = found.astype({"parameters": int, "rates": int, "seeds": int})
    found.index = pandas.MultiIndex.from_tuples(lines, names=groups) if len(groups) > 1 else found.index.rename(by)
    return found


def seeds_range(line) -> str:
    """Mean, lowest and highest of a line of `summary` that holds shares: "47.0 % (43.2–50.1)"."""
    return f"{100 * line['mean']:.1f} % ({100 * line['low']:.1f}–{100 * line['high']:.1f})"


class Interval(NamedTuple):
    """A value with its 95 % interval, in the unit of what was measured."""

    value: float
    low: float
    high: float


def bootstrap(
    values: Sequence[float],
    statistic: Callable[[Sequence[float]], float] = fmean,
    draws: int = 10_000,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> Interval:
    """A statistic of runs with its 95 % percentile interval: (value, low, high).

    Runs are drawn with replacement, as many as there are, `draws` times; low and high are the 2.5 % and 97.5 %
    quantiles of the statistic. `groups`, one label per value (a task, a base model): drawn are groups, then runs within
    each drawn group, so that the interval speaks of other groups too. Of a single value (or group), low and high are
    nan: how much runs differ is not known.

    Few runs give too narrow an interval: for the mean of normal values, the one that is called 95 % holds the truth in
    76 % of all cases with 3 runs, 83 % with 5, 91 % with 10, 93 % with 30 (simulated; tests/test_laboratory.py). With 3
    it is their range: the lowest is drawn three times with a chance of 1/27, which is more than 2.5 %.
    Raises ValueError: no values, values that are no finite numbers, labels that are not one per value.
    Source: Efron 1979, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7.
    """
    import numpy

    data = _finite_values(values, "values")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, not {draws}")
    rng, n = numpy.random.default_rng(seed), len(data)
    labels = list(range(n) if groups is None else groups)
    if len(labels) != n:
        raise ValueError(f"groups needs one label per value: there are {n} values and {len(labels)} labels")
    parts = [data[[label == name for label in labels]] for name in dict.fromkeys(labels)]

    def drawn():
        if groups is None:
            return data[rng.integers(n, size=n)]
        picked = [parts[i] for i in rng.integers(len(parts), size=len(parts))]
        return numpy.concatenate([part[rng.integers(len(part), size=len(part))] for part in picked])

    value, low, high = float(statistic(data)), math.nan, math.nan
    if len(parts) > 1:
        low, high = numpy.quantile([statistic(drawn()) for _ in range(draws)], (0.025, 0.975)).tolist()
    return Interval(value, low, high)


class Comparison(NamedTuple):
    """The mean difference of two methods, what it may be by chance, and how often chance alone gives as much.

    low, high: 95 % bootstrap interval of the difference, nan if there is one pair or run. p: two-sided. n: pairs, or
    runs of both together. smallest_p: no p below this is possible with so few, whatever the values are.
    """

    difference: float
    low: float
    high: float
    p: float
    n: int
    smallest_p: float
    paired: bool = True

    def __str__(self) -> str:
        what = ("pair" if self.paired else "run") + ("" if self.n == 1 else "s")
        interval = f"95 % interval {self.low:+.4g} to {self.high:+.4g}" if math.isfinite(self.low) else "no interval"
        words = f"{self.difference:+.4g} ({interval}), p = {self.p:.3g}, {self.n} {what}"
        if self.smallest_p > 0.05:
            words += f"; no p below {self.smallest_p:.3g} is possible with so few"
        return words

    def __repr__(self) -> str:
        return str(self)


def compare(
    a: Sequence[float], b: Sequence[float], paired: bool = True, draws: int = 10_000, seed: int = 0
) -> Comparison:
    """Is a better than b? The mean of a − b with its 95 % bootstrap interval, and a two-sided permutation test.

    paired: a[i] and b[i] belong together (same task, same seed). If the methods were alike, each difference could have
    had the other sign: p is the share of all 2ⁿ flips of signs whose mean is at least as far from 0. Unpaired: all ways
    to call len(a) of the runs "a". Both are exact: every way is counted. Of more than 2²⁰ flips or 200 000 ways,
    `draws` are drawn with the seed, and p = (1 + as far) / (1 + draws), which is never 0.

    The smallest p that is possible is 2/2ⁿ for n pairs: 0.25 for 3, 0.06 for 5, and 6 are needed to come below 0.05.
    For two groups of 3, unpaired, it is 2/20 = 0.1. `smallest_p` says it. The interval has no such limit, but is too
    narrow with few runs (see `bootstrap`). compare(b, a) is the same with the signs changed.
    Raises ValueError: no values, pairs that do not match in number, values that are no finite numbers.
    Source: Fisher 1935, "The Design of Experiments", section 21; Pitman 1937, "Significance tests which may be applied
    to samples from any populations", JRSS supplement 4. Drawn ones: Phipson & Smyth 2010, arXiv:1603.05766.
    """
    x, y = _finite_values(a, "a"), _finite_values(b, "b")
    if not paired:
        if sorted(x) < sorted(y):  # always computed in the same order, so that a and b may change places
            turned = _unpaired(sorted(y), sorted(x), draws, seed)
            return turned._replace(difference=-turned.difference, low=-turned.high, high=-turned.low)
        return _unpaired(sorted(x), sorted(y), draws, seed)
    if len(x) != len(y):
        raise ValueError(f"pairs need as many values in a ({len(x)}) as in b ({len(y)}); or say paired=False")
    difference, low, high = bootstrap(x - y, draws=draws, seed=seed)
    p, smallest = _sign_flips(x - y, draws, seed)
    return Comparison(difference, low, high, p, len(x), smallest)


def _sign_flips(differences, draws: int, seed: int) -> tuple[float, float]:
    """(p, the smallest possible) of the mean of differences, each of which may have either sign."""
    import numpy

    n = len(differences)
    if n <= EXACT_PAIRS:
        sums = numpy.zeros(1)
        for one in differences:  # 1, 2, 4, … sums: each difference is added to all of them, and taken from all
            sums = numpy.concatenate([sums + one, sums - one])
        return _share_as_far(sums, differences.sum(), abs(differences).sum()), 2.0 ** (1 - n)
    rng = numpy.random.default_rng(seed)
    sums = numpy.array([(differences * (2 * rng.integers(2, size=n) - 1)).sum() for _ in range(draws)])
    share = _share_as_far(sums, differences.sum(), abs(differences).sum())
    return (1 + share * draws) / (1 + draws), 1 / (1 + draws)


def _unpaired(a, b, draws: int, seed: int) -> Comparison:
    import numpy

    x, y = numpy.array(a), numpy.array(b)
    both, m, n = numpy.concatenate([x, y]), len(x), len(x) + len(y)
    rng, ways = numpy.random.default_rng(seed), math.comb(n, m)
    low = high = math.nan
    if min(m, n - m) > 1:
        means = (rng.choice(x, (draws, m)).mean(1) - rng.choice(y, (draws, n - m)).mean(1)).tolist()
        low, high = numpy.quantile(means, (0.025, 0.975)).tolist()
    exact = ways <= EXACT_GROUPINGS
    if exact:
        picked = numpy.fromiter(chain.from_iterable(combinations(range(n), m)), int, ways * m).reshape(ways, m)
    else:
        picked = numpy.array([rng.permutation(n)[:m] for _ in range(draws)])
    firsts = both[picked].sum(1)
    differences = firsts / m - (both.sum() - firsts) / (n - m)
    p = _share_as_far(differences, x.mean() - y.mean(), abs(both).sum())
    smallest = (2 if 2 * m == n else 1) / ways  # of equal groups, the same two with their names changed are as far
    if not exact:
        p, smallest = (1 + p * draws) / (1 + draws), 1 / (1 + draws)
    return Comparison(float(x.mean() - y.mean()), low, high, p, n, smallest, paired=False)


def _share_as_far(found, observed: float, scale: float) -> float:
    """The share that is at least as far from 0; sums of the same numbers in another order count as equal."""
    return float((abs(found) >= abs(observed) - 1e-12 * scale).mean())


def compare_methods(
    runs, a: Any, b: Any, metric: str = "test_accuracy", by: str = "method", pair: Sequence[str] = ("task", "seed")
) -> Comparison:
    """`compare` two methods of a table of runs at their chosen rates (see `chosen`), paired by columns: a − b.

    `by` is the column that names the methods. Each row of one has its partner in that row of the other with the same
    values in the columns `pair`. Pairs count as independent: what they say holds for the tasks and the base that were
    run. For a claim about other tasks, the tasks' means are the pairs.
    Raises ValueError: a column or method that is not there, several rows for one pair, a row without a partner.
    """
    columns = [pair] if isinstance(pair, str) else list(pair)
    if wrong := [name for name in (by, metric, *columns) if name not in runs]:
        raise ValueError(f"the table has no column {wrong[0]!r}; it has {', '.join(runs)}")
    there = list(dict.fromkeys(runs[by]))
    if missing := [name for name in (a, b) if name not in there]:
        spelled = {str(name).lower(): name for name in there}
        close = difflib.get_close_matches(str(missing[0]).lower(), spelled, 1)
        hint = f"did you mean {spelled[close[0]]!r}?" if close else f"there are {', '.join(map(str, there))}"
        raise ValueError(f"no row has {by} {missing[0]!r}; {hint}")
    values = []
    for name in (a, b):
        rows = runs[runs[by] == name].set_index(columns)[metric]
        if (again := rows.index[rows.index.duplicated()]).size:
            raise ValueError(f"{name!r} has several rows with {_told(columns, again[0])}: choose one rate first, with "
                             f"lab.chosen(runs, by=[…, {by!r}]), or name more columns in pair")  # fmt: skip
        values.append(rows)
    x, y = values
    for name, rows, other in ((a, x, y), (b, y, x)):
        if (alone := rows.index.difference(other.index)).size:
            more = f" and {alone.size - 1} more" if alone.size > 1 else ""
            raise ValueError(f"{name!r} has a row with {_told(columns, alone[0])}{more}, the other method has none: "
                             "run what is missing, or compare the rows that both have")  # fmt: skip
    return compare(x.to_numpy(float), y.loc[x.index].to_numpy(float))


def _told(columns: Sequence[str], values: Any) -> str:
    each = values if len(columns) > 1 else [values]
    return ", ".join(f"{column} {value}" for column, value in zip(columns, each, strict=True))


def holm(p_values: Iterable[float]) -> list[float]:
    """p-values of several claims, adjusted so that the chance of any false one among them stays below what you ask.

    The smallest of m is multiplied by m, the next by m − 1, …; none becomes smaller than one before it, none exceeds 1.
    In the order given.
    Raises ValueError: a number that is no probability.
    Source: Holm 1979, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6.
    """
    found = list(p_values)
    if wrong := [p for p in found if not 0 <= p <= 1]:
        raise ValueError(f"a p-value lies between 0 and 1, not at {wrong[0]}")
    adjusted, floor = [0.0] * len(found), 0.0
    for rank, at in enumerate(sorted(range(len(found)), key=found.__getitem__)):
        floor = adjusted[at] = min(1.0, max(floor, (len(found) - rank) * found[at]))
    return adjusted


def _finite_values(values: Sequence[float], name: str):
    """As a float64 array of one dimension."""
    import numpy

    data = numpy.asarray(list(values), dtype=float)
    if data.ndim != 1 or not len(data):
        raise ValueError(f"{name} must be a list of at least one number")
    if not numpy.isfinite(data).all():
        raise ValueError(f"{name} holds {data[~numpy.isfinite(data)][0]}: a run that diverged or was not measured; "
                         "leave it out, or compare a metric that all runs have")  # fmt: skip
    return data

"""Exercises of 11_choosing_a_method: how wide the range of good rates is, and what chance can do."""

import itertools

from ._frame import exercise, prediction

LESSON = "11_choosing_a_method"


def _ladders() -> list[tuple]:
    """(accuracies by rate, share): a peak, a plateau, all equal, unsorted, and a share that only the best has."""
    return [
        ({0.001: 0.2, 0.002: 0.55, 0.005: 0.6, 0.01: 0.5}, 0.9),
        ({0.01: 0.05, 0.02: 0.08, 0.05: 0.1}, 0.75),
        ({0.1: 0.3, 0.2: 0.3}, 0.9),
        ({0.02: 0.4, 0.001: 0.8, 0.005: 0.76}, 0.5),
        ({0.001: 0.2, 0.002: 0.4}, 1.0),
    ]


@exercise(LESSON, "the best accuracy times `share` is the bar; who reaches it stays", _ladders)
def good_rates(accuracies, share):
    """Return the sorted list of learning rates whose accuracy is at least `share` of the best one's.

    accuracies: rate -> accuracy. share: 0.9 means nine tenths of the best accuracy.
    """
    bar = share * max(accuracies.values())
    return sorted(rate for rate, accuracy in accuracies.items() if accuracy >= bar)


@good_rates.mistake("share is a part of the best accuracy, not an accuracy: 0.9 of a best of 0.6 is 0.54")
def _absolute(accuracies, share):
    return sorted(rate for rate, accuracy in accuracies.items() if accuracy >= share)


@good_rates.mistake("at least `share`: a rate that is exactly at the bar is good too, and so is the best one")
def _strict(accuracies, share):
    bar = share * max(accuracies.values())
    return sorted(rate for rate, accuracy in accuracies.items() if accuracy > bar)


@good_rates.mistake("this goes down by 1 − share itself, not by that share of the best: small accuracies all pass")
def _points(accuracies, share):
    bar = max(accuracies.values()) - (1 - share)
    return sorted(rate for rate, accuracy in accuracies.items() if accuracy >= bar)


@good_rates.mistake("these are the accuracies; wanted are the rates that have them")
def _values(accuracies, share):
    bar = share * max(accuracies.values())
    return sorted(accuracy for accuracy in accuracies.values() if accuracy >= bar)


@good_rates.mistake("the bar is set by the best accuracy, not by that of the largest rate")
def _largest_rate(accuracies, share):
    bar = share * accuracies[max(accuracies)]
    return sorted(rate for rate, accuracy in accuracies.items() if accuracy >= bar)


def _differences() -> list[tuple]:
    """Differences of pairs: all of one sign, mixed, one alone, with a zero."""
    return [([3.0, 1.0, 2.0],), ([2.0, -1.0, 4.0, 1.0],), ([5.0],), ([1.0, 0.0, -3.0, -2.0, -4.0],), ([1.0, -1.0],)]


@exercise(LESSON, "itertools.product(*((d, -d) for d in differences)) gives all patterns", _differences)
def sign_flip_p(differences):
    """Return the exact two-sided p-value of paired differences: how often chance does as much.

    If the two methods were alike, each difference might as well have the other sign. Of all 2ⁿ patterns of signs, the
    share whose sum is at least as far from zero as the sum that was seen (to within 1e-9).
    """
    import itertools

    seen = abs(sum(differences))
    sums = [abs(sum(pattern)) for pattern in itertools.product(*((d, -d) for d in differences))]
    return sum(one >= seen - 1e-9 for one in sums) / len(sums)


@sign_flip_p.mistake("one-sided: a difference as large in the other direction would have surprised us as much")
def _one_sided(differences):
    sums = [sum(pattern) for pattern in itertools.product(*((d, -d) for d in differences))]
    return sum(one >= abs(sum(differences)) - 1e-9 for one in sums) / len(sums)


@sign_flip_p.mistake("at least as far: the pattern that was seen counts itself, so p is never 0")
def _beyond(differences):
    seen = abs(sum(differences))
    sums = [abs(sum(pattern)) for pattern in itertools.product(*((d, -d) for d in differences))]
    return sum(one > seen + 1e-9 for one in sums) / len(sums)


@sign_flip_p.mistake("this is the share of patterns that are less extreme: the other side of p")
def _complement(differences):
    return 1 - _beyond(differences)


@sign_flip_p.mistake("this counts signs only; a large difference weighs more than a small one")
def _signs(differences):
    flat = [(d > 0) - (d < 0) for d in differences]
    seen = abs(sum(flat))
    sums = [abs(sum(pattern)) for pattern in itertools.product(*((d, -d) for d in flat))]
    return sum(one >= seen for one in sums) / len(sums)


three_seeds = prediction(
    "three_seeds",
    LESSON,
    "Two methods, three seeds each, paired. The first is better with every seed. What is the smallest p-value that an "
    "exact two-sided test can give?",
    right="0.25",
    why="There are 2³ = 8 sign patterns; all plus and all minus are the two most extreme ones: 2/8. Three pairs never "
    "suffice.",
    wrong={
        "0": "the pattern that was seen is one of those that are counted",
        "0.05": "that is a threshold people like; how many sign patterns do three pairs have?",
        "0.125": "one pattern of eight; but the test is two-sided: its mirror image is as extreme",
    },
)

many_users = prediction(
    "many_users",
    LESSON,
    "A service keeps an adapter for each of its 100,000 users, and most are idle. All use one base. Which property of "
    "the method matters most?",
    right="bytes of an adapter",
    why="A few kilobytes or a few megabytes, 100,000 times: the files, and how many fit in memory at once.",
    wrong={
        "time of a training step": "an adapter is trained once in a while, and kept for long",
        "whether it can be merged": "merged, an adapter takes the whole model: one user per copy of the base",
        "memory of training": "one user at a time is trained; kept are all of them",
    },
)

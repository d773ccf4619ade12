"""How memory looks: a step over time, and bars side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..course import style
from .memory import GIB, MIB, Memory
from .tape import KINDS, Tape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = dict(zip(KINDS, (style.GREY, style.BLACK, style.RED, style.PINK, style.GREEN, style.BLUE, style.SKY,
                           style.ORANGE, style.YELLOW, "#DDDDDD"), strict=True))  # fmt: skip
POINTS = 1500  # of a curve: more than a figure has pixels


def levels(tape: Tape, first: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(event numbers, kind -> bytes allocated after each), from an event on, thinned out without losing the peak."""
    kinds = {kind: i for i, kind in enumerate(KINDS)}
    changes = np.zeros((len(KINDS), len(tape.events)))
    for event, number in enumerate(tape.events):
        block = tape.blocks[number if number >= 0 else ~number]
        changes[kinds[block.kind], event] = block.size if number >= 0 else -block.size
    sums = changes.cumsum(1)
    events = np.arange(first, len(tape.events))
    if len(events) > POINTS:  # of each stretch, its highest moment
        total = sums.sum(0)
        stretches = np.array_split(events, POINTS)
        events = np.array([stretch[total[stretch].argmax()] for stretch in stretches])
    return events, {kind: sums[i, events] for kind, i in kinds.items() if sums[i].any()}


def timeline(memory: Memory, ax: Axes | None = None) -> Axes:
    """What is allocated over the last step, by kind, with its phases. Needs the tape: ValueError without."""
    if memory.tape is None:
        raise ValueError("this memory was read from a file and has no tape; predict or measure it again to see it over "
                         "time")  # fmt: skip
    first = memory.last_step()
    events, parts = levels(memory.tape, first)
    top = max(np.sum(list(parts.values()), axis=0))
    unit, word = (GIB, "GiB") if top >= GIB else (MIB, "MiB")
    with style.context():
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots(figsize=(7.6, 3.6), layout="constrained")[1]
        ax.stackplot(events - first, [part / unit for part in parts.values()], labels=list(parts),
                     colors=[COLOURS[kind] for kind in parts], linewidth=0)  # fmt: skip
        for phase, span in memory.tape.phases():
            if span.start >= first and len(span) > 0.04 * (events[-1] - first):
                ax.axvline(span.start - first, color=style.BLACK, linewidth=0.7, linestyle=":")
                ax.annotate(phase, (span.start - first, 1), (4, -3), xycoords=("data", "axes fraction"),
                            textcoords="offset points", va="top", fontsize=9)  # fmt: skip
        high = max(range(len(events)), key=lambda i: sum(part[i] for part in parts.values()))
        ax.plot(events[high] - first, top / unit, ".", color=style.BLACK)
        ax.annotate(f"peak {top / unit:,.1f} {word}", (events[high] - first, top / unit), (6, -3),
                    textcoords="offset points", fontsize=9)  # fmt: skip
        ax.set(xlabel="allocations and frees since the step began", ylabel=f"allocated ({word})",
               xlim=(0, events[-1] - first), ylim=(0, 1.2 * top / unit))  # fmt: skip
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    return ax


def bars(memories: Mapping[str, Memory], ax: Axes | None = None, cards: Mapping[str, float] | None = None) -> Axes:
    """A bar for each, cut into its kinds at its peak; the line at its end is what is reserved.

    cards: name -> usable bytes, drawn as vertical lines.
    """
    kinds = [kind for kind in KINDS if any(kind in memory.by_kind for memory in memories.values())]
    top = max(max(memory.allocated, memory.reserved) for memory in memories.values())
    unit, word = (GIB, "GiB") if top >= GIB else (MIB, "MiB")
    with style.context():
        if ax is None:
            import matplotlib.pyplot as plt

            height = 1.3 + 0.36 * len(memories)
            ax = plt.subplots(figsize=(7.6, height), layout="constrained")[1]
        left = np.zeros(len(memories))
        for kind in kinds:
            width = np.array([memory.by_kind.get(kind, 0) / unit for memory in memories.values()])
            ax.barh(list(memories), width, left=left, color=COLOURS[kind], label=kind)
            left += width
        reserved = [memory.reserved / unit for memory in memories.values()]
        if any(reserved):
            ax.plot(reserved, range(len(memories)), "|", color=style.BLACK, markersize=15, label="reserved")
        for (name, usable), line in zip((cards or {}).items(), ("--", ":", "-.", "-") * 3, strict=False):
            ax.axvline(usable / unit, color=style.BLACK, linestyle=line, linewidth=1, label=name)
        ax.invert_yaxis()
        ax.grid(visible=False, axis="y")
        ax.set(xlabel=f"at the peak ({word})", xlim=(0, None))
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax

"""`Memory`: what a program needs of a device, predicted or measured, and how it looks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from .tape import KINDS, Tape

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

GIB, MIB = 2**30, 2**20


class Peak(NamedTuple):
    """The moment when most is allocated."""

    phase: str
    module: str  # path of the module at work; "": none was (the loss, the optimizer)
    op: str  # the operation whose result or workspace was the last straw
    event: int  # its place on the tape


@dataclass(frozen=True, repr=False)
class Memory:
    """Bytes on a device while a program runs. allocated: what tensors take at the peak; reserved: what torch holds for
    them then, which is what nvidia-smi shows besides the CUDA context, and what has to fit the card.

    by_kind: kind -> bytes at the peak of `allocated`; they add up to it. phases: phase -> its own peak of `allocated`.
    host: bytes of CPU memory, and seconds, that finding this out took. notes: what to know before believing it.
    """

    source: str  # "predicted" or "measured"
    asked: Mapping[str, Any]
    allocated: int
    reserved: int
    by_kind: Mapping[str, int]
    phases: Mapping[str, int]
    peak: Peak
    seconds: float = 0.0
    host: int = 0
    notes: tuple[str, ...] = ()
    tape: Tape | None = field(default=None, compare=False)
    levels: Sequence[int] | None = field(default=None, compare=False)  # the allocator's count, where it is another
    again: Callable[..., Memory] | None = field(default=None, compare=False)  # the same prediction with other arguments

    @property
    def timeline(self) -> list[tuple[str, int]]:
        """(phase, bytes allocated) after each event of the last step: what a plot over time shows."""
        if self.tape is None:
            return []
        levels, last = self.levels or self.tape.allocated(), self.last_step()
        return [(phase, levels[i]) for phase, events in self.tape.phases() for i in events if i >= last]

    def last_step(self) -> int:
        """The event with which the last step began: the first of its first phase."""
        marks = self.tape.marks if self.tape is not None else []
        first = next((m.phase for m in marks if m.phase != "setup"), "")
        starts = [m.event for before, m in zip([None, *marks], marks, strict=False)
                  if m.phase == first and (before is None or before.phase in ("setup", "step"))]  # fmt: skip
        return starts[-1] if starts else 0

    def __repr__(self) -> str:
        wide = max(map(len, [*self.by_kind, "allocated"]))
        lines = [f"{self.source}: {self.title()}"]
        lines += [f"  {kind:<{wide}}  {size(n):>10}  {100 * n / self.allocated:5.1f} %"
                  for kind, n in self.by_kind.items()]  # fmt: skip
        lines.append(f"  {'allocated':<{wide}}  {size(self.allocated):>10}  at the peak, {self.where()}")
        if self.reserved:
            lines.append(f"  {'reserved':<{wide}}  {size(self.reserved):>10}  with the allocator's rounding and gaps")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def where(self) -> str:
        """The peak in words."""
        module = f" of {self.peak.module}" if self.peak.module else ""
        return f"{self.peak.phase}{module} ({self.peak.op.removeprefix('aten.').partition('.')[0] or 'before it'})"

    def title(self) -> str:
        """What was asked for, in a line."""
        return describe(self.asked)

    def to_dict(self) -> dict[str, Any]:
        """What can be written as JSON: all but the tape. Bytes."""
        return {
            "source": self.source, "asked": {k: v for k, v in self.asked.items() if _plain(v)},
            "allocated": self.allocated, "reserved": self.reserved, "by_kind": dict(self.by_kind),
            "phases": dict(self.phases),
            "peak": self.peak._asdict(), "seconds": self.seconds, "host": self.host, "notes": list(self.notes),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Memory:
        """The inverse, without a tape."""
        return cls(**{**dict(entries), "peak": Peak(**entries["peak"]), "notes": tuple(entries["notes"])})

    def verdict(self, card: Any = None, **room: Any) -> Any:
        """Whether it fits a card, and if not, what would: see `cards.verdict`."""
        from .cards import verdict

        return verdict(self, card, **room)

    def to_pandas(self) -> pandas.DataFrame:
        """One row a kind: MiB at the peak, and the share of it."""
        import pandas as pd

        rows = {kind: (n / MIB, 100 * n / self.allocated) for kind, n in self.by_kind.items()}
        return pd.DataFrame.from_dict(rows, orient="index", columns=["MiB", "%"])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Memory over the last step, by kind: the height at each moment is what is allocated then."""
        from .plots import timeline

        return timeline(self, ax)


def size(n: float) -> str:
    """Bytes in GiB or MiB, as cards are sold."""
    return f"{n / GIB:,.2f} GiB" if abs(n) >= GIB else f"{n / MIB:,.1f} MiB"


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool, list, tuple, dict))


def describe(asked: Mapping[str, Any]) -> str:
    """The question in a line: model, method, what is special about it."""
    a = {"model": "model", "batch": 1, "tokens": 0, **asked}
    hyper = ", ".join(f"{k}={v}" for k, v in (a.get("hyper") or {}).items() if _plain(v))
    method = str(a.get("method") or "as it is") + (f" ({hyper})" if hyper else "")
    method += f" on {a['targets']}" if a.get("targets") else ""
    said = [str(a["model"]), method, f"{a['batch']} × {a['tokens']} tokens"]
    if a.get("new_tokens"):
        said[-1] += f" + {a['new_tokens']} new"
    said += [f"base in {a['quantize'] or a.get('dtype')}"] if a.get("quantize") or a.get("dtype") else []
    said += ["checkpointing"] if a.get("checkpointing") else []
    said += [f"autocast {a['autocast']}"] if a.get("autocast") else []
    said += [str(a["optimizer"])] if a.get("train", True) and a.get("optimizer") else []
    return ", ".join(said)


def from_tape(
    source: str, tape: Tape, reserved: int, asked: Mapping[str, Any], levels: Sequence[int] | None = None, **more: Any
) -> Memory:
    """The `Memory` that a tape tells of; its blocks must have kinds.

    levels: bytes that the allocator counts as allocated after each event, where that is more than the blocks' sizes:
    what is left of a piece of memory and too small to be cut off counts with its block, as "remainders".
    """
    counted, levels = levels, tape.allocated() if levels is None else levels
    event = max(range(len(levels)), key=levels.__getitem__, default=0)
    phases: dict[str, int] = {}
    for phase, events in tape.phases():
        before = levels[events.start - 1] if events.start else 0
        phases[phase] = max(phases.get(phase, 0), before, max((levels[i] for i in events), default=0))
    block = tape.blocks[n if (n := tape.events[event]) >= 0 else ~n] if levels else None
    phase = next((name for name, events in tape.phases() if event in events), "")
    peak = Peak(phase, block.module if block else "", block.op if block else "", event)
    allocated, kinds = levels[event] if levels else 0, tape.by_kind(event)
    if remainders := allocated - sum(kinds.values()):
        kinds["remainders"] = remainders
    return Memory(source, asked, allocated, reserved, kinds, phases, peak, tape=tape, levels=counted, **more)


__all__ = ["GIB", "KINDS", "MIB", "Memory", "Peak", "describe", "from_tape", "size"]

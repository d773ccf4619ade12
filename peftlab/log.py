"""What a training run leaves behind: a log that prints, plots and saves itself."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .paths import atomic_write

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes


@dataclass(repr=False)
class Log:
    """One entry per optimizer step.

    Losses are means in nats per trained label (per row for a classifier) before the step's update; gradient norms are
    those before clipping; tokens are inputs without padding; seconds are wall-clock. `valid_losses` maps a number of
    steps done to the validation loss after them.
    """

    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    valid_losses: dict[int, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.losses)

    def __bool__(self) -> bool:
        return True  # an empty log is still a log

    def __repr__(self) -> str:  # without times: the same on every machine
        if not self.losses:
            return "0 steps"
        at = self.best_step
        best = f", best validation loss {self.valid_losses[at]:.3g} at step {at}" if at is not None else ""
        return f"{len(self)} steps, loss {self.losses[0]:.3g} → {self.final:.3g}{best}"

    @property
    def final(self) -> float:
        """Training loss of the last step."""
        return self.losses[-1] if self.losses else float("nan")

    @property
    def best_step(self) -> int | None:
        """Steps done when the validation loss was lowest (the first time); None without validation."""
        return min(self.valid_losses, key=self.valid_losses.__getitem__, default=None)

    def smoothed(self, window: float = 20) -> list[float]:
        """Exponential mean of the losses over about `window` steps, without a bias towards its start (as in Adam)."""
        out, total, weight, keep = [], 0.0, 0.0, 1 - 1 / window
        for loss in self.losses:
            total, weight = keep * total + (1 - keep) * loss, keep * weight + (1 - keep)
            out.append(total / weight)
        return out

    def to_pandas(self) -> pandas.DataFrame:
        """One row per step, numbered from 1; validation losses where they were measured."""
        import pandas as pd

        frame = pd.DataFrame(
            {"loss": self.losses, "learning_rate": self.learning_rates, "grad_norm": self.grad_norms,
             "tokens": self.tokens, "seconds": self.seconds},
            index=pd.RangeIndex(1, len(self) + 1, name="step"),
        )  # fmt: skip
        frame["valid_loss"] = pd.Series(self.valid_losses, dtype=float)
        return frame

    def plot(self, ax: Axes | None = None, label: str = "training", window: float = 20) -> Axes:
        """Loss against steps: every step pale, the smoothed curve strong, validation as dots."""
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots(figsize=(6, 3.5), layout="constrained")[1]
        steps = range(1, len(self) + 1)
        (line,) = ax.plot(steps, self.smoothed(window), label=label)
        ax.plot(steps, self.losses, color=line.get_color(), alpha=0.25, linewidth=0.8)
        if self.valid_losses:
            ax.plot(list(self.valid_losses), list(self.valid_losses.values()), "o--", markersize=4, label="validation")
        ax.set(xlabel="step", ylabel="loss (nats)")
        ax.legend()
        return ax

    def save(self, path: str | os.PathLike) -> Path:
        """Write the log as JSON; an older file is replaced only by a complete new one."""
        return atomic_write(path, json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Log:
        """Read what `save` wrote. ValueError if the file holds no log."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a training log ({error}); it should be a file written by Log.save"
            ) from error

    @classmethod
    def from_dict(cls, entries: dict) -> Log:
        """The inverse of dataclasses.asdict, after JSON (whose keys are text)."""
        valid = {int(step): loss for step, loss in entries["valid_losses"].items()}
        return cls(**{**entries, "valid_losses": valid})

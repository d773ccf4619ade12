"""One look for every figure of the course: sizes, colours, resolution.

Figures are stored with the notebooks and compared by the tests, so size and resolution are fixed and the font is
the one that matplotlib brings along. The colours are those of Okabe and Ito, which readers with any common form of
colour blindness can tell apart.
Source: Okabe and Ito 2008, "Color universal design".
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PINK, SKY, YELLOW, BLACK, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#000000", "#999999"
COLORS = (BLUE, ORANGE, GREEN, RED, PINK, SKY, BLACK)  # yellow is too pale for a line on white
WIDTH, HEIGHT, DPI = 6.4, 3.6, 100  # inches, inches, dots per inch


def rc() -> dict[Any, Any]:
    """The style as matplotlib settings."""
    from cycler import cycler

    return {
        "figure.figsize": (WIDTH, HEIGHT),
        "figure.dpi": DPI,
        "savefig.dpi": DPI,
        "figure.facecolor": "white",  # also on a dark page: the colours are chosen for white
        "savefig.facecolor": "white",
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.labelsize": 10,
        "legend.fontsize": 9,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "legend.frameon": False,
        "axes.prop_cycle": cycler(color=COLORS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#E5E5E5",
        "grid.linewidth": 0.8,
        "lines.linewidth": 1.8,
    }


@contextmanager
def context() -> Iterator[None]:
    """The style inside a with-block; the settings from before come back after it.

    All but one: the first figure of a notebook starts a backend that shows figures by itself ("interactive"), and must
    go on doing so.
    """
    import matplotlib

    with matplotlib.rc_context(rc()):
        yield
        shows = matplotlib.is_interactive()
    matplotlib.interactive(shows)


def use() -> None:
    """The style from here on, for a notebook's own figures."""
    import matplotlib

    matplotlib.rcParams.update(rc())


def figure(
    width: float = WIDTH, height: float = HEIGHT, margins: tuple[float, float, float, float] | None = None
) -> tuple[Figure, Axes]:
    """A new figure with one axes, in inches. It belongs to no window and no notebook: nobody has to close it.

    margins are the left, bottom, right and top edges of the axes as fractions of the figure; without them they are
    searched for, which takes half the time of a drawing.
    """
    from matplotlib.figure import Figure

    with context():
        fig = Figure(figsize=(width, height), layout=None if margins else "constrained")
        axes = fig.subplots()
        if margins:
            left, bottom, right, top = margins
            fig.subplots_adjust(left=left, bottom=bottom, right=right, top=top)
        return fig, axes


def png(fig: Figure) -> bytes:
    """The figure as a PNG file: the same figure gives the same bytes, of the same size in pixels."""
    from matplotlib import pyplot
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    with context():  # not "tight": that would let the size depend on the text
        FigureCanvasAgg(fig).print_figure(buffer, format="png", dpi=DPI, metadata={"Software": None})
    pyplot.close(fig)  # a figure made by pyplot would else be shown a second time by the notebook
    return buffer.getvalue()

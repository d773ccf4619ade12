"""Widgets that teach by turning a knob: `Explorer` redraws a figure, `LiveTraining` trains and draws the loss.

Both work in JupyterLab and VS Code by mouse and keyboard, and from code: `w.set(rank=16)`. Their first state is
computed when they are made, so that a notebook stored without its kernel still shows the figure, and so that tests
can compare it. (Hence no `interact` and no `Output`: both write to the page behind the cell's back.)

Work is done in the event loop that was running when the widget was made, the notebook's. A front end may report a
slider's move on another thread; drawing there would race with the figures of a running cell.
"""

from __future__ import annotations

import asyncio
import base64
import html
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ipywidgets

from . import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Value = int | float | str | bool

SETTLE = 0.03  # seconds: moves that arrive within it are drawn once; far below the 0.2 s that feel immediate
RESTART = 0.3  # seconds without a further move before a training run starts anew
TELL = 0.1  # seconds between two updates of the numbers of a running training
REDRAW = 0.2  # seconds between two drawings of its curve, at least
SLOW = 0.2  # seconds: whoever took longer last time announces itself before it starts


# ---------------------------------------------------------------------------------------------------- knobs


@dataclass(frozen=True)
class Knob:
    """One thing to turn: a range (slider), a list of numbers (slider), a list of words (menu), or yes/no (box)."""

    value: Value
    low: float | None = None
    high: float | None = None
    step: float | None = None
    choices: tuple[Value, ...] = ()
    label: str | None = None

    def check(self, name: str, value: Value) -> None:
        """Raise ValueError, naming the knob and what it takes, if it cannot be turned to this value."""
        if self.choices and value not in self.choices:
            raise ValueError(f"{name}={value!r} is not one of its choices: {', '.join(map(repr, self.choices))}")
        if self.low is not None and self.high is not None:
            if isinstance(value, (str, bool)) or not self.low <= value <= self.high:
                raise ValueError(f"{name}={value!r} is outside of {self.low} … {self.high}")

    def widget(self, name: str) -> ipywidgets.Widget:
        """The ipywidgets control for it."""
        look = {
            "description": self.label or name,
            "style": {"description_width": "initial"},
            "layout": ipywidgets.Layout(width="27em", max_width="100%", margin="2px 16px 2px 2px"),
        }
        if self.choices:
            options = [(say(choice), choice) for choice in self.choices]
            words = any(isinstance(choice, str) for choice in self.choices)
            kind = ipywidgets.Dropdown if words else ipywidgets.SelectionSlider
            return kind(options=options, value=self.value, **look)
        if isinstance(self.value, bool):
            return ipywidgets.Checkbox(value=self.value, indent=False, **look)
        if isinstance(self.value, float):
            step = self.step or ((self.high or 0.0) - (self.low or 0.0)) / 100
            return ipywidgets.FloatSlider(value=self.value, min=self.low, max=self.high, step=step, **look)
        return ipywidgets.IntSlider(value=self.value, min=self.low, max=self.high, step=self.step or 1, **look)


def knob(
    value: Value,
    low: float | None = None,
    high: float | None = None,
    *,
    step: float | None = None,
    choices: Iterable[Value] = (),
    label: str | None = None,
) -> Knob:
    """A knob for `Explorer` and `LiveTraining`.

    knob(8, 1, 64, label="rank r")      a slider over whole numbers
    knob(0.5, 0.0, 1.0, step=0.05)      a slider over fractions
    knob(8, choices=[1, 2, 4, 8, 16])   a slider over just these numbers
    knob("Adam", choices=["SGD", "Adam"])   a menu
    knob(True)                          a box to tick
    """
    new = Knob(value, low, high, step, tuple(choices), label)
    if not new.choices and not isinstance(value, bool):
        if isinstance(value, str):
            raise ValueError(f"knob({value!r}) needs choices=[…]: a word has no range")
        if low is None or high is None:
            raise ValueError(f"knob({value!r}) needs a range, knob({value!r}, low, high), or choices=[…]")
        if low >= high:
            raise ValueError(f"knob({value!r}, {low}, {high}) has an empty range: low must be below high")
    new.check("knob value", value)
    return new


class Panel:
    """The controls of a widget, by name: their values, turning them from code, and who hears of it."""

    def __init__(self, knobs: Mapping[str, Knob], moved: Callable[[], None]):
        for name, one in knobs.items():
            if not isinstance(one, Knob):
                raise TypeError(f"{name}={one!r} is not a knob; write {name}=knob(value, low, high) or choices=[…]")
        self.knobs = dict(knobs)
        self.controls = {name: one.widget(name) for name, one in knobs.items()}
        self.muted = False
        for control in self.controls.values():
            control.observe(lambda change: None if self.muted else moved(), "value")

    @property
    def values(self) -> dict[str, Value]:
        return {name: control.value for name, control in self.controls.items()}

    def turn(self, new: Mapping[str, Value]) -> None:
        """Set several at once, all or none, without telling anybody."""
        for name, value in new.items():
            if name not in self.knobs:
                raise ValueError(f"no knob {name!r}; there are {', '.join(self.knobs) or 'none'}")
            self.knobs[name].check(name, value)
        self.muted = True
        try:
            for name, value in new.items():
                self.controls[name].value = value
        finally:
            self.muted = False

    def __str__(self) -> str:
        return told(self.values)


def say(value: object, digits: int | None = None) -> str:
    """A value in a few characters, the same on every machine."""
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if digits is None else f"{value:.{digits}f}"


def told(values: Mapping[str, object], digits: int | None = None) -> str:
    return ", ".join(f"{name}={say(value, digits)}" for name, value in values.items())


# ------------------------------------------------------------------------------------ what both widgets share


class EventLoop:
    """The loop that was running when the widget was made, if any: where its work is done."""

    def __init__(self) -> None:
        try:
            self.loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:  # a plain Python program: everything is done at once
            self.loop = None

    def __bool__(self) -> bool:
        return self.loop is not None and self.loop.is_running()

    def later(self, delay: float, call: Callable[[], None]) -> None:
        """From any thread: call in `delay` seconds in the loop; at once if there is none."""
        if self.loop is None or not self.loop.is_running():
            call()
        else:
            self.loop.call_soon_threadsafe(self.loop.call_later, delay, call)


def note(text: str, *, error: bool = False) -> str:
    """A line of text as HTML, for below a figure."""
    colour = f"color: {style.RED}; " if error else ""
    return f'<div style="{colour}line-height: 1.4; max-width: 60em">{html.escape(text)}</div>'


def bundle(widget: ipywidgets.Widget, picture: bytes = b"") -> dict[str, object]:
    """What a notebook stores for a widget: the live view and, for readers without a kernel, text and figure."""
    data: dict[str, object] = {
        "text/plain": repr(widget),  # whole: ipywidgets would cut it after 110 characters
        "application/vnd.jupyter.widget-view+json": {
            "version_major": 2,
            "version_minor": 0,
            "model_id": widget.model_id,
        },
    }
    if picture:
        data["image/png"] = base64.b64encode(picture).decode()
    return data


def picture_box() -> ipywidgets.Image:
    """An image at its own size: stretched over the page it would be blurred."""
    return ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%", align_self="flex-start"))


def rows(controls: Iterable[ipywidgets.Widget]) -> ipywidgets.HBox:
    return ipywidgets.HBox(list(controls), layout=ipywidgets.Layout(flex_flow="row wrap", align_items="center"))


# ------------------------------------------------------------------------------------------------- Explorer


class Explorer(ipywidgets.VBox):
    """Knobs and a figure that follows them.

    draw(**values) returns a matplotlib figure, or (figure, {"what": number, …}) with what it says in numbers; the
    numbers stand below the figure and in the text that the notebook stores. It is called once when the widget is
    made and then for each move; of moves that come faster than it draws, the last one is drawn.

    Errors in `draw` are raised by the constructor and by `set`; after a slider's move they are shown below the
    figure, which stays as it was.
    """

    def __init__(self, draw: Callable[..., Any], **knobs: Knob):
        self._draw = draw
        self._events = EventLoop()
        self._waiting = False
        self._cost = 0.0  # seconds that the last drawing took
        self.title = ""
        self.summary: Mapping[str, Any] = {}
        self.drawn = 0  # how often the figure was drawn: rapid moves count once
        self.panel = Panel(knobs, self._moved)
        self.image = picture_box()
        self.caption = ipywidgets.HTML()
        super().__init__([rows(self.panel.controls.values()), self.image, self.caption])
        self.add_class("peftlab-explorer")
        self.redraw()

    @property
    def values(self) -> dict[str, Value]:
        """The knobs' values by name."""
        return self.panel.values

    def set(self, **values: Value) -> None:
        """Turn knobs from code and draw. Raises ValueError for an unknown knob or a value that it cannot take."""
        self.panel.turn(values)
        self.redraw()

    def redraw(self) -> None:
        """Draw the figure for the knobs as they stand now."""
        self._waiting = False
        start = time.perf_counter()
        if self._cost > SLOW:
            self.caption.value = note("drawing …")
        with style.context():
            answer = self._draw(**self.values)
            figure, summary = answer if isinstance(answer, tuple) else (answer, {})
            if not hasattr(figure, "savefig"):
                raise TypeError(f"draw must return a matplotlib figure, not {type(figure).__name__}")
            picture = style.png(figure)
        self.title, self.summary = _title(figure), summary
        self.image.value = picture
        self.caption.value = note(told(summary))
        self.drawn += 1
        self._cost = time.perf_counter() - start

    def _moved(self) -> None:
        if not self._waiting:
            self._waiting = True
            self._events.later(SETTLE, self._catch_up)

    def _catch_up(self) -> None:
        if not self._waiting:  # somebody drew in the meantime
            return
        try:
            self.redraw()
        except Exception as error:  # nobody above could show it to the reader
            self.caption.value = note(f"{type(error).__name__}: {error}", error=True)

    def __repr__(self) -> str:
        if self._waiting:
            self._catch_up()
        said = "; ".join(part for part in (self.title, told(self.summary)) if part)
        return f"Explorer({self.panel}): {said}" if said else f"Explorer({self.panel})"

    def _repr_mimebundle_(self, **kwargs: object) -> dict[str, object]:
        return bundle(self, self.image.value)


def _title(figure: Figure) -> str:
    titles = [figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]
    return next((title.replace("\n", " ") for title in titles if title), "")


# --------------------------------------------------------------------------------------------- LiveTraining


@dataclass
class Run:
    """One training run: the knobs it had, its losses, what it said at the end, and how it ended."""

    values: dict[str, Value]
    losses: list[float] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    ended: str = "running"  # or "done", "stopped", "diverged", "failed"

    def loss(self, last: int = 10) -> float:
        """The mean of the last losses: a single step's loss says as much of its batch as of the model."""
        tail = self.losses[-last:]
        return sum(tail) / len(tail) if tail else math.nan

    def smooth(self, last: int = 10) -> list[float]:
        """The running mean that the figure shows, over up to `last` steps."""
        return [sum(part) / len(part) for part in (self.losses[max(0, i - last) : i] for i in self.steps())]

    def steps(self) -> range:
        return range(1, len(self.losses) + 1)


class LiveTraining(ipywidgets.VBox):
    """Knobs, a button, and a training run that draws its loss while it runs; former runs stay for comparison.

    train(**values) is a generator: it yields the loss after each step and, if it likes, a dict of numbers at the
    end, which are shown with the result. `steps`, a number or a knob, is the length of a run: `train` gets it as
    `steps` like the knobs, and the progress bar counts up to it (without it, `train` alone knows). With `auto` a
    run starts when a knob was moved, else by the button; a knob moved during a run starts it anew. A run is stopped
    by its button, by a new run, or by a loss that is not a number; then the generator is closed, so its `finally`
    and `with` blocks are left as usual.

    The first run is done when the widget is made, and `set` and `run` return when the run is over. Runs started
    on the page share the event loop with the rest of the notebook, one step at a time: `train` should work on its
    own copy of the model, neither print nor hold a global state such as torch.no_grad() across a yield.
    """

    def __init__(
        self,
        train: Callable[..., Iterator[Any]],
        *,
        steps: int | Knob | None = None,
        auto: bool = True,
        digits: int = 2,
        keep: int = 4,
        title: str = "",
        xlabel: str = "step",
        ylabel: str = "loss",
        **knobs: Knob,
    ):
        self._train, self._steps, self._auto = train, steps, auto
        self._digits, self._keep, self._words = digits, keep, (title, xlabel, ylabel)
        self._events = EventLoop()
        self._moves = 0
        self._stopping = False
        self._generator: Iterator[Any] | None = None
        self._told = 0.0  # when the progress was last told
        self._drawn, self._cost = 0.0, 0.0  # when the curve was last drawn, and how long that took
        self.runs: list[Run] = []  # oldest first; the last one is the current one
        if isinstance(steps, Knob):
            knobs["steps"] = steps
        self.panel = Panel(knobs, self._moved)
        self.start = ipywidgets.Button(description="train", icon="play", tooltip="train with the knobs as they are")
        self.halt = ipywidgets.Button(description="stop", icon="stop", disabled=True, tooltip="stop this run")
        self.progress = ipywidgets.IntProgress(layout=ipywidgets.Layout(width="16em"))
        self.image = picture_box()
        self.caption = ipywidgets.HTML()
        self.start.on_click(lambda button: self._events.later(0, self._launch))
        self.halt.on_click(lambda button: self.stop())
        buttons = rows([self.start, self.halt, self.progress])
        super().__init__([rows(self.panel.controls.values()), buttons, self.image, self.caption])
        self.add_class("peftlab-training")
        self.run()

    @property
    def values(self) -> dict[str, Value]:
        """The knobs' values by name."""
        return self.panel.values

    @property
    def losses(self) -> list[float]:
        """The losses of the current run, one per step."""
        return self.runs[-1].losses

    @property
    def summary(self) -> dict[str, Any]:
        """What the current run said at its end."""
        return self.runs[-1].summary

    def set(self, **values: Value) -> None:
        """Turn knobs from code and train. Raises ValueError for an unknown knob or a value that it cannot take."""
        self.panel.turn(values)
        self.run()

    def run(self) -> None:
        """Train with the knobs as they are, to the end, and draw."""
        run = self._begin()
        while self._advance(run):
            pass

    def stop(self) -> None:
        """Stop the run after its current step; its curve stays."""
        self._stopping = True

    # A run is begun, advanced step by step, and ended. Who calls these decides what happens between the steps:
    # nothing (`run`), or everything else that the notebook's event loop has to do (`_launch`).

    def _begin(self) -> Run:
        self._moves += 1  # a restart that still waits for further moves is out of date
        if self.runs and self.runs[-1].ended == "running":
            self._end(self.runs[-1], "stopped")
        run = Run(self.values)
        steps = run.values.get("steps", self._steps)
        self._generator = self._train(**run.values | ({} if steps is None else {"steps": steps}))
        if not hasattr(self._generator, "__next__"):
            kind = type(self._generator).__name__
            raise TypeError(f"train must be a generator that yields the loss after each step; it returned a {kind}")
        self.runs = [*(r for r in self.runs if len(r.losses) > 1), run][-self._keep - 1 :]
        self._stopping = False
        self.progress.bar_style = "info"
        self.progress.value, self.progress.max = 0, steps or 1
        self.start.disabled, self.halt.disabled = True, False
        return run

    def _advance(self, run: Run) -> bool:
        """One step of the run. False if there is nothing more to do for it."""
        if run.ended != "running" or self._generator is None:
            return False
        if self._stopping:
            self._end(run, "stopped")
            return False
        try:
            item = next(self._generator)
        except StopIteration:
            self._end(run, "done")
            return False
        except BaseException:
            self._end(run, "failed")
            raise
        if isinstance(item, Mapping):
            run.summary.update(item)
            return True
        run.losses.append(float(item))
        if not math.isfinite(run.losses[-1]):
            self._end(run, "diverged")
            return False
        self._show(run)
        return True

    def _end(self, run: Run, how: str) -> None:
        run.ended = how
        close = getattr(self._generator, "close", None)
        self._generator = None
        self.start.disabled, self.halt.disabled = False, True
        self.progress.value = self.progress.max if how == "done" else self.progress.value
        self.progress.bar_style = {"done": "success", "stopped": "warning"}.get(how, "danger")
        if close is not None:
            close()
        self._redraw()
        self.caption.value = note(self._verdict(run), error=how in ("diverged", "failed"))

    def _show(self, run: Run) -> None:
        """Progress while it runs: the numbers ten times a second; the curve less often, as it costs more to draw."""
        now = time.perf_counter()
        if now - self._told < TELL:
            return
        self._told = now
        self.progress.max = max(self.progress.max, len(run.losses)) if self._steps else len(run.losses) + 1
        self.progress.value = len(run.losses)
        of = f" of {self.progress.max}" if self._steps else ""
        self.caption.value = note(f"{told(run.values)}: step {len(run.losses)}{of}, loss {run.loss():.3f}")
        if self._events and now - self._drawn > max(REDRAW, 3 * self._cost):  # without a loop, nobody is looking yet
            self._redraw()
            self._drawn = time.perf_counter()
            self._cost = self._drawn - now

    def _launch(self) -> None:
        """Train in the background of the notebook (in the foreground where there is no event loop)."""
        try:
            if not self._events:
                self.run()
                return
            run = self._begin()
        except Exception as error:
            self.caption.value = note(f"{type(error).__name__}: {error}", error=True)
            return
        self._task = asyncio.ensure_future(self._work(run))  # kept: the loop itself holds tasks only weakly

    async def _work(self, run: Run) -> None:
        try:
            while self._advance(run):
                await asyncio.sleep(0)  # clicks, moves and other cells have their turn
        except Exception as error:  # nobody awaits this task: the reader must hear of it here
            self.caption.value = note(f"{type(error).__name__}: {error}", error=True)

    def _moved(self) -> None:
        running = self.runs[-1].ended == "running"
        if not self._auto and not running:
            self.caption.value = note(f"{self.panel}: press train")
            return
        if running:
            self.stop()
        self._moves += 1
        move = self._moves
        self._events.later(RESTART, lambda: self._launch() if move == self._moves else None)

    def _redraw(self) -> None:
        with style.context():
            figure, axes = style.figure(margins=(0.1, 0.14, 0.97, 0.91))
            self._plot(axes)
            self.image.value = style.png(figure)

    def _plot(self, axes: Axes) -> None:
        title, xlabel, ylabel = self._words
        *former, current = self.runs
        for run, colour in zip(reversed(former), style.COLORS[1:], strict=False):
            axes.plot(run.steps(), run.smooth(), color=colour, alpha=0.55, linewidth=1.2, label=self._label(run))
        axes.plot(current.steps(), current.losses, color=style.BLUE, alpha=0.25, linewidth=1)
        axes.plot(current.steps(), current.smooth(), color=style.BLUE, label=self._label(current))
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
        axes.legend(loc="upper right")

    def _label(self, run: Run) -> str:
        end = "" if run.ended in ("done", "running") else f" ({run.ended})"
        return told(run.values) + end

    def _verdict(self, run: Run) -> str:
        if not run.losses:
            return f"{run.ended} before its first step"
        if run.ended == "diverged":
            return f"loss {run.losses[-1]} at step {len(run.losses)} (diverged: try a lower learning rate)"
        said = f"loss {run.losses[0]:.{self._digits}f} → {run.loss():.{self._digits}f} in {len(run.losses)} steps"
        if run.ended in ("stopped", "failed"):
            said += f" ({run.ended})"
        return "; ".join(part for part in (said, told(run.summary, self._digits)) if part)

    def __repr__(self) -> str:
        return f"LiveTraining({told(self.runs[-1].values)}): {self._verdict(self.runs[-1])}"

    def _repr_mimebundle_(self, **kwargs: object) -> dict[str, object]:
        return bundle(self, self.image.value)

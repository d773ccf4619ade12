"""`measure`: the memory of a step that really runs, as the same kind of `Memory` that `predict` gives.

Every block that the device's allocator gives out and takes back is put on a tape, by its address (history.py). What it
is for is known from the addresses of the model's and the optimizer's tensors. So peak, kinds and timeline of a
measurement come from the code that reads a prediction.

    CUDA    torch's memory history and snapshot, beside the allocator's own counters
    CPU     torch.profiler, which notes each block with the operation that asked for it
    MPS     two counters that are read when a phase begins: torch has no more there
"""

from __future__ import annotations

import gc
import inspect
import os
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from ..attach import adapters
from .cards import CUBLAS_HOPPER
from .history import (
    GONE,
    MODULE,
    MOMENT,
    Entry,
    Moment,
    history_of_profile,
    history_of_snapshot,
    labelled,
    same_device,
    survivors,
    tape_of,
    with_moments,
)
from .memory import KINDS, Memory, Peak, from_tape, size
from .prediction import _cached, _name, _parameters, _resident, _vocabulary
from .step import Generation, TrainingStep
from .tape import CUBLAS


def measure(step: Callable[..., Any], *, model: nn.Module | None = None,
            optimizer: torch.optim.Optimizer | None = None, warmup: int = 1,
            device: str | torch.device | None = None, asked: Mapping[str, Any] | None = None) -> Memory:  # fmt: skip
    """The memory that one call of `step` takes, as a `Memory` that stands beside a prediction:

        optimizer = OPTIMIZERS["adamw"]([p for p in model.parameters() if p.requires_grad])
        measured = measure(TrainingStep(model, batch_of(model, 2, 128, device="cpu"), optimizer))
        predicted = predict(model, batch=2, tokens=128, device="cpu")

    step: a `TrainingStep` or `Generation` of `peftlab.vram.step`, from which model, optimizer and phases are known; or
    anything that does a whole step when it is called. If that takes an argument, it gets a function to be told of each
    phase; else phases are found as by `measuring`.
    model, optimizer: whose tensors are told apart from the rest. warmup: calls before the one that counts; with one,
    Adam's states are there. device: by default where the model is, else a GPU. asked: more to remember, by name.

    On a GPU, all that torch has there counts, whoever holds it. On a CPU: what model, optimizer and batch hold, and
    what the calls allocate; nothing is reserved. The step trains as it would without being watched.
    Raises TypeError for a step that cannot be called so; ValueError for a device that is not there, a model without
    numbers or with nothing to train; RuntimeError where a profiler or a memory history is on already. What the step
    raises passes through, and recording ends.
    """
    call = _callable(step)
    if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
        raise ValueError(f"warmup={warmup!r}: must be a whole number, at least 0")
    ours = step if isinstance(step, (TrainingStep, Generation)) else None
    if ours is not None:
        model = ours.model if model is None else model
    if isinstance(ours, TrainingStep):
        if not ours.trained:
            raise ValueError(f"nothing in {_name(ours.model)} trains; attach a method, or full_finetuning(model)")
        optimizer = ours.optimizer if optimizer is None else optimizer
    m = Measurement(model, optimizer, _device(model, optimizer, device), asked, ours)
    with m.running():
        for _ in range(warmup):
            call(lambda phase: None)
        m.begin()
        call(m.mark)
    return m.memory


@contextmanager
def measuring(model: nn.Module | None = None, *, optimizer: torch.optim.Optimizer | None = None,
              device: str | torch.device | None = None,
              asked: Mapping[str, Any] | None = None) -> Iterator[Measurement]:  # fmt: skip
    """Measure what happens inside of a `with` block:

        with pl.vram.measuring(model) as m:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(m.memory)

    Phases are found: "forward" where the model is called, "backward" with the first gradient of what it gave, "step"
    with the optimizer's; `m.mark(phase)` replaces them by your own. Nothing is warmed up: do a step before, if the
    first one is not what you want to know. Arguments and errors: as for `measure`.
    """
    m = Measurement(model, optimizer, _device(model, optimizer, device), asked)
    with m.running():
        m.begin()
        yield m


class Measurement:
    """A measurement: `mark(phase)` while it is going on, `memory` once it is over."""

    def __init__(self, model: nn.Module | None, optimizer: torch.optim.Optimizer | None, device: torch.device,
                 asked: Mapping[str, Any] | None = None,
                 step: TrainingStep | Generation | None = None):  # fmt: skip
        self.model, self.optimizer, self.device, self.step = model, optimizer, device, step
        self.asked, self.recorder = dict(asked or {}), _recorder(device)
        self.logits: set[int] = set()  # bytes that logits can have
        self.told = False  # whether the step tells its phases, so that none are looked for
        self.marked = False
        self.started = 0.0
        self._memory: Memory | None = None

    @property
    def memory(self) -> Memory:
        if self._memory is None:
            raise RuntimeError("this measurement has no result yet; read it after the end of the `with` block")
        return self._memory

    def mark(self, phase: str) -> None:
        """From here on the step is in this phase: "forward", "backward", "step", or what you call it."""
        self.told = True
        self._moment(phase)

    @contextmanager
    def running(self) -> Iterator[None]:
        """What happens inside is recorded; recording ends with it, whatever happens."""
        resident, history, over = _resident(), list[Entry](), False
        gc.collect()
        with ExitStack() as undo:
            undo.callback(lambda: history.extend(self.recorder.close()))
            self.recorder.open(t for t in self._known() if self._is_here(t))
            self._listen(undo)
            yield
            self._end()
            over = True
        if over:
            asked = {**_described(self.model, self.optimizer, self.step, self.device), **self.asked}
            found = self.recorder.result(history, asked, _vocabulary(self.model) if self.model else None, self.logits)
            self._memory = replace(found, seconds=self.seconds, host=max(0, _resident() - resident))

    def begin(self) -> None:
        """What came before was warming up; the step begins here."""
        gc.collect()
        self.recorder.begin(Moment("", self._staying() | self._passing()))
        self.started = time.perf_counter()

    def _end(self) -> None:
        if not self.marked:  # nothing told of a phase: the step is one
            first = self.recorder.first
            self.recorder.moments[first] = self.recorder.moments[first]._replace(phase="step")
        self.recorder.moment(Moment("", self._passing()))
        self.recorder.end()
        self.seconds = time.perf_counter() - self.started

    # --- what is known by its address

    def _is_here(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.layout == torch.strided and same_device(tensor.device, self.device)

    def _named(self, kind: str, tensors: Iterable[Any]) -> dict[int, tuple[str, int]]:
        storages = [t.untyped_storage() for t in tensors if self._is_here(t)]
        return {s.data_ptr(): (kind, s.nbytes()) for s in storages if s.nbytes()}

    def _staying(self) -> dict[int, tuple[str, int]]:
        """The batch, weights and adapters."""
        base, added = _parameters(self.model) if self.model is not None else ([], [])
        batch = self.step.batch.values() if self.step is not None else []
        return self._named("activations", batch) | self._named("weights", base) | self._named("adapter", added)

    def _passing(self) -> dict[int, tuple[str, int]]:
        """Gradients, the optimizer's states and a cache, as far as they are there now."""
        found = self._named("gradients", (p.grad for p in self._trained()))
        found |= self._named("optimizer", self._states())
        return found | self._named("cache", _cached(getattr(self.step, "cache", None)))

    def _trained(self) -> list[Tensor]:
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        return list(self.model.parameters()) if self.model is not None else [p for g in groups for p in g["params"]]

    def _states(self) -> list[Any]:
        states = self.optimizer.state.values() if self.optimizer is not None else []
        return [t for state in states for t in state.values()]

    def _known(self) -> Iterator[Any]:
        if self.model is not None:
            yield from (t for tensors in _parameters(self.model) for t in tensors)
        yield from self.step.batch.values() if self.step is not None else ()
        yield from self._states()
        yield from (p.grad for p in self._trained())

    # --- while it is running

    def _moment(self, phase: str, batch: Iterable[Any] = ()) -> None:
        if self.started:
            self.marked = True
            self.recorder.moment(Moment(phase, self._named("activations", batch) | self._passing()))

    def _found(self, phase: str, batch: Iterable[Any] = ()) -> None:
        if not self.told:
            self._moment(phase, batch)

    def _listen(self, undo: ExitStack) -> None:
        """Have torch tell which module is at work, how large logits are, and when phases begin."""
        handles = [register_optimizer_step_pre_hook(self._stepping)]
        if self.model is not None:
            paths, ranges = {id(m): path for path, m in self.model.named_modules() if path}, list[record_function]()

            def enter(module: nn.Module, args: Any) -> None:
                if id(module) in paths:
                    ranges.append(record_function(MODULE + paths[id(module)]))
                    ranges[-1].__enter__()

            def leave(module: nn.Module, args: Any, out: Any) -> None:
                if id(module) in paths and ranges:
                    ranges.pop().__exit__(None, None, None)

            handles += [
                register_module_forward_pre_hook(enter),
                register_module_forward_hook(leave, always_call=True),
                self.model.register_forward_pre_hook(self._called, with_kwargs=True),
                self.model.register_forward_hook(self._answered),
            ]
            head = getattr(self.model, "get_output_embeddings", lambda: None)()
            if head is not None:
                handles.append(head.register_forward_hook(self._note_logits))
        for handle in handles:
            undo.callback(handle.remove)

    def _called(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self._found("forward", tree_leaves((args, kwargs)))

    def _answered(self, model: nn.Module, args: Any, out: Any) -> None:
        values = out.values() if isinstance(out, Mapping) else out if isinstance(out, (tuple, list)) else [out]
        first = next((t for t in values if isinstance(t, Tensor) and t.requires_grad), None)
        if first is not None and not self.told:
            first.register_hook(lambda gradient: self._found("backward"))

    def _stepping(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.optimizer = optimizer if self.optimizer is None else self.optimizer
        self._found("step")

    def _note_logits(self, head: nn.Module, args: Any, out: Any) -> None:
        """(B, T, V) or, where the loss leaves out the last token, (B, T - 1, V), in 16 or 32 bits."""
        if isinstance(out, Tensor) and out.dim() > 1:
            shorter = out.numel() - out.numel() // max(1, out.shape[-2])
            self.logits |= {n * width for n in (out.numel(), shorter) for width in (2, 4)}


# ----------------------------------------------------------------------------------------------------------- recorders


class _Profiled:
    """A CPU. The profiler is on from the warm-up on: it does not see the end of a block that is older than itself."""

    def __init__(self, device: torch.device):
        self.device, self.moments, self.first = device, list[Moment](), 0
        self.profile: Any = None
        self.watched: list[weakref.finalize] = []

    def open(self, tensors: Iterable[Tensor]) -> None:
        """tensors: those that are there, whose end is watched in another way."""
        if torch.autograd._profiler_enabled():
            raise RuntimeError("a torch profiler is on, and measuring on a CPU needs one of its own; end it first")
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.watched.append(weakref.finalize(storage, _say, GONE + str(storage.data_ptr())))
            self.watched[-1].atexit = False
        self.profile = _profiler()

    def begin(self, moment: Moment) -> None:
        self.first = len(self.moments)
        self.moment(moment)

    def moment(self, moment: Moment) -> None:
        _say(MOMENT + str(len(self.moments)))
        self.moments.append(moment)

    def end(self) -> None:
        """Nothing to read: all is in the profile."""

    def close(self) -> list[Entry]:
        for end in self.watched:
            end.detach()
        return _history(self.profile, self.device, self.moments)

    def result(self, history: list[Entry], asked: Mapping[str, Any], vocabulary: int | None,
               logits: Collection[int]) -> Memory:  # fmt: skip
        start = next(i for i, entry in enumerate(history) if entry is self.moments[self.first])
        tape = tape_of(survivors(history[:start]), history[start:], vocabulary, logits)
        return from_tape("measured", tape, 0, asked)


class _Counted:
    """A device with counters alone: MPS, and a GPU with another allocator than torch's own."""

    def __init__(self, device: torch.device):
        self.device, self.moments, self.first = device, list[Moment](), 0
        self.peaks: list[tuple[int, int]] = []  # (allocated, reserved): the most after each moment

    def open(self, tensors: Iterable[Tensor]) -> None:
        """Counters are always on."""

    def begin(self, moment: Moment) -> None:
        self._synchronize()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.moment(moment)

    def moment(self, moment: Moment) -> None:
        if self.moments:
            self._read()
        self.moments.append(moment)

    def end(self) -> None:
        self._synchronize()
        self._read()

    def close(self) -> list[Entry]:
        return []

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        else:
            torch.mps.synchronize()

    def _read(self) -> None:
        if self.device.type == "cuda":
            peaks = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            peaks = torch.mps.current_allocated_memory(), torch.mps.driver_allocated_memory()
        self.peaks.append(peaks)

    def result(self, history: list[Entry], asked: Mapping[str, Any], vocabulary: int | None,
               logits: Collection[int]) -> Memory:  # fmt: skip
        phases: dict[str, int] = {}
        phase, most, top, when = "", 0, "", 0
        for i, (moment, (allocated, _)) in enumerate(zip(self.moments, self.peaks, strict=True)):
            phase = moment.phase or phase
            if phase:
                phases[phase] = max(phases.get(phase, 0), allocated)
            if allocated > most:
                most, top, when = allocated, phase, i
        kinds = dict.fromkeys(KINDS, 0)
        for kind, n in {**self.moments[0].names, **self.moments[when].names}.values():
            kinds[kind] += n
        kinds["activations"] += max(0, most - sum(kinds.values()))
        notes = ["activations stand for logits and temporaries too: they are not told apart here"]
        if self.device.type == "mps":
            notes += ["torch counts no peak on MPS: what comes and goes within a phase is missing"]
        return Memory("measured", asked, most, max(r for _, r in self.peaks), {k: n for k, n in kinds.items() if n},
                      phases, Peak(top, "", "", 0), notes=tuple(notes))  # fmt: skip


class _Traced(_Counted):
    """A GPU with torch's own allocator: its counters; its history; and a profile, for the names of operations."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.tracing, self.profile, self.start = False, None, 0
        self.places: list[int] = []  # births and deaths before each moment
        self.before: Mapping[str, Any] = {}
        self.after: Mapping[str, Any] = {}

    def open(self, tensors: Iterable[Tensor]) -> None:
        if getattr(torch._C, "_cuda_isHistoryEnabled", lambda: False)():
            raise RuntimeError("torch's memory history is on, and measuring on a GPU needs its own; end it first with "
                               "torch.cuda.memory._record_memory_history(None)")  # fmt: skip
        torch.cuda.init()  # before that, torch has no counters

    def begin(self, moment: Moment) -> None:
        self.profile = None if torch.autograd._profiler_enabled() else _profiler()
        torch.cuda.memory._record_memory_history("all", context=None, stacks="python")
        self.tracing = True
        self.before, self.start = torch.cuda.memory._snapshot(), self._count()
        blocks = [b for s in self.before["segments"] if s["device"] == self.device.index for b in s["blocks"]]
        cublas = {b["address"]: ("workspace", b["size"]) for b in blocks
                  if b["state"] == "active_allocated" and b["requested_size"] in (CUBLAS, CUBLAS_HOPPER)}  # fmt: skip
        super().begin(moment._replace(names={**cublas, **moment.names}))

    def moment(self, moment: Moment) -> None:
        self.places.append(self._count() - self.start)
        _say(MOMENT + str(len(self.moments)))
        super().moment(moment)

    def _count(self) -> int:
        """Births and deaths so far: each is one entry of the trace."""
        count = torch.cuda.memory_stats_as_nested_dict(self.device)["allocation"]["all"]
        return count["allocated"] + count["freed"]

    def end(self) -> None:
        super().end()
        self.after = torch.cuda.memory._snapshot()

    def close(self) -> list[Entry]:
        if self.tracing:
            torch.cuda.memory._record_memory_history(None)
        return _history(self.profile, self.device, self.moments)

    def result(self, history: list[Entry], asked: Mapping[str, Any], vocabulary: int | None,
               logits: Collection[int]) -> Memory:  # fmt: skip
        index = self.device.index
        alive, traced = history_of_snapshot(self.before, self.after["device_traces"][index], index)
        traced = with_moments(labelled(traced, history), self.moments, self.places)
        tape = tape_of(alive, traced, vocabulary, logits)
        counted, reserved = (max(peaks) for peaks in zip(*self.peaks, strict=True))
        found = from_tape("measured", tape, reserved, asked)
        others = sum(b.size for b in tape.blocks if b.phase == "setup" and b.kind == "temporaries")
        notes = []
        if counted != found.allocated:
            notes.append(f"torch's own counter has {size(counted)} at the peak")
        if others > counted / 100:
            notes.append(f"{size(others)} were there before and belong neither to the model nor to its optimizer")
        return replace(found, notes=tuple(notes))


def _recorder(device: torch.device) -> Any:
    if device.type == "cpu":
        return _Profiled(device)
    native = device.type == "cuda" and torch.cuda.memory.get_allocator_backend() == "native"
    return _Traced(device) if native else _Counted(device)


def _profiler() -> Any:
    with _quiet():
        return profile(activities=[ProfilerActivity.CPU], profile_memory=True).__enter__()


def _history(profiler: Any, device: torch.device, moments: list[Moment]) -> list[Entry]:
    """End a profiler, and what it has seen."""
    if profiler is None:
        return []
    with _quiet():
        profiler.__exit__(None, None, None)
    return history_of_profile(profiler.profiler.kineto_results.experimental_event_tree(), device, moments)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that kineto, the profiler's library, prints of itself; it looks for this when first used."""
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = before or "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]


def _say(name: str) -> None:
    """Put a name into the profile, at this moment."""
    with record_function(name):
        pass


# ---------------------------------------------------------------------------------------------------- what is measured


def _callable(step: Any) -> Callable[[Callable[[str], None]], Any]:
    """The step as a function of `mark`."""
    if not callable(step):
        raise TypeError(f"step must be something to call, such as a TrainingStep, not {type(step).__name__}")
    try:
        parameters = list(inspect.signature(step).parameters.values())
    except ValueError:  # a built-in function
        parameters = []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wanted = [p.name for p in parameters if p.kind in kinds and (p.default is p.empty or p.name == "mark")]
    if len(wanted) > 1:
        raise TypeError(f"step wants {len(wanted)} arguments ({', '.join(wanted)}), and gets `mark` or none: wrap it")
    return step if wanted else lambda mark: step()


def _device(model: nn.Module | None, optimizer: torch.optim.Optimizer | None, device: Any) -> torch.device:
    """The device whose memory is measured."""
    params = list(model.parameters()) if model is not None else []
    params += [p for group in optimizer.param_groups for p in group["params"]] if optimizer is not None else []
    if any(p.is_meta for p in params):
        raise ValueError("the model has no numbers (it is on the meta device), so it cannot run; predict its memory")
    if device is None and not params and not torch.cuda.is_available():
        raise ValueError("there is no GPU here, and on a CPU the model's weights must be known: pass model=")
    found = torch.device(device or (params[0].device if params else "cuda"))
    if found.type not in ("cuda", "cpu", "mps"):
        raise ValueError(f"device={str(device)!r}: memory is measured on cuda, cpu and mps")
    if found.type == "cpu" and not params:
        raise ValueError("on a CPU the model's weights must be known: pass model=")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device='mps': torch sees no Apple GPU here; measure on the CPU, or predict")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}: torch sees no CUDA GPU here; measure on the CPU, or predict")
    return torch.device("cuda", torch.cuda.current_device()) if found.type == "cuda" and found.index is None else found


def _described(model: nn.Module | None, optimizer: Any, step: TrainingStep | Generation | None,
               device: torch.device) -> dict[str, Any]:  # fmt: skip
    """What was measured, in the words of `predict`."""
    found: dict[str, Any] = {"model": "step" if model is None else _name(model)}
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if model is not None:
        names = dict.fromkeys(type(a).__name__ for at in adapters(model).values() for a in at.values())
        found["method"] = " + ".join(names) or ("full" if all(p.requires_grad for p in model.parameters()) else None)
        found["checkpointing"] = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    if step is not None and "input_ids" in step.batch:
        found["batch"], found["tokens"] = step.batch["input_ids"].shape
    found["train"] = not isinstance(step, Generation)
    if isinstance(step, Generation):
        found["new_tokens"] = step.new_tokens
    elif optimizer is not None:
        found["optimizer"] = _name(optimizer)
    return found

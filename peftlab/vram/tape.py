"""What happens to a device's memory while a program runs: every block that is born and dies, in order.

The program runs for real, on tensors that have a shape and no content (torch's meta device), so nothing is computed and
nothing is stored. What a run tells is when each tensor's storage appears and when its last reference is gone; that is
all an allocator ever sees. `measurement.py` writes the same tape from a real run.
"""

from __future__ import annotations

import bisect
import functools
import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch._prims_common
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

# What memory is used for. A block that nobody named is told by its life: see `Tape.name_the_rest`.
KINDS = ("weights", "adapter", "optimizer", "gradients", "cache", "activations", "logits", "temporaries", "workspace",
         "remainders")  # fmt: skip
GRAIN = {"cuda": 512, "cpu": 1}  # bytes that each allocation is rounded up to: CUDACachingAllocator's kMinBlockSize
# cuBLAS gets one workspace for each thread that multiplies matrices, and backward passes have a thread of their own:
# two buffers of 4,096 KiB and eight of 16 KiB (CUBLAS_WORKSPACE_CONFIG=:4096:2:16:8, torch's default before Hopper).
CUBLAS = (2 * 4096 + 8 * 16) * 1024
LIBRARIES = ("transformers", "peft")  # their questions are known: is a mask all ones?
MATMULS = {
    getattr(aten, name)
    for name in ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "_addmm_activation", "mv", "addmv", "linear")
}


@dataclass(slots=True)
class Block:
    """One piece of memory, from the event that made it to the one that freed it (None: it outlived the tape)."""

    size: int
    phase: str
    module: str  # path of the module that made it; "": none did
    op: str  # the operation that made it
    shape: tuple[int, ...] = ()
    kind: str = ""
    born: int = 0
    died: int | None = None
    call: int = -1  # number of the module call inside of a backward pass that made it; -1: none


class Mark(NamedTuple):
    """From this event on, the program is in this phase."""

    event: int
    phase: str


@dataclass
class Tape:
    """Births and deaths of blocks in order. Event i is `events[i]`: n for the birth of block n, ~n for its death."""

    blocks: list[Block] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    emptied: list[int] = field(default_factory=list)  # events before which torch.cuda.empty_cache() was called
    calls: list[int] = field(default_factory=list)  # the first event after each module call of a backward pass

    def alloc(self, block: Block) -> int:
        """Number of the new block."""
        block.born = len(self.events)
        self.blocks.append(block)
        self.events.append(number := len(self.blocks) - 1)
        return number

    def free(self, number: int) -> None:
        self.blocks[number].died = len(self.events)
        self.events.append(~number)

    def enter(self, phase: str) -> None:
        if phase != self.phase or phase == "forward":
            self.marks.append(Mark(len(self.events), phase))

    @property
    def phase(self) -> str:
        return self.marks[-1].phase if self.marks else "setup"

    def phases(self) -> Iterator[tuple[str, range]]:
        """(phase, its events), in order."""
        ends = [*self.marks, Mark(len(self.events), "")]
        for mark, after in pairwise(ends):
            yield mark.phase, range(mark.event, after.event)

    def allocated(self) -> list[int]:
        """Bytes that are allocated after each event."""
        sizes = (self.blocks[n].size if n >= 0 else -self.blocks[~n].size for n in self.events)
        return list(accumulate(sizes))

    def at(self, event: int) -> list[Block]:
        """The blocks that are alive after an event."""
        return [b for b in self.blocks if b.born <= event and (b.died is None or b.died > event)]

    def by_kind(self, event: int) -> dict[str, int]:
        """kind -> bytes after an event, in the order of KINDS."""
        total = dict.fromkeys(KINDS, 0)
        for block in self.at(event):
            total[block.kind] += block.size
        return {kind: size for kind, size in total.items() if size}

    def name_the_rest(self, vocabulary: int | None) -> None:
        """Give each block without a kind the one that its life shows.

        What has a column for each token of the vocabulary is logits: they, their probabilities, their gradients. What
        a forward pass makes and a later phase frees was kept for the backward pass: activations. The same holds for a
        block that gradient checkpointing computes again, when it outlives the module call that made it. The rest is
        temporary.
        """
        last = {}  # event -> the last event of its phase
        for phase, events in self.phases():
            if phase == "forward":
                last.update(dict.fromkeys(events, events.stop - 1))
        for block in self.blocks:
            if block.kind:
                continue
            died = math.inf if block.died is None else block.died
            kept = died > last[block.born] if block.born in last else block.call >= 0 and died >= self.calls[block.call]
            if vocabulary and block.shape and block.shape[-1] == vocabulary:
                block.kind = "logits"
            elif block.phase in ("prompt", "tokens"):  # nothing is kept for a backward pass: all that is at work
                block.kind = "activations"
            else:
                block.kind = "activations" if kept else "temporaries"


class Recorder(TorchDispatchMode):
    """Writes the tape of what runs inside `with recorder:` on the meta device, as if it were another (`like`).

    kernels: op -> function of (arguments, result) that returns (result, bytes of further memory the op takes while it
    runs), for operations whose kernel on the imitated device differs from the one that runs here.
    answer: what transformers is answered when it asks whether a mask is all ones, bool(tensor). Raises ValueError for
    any other number that a program wants to see (`Unknown`).
    """

    def __init__(self, model: nn.Module, like: str = "cuda", answer: bool = True,
                 kernels: Mapping[Any, Callable] | None = None):  # fmt: skip
        super().__init__()
        self.held = _held_by_autograd()
        self.tape, self.answer, self.kernels = Tape(), answer, kernels or {}
        self.devices = {"meta", like}  # what lies on the CPU anyway (a state of its random numbers) counts there
        self.grain, self.workspaces = GRAIN[like], {True: CUBLAS, False: CUBLAS} if like == "cuda" else {}
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.any: Any = None  # the result of the last operation, if that was any()
        self.stack: list[str] = []
        self.live: dict[int, int] = {}  # address of a storage -> number of its block
        self.born_in: tuple[list[int], list[str]] = [], []  # numbers of autograd nodes, the module from there on

    # --- which module is at work

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note which module is at work, in forward passes by hooks, in backward passes by the nodes they made."""
        handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if not self.stack and _in_backward():
            self.tape.calls.append(len(self.tape.events))
        self.stack.append(self.paths.get(id(module), self.stack[-1] if self.stack else ""))
        self._note_node()

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        if self.stack:
            self.stack.pop()
        self._note_node()
        if not self.stack and _in_backward():
            self.tape.calls[-1] = len(self.tape.events)

    def _note_node(self) -> None:
        numbers, modules = self.born_in
        numbers.append(torch.autograd._get_sequence_nr())
        modules.append(self.stack[-1] if self.stack else "")

    def module(self) -> str:
        if self.stack or not _in_backward():
            return self.stack[-1] if self.stack else ""
        numbers, modules = self.born_in
        place = bisect.bisect_right(numbers, torch._C._current_autograd_node()._sequence_nr()) - 1
        return modules[place] if 0 <= place < len(modules) - 1 else ""

    # --- which memory appears and goes

    def tag(self, tensors: Iterable[Any], kind: str) -> None:
        """Say what tensors are for; those that were there before the tape began are put on it."""
        for tensor in tensors:
            if isinstance(tensor, Tensor) and (number := self.see(tensor, "")) is not None:
                self.tape.blocks[number].kind = kind

    def see(self, tensor: Tensor, op: str) -> int | None:
        """Number of the block of a tensor; a new one if its storage was not seen before."""
        if tensor.device.type not in self.devices or tensor.layout != torch.strided:
            return None
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // self.grain) * self.grain
        number = self.live.get(key)
        if number is not None and self.tape.blocks[number].size != size:  # resized, or `tensor.data = …`
            self._gone(key)
            number = None
        if number is None and size:
            number = self.live[key] = self.new(size, op, tuple(tensor.shape))
            weakref.finalize(storage, self._gone, key).atexit = False
        return number

    def new(self, size: int, op: str, shape: tuple[int, ...] = (), kind: str = "") -> int:
        inside = len(self.tape.calls) - 1 if self.stack and _in_backward() else -1
        return self.tape.alloc(Block(size, self.tape.phase, self.module(), op, shape, kind, call=inside))

    def _gone(self, key: int) -> None:
        if key in self.live:
            self.tape.free(self.live.pop(key))

    def workspace(self, size: int, op: str) -> None:
        """Memory that a kernel takes and gives back while it runs."""
        if size:
            self.tape.free(self.new(-(-size // self.grain) * self.grain, op, kind="temporaries"))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return self._answered(args[0])
        name = str(func)
        if func.overloadpacket in MATMULS and self.workspaces.get(_in_backward()):
            self.new(self.workspaces.pop(_in_backward()), "cuBLAS", kind="workspace")
        if (sum_in_place := _accumulates(func, args, self.held)) is not None:
            return sum_in_place
        out, more = func(*args, **kwargs), 0
        self.any = out if func.overloadpacket is aten.any else None
        if func in self.kernels:
            out, more = self.kernels[func](args, kwargs, out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.see(tensor, name)
        self.workspace(more, name)
        return out

    def _answered(self, tensor: Tensor) -> bool:
        if tensor.dtype == torch.bool and _who_asks() in LIBRARIES:
            return self.answer and tensor is not self.any  # "is any of them wrong?" None is
        does = "decides by" if tensor.dtype == torch.bool else "computes with"
        where = f" in {self.stack[-1]!r}" if self.stack and self.stack[-1] else ""
        raise Unknown(f"the model {does} a number that it reads out of a tensor{where} (.item(), int(tensor), "
                      "if tensor: …), and there are no numbers here")  # fmt: skip


class Unknown(ValueError):
    """A program on meta tensors asked for a number."""


def _who_asks() -> str:
    """The package whose code asks for a number: the first on the stack that is neither torch nor this room."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(("torch.", "peftlab.vram.")):
            return name.partition(".")[0]
        frame = frame.f_back
    return ""


def _in_backward() -> bool:
    return torch._C._current_autograd_node() is not None


def _holders(args: tuple) -> tuple[int, int, int]:
    """How often the first argument is held: as a Python object, as a tensor, as a storage."""
    return sys.getrefcount(args[0]), args[0]._use_count(), torch._C._storage_Use_Count(args[0].untyped_storage()._cdata)


@functools.cache
def _held_by_autograd() -> tuple[int, int, int]:
    """`_holders` of a gradient that only autograd holds when it adds another one to it: looked at in a tiny example."""
    seen = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is aten.add.Tensor:
                seen.append(_holders(args))
            return func(*args, **(kwargs or {}))

    x = torch.ones(2, requires_grad=True)
    with torch.enable_grad():
        y = x * 1
        both = torch.stack([y * 2, y * 3])
    with Look():
        both.backward(torch.ones(2, 2))
    return seen[0]


def _accumulates(func: Any, args: tuple, held: tuple[int, int, int]) -> Tensor | None:
    """The sum, if this is autograd adding up two gradients of one tensor and it may write into the first.

    Where a tensor is used twice, autograd adds its gradients, in the memory of the first if nobody else holds that.
    While a dispatch mode is on it does not dare to and makes a third tensor, which is not there in a real run.
    Source: torch/csrc/autograd/input_buffer.cpp, accumulate and can_accumulate_inplace.
    """
    if func is not aten.add.Tensor or not _in_backward() or torch.is_grad_enabled() or len(args) != 2:
        return None
    if not isinstance(args[1], Tensor) or _holders(args) != held:
        return None
    first, second = args
    dense = torch._prims_common.is_non_overlapping_and_dense_or_false(first)
    same = first.shape == second.shape and first.dtype == torch.promote_types(first.dtype, second.dtype)
    return first.add_(second) if dense and same else None

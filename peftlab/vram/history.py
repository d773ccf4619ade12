"""From what torch records of a real run to a tape: births and deaths of blocks, each with its address.

What comes in is plain data, a tree of profiler events or the dictionaries of a CUDA snapshot, so that it can be tested
where there is no GPU. See measurement.py for how it is recorded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .allocator import MIN_BLOCK, CachingAllocator, Piece
from .tape import Block, Tape


class Birth(NamedTuple):
    """A block comes to be at an address."""

    address: int
    size: int  # bytes that the allocator counts for it
    asked: int = 0  # bytes that were asked for
    op: str = ""
    module: str = ""
    call: int = -1  # number of the module call inside of a backward pass that made it; -1: none


class Death(NamedTuple):
    """The block at an address is given back."""

    address: int
    size: int = 0


class Moment(NamedTuple):
    """A phase begins (unless it is ""), and these blocks are known: address -> (kind, bytes)."""

    phase: str
    names: Mapping[int, tuple[str, int]]


class Returned(NamedTuple):
    """A module call inside of a backward pass has ended."""

    call: int


Entry = Birth | Death | Moment | Returned


def tape_of(alive: Mapping[int, int], history: Sequence[Entry], vocabulary: int | None = None,
            logits: Collection[int] = ()) -> Tape:  # fmt: skip
    """The tape of a history. alive: address -> bytes of the blocks that were there before it.

    A block that is named or given back without having been born was there before, too. logits: how many bytes a tensor
    with a column for each token of the vocabulary has: it is known by that, since shapes are not recorded.
    """
    tape, at = Tape(), dict[int, int]()  # address -> number of the block that is there
    for address, size in {**alive, **_older(alive, history)}.items():
        at[address] = tape.alloc(Block(size, "setup", "", ""))
    for entry in history:
        if isinstance(entry, Birth):
            if entry.address in at:  # its death was not seen, but two blocks are never at one place
                tape.free(at.pop(entry.address))
            shape = (vocabulary,) if vocabulary and entry.asked in logits else ()
            block = Block(entry.size, tape.phase, entry.module, entry.op, shape, call=entry.call)
            at[entry.address] = tape.alloc(block)
            tape.calls += [len(tape.events)] * (entry.call + 1 - len(tape.calls))
        elif isinstance(entry, Death):
            if entry.address in at:
                tape.free(at.pop(entry.address))
        elif isinstance(entry, Returned):
            if entry.call < len(tape.calls):
                tape.calls[entry.call] = len(tape.events)
        else:
            for address, (kind, _) in entry.names.items():
                if address in at:
                    tape.blocks[at[address]].kind = kind
            if entry.phase:
                tape.enter(entry.phase)
    tape.name_the_rest(vocabulary)
    return tape


def _older(alive: Mapping[int, int], history: Sequence[Entry]) -> dict[int, int]:
    """address -> bytes of blocks that a history speaks of and that it did not see being born."""
    known, found = set(alive), dict[int, int]()
    for entry in history:
        new: dict[int, int] = {}
        if isinstance(entry, Birth):
            known.add(entry.address)
        elif isinstance(entry, Death):
            new = {entry.address: entry.size} if entry.size else {}
        elif isinstance(entry, Moment):
            new = {address: size for address, (_, size) in entry.names.items()}
        found |= {address: size for address, size in new.items() if address not in known}
        known |= new.keys()
    return found


def survivors(history: Iterable[Entry]) -> dict[int, int]:
    """address -> bytes of the blocks that are born in a history and not given back."""
    left: dict[int, int] = {}
    for entry in history:
        if isinstance(entry, Birth):
            left[entry.address] = entry.size
        elif isinstance(entry, Death):
            left.pop(entry.address, None)
    return left


# ------------------------------------------------------------------------------------------------------ torch.profiler

MOMENT, MODULE, GONE = "peftlab moment ", "peftlab module ", "peftlab gone "  # ranges that we put into a profile
ENGINE = "autograd::engine::evaluate_function"  # the range around a node of the backward pass
HELPERS = ("aten::empty", "aten::resize")  # they ask for memory on behalf of the operation around them


def history_of_profile(tree: Iterable[Any], device: torch.device, moments: Sequence[Moment]) -> list[Entry]:
    """What a profile tells of one device, in order of time. tree: `kineto_results.experimental_event_tree()`.

    A block belongs to the module whose forward pass is at work, and in a backward pass to the one that made the node:
    torch gives a node the number under which the operation before it ran in the forward pass.
    """
    found: list[tuple[int, Entry]] = []  # (time, what happened)
    made_by: dict[int, str] = {}  # number of a node -> module
    calls = 0
    # (event, operation, module and node of the backward pass around it, number of the call in that), the next one last
    todo = [(e, "", "", None, -1) for e in sorted(tree, key=lambda e: e.start_time_ns, reverse=True)]
    while todo:
        event, op, module, node, call = todo.pop()
        name, time, more = event.name, event.start_time_ns, event.extra_fields
        if name == "[memory]":
            if same_device(more.device, device):
                n = more.alloc_size
                found.append((time, Birth(more.ptr, n, n, op, module, call) if n > 0 else Death(more.ptr, -n)))
            continue
        if name.startswith(MODULE):
            module = name.removeprefix(MODULE)
            if node is not None and call < 0:
                call, calls = calls, calls + 1
                found.append((event.end_time_ns, Returned(call)))
        elif name.startswith(MOMENT):
            found.append((time, moments[int(name.removeprefix(MOMENT))]))
        elif name.startswith(GONE):
            found.append((time, Death(int(name.removeprefix(GONE)))))
        elif name.startswith(ENGINE):
            node = more.sequence_number
            module = made_by.get(node, "")
        elif name.startswith("aten::"):
            if not name.startswith(HELPERS):
                op = name.replace("::", ".", 1)
            if node is None and more.sequence_number >= 0:
                made_by[more.sequence_number] = module
        todo += [(child, op, module, node, call) for child in reversed(event.children)]
    return [entry for _, entry in sorted(found, key=lambda pair: pair[0])]


def same_device(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and (one.type != "cuda" or one.index == other.index)


# ------------------------------------------------------------------------------------------------ torch.cuda's snapshot


class _Heap(CachingAllocator):
    """A real allocator's pieces, of which it is told where each block lies; what is cut off then, it knows itself."""

    told = 0

    def _best(self, size: int, small: bool) -> Piece | None:
        piece = self.pieces[self.told]
        self._take(piece)
        return piece

    def segment(self, address: int, parts: Iterable[tuple[int, bool]]) -> None:
        """A new segment with its parts: (bytes, whether free)."""
        before: Piece | None = None
        for size, free in parts:
            piece = Piece(address, size, False, free, before)  # told where, it needs no pools of small and large ones
            if before is not None:
                before.after = piece
            self.pieces[address] = before = piece
            if free:
                self._put(piece)
            else:
                self.used[address] = piece
            address += size

    def given(self, address: int, asked: int) -> int:
        """Bytes of the piece that is given out at an address for so many bytes."""
        rounded = max(MIN_BLOCK, -(-asked // MIN_BLOCK) * MIN_BLOCK)
        piece = self.pieces.get(address)
        if self.expandable or piece is None or not piece.free or piece.size < rounded:
            return rounded
        self.told = address
        self.malloc(address, asked)
        return self.used[address].size


def history_of_snapshot(before: Mapping[str, Any], trace: Iterable[Mapping[str, Any]],
                        device: int) -> tuple[dict[int, int], list[Entry]]:  # fmt: skip
    """(blocks that were there: address -> bytes; births and deaths since then) on one GPU.

    before: a `torch.cuda.memory._snapshot()`, of which the segments count. trace: what the allocator did after it, from
    `device_traces` of a later one. A trace says how many bytes were asked for. Counted, by torch too, is the piece that
    was given out, which can be longer by a rest too small to be cut off: therefore all pieces are followed. A block
    counts until its freeing is requested; its piece can be given out again once that is completed.
    Source: torch/cuda/memory.py, _snapshot; c10/cuda/CUDACachingAllocator.cpp, alloc_found_block and free.
    """
    segments = [s for s in before["segments"] if s.get("device", device) == device]
    heap = _Heap(expandable=any(s.get("is_expandable") for s in segments))
    now: dict[int, int] = {}
    for s in segments:
        heap.segment(s["address"], [(b["size"], b["state"] == "inactive") for b in s["blocks"]])
        now |= {b["address"]: b["size"] for b in s["blocks"] if b["state"] == "active_allocated"}
    alive, history = dict(now), list[Entry]()
    for entry in trace:
        action, address, size = entry["action"], entry.get("addr", 0), entry["size"]
        if action == "alloc":
            now[address] = heap.given(address, size)
            history.append(Birth(address, now[address], size))
        elif action == "free_requested":
            history.append(Death(address, now.pop(address, size)))
        elif action == "free_completed" and address in heap.used:
            heap.free(address)
        elif action == "segment_alloc":
            heap.segment(address, [(size, True)])
        elif action == "segment_map":
            heap.expandable = True
    return alive, history


def labelled(history: Sequence[Entry], profile: Sequence[Entry]) -> list[Entry]:
    """A GPU's history, with operations and modules from a profile of the same run: the same births in the same order.

    If the profiler has not seen as many, the history stays without.
    """
    labels = [entry for entry in profile if isinstance(entry, Birth)]
    if len(labels) != sum(isinstance(entry, Birth) for entry in history):
        return list(history)
    returned: dict[int, list[Entry]] = {}  # number of births before -> the calls that ended there
    births = 0
    for entry in profile:
        births += isinstance(entry, Birth)
        if isinstance(entry, Returned):
            returned.setdefault(births, []).append(entry)
    found, births = list[Entry](), 0
    for entry in history:
        if isinstance(entry, Birth):
            label = labels[births]
            found += returned.pop(births, [])
            found.append(entry._replace(op=label.op, module=label.module, call=label.call))
            births += 1
        else:
            found.append(entry)
    return [*found, *(entry for left in returned.values() for entry in left)]


def with_moments(history: Sequence[Entry], moments: Sequence[Moment], places: Sequence[int]) -> list[Entry]:
    """A history, with each moment after as many births and deaths as its place says."""
    found, waiting, count = list[Entry](), list(zip(places, moments, strict=True)), 0
    for entry in history:
        if isinstance(entry, (Birth, Death)):
            while waiting and waiting[0][0] <= count:
                found.append(waiting.pop(0)[1])
            count += 1
        found.append(entry)
    return [*found, *(moment for _, moment in waiting)]

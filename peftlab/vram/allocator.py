"""How many bytes a GPU has to set aside for a tape: torch's caching allocator, played again.

A GPU program reserves memory in large segments and cuts them into blocks. A freed block is kept and used again for
what fits into it. So what is reserved, and what `nvidia-smi` shows, is more than what tensors need at their peak.
Source: c10/cuda/CUDACachingAllocator.cpp, malloc, get_free_block, alloc_block, should_split, free_block; one stream.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from .tape import Tape

MIB = 2**20
MIN_BLOCK = 512  # kMinBlockSize: every size is rounded up to it
SMALL = MIB  # kSmallSize: up to here a block lives in a pool of its own
SMALL_SEGMENT = 2 * MIB  # kSmallBuffer: that pool grows by segments of this size
LARGE_SEGMENT, LARGE = 20 * MIB, 10 * MIB  # kLargeBuffer, kMinLargeAlloc: below 10 MiB the other one grows by 20 MiB,
ROUND_LARGE = 2 * MIB  # kRoundLarge: above by the size itself, rounded up to 2 MiB


class OutOfMemory(MemoryError):
    """The tape does not fit."""


@dataclass(eq=False, slots=True)
class Piece:
    """A part of a segment: in use or free, between its neighbours."""

    address: int
    size: int
    small: bool
    free: bool = True
    before: Piece | None = None
    after: Piece | None = None


class CachingAllocator:
    """The default allocator of torch.cuda. limit: bytes of the device; None: as many as it takes.

    expandable: as with PYTORCH_ALLOC_CONF=expandable_segments:True, where each pool is one segment that grows in
    steps of 20 MiB (2 MiB for small blocks), so that a hole in the middle can be used up to its end. With a
    limit too this is less than torch can do, which gives single pages of such a segment back before it gives up.
    """

    def __init__(self, limit: int | None = None, expandable: bool = False):
        self.limit, self.expandable = limit, expandable
        self.pools: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # small? -> (size, address), sorted
        self.pieces: dict[int, Piece] = {}  # address -> piece
        self.ends: dict[bool, Piece | None] = {True: None, False: None}  # expandable: the last piece of each pool
        self.used: dict[int, Piece] = {}
        self.levels: list[int] = []  # bytes allocated after each event of a tape
        self.reserved = self.allocated = self.peak_reserved = self.peak_allocated = self.retries = 0
        self._next = 0

    def replay(self, tape: Tape) -> CachingAllocator:
        """All births and deaths of a tape. Raises OutOfMemory at the first block that finds no place."""
        emptied = set(tape.emptied)
        for event, number in enumerate(tape.events):
            if event in emptied:
                self.empty_cache()
            if number >= 0:
                self.malloc(number, tape.blocks[number].size)
            else:
                self.free(~number)
            self.levels.append(self.allocated)
        return self

    def malloc(self, number: int, size: int) -> None:
        size = max(MIN_BLOCK, -(-size // MIN_BLOCK) * MIN_BLOCK)
        small = size <= SMALL
        piece = self._best(size, small) or self._grow(size, small)
        rest = piece.size - size
        if rest >= MIN_BLOCK if small or self.expandable else rest > SMALL:  # should_split
            self._cut(piece, size)
        piece.free = False
        self.used[number] = piece
        self.allocated += piece.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)

    def free(self, number: int) -> None:
        piece = self.used.pop(number)
        self.allocated -= piece.size
        piece.free = True
        if (left := piece.before) is not None and left.free:
            self._take(left)
            piece = self._join(left, piece)
        if (right := piece.after) is not None and right.free:
            self._take(right)
            piece = self._join(piece, right)
        self._put(piece)

    def empty_cache(self) -> None:
        """Give back each segment that is free as a whole: torch.cuda.empty_cache, and before an out-of-memory error."""
        for piece in [p for p in self.pieces.values() if p.free and p.before is None and p.after is None]:
            self._take(piece)
            del self.pieces[piece.address]
            self.reserved -= piece.size
            if self.ends[piece.small] is piece:
                self.ends[piece.small] = None

    # --- pieces

    def _put(self, piece: Piece) -> None:
        bisect.insort(self.pools[piece.small], (piece.size, piece.address))

    def _take(self, piece: Piece) -> None:
        pool = self.pools[piece.small]
        pool.pop(bisect.bisect_left(pool, (piece.size, piece.address)))

    def _best(self, size: int, small: bool) -> Piece | None:
        """The smallest free piece that is large enough, the first of those in memory."""
        pool = self.pools[small]
        place = bisect.bisect_left(pool, (size, 0))
        return self.pieces[pool.pop(place)[1]] if place < len(pool) else None

    def _cut(self, piece: Piece, size: int) -> None:
        rest = Piece(piece.address + size, piece.size - size, piece.small, True, piece, piece.after)
        if rest.after is not None:
            rest.after.before = rest
        if self.ends[piece.small] is piece:
            self.ends[piece.small] = rest
        piece.after, piece.size = rest, size
        self.pieces[rest.address] = rest
        self._put(rest)

    def _join(self, first: Piece, second: Piece) -> Piece:
        first.size += second.size
        first.after = second.after
        if first.after is not None:
            first.after.before = first
        if self.ends[second.small] is second:
            self.ends[second.small] = first
        del self.pieces[second.address]
        return first

    def _grow(self, size: int, small: bool) -> Piece:
        """A new segment; at the limit, unused ones are given back first."""
        if self.expandable:
            return self._expand(size, small)
        large = LARGE_SEGMENT if size < LARGE else -(-size // ROUND_LARGE) * ROUND_LARGE
        segment = SMALL_SEGMENT if small else large
        self._reserve(segment, size)
        piece = Piece(self._address(segment), segment, small)
        self.pieces[piece.address] = piece
        return piece

    def _expand(self, size: int, small: bool) -> Piece:
        step = SMALL_SEGMENT if small else LARGE_SEGMENT
        end = self.ends[small]
        here = end.size if end is not None and end.free else 0
        more = -(-(size - here) // step) * step
        self._reserve(more, size)
        if end is None:
            address = self._address(2**50)
            piece = Piece(address, more, small)
        elif here:
            self._take(end)
            end.size += more
            piece = end
        else:
            piece = Piece(end.address + end.size, more, small, True, end)
            end.after = piece
        self.pieces[piece.address] = self.ends[small] = piece
        return piece

    def _reserve(self, more: int, size: int) -> None:
        if self.limit is not None and self.reserved + more > self.limit:
            self.retries += 1
            self.empty_cache()
            if self.reserved + more > self.limit:
                raise OutOfMemory(f"no place for {size:,} bytes: {self.allocated:,} are in use, {self.reserved:,} "
                                  f"reserved, of {self.limit:,}")  # fmt: skip
        self.reserved += more
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _address(self, length: int) -> int:
        self._next += length + 2**40  # segments are no neighbours
        return self._next

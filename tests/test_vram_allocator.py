"""The copy of torch's CUDA allocator: the laws of any allocator, sizes worked out by hand from the constants of
CUDACachingAllocator.cpp, and the same rules written a second time, as plainly as can be."""

from __future__ import annotations

import itertools

import pytest
import torch
from families import build
from hypothesis import given, settings
from hypothesis import strategies as st

import peftlab as pl
from peftlab.vram.allocator import (
    LARGE,
    LARGE_SEGMENT,
    MIN_BLOCK,
    ROUND_LARGE,
    SMALL,
    SMALL_SEGMENT,
    CachingAllocator,
    OutOfMemory,
    Piece,
)
from peftlab.vram.tape import Block, Tape

MIB = 2**20

# A program: sizes are births, None empties the cache, −n frees the block n-th from the oldest of those alive. Sizes lie
# where the rules change: at 512 bytes, 1 MiB, 10 MiB, multiples of 2 MiB.
edges = st.builds(lambda base, off: max(1, base + off), st.sampled_from([0, 512, MIB, 2 * MIB, 10 * MIB, 11 * MIB, 20 * MIB]),
                  st.sampled_from([-513, -512, -1, 0, 1, 512, 513]))  # fmt: skip
sizes = st.one_of(edges, st.integers(1, 3 * MIB), st.integers(1, 48 * MIB))
programs = st.lists(st.one_of(sizes, sizes, sizes, st.integers(-8, -1), st.integers(-8, -1), st.none()), max_size=60)


def rounded(size: int) -> int:
    return max(MIN_BLOCK, -(-size // MIN_BLOCK) * MIN_BLOCK)


def run(allocator, program, alive: dict[int, int] | None = None):
    """Runs a program; gives, after each step of it, the blocks that are alive: number -> size."""
    alive = {} if alive is None else alive
    for number, act in enumerate(program):
        if act is None:
            allocator.empty_cache()
        elif act > 0:
            allocator.malloc(number, act)
            alive[number] = act
        elif alive:
            oldest = list(alive)
            allocator.free(dead := oldest[-act % len(oldest)])
            del alive[dead]
        yield alive


def segments(allocator: CachingAllocator) -> list[list[Piece]]:
    """The pieces of each segment, in order of address."""
    found = []
    for piece in allocator.pieces.values():
        if piece.before is None:
            found.append([piece])
            while (piece := piece.after) is not None:
                found[-1].append(piece)
    return found


def check(allocator: CachingAllocator, alive: dict[int, int]) -> None:
    """What holds at each moment."""
    found = segments(allocator)
    pieces = [piece for segment in found for piece in segment]
    assert sorted(map(id, pieces)) == sorted(map(id, allocator.pieces.values()))
    assert all(allocator.pieces[piece.address] is piece for piece in pieces)
    for segment in found:
        assert len({piece.small for piece in segment}) == 1, "small and large blocks never share a segment"
        for left, right in itertools.pairwise(segment):
            assert right.before is left and left.address + left.size == right.address, "no gap and no overlap"
            assert not (left.free and right.free), "free neighbours are one piece"
    free = sorted((p.size, p.address, p.small) for p in pieces if p.free)
    assert free == sorted((*entry, small) for small, pool in allocator.pools.items() for entry in pool)
    assert allocator.reserved == sum(piece.size for piece in pieces)
    assert allocator.allocated == sum(piece.size for piece in pieces if not piece.free) <= allocator.reserved
    assert set(allocator.used) == set(alive)
    for number, size in alive.items():
        piece, rest = allocator.used[number], allocator.used[number].size - rounded(size)
        assert not piece.free and piece.small == (rounded(size) <= SMALL)
        assert 0 <= rest <= (0 if piece.small or allocator.expandable else SMALL), "what is not worth cutting off"
    assert allocator.peak_reserved >= allocator.reserved and allocator.peak_allocated >= allocator.allocated


@given(programs, st.booleans())
@settings(max_examples=150)
def test_at_each_moment(program, expandable):
    allocator = CachingAllocator(expandable=expandable)
    for alive in run(allocator, program):
        check(allocator, alive)
    for number in list(alive) if program else []:
        allocator.free(number)
    assert allocator.allocated == 0 and all(len(segment) == 1 and segment[0].free for segment in segments(allocator))
    allocator.empty_cache()
    assert allocator.reserved == 0 and not allocator.pieces and not any(allocator.pools.values())
    assert allocator.retries == 0


@given(programs)
@settings(max_examples=60)
def test_the_same_program_gives_the_same_numbers(program):
    first, second = CachingAllocator(), CachingAllocator()
    for _ in zip(run(first, program), run(second, program), strict=True):
        assert (first.reserved, first.allocated) == (second.reserved, second.allocated)


class Plain:
    """The default allocator as lists of [size, number of the block in it or None], searched from the start each time."""

    def __init__(self):
        self.segments: list[tuple[bool, list[list]]] = []

    def malloc(self, number: int, size: int) -> None:
        size = rounded(size)
        small = size <= SMALL
        fits = [(piece[0], s, i) for s, (kind, pieces) in enumerate(self.segments) for i, piece in enumerate(pieces)
                if kind == small and piece[1] is None and piece[0] >= size]  # fmt: skip
        if not fits:
            new = SMALL_SEGMENT if small else LARGE_SEGMENT if size < LARGE else -(-size // ROUND_LARGE) * ROUND_LARGE
            self.segments.append((small, [[new, None]]))
            fits = [(new, len(self.segments) - 1, 0)]
        room, s, i = min(fits)
        pieces = self.segments[s][1]
        cut = room - size >= MIN_BLOCK if small else room - size > SMALL
        pieces[i : i + 1] = [[size, number], [room - size, None]] if cut else [[room, number]]

    def free(self, number: int) -> None:
        for _, pieces in self.segments:
            for piece in pieces:
                piece[1] = None if piece[1] == number else piece[1]
            pieces[:] = [joined for taken, group in itertools.groupby(pieces, key=lambda piece: piece[1] is not None)
                         for joined in (group if taken else [[sum(size for size, _ in group), None]])]  # fmt: skip

    def empty_cache(self) -> None:
        self.segments = [(kind, pieces) for kind, pieces in self.segments if len(pieces) > 1 or pieces[0][1] is not None]

    def total(self, used: bool) -> int:
        return sum(size for _, pieces in self.segments for size, number in pieces if number is not None or not used)


@given(programs)
@settings(max_examples=150)
def test_against_the_plain_allocator(program):
    ours, plain = CachingAllocator(), Plain()
    for _ in zip(run(ours, program), run(plain, program), strict=True):
        assert (ours.reserved, ours.allocated) == (plain.total(used=False), plain.total(used=True))


# ---------------------------------------------------------------------------------------------------- a card's limit


@given(programs, st.integers(2, 80), st.booleans())
@settings(max_examples=150)
def test_a_limit(program, limit, expandable):
    """Never above it; an error only where there is no place, and none where the program fits without a limit."""
    free = CachingAllocator(expandable=expandable)
    for _ in run(free, program):
        pass
    allocator, alive = CachingAllocator(limit * MIB, expandable), {}
    try:
        for _ in run(allocator, program, alive):
            assert allocator.reserved <= allocator.peak_reserved <= limit * MIB
            check(allocator, alive)
    except OutOfMemory as error:
        size = next(act for number, act in enumerate(program) if act and act > 0 and number > max(alive, default=-1)
                    and number not in alive)  # fmt: skip
        assert allocator.retries and free.peak_reserved > limit * MIB and "no place for" in str(error)
        assert size or True
        check(allocator, alive)
    else:
        assert (allocator.retries == 0) >= (free.peak_reserved <= limit * MIB)

"""The copy of torch's CUDA allocator: the laws of any allocator, sizes worked out by hand from the constants of
CUDACachingAllocator.cpp, and the same rules written a second time, as plainly as can be."""

from __future__ import annotations

import itertools

import pytest
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

# A program: a size is a birth, None empties the cache, −n frees one of those alive. Sizes lie where the rules change:
# at 512 bytes, 1 MiB, 10 MiB, multiples of 2 MiB.
edges = st.builds(lambda size, more: max(1, size + more), st.sampled_from([0, 512, MIB, 2 * MIB, 10 * MIB, 11 * MIB]),
                  st.sampled_from([-513, -512, -1, 0, 1, 512, 513]))  # fmt: skip
sizes = st.one_of(edges, st.integers(1, 3 * MIB), st.integers(1, 48 * MIB))
programs = st.lists(st.one_of(sizes, sizes, sizes, st.integers(-8, -1), st.integers(-8, -1), st.none()), max_size=60)


def rounded(size: int) -> int:
    return max(MIN_BLOCK, -(-size // MIN_BLOCK) * MIN_BLOCK)


def act(allocator, alive: dict[int, int], number: int, what: int | None) -> None:
    """One step of a program. alive: number of each block that is alive -> the size that was asked for."""
    if what is None:
        allocator.empty_cache()
    elif what > 0:
        allocator.malloc(number, what)
        alive[number] = what
    elif alive:
        allocator.free(dead := list(alive)[-what % len(alive)])
        del alive[dead]


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
    allocator, alive = CachingAllocator(expandable=expandable), {}
    for number, what in enumerate(program):
        act(allocator, alive, number, what)
        check(allocator, alive)
    for number in alive:
        allocator.free(number)
    assert allocator.allocated == 0
    assert all(len(segment) == 1 and segment[0].free for segment in segments(allocator)), "all is whole again"
    allocator.empty_cache()
    assert allocator.reserved == 0 and not allocator.pieces and not any(allocator.pools.values())


class Plain:
    """The default allocator as lists of [size, number of the block in it or None], searched whole each time."""

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
        self.segments = [segment for segment in self.segments if any(number is not None for _, number in segment[1])]

    def total(self, used: bool) -> int:
        return sum(size for _, pieces in self.segments for size, number in pieces if number is not None or not used)


@given(programs)
@settings(max_examples=150)
def test_against_the_plain_allocator(program):
    """So it is also the same in each run: nothing in it depends on where Python puts its objects."""
    ours, plain, alive, same = CachingAllocator(), Plain(), {}, {}
    for number, what in enumerate(program):
        act(ours, alive, number, what)
        act(plain, same, number, what)
        assert (ours.reserved, ours.allocated) == (plain.total(used=False), plain.total(used=True))


# ---------------------------------------------------------------------------------------------------- a card's limit


@given(programs, st.integers(2, 80))
@settings(max_examples=150)
def test_a_limit(program, limit):
    """Never above it. An error only where, with nothing left to give back, there is no place for one more segment."""
    limit *= MIB
    endless, allocator, alive, all_alive = CachingAllocator(), CachingAllocator(limit), {}, {}
    for number, what in enumerate(program):
        act(endless, all_alive, number, what)
        try:
            act(allocator, alive, number, what)
        except OutOfMemory as error:
            new = Plain()
            new.malloc(number, what)
            assert allocator.reserved + new.total(used=False) > limit
            assert all(room < rounded(what) for room, _ in allocator.pools[rounded(what) <= SMALL])
            assert not any(len(segment) == 1 and segment[0].free for segment in segments(allocator))
            assert f"no place for {rounded(what):,} bytes" in str(error)
            break
        finally:
            check(allocator, alive)
            assert allocator.reserved <= allocator.peak_reserved <= limit
    assert (allocator.retries > 0) == (endless.peak_reserved > limit), "what fits without a limit fits with it"


# --------------------------------------------------------------------------------------------------- worked by hand

ORDINARY, EXPANDABLE = False, True


@pytest.mark.parametrize("asked, allocated, reserved", [
    ([1], 512, 2 * MIB),  # a block of 512 bytes, the rest of its 2 MiB stays free
    ([513], 1024, 2 * MIB),
    ([MIB], MIB, 2 * MIB),  # the largest small block
    ([MIB, MIB], 2 * MIB, 2 * MIB),  # two fill a segment
    ([MIB, MIB, 1], 2 * MIB + 512, 4 * MIB),
    ([MIB + 1], MIB + 512, 20 * MIB),  # the smallest large block
    ([MIB + 1, MIB], 2 * MIB + 512, 22 * MIB),  # which a small one does not share
    ([10 * MIB - 512], 10 * MIB - 512, 20 * MIB),  # the last that gets 20 MiB
    ([10 * MIB], 10 * MIB, 10 * MIB),  # from here on a segment of its own, a multiple of 2 MiB
    ([10 * MIB + 1], 10 * MIB + 512, 12 * MIB),  # 2 MiB − 512 are more than 1 MiB: cut off
    ([11 * MIB], 12 * MIB, 12 * MIB),  # 1 MiB is not more than 1 MiB: not cut off, and counted as allocated
    ([11 * MIB - 512], 11 * MIB - 512, 12 * MIB),  # 1 MiB + 512 are
    ([11 * MIB - 512, MIB + 512], 12 * MIB, 12 * MIB),  # and have room for a block
    ([9 * MIB, 9 * MIB], 18 * MIB, 20 * MIB),  # 11 left, then 2
    ([9 * MIB, 9 * MIB, 2 * MIB], 20 * MIB, 20 * MIB),
    ([9 * MIB, 9 * MIB, 2 * MIB + 1], 20 * MIB + 512, 40 * MIB),
    ([9 * MIB, 9 * MIB, MIB + 512], 20 * MIB, 20 * MIB),  # 1 MiB − 512 stay with it
])  # fmt: skip
def test_sizes(asked, allocated, reserved):
    allocator = CachingAllocator()
    for number, size in enumerate(asked):
        allocator.malloc(number, size)
    assert (allocator.allocated, allocator.reserved) == (allocated, reserved)


@pytest.mark.parametrize("expandable, reserved", [(ORDINARY, [24, 44]), (EXPANDABLE, [40, 40])])
def test_expandable_segments(expandable, reserved):
    """24 MiB are a segment of their own, or two steps of 20 MiB, whose last 16 have room for 12 more."""
    allocator, seen = CachingAllocator(expandable=expandable), []
    for number, size in enumerate([24, 9]):
        allocator.malloc(number, size * MIB)
        seen.append(allocator.reserved // MIB)
    assert seen == reserved


def test_the_smallest_hole_that_is_large_enough():
    """Holes of 6, 4 and 5 MiB between blocks of 1.5 in one segment: 4.5 MiB go into that of 5."""
    allocator = CachingAllocator()
    for number, size in enumerate([6, 1.5, 4, 1.5, 5, 1.5]):
        allocator.malloc(number, int(size * MIB))
    for number in (0, 2, 4):
        allocator.free(number)
    allocator.malloc(6, 9 * MIB // 2)
    assert allocator.used[6].before is allocator.used[3] and allocator.used[6].after is allocator.used[5]
    assert allocator.used[6].size == 5 * MIB, "half a MiB is not cut off"
    assert allocator.reserved == 20 * MIB


def test_neighbours_become_one():
    """Three blocks of 6 MiB of one segment of 20: free, each of them is too small for 12 MiB, but two are not."""
    allocator = CachingAllocator()
    for number in range(3):
        allocator.malloc(number, 6 * MIB)
    allocator.free(0)
    allocator.free(1)
    allocator.malloc(3, 12 * MIB)
    assert (allocator.allocated, allocator.reserved) == (18 * MIB, 20 * MIB)


def test_what_is_free_is_given_back_before_it_fails():
    """A card of 40 MiB: 20 and 20 are free, 30 fit once both are given back; then 12 do not."""
    allocator = CachingAllocator(40 * MIB)
    for number in range(2):
        allocator.malloc(number, 20 * MIB)
    for number in range(2):
        allocator.free(number)
    assert allocator.reserved == 40 * MIB
    allocator.malloc(2, 30 * MIB)
    assert (allocator.reserved, allocator.retries) == (30 * MIB, 1)
    with pytest.raises(OutOfMemory, match=f"no place for {12 * MIB:,} bytes.* of {40 * MIB:,}"):
        allocator.malloc(3, 12 * MIB)


# ------------------------------------------------------------------------------------------------------ whole programs


def written(acts) -> Tape:
    """A tape of ("+", name, MiB) and ("-", name)."""
    tape, numbers = Tape(), {}
    for sign, name, *size in acts:
        if sign == "+":
            numbers[name] = tape.alloc(Block(int(size[0] * MIB), "forward", "", ""))
        else:
            tape.free(numbers.pop(name))
    return tape


def steps(lengths: list[int], tensors: int = 4) -> Tape:
    """Steps that need `tensors` blocks of so many MiB each, one after the other."""
    return written(act for i, length in enumerate(lengths) for sign in "+-" for t in range(tensors)
                   for act in [(sign, (i, t), length) if sign == "+" else (sign, (i, t))])  # fmt: skip


def test_the_order_of_batches():
    """Each longer batch finds only holes that are too small. With segments that grow it does not matter."""
    lengths = [12, 16, 20, 24]
    growing = CachingAllocator().replay(steps(lengths))
    falling = CachingAllocator().replay(steps(lengths[::-1]))
    assert growing.peak_allocated == falling.peak_allocated == 4 * 24 * MIB
    assert growing.peak_reserved == 4 * sum(lengths) * MIB
    assert falling.peak_reserved == 4 * 24 * MIB
    for order in (lengths, lengths[::-1]):
        assert CachingAllocator(expandable=True).replay(steps(order)).peak_reserved == -(-4 * 24 // 20) * 20 * MIB


def test_a_cache_that_is_emptied_in_time():
    """torch.cuda.empty_cache() between a long and a longer batch: its place is used again."""
    tape = steps([30, 40])
    tape.emptied.append(len(tape.events) // 2)
    assert CachingAllocator().replay(tape).peak_reserved == 4 * 40 * MIB
    tape.emptied.clear()
    assert CachingAllocator().replay(tape).peak_reserved == 4 * (30 + 40) * MIB


def test_a_tape_is_replayed_to_its_peaks():
    tape = written([("+", "a", 3), ("+", "b", 0.25), ("-", "a"), ("+", "c", 0.5), ("-", "b")])
    allocator = CachingAllocator().replay(tape)
    assert (allocator.peak_allocated, allocator.allocated) == (int(3.25 * MIB), MIB // 2)
    assert allocator.peak_reserved == allocator.reserved == 22 * MIB
    with pytest.raises(OutOfMemory):
        CachingAllocator(21 * MIB).replay(tape)


def test_the_order_of_real_batches():
    """A training loop of batches that grow reserves more than the same batches, the longest first."""

    def loop(lengths):
        def step(model, batch, optimizer, mark):
            for length in lengths:
                mark("forward")
                loss = model(**{name: tensor[:, :length] for name, tensor in batch.items()}, use_cache=False).loss
                mark("backward")
                loss.backward()
                del loss
                mark("step")
                optimizer.step()
                optimizer.zero_grad()

        return step

    model, lengths = build("llama"), [500, 800, 1200, 1700]
    ask = dict(batch=8, tokens=max(lengths), targets="q_proj", r=2)
    growing, falling = (pl.vram.predict(model, "lora", step=loop(order), **ask) for order in (lengths, lengths[::-1]))
    assert growing.allocated == pytest.approx(falling.allocated, rel=1e-3)
    assert growing.reserved > 1.4 * falling.reserved > 1.4 * falling.allocated
    assert growing.again(expandable=True).reserved < 1.1 * growing.allocated

"""Exercises of 09_vram: the peak of a list of births and deaths, what torch reserves, the longest text that fits."""

from ._frame import exercise

LESSON = "09_vram"
MIB = 2**20


def _lives() -> list[tuple]:
    """A step of two layers; one that ends higher than it began; names that are used again; one birth."""
    step = [("weights", 400), ("a", 100), ("b", 250), ("a", None), ("c", 60), ("b", None), ("g", 90), ("c", None)]
    kept = [("weights", 400), ("x", 300), ("x", None), ("state", 200), ("x", 150), ("x", None)]
    again = [("x", 700), ("x", None), ("x", 90), ("y", 10), ("x", None), ("y", None)]
    return [(step,), (kept,), (again,), ([("x", 5)],)]


@exercise(LESSON, "keep a running sum of what is alive; the peak is the largest value that it ever has", _lives)
def peak_of(events):
    """Return the most bytes that were alive at once.

    events is a list of (name, bytes) for a tensor that is made, and (name, None) for one that is freed, in order.
    A name can be used again after it was freed.
    """
    alive, peak = {}, 0
    for name, size in events:
        if size is None:
            del alive[name]
        else:
            alive[name] = size
            peak = max(peak, sum(alive.values()))
    return peak


@peak_of.mistake("that is everything ever made: what was freed in between makes room again")
def _all_births(events):
    return sum(size for _, size in events if size is not None)


@peak_of.mistake("that is what is alive in the end; the peak was somewhere on the way")
def _the_end(events):
    alive = {}
    for name, size in events:
        alive[name] = size or 0
    return sum(alive.values())


@peak_of.mistake("that is the largest single tensor; many are alive at the same time")
def _largest(events):
    return max(size for _, size in events if size is not None)


@peak_of.mistake("a name may come again with another size, after it was freed: do not look its size up beforehand")
def _sizes_first(events):
    sizes = {name: size for name, size in events if size is not None}
    now = peak = 0
    for name, size in events:
        now += sizes[name] if size is not None else -sizes[name]
        peak = max(peak, now)
    return peak


def _requests() -> list[tuple]:
    """Both sides of each limit, and a logits tensor."""
    return [(1,), (512,), (MIB,), (MIB + 1,), (9 * MIB,), (10 * MIB - 512,), (10 * MIB,), (11 * MIB,), (1368064 * 512,)]


@exercise(LESSON, "three cases: up to 1 MiB, below 10 MiB, and the rest, rounded up to whole 2 MiB", _requests)
def segment(size):
    """Return the bytes that torch reserves for a first block of `size` bytes, when nothing is cached.

    Blocks are rounded up to 512 bytes. Up to 1 MiB, a segment of 2 MiB is reserved; below 10 MiB one of 20 MiB;
    from there on the size itself, rounded up to a multiple of 2 MiB.
    """
    size, mib = -(-size // 512) * 512, 2**20
    if size <= mib:
        return 2 * mib
    return 20 * mib if size < 10 * mib else -(-size // (2 * mib)) * 2 * mib


@segment.mistake("that is the block; torch takes memory from the card in larger segments and cuts blocks from them")
def _the_block(size):
    return -(-size // 512) * 512


@segment.mistake("round up, not down: the block has to find room in its segment")
def _down(size):
    return segment.reference(size) if size < 10 * MIB else size // (2 * MIB) * 2 * MIB


@segment.mistake("from 10 MiB on a segment is as large as its block, rounded up to 2 MiB")
def _always_20(size):
    return 2 * MIB if size <= MIB else 20 * MIB * -(-size // (20 * MIB))


@segment.mistake("between 1 and 10 MiB a whole segment of 20 MiB is taken: others of that size will fit in it too")
def _no_middle(size):
    return 2 * MIB if size <= MIB else -(-size // (2 * MIB)) * 2 * MIB


@segment.mistake("exactly 1 MiB still counts as small, and exactly 10 MiB no longer as middle")
def _borders(size):
    size = -(-size // 512) * 512
    if size < MIB:
        return 2 * MIB
    return 20 * MIB if size <= 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB


def _cards() -> list[tuple]:
    """24 GiB with an 8B model in 16 bits and in 4; one on which nothing fits; one where the batch is eight rows."""
    gib = 2**30
    return [
        (24 * gib, gib // 2, 15 * gib, 5 * MIB, 1), (24 * gib, gib // 2, 6 * gib, 5 * MIB, 1),
        (8 * gib, gib // 2, 15 * gib, 5 * MIB, 1), (24 * gib, gib // 2, 15 * gib, 5 * MIB, 8),
    ]  # fmt: skip


@exercise(LESSON, "what is left of the card, divided by what one more token of each row takes; round down", _cards)
def longest_text(card, context, fixed, per_token, batch):
    """Return how many tokens a row can have at most, as a multiple of 64; 0 if none fits.

    card: bytes of the card. context: bytes that the CUDA context takes of it. fixed: bytes that do not depend on the
    text. per_token: bytes that each token of each row takes. batch: rows.
    """
    left = card - context - fixed
    return max(0, left // (per_token * batch) // 64 * 64)


@longest_text.mistake("each of the rows has that many tokens: divide by the batch too")
def _one_row(card, context, fixed, per_token, batch):
    return longest_text.reference(card, context, fixed, per_token, 1)


@longest_text.mistake("the CUDA context takes its part of the card, though no tensor is in it")
def _no_context(card, context, fixed, per_token, batch):
    return longest_text.reference(card, 0, fixed, per_token, batch)


@longest_text.mistake("it must fit: round down to a multiple of 64, not up")
def _up(card, context, fixed, per_token, batch):
    left = card - context - fixed
    return max(0, -(-(left // (per_token * batch)) // 64) * 64)


@longest_text.mistake("where the fixed part does not fit, no text does: 0, not a negative length")
def _negative(card, context, fixed, per_token, batch):
    return (card - context - fixed) // (per_token * batch) // 64 * 64


@longest_text.mistake("weights and optimizer states are there whatever the text: take the fixed part off first")
def _no_fixed(card, context, fixed, per_token, batch):
    return longest_text.reference(card, context, 0, per_token, batch)

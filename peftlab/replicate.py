"""A deeper model of the blocks it has: some come several times, and share their weights. arXiv:2312.15166."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from .attach import hosts
from .baselines import stacks
from .hyper import fits
from .sites import bare, put, sites

Ranges = Sequence[tuple[int, int]]  # (first, one after the last)
INDEX = ("layer_idx", "layer_id")  # where a block's parts keep its number, their place in the cache


def replicate_layers(model: nn.Module, ranges: Ranges) -> nn.Module:
    """Layer replication: a deeper model, in which blocks come several times and share their weights.

    The blocks of the ranges follow each other: of [(0, 4), (2, 6)] come blocks 0 1 2 3 2 3 4 5. SOLAR makes a deeper
    model like this, from copies, and trains all of it on. Here, as in HF PEFT, the appearances of a block share its
    frozen weights, so the model takes no more memory; each has adapters of its own, which make them differ. A pass
    takes the time, and the cache the memory, of all blocks. Ranges may leave blocks out, too.

    Do it before the first adapter is attached. Saved adapters name the ranges (`layer_replication`, which HF PEFT reads
    for LoRA alone), and `load_adapter` repeats the blocks of a model as it came. The config's depth follows, and its
    lists with an entry a block, which HF PEFT leaves short. Quantise before; to merge or export, `untie_layers` first.
    Raises ValueError with the model as it was: no ranges, blocks that are not there, an adapter attached, no list of
    blocks or two of them (an encoder and a decoder). Returns the model.
    Source: Kim et al. 2023, arXiv:2312.15166, section 2.
    """
    _restack(model, ranges)
    return model


def untie_layers(model: nn.Module) -> nn.Module:
    """Give each appearance of a block weights of its own, as in SOLAR, so that adapters can be merged into them.

    HF PEFT merges the adapters of all appearances into the one shared weight, and so computes something else.
    Nothing changes in what the model computes, nor in its adapters' files. Returns the model.
    """
    seen: set[int] = set()
    for block in _replicated(model):
        here: dict[int, Any] = {}  # what two parts of one block share, they share on
        for part in block.modules():
            for tensors in (part._parameters, part._buffers):
                for name, t in tensors.items():
                    if t is not None:
                        tensors[name] = here.setdefault(id(t), copy.deepcopy(t) if id(t) in seen else t)
        seen |= {id(t) for t in here.values()}
    return model


def check_untied(model: nn.Module) -> None:
    """ValueError if appearances of a block share weights: a file of the whole model would hold them once."""
    holders = [{id(p) for p in block.parameters()} for block in _replicated(model)]
    if sum(map(len, holders)) > len(set().union(*holders)):
        raise ValueError("blocks of this model appear several times and share weights, which a file of the whole model "
                         "cannot say; untie_layers(model) first")  # fmt: skip


def replication(model: nn.Module) -> list[list[int]]:
    """The ranges of a model's blocks, as files have them; empty if they are as they came."""
    return _joined((i, i + 1) for i in _order(model))


@contextmanager
def replicated_as_saved(model: nn.Module, ranges: Any) -> Iterator[None]:
    """The block runs on a model whose blocks are repeated as an adapter's file says; after an error it is as it was."""
    there, wanted = replication(model), _joined(_pairs(ranges or []))
    undo = _nothing
    if there != wanted:
        if there or not wanted or hosts(model):
            raise ValueError(f"the adapter's model has the blocks {wanted or 'as they came'}, and this one has them "
                             f"{there or 'as they came'}{', with adapters on them' if hosts(model) else ''}; load it "
                             "into a model of its own, as it came")  # fmt: skip
        undo = _restack(model, ranges)
    try:
        yield
    except BaseException:
        undo()
        raise


def _restack(model: nn.Module, ranges: Ranges) -> Callable[[], None]:
    """Do it; what is returned undoes it."""
    path, blocks = _blocks(model)
    pairs = _pairs(ranges)
    if not pairs:
        raise ValueError(f"ranges={ranges!r} name no block; give pairs (first, one after the last)")
    if not all(0 <= first < last <= len(blocks) for first, last in pairs):
        raise ValueError(f"ranges={ranges!r} reach beyond the blocks of {type(model).__name__}, which are 0 to "
                         f"{len(blocks) - 1}")  # fmt: skip
    order = [i for first, last in pairs for i in range(first, last)]
    stack = nn.ModuleList(_numbered(_shell(blocks[i]), n) for n, i in enumerate(order))
    stack.training = blocks.training
    came = getattr(blocks, "replicated", range(len(blocks)))
    stack.replicated = [came[i] for i in order]
    config = getattr(model.get_submodule(path.rpartition(".")[0]), "config", getattr(model, "config", None))
    before = {} if config is None else _per_block(config, len(blocks))

    def place(blocks: nn.ModuleList, settings: dict[str, Any]) -> None:
        put(model, path, blocks)
        for name, value in settings.items():
            setattr(config, name, value)

    try:
        place(stack, {name: [value[i] for i in order] if isinstance(value, list) else len(order)
                      for name, value in before.items()})  # fmt: skip
    except BaseException:  # a config that checks what is set
        place(blocks, before)
        raise
    return lambda: place(blocks, before)


def _blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(path, list) of the model's blocks."""
    if hosts(model):
        raise ValueError("adapters are attached to this model's blocks already; replicate them before")
    found = stacks(model)
    if len(found) != 1:
        raise ValueError(f"{type(model).__name__} has {len(found)} lists of equal blocks ({', '.join(found) or 'none'})"
                         ": which block follows which is clear if there is one")  # fmt: skip
    return next(iter(found.items()))


def _shell(block: nn.Module) -> nn.Module:
    """The block once more, of new modules, with the very same parameters, buffers and configs."""
    kept = [t for part in block.modules() for t in (*part._parameters.values(), *part._buffers.values())]
    kept += [part.config for part in block.modules() if hasattr(part, "config")]
    return copy.deepcopy(block, {id(t): t for t in kept if t is not None})


def _numbered(block: nn.Module, n: int) -> nn.Module:
    for part in block.modules():
        for name in INDEX:
            if hasattr(part, name):
                setattr(part, name, n)
    return block


def _per_block(config: Any, n: int) -> dict[str, Any]:
    """A config's depth, n, and its lists with an entry for each block, such as layer_types."""
    lists = {name: list(value) for name, value in vars(config).items()
             if "layer" in name and isinstance(value, list | tuple) and len(value) == n}  # fmt: skip
    return {"num_hidden_layers": n, **lists} if getattr(config, "num_hidden_layers", None) == n else lists


def _pairs(ranges: Any) -> list[tuple[int, int]]:
    """The ranges; ValueError if these are none."""
    try:
        pairs = [(first, last) for first, last in ranges]
    except (TypeError, ValueError):
        pairs = [(None, None)]
    if not all(fits(number, int) for pair in pairs for number in pair):
        raise ValueError(f"ranges={ranges!r} are no pairs (first, one after the last)")
    for first, last in pairs:
        if first >= last:
            raise ValueError(f"the range ({first}, {last}) is empty; a range is (first, one after the last)")
    return pairs


def _replicated(model: nn.Module) -> nn.ModuleList:
    """The blocks, if they are repeated; else none."""
    lists = (site for site in map(bare, sites(model).values()) if isinstance(site, nn.ModuleList))  # not in adapters
    return next((blocks for blocks in lists if getattr(blocks, "replicated", None)), nn.ModuleList())


def _order(model: nn.Module) -> list[int]:
    """Which of the blocks as they came stands at each place; empty if they are as they came."""
    return getattr(_replicated(model), "replicated", [])


def _joined(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """The same as ranges that are as long as can be."""
    runs: list[list[int]] = []
    for first, last in pairs:
        if runs and first == runs[-1][1]:
            runs[-1][1] = last
        else:
            runs.append([first, last])
    return runs


def _nothing() -> None:
    """Undoes nothing."""

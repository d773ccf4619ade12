"""A few of many adapters attached to one base at a time; the one used longest ago makes room."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from .attach import adapters, detach, hosts, switch_of, using
from .files import load_adapter

if TYPE_CHECKING:
    from .store import Entry, Store


@dataclass(frozen=True)
class Statistics:
    """What a cache did since it was made."""

    hits: int = 0  # needed, and attached already
    misses: int = 0  # needed, and read from the store
    evictions: int = 0  # detached or overwritten to make room
    in_place: int = 0  # of the misses: values copied over those of an adapter of the same layout


class Cache:
    """The adapters of a store that are attached to a model just now, under their own names.

    capacity: how many at most. max_bytes: how many bytes of their parameters at most (float32), or None.
    Never evicted: what is needed in the same call, pinned, active, or needed by another adapter. Adapters that were
    attached by other means are used as they are and not counted. For one thread; the model must not run meanwhile.
    """

    def __init__(self, model: nn.Module, store: Store, capacity: int = 16, max_bytes: int | None = None):
        if capacity < 1:
            raise ValueError(f"capacity={capacity}: a cache holds at least one adapter")
        self.model, self.store, self.capacity, self.max_bytes = model, store, capacity, max_bytes
        self.statistics = Statistics()
        self.pinned: set[str] = set()
        self._held: dict[str, Entry] = {}  # used longest ago first

    @property
    def names(self) -> list[str]:
        """What the cache has attached, used longest ago first."""
        return list(self._held)

    @property
    def bytes(self) -> int:
        """Of the parameters that the cache has attached."""
        return _bytes(self._held.values())

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def need(self, *names: str) -> None:
        """Attach the present version of these adapters. What is active stays active.

        Raises LookupError (not in the store) or ValueError (more than fit at once) before anything is changed. If a
        file cannot be loaded, its adapter is not attached; the others are as they were, or newly attached.
        """
        wanted = {name: self.store.info(name) for name in self._of_the_store(names)}
        if all(self._present(entry) for entry in wanted.values()):  # without a look at the model: microseconds
            return self._used(wanted)
        busy = {name: self._held[name] for name in self.pinned | _in_use(self.model) if name in self._held}
        together = {**busy, **wanted}
        if not self._fit(together.values()):
            limit = f"{self.capacity} adapters" + ("" if self.max_bytes is None else f" and {self.max_bytes:,} bytes")
            raise ValueError(f"{len(together)} adapters of {_bytes(together.values()):,} bytes are needed or in use at "
                             f"once, and the cache holds {limit}; need fewer at a time, or enlarge it")  # fmt: skip
        with _active_kept(self.model):
            for name, entry in wanted.items():  # first, so that no old version stands in the way of a new one
                if name in self._held and self._held[name].layout != entry.layout:
                    self._drop(name)
            for name, entry in wanted.items():
                if self._present(entry):
                    self._used([name])
                else:
                    self._load(entry, together)

    def _of_the_store(self, names: Iterable[str]) -> list[str]:
        """Each name once, without those that were attached by other means."""
        different = dict.fromkeys(names)
        others = set() if different.keys() <= self._held.keys() else set(adapters(self.model)) - set(self._held)
        return [name for name in different if name not in others]

    def _present(self, entry: Entry) -> bool:
        held = self._held.get(entry.name)
        return held is not None and (held.version, held.sha256) == (entry.version, entry.sha256)

    def _used(self, names: Iterable[str]) -> None:
        for name in names:
            self._held[name] = self._held.pop(name)  # now the one used last
            self._count(hits=1)

    @contextlib.contextmanager
    def using(self, *names: str, rows: Sequence[str | None] | None = None) -> Iterator[nn.Module]:
        """`pl.using` for adapters of the store: they are attached first, and run inside the block."""
        self.need(*names, *(row for row in rows or () if row is not None))
        with using(self.model, *names, rows=rows) as model:
            yield model

    def pin(self, *names: str) -> None:
        """Attach these and keep them until `unpin`."""
        before = set(self.pinned)
        self.pinned |= set(names)
        try:
            self.need(*names)
        except BaseException:
            self.pinned = before
            raise

    def unpin(self, *names: str) -> None:
        self.pinned -= set(names)

    def clear(self) -> None:
        """Detach all that the cache attached, pinned ones too."""
        self.pinned.clear()
        for name in self.names:
            self._drop(name)

    def _fit(self, entries: Collection[Entry]) -> bool:
        return len(entries) <= self.capacity and (self.max_bytes is None or _bytes(entries) <= self.max_bytes)

    def _load(self, entry: Entry, keep: Collection[str]) -> None:
        """Attach one adapter: over its own old version, over an evicted one of the same layout, or as a new one."""
        self._count(misses=1)
        while not self._fit({**self._held, entry.name: entry}.values()):
            oldest = next(name for name in self._held if name not in keep)
            self._count(evictions=1)
            if entry.name not in self._held and self._held[oldest].layout == entry.layout:
                _rename(self.model, oldest, entry.name)
                self._held[entry.name] = self._held.pop(oldest)
            else:
                self._drop(oldest)
        in_place = entry.name in self._held
        try:
            try:
                load_adapter(self.model, self.store.path(entry.name), entry.name)
            except FileNotFoundError:  # a newer version came, and `clean` took this one, in this very moment
                load_adapter(self.model, self.store.path(entry.name), entry.name)
        except BaseException:
            if in_place:
                self._drop(entry.name)  # it has the values of another one, or of its old version
            raise
        self._count(in_place=in_place)
        self._held.pop(entry.name, None)
        self._held[entry.name] = entry

    def _drop(self, name: str) -> None:
        detach(self.model, name)
        del self._held[name]

    def _count(self, **more: int) -> None:
        now = asdict(self.statistics)
        self.statistics = replace(self.statistics, **{key: now[key] + value for key, value in more.items()})


def _bytes(entries: Iterable[Entry]) -> int:
    return sum(4 * entry.parameters for entry in entries)  # attached in float32, whatever the file holds


def _in_use(model: nn.Module) -> set[str | None]:
    """Adapters that run now, in the whole batch or in some rows, and those that another attached one needs."""
    if not hosts(model):
        return set()
    switch = switch_of(model)
    needed = (name for found in adapters(model).values() for adapter in found.values() for name in adapter.needs)
    return {*switch.active, *(switch.rows.names if switch.rows else ()), *needed}


def _rename(model: nn.Module, old: str, new: str) -> None:
    for host in hosts(model).values():
        if old in host.adapters:
            host.adapters[new] = host.adapters.pop(old)


@contextlib.contextmanager
def _active_kept(model: nn.Module) -> Iterator[None]:
    """Loading makes an adapter the active one, and detaching ends a mixed batch: put back what was set before."""
    before = (switch_of(model).active, switch_of(model).rows) if hosts(model) else ((), None)
    try:
        yield
    finally:
        if hosts(model):
            switch, there = switch_of(model), {None, *adapters(model)}
            switch.active = tuple(name for name in before[0] if name in there)
            switch.rows = before[1] if before[1] is not None and set(before[1].names) <= there else None

"""One thread that owns a model: requests from anywhere wait in a queue, and are decoded in batches of mixed adapters.

Requests that come while a batch runs wait for the next one. A batch takes the rows that wait longest, as many as
`max_batch`, with no more different adapters than the cache can hold; those come from the store before it starts.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .attach import adapters
from .serve import Request, Token, check, decode
from .store import BASE, Store


class Full(RuntimeError):
    """As many rows wait as may wait: try again later."""


class Stopping(RuntimeError):
    """The engine takes no more requests: it ends when those that wait are done."""


class Broken(RuntimeError):
    """An adapter of the store cannot be loaded, or the model failed: not the request's fault."""


@dataclass(eq=False)
class Job:
    """Rows that were asked for together.

    tell: called in the engine's thread with (row, token) for each token, or once with (-1, error) instead of the rest.
    cancelled: set it when nobody waits for the answer any more.
    """

    requests: Sequence[Request]
    tell: Callable[[int, Token | Exception], None]
    cancelled: bool = False

    def fail(self, error: Exception) -> None:
        if not self.cancelled:
            self.cancelled = True
            self.tell(-1, error)


class Engine:
    """Decodes jobs until it is stopped. After `start` nobody else may touch the model.

    capacity: how many adapters of the store are attached at once. max_batch: rows decoded together. max_queue: rows
    that may wait. Adapters that are attached already are served too.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, store: Store | None = None, *, capacity: int = 16, max_batch: int = 16,
        max_queue: int = 256,
    ):  # fmt: skip
        self.own = tuple(adapters(model))
        both = sorted(set(self.own) & set(store or ())) or [name for name in self.own if name.lower() == BASE]
        if both:
            other = "the model without an adapter" if both[0].lower() == BASE else "one in the store"
            raise ValueError(f"an attached adapter and {other} are both called {both[0]!r}; detach or rename it")
        for name, number in (("max_batch", max_batch), ("max_queue", max_queue)):
            if number < 1:
                raise ValueError(f"{name}={number}: at least one row")
        self.model, self.tokenizer, self.store = model, tokenizer, store
        self.cache = None if store is None else store.cache(model, capacity)
        self.max_batch, self.max_queue = max_batch, max_queue
        self.finished = 0  # rows
        self.running: list[tuple[Job, int]] = []
        self.stopping = False
        self._waiting: deque[tuple[Job, int]] = deque()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="peftlab engine", daemon=True)

    def names(self) -> list[str]:
        """All adapters that can be asked for: attached ones and those of the store, as of now."""
        return [*self.own, *(self.store or ())]

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        with self._changed:
            return not self._waiting and not self.running

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put all rows of a job into the queue, or none. Raises Stopping, Full, or ValueError if it can never fit."""
        with self._changed:
            if self.stopping:
                raise Stopping("the server is shutting down")
            if len(job.requests) > self.max_queue:
                raise ValueError(f"{len(job.requests)} rows in one request; at most {self.max_queue} can wait")
            if len(self._waiting) + len(job.requests) > self.max_queue:
                raise Full(f"{len(self._waiting)} rows are waiting, at most {self.max_queue} may; try again later")
            self._waiting.extend((job, row) for row in range(len(job.requests)))
            self._changed.notify_all()

    def stop(self, *, now: bool = False) -> None:
        """Take no more jobs; finish those there are, or with `now` cancel them. See `join`."""
        with self._changed:
            self.stopping = True
            for job, _ in [*self._waiting, *self.running] if now else ():
                job.fail(Stopping("the server was stopped before this answer was finished"))
            self._changed.notify_all()

    def join(self) -> None:
        """Wait until the last job is done and the thread has ended."""
        if self._thread.ident is not None:
            self._thread.join()

    # in the thread

    def _work(self) -> None:
        while self._take():
            try:
                self._decode(self._ready(self.running))
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                failed = Broken(f"the model failed on this batch ({type(error).__name__}); the server's log says more")
                for job, _ in self.running:
                    job.fail(failed)
            with self._changed:
                self.finished += len(self.running)
                self.running = []

    def _take(self) -> bool:
        """Move the next batch from the queue to `running`; False when there will be none any more."""
        with self._changed:
            while not self.running:
                self._changed.wait_for(lambda: self._waiting or self.stopping)
                if not self._waiting:
                    return False
                left: deque[tuple[Job, int]] = deque()
                names: set[str | None] = set()
                for job, row in self._waiting:
                    if job.cancelled:
                        continue
                    more = {job.requests[row].adapter} - {None, *self.own}
                    if len(self.running) < self.max_batch and self._fit(names | more):
                        self.running.append((job, row))
                        names |= more
                    else:
                        left.append((job, row))
                self._waiting = left
        return True

    def _fit(self, names: set[str | None]) -> bool:
        return self.cache is None or len(names) <= self.cache.capacity

    def _ready(self, rows: list[tuple[Job, int]]) -> list[tuple[Job, int]]:
        """The rows that can be decoded, with their adapters attached; the jobs of the others are told why not."""
        names = dict.fromkeys(job.requests[row].adapter for job, row in rows)
        wanted = [name for name in names if name is not None and name not in self.own]
        wrong = self._attach(wanted)
        for job, row in rows:
            try:
                if (name := job.requests[row].adapter) in wrong:
                    raise wrong[name]
                check(self.model, self.tokenizer, job.requests[row])
            except (ValueError, LookupError, Broken) as error:
                job.fail(error)
        return [(job, row) for job, row in rows if not job.cancelled]

    def _attach(self, names: list[str]) -> dict[str | None, Exception]:
        """Have these adapters in the cache, all at once; {name: what is wrong with it}."""
        wrong: dict[str | None, Exception] = {}
        while names and self.cache is not None:
            try:
                self.cache.need(*names)
                break
            except LookupError as error:  # removed since it was asked for
                gone = [name for name in names if name not in self.cache.store] or names
                wrong |= dict.fromkeys(gone, error)
            except (ValueError, OSError):
                traceback.print_exc(file=sys.stderr)
                gone = [next((name for name in names if name not in self.cache), names[0])]
                wrong[gone[0]] = Broken(f"adapter {gone[0]!r} cannot be loaded; the server's log says why")
            names = [name for name in names if name not in gone]
        return wrong

    def _decode(self, rows: list[tuple[Job, int]]) -> None:
        requests = [job.requests[row] for job, row in rows]
        for token in decode(self.model, self.tokenizer, requests, lambda i: rows[i][0].cancelled) if rows else ():
            job, row = rows[token.row]
            if not job.cancelled:
                job.tell(row, token)

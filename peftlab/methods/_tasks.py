"""What methods with several tasks share: where the model's call says which. Ponti et al. 2022, arXiv:2202.13914."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..core import Adapter
from ..sites import group


class Box:
    """What one part of an adapter learns in a pass and its other parts use: one object for all of them."""

    ids: Tensor | None = None  # (B,): the task of each row


class TaskIds(Adapter):
    """Takes `task_ids` out of the model's call, for the layers below. Nothing is trained; a part of Poly."""

    targets, mixes, part_of = "decoder", False, "Poly"

    def __init__(self, layer: nn.Module):
        super().__init__(layer)
        self.__dict__["now"] = Box()

    def expected(self) -> int:
        return 0

    def forward(self, f, *args, task_ids: Tensor | None = None, **inputs):
        self.now.ids = task_ids  # kept after the pass: gradient checkpointing runs the layers again
        return f(*args, **inputs)


def plan_tasks(method: type[Adapter], model: nn.Module, paths: Sequence[str], hyper: dict) -> dict[str, Any]:
    """{path: (method, hyper)}, and the place where `task_ids` come in, if it is known."""
    try:
        inner = group(model, "decoder")
    except ValueError:
        inner = []
    return {path: (TaskIds, {}) for path in inner} | {path: (method, hyper) for path in paths}


def share_box(made: Mapping[str, Any]) -> None:
    """All parts look into one box."""
    for adapter in made.values():
        adapter.__dict__["now"] = next(iter(made.values())).now


def set_task(model: nn.Module, task: int, name: str | None = None) -> None:
    """Make `task` the one of every row in the calls to come, in all adapters that have tasks, or in the named one."""
    from ..attach import adapters

    there = adapters(model)
    found: list[Any] = [a for n in there if name in (None, n) for a in there[n].values() if hasattr(a, "task")]
    if not found:
        raise ValueError("no adapter with tasks is attached" if name is None else f"{name!r} has no tasks")
    for adapter in found:
        adapter.task = checked_task(task, adapter.hyper["tasks"])


def checked_task(task: int | None, tasks: int) -> int:
    """The number of a task; ValueError for none, or one that does not exist."""
    if task is None:
        raise ValueError(f"which of the {tasks} tasks? Set the adapters' attribute `task` (set_task does), or "
                         "call the model with task_ids=, one number a row")  # fmt: skip
    if not 0 <= task < tasks:
        raise ValueError(f"task {task} is not in 0…{tasks - 1}")
    return task

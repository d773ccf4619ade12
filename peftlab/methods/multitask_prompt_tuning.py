"""Multitask prompt tuning: a prompt that each task scales in its own way. Wang et al. 2023, arXiv:2303.02861."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..prompts import embedding_of, plan_prompt, with_prompt
from .prompt_tuning import start


class MultitaskPromptTuning(Adapter):
    """Multitask prompt tuning: the tasks share a prompt P; a task's own prompt is P times a low-rank matrix of its own.

    h = f([P_t; E(x)]), P_t = P ⊙ (u_t·v_tᵀ), with P (k, d), u_t (k, r) and v_t (r, d) from N(0, 0.02²).
    Which task: the attribute `task` (a number), or one number a row as `task_ids` (B,) of the model's call, which
    `generate` does not pass on.

    k, init: as in `PromptTuning`. tasks: how many. rank: r, 1 in the paper.
    Trained: k·d + tasks·(k·r + r·d). Raises ValueError for another site, a number out of range, or an unnamed task.
    Source: Wang et al. 2023, arXiv:2303.02861, section 3.1.
    """

    family = "soft prompt"
    targets, mixes = "decoder", False
    hf_type = "MULTITASK_PROMPT_TUNING"
    hf_hyper = {"k": "num_virtual_tokens", "tasks": "num_tasks", "rank": "num_ranks"}
    hf_params = {"prompt": "prompt_embeddings", "u": "prefix_task_cols", "v": "prefix_task_rows"}

    def __init__(
        self, layer: nn.Module, k: int = 20, init: str | list[int] = "vocabulary", tasks: int = 1, rank: int = 1
    ):
        super().__init__(layer)
        d = embedding_of(layer).embedding_dim
        if tasks < 1 or not 1 <= rank <= min(k, d):
            raise ValueError(f"tasks={tasks}, rank={rank}: take at least one task and a rank in 1…{min(k, d)}")
        self.prompt = nn.Parameter(start(embedding_of(layer), k, init))
        self.u = nn.Parameter(0.02 * torch.randn(tasks, k, rank))
        self.v = nn.Parameter(0.02 * torch.randn(tasks, rank, d))
        self.task: int | None = 0 if tasks == 1 else None

    @classmethod
    def plan(cls, model, paths, hyper):
        return plan_prompt(cls, model, paths, hyper)

    def expected(self) -> int:
        """k·d + tasks·(k·r + r·d)"""
        k, d, r = self.hyper["k"], embedding_of(self.layer).embedding_dim, self.hyper["rank"]
        return k * d + self.hyper["tasks"] * (k * r + r * d)

    def forward(self, f, input_ids: Tensor | None = None, task_ids: Tensor | None = None, **inputs):
        tasks, t = len(self.u), self.task if task_ids is None else task_ids
        if t is None:
            raise ValueError(f"which of the {tasks} tasks? Set the adapter's attribute `task`, or call the model with "
                             "task_ids=, one number a row")  # fmt: skip
        if isinstance(t, int) and not 0 <= t < tasks:
            raise ValueError(f"task {t} is not in 0…{tasks - 1}")
        return with_prompt(self.layer, f, self.prompt * (self.u[t] @ self.v[t]), input_ids, **inputs)

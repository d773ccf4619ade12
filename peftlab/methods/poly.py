"""Polytropon and multi-head routing: tasks share an inventory of skills. Ponti et al. 2022, arXiv:2202.13914."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of
from ._tasks import Box, checked_task, plan_tasks, set_task, share_box  # noqa: F401  set_task: for users


class Poly(Adapter):
    """Polytropon: every layer has several LoRAs, skills, and learns which of them each task needs.

    h = W₀x + (1/r)·B_t·A_t·x, A_t = Σₛ α_ts·Aₛ and B_t = Σₛ α_ts·Bₛ, with α_t = σ(z_t) / Σₛ σ(z_ts) for task t. While
    training, σ(z) is drawn: σ(z + log u − log(1 − u)), u uniform in 0…1 (a relaxed Bernoulli). With `splits` > 1 the
    inputs and the outputs are cut into as many blocks with an α each: multi-head routing. B = 0: starts at the base.

    Which task: the attribute `task` of each adapter (`set_task` sets all), or one number a row as `task_ids`
    (B,) of the model's call, which `generate` does not pass on. One task's change is a LoRA's, but it is not merged.
    r: rank of a skill. tasks, skills, splits: how many.
    Trained: skills·r·(in + out) + tasks·splits·skills. Raises ValueError for splits that do not divide, or no task.
    Source: Ponti et al. 2022, arXiv:2202.13914; splits: Caccia et al. 2022, arXiv:2211.03831.
    """

    hf_type, family, mixes = "POLY", "mixture", False
    hf_hyper = {"r": "r", "tasks": "n_tasks", "skills": "n_skills", "splits": "n_splits"}
    hf_params, hf_ignored = {"module_logits": "poly_router.module_logits"}, frozenset({"poly_type"})  # it has one

    def __init__(self, layer: nn.Module, r: int = 8, tasks: int = 1, skills: int = 4, splits: int = 1):
        super().__init__(layer)
        out_features, in_features = shape_of(layer)
        if min(r, tasks, skills, splits) < 1 or in_features % splits or out_features % splits:
            raise ValueError(f"r={r}, tasks={tasks}, skills={skills}, splits={splits}: take at least 1 each, splits "
                             f"that divide the layer's {out_features}×{in_features}")  # fmt: skip
        bound = math.sqrt(splits / in_features)  # as nn.Linear with in/splits inputs
        A = torch.empty(splits, skills, in_features // splits, r).uniform_(-bound, bound)
        self.poly_lora_A = nn.Parameter(A)
        self.poly_lora_B = nn.Parameter(torch.zeros(splits, skills, r, out_features // splits))
        self.module_logits = nn.Parameter(torch.empty(tasks, splits * skills).uniform_(-1e-3, 1e-3))  # z
        self.task: int | None = 0 if tasks == 1 else None
        self.__dict__["now"] = Box()

    @classmethod
    def plan(cls, model, paths, hyper):
        return plan_tasks(cls, model, paths, hyper)

    @classmethod
    def share(cls, made):
        share_box(made)

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 8, tasks: int = 1, skills: int = 4, splits: int = 1, **_):
        """skills·r·(in + out) + tasks·splits·skills"""
        return skills * r * (in_features + out_features) + tasks * splits * skills

    def mixtures(self, tasks: Tensor) -> tuple[Tensor, Tensor]:
        """A_t (N, in, r) and B_t (N, r, out) of N tasks."""
        z = self.module_logits[tasks].view(-1, *self.poly_lora_A.shape[:2])
        if self.training:
            u = torch.rand_like(z).clamp(1e-6, 1 - 1e-6)
            z = z + u.log() - (-u).log1p()
        a = torch.sigmoid(z) / (torch.sigmoid(z).sum(-1, keepdim=True) + 1e-12)
        A = torch.einsum("nqs,qsir->nqir", a, self.poly_lora_A).flatten(1, 2)
        return A, torch.einsum("nqs,qsro->nrqo", a, self.poly_lora_B).flatten(2)

    def delta(self, x: Tensor) -> Tensor:  # (B, ..., in) -> (B, ..., out)
        ids = self.now.ids
        if ids is None:
            ids = torch.full((1,), checked_task(self.task, len(self.module_logits)), device=x.device)
        elif len(ids) != len(x):
            raise ValueError(f"{len(ids)} task_ids for {len(x)} rows: one number for each row that reaches the layer")
        A, B = self.mixtures(ids)
        change = x @ A[0] @ B[0] if len(ids) == 1 else torch.einsum("n...i,nir,nro->n...o", x, A, B)
        return change / A.shape[-1]

"""What can be done against forgetting, besides a lower learning rate: each in a few lines, for any method.

    rows = rehearse(sql["train"], old, share=0.05)                      # mix in some of what the base was trained on
    pl.train(model, rows, tokenizer, optimizer=decay_to_start(lr, 10))  # pull every trained parameter back to its start
    pl.train(model, sql["train"], tokenizer, penalty=KLToBase(…))       # stay close to what the base would say
    interpolate(model, start, 0.5)                                      # WiSE-FT: half of the way back, after training
    rescale(model, "sql", 0.5)                                          # the same for a LoRA, by its scale

And one that costs nothing: an adapter is switched off for every request that does not need it (`pl.using(model)`), and
the model is the base, bit for bit. None of the others can promise that.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attach import adapters, hosts, using
from .rows import collate, encode
from .runtime import mode
from .texts import filler

# --------------------------------------------------------------------------------------------------- rehearsal


def rehearse(rows: Sequence[Mapping], old: Sequence[str], share: float, seed: int = 0) -> list[dict]:
    """The task's rows with texts of the base's own training mixed in, so that `share` of all rows are old ones.

    rows: with prompt and completion. An old text is learned whole: its prompt is empty. Texts are drawn without
    repetition while there are enough. The order of the rows is left to the training loop, which shuffles them.
    Raises ValueError for a share outside of 0 ≤ share < 1 or if there is no old text to draw.
    Source: Robins 1995, "Catastrophic forgetting, rehearsal and pseudorehearsal", Connection Science 7.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share={share!r} is not in 0 ≤ share < 1: 0.05 makes one row of twenty an old one")
    n = round(len(rows) * share / (1 - share))
    if n and not old:
        raise ValueError("there is no old text to rehearse")
    draw, drawn = random.Random(seed), list[str]()
    while len(drawn) < n:
        drawn += draw.sample(list(old), min(len(old), n - len(drawn)))
    new = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
    return new + [{"prompt": "", "completion": text} for text in drawn]


def old_texts(n: int, seed: int = 0) -> list[str]:
    """n pieces of what the embedded base was trained on: half of them the invented world (facts, biographies, skills),
    a quarter documentation, a quarter code. The held-out twentieth is not in it."""
    from .base.text import standard_library
    from .tasks import world

    rng, library, people = random.Random(seed), standard_library(), world.people()
    found = [world.document(rng, people) for _ in range(n - n // 2)]
    for kind, share in (("docs", n // 4), ("code", n // 2 - n // 4)):
        for text in rng.choices(library[kind], k=share):
            at = rng.randrange(max(1, len(text) - 400))
            found.append(text[at : at + 400])
    return found


# -------------------------------------------------------------------------------------------------------- decay


class DecayToStart(torch.optim.AdamW):
    """AdamW that also pulls each parameter to where it began: θ ← θ − η·λ·(θ − θ₀), beside Adam's own step.

    Full fine-tuning begins at the base, so this is a decay towards the base; ordinary weight decay pulls to 0, where
    there is no model. An adapter begins where it changes nothing (B = 0 in LoRA), so for it the base is the start too.
    λ = `decay`; one copy of the trained parameters is kept.
    Source: Li, Grandvalet and Davoine 2018, "Explicit inductive bias for transfer learning", arXiv:1802.01483 (L2-SP,
    there in the loss); decoupled from the gradient as in Loshchilov and Hutter 2019, arXiv:1711.05101.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float, decay: float):
        if decay < 0:
            raise ValueError(f"decay={decay!r} must not be negative: it would push away from the start")
        super().__init__(parameters, lr=lr, weight_decay=0.0)
        self.decay = decay
        self.start = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        rates = [group["lr"] for group in self.param_groups for _ in group["params"]]
        for p, start, rate in zip(parameters, self.start, rates, strict=True):
            p.lerp_(start, min(1.0, rate * self.decay))
        return super().step(closure)


def decay_to_start(lr: float, decay: float) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """For `pl.train(…, optimizer=decay_to_start(lr, decay))`."""
    return lambda parameters: DecayToStart(parameters, lr, decay)


# ----------------------------------------------------------------------------------------------------------- KL


class KLToBase:
    """A penalty on saying other things than the base: λ · mean over tokens of KL(p₀ ‖ p), in nats.

    p₀ and p are the distributions of the next token by the base and by the model, on `batch_size` of `rows`, drawn
    anew at each step; labels are not used. base: a frozen copy; None: the model with its adapters switched off, which
    needs no second model in memory. Rows may be old texts, or the task's own prompts where no old text is at hand.
    For `pl.train(…, penalty=KLToBase(…))`.
    Source: Li and Hoiem 2016, "Learning without forgetting", arXiv:1606.09282, section 3.
    """

    def __init__(
        self, model: nn.Module, rows: Sequence[Mapping], tokenizer, weight: float = 1.0, base: nn.Module | None = None,
        batch_size: int = 4,
    ):  # fmt: skip
        if base is None and not hosts(model):
            raise ValueError("without adapters to switch off there is no base in this model: pass a frozen copy, base=")
        self.rows, self.weight, self.base, self.size = encode(model, rows, tokenizer), weight, base, batch_size
        self.pad = filler(tokenizer)

    def __call__(self, model: nn.Module) -> Tensor:
        picked = torch.randint(len(self.rows), (self.size,)).tolist()
        batch = collate([self.rows[i] for i in picked], self.pad, next(model.parameters()).device)
        del batch["labels"]
        base = self.base if self.base is not None else model
        with torch.no_grad(), mode(base, training=False), using(model) if self.base is None else nullcontext():
            p0 = base(**batch, use_cache=False).logits.float().log_softmax(-1)
        p = model(**batch, use_cache=False).logits.float().log_softmax(-1)
        per_token = F.kl_div(p, p0, log_target=True, reduction="none").sum(-1)  # (B, T)
        mask = batch["attention_mask"]
        return self.weight * (per_token * mask).sum() / mask.sum()


# ------------------------------------------------------------------------------------------------ after training


@torch.no_grad()
def interpolate(model: nn.Module, start: Mapping[str, Tensor], a: float) -> nn.Module:
    """θ ← θ₀ + a·(θ − θ₀) for each parameter named in `start`, in place: a = 0 gives θ₀ back, a = 1 changes nothing.

    start: name -> θ₀, of before training ({name: p.detach().clone() for name, p in model.named_parameters()}).
    Source: Wortsman et al. 2021, "Robust fine-tuning of zero-shot models" (WiSE-FT), arXiv:2109.01903, section 3.
    """
    there = dict(model.named_parameters())
    if missing := sorted(set(start) - set(there)):
        raise ValueError(f"the model has no parameter {missing[0]!r}: was it wrapped or changed since?")
    for name, before in start.items():
        there[name].copy_(torch.lerp(before.to(there[name]), there[name], a))
    return model


@torch.no_grad()
def rescale(model: nn.Module, name: str, a: float) -> nn.Module:
    """ΔW ← a·ΔW for each adapter called `name` that is a product s·B·A, by multiplying B in place.

    With LoRA this is what a smaller α does at inference, and `interpolate`'s W₀ + a·(W − W₀) without touching a weight.
    Raises ValueError for an unknown name and for a method whose change is no such product; then nothing is changed.
    """
    found = adapters(model).get(name)
    if not found:
        raise ValueError(f"no adapter is called {name!r}; there are {', '.join(adapters(model)) or 'none'}")
    products = {path: adapter.factors() for path, adapter in found.items()}
    if without := [path for path, factors in products.items() if factors is None]:
        raise ValueError(f"{type(found[without[0]]).__name__} at {without[0]!r} is not a product s·B·A: there is no "
                         "factor to multiply; call model.eval() if it is LoRA with dropout")  # fmt: skip
    B = {path: factors[1] for path, factors in products.items() if factors is not None}
    if computed := [path for path in found if not any(B[path] is own for own in found[path].parameters())]:
        raise ValueError(f"{type(found[computed[0]]).__name__} at {computed[0]!r} computes its B in each pass, from a "
                         "start or from other factors; make a plain LoRA of it: to_lora, or save and load it")
    for factor in B.values():
        factor.mul_(a)
    return model

"""The loss of context-aware prompt tuning on the answers in its own context.

    pl.train(model, rows, tokenizer, penalty=answers_loss)

Source: Blau et al. 2024, arXiv:2410.17222.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def answers_loss(model: nn.Module) -> Tensor:
    """Mean over the context's answer tokens of ω·(−log p): ω is decay for the last example, decay² before it, ….

    The context stands before every text and sees none of it, so one more pass over its k tokens is enough. (HF PEFT
    computes the same number in each row of a batch; its loss is one mean over these tokens and the text's.)
    Raises ValueError without one active CPT that has answers.
    """
    from .attach import adapters, switch_of, using
    from .methods.cpt import CPT

    active = switch_of(model).active
    found = [(name, a) for name in active for a in adapters(model)[name].values() if isinstance(a, CPT)]
    if len(found) != 1 or not any(found[0][1].answers):
        raise ValueError("needs one active CPT with answers in its context: kinds of 4, 8, …")
    ((own, cpt),) = found
    with using(model, *(name for name in active if name != own)):
        logits = model(inputs_embeds=cpt.vectors()[None], use_cache=False).logits[0, :-1]
    answers = torch.tensor(cpt.answers[1:], device=logits.device)
    kinds = torch.tensor(cpt.kinds[1:], device=logits.device)[answers]
    age = (kinds[:, None] <= kinds.unique()).sum(-1)  # 1 for the last example
    targets = torch.tensor(cpt.tokens[1:], device=logits.device)[answers]
    losses = F.cross_entropy(logits[answers].float(), targets, reduction="none")
    return (cpt.decay**age * losses).mean()

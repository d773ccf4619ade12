"""Prompt tuning: trained vectors before the tokens. Lester et al. 2021, arXiv:2104.08691."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..prompts import embedding_of, plan_prompt, with_prompt


class PromptTuning(Adapter):
    """Prompt tuning: k trained vectors P stand before the embedded tokens, and nothing else is trained.

    h = f([P; E(x)]), with P (k, d) and E the frozen embedding; the k positions are cut off again, so that logits and
    labels have the tokens' length. Not the identity at its start, and no weight can stand for it: it cannot be merged.

    k: prompt length, below the model's context, of which it takes k positions. init: "vocabulary": the vectors of k
    random tokens; "random": uniform in ±0.5; or token ids, `tokenizer(text).input_ids`, repeated or cut to k.
    Trained: k·d. In an encoder–decoder model the encoder alone gets a prompt, as in the paper; the decoder sees it.
    Raises ValueError for another site than the decoder, a k out of range, or a text without tokens.
    Source: Lester et al. 2021, arXiv:2104.08691, sections 2 and 3.2.
    """

    family = "soft prompt"
    targets, mixes = "decoder", False
    hf_type, hf_hyper, hf_params = "PROMPT_TUNING", {"k": "num_virtual_tokens"}, {"prompt": "prompt_embeddings"}

    def __init__(self, layer: nn.Module, k: int = 20, init: str | list[int] = "vocabulary"):
        super().__init__(layer)
        self.prompt = nn.Parameter(start(embedding_of(layer), k, init))

    @classmethod
    def plan(cls, model, paths, hyper):
        return plan_prompt(cls, model, paths, hyper)

    def expected(self) -> int:
        """k·d"""
        return self.hyper["k"] * embedding_of(self.layer).embedding_dim

    def forward(self, f, input_ids: Tensor | None = None, **inputs):  # (B, T) token ids -> h (B, T, d)
        return with_prompt(self.layer, f, self.prompt, input_ids, **inputs)


@torch.no_grad()
def start(embedding: nn.Module, k: int, init: str | list[int]) -> Tensor:
    """The first values of a prompt, (k, d): `init` as in `PromptTuning`."""
    device, size = embedding.weight.device, embedding.num_embeddings
    if isinstance(init, str):
        if init == "random":
            return torch.empty(k, embedding.embedding_dim, device=device).uniform_(-0.5, 0.5)
        if init != "vocabulary":
            raise ValueError(f"init={init!r} is neither 'random' nor 'vocabulary' nor a list of token ids; "
                             "for a text pass tokenizer(text).input_ids")  # fmt: skip
        return embedding(torch.randint(size, (k,), device=device)).float()
    ids = list(init)
    if not ids:
        raise ValueError("the prompt text has no tokens: init is an empty list; use a longer text or init='vocabulary'")
    if not all(isinstance(i, int) and 0 <= i < size for i in ids):
        raise ValueError(f"init={ids[:8]}… is not a list of token ids in 0…{size - 1}: pass tokenizer(text).input_ids")
    return embedding(torch.tensor([ids[i % len(ids)] for i in range(k)], device=device)).float()

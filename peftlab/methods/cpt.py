"""Context-aware prompt tuning: examples before the text, moved a little. Blau et al. 2024, arXiv:2410.17222."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..prompts import embedding_of, plan_prompt, with_prompt
from .prompt_tuning import PromptTuning


class CPT(Adapter):
    """Context-aware prompt tuning: the prompt is a context of solved examples, and learns without leaving them.

    h = f([E + δ;E(x)]) with E (k, d) the embedded tokens of the context, ‖δᵢ‖ ≤ ε·√(d/2048) for each token: after each
    step δ is put back into its ball (projected gradient descent). Answers in the context are never moved. They are
    learned too with `pl.train(…, penalty=peftlab.context.answers_loss)`. It starts at in-context learning, not at the
    base, and cannot be merged.

    tokens: ids of the context. kinds: what each one is, 4·i + 1, 2, 3 of example i = 0, 1, … for the template of its
    input, its input, the template of its answer, and 4·i + 4 for its answer; by default all 1. epsilon, format_epsilon:
    ε of inputs and of templates. decay: see `answers_loss`.
    Trained: k·d. Raises ValueError for no tokens, kinds of another number, or a context without room for a text.
    Source: Blau et al. 2024, arXiv:2410.17222; √(d/2048) and the kinds are HF PEFT's.
    """

    targets, mixes, family = "decoder", False, "soft prompt"
    hf_type, hf_params = "CPT", {"prompt": "prompt_embeddings"}
    hf_hyper = {"tokens": "cpt_token_ids", "kinds": "cpt_tokens_type_mask", "epsilon": "opt_projection_epsilon",
                "format_epsilon": "opt_projection_format_epsilon", "decay": "opt_loss_decay_factor"}  # fmt: skip

    def __init__(self, layer: nn.Module, tokens: tuple[int, ...] = (), kinds: tuple[int, ...] = (),
                 epsilon: float = 0.1, format_epsilon: float = 0.1, decay: float = 1.0):  # fmt: skip
        super().__init__(layer)
        embedding, kinds = embedding_of(layer), tuple(kinds or [1] * len(tokens))
        if len(kinds) != len(tokens) or not all(0 <= t < embedding.num_embeddings for t in tokens) or min(kinds) < 0:
            raise ValueError(f"{len(tokens)} tokens, {len(kinds)} kinds: give one kind ≥ 0 for each id below the "
                             f"vocabulary's {embedding.num_embeddings}")  # fmt: skip
        size = (embedding.embedding_dim / 2048) ** 0.5
        radius = [size * (0, format_epsilon, epsilon, format_epsilon)[kind % 4] for kind in kinds]
        self.tokens, self.kinds, self.decay = list(tokens), list(kinds), decay
        self.answers = [k > 0 and k % 4 == 0 for k in self.kinds]
        with torch.no_grad():
            E = embedding(torch.tensor(self.tokens, device=embedding.weight.device)).float()
        self.register_buffer("E", E, persistent=False)
        self.register_buffer("radius", torch.tensor(radius).to(E)[:, None], persistent=False)
        self.prompt = nn.Parameter(E.clone())

    @classmethod
    def plan(cls, model, paths, hyper):
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError("examples with their answers belong to a model of one text; take PromptTuning")
        if not hyper.get("tokens"):
            raise ValueError("tokens=() is no context: give token ids, tokenizer(examples).input_ids")
        return {p: (cls, hyper) for p in plan_prompt(PromptTuning, model, paths, {"k": len(hyper["tokens"])})}

    def expected(self) -> int:
        """k·d"""
        return self.E.numel()

    def projected(self) -> Tensor:
        """E + δ·min(1, ε/‖δ‖); a δ that was put back once is left as it is, whatever rounding made of its length."""
        delta = self.prompt - self.E
        length = delta.norm(dim=-1, keepdim=True)
        inside = length <= self.radius * (1 + 1e-4)
        return torch.where(inside, self.prompt, self.E + delta * (self.radius / length.clamp(min=1e-10)))

    def vectors(self) -> Tensor:
        """(k, d): E + δ in its ball. The gradient is δ's own, as if there were no ball, and nil for answers."""
        free = torch.where(self.radius > 0, self.prompt, self.prompt.detach())
        return self.projected().detach() + (free - free.detach())

    @classmethod
    def stepped(cls, made, step: int, steps: int) -> None:
        for adapter in made.values():
            adapter.prompt.data.copy_(adapter.projected())

    def forward(self, f, input_ids: Tensor | None = None, **inputs):  # (B, T) token ids -> h (B, T, d)
        return with_prompt(self.layer, f, self.vectors(), input_ids, **inputs)

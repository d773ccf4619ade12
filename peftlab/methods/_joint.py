"""The shared basis of FRoD (arXiv:2512.23485): one V for the weights of all layers of a kind, and what a kind is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..layers import weight_of


def kind_of(path: str) -> str:
    """What a layer is called in its block: the last two words of its path, or the last one after a number.

    As HF PEFT names the kinds in its files: "self_attn_q_proj", and "attention_output" for BERT's.
    """
    words = path.split(".")
    if len(words) == 1 or words[-2].isdigit():
        return words[-1]
    kind = f"{words[-2]}_{words[-1]}"
    return "attention_output" if kind == "output_dense" and words[-3:-2] == ["attention"] else kind


def block_of(path: str, otherwise: int) -> int:
    """The number of a layer's block: that after "layers", else the first one in the path."""
    words = path.split(".")
    after = words[words.index("layers") + 1 :][:1] if "layers" in words else []
    return next((int(word) for word in (*after, *words) if word.isdigit()), otherwise)


def joint_basis(layers: Mapping[str, nn.Module], ridge: float) -> Tensor:
    """V (in, in), on whose axes all W₀ of these layers are written: Uᵢ·Λᵢ·Vᵀ. ValueError if their widths differ.

    With the layers stacked, Q·R, and T the mean of (QᵢᵀQᵢ + ridge·I)⁻¹ over the layers, V = Rᵀ·(eigenvectors of T): the
    axes on which the layers differ most. Of several layers of a kind in a block (an encoder's and a decoder's) HF PEFT
    takes the last. Fewer rows than columns: the right singular vectors.
    """
    blocks = {block_of(path, i): weight_of(layer).detach() for i, (path, layer) in enumerate(layers.items())}
    W = [blocks[number] for number in sorted(blocks)]
    if len(widths := {w.shape[1] for w in W}) > 1:
        raise ValueError(f"layers of one kind ({next(iter(layers))}, …) have {sorted(widths)} inputs: no common basis")
    n = W[0].shape[1]
    if W[0].is_meta:
        return W[0].new_empty(n, n)
    stacked = torch.cat([w.float().cpu() for w in W])
    if len(stacked) < n:
        V = torch.linalg.svd(stacked)[2].T
    else:
        Q, R = torch.linalg.qr(stacked)
        parts = [q.T @ q + ridge * torch.eye(n) for q in Q.split([len(w) for w in W])]
        T = torch.stack([torch.linalg.inv(part) for part in parts]).mean(0)
        V = R.T @ torch.linalg.eigh(T)[1]
    return V.to(W[0].device).contiguous()


def in_basis(layer: nn.Module, V: Tensor) -> tuple[Tensor, Tensor]:
    """U (out, in) and Λ₀ (in,) with W₀ = U·Λ₀·Vᵀ: the columns of W₀·V⁻ᵀ, to length 1, and their lengths; in float32."""
    W = weight_of(layer).detach()
    if W.is_meta:
        return torch.empty_like(W), W.new_empty(len(V))
    X = torch.linalg.solve(V.to(W.device).double(), W.double().T).T  # V⁻¹ is never formed: V can be near-singular
    lengths = X.norm(dim=0)
    return (X / lengths.clamp(min=1e-12)).float(), lengths.float()


def number_of_places(n: int, rate: float) -> int:
    """⌊ρ·n²⌋ places off the diagonal of an (n, n) matrix, at most all, and at least one unless ρ is zero."""
    return min(max(int(n * n * rate), 1), n * (n - 1)) if rate > 0 else 0


def draw_places(n: int, number: int, draw: torch.Generator) -> Tensor:
    """(2, number): rows and columns, off the diagonal, in random order; drawn as HF PEFT does."""
    picked = torch.randperm(n * (n - 1), generator=draw, device="cpu")[:number]
    row, column = picked // (n - 1), picked % (n - 1)
    return torch.stack([row, column + (column >= row)])  # the diagonal is left out of each row

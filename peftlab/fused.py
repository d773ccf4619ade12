"""A frozen linear layer and a low-rank term in one autograd node: speed of the host, so that methods stay equations.

Written as f(x) + Δ(x), a training step builds Δ(x), adds it, and adds the two gradients of x again on the way back:
four passes over tensors as large as the layer's output or input. Here they are accumulated inside the matrix products,
and only x and the thin z = Ax are kept for the backward pass (x in its own dtype, even if the adapter's is another).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import is_conv1d, is_packed, weight_of


class LowRankLinear(torch.autograd.Function):
    """y = W·x + b + s·B·A·x with frozen W, b. Shapes: x (..., in), W (out, in), A (r, in), B (out, r), y (..., out).

    W is given as two functions of whatever it is stored as: product(x, *stored) = W·x + b, gradient(g, *stored) = Wᵀ·g.
    """

    @staticmethod
    def forward(ctx, x: Tensor, A: Tensor, B: Tensor, s: float, product, gradient, *stored) -> Tensor:
        y = product(x, *stored)
        z = F.linear(x.to(A.dtype), A)
        if y.dtype == B.dtype:
            y.view(-1, y.shape[-1]).addmm_(z.view(-1, z.shape[-1]), B.T, alpha=s)
        else:
            y += (s * F.linear(z, B)).to(y.dtype)
        tensors = [t if isinstance(t, Tensor) else None for t in stored]
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, z, A, B, *tensors)  # a frozen A needs no x
        ctx.s, ctx.gradient = s, gradient
        ctx.facts = [None if isinstance(t, Tensor) else t for t in stored]
        return y

    @staticmethod
    def backward(ctx, g: Tensor):
        x, z, A, B, *tensors = ctx.saved_tensors
        stored = [fact if tensor is None else tensor for tensor, fact in zip(tensors, ctx.facts, strict=True)]
        lead, g = g.shape[:-1], g.reshape(-1, g.shape[-1])
        own = g.to(B.dtype)
        gz = (own @ B).mul_(ctx.s)
        grad_B = (z.view(-1, z.shape[-1]).T @ own).mul_(ctx.s).T  # three times as fast as ownᵀ·z: z is the thin one
        grad_A = None if x is None else gz.T @ x.reshape(-1, x.shape[-1]).to(A.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.gradient(g, *stored)
            grad_x = grad_x.addmm_(gz, A) if A.dtype == grad_x.dtype else grad_x.add_((gz @ A).to(grad_x.dtype))
            grad_x = grad_x.view(*lead, A.shape[1])
        return grad_x, grad_A, grad_B, *[None] * (3 + len(stored))


def _dense_gradient(g: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    return g @ W


def untouched(f) -> bool:
    """Whether f is a linear layer, dense or packed, where nothing else wants a say: hooks, a forward of its own, as
    accelerate gives it."""
    linear = type(f) is nn.Linear or is_conv1d(f) or is_packed(f)
    return linear and not (f._forward_hooks or f._forward_pre_hooks or "forward" in vars(f))


def fusible(f, x: Tensor) -> bool:
    """Whether f is an untouched frozen linear layer, without autocast.

    A packed one is left to itself under torch.compile, and where it multiplies in another dtype than that of x.
    """
    if not untouched(f) or not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return False
    if is_packed(f):
        return f.compute in (None, x.dtype) and not torch.compiler.is_compiling() and x.is_floating_point()
    return not f.weight.requires_grad


def low_rank_linear(f: nn.Module, x: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """f(x) + s·x·Aᵀ·Bᵀ for a `fusible` layer."""
    if not is_packed(f):
        return LowRankLinear.apply(x, A, B, s, F.linear, _dense_gradient, weight_of(f), f.bias)
    from . import nf4_layer

    return LowRankLinear.apply(x, A, B, s, nf4_layer.biased_product, nf4_layer.biased_gradient, f.bias, *f.packed)

"""The kinds of layers that methods know: nn.Linear, transformers' Conv1D (GPT-2) and layers shaped like them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn


def is_conv1d(layer: nn.Module) -> bool:
    """transformers' Conv1D is a linear layer that stores W transposed, (in, out). By name: transformers stays lazy."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def is_linear(layer: nn.Module) -> bool:
    """nn.Linear, Conv1D, or a quantised layer with in_features and out_features."""
    return is_conv1d(layer) or (hasattr(layer, "in_features") and hasattr(layer, "out_features"))


def is_quantised(layer: nn.Module) -> bool:
    """Whether a linear layer keeps its weights in codes: ours, or bitsandbytes' four bits. Whole models of transformers
    have a `dequantize` too, packed or not."""
    theirs = getattr(getattr(layer, "weight", None), "quant_state", None)
    return is_linear(layer) and (hasattr(layer, "dequantize") or theirs is not None)


def is_packed(layer: nn.Module) -> bool:
    """Whether it is our NF4Linear. By name: that module imports this one."""
    return type(layer).__name__ == "NF4Linear" and hasattr(layer, "packed")


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer; a ValueError names any other kind."""
    if is_conv1d(layer):
        return layer.nf, layer.weight.shape[0]
    if not is_linear(layer):
        raise ValueError(f"needs a linear layer (nn.Linear, Conv1D), not {type(layer).__name__}; choose other targets")
    return layer.out_features, layer.in_features


def weight_of(layer: nn.Module) -> Tensor:
    """W (out, in) of a linear layer whatever its storage; a quantised layer is dequantised, at the cost of one copy."""
    if hasattr(layer, "dequantize"):
        return layer.dequantize()
    if is_quantised(layer):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer.weight.T if is_conv1d(layer) else layer.weight


def affine(f: Callable[[Tensor], Tensor], in_features: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(W (out, in), b (out,)) of a map f(x) = Wx + b in float64, found by asking it; ValueError if it is not affine.

    An affine map is known from its values at 0 and at the unit vectors; a few random inputs check that it is one.
    """
    unit = torch.eye(in_features, dtype=torch.double, device=device)
    bias = f(0 * unit[:1])[0]
    weight = (f(unit) - bias).T
    probe = torch.randn(4, in_features, generator=torch.Generator().manual_seed(0)).to(unit)
    if not torch.allclose(f(probe), probe @ weight.T + bias, rtol=1e-6, atol=1e-9):
        raise ValueError("the adapted layer is not an affine map of its input, so no weight can stand for it")
    return weight, bias


def as_dense(layer: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """A layer of the same kind with W (out, in) and b (out,); a bias that is nil is left out where there was none."""
    if not is_conv1d(layer) and type(layer) is not nn.Linear:  # quantised: only a dense layer can hold the sum
        new = nn.Linear(weight.shape[1], weight.shape[0], device="meta", dtype=weight.dtype)
        new.bias = None if layer.bias is None else new.bias
    else:
        new = copy.deepcopy(layer)
    new.weight = nn.Parameter((weight.T if is_conv1d(layer) else weight).contiguous(), requires_grad=False)
    if new.bias is not None or bias.any():
        new.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return new


def dense(layer: nn.Module) -> nn.Module:
    """A linear layer that computes with the weights a quantised one stands for."""
    W = weight_of(layer)
    return as_dense(layer, W, W.new_zeros(len(W)) if layer.bias is None else layer.bias)


def device_of(layer: nn.Module) -> torch.device:
    """Where a layer's tensors live."""
    tensor = next(layer.parameters(), None)
    tensor = next(layer.buffers(), None) if tensor is None else tensor
    return torch.device("cpu") if tensor is None else tensor.device


def wide(t: Tensor) -> Tensor:
    """`t` in float32 at least: torch has no FFT, QR or LU in 16 bits."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def dtype_of(layer: nn.Module) -> torch.dtype:
    """The dtype of a layer's weights; of packed ones, the dtype they had before."""
    own = getattr(layer, "dtype", None)
    if isinstance(own, torch.dtype):
        return own
    return next((p.dtype for p in layer.parameters() if p.is_floating_point()), torch.bfloat16)

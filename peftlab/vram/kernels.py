"""What a GPU's kernels do to memory that the ones at hand do not: attention, dropout, autocast, four bits, optimizers.

`like("cuda")` makes torch on the meta device take the same operations as on a CUDA device. These few are all that
differ: everything else of a model is made of operations that allocate their results and nothing more, on any device.
Functions of torch are replaced while the context is open, so it is not for several threads at once. (A function mode
would be tidier, but is off while gradient checkpointing computes a block again inside of a backward pass.)
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import nf4_fast, nf4_layer

aten = torch.ops.aten
ATTENTION = ("auto", "flash", "efficient", "cudnn", "math", "eager")  # "eager": the model's own, without a kernel
HALF = (torch.float16, torch.bfloat16)


@contextmanager
def replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """(owner, name, value): each attribute has its value inside the context, and its old one after it."""
    with ExitStack() as undo:
        for owner, name, value in changes:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


@contextmanager
def like(device: str, attention: str = "auto", autocast: torch.dtype | None = None) -> Iterator[Autocast]:
    """Torch on meta tensors as on a device, "cuda" or "cpu". Gives the autocast context for the forward pass."""
    cast = Autocast(autocast, device)
    adam = importlib.import_module("torch.optim.adam")
    changes = [
        (F, "scaled_dot_product_attention", cast.inputs(ATTEND[device](attention), "low")),
        (adam, "_device_dtype_check_for_fused", lambda *args, **kwargs: None),  # it knows of no meta device
        *cast.changes(),
    ]
    if device == "cuda":
        changes += [
            (F, "dropout", dropout),
            (nf4_fast, "kernels", lambda p: Packed),
            (nf4_layer, "kernels", lambda p: Packed),
        ]
    with replaced(*changes):
        yield cast


# ----------------------------------------------------------------------------------------------------------- attention


def attention_on_cuda(which: str) -> Callable[..., Tensor]:
    """F.scaled_dot_product_attention with the backend that torch chooses on an Ampere card or newer, or with `which`.

    Source: aten/src/ATen/native/transformers/attention.cpp and cuda/sdp_utils.cpp.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
               is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
        q, k, v, d = query, key, value, query.shape[-1]
        scale = 1 / math.sqrt(d) if scale is None else scale
        grouped = q.shape[-3] != k.shape[-3] if q.dim() > 3 else False
        flash = attn_mask is None and q.dtype in HALF and d == v.shape[-1] and d <= 256
        efficient = not grouped and q.dim() == 4 and d % (8 if q.dtype in HALF else 4) == 0 and q.dtype != torch.double
        chosen = which if which != "auto" else "flash" if flash else "efficient" if efficient else "math"
        if (chosen == "flash" and not flash) or (chosen in ("efficient", "cudnn") and not efficient):
            chosen = "math"  # what torch does where nothing else is left
        attn_mask = _additive(attn_mask, q)
        if chosen == "flash":
            q, k, v = (F.pad(t, (0, -d % 8)) if d % 8 else t for t in (q, k, v))
            return aten._scaled_dot_product_flash_attention(
                q, k, v, dropout_p, is_causal, return_debug_mask=False, scale=scale
            )[0][..., :d]
        if chosen == "math":
            return by_formula(q, k, v, attn_mask, dropout_p, is_causal, scale)
        if attn_mask is not None:
            attn_mask = _aligned(attn_mask).expand(*q.shape[:3], k.shape[2])
        trained = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
        kernel = {"cudnn": aten._scaled_dot_product_cudnn_attention,
                  "efficient": aten._scaled_dot_product_efficient_attention}[chosen]  # fmt: skip
        return kernel(q, k, v, attn_mask, trained, dropout_p, is_causal, scale=scale)[0]

    return attend


def attention_on_cpu(which: str) -> Callable[..., Tensor]:
    """The flash attention of torch's CPU backend, or the plain formula with `which` = "math"."""

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
               is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
        fits = dropout_p == 0 and query.dim() == 4 and query.shape[-1] == value.shape[-1] and which != "math"
        trains_mask = attn_mask is not None and attn_mask.requires_grad
        attn_mask = _additive(attn_mask, query)
        if not fits or trains_mask or (attn_mask is not None and is_causal):
            return by_formula(query, key, value, attn_mask, dropout_p, is_causal, scale)
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]

    return attend


ATTEND = {"cuda": attention_on_cuda, "cpu": attention_on_cpu}


def by_formula(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool,
               scale: float | None) -> Tensor:  # fmt: skip
    """softmax(s·q·kᵀ + mask)·v without a kernel, in float32. Torch has it in C++, but makes a third matrix of scores
    while a dispatch mode watches (areAnyTensorSubclassLike), and has another dropout for meta tensors than for a GPU.

    Source: aten/src/ATen/native/transformers/attention.cpp, _scaled_dot_product_attention_math.
    """
    exact = [t.float() if t.dtype in HALF else t for t in (query, key, value)]  # kept to the end
    root = math.sqrt(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    q, k, v = exact[0] * root, *exact[1:]
    if is_causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        mask = torch.where(mask, 0.0, torch.scalar_tensor(-math.inf, dtype=q.dtype, device=q.device))
    if k.shape[-3] != q.shape[-3]:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    scores = aten.matmul(q, k.transpose(-2, -1) * root)
    if mask is not None:
        scores.add_(mask)
    scores = aten._safe_softmax(scores, -1)
    if dropout_p:
        scores = F.dropout(scores, dropout_p, True)
    out, _ = aten.matmul(scores, v).to(query.dtype), scores.to(query.dtype)
    return out


def _additive(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """A mask of yes and no becomes one of 0 and −∞, as large as its numbers are: torch does so in each layer anew."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, 0.0, torch.scalar_tensor(-math.inf, dtype=q.dtype, device=q.device))


def _aligned(mask: Tensor) -> Tensor:
    """The memory-efficient kernel reads masks in steps of 8 numbers: a row of another length is copied to a longer one.

    Source: attention.cpp, preprocess_mask and pad_bias.
    """
    if all(stride % 8 == 0 for stride in mask.stride()[:-1]) and mask.stride(-1) == 1:
        return mask
    return F.pad(mask, (0, 8 - mask.shape[-1] % 8))[..., : mask.shape[-1]]


def _up(number: int, to: int) -> int:
    return -(-number // to) * to


def _laid_out(t: Tensor) -> Tensor:
    """(B, h, T, d) as the kernels write it: in the memory of a (B, T, h, d)."""
    B, h, T, d = t.shape
    return t.new_empty(B, T, h, d).transpose(1, 2)


def _forward(args: tuple, kwargs: dict, out: tuple) -> tuple[tuple, int]:
    return (_laid_out(out[0]), *out[1:]), 0


def _flash_backward(args: tuple, kwargs: dict, out: tuple) -> tuple[tuple, int]:
    """The gradient of q is added up in float32, with one number for each row of the softmax; where heads share keys and
    values, their gradients come as one for each head of q first. Source: flash_attn/flash_api.cpp, mha_bwd."""
    q, k = args[1], args[2]
    (B, h, T, d), T_k = q.shape, k.shape[2]
    rows = _up(T, 128)
    more = 4 * B * h * rows * _up(d, 32 if d <= 128 else 64) + 4 * B * h * rows
    if k.shape[1] != h:
        more += 2 * B * T_k * h * d * q.element_size()
    return tuple(map(_laid_out, out)), more


def _efficient_backward(args: tuple, kwargs: dict, out: tuple) -> tuple[tuple, int]:
    """16-bit gradients of q are added up in float32 blocks of 64 rows; the sum of output times gradient is kept beside.
    Source: mem_eff_attention/kernel_backward.h, workspace_size, and attention_backward.cu."""
    q = args[1]
    B, h, T, d = q.shape
    more = 4 * B * h * T
    more += 4 * B * h * _up(T, 64) * _up(d, 32) if q.dtype in HALF else 4 * B * h * T * d
    return (*map(_laid_out, out[:3]), *out[3:]), more


def _dequantised(args: tuple, kwargs: dict, out: Tensor) -> tuple[Tensor, int]:
    """bitsandbytes unpacks the weights before it multiplies many rows: a dense copy in the dtype of x while it runs."""
    x, N, K = args[0], args[2][0], args[2][1]
    return out, x.element_size() * N * K * (x.numel() // K > 64)


def _cast(args: tuple, kwargs: dict, out: Tensor) -> tuple[Tensor, int]:
    """A CPU brings numbers of two types to one before it works on them, in a copy; a GPU does so on the way.
    Source: aten/src/ATen/TensorIterator.cpp, compute_types, cast_common_dtype_to_outputs."""
    tensors = [t for t in args[:2] if isinstance(t, Tensor)]
    common = torch.result_type(*tensors) if len(tensors) > 1 else out.dtype
    return out, sum(t.numel() * common.itemsize for t in tensors if t.dtype != common and t.dim())


def _layer_norm(args: tuple, kwargs: dict, out: tuple) -> tuple[tuple, int]:
    """A CPU keeps mean and deviation of each row in the dtype of the weight, a GPU always in float32.
    Source: aten/src/ATen/native/layer_norm.cpp, layer_norm_cpu, and cpu/mixed_data_type.h."""
    x, weight = args[0], args[2]
    own = (x if weight is None else weight).dtype
    return (out[0], *(t.new_empty(t.shape, dtype=own) for t in out[1:])), 0


def _safe_softmax(args: tuple, kwargs: dict, out: Tensor) -> tuple[Tensor, int]:
    """The softmax of attention by the plain formula looks for rows that see nothing: one byte for each score, and row.
    Source: aten/src/ATen/native/transformers/attention.cpp, _safe_softmax."""
    return out, out.numel() + out.numel() // out.shape[-1]


def kernels(device: str) -> dict[Any, Callable]:
    """op -> its `Recorder.kernels` entry."""
    everywhere: dict[Any, Callable] = {aten._safe_softmax.default: _safe_softmax}
    if device == "cpu":
        names = ("mul", "add", "sub", "div", "mul_", "add_", "sub_", "div_")
        casts = {getattr(aten, name).Tensor: _cast for name in names}
        return {**everywhere, **casts, aten.native_layer_norm.default: _layer_norm}
    found: dict[Any, Callable] = {
        **everywhere,
        aten._scaled_dot_product_flash_attention.default: _forward,
        aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
        aten._scaled_dot_product_efficient_attention.default: _forward,
        aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
        aten._scaled_dot_product_cudnn_attention.default: _forward,
    }
    with contextlib.suppress(AttributeError):  # bitsandbytes, if it was imported
        found[torch.ops.bitsandbytes.gemm_4bit.default] = _dequantised
    return found


# ----------------------------------------------------------------------------------------------- dropout and four bits


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """A GPU makes the result and a mask of one byte a number; elsewhere torch makes a mask as large as the input."""
    return aten.native_dropout(input, p, True)[0] if training and p else input


class Packed:
    """Stands in for nf4_triton.py: W is written dense, and nothing beside it."""

    @staticmethod
    def multiplies(p: Any, x: Tensor) -> bool:
        """Few rows are multiplied without a dense W."""
        return x.numel() // x.shape[-1] <= 16

    @staticmethod
    def matmul(x: Tensor, p: Any) -> Tensor:
        return x.new_empty(*x.shape[:-1], p.shape[0])

    @staticmethod
    def dequantize(p: Any, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(p.shape, dtype=dtype or p.dtype, device=p.codes.device)


# ------------------------------------------------------------------------------------------------------------ autocast


class Autocast:
    """torch.autocast for meta tensors, which have none of their own: products in 16 bits, norms and losses in 32.

    `with cast:` around the forward pass. Trained float32 weights are cast once and kept until its end; frozen ones are
    cast each time. It stays on after the forward pass for what checkpointing computes again in the backward pass, where
    torch restores it too. Source: aten/src/ATen/autocast_mode.h, the lists and cached_cast.
    """

    LOW = ((F, "linear"), (torch, "matmul"), (torch, "bmm"), (torch, "mm"), (torch, "addmm"), (torch, "baddbmm"),
           (torch, "mv"), (torch.Tensor, "matmul"), (torch.Tensor, "__matmul__"), (torch.Tensor, "__rmatmul__"),
           (torch.Tensor, "mm"), (torch.Tensor, "bmm"), (F, "conv1d"), (F, "conv2d"))  # fmt: skip
    HIGH = ((F, "layer_norm"), (F, "softmax"), (F, "log_softmax"), (torch, "softmax"), (F, "cross_entropy"),
            (F, "nll_loss"), (F, "softplus"), (torch, "rsqrt"), (torch, "exp"), (torch, "pow"), (torch.Tensor, "pow"),
            (torch.Tensor, "softmax"), (torch.Tensor, "exp"), (torch.Tensor, "rsqrt"))  # fmt: skip
    HIGH_ON_CPU = ((F, "cross_entropy"), (F, "nll_loss"))  # of those above; a CPU does the others in 16 bits

    def __init__(self, dtype: torch.dtype | None, device: str = "cuda"):
        self.dtype, self.on, self.keeps = dtype, False, False
        self.highs = self.HIGH_ON_CPU if device == "cpu" else self.HIGH
        self.kept: dict[int, Tensor] = {}

    def __enter__(self) -> Autocast:
        self.on = self.keeps = self.dtype is not None
        return self

    def __exit__(self, *error: Any) -> None:
        self.keeps = False
        self.kept.clear()

    def low(self, x: Any) -> Any:
        if not (self.on and isinstance(x, Tensor) and x.dtype in (torch.float32, *HALF) and x.dtype != self.dtype):
            return x
        if not (self.keeps and x.is_leaf and x.requires_grad and x.dtype == torch.float32):
            return x.to(self.dtype)
        if id(x) not in self.kept:
            self.kept[id(x)] = x.to(self.dtype)
        return self.kept[id(x)]

    def high(self, x: Any) -> Any:
        return x.float() if self.on and isinstance(x, Tensor) and x.dtype in HALF else x

    def inputs(self, function: Callable, how: str) -> Callable:
        """The function, with its tensors cast "low" or "high"."""
        if self.dtype is None:
            return function
        cast = getattr(self, how)
        return lambda *args, **kwargs: function(*map(cast, args), **{name: cast(x) for name, x in kwargs.items()})

    def changes(self) -> list[tuple[Any, str, Any]]:
        """What has to be replaced while it is used."""
        if self.dtype is None:
            asked, given = torch.is_autocast_enabled, torch.autocast
            return [(torch, "is_autocast_enabled", lambda kind="cuda": kind != "meta" and asked(kind)),
                    (torch, "autocast", lambda kind, *args, **kwargs: contextlib.nullcontext() if kind == "meta"
                     else given(kind, *args, **kwargs))]  # fmt: skip
        found = [(owner, name, self.inputs(getattr(owner, name), "low")) for owner, name in self.LOW]
        found += [(owner, name, self.inputs(getattr(owner, name), "high")) for owner, name in self.highs]
        return [*found, (torch, "is_autocast_enabled", lambda kind="cuda": self.on),
                (torch, "get_autocast_dtype", lambda kind="cuda": self.dtype),
                (torch, "autocast", lambda kind, *args, enabled=True, **kwargs: self.switched(enabled))]  # fmt: skip

    @contextmanager
    def switched(self, on: bool) -> Iterator[None]:
        before, self.on = self.on, on and self.dtype is not None
        try:
            yield
        finally:
            self.on = before



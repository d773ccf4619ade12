"""A frozen linear layer in four bits, and whole models made of them. Any method on such a base is QLoRA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .attach import Sharing, Targets, find_targets
from .core import Adapted
from .layers import is_conv1d, is_linear, is_quantised, shape_of, weight_of
from .nf4 import FLOATS, Packed, check_pack, not_finite, pack, unpack
from .nf4_fast import kernels, unpack_rows
from .sites import at, bare, group, put


class PackedMatmul(torch.autograd.Function):
    """y = x·Wᵀ, W packed and frozen. The backward pass unpacks W again: gx = gy·W needs neither x nor a dense W to be
    kept, so all that waits for it is what the layer stores anyway. Shapes: x (..., in), W (out, in), y (..., out)."""

    @staticmethod
    def forward(ctx, x: Tensor, *packed) -> Tensor:
        ctx.save_for_backward(*packed[:5])
        ctx.facts = packed[5:]
        return (_opaque_product if torch.compiler.is_compiling() else product)(x, *packed)

    @staticmethod
    def backward(ctx, gy: Tensor):
        packed = (*ctx.saved_tensors, *ctx.facts)
        gx = (_opaque_gradient if torch.compiler.is_compiling() else gradient)(gy, *packed)
        return gx, *[None] * len(packed)


def product(x: Tensor, *packed) -> Tensor:
    """x·Wᵀ"""
    p = Packed(*packed)
    if (triton := kernels(p)) and triton.multiplies(p, x):
        return triton.matmul(x, p)
    flat, y = x.reshape(-1, x.shape[-1]), x.new_empty(*x.shape[:-1], p.shape[0])
    for rows, W in unpack_rows(p, x.dtype, x.numel()):
        torch.mm(flat, W.T, out=y.view(-1, p.shape[0])[:, rows])
    return y


def gradient(gy: Tensor, *packed) -> Tensor:
    """gy·W"""
    p = Packed(*packed)
    flat, gx = gy.reshape(-1, gy.shape[-1]), gy.new_empty(*gy.shape[:-1], p.shape[1])
    for rows, W in unpack_rows(p, gy.dtype, gy.numel()):
        gx.view(-1, p.shape[1]).addmm_(flat[:, rows], W, beta=int(rows.start > 0))  # the first sets, the others add
    return gx


def biased_product(x: Tensor, b: Tensor | None, *packed) -> Tensor:
    """x·Wᵀ + b, in memory of its own."""
    y = product(x, *packed)
    return y if b is None else y.add_(b.to(y.dtype))


def biased_gradient(gy: Tensor, b: Tensor | None, *packed) -> Tensor:
    """gy·W, for `biased_product`."""
    return gradient(gy, *packed)


# For torch.compile each is one operation that it does not look into: it would merge the two unpackings of W into one
# and keep the dense W from the forward to the backward pass, which is what QLoRA is there to avoid.
@torch.library.custom_op("peftlab::packed_product", mutates_args=())
def _opaque_product(
    x: Tensor, codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_levels: Tensor | None,
    offset: Tensor | None, shape: Sequence[int], dtype: torch.dtype, kind: str, block: int,
) -> Tensor:  # fmt: skip
    return product(x, codes, absmax, nested_absmax, nested_levels, offset, tuple(shape), dtype, kind, block)


@torch.library.custom_op("peftlab::packed_gradient", mutates_args=())
def _opaque_gradient(
    gy: Tensor, codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_levels: Tensor | None,
    offset: Tensor | None, shape: Sequence[int], dtype: torch.dtype, kind: str, block: int,
) -> Tensor:  # fmt: skip
    return gradient(gy, codes, absmax, nested_absmax, nested_levels, offset, tuple(shape), dtype, kind, block)


@_opaque_product.register_fake
def _(x, codes, absmax, nested_absmax, nested_levels, offset, shape, dtype, kind, block):
    return x.new_empty(*x.shape[:-1], shape[0])


@_opaque_gradient.register_fake
def _(gy, codes, absmax, nested_absmax, nested_levels, offset, shape, dtype, kind, block):
    return gy.new_empty(*gy.shape[:-1], shape[1])


class NF4Linear(nn.Module):
    """A linear layer whose frozen weights are packed in four bits: h = W₀x + b with W₀ ≈ level[code] · absmax.

    layer: nn.Linear or GPT-2's Conv1D, whose weights are packed; its bias stays as it is. block, kind, double: see
    `nf4.pack`. compute: the dtype it multiplies in, None for that of x (autocast has its say, as in nn.Linear).
    Costs beside the packed weights: while it computes, a few MiB of dense rows on a CPU, all rows on a GPU; for the
    backward pass nothing. Its state dict is that of bitsandbytes' Linear4bit, see nf4_files.py.
    Raises ValueError for what `pack` refuses, another kind of layer, or a compute dtype that the device cannot do.
    Source: Dettmers et al. 2023, arXiv:2305.14314, section 3, equation 5.
    """

    def __init__(self, layer: nn.Module, block: int = 64, kind: str = "nf4", double: bool = True,
                 compute: torch.dtype | None = None):  # fmt: skip
        super().__init__()
        check_linear(layer)
        self.out_features, self.in_features = shape_of(layer)
        W = weight_of(layer)
        check_compute(compute, W.device)
        self.compute = compute
        self.bias = layer.bias
        self._put(pack(W, block, kind, double))

    @classmethod
    def of(cls, packed: Packed, bias: Tensor | None = None, compute: torch.dtype | None = None) -> NF4Linear:
        """A layer of weights that are packed already, (out, in)."""
        check_compute(compute, packed.codes.device)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.out_features, self.in_features = packed.shape
        self.compute, self.bias = compute, None
        if bias is not None:
            self.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        self._put(packed)
        return self

    def _put(self, p: Packed) -> None:
        for name, tensor in zip(("weight", *Packed._fields[1:5]), p[:5], strict=True):
            self.register_buffer(name, tensor, persistent=False)  # nf4_files.py saves them, by bitsandbytes' names
        self.dtype, self.kind, self.block = p.dtype, p.kind, p.block

    @property
    def packed(self) -> Packed:
        """What it stores of its weights."""
        return Packed(self.weight, self.absmax, self.nested_absmax, self.nested_levels, self.offset,
                      (self.out_features, self.in_features), self.dtype, self.kind, self.block)  # fmt: skip

    @property
    def n_weights(self) -> int:
        """The number of weights that the codes stand for."""
        return self.out_features * self.in_features

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W (out, in), dense, in `dtype` (None: the weights' own before they were packed)."""
        return unpack(self.packed, dtype)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if not x.is_floating_point():  # of a model that casts it to the dtype of the weight, here codes
            raise ValueError(f"an NF4Linear takes floating-point input, not {x.dtype}; leave this layer dense (skip=…)")
        asked, kind = x.dtype, x.device.type
        if torch.is_autocast_enabled(kind) and asked != torch.float64:  # autocast leaves float64 alone
            asked = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            y = PackedMatmul.apply(x.to(self.compute or asked), *self.packed)
            return (y if self.bias is None else y + self.bias.to(y.dtype)).to(asked)

    def _apply(self, fn, recurse: bool = True):
        """model.to(bfloat16) and the like: the scales stay float32, or all weights would change; only what a dense
        copy of them would come out as follows."""
        scales = {name: t for name, t in self._buffers.items() if t is not None and t.is_floating_point()}
        super()._apply(fn, recurse)
        for name, old in scales.items():
            if self._buffers[name].dtype != torch.float32:
                self._buffers[name] = old.to(self._buffers[name].device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        from .nf4_files import to_state

        destination[f"{prefix}weight"] = self.weight  # first, as in bitsandbytes' order
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({f"{prefix}weight{name}": tensor for name, tensor in to_state(self.packed).items()})

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        from .nf4_files import from_state

        start = f"{prefix}weight"
        mine = {key.removeprefix(start): state_dict.pop(key) for key in list(state_dict)
                if key == start or key.startswith(f"{start}.")}  # fmt: skip
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if not mine:  # a part of a model, such as an adapter's: strict=False allows that
            missing.append(start)
            return
        try:
            p = from_state(mine, start)
            if p.shape != self.packed.shape:
                raise ValueError(f"{start}: a matrix of {p.shape} in the file, of {self.packed.shape} in the model")
        except ValueError as error:
            errors.append(str(error))
        else:
            here = None if metadata.get("assign_to_params_buffers") else self.weight.device
            self._put(Packed(*[t if t is None else t.to(here or t.device) for t in p[:5]], *p[5:]))

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
                f"kind={self.kind}, block={self.block}, {self.packed.bits:.2f} bits a weight")  # fmt: skip


def check_linear(layer: nn.Module) -> None:
    """ValueError unless it is a linear layer with dense weights."""
    if is_quantised(layer):
        raise ValueError(f"this {type(layer).__name__} is quantised already; packing it again would only lose more")
    out_features, in_features = shape_of(layer)
    W = getattr(layer, "weight", None)
    if not isinstance(W, Tensor) or W.numel() != out_features * in_features:
        raise ValueError(f"this {type(layer).__name__} has no dense weights of its {out_features}×{in_features}; only "
                         "layers like nn.Linear and Conv1D can be packed")  # fmt: skip


def check_compute(dtype: torch.dtype | None, device: torch.device) -> None:
    """ValueError if a device cannot multiply matrices of a dtype."""
    if dtype is None or device.type == "meta":
        return
    if dtype not in FLOATS:
        raise ValueError(f"cannot compute in {dtype}; float32, bfloat16 and float16 are possible")
    emulated = device.type == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(False)
    try:
        one = torch.ones(1, 1, dtype=dtype, device=device)
        one @ one
    except RuntimeError as error:
        raise ValueError(f"{device} cannot compute in {dtype} ({error}); take float32") from None
    if emulated:
        raise ValueError(f"{device} has no bfloat16 of its own; take compute=torch.float16 or torch.float32")


def quantize(model: nn.Module, skip: Targets = (), also: Targets = (), *, block: int = 64, kind: str = "nf4",
             double: bool = True, compute: torch.dtype | None = None) -> nn.Module:  # fmt: skip
    """Put an `NF4Linear` in the place of each frozen linear layer, one after the other, and return the model.

    Embeddings, norms, the output head and what transformers keeps in float32 (T5's wo) stay as they are. skip, also:
    paths of layers that stay too, or that do not, as `attach` takes them ("down_proj", "lm_head"). Adapters attached
    before stay where they are, and merged ones are packed with their layer. Of a model that is packed in part, as after
    a merge or an interruption, the dense layers are packed and the others stay. A model fresh from its file, where all
    trains, is frozen by this: four bits cannot be trained.
    The dense weights of a layer are freed before the next one is packed, unless you hold them elsewhere.
    Raises ValueError, and leaves the model as it was, for a layer that trains, shares its weights, has hooks or holds
    NaN, for a model that is quantised already, and for what `NF4Linear` refuses.
    """
    paths = paths_to_quantize(model, skip, also)
    paths = [path for path in paths if not isinstance(bare(at(model, path)), NF4Linear)] or paths
    sharing = Sharing(model)
    for path in paths:
        try:
            check_packable(model, path, block, kind, compute, sharing)
        except ValueError as error:
            raise ValueError(f"{path!r} cannot be quantised: {error}") from None
    if all(p.requires_grad for p in model.parameters()):
        model.requires_grad_(False)
    for path in paths:
        site = at(model, path)
        layer = NF4Linear(bare(site), block, kind, double, compute).train(site.training)
        if isinstance(site, Adapted):
            site.layer = layer
            for adapter in site.adapters.values() if site.original is None else ():  # merged: theirs is the original
                adapter.__dict__["layer"] = layer
        else:
            put(model, path, layer)
        del site
    return model


READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # their fast paths hand the weights to a fused kernel


def paths_to_quantize(model: nn.Module, skip: Targets, also: Targets) -> list[str]:
    """The bare paths of the layers that `quantize` means; ValueError for names that lead nowhere or change nothing."""
    if is_linear(model):
        raise ValueError(f"this {type(model).__name__} is a layer, not a model with layers; NF4Linear(layer) packs it")
    kept = {*(getattr(model, "_keep_in_fp32_modules", None) or ()),
            *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}  # fmt: skip
    paths = [path for path in group(model, "all-linear") if not kept & set(path.split("."))]
    more = find_targets(model, also) if also else []
    if fixed := [path for path in more if kept & set(path.split("."))]:
        raise ValueError(f"also={also!r}: {type(model).__name__} reads the dtype of {fixed[0]!r}, so it stays dense")
    paths += [path for path in more if path not in paths]
    stay = find_targets(model, skip) if skip else []
    if unknown := [path for path in stay if all(p != path and not p.startswith(f"{path}.") for p in paths)]:
        raise ValueError(f"skip={skip!r}: {unknown[0]!r} would not be quantised anyway; leave it out of skip")
    paths = [path for path in paths if not any(path == s or path.startswith(f"{s}.") for s in stay)]
    if not paths:
        raise ValueError(f"skip={skip!r} leaves no layer of {type(model).__name__} to quantise")
    return paths


def check_packable(
    model: nn.Module, path: str, block: int, kind: str, compute: torch.dtype | None, sharing: Sharing
) -> None:
    """ValueError with the reason why the layer at `path` cannot be packed; nothing is changed."""
    layer = bare(at(model, path))
    check_linear(layer)
    W = weight_of(layer)
    if isinstance(owner := bare(at(model, path.rpartition(".")[0])), READERS):
        raise ValueError(f"it belongs to {type(owner).__name__}, which reads its weight instead of calling it; skip it")
    if sharing.repeated(layer):
        raise ValueError("it stands at more than one place in the model; skip it")
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        raise ValueError("it has hooks or a forward of its own, which would be lost; remove them first, or skip it")
    if layer.weight.requires_grad and not all(p.requires_grad for p in model.parameters()):
        raise ValueError("it trains, and four bits cannot be trained; freeze it (requires_grad_(False)), or skip it")
    if sharing.tied(layer):
        raise ValueError("it shares its weight with another module, which would keep the dense one; skip it")
    check_pack(W, block, kind)
    check_compute(compute, W.device)
    if W.is_meta:
        return
    if not torch.stack(torch.aminmax(W)).isfinite().all():
        raise ValueError(not_finite(W))
    if type(layer) is not nn.Linear and not is_conv1d(layer):  # a class of its own: ask it
        x = torch.linspace(-1, 1, W.shape[1]).to(W).unsqueeze(0)
        with torch.no_grad():
            y, want = layer(x), nn.functional.linear(x, W, layer.bias)
        if y.shape != want.shape or not torch.allclose(y, want, rtol=0.01, atol=0.01 * want.abs().max().item()):
            raise ValueError(f"{type(layer).__name__} computes something else than x·Wᵀ + b; skip it")

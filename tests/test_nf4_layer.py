"""A linear layer in four bits against the dense layer it stands for, and whole models of such layers."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import tracemalloc
import weakref

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, TARGETS, build, inputs, labels, shake
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import peftlab as pl
from peftlab import layers, nf4, nf4_fast, nf4_layer
from peftlab.attach import hosts
from peftlab.layers import is_conv1d, weight_of

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of compiled kernels that are not there

MIB = 2**20
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# fp32: the same products in the same order, but the bias is added after the sum. bf16, fp16: 8 and 11 bits of mantissa,
# and the sum is rounded once more before the bias is added
CLOSE = {"fp32": dict(rtol=1e-5, atol=1e-5), "bf16": dict(rtol=2e-2, atol=4e-2), "fp16": dict(rtol=2e-3, atol=4e-3)}


def linear(in_features: int = 96, out_features: int = 64, bias: bool = True, dtype=torch.float32) -> nn.Linear:
    return nn.Linear(in_features, out_features, bias).to(dtype).requires_grad_(False)


def conv1d(in_features: int = 96, out_features: int = 64, dtype=torch.float32) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(out_features, in_features).to(dtype).requires_grad_(False)
    layer.bias.normal_()
    return layer


def dense_twin(layer: pl.NF4Linear, dtype=torch.float32) -> nn.Linear:
    """nn.Linear with the weights that the packed ones stand for."""
    twin = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=dtype).requires_grad_(False)
    twin.weight.copy_(layer.dequantize(dtype))
    if layer.bias is not None:
        twin.bias.copy_(layer.bias)
    return twin


def passes(layer, x, seed: int = 3):
    """Output and input gradient for a fixed gradient of the output."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    gy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype)
    return y.detach(), torch.autograd.grad(y, x, gy)[0]


def snapshot(model) -> dict:
    """Everything that could change: classes, bytes, what trains."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "modules": {path: (type(module), id(module)) for path, module in model.named_modules()},
        "bytes": {name: (id(t), t.dtype, t.reshape(-1).view(torch.uint8).tolist()) for name, t in tensors.items()},
        "trains": {name: p.requires_grad for name, p in model.named_parameters()},
    }


def same_bytes(a, b) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def memory(work) -> tuple[int, int]:
    """(most, last): bytes above the start while `work` ran, and at its end; counted at each allocation and release.

    Those of torch's CPU allocator and, above them in `most`, numpy's, whose arrays can be a tensor's memory.
    """
    tracemalloc.start()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        tracemalloc.reset_peak()
        start = tracemalloc.get_traced_memory()[0]
        result = work()
        arrays = tracemalloc.get_traced_memory()[1] - start
    tracemalloc.stop()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    del result
    return most + arrays, now


# --- one layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (96, 64), (33, 7), (1, 1), (100, 130), (130, 3)])
def test_it_computes_what_the_dense_layer_with_its_weights_does(shape, bias, dtype):
    layer = pl.NF4Linear(linear(*shape, bias, FLOATS[dtype]))
    assert layer.dequantize().dtype == FLOATS[dtype]
    for rows in [(5,), (2, 3), (1,), (), (0,)]:
        x = torch.randn(*rows, shape[0]).to(FLOATS[dtype])
        y, gx = passes(layer, x)
        want, gwant = passes(dense_twin(layer, FLOATS[dtype]), x)
        assert y.dtype == gx.dtype == FLOATS[dtype]
        torch.testing.assert_close(y, want, **CLOSE[dtype])
        torch.testing.assert_close(gx, gwant, **CLOSE[dtype])


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int4", "int8"])
@pytest.mark.parametrize("double", [True, False])
def test_every_kind_of_code_computes(kind, double):
    layer = pl.NF4Linear(linear(33, 7), 32, kind, double)
    x = torch.randn(5, 33)
    for got, want in zip(passes(layer, x), passes(dense_twin(layer), x), strict=True):
        torch.testing.assert_close(got, want, **CLOSE["fp32"])


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_conv1d_is_packed_as_the_matrix_it_is_with_rows_of_outputs(dtype):
    source = conv1d(dtype=FLOATS[dtype])
    layer, x = pl.NF4Linear(source), torch.randn(5, 96).to(FLOATS[dtype])
    assert (layer.in_features, layer.out_features) == (96, 64) and layer.bias is source.bias
    assert torch.equal(layer.dequantize(), nf4.unpack(nf4.pack(source.weight.T.contiguous())))
    by_hand = copy.deepcopy(source)
    by_hand.weight.copy_(layer.dequantize().T)
    for got, want in zip(passes(layer, x), passes(by_hand, x), strict=True):
        torch.testing.assert_close(got, want, **CLOSE[dtype])


@pytest.mark.parametrize("dense", [1, 1000, 5000])
@pytest.mark.parametrize("shape", [(96, 200), (33, 200), (100, 257)])
def test_by_parts_it_computes_the_same(shape, dense, monkeypatch):
    layer, x = pl.NF4Linear(linear(*shape)), torch.randn(3, 4, shape[0])
    whole = passes(layer, x)
    monkeypatch.setattr(nf4_fast, "DENSE", dense)
    assert len(list(nf4_fast.unpack_rows(layer.packed, x.dtype))) > 1
    for got, want in zip(passes(layer, x), whole, strict=True):
        torch.testing.assert_close(got, want, **CLOSE["fp32"])  # sums in another order


def test_its_gradients_are_those_of_finite_differences():
    layer, x = pl.NF4Linear(linear(33, 7)).double(), torch.randn(3, 33, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x) and torch.autograd.gradgradcheck(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.double == dense_twin(layer, torch.double)(x).dtype


def test_a_bias_may_train():
    source = linear()
    source.bias.requires_grad_()
    layer, x = pl.NF4Linear(source), torch.randn(2, 5, 96)
    layer(x).sum().backward()
    torch.testing.assert_close(source.bias.grad, torch.full((64,), 10.0))


def bitsandbytes_layer(source: nn.Linear, kind: str, block: int, double: bool):
    bnb = pytest.importorskip("bitsandbytes")
    theirs = bnb.nn.Linear4bit(source.in_features, source.out_features, source.bias is not None,
                               compress_statistics=double, quant_type=kind)  # fmt: skip
    theirs.weight = bnb.nn.Params4bit(source.weight.clone(), requires_grad=False, blocksize=block, quant_type=kind,
                                      compress_statistics=double)  # fmt: skip
    theirs.bias = None if source.bias is None else nn.Parameter(source.bias.clone(), requires_grad=False)
    return theirs.to("cpu").train()  # in eval mode some CPUs take a kernel of other numerics


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("block, in_features", [(64, 128), (128, 256), (32, 96)])
def test_it_computes_what_bitsandbytes_does(kind, double, block, in_features):
    source, x = linear(in_features, 80), torch.randn(7, in_features)
    theirs = bitsandbytes_layer(source, kind, block, double)
    ours = pl.NF4Linear(source, block, kind, double)
    assert torch.equal(ours.weight, theirs.weight)
    for got, want in zip(passes(ours, x), passes(theirs, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # the same weights; the bias is added elsewhere
    source.bias = ours.bias = theirs.bias = None
    for got, want in zip(passes(ours, x), passes(theirs, x), strict=True):
        assert torch.equal(got, want)


# --- memory ---------------------------------------------------------------------------------------------------------


def test_the_weights_of_a_layer_of_bitsandbytes_are_its_dequantised_ones():
    source = linear(128, 80)
    theirs, ours = bitsandbytes_layer(source, "nf4", 64, True), pl.NF4Linear(source)
    assert torch.equal(weight_of(theirs), weight_of(ours)) and weight_of(theirs).dtype == torch.float32
    assert torch.equal(layers.dense(theirs).weight, ours.dequantize())


def saved(work) -> list[torch.Tensor]:
    """The tensors that autograd keeps for the backward pass."""
    kept: list[torch.Tensor] = []

    def note(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        work()
    return kept


def storages(tensors) -> dict[int, int]:
    """address -> bytes"""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype, compute", [("fp32", None), ("bf16", None), ("fp32", torch.bfloat16)])
def test_for_backward_it_keeps_nothing_but_its_own_buffers(double, dtype, compute):
    source = linear(256, 128, dtype=FLOATS[dtype])
    layer = pl.NF4Linear(source, double=double, compute=compute)
    x = torch.randn(64, 256, dtype=FLOATS[dtype], requires_grad=True)
    kept = storages(saved(lambda: layer(x)))
    own = storages(layer.buffers())
    assert kept and set(kept) <= set(own)
    # beside nf4 codes and scales: the 256 levels of the scales and their mean
    assert sum(kept.values()) == sum(own.values()) == layer.packed.bits * layer.n_weights / 8 + double * (256 * 4 + 4)
    dense = storages(saved(lambda: source(x)))
    assert dense == storages([source.weight])  # the frozen dense layer: its matrix, not x


def test_autocast_keeps_nothing_more_either():
    layer, x = pl.NF4Linear(linear(256, 128)), torch.randn(64, 256, requires_grad=True)

    def work():
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)

    assert set(storages(saved(work))) <= set(storages(layer.buffers()))


def test_lora_on_it_keeps_what_lora_needs_and_no_dense_matrix():
    model = pl.attach(pl.quantize(nn.Sequential(linear(256, 128))), pl.LoRA, "0", r=4)
    x = torch.randn(64, 256, requires_grad=True)
    kept = storages(saved(lambda: model(x)))
    allowed = storages([x, *model.buffers(), *model.parameters()])
    others = [size for address, size in kept.items() if address not in allowed]
    assert sum(others) <= 2 * 64 * 4 * 4  # z = Ax and s·z of the adapter; W would be 131,072


def test_forward_and_backward_never_hold_a_whole_dense_matrix(monkeypatch):
    monkeypatch.setattr(nf4_fast, "DENSE", 2**14)
    layer, x = pl.NF4Linear(linear(512, 1024, bias=False)), torch.randn(4, 512, requires_grad=True)
    dense = 4 * layer.n_weights
    passes(layer, x)  # look-up tables are made once
    most, _ = memory(lambda: passes(layer, x))
    assert most < dense / 4
    assert memory(layer.dequantize)[0] >= dense  # it would have been seen
    with torch.no_grad():
        assert memory(lambda: layer(x))[0] < dense / 4


def test_between_forward_and_backward_only_the_output_is_there():
    layer, x = pl.NF4Linear(linear(512, 1024, bias=False)), torch.randn(4, 512, requires_grad=True)
    layer(x)
    outputs = []
    memory(lambda: outputs.append(layer(x)))
    most, last = memory(lambda: outputs.append(layer(x)))
    assert most > last == outputs[0].nbytes


# --- dtypes ---------------------------------------------------------------------------------------------------------


def test_autocast_has_its_say_as_with_a_dense_layer():
    layer, x = pl.NF4Linear(linear()), torch.randn(5, 96)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == linear()(x).dtype == torch.bfloat16
        got, want = passes(layer, x), passes(dense_twin(layer), x)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, **CLOSE["bf16"])


@pytest.mark.parametrize("outside", FLOATS)
@pytest.mark.parametrize("inside", FLOATS)
def test_it_multiplies_in_the_compute_dtype_and_answers_in_that_of_x(inside, outside):
    layer = pl.NF4Linear(linear(bias=False), compute=FLOATS[inside])
    x = torch.randn(5, 96).to(FLOATS[outside])
    y, gx = passes(layer, x)
    want = F.linear(x.to(FLOATS[inside]), layer.dequantize(FLOATS[inside])).to(x.dtype)
    assert torch.equal(y, want) and gx.dtype == x.dtype


@pytest.mark.parametrize("compute", [torch.float64, torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_other_compute_dtypes_are_refused(compute):
    with pytest.raises(ValueError, match=f"cannot compute in {compute}; float32, bfloat16 and float16 are possible"):
        pl.NF4Linear(linear(), compute=compute)
    with pytest.raises(ValueError, match=f"cannot compute in {compute}"):
        pl.NF4Linear.of(nf4.pack(torch.randn(4, 64)), compute=compute)
    model = nn.Sequential(linear())
    with pytest.raises(ValueError, match=f"'0' cannot be quantised: cannot compute in {compute}"):
        pl.quantize(model, compute=compute)
    assert type(model[0]) is nn.Linear


def test_moved_to_another_dtype_it_keeps_its_scales_and_so_its_values():
    for double in (True, False):
        layer = pl.NF4Linear(linear(), double=double)
        values, before = layer.dequantize(torch.float32), snapshot(layer)["bytes"]
        for move, dtype in [("bfloat16", torch.bfloat16), ("half", torch.float16), ("double", torch.float64),
                            ("float", torch.float32)]:  # fmt: skip
            getattr(layer, move)()
            assert torch.equal(layer.dequantize(torch.float32), values)
            assert layer.dtype == layer.dequantize().dtype == layer.bias.dtype == dtype
            assert layer(torch.randn(2, 96, dtype=dtype)).dtype == dtype
            after = snapshot(layer)["bytes"]
            assert all(after[name][1:] == before[name][1:] for name in before if name != "bias")


# --- copies and files -----------------------------------------------------------------------------------------------


def twins(layer):
    return {
        "deepcopy": copy.deepcopy(layer),
        "pickle": pickle.loads(pickle.dumps(layer)),
        "of": pl.NF4Linear.of(layer.packed, layer.bias, layer.compute),
    }


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "of"])
@pytest.mark.parametrize("double", [True, False])
def test_a_copy_computes_the_same(how, double):
    layer, x = pl.NF4Linear(linear(33, 50), 32, "fp4", double, compute=torch.bfloat16), torch.randn(5, 33)
    twin = twins(layer)[how]
    assert torch.equal(twin(x), layer(x))
    assert (twin.kind, twin.block, twin.compute, twin.dtype) == ("fp4", 32, torch.bfloat16, torch.float32)
    assert repr(twin) == repr(layer) and "kind=fp4, block=32" in repr(layer)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_state_dict_goes_round(kind, double, bias):
    layer = pl.NF4Linear(linear(33, 50, bias), 32, kind, double)
    other = pl.NF4Linear(linear(33, 50, bias), 64, "nf4", not double)
    other.load_state_dict(layer.state_dict())
    assert other.packed[5:] == layer.packed[5:]
    x = torch.randn(3, 33)
    assert torch.equal(other(x), layer(x))
    theirs, ours = other.state_dict(), layer.state_dict()
    assert list(theirs) == list(ours) and all(same_bytes(theirs[name], ours[name]) for name in ours)


def test_a_model_with_adapters_goes_round():
    def quantized(seed):
        model = pl.attach(pl.quantize(build("llama", seed)), pl.LoRA, r=2)
        shake(model.model.layers[0].self_attn.q_proj.adapters, seed=seed)
        return model

    one, two, batch = quantized(0), quantized(1), inputs("llama")
    assert not torch.equal(one(**batch).logits, two(**batch).logits)
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(**batch).logits, two(**batch).logits)


@pytest.mark.parametrize("source", [
    pytest.param(lambda: pl.NF4Linear(linear(64, 96)), id="transposed"),
    pytest.param(lambda: pl.NF4Linear(linear(96, 63)), id="one row fewer"),
    pytest.param(lambda: linear(96, 64), id="dense"),
])  # fmt: skip
def test_a_state_dict_that_does_not_fit_is_refused_and_changes_no_weight(source):
    layer = pl.NF4Linear(linear(96, 64, bias=False))
    before, state = snapshot(layer), {k: v for k, v in source().state_dict().items() if k != "bias"}
    with pytest.raises(RuntimeError, match="weight"):
        layer.load_state_dict(state)
    assert snapshot(layer) == before


def test_a_state_dict_without_the_weight_is_refused():
    layer = pl.NF4Linear(linear(96, 64))
    before = snapshot(layer)["bytes"]["weight"]
    with pytest.raises(RuntimeError, match="weight"):
        layer.load_state_dict({"bias": layer.bias})
    assert snapshot(layer)["bytes"]["weight"] == before


def test_a_part_of_a_state_dict_leaves_the_rest_as_it_is():
    """As the state dict of a head or of adapters does, with strict=False."""
    model = pl.quantize(build("llama"))
    before = logits(model)
    head = {"lm_head.weight": model.lm_head.weight}
    with pytest.raises(RuntimeError, match="Missing key.*q_proj.weight"):
        model.load_state_dict(head)
    assert "model.layers.0.mlp.up_proj.weight" in model.load_state_dict(head, strict=False).missing_keys
    assert torch.equal(logits(model), before)


def test_a_model_without_data_takes_its_weights_from_a_state_dict():
    full = pl.quantize(nn.Sequential(linear(), linear(64, 32)))
    with torch.device("meta"):
        empty = pl.quantize(nn.Sequential(linear(), linear(64, 32)))
    empty.load_state_dict(full.state_dict(), assign=True)
    x = torch.randn(2, 96)
    assert torch.equal(empty(x), full(x))


# --- compiled and recomputed ----------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("double", [True, False])
def test_compiled_without_a_break_it_computes_the_same(backend, double, fresh_compiler):
    layer, x = pl.NF4Linear(linear(), double=double), torch.randn(2, 5, 96)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for got, want in zip(passes(compiled, x), passes(layer, x), strict=True):
        torch.testing.assert_close(got, want, **CLOSE["fp32"])
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), **CLOSE["fp32"])


def test_compiled_it_keeps_no_dense_matrix_either(fresh_compiler):
    layer, x = pl.NF4Linear(linear(256, 128)), torch.randn(4, 256, requires_grad=True)
    # with inductor's choice of what to keep, which merges what forward and backward compute twice; no C compiler
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition")
    compiled(x)  # compiles
    kept = storages(saved(lambda: compiled(x)))
    assert kept and max(kept.values()) <= layer.weight.nbytes  # the codes; dense it would be eight times as much


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_lora_on_it_compiles_without_a_break(backend, fresh_compiler):
    model = pl.attach(pl.quantize(nn.Sequential(linear(96, 64), nn.GELU(), linear(64, 32))), pl.LoRA, "0|2", r=4)
    for seed, adapter in enumerate(pl.adapters(model)["default"].values()):
        shake(adapter, seed=seed)
    x, trained = torch.randn(5, 96), [p for p in model.parameters() if p.requires_grad]

    def gradients(f):
        return torch.autograd.grad(f(x).square().sum(), trained)

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for got, want in zip(gradients(compiled), gradients(model), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # sums in another order, twice


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_in_the_backward_pass_it_gives_the_same_gradient(reentrant):
    layers, x = nn.Sequential(pl.NF4Linear(linear(96, 96)), nn.Tanh(), pl.NF4Linear(linear(96, 64))), torch.randn(5, 96)
    want = passes(layers, x)
    got = passes(lambda x: checkpoint(layers, x, use_reentrant=reentrant), x) if not reentrant else None
    if reentrant:  # this kind has no autograd.grad
        x = x.clone().requires_grad_()
        y = checkpoint(layers, x, use_reentrant=True)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)))
        got = y.detach(), x.grad
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_model_trains_the_same_with_gradient_checkpointing():
    def gradients(checkpointing: bool):
        model = pl.attach(pl.quantize(build("llama")), pl.LoRA, r=2).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        batch = inputs("llama")
        model(**batch, labels=labels("llama", batch)).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    torch.manual_seed(0)
    plain = gradients(False)
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(gradients(True), plain, strict=True)) and any(g.any() for g in plain)


# --- one layer: refusals --------------------------------------------------------------------------------------------


def test_a_layer_that_is_none_is_refused():
    for layer in (nn.LayerNorm(4), nn.Conv1d(4, 4, 1), nn.Embedding(4, 4)):
        with pytest.raises(ValueError, match=f"needs a linear layer .*not {type(layer).__name__}"):
            pl.NF4Linear(layer)
    layer = linear()
    layer.weight = None  # as of layers that other tools packed
    with pytest.raises(ValueError, match="this Linear has no dense weights of its 64×96"):
        pl.NF4Linear(layer)


def test_integers_are_refused():
    layer = pl.NF4Linear(linear())
    with pytest.raises(ValueError, match="floating-point input, not torch.uint8; leave this layer dense"):
        layer(torch.ones(2, 96).to(layer.weight.dtype))  # what T5 would do


def test_a_packed_layer_is_refused():
    with pytest.raises(ValueError, match="this NF4Linear is quantised already"):
        pl.NF4Linear(pl.NF4Linear(linear()))
    with pytest.raises(ValueError, match="this Linear4bit is quantised already"):
        pl.NF4Linear(bitsandbytes_layer(linear(), "nf4", 64, True))


def test_what_pack_refuses_the_layer_refuses():
    with pytest.raises(ValueError, match="block size 48"):
        pl.NF4Linear(linear(), 48)
    with pytest.raises(ValueError, match="no data type 'nf5'"):
        pl.NF4Linear(linear(), kind="nf5")
    with pytest.raises(ValueError, match="1 of 6,144 weights are NaN"):
        layer = linear()
        layer.weight[3, 4] = torch.nan
        pl.NF4Linear(layer)
    with pytest.raises(ValueError, match="nothing to pack"):
        pl.NF4Linear(nn.Linear(0, 4))


# --- models ---------------------------------------------------------------------------------------------------------

STAY = {"bert": {"classifier"}, "t5": {"lm_head", "wo"}}  # a head; transformers keeps T5's wo in float32


def dense_layers(model) -> dict[str, nn.Module]:
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m)}


def packed_layers(model) -> dict[str, pl.NF4Linear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, pl.NF4Linear)}


def logits(model, family="llama"):
    with torch.no_grad():
        return model(**inputs(family)).logits


def by_hand(model, **how):
    """The dense model with the weights of its linear layers put through four bits."""
    for path, layer in dense_layers(model).items():
        if path.split(".")[-1] not in STAY.get(how.get("family"), {"lm_head"}):
            W = nf4.unpack(nf4.pack(weight_of(layer)))
            layer.weight.data = W.T.contiguous() if is_conv1d(layer) else W
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_computes_with_its_weights_in_four_bits(family):
    stay = STAY.get(family, {"lm_head"})
    model, dense = build(family), dense_layers(build(family))
    untouched = {id(m) for path, m in model.named_modules() if path not in dense or path.split(".")[-1] in stay}
    before = pl.count(model).total
    assert pl.quantize(model) is model
    assert set(packed_layers(model)) == {path for path in dense if path.split(".")[-1] not in stay}
    assert set(dense_layers(model)) == {path for path in dense if path.split(".")[-1] in stay}
    assert untouched == {id(m) for m in model.modules() if not isinstance(m, pl.NF4Linear)}
    torch.testing.assert_close(logits(model, family), logits(by_hand(build(family), family=family), family),
                               rtol=1e-4, atol=1e-4)  # fmt: skip  # biases are added after the sum, through all layers
    assert not torch.allclose(logits(model, family), logits(build(family), family), atol=1e-2), "four bits show"
    assert pl.count(model).total == before
    assert not any(p.requires_grad for p in model.parameters())
    assert all(not module.training for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_trains_adapters_on_its_weights_in_four_bits(family):
    model = pl.attach(pl.quantize(build(family)), pl.LoRA, TARGETS[family], r=2)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    batch = inputs(family)
    model(**batch, labels=labels(family, batch)).loss.backward()
    assert all(a.lora_B.grad.abs().sum() > 0 for a in pl.adapters(model)["default"].values())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_settings_reach_every_layer():
    model = pl.quantize(build("llama"), block=32, kind="fp4", double=False, compute=torch.bfloat16)
    found = {(m.block, m.kind, m.nested_absmax, m.compute) for m in packed_layers(model).values()}
    assert found == {(32, "fp4", None, torch.bfloat16)}
    assert logits(model).dtype == torch.float32


def test_skipped_layers_stay_and_named_heads_do_not():
    model = pl.quantize(build("llama"), skip="down_proj|layers.0.self_attn")
    assert not [p for p in packed_layers(model) if p.endswith("down_proj") or "layers.0.self_attn" in p]
    assert len(packed_layers(model)) == 14 - 2 - 4
    assert set(packed_layers(pl.quantize(build("llama"), skip=["q_proj"], also="lm_head"))) >= {"lm_head"}


@pytest.mark.parametrize("skip, also, message", [
    ("q_prj", (), "no module path matches 'q_prj'; did you mean 'q_proj'"),
    ("lm_head", (), "skip='lm_head': 'lm_head' would not be quantised anyway; leave it out"),
    ("norm", (), "would not be quantised anyway"),
    ("all-linear", (), "leaves no layer of LlamaForCausalLM to quantise"),
    ((), "lm_hed", "no module path matches 'lm_hed'; did you mean 'lm_head'"),
    ((), "embed_tokens", "'model.embed_tokens' cannot be quantised: needs a linear layer .*not Embedding"),
    ((), "norm", "cannot be quantised: needs a linear layer"),
    ((), "wo", "also='wo': T5ForConditionalGeneration reads the dtype of 'encoder.block.0.layer.1.DenseReluDense.wo'"),
])  # fmt: skip
def test_names_that_lead_nowhere_are_refused(skip, also, message):
    model = build("t5" if also == "wo" else "llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        pl.quantize(model, skip, also)
    assert snapshot(model) == before


def spoil_late(model):
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = torch.nan


def train_one(model):
    model.requires_grad_(False)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_()


def tie_two(model):
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def in_float64(model):
    model.model.layers[1].mlp.up_proj.double()


def theirs(model):
    model.requires_grad_(False)
    model.model.layers[1].mlp.up_proj = bitsandbytes_layer(model.model.layers[1].mlp.up_proj, "nf4", 64, True)


def theirs_in_eight_bits(model):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(32, 64, bias=False, has_fp16_weights=False)
    model.requires_grad_(False).model.layers[1].mlp.up_proj = layer.to("cpu").requires_grad_(False)


def hook_one(model):
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, args, y: 2 * y)


@pytest.mark.parametrize("spoil, how, message", [
    (hook_one, {}, "'model.layers.1.mlp.up_proj' cannot be quantised: it has hooks"),
    (spoil_late, {}, "'model.layers.1.mlp.down_proj' cannot be quantised: 1 of 2,048 weights are NaN"),
    (train_one, {}, r"'model.layers.1.mlp.up_proj' cannot be quantised: it trains, .*freeze it \(requires_grad_\("),
    (tie_two, {}, "'model.layers.0.mlp.up_proj' cannot be quantised: it shares its weight with another.*skip it"),
    (in_float64, {}, "'model.layers.1.mlp.up_proj' cannot be quantised: weights of torch.float64 cannot be packed"),
    (theirs, {}, "'model.layers.1.mlp.up_proj' cannot be quantised: this Linear4bit is quantised already"),
    (theirs_in_eight_bits, {}, "'model.layers.1.mlp.up_proj' cannot be quantised"),
    (pl.quantize, {}, "'model.layers.0.self_attn.q_proj' cannot be quantised: this NF4Linear is quantised already"),
    (lambda model: None, dict(block=100), "cannot be quantised: block size 100"),
    (lambda model: None, dict(kind="nf8"), "cannot be quantised: no data type 'nf8'"),
    (lambda model: None, dict(kind="dynamic8"), "cannot be quantised: 'dynamic8' is for scales"),
], ids=["hook", "NaN", "trains", "tied", "float64", "theirs", "8 bits", "twice", "block", "kind", "map"])  # fmt: skip
def test_a_refused_model_is_as_it_was(spoil, how, message):
    model = build("llama")
    spoil(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        pl.quantize(model, **how)
    assert snapshot(model) == before


def test_a_layer_is_no_model():
    with pytest.raises(ValueError, match=r"this Linear is a layer, .*NF4Linear\(layer\) packs it"):
        pl.quantize(linear())


def test_after_an_interruption_it_goes_on(monkeypatch):
    """In place, layer by layer: what was packed stays packed, nothing is lost, and the same call does the rest."""
    model, packed = build("llama"), []

    def interrupted(*args):
        if len(packed) == 3:
            raise KeyboardInterrupt
        packed.append(args)
        return nf4.pack(*args)

    with monkeypatch.context() as patch:
        patch.setattr(nf4_layer, "pack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pl.quantize(model)
    assert len(packed_layers(model)) == 3
    assert torch.equal(logits(pl.quantize(model)), logits(pl.quantize(build("llama"))))


def test_layers_that_torch_reads_and_does_not_call_are_refused():
    block = nn.TransformerEncoderLayer(32, 4, dim_feedforward=64, batch_first=True)
    model = nn.Sequential(block, linear(32, 4)).requires_grad_(False)
    for skip, message in [((), "'0.self_attn.out_proj' .*to MultiheadAttention, which reads its weight .*skip it"),
                          ("out_proj", "'0.linear1' .*belongs to TransformerEncoderLayer")]:  # fmt: skip
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            pl.quantize(model, skip)
        assert snapshot(model) == before
    assert list(packed_layers(pl.quantize(model, "0"))) == ["1"]


def test_a_layer_at_two_places_is_refused():
    layer = linear(64, 64)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    with pytest.raises(ValueError, match="'0' cannot be quantised: it stands at more than one place"):
        pl.quantize(model)
    assert model[0] is model[2] is layer


def test_a_tied_head_is_refused():
    model = build("llama", tie_word_embeddings=True)
    before = snapshot(model)
    with pytest.raises(ValueError, match="'lm_head' cannot be quantised: it shares its weight with another module"):
        pl.quantize(model, also="lm_head")
    assert snapshot(model) == before
    pl.quantize(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_model_that_trains_is_frozen_by_it_and_a_frozen_one_stays_frozen():
    model = build("llama")
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in pl.quantize(model).parameters())
    model = build("llama").requires_grad_(False)
    model.lm_head.weight.requires_grad_()  # a head that trains is none of its business
    pl.quantize(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]


def test_a_model_without_data_is_quantised_in_shape():
    with torch.device("meta"):
        model = build("llama")
    before = pl.count(model).total
    pl.quantize(model)
    real = dict(pl.quantize(build("llama")).named_buffers())
    assert {name: (b.shape, b.dtype) for name, b in model.named_buffers()} == {
        name: (b.shape, b.dtype) for name, b in real.items()
    }
    assert pl.count(model).total == before and all(b.is_meta for name, b in model.named_buffers() if "proj" in name)


def test_training_mode_stays():
    assert all(m.training for m in pl.quantize(build("llama").train()).modules())


def test_the_parameters_are_counted_as_before():
    before = pl.count(build("llama"))
    after = pl.count(pl.quantize(build("llama")))
    assert (after.total, after.base, after.per_module.keys()) == (before.total, before.base, before.per_module.keys())
    adapted = pl.count(pl.attach(pl.quantize(build("llama")), pl.LoRA, r=2))
    dense = pl.count(pl.attach(build("llama"), pl.LoRA, r=2))
    assert adapted.trainable == dense.trainable == adapted.expected["default"]


# --- models with adapters -------------------------------------------------------------------------------------------


def adapted(quantized_first: bool):
    model = build("llama")
    if quantized_first:
        pl.quantize(model)
    torch.manual_seed(0)
    pl.attach(model, pl.LoRA, "q_proj|down_proj", name="a", r=2)
    pl.attach(model, pl.IA3, "q_proj|up_proj", name="b")
    for name in "ab":
        for seed, adapter in enumerate(pl.adapters(model)[name].values()):
            shake(adapter, seed=seed)
    pl.activate(model, "a", "b")
    if not quantized_first:
        pl.quantize(model)
    return model


def test_adapters_may_be_there_before():
    before, after = adapted(False), adapted(True)
    assert torch.equal(logits(before), logits(after))
    assert len(packed_layers(before)) == len(packed_layers(after)) == 14
    for host in hosts(before).values():
        assert isinstance(host.layer, pl.NF4Linear)
        assert all(adapter.layer is host.layer for adapter in host.adapters.values())
    assert [n for n, p in before.named_parameters() if p.requires_grad] == [
        n for n, p in after.named_parameters() if p.requires_grad
    ]
    with pl.using(before), pl.using(after):
        assert torch.equal(logits(before), logits(pl.quantize(build("llama"))))
    with_merge = logits(pl.merge(before))
    torch.testing.assert_close(with_merge, logits(after), rtol=1e-4, atol=1e-4)  # sums in another order
    pl.unmerge(before)
    assert torch.equal(logits(before), logits(after))
    pl.detach(before)
    assert torch.equal(logits(before), logits(pl.quantize(build("llama"))))


@pytest.mark.parametrize("start", ["dense", "packed"])
def test_merged_quantised_and_taken_out_again(start):
    model = build("llama")
    if start == "packed":
        pl.quantize(model)
    pl.attach(model, pl.LoRA, r=2, alpha=4)
    for seed, adapter in enumerate(pl.adapters(model)["default"].values()):
        shake(adapter, 0.02, seed=seed)
    before = logits(model)
    originals = {path: host.layer for path, host in hosts(model).items()}
    merged = pl.merge(model).model.layers[0].self_attn.q_proj.layer
    W, want = merged.weight.clone(), logits(model)
    pl.quantize(model)
    packed = model.model.layers[0].self_attn.q_proj.layer
    assert isinstance(packed, pl.NF4Linear) and torch.equal(packed.dequantize(), nf4.unpack(nf4.pack(W)))
    assert not torch.equal(logits(model), want)  # requantised: merged weights lie off the levels
    pl.unmerge(model)
    for path, host in hosts(model).items():
        assert host.layer is originals[path] and all(a.layer is host.layer for a in host.adapters.values())
    assert torch.equal(logits(model), before)


# --- memory of a model ----------------------------------------------------------------------------------------------


class Tower(nn.Sequential):
    """Six layers of 4 MiB each."""

    def __init__(self, make):
        super().__init__(*[make() for _ in range(6)])


def test_dense_weights_are_freed():
    model = Tower(lambda: linear(128, 64))
    gone = [weakref.ref(layer.weight) for layer in model]
    biases = [layer.bias for layer in model]
    gc.disable()  # at once, and not when the garbage collector comes by
    try:
        pl.quantize(model)
        assert not any(ref() is not None for ref in gone)
    finally:
        gc.enable()
    assert all(layer.bias is bias for layer, bias in zip(model, biases, strict=True))


@pytest.mark.parametrize("make, copies", [
    pytest.param(lambda: nn.Linear(1024, 1024), 0, id="Linear"),
    pytest.param(lambda: nn.Linear(1024, 1024, dtype=torch.bfloat16), 0, id="bf16"),
    pytest.param(lambda: conv1d(1024, 1024), 1, id="Conv1D"),  # stored the other way: its transpose is a copy
])  # fmt: skip
def test_quantising_takes_one_packed_layer_more_than_the_dense_model(make, copies):
    pl.quantize(nn.Sequential(linear()))  # look-up tables are made once
    models = []
    dense = memory(lambda: models.append(Tower(make)))[1]
    most, last = memory(lambda: models.append(pl.quantize(Tower(make).requires_grad_(False))))
    packed = sum(t.nbytes for t in models[1].buffers())
    assert dense == sum(p.nbytes for p in models[0].parameters())
    assert last == packed + sum(p.nbytes for p in models[1].parameters())  # the biases; all dense weights are gone
    assert most <= dense + packed / 6 + copies * dense / 6 + 2.5 * MIB  # float32 parts of half a MiB while it packs


def test_a_layer_that_computes_something_else_is_not_taken_for_a_linear_one():
    class Tripled(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    class Named(nn.Linear):
        pass

    model = nn.Sequential(Named(64, 64), Tripled(64, 64))
    with pytest.raises(ValueError, match="'1' cannot be quantised: Tripled computes something else"):
        pl.quantize(model)
    assert type(model[0]) is Named and model[0].weight.requires_grad
    assert isinstance(pl.quantize(model, skip="1")[0], pl.NF4Linear)

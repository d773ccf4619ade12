"""The laws of every method in the registry, each on a whole model. A new method file is picked up by itself."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import case_of
from families import attach_each, build, inputs, labels, shake
from torch import nn

import peftlab as pl
from peftlab.core import Adapted, Adapter, Switch

METHODS = [m for m in pl.METHODS.values() if m.__module__.startswith("peftlab.")]
BASES = ["fp32", "bf16", "nf4"]  # nf4: float32 weights packed in four bits, all else float32

every = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
each_base = pytest.mark.parametrize("dtype", BASES)
fp32_and_nf4 = pytest.mark.parametrize("dtype", ["fp32", "nf4"])
half = [pytest.param(method, dtype, id=f"{method.__name__}-{dtype}", marks=[pytest.mark.grid] if (i + j) % 2 else [])
        for i, method in enumerate(METHODS) for j, dtype in enumerate(["fp32", "nf4"])]  # fmt: skip
on_one_base = pytest.mark.parametrize(("method", "dtype"), half)  # compiling takes seconds: on the other in the grid


def base(dtype: str = "fp32", method=None):
    """The tiny Llama, with what a method needs to be there before it."""
    model = build("llama")
    model = pl.quantize(model) if dtype == "nf4" else model.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    if method is not None and (before := case_of(method).before):
        before(model)
    return model


def with_two(method, dtype="fp32", moved=True):
    """A model with the adapters "a" and "b" of one method, moved off their start."""
    case = case_of(method)
    model = base(dtype, method)
    return attach_each(model, method, case, "ab", moved)


def sets(method) -> list[tuple[str, ...]]:
    """The sets of adapters that the laws activate: one and two, unless one takes the place of the other."""
    return [("a",)] if method.replaces else [("a",), ("a", "b"), ("b", "a")]


def most(method) -> tuple[str, ...]:
    return sets(method)[-1]


def logits(model, **batch):
    with torch.no_grad():
        return model(**(batch or inputs("llama"))).logits


def state(model) -> dict[str, torch.Tensor]:
    """The base's tensors by their name in the bare model."""
    return {k.replace(".layer.", "."): v.clone() for k, v in model.state_dict().items() if ".adapters." not in k}


def tolerance(dtype: str) -> dict:
    # fp32, also what NF4 unpacks to: sums in another order.
    # bf16: 8 bits of mantissa, and a merged weight is rounded once more
    return dict(rtol=0.05, atol=0.15) if dtype == "bf16" else dict(rtol=1e-5, atol=2e-5)


@each_base
@every
def test_1_attached_and_untrained_it_changes_nothing(method, dtype):
    bare = logits(base(dtype))
    model = with_two(method, dtype, moved=False)
    starts_at_the_base = case_of(method).identity
    for names in [(), *sets(method)]:
        with pl.using(model, *names):
            assert torch.equal(logits(model), bare) == (starts_at_the_base or not names)


@each_base
@every
def test_2_only_the_active_adapter_learns_and_the_base_keeps_its_bytes(method, dtype):
    model = with_two(method, dtype)
    before = state(model)
    batch = inputs("llama")
    with pl.using(model, "a"):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1)
        model.train()
        model(**batch, labels=labels("llama", batch)).loss.backward()
        optimizer.step()
    for adapter in pl.adapters(model)["a"].values():
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
        assert all(p.grad.dtype == p.dtype for p in adapter.parameters())
    assert all(p.grad is None for a in pl.adapters(model)["b"].values() for p in a.parameters())
    after = state(model)
    assert all(torch.equal(after[k], v) for k, v in before.items())


@each_base
@every
def test_3_and_4_merge_equals_forward_and_unmerge_is_exact(method, dtype):
    model = with_two(method, dtype)
    before, bare = state(model), logits(base(dtype))
    for names in sets(method):
        pl.activate(model, *names)
        want = logits(model)
        assert (want - bare).abs().max() > 0.05, "the adapter must show, or the test proves nothing"
        if why := case_of(method).affine:
            with pytest.raises(ValueError, match=why):
                pl.merge(model)
        else:
            pl.merge(model, *names)
            torch.testing.assert_close(logits(model), want, **tolerance(dtype))
            with pytest.raises(ValueError, match="unmerge"), pl.using(model):
                pass
            pl.unmerge(model)
        assert all(torch.equal(state(model)[k], v) for k, v in before.items())
        assert torch.equal(logits(model), want)


def test_3b_a_merged_weight_is_the_float64_sum_rounded_once():
    model = with_two(pl.LoRA)
    a = pl.adapters(model)["a"]
    wanted = {p: (x.layer.weight.double() + x.scaling * x.lora_B.double() @ x.lora_A.double()).float()
              for p, x in a.items()}  # fmt: skip
    torch.set_float32_matmul_precision("medium")
    try:
        pl.activate(model, "a")
        pl.merge(model)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(model.get_submodule(p).layer.weight, w) for p, w in wanted.items())


@fp32_and_nf4
@every
def test_3c_part_of_the_active_adapters_can_be_merged(method, dtype):
    model = with_two(method, dtype)
    if method.replaces:
        before = logits(model)
        with pytest.raises(ValueError, match="takes the place"):
            pl.activate(model, "a", "b")
        assert torch.equal(logits(model), before)
        return
    pl.activate(model, "a", "b")
    want = logits(model)
    with pytest.raises(ValueError, match="order"):
        pl.merge(model, "b")
    if not case_of(method).affine:
        pl.merge(model, "a")
        torch.testing.assert_close(logits(model), want, **tolerance("fp32"))


@each_base
@every
def test_5_a_mixed_batch_is_each_row_with_its_own_adapter(method, dtype):
    model = with_two(method, dtype)
    batch = inputs("llama", rows=5)
    rows = ["a", None, "b", "b", "a"]
    if not method.mixes:
        with pytest.raises(ValueError, match="mixed batch"), pl.using(model, rows=rows):
            pass
        return
    with pl.using(model, rows=rows):
        mixed = logits(model, **batch)
    for i, name in enumerate(rows):
        with pl.using(model, *([name] if name else [])):
            alone = logits(model, input_ids=batch["input_ids"][i : i + 1])
        torch.testing.assert_close(mixed[i : i + 1], alone, **tolerance(dtype))


@fp32_and_nf4
@every
def test_6_saved_and_loaded_it_is_the_same(method, dtype, tmp_path):
    model = with_two(method, dtype)
    with pl.using(model, "b"):
        want = logits(model)
    pl.save_adapter(model, tmp_path, name="b")
    again = pl.load_adapter(base(dtype, method), tmp_path, name="c")
    assert torch.equal(logits(again), want)
    if case_of(method).same_hyper:
        hyper = {p: a.hyper for p, a in pl.adapters(model)["b"].items()}
        assert {p: a.hyper for p, a in pl.adapters(again)["c"].items()} == hyper


@on_one_base
def test_7_copied_pickled_and_compiled_it_is_the_same(method, dtype):
    model = with_two(method, dtype)
    pl.activate(model, *most(method))
    want = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), want)
        host = next(iter(pl.hosts(twin).values()))
        assert host.adapters["a"].layer is host.layer, "a copy adapts its own layer, not the original's"
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    batch = inputs("llama")
    out = compiled(**batch, labels=labels("llama", batch))
    torch.testing.assert_close(out.logits, want, **tolerance("fp32"))
    out.loss.backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(**batch, labels=labels("llama", batch)).loss.backward()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@fp32_and_nf4
@every
def test_7b_gradient_checkpointing_gives_the_same_gradients(method, dtype, reentrant):
    batch, grads = inputs("llama"), []
    for checkpointing in (False, True):
        model = with_two(method, dtype).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model(**batch, labels=labels("llama", batch)).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0] and grads[0].keys() == grads[1].keys()
    for name, gradient in grads[0].items():
        torch.testing.assert_close(gradient, grads[1][name], rtol=1e-5, atol=1e-6)


@fp32_and_nf4
@every
def test_8_the_count_is_the_closed_formula(method, dtype):
    model = with_two(method, dtype)
    there = pl.adapters(model)["a"].values()
    counted = {id(p): p.numel() for adapter in there for p in adapter.parameters()}  # shared ones once
    assert sum(counted.values()) == sum(adapter.expected() for adapter in there) > 0
    assert pl.count(model).expected["a"] == pl.count(model).per_adapter["a"] == sum(counted.values())


@every
def test_9_train_and_eval_and_the_active_set_never_change_what_is_trainable(method):
    model = with_two(method)
    pl.freeze(model, "a")

    def trainable():
        return {n for n, p in model.named_parameters() if p.requires_grad}

    want = trainable()
    assert want and not any(".adapters.a." in n for n in want)
    for change in (model.train, model.eval, lambda: pl.activate(model), lambda: pl.activate(model, *most(method))):
        change()
        assert trainable() == want
    with pl.using(model, "a"):
        assert trainable() == want
    pl.freeze(model, "a", frozen=False)
    assert any(".adapters.a." in n for n in trainable())


@fp32_and_nf4
@every
def test_10_detached_the_model_is_the_base_again(method, dtype):
    bare = base(dtype)
    model = with_two(method, dtype)
    pl.detach(model, "a")
    assert set(pl.adapters(model)) == {"b", *pl.adapters(base(dtype, method))}
    pl.detach(model)
    assert [n for n, _ in model.named_modules()] == [n for n, _ in bare.named_modules()]
    assert torch.equal(logits(model), logits(bare))
    assert model.state_dict().keys() == bare.state_dict().keys()


class Doubled(Adapter):
    """Not a sum: a method that calls f and changes what comes out, to hold the host to more than `delta`."""

    def __init__(self, layer, start: float = 2.0):
        super().__init__(layer)
        self.gain = nn.Parameter(torch.full((1,), start))

    def forward(self, f, x):
        return f(x) * self.gain


class Bent(Doubled):
    """Not affine: cannot be merged."""

    def forward(self, f, x):
        return f(x).relu() * self.gain


del pl.METHODS["Doubled"], pl.METHODS["Bent"]  # defined for this file only


def test_adapters_nest_in_the_order_of_activation():
    layer, switch = nn.Linear(4, 4), Switch()
    host = Adapted(layer, switch)
    host.adapters["low"], host.adapters["gain"] = pl.LoRA(layer, r=2), Doubled(layer)
    shake(host.adapters["low"], 0.5)
    x = torch.randn(3, 4)
    low = host.adapters["low"].delta(x)
    switch.active = ("low", "gain")
    torch.testing.assert_close(host(x), 2 * (layer(x) + low))
    switch.active = ("gain", "low")
    torch.testing.assert_close(host(x), 2 * layer(x) + low)
    for names in (("low", "gain"), ("gain", "low")):
        switch.active = names
        want = host(x)
        host.merge(names)
        torch.testing.assert_close(host(x), want)
        host.unmerge()


def test_what_is_not_affine_is_refused_and_the_rest_is_unmerged_again():
    model = base()
    pl.attach(model, pl.LoRA, "q_proj", name="a")
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"):
        host = model.get_submodule(path)
        host.adapters["bent"] = Bent(host.layer)
        break
    before = state(model)
    pl.activate(model, "a", "bent")
    with pytest.raises(ValueError, match="affine"):
        pl.merge(model, "a", "bent")
    assert not any(h.merged for h in pl.hosts(model).values())
    assert all(torch.equal(v, before[k]) for k, v in state(model).items())


def test_the_fused_path_is_the_equation():
    """LoRA's factors go through the host's fused node; values and gradients are those of f(x) + Δ(x)."""
    torch.manual_seed(0)
    for dtype in (torch.float64, torch.bfloat16):
        layer = nn.Linear(12, 20).requires_grad_(False).to(dtype)
        lora = pl.LoRA(layer, r=3, alpha=5)
        lora = lora.double() if dtype == torch.float64 else lora
        shake(lora, 0.5)
        x = torch.randn(2, 7, 12, dtype=dtype, requires_grad=True)
        results = []
        for fused in (True, False):
            y = lora(layer, x) if fused else layer(x) + lora.change(x)
            weight = torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)
            results.append((y, *torch.autograd.grad((y * weight).sum(), [x, lora.lora_A, lora.lora_B])))
        assert "LowRankLinear" in type(lora(layer, x).grad_fn).__name__
        close = dict(rtol=1e-10, atol=1e-10) if dtype == torch.float64 else dict(rtol=0.05, atol=0.1)
        for fast, plain in zip(*results, strict=True):
            torch.testing.assert_close(fast, plain, **close)


@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_with_a_forward_of_its_own_is_not_fused(packed):
    layer = nn.Linear(64, 64).requires_grad_(False)
    layer = pl.NF4Linear(layer) if packed else layer
    lora, x = pl.LoRA(layer, r=2), torch.randn(3, 64, requires_grad=True)
    assert "LowRankLinear" in type(lora(layer, x).grad_fn).__name__
    layer.forward = lambda x: 7 * x  # what accelerate's hooks do, to move weights about
    torch.testing.assert_close(lora(layer, x), 7 * x)  # B is nil


def test_the_fused_path_on_a_packed_layer_is_the_equation_and_keeps_less():
    """The same for weights in four bits, with a float32 adapter on 16-bit inputs: x is kept as it came, and once."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        layer = pl.NF4Linear(nn.Linear(128, 64).to(dtype))
        lora = pl.LoRA(layer, r=3, alpha=5)
        shake(lora, 0.5)
        x = torch.randn(2, 7, 128, dtype=dtype, requires_grad=True)
        results, kept, stored = [], [], {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}
        for fused in (True, False):
            sizes = {}

            def note(tensor, sizes=sizes, stored=stored):
                if tensor.data_ptr() not in stored:
                    sizes[tensor.data_ptr()] = tensor.nbytes
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                y = lora(layer, x) if fused else layer(x) + lora.change(x)
            kept.append(sum(sizes.values()))
            weight = torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)
            results.append((y, *torch.autograd.grad((y * weight).sum(), [x, lora.lora_A, lora.lora_B])))
        close = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=0.05, atol=0.1)
        for fast, plain in zip(*results, strict=True):
            torch.testing.assert_close(fast, plain, **close)
        assert kept[0] <= kept[1] - (x.nbytes if dtype == torch.bfloat16 else 0)


def test_the_fused_path_keeps_no_more_than_the_plain_one():
    layer = nn.Linear(64, 64, bias=False).requires_grad_(False)
    lora, x = pl.LoRA(layer, r=2), torch.randn(128, 64, requires_grad=True)

    def kept(f):
        sizes = {}

        def note(tensor):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            f()
        return sum(sizes.values())

    assert kept(lambda: lora(layer, x)) <= kept(lambda: layer(x) + lora.change(x))


def test_autocast_takes_the_plain_path_and_still_learns():
    model = pl.attach(base(), pl.LoRA, "q_proj|v_proj|down_proj")
    batch = inputs("llama")
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch, labels=labels("llama", batch)).loss.backward()
    assert all(a.lora_B.grad.abs().sum() > 0 for a in pl.adapters(model)["default"].values())


def test_generation_with_a_mixed_batch_and_a_cache():
    model = with_two(pl.LoRA)
    ids = inputs("llama", rows=3)["input_ids"]
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    with pl.using(model, rows=["b", None, "a"]):
        mixed = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    for i, names in enumerate([("b",), (), ("a",)]):
        with pl.using(model, *names):
            row = ids[i : i + 1]
            assert torch.equal(model.generate(row, attention_mask=torch.ones_like(row), **settings)[0], mixed[i])

"""Combining adapters: equal to the reference in every way, and each way what its paper says."""

from __future__ import annotations

import copy
import math
import warnings
from functools import partial

import peft
import pytest
import torch
from families import build, inputs, shake

import peftlab as pl
from peftlab import task_vectors as tv
from peftlab.layers import weight_of
from peftlab.lowrank import product_of
from peftlab.merge import WAYS
from peftlab.remedies import interpolate, rescale

TARGETS = {"llama": "q_proj|down_proj", "gpt2": "c_attn|c_fc"}
WEIGHTS = {"a": 0.7, "b": -0.4}
FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")  # the ways on A and B apart


def options(how: str) -> dict:
    return {} if how in ("cat", "linear", "svd") else {"density": 0.6}


def model_with(family="llama", a=None, b=None, names="ab", scale=0.15):
    """A tiny model with the LoRAs "a" and "b", of the given settings, moved off their start."""
    model = build(family)
    for seed, (name, setting) in enumerate(zip(names, (a, b, {}), strict=False), 1):
        pl.attach(model, pl.LoRA, name=name, **{"targets": TARGETS[family], "r": 4, "alpha": 6, **(setting or {})})
        for i, adapter in enumerate(pl.adapters(model)[name].values()):
            shake(adapter, scale, seed=100 * seed + i)
    return model


def deltas(model, name) -> dict[str, torch.Tensor]:
    """path -> ΔW (out, in) of a LoRA."""
    products = {path: product_of(adapter) for path, adapter in pl.adapters(model)[name].items()}
    return {path: s * B.double() @ A.double() for path, (A, B, s) in products.items()}


def logits(model, family="llama"):
    with torch.no_grad():
        return model(**inputs(family)).logits


def state(model) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(model, before) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[k], v) for k, v in before.items())


# --------------------------------------------------------------------------------------------- beside the reference


def reference(family, folders, monkeypatch, how, weights=WEIGHTS, seed=5, **more):
    """The reference with the same adapters read from folders, combined as "c"; its draws begin at `seed` behind the
    random initialisation of the new adapter, which it overwrites."""
    (first, folder), *rest = folders.items()
    model = peft.PeftModel.from_pretrained(build(family), folder, adapter_name=first).eval()
    for name, folder in rest:
        model.load_adapter(folder, name)
    inject = peft.tuners.lora.LoraModel.inject_adapter

    def and_seed(*args, **kwargs):
        inject(*args, **kwargs)
        torch.manual_seed(seed)

    monkeypatch.setattr(peft.tuners.lora.LoraModel, "inject_adapter", and_seed)
    if family == "gpt2" and how.endswith("_svd"):  # there ΔW is (in, out), so the same draws would fall elsewhere
        prune = peft.utils.merge_utils.random_pruning
        monkeypatch.setattr(peft.utils.merge_utils, "random_pruning", partial(prune_turned, prune))
    model.add_weighted_adapter(list(weights), list(weights.values()), "c", combination_type=how, **more)
    model.set_adapter("c")
    return model


def prune_turned(prune, W, density, rescale):
    return prune(W.T.contiguous(), density, rescale).T


def layers_of(theirs, name="c"):
    """bare path -> the reference's layer."""
    found = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    return {n: m for n, m in found.items() if name in m.lora_A}


def theirs_and_ours(family, tmp_path, monkeypatch, how, a=None, b=None, weights=WEIGHTS, **more):
    model = model_with(family, a, b)
    folders = {n: pl.save_adapter(model, tmp_path / n, name=n) for n in weights}
    again = build(family)
    for name, folder in folders.items():
        pl.load_adapter(again, folder, name=name)
    torch.manual_seed(5)
    pl.combine(again, weights, how, name="c", **more)
    return reference(family, folders, monkeypatch, how, weights, **more), again


def check_equal(theirs, ours, family, factor=1.0):
    made = deltas(ours, "c")
    for path, layer in layers_of(theirs).items():
        wanted = layer.get_delta_weight("c").detach()
        wanted = (wanted.T if layer.fan_in_fan_out else wanted).double() / factor
        # float32 here and there, and there in the singular vectors too
        torch.testing.assert_close(made[path], wanted, rtol=0, atol=1e-6)
    assert made.keys() == layers_of(theirs).keys()
    assert max(delta.abs().max() for delta in made.values()) > 0.1, "or the test proves nothing"
    if factor == 1:
        torch.testing.assert_close(logits(ours, family), logits(theirs, family), rtol=0, atol=2e-5)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("family", TARGETS)
def test_every_way_equals_the_reference(family, how, tmp_path, monkeypatch):
    theirs, ours = theirs_and_ours(family, tmp_path, monkeypatch, how, b={"alpha": 3}, **options(how))
    check_equal(theirs, ours, family)
    if how in (*FACTORS, "cat"):
        for path, layer in layers_of(theirs).items():
            for ours_, theirs_ in zip(product_of(pl.adapters(ours)["c"][path])[:2], ("lora_A", "lora_B"), strict=True):
                wanted = getattr(layer, theirs_)["c"].weight
                torch.testing.assert_close(ours_, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", ["ties", "ties_svd", "dare_ties", "dare_ties_svd"])
def test_the_other_election_equals_the_reference(how, tmp_path, monkeypatch):
    more = dict(density=0.5, majority_sign_method="frequency")
    check_equal(*theirs_and_ours("llama", tmp_path, monkeypatch, how, **more), "llama")


@pytest.mark.parametrize("how", ["cat", "svd", "ties_svd", "magnitude_prune_svd"])
def test_other_ranks_layers_and_a_given_rank_equal_the_reference(how, tmp_path, monkeypatch):
    a, b = {"r": 2, "targets": ["q_proj", "v_proj"]}, {"r": 5, "targets": ["v_proj", "down_proj"]}
    more = options(how) | ({} if how == "cat" else {"svd_rank": 6})
    theirs, ours = theirs_and_ours("llama", tmp_path, monkeypatch, how, a, b, **more)
    check_equal(theirs, ours, "llama")


@pytest.mark.parametrize("how", FACTORS)
def test_on_a_layer_of_one_source_alone_the_other_is_nil(how, tmp_path, monkeypatch):
    a, b = {"targets": ["q_proj", "v_proj"]}, {"targets": ["v_proj", "down_proj"]}
    theirs, ours = theirs_and_ours("llama", tmp_path, monkeypatch, how, a, b, **options(how))
    check_equal(theirs, ours, "llama")


@pytest.mark.parametrize("how", ["cat", "linear", "svd"])
def test_rslora_keeps_its_scale_here_and_is_sqrt_r_too_large_there(how, tmp_path, monkeypatch):
    """huggingface/peft #3761: there the new adapter inherits use_rslora, so that its alpha = r is a scale of √r."""
    rs = {"rslora": True}
    theirs, ours = theirs_and_ours("llama", tmp_path, monkeypatch, how, rs, rs)
    rank = 8 if how == "cat" else 4
    check_equal(theirs, ours, "llama", factor=math.sqrt(rank))
    if how == "cat":
        whole = {p: 0.7 * deltas(ours, "a")[p] - 0.4 * deltas(ours, "b")[p] for p in deltas(ours, "a")}
        assert all(torch.allclose(deltas(ours, "c")[p], W, atol=1e-6) for p, W in whole.items())


def test_what_was_combined_is_read_by_the_reference(tmp_path):
    model = model_with(a={"r": 2, "targets": ["q_proj", "v_proj"]}, b={"r": 5, "targets": ["v_proj", "down_proj"]})
    pl.combine(model, WEIGHTS, "cat", name="c")
    pl.save_adapter(model, tmp_path, name="c")
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)
    again = pl.load_adapter(build("llama"), tmp_path, name="c")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("weights", [{"a": 0.6, "b": 0.4}, {"a": 0.7, "b": 0.4}])
def test_ia3_is_averaged_as_in_the_reference(weights, tmp_path):
    model = build("gpt2")
    for seed, name in enumerate(weights):
        pl.attach(model, pl.IA3, name=name)
        for i, adapter in enumerate(pl.adapters(model)[name].values()):
            shake(adapter, 0.3, seed=10 * seed + i)
        pl.save_adapter(model, tmp_path / name, name=name)
    theirs = peft.PeftModel.from_pretrained(build("gpt2"), tmp_path / "a", adapter_name="a").eval()
    theirs.load_adapter(tmp_path / "b", "b")
    theirs.base_model.add_weighted_adapter(list(weights), list(weights.values()), "c")
    theirs.set_adapter("c")
    if sum(weights.values()) == 1:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pl.combine(model, weights, "linear", name="c")
    else:
        with pytest.warns(UserWarning, match=r"add up to 1\.1.*rescales the base.*how='cat'"):
            pl.combine(model, weights, "linear", name="c")
    torch.testing.assert_close(logits(model, "gpt2"), logits(theirs, "gpt2"), rtol=0, atol=2e-5)
    pl.combine(model, weights, "cat", name="d")
    for path, adapter in pl.adapters(model)["d"].items():
        a, b = (pl.adapters(model)[n][path].ia3_l for n in "ab")
        torch.testing.assert_close(adapter.ia3_l, 1 + weights["a"] * (a - 1) + weights["b"] * (b - 1))


# ----------------------------------------------------------------------------------------------------- exact ways


@pytest.mark.parametrize("family", TARGETS)
def test_cat_is_the_weighted_sum_of_the_changes(family):
    model = model_with(family, b={"r": 7, "alpha": 5, "rslora": True}, names="abc")
    sources = {n: deltas(model, n) for n in "abc"}
    before = state(model)
    weights = {"a": 0.7, "b": -0.4, "c": 2.0}
    pl.combine(model, weights, name="sum")
    for path, W in deltas(model, "sum").items():
        torch.testing.assert_close(W, sum(w * sources[n][path] for n, w in weights.items()), rtol=0, atol=2e-6)
        assert len(pl.adapters(model)["sum"][path].lora_A) == 4 + 7 + 4
    after = state(model)
    assert all(torch.equal(after[key], value) for key, value in before.items()), "the sources stay as they are"
    host = next(iter(pl.hosts(model).values()))
    assert host.switch.active == ("sum",)
    assert all(p.requires_grad for a in pl.adapters(model)["sum"].values() for p in a.parameters())


def test_cat_with_more_ranks_than_the_layer_has_is_still_exact():
    model = model_with(a={"r": 20}, b={"r": 20}, scale=0.1)  # 40 > 32: wide and high layers
    pl.combine(model, WEIGHTS, name="sum")
    a, b = deltas(model, "a"), deltas(model, "b")
    for path, W in deltas(model, "sum").items():
        torch.testing.assert_close(W, 0.7 * a[path] - 0.4 * b[path], rtol=0, atol=1e-5)
        assert len(pl.adapters(model)["sum"][path].lora_A) == 32


def test_negation_is_exact_and_adding_both_gives_the_base():
    model = model_with(b={"alpha": 8})
    pl.combine(model, {"a": -1}, name="minus")
    for path, W in deltas(model, "minus").items():
        torch.testing.assert_close(W, -deltas(model, "a")[path], rtol=0, atol=1e-7)  # s = 1.5 goes into A, rounded once
    pl.combine(model, {"b": -1}, name="bit_for_bit")
    for path, W in deltas(model, "bit_for_bit").items():
        assert torch.equal(W, -deltas(model, "b")[path])  # s = 2
    with pl.using(model):
        bare = logits(model)
    with pl.using(model, "a", "minus"):
        torch.testing.assert_close(logits(model), bare, rtol=1e-5, atol=2e-5)  # float32 sums of order 10


def test_linear_with_one_source_is_exact_and_with_two_has_cross_terms():
    model = model_with()
    pl.combine(model, {"a": -0.3}, "linear", name="one")
    pl.combine(model, {"a": 0.5, "b": 0.5}, "linear", name="two")
    for path, a in deltas(model, "a").items():
        torch.testing.assert_close(deltas(model, "one")[path], -0.3 * a, rtol=0, atol=1e-6)
        A1, B1, s = product_of(pl.adapters(model)["a"][path])
        A2, B2, _ = product_of(pl.adapters(model)["b"][path])
        wanted = 0.5 * s * (B1 + B2).double() @ (A1 + A2).double()
        torch.testing.assert_close(deltas(model, "two")[path], wanted, rtol=0, atol=1e-5)
        halves = 0.5 * (a + deltas(model, "b")[path])
        assert (wanted - halves).norm() > 0.3 * halves.norm(), "not the soup of the two"


def test_one_weight_is_rescale_and_the_interpolation_of_merged_weights():
    model = model_with()
    start = {p: weight_of(h.layer).clone() for p, h in pl.hosts(model).items()}
    pl.combine(model, {"a": 0.3}, name="third")
    combined = logits(model)
    merged = pl.merge(copy.deepcopy(model), "third")
    third = {p: weight_of(h.layer).clone() for p, h in pl.hosts(merged).items()}
    other = rescale(copy.deepcopy(model), "a", 0.3)
    with pl.using(other, "a"):
        torch.testing.assert_close(logits(other), combined, rtol=0, atol=2e-5)
    tuned = pl.merge(copy.deepcopy(pl.detach(model, "b", "third")), "a")
    names = {f"{p}.layer.weight": W for p, W in start.items()}
    interpolate(tuned, names, 0.3)
    for path, host in pl.hosts(tuned).items():
        torch.testing.assert_close(weight_of(host.layer), third[path], rtol=0, atol=1e-6)


def test_svd_is_the_nearest_matrix_of_its_rank():
    model = model_with(b={"r": 6})
    pl.combine(model, WEIGHTS, "svd", name="low", svd_rank=3)
    pl.combine(model, WEIGHTS, "svd", name="full", svd_rank=10)
    pl.combine(model, WEIGHTS, "svd", name="most")
    for path, a in deltas(model, "a").items():
        W = 0.7 * a - 0.4 * deltas(model, "b")[path]
        tail = torch.linalg.svdvals(W)[3:].norm()
        assert abs((W - deltas(model, "low")[path]).norm() / tail - 1) < 1e-5
        torch.testing.assert_close(deltas(model, "full")[path], W, rtol=0, atol=1e-5)
        assert len(pl.adapters(model)["most"][path].lora_A) == 6


def test_ties_on_whole_changes_is_the_papers_when_nothing_is_truncated():
    model = model_with(names="abc")
    pl.combine(model, {"a": 0.4, "b": 0.4, "c": 0.4}, "ties_svd", name="t", density=0.2, svd_rank=10**6)
    sources = [deltas(model, n) for n in "abc"]
    for path, made in deltas(model, "t").items():
        W = torch.stack([d[path] for d in sources])
        for w in W:  # by sorting, not by topk
            w[w.abs() < w.abs().flatten().sort(descending=True).values[int(0.2 * w.numel()) - 1]] = 0
        sign = W.sum(0).sign()
        chosen = (W.sign() == sign) & (W != 0)
        wanted = 0.4 * (W * chosen).sum(0) / chosen.sum(0).clamp(min=1)
        torch.testing.assert_close(made, wanted, rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------- the papers' steps, as functions


def test_trim_keeps_the_largest():
    v = torch.tensor([[0.1, -3.0, 0.5], [2.0, -0.2, 0.0]])
    assert torch.equal(tv.trim(v, 0.34), torch.tensor([[0.0, -3, 0], [2, 0, 0]]))
    assert torch.equal(tv.trim(v, 1.0), v)
    draws = torch.randn(50, 40)
    kept = tv.trim(draws, 0.2)
    assert (kept != 0).sum() == 400 and kept[kept != 0].abs().min() >= draws[kept == 0].abs().max()
    with pytest.raises(ValueError, match="density=0.1 keeps none of 6 numbers; take at least 0.17"):
        tv.trim(v, 0.1)


def test_elect_by_mass_or_by_number_and_the_disjoint_mean():
    """As in the paper's figure 1: a value that most disagree with, one that all agree on, one that only one holds."""
    vectors = [torch.tensor([3.0, 1.0, 0.0]), torch.tensor([-1.0, 2.0, 0.0]), torch.tensor([-1.0, 3.0, -4.0])]
    assert torch.equal(tv.elected_sign(vectors), torch.tensor([1, 1, -1]))
    assert torch.equal(tv.elected_sign(vectors, "frequency"), torch.tensor([-1, 1, -1]))
    assert torch.equal(tv.elected_mean(vectors, [1, 1, 1]), torch.tensor([3.0, 2, -4]))
    assert torch.equal(tv.elected_mean(vectors, [1, 1, 1], "frequency"), torch.tensor([-1.0, 2, -4]))
    assert torch.equal(tv.elected_mean(vectors, [2, 2, 2]), 2 * tv.elected_mean(vectors, [1, 1, 1]))
    assert torch.equal(tv.elected_mean([torch.zeros(2)] * 2, [1, 1]), torch.zeros(2)), "nobody's place stays 0"


def test_dare_keeps_the_expectation_and_rescales():
    v, draw = torch.linspace(-1, 1, 40), torch.Generator().manual_seed(0)
    masks = torch.stack([tv.drop(v, 0.3, draw) for _ in range(4000)])
    # the standard error of a mean of 4000 is |v|·√(0.7/0.3/4000) = 0.024·|v|; five of them
    assert (masks.mean(0) - v).abs().max() < 0.12
    assert abs((masks != 0).float().mean() - 0.3) < 0.01
    kept = masks[0] != 0
    torch.testing.assert_close(masks[0][kept], v[kept] / 0.3)
    assert torch.equal(tv.drop(v, 1.0), v)


def test_task_arithmetic_adds_and_negates():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
    assert torch.equal(tv.weighted_sum([a, b], [1, 1]), a + b)
    assert torch.equal(tv.weighted_sum([a], [-1]), -a)


def test_magnitude_pruning_of_one_adapter_prunes_its_change():
    model = model_with()
    pl.combine(model, {"a": 2.0}, "magnitude_prune_svd", name="thin", density=0.1, svd_rank=99)
    for path, W in deltas(model, "thin").items():
        torch.testing.assert_close(W, 2 * tv.trim(deltas(model, "a")[path], 0.1), rtol=0, atol=1e-5)


def test_masks_follow_the_seed():
    model = model_with()

    def made(name, **more):
        pl.combine(model, WEIGHTS, "dare_linear", name=name, density=0.5, **more)
        return deltas(model, name)

    def equal(one, other):
        return all(torch.equal(W, other[path]) for path, W in one.items())

    assert equal(made("x", seed=1), made("y", seed=1)) and not equal(made("z", seed=1), made("w", seed=2))
    torch.manual_seed(1)
    first = made("u")
    torch.manual_seed(1)
    assert equal(first, made("v"))
    state_ = torch.random.get_rng_state()
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert equal(made("t", seed=1), deltas(model, "x")), "a seed of its own does not listen to torch's"
    assert torch.equal(state_, torch.random.get_rng_state())


# ------------------------------------------------------------------------------------------- bases and conditions


@pytest.mark.parametrize("dtype", ["bf16", "nf4"])
def test_on_other_bases_the_sum_is_the_same(dtype):
    model = model_with()
    wanted = deltas(pl.combine(model, WEIGHTS, name="c"), "c")
    pl.detach(model, "c")
    other = pl.quantize(model) if dtype == "nf4" else model
    if dtype == "bf16":
        for host in pl.hosts(other).values():
            host.layer.to(torch.bfloat16)
    pl.combine(other, WEIGHTS, name="c")
    assert all(torch.equal(W, wanted[path]) for path, W in deltas(other, "c").items())
    assert next(iter(pl.adapters(other)["c"].values())).lora_A.dtype == torch.float32


def test_adapters_in_training_mode_with_dropout_combine_as_they_are():
    model = model_with(a={"dropout": 0.5}).train()
    wanted = 0.7 * deltas(model, "a")["model.layers.0.mlp.down_proj"]
    pl.combine(model, {"a": 0.7}, name="c")
    torch.testing.assert_close(deltas(model, "c")["model.layers.0.mlp.down_proj"], wanted, rtol=0, atol=1e-6)
    assert all(a.training and a.dropout.training for a in pl.adapters(model)["a"].values()), "its mode is given back"


def test_a_combined_adapter_can_be_combined_merged_and_trained_on():
    model = model_with()
    pl.combine(model, WEIGHTS, name="c")
    pl.combine(model, {"c": 0.5, "a": 0.5}, name="d")
    want = logits(model)
    torch.testing.assert_close(logits(pl.merge(model)), want, rtol=1e-5, atol=2e-5)
    pl.unmerge(model).train()
    batch = inputs("llama")
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad.abs().sum() > 0 for a in pl.adapters(model)["d"].values() for p in a.parameters())


# ------------------------------------------------------------------------------------------------- what is refused

ONE = {"a": 0.5}
BAD = {
    "unknown source": (({"a": 1, "bb": 1},), {}, r"no adapter named 'bb' is attached; did you mean 'b'\? Attached: a"),
    "not a name": (({None: 1},), {}, "no adapter named 'None'"),
    "a list": ((["a", "b"],), {}, "weights is list; give each adapter its weight"),
    "none": (({},), {}, "names no adapter"),
    "name taken": ((WEIGHTS,), dict(name="a"), "'a' is attached already"),
    "unsafe name": ((WEIGHTS,), dict(name="../x"), "cannot be used"),
    "a weight that is no number": (({"a": "1"},), {}, "weight of 'a' is '1', no finite number"),
    "nan": (({"a": math.nan, "b": 1},), {}, "weight of 'a' is nan, no finite number"),
    "inf": (({"a": 1, "b": math.inf},), {}, "weight of 'b' is inf"),
    "unknown way": ((WEIGHTS, "tie"), {}, r"how='tie' is no way to combine; did you mean 'ties'\? There are cat"),
    "no density": ((WEIGHTS, "ties"), {}, "how='ties' needs a density"),
    "density 0": ((WEIGHTS, "ties"), dict(density=0), "density=0 is not in 0 < density"),
    "density above 1": ((WEIGHTS, "dare_linear"), dict(density=1.5), "density=1.5 is not in"),
    "density nan": ((WEIGHTS, "dare_linear"), dict(density=math.nan), "density=nan is not in"),
    "density for nothing": ((WEIGHTS, "cat"), dict(density=0.5), "would do nothing"),
    "density too small": ((WEIGHTS, "ties"), dict(density=0.001), r"ties at 'model\.layers.*keeps none of 128"),
    "rank for nothing": ((WEIGHTS, "cat"), dict(svd_rank=3), "svd_rank is for the ways that end in 'svd'"),
    "rank 0": ((WEIGHTS, "svd"), dict(svd_rank=0), "svd_rank=0: must be a whole number"),
    "election": ((WEIGHTS, "ties"), dict(density=0.5, majority_sign_method="max"), "there are 'total' and 'frequency'"),
    "one adapter": ((ONE, "ties"), dict(density=0.5), "elects a sign between adapters, and there is only one"),
    "ranks": (({"a": 1, "c": 1}, "ties"), dict(density=0.5),
              r"ranks on 'model\.layers\.0\.self_attn\.q_proj' differ \(a 4, c 2\); take 'ties_svd'"),
    "ranks of linear": (({"a": 1, "c": 1}, "linear"), {}, "take 'cat' or 'svd'"),
    "no product": (({"a": 1, "i": 1},), {}, r"'i' is IA3 on .*no product.*to_lora\(model, 'i', r=8, into='i_lora'\)"),
    "copies": (({"a": 1, "h": 1},), {}, r"'h' has a trained copy of 'lm_head' \(modules_to_save\)"),
    "ways of IA3": (({"i": 1}, "svd"), {}, "how='svd' is for products"),
    "IA3 here and there": (({"i": 1, "j": 1},), {}, "is feed-forward for some of i, j and not for others"),
}  # fmt: skip


@pytest.fixture(scope="module")
def crowd():
    model = model_with(b={"targets": "q_proj"})
    pl.attach(model, pl.LoRA, "q_proj", name="c", r=2)
    pl.attach(model, pl.LoRA, "q_proj", name="h", r=4, modules_to_save=["lm_head"])
    pl.attach(model, pl.IA3, "q_proj", name="i", feedforward=False)
    pl.attach(model, pl.IA3, "q_proj", name="j", feedforward=True)
    pl.activate(model, "a")
    return model


@pytest.mark.parametrize("case", BAD)
def test_bad_input_changes_nothing(case, crowd):
    arguments, more, words = BAD[case]
    before, switch = state(crowd), next(iter(pl.hosts(crowd).values())).switch
    with pytest.raises((ValueError, TypeError), match=words):
        pl.combine(crowd, *arguments, **more)
    assert same(crowd, before) and switch.active == ("a",)


def test_merged_adapters_must_be_unmerged_first():
    model = pl.merge(model_with(), "b")
    before = state(model)
    with pytest.raises(ValueError, match=r"b is merged into the weights; unmerge\(model\) first"):
        pl.combine(model, {"a": 1, "b": 1})
    assert same(model, before)
    pl.combine(pl.unmerge(model), {"a": 1, "b": 1})


def test_a_bare_model_has_nothing_to_combine():
    with pytest.raises(ValueError, match="no adapter named 'a' is attached.*Attached: none"):
        pl.combine(build("llama"), {"a": 1})


def test_what_overflows_is_not_attached():
    model = model_with()
    before = state(model)
    with pytest.raises(ValueError, match="'c' would hold NaN or inf"):
        pl.combine(model, {"a": 1e39, "b": 1}, name="c")
    assert same(model, before)

"""Bottleneck adapters: what each paper says about its own, and the counts that were printed for known models."""

from __future__ import annotations

import math

import pytest
import torch
from families import FAMILIES, build, build_other, inputs, shake
from torch import nn

import peftlab as pl
from peftlab.methods._bottleneck import ACTIVATIONS

BOTTLENECKS = (pl.Houlsby, pl.Pfeiffer, pl.Compacter)


def adapter_of(method, layer, **hyper):
    """A lone adapter on a layer, moved off its start."""
    torch.manual_seed(0)
    adapter = method(layer, **hyper)
    shake(adapter, 0.3)
    return adapter


def outputs(family, model, **more):
    with torch.no_grad():
        return model(**inputs(family), **more).logits


def meta(name: str, **more):
    """An architecture of a paper, without its weights."""
    import transformers as t

    with torch.device("meta"):
        if name == "bert-large":
            size = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
            return t.BertModel(t.BertConfig(**size))
        if name == "roberta-base":
            return t.RobertaModel(t.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1))
        if name == "t5-base":
            size = dict(d_model=768, d_ff=3072, d_kv=64, num_layers=12, num_heads=12)
            return t.T5ForConditionalGeneration(t.T5Config(vocab_size=32128, **size))
    raise ValueError(name)


def trained(model, method, targets=None, **hyper) -> int:
    """How many parameters are counted on the model; the closed formula must give as many."""
    pl.attach(model, method, targets, name="paper", **hyper)
    counted = pl.count(model).trainable
    assert counted == sum(adapter.expected() for adapter in pl.adapters(model)["paper"].values())
    return counted


# --- the equations ---


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("method", [pl.Houlsby, pl.Pfeiffer])
def test_the_sequential_bottleneck_reads_what_the_layer_gives_out(method, activation):
    layer, x = nn.Linear(12, 8), torch.randn(2, 5, 12)
    adapter = adapter_of(method, layer, bottleneck=3, activation=activation)
    h = layer(x)
    bend = ACTIVATIONS[activation]
    want = h + bend(h @ adapter.down.weight.T + adapter.down.bias) @ adapter.up.weight.T + adapter.up.bias
    torch.testing.assert_close(adapter(layer, x), want)


def test_the_parallel_bottleneck_reads_what_the_module_reads_and_is_scaled():
    net, x = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 8)), torch.randn(2, 5, 12)
    once, four = (adapter_of(pl.ParallelAdapter, net, bottleneck=3, scale=s) for s in (1.0, 4.0))
    change = torch.relu(x @ once.down.weight.T + once.down.bias) @ once.up.weight.T + once.up.bias
    torch.testing.assert_close(once(net, x), net(x) + change)
    torch.testing.assert_close(four(net, x), net(x) + 4 * change)
    learned = pl.ParallelAdapter(net, scale="learned")
    assert learned.scale.shape == (1,) and learned.scale.requires_grad and learned.scale.item() == 1


def test_without_its_bend_the_parallel_adapter_is_lora():
    """He et al., table 1: LoRA and the parallel adapter differ in σ, in the place and in the biases."""
    layer, x = nn.Linear(12, 8), torch.randn(2, 5, 12)
    parallel = adapter_of(pl.ParallelAdapter, layer, bottleneck=3, scale=4.0, activation="identity")
    with torch.no_grad():
        parallel.down.bias.zero_()
        parallel.up.bias.zero_()
    lora = pl.LoRA(layer, r=3, alpha=12)
    lora.lora_A, lora.lora_B = parallel.down.weight, parallel.up.weight
    torch.testing.assert_close(parallel(layer, x), lora(layer, x))


def test_without_its_bend_a_sequential_adapter_merges():
    """It is σ that keeps an adapter out of the weights, not its place: (I + U·D)·W is a weight."""
    model = build("llama")
    pl.attach(model, pl.Houlsby, activation="identity", bottleneck=4)
    for adapter in pl.adapters(model)["default"].values():
        shake(adapter, 0.2)
    want = outputs("llama", model)
    pl.merge(model)
    torch.testing.assert_close(outputs("llama", model), want, rtol=1e-4, atol=1e-4)
    pl.unmerge(model)
    assert torch.equal(outputs("llama", model), want)
    pl.detach(model)
    pl.attach(model, pl.Houlsby, bottleneck=4)
    for adapter in pl.adapters(model)["default"].values():
        shake(adapter, 0.2)
    with pytest.raises(ValueError, match="not an affine map"):
        pl.merge(model)


def test_compacters_weight_is_a_sum_of_kronecker_products():
    layer, x = nn.Linear(20, 12), torch.randn(3, 20)
    adapter = adapter_of(pl.Compacter, layer, n=4, rank=2, bottleneck=8)
    h = layer(x)

    def W(s, t):
        return sum(torch.kron(adapter.A[i], s[i] @ t[i]) for i in range(4))

    z = torch.nn.functional.gelu(h @ W(adapter.down_s, adapter.down_t) + adapter.down_bias)
    torch.testing.assert_close(adapter(layer, x), h + z @ W(adapter.up_s, adapter.up_t) + adapter.up_bias)
    assert W(adapter.down_s, adapter.down_t).shape == (12, 8)


def test_compacters_first_weight_starts_as_wide_as_that_of_nn_linear():
    adapter = pl.Compacter(nn.Linear(256, 256), n=4, bottleneck=64)
    spread = adapter.weight(adapter.down_s, adapter.down_t).std().item()
    assert 0.5 / math.sqrt(256) < spread < 2 / math.sqrt(256)


def test_compacters_slow_weights_are_one_for_the_whole_model():
    model = build("llama")
    pl.attach(model, pl.Compacter, bottleneck=8)
    found = list(pl.adapters(model)["default"].values())
    assert len(found) == 4 and len({id(a.A) for a in found}) == 1
    assert sum(n.endswith(".A") for n, _ in model.named_parameters()) == 1
    for adapter in found:
        shake(adapter, 0.2)
    batch = inputs("llama")
    model(**batch, labels=batch["input_ids"]).loss.backward()
    together = found[0].A.grad.clone()
    apart = torch.zeros_like(together)
    for one in found:  # each layer's share of the gradient, with the others' A detached
        one.A.grad = None
        kept = [(a, a.A) for a in found if a is not one]
        for adapter, A in kept:
            adapter._parameters.pop("A", None)
            adapter.__dict__["A"] = A.detach()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        apart += one.A.grad
        for adapter, A in kept:
            adapter.__dict__["A"] = A
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-6)


# --- places ---


@pytest.mark.parametrize("family", FAMILIES)
def test_they_sit_after_each_sublayer_of_every_family(family):
    stacks, sublayers = (2, 5) if family == "t5" else (1, 4)  # T5: two blocks of two, and two of three sublayers
    blocks = 2 * stacks
    for method, sites in ((pl.Houlsby, 2 * sublayers if family == "t5" else sublayers), (pl.Pfeiffer, blocks)):
        model = build(family)
        bare = outputs(family, model)
        pl.attach(model, method, bottleneck=4)
        found = pl.adapters(model)["default"]
        assert len(found) == sites
        assert torch.equal(outputs(family, model), bare)
        for adapter in found.values():
            shake(adapter, 0.3)
        assert (outputs(family, model) - bare).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_parallel_adapters_sit_on_feed_forward_modules_where_a_family_has_them(family):
    model = build(family)
    if family in ("opt", "bert"):  # their two layers stand in the block itself, so there is no module to go around
        with pytest.raises(ValueError, match="no feed-forward module of its own.*targets="):
            pl.attach(model, pl.ParallelAdapter)
        assert not pl.hosts(model)
        return
    bare = outputs(family, model)
    pl.attach(model, pl.ParallelAdapter, bottleneck=4)
    found = pl.adapters(model)["default"]
    assert len(found) == (4 if family == "t5" else 2)
    for adapter in found.values():
        assert (adapter.down.in_features, adapter.up.out_features) == (32, 32)
        shake(adapter, 0.3)
    assert (outputs(family, model) - bare).abs().max() > 0.01


def test_a_parallel_adapter_goes_around_a_module_that_has_adapters_inside():
    model = build("llama")
    pl.attach(model, pl.LoRA, "down_proj|gate_proj", name="inside")
    pl.attach(model, pl.ParallelAdapter, name="around", bottleneck=4)
    for name in ("inside", "around"):
        for adapter in pl.adapters(model)[name].values():
            shake(adapter, 0.2)
    net = model.get_submodule("model.layers.0.mlp")
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        with pl.using(model, "inside"):
            inner = net(x)
        with pl.using(model, "inside", "around"):
            torch.testing.assert_close(net(x), inner + net.adapters["around"].change(x))


# --- counts that were printed ---


def test_compacters_table_for_t5_base():
    """Karimi Mahabadi et al. 2021, table 1: percent of T5-base that is trained a task, layer norms included.

    They train the norms with all adapters (figure 2). b = D/32 in all rows, n = 4; AdapterDrop has none in the first
    five blocks of encoder and decoder.
    """
    printed = {"Adapter": 0.832, "Pfeiffer-Adapter": 0.427, "AdapterDrop": 0.494, "Compacter": 0.073,
               "Compacter++": 0.047}  # fmt: skip
    plain = r"block\.\d+\..*(SelfAttention\.o|wo)"  # two adapters a block: none behind the cross-attention
    upper = r"block\.([5-9]|1\d)\..*(SelfAttention\.o|wo)"
    ours = {
        "Adapter": (pl.Houlsby, plain, dict(reduction=32)),
        "Pfeiffer-Adapter": (pl.Pfeiffer, None, dict(reduction=32)),
        "AdapterDrop": (pl.Houlsby, upper, dict(reduction=32)),
        "Compacter": (pl.Compacter, plain, dict(n=4)),
        "Compacter++": (pl.Compacter, "ffn-output", dict(n=4)),
    }
    for row, (method, targets, hyper) in ours.items():
        model = meta("t5-base")
        total = pl.count(model).total
        norms = sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
        counted = trained(model, method, targets, **hyper)
        assert round(100 * (counted + norms) / total, 3) == printed[row], row


def test_adapterhubs_table_for_roberta_base():
    """Print-out of adapter-transformers 3.1 for roberta-base (its release notes): parameters by configuration."""
    assert trained(meta("roberta-base"), pl.Pfeiffer, reduction=16) == 894_528
    assert trained(meta("roberta-base"), pl.Houlsby, reduction=16) == 1_789_056
    assert trained(meta("roberta-base"), pl.Compacter, reduction=32, n=4) == 57_088
    assert trained(meta("roberta-base"), pl.Compacter, "ffn-output", reduction=32, n=4) == 28_576
    # RoBERTa's feed-forward net is no module of its own, so its parallel adapters can only be computed: 12 of D → D
    assert 12 * pl.ParallelAdapter.size(768, 768, reduction=2) == 7_091_712
    assert 12 * pl.ParallelAdapter.size(768, 768, reduction=2, scale="learned") == 7_091_724


def test_houlsbys_share_of_bert_large():
    """Section 2.1: 2md + d + m an adapter, and "around 0.5–8 %" of the model for the widths that were searched."""
    percent = {}
    for m in (8, 64, 256):
        model = meta("bert-large")
        total = pl.count(model).total
        counted = trained(model, pl.Houlsby, bottleneck=m)
        assert counted == 2 * 24 * (2 * m * 1024 + 1024 + m)
        percent[m] = 100 * counted / total
    # Table 1 prints 2.1 % for 64; its own formula gives 1.9 % of 335 million, without the layer norms and the head
    assert percent[8] < 0.5 and round(percent[64], 1) == 1.9 and 7 < percent[256] < 8


def test_hes_parallel_adapters_and_prefix_are_mams_share_of_bart_large():
    """He et al. 2022, table 6: MAM with l = 30 and r = 512 trains 6.7 % of BART-large (406,291,456 parameters)."""
    prefix = 36 * 2 * 30 * 1024  # keys and values of 12 encoder, 12 decoder and 12 cross attentions
    parallel = 24 * pl.ParallelAdapter.size(1024, 1024, bottleneck=512)
    assert round(100 * (prefix + parallel) / 406_291_456, 1) == 6.7


# --- bad input ---


@pytest.mark.parametrize("method", [*BOTTLENECKS, pl.ParallelAdapter])
@pytest.mark.parametrize(
    ("hyper", "words"),
    [
        (dict(bottleneck=0), "bottleneck=0 must be at least 1"),
        (dict(bottleneck=33), "bottleneck=33 .*1…32"),
        (dict(reduction=64), "reduction=64 .*choose bottleneck"),
        (dict(reduction=0), "reduction=0 .*must be above 0"),
        (dict(reduction=4, activation="bend"), "'bend' is unknown; choose one of relu"),
    ],
)
def test_a_bad_bottleneck_is_refused_and_the_model_is_unchanged(method, hyper, words):
    model = build("llama")
    with pytest.raises(ValueError, match=words):
        pl.attach(model, method, **hyper)
    assert not pl.hosts(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("hyper", "words"),
    [
        (dict(n=4, bottleneck=6), "n=4 must divide the width 32 and the bottleneck 6.*bottleneck=8"),
        (dict(n=5, bottleneck=5), "n=5 must divide the width 32"),
        (dict(n=0), "n=0"),
        (dict(rank=0, bottleneck=4), "rank=0"),
    ],
)
def test_compacter_needs_widths_that_n_divides(hyper, words):
    with pytest.raises(ValueError, match=words):
        pl.attach(build("llama"), pl.Compacter, **hyper)


def test_a_parallel_adapter_needs_a_module_with_linear_layers_and_a_scale_it_knows():
    with pytest.raises(ValueError, match="LlamaRMSNorm holds no linear layer"):
        pl.attach(build("llama"), pl.ParallelAdapter, "input_layernorm")
    with pytest.raises(ValueError, match="'large' is neither a number nor 'learned'"):
        pl.attach(build("llama"), pl.ParallelAdapter, scale="large")


def test_a_sequential_adapter_needs_a_linear_layer():
    with pytest.raises(ValueError, match="Houlsby on 'model.layers.0.mlp'.*needs a linear layer"):
        pl.attach(build("llama"), pl.Houlsby, "mlp")


# --- fusion ---


def fused(names=("a", "b"), value=0.3):
    model = build("llama")
    for seed, name in enumerate(names):
        pl.attach(model, pl.Pfeiffer, name=name, bottleneck=4)
        for adapter in pl.adapters(model)[name].values():
            shake(adapter, value, seed=seed)
        pl.freeze(model, name)
    return pl.attach(model, pl.AdapterFusion, name="both", of=tuple(names))


def test_fusion_is_attention_over_what_the_adapters_add():
    model = fused()
    path, fusion = next(iter(pl.adapters(model)["both"].items()))
    shake(fusion, 0.3)
    a, b = (pl.adapters(model)[name][path] for name in "ab")
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        h = fusion.layer(x)
        z = [a.change(h), b.change(h)]
        score = torch.stack([((h @ fusion.Q.T) * (zi @ fusion.K.T)).sum(-1) for zi in z], -1)
        share = score.softmax(-1)
        want = h + sum(share[..., i, None] * (z[i] @ fusion.V.T) for i in range(2))
        torch.testing.assert_close(model.get_submodule(path)(x), want)


def test_fusion_starts_near_the_average_and_can_come_to_choose_one():
    model = fused()
    path, fusion = next(iter(pl.adapters(model)["both"].items()))
    a, b = (pl.adapters(model)[name][path] for name in "ab")
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        h = fusion.layer(x)
        fusion.Q.zero_()
        torch.testing.assert_close(fusion(fusion.layer, x), h + (a.change(h) + b.change(h)) / 2)
        one = h[0, 0]  # a query along h and a key along what tells a from b: then only a is heard there
        apart = a.change(one) - b.change(one)
        fusion.Q.copy_(1e4 * apart[:, None] * one[None] / one.norm() ** 2 / apart.norm() ** 2)
        fusion.K.copy_(torch.eye(32))
        torch.testing.assert_close(fusion(fusion.layer, x)[0, 0], one + a.change(one))


def test_fusing_equal_adapters_is_the_adapter():
    """The shares add up to one, so what all adapters say is said once."""
    model = fused()
    for path, adapter in pl.adapters(model)["a"].items():
        pl.adapters(model)["b"][path].load_state_dict(adapter.state_dict())
    with pl.using(model, "a"):
        want = outputs("llama", model)
    torch.testing.assert_close(outputs("llama", model), want, rtol=1e-4, atol=1e-4)


def test_fusion_fuses_methods_of_any_form():
    """What an adapter adds is its output less the layer's, so LoRA and a bottleneck can be fused too."""
    model = build("llama")
    pl.attach(model, pl.LoRA, "ffn-output", name="a", r=4)
    pl.attach(model, pl.Houlsby, "ffn-output", name="b", bottleneck=4)
    for name in "ab":
        for adapter in pl.adapters(model)[name].values():
            shake(adapter, 0.2)
        pl.freeze(model, name)
    pl.attach(model, pl.AdapterFusion, name="both", of=("a", "b"))
    path, fusion = next(iter(pl.adapters(model)["both"].items()))
    x = torch.randn(2, 64)
    with torch.no_grad():
        fusion.Q.zero_()
        h = fusion.layer(x)
        a, b = (pl.adapters(model)[name][path] for name in "ab")
        torch.testing.assert_close(fusion(fusion.layer, x), h + (a.change(x) + b.change(h)) / 2)


def test_the_fused_adapters_stay_as_they_are():
    model = fused()
    before = {n: p.clone() for name in "ab" for a in pl.adapters(model)[name].values() for n, p in a.named_parameters()}
    batch = inputs("llama")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    after = {n: p for name in "ab" for a in pl.adapters(model)[name].values() for n, p in a.named_parameters()}
    assert all(torch.equal(after[n], p) for n, p in before.items())
    assert pl.count(model).trainable == 2 * 3 * 32**2


def test_a_fusion_saved_with_its_adapters_is_the_same_again(tmp_path):
    model = fused()
    want = outputs("llama", model)
    for name in ("a", "b", "both"):
        pl.save_adapter(model, tmp_path / name, name=name)
    again = build("llama")
    for name in ("a", "b", "both"):
        pl.load_adapter(again, tmp_path / name, name=name)
    assert torch.equal(outputs("llama", again), want)
    lonely = pl.load_adapter(build("llama"), tmp_path / "both", name="both")
    with pytest.raises(ValueError, match="AdapterFusion needs the adapter 'a'.*attach or load it first"):
        outputs("llama", lonely)


def test_what_cannot_be_fused_is_refused():
    model = build("llama")
    pl.attach(model, pl.Pfeiffer, name="a", bottleneck=4)
    pl.attach(model, pl.Pfeiffer, name="b", bottleneck=4)
    pl.attach(model, pl.LoRA, "q_proj", name="elsewhere")
    for of, said in (((), "two or more"), (("a",), "two or more"), ("ab", "must be a list of words")):
        with pytest.raises(ValueError, match=said):
            pl.attach(model, pl.AdapterFusion, name="both", of=of)
    with pytest.raises(ValueError, match="no adapter named 'bb' is attached.*'b'"):
        pl.attach(model, pl.AdapterFusion, name="both", of=("a", "bb"))
    with pytest.raises(ValueError, match=r"'a' is still being trained.*freeze\(model, 'a'\)"):
        pl.attach(model, pl.AdapterFusion, name="both", of=("a", "b"))
    with pytest.raises(ValueError, match="'a' and 'elsewhere' must sit on the same layers"):
        pl.attach(model, pl.AdapterFusion, name="both", of=("a", "elsewhere"))
    with pytest.raises(ValueError, match="none of the targets carries 'a'.*targets="):
        pl.attach(model, pl.AdapterFusion, "k_proj", name="both", of=("a", "b"))
    assert set(pl.adapters(model)) == {"a", "b", "elsewhere"}


def test_an_adapter_in_use_by_a_fusion_cannot_be_detached():
    model = fused()
    with pytest.raises(ValueError, match="'both' needs 'a'; detach"):
        pl.detach(model, "a")
    assert set(pl.adapters(model)) == {"a", "b", "both"}
    pl.detach(model, "a", "both")
    assert set(pl.adapters(model)) == {"b"}
    pl.detach(fused())


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_a_parallel_adapter_on_a_net_that_is_given_the_residual_too(family):
    model = build_other(family)
    batch = inputs("llama")
    with torch.no_grad():
        bare = model(**batch).logits
        pl.attach(model, pl.ParallelAdapter, name="p")
        assert torch.equal(model(**batch).logits, bare)
        for adapter in pl.adapters(model)["p"].values():
            shake(adapter, 0.1)
        adapted = model(**batch).logits
        assert (adapted - bare).abs().max() > 1e-3
        with pl.using(model, rows=["p", None, "p"]):
            mixed = model(**batch).logits
    torch.testing.assert_close(mixed, torch.stack([adapted[0], bare[1], adapted[2]]), rtol=1e-5, atol=1e-5)

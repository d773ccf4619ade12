"""Gates and unions: methods that compose, and what their papers say of the sum."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from families import build, inputs, shake
from torch import nn

import peftlab as pl
from peftlab.methods.gated import Gated
from peftlab.prefix import PositionShift, PrefixedCache
from peftlab.unions import mam, unipelt

WITH_MLP = ("llama", "qwen2", "qwen3", "mistral", "gpt2")
WITH_PREFIX = (*WITH_MLP, "opt", "bert")


def outputs(family, model, **more):
    with torch.no_grad():
        return model(**{**inputs(family), **more}).logits


def shaken(model, value=0.2):
    for seed, adapters in enumerate(pl.adapters(model).values()):
        for adapter in adapters.values():
            shake(adapter, value, seed=seed)
    return model


def opened(model, name, by: float):
    """Set the gates of an adapter: +∞ for open, −∞ for shut."""
    with torch.no_grad():
        for adapter in pl.adapters(model)[name].values():
            adapter.w.zero_()
            adapter.c.fill_(by)


# --- gates ---

GATED = [(pl.LoRA, "q_proj|down_proj"), (pl.Houlsby, None), (pl.ParallelAdapter, None), (pl.PrefixTuning, None),
         (pl.BitFit, None), (pl.IA3, None)]  # fmt: skip


@pytest.mark.parametrize(("method", "targets"), GATED, ids=lambda v: getattr(v, "__name__", ""))
def test_an_open_gate_is_the_adapter_and_a_shut_one_the_base(method, targets):
    model = build("gpt2" if method is pl.BitFit else "llama")
    family = "gpt2" if method is pl.BitFit else "llama"
    targets = "c_attn|mlp.c_proj" if method is pl.BitFit else targets
    bare = outputs(family, model)
    pl.attach(model, method, targets, name="x")
    shaken(model)
    want = outputs(family, model)
    pl.attach(model, Gated, targets or method.targets, name="gate", of="x")
    if method is pl.PrefixTuning:  # the gate leaves the positions alone
        for adapter in pl.adapters(model)["x"].values():
            if isinstance(adapter, PositionShift):
                adapter.k = 0
        with pl.using(model, "x"):
            want = outputs(family, model)
    opened(model, "gate", 100.0)
    torch.testing.assert_close(outputs(family, model), want, rtol=1e-4, atol=1e-4)
    opened(model, "gate", -80.0)
    torch.testing.assert_close(outputs(family, model), bare, rtol=1e-4, atol=1e-4)
    opened(model, "gate", 0.0)
    half = outputs(family, model)
    assert (half - want).abs().max() > 1e-3 and (half - bare).abs().max() > 1e-3


def test_each_token_has_its_own_gate():
    layer, x = nn.Linear(12, 8), torch.randn(2, 5, 12)
    model = nn.Sequential(layer)
    pl.attach(model, pl.LoRA, "0", name="x", r=2)
    pl.attach(model, Gated, "0", name="gate", of="x")
    shaken(model, 0.5)
    lora, gate = pl.adapters(model)["x"]["0"], pl.adapters(model)["gate"]["0"]
    g = torch.sigmoid(x @ gate.w + gate.c)[..., None]
    torch.testing.assert_close(model(x), layer(x) + g * lora.delta(x))
    assert g.std() > 0.01


def test_a_gated_prefix_weighs_g_times_as_much_in_the_softmax():
    """Attention by hand: weights ∝ g·exp(q·p) on the prefix and exp(q·k) on the text."""
    B, T, k, d = 2, 4, 3, 8
    draw = torch.Generator().manual_seed(0)
    q, K, V = (torch.randn(B, 1, T, d, generator=draw) for _ in range(3))
    P_k, P_v = (torch.randn(1, 1, k, d, generator=draw) for _ in range(2))
    g = torch.rand(B, T, 1, generator=draw)

    class Attention(nn.Linear):
        layer_idx = 0

        def forward(self, hidden_states, past_key_values=None, attention_mask=None):
            keys, values = past_key_values.update(K, V)
            return nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=attention_mask)

    attention = Attention(d, d)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    seen = torch.cat([torch.ones(T, k, dtype=torch.bool), causal], -1)[None, None]
    pairs = torch.cat([P_k.expand(B, -1, -1, -1), K], 2), torch.cat([P_v.expand(B, -1, -1, -1), V], 2)
    weight = (q @ pairs[0].mT / d**0.5).exp() * seen
    weight = weight * torch.cat([g[:, None].expand(-1, -1, -1, k), torch.ones(B, 1, T, T)], -1)
    want = weight / weight.sum(-1, keepdim=True) @ pairs[1]
    additive = torch.zeros(1, 1, T, k + T).masked_fill(~seen, torch.finfo(torch.float32).min)
    for mask in (seen, additive):
        cache = PrefixedCache(None, P_k, P_v, None)
        run = partial(Gated(attention, of="x").attend, attention, g)
        torch.testing.assert_close(run(torch.zeros(B, T, d), past_key_values=cache, attention_mask=mask), want)


def test_a_gate_without_its_adapter_says_so():
    model = build("llama")
    with pytest.raises(ValueError, match="name one attached adapter"):
        Gated(nn.Linear(4, 4))
    pl.attach(model, pl.LoRA, "q_proj", name="x")
    with pytest.raises(ValueError, match="no adapter named 'y' is attached"):
        pl.attach(model, Gated, "q_proj", name="gate", of="y")
    with pytest.raises(ValueError, match="none of the targets carries 'x', which sits on 'model.layers.0.self"):
        pl.attach(model, Gated, "v_proj", name="gate", of="x")
    pl.attach(model, Gated, "q_proj", name="gate", of="x")
    with pytest.raises(ValueError, match="'gate' needs 'x'; detach"):
        pl.detach(model, "x")


def test_a_gate_on_attention_is_refused_in_a_mixed_batch_and_one_on_a_layer_is_not():
    model = build("llama")
    names = unipelt(model, k=3)
    with pytest.raises(ValueError, match="mixed"), pl.using(model, rows=[names[1], None, None]):
        pass
    shaken(model)
    with pl.using(model, rows=[names[0], None, names[2]]):
        mixed = outputs("llama", model)
    for i, used in enumerate([(names[0],), (), (names[2],)]):
        with pl.using(model, *used):
            torch.testing.assert_close(mixed[i : i + 1], outputs("llama", model)[i : i + 1], rtol=1e-4, atol=1e-4)


# --- unions ---


@pytest.mark.parametrize("family", WITH_MLP)
def test_mam_is_its_two_parts(family):
    model = build(family)
    names = mam(model, k=3, bottleneck=4)
    assert names == ("mam_prefix", "mam_parallel")
    shaken(model)
    want = outputs(family, model)
    apart = build(family)
    pl.attach(apart, pl.PrefixTuning, name="one", k=3)
    pl.attach(apart, pl.ParallelAdapter, name="two", bottleneck=4, scale=4.0)
    shaken(apart)
    with pl.using(apart, "one", "two"):
        assert torch.equal(outputs(family, apart), want)
    trainable = sum(a.expected() for part in pl.adapters(model).values() for a in part.values())
    assert pl.count(model).trainable == trainable
    with pl.using(model):
        assert torch.equal(outputs(family, model), outputs(family, build(family)))


@pytest.mark.parametrize("family", WITH_PREFIX)
def test_unipelt_has_three_methods_and_three_gates_and_all_learn(family):
    model = build(family)
    names = unipelt(model, k=3)
    assert names == tuple(f"unipelt_{part}_gate" for part in ("lora", "prefix", "adapter"))
    shaken(model)
    batch = inputs(family)
    model(**batch).logits.square().sum().backward()
    for name, parts in pl.adapters(model).items():
        for path, adapter in parts.items():
            for parameter in adapter.parameters():
                assert parameter.grad is not None and parameter.grad.abs().sum() > 0, (name, path)
    trainable = sum(a.expected() for part in pl.adapters(model).values() for a in part.values())
    assert pl.count(model).trainable == trainable


@pytest.mark.parametrize("union", [mam, unipelt])
def test_a_union_writes_the_same_with_a_cache_and_in_a_padded_batch(union):
    model = build("llama")
    union(model, k=3)
    shaken(model, 0.1)
    ids = inputs("llama", rows=2, length=7)["input_ids"]
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    cached = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **settings)
    assert torch.equal(cached, plain)
    left = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)], 1)
    padded = model.generate(left, attention_mask=mask, **settings)
    assert torch.equal(padded[:, 3:], cached)


@pytest.mark.parametrize("union", [mam, unipelt])
def test_a_causal_model_with_a_union_does_not_see_the_future(union):
    """A gate averaged over all tokens, as the paper has it for BERT, would fail here."""
    model = build("llama")
    union(model, k=3)
    shaken(model)
    ids = inputs("llama", rows=1, length=8)["input_ids"]
    other = ids.clone()
    other[:, 5:] = (other[:, 5:] + 7) % 96
    first, second = (outputs("llama", model, input_ids=i) for i in (ids, other))
    torch.testing.assert_close(first[:, :5], second[:, :5], rtol=1e-5, atol=1e-5)
    assert (first[:, 5:] - second[:, 5:]).abs().max() > 0.1


@pytest.mark.parametrize("union", [mam, unipelt])
def test_gradient_checkpointing_gives_the_same_gradients(union):
    batch, grads = inputs("llama"), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build("llama").train()
        union(model, k=3)
        shaken(model)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(**batch, labels=batch["input_ids"]).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0] and grads[0].keys() == grads[1].keys()
    for name, gradient in grads[0].items():
        torch.testing.assert_close(gradient, grads[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("union", [mam, unipelt])
def test_a_union_is_saved_and_loaded_part_by_part(union, tmp_path):
    model = build("llama")
    names = union(model, k=3)
    shaken(model)
    want = outputs("llama", model)
    again = build("llama")
    parts = sorted(pl.adapters(model), key=lambda name: name.endswith("_gate"))
    for name in parts:
        pl.save_adapter(model, tmp_path / name, name=name)
        pl.load_adapter(again, tmp_path / name, name=name)
    pl.activate(again, *names)
    assert torch.equal(outputs("llama", again), want)


@pytest.mark.parametrize("union", [mam, unipelt])
def test_after_an_error_nothing_of_a_union_is_attached(union):
    model = build("llama")
    with pytest.raises(ValueError):
        union(model, k=3, reduction=1000)
    assert not pl.hosts(model) and all(p.requires_grad for p in model.parameters())
    pl.attach(model, pl.LoRA, name="mine")
    with pytest.raises(ValueError):
        union(model, k=3, reduction=1000)
    assert list(pl.adapters(model)) == ["mine"] and next(iter(pl.hosts(model).values())).switch.active == ("mine",)
    union(model, k=3)
    with pytest.raises(ValueError, match="is attached already"):
        union(model, k=3)
    assert "mine" in pl.adapters(model) and len(pl.adapters(model)) in (3, 7)


@pytest.mark.parametrize("union", [mam, unipelt])
def test_models_a_union_does_not_fit_are_named(union):
    with pytest.raises(ValueError, match="T5ForConditionalGeneration"):
        union(build("t5"))


def test_the_unions_of_adapterhubs_table_but_for_their_prefix_network():
    """adapter-transformers prints 22,493,984 (MAM) and 11,083,376 (UniPELT) for roberta-base, with prefix networks.

    Ours have one width of table and network, theirs two (MAM: 768 and 800; UniPELT: 768 and 512), so that the whole
    can only be computed; what is left of it, their own "prefix_tuning_flat" and gates, is counted.
    """
    import transformers as t

    with torch.device("meta"):
        model = t.RobertaModel(t.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1))
    pl.attach(model, pl.PrefixTuning, name="flat", k=30)
    assert pl.count(model).trainable == 552_960
    pl.detach(model)
    names = unipelt(model, k=10, r=8, reduction=16)
    parts = {n: sum(a.expected() for a in found.values()) for n, found in pl.adapters(model).items()}
    assert parts["unipelt_lora"] == 294_912 and parts["unipelt_adapter"] == 894_528
    assert [parts[n] for n in names] == [24 * 769, 12 * 769, 12 * 769]

    def network(k, hidden, d=768, L=12):
        return k * d + (d * hidden + hidden) + (hidden + 1) * 2 * L * d

    whole = {n: c for n, c in parts.items() if n != "unipelt_prefix"}
    assert sum(whole.values()) + network(10, 512) == 11_083_376
    assert 12 * pl.ParallelAdapter.size(768, 768, reduction=2) + network(30, 800) == 22_493_984


def test_a_gated_prefix_needs_attention_that_takes_a_mask_of_numbers(monkeypatch):
    model = build("llama")
    unipelt(model, k=3, reduction=4)
    monkeypatch.setattr(model.config, "_attn_implementation", "flash_attention_2")
    (attention, *_) = [host for path, host in pl.hosts(model).items() if path.endswith("self_attn")]
    x, turn = torch.randn(1, 4, 32), (torch.ones(1, 4, 8), torch.zeros(1, 4, 8))
    with pytest.raises(ValueError, match="'flash_attention_2' does not take; load.*attn_implementation='sdpa'"):
        attention(hidden_states=x, position_embeddings=turn, attention_mask=None)


def test_a_refused_union_leaves_a_mixed_batch_as_it_was():
    model = pl.attach(build("llama"), pl.LoRA, name="low")
    pl.attach(model, pl.LoRA, name="mam_parallel")  # the name is taken: the second part fails
    for found in pl.adapters(model).values():
        for adapter in found.values():
            shake(adapter)
    rows = ["low", None, "mam_parallel"]
    with pl.using(model, rows=rows), torch.no_grad():
        want = model(**inputs("llama")).logits
        with pytest.raises(ValueError, match="mam_parallel"):
            pl.mam(model)
        assert torch.equal(model(**inputs("llama")).logits, want)
    assert set(pl.adapters(model)) == {"low", "mam_parallel"}

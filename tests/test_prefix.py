"""Prefix tuning and LLaMA-Adapter: beside the reference, with caches, padding, checkpointing, and against bad input."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from families import build, build_other, inputs, labels, shake

import peftlab as pl
from peftlab.prefix import PrefixMLP, shift_bias

CAUSAL = ("llama", "qwen2", "qwen3", "mistral", "gpt2", "opt", "bloom", "gpt_neox")
FAMILIES = (*CAUSAL, "bert")
TASKS = {"bert": "SEQ_CLS"}
CLOSE = dict(rtol=0, atol=1e-5)
K = 5


def ours(family, name="a", **hyper):
    heads = dict(modules_to_save=["classifier"]) if family == "bert" else {}
    return pl.attach(build(family), pl.PrefixTuning, name=name, k=K, **heads, **hyper)


def reference(family, **settings):
    config = peft.PrefixTuningConfig(task_type=TASKS.get(family, "CAUSAL_LM"), num_virtual_tokens=K, **settings)
    return peft.get_peft_model(build(family), config).eval()


def prefixes(model, name="a"):
    return [a for a in pl.adapters(model)[name].values() if isinstance(a, pl.PrefixTuning)]


def padded(family, side="right"):
    """A batch of which two rows are shorter."""
    batch = inputs(family)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    for row, n in ((0, 3), (2, 1)):
        batch["attention_mask"][row, slice(-n, None) if side == "right" else slice(n)] = 0
    return batch


def seen(logits, batch):
    """The logits of real tokens: what stands at padding means nothing."""
    return logits if logits.ndim == 2 else logits[batch["attention_mask"].bool()]


@torch.no_grad()
def logits(model, **batch):
    return model(**batch).logits


def generated(model, ids, **settings):
    settings = dict(max_new_tokens=7, do_sample=False, pad_token_id=0, eos_token_id=None) | settings
    mask = settings.pop("attention_mask", torch.ones_like(ids))
    return model.generate(input_ids=ids, attention_mask=mask, **settings)[:, ids.shape[1] :]


@pytest.mark.reference("PrefixTuning", "writes")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_reads_ours(family, tmp_path):
    model, batch = ours(family), padded(family)
    pl.save_adapter(model, tmp_path, name="a")
    theirs = peft.PeftModel.from_pretrained(build(family), tmp_path).eval()
    for one in (inputs(family), batch):
        want, got = logits(theirs, **one), logits(model, **one)
        same = (got, want) if one is not batch else (seen(got, batch), seen(want, batch))
        torch.testing.assert_close(*same, **CLOSE)
    assert (logits(model, **inputs(family)) - logits(build(family), **inputs(family))).abs().max() > 0.1


@pytest.mark.reference("PrefixTuning", "reads")
@pytest.mark.parametrize("settings", [{}, dict(prefix_projection=True, encoder_hidden_size=12)], ids=["plain", "mlp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ours_reads_the_reference_with_its_gradients_and_count(family, settings, tmp_path):
    theirs = reference(family, **settings)
    theirs.save_pretrained(tmp_path)
    model, batch = pl.load_adapter(build(family), tmp_path), inputs(family)
    torch.testing.assert_close(logits(model, **batch), logits(theirs, **batch), **CLOSE)
    if settings:
        return  # of the MLP the file holds only what it gave: see the test of the projection
    for m in (theirs, model):
        m(**batch, labels=labels(family, batch)).loss.backward()
    got = torch.cat([p.grad for a in prefixes(model, "default") for p in (a.P_k, a.P_v)], -1)
    torch.testing.assert_close(got, theirs.prompt_encoder["default"].embedding.weight.grad, rtol=1e-4, atol=1e-6)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == theirs.get_nb_trainable_parameters()[0]


@pytest.mark.reference("PrefixTuning", "gradients")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_projection_is_the_references(family):
    """The same E and MLP: equal outputs, gradients and counts; the MLP is counted and trained once for all layers."""
    theirs, model = reference(family, prefix_projection=True, encoder_hidden_size=12), None
    model = pl.attach(build(family), pl.PrefixTuning, k=K, projection=True, hidden=12, name="a")
    encoder, mlp = theirs.prompt_encoder["default"], prefixes(model)[0].mlp
    pairs = [(mlp.E, encoder.embedding.weight), (mlp.first.weight, encoder.transform[0].weight),
             (mlp.first.bias, encoder.transform[0].bias), (mlp.second.weight, encoder.transform[2].weight),
             (mlp.second.bias, encoder.transform[2].bias)]  # fmt: skip
    with torch.no_grad():
        for mine, other in pairs:
            mine.copy_(other)
    batch = inputs(family)
    torch.testing.assert_close(logits(model, **batch), logits(theirs, **batch), **CLOSE)
    for m in (theirs, model):
        m(**batch, labels=labels(family, batch)).loss.backward()
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted == sum(a.expected() for a in prefixes(model))
    heads = sum(p.numel() for n, p in theirs.named_parameters() if "modules_to_save" in n)
    assert counted == theirs.get_nb_trainable_parameters()[0] - heads


def test_the_projection_is_one_module_wherever_the_model_goes(tmp_path):
    model = pl.attach(build("llama"), pl.PrefixTuning, k=K, projection=True, name="a")
    want = logits(model, **inputs("llama"))
    twin = copy.deepcopy(model)
    assert len({id(a.mlp) for a in prefixes(twin)}) == 1 and prefixes(twin)[0].mlp is not prefixes(model)[0].mlp
    assert sum(isinstance(m, PrefixMLP) for m in twin.modules()) == 1
    assert torch.equal(logits(twin, **inputs("llama")), want)
    pl.save_adapter(model, tmp_path, name="a")
    with torch.device("meta"):
        nowhere = build("llama")
    pl.attach(nowhere, pl.PrefixTuning, k=K, projection=True, name="a")
    assert prefixes(nowhere)[0].mlp.E.is_meta, "where the model is"
    plain = pl.load_adapter(build("llama"), tmp_path, name="b")
    assert not any(a.projection for a in prefixes(plain, "b"))
    torch.testing.assert_close(logits(plain, **inputs("llama")), want, **CLOSE)


@pytest.mark.parametrize("hyper, size", [(dict(k=10), 2 * 10 * 16), (dict(k=1, init="zero"), 2 * 16)])
def test_grouped_query_attention_needs_only_its_own_heads(hyper, size):
    """2 of 4 heads of width 8: d_kv is 16, not the model's width of 32."""
    model = pl.attach(build("llama"), pl.PrefixTuning, name="a", **hyper)
    for adapter in prefixes(model):
        assert sum(p.numel() for p in adapter.parameters()) == adapter.expected() == size


@pytest.mark.parametrize("family", CAUSAL)
def test_a_real_texts_keys_and_values_as_prefix_are_that_text(family):
    """The prefix taken from the cache of a text: then the model goes on exactly as if it had read that text."""
    base, ids = build(family), inputs(family, length=K + 6, seed=8)["input_ids"]  # seed 7: Qwen3 has two equal logits
    want = logits(base, input_ids=ids)[:1, K:]
    with torch.no_grad():
        cache = base(input_ids=ids[:1, :K], use_cache=True).past_key_values
    model = ours(family)
    with torch.no_grad():
        for adapter, layer in zip(prefixes(model), cache.layers, strict=True):
            for part, states in ((adapter.P_k, layer.keys), (adapter.P_v, layer.values)):
                part.copy_(states[0].transpose(0, 1).flatten(1))  # (heads, k, head) -> (k, d_kv)
    torch.testing.assert_close(logits(model, input_ids=ids[:1, K:]), want, **CLOSE)
    prompt = ids[:1, K : K + 3]
    new = generated(base, ids[:1, : K + 3])
    assert torch.equal(generated(model, prompt), new)


@pytest.mark.parametrize("family", CAUSAL)
def test_generation_equals_the_references_with_and_without_a_cache(family, tmp_path):
    model = ours(family)
    pl.save_adapter(model, tmp_path, name="a")
    theirs = peft.PeftModel.from_pretrained(build(family), tmp_path).eval()
    ids = inputs(family)["input_ids"]
    want = generated(theirs, ids)
    assert torch.equal(generated(model, ids), want)
    assert torch.equal(generated(model, ids, use_cache=False), want)
    assert torch.equal(generated(model, ids, cache_implementation="static"), want)
    with pl.using(model):
        assert torch.equal(generated(model, ids), generated(build(family), ids))


@pytest.mark.parametrize("family", CAUSAL)
def test_padding_on_either_side_changes_nothing(family):
    """A row of a padded batch equals the row alone; the reference drops position_ids, so there left padding matters."""
    model = ours(family)
    for side in ("left", "right"):
        batch = padded(family, side)
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)  # what generate() gives
        together = logits(model, **batch, position_ids=positions)
        for row, real in enumerate(batch["attention_mask"].bool()):
            alone = logits(model, input_ids=batch["input_ids"][row, real][None])
            torch.testing.assert_close(together[row, real][None], alone, rtol=1e-5, atol=2e-5)
    batch = padded(family, "left")
    new = generated(model, **{"ids": batch["input_ids"], "attention_mask": batch["attention_mask"]})
    for row, real in enumerate(batch["attention_mask"].bool()):
        assert torch.equal(generated(model, batch["input_ids"][row, real][None])[0], new[row])


def test_a_sliding_window_slides_over_the_text_and_keeps_the_prefix():
    base = build("mistral", sliding_window=4)
    model = pl.attach(base, pl.PrefixTuning, k=K)
    ids = inputs("mistral", length=12)["input_ids"]
    assert torch.equal(generated(model, ids), generated(model, ids, use_cache=False))
    with torch.no_grad():
        early = model(input_ids=ids).logits[:, -1]
        for adapter in prefixes(model, "default"):
            adapter.P_v.mul_(2)
        assert (model(input_ids=ids).logits[:, -1] - early).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_eager_and_sdpa_attention_agree(family):
    for batch in (inputs(family), padded(family, "left")):
        results = []
        for attention in ("sdpa", "eager"):
            torch.manual_seed(3)
            base = build(family, attn_implementation=attention)
            torch.manual_seed(4)
            result = logits(pl.attach(base, pl.PrefixTuning, k=K), **batch)
            results.append(seen(result, batch) if "attention_mask" in batch else result)
        torch.testing.assert_close(*results, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("hyper", [{}, dict(projection=True)], ids=["plain", "mlp"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom"])
def test_gradient_checkpointing_keeps_the_prefix(family, hyper, reentrant):
    """The layers then get no cache: where the prefix is given as one, as in the reference, it is lost or refused."""
    batch, grads = padded(family), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = pl.attach(build(family), pl.PrefixTuning, k=K, **hyper).train()
        for module in model.modules():  # the families differ in where they drop
            module.p = 0.0 if isinstance(module, torch.nn.Dropout) else getattr(module, "p", None)
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model(**batch, labels=labels(family, batch), use_cache=True).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(g is not None and g.abs().sum() > 0 for g in grads[1].values())
    for name, gradient in grads[0].items():
        torch.testing.assert_close(gradient, grads[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hyper", [{}, dict(projection=True)], ids=["plain", "mlp"])
@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom"])
def test_compiled_without_a_break(family, hyper):
    model = ours(family, **hyper)
    want = logits(model, **inputs(family))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, **inputs(family)), want, rtol=1e-5, atol=2e-5)


def test_on_a_bfloat16_base_the_prefix_stays_float32_and_agrees_with_the_reference(tmp_path):
    model = pl.attach(build("llama").bfloat16(), pl.PrefixTuning, k=K, name="a")
    assert all(p.dtype == torch.float32 for a in prefixes(model) for p in a.parameters())
    pl.save_adapter(model, tmp_path, name="a")
    theirs = peft.PeftModel.from_pretrained(build("llama").bfloat16(), tmp_path).eval()
    torch.testing.assert_close(logits(model, **inputs("llama")), logits(theirs, **inputs("llama")))
    ids = inputs("llama")["input_ids"]
    assert torch.equal(generated(model, ids), generated(model, ids, use_cache=False))


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_two_prefixes_stand_one_behind_the_other(family):
    """Both run together: the later one in front, and the text begins behind both."""
    model = ours(family)
    pl.attach(model, pl.PrefixTuning, name="b", k=3)
    pl.activate(model, "a", "b")
    long = pl.attach(build(family), pl.PrefixTuning, k=K + 3)
    with torch.no_grad():
        for joint, a, b in zip(prefixes(long, "default"), prefixes(model), prefixes(model, "b"), strict=True):
            joint.P_k.copy_(torch.cat([a.P_k, b.P_k]))
            joint.P_v.copy_(torch.cat([a.P_v, b.P_v]))
    for batch in (inputs(family), padded(family)):
        torch.testing.assert_close(logits(model, **batch), logits(long, **batch), **CLOSE)


def test_positions_that_are_a_bias_move_behind_the_prefix():
    """BLOOM: slope of the head times position, also behind padding; a prefix of 3 and one of 2 are one of 5."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    for heads in (4, 6):  # 6: slopes of two kinds
        alibi = build_alibi_tensor(mask, heads, torch.float32)
        want = build_alibi_tensor(torch.cat([mask.new_ones(2, 5), mask], 1), heads, torch.float32)
        real = torch.cat([mask.new_ones(2, 5), mask], 1).bool().repeat_interleave(heads, 0)[:, None]
        for got in (shift_bias(alibi, heads, 5), shift_bias(shift_bias(alibi, heads, 2), heads, 3)):
            assert got.shape == want.shape
            torch.testing.assert_close(got[real], want[real])


def test_prefix_attention_is_a_mixture_of_two_attentions():
    """(1 − λ)·Attn(q, K, V) + λ·Attn(q, P_k, P_v), λ the prefix's share. He et al. 2021, arXiv:2110.04366, 3.1."""
    q, K_, V = (torch.randn(7, 8, dtype=torch.float64) for _ in range(3))
    P_k, P_v = (torch.randn(3, 8, dtype=torch.float64) for _ in range(2))

    def attend(keys, values):
        return torch.softmax(q @ keys.T, -1) @ values

    share = torch.softmax(q @ torch.cat([P_k, K_]).T, -1)[:, :3].sum(-1, keepdim=True)
    mixture = (1 - share) * attend(K_, V) + share * attend(P_k, P_v)
    torch.testing.assert_close(attend(torch.cat([P_k, K_]), torch.cat([P_v, V])), mixture)
    assert torch.softmax(q @ torch.cat([0 * P_k, K_]).T, -1)[:, :3].sum(-1).min() > 0, "keys of zero take a share too"


def unchanged(model, before):
    after = model.state_dict()
    return not pl.hosts(model) and after.keys() == before.keys() and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family, hyper, words", [
    ("llama", dict(k=64), "k=64 leaves no room in a context of 64"),
    ("gpt2", dict(k=100), "context of 64"),
    ("llama", dict(k=0), "k ≥ 1"),
    ("llama", dict(init="ones"), "init='ones'"),
    ("t5", {}, "PromptTuning"),
    ("llama", dict(targets="q_proj"), "Linear has no projections of its own, so it is no attention"),
    ("t5", dict(targets="layer.0.SelfAttention"), "PromptTuning"),
])  # fmt: skip
def test_what_a_prefix_cannot_do_is_refused_and_the_model_stays(family, hyper, words):
    model = build(family)
    before = model.state_dict()
    with pytest.raises(ValueError, match=words):
        pl.attach(model, pl.PrefixTuning, **hyper)
    assert unchanged(model, before)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_text_longer_than_the_context_is_refused_with_the_prefix_counted(family):
    model = pl.attach(build(family), pl.PrefixTuning, k=60)
    model(input_ids=inputs(family, length=4)["input_ids"])
    with pytest.raises(ValueError, match="k=60 and 5 tokens are longer than the context of 64"):
        model(input_ids=inputs(family, length=5)["input_ids"])
    with pytest.raises(ValueError, match="k=60 and 5 tokens"):
        generated(model, inputs(family, length=2)["input_ids"])


def test_a_mixed_batch_and_a_partial_file_are_refused(tmp_path):
    model = ours("llama")
    with pytest.raises(ValueError, match="mixed batch"), pl.using(model, rows=["a", None, "a"]):
        pass
    part = pl.attach(build("llama"), pl.PrefixTuning, targets="layers.1.self_attn", name="a")
    with pytest.raises(ValueError, match="each attention layer"):
        pl.save_adapter(part, tmp_path, name="a")


# LLaMA-Adapter: the reference has it for Llama, Mistral and GPT-2; in GPT-2 it leaves W_o out, so there we refuse


def adapted(family, k=4, layers=1, gate=0.7):
    model = pl.attach(build(family), pl.LlamaAdapter, name="a", k=k, layers=layers)
    for adapter in pl.adapters(model)["a"].values():
        torch.nn.init.constant_(adapter.adaption_gate, gate)
    return model


@pytest.mark.reference("LlamaAdapter", "writes", "reads", "gradients")
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_llama_adapter_and_the_reference_read_each_other(family, layers, tmp_path):
    model = adapted(family, layers=layers)
    assert list(pl.adapters(model)["a"]) == [f"model.layers.{i}.self_attn" for i in range(2 - layers, 2)]
    pl.save_adapter(model, tmp_path / "ours", name="a")
    theirs = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours", is_trainable=True).eval()
    batch = padded(family)
    torch.testing.assert_close(logits(model, **batch), logits(theirs, **batch), **CLOSE)
    assert (logits(model, **batch) - logits(build(family), **batch)).abs().max() > 0.1
    for m in (model, theirs):
        m(**batch, labels=labels(family, batch)).loss.backward()
    grads = {n.replace("base_model.model.", ""): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for path, adapter in pl.adapters(model)["a"].items():
        for name, parameter in adapter.named_parameters():
            torch.testing.assert_close(parameter.grad, grads[f"{path}.{name}"], rtol=1e-4, atol=1e-5)
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted == theirs.get_nb_trainable_parameters()[0] == layers * (4 * 32 + 1)
    theirs.save_pretrained(tmp_path / "theirs")
    again = pl.load_adapter(build(family), tmp_path / "theirs")
    assert torch.equal(logits(again, **batch), logits(model, **batch))
    ids = batch["input_ids"]
    new = generated(model, ids)
    assert torch.equal(new, generated(model, ids, use_cache=False))
    assert torch.equal(new, generated(theirs, ids))


@pytest.mark.parametrize("more", [{}, dict(attention_bias=True)], ids=["plain", "biases"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_llama_adapter_starts_at_the_base_and_is_its_equation(family, more):
    base = build(family, **(more if family in ("llama", "qwen3") else {}))
    want = logits(base, **inputs(family))
    model = pl.attach(copy.deepcopy(base), pl.LlamaAdapter, k=4, layers=1, name="a")
    assert torch.equal(logits(model, **inputs(family)), want)
    adapter = pl.adapters(model)["a"]["model.layers.1.self_attn"]
    shake(adapter, 1.0)
    attention = adapter.layer
    x, cos, sin = torch.randn(1, 6, 32), torch.ones(1, 6, attention.head_dim), torch.zeros(1, 6, attention.head_dim)
    with torch.no_grad():  # at position 0 nothing is rotated: one head after the other, by hand
        norm = {n: getattr(attention, n, torch.nn.Identity()) for n in ("q_norm", "k_norm")}
        q = norm["q_norm"](attention.q_proj(x)[0].view(6, 4, -1))
        keys = norm["k_norm"](attention.k_proj(adapter.adaption_prompt)[0].view(4, 2, -1))
        values = attention.v_proj(adapter.adaption_prompt)[0].view(4, 2, -1)
        parts = [torch.softmax(q[:, h] @ keys[:, h // 2].T / attention.head_dim**0.5, -1) @ values[:, h // 2]
                 for h in range(4)]  # fmt: skip
        by_hand = adapter.adaption_gate * torch.cat(parts, -1) @ attention.o_proj.weight.T
        torch.testing.assert_close(adapter.prompted(x, cos, sin)[0], by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family, hyper, words", [
    ("gpt2", {}, "GPT2Attention is not attention as in Llama"),
    ("opt", {}, "PrefixTuning"),
    ("llama", dict(layers=3), "layers=3, but LlamaForCausalLM has 2"),
    ("llama", dict(layers=0), "take 1…2"),
    ("llama", dict(k=0), "at least one"),
    ("llama", dict(targets="down_proj"), "Linear is not attention"),
])  # fmt: skip
def test_llama_adapter_refuses_what_it_cannot_sit_on(family, hyper, words):
    model = build(family)
    before = model.state_dict()
    with pytest.raises(ValueError, match=words):
        pl.attach(model, pl.LlamaAdapter, **hyper)
    assert unchanged(model, before)


@pytest.mark.parametrize("family", ["gemma", "gemma3", "granite", "mixtral", "qwen2_moe", "starcoder2"])
def test_llama_adapter_asks_with_the_queries_of_the_frozen_attention(family, monkeypatch):
    """Those that the attention itself hands to scaled_dot_product_attention, whatever it normalised and rotated."""
    model = build_other(family)
    model.set_attn_implementation("sdpa")
    pl.attach(model, pl.LlamaAdapter, k=4, layers=1)
    ((_, adapter),) = pl.adapters(model)["default"].items()
    shake(adapter, 0.5)
    queries, answers = [], []
    attend, prompted = torch.nn.functional.scaled_dot_product_attention, adapter.prompted
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda q, *a, **k: queries.append(q) or attend(q, *a, **k))  # fmt: skip
    monkeypatch.setattr(adapter, "prompted", lambda *a: answers.append(prompted(*a)) or answers[-1])
    with torch.no_grad():
        model(**inputs("llama"))
        layer, P = adapter.layer, adapter.adaption_prompt
        K_p = adapter.heads(layer.k_proj(P), "k_norm").repeat_interleave(layer.num_key_value_groups, 1)
        V_p = adapter.heads(layer.v_proj(P)).repeat_interleave(layer.num_key_value_groups, 1)
        seen = torch.softmax(queries[-1] @ K_p.mT * layer.scaling, -1) @ V_p
        want = torch.nn.functional.linear(adapter.adaption_gate * seen.transpose(1, 2).flatten(2), layer.o_proj.weight)
    assert want.abs().max() > 1e-2
    torch.testing.assert_close(answers[-1], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["cohere", "gemma2", "olmo2", "smollm3", "stablelm"])
def test_llama_adapter_refuses_attention_that_is_computed_otherwise(family):
    """Cohere and SmolLM3 rotate otherwise and Gemma 2 caps the scores, unseen; OLMo-2 and StableLM would break."""
    model = build_other(family)
    with pytest.raises(ValueError, match="is not attention as in Llama"):
        pl.attach(model, pl.LlamaAdapter)
    assert not pl.hosts(model)


@pytest.mark.parametrize("inside, hyper", [("BitFit", {}), ("Houlsby", dict(bottleneck=4))])
def test_a_bias_trained_on_the_output_projection_counts_once(inside, hyper):
    """Untrained (g = 0), LLaMA-Adapter leaves the output as it is, whatever sits on o_proj."""
    model = pl.attach(build("llama"), inside, "o_proj", name="inside", **hyper)
    for adapter in pl.adapters(model)["inside"].values():
        shake(adapter, 0.2)
    with torch.no_grad():
        want = model(**inputs("llama")).logits
        pl.attach(model, pl.LlamaAdapter, name="llama", k=4)
        pl.activate(model, "inside", "llama")
        torch.testing.assert_close(model(**inputs("llama")).logits, want, rtol=1e-5, atol=1e-5)
        if inside == "BitFit":
            for adapter in pl.adapters(model)["llama"].values():
                shake(adapter, 0.5)
            want = model(**inputs("llama")).logits
            pl.merge(model, "inside")
            torch.testing.assert_close(model(**inputs("llama")).logits, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family, words", [
    ("gptj", "GPTJAttention takes no past_key_values"),
    ("distilbert", "PromptTuning"),
    ("mpt", "MptAttention adds a bias for each pair"),
    ("deepseek", "different widths"),
])  # fmt: skip
def test_a_prefix_is_refused_at_once_where_attention_takes_none(family, words):
    model = build_other(family)
    with pytest.raises(ValueError, match=words) as error:
        pl.attach(model, pl.PrefixTuning)
    assert "PromptTuning" in str(error.value) and "positions" not in str(error.value) and not pl.hosts(model)

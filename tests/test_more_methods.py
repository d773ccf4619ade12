"""NoReFT, Bapna and Firat's adapter, side-tuning, DVoRA, and AdapterDrop: their equations, counts and properties."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from families import build, inputs, labels, shake
from torch import nn

import peftlab as pl
from peftlab.layers import weight_of


def logits(model, family="llama", **more):
    with torch.no_grad():
        return model(**(inputs(family) | more)).logits


def attached(family, method, targets=None, scale=0.3, **hyper):
    """The family's model with one trained adapter "a"."""
    torch.manual_seed(0)
    model = pl.attach(build(family), method, targets, name="a", **hyper)
    for adapter in pl.adapters(model)["a"].values():
        shake(adapter, scale)
    return model


def writes(model, ids, **more):
    settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))
    return model.generate(ids, **settings, **more)


# ---------------------------------------------------------------------------------------------------------- NoReFT


def test_noreft_is_loreft_if_its_rows_are_orthonormal():
    block = build("llama").model.layers[0]
    loose, strict = pl.NoReFT(block, r=3), pl.LoReFT(block, r=3)
    shake(strict, 0.3)
    h = torch.randn(5, 32)
    with torch.no_grad():
        for theirs, value in ((loose.W2, strict.rotation()), (loose.W1, strict.W), (loose.b, strict.b)):
            theirs.copy_(value)
        torch.testing.assert_close(loose.edit(h), strict.edit(h), rtol=1e-5, atol=1e-5)
        loose.W2 *= 1.5
        assert (loose.edit(h) - strict.edit(h)).abs().max() > 0.1, "and it is free to leave them"


def test_noreft_goes_towards_what_it_has_learned_but_not_all_the_way():
    """W₂·Φ(h) = W₂·h + G·(W₁·h + b − W₂·h), G = W₂·W₂ᵀ; LoReFT's G is 1."""
    adapter = pl.NoReFT(build("llama").model.layers[0], r=3)
    assert torch.equal(adapter.W1, adapter.W2) and not adapter.b.any()
    shake(adapter, 0.3)
    h, W1, W2, b = torch.randn(5, 32), adapter.W1, adapter.W2, adapter.b
    with torch.no_grad():
        after = (h + adapter.edit(h)) @ W2.T
        want = h @ W2.T + (h @ W1.T + b - h @ W2.T) @ (W2 @ W2.T)
        torch.testing.assert_close(after, want, rtol=1e-4, atol=1e-4)
        assert (after - (h @ W1.T + b)).abs().max() > 0.1


def test_noreft_has_the_published_share_of_loreft():
    """Table 1 of arXiv:2404.03592: r = 8 in all blocks of LLaMA-7B, 0.031 %; neither constraint changes a count."""
    counted = pl.count("llama-7b", pl.NoReFT, r=8)
    assert round(100 * counted.trainable / (counted.total - counted.trainable), 3) == 0.031
    assert counted.trainable == pl.count("llama-7b", pl.LoReFT, r=8).trainable == 32 * (2 * 8 * 4096 + 8)


@pytest.mark.parametrize("method", [pl.LoReFT, pl.NoReFT, pl.DiReFT])
@pytest.mark.parametrize(("hyper", "words"), [
    (dict(r=33), "rank r=33 is not in 1…32"),
    (dict(first=0), "choose at least one position"),
    (dict(last=2), "cannot tell where the prompt ends"),
])  # fmt: skip
def test_the_three_reft_refuse_alike(method, hyper, words):
    with pytest.raises(ValueError, match=words):
        pl.attach(model := build("llama"), method, **hyper)
    assert not pl.hosts(model)


# ------------------------------------------------------------------------------------------------- Bapna and Firat


def test_bapna_and_firats_norm_makes_the_change_independent_of_the_size_of_h():
    """The reason that the paper gives for the norm: it fits wherever it is put, whatever the states' distribution."""
    block = build("llama").model.layers[0]
    normed, plain = pl.BapnaFirat(block, bottleneck=4), pl.AdapterPlus(block, bottleneck=4)
    for adapter in (normed, plain):
        shake(adapter, 0.3)
    h = torch.randn(5, 32)
    with torch.no_grad():
        torch.testing.assert_close(normed.delta(30 * h + 7), normed.delta(h), rtol=1e-3, atol=1e-3)  # the norm's ε
        assert (plain.delta(30 * h + 7) - plain.delta(h)).abs().max() > 1


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_bapna_and_firats_adapter_reads_what_the_whole_block_gives(family):
    model = attached(family, pl.BapnaFirat, bottleneck=4, activation="gelu")
    assert len(pl.hosts(model)) == (4 if family == "t5" else 2)
    seen: dict = {}
    for host in pl.hosts(model).values():
        host.layer.register_forward_hook(lambda m, args, out, host=host: seen.update({host: [out]}))
        host.register_forward_hook(lambda m, args, out, host=host: seen[host].append(out))
    logits(model, family)
    for host, outs in seen.items():
        h, y = (out[0] if isinstance(out, tuple) else out for out in outs)
        a = host.adapters["a"]
        z = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        z = z * a.norm.weight + a.norm.bias
        bent = nn.functional.gelu(z @ a.down.weight.T + a.down.bias)
        torch.testing.assert_close(y, h + bent @ a.up.weight.T + a.up.bias, rtol=1e-4, atol=1e-4)


def test_bapna_and_firats_count_is_pfeiffers_and_a_norm():
    more = {}
    for method in (pl.Pfeiffer, pl.BapnaFirat):
        counted = pl.count("llama-7b", method, bottleneck=64)
        assert counted.trainable == counted.expected["default"]
        more[method] = counted.trainable
    assert more[pl.BapnaFirat] - more[pl.Pfeiffer] == 32 * 2 * 4096


@pytest.mark.parametrize(("hyper", "words"), [
    (dict(bottleneck=33), "bottleneck=33 .*1…32"),
    (dict(activation="bend"), "'bend' is unknown"),
    (dict(targets="input_layernorm"), "holds no linear layer"),
])  # fmt: skip
def test_bapna_and_firats_adapter_refuses(hyper, words):
    with pytest.raises(ValueError, match=words):
        pl.attach(model := build("llama"), pl.BapnaFirat, **hyper)
    assert not pl.hosts(model)


# ----------------------------------------------------------------------------------------------------- side-tuning


def truncated(family):
    """The model with its first block alone: what an untrained side network computes."""
    model = build(family)
    body = getattr(model, model.base_model_prefix)
    body = getattr(body, "decoder", body)
    name = "h" if hasattr(body, "h") else "layers"
    setattr(body, name, getattr(body, name)[:1])
    body.config.num_hidden_layers = 1
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_side_tuning_blends_the_base_with_its_own_beginning(family):
    """Logits are linear in what is blended: α of the base's, 1 − α of those that its first block alone gives."""
    base, first = logits(build(family), family), logits(truncated(family), family)
    assert (base - first).abs().max() > 0.5
    for alpha in (0.5, 0.9):
        model = pl.attach(build(family), pl.SideTuning, alpha=alpha)
        want = alpha * base + (1 - alpha) * first
        torch.testing.assert_close(logits(model, family), want, rtol=1e-4, atol=1e-4)


def test_side_tuning_begins_with_the_weights_that_a_packed_base_stands_for():
    packed = pl.quantize(build("llama"))
    block = packed.model.layers[0]
    side = pl.adapters(pl.attach(packed, pl.SideTuning))["default"]["model"].side
    assert torch.equal(side.layers[0].mlp.up_proj.weight, weight_of(block.mlp.up_proj).float())
    assert torch.equal(side.norm.weight, packed.model.layer.norm.weight)


def test_side_tuning_does_not_forget():
    """Whatever S has become: α = 1 is the base, and without the adapter it is the base bit for bit."""
    model = attached("llama", pl.SideTuning, scale=2.0)
    bare, adapter = logits(build("llama")), pl.adapters(model)["a"]["model"]
    assert (logits(model) - bare).abs().max() > 1
    with torch.no_grad():
        adapter.a.fill_(math.inf)
    assert torch.equal(logits(model), bare)


def test_side_tuning_keeps_nothing_of_the_base_for_backward_and_learns():
    def kept(model) -> int:
        sizes, stored = {}, {p.data_ptr() for p in model.parameters()}

        def note(tensor):
            if tensor.data_ptr() not in stored:
                sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model.model(**inputs("llama"))
        return sum(sizes.values())

    used = []
    for blocks in (2, 6):  # of the base
        from transformers import LlamaForCausalLM

        config = build("llama").config
        config.num_hidden_layers = blocks
        torch.manual_seed(0)
        model = pl.attach(LlamaForCausalLM(config), pl.SideTuning)
        used.append(kept(model))
    assert used[0] == used[1] > 0
    ids = inputs("llama", rows=4, seed=3)["input_ids"].tolist()
    log = pl.train(model, [{"input_ids": r, "labels": r} for r in ids], steps=15, batch_size=4, lr=1e-2, progress=False)
    assert log.losses[-1] < 0.7 * log.losses[0]


def test_side_tunings_count_on_llama_is_one_block_a_norm_and_one():
    D, F, kv = 32, 64, 16
    block = 2 * D * D + 2 * D * kv + 3 * D * F + 2 * D
    for layers in (1, 2):
        counted = pl.count(pl.attach(build("llama"), pl.SideTuning, layers=layers))
        assert counted.trainable == counted.expected["default"] == layers * block + D + 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_side_network_writes_the_same_with_and_without_a_cache_and_with_beams(family):
    model = attached(family, pl.SideTuning, scale=0.1, layers=2, alpha=0.3)
    ids = inputs(family)["input_ids"]
    for more in ({}, dict(num_beams=2)):
        assert torch.equal(writes(model, ids, **more), writes(model, ids, use_cache=False, **more))


@pytest.mark.parametrize(("method", "hyper"), [("SideTuning", {}), ("Shadow", dict(r=4))])
def test_two_side_networks_cannot_share_one_room_of_the_cache(method, hyper):
    model = build("llama")
    for name in "ab":
        pl.attach(model, method, name=name, **hyper)
    ids = inputs("llama")["input_ids"]
    with pl.using(model, "a", "b"):
        assert writes(model, ids, use_cache=False).shape == (3, 14)
        with pytest.raises(ValueError, match="two side networks .* one at a time"):
            writes(model, ids)


@pytest.mark.parametrize(("family", "targets", "hyper", "words"), [
    ("llama", None, dict(alpha=1.0), "α is between 0 and 1"),
    ("llama", None, dict(layers=3), "S has 1…2 blocks"),
    ("llama", "q_proj", {}, "is not 'model': S stands beside the whole model"),
    ("bert", None, {}, "no decoder-only model"),
])  # fmt: skip
def test_side_tuning_refuses(family, targets, hyper, words):
    with pytest.raises(ValueError, match=words):
        pl.attach(model := build(family), pl.SideTuning, targets, **hyper)
    assert not pl.hosts(model)


# ----------------------------------------------------------------------------------------------------------- DVoRA


def test_dvora_is_dora_with_veras_matrices():
    layer = nn.Linear(12, 20)
    ours, dora, vera = pl.DVoRA(layer, r=8, seed=5), pl.DoRA(layer, r=8, alpha=8), pl.VeRA(layer, r=8, seed=5)
    shake(ours, 0.4)
    A, B = vera.pair()
    with torch.no_grad():
        dora.lora_A.copy_(ours.vera.vera_lambda_d[:, None] * A)
        dora.lora_B.copy_(ours.vera.vera_lambda_b[:, None] * B)
        dora.m.copy_(ours.m)
    x, g = torch.randn(5, 12), torch.randn(5, 20)
    torch.testing.assert_close(ours(layer, x), dora(layer, x), rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad((g * ours(layer, x)).sum(), (ours.m, ours.vera.vera_lambda_b, ours.vera.vera_lambda_d))
    m, dB, dA = torch.autograd.grad((g * dora(layer, x)).sum(), (dora.m, dora.lora_B, dora.lora_A))
    for got, want in zip(grads, (m, (dB * B).sum(1), (dA * A).sum(1)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    merged = ours.fold(copy.deepcopy(layer).double())
    torch.testing.assert_close(merged.weight.norm(dim=1).float(), ours.m.detach().abs(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("family", "targets"), [("gpt2", "c_attn|c_fc"), ("bert", "query|intermediate.dense")])
def test_dvora_starts_at_the_base_and_merges_into_weights_of_any_kind(family, targets):
    bare = logits(build(family), family)
    model = pl.attach(build(family), pl.DVoRA, targets, name="a", r=8)
    assert torch.equal(logits(model, family), bare)
    for adapter in pl.adapters(model)["a"].values():
        shake(adapter, 0.3)
    want = logits(model, family)
    assert (want - bare).abs().max() > 0.05
    torch.testing.assert_close(logits(pl.merge(model), family), want, rtol=1e-5, atol=2e-5)


def test_dvoras_layers_share_one_pair_that_is_not_in_the_file(tmp_path):
    model = attached("llama", pl.DVoRA, "q_proj|down_proj", r=8)
    found = [a.vera for a in pl.adapters(model)["a"].values()]
    assert len({id(vera.shared) for vera in found}) == 1 and found[0].pair()[0].shape == (8, 32)
    pl.save_adapter(model, tmp_path, "a")
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) == pl.count(model).trainable == 4 * (2 * 32 + 8)


def test_dvora_has_the_published_share_of_llama_7b():
    """Liu et al. 2024, the table of MT-Bench scores: VeRA trains 0.02 % of LLaMA-7B, DVoRA 0.04 %; r = 1024 in VeRA's
    own experiment with it."""
    for method, printed in ((pl.VeRA, 0.02), (pl.DVoRA, 0.04)):
        counted = pl.count("llama-7b", method, r=1024)
        assert round(counted.percent, 2) == printed and counted.trainable == counted.expected["default"]


def test_dvora_refuses_a_rank_of_nothing_and_layers_that_disagree():
    with pytest.raises(ValueError, match="r=0"):
        pl.attach(build("llama"), pl.DVoRA, r=0)
    with pytest.raises(ValueError, match="r must be one for all layers"):
        pl.attach(build("llama"), pl.DVoRA, "q_proj", r=8, rank_pattern={r"layers\.1\..*": 4})


# ----------------------------------------------------------------------------------------------------- AdapterDrop

SITES = "q_proj|down_proj"


def calls(model) -> dict[str, int]:
    """path -> how often its adapter is computed from now on."""
    counted: dict[str, int] = {}

    def note(path):
        return lambda *_: counted.update({path: counted.get(path, 0) + 1})

    for path, adapter in pl.adapters(model)["a"].items():
        adapter.register_forward_pre_hook(note(path))
    return counted


@pytest.fixture
def deep():
    """A Llama of four blocks with trained adapters in each."""
    from transformers import LlamaForCausalLM

    config = build("llama").config
    config.num_hidden_layers = 4
    torch.manual_seed(0)
    model = pl.attach(LlamaForCausalLM(config).eval(), pl.Houlsby, name="a", bottleneck=4)
    for adapter in pl.adapters(model)["a"].values():
        shake(adapter, 0.3)
    return model


def states(model):
    with torch.no_grad():
        return model(**inputs("llama"), output_hidden_states=True).hidden_states


@pytest.mark.parametrize("n", range(5))
def test_the_first_blocks_adapters_are_not_computed_and_the_others_are(deep, n):
    with pl.using(deep):
        bare = states(deep)
    whole, counted = states(deep), calls(deep)
    with pl.adapter_drop(deep, first=n):
        dropped = states(deep)
    assert set(counted) == {path for path in pl.adapters(deep)["a"] if int(path.split(".")[2]) >= n}
    assert set(counted.values()) <= {1} and len(counted) == 2 * (4 - n), "two sites a block, once each"
    assert all(torch.equal(dropped[i], bare[i]) for i in range(n)), "up to there every task gives the same"
    assert torch.equal(dropped[-1], whole[-1]) == (n == 0) and torch.equal(dropped[-1], bare[-1]) == (n == 4)
    assert torch.equal(states(deep)[-1], whole[-1]), "outside all is as it was"


def test_dropping_is_attaching_to_the_upper_blocks_alone(deep):
    upper = pl.attach(copy.deepcopy(deep), pl.Houlsby, r"layers\.[23]\..*(o_proj|down_proj)", name="b", bottleneck=4)
    for path, adapter in pl.adapters(upper)["b"].items():
        adapter.load_state_dict(pl.adapters(deep)["a"][path].state_dict())
    pl.activate(upper, "b")
    with pl.adapter_drop(deep, first=2):
        assert torch.equal(logits(deep), logits(upper))


def test_backward_ends_at_the_first_block_that_has_adapters(deep):
    needs = []
    for layer in deep.model.layers:
        layer.register_forward_pre_hook(lambda m, args: needs.append(args[0].requires_grad))
    batch = inputs("llama")
    with pl.adapter_drop(deep, first=2):
        deep(**batch, labels=labels("llama", batch)).loss.backward()
    assert needs == [False, False, False, True]
    for path, adapter in pl.adapters(deep)["a"].items():
        assert all((p.grad is not None) == (int(path.split(".")[2]) >= 2) for p in adapter.parameters())


def test_it_holds_for_mixed_batches_and_for_what_is_merged_and_for_copies():
    model = build("llama")
    for seed, name in enumerate("ab"):
        pl.attach(model, pl.LoRA, SITES, name=name, r=4)
        for adapter in pl.adapters(model)[name].values():
            shake(adapter, 0.3, seed=seed)
    alone = {}
    for name in "ab":
        with pl.using(model, name), pl.adapter_drop(model, first=1):
            alone[name] = logits(model)
            for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert torch.equal(logits(twin), alone[name])
    with pl.using(model, rows=["a", "b", None]) as mixed, pl.adapter_drop(model, first=1):
        got = logits(mixed)
    for i, name in enumerate("ab"):
        torch.testing.assert_close(got[i], alone[name][i], rtol=1e-5, atol=1e-5)
    with pl.using(model):
        torch.testing.assert_close(got[2], logits(model)[2], rtol=1e-5, atol=1e-5)
    pl.activate(model, "a")
    with pl.adapter_drop(pl.merge(model), first=1):
        torch.testing.assert_close(logits(model), alone["a"], rtol=1e-5, atol=2e-5)


def test_both_stacks_of_an_encoder_decoder_lose_their_first_blocks():
    model = attached("t5", pl.LoRA, "q|wi", r=2)
    counted = calls(model)
    with pl.adapter_drop(model, first=1):
        logits(model, "t5")
    assert counted and all(".block.1." in path for path in counted)
    assert {path.split(".")[0] for path in counted} == {"encoder", "decoder"}


def test_counts_and_files_know_nothing_of_it(deep, tmp_path):
    counted, want = pl.count(deep), logits(deep)
    with pl.adapter_drop(deep, first=3):
        assert pl.count(deep).expected == counted.expected
        pl.save_adapter(deep, tmp_path, "a")
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    again = pl.load_adapter(LlamaForCausalLM(deep.config).eval(), tmp_path, name="a")
    assert torch.equal(logits(again), want)


def test_robust_training_draws_how_many_at_each_pass_and_evaluation_drops_none(deep):
    """The paper: n is drawn from 0 to L − 1 for each batch, all alike."""
    counted, want, drawn = calls(deep), logits(deep), []
    with pl.adapter_drop(deep):
        torch.manual_seed(0)
        for _ in range(200):
            counted.clear()
            with torch.no_grad():
                deep.train()(input_ids=inputs("llama", rows=1, length=2)["input_ids"])
            drawn.append(4 - len(counted) // 2)
        assert torch.equal(logits(deep.eval()), want)
    shares = [drawn.count(n) / 200 for n in range(4)]
    assert sum(shares) == 1 and all(abs(share - 0.25) < 0.1 for share in shares)  # deviation 0.03
    counted.clear()
    assert torch.equal(logits(deep.train()), want) and len(counted) == 8, "the hook is gone"


def test_a_robust_run_trains_all_blocks_is_repeatable_and_ends_as_it_began(deep):
    rows = [{"input_ids": r, "labels": r} for r in inputs("llama", rows=4, seed=3)["input_ids"].tolist()]
    losses, before = [], {n: p.clone() for n, p in deep.named_parameters()}
    for _ in range(2):
        model = copy.deepcopy(deep)
        with pl.adapter_drop(model):
            losses.append(pl.train(model, rows, steps=8, batch_size=2, lr=1e-2, progress=False).losses)
    assert losses[0] == losses[1] != pl.train(copy.deepcopy(deep), rows, steps=8, batch_size=2, lr=1e-2,
                                              progress=False).losses  # fmt: skip
    moved = {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[n])}
    assert moved == set("0123") and not any("forward" in vars(host) for host in pl.hosts(model).values())


def test_gradient_checkpointing_computes_again_without_the_dropped_ones(deep):
    batch, grads = inputs("llama"), []
    for checkpointing in (False, True):
        model = copy.deepcopy(deep).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with pl.adapter_drop(model):
            torch.manual_seed(3)
            model(**batch, labels=labels("llama", batch)).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) < len(list(pl.adapters(deep)["a"])) * 4
    for name, gradient in grads[0].items():
        torch.testing.assert_close(gradient, grads[1][name], rtol=1e-5, atol=1e-6)


def test_drops_nest_and_end_after_an_error(deep):
    whole = logits(deep)
    with pl.adapter_drop(deep, first=1):
        one = logits(deep)
        with pytest.raises(RuntimeError), pl.adapter_drop(deep, first=3):
            assert not torch.equal(logits(deep), one)
            raise RuntimeError
        assert torch.equal(logits(deep), one) and not torch.equal(one, whole)
    assert torch.equal(logits(deep), whole)


def test_what_cannot_be_dropped_is_refused(deep):
    for n in (-1, 5):
        with pytest.raises(ValueError, match=f"first={n} .* has 4; 0…4 can"), pl.adapter_drop(deep, first=n):
            pass
    for model in (build("llama"), pl.attach(build("llama"), pl.PromptTuning, k=2)):
        with pytest.raises(ValueError, match="no block of this LlamaForCausalLM has adapters"), pl.adapter_drop(model):
            pass
    ladder = pl.attach(build("llama"), pl.LadderSide, bottleneck=4)
    with pytest.raises(ValueError, match="'default' is LadderSide, whose part on 'model'"), pl.adapter_drop(ladder, 1):
        pass
    with pytest.raises(ValueError, match="has no list of blocks"), pl.adapter_drop(nn.Sequential(nn.Linear(2, 2)), 1):
        pass

"""Blocks that come several times: what the deeper model computes, what it costs, and its adapters' files."""

from __future__ import annotations

import copy
import json
import math

import peft
import pytest
import torch
from families import TARGETS, build, inputs, labels, shake
from parity import CLOSE, logits
from peft.tuners.tuners_utils import replicate_layers as theirs_replicates

import peftlab as pl
from peftlab.replicate import replication

RANGES, ORDER = [(0, 2), (1, 2), (0, 1)], [0, 1, 1, 0]
FIT = ("llama", "mistral", "bert")  # those of our families that the reference repeats: see the test below
FOLDED = dict(rtol=0, atol=1e-4)  # as tests/test_merge.py: float32 weights, rounded once more


def deeper(family="llama", ranges=RANGES):
    return pl.replicate_layers(build(family), ranges)


def blocks(model):
    (found,) = (m for m in model.modules() if hasattr(m, "replicated"))
    return found


def adapted(family="llama", method="LoRA", **hyper):
    model = pl.attach(deeper(family), method, TARGETS[family], name="a", **{"r": 4, **hyper})
    for seed, host in enumerate(pl.hosts(model).values()):
        shake(host.adapters, 0.2, seed=seed)
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt2", "opt", "bert", "smollm3"])
def test_it_is_the_deeper_model_that_its_config_builds(family):
    model = deeper(family)
    assert model.config.num_hidden_layers == 4
    apart = type(model)(copy.deepcopy(model.config)).eval()  # with weights of its own for each block
    apart.load_state_dict(model.state_dict())
    assert torch.equal(logits(model, family), logits(apart, family))
    assert (logits(model, family) - logits(build(family), family)).abs().max() > 1e-2
    total = sum(p.numel() for p in apart.parameters())
    assert pl.count(model).total == sum(p.numel() for p in build(family).parameters()) < total


def test_weights_are_shared_and_modules_are_not():
    base = build("llama")
    came = list(base.model.layers)
    model = pl.replicate_layers(base, RANGES)
    assert model is base and len(model.model.layers) == 4
    assert len({id(m) for block in model.model.layers for m in block.modules()}) == 4 * len(list(came[0].modules()))
    for n, i in enumerate(ORDER):
        for name, p in came[i].named_parameters():
            assert model.model.layers[n].get_parameter(name) is p
        assert model.model.layers[n].self_attn.layer_idx == n
        assert model.model.layers[n].self_attn.config is model.config
    assert [block.self_attn.layer_idx for block in came] == [0, 1]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_each_appearance_has_its_place_in_the_cache(family):
    model, ids = deeper(family), inputs(family)["input_ids"]
    made = [model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*made)
    cache = model(ids, use_cache=True).past_key_values
    assert len(cache) == 4 and all(cache.get_seq_length(n) == ids.shape[1] for n in range(4))


def test_each_appearance_learns_apart():
    model = pl.attach(deeper(), "LoRA", "q_proj", r=4)
    assert pl.count(model).trainable == 4 * 4 * (32 + 32)
    rows = [{"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9]}] * 2
    before = [p.clone() for p in blocks(model).parameters() if not p.requires_grad]
    pl.train(model, rows, steps=3, lr=1e-2, batch_size=2)
    learnt = [host.adapters["default"].lora_B for host in pl.hosts(model).values()]
    assert len(learnt) == 4 and not torch.equal(learnt[1], learnt[2]) and not torch.equal(learnt[0], learnt[3])
    frozen = [p for p in blocks(model).parameters() if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(before, frozen, strict=True))


def test_twice_is_once_with_the_ranges_of_both():
    twice = pl.replicate_layers(deeper(ranges=[(0, 2), (0, 2)]), [(1, 4), (0, 1)])
    assert replication(twice) == [[1, 2], [0, 2], [0, 1]]
    assert torch.equal(logits(twice, "llama"), logits(deeper(ranges=[(1, 2), (0, 2), (0, 1)]), "llama"))
    assert replication(deeper(ranges=[(0, 1), (1, 2), (1, 2)])) == [[0, 2], [1, 2]]
    assert replication(build("llama")) == []
    assert replication(copy.deepcopy(twice)) == replication(twice)


@pytest.mark.reference("layer replication", "outputs")
@pytest.mark.parametrize("family", FIT)
def test_the_reference_builds_the_same(family):
    theirs = build(family)
    theirs_replicates(theirs, RANGES)
    torch.testing.assert_close(logits(deeper(family), family), logits(theirs, family), rtol=0, atol=0)


@pytest.mark.reference("layer replication", "writes")
@pytest.mark.parametrize("family", FIT)
def test_the_reference_reads_our_file(family, tmp_path):
    model = adapted(family)
    pl.save_adapter(model, tmp_path, name="a")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["layer_replication"] == [[0, 2], [1, 2], [0, 1]]
    theirs = peft.PeftModel.from_pretrained(build(family), tmp_path).eval()
    torch.testing.assert_close(logits(theirs, family), logits(model, family), **CLOSE)


@pytest.mark.reference("layer replication", "reads", "gradients")
@pytest.mark.parametrize("family", FIT)
def test_we_read_the_references_file(family, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=TARGETS[family].split("|"), init_lora_weights=False,
                             layer_replication=[list(r) for r in RANGES])  # fmt: skip
    theirs = peft.get_peft_model(build(family), config).eval()
    theirs.save_pretrained(tmp_path)
    model = pl.load_adapter(build(family), tmp_path, name="a")  # the model as it came
    torch.testing.assert_close(logits(model, family), logits(theirs, family), **CLOSE)
    trained = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == pl.count(model).trainable
    for one in (theirs, model):
        batch = inputs(family)
        one(**batch, labels=labels(family, batch)).loss.backward()
    for path, adapter in pl.adapters(model)["a"].items():
        for name, p in adapter.named_parameters():
            want = trained[f"base_model.model.{path}.{adapter.hf_params[name].replace('.weight', '.default.weight')}"]
            torch.testing.assert_close(p.grad, want.grad, rtol=1e-4, atol=1e-6)
    again = pl.load_adapter(deeper(family), tmp_path)  # repeated already
    assert torch.equal(logits(again, family), logits(model, family))


def test_the_reference_leaves_the_layers_types_short():
    theirs = build("qwen2")
    theirs_replicates(theirs, RANGES)
    assert len(theirs.config.layer_types) == 2 and theirs.config.num_hidden_layers == 4
    with pytest.raises(IndexError):
        logits(theirs, "qwen2")


def test_the_reference_merges_all_appearances_into_one_weight():
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], layer_replication=[list(r) for r in RANGES],
                             init_lora_weights=False)  # fmt: skip
    theirs = peft.get_peft_model(build("llama"), config).eval()
    before = logits(theirs, "llama")
    assert (logits(theirs.merge_and_unload(), "llama") - before).abs().max() > 0.5


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_untied_it_merges_and_is_an_ordinary_model(family, tmp_path):
    from transformers import AutoModelForCausalLM

    model = adapted(family)
    want = logits(model, family)
    with pytest.raises(ValueError, match="untie"):
        pl.merge(model)
    with pytest.raises(ValueError, match="untie_layers"):
        pl.export.to_transformers(model, tmp_path / "x")
    assert pl.untie_layers(model) is model
    kept = {n: p.data_ptr() for n, p in model.named_parameters(remove_duplicate=False) if "adapters" not in n}
    assert len(set(kept.values())) == len(kept)
    assert torch.equal(logits(model, family), want)
    pl.export.to_transformers(model, tmp_path / "x")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "x").eval()
    torch.testing.assert_close(logits(exported, family), want, **FOLDED)
    torch.testing.assert_close(logits(pl.merge(model), family), want, **FOLDED)
    pl.save_adapter(pl.unmerge(model), tmp_path / "a", name="a")
    torch.testing.assert_close(logits(pl.load_adapter(build(family), tmp_path / "a"), family), want, rtol=0, atol=0)


def test_four_bits_are_shared_too():
    model = pl.quantize(build("llama"))
    bytes_ = pl.count(model).bytes
    pl.replicate_layers(model, RANGES)
    assert pl.count(model).bytes == bytes_ and torch.isfinite(logits(model, "llama")).all()
    codes = [dict(block.self_attn.q_proj.named_buffers()) for block in model.model.layers]
    assert codes[1] and all(codes[1][n].data_ptr() == codes[2][n].data_ptr() for n in codes[1])


@pytest.mark.parametrize("method", ["VeRA", "PrefixTuning", "LoReFT"])
def test_any_method_and_its_file(method, tmp_path):
    hyper = {"PrefixTuning": {"k": 2}}.get(method, {"r": 4})
    model = pl.attach(deeper(), method, name="a", **hyper)
    for seed, host in enumerate(pl.hosts(model).values()):
        shake(host.adapters, 0.2, seed=seed)
    pl.save_adapter(model, tmp_path, name="a")
    fresh = pl.load_adapter(build("llama"), tmp_path)
    torch.testing.assert_close(logits(fresh, "llama"), logits(model, "llama"), **CLOSE)


@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        ([(0, 3)], "beyond the blocks of LlamaForCausalLM, which are 0 to 1"),
        ([(-1, 1)], "beyond the blocks"),
        ([], "name no block"),
        ([(0, 2), (1, 1)], r"\(1, 1\) is empty"),
        ([(2, 0)], r"\(2, 0\) is empty"),
        ([0, 1], "are no pairs"),
    ],
)
def test_wrong_ranges_change_nothing(ranges, said):
    model = build("llama")
    before, layers = logits(model, "llama"), list(model.model.layers)
    with pytest.raises(ValueError, match=said):
        pl.replicate_layers(model, ranges)
    assert list(model.model.layers) == layers and model.config.num_hidden_layers == 2
    assert torch.equal(logits(model, "llama"), before)


def test_models_that_do_not_fit():
    with pytest.raises(ValueError, match="2 lists of equal blocks"):
        pl.replicate_layers(build("t5"), [(0, 2)])
    with pytest.raises(ValueError, match="Linear has 0 lists"):
        pl.replicate_layers(torch.nn.Linear(2, 2), [(0, 1)])
    with pytest.raises(ValueError, match="attached to this model's blocks already"):
        pl.replicate_layers(pl.attach(build("llama"), "LoRA", "q_proj"), RANGES)


def test_a_file_of_other_blocks_is_refused(tmp_path):
    pl.save_adapter(adapted(), tmp_path / "deep", name="a")
    flat = pl.attach(build("llama"), "LoRA", "q_proj", name="a", r=4)
    pl.save_adapter(flat, tmp_path / "flat", name="a")
    with pytest.raises(ValueError, match=r"has the blocks \[\[0, 2\].*with adapters on them"):
        pl.load_adapter(flat, tmp_path / "deep", name="b")
    with pytest.raises(ValueError, match=r"as they came, and this one has them \[\[0, 2\]"):
        pl.load_adapter(deeper(), tmp_path / "flat")
    with pytest.raises(ValueError, match="has the blocks"):
        pl.load_adapter(deeper(ranges=[(0, 2), (0, 2)]), tmp_path / "deep")


def test_a_load_that_fails_leaves_the_blocks_as_they_came(tmp_path):
    pl.save_adapter(adapted(), tmp_path, name="a")
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 5'))
    model = build("llama")
    layers, before = list(model.model.layers), logits(model, "llama")
    with pytest.raises(ValueError, match="this model needs"):
        pl.load_adapter(model, tmp_path)
    assert list(model.model.layers) == layers and replication(model) == []
    assert model.config.num_hidden_layers == 2 and torch.equal(logits(model, "llama"), before)
    assert all(p.requires_grad for p in model.parameters())
    config.write_text(config.read_text().replace('"layer_replication": [', '"layer_replication": [7, '))
    with pytest.raises(ValueError, match="are no pairs"):
        pl.load_adapter(model, tmp_path)


@pytest.mark.parametrize("ranges", [[(0, 2.9)], [(0, math.inf)], [(0, 10**9)], [(0, True)], [(-1, 2)], [3], "ab"])
def test_what_are_no_ranges_is_refused_at_once(ranges):
    model = build("llama")
    with pytest.raises(ValueError, match="ranges="):
        pl.replicate_layers(model, ranges)
    assert not pl.replicate.replication(model)


def test_a_config_that_refuses_leaves_the_model_as_it_was():
    model = build("llama")
    blocks, depth = model.model.layers, model.config.num_hidden_layers

    class Strict(type(model.config)):
        def __setattr__(self, name, value):
            if name == "num_hidden_layers" and value != depth:
                raise RuntimeError("no other depth")
            super().__setattr__(name, value)

    model.model.config.__class__ = Strict
    with pytest.raises(RuntimeError, match="no other depth"):
        pl.replicate_layers(model, [(0, 2), (0, 2)])
    assert model.model.layers is blocks and model.config.num_hidden_layers == depth


def test_looking_for_repeated_blocks_does_not_walk_the_adapters(monkeypatch):
    """It is done at each load and save: with hundreds of adapters a walk over their modules took most of the time."""
    model = pl.replicate_layers(build("llama"), [(0, 2), (0, 2)])
    pl.attach(model, "LoRA", r=2)
    monkeypatch.setattr(type(model), "modules", None)
    assert pl.replicate.replication(model) == [[0, 2], [0, 2]]

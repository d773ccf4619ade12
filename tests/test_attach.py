"""Attaching, choosing, refusing: every refusal names the object and the cure, and leaves the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, build, inputs, labels, shake
from torch import nn

import peftlab as pl


def fingerprint(model: nn.Module):
    return ([(n, type(m).__name__) for n, m in model.named_modules()],
            [(n, p.requires_grad, p.data_ptr()) for n, p in model.named_parameters()])  # fmt: skip


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("q_prj", "'q_prj'; did you mean 'q_proj'"),
        (["q_proj", "v_prj"], "'v_prj'; did you mean 'v_proj'.*match 2 modules; nothing was attached"),
        ("q_proj|x_proj", "'x_proj'.*match 2 modules"),
        ("zzz", "Linear layers of LlamaForCausalLM: down_proj, gate_proj"),
        ("q_proj(", "not a regular expression"),
        ([], "nothing to attach|empty"),
        ("embed_tokens", "needs a linear layer.*not Embedding"),
        ("input_layernorm", "needs a linear layer.*LlamaRMSNorm"),
    ],
)
def test_wrong_targets(targets, said):
    model = build("llama")
    before = fingerprint(model)
    with pytest.raises(ValueError, match=f"(?s){said}"):
        pl.attach(model, pl.LoRA, targets)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("hyper", "error", "said"),
    [
        (dict(r=0), ValueError, "rank r=0"),
        (dict(r=-1), ValueError, "LoRA: r=-1 must be at least 0"),
        (dict(r=33), ValueError, r"'model.layers.0.self_attn.q_proj': rank r=33 is not in 1…32"),
        (dict(rank=4), TypeError, "no hyper-parameter 'rank'.*It takes: r, alpha"),
        (dict(dropout=1.5), ValueError, "dropout"),
        (dict(name="a.b"), ValueError, "adapter name 'a.b'"),
        (dict(name="../up"), ValueError, "adapter name"),
        (dict(name="keys"), ValueError, "adapter name 'keys'"),
        (dict(rank_pattern={"k_proj": 2}), ValueError, "'k_proj' matches none of the 2 target layers"),
        (dict(modules_to_save=["lm_hat"]), ValueError, "did you mean 'lm_head'"),
    ],
)
def test_wrong_settings(hyper, error, said):
    model = build("llama")
    before = fingerprint(model)
    with pytest.raises(error, match=said):
        pl.attach(model, pl.LoRA, "q_proj", **hyper)
    assert fingerprint(model) == before


def test_an_error_in_the_middle_leaves_earlier_adapters_as_they_were():
    """down_proj is 32 × 64, q_proj 32 × 32: rank 32 fits both, and 40 neither; k_proj (16 × 32) refuses rank 20."""
    model = pl.attach(build("llama"), pl.LoRA, "q_proj", name="first")
    before, active = fingerprint(model), next(iter(pl.hosts(model).values())).switch.active
    with pytest.raises(ValueError, match="k_proj"):
        pl.attach(model, pl.LoRA, "q_proj|k_proj", name="second", r=20)
    assert fingerprint(model) == before
    assert next(iter(pl.hosts(model).values())).switch.active == active


def test_the_same_name_twice_and_unknown_names():
    model = pl.attach(build("llama"), pl.LoRA, "q_proj", name="sql")
    with pytest.raises(ValueError, match="'sql' is attached already"):
        pl.attach(model, pl.LoRA, "v_proj", name="sql")
    with pytest.raises(ValueError, match="'sqll'.*did you mean 'sql'"), pl.using(model, "sqll"):
        pass
    for call in (pl.merge, pl.detach, pl.activate, pl.freeze):
        with pytest.raises(ValueError, match="no adapter named 'x'"):
            call(model, "x")
    with pytest.raises(ValueError, match="no adapter is attached"):
        pl.activate(build("llama"))
    with pytest.raises(ValueError, match="unknown method 'lorra'.*did you mean 'LoRA'"):
        pl.attach(model, "lorra", "v_proj", name="b")


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_every_linear_layer_but_the_head(family):
    model = build(family)
    found = pl.find_targets(model, "all-linear")
    head = {"lm_head", "classifier", "score"}
    linear = [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    assert found == [n for n in linear if n.split(".")[0] not in head]
    pl.attach(model, pl.LoRA, r=2)
    batch = inputs(family)
    model.train()
    model(**batch, labels=labels(family, batch)).loss.backward()
    untrained = [p for p, a in pl.adapters(model)["default"].items() if a.lora_B.grad is None]
    assert not untrained, "a layer that never ran would silently stay untrained"


def test_patterns_set_rank_and_alpha_by_layer():
    patterns = dict(rank_pattern={r"layers\.0\.self_attn\.q_proj": 2}, alpha_pattern={"v_proj": 3})
    model = pl.attach(build("llama"), pl.LoRA, "q_proj|v_proj", r=4, alpha=8, **patterns)
    a = {p.removeprefix("model.layers."): x for p, x in pl.adapters(model)["default"].items()}
    assert [len(x.lora_A) for x in a.values()] == [2, 4, 4, 4]
    assert [x.scaling for x in a.values()] == [4, 0.75, 2, 0.75]


def test_multihead_attention_is_refused():
    """nn.MultiheadAttention reads out_proj.weight and never calls it: a host there would do nothing."""
    model = nn.TransformerEncoderLayer(16, 2, 32)
    with pytest.raises(ValueError, match="MultiheadAttention"):
        pl.attach(model, pl.LoRA, "out_proj")
    pl.attach(model, pl.LoRA, "linear1|linear2")


def test_a_tied_head_can_be_adapted_but_neither_copied_nor_merged():
    model = build("llama", tie_word_embeddings=True)
    before = fingerprint(model)
    with pytest.raises(ValueError, match="shares its weight"):
        pl.attach(model, pl.LoRA, "q_proj", modules_to_save=["lm_head"])
    assert fingerprint(model) == before
    pl.attach(model, pl.LoRA, "q_proj|lm_head")
    for host in pl.hosts(model).values():
        shake(host.adapters)
    want = model(**inputs("llama")).logits
    with pytest.raises(ValueError, match="'lm_head' shares its weight"):
        pl.merge(model)
    assert torch.equal(model(**inputs("llama")).logits, want)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_merging_twice_and_attaching_onto_merged():
    model = pl.attach(build("llama"), pl.LoRA, "q_proj", name="a")
    shake(model)
    pl.merge(model)
    with pytest.raises(ValueError, match="a is merged already; unmerge"):
        pl.merge(model)
    with pytest.raises(ValueError, match="unmerge"):
        pl.detach(model, "a")
    merged = model(**inputs("llama")).logits
    pl.attach(model, pl.LoRA, "q_proj", name="b")
    assert torch.equal(model(**inputs("llama")).logits, merged), "a new adapter starts on what is merged"
    pl.unmerge(model)
    torch.testing.assert_close(model(**inputs("llama")).logits, merged, rtol=1e-4, atol=1e-4)


def test_rows_must_fit_the_batch():
    model = pl.attach(build("llama"), pl.LoRA, "q_proj", name="a")
    with pytest.raises(ValueError, match="3 rows.*named for 2"), pl.using(model, rows=["a", None]):
        model(**inputs("llama", rows=3))
    with pytest.raises(ValueError, match="not both"), pl.using(model, "a", rows=["a"]):
        pass
    model(**inputs("llama", rows=3))  # the switch is as it was


def test_a_trained_head_works_in_eval_with_a_mixed_batch_and_is_switched_off():
    base = build("bert")
    model = pl.attach(copy.deepcopy(base), pl.LoRA, "query", name="a", modules_to_save=["classifier"])
    for host in pl.hosts(model).values():
        shake(host.adapters, 0.3)
    batch = inputs("bert")
    with torch.no_grad():
        on, bare = model(**batch).logits, base(**batch).logits
        with pl.using(model, rows=["a", None, "a"]):
            mixed = model(**batch).logits
    assert not torch.allclose(on, bare, atol=1e-2)
    torch.testing.assert_close(mixed, torch.stack([on[0], bare[1], on[2]]), rtol=1e-5, atol=1e-5)


def test_a_model_that_was_trained_in_full_is_frozen_by_attach_and_adapters_never_freeze_each_other():
    model = build("llama")
    assert any(p.requires_grad for p in model.parameters())
    pl.attach(model, pl.LoRA, "q_proj", name="a")
    pl.attach(model, pl.LoRA, "v_proj", name="b")
    assert all(p.requires_grad == (".adapters." in n) for n, p in model.named_parameters())


def test_model_code_that_reads_a_layers_attributes_keeps_working():
    model = pl.attach(build("t5"), pl.LoRA, "wo")  # T5 reads wo.weight.dtype before it calls wo
    host = next(iter(pl.hosts(model).values()))
    assert host.weight is host.layer.weight and host.in_features == host.layer.in_features
    with pytest.raises(AttributeError):
        host.nothing  # noqa: B018


def test_meta_models_can_be_counted():
    with torch.device("meta"):
        model = build("llama")
    pl.attach(model, pl.LoRA, "q_proj", r=4)
    assert all(p.device.type == "meta" for p in model.parameters())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 4 * 64


def test_a_method_that_knows_no_layer_by_name_says_so_in_short():
    from torch import nn

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(ValueError, match="IA3 knows none of .* Sequential by name; name them with targets=") as told:
        pl.attach(model, pl.IA3)
    assert len(str(told.value)) < 200 and not pl.hosts(model)
    pl.attach(model, pl.IA3, targets="0", feedforward=False)
    assert list(pl.hosts(model)) == ["0"]

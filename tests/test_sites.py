"""Groups of sites on every family, and hosts inside of hosts: paths stay those of the model without adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, build, inputs, shake
from torch import nn

import peftlab as pl
from peftlab.core import Adapter
from peftlab.layers import shape_of
from peftlab.sites import GROUPS, bare, group, sites

BLOCKS = 2
# family -> how many sites of each group its tiny model has; None: the model has none and says so
COUNTS = {
    "llama": dict(attention=2, mlp=2, attention_output=2, ffn_output=2, norms=5, biases=None, decoder=1, positions=1),
    "qwen2": dict(attention=2, mlp=2, attention_output=2, ffn_output=2, norms=5, biases=6, decoder=1, positions=1),
    "qwen3": dict(attention=2, mlp=2, attention_output=2, ffn_output=2, norms=9, biases=None, decoder=1, positions=1),
    "mistral": dict(attention=2, mlp=2, attention_output=2, ffn_output=2, norms=5, biases=None, decoder=1, positions=1),
    "gpt2": dict(attention=2, mlp=2, attention_output=2, ffn_output=2, norms=5, biases=13, decoder=1, positions=1),
    "opt": dict(attention=2, mlp=None, attention_output=2, ffn_output=2, norms=5, biases=17, decoder=1, positions=1),
    "bert": dict(attention=2, mlp=None, attention_output=2, ffn_output=2, norms=5, biases=18, decoder=1, positions=1),
    "t5": dict(attention=6, mlp=4, attention_output=6, ffn_output=4, norms=12, biases=None, decoder=2, positions=None),
}
NAMES = dict(attention="all-attention", mlp="all-mlp", attention_output="attention-output", ffn_output="ffn-output",
             norms="all-norms", biases="all-biases", decoder="decoder", positions="positions")  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_groups(family):
    model = build(family)
    for short, expected in COUNTS[family].items():
        if expected is None:
            with pytest.raises(ValueError, match=r"targets="):
                group(model, NAMES[short])
        else:
            assert len(group(model, NAMES[short])) == expected, short
    width = model.config.hidden_size
    outputs = group(model, "sublayer-output")
    assert outputs == [p for p in sites(model) if p in {*group(model, "attention-output"), *group(model, "ffn-output")}]
    assert all(shape_of(bare(sites(model)[p]))[0] == width for p in outputs), "a sublayer gives the model's width"
    assert group(model, "embeddings") and len(group(model, "embeddings")) == 1
    assert set(COUNTS[family]) == set(NAMES) and set(NAMES.values()) < set(GROUPS)


class Louder(Adapter):
    """Multiplies the first output of any module, for these tests only."""

    targets, mixes = "all-attention", False

    def __init__(self, layer):
        super().__init__(layer)
        self.gain = nn.Parameter(torch.full((1,), 1.5))

    def forward(self, f, *args, **kwargs):
        out = f(*args, **kwargs)
        return (out[0] * self.gain, *out[1:]) if isinstance(out, tuple) else out * self.gain


class Watch(Louder):
    """Around the whole decoder: hidden states times a number."""

    targets = "decoder"

    def forward(self, f, *args, **kwargs):
        out = f(*args, **kwargs)
        out.last_hidden_state = out.last_hidden_state * self.gain
        return out


del pl.METHODS["Louder"], pl.METHODS["Watch"]


def logits(model, family="llama"):
    with torch.no_grad():
        return model(**inputs(family)).logits


ORDERS = [("linear", "attention", "decoder"), ("decoder", "attention", "linear"), ("attention", "linear", "decoder")]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "qwen3"])
def test_hosts_inside_of_hosts(family, order):
    """The outputs, paths and files do not depend on the order in which the sites were wrapped."""
    methods = {"linear": pl.LoRA, "attention": Louder, "decoder": Watch}
    base = build(family)
    model = copy.deepcopy(base)
    for name in order:
        torch.manual_seed(3)
        pl.attach(model, methods[name], name=name)
    for adapter in pl.adapters(model)["linear"].values():
        shake(adapter, 0.05)
    plain = {p for p in sites(base)}
    assert set(sites(model)) == plain and set(pl.hosts(model)) <= plain
    pl.activate(model)
    assert torch.equal(logits(model, family), logits(base, family))
    alone = pl.attach(copy.deepcopy(base), pl.LoRA, name="linear")
    for adapter in pl.adapters(alone)["linear"].values():
        shake(adapter, 0.05)
    for path, adapter in pl.adapters(alone)["linear"].items():
        adapter.load_state_dict(pl.adapters(model)["linear"][path].state_dict())
    with pl.using(model, "linear"):
        assert torch.equal(logits(model, family), logits(alone, family))
    with pl.using(model, "linear", "attention"):
        louder = logits(model, family)
        assert not torch.allclose(louder, logits(alone, family), atol=1e-3)
    twin = copy.deepcopy(model)
    with pl.using(twin, "linear", "attention"):
        assert torch.equal(logits(twin, family), louder)
    for name in ("attention", "decoder", "linear"):
        pl.detach(model, name)
    assert [n for n, _ in model.named_modules()] == [n for n, _ in base.named_modules()]
    assert torch.equal(logits(model, family), logits(base, family))


def test_a_lora_inside_of_other_hosts_is_saved_like_any(tmp_path):
    model = build("llama")
    for name, method in (("watch", Watch), ("loud", Louder), ("low", pl.LoRA)):
        pl.attach(model, method, name=name)
    for adapter in pl.adapters(model)["low"].values():
        shake(adapter, 0.05)
    pl.save_adapter(model, tmp_path, "low")
    alone = pl.load_adapter(build("llama"), tmp_path, "low")
    with pl.using(model, "low"):
        assert torch.equal(logits(model), logits(alone))
        pl.merge(model, "low")
    torch.testing.assert_close(logits(model), logits(alone), rtol=1e-5, atol=2e-5)


def test_what_changes_a_whole_module_is_neither_merged_nor_mixed():
    model = pl.attach(build("llama"), pl.LoRA, name="low")
    pl.attach(model, Louder, name="loud")
    want = logits(model)
    with pytest.raises(ValueError, match="no weight can stand for it"):
        pl.merge(model, "loud")
    pl.activate(model, "low", "loud")
    with pytest.raises(ValueError, match="no weight can stand for it"):
        pl.merge(model)
    assert not any(host.merged for host in pl.hosts(model).values())
    with pytest.raises(ValueError, match="mixed batch"), pl.using(model, rows=["loud", "low", None]):
        pass
    pl.activate(model, "loud")
    assert torch.equal(logits(model), want)
    with pl.using(model, rows=["low", None, "low"]):  # its hosts stand aside when others are mixed
        mixed = logits(model)
    with pl.using(model):
        assert torch.equal(mixed[1], logits(model)[1])


def test_an_unknown_group_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="did you mean 'all-attention'"):
        pl.attach(build("llama"), pl.LoRA, targets="all-atention")


def test_a_masked_language_models_head_is_no_site_for_biases():
    """cls.predictions keeps a bias of its own that no layer of a known kind adds."""
    import transformers as t

    config = t.BertConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = t.BertForMaskedLM(config)
    assert not [path for path in group(model, "all-biases") if path.startswith("cls")]
    pl.attach(model, pl.BitFit)
    assert not [path for path in pl.hosts(pl.attach(t.BertForMaskedLM(config), pl.LoRA)) if path.startswith("cls")]

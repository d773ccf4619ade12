"""Groups of sites on every family, and hosts inside of hosts: paths stay those of the model without adapters."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from families import FAMILIES, WIDTH, build, build_other, inputs, shake
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

    config = t.BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = t.BertForMaskedLM(config)
    assert not [path for path in group(model, "all-biases") if path.startswith("cls")]
    pl.attach(model, pl.BitFit)
    assert not [path for path in pl.hosts(pl.attach(t.BertForMaskedLM(config), pl.LoRA)) if path.startswith("cls")]


@pytest.mark.parametrize("family", ["bloom", "distilbert", "electra", "gptj", "modernbert", "mpt", "phi", "roberta"])
def test_the_last_layers_of_sublayers_in_other_families(family):
    """Two blocks, two sublayers each: none is missed without a word, and a classifier's out_proj is none of them."""
    model = build_other(family)
    found = group(model, "sublayer-output")
    assert len(found) == 2 * BLOCKS and not any("classifier" in path for path in found)
    assert all(shape_of(bare(sites(model)[path]))[0] == WIDTH for path in found)


def test_a_model_of_which_only_half_of_the_sublayers_are_known_is_refused():
    """Mixtral's experts are one tensor, no layers: Houlsby behind the attention alone would be another method."""
    model = build_other("mixtral")
    with pytest.raises(ValueError, match="feed-forward network's last"):
        pl.attach(model, pl.Houlsby, reduction=4)
    assert not pl.hosts(model)
    assert len(pl.hosts(pl.attach(model, pl.Houlsby, "attention-output", reduction=4))) == BLOCKS


def test_bloom_has_its_groups_and_positions_that_are_no_module():
    """Its attention's last layer is just called dense, and ALiBi is a bias that each attention is given."""
    model = build_other("bloom")
    attention, mlp = (".self_attention", ".mlp")
    blocks = [f"transformer.h.{i}" for i in range(BLOCKS)]
    assert group(model, "all-attention") == [b + attention for b in blocks]
    assert group(model, "all-mlp") == [b + mlp for b in blocks]
    assert group(model, "attention-output") == [b + attention + ".dense" for b in blocks]
    assert group(model, "ffn-output") == [b + mlp + ".dense_4h_to_h" for b in blocks]
    assert len(group(model, "all-norms")) == 2 * BLOCKS + 2 and len(group(model, "all-biases")) == 6 * BLOCKS + 2
    assert group(model, "decoder") == ["transformer"] and group(model, "embeddings") == ["transformer.word_embeddings"]
    with pytest.raises(ValueError, match="positions"):
        group(model, "positions")


@pytest.mark.parametrize("method", [
    "Houlsby", "Pfeiffer", "ParallelAdapter", "Compacter", "IA3", "PromptTuning", "PTuning", "PrefixTuning", "BitFit",
    "LNTuning", "LoRA", "mam", "unipelt",
])  # fmt: skip
def test_methods_learn_on_bloom_with_no_targets_named(method):
    torch.manual_seed(0)
    model, batch = build_other("bloom"), inputs("bloom")
    if method in ("mam", "unipelt"):
        getattr(pl, method)(model)
    else:
        pl.attach(model, method, **({"bottleneck": 4} if method == "Compacter" else {}))
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(learning, 1e-2), []
    for _ in range(8):
        losses.append(model(**batch, labels=batch["input_ids"]).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05


def test_ia3_sits_on_bloom_where_the_references_default_does(tmp_path):
    theirs = peft.get_peft_model(build_other("bloom"), peft.IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False))
    theirs.save_pretrained(tmp_path)
    model = pl.load_adapter(build_other("bloom"), tmp_path, "theirs")
    torch.testing.assert_close(logits(model), logits(theirs.eval()), rtol=0, atol=1e-5)
    assert (logits(model) - logits(build_other("bloom"))).abs().max() > 0.1
    found = pl.adapters(pl.attach(build_other("bloom"), pl.IA3))["default"]
    assert {p: a.hyper for p, a in found.items()} == {p: a.hyper for p, a in pl.adapters(model)["theirs"].items()}


@pytest.mark.parametrize("outer_first", [True, False])
def test_a_host_around_a_module_that_has_a_layer_itself(outer_first, tmp_path):
    """T5's blocks keep their sublayers under `layer`, the name under which a host keeps what it is around."""
    model, base = build("t5"), build("t5")
    steps = [lambda: pl.attach(model, Louder, r"encoder\.block\.\d", name="loud"),
             lambda: pl.attach(model, pl.LoRA, "q|wi", name="low")]  # fmt: skip
    for step in steps if outer_first else steps[::-1]:
        step()
    assert set(sites(model)) == set(sites(base))
    for adapter in pl.adapters(model)["low"].values():
        shake(adapter, 0.05)
    pl.save_adapter(model, tmp_path, "low")
    alone = pl.load_adapter(build("t5"), tmp_path, "low")
    with pl.using(model, "low"):
        assert torch.equal(logits(model, "t5"), logits(alone, "t5"))
    pl.detach(model)
    assert [n for n, _ in model.named_modules()] == [n for n, _ in base.named_modules()]


def test_a_layer_too_thin_for_the_rank_is_named_with_the_cure():
    """Qwen2-MoE's gate of the shared expert gives out one number."""
    with pytest.raises(ValueError, match=r"shared_expert_gate.*take a smaller r.*rank_pattern"):
        pl.attach(build_other("qwen2_moe"), pl.LoRA)
    model = pl.attach(build_other("qwen2_moe"), pl.LoRA, rank_pattern={"shared_expert_gate": 1})
    logits(model)

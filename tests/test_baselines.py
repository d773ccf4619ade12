"""Full fine-tuning and training the last layers: what is trained, what is not, and what is refused."""

from __future__ import annotations

import re

import pytest
import torch
from families import FAMILIES, build, inputs, labels
from torch import nn

import peftlab as pl

each_family = pytest.mark.parametrize("family", FAMILIES)
# family -> patterns of all that last_layers(model, 1) trains, in a model of two blocks
LAST = {
    "llama": r"model\.(layers\.1\..*|norm\.weight)|lm_head\.weight",
    "qwen2": r"model\.(layers\.1\..*|norm\.weight)|lm_head\.weight",
    "qwen3": r"model\.(layers\.1\..*|norm\.weight)|lm_head\.weight",
    "mistral": r"model\.(layers\.1\..*|norm\.weight)|lm_head\.weight",
    "gpt2": r"transformer\.(h\.1\..*|ln_f\..*)",  # tied heads: GPT-2, OPT, T5
    "opt": r"model\.decoder\.(layers\.1\..*|final_layer_norm\..*)",
    "bert": r"bert\.encoder\.layer\.1\..*|bert\.pooler\..*|classifier\..*",  # BERT has no norm after its blocks
    "t5": r"decoder\.(block\.1\..*|final_layer_norm\.weight)",
}
TIED = {"gpt2": "transformer.wte.weight", "opt": "model.decoder.embed_tokens.weight", "t5": "shared.weight"}


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def after_one_step(model, family) -> set[str]:
    """Names of the parameters that one optimizer step over everything trainable changes."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = inputs(family)
    model(**batch, labels=labels(family, batch)).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    return {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}


@each_family
def test_full_finetuning_trains_every_parameter(family):
    model = build(family).requires_grad_(False)
    assert pl.full_finetuning(model) is model
    everything = {name for name, _ in model.named_parameters()}
    assert trained(model) == everything
    # A bias of the keys moves every score of a query alike, so the softmax gives it no gradient but rounding.
    changed = after_one_step(model, family)
    assert {n for n in everything - changed if not n.endswith(("k_proj.bias", "key.bias"))} == set()


@each_family
def test_last_layers_train_the_last_block_the_final_norm_and_the_head(family):
    model = build(family)
    assert pl.last_layers(model) is model
    assert trained(model) == {n for n, _ in model.named_parameters() if re.fullmatch(LAST[family], n)}
    assert after_one_step(model, family) <= trained(model)


@each_family
def test_without_head_the_rest_stays_the_same(family):
    model = build(family)
    with_head = trained(pl.last_layers(model))
    without = trained(pl.last_layers(model, head=False))
    heads = {n for n in with_head if n.startswith(("lm_head", "classifier", "bert.pooler"))}
    assert without == with_head - heads
    assert bool(heads) == (family not in TIED)


@pytest.mark.parametrize("family", TIED)
def test_a_tied_head_is_trained_only_when_asked(family):
    model = build(family)
    assert TIED[family] not in trained(pl.last_layers(model))
    without = trained(pl.last_layers(model))
    assert trained(pl.last_layers(model, tied=True)) == without | {TIED[family]}


def test_own_bias_of_a_tied_head_is_trained():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
            self.lm_head = nn.Linear(4, 7)
            self.lm_head.weight = self.embed.weight

    assert trained(pl.last_layers(Model())) == {"layers.1.0.weight", "layers.1.0.bias", "lm_head.bias"}


def test_tied_small_llama_trains_blocks_and_norm_only():
    model = build("llama", tie_word_embeddings=True)
    names = trained(pl.last_layers(model, 2))
    assert names == {n for n, _ in model.named_parameters()} - {"model.embed_tokens.weight"}


def test_a_smaller_n_after_a_larger_one_freezes_again():
    model = build("llama")
    larger = trained(pl.last_layers(model, 2))
    smaller = trained(pl.last_layers(model, 1))
    assert smaller < larger
    assert {n for n in larger - smaller} == {n for n in larger if n.startswith("model.layers.0.")}


def test_the_decoder_is_taken_even_if_the_encoder_is_deeper():
    import transformers as t

    config = t.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=4, num_decoder_layers=2, num_heads=2,
                        decoder_start_token_id=0, pad_token_id=0)  # fmt: skip
    model = pl.last_layers(t.T5ForConditionalGeneration(config))
    assert {n.split(".block.")[0] for n in trained(model) if ".block." in n} == {"decoder"}
    with pytest.raises(ValueError, match=r"n=3 is not in 1…2.*decoder\.block"):
        pl.last_layers(model, 3)


def test_experts_inside_a_block_are_not_taken_for_blocks():
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(4, 4)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(Expert() for _ in range(5))

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(2))

    model = pl.last_layers(Mixture(), 1)
    assert trained(model) == {n for n, _ in model.named_parameters() if n.startswith("layers.1.")}


@pytest.mark.parametrize("n", [0, -1, 3, 1.0, True])
def test_n_out_of_range_is_refused_and_nothing_changes(n):
    model = build("llama")
    before = trained(model)
    with pytest.raises(ValueError, match=r"is not in 1…2: LlamaForCausalLM has 2 blocks"):
        pl.last_layers(model, n)
    assert trained(model) == before


@pytest.mark.parametrize("baseline", [pl.full_finetuning, pl.last_layers])
def test_attached_adapters_are_refused_and_nothing_changes(baseline):
    model = pl.attach(build("llama"), pl.LoRA, targets="q_proj", name="sql", r=2)
    before = trained(model)
    with pytest.raises(ValueError, match=r"'sql' is attached; call detach\(model\) first"):
        baseline(model)
    assert trained(model) == before
    pl.attach(model, pl.LoRA, targets="v_proj", name="style", r=2)
    with pytest.raises(ValueError, match=r"'sql', 'style' are attached"):
        baseline(model)
    baseline(pl.detach(model))  # the cure that the message names


@pytest.mark.parametrize("baseline", [pl.full_finetuning, pl.last_layers])
def test_a_quantised_base_is_refused_and_nothing_changes(baseline):
    model = build("llama").requires_grad_(False)
    packed = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    model.model.layers[1].mlp.up_proj.weight = packed
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight' is stored as torch\.uint8"):
        baseline(model)
    assert trained(model) == set()


@pytest.mark.parametrize("baseline", [pl.full_finetuning, pl.last_layers])
def test_packed_layers_are_refused_where_they_would_train(baseline):
    model = pl.quantize(build("llama"))
    with pytest.raises(ValueError, match="q_proj' .*is quantised, which has no gradient"):
        baseline(model)
    assert trained(model) == set()


def test_the_last_layers_may_stand_on_packed_ones():
    model = pl.quantize(build("llama"), skip=r"layers\.1\..*_proj")
    assert any("layers.1." in name for name in trained(pl.last_layers(model)))


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="Sequential has no nn.ModuleList of equal blocks"):
        pl.last_layers(nn.Sequential(nn.Linear(3, 3)))

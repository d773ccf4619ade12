"""BitFit, LN tuning, (IA)³ and trainable tokens: beside the reference on every family, and what is their own."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, field

import peft
import pytest
import torch
from families import FAMILIES, WIDTH, build, inputs, labels, shake
from torch import nn

import peftlab as pl
from peftlab.vocabulary import add_tokens, ties

CLOSE = dict(rtol=0, atol=1e-5)  # fp32 logits of order 1; the two libraries add and scale in another order
TOKENS = [5, 3, 18, 87]
TIED = ("gpt2", "opt", "t5")


@dataclass
class Pair:
    """A method here and there. The reference has it on exactly the modules that ours took by default."""

    ours: type
    hyper: dict = field(default_factory=dict)
    marker: str = ""  # in the names of the reference's parameters

    def reference(self, model: nn.Module, theirs: nn.Module):
        found = pl.adapters(model)["a"]
        if self.ours is pl.LNTuning:
            config = peft.LNTuningConfig(target_modules=list(found))
        elif self.ours is pl.IA3:
            inner = [p for p, a in found.items() if a.feedforward]
            config = peft.IA3Config(target_modules=list(found), feedforward_modules=inner)
        else:
            owners = [p for p, a in found.items() if not a.tied]
            config = peft.TrainableTokensConfig(target_modules=owners, token_indices=self.hyper["tokens"])
        return peft.get_peft_model(theirs, config).eval()


PAIRS = {
    "LNTuning": Pair(pl.LNTuning, marker="ln_tuning_layers"),
    "IA3": Pair(pl.IA3, marker="ia3_l"),
    "TrainableTokens": Pair(pl.TrainableTokens, dict(tokens=TOKENS), marker="trainable_tokens_delta"),
}
every = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
everywhere = pytest.mark.parametrize("family", FAMILIES)


def beside(*what: str):
    """Each pair as a case that says what it compares."""
    return pytest.mark.parametrize(
        "pair", [pytest.param(pair, id=name, marks=pytest.mark.reference(name, *what)) for name, pair in PAIRS.items()])


def logits(model, family, **more):
    with torch.no_grad():
        return model(**inputs(family), **more).logits


def adapted(family: str, pair: Pair, moved: bool = True) -> nn.Module:
    model = pl.attach(build(family), pair.ours, name="a", **pair.hyper)
    for host in pl.hosts(model).values():
        if moved:
            shake(host.adapters, 0.2)
    return model


@beside("writes")
@everywhere
def test_the_reference_reads_ours(family, pair, tmp_path):
    model = adapted(family, pair)
    ours, bare = logits(model, family), logits(build(family), family)
    assert (ours - bare).abs().max() > 1e-2, "the adapter must show, or the test proves nothing"
    pl.save_adapter(model, tmp_path, name="a")
    theirs = peft.PeftModel.from_pretrained(build(family), tmp_path).eval()
    torch.testing.assert_close(logits(theirs, family), ours, **CLOSE)


@beside("reads", "gradients")
@everywhere
def test_ours_reads_the_reference_with_its_count_and_gradients(family, pair, tmp_path):
    blank = adapted(family, pair, moved=False)
    theirs = pair.reference(blank, build(family))
    trained = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    assert all(pair.marker in n for n in trained)
    assert sum(p.numel() for p in trained.values()) == pl.count(blank).trainable
    for seed, parameter in enumerate(trained.values()):
        draw = torch.Generator().manual_seed(seed)
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw)
    wanted = logits(theirs, family)
    theirs.save_pretrained(tmp_path)
    model = pl.load_adapter(build(family), tmp_path, name="a")
    torch.testing.assert_close(logits(model, family), wanted, **CLOSE)

    batch = inputs(family)
    for one in (theirs, model):
        one(**batch, labels=labels(family, batch)).loss.backward()
    ours = {f"{path}.{n}": p.grad for path, a in pl.adapters(model)["a"].items() for n, p in a.named_parameters()}
    for name, parameter in trained.items():
        path = name.removeprefix("base_model.model.").replace(".default", "").replace("ln_tuning_layers.", "")
        path = path.replace("trainable_tokens_delta", "rows")
        torch.testing.assert_close(ours.pop(path), parameter.grad, rtol=1e-4, atol=1e-6)
    tied = [path for path, a in pl.adapters(model)["a"].items() if getattr(a, "tied", False)]
    assert list(ours) == [f"{path}.rows" for path in tied], "a parameter here that the reference has not"


@every
@everywhere
def test_the_closed_formula_is_the_count(family, pair):
    model = adapted(family, pair, moved=False)
    counted = pl.count(model)
    assert counted.trainable == counted.expected["a"] > 0


ODD = [("llama", None, None), ("bert", None, None), ("gpt2", None, None), ("gpt2", "c_proj", r"mlp\.c_proj"),
       ("t5", "[kvo]|wo", "o")]  # fmt: skip


@pytest.mark.parametrize(("family", "targets", "inner"), ODD)
def test_a_file_says_how_the_reference_would(family, targets, inner, tmp_path):
    """What a config names by ending must mean the same modules there: `wo` ends on `o`, and GPT-2 has two `c_proj`."""
    model = pl.attach(build(family), pl.IA3, targets, feedforward=inner)
    for host in pl.hosts(model).values():
        shake(host.adapters, 0.2)
    pl.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(config) <= set(peft.IA3Config().to_dict()), "no key that the reference does not know"
    theirs = peft.PeftModel.from_pretrained(build(family), tmp_path).eval()
    torch.testing.assert_close(logits(theirs, family), logits(model, family), **CLOSE)


# --- (IA)³ ---


def test_ia3_is_the_equation():
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 5), torch.randn(2, 3)
    outer, inner = pl.IA3(layer), pl.IA3(layer, feedforward=True)
    shake(outer, 1.0), shake(inner, 1.0)
    torch.testing.assert_close(outer(layer, x), outer.ia3_l[:, 0] * (x @ layer.weight.T + layer.bias))
    torch.testing.assert_close(inner(layer, x), (inner.ia3_l[0] * x) @ layer.weight.T + layer.bias)


def test_ia3_sits_where_the_paper_puts_it():
    """Liu et al. 2022, section 3.3: L(d_k + d_v + d_ff) in an encoder, L(2d_k + 2d_v + d_ff) in a decoder."""
    config = build("t5").config
    d, ff, blocks = config.num_heads * config.d_kv, config.d_ff, config.num_layers
    model = pl.attach(build("t5"), pl.IA3)
    assert pl.count(model).trainable == blocks * (2 * d + ff) + blocks * (4 * d + ff)
    assert {p.rsplit(".", 1)[-1] for p in pl.hosts(model)} == {"k", "v", "wo"}
    bert = pl.attach(build("bert"), pl.IA3)
    assert pl.count(bert).trainable == 2 * (WIDTH + WIDTH + 64), "not on the attention's output"


def test_ia3_tells_its_feedforward_layers_apart():
    def inner(**more):
        found = pl.adapters(pl.attach(build("llama"), pl.IA3, **more))["default"]
        return {p.rsplit(".", 1)[-1] for p, a in found.items() if a.feedforward}

    assert inner() == {"down_proj"}
    assert inner(targets="k_proj|up_proj") == set()
    assert inner(targets="k_proj|up_proj", feedforward="up_proj") == {"up_proj"}
    assert inner(targets="k_proj|up_proj|o_proj", feedforward=["up_proj", "o_proj"]) == {"up_proj", "o_proj"}
    assert inner(feedforward=False) == set()


def test_ia3_moves_by_less_than_a_bfloat16_step():
    """bfloat16 has nothing between 1 and 1.0078; a factor kept in float32 acts all the same."""
    assert torch.tensor(1.003).bfloat16() == 1
    layer, x = nn.Linear(64, 4096, dtype=torch.bfloat16), torch.ones(1, 64, dtype=torch.bfloat16)
    ia3 = pl.IA3(layer)
    nn.init.constant_(ia3.ia3_l, 1.003)
    assert ia3(layer, x).dtype == torch.bfloat16
    assert (ia3(layer, x) != layer(x)).float().mean() > 0.5


# --- BitFit ---


def test_bitfit_trains_roberta_base_s_102_912_biases():
    """Hu et al. 2021, table 2, BitFit on RoBERTa-base: 0.1M. All biases of the encoder and the pooler."""
    import transformers as t

    config = t.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    with torch.device("meta"):
        model = pl.attach(t.RobertaModel(config), pl.BitFit)
    biases = sum(p.numel() for n, p in t.RobertaModel(config).named_parameters() if n.endswith("bias"))
    counted = pl.count(model)
    assert counted.trainable == counted.expected["default"] == biases == 102_912


def test_bitfit_of_bert_large_s_queries_and_middle_layers_is_the_papers_0_04_percent():
    """Ben Zaken et al. 2022, section 3: b_q and b_m2 alone are 0.04 % of BERT-large, all biases 0.08 %."""
    import transformers as t

    size = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    with torch.device("meta"):
        base = t.BertModel(t.BertConfig(**size))
    some = pl.count(pl.attach(copy.deepcopy(base), pl.BitFit, "query|intermediate.dense"))
    every_bias = pl.count(pl.attach(copy.deepcopy(base), pl.BitFit))
    assert some.trainable == 24 * (1024 + 4096)
    assert [round(100 * c.trainable / c.base, 2) for c in (some, every_bias)] == [0.04, 0.08]


@pytest.mark.parametrize("family", ["bert", "gpt2", "opt"])
def test_bitfit_is_training_the_biases_themselves(family):
    """The gradient of Δb is the gradient of b, on linear layers and norms; and merged, the layer has b + Δb."""
    base, batch = build(family), inputs(family)
    base(**batch, labels=labels(family, batch)).loss.backward()
    want = {n: p.grad for n, p in base.named_parameters() if n.endswith(".bias") and "classifier" not in n}
    model = pl.attach(build(family), pl.BitFit)
    model(**batch, labels=labels(family, batch)).loss.backward()
    found = pl.adapters(model)["default"]
    assert {f"{p}.bias" for p in found} == set(want)
    for path, adapter in found.items():
        torch.testing.assert_close(adapter.delta_b.grad, want[f"{path}.bias"], rtol=1e-4, atol=1e-6)
    for host in pl.hosts(model).values():
        shake(host.adapters, 0.2)
    forward = logits(model, family)
    pl.merge(model)
    torch.testing.assert_close(logits(model, family), forward, **CLOSE)
    for path, host in pl.hosts(model).items():
        torch.testing.assert_close(host.layer.bias, build(family).get_submodule(path).bias + found[path].delta_b)


def test_bitfit_on_a_model_without_biases_says_so_and_can_add_them():
    for family in ("llama", "t5"):
        model = build(family)
        with pytest.raises(ValueError, match="has no bias.*all-linear.*LNTuning"):
            pl.attach(model, pl.BitFit)
        assert not pl.hosts(model) and all(p.requires_grad for p in model.parameters())
    model = pl.attach(build("llama"), pl.BitFit, "v_proj|down_proj")
    assert pl.count(model).trainable == 2 * (16 + WIDTH)
    for host in pl.hosts(model).values():
        shake(host.adapters, 0.2)
    forward = logits(model, "llama")
    pl.merge(model)
    assert all(host.layer.bias is not None for host in pl.hosts(model).values())
    torch.testing.assert_close(logits(model, "llama"), forward, **CLOSE)
    assert all(host.layer.bias is None for host in pl.hosts(pl.unmerge(model)).values())


# --- LN tuning ---


def test_ln_tuning_is_one_norm_with_other_weights():
    for norm in (nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-6)):
        shake(norm, 1.0)
        tuned = pl.LNTuning(norm)
        shake(tuned, 1.0, seed=2)
        twin = copy.deepcopy(norm)
        twin.load_state_dict(tuned.state_dict())
        x = torch.randn(3, 8)
        assert torch.equal(tuned(norm, x), twin(x))


def test_ln_tuning_over_another_adapter_adds_its_change():
    """LN tuning replaces the norm, but not what another adapter of the same norm does; merged likewise."""
    model = pl.attach(build("bert"), pl.BitFit, "LayerNorm", name="b")
    pl.attach(model, pl.LNTuning, name="l")
    for host in pl.hosts(model).values():
        shake(host.adapters, 0.3)
    pl.activate(model, "b", "l")
    host = model.bert.encoder.layer[0].output.LayerNorm
    x, both = torch.randn(4, WIDTH), host.adapters
    x_hat = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + host.layer.eps)
    torch.testing.assert_close(host(x), x_hat * both["l"].weight + both["l"].bias + both["b"].delta_b)
    forward = logits(model, "bert")
    pl.merge(model, "b", "l")
    torch.testing.assert_close(logits(model, "bert"), forward, **CLOSE)


# --- trainable tokens ---


@everywhere
def test_tied_tables_keep_one_weight_and_share_one_set_of_rows(family):
    base = build(family)
    model = pl.attach(copy.deepcopy(base), pl.TrainableTokens, tokens=TOKENS)
    assert pl.count(model).trainable == len(TOKENS) * WIDTH
    found = pl.adapters(model)["default"]
    assert len(found) == {"gpt2": 2, "opt": 2, "t5": 4}.get(family, 1)
    assert len({id(a.rows) for a in found.values()}) == 1
    assert len({id(host.layer.weight) for host in pl.hosts(model).values()}) == 1, "still tied"
    assert (model.get_output_embeddings() is not None) == (family != "bert")


@pytest.mark.parametrize("family", ["llama", *TIED])
def test_trained_rows_act_as_if_written_into_the_table(family):
    model = pl.attach(build(family), pl.TrainableTokens, tokens=TOKENS)
    rows = next(iter(pl.adapters(model)["default"].values())).rows
    shake(next(iter(pl.hosts(model).values())).adapters, 0.5)
    twin = build(family)
    with torch.no_grad():
        twin.get_input_embeddings().weight[TOKENS] = rows
    torch.testing.assert_close(logits(model, family), logits(twin, family), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", *TIED])
def test_training_moves_the_rows_alone(family):
    """Base bytes as before; the gradient of the rows is that of full fine-tuning, through input and tied head."""
    batch = inputs(family)
    full = build(family)
    full(**batch, labels=labels(family, batch)).loss.backward()
    want = full.get_input_embeddings().weight.grad[TOKENS]
    model = pl.attach(build(family), pl.TrainableTokens, tokens=TOKENS)
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    model(**batch, labels=labels(family, batch)).loss.backward()
    torch.testing.assert_close(trained[0].grad, want, rtol=1e-4, atol=1e-6)
    torch.optim.AdamW(trained, 0.1).step()
    assert len(trained) == 1 and all(torch.equal(model.get_parameter(n), p) for n, p in before.items())


def test_an_untied_head_is_trained_only_when_it_is_named():
    model = pl.attach(build("llama"), pl.TrainableTokens, tokens=TOKENS)
    assert list(pl.hosts(model)) == ["model.embed_tokens"]
    model = pl.attach(build("llama"), pl.TrainableTokens, "embed_tokens|lm_head", tokens=TOKENS)
    found = pl.adapters(model)["default"]
    assert len({id(a.rows) for a in found.values()}) == 2 and pl.count(model).trainable == 2 * len(TOKENS) * WIDTH
    for host in pl.hosts(model).values():
        shake(host.adapters, 0.3)
    forward = logits(model, "llama")
    pl.merge(model)
    torch.testing.assert_close(logits(model, "llama"), forward, **CLOSE)


@pytest.mark.parametrize("family", TIED)
def test_merging_into_a_tied_table_is_refused_with_the_reason(family):
    model = pl.attach(build(family), pl.TrainableTokens, tokens=TOKENS)
    with pytest.raises(ValueError, match="untie"):
        pl.merge(model)
    assert not any(host.merged for host in pl.hosts(model).values())


def test_new_words_are_learnt_while_the_old_table_stays(tmp_path):
    """A new word gets a row in model and tokenizer; training makes the model say it, and moves nothing else."""
    base, tokenizer = pl.load_base()
    prompt = "The ship that nobody had heard of was the"
    new = add_tokens(base, tokenizer, ["<zorblat>"])
    assert tokenizer.convert_ids_to_tokens(new) == ["<zorblat>"] and len(base.get_input_embeddings().weight) > new[0]
    table = base.get_input_embeddings().weight.detach().clone()
    model = pl.attach(base, pl.TrainableTokens, tokens=new)
    assert pl.count(model).trainable == base.config.hidden_size
    ids = tokenizer(prompt + "<zorblat>", return_tensors="pt")["input_ids"]
    assert ids[0, -1] == new[0]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05)
    chances = []
    for _ in range(15):
        logprob = model(ids).logits[0, -2].log_softmax(-1)[new[0]]
        chances.append(logprob.item())
        optimizer.zero_grad()
        (-logprob).backward()
        optimizer.step()
    assert chances[-1] > math.log(0.5) > chances[0]
    head, table_after = model.get_output_embeddings(), model.get_input_embeddings().weight
    assert head.weight is table_after and torch.equal(table_after, table)

    pl.save_adapter(model, tmp_path)
    fresh, tokenizer = pl.load_base()
    assert add_tokens(fresh, tokenizer, ["<zorblat>"]) == new
    pl.load_adapter(fresh, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(fresh(ids).logits, model(ids).logits)


def test_scaled_tables_scale_the_new_rows_too():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    torch.manual_seed(0)
    table = Gemma3TextScaledWordEmbedding(10, 4, 0, embed_scale=2.0)
    tokens = pl.TrainableTokens(table, tokens=[7, 2])
    nn.init.ones_(tokens.rows)
    ids = torch.tensor([[2, 3, 7]])
    y = tokens(table, ids)
    torch.testing.assert_close(y[0, [0, 2]], torch.full((2, 4), 2.0))
    assert torch.equal(y[0, 1], table(ids)[0, 1])


def test_ties_are_found_by_the_weight_itself():
    assert ties(build("t5"), "shared") == ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]
    assert ties(build("llama"), "model.embed_tokens") == ["model.embed_tokens"]


# --- bad input ---

WRONG = [
    (pl.BitFit, dict(targets="all-attention"), "LlamaAttention is neither a linear layer nor a norm"),
    (pl.BitFit, dict(targets="all-norms"), "LlamaRMSNorm is neither .* LNTuning"),
    (pl.LNTuning, dict(targets="q_proj"), "Linear is no normalisation layer.*all-norms"),
    (pl.IA3, dict(targets="all-norms"), "needs a linear layer .* not LlamaRMSNorm"),
    (pl.IA3, dict(feedforward="fc2"), "feedforward='fc2' matches none of the 6 targets"),
    (pl.TrainableTokens, dict(), "no tokens to train"),
    (pl.TrainableTokens, dict(tokens=[3, 96]), "token 96 is not an id in 0…95.*add_tokens"),
    (pl.TrainableTokens, dict(tokens=[-1]), "token -1 is not an id"),
    (pl.TrainableTokens, dict(tokens=["ship"]), "must be a list of whole numbers"),
    (pl.TrainableTokens, dict(tokens=[3, 4, 3]), "token 3 is named twice"),
    (pl.TrainableTokens, dict(tokens=[3], targets="q_proj"), "q_proj' is a Linear, no table"),
    (pl.TrainableTokens, dict(tokens=[3], targets="all-norms"), "LlamaRMSNorm, no table"),
]


@pytest.mark.parametrize(("method", "arguments", "message"), WRONG)
def test_what_cannot_be_is_refused_and_the_model_is_unchanged(method, arguments, message):
    model = build("llama")
    before = [n for n, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        pl.attach(model, method, **arguments)
    assert [n for n, _ in model.named_modules()] == before and all(p.requires_grad for p in model.parameters())


def test_new_words_that_are_known_or_come_too_late_are_refused():
    model, tokenizer = pl.load_base()
    known, size = tokenizer.convert_ids_to_tokens(50), len(tokenizer)
    with pytest.raises(ValueError, match="in the vocabulary already, as token 50"):
        add_tokens(model, tokenizer, ["<new>", known])
    pl.attach(model, pl.LNTuning)
    with pytest.raises(ValueError, match="add the tokens first"):
        add_tokens(model, tokenizer, ["<new>"])
    assert len(tokenizer) == size


def test_a_file_of_another_model_is_refused(tmp_path):
    pl.save_adapter(pl.attach(build("gpt2"), pl.IA3), tmp_path)
    model = build("llama")
    with pytest.raises(ValueError, match="LlamaForCausalLM has no module 'transformer.h.0"):
        pl.load_adapter(model, tmp_path)
    assert not pl.hosts(model)

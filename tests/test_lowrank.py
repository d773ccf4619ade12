"""LoRAs out of other adapters, of LoRAs of higher rank, and of full fine-tunings: nearest, the rest is said."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import case_of
from families import build, inputs, shake
from test_combine import deltas, logits, model_with, same, state
from torch import nn

import peftlab as pl
from peftlab.layers import weight_of
from peftlab.lowrank import LowRank, product_of, shorten, truncate


def tail(W: torch.Tensor, r: int) -> float:
    return torch.linalg.svdvals(W.double())[r:].norm().item()


# ------------------------------------------------------------------------------------------------ matrices alone


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_the_error_is_the_tail_of_the_singular_values(shape):
    W = torch.randn(*shape)
    for r in (1, 7, 20):
        short = truncate(W, r)
        missed = (W - short.B @ short.A).norm().item()
        assert short.A.shape == (r, shape[1]) and short.B.shape == (shape[0], r)
        assert missed == pytest.approx(tail(W, r), abs=1e-12) == pytest.approx(short.tail, abs=1e-12)
        assert short.norm == pytest.approx(W.double().norm().item(), rel=1e-12)
    others = [torch.randn(shape[0], 7) @ torch.randn(7, shape[1]) for _ in range(20)]
    assert truncate(W, 7).tail < min((W - other).norm().item() for other in others)


@pytest.mark.parametrize("r", [1, 3, 6, 9])
def test_a_product_is_shortened_without_being_formed(r):
    A, B = torch.randn(6, 25), torch.randn(18, 6)
    short, dense = shorten(A, B, r), truncate(B.double() @ A.double(), r)
    assert short.A.shape == (r, 25) and short.B.shape == (18, r)
    torch.testing.assert_close(short.B @ short.A, dense.B @ dense.A, rtol=0, atol=1e-12)
    assert short.tail == pytest.approx(dense.tail, abs=1e-11) and short.norm == pytest.approx(dense.norm, rel=1e-12)
    torch.testing.assert_close(short.A @ short.A.T, torch.eye(r).double(), rtol=0, atol=1e-12)  # no dead direction


# ------------------------------------------------------------------------------------------------------- to_lora


def test_the_rank_of_a_lora_is_reduced_and_its_own_rank_is_exact(monkeypatch):
    monkeypatch.setattr(pl.LoRA, "fold", None)  # no dense matrix
    model = model_with(a={"r": 6, "alpha": 5, "rslora": True})
    a, before = deltas(model, "a"), state(model)
    low = pl.to_lora(model, "a", 2, "low")
    same_rank = pl.to_lora(model, "a", 6, "same")
    more = pl.to_lora(model, "a", 9, "more")
    assert (low.name, low.r) == ("low", 2) and set(low.errors) == set(a)
    for path, W in a.items():
        missed = (W - deltas(model, "low")[path]).norm().item()
        assert missed == pytest.approx(tail(W, 2), rel=1e-5) == pytest.approx(low.tails[path], rel=1e-5)
        assert low.errors[path] == pytest.approx(missed / W.norm().item(), rel=1e-5)
        for name in ("same", "more"):
            torch.testing.assert_close(deltas(model, name)[path], W, rtol=0, atol=1e-6)
        assert pl.adapters(model)["low"][path].scaling == 1
        assert len(pl.adapters(model)["more"][path].lora_A) == 9
    assert max(same_rank.error, more.error) < 1e-12
    want = (sum(v**2 for v in low.tails.values()) / sum(v**2 for v in low.norms.values())) ** 0.5
    assert low.error == pytest.approx(want)
    after = state(model)
    assert all(torch.equal(after[k], v) for k, v in before.items()), "the source stays as it is"
    assert next(iter(pl.hosts(model).values())).switch.active == ("more",)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("method", [m for m in pl.METHODS.values() if m.__module__.startswith("peftlab.")],
                         ids=lambda m: m.__name__)  # fmt: skip
def test_every_method_that_folds_into_linear_layers_becomes_a_lora(method, dtype):
    """At full rank the LoRA is the adapter; what cannot be one is refused, and nothing is changed."""
    case, model = case_of(method), build("llama")
    model = pl.quantize(model) if dtype == "nf4" else model.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    if case.before:
        case.before(model)
    pl.attach(model, method, case.targets, name="a", **case.hyper)
    for i, adapter in enumerate(pl.adapters(model)["a"].values()):
        shake(adapter, case.shake, seed=i)
    before = state(model)
    linear = all(isinstance(a.layer, (nn.Linear, pl.NF4Linear)) for a in pl.adapters(model)["a"].values())
    if case.affine or not linear or method in (pl.BitFit, pl.BEFT):
        with pytest.raises(ValueError, match="no product B·A|not an affine map|changes biases alone"):
            pl.to_lora(model, "a", 10**6, "low")
        assert same(model, before)
        return
    with pl.using(model, "a"):
        want = logits(model)
    table = pl.to_lora(model, "a", 10**6, "low")
    if method is pl.RED:  # it shifts too, and no LoRA has a bias
        assert set(table.left_out) == {f"{path}.bias" for path in table.norms} and max(table.errors.values()) < 1e-9
        return
    assert table.error < 1e-9 and not table.left_out
    # bf16: the LoRA adds up after the rounding of the layer, the adapter before it
    close = dict(rtol=0.05, atol=0.15) if dtype == "bf16" else dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model), want, **close)
    assert all(len(a.lora_A) == min(a.lora_A.shape[1], a.lora_B.shape[0]) for a in pl.adapters(model)["low"].values())


def test_on_conv1d_the_change_lies_the_right_way_round_and_biases_are_reported():
    """(IA)³ rescales GPT-2's biases too: l ⊙ (Wx + b); no LoRA holds that part, and it is said."""
    model = pl.attach(build("gpt2"), pl.IA3, "c_attn", name="a", feedforward=False)
    for layer in (host.layer for host in pl.hosts(model).values()):
        nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(3))
    for i, adapter in enumerate(pl.adapters(model)["a"].values()):
        shake(adapter, 0.3, seed=i)
    table = pl.to_lora(model, "a", 99, "low")
    missed = 0.0
    for path, host in pl.hosts(model).items():
        shift = host.adapters["a"].ia3_l.detach()[:, 0] - 1
        torch.testing.assert_close(deltas(model, "low")[path].float(), shift[:, None] * weight_of(host.layer))
        assert table.left_out[f"{path}.bias"] == pytest.approx((shift * host.layer.bias).norm().item(), rel=1e-6)
        missed += table.left_out[f"{path}.bias"] ** 2
    assert max(table.errors.values()) < 1e-12, "all of ΔW is held"
    whole = sum(v**2 for v in table.norms.values()) + missed
    assert table.error == pytest.approx((missed / whole) ** 0.5)
    assert "changed too, and in no LoRA" in repr(table) and "transformer.h.0.attn.c_attn.bias" in repr(table)
    with torch.no_grad():
        for layer in (host.layer for host in pl.hosts(model).values()):
            layer.bias.zero_()
    low = logits(model, "gpt2")
    with pl.using(model, "a"):
        torch.testing.assert_close(logits(model, "gpt2"), low, rtol=1e-4, atol=1e-4)


def test_a_trained_copy_becomes_a_lora_and_can_then_be_combined():
    model = pl.attach(build("llama"), pl.LoRA, "q_proj", name="a")
    pl.attach(model, pl.LoRA, "v_proj", name="b", modules_to_save=["lm_head"])
    for name in "ab":
        for adapter in pl.adapters(model)[name].values():
            shake(adapter, 0.1)
    with pl.using(model, "b"):
        want = logits(model)
    assert pl.to_lora(model, "b", 32, "b_lora").error < 1e-9
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
    pl.combine(model, {"a": 1, "b_lora": 1}, name="both")
    assert "lm_head" in pl.adapters(model)["both"]


BAD = {
    "unknown": (("aa", 2, "x"), "no adapter named 'aa' is attached; did you mean 'a'"),
    "taken": (("a", 2, "b"), "'b' is attached already"),
    "unsafe": (("a", 2, "x/y"), "cannot be used"),
    "rank 0": (("a", 0, "x"), "rank r=0: must be a whole number"),
    "rank half": (("a", 1.5, "x"), "rank r=1.5: must be a whole number"),
    "a norm": (("n", 2, "x"), r"'n' is LNTuning on 'model\.layers\.0\.input_layernorm', no linear layer"),
    "biases": (("c", 2, "x"), "'c' changes biases alone, and a LoRA has none"),
    "bent": (("d", 2, "x"), r"'d' at 'model\.layers\.0\.self_attn\.q_proj': .*not an affine map"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_changes_nothing(case):
    arguments, words = BAD[case]
    model = model_with()
    pl.attach(model, pl.LNTuning, name="n")
    pl.attach(model, pl.BitFit, "q_proj", name="c")
    pl.attach(model, pl.Pfeiffer, "q_proj", name="d", bottleneck=4)
    for name in "cd":
        for adapter in pl.adapters(model)[name].values():
            shake(adapter, 0.2)
    before = state(model)
    with pytest.raises(ValueError, match=words):
        pl.to_lora(model, *arguments)
    assert same(model, before) and next(iter(pl.hosts(model).values())).switch.active == ("d",)


def test_merged_adapters_are_refused():
    model = pl.merge(model_with(), "b")
    with pytest.raises(ValueError, match="b is merged into the weights; unmerge"):
        pl.to_lora(model, "a", 2, "x")


# ------------------------------------------------------------------------------------------------------- extract


def tuned(family="llama", rank=None, only="", scale=0.05):
    """The base after a full fine-tuning: every matrix moved (by a matrix of this rank), or some parameters alone."""
    model, draw = build(family), torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if only and only not in name:
                continue
            if rank and p.dim() == 2:
                p += scale * torch.randn(len(p), rank, generator=draw) @ torch.randn(rank, p.shape[1], generator=draw)
            else:
                p += scale * torch.randn(p.shape, generator=draw)
    return model


def test_a_fine_tuning_of_low_rank_is_extracted_whole(tmp_path):
    model, after = build("llama"), tuned(rank=3, only="proj")
    table = pl.extract(model, after, 3, "tuned")
    assert table.error < 1e-5 and not table.left_out and len(table.errors) == 14  # float32 weights
    torch.testing.assert_close(logits(model), logits(after), rtol=1e-3, atol=1e-3)
    with pl.using(model):
        assert torch.equal(logits(model), logits(build("llama")))
    pl.save_adapter(model, tmp_path, name="tuned")
    again = pl.load_adapter(build("llama"), tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_error_of_each_layer_is_its_tail_and_the_rest_is_reported(family):
    base, after = build(family), tuned(family)
    table = pl.extract(base, after, 4, "tuned")
    there = dict(after.named_modules())
    for path, made in deltas(base, "tuned").items():
        W = weight_of(there[path]).double() - weight_of(pl.hosts(base)[path].layer).double()
        assert table.tails[path] == pytest.approx(tail(W, 4), rel=1e-9)
        assert (W - made).norm().item() == pytest.approx(table.tails[path], rel=1e-4)
    held = {f"{path}.weight" for path in table.errors}
    changed = {name for name, _ in after.named_parameters()}
    assert set(table.left_out) == changed - held and "in no LoRA" in repr(table)
    start = dict(build(family).named_parameters())
    for name, p in after.named_parameters():
        if name in table.left_out:
            assert table.left_out[name] == pytest.approx((p - start[name]).norm().item(), rel=1e-5)
    few = pl.extract(build(family), after, 4, "few", targets=next(iter(table.errors)))
    assert set(few.left_out) == changed - {f"{next(iter(table.errors))}.weight"}


def test_a_tied_weight_is_reported_once_and_held_where_it_is_a_target():
    base = build("llama", tie_word_embeddings=True)
    after = copy.deepcopy(base)
    shake(after.lm_head, 0.1)
    head = pl.extract(copy.deepcopy(base), after, 99, "x", targets="lm_head")
    assert set(head.left_out) == {"model.embed_tokens.weight"} and head.errors["lm_head"] < 1e-9
    other = pl.extract(base, after, 99, "x", targets="q_proj")
    assert set(other.left_out) == {"model.embed_tokens.weight"} and other.error == 1


def test_on_bf16_and_packed_bases():
    after = tuned(rank=2, only="proj")
    for base, room in ((build("llama").bfloat16(), 0.02), (pl.quantize(build("llama")), 1e-6)):
        table = pl.extract(base, after, 64, "tuned")
        assert max(table.errors.values()) < 1e-9 and not {k for k in table.left_out if "proj" in k}
        for path, host in pl.hosts(base).items():
            W = dict(after.named_modules())[path].weight
            close = weight_of(host.layer).float() + deltas(base, "tuned")[path].float()
            torch.testing.assert_close(close, W, rtol=0, atol=max(room, 1e-5))


NOT_TUNED = {
    "the same": (lambda: build("llama"), {}, "does not differ from the base"),
    "another family": (lambda: build("qwen3"), {}, "only one of the two models has a module"),
    "another size": (lambda: build("llama", head_dim=16), {}, "no fine-tuning of this base"),
    "adapters": (lambda: pl.attach(build("llama"), pl.LoRA, name="z"), {}, "adapters are attached to the tuned.*: z"),
    "targets": (tuned, {"targets": "q_prj"}, "did you mean 'q_proj'"),
    "norms": (tuned, {"targets": "model.norm"}, "needs a linear layer"),
    "rank": (tuned, {"r": 0}, "rank r=0"),
    "name": (tuned, {"name": "a b"}, "cannot be used"),
    "nan": (lambda: tuned(scale=float("nan")), {}, "holds NaN or inf"),
}


@pytest.mark.parametrize("case", NOT_TUNED)
def test_what_cannot_be_extracted_leaves_the_base_alone(case):
    make, more, words = NOT_TUNED[case]
    base, after = build("llama"), make()
    before, trainable = state(base), [p.requires_grad for p in base.parameters()]
    with pytest.raises(ValueError, match=words):
        pl.extract(base, after, **{"r": 4, "name": "x", **more})
    assert same(base, before) and not pl.hosts(base) and [p.requires_grad for p in base.parameters()] == trainable


def test_a_bias_that_the_tuned_model_has_alone_is_reported():
    base, after = build("llama"), build("llama")
    after.model.norm.bias = nn.Parameter(torch.full((32,), 0.5))
    after.lm_head.bias = nn.Parameter(torch.ones(96))
    shake(after.model.layers[0].mlp, 0.1)
    table = pl.extract(base, after, 4, "x")
    assert table.left_out == pytest.approx({"lm_head.bias": 96**0.5, "model.norm.bias": 8**0.5})


def test_the_table_is_readable():
    table = LowRank("low", 4, {f"layer.{i}": 2.0 for i in range(12)}, {f"layer.{i}": 0.1 * i for i in range(12)},
                    {"norm.weight": 0.25})  # fmt: skip
    lines = repr(table).splitlines()
    assert lines[0].startswith("'low': LoRA of rank 4 on 12 layers, relative error 0.")
    assert lines[2].split() == ["layer.11", "0.5500"] and "  … and 4 more" in lines
    assert lines[-1].split() == ["norm.weight", "0.2500"]
    assert repr(LowRank("x", 1, {"one": 0.0}, {"one": 0.0})).startswith("'x': LoRA of rank 1 on 1 layer, relative")
    assert LowRank("x", 1, {"one": 0.0}, {"one": 0.0}).error == 0


def test_combined_after_extraction_it_is_a_task_vector():
    """Task arithmetic over full fine-tunings, held as adapters: minus what was added is the base again."""
    base, after = build("llama"), tuned(rank=2, only="proj")
    pl.extract(base, after, 4, "plus")
    pl.combine(base, {"plus": -1}, name="minus")
    A, B, s = product_of(next(iter(pl.adapters(base)["plus"].values())))
    assert s == 1 and A.shape[0] == 4
    with pl.using(base, "plus", "minus"):
        torch.testing.assert_close(logits(base), build("llama")(**inputs("llama")).logits, rtol=1e-4, atol=1e-4)

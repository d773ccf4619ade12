"""Merging on every family: one adapter, two, part of them; what is refused leaves the model's bytes as they are.

That each method of the registry can be merged, or is refused with the reason, are laws 3 and 4 of test_laws.py.
"""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, TARGETS, build, inputs, shake

import peftlab as pl

# float32 sums in another order; logits of order 10, and T5's of order 100
CLOSE = dict(rtol=1e-5, atol=5e-5)
everywhere = pytest.mark.parametrize("family", FAMILIES)


def logits(model, family="llama"):
    with torch.no_grad():
        return model(**inputs(family)).logits


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(model, before) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[k], v) for k, v in before.items())


def with_two(family="llama", second=None):
    """"a", a LoRA, and "b", another LoRA on some of its layers, or an (IA)³ around it."""
    model = pl.attach(build(family), pl.LoRA, TARGETS[family], name="a", r=4, alpha=8)
    pl.attach(model, second or pl.LoRA, TARGETS[family].split("|")[0] if second is None else None, name="b")
    for seed, name in enumerate("ab"):
        for i, adapter in enumerate(pl.adapters(model)[name].values()):
            shake(adapter, 0.1, seed=10 * seed + i)
    return model


@pytest.mark.parametrize("second", [None, pl.IA3], ids=["two LoRAs", "IA3 around LoRA"])
@everywhere
def test_merging_two_is_both_active(family, second):
    model = with_two(family, second)
    before = state(model)
    bare = logits(pl.attach(build(family), pl.LoRA, TARGETS[family]), family)
    for names in (("a", "b"), ("b", "a"), ("a",), ("b",)):
        pl.activate(model, *names)
        want = logits(model, family)
        assert (want - bare).abs().max() > 1e-2, "the adapters must show, or the test proves nothing"
        pl.merge(model)
        torch.testing.assert_close(logits(model, family), want, **CLOSE)
        pl.unmerge(model)
        assert same(model, before) and torch.equal(logits(model, family), want)


@everywhere
def test_a_new_adapter_on_a_merged_one_is_both(family):
    model = with_two(family)
    pl.activate(model, "a", "b")
    want = logits(model, family)
    pl.merge(model, "a")
    torch.testing.assert_close(logits(model, family), want, **CLOSE)
    with pytest.raises(ValueError, match=r"a is merged already; unmerge\(model\) first"):
        pl.merge(model, "a", "b")
    torch.testing.assert_close(logits(model, family), want, **CLOSE)


@pytest.mark.parametrize("names, words", [
    (("c",), "no adapter named 'c' is attached"),
    (("b", "a"), "would change their order"),
    (("a", "b", "c"), "no adapter named 'c'"),
])  # fmt: skip
def test_bad_names_change_nothing(names, words):
    model = with_two()
    pl.activate(model, "a", "b")
    before = state(model)
    with pytest.raises(ValueError, match=words):
        pl.merge(model, *names)
    assert same(model, before) and not any(host.merged for host in pl.hosts(model).values())


def test_merging_nothing_and_a_bare_model_are_refused():
    model = with_two()
    pl.activate(model)
    with pytest.raises(ValueError, match="no adapter is active, so there is nothing to merge"):
        pl.merge(model)
    with pytest.raises(ValueError, match="no adapter is attached to this LlamaForCausalLM"):
        pl.merge(build("llama"))


def test_unmerging_what_is_not_merged_does_nothing():
    """So that it can stand in a `finally`; a bare model is fine too."""
    model = with_two()
    before, active = state(model), next(iter(pl.hosts(model).values())).switch.active
    assert pl.unmerge(pl.unmerge(model)) is model
    assert same(model, before) and next(iter(pl.hosts(model).values())).switch.active == active
    bare = build("llama")
    before = state(bare)
    assert same(pl.unmerge(bare), before)


def test_a_refusal_in_the_last_layer_undoes_the_first():
    model = with_two()
    pl.activate(model, "a", "b")
    before, want = state(model), logits(model)
    *_, last = pl.hosts(model).values()
    last.adapters["a"].forward = lambda f, x: f(x).relu()
    with pytest.raises(ValueError, match=r"cannot be merged at 'model\.layers\.1\.mlp\.down_proj': .*affine"):
        pl.merge(model, "a")
    del last.adapters["a"].forward
    assert same(model, before) and torch.equal(logits(model), want)
    assert not any(host.merged for host in pl.hosts(model).values())


def test_an_interruption_undoes_what_was_merged(monkeypatch):
    model = with_two()
    pl.activate(model, "a", "b")
    before = state(model)
    *_, last = pl.hosts(model).values()

    def interrupted(*_):
        raise KeyboardInterrupt

    last.adapters["a"].fold = interrupted
    with pytest.raises(KeyboardInterrupt):
        pl.merge(model, "a")
    assert same(model, before) and not any(host.merged for host in pl.hosts(model).values())

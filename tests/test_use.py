"""Every method as a reader uses it: generation with a cache and padding, autocast, casts, killed runs, other models.

What test_laws.py asks of one pass, these laws ask of the loops around it.
"""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case, case_of
from families import TARGETS, attach_each, build, inputs, labels, shake

import peftlab as pl

METHODS = [m for m in pl.METHODS.values() if m.__module__.startswith("peftlab.")]
every = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
SETTINGS = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
RUN = dict(steps=3, batch_size=4, lr=1e-2, seed=1)

# Its router takes the mean over all tokens of the batch, as the paper's code does: see its docstring.
MEETS_ITS_NEIGHBOURS = {"Lily"}


def attached(method, *names, moved=True, model=None):
    """The tiny Llama with adapters of one method, moved off their start."""
    case, model = case_of(method), build("llama") if model is None else model
    if case.before:
        case.before(model)
    return attach_each(model, method, case, names or "a", moved)


def padded():
    """Three rows of 5, 8 and 9 tokens, padded on the left; the invocation of ALoRA's case is in two of them."""
    ids = inputs("llama")["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, :1] = 0
    return ids * mask, mask


def token_rows(n=6):
    """Rows of three lengths; each has the invocation of ALoRA's case."""
    draw = torch.Generator().manual_seed(3)
    return [{"input_ids": [5, 87, *torch.randint(2, 96, (7 - i % 3,), generator=draw).tolist()]} for i in range(n)]


def logits(model, **batch):
    with torch.no_grad():
        return model(**(batch or inputs("llama"))).logits


def said(model, ids, mask, **more):
    return model.generate(input_ids=ids, attention_mask=mask, **SETTINGS, **more)[:, ids.shape[1] :]


def said_alone(model, ids, mask, row):
    one = ids[row : row + 1, mask[row] == 1]
    return said(model, one, torch.ones_like(one), use_cache=False)[0]


@every
def test_a_padded_batch_with_a_cache_says_what_each_row_alone_says_without(method):
    model, (ids, mask) = attached(method), padded()
    if method.__name__ == "XLoRA":
        with pytest.raises(ValueError, match="without a cache"):
            said(model, ids, mask)
    together = said(model, ids, mask, use_cache=method.__name__ != "XLoRA")
    alike = [torch.equal(together[row], said_alone(model, ids, mask, row)) for row in range(3)]
    assert all(alike) or method.__name__ in MEETS_ITS_NEIGHBOURS, alike


@pytest.mark.parametrize("method", [m for m in METHODS if m.mixes], ids=lambda m: m.__name__)
def test_a_mixed_padded_batch_with_a_cache_says_what_each_row_alone_says(method):
    model, (ids, mask) = attached(method, "a", "b"), padded()
    with pl.using(model, rows=["b", None, "a"]):
        together = said(model, ids, mask)
    for row, names in enumerate([("b",), (), ("a",)]):
        with pl.using(model, *names):
            assert torch.equal(together[row], said_alone(model, ids, mask, row)), row


@every
def test_it_learns_under_autocast(method):
    model, batch = attached(method).train(), inputs("llama")
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch, labels=labels("llama", batch)).loss
    loss.backward()  # outside, as `train` and all of torch's recipes do: backward passes of our own are not cast there
    for adapter in pl.adapters(model)["a"].values():
        assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in adapter.parameters())


@every
def test_it_survives_a_cast_of_the_whole_model(method):
    model = attached(method)
    want = logits(model)
    wide = logits(model.double())
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), want, rtol=1e-4, atol=1e-4)  # float32 has 24 bits, this model two layers
    torch.testing.assert_close(logits(model.bfloat16()).float(), want, rtol=0.1, atol=0.6)  # and bfloat16 has 8


learns = {"AdaLoRA", "DyLoRA", "OSF", "LoReFT"}  # by a hook, or with parameters that are not contiguous
some = [pytest.param(m, id=m.__name__, marks=[] if i % 3 == 0 or m.memory or m.__name__ in learns else
                     [pytest.mark.grid]) for i, m in enumerate(METHODS)]  # fmt: skip


@pytest.mark.parametrize("method", some)
def test_a_killed_run_goes_on_as_if_nothing_had_been(method, tmp_path):
    whole, again = attached(method, moved=False), attached(method, moved=False)
    log = pl.train(whole, token_rows(), progress=False, **RUN)
    steps = pl.train_steps(attached(method, moved=False), token_rows(), checkpoint=tmp_path, **RUN)
    next(steps)
    steps.close()
    resumed = pl.train(again, token_rows(), checkpoint=tmp_path, progress=False, **RUN)
    assert resumed.losses == log.losses and len(resumed) == RUN["steps"]
    assert torch.equal(logits(again), logits(whole))


@every
def test_a_text_read_in_pieces_through_a_cache_is_the_text(method):
    """So do chunked prefill, prompt caches and assisted generation read it."""
    from transformers import DynamicCache

    model, ids = attached(method), inputs("llama")["input_ids"]
    ids[1, 2] = 5  # there was ALoRA's invocation for the second time; only the whole text knows which is the last
    cache, want = DynamicCache(config=model.config), logits(model, input_ids=ids)
    pieces = [logits(model, input_ids=ids[:, :1], past_key_values=cache, use_cache=True)]
    if method.__name__ == "XLoRA":
        with pytest.raises(ValueError, match="without a cache"):
            logits(model, input_ids=ids[:, 1:], past_key_values=cache, use_cache=True)
        return
    for start, end in ((1, 5), (5, 9)):
        pieces.append(logits(model, input_ids=ids[:, start:end], past_key_values=cache, use_cache=True))
    same = torch.allclose(torch.cat(pieces, 1), want, rtol=1e-4, atol=1e-4)
    assert same or method.__name__ in MEETS_ITS_NEIGHBOURS


OTHERS = ["bert", "gpt2", "t5"]
alone = [m for m in METHODS if CASES.get(m.__name__, Case()).before is None and m.__name__ != "Arrow"]
pairs = [pytest.param(m, f, id=f"{m.__name__}-{f}", marks=[] if (i + j) % 8 == 0 or m.family == "side network" else
                      [pytest.mark.grid]) for i, m in enumerate(alone) for j, f in enumerate(OTHERS)]  # fmt: skip


def elsewhere(method, family):
    """The method with its own targets on another family's model; skipped if it is refused by name."""
    case, model = CASES.get(method.__name__, Case(targets=None)), build(family)
    targets = TARGETS[family] if method.__name__ == "ModuleCopy" else None
    torch.manual_seed(0)
    try:
        pl.attach(model, method, targets, name="a", **case.hyper)
    except ValueError as error:
        assert len(str(error)) > 40, "a refusal says why"
        pytest.skip(f"refused on {family}")
    for adapter in pl.adapters(model)["a"].values():
        shake(adapter, case.shake / 2)
    return model


def gradients(model, family):
    batch = inputs(family)
    torch.manual_seed(5)
    model(**batch, labels=labels(family, batch)).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("method", "family"), pairs)
def test_other_models_are_saved_checkpointed_merged_and_given_back(method, family, tmp_path):
    model, bare, batch = elsewhere(method, family), build(family), inputs(family)
    want = logits(model, **batch)
    near = dict(rtol=1e-4, atol=2e-5 * max(1.0, float(want.abs().max())))  # this T5's logits are tens
    pl.save_adapter(model, tmp_path, name="a")
    assert torch.equal(logits(pl.load_adapter(build(family), tmp_path), **batch), want)
    try:
        pl.merge(model)
    except ValueError as error:
        assert case_of(method).affine or "would untie them" in str(error), error  # tied embeddings
    else:
        assert not case_of(method).affine
        torch.testing.assert_close(logits(model, **batch), want, **near)
        pl.unmerge(model)
    assert torch.equal(logits(model, **batch), want)

    twin = elsewhere(method, family).train()
    plain = gradients(twin, family)
    twin.zero_grad()
    twin.activation_checkpointing_enable({"use_reentrant": False})
    kept = gradients(twin, family)
    assert plain and plain.keys() == kept.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(kept[name], gradient, rtol=1e-4, atol=1e-4 * max(1.0, float(gradient.abs().max())))

    pl.detach(model)
    state = bare.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())

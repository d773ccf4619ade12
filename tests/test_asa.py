"""AdaMSS's adaptive subspace allocation: the reference's scores, its budget, and what freezing means."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from families import build, inputs, labels
from parity import logits
from test_structured import clusters  # noqa: F401  (a fixture: scikit-learn's groups, or ours in their place)

import peftlab as pl

ASA = dict(asa=True, target=4, tinit=0, tfinal=4, interval=4)
THEIRS = dict(use_asa=True, asa_target_subspaces=4, init_warmup=0, final_warmup=4, mask_interval=4)
SIZES = dict(r=8, subspaces=3, subspace_rank=2)
ROWS = [{"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9]}] * 4


def adapted(**hyper):
    torch.manual_seed(0)
    return pl.attach(build("llama"), "AdaMSS", "q_proj|v_proj", name="a", **SIZES, **hyper)


def of(model):
    return pl.adapters(model)["a"]


def batch(i):
    found = inputs("llama", seed=i)
    return {**found, "labels": labels("llama", found)}


def test_scores_and_choice_are_the_references(tmp_path):
    """But it keeps one group fewer than its target: of those above the target-th score, which is never above itself."""
    ours = adapted(**ASA).train()
    pl.save_adapter(ours, tmp_path, name="a")
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True).train()
    assert theirs.peft_config["default"].use_asa and theirs.peft_config["default"].mask_interval == 4
    config = theirs.peft_config["default"]
    config.asa_target_subspaces += 1
    layers = {path: theirs.base_model.model.get_submodule(path) for path in of(ours)}
    for step in range(1, 5):
        for model in (ours, theirs):
            model.zero_grad()
            model(**batch(step)).loss.backward()
            with torch.no_grad():
                for p in (p for p in model.parameters() if p.requires_grad):
                    p -= 0.5 * p.grad
        if step == 4:
            break
        theirs.base_model.update_and_allocate(step)
        pl.AdaMSS.stepped(of(ours), step, 100)
        for path, adapter in of(ours).items():
            mean = [t for kind in ("A", "B") for t in getattr(layers[path], f"exp_avg_ipt_{kind}")["default"]]
            spread = [t for kind in ("A", "B") for t in getattr(layers[path], f"exp_avg_unc_{kind}")["default"]]
            for mine, parts in ((adapter.mean, mean), (adapter.spread, spread)):
                torch.testing.assert_close(mine, torch.cat([t.flatten() for t in parts]), rtol=1e-3, atol=1e-9)
    theirs.base_model.update_and_allocate(4)
    pl.AdaMSS.stepped(of(ours), 4, 100)
    chosen = {path: [p.requires_grad for p in layers[path].adamss_A["default"]] for path in layers}
    assert {path: a.active.bool().tolist() for path, a in of(ours).items()} == chosen
    assert sum(map(sum, chosen.values())) == 4 < config.asa_target_subspaces
    assert all(not a.mean.any() for a in of(ours).values()), "each choice has its own window"


def test_what_is_frozen_stays_and_the_rest_learns_on():
    model = adapted(**{**ASA, "tfinal": 8, "interval": 2})
    kept = {}

    def note(adapters, step, steps, was=pl.AdaMSS.stepped):
        was(adapters, step, steps)
        if step == 8:
            kept.update(copy.deepcopy({path: (a.active, a.adamss_A, a.adamss_B) for path, a in adapters.items()}))
        counts.append(int(sum(a.active.sum() for a in adapters.values())))

    counts: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl.AdaMSS, "stepped", staticmethod(note))
        pl.train(model, ROWS, steps=12, lr=0.02, batch_size=2, weight_decay=0.1)
    assert counts == [12, 7, 7, 5, 5, 4, 4, 4, 4, 4, 4, 4], "4 + (12 − 4)·(1 − step/8)³ at steps 2, 4, 6 and 8"
    moved = 0
    for path, adapter in of(model).items():
        active, A, B = kept[path]
        for k, on in enumerate(active.bool().tolist()):
            same = torch.equal(adapter.adamss_A[k], A[k]) and torch.equal(adapter.adamss_B[k], B[k])
            assert same is not on
            moved += on
    assert moved == 4
    want = logits(model.eval(), "llama")
    assert (want - logits(build("llama"), "llama")).abs().max() > 1e-3


def test_it_is_off_by_default_and_its_settings_are_checked(tmp_path):
    plain = adapted()
    assert not any(name in dict(a.named_buffers()) for a in of(plain).values() for name in ("active", "mean"))
    pl.AdaMSS.stepped(of(plain), 100, 1000)
    for wrong in (dict(target=0), dict(tinit=9, tfinal=9), dict(exponent=0.0), dict(interval=0)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            adapted(asa=True, **wrong)
    config = peft.AdamssConfig(target_modules=["q_proj"], r=8, num_subspaces=3, **THEIRS)
    peft.get_peft_model(build("llama"), config).save_pretrained(tmp_path)
    model = pl.load_adapter(build("llama"), tmp_path, name="a")
    assert {(a.asa, a.hyper["target"], a.hyper["interval"]) for a in of(model).values()} == {(True, 4, 4)}

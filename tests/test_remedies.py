"""Remedies against forgetting: each does what its formula says, and nothing else."""

import copy
from functools import cache

import pytest
import torch
from families import VOCABULARY, build

import peftlab as pl
from peftlab.base import text
from peftlab.layers import weight_of
from peftlab.remedies import DecayToStart, KLToBase, decay_to_start, interpolate, old_texts, rehearse, rescale
from peftlab.rows import collate, encode


class Words:
    """A tokenizer for a tiny model: one token per letter."""

    pad_token_id, eos_token_id = 0, 1

    def __call__(self, texts, **_):
        ids = [[2 + ord(letter) % (VOCABULARY - 2) for letter in text] for text in texts]
        return {"input_ids": ids}


ROWS = [{"prompt": f"question {i}", "completion": f" answer {i * i}"} for i in range(12)]
OLD = [{"text": f"an old text number {i}"} for i in range(6)]


def adapted(seed=0, **hyper):
    torch.manual_seed(seed)
    return pl.attach(build("llama"), pl.LoRA, targets="q_proj|down_proj", name="task", **hyper)


def trained(model, steps=4, **settings):
    log = pl.train(model, ROWS, Words(), steps=steps, batch_size=4, lr=0.05, progress=False, **settings)
    return model, log


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# ------------------------------------------------------------------------------------------------ rehearsal


@pytest.mark.parametrize("share, n", [(0, 0), (0.25, 4), (0.5, 12), (0.04, 0), (0.05, 1)])
def test_rehearsed_rows_are_the_task_and_a_share_of_old_text(share, n):
    rows = rehearse([row | {"db": "zoo"} for row in ROWS], ["a", "b", "c"], share)
    assert rows[:12] == ROWS and len(rows) == 12 + n
    assert {row["prompt"] for row in rows[12:]} <= {""} and {row["completion"] for row in rows[12:]} <= set("abc")
    counts = [sum(row["completion"] == text for row in rows[12:]) for text in "abc"]
    assert max(counts) - min(counts) <= 1, "no text twice while another is left"
    assert rows == rehearse(ROWS, ["a", "b", "c"], share)


def test_an_old_text_is_learned_whole():
    row = encode(build("llama"), rehearse(ROWS, ["some old text"], 0.1), Words())[-1]
    assert row.trained == row.tokens - 1  # all but the first token, which nothing predicts


@pytest.mark.parametrize("share", [1, -0.1, 2])
def test_impossible_shares_and_missing_texts_are_refused(share):
    with pytest.raises(ValueError, match="share"):
        rehearse(ROWS, ["a"], share)
    with pytest.raises(ValueError, match="no old text"):
        rehearse(ROWS, [], 0.5)


def test_old_texts_are_of_pretraining_and_not_of_its_held_out_part(monkeypatch):
    standard_library = cache(text.standard_library)  # reading it takes seconds
    monkeypatch.setattr(text, "standard_library", standard_library)
    found, again = old_texts(40), old_texts(40)
    assert found == again and len(found) == 40 and found != old_texts(40, seed=1)
    held_out = "".join(sum(standard_library(held_out=True).values(), []))
    assert all(found[20:]) and not any(piece in held_out for piece in found[20:] if len(piece) > 100)
    assert sum("Question:" in piece for piece in found[:20]) >= 8


# ---------------------------------------------------------------------------------------------------- decay


def test_without_decay_it_is_adamw_bit_for_bit():
    models = [pl.full_finetuning(build("llama")) for _ in range(2)]
    trained(models[0], optimizer=lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.0))
    trained(models[1], optimizer=decay_to_start(0.05, 0.0))
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_each_step_goes_a_share_of_the_way_back_to_the_start_and_not_to_zero():
    p = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = DecayToStart([p], lr=0.1, decay=2.0)
    with torch.no_grad():
        p += torch.tensor([1.0, 5.0])
    for n in (1, 2, 3):
        p.grad = torch.zeros(2)  # Adam's own step is nil
        optimizer.step()
        assert torch.allclose(p, torch.tensor([3.0, -2.0]) + 0.8**n * torch.tensor([1.0, 5.0]))
    with pytest.raises(ValueError, match="negative"):
        DecayToStart([p], lr=0.1, decay=-1)


def test_decay_keeps_the_weights_nearer_to_the_base():
    start = state(build("llama"))

    def moved(decay):
        model, _ = trained(pl.full_finetuning(build("llama")), steps=10, optimizer=decay_to_start(0.05, decay))
        return sum((p - start[name]).square().sum() for name, p in model.named_parameters())

    assert moved(10) < moved(1) < moved(0)


def test_a_decaying_run_goes_on_from_its_checkpoint(tmp_path):
    settings = {"steps": 6, "batch_size": 4, "seed": 0, "optimizer": decay_to_start(0.05, 3.0)}
    whole = list(pl.train_steps(adapted(), ROWS, Words(), **settings))[-1].losses
    for log in pl.train_steps(adapted(), ROWS, Words(), checkpoint=tmp_path, **settings):
        if len(log) == 3:
            break
    rest = list(pl.train_steps(adapted(), ROWS, Words(), checkpoint=tmp_path, **settings))[-1].losses
    assert rest == whole


# ------------------------------------------------------------------------------------------------------- KL


def test_kl_is_nil_at_the_base_and_the_formula_elsewhere():
    model = adapted()
    penalty = KLToBase(model, OLD, Words(), weight=0.7, batch_size=3)
    assert abs(float(penalty(model).detach())) < 1e-6
    trained(model)
    torch.manual_seed(5)
    found = float(penalty(model).detach())
    torch.manual_seed(5)
    batch = collate([penalty.rows[i] for i in torch.randint(len(OLD), (3,))], 0, torch.device("cpu"))
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    with torch.no_grad():
        p = model(input_ids=ids, attention_mask=mask).logits.double().softmax(-1)[mask]
        p0 = build("llama")(input_ids=ids, attention_mask=mask).logits.double().softmax(-1)[mask]
    assert found == pytest.approx(0.7 * float((p0 * (p0 / p).log()).sum(-1).mean()), rel=1e-4) and found > 1e-3


def test_adapters_off_are_as_good_as_a_frozen_copy():
    model, _ = trained(adapted())
    values = []
    for base in (None, build("llama")):
        torch.manual_seed(1)
        values.append(float(KLToBase(model, OLD, Words(), base=base)(model).detach()))
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_full_fine_tuning_needs_a_copy_and_leaves_it_alone():
    model = pl.full_finetuning(build("llama"))
    with pytest.raises(ValueError, match="base="):
        KLToBase(model, OLD, Words())
    base = build("llama").requires_grad_(False).train()
    before = state(base)
    trained(model, penalty=KLToBase(model, OLD, Words(), 1.0, base))
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in base.named_parameters())
    assert all(module.training for module in base.modules())


def test_a_penalised_run_stays_nearer_to_what_the_base_says():
    def divergence(weight):
        model = adapted()
        trained(model, steps=12, penalty=KLToBase(model, OLD, Words(), weight))
        torch.manual_seed(0)
        return float(KLToBase(model, OLD, Words(), 1.0, batch_size=24)(model).detach())

    assert divergence(10.0) < 0.5 * divergence(0.0)


def test_the_penalty_counts_once_whatever_the_micro_batches_and_is_not_logged():
    def run(accumulation, penalty):
        model = adapted()
        pull = (lambda m: sum(p.square().sum() for p in m.parameters() if p.requires_grad)) if penalty else None
        optimizer = lambda ps: torch.optim.SGD(ps, lr=0.01)  # noqa: E731  # the gradient itself, not its sign
        _, log = trained(model, steps=2, accumulation=accumulation, clip=None, penalty=pull, optimizer=optimizer)
        return model, log

    (one, log), (two, _), (none, plain) = run(1, True), run(2, True), run(1, False)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert log.losses[0] == plain.losses[0]
    assert any(not torch.allclose(a, b, atol=1e-5) for a, b in zip(one.parameters(), none.parameters(), strict=True))


def test_a_checkpoint_knows_its_penalty(tmp_path):
    model = adapted()
    trained(model, checkpoint=tmp_path, penalty=KLToBase(model, OLD, Words()))
    with pytest.raises(ValueError, match="penalty"):
        trained(adapted(), checkpoint=tmp_path)


# -------------------------------------------------------------------------------------------- after training


def test_interpolation_gives_both_ends_exactly_and_the_middle():
    model = pl.full_finetuning(build("llama"))
    start = state(model)
    trained(model)
    end = state(model)
    for a in (1.0, 0.25, 0.0):
        half = interpolate(copy.deepcopy(model), start, a)
        for name, p in half.named_parameters():
            assert torch.allclose(p, start[name] + a * (end[name] - start[name]), atol=1e-6)
            assert a == 0.25 or torch.equal(p, start[name] if a == 0 else end[name])
    with pytest.raises(ValueError, match="no parameter 'nowhere'"):
        interpolate(model, {"nowhere": torch.zeros(1)}, 0.5)


def test_a_rescaled_lora_is_the_interpolation_of_its_merged_weights(tmp_path):
    model, _ = trained(adapted())
    W0 = {path: weight_of(host.layer).clone() for path, host in pl.hosts(model).items()}
    pl.merge(model)
    W = {path: weight_of(host.layer).clone() for path, host in pl.hosts(model).items()}
    pl.unmerge(model)
    pl.merge(rescale(model, "task", 0.3))
    for path, host in pl.hosts(model).items():
        assert torch.allclose(weight_of(host.layer), W0[path] + 0.3 * (W[path] - W0[path]), atol=1e-5)
    pl.save_adapter(pl.unmerge(model), tmp_path, name="task")
    again = build("llama")
    pl.load_adapter(again, tmp_path, name="task")
    x = torch.arange(2, 10)[None]
    assert torch.allclose(again(x).logits, model(x).logits, atol=1e-6)


def test_rescaling_refuses_what_is_no_product_and_changes_nothing():
    model = pl.attach(build("llama"), pl.IA3, name="task")
    before = state(model)
    with pytest.raises(ValueError, match="IA3 at .* is not a product"):
        rescale(model, "task", 0.5)
    with pytest.raises(ValueError, match="no adapter is called 'tusk'; there are task"):
        rescale(model, "tusk", 0.5)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_switch_gives_the_base_bit_for_bit():
    model, _ = trained(adapted(), steps=10)
    x = torch.arange(2, 20)[None]
    with pl.using(model), torch.no_grad():
        assert torch.equal(model(x).logits, build("llama")(x).logits)

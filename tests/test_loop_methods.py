"""AdaLoRA, DyLoRA and OSF, whose idea lives in the training loop: beside the reference, and what is their own."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from families import TARGETS, VOCABULARY, build, check_refused, inputs, labels, shake
from parity import CLOSE, Pair, adapted, beside, check_reads_ours, check_reads_theirs, logits
from torch import nn

import peftlab as pl
from peftlab.methods._budget import allocate
from peftlab.methods.dylora import cut

STEPS = dict(total_step=9)  # which the reference wants; it means nothing to what is saved
PAIRS = {
    "AdaLoRA": Pair("AdaLoRA", peft.AdaLoraConfig, {}, STEPS, moved=0.3, conv1d=True),
    "AdaLoRA, rank 5": Pair(
        "AdaLoRA", peft.AdaLoraConfig, dict(r=5, target_r=2, alpha=6, tinit=2, tfinal=3, deltaT=2, orth=0.1),
        dict(init_r=5, target_r=2, lora_alpha=6, tinit=2, tfinal=3, deltaT=2, orth_reg_weight=0.1, **STEPS), 0.3, True,
    ),
    "OSF": Pair("OSF", peft.OSFConfig),
    "OSF, 20 stay": Pair("OSF", peft.OSFConfig, dict(effective_rank=20)),
    "OSF, a fraction": Pair("OSF", peft.OSFConfig, dict(effective_rank=0.25)),
}  # fmt: skip
CASES = [("llama", name) for name in PAIRS]
CASES += [("gpt2", "AdaLoRA, rank 5"), ("bert", "AdaLoRA, rank 5"), ("bert", "OSF")]
every = beside("family, name", CASES, PAIRS)


@every("writes")
def test_the_reference_reads_ours(family, name, tmp_path):
    check_reads_ours(family, PAIRS[name], tmp_path)


@every("reads", "gradients")
def test_ours_reads_the_reference(family, name, tmp_path):
    check_reads_theirs(family, PAIRS[name], tmp_path)


def backward(model: nn.Module, seed: int = 7) -> torch.Tensor:
    batch = inputs("llama", seed=seed)
    loss = model(**batch, labels=labels("llama", batch)).loss
    return loss


def rows(n: int = 8) -> list[dict]:
    draw = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(2, VOCABULARY, (9,), generator=draw).tolist()} for _ in range(n)]


def train(model: nn.Module, steps: int, **more) -> None:
    pl.train(model, rows(), steps=steps, batch_size=4, lr=1e-2, schedule="constant", warmup=0.0, clip=None,
             progress=False, **more)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- AdaLoRA

BUDGET = dict(r=6, target_r=3, alpha=12, tinit=2, tfinal=3, deltaT=2, orth=0.5)


def both(task: str | None = "CAUSAL_LM") -> tuple[nn.Module, nn.Module]:
    """Our AdaLoRA and the reference's, on the same layers with the same values."""
    torch.manual_seed(0)
    ours = pl.attach(build("llama"), pl.AdaLoRA, "q_proj|down_proj", name="a", **BUDGET)
    config = peft.AdaLoraConfig(init_r=6, target_r=3, lora_alpha=12, tinit=2, tfinal=3, deltaT=2, total_step=12,
                                orth_reg_weight=0.5, target_modules=["q_proj", "down_proj"],
                                task_type=task)  # fmt: skip
    theirs = peft.get_peft_model(build("llama"), config).eval()
    for path, a in pl.adapters(ours)["a"].items():
        for name, p in a.named_parameters():
            theirs.get_parameter(f"base_model.model.{path}.{name}.default").data.copy_(p)
    return ours, theirs


def ranks(model: nn.Module) -> dict[str, int]:
    return {path: int(a.mask.sum()) for path, a in pl.adapters(model)["a"].items()}


def test_adalora_is_trained_as_the_reference_and_drops_the_same_triplets(tmp_path):
    """Twelve steps of AdamW with the term of the loss; then each reads the other's file, which lacks the dropped."""
    ours, theirs = both()
    made = pl.adapters(ours)["a"]
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 3e-2) for m in (ours, theirs)]
    kept = []
    for step in range(1, 13):
        loss = backward(ours, seed=step) + sum(a.penalty() for a in made.values())
        other = backward(theirs, seed=step)
        torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-5)
        loss.backward()
        other.backward()
        for optimizer in optimizers:
            optimizer.step()
        pl.AdaLoRA.stepped(made, step, 12)
        theirs.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        for path, a in made.items():
            for name, p in a.named_parameters():
                q = theirs.get_parameter(f"base_model.model.{path}.{name}.default")
                torch.testing.assert_close(p, q, rtol=2e-3, atol=2e-5)
                assert name != "lora_E" or torch.equal(p == 0, q == 0), "the same triplets are dropped"
        kept.append(sum(ranks(ours).values()))
    # 24 triplets, then 12 + 12·(1 − (step − 2)/7)³ at every second step, and 12 from the ninth on
    assert kept == [24, 24, 24, 16, 16, 12, 12, 12, 12, 12, 12, 12]
    assert len(set(ranks(ours).values())) > 1, "layers differ in what they need"
    pl.save_adapter(ours, tmp_path / "ours", name="a")
    theirs.save_pretrained(tmp_path / "theirs")
    again = pl.load_adapter(build("llama"), tmp_path / "theirs", name="a")
    torch.testing.assert_close(logits(again, "llama"), logits(theirs, "llama"), **CLOSE)
    assert ranks(again) == ranks(ours)
    pl.save_adapter(again, tmp_path / "again", name="a")
    for folder in (tmp_path / "ours", tmp_path / "again"):
        read = peft.PeftModel.from_pretrained(build("llama"), folder).eval()
        torch.testing.assert_close(logits(read, "llama"), logits(again, "llama"), **CLOSE)
    same = pl.load_adapter(build("llama"), tmp_path / "ours", name="a")
    torch.testing.assert_close(logits(same, "llama"), logits(ours, "llama"), **CLOSE)


def test_the_reference_forgets_the_term_of_the_loss_where_no_task_is_named():
    """Its forward is then the base model's own, around which the term is added."""
    ours, theirs = both(task=None)
    assert sum(a.penalty() for a in pl.adapters(ours)["a"].values()) > 1
    torch.testing.assert_close(backward(ours), backward(theirs), rtol=1e-5, atol=1e-5)


def test_adalora_in_the_house_s_loop_keeps_its_budget_and_its_bases_orthonormal():
    model = pl.attach(build("llama"), pl.AdaLoRA, "q_proj|down_proj", name="a", **BUDGET | dict(orth=20.0))
    train(model, 40)
    assert sum(ranks(model).values()) == 12
    for a in pl.adapters(model)["a"].values():
        assert torch.equal(a.lora_E[:, 0] != 0, a.mask)
        assert (a.lora_A @ a.lora_A.T - torch.eye(6)).norm() < 0.5, "√6 at the start"
        assert (a.lora_B.T @ a.lora_B - torch.eye(6)).norm() < 0.5
    free = pl.attach(build("llama"), pl.AdaLoRA, "q_proj|down_proj", name="a", **BUDGET | dict(orth=0.0))
    train(free, 40)
    assert all((a.lora_A @ a.lora_A.T - torch.eye(6)).norm() > 1.5 for a in pl.adapters(free)["a"].values())


def test_a_killed_training_of_adalora_chooses_the_same(tmp_path):
    def fresh():
        torch.manual_seed(0)
        return pl.attach(build("llama"), pl.AdaLoRA, "q_proj|down_proj", name="a", **BUDGET)

    whole, killed, again = fresh(), fresh(), fresh()
    train(whole, 12)
    settings = dict(steps=12, batch_size=4, lr=1e-2, schedule="constant", warmup=0.0, clip=None, checkpoint=tmp_path)
    for log in pl.train_steps(killed, rows(), **settings):
        if len(log) == 7:
            break
    pl.train(again, rows(), progress=False, **settings)
    assert ranks(again) == ranks(whole)
    assert torch.equal(logits(again, "llama"), logits(whole, "llama"))


def test_adalora_keeps_the_budget_where_the_reference_cannot():
    """With as many triplets as at first there is nothing to drop. The reference asks for the 0th smallest score."""
    ours, theirs = both()
    made = pl.adapters(ours)["a"]
    (backward(ours) + sum(a.penalty() for a in made.values())).backward()
    pl.AdaLoRA.stepped(made, 1, 12)
    allocate(made, 24)
    assert sum(ranks(ours).values()) == 24
    allocate(made, 5)
    assert sum(ranks(ours).values()) == 5
    backward(theirs).backward()
    theirs.base_model.rankallocator.update_ipt(theirs.base_model.model)
    with pytest.raises(RuntimeError, match="out of range"):
        theirs.base_model.rankallocator.mask_to_budget(theirs.base_model.model, 24)


def test_the_reference_cannot_load_an_adalora_under_a_name_that_is_part_of_a_path(tmp_path):
    """It asks whether the name is in "…self_attn.q_proj.lora_E", and if so, takes a word more off its end."""
    ours, _ = both()
    made = pl.adapters(ours)["a"]
    (backward(ours) + sum(a.penalty() for a in made.values())).backward()
    pl.AdaLoRA.stepped(made, 1, 12)
    allocate(made, 12)
    pl.save_adapter(ours, tmp_path, name="a")
    peft.PeftModel.from_pretrained(build("llama"), tmp_path, adapter_name="mine")
    with pytest.raises(AttributeError):
        peft.PeftModel.from_pretrained(build("llama"), tmp_path, adapter_name="attn")
    assert pl.load_adapter(build("llama"), tmp_path, name="attn")


# ------------------------------------------------------------------------------------------------------------ DyLoRA


@pytest.mark.parametrize("frozen", [False, True])
def test_dylora_at_b_is_a_lora_of_rank_b_and_only_its_rows_learn(frozen):
    torch.manual_seed(0)
    layer = nn.Linear(7, 5)
    adapter = pl.DyLoRA(layer, r=4, alpha=6, frozen=frozen)
    shake(adapter, 0.5)
    adapter.drawn.fill_(3)
    x, A, B = torch.randn(2, 7), adapter.lora_A, adapter.lora_B
    y = adapter.train().delta(x)
    torch.testing.assert_close(y, 6 / 3 * x @ A[:3].T @ B[:, :3].T)
    y.square().sum().backward()
    learned = [[bool(row.any()) for row in A.grad], [bool(column.any()) for column in B.grad.T]]
    assert learned == [[not frozen, not frozen, True, False]] * 2
    torch.testing.assert_close(adapter.eval().delta(x), 6 / 4 * x @ A.T @ B.T)


def test_dylora_draws_one_rank_a_step_for_all_layers_and_all_ranks_alike(tmp_path):
    model = pl.attach(build("llama"), pl.DyLoRA, "q_proj|down_proj", name="a", r=4)
    made, drawn = pl.adapters(model)["a"], []
    for step in range(1, 401):
        pl.DyLoRA.stepped(made, step, 400)
        (b,) = {int(a.drawn) for a in made.values()}
        drawn.append(b)
    assert all(75 < drawn.count(b) < 125 for b in (1, 2, 3, 4)), "100 each, give or take 2.9 deviations of 8.7"
    whole, killed, again = (copy.deepcopy(model) for _ in range(3))
    train(whole, 8)
    settings = dict(steps=8, batch_size=4, lr=1e-2, schedule="constant", warmup=0.0, clip=None, checkpoint=tmp_path)
    for log in pl.train_steps(killed, rows(), **settings):
        if len(log) == 3:
            break
    pl.train(again, rows(), progress=False, **settings)
    assert torch.equal(logits(again, "llama"), logits(whole, "llama"))


def test_dylora_s_first_rows_hold_what_matters_most():
    """A change with singular values 4, 3, 2, 1, learned by gradient descent: cut to rank b, DyLoRA is nearer to it than
    LoRA, whose rows share the change in no order; nearer than √(Σ σᵢ², i > b) nothing can be (Eckart and Young)."""
    torch.manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(8, 8))
    P, _ = torch.linalg.qr(torch.randn(8, 8))
    values = torch.tensor([4.0, 3, 2, 1, 0, 0, 0, 0])
    target, missed = Q @ torch.diag(values) @ P, {}
    for method in (pl.DyLoRA, pl.LoRA):
        torch.manual_seed(1)
        adapter = method(nn.Linear(8, 8), r=4, alpha=4).train()
        adapter.hyper = {"seed": 0}
        optimizer = torch.optim.Adam(adapter.parameters(), 0.03)
        for step in range(1, 601):
            (adapter.delta(torch.eye(8)).T - target).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            method.stepped({"": adapter}, step, 600)
        missed[method] = []
        for b in (1, 2, 3):
            A, B = adapter.lora_A[:b], adapter.lora_B[:, :b]
            s = 4 / b if method is pl.DyLoRA else 1.0
            missed[method].append((s * B @ A - target).norm().item())
    best = [values[b:].norm().item() for b in (1, 2, 3)]
    for b, dynamic, plain in zip(best, missed[pl.DyLoRA], missed[pl.LoRA], strict=True):
        assert b < dynamic < 0.95 * plain


def test_dylora_cut_and_saved_is_a_lora_that_the_reference_reads(tmp_path):
    model = pl.attach(build("llama"), pl.DyLoRA, "q_proj|down_proj", name="a", r=4, alpha=6)
    for seed, a in enumerate(pl.adapters(model)["a"].values()):
        shake(a, 0.2, seed=seed)
    whole = logits(model, "llama")
    for b in (2, 4):
        cut(pl.adapters(model)["a"].values(), b)
        want = logits(model, "llama")
        assert torch.equal(want, whole) == (b == 4)
        pl.save_adapter(model, tmp_path, name="a")
        read = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
        torch.testing.assert_close(logits(read, "llama"), want, **CLOSE)
        assert read.peft_config["default"].r == b
    with pytest.raises(ValueError, match="b=5 is not in 1…4"):
        cut(pl.adapters(model)["a"].values(), 5)


# --------------------------------------------------------------------------------------------------------------- OSF


def leaked(U: torch.Tensor, V: torch.Tensor, W: torch.Tensor, n: int) -> float:
    """The largest part of a column of U, or a row of V, along the n directions of W that should stay."""
    left, _, right = torch.linalg.svd(W.double(), full_matrices=False)
    return max((left[:, :n].T @ U.double()).abs().max().item(), (V.double() @ right[:n].T).abs().max().item())


def test_osf_stays_orthogonal_to_what_it_keeps_and_the_reference_does_not():
    """Ten steps of AdamW. The gradients are projected in both; Adam's step is not along its gradient."""
    ours = pl.attach(build("llama"), pl.OSF, "q_proj|down_proj", name="a", effective_rank=8)
    theirs = peft.get_peft_model(
        build("llama"), peft.OSFConfig(effective_rank=8, target_modules=["q_proj", "down_proj"]))  # fmt: skip
    train(ours, 10)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], 1e-2, weight_decay=0)
    for step in range(10):
        backward(theirs, seed=step).backward()
        optimizer.step()
        optimizer.zero_grad()
    for path, a in pl.adapters(ours)["a"].items():
        W = a.layer.weight
        assert leaked(a.U_low.detach(), a.V_low.detach(), W, 8) < 1e-5
        assert (a.U_low - a.U_start).abs().max() > 1e-2, "it did learn"
        low = theirs.base_model.model.get_submodule(path).osf_svd_params["default"]
        assert leaked(low["U_low"].detach(), low["V_low"].detach(), W, 8) > 1e-2, "mended there"
        # what the kept directions do is untouched: W′ᵀ·u and W′·v are W's
        change = (a.U_low * a.S_low) @ a.V_low - (a.U_start * a.S_start) @ a.V_start
        assert (a.U_high.T @ change).abs().max() < 1e-4 and (change @ a.V_high.T).abs().max() < 1e-4


def test_osf_with_plain_gradient_descent_needs_no_help():
    model = pl.attach(build("llama"), pl.OSF, "q_proj|down_proj", name="a", effective_rank=8)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for step in range(5):
        backward(model, seed=step).backward()
        optimizer.step()
        optimizer.zero_grad()
    for a in pl.adapters(model)["a"].values():
        assert leaked(a.U_low.detach(), a.V_low.detach(), a.layer.weight, 8) < 1e-5
        assert not torch.equal(a.U_low, a.U_start)


def test_osf_reads_ranks_that_differ_between_layers(tmp_path):
    config = peft.OSFConfig(effective_rank=0.5, rank_pattern={"down_proj": 20, r"\.1\.": 5},
                            target_modules=["q_proj", "down_proj"])  # fmt: skip
    theirs = peft.get_peft_model(build("llama"), config).eval()
    for seed, p in enumerate(p for p in theirs.parameters() if p.requires_grad):
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = pl.load_adapter(build("llama"), tmp_path / "theirs", name="a")
    torch.testing.assert_close(logits(ours, "llama"), logits(theirs, "llama"), **CLOSE)
    assert [a.hyper["effective_rank"] for a in pl.adapters(ours)["a"].values()] == [0.5, 20, 5, 20]
    pl.save_adapter(ours, tmp_path / "ours", name="a")
    again = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again, "llama"), logits(ours, "llama"), **CLOSE)


# ------------------------------------------------------------------------------------------------------------ counts


@pytest.mark.parametrize("name", PAIRS)
def test_the_closed_formula_is_the_count(name):
    counted = pl.count(adapted("llama", PAIRS[name], moved=False))
    assert counted.trainable == counted.expected["a"] > 0
    on_meta = pl.count("llama-3.2-3b", PAIRS[name].ours, TARGETS["llama"], **PAIRS[name].hyper)
    assert on_meta.trainable == on_meta.expected["default"]


@pytest.mark.parametrize(("method", "hyper", "said"), [
    ("AdaLoRA", dict(r=4), "target_r=8 must be in 1…4"),
    ("AdaLoRA", dict(beta1=1.0), "beta1=1.0"),
    ("DyLoRA", dict(r=0), "rank r=0"),
    ("OSF", dict(effective_rank=32), "keeps 32 of 32"),
    ("OSF", dict(effective_rank=0.01), "keeps 0 of 32"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(method, hyper, said):
    check_refused(said, method, "q_proj", **hyper)


def test_adalora_refuses_a_schedule_that_is_longer_than_the_training():
    model = pl.attach(build("llama"), pl.AdaLoRA, "q_proj", tinit=5, tfinal=5)
    with pytest.raises(ValueError, match="tinit=5 and tfinal=5 leave none of the 10 steps"):
        train(model, 10)

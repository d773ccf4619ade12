"""Optimizers that know adapters: beside the reference step for step, their papers' laws, and killed runs that go on."""

from __future__ import annotations

import copy
from itertools import pairwise

import peft
import peft.optimizers
import pytest
import torch
from families import VOCABULARY, build, inputs, labels
from torch import nn

import peftlab as pl
from peftlab.optim import (
    OPTIMIZERS,
    OLoRA,
    badam,
    galore,
    jagged,
    lisa,
    lora_fa,
    lora_plus,
    lora_pro,
    relora,
    riemannian,
)
from peftlab.optim._pairs import Pair, products
from peftlab.optim.galore import subspace
from peftlab.optim.lora_pro import nearest
from peftlab.optim.relora import prune

CLOSE = dict(rtol=1e-4, atol=1e-6)  # fp32, a few steps of Adam: the two libraries add in another order
HOW = {  # name -> (whether it is for full fine-tuning, its arguments for the tiny model)
    "lora_plus": (False, dict(lr=3e-3, ratio=4)),
    "lora_fa": (False, dict(lr=1e-2)),
    "riemannian": (False, dict(lr=1e-2)),
    "lora_pro": (False, dict(lr=1e-2)),
    "galore": (True, dict(lr=1e-2, r=4, every=2)),
    "lisa": (True, dict(lr=1e-2, blocks=1, every=2)),
    "badam": (True, dict(lr=1e-2, every=2)),
    "relora": (False, dict(lr=1e-2, every=2, r=2)),
}
each = pytest.mark.parametrize("name", OPTIMIZERS)


def adapted(spread: float = 0.0, r: int = 4) -> nn.Module:
    """A tiny Llama with a LoRA on two kinds of layers; `spread` moves B off zero."""
    torch.manual_seed(0)
    model = pl.attach(build("llama"), pl.LoRA, "q_proj|down_proj", r=r, alpha=2 * r)
    for B in (pair.B for pair in products(model)):
        B.data += spread * torch.randn(B.shape)
    return model


def of(name: str) -> tuple[nn.Module, object]:
    """A fresh model, and the optimizer's function for it."""
    full, hyper = HOW[name]
    model = pl.full_finetuning(build("llama")) if full else adapted()
    return model, OPTIMIZERS[name](model, **hyper)


def rows(n: int = 8, seed: int = 1) -> list[dict]:
    draw = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(2, VOCABULARY, (9,), generator=draw).tolist()} for _ in range(n)]


def settings(**more) -> dict:
    return dict(steps=6, batch_size=4, schedule="constant", warmup=0.0, progress=False) | more


def backward(model: nn.Module) -> float:
    batch = inputs("llama")
    loss = model(**batch, labels=labels("llama", batch)).loss
    loss.backward()
    return loss.item()


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------------ in the house's loop


@each
def test_it_learns_and_leaves_the_model_as_it_found_it(name):
    model, optimizer = of(name)
    before = [n for n, p in model.named_parameters() if p.requires_grad]
    log = pl.train(model, rows(), optimizer=optimizer, **settings(steps=24))
    assert log.losses[-1] < log.losses[0] - 0.05
    assert [n for n, p in model.named_parameters() if p.requires_grad] == before
    assert all(p.grad is None for p in model.parameters())


@each
def test_a_killed_run_goes_on_with_the_same_losses(name, tmp_path):
    """Stopped at an odd step, so that choices that are made every two steps are in the middle."""
    model, optimizer = of(name)
    whole = pl.train(model, rows(), optimizer=optimizer, **settings())
    end = trained(model)
    first, optimizer = of(name)
    want = settings(checkpoint=tmp_path)
    del want["progress"]
    for log in pl.train_steps(first, rows(), optimizer=optimizer, **want):
        if len(log) == 3:
            break
    again, optimizer = of(name)
    log = pl.train(again, rows(), optimizer=optimizer, progress=False, **want)
    assert log.losses == whole.losses, "bit for bit"
    assert all(torch.equal(p, end[n]) for n, p in trained(again).items())


@each
def test_a_closure_and_a_model_without_what_it_needs_are_refused(name):
    model, make = of(name)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    if name != "lora_plus":  # which changes no gradient
        with pytest.raises(ValueError, match="closure"):
            optimizer.step(lambda: 0.0)
    with pytest.raises(ValueError, match="attach|trained"):
        OPTIMIZERS[name](build("llama").requires_grad_(False), **HOW[name][1])([])


@each
def test_bfloat16_parameters_are_trained(name):
    """Inverses and singular vectors exist in float32 only; the moments are the parameters' own kind."""
    model, make = of(name)
    model.to(torch.bfloat16)
    before, optimizer = trained(model), make([p for p in model.parameters() if p.requires_grad])
    for _ in range(3):
        assert backward(model) < 20
        optimizer.step()
        optimizer.zero_grad()
    assert any(not torch.equal(p, before[n]) for n, p in trained(model).items() if n in before)
    assert all(torch.isfinite(p).all() and p.dtype == torch.bfloat16 for p in model.parameters())
    kept = [t for state in optimizer.state.values() for key, t in state.items() if key != "step"]
    assert kept and all(t.dtype == torch.bfloat16 for t in kept)


@each
def test_parameters_besides_its_own_are_trained_too(name):
    """A norm that is trained with the LoRAs; of full fine-tuning, the embeddings."""
    model, make = of(name)
    norm = model.model.norm.weight.requires_grad_(True)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    before = norm.detach().clone()
    for _ in range(1 if name != "badam" else 6):  # BAdam comes to it in one of three periods of two steps
        backward(model)
        optimizer.step()
    assert not torch.equal(norm, before)


# ------------------------------------------------------------------------------------------- beside the reference


def theirs_of(ours: nn.Module, **config) -> nn.Module:
    """The reference's LoRA with the same values."""
    model = peft.get_peft_model(
        build("llama"), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], **config)
    ).eval()
    for path, a in pl.adapters(ours)["default"].items():
        for name in ("lora_A", "lora_B"):
            model.get_parameter(f"base_model.model.{path}.{name}.default.weight").data.copy_(getattr(a, name))
    return model


def side_by_side(ours, theirs, optimizer, other, steps: int = 5) -> None:
    for _ in range(steps):
        assert abs(backward(ours) - backward(theirs)) < 1e-5
        for one in (optimizer, other):
            one.step()
            one.zero_grad()
        for model in (ours, theirs):
            model.zero_grad()
        for path, a in pl.adapters(ours)["default"].items():
            for name in ("lora_A", "lora_B"):
                theirs_p = theirs.get_parameter(f"base_model.model.{path}.{name}.default.weight")
                torch.testing.assert_close(getattr(a, name), theirs_p, **CLOSE)


def parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.reference("lora_plus", "peft.optimizers.create_loraplus_optimizer")
@pytest.mark.parametrize(("ratio", "decay"), [(16, 0.0), (4, 0.1)])
def test_lora_plus_is_the_reference(ratio, decay):
    ours = adapted(0.1)
    theirs = theirs_of(ours)
    other = peft.optimizers.create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=ratio, loraplus_weight_decay=decay
    )
    side_by_side(ours, theirs, lora_plus(ours, 1e-3, ratio, decay)(parameters(ours)), other)


@pytest.mark.reference("lora_fa", "peft.optimizers.create_lorafa_optimizer")
@pytest.mark.parametrize(("rslora", "start"), [(False, 0.1), (True, 0.0)])
def test_lora_fa_is_the_reference_without_its_rounding(rslora, start, monkeypatch):
    """Adam's ε is added before the bias is corrected there and after it here, so both are nearly zero in this test."""
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)
    ours = adapted(start)
    if rslora:
        for pair in pl.adapters(ours)["default"].values():
            pair.scaling = 8 / 4**0.5
    theirs = theirs_of(ours, use_rslora=rslora)
    other = peft.optimizers.create_lorafa_optimizer(theirs, r=4, lora_alpha=8, lr=1e-3)
    optimizer = lora_fa(ours, 1e-3)(parameters(ours))
    optimizer.param_groups[0]["eps"] = other.param_groups[0]["eps"] = 1e-30
    A = [pair.A.detach().clone() for pair in products(ours)]
    side_by_side(ours, theirs, optimizer, other)
    assert all(torch.equal(pair.A, a) for pair, a in zip(products(ours), A, strict=True))


def test_the_reference_rounds_lora_fas_gradients_to_bfloat16():
    """Two parts in a thousand of each, on float32 parameters: its moments show it after one step."""
    ours = adapted(0.1)
    theirs = theirs_of(ours)
    other = peft.optimizers.create_lorafa_optimizer(theirs, r=4, lora_alpha=8, lr=1e-3)
    optimizer = lora_fa(ours, 1e-3)(parameters(ours))
    for model, one in ((ours, optimizer), (theirs, other)):
        backward(model)
        one.step()
    worst = 0.0
    for path, a in pl.adapters(ours)["default"].items():
        exact = optimizer.state[a.lora_B]["exp_avg"]
        rounded = other.state[f"base_model.model.{path}.lora"]["exp_avg_B"]
        worst = max(worst, ((rounded - exact).norm() / exact.norm()).item())
    assert 5e-4 < worst < 2e-2, "mended there: compare without replacing is_bf16_available"


@pytest.mark.reference("riemannian", "peft.optimizers.create_riemannian_optimizer")
@pytest.mark.parametrize(("reg", "start"), [(1e-2, 0.3), (1e-4, 0.3), (1e-2, 0.0)])
def test_riemannian_is_the_reference(reg, start):
    ours = adapted(start)
    theirs = theirs_of(ours)
    other = peft.optimizers.create_riemannian_optimizer(theirs, torch.optim.AdamW, lr=1e-3, reg=reg, weight_decay=0.1)
    side_by_side(ours, theirs, riemannian(ours, 1e-3, reg, 0.1)(parameters(ours)), other)


# --------------------------------------------------------------------------------------------------- laws of LoRA's


def single(out: int = 7, in_: int = 6, r: int = 3, spread: float = 1.0):
    """(model, adapter, G): one adapted layer with gradients of a loss whose gradient for W is G (out, in)."""
    model = pl.attach(nn.Sequential(nn.Linear(in_, out, bias=False)).double(), pl.LoRA, "0", r=r, alpha=2 * r)
    (adapter,) = pl.adapters(model)["default"].values()
    adapter.double()
    adapter.lora_B.data += spread * torch.randn(out, r).double()
    G = torch.randn(out, in_).double()
    (G * model(torch.eye(in_).double()).T).sum().backward()
    return model, adapter, G


def pair_of(adapter) -> Pair:
    return Pair(adapter.lora_A, adapter.lora_B, adapter.scaling)


@pytest.fixture
def no_adam(monkeypatch):
    """Optimizers only correct the gradients."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)


def test_lora_fas_step_of_w_is_the_gradient_projected_on_the_rows_of_a(no_adam):
    model, adapter, G = single()
    lora_fa(model, 1.0)(parameters(model)).step()
    A = adapter.lora_A.detach()
    moved = adapter.scaling * adapter.lora_B.grad @ A
    torch.testing.assert_close(moved, G @ A.T @ torch.linalg.inv(A @ A.T) @ A, rtol=1e-4, atol=1e-5)  # float32 inside


@pytest.mark.parametrize("packed", [False, True])
def test_with_a_frozen_a_layer_keeps_its_thin_product_and_not_its_input(packed):
    """What the paper is about. The gradients that are left are the same."""
    kept, grads = {}, {}
    for frozen in (False, True):
        torch.manual_seed(0)
        model = pl.attach(nn.Sequential(nn.Linear(256, 64).requires_grad_(False)), pl.LoRA, "0", r=4)
        model = pl.quantize(model) if packed else model
        (adapter,) = pl.adapters(model)["default"].values()
        adapter.lora_B.data.normal_()
        if frozen:
            lora_fa(model, 1e-3)
        x, shapes = torch.randn(2, 5, 256, requires_grad=True), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=shapes: to.append(t.shape) or t, lambda t: t):
            y = model(x)
        kept[frozen] = (x.shape in shapes, (2, 5, 4) in [tuple(shape) for shape in shapes])
        grads[frozen] = torch.autograd.grad(y.square().sum(), [x, adapter.lora_B])
    assert kept == {False: (True, True), True: (False, True)}
    assert all(map(torch.equal, grads[False], grads[True]))


def test_riemannian_does_not_care_how_a_and_b_share_their_product(no_adam):
    def moved(balance: torch.Tensor, make) -> torch.Tensor:
        torch.manual_seed(3)
        model, adapter, G = single()
        adapter.lora_A.data = balance @ adapter.lora_A.data
        adapter.lora_B.data = adapter.lora_B.data @ torch.linalg.inv(balance)
        model.zero_grad()
        (G * model(torch.eye(6).double()).T).sum().backward()
        make(model)(parameters(model)).step()
        A, B = adapter.lora_A, adapter.lora_B
        return (B.grad @ A + B @ A.grad).detach()

    M = torch.tensor([[5.0, 1, 0], [0, 0.2, 1], [1, 0, 1]]).double()
    one = moved(torch.eye(3).double(), lambda model: riemannian(model, 1.0, 1e-12))
    other = moved(M, lambda model: riemannian(model, 1.0, 1e-12))
    torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-8)
    plain = [moved(b, lambda model: lora_plus(model, 1.0, 1)) for b in (torch.eye(3).double(), M)]
    assert (plain[0] - plain[1]).norm() > plain[0].norm(), "plain gradients do care"


def test_lora_pro_moves_w_as_near_to_the_gradient_as_a_and_b_can():
    """Against least squares over all (g_A, g_B); and of all that move W alike, it moves A and B least."""
    _, adapter, G = single()
    A, B, s = pair = pair_of(adapter)
    g_A, g_B = nearest(pair, A.grad, B.grad)
    moved = s * (B @ g_A + g_B @ A)
    A, B = A.detach(), B.detach()
    # vec(s·B·g_A + s·g_B·A) as a matrix on all the numbers of g_A and g_B
    eye = torch.eye(7).double()
    wide = torch.cat([torch.kron(s * B, eye[:6, :6].contiguous()), torch.kron(eye, s * A.T.contiguous())], 1)
    best = wide @ torch.linalg.lstsq(wide, G.reshape(-1, 1), driver="gelsd").solution
    torch.testing.assert_close(moved.detach().reshape(-1), best[:, 0], rtol=1e-5, atol=1e-6)  # the damping is 1e-8

    def far(X):
        return (g_A + X @ A - adapter.lora_A.grad).norm() ** 2 + (g_B - B @ X - adapter.lora_B.grad).norm() ** 2

    for seed in range(5):
        X = 1e-3 * torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)).double()
        torch.testing.assert_close(s * (B @ (g_A + X @ A) + (g_B - B @ X) @ A), moved)
        assert far(X) > far(0 * X)


def test_lora_pro_at_full_rank_is_full_fine_tuning():
    """One small step of A and B moves W by Adam's step of W's own gradient, up to η²."""
    lr, moved = 1e-5, {}
    for first in (True, False):
        torch.manual_seed(0)
        model, adapter, G = single(6, 6, 6)
        if first:
            before = adapter.lora_B.detach() @ adapter.lora_A.detach()
            lora_pro(model, lr)(parameters(model)).step()
            moved[first] = adapter.scaling * (adapter.lora_B.detach() @ adapter.lora_A.detach() - before)
        else:
            W = nn.Parameter(torch.zeros(6, 6).double())
            W.grad = G
            torch.optim.AdamW([W], lr, weight_decay=0).step()
            moved[first] = W.detach()
    assert (moved[True] - moved[False]).abs().max() < 0.05 * lr


def test_lora_pro_begins_at_b_zero_and_keeps_moments_of_w():
    model, adapter, _ = single(spread=0.0)
    optimizer = lora_pro(model, 1e-2)(parameters(model))
    A = adapter.lora_A.detach().clone()
    optimizer.step()
    assert torch.equal(adapter.lora_A, A) and torch.isfinite(adapter.lora_B).all() and adapter.lora_B.any()
    assert {t.shape for t in optimizer.state[adapter.lora_B].values()} == {torch.Size([]), torch.Size([7, 6])}
    with pytest.raises(ValueError, match="DoRA is more than s·B·A"):
        lora_pro(pl.attach(build("llama"), pl.DoRA, "q_proj", r=2), 1e-2)


# ------------------------------------------------------------------------------------------------- full fine-tuning


@pytest.mark.parametrize(("m", "n"), [(5, 9), (9, 5), (6, 6)])
def test_galore_is_adam_in_the_leading_singular_vectors(m, n):
    """Three steps by hand, with a new subspace before the third; both ways around."""
    model = nn.Sequential(nn.Linear(n, m, bias=False)).double()
    W, r, lr = model[0].weight, 2, 1e-2
    optimizer = galore(model, lr, r=r, every=2, scale=0.5)([W])
    want, mean, square = W.detach().clone(), 0.0, 0.0
    for t in (1, 2, 3):
        G = torch.randn(m, n, generator=torch.Generator().manual_seed(t)).double()
        before = W.detach().clone()
        W.grad = G.clone()
        optimizer.step()
        if t in (1, 3):
            U, _, Vt = torch.linalg.svd(G)
            leading = U[:, :r] if m < n else Vt[:r].T
            P = optimizer.state[W]["P"] if m < n else optimizer.state[W]["P"].T  # a singular vector has two signs
            torch.testing.assert_close(P @ P.T, leading @ leading.T, rtol=0, atol=1e-5)  # found in float32
        R = P.T @ G if m < n else G @ P
        mean, square = 0.9 * mean + 0.1 * R, 0.999 * square + 0.001 * R**2
        N = mean / (1 - 0.9**t) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
        want -= lr * 0.5 * (P @ N if m < n else N @ P.T)
        assert torch.linalg.matrix_rank(W.detach() - before, rtol=1e-6) == r
        torch.testing.assert_close(W.detach(), want)


def test_galore_moves_in_all_directions_and_keeps_little():
    """Table 1 of the paper: m·r + 2·n·r numbers for an m×n weight, m ≤ n; embeddings and norms keep Adam's two."""
    model = pl.full_finetuning(build("llama"))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = galore(model, 1e-2, r=4, every=1)(parameters(model))
    for seed in range(3):
        batch = inputs("llama", seed=seed)
        model(**batch, labels=labels("llama", batch)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    linear = [name for name, p in before.items() if "_proj" in name]
    for name, p in model.named_parameters():
        m, n = sorted(p.shape) if p.ndim == 2 else (0, 0)
        kept = sum(t.numel() for t in optimizer.state[p].values()) - 1  # without the step
        assert kept == (4 * m + 2 * 4 * n if name in linear else 2 * p.numel())
        if name in linear:
            assert torch.linalg.matrix_rank(p.detach() - before[name], rtol=1e-4) == 12
    G = torch.randn(5, 8)
    U, S, Vt = torch.linalg.svd(G)
    P = subspace(G, 2)
    assert abs((G - P @ P.T @ G).norm() ** 2 - (S[2:] ** 2).sum()) < 1e-4, "no other subspace of rank 2 loses less"
    with pytest.raises(ValueError, match="both sides above r=64"):
        galore(model, 1e-2, r=64)(parameters(model))
    with pytest.raises(ValueError, match="at least 1"):
        galore(model, 1e-2, every=0)


def deep(layers: int = 4) -> nn.Module:
    import transformers as t

    torch.manual_seed(0)
    return pl.full_finetuning(t.LlamaForCausalLM(t.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=32, pad_token_id=0)))  # fmt: skip


def moved_blocks(model: nn.Module, before: dict) -> set:
    """Numbers of the blocks that changed, and "outside"."""
    return {int(n.split(".")[2]) if ".layers." in n else "outside" for n, p in model.named_parameters()
            if not torch.equal(p, before[n])}  # fmt: skip


def test_badam_trains_one_block_at_a_time_and_keeps_no_others_moments():
    model = deep()
    optimizer = badam(model, 1e-2, every=2, seed=1)(parameters(model))
    rounds = []
    for step in range(20):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        assert all(p.requires_grad == (p.grad is None and p in set(optimizer.param_groups[0]["params"]))
                   for p in model.parameters())  # fmt: skip
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        (block,) = moved_blocks(model, before)
        if step % 2 == 0:
            rounds.append(block)
            kept = {p for p, state in optimizer.state.items() if state}
            assert kept == {p for n, p in model.named_parameters() if not torch.equal(p, before[n])}
            assert all(optimizer.state[p]["step"] == 1 for p in kept), "moments begin at zero in each period"
    everything = {0, 1, 2, 3, "outside"}
    assert set(rounds[:5]) == set(rounds[5:]) == everything and rounds[:5] != rounds[5:]


def test_badam_is_adam_on_one_block_after_the_other():
    model, other = deep(2), deep(2)
    optimizer = badam(model, 1e-2, every=2, order="descending")(parameters(model))
    order = ["outside", 1, 0]
    for block in order:
        own = [p for n, p in other.named_parameters()
               if f"layers.{block}." in n or (block == "outside" and ".layers." not in n)]  # fmt: skip
        plain = torch.optim.AdamW(own, 1e-2, weight_decay=0)
        for _ in range(2):
            backward(model)
            backward(other)
            optimizer.step()
            plain.step()
            optimizer.zero_grad()
            other.zero_grad()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, **CLOSE, msg=name)
    with pytest.raises(ValueError, match="random, ascending, descending"):
        badam(model, 1e-2, order="up")
    with pytest.raises(ValueError, match="every=0"):
        badam(model, 1e-2, every=0)(parameters(pl.full_finetuning(model)))


def test_lisa_trains_the_ends_always_and_each_block_as_often():
    model = deep()
    optimizer = lisa(model, 1e-2, blocks=2, every=1)(parameters(model))
    counts = dict.fromkeys(range(4), 0)
    for _ in range(60):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
        moved = moved_blocks(model, before)
        assert "outside" in moved and len(moved) == 3
        for block in moved - {"outside"}:
            counts[block] += 1
    assert optimizer.state[model.lm_head.weight]["step"] == 60, "what is always trained keeps its moments"
    assert min(counts.values()) > 20, "30 each on average, of which one in 300 trials is below 21"
    with pytest.raises(ValueError, match="blocks=5 is not in 1…4"):
        lisa(model, 1e-2, blocks=5)(parameters(pl.full_finetuning(model)))


# --------------------------------------------------------------------------------------------------- ReLoRA, O-LoRA


def test_relora_is_merging_and_starting_again():
    """The paper's loop word for word: after T steps W ← W + s·B·A, a new A, B = 0, moments pruned; the same losses."""
    ours = adapted(r=6)
    optimizer = relora(ours, 1e-2, every=2, r=2, keep=0.25)(parameters(ours))
    torch.manual_seed(0)
    other = pl.attach(build("llama"), pl.LoRA, "q_proj|down_proj", r=2, alpha=4)
    fresh = {path: a.lora_A.detach().clone() for path, a in pl.adapters(ours)["default"].items()}
    there = pl.adapters(other)["default"]
    for path, a in there.items():
        a.lora_A.data = fresh[path][:2].clone()
    plain = torch.optim.AdamW(parameters(other), 1e-2, weight_decay=0)
    for step in range(6):
        if step in (2, 4):
            for path, a in there.items():
                a.layer.weight.data += a.scaling * a.lora_B.data @ a.lora_A.data
                a.lora_A.data.copy_(fresh[path][step : step + 2])
                a.lora_B.data.zero_()
                for p in (a.lora_A, a.lora_B):
                    for key in ("exp_avg", "exp_avg_sq"):
                        moment = plain.state[p][key]
                        border = moment.abs().flatten().sort(descending=True).values[moment.numel() // 4 - 1]
                        moment[moment.abs() < border] = 0
        assert abs(backward(ours) - backward(other)) < 1e-5
        for one in (optimizer, plain):
            one.step()
            one.zero_grad()
    for path, a in there.items():  # what was merged, and the pair at work
        mine = pl.adapters(ours)["default"][path]
        change = a.layer.weight + a.scaling * a.lora_B @ a.lora_A - mine.layer.weight
        torch.testing.assert_close(mine.scaling * mine.lora_B @ mine.lora_A, change, rtol=1e-3, atol=2e-3)
        assert torch.linalg.matrix_rank(change.detach().double(), rtol=1e-4) > 2
    assert {tuple(optimizer.state[p]["exp_avg"].shape) for p in parameters(ours)} == {(2, 32), (32, 2), (2, 64)}
    with pytest.raises(ValueError, match="r=4 does not divide 6"):
        relora(ours, 1e-2, every=2, r=4)
    with pytest.raises(ValueError, match="every=0"):
        relora(ours, 1e-2, every=0, r=2)


def test_moments_are_pruned_by_size():
    moment = torch.tensor([[1.0, -5, 2, 0], [3, -4, 0.5, 0.1]])
    prune(moment, 0.3)
    assert moment.tolist() == [[0, -5, 0, 0], [3, -4, 0, 0]]
    prune(moment, 1.0)
    assert moment.count_nonzero() == 3


def test_the_jagged_schedule_falls_to_zero_at_each_restart():
    rate, cosine = jagged(4, warmup=0.2), lambda p: 0.5 * (1 + torch.cos(torch.tensor(torch.pi * p)).item())
    assert [rate(i / 4) for i in range(4)] == [0, 0, 0, 0]
    assert rate(0.25 + 0.1 / 4) == pytest.approx(0.5 * cosine(0.275))
    assert rate(0.25 + 0.2 / 4) == pytest.approx(cosine(0.3)) and rate(0.49) == pytest.approx(cosine(0.49))
    within = [rate(0.25 + i / 100) for i in range(5, 25)]
    assert all(a > b for a, b in pairwise(within))
    model = adapted()
    log = pl.train(model, rows(), optimizer=relora(model, 1e-2, every=3, r=2), **settings(schedule=jagged(2)))
    assert [round(x, 9) > 0 for x in log.learning_rates] == [False, True, True, False, True, True]


def test_o_lora_keeps_a_new_lora_away_from_the_old_ones_directions():
    model = adapted(0.1)
    pl.freeze(model, "default")
    pl.attach(model, pl.LoRA, "q_proj|down_proj", name="new", r=4)
    pl.activate(model, "default", "new")
    penalty = OLoRA(model, "new", ["default"], weight=0.5)
    old, new = pl.adapters(model)["default"], pl.adapters(model)["new"]
    by_hand = sum((old[p].lora_A[i] @ new[p].lora_A[j]) ** 2 for p in old for i in range(4) for j in range(4))
    assert penalty(model).item() == pytest.approx(0.5 * by_hand.item(), rel=1e-5)
    frozen = {p: (a.lora_A.clone(), a.lora_B.clone()) for p, a in old.items()}
    lost = {}
    for weight in (0.0, 50.0):
        twin = copy.deepcopy(model)
        pl.train(twin, rows(), lr=1e-2, penalty=OLoRA(twin, "new", ["default"], weight), **settings(steps=40))
        lost[weight] = OLoRA(twin, "new", ["default"], 1.0)(twin).item()
        for p, a in pl.adapters(twin)["default"].items():
            assert torch.equal(a.lora_A, frozen[p][0]) and torch.equal(a.lora_B, frozen[p][1])
    assert lost[50.0] < 0.01 * lost[0.0], "orthogonal, or nearly"
    with pytest.raises(ValueError, match="shares no layer"):
        OLoRA(model, "new", [])
    pl.attach(model, pl.IA3, name="scales")
    with pytest.raises(ValueError, match="'scales' is IA3"):
        OLoRA(model, "new", ["scales"])


@pytest.mark.parametrize(("make", "said"), [
    (lambda m: lora_plus(m, 1e-3, ratio=0), "must be positive"),
    (lambda m: riemannian(m, 1e-3, reg=0), "must be positive"),
    (lambda m: relora(m, 1e-3, every=1, r=2, keep=2), "fraction"),
    (lambda m: lora_fa(m, 1e-3)(parameters(adapted())), "pass the model that is trained"),
])  # fmt: skip
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make(adapted())

"""LoRA's variants: beside the reference, and what is their own."""

from __future__ import annotations

import parity
import peft
import pytest
import torch
from families import build, check_refused, inputs, shake
from parity import Pair, adapted, beside, check_reads_ours, check_reads_theirs, logits
from torch import nn

import peftlab as pl
from peftlab import hooks

LISTS = dict(bd_a=("down_proj", "output"), bd_b=("q_proj", "query", "intermediate"))


def blocks(N: int) -> peft.tuners.lora.BdLoraConfig:
    return peft.tuners.lora.BdLoraConfig(
        target_modules_bd_a=list(LISTS["bd_a"]), target_modules_bd_b=list(LISTS["bd_b"]), nblocks=N)  # fmt: skip


PAIRS = {
    "LoRA, bias": Pair("LoRA", peft.LoraConfig, dict(r=4, alpha=6, lora_bias=True),
                       dict(r=4, lora_alpha=6, lora_bias=True), conv1d=True, merges=False,
                       switched="lora_bias"),
    "DoRA": Pair("DoRA", peft.LoraConfig, dict(r=4, alpha=8), dict(r=4, lora_alpha=8, use_dora=True), conv1d=True),
    "DoRA, patterns": Pair(
        "DoRA", peft.LoraConfig, dict(r=2, alpha=3, rslora=True, rank_pattern={r".*\.1\..*": 5}),
        dict(r=2, lora_alpha=3, use_dora=True, use_rslora=True, rank_pattern={r".*\.1\..*": 5})),
    "BD-LoRA": Pair("BDLoRA", peft.LoraConfig, dict(r=4, alpha=8, nblocks=2, **LISTS),
                    dict(r=4, lora_alpha=8, use_bdlora=blocks(2))),
    "BD-LoRA, 4": Pair("BDLoRA", peft.LoraConfig, dict(r=8, alpha=8, rslora=True, nblocks=4, **LISTS),
                       dict(r=8, lora_alpha=8, use_rslora=True, use_bdlora=blocks(4))),
    "KaSA": Pair("KaSA", peft.LoraConfig, dict(r=4, alpha=8, beta=1e-3, gamma=1e-2),
                 dict(r=4, lora_alpha=8, kasa_config=peft.KasaConfig(beta=1e-3, gamma=1e-2))),
    "KaSA, rslora": Pair("KaSA", peft.LoraConfig, dict(r=2, alpha=3, rslora=True),
                         dict(r=2, lora_alpha=3, use_rslora=True, kasa_config=peft.KasaConfig()), moved=0.1),
    "MiCA": Pair("MiCA", peft.LoraConfig, dict(r=4, alpha=8),
                 dict(r=4, lora_alpha=8, init_lora_weights="mica"), conv1d=True),
    "MiCA, rslora": Pair("MiCA", peft.LoraConfig, dict(r=3, alpha=5, rslora=True),
                         dict(r=3, lora_alpha=5, use_rslora=True, init_lora_weights="mica")),
    # evaluated: the gradients of these two while training are compared below
    "VeLoRA": Pair("VeLoRA", peft.LoraConfig, dict(r=4, alpha=8, groups=4),
                   dict(r=4, lora_alpha=8, velora_config=peft.VeloraConfig(num_groups=4))),
    "MonteCLoRA": Pair("MonteCLoRA", peft.LoraConfig, dict(r=4, alpha=8, samples=5),
                       dict(r=4, lora_alpha=8, monteclora_config=peft.MontecloraConfig(num_samples=5)),
                       gradients=False),
    "aLoRA": Pair("ALoRA", peft.LoraConfig, dict(r=4, alpha=8, invocation=(87, 6)),
                  dict(r=4, lora_alpha=8, alora_invocation_tokens=[87, 6], task_type="CAUSAL_LM"),
                  conv1d=True, merges=False),
    "aLoRA, one": Pair("ALoRA", peft.LoraConfig, dict(r=4, alpha=8, invocation=(87,)),
                       dict(r=4, lora_alpha=8, alora_invocation_tokens=[87], task_type="CAUSAL_LM"), merges=False),
}  # fmt: skip
every = beside("pair", PAIRS.values(), PAIRS)
FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])


@pytest.fixture(autouse=True)
def rounding(request, monkeypatch):
    """The reference puts W₀ without its smallest singular components together again, from all others in float32."""
    params = getattr(request.node, "callspec", None)
    if params and "KaSA" in str(params.params.get("pair")):
        monkeypatch.setattr(parity, "CLOSE", dict(rtol=0, atol=4e-5))


def firsts(family: str, pair: Pair) -> None:
    """A method's first setting is compared on all three families, its others on the Llama."""
    first = next(p for p in PAIRS.values() if p.ours == pair.ours)
    if family != "llama" and pair is not first:
        pytest.skip("this setting is compared on the Llama")
    if family == "bert" and pair.ours == "ALoRA":
        pytest.skip("for models that write")


@every("writes")
@FAMILIES
def test_the_reference_reads_ours(family, pair, tmp_path):
    firsts(family, pair)
    check_reads_ours(family, pair, tmp_path)


@every("reads", "gradients")
@FAMILIES
def test_ours_reads_the_reference_with_its_count_and_gradients(family, pair, tmp_path):
    firsts(family, pair)
    check_reads_theirs(family, pair, tmp_path)


def one(method: str, out_features: int = 12, in_features: int = 16, bias: bool = False, moved: float = 0.3, **hyper):
    """(layer, adapter): one method on one frozen random layer, its parameters moved off their start."""
    torch.manual_seed(0)
    layer = nn.Linear(in_features, out_features, bias=bias).requires_grad_(False)
    model = pl.attach(nn.Sequential(layer), method, "0", name="a", **hyper)
    adapter = model[0].adapters["a"]
    shake(adapter, moved)
    return layer, adapter


def x_of(layer: nn.Module, rows: int = 5) -> torch.Tensor:
    return torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------- LoRA with a bias


def test_a_lora_with_a_bias_merges_where_the_reference_refuses_and_shares_a_mixed_batch():
    model = pl.attach(build("llama"), pl.LoRA, "q_proj|down_proj", name="a", r=4, lora_bias=True)
    pl.attach(model, pl.LoRA, "q_proj|down_proj", name="b", r=4)
    for seed, name in enumerate("ab"):
        for adapter in pl.adapters(model)[name].values():
            shake(adapter, 0.2, seed=seed)
    batch = inputs("llama", rows=2)
    with torch.no_grad(), pl.using(model, rows=["a", "b"]):
        mixed = model(**batch).logits
    for i, name in enumerate("ab"):
        with torch.no_grad(), pl.using(model, name):
            alone = model(batch["input_ids"][i : i + 1]).logits
        torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-5, atol=2e-5)
    pl.detach(model, "b")
    pl.activate(model, "a")
    want = logits(model, "llama")
    torch.testing.assert_close(logits(pl.merge(model), "llama"), want, rtol=1e-5, atol=2e-5)
    assert model.model.layers[0].self_attn.q_proj.layer.bias is not None
    theirs = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"], lora_bias=True))
    with pytest.raises(RuntimeError, match="no bias"):
        theirs.merge_and_unload()


# ------------------------------------------------------------------------------------------------------------ DoRA


def test_doras_rows_have_the_lengths_m_and_the_bias_is_left_alone():
    layer, dora = one("DoRA", bias=True, r=3)
    merged = dora.fold(layer.double())
    torch.testing.assert_close(merged.weight.norm(dim=1).float(), dora.m.detach().abs(), rtol=1e-5, atol=0)
    torch.testing.assert_close(merged.bias, layer.bias, rtol=0, atol=1e-12)


def test_doras_gradient_of_m_is_the_derivative_and_that_of_a_and_b_has_the_length_as_a_constant():
    """Section 4.3: ‖V‖ is not differentiated. A true derivative of B would be orthogonal to V in each row."""
    layer, dora = one("DoRA", r=3)
    x, g = x_of(layer), torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
    m, A, B = (p.detach().clone().requires_grad_() for p in (dora.m, dora.lora_A, dora.lora_B))
    V = layer.weight + dora.scaling * B @ A
    C = V.norm(dim=1)
    true = torch.autograd.grad((g * (x @ (m[:, None] * V / C[:, None]).T)).sum(), (m, A, B), retain_graph=True)
    constant = torch.autograd.grad((g * (x @ (m[:, None] * V / C.detach()[:, None]).T)).sum(), (m, A, B))
    ours = torch.autograd.grad((g * dora(layer, x)).sum(), (dora.m, dora.lora_A, dora.lora_B))
    torch.testing.assert_close(ours[0], true[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, constant, rtol=1e-5, atol=1e-5)
    assert (ours[2] - true[2]).abs().max() > 0.1


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_dora_starts_at_the_base_bit_for_bit_with_biases_too(family):
    model = build(family)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_()
    bare = logits(model, family)
    assert torch.equal(logits(pl.attach(model, "DoRA", r=4), family), bare)


# --------------------------------------------------------------------------------------------------------- BD-LoRA


@pytest.mark.parametrize("side", ["A", "B"])
def test_bd_lora_is_block_diagonal_and_each_shard_is_computed_alone(side):
    layer, bd = one("BDLoRA", r=6, nblocks=2, **{f"bd_{side.lower()}": ["0"]})
    A, B = bd.lora_A.detach(), bd.lora_B.detach()
    if side == "A":
        assert A.shape == (6, 8)
        A = torch.block_diag(*A.chunk(2))
    else:
        assert B.shape == (12, 3)
        B = torch.block_diag(*B.chunk(2))
    x = x_of(layer)
    with torch.no_grad():
        torch.testing.assert_close(bd.change(x), bd.scaling * x @ A.T @ B.T)
    for i in range(2):  # what GPU i has: its rows of A, its columns or rows of B, and x or its part of x
        rows = slice(3 * i, 3 * i + 3)
        if side == "A":
            z = x[:, 8 * i : 8 * i + 8] @ bd.lora_A[rows].T  # the sum over GPUs is the layer's own
            torch.testing.assert_close(z, x @ A[rows].T)
        else:
            y = bd.scaling * (x @ A[rows].T) @ bd.lora_B[6 * i : 6 * i + 6].T
            torch.testing.assert_close(y, bd.change(x)[:, 6 * i : 6 * i + 6])


def test_bd_loras_sides_are_those_of_tensor_parallel_layers():
    model = pl.attach(build("llama"), "BDLoRA", r=4)
    side = {path.rpartition(".")[2]: a.side for path, a in pl.adapters(model)["default"].items()}
    assert {n for n, s in side.items() if s == "A"} == {"o_proj", "down_proj"}
    assert {n for n, s in side.items() if s == "B"} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}


# --------------------------------------------------------------------------------------------------------- QA-LoRA


def test_qa_loras_change_is_constant_in_a_group_and_goes_into_the_zeros():
    """W packed as scale·code + zero, a pair for each output and group of 4 inputs: the codes stay as they are."""
    layer, qa = one("QALoRA", r=3, group_size=4)
    change = qa.fold(layer.double()).weight.float() - layer.weight.float()
    groups = change.unflatten(1, (4, 4))
    assert groups.abs().max() > 0.1
    torch.testing.assert_close(groups, groups[..., :1].expand_as(groups), rtol=0, atol=1e-6)

    W = layer.weight.float().unflatten(1, (4, 4))
    zero, top = W.amin(-1, keepdim=True), W.amax(-1, keepdim=True)
    scale = (top - zero) / 15
    code = ((W - zero) / scale).round()
    new_zero = zero + qa.scaling * (qa.lora_B @ qa.lora_A).detach()[..., None] * 16 / 4**2
    merged = (scale * code + new_zero).flatten(1)
    torch.testing.assert_close(merged, (scale * code + zero).flatten(1) + change, rtol=0, atol=1e-6)


@pytest.mark.reference("QALoRA", "outputs", "peft.tuners.lora.variants.QALoraLinearVariant.forward")
def test_qa_lora_computes_what_the_reference_does_which_is_not_the_papers_sum():
    """The reference has it on layers of GPTQ alone, so its function is called by itself. Algorithm 1 of the paper adds
    up a group, mean·g; the reference multiplies the mean by the number of groups: here 64/4² = 4 times as much."""
    from peft.tuners.lora.variants import QALoraLinearVariant

    layer, qa = one("QALoRA", in_features=64, r=3, alpha=5, group_size=4)
    theirs = nn.Module()
    theirs.lora_A = nn.ModuleDict({"a": nn.Linear(16, 3, bias=False)})
    theirs.lora_B = nn.ModuleDict({"a": nn.Linear(3, 12, bias=False)})
    theirs.lora_A["a"].weight.data, theirs.lora_B["a"].weight.data = qa.lora_A.data, qa.lora_B.data
    theirs.lora_dropout, theirs.in_features = {"a": nn.Identity()}, 64
    theirs.scaling, theirs.qalora_group_size = {"a": 5 / 3}, {"a": 4}
    x = x_of(layer).view(1, 5, 64)
    with torch.no_grad():
        want = QALoraLinearVariant.forward(theirs, "a", x, torch.zeros(1, 5, 12))
        torch.testing.assert_close(qa.change(x), want, rtol=1e-5, atol=1e-5)
        paper = 5 / 3 * x.unflatten(-1, (16, 4)).sum(-1) @ qa.lora_A.T @ qa.lora_B.T
        torch.testing.assert_close(qa.change(x), paper * 64 / 4**2, rtol=1e-5, atol=1e-5)


def test_qa_loras_groups_fit_all_targets_unless_they_are_given():
    model = pl.attach(nn.Sequential(nn.Linear(24, 8), nn.Linear(36, 8)), "QALoRA", "0|1", r=2)
    assert {a.hyper["group_size"] for a in pl.adapters(model)["default"].values()} == {12}


# ------------------------------------------------------------------------------------------------------------ KaSA


def test_kasa_drops_the_smallest_components_without_touching_the_base():
    layer, kasa = one("KaSA", moved=0, r=5)
    before = layer.weight.clone()
    x = x_of(layer)
    with torch.no_grad():
        y = kasa(layer, x)
    assert torch.equal(layer.weight, before)
    U, S, Vh = torch.linalg.svd(before)
    torch.testing.assert_close(y, x @ ((U[:, :7] * S[:7]) @ Vh[:7]).T, rtol=0, atol=1e-5)
    A, B, s = kasa.factors()
    torch.testing.assert_close(layer(x) + s * x @ A.T @ B.T, y, rtol=0, atol=1e-5)


def test_kasas_penalty_is_the_references():
    from peft.tuners.lora.variants import _kasa_layer_regularization_loss

    pair = PAIRS["KaSA"]
    model = adapted("llama", pair)
    config = peft.LoraConfig(target_modules=["q_proj"], **pair.theirs)
    theirs = peft.get_peft_model(build("llama"), config).base_model.model.model.layers[0].self_attn.q_proj
    ours = pl.adapters(model)["a"]["model.layers.0.self_attn.q_proj"]
    theirs.lora_A["default"].weight.data, theirs.lora_B["default"].weight.data = ours.lora_A.data, ours.lora_B.data
    theirs.lora_diag["default"].data = ours.d.data
    torch.testing.assert_close(ours.penalty(), _kasa_layer_regularization_loss(theirs, "default", 1e-3, 1e-2))


def test_the_references_kasa_has_another_base_for_ever():
    before = logits(build("llama"), "llama")
    theirs = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"], **PAIRS["KaSA"].theirs))
    with theirs.disable_adapter():
        assert (logits(theirs.eval(), "llama") - before).abs().max() > 0.1
    model = adapted("llama", PAIRS["KaSA"])
    with pl.using(model):
        assert torch.equal(logits(model, "llama"), before)


# ------------------------------------------------------------------------------------------------------------ MiCA


def test_mica_writes_where_the_weight_writes_least():
    layer, mica = one("MiCA", r=4)
    U, S, Vh = torch.linalg.svd(layer.weight)
    B, change = mica.lora_B, mica.fold(layer.double()).weight.float() - layer.weight.float()
    torch.testing.assert_close(B.T @ B, torch.eye(4), rtol=0, atol=1e-5)
    torch.testing.assert_close((B.T @ layer.weight.float()).norm(dim=1), S[-4:], rtol=1e-4, atol=1e-5)
    assert change.abs().max() > 0.1
    torch.testing.assert_close(B @ B.T @ change, change, rtol=0, atol=1e-5)
    assert [n for n, p in mica.named_parameters()] == ["lora_A"]


def test_mica_does_not_change_the_references_base():
    """Its file fits the original base, unlike those of PiSSA, OLoRA, CorDA and LoRA-GA, which are refused."""
    bare = build("llama")
    theirs = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="mica"))
    weight = theirs.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert torch.equal(weight, bare.model.layers[0].self_attn.q_proj.weight)


# ---------------------------------------------------------------------------------------------------------- VeLoRA


@pytest.mark.parametrize("start", ["batch_average", "batch_average_once", "random"])
def test_veloras_gradients_are_the_references(start):
    """In three groups of 16 features, which do not divide: the last is filled up."""
    from peft.tuners.lora.velora import VeloraFunction

    layer, velora = one("VeLoRA", r=3, groups=3, scale=1.5, start=start)
    velora.train()
    for seed in range(2):  # of the second batch only "batch_average" takes another v
        x = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        velora.zero_grad()
        y = velora(layer, x)
        got = torch.autograd.grad((y * y).sum(), (velora.lora_A, velora.lora_B, x))
        if start != "random" and (seed == 0 or start == "batch_average"):
            mean = torch.nn.functional.pad(x.detach(), (0, 2)).view(-1, 6).mean(0)
            v = mean / mean.norm()
        elif seed == 0:
            v = velora.v.clone()
        A, B = velora.lora_A.detach().requires_grad_(), velora.lora_B.detach().requires_grad_()
        again = layer(x) + velora.scaling * VeloraFunction.apply(x, A, None, v, 3, 1.5) @ B.T
        want = torch.autograd.grad((again * again).sum(), (A, B, x))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(velora.v, v)


def test_velora_keeps_a_number_for_each_group_and_is_exact_where_the_tokens_lie_along_v():
    layer, velora = one("VeLoRA", in_features=64, r=3, groups=4)
    plain = pl.LoRA(layer, r=3)
    plain.load_state_dict({"lora_A": velora.lora_A, "lora_B": velora.lora_B})
    v = torch.randn(16, generator=torch.Generator().manual_seed(3)).abs()
    x = (torch.rand(7, 4, 1, generator=torch.Generator().manual_seed(4)) * v).flatten(1)  # groups: multiples of v
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = velora.train()(layer, x)
    assert not any(t.shape[-1] == 64 and len(t) == 7 for t in kept), "x is kept after all"
    assert any(t.shape == (7, 4) for t in kept)
    want = torch.autograd.grad((plain(layer, x) ** 2).sum(), plain.lora_A)[0]
    torch.testing.assert_close(torch.autograd.grad((y**2).sum(), velora.lora_A)[0], want, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ MonteCLoRA


def test_monteclora_is_lora_but_for_its_noise_while_training():
    """The noise of a row has mean 0 and variance ε²·E[v]·E[Σw²]; v has the mean r of a χ² with r degrees of freedom."""
    layer, monte = one("MonteCLoRA", out_features=40, in_features=200, r=6, samples=3, noise=0.1, moved=0)
    with torch.no_grad():
        monte.s.zero_()
        monte.c.fill_(20.0)  # a Dirichlet of exp(20) is 1/n, 1/n, 1/n
        assert torch.equal(monte.eval().factors()[0], monte.lora_A)
        noise = torch.stack([monte.sampled() - monte.lora_A for _ in range(300)])
    assert noise.mean().abs() < 4 * 0.1 * (6 / 3) ** 0.5 / noise.numel() ** 0.5  # four standard errors
    per_row = noise.square().mean(-1)  # ε²·v/n of 300·6 draws of v
    v = per_row * 3 / 0.1**2
    assert abs(v.mean() - 6) < 0.4 and abs(v.var() - 2 * 6) < 3, "χ² with r degrees of freedom: mean r, variance 2r"


def test_montecloras_penalty_is_the_divergence_and_the_references_dirichlet_one_is_none():
    from peft.tuners.lora.monteclora import MontecloraSampler
    from torch.distributions import Dirichlet, Normal, kl_divergence

    _, monte = one("MonteCLoRA", r=4, samples=5, kl=1.0, prior=0.7)
    with torch.no_grad():
        a = monte.c.exp()
        KL_w = kl_divergence(Dirichlet(a), Dirichlet(torch.full_like(a, 0.7)))
        KL_v = 4 / 2 * ((2 * monte.s).exp() - 2 * monte.s - 1).sum()
        v = (2 * monte.s).exp() * torch.randn(200_000, 4, 4).square().sum(-1)
        KL_Z = 5 * kl_divergence(Normal(0.0, v.sqrt()), Normal(0.0, 1.0)).sum(1).mean()
        before = monte.penalty()
        torch.testing.assert_close(before, KL_w + KL_v + KL_Z, rtol=0.02, atol=0)  # KL_Z is a mean over draws
        monte.c += torch.tensor([1.0, -0.9, 0.8, 0.4, 0.1])
        change = kl_divergence(Dirichlet(monte.c.exp()), Dirichlet(torch.full_like(a, 0.7))) - KL_w
        assert change.abs() > 0.1
        torch.testing.assert_close(monte.penalty() - before, change, rtol=1e-3, atol=1e-4)

        theirs = MontecloraSampler(in_features=16, out_features=4, num_samples=5, dirichlet_prior=3.0, buffer_size=1,
                                   device="cpu")  # fmt: skip
        assert theirs.dirichlet_kl(torch.full((5,), 1.0)) < -1, "mended there: a divergence is never below zero"


def test_monteclora_pays_its_share_of_a_mean_over_layers():
    model = adapted("llama", PAIRS["MonteCLoRA"], moved=False)
    found = list(pl.adapters(model)["a"].values())
    assert len(found) == 4 and all(a.layers == 4 for a in found)


# ----------------------------------------------------------------------------------------------------------- aLoRA


def invoked(**hyper) -> nn.Module:
    model = pl.attach(build("llama"), "ALoRA", "q_proj|v_proj|down_proj", name="a", invocation=(87, 6), **hyper)
    for seed, adapter in enumerate(pl.adapters(model)["a"].values()):
        shake(adapter, 0.2, seed=seed)
    return model


def test_alora_before_the_last_invocation_is_the_base_bit_for_bit():
    model, bare = invoked(), logits(build("llama"), "llama")
    got = logits(model, "llama")  # row 1 begins 87, 6, 87, 6; no other row has them
    assert torch.equal(got[[0, 2]], bare[[0, 2]]) and torch.equal(got[1, :2], bare[1, :2])
    assert ((got[1, 2:] - bare[1, 2:]).abs().amax(-1) > 0.01).all()


def test_alora_goes_on_from_the_bases_cache():
    """The point of the method: a text that the base has read is not read again."""
    model = invoked()
    text, rest = torch.randint(2, 80, (2, 11)), torch.tensor([[87, 6, 30, 31], [87, 6, 40, 41]])
    with torch.no_grad():
        whole = model(torch.cat([text, rest], 1)).logits[:, 11:]
        with pl.using(model):
            cache = model(text).past_key_values
        got = model(rest[:, :3], past_key_values=cache)
        last = model(rest[:, 3:], past_key_values=got.past_key_values)  # the cache knows that it was invoked
    torch.testing.assert_close(torch.cat([got.logits, last.logits], 1), whole, rtol=0, atol=2e-5)


def test_alora_generates_with_a_cache_what_it_generates_without():
    model = invoked()
    ids = torch.tensor([[5, 9, 87, 6, 30], [5, 9, 7, 6, 30]])
    settings = dict(max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids))
    cached = model.generate(ids, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))
    with pl.using(model):
        base = model.generate(ids, **settings)
    assert torch.equal(cached[1], base[1]) and not torch.equal(cached[0], base[0])


def test_alora_needs_the_tokens_and_a_model_that_writes():
    model = invoked()
    host = next(h for h in pl.hosts(model).values() if isinstance(h.layer, nn.Linear))
    x = x_of(host.layer)
    assert torch.equal(host(x), host.layer(x)), "a layer by itself sees no tokens, so nothing is invoked"
    with pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="encoder"):
        pl.attach(build("t5"), "ALoRA", "q", invocation=(5,))


# --------------------------------------------------------------------------------------------- what training asks


def test_training_adds_the_penalties_and_remembers_veloras_vectors():
    model = adapted("llama", PAIRS["KaSA"])
    terms = [a.penalty() for a in pl.adapters(model)["a"].values()]
    torch.testing.assert_close(hooks.penalty(hooks.learning(model)), sum(terms))
    model = adapted("llama", PAIRS["VeLoRA"]).train()
    model(**inputs("llama"))
    kept = hooks.memory(hooks.learning(model))
    assert len(kept) == len(pl.adapters(model)["a"]) and all(v.norm() > 0.99 for v in kept.values())


# ------------------------------------------------------------------------------------------------------ bad inputs


@pytest.mark.parametrize(("method", "hyper", "said"), [
    ("DoRA", dict(r=33), "1…32"),
    ("BDLoRA", dict(r=3, nblocks=2), "divide r=3"),
    ("BDLoRA", dict(r=4, nblocks=4, bd_a=["q_proj"], bd_b=["q_"]), "in both"),
    ("BDLoRA", dict(bd_a=["o_proj"]), "in none"),
    ("QALoRA", dict(group_size=5), "does not divide the layer's 32 inputs"),
    ("KaSA", dict(r=32), "drop all"),
    ("MiCA", dict(r=0), "1…32"),
    ("VeLoRA", dict(groups=33), "1…32 groups"),
    ("VeLoRA", dict(start="mean"), "batch_average_once"),
    ("MonteCLoRA", dict(samples=0), "at least one sample"),
    ("ALoRA", dict(), "invocation"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_by_name_and_nothing_is_attached(method, hyper, said):
    check_refused(said, method, "q_proj", **hyper)

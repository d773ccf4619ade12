"""OFT, BOFT, HRA, PSOFT, ETHER, ETHER+, GOFT, qGOFT, SSVD and CLOVER: beside the reference, and what is their own."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from families import build, check_refused, inputs, shake
from parity import Pair, beside, check_reads_ours, check_reads_theirs, dense, logits
from test_papers import agrees
from torch import nn

import peftlab as pl
from peftlab.methods._givens import givens
from peftlab.methods._rotations import cayley, neumann, skew

NEUMANN, CAYLEY = dict(oft_block_size=16, r=0), dict(oft_block_size=0, r=2, use_cayley_neumann=False)
PAIRS = {
    "OFT": Pair("OFT", peft.OFTConfig, NEUMANN, moved=0.1),
    "OFT by Cayley": Pair("OFT", peft.OFTConfig, CAYLEY),
    "OFT, one block": Pair("OFT", peft.OFTConfig, dict(oft_block_size=8, block_share=True, num_cayley_neumann_terms=7)),
    "OFT, short series": Pair("OFT", peft.OFTConfig, dict(oft_block_size=8, num_cayley_neumann_terms=2), moved=0.1),
    "OFT, constrained": Pair("OFT", peft.OFTConfig, dict(coft=True, eps=0.5, **NEUMANN)),
    "BOFT, one factor": Pair("BOFT", peft.BOFTConfig, dict(boft_block_size=4, boft_n_butterfly_factor=1)),
    "BOFT": Pair("BOFT", peft.BOFTConfig, dict(boft_block_size=4, boft_n_butterfly_factor=3)),
    "BOFT, eight blocks": Pair("BOFT", peft.BOFTConfig, dict(boft_block_size=0, boft_block_num=8,
                                                             boft_n_butterfly_factor=2)),
    "HRA": Pair("HRA", peft.HRAConfig, dict(r=6)),
    "HRA, odd": Pair("HRA", peft.HRAConfig, dict(r=3)),
    "HRA, at right angles": Pair("HRA", peft.HRAConfig, dict(r=4, apply_GS=True)),
    "PSOFT": Pair("PSOFT", peft.PsoftConfig, dict(r=8), dict(r=8, psoft_alpha=7)),  # α cancels, so we have none
    "PSOFT, else": Pair("PSOFT", peft.PsoftConfig, dict(
        r=6, psoft_svd="lowrank", psoft_svd_lowrank_niter=3, random_seed=5, ab_svd_init="pissa_init",
        use_cayley_neumann=True, num_cayley_neumann_terms=6, cayley_neumann_eps=0.6)),
    "PSOFT, free": Pair("PSOFT", peft.PsoftConfig, dict(r=5, psoft_orth=False, psoft_mag_a=False)),
}  # fmt: skip
CASES = [("llama", name) for name in PAIRS] + [("bert", name) for name in ("OFT", "BOFT", "HRA", "PSOFT")]
every = beside("family, name", CASES, PAIRS)
quiet = pytest.mark.filterwarnings("ignore:The cayley-neumann", "ignore:`num_cayley", "ignore:The symmetric")


@pytest.fixture(autouse=True)
def butterflies(monkeypatch):
    """The reference's one CUDA kernel, block-diagonal matrices from their blocks, in three lines of Python: without it
    the reference has one butterfly factor whatever is asked, see below."""

    class Python:
        @staticmethod
        def apply(blocks):
            return torch.stack([torch.block_diag(*factor) for factor in blocks])

    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: "there")
    monkeypatch.setattr("peft.tuners.boft.layer.FastBlockDiag", Python)


@every("writes")
@quiet
def test_the_reference_reads_ours(family, name, tmp_path):
    check_reads_ours(family, PAIRS[name], tmp_path)


@every("reads", "gradients")
@quiet
def test_ours_reads_the_reference_with_its_count_and_gradients(family, name, tmp_path):
    check_reads_theirs(family, PAIRS[name], tmp_path)


@quiet
@pytest.mark.parametrize(("asked", "sizes"), [
    (dict(oft_block_size=50), {32, 64}), (dict(oft_block_size=0, r=3), {16, 32}),
])  # fmt: skip
def test_a_size_that_the_reference_replaced_is_read_from_its_tensors(asked, sizes, tmp_path):
    """It takes the nearest divisor, with a warning, and its file says what was asked; we refuse such a size."""
    config = peft.OFTConfig(target_modules=["q_proj", "down_proj"], init_weights=False, **asked)
    with pytest.warns(UserWarning, match="Adjusted"):
        theirs = peft.get_peft_model(build("llama"), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = pl.load_adapter(build("llama"), tmp_path / "theirs", name="a")
    torch.testing.assert_close(logits(model, "llama"), logits(theirs, "llama"), rtol=0, atol=1e-5)
    assert {adapter.b for _, adapter in parts(model)} == sizes
    if "r" in asked:  # two blocks everywhere
        again = pl.load_adapter(build("llama"), pl.save_adapter(model, tmp_path / "ours", name="a"))
        assert torch.equal(logits(again, "llama"), logits(model, "llama"))
    else:
        with pytest.raises(ValueError, match="oft_block_size differs between layers"):
            pl.save_adapter(model, tmp_path / "ours", name="a")


def attached(method: str, moved: float = 0.2, **hyper) -> nn.Module:
    model = pl.attach(build("llama"), method, "q_proj|down_proj", name="a", **hyper)
    for seed, adapter in enumerate(pl.adapters(model)["a"].values()):
        shake(adapter, moved, seed=seed)
    return model


def parts(model: nn.Module):
    return pl.adapters(model)["a"].items()


def input_map(adapter) -> torch.Tensor:
    """M (in, in) of what a method does to the input, x·M."""
    seen: list[torch.Tensor] = []
    layer = copy.deepcopy(adapter.layer).double()
    with torch.no_grad():
        adapter.double()(lambda x: seen.append(x) or layer(x), eye(layer.in_features))
    return seen[0]


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-10) -> None:  # float64: sums of some hundred terms
    torch.testing.assert_close(a, b.to(a), rtol=0, atol=atol)


def eye(n: int) -> torch.Tensor:
    return torch.eye(n, dtype=torch.double)


ROTATIONS = {
    "OFT": dict(use_cayley_neumann=False), "BOFT": dict(boft_n_butterfly_factor=3), "HRA": dict(r=6), "GOFT": {},
    "ETHER": {}, "HRA, at right angles": dict(r=5, apply_GS=True),
}  # fmt: skip


@pytest.mark.parametrize("name", ROTATIONS)
def test_what_it_learns_is_orthogonal(name):
    """… so that the weights' rows keep their lengths and the angles between each other."""
    model = attached(name.partition(",")[0], **ROTATIONS[name])
    for _, adapter in parts(model):
        W = adapter.layer.weight.detach().double()
        M = input_map(adapter)
        close(M @ M.T, eye(len(M)))
        assert (M - eye(len(M))).abs().max() > 0.1
        close((W @ M.T) @ (W @ M.T).T, W @ W.T)
        reflections = {"ETHER": 4, "HRA, at right angles": 5}.get(name, 0)
        close(torch.linalg.det(M), torch.tensor(-1.0) ** reflections)


def test_the_series_comes_nearer_to_cayleys_rotation_with_each_term():
    Q = skew(0.03 * torch.randn(3, 28, generator=torch.Generator().manual_seed(0), dtype=torch.double), 8)
    norm = torch.linalg.matrix_norm(Q, 2).max()
    errors = [torch.linalg.matrix_norm(neumann(Q, t) - cayley(Q), 2).max() for t in (4, 5, 6, 8, 12)]
    for t, error in zip((4, 5, 6, 8, 12), errors, strict=True):  # what is cut off: Qᵗ⁻¹ + 2Qᵗ + …
        assert error <= norm ** (t - 1) * (1 + norm) / (1 - norm)
    assert errors == sorted(errors, reverse=True)
    close(neumann(Q, 5), eye(8) + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q)


def test_constrained_oft_stays_near_and_its_gradient_passes():
    model = attached("OFT", oft_block_size=16, coft=True, eps=0.3)
    for path, adapter in parts(model):
        bound = 0.3 / len(adapter.oft_R) ** 0.5
        norms = skew(adapter.held(), 16).flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, torch.full_like(norms, bound))
        adapter.held().sum().backward()
        assert (adapter.oft_R.grad == 1).all()
        held = adapter.held().detach()
        type(adapter).stepped({path: adapter}, 1, 1)
        torch.testing.assert_close(adapter.oft_R.detach(), held)
        adapter.oft_R.data.mul_(0.5)  # inside of it nothing is held
        torch.testing.assert_close(adapter.held(), adapter.oft_R)


@pytest.mark.parametrize("method", ["OFT", "BOFT"])
def test_dropout_leaves_out_whole_blocks_in_training_alone(method):
    hyper = dict(oft_block_size=4, module_dropout=0.5) if method == "OFT" else dict(boft_dropout=0.5)
    (_, adapter), *_ = parts(attached(method, **hyper))
    whole, nothing = adapter.eval().rotations(), torch.eye(4)
    torch.manual_seed(0)
    dropped = adapter.train().rotations()
    gone, kept = ((dropped - other).abs().amax((-1, -2)) < 1e-6 for other in (nothing, whole))
    assert (gone ^ kept).all() and gone.any() and kept.any()
    if method == "BOFT":  # of one factor
        assert gone.any(-1).sum() == 1
    assert torch.equal(adapter.eval().rotations(), whole)


def blocks_of_butterfly(A: torch.Tensor, i: int) -> torch.Tensor:
    """B̃ᵢ (in, in), i from 1, by its entries: half-blocks j and j + 2ⁱ⁻¹ of a group of 2ⁱ are turned together."""
    n, b, _ = A.shape
    Q = (A - A.mT) / 2
    turns = torch.linalg.inv(eye(b) + Q) @ (eye(b) - Q)
    dense_factor = torch.zeros(n * b, n * b, dtype=torch.double)
    half, apart = b // 2, 2 ** (i - 1)
    for k, turn in enumerate(turns):
        first = (k // apart * 2 * apart + k % apart) * half
        places = torch.cat([torch.arange(half) + first, torch.arange(half) + first + apart * half])
        dense_factor[places[:, None], places] = turn
    return dense_factor


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_boft_is_the_product_of_the_papers_factors_and_mixes_twice_as_much_with_each(m):
    model = attached("BOFT", boft_block_size=4, boft_n_butterfly_factor=m)
    (_, adapter), *_ = parts(model)
    A = adapter.boft_R.detach().double()
    R = eye(32)
    for i in range(1, m + 1):
        R = blocks_of_butterfly(A[i - 1], i) @ R
    with torch.no_grad():
        close(adapter.double().rotated(eye(32)), R)
    assert ((R.abs() > 1e-9).sum(0) == 4 * 2 ** (m - 1)).all()  # inputs that one output sees: 32 of 32 at m = 4


def test_boft_scales_the_weight_and_not_the_bias():
    layer = nn.Linear(8, 5)
    adapter = pl.BOFT(layer, boft_block_size=2)
    adapter.boft_s.data.mul_(3)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(adapter(layer, x), 3 * (layer(x) - layer.bias) + layer.bias)


def test_pairs_of_reflections_are_multiplied_as_the_papers_chain():
    (_, adapter), *_ = parts(attached("HRA", r=7))
    H = eye(32)
    for u in nn.functional.normalize(adapter.hra_u.detach().double(), dim=0).T:
        H = H @ (eye(32) - 2 * torch.outer(u, u))
    close(input_map(adapter), H.T)  # rows: x·Hᵀ
    changed = torch.linalg.matrix_rank(input_map(adapter) - eye(32), rtol=1e-9)
    assert changed == 7, "the identity plus a matrix of rank r"


@pytest.mark.parametrize("strict", [False, True])
def test_ssvd_keeps_the_outputs_directions_and_is_orthogonal_to_first_order(strict):
    for _, adapter in parts(attached("SSVD", k=6, strict=strict, moved=0.02)):
        adapter.double()
        W, G = adapter.layer.weight.detach().double(), adapter.rotation().detach()
        K = skew(adapter.K.detach(), 6)
        close(G, (eye(6) - K) @ torch.linalg.inv(eye(6) + K) if strict else eye(6) - 2 * K, 1e-12)
        close(G.T @ G, eye(6) if strict else eye(6) - 4 * K @ K, 1e-12)
        A, B, s = adapter.factors()
        changed = W + s * B.detach() @ A.detach()
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        S[:6] += adapter.sigma.detach()
        if strict:  # the singular values are those that were learned, the left vectors as they were
            close(changed @ changed.T, U @ torch.diag(S**2) @ U.T, 1e-4)  # U of the adapter: float32
        close(changed @ Vt[6:].T, W @ Vt[6:].T, 1e-4)


def test_psoft_turns_the_principal_subspace_and_nothing_else():
    model = attached("PSOFT", r=6, psoft_mag_a=False, psoft_mag_b=False)
    for path, change in dense(model).items():
        W = pl.adapters(model)["a"][path].layer.weight.detach()
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        rest = U[:, 6:] * S[6:] @ Vt[6:]
        before, after = W - rest, W + change - rest
        assert change.abs().max() > 0.1
        close(after @ after.T, before @ before.T, 1e-4)  # float32, entries of order 10: lengths and angles of the rows
        close(change @ Vt[6:].T, torch.zeros(len(W), len(Vt) - 6), 1e-5)


def test_a_file_of_psoft_means_the_signs_that_the_svd_chose():
    """The reference's files too: neither holds A and B. A pair of singular vectors with both signs changed is as good
    a singular pair, and another adapter."""
    model = attached("PSOFT", r=6)
    before = logits(model, "llama")
    for _, adapter in parts(model):
        assert not {"A", "B"} & set(adapter.state_dict())
        product = adapter.B @ adapter.A
        adapter.A[0] *= -1
        adapter.B[:, 0] *= -1
        torch.testing.assert_close(adapter.B @ adapter.A, product)
    assert (logits(model, "llama") - before).abs().max() > 0.05


def test_ether_is_always_as_far_from_the_base_and_ether_plus_never_further():
    for scale in (0.0, 0.1, 100.0):
        (_, adapter), *_ = parts(attached("ETHER", n=4, moved=scale))
        H = input_map(adapter)
        close(H, H.T)
        for i in range(4):
            piece = slice(8 * i, 8 * i + 8)
            close(torch.linalg.matrix_norm(H[piece, piece] - eye(8)), torch.tensor(2.0))
        assert not H[:8, 8:].any()
        (_, plus), *_ = parts(attached("ETHERPlus", n=2, moved=scale))
        H = input_map(plus)
        for i in range(2):
            piece = slice(16 * i, 16 * i + 16)
            distance = torch.linalg.matrix_norm(H[piece, piece] - eye(16))
            assert distance <= 2 and (scale == 0.0 or distance > 0.1)


def test_ether_plus_turns_the_weight_on_both_sides_and_not_the_bias():
    layer = nn.Linear(8, 12)
    adapter = pl.ETHERPlus(layer, n=2)
    shake(adapter, 0.5)

    def H(side):
        u, v = (nn.functional.normalize(getattr(adapter, f"{a}_{side}").detach(), dim=1) for a in "uv")
        return torch.block_diag(*(torch.eye(len(a)) - torch.outer(a, a) + torch.outer(b, b)
                                  for a, b in zip(u, v, strict=True)))  # fmt: skip

    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    want = x @ (H("out") @ layer.weight @ H("in")).T + layer.bias
    torch.testing.assert_close(adapter(layer, x), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("d", [2, 7, 32])
def test_givens_steps_are_the_papers_product(d):
    """Equation 3: Pᵣ has the rotations G(2ʳk, 2ʳ⁻¹(2k + 1)), counted from 0."""
    G = torch.randn(d - 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    P, used, r = eye(d), 0, 1
    while 2 ** (r - 1) < d:
        for k in range(d):
            i, j = 2**r * k, 2 ** (r - 1) * (2 * k + 1)
            if j < d:
                one = eye(d)
                one[[[i], [j]], [i, j]] = G[used]
                P, used = P @ one, used + 1
        r += 1
    assert used == d - 1
    close(givens(eye(d), G), P)


def test_goft_takes_any_vector_to_any_of_its_length():
    """Theorem 4.1, for one where all lies in feature 0: each angle takes the second of a pair to nothing."""
    adapter = pl.GOFT(nn.Linear(13, 3)).double()
    x = torch.randn(13, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    alive, angles = x, []
    while len(alive) > 1:
        pairs = alive[: len(alive) // 2 * 2].view(-1, 2)
        angles.append(torch.atan2(pairs[:, 1], pairs[:, 0]))
        alive = torch.cat([pairs.norm(dim=1), alive[2 * len(pairs) :]])
    adapter.theta.data = torch.cat(angles)
    turned = adapter(lambda x: x, x[None]).detach()[0]
    close(turned, x.norm() * eye(13)[0])


def test_qgoft_is_goft_where_its_matrices_are_rotations_and_pays_for_what_is_not():
    goft, qgoft = pl.GOFT(nn.Linear(16, 3)), pl.QGOFT(nn.Linear(16, 3), penalty_weight=0.5)
    assert qgoft.penalty() == 0
    shake(goft, 1.0)
    qgoft.G.data = goft.matrices().detach()
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(qgoft(lambda x: x, x), goft(lambda x: x, x))
    assert qgoft.penalty() < 1e-10
    qgoft.G.data *= 3  # lengths are free
    assert qgoft.penalty() < 1e-10
    qgoft.G.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat(15, 1, 1)  # columns (1, 3) and (2, 4)
    assert qgoft.penalty().item() == 0.5 * 15 * 14**2


DEBERTA = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]  # (out, in) of the linear layers of a layer of DeBERTaV3-base


@pytest.mark.parametrize(("method", "printed"), [
    ("GOFT", "0.08M"), ("QGOFT", "0.33M"),  # Ma et al. 2024, table 1
    ("ETHERPlus", "0.33M"),  # Bini et al. 2024, table 4
])  # fmt: skip
def test_published_counts_on_deberta(method, printed):
    count = 12 * sum(pl.METHODS[method].size(*shape) for shape in DEBERTA)
    assert agrees(printed, count, 1)


@pytest.mark.parametrize(("method", "hyper", "printed"), [
    ("ETHER", dict(n=32), "0.26M"), ("ETHERPlus", dict(n=32), "1.04M"),  # Bini et al. 2024, table 5
    ("HRA", dict(r=8), "0.03%"), ("HRA", dict(r=16), "0.06%"), ("HRA", dict(r=32), "0.12%"),  # Yuan et al. 2024, fig. 1
])  # fmt: skip
def test_published_counts_on_llama_2(method, hyper, printed):
    c = pl.count("llama-2-7b", method, targets="q_proj|v_proj", **hyper)
    assert c.expected["default"] == c.trainable and agrees(printed, c.trainable, c.total - c.trainable)


def test_clover_gives_a_head_new_combinations_of_its_own_directions():
    for _, adapter in parts(attached("CLOVER", d=8, moved=0.5)):
        layer = copy.deepcopy(adapter.layer).double()
        W = layer.weight.detach().unflatten(0, (-1, 8))
        T = torch.linalg.inv(adapter.inverse.double())
        V = adapter.inverse.double() @ W
        close(V @ V.mT, eye(8).expand(len(V), 8, 8), 1e-5)  # the inverse is kept in float32
        with torch.no_grad():
            changed = adapter.double()(layer, eye(layer.in_features)).T.unflatten(0, (-1, 8))
        close(changed, (T + adapter.S.detach()) @ V, 1e-4)
        assert (torch.linalg.matrix_rank(changed - W, rtol=1e-9) == 8).all(), "of full rank"


def test_clover_keeps_the_bias_and_bears_heads_without_weight():
    layer = nn.Linear(6, 8)
    layer.weight.data[0] = 0  # a row without weight has no direction
    adapter = pl.CLOVER(layer, d=4)
    adapter.S.data.normal_(generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(adapter.inverse).all() and not adapter.inverse[0, 0].abs().max() > 1e-6
    torch.testing.assert_close(adapter(layer, torch.zeros(1, 6)), layer.bias[None])


def test_clovers_published_count_on_llama_2():
    """0.83%, and "the learnable parameters match LoRA with rank 32", section 4.2: to the last one."""
    size = pl.CLOVER.size
    count = 32 * (2 * size(4096, 4096, d=128) + size(11008, 4096, d=64))
    lora = pl.count("llama-2-7b", "LoRA", targets="q_proj|k_proj|v_proj|up_proj|down_proj", r=32)
    assert count == lora.trainable == 56_098_816 and agrees("0.83%", count, lora.total - count)


OURS = {"OFT": {}, "BOFT": {}, "HRA": {}, "PSOFT": dict(r=8), "ETHER": {}, "ETHERPlus": {}, "GOFT": {}, "QGOFT": {},
        "SSVD": dict(k=8), "CLOVER": dict(d=16)}  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_on_gpt2s_transposed_layers_with_their_biases_it_merges_and_shows(name):
    """The reference has none of them there, though it takes fan_in_fan_out."""
    model = pl.attach(build("gpt2"), name, "c_attn|c_fc", name="a", **OURS[name])
    for seed, (_, adapter) in enumerate(parts(model)):
        adapter.layer.bias.data.normal_(generator=torch.Generator().manual_seed(seed))
        shake(adapter, 0.2, seed=seed)
    with pl.using(model):
        bare = logits(model, "gpt2")
    want = logits(model, "gpt2")
    assert (want - bare).abs().max() > 0.05
    torch.testing.assert_close(logits(pl.merge(model), "gpt2"), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", OURS)
def test_without_weights_it_is_counted(name):
    c = pl.count("gpt2", name, **OURS[name])
    assert c.expected["default"] == c.trainable > 0


# What is different or wrong in the reference, peft 0.21.2


@quiet
def test_the_reference_merges_two_ofts_in_another_order_than_it_runs_them():
    config = peft.OFTConfig(oft_block_size=8, target_modules=["q_proj"])
    theirs = peft.get_peft_model(build("llama"), config, adapter_name="a")
    theirs.add_adapter("b", config)
    theirs.base_model.set_adapter(["a", "b"])
    for seed, module in enumerate(m for n, m in theirs.named_modules() if n.endswith(("oft_R.a", "oft_R.b"))):
        shake(module, 0.2, seed=seed)
    ran = logits(theirs.eval(), "llama")
    merged = logits(theirs.merge_and_unload(), "llama")
    assert (merged - ran).abs().max() > 0.1, "mended there"  # ours: laws 3 and 4


@quiet
def test_the_reference_turns_the_other_way_by_cayley():
    from peft.tuners.oft.layer import OFTRotationModule

    w = 0.02 * torch.randn(3, 28, generator=torch.Generator().manual_seed(0))
    module = OFTRotationModule(3, 28, 8, 24)
    exact, series = (module._cayley_batch(w, 8, by_series, 9) for by_series in (False, True))
    torch.testing.assert_close(exact.mT, series, rtol=0, atol=1e-5)  # ‖Q‖ is 0.1: the series is exact
    assert (exact - series).abs().max() > 0.1
    assert torch.equal(module._cayley_batch(w, 8, True, 3), module._cayley_batch(w, 8, True, 4))


@quiet
def test_the_reference_never_drops_a_block_of_oft():
    config = peft.OFTConfig(oft_block_size=8, module_dropout=0.9, target_modules=["q_proj"], init_weights=False)
    theirs = peft.get_peft_model(build("llama"), config)
    batch = inputs("llama")
    with torch.no_grad():
        assert torch.equal(theirs.train()(**batch).logits, theirs.eval()(**batch).logits)


def test_the_reference_has_one_butterfly_factor_without_its_cuda_extension(monkeypatch):
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)  # as on any CPU
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3, target_modules=["q_proj"])
    theirs = peft.get_peft_model(build("llama"), config)
    shapes = {tuple(p.shape) for n, p in theirs.named_parameters() if "boft_R" in n}
    assert shapes == {(1, 8, 4, 4)}
    assert {a.boft_R.shape[0] for _, a in parts(attached("BOFT", boft_n_butterfly_factor=3))} == {3}


def test_the_reference_starts_at_rounding_errors_with_planes_at_right_angles():
    """Its planes start equal in pairs; what Gram–Schmidt leaves of the second is noise, blown up to length one."""
    config = peft.HRAConfig(r=4, apply_GS=True, target_modules=["q_proj"])
    torch.manual_seed(0)
    layer = peft.get_peft_model(build("llama"), config).base_model.model.model.layers[0].self_attn.q_proj
    before = layer.get_delta_weight("default")
    layer.hra_u.default.data *= 1 + 1e-6 * torch.rand(layer.hra_u.default.shape)
    after = layer.get_delta_weight("default")
    assert not (after - before).abs().max() < 0.1  # far away, or not a number
    (_, adapter), *_ = parts(attached("HRA", r=4, apply_GS=True, moved=0.0))
    before = input_map(adapter)
    adapter.hra_u.data *= 1 + 1e-6
    close(input_map(adapter), before, 1e-5)


@pytest.mark.parametrize(("method", "hyper", "said"), [
    ("OFT", dict(oft_block_size=5), "2, 4, 8, 16, 32 do"),
    ("OFT", dict(oft_block_size=8, r=4), "not both"),
    ("OFT", dict(r=32), "blocks of 1"),
    ("OFT", dict(num_cayley_neumann_terms=1), "take 2 or more"),
    ("OFT", dict(module_dropout=1.0), "module_dropout=1.0"),
    ("BOFT", dict(boft_block_size=8, boft_n_butterfly_factor=4), "multiple of 8 blocks"),
    ("BOFT", dict(boft_block_size=1), "blocks of 1"),
    ("BOFT", dict(boft_dropout=-0.1), "boft_dropout=-0.1"),
    ("HRA", dict(r=0), "r=0 is not in 1…32"),
    ("HRA", dict(r=33, apply_GS=True), "right angles"),
    ("PSOFT", dict(r=33), "take a smaller one"),
    ("PSOFT", dict(ab_svd_init="svd"), "neither 'psoft_init'"),
    ("PSOFT", dict(psoft_svd="fast"), "'fast' is neither"),
    ("ETHER", dict(n=3), "3 does not divide the width 32"),
    ("ETHERPlus", dict(n=32), "blocks of 1"),
    ("QGOFT", dict(penalty_weight=-1), "penalty_weight=-1"),
    ("SSVD", dict(k=0), "rank 0 is not in 1…32"),
    ("CLOVER", dict(d=6), "6 does not divide the width 32"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_by_name_and_nothing_is_attached(method, hyper, said):
    check_refused(said, method, "q_proj", **hyper)


def test_sizes_that_are_not_given_fit_all_targets():
    model = nn.Sequential(nn.Linear(96, 40), nn.Linear(40, 3))
    pl.attach(model, pl.OFT, "0|1", name="a")
    assert {a.hyper["oft_block_size"] for a in pl.adapters(model)["a"].values()} == {8}
    with pytest.raises(ValueError, match="no block size from 2 to 32"):
        pl.attach(nn.Sequential(nn.Linear(37, 37)), pl.OFT, "0")

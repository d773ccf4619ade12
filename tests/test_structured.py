"""Structured changes beside the reference, and the law of each: Kronecker products, tiles, blocks, waves, wavelets."""

from __future__ import annotations

import importlib.util
import math
import sys
import types

import numpy as np
import peft
import pytest
import torch
from families import build, check_refused, shake
from parity import Pair, adapted, beside, check_reads_ours, check_reads_theirs, dense
from torch import nn

import peftlab as pl
from peftlab.layers import weight_of
from peftlab.methods._filters import low_pass
from peftlab.methods._kmeans import ROUNDS, SEED, kmeans
from peftlab.methods._wavelets import inverse
from peftlab.methods.lokr import factored

PAIRS = {
    "LoKr": Pair("LoKr", peft.LoKrConfig, dict(r=2, alpha=6), moved=0.4),
    "LoKr, factor 4": Pair("LoKr", peft.LoKrConfig, dict(r=1, alpha=2, factor=4, decompose_both=True),
                           dict(r=1, alpha=2, decompose_factor=4, decompose_both=True), 0.7),
    "LoKr, full": Pair("LoKr", peft.LoKrConfig, dict(r=8, alpha=8, factor=8), dict(r=8, alpha=8, decompose_factor=8),
                       0.4),
    "LoKr, patterns": Pair("LoKr", peft.LoKrConfig, dict(r=2, alpha=6, rank_pattern={r".*\.1\..*": 1},
                                                         alpha_pattern={r".*\.0\..*": 3}), moved=0.3),
    "DeLoRA": Pair("DeLoRA", peft.DeloraConfig, dict(r=4, strength=3), dict(r=4, delora_lambda=3)),
    "DeLoRA, dropout": Pair("DeLoRA", peft.DeloraConfig, dict(r=3, strength=2, dropout=0.2),
                            dict(r=3, delora_lambda=2, module_dropout=0.2)),
    "MiSS": Pair("MiSS", peft.MissConfig, dict(r=8)),
    "MiSS, r that does not divide": Pair("MiSS", peft.MissConfig, dict(r=7, dropout=0.1), dict(r=7, miss_dropout=0.1)),
    "MiSS, bat": Pair("MiSS", peft.MissConfig, dict(r=8, variant="bat"), dict(r=8, init_weights="bat")),
    "MiSS, mini": Pair("MiSS", peft.MissConfig, dict(r=8, variant="mini", mini_r=4),
                       dict(r=8, init_weights="mini", mini_r=4)),
    "FourierFT": Pair("FourierFT", peft.FourierFTConfig, dict(n=100, scaling=50.0),
                      dict(n_frequency=100, scaling=50.0), conv1d=True),
    "FourierFT, seed": Pair("FourierFT", peft.FourierFTConfig, dict(n=30, scaling=90.0, seed=3),
                            dict(n_frequency=30, scaling=90.0, random_loc_seed=3), conv1d=True),
    "WaveFT": Pair("WaveFT", peft.WaveFTConfig, dict(n=200, scaling=2.0), dict(n_frequency=200, scaling=2.0),
                   conv1d=True),
    "WaveFT, db4": Pair("WaveFT", peft.WaveFTConfig, dict(n=200, scaling=2.0, wavelet="db4", seed=5),
                        dict(n_frequency=200, scaling=2.0, wavelet_family="db4", random_loc_seed=5), conv1d=True),
    "WaveFT, sym5": Pair("WaveFT", peft.WaveFTConfig, dict(n=200, scaling=2.0, wavelet="sym5"),
                         dict(n_frequency=200, scaling=2.0, wavelet_family="sym5"), conv1d=True),
    "WaveFT, no transform": Pair("WaveFT", peft.WaveFTConfig, dict(n=200, scaling=1.0, use_idwt=False),
                                 dict(n_frequency=200, scaling=1.0, use_idwt=False), conv1d=True),
    "GraLoRA": Pair("GraLoRA", peft.GraloraConfig, dict(r=4, alpha=4), conv1d=True),
    "GraLoRA, hybrid": Pair("GraLoRA", peft.GraloraConfig, dict(r=8, k=4, hybrid_r=3, alpha=6, dropout=0.1),
                            dict(r=8, gralora_k=4, hybrid_r=3, alpha=6, gralora_dropout=0.1), conv1d=True),
    "GLoRA": Pair("GLoRA", peft.GloraConfig, dict(r=3), moved=0.3),
    "GLoRA, vectors": Pair("GLoRA", peft.GloraConfig, dict(ab="vector", c="vector", de="vector"),
                           dict(config_A_B="vector", config_C="vector", config_D_E="vector")),
    "GLoRA, constants": Pair("GLoRA", peft.GloraConfig, dict(ab="constant", c="none"),
                             dict(config_A_B="constant", config_C="none")),
    "PEANuT": Pair("PEANuT", peft.PeanutConfig, dict(r=4, scaling=0.5)),
    "PEANuT, depth 2": Pair("PEANuT", peft.PeanutConfig, dict(r=4, depth=2, activation="silu"),
                            dict(r=4, depth=2, act_fn="silu")),
    "DEFT": Pair("DEFT", peft.DeftConfig, dict(r=4), conv1d=True),
    "DEFT, qr": Pair("DEFT", peft.DeftConfig, dict(r=4, kind="qr", alpha=6, dropout=0.1),
                     dict(r=4, decomposition_method="qr", alpha=6, deft_dropout=0.1), conv1d=True),
    "PaRa": Pair("PaRa", peft.DeftConfig, dict(r=3), dict(r=3, para=True, decomposition_method="qr"), conv1d=True),
    "AdaMSS": Pair("AdaMSS", peft.AdamssConfig, dict(r=8, subspaces=3, subspace_rank=2),
                   dict(r=8, num_subspaces=3, subspace_rank=2), moved=0.3),
    "AdaMSS, seed": Pair("AdaMSS", peft.AdamssConfig, dict(r=100, subspaces=4, seed=3),
                         dict(r=100, num_subspaces=4, random_seed=3), moved=0.5),
    "PaRa, relu": Pair("PaRa", peft.DeftConfig, dict(r=3, kind="relu"), dict(r=3, para=True), moved=0.4, conv1d=True),
}  # fmt: skip
FIRST = {"llama": list(PAIRS), "gpt2": [name for name, pair in PAIRS.items() if pair.conv1d and "," not in name],
         "bert": [name for name in PAIRS if "," not in name or name.startswith("GLoRA")]}  # fmt: skip
every = beside("family, name", [(family, name) for family, names in FIRST.items() for name in names], PAIRS)


@pytest.fixture(autouse=True)
def clusters(monkeypatch):
    """The reference asks scikit-learn for AdaMSS's groups; where that is not installed, it asks ours."""
    if importlib.util.find_spec("sklearn") is not None:
        return

    class KMeans:
        def __init__(self, n_clusters, **fixed):
            assert fixed == {"init": "random", "n_init": 1, "max_iter": ROUNDS, "random_state": SEED}
            self.groups = n_clusters

        def fit_predict(self, points):
            return kmeans(torch.from_numpy(points), self.groups).numpy()

    for name in ("sklearn", "sklearn.cluster"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.KMeans = KMeans
        monkeypatch.setitem(sys.modules, name, module)


@every("writes")
def test_the_reference_reads_ours(family, name, tmp_path):
    check_reads_ours(family, PAIRS[name], tmp_path)


@every("reads", "gradients")
def test_ours_reads_the_reference_with_its_count_and_gradients(family, name, tmp_path):
    check_reads_theirs(family, PAIRS[name], tmp_path)


def of(model: nn.Module) -> dict[str, pl.Adapter]:
    return pl.adapters(model)["a"]


def one(out_features: int, in_features: int, method: str, moved: float = 0.0, bias: bool = False, **hyper):
    """(adapter, ΔW in float64) on a single layer."""
    torch.manual_seed(0)
    layer = nn.Linear(in_features, out_features, bias=bias).double().requires_grad_(False)
    adapter = pl.METHODS[method](layer, **hyper).double()
    shake(adapter, moved)
    with torch.no_grad():
        return adapter, adapter.delta(torch.eye(in_features, dtype=torch.double)).T


def rank(matrix: torch.Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix.double(), rtol=1e-6))


def test_lokr_is_a_kronecker_product_and_has_the_product_of_the_ranks():
    model = adapted("llama", Pair("LoKr", peft.LoKrConfig, dict(r=2, alpha=6, factor=4), moved=0.5))
    for path, change in dense(model).items():
        a = of(model)[path]
        with torch.no_grad():
            want = 3 * torch.kron(a.lokr_w1, a.lokr_w2_a @ a.lokr_w2_b)
        torch.testing.assert_close(change, want)
        assert rank(change) == rank(a.lokr_w1.detach()) * 2 == 8


def test_sizes_are_factored_as_in_the_reference():
    from peft.tuners.lokr.layer import factorization

    for factor in (-1, 1, 2, 3, 4, 6, 8, 16, 50):
        for size in range(1, 130):
            assert factored(size, factor) == factorization(size, factor)


def test_delora_has_a_bound_that_the_length_of_its_vectors_does_not_move():
    """‖ΔW·diag(w)⁻¹‖ ≤ λ, and it is λ for one term; ten times A or B is the same change; short vectors are no more."""
    for r in (1, 5):
        adapter, change = one(12, 20, "DeLoRA", 0.5, r=r, strength=3)
        norm = (change / weight_of(adapter.layer).norm(dim=0)).norm()
        bound = adapter.delora_lambda.detach().abs()[0]
        assert norm <= bound and (r > 1 or norm == pytest.approx(bound.item()))
        x = torch.randn(2, 20, dtype=torch.double)
        with torch.no_grad():
            want = adapter.delta(x)
            adapter.delora_A *= 10
            adapter.delora_B *= 0.1
            torch.testing.assert_close(adapter.delta(x), want)
            adapter.delora_B *= 1e-4 / adapter.delora_B.norm(dim=0)
            torch.testing.assert_close(adapter.delta(x), want)
            adapter.delora_B *= 0.1
            torch.testing.assert_close(adapter.delta(x), 0.1 * want)


def test_miss_is_one_tile_and_its_variants_are_other_tilings():
    adapter, change = one(12, 20, "MiSS", 0.5, r=5)
    D = adapter.miss_block.detach()
    torch.testing.assert_close(change, D.T.repeat(1, 4))
    assert rank(change) == 5
    adapter, change = one(12, 20, "MiSS", 0.5, r=8)  # the last tile is cut
    torch.testing.assert_close(change, adapter.miss_block.detach().T.repeat(1, 3)[:, :20])
    adapter, change = one(12, 20, "MiSS", 0.5, r=5, variant="mini", mini_r=3)
    torch.testing.assert_close(change, adapter.miss_block.detach().T.repeat(4, 4))
    adapter, change = one(12, 20, "MiSS", 0.5, r=4, variant="bat")
    W = weight_of(adapter.layer)
    for j in range(3):
        D = adapter.miss_block.detach()[j]
        for k in range(5):
            block = (slice(4 * j, 4 * j + 4), slice(4 * k, 4 * k + 4))
            torch.testing.assert_close(change[block], W[block] @ D + D)


def test_two_bats_are_a_sum_here_and_chained_in_the_reference():
    config = peft.MissConfig(r=4, init_weights="bat", target_modules=["0"])
    torch.manual_seed(0)
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config, "a")
    theirs.add_adapter("b", config)
    for seed, parameter in enumerate(theirs.base_model.model[0].miss_block.values()):
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    ours = nn.Sequential(nn.Linear(8, 8))
    ours.load_state_dict(theirs.base_model.model[0].base_layer.state_dict(prefix="0."))
    for name in "ab":
        pl.attach(ours, pl.MiSS, "0", name=name, r=4, variant="bat")
        pl.adapters(ours)[name]["0"].miss_block.data = theirs.base_model.model[0].miss_block[name].data
    x, gaps = torch.eye(8), []
    for model, use in ((ours, pl.activate), (theirs, lambda model, *names: model.base_model.set_adapter(list(names)))):
        found = {}
        for names in (("a",), ("b",), ("a", "b")):
            use(model, *names)
            found[names] = model(x).detach()
        plain = nn.functional.linear(x, ours[0].layer.weight, ours[0].layer.bias)
        gaps.append((found["a", "b"] - found["a",] - found["b",] + plain).abs().max())
    assert gaps[0] < 1e-6 < 0.05 < gaps[1]


def test_one_number_of_fourierft_is_a_wave_over_the_whole_weight():
    adapter, _ = one(12, 20, "FourierFT", n=1, scaling=7, seed=4)
    u, v = divmod(adapter.where.item(), 20)
    assert (u, v) != (0, 0)
    j, k = torch.meshgrid(torch.arange(12.0).double(), torch.arange(20.0).double(), indexing="ij")
    wave = torch.cos(2 * math.pi * (u * j / 12 + v * k / 20)) * adapter.fourierft_spectrum.item() * 7 / 240
    torch.testing.assert_close(adapter.change_of_weight().detach(), wave)


def test_few_frequencies_are_a_change_of_high_rank_at_the_same_places_in_all_layers():
    model = adapted("llama", Pair("FourierFT", peft.FourierFTConfig, dict(n=60)))
    assert min(rank(change) for change in dense(model).values()) > 20, "a LoRA with 64 numbers has rank 1"
    places = [a.where for path, a in of(model).items() if "q_proj" in path]
    assert len(places) == 2 and torch.equal(*places) and len(places[0].unique()) == 60
    other = pl.FourierFT(nn.Linear(32, 32), n=60, seed=1)
    assert not torch.equal(other.where, places[0])


@pytest.mark.parametrize(("kind", "N"), [*(("db", N) for N in range(1, 11)), *(("sym", N) for N in range(2, 11))])
def test_filters_are_computed(kind, N):
    """The reference's table, and what defines them: orthonormal when moved by two, N vanishing moments."""
    from peft.tuners.waveft.wavelet import Wavelet

    h = torch.tensor(low_pass(f"{kind}{N}"), dtype=torch.double)
    table = torch.tensor(Wavelet(f"{kind}{N}").rec_lo, dtype=torch.double)
    torch.testing.assert_close(h, table, rtol=0, atol=1e-11)  # the table's db3 has eleven digits
    for k in range(N):
        assert (h[2 * k :] * h[: 2 * N - 2 * k]).sum() == pytest.approx(float(k == 0), abs=1e-12)
    t = torch.arange(2 * N, dtype=torch.double)
    for power in range(N):
        terms = h.flip(0) * (-1) ** t * (t / N) ** power
        assert terms.sum().abs() < 1e-8 * terms.abs().sum().clamp(min=1)


def test_symlets_are_nearly_symmetric_and_the_references_last_coiflets_are_no_wavelets():
    from peft.tuners.waveft.wavelet import Wavelet

    def symmetry(name: str) -> float:
        """The inner product with its mirror image, where it is largest: 1 if they are the same."""
        return np.convolve(low_pass(name), low_pass(name)).max()

    for N in range(4, 11):
        assert symmetry(f"sym{N}") > max(0.9, symmetry(f"db{N}") + 0.015)
    for name, length, wrong in (("coif3", 18, 0), ("coif4", 24, 0.0213), ("coif5", 48, 0.0166)):  # coif5 has 30 numbers
        h = torch.tensor(Wavelet(name).rec_lo, dtype=torch.double)
        assert len(h) == length
        products = torch.stack([(h[2 * k :] * h[: len(h) - 2 * k]).sum() - float(k == 0) for k in range(len(h) // 2)])
        assert products.abs().max().item() == pytest.approx(wrong, abs=1e-4), "orthonormal when moved by two"


def test_haar_keeps_the_length_and_one_number_changes_four():
    torch.manual_seed(0)
    S = torch.randn(6, 10, dtype=torch.double)
    W = inverse(S, low_pass("db1"))
    assert W.norm().item() == pytest.approx(S.norm().item())
    low, high = (W[0::2] + W[1::2]) / 2**0.5, (W[0::2] - W[1::2]) / 2**0.5  # the forward transform gives S back
    quarters = [(part[:, 0::2] + sign * part[:, 1::2]) / 2**0.5 for sign in (1, -1) for part in (low, high)]
    A, H, V, D = quarters
    torch.testing.assert_close(torch.cat([torch.cat([A, H], 1), torch.cat([V, D], 1)]), S)
    _, change = one(6, 10, "WaveFT", 1.0, n=1, scaling=2)
    assert (change != 0).sum() == 4 and change[change != 0].abs().unique().numel() == 1


@pytest.mark.parametrize("wavelet", ["db1", "db3", "sym6"])
@pytest.mark.parametrize("shape", [(5, 7), (6, 9), (9, 6)])
def test_odd_sizes_are_cut_as_in_the_reference(shape, wavelet):
    config = peft.WaveFTConfig(n_frequency=20, wavelet_family=wavelet, init_weights=False, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(*shape[::-1])), config).base_model.model[0]
    ours = pl.WaveFT(nn.Linear(*shape[::-1]), n=20, wavelet=wavelet)
    ours.waveft_spectrum.data = theirs.waveft_spectrum["default"].data
    torch.testing.assert_close(ours.change_of_weight(), theirs.get_delta_weight("default"), rtol=0, atol=1e-6)


def test_gralora_has_k_times_the_rank_and_keeps_an_outlier_in_its_column():
    adapter, change = one(32, 24, "GraLoRA", 0.5, r=4, k=4)
    assert rank(change) == 16 and {rank(block) for row in change.split(8) for block in row.split(6, 1)} == {1}
    x = torch.zeros(3, 24, dtype=torch.double)
    x[:, 6:12] = 1e3  # the second column of blocks
    adapter.delta(x).sum().backward()
    touched = adapter.gralora_B.grad.abs().sum((0, 2)) > 0  # (r,): rows j·r/k … are of column j
    assert touched.tolist() == [False, True, False, False]
    assert (adapter.gralora_A.grad.abs().sum((1, 2)) > 0).tolist() == touched.tolist()


def test_glora_scales_and_shifts_weight_and_bias():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    W, b = (p.detach().clone() for p in model[0].parameters())
    pl.attach(model, pl.GLoRA, "0", name="a", r=2)
    shake(of(model)["0"], 0.5)
    A, B, C, D, E = (of(model)["0"].part(name) for name in "ABCDE")
    assert rank(A.detach()) == rank(B.detach()) == 2 and C.shape == (6, 1) and D.shape == E.shape == (1,)
    pl.merge(model)
    torch.testing.assert_close(model[0].layer.weight, (W + W * A + B).detach())
    torch.testing.assert_close(model[0].layer.bias, (b + b * D + E + (W @ C)[:, 0]).detach())


def test_glora_without_a_bias_is_read_without_a_warning(tmp_path, recwarn):
    pl.save_adapter(adapted("llama", PAIRS["GLoRA"]), tmp_path, name="a")
    peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    assert not [w for w in recwarn if "missing adapter keys" in str(w.message)]


@pytest.mark.parametrize("kind", ["rotate", "share"])
def test_mora_is_square_and_has_no_more_numbers_than_the_lora(kind):
    for shape in ((32, 24), (24, 32), (64, 64), (11, 37)):
        for r in (1, 2, 3):
            adapter, change = one(*shape, "MoRA", 0.5, r=r, kind=kind)
            size = len(adapter.M)
            assert size**2 <= r * sum(shape) < (size + 2) ** 2
            assert kind == "rotate" or rank(change) == min(size, *shape)


def test_mora_turns_each_piece_by_its_place_and_so_has_full_rank():
    adapter, change = one(24, 24, "MoRA", 0.5, r=1)
    M, blocks = adapter.M.detach(), []
    for j in range(4):
        R = torch.zeros(6, 6, dtype=torch.double)
        for i in range(3):
            angle = torch.tensor(j * 10000 ** (-i / 3)).double()
            R[i, i] = R[i + 3, i + 3] = angle.cos()
            R[i + 3, i] = angle.sin()
            R[i, i + 3] = -angle.sin()
        blocks.append(M @ R)
    torch.testing.assert_close(change, torch.block_diag(*blocks), rtol=0, atol=1e-6)  # angles are kept in float32
    assert rank(change) == 24


def test_mora_as_large_as_the_layer_is_the_matrix_itself_and_else_what_its_operators_say():
    for kind in ("rotate", "share"):
        adapter, change = one(16, 16, "MoRA", 0.5, r=8, kind=kind)
        torch.testing.assert_close(change, adapter.M.detach())
    adapter, change = one(9, 10, "MoRA", 0.5, r=1, kind="share")  # 4 × 4
    column, row = torch.arange(12) % 4, torch.arange(9) % 4
    compress = torch.zeros(4, 10, dtype=torch.double)
    for place in range(12):
        compress[column[place], place % 10] += 1  # the last piece ends with x's first numbers
    torch.testing.assert_close(change, (adapter.M.detach() @ compress)[row])


def test_peanut_without_a_bend_is_a_low_rank_factor_of_the_weight():
    adapter, change = one(12, 20, "PEANuT", 0.3, r=3, activation="identity", scaling=2)
    want = 2 * adapter.peanut_B.weight @ adapter.peanut_A.weight @ weight_of(adapter.layer)
    torch.testing.assert_close(change, want.detach())
    bent, other = one(12, 20, "PEANuT", 0.3, r=3, depth=2)
    assert rank(other) <= 3
    z = bent.factor()
    assert z.shape == (20, 3) and (z >= 0).all(), "sums of what relu leaves"


@pytest.mark.parametrize("alpha", [None, 8])
def test_deft_rewrites_its_directions_and_leaves_the_others(alpha):
    adapter, start = one(12, 20, "DEFT", r=3, kind="qr", alpha=alpha)
    assert start.abs().max() < 1e-6, "its numbers are float32, the weight float64"
    shake(adapter, 0.3)
    Q, _ = adapter.taken()
    with torch.no_grad():
        A, B, s = adapter.factors()
        W = weight_of(adapter.layer) + s * B @ A
        torch.testing.assert_close(Q.T @ W, (alpha or 3) / 3 * adapter.deft_R)
        torch.testing.assert_close(W - Q @ Q.T @ W, (lambda V: V - Q @ Q.T @ V)(weight_of(adapter.layer)))


def test_para_takes_as_many_directions_from_the_rank():
    adapter, change = one(12, 20, "PaRa", r=3)
    assert rank(weight_of(adapter.layer)) == 12 and rank(weight_of(adapter.layer) + change) == 9
    with torch.no_grad():
        A, B, s = adapter.factors()
        torch.testing.assert_close(s * B @ A, change)
        assert (B.T @ (weight_of(adapter.layer) + change)).abs().max() < 1e-12


def test_one_file_type_holds_deft_and_para(tmp_path):
    """The reference's `para` tells them apart."""
    for name in ("DEFT", "PaRa"):
        pl.save_adapter(adapted("llama", PAIRS[name]), tmp_path / name, name="a")
        model = pl.load_adapter(build("llama"), tmp_path / name, name="a")
        assert {type(a).__name__ for a in of(model).values()} == {name}


def test_rows_are_grouped_by_likeness_as_scikit_learn_does():
    points = torch.cat([torch.randn(7, 3, generator=torch.Generator().manual_seed(k)) * 0.1 + 4 * k for k in range(3)])
    found = kmeans(points, 3)
    assert [len(set(found[start : start + 7].tolist())) for start in (0, 7, 14)] == [1, 1, 1]
    assert len(found.unique()) == 3 and kmeans(points[:3], 3).unique().numel() == 3
    assert kmeans(torch.zeros(5, 2), 4).max() < 4, "rows that are all alike are no error"
    cluster = pytest.importorskip("sklearn.cluster")
    if not hasattr(cluster, "__file__"):
        return  # ours in its place: see `clusters`
    for seed in range(5):
        points = torch.randn(60, 8, generator=torch.Generator().manual_seed(seed))
        theirs = cluster.KMeans(7, init="random", n_init=1, max_iter=ROUNDS, random_state=SEED)
        assert torch.equal(kmeans(points, 7), torch.from_numpy(theirs.fit_predict(points.numpy())).long())


def test_adamss_changes_each_group_by_its_own_small_rank_in_the_directions_of_the_weight():
    adapter, change = one(24, 20, "AdaMSS", 0.5, r=6, subspaces=3, subspace_rank=2)
    rows = adapter.order.argsort().split(adapter.groups)
    assert sorted(torch.cat(rows).tolist()) == list(range(24)) and len(rows) == 3
    assert [rank(change[own]) for own in rows] == [2, 2, 2] and rank(change) == 6
    V = adapter.adamss_newB
    torch.testing.assert_close(change @ V.T @ V, change, rtol=0, atol=1e-6)  # V is kept in float32
    fresh, _ = one(24, 20, "AdaMSS", r=6, subspaces=3, subspace_rank=2)
    for A in fresh.adamss_A:
        torch.testing.assert_close(A @ A.T, torch.eye(2, dtype=torch.double), rtol=0, atol=1e-6)


def test_adamss_counts_the_bias_as_a_column_and_small_groups_as_they_are():
    adapter, _ = one(6, 5, "AdaMSS", bias=True, subspaces=2, subspace_rank=1)
    assert adapter.adamss_newB.shape == (6, 6)
    many = pl.attach(build("llama"), pl.AdaMSS, "q_proj", name="a", subspaces=20, subspace_rank=4)
    assert any(min(a.groups) < 4 for a in of(many).values())
    assert pl.count(many).expected == pl.count(many).per_adapter


def test_groups_of_other_sizes_than_the_files_are_refused(tmp_path):
    """A file has no groups, and other weights have others; the reference takes the file's shapes all the same."""
    pl.save_adapter(adapted("llama", PAIRS["AdaMSS"]), tmp_path, name="a")
    with pytest.raises(ValueError, match="this model needs"):
        pl.load_adapter(build("llama", seed=1), tmp_path, check_base=False)


def test_sizes_that_are_not_given_fit_all_targets():
    """Layers of 16 × 32 and 32 × 64."""
    for method, hyper, name, want in (
        ("MiSS", {}, "r", 32), ("MiSS", dict(variant="bat"), "r", 16), ("FourierFT", {}, "n", 512),
        ("WaveFT", {}, "n", 512),
    ):  # fmt: skip
        model = pl.attach(build("llama"), method, "v_proj|down_proj", name="a", **hyper)
        assert {a.hyper[name] for a in of(model).values()} == {want}, method
    assert pl.count("llama-2-7b", "MiSS", "q_proj").trainable == 32 * 64 * 4096
    assert pl.count("llama-2-7b", "WaveFT", "q_proj").trainable == 32 * 2592


@pytest.mark.parametrize(("method", "hyper", "said"), [
    ("LoKr", dict(r=0), "at least 1"),
    ("LoKr", dict(factor=0), "or -1"),
    ("DeLoRA", dict(r=0), "below 1"),
    ("MiSS", dict(r=33), "must be 1…32"),
    ("MiSS", dict(r=0), "r=0 must be at least 1"),
    ("MiSS", dict(r=12, variant="bat"), "divisors of 32"),
    ("MiSS", dict(r=8, variant="mini", mini_r=5), "does not divide the layer's 32"),
    ("MiSS", dict(variant="maxi"), "plain, bat, mini"),
    ("FourierFT", dict(n=2000), "1…1024"),
    ("WaveFT", dict(n=2000), "1…1024"),
    ("WaveFT", dict(n=0), "n=0 must be at least 1"),
    ("WaveFT", dict(n=4, wavelet="coif1"), "db1, … db10, sym2, … sym10"),
    ("GraLoRA", dict(r=6, k=4), "divisors of 2"),
    ("GraLoRA", dict(r=8, hybrid_r=-1), "at least 0"),
    ("GLoRA", dict(c="constant"), "C has no form 'constant'"),
    ("GLoRA", dict(ab="none"), "nothing to train"),
    ("MoRA", dict(r=64), "take a smaller r"),
    ("MoRA", dict(kind="spin"), "rotate, share"),
    ("PEANuT", dict(depth=-1), "depth=-1"),
    ("PEANuT", dict(activation="mish"), "relu, gelu"),
    ("DEFT", dict(r=33), "1…32"),
    ("AdaMSS", dict(subspaces=0), "subspaces=0"),
    ("PaRa", dict(kind="svd"), "relu, qr"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_by_name_and_nothing_is_attached(method, hyper, said):
    check_refused(said, method, "q_proj", **hyper)

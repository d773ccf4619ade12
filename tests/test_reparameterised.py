"""LoHa, HiRA, C3A and RoAd: beside the reference on every family, and what is their own."""

from __future__ import annotations

import peft
import pytest
import torch
from families import FAMILIES, TARGETS, build, check_refused
from parity import Pair, adapted, beside, check_reads_ours, check_reads_theirs, dense
from torch import nn

import peftlab as pl

PAIRS = {
    "LoHa": Pair("LoHa", peft.LoHaConfig, dict(r=4, alpha=8), moved=0.4),
    "LoHa, patterns": Pair("LoHa", peft.LoHaConfig, dict(r=4, alpha=6, rank_pattern={r".*\.1\..*": 2},
                                                         alpha_pattern={r".*\.0\..*": 3}), moved=0.4),
    "HiRA": Pair("HiRA", peft.HiraConfig, dict(r=4), moved=0.5, conv1d=True),
    "HiRA, rank 40": Pair("HiRA", peft.HiraConfig, dict(r=40, dropout=0.3), dict(r=40, hira_dropout=0.3), 0.3, True),
    "C3A": Pair("C3A", peft.C3AConfig, dict(block_size=16), moved=1.0, gradients=False),
    "C3A, small blocks": Pair("C3A", peft.C3AConfig, dict(block_size=4), moved=1.0, gradients=False),
    "RoAd 1": Pair("RoAd", peft.RoadConfig, dict(variant="road_1", group_size=8)),
    "RoAd 2": Pair("RoAd", peft.RoadConfig, dict(variant="road_2", group_size=16)),
    "RoAd 4": Pair("RoAd", peft.RoadConfig, dict(variant="road_4", group_size=4)),
}  # fmt: skip
every = beside("pair", PAIRS.values(), PAIRS)
everywhere = pytest.mark.parametrize("family", FAMILIES)


@every("writes")
@everywhere
def test_the_reference_reads_ours(family, pair, tmp_path):
    check_reads_ours(family, pair, tmp_path)


@every("reads", "gradients")
@everywhere
def test_ours_reads_the_reference_with_its_count_and_gradients(family, pair, tmp_path):
    check_reads_theirs(family, pair, tmp_path)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@everywhere
def test_the_closed_formula_is_the_count(family, pair):
    counted = pl.count(adapted(family, pair, moved=False))
    assert counted.trainable == counted.expected["a"] > 0


def test_loha_has_the_square_of_its_rank():
    for change in dense(adapted("llama", Pair("LoHa", peft.LoHaConfig, dict(r=3, alpha=3)))).values():
        assert torch.linalg.matrix_rank(change.double(), rtol=1e-6) == 9


def test_hira_is_of_full_rank_and_leaves_zeros_alone():
    model = adapted("llama", Pair("HiRA", peft.HiraConfig, dict(r=2)))
    for path, adapter in pl.adapters(model)["a"].items():
        adapter.layer.weight.data[0, :5] = 0
        change = dense(model)[path]
        assert torch.linalg.matrix_rank(change.double(), rtol=1e-6) > 2 * 2
        assert not change[0, :5].any()


def test_c3a_is_circulant_in_blocks_and_two_of_them_add_up():
    """In the reference, two active ones are chained: the second gets the first one's output."""
    model = adapted("llama", PAIRS["C3A, small blocks"])
    for path, change in dense(model).items():
        kernel = pl.adapters(model)["a"][path].c3a_kernel.detach()
        for m in range(kernel.shape[0]):
            for n in range(kernel.shape[1]):
                block = torch.stack([kernel[m, n].roll(k) for k in range(4)]) / change.shape[1]
                torch.testing.assert_close(change[4 * m : 4 * m + 4, 4 * n : 4 * n + 4], block, rtol=0, atol=1e-6)
    pl.attach(model, pl.C3A, TARGETS["llama"], name="b", block_size=8)
    layer = next(host for host in pl.hosts(model).values())
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = {}
        for names in [(), ("a",), ("b",), ("a", "b")]:
            with pl.using(model, *names):
                alone[names] = layer(x)
    both = alone["a",] + alone["b",] - alone[()]
    torch.testing.assert_close(alone["a", "b"], both, rtol=0, atol=1e-5)


def test_the_gradient_of_c3a_is_the_derivative():
    """In the reference, the one with respect to the input is not: where ifft(fft(w)·fft(g)) belongs, it has
    fft(ifft(w)·fft(g)). So every layer below the last gets another gradient there."""
    from peft.tuners.c3a.utils import BlockCircularConvolution

    torch.manual_seed(0)
    adapter = pl.C3A(nn.Linear(8, 12), block_size=4).double()
    x = torch.randn(2, 8, dtype=torch.double, requires_grad=True)
    w = adapter.c3a_kernel

    def change(x, w):
        return torch.func.functional_call(adapter, {"c3a_kernel": w}, (lambda x: 0, x))

    assert torch.autograd.gradcheck(change, (x, w))
    g = torch.randn(2, 12, dtype=torch.double)
    ours = torch.autograd.grad(adapter.delta(x), (x, w), g)
    theirs = torch.autograd.grad(BlockCircularConvolution.apply(x, w) / 8, (x, w), g)
    torch.testing.assert_close(ours[1], theirs[1])
    assert (ours[0] - theirs[0]).abs().max() > 0.01, "mended there: compare C3A's gradients like all others"


def test_road_1_turns_by_its_angle_and_stretches_by_its_factor():
    model = pl.attach(build("llama"), pl.RoAd, "q_proj", name="a", group_size=8)
    adapter = next(iter(pl.adapters(model)["a"].values()))
    with torch.no_grad():
        adapter.road_theta.fill_(torch.pi / 2)
        adapter.road_alpha.fill_(3.0)
        y = torch.arange(adapter.layer.out_features).float()[None]
        turned = adapter(lambda x: x, y)[0]
    torch.testing.assert_close(turned[:4], -3 * y[0, 4:8])
    torch.testing.assert_close(turned[4:8], 3 * y[0, :4])


def test_sizes_that_are_not_given_fit_all_targets():
    """Files hold one number for all layers. 16, 32 and 64 outputs; a width of 48 takes 48, for 64 would not fit."""
    blocks = pl.adapters(pl.attach(build("llama"), pl.C3A, "v_proj|down_proj"))["default"].values()
    assert {a.hyper["block_size"] for a in blocks} == {16}
    groups = pl.adapters(pl.attach(build("llama"), pl.RoAd, "v_proj|up_proj"))["default"].values()
    assert {a.hyper["group_size"] for a in groups} == {16}
    for width, group in ((512, 64), (48, 48), (100, 50), (130, 26)):
        model = pl.attach(nn.Sequential(nn.Linear(3, width)), pl.RoAd, "0")
        assert {a.hyper["group_size"] for a in pl.adapters(model)["default"].values()} == {group}
    with pytest.raises(ValueError, match="odd"):
        pl.attach(nn.Sequential(nn.Linear(3, 5)), pl.RoAd, "0")


@pytest.mark.parametrize(("method", "hyper", "said"), [
    ("LoHa", dict(r=0), "below 1"),
    ("HiRA", dict(r=0), "below 1"),
    ("C3A", dict(block_size=5), "divisors of 32"),
    ("RoAd", dict(group_size=6), "divide the layer's 32"),
    ("RoAd", dict(variant="road_3", group_size=8), "road_1, road_2, road_4"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_by_name_and_nothing_is_attached(method, hyper, said):
    check_refused(said, method, "q_proj", **hyper)

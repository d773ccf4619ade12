"""LoHa, HiRA, C3A and RoAd: beside the reference on every family, and what is their own."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import peft
import pytest
import torch
from families import FAMILIES, TARGETS, build, inputs, labels, shake
from torch import nn

import peftlab as pl
from peftlab.layers import is_conv1d

CLOSE = dict(rtol=0, atol=1e-5)  # fp32 logits of order 1; the two libraries add in another order


@dataclass
class Pair:
    """A method with some hyper-parameters, here and there; how far its parameters are moved, so that it shows."""

    ours: str
    config: type
    hyper: dict = field(default_factory=dict)
    theirs: dict | None = None  # where the reference spells them otherwise
    moved: float = 0.2
    conv1d: bool = False  # whether the reference has it on GPT-2's transposed layers


PAIRS = {
    "LoHa": Pair("LoHa", peft.LoHaConfig, dict(r=4, alpha=8), moved=0.4),
    "LoHa, patterns": Pair("LoHa", peft.LoHaConfig, dict(r=4, alpha=6, rank_pattern={r".*\.1\..*": 2},
                                                         alpha_pattern={r".*\.0\..*": 3}), moved=0.4),
    "HiRA": Pair("HiRA", peft.HiraConfig, dict(r=4), moved=0.5, conv1d=True),
    "HiRA, rank 40": Pair("HiRA", peft.HiraConfig, dict(r=40, dropout=0.3), dict(r=40, hira_dropout=0.3), 0.3, True),
    "C3A": Pair("C3A", peft.C3AConfig, dict(block_size=16), moved=1.0),
    "C3A, small blocks": Pair("C3A", peft.C3AConfig, dict(block_size=4), moved=1.0),
    "RoAd 1": Pair("RoAd", peft.RoadConfig, dict(variant="road_1", group_size=8)),
    "RoAd 2": Pair("RoAd", peft.RoadConfig, dict(variant="road_2", group_size=16)),
    "RoAd 4": Pair("RoAd", peft.RoadConfig, dict(variant="road_4", group_size=4)),
}  # fmt: skip
every = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
everywhere = pytest.mark.parametrize("family", FAMILIES)


def logits(model, family):
    with torch.no_grad():
        return model(**inputs(family)).logits


def adapted(family: str, pair: Pair, moved: bool = True) -> nn.Module:
    model = pl.attach(build(family), pair.ours, TARGETS[family], name="a", **pair.hyper)
    for seed, host in enumerate(pl.hosts(model).values()):
        if moved:
            shake(host.adapters, pair.moved, seed=seed)
    return model


def skip_conv1d(family: str, pair: Pair) -> None:
    if family == "gpt2" and not pair.conv1d:
        pytest.skip("the reference has it on nn.Linear only")


@every
@everywhere
def test_the_reference_reads_ours(family, pair, tmp_path):
    skip_conv1d(family, pair)
    model = adapted(family, pair)
    ours = logits(model, family)
    assert (ours - logits(build(family), family)).abs().max() > 1e-2, "the adapter must show, or nothing is proved"
    pl.save_adapter(model, tmp_path, name="a")
    theirs = peft.PeftModel.from_pretrained(build(family), tmp_path).eval()
    torch.testing.assert_close(logits(theirs, family), ours, **CLOSE)
    merged = pl.merge(model)
    torch.testing.assert_close(logits(merged, family), logits(theirs.merge_and_unload(), family), **CLOSE)


@every
@everywhere
def test_ours_reads_the_reference_with_its_count_and_gradients(family, pair, tmp_path):
    skip_conv1d(family, pair)
    blank = adapted(family, pair, moved=False)
    settings = pair.hyper if pair.theirs is None else pair.theirs
    config = pair.config(target_modules=TARGETS[family].split("|"), **settings)
    theirs = peft.get_peft_model(build(family), config).eval()
    trained = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == pl.count(blank).trainable
    for seed, parameter in enumerate(trained.values()):
        draw = torch.Generator().manual_seed(seed)
        parameter.data += pair.moved * torch.randn(parameter.shape, generator=draw)
    theirs.save_pretrained(tmp_path)
    model = pl.load_adapter(build(family), tmp_path, name="a")
    torch.testing.assert_close(logits(model, family), logits(theirs, family), **CLOSE)

    if pair.ours == "C3A":
        return  # the reference's gradients are others: see test_the_gradient_of_c3a_is_the_derivative
    batch = inputs(family)
    for one in (theirs, model):
        one(**batch, labels=labels(family, batch)).loss.backward()
    ours = {f"{path}.{n}": p.grad for path, a in pl.adapters(model)["a"].items() for n, p in a.named_parameters()}
    for name, parameter in trained.items():
        path = name.removeprefix("base_model.model.").replace(".a.", ".").replace(".default", "")
        torch.testing.assert_close(ours.pop(path), parameter.grad, rtol=1e-4, atol=1e-6)
    assert not ours, "a parameter here that the reference has not"


@every
@everywhere
def test_the_closed_formula_is_the_count(family, pair):
    counted = pl.count(adapted(family, pair, moved=False))
    assert counted.trainable == counted.expected["a"] > 0


def dense(model: nn.Module) -> dict[str, torch.Tensor]:
    """path -> ΔW (out, in) of the adapter "a", by asking it."""
    with torch.no_grad():
        return {path: adapter.change(torch.eye(adapter.layer.weight.shape[0 if is_conv1d(adapter.layer) else 1])).T
                for path, adapter in pl.adapters(model)["a"].items()}  # fmt: skip


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
    model = build("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=said):
        pl.attach(model, method, "q_proj", **hyper)
    assert not pl.hosts(model) and model.state_dict().keys() == before.keys()

"""LoftQ: Q + s·BA is nearer to W than Q alone, for every layer, rank and scale; what cannot be fitted is refused."""

from __future__ import annotations

import copy
import inspect
import logging
from collections import OrderedDict

import peft
import pytest
import torch
from families import TARGETS, build, inputs, shake
from peft.utils import loftq_utils
from torch import nn

import peftlab as pl
from peftlab.inits import loftq
from peftlab.inits.loftq import factors
from peftlab.layers import weight_of
from peftlab.nf4 import pack, unpack
from peftlab.sites import at, bare

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def error(W, found, scaling: float = 1.0) -> float:
    Q, A, B = found
    return (W.double() - unpack(Q, torch.double) - scaling * (B @ A).double()).norm().item()


def attached(family: str = "llama", dtype=torch.float32, **hyper):
    """(the dense model with an untrained LoRA, the dense model)"""
    base = build(family).to(dtype)
    return pl.attach(copy.deepcopy(base), pl.LoRA, TARGETS[family].split("|"), **({"r": 4, "alpha": 8} | hyper)), base


def logits(model, family: str = "llama"):
    with torch.no_grad():
        return model(**inputs(family)).logits.float()


# --- one matrix ---


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int4", "int8"])
@pytest.mark.parametrize("shape", [(96, 64), (33, 130), (64, 64)])
def test_a_higher_rank_leaves_less_and_all_ranks_leave_nothing(shape, kind):
    W, full = matrix(*shape), min(shape)
    plain = (W - unpack(pack(W, kind=kind))).norm().item()
    errors = [error(W, factors(W, r, kind=kind)) for r in (1, 4, 16, full)]
    assert plain > errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-5 * W.norm(), "float32 rounding of an SVD"


@pytest.mark.parametrize("r", [2, 16, 48])
@pytest.mark.parametrize("scaling", [1.0, 0.25, 2.0, -1.0])
def test_more_turns_never_lose(r, scaling):
    W = matrix(64, 64, seed=r)
    errors = [error(W, factors(W, r, turns, scaling), scaling) for turns in range(1, 8)]
    assert all(b <= a * (1 + 1e-6) for a, b in zip(errors, errors[1:], strict=False)), errors
    assert errors[4] < errors[0], "five turns, as in the paper, are better than one"


def test_a_turn_on_its_own_can_lose():
    """Why the best turn is kept: the plain alternation of algorithm 1 goes up here."""
    W, r = matrix(64, 64, seed=48), 48
    errors, BA = [], torch.zeros_like(W)
    for _ in range(8):
        Q = pack(W - BA)
        U, S, V = torch.linalg.svd(W - unpack(Q))
        BA = (U[:, :r] * S[:r]) @ V[:r]
        errors.append(S[r:].norm().item())
    assert any(b > a for a, b in zip(errors, errors[1:], strict=False))
    assert error(W, factors(W, r, 8)) == pytest.approx(min(errors), rel=1e-4)


def test_weights_that_four_bits_hold_exactly_need_no_adapter():
    W = unpack(pack(matrix(64, 64), double=False))
    Q, A, B = factors(W, 4, double=False)
    assert torch.equal(unpack(Q), W) and (B @ A).abs().max() == 0


# --- the reference ---


@pytest.fixture
def reference(monkeypatch):
    """HF PEFT's `loftq_init`, which computes on a GPU alone: the same source with the CPU in its place."""
    source = inspect.getsource(loftq_utils.loftq_init)
    assert source.count('"cuda"') == 1
    names = dict(vars(loftq_utils))
    exec(compile(source.replace('"cuda"', '"cpu"'), "loftq_init", "exec"), names)
    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", names["loftq_init"])
    return names["loftq_init"]


@pytest.mark.reference("loftq", "peftlab.inits.loftq:factors", "peft.utils.loftq_utils._low_rank_decomposition")
@pytest.mark.parametrize("turns", [1, 2, 5])
@pytest.mark.parametrize("shape", [(64, 128), (96, 64)])  # rows of whole blocks: bitsandbytes unpacks others wrongly
def test_the_reference_finds_the_same(reference, shape, turns):
    W, r = matrix(*shape), 8
    Q, A, B = factors(W, r, turns, double=False)
    theirs, R, L = reference(W, num_bits=4, reduced_rank=r, num_iter=turns)
    moved = (theirs != unpack(Q)).float().mean()
    assert moved <= (0 if turns == 1 else 0.002), "a weight between two levels may fall to either after rounding"
    if not moved:
        torch.testing.assert_close(B @ A, L @ R, rtol=0, atol=1e-6 * W.abs().max().item() + 1e-7)
    assert error(W, (Q, A, B)) == pytest.approx((W - theirs - L @ R).norm().item(), rel=1e-3)


def test_the_reference_forgets_the_scale(reference):
    """Its A and B are not divided by alpha/r: with 2r the part E of the loss that they fit comes back as E − 2E."""
    base = nn.Sequential(OrderedDict(proj=nn.Linear(64, 96), end=nn.Linear(96, 2)))
    W = base.proj.weight.detach()
    plain = (W - unpack(pack(W, double=False))).norm()
    config = peft.LoraConfig(target_modules=["proj"], r=4, lora_alpha=8)
    config.init_lora_weights, config.loftq_config = "loftq", {"loftq_bits": 4, "loftq_iter": 1}  # asked at once: scipy
    layer = peft.get_peft_model(copy.deepcopy(base), config).base_model.model.proj
    theirs = (W - layer.base_layer.weight - layer.get_delta_weight("default")).detach().norm()
    model = loftq(pl.attach(copy.deepcopy(base), pl.LoRA, ["proj"], r=4, alpha=8), double=False)
    adapter = pl.adapters(model)["default"]["proj"]
    ours = (W - adapter.layer.dequantize() - adapter.scaling * adapter.lora_B @ adapter.lora_A).detach().norm()
    assert ours < 0.95 * plain and theirs == pytest.approx(plain.item(), rel=1e-4)


# --- a model ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turns", [1, 5])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "t5"])
def test_each_layer_begins_nearer_to_its_weights(family, turns, dtype):
    model, base = attached(family, dtype)
    assert loftq(model, iterations=turns) is model
    plain = pl.quantize(copy.deepcopy(base))
    for path, adapter in pl.adapters(model)["default"].items():
        W = weight_of(at(base, path)).float()
        lost = (W - bare(at(plain, path)).dequantize(torch.float32)).norm()
        Q = bare(at(model, path)).dequantize(torch.float32)
        left = (W - Q - adapter.scaling * adapter.lora_B @ adapter.lora_A).norm()
        assert left < lost, path
        assert adapter.layer is bare(at(model, path)) and adapter.layer.dtype == dtype
    packed = {name for name, module in model.named_modules() if isinstance(module, pl.NF4Linear)}
    assert len(packed) == sum(isinstance(module, pl.NF4Linear) for module in plain.modules()), "the others too"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_model_begins_nearer_to_the_dense_one(family):
    base = build(family)
    exact, plain = logits(base, family), logits(pl.quantize(copy.deepcopy(base)), family)
    errors = [(logits(loftq(pl.attach(copy.deepcopy(base), pl.LoRA, r=r), iterations=5), family) - exact).norm()
              for r in (4, 16)]  # fmt: skip
    assert errors[1] < errors[0] < (plain - exact).norm()


def test_one_turn_packs_as_quantize_does_so_the_file_fits_any_such_base(tmp_path):
    model, base = attached()
    loftq(model)
    plain = pl.quantize(copy.deepcopy(base))
    for path in pl.adapters(model)["default"]:
        ours, theirs = bare(at(model, path)).packed, bare(at(plain, path)).packed
        assert all(torch.equal(a, b) for a, b in zip(ours[:5], theirs[:5], strict=True)) and ours[5:] == theirs[5:]
    pl.save_adapter(model, tmp_path)
    pl.load_adapter(plain, tmp_path)
    assert torch.equal(logits(plain), logits(model))


def test_several_turns_pack_another_matrix_which_its_state_dict_holds(tmp_path):
    model, base = attached()
    loftq(model, iterations=5)
    plain = pl.attach(pl.quantize(copy.deepcopy(base)), pl.LoRA, TARGETS["llama"].split("|"), r=4, alpha=8)
    path = next(iter(pl.adapters(model)["default"]))
    assert not torch.equal(bare(at(model, path)).packed.codes, bare(at(plain, path)).packed.codes)
    assert not torch.equal(logits(plain), logits(model))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(logits(plain), logits(model))


def test_options_and_layers_that_stay_dense():
    model, base = attached()
    loftq(model, skip="q_proj", also="lm_head", block=32, kind="fp4", double=False, compute=torch.bfloat16)
    adapters = pl.adapters(model)["default"]
    for path, adapter in adapters.items():
        dense = path.endswith("q_proj")
        assert isinstance(adapter.layer, pl.NF4Linear) is not dense
        assert adapter.lora_B.any().item() is not dense, "there is nothing to make good where nothing was lost"
    assert (model.lm_head.kind, model.lm_head.block, model.lm_head.compute) == ("fp4", 32, torch.bfloat16)
    fitted = next(a for p, a in adapters.items() if p.endswith("down_proj"))
    assert (fitted.layer.kind, fitted.layer.block, fitted.layer.compute) == ("fp4", 32, torch.bfloat16)
    assert fitted.layer.nested_absmax is None


def test_ranks_of_their_own_a_second_adapter_and_a_copied_head():
    model = pl.attach(build("llama"), pl.LoRA, ["q_proj", "v_proj"], name="other")
    pl.attach(model, pl.LoRA, ["q_proj", "down_proj"], name="a", r=4, rank_pattern={"down_proj": 9}, rslora=True,
              modules_to_save=["lm_head"])  # fmt: skip
    head = model.lm_head.layer.weight.clone()
    loftq(model, "a")
    for path, adapter in pl.adapters(model)["a"].items():
        if path != "lm_head":
            assert torch.linalg.matrix_rank(adapter.lora_B) == (9 if "down_proj" in path else 4)
    assert not any(adapter.lora_B.any() for adapter in pl.adapters(model)["other"].values())
    assert torch.equal(model.lm_head.layer.weight, head)


# --- what is refused, with the model as it was ---


def state(model):
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    return kinds, {name: t.clone() for name, t in model.state_dict().items()}


def unchanged(model, before):
    kinds, tensors = state(model)
    assert kinds == before[0] and all(torch.equal(tensors[n], t) for n, t in before[1].items())


def trained(model):
    shake(next(iter(pl.adapters(model)["default"].values())))


def not_a_number(path):
    def spoil(model):
        bare(at(model, path)).weight.data[1, 2] = float("nan")

    return spoil


CASES = {
    "trained": (trained, {}, "'default' is trained .* overwritten"),
    "merged": (lambda m: pl.merge(m), {}, "default is merged .* unmerge"),
    "quantised": (lambda m: pl.quantize(m), {}, "q_proj'.*quantised already.*dense model.*in place of quantize"),
    "another name": (None, {"name": "defautl"}, "did you mean 'default'"),
    "no turns": (None, {"iterations": 0}, "iterations=0"),
    "half a turn": (None, {"iterations": 1.5}, "iterations=1.5"),
    "block": (None, {"block": 48}, "block size 48"),
    "kind": (None, {"kind": "nf3"}, "no data type 'nf3'"),
    "skips all its layers": (None, {"skip": "q_proj|down_proj"}, "no layer of adapter 'default' is quantised"),
    "skips nothing": (None, {"skip": "embed_tokens"}, "would not be quantised anyway"),
    "not finite": (not_a_number("model.layers.1.mlp.down_proj"), {}, "layers.1.mlp.down_proj'.*NaN"),
    "not finite elsewhere": (not_a_number("model.layers.1.mlp.up_proj"), {}, "layers.1.mlp.up_proj'.*NaN"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refusals(case):
    spoil, options, words = CASES[case]
    model, _ = attached()
    if spoil:
        spoil(model)
    kinds, tensors = state(model)
    with pytest.raises(ValueError, match=words):
        loftq(model, **options)
    after = state(model)
    assert kinds == after[0]
    assert all(torch.equal(after[1][n].nan_to_num(7), t.nan_to_num(7)) for n, t in tensors.items())


def test_other_methods_other_models_and_models_without_weights():
    model = pl.attach(build("llama"), pl.IA3)
    with pytest.raises(ValueError, match="is IA3, and LoftQ fills the A and B of LoRA"):
        loftq(model)
    with pytest.raises(ValueError, match="no adapter|Attached: none"):
        loftq(build("llama"))
    with pytest.raises(ValueError, match="alpha=0"):
        loftq(attached(alpha=0)[0])
    model, _ = attached()
    with pytest.raises(ValueError, match="meta device"):
        loftq(model.to("meta"))


@pytest.mark.parametrize("what", [RuntimeError, KeyboardInterrupt])
def test_a_failure_in_the_middle_changes_nothing(what, monkeypatch):
    model, _ = attached()
    before, svd, calls = state(model), torch.linalg.svd, []

    def fails_late(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise what("out of memory, or a user's hand")
        return svd(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", fails_late)
    with pytest.raises(what):
        loftq(model)
    unchanged(model, before)

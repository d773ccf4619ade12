"""Initialisations: each begins at the base, where the reference begins, and with the property it was made for."""

from __future__ import annotations

import copy
import inspect
import pickle

import peft
import pytest
import torch
from families import TARGETS, build, inputs, labels, shake
from parity import CLOSE
from torch import nn

import peftlab as pl
from peftlab import inits
from peftlab.inits import corda, eva, lora_ga, lora_null, milora, olora, pissa, qpissa
from peftlab.inits._common import split, svd
from peftlab.inits._data import batches, gradients, look, second_moments
from peftlab.inits.eva import Directions, ranks_of, shared_out
from peftlab.inits.kappatune import condition_numbers
from peftlab.inits.pissa import residual
from peftlab.intruders import intruders, reduce_intruders
from peftlab.layers import is_conv1d, weight_of
from peftlab.nf4 import pack, unpack

HYPER = dict(r=4, alpha=8)
FAMILIES = ["llama", "gpt2", "bert"]
DATA_FREE = {"pissa": pissa, "olora": olora, "milora": milora}
KEPT = {"pissa": pissa, "corda": corda}  # one of the weights, one of data: what is tested on a start is true of all


def logits(model, family: str = "llama", **batch):
    with torch.no_grad():
        return model(**(batch or inputs(family))).logits


def data(family: str = "llama", number: int = 2, rows: int = 3, length: int = 9) -> list[dict]:
    found = [inputs(family, rows, length, seed=11 + i) for i in range(number)]
    return [{**batch, "labels": labels(family, batch)} for batch in found]


def attached(family: str = "llama", targets=None, **hyper):
    return pl.attach(build(family), pl.LoRA, targets or TARGETS[family], name="a", **(HYPER | hyper))


def begun(how: str, family: str = "llama", model=None, **hyper):
    """A model whose LoRA "a" was begun by an initialisation of this name."""
    model = attached(family, **hyper) if model is None else model
    if how in ("eva", "corda", "lora_ga", "lora_null", "keeplora"):
        return getattr(inits, how)(model, data(family), name="a")
    return getattr(inits, how)(model, "a")


def there(model) -> dict[str, pl.LoRA]:
    return pl.adapters(model)["a"]


def theirs(family: str, init, model=None, targets=None, **hyper):
    config = peft.LoraConfig(
        target_modules=(targets or TARGETS[family]).split("|"), lora_alpha=8, init_lora_weights=init,
        fan_in_fan_out=family == "gpt2", **({"r": 4} | hyper),
    )  # fmt: skip
    return config, build(family) if model is None else model


def both_moved(ours, reference) -> None:
    """The factors of the reference, moved, in both models: they agree only if both began at the same product."""
    for seed, (path, adapter) in enumerate(there(ours).items()):
        layer = reference.base_model.model.get_submodule(path)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        for i, (mine, its) in enumerate(((adapter.lora_A, A), (adapter.lora_B, B))):
            draw = torch.Generator().manual_seed(2 * seed + i)
            its.data += 0.1 * torch.randn(its.shape, generator=draw)
            mine.data.copy_(its)


# --- a start that is kept: every law of LoRA holds for it ---


def moved(how: str, family: str = "llama", dtype=torch.float32, nf4: bool = False, **hyper):
    base = build(family).to(dtype)
    model = pl.attach(pl.quantize(base) if nf4 else base, pl.LoRA, TARGETS[family], name="a", **(HYPER | hyper))
    begun(how, family, model)
    for seed, adapter in enumerate(there(model).values()):
        shake(adapter, 0.05, seed=seed)
    return model


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("how", inits.INITS)
def test_each_begins_at_the_base_and_keeps_its_bytes(how, nf4):
    if how in ("loftq", "qpissa"):
        pytest.skip("made to begin beside it")
    base = pl.quantize(build("llama")) if nf4 else build("llama")
    want, before = logits(base), {k: v.clone() for k, v in base.state_dict().items()}
    model = begun(how, model=pl.attach(base, pl.LoRA, TARGETS["llama"], name="a", **HYPER))
    if how == "orthogonal":
        torch.testing.assert_close(logits(model), want, **CLOSE)  # B·A is nil up to rounding
    else:
        assert torch.equal(logits(model), want)
    after = {k.replace(".layer.", "."): v for k, v in model.state_dict().items() if ".adapters." not in k}
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert all(p.grad is None and not p.requires_grad for n, p in model.named_parameters() if ".adapters." not in n)


@pytest.mark.parametrize("nf4", [False, True])
def test_a_start_is_copied_pickled_compiled_merged_and_mixed(nf4):
    model, bare = moved("pissa", nf4=nf4), pl.quantize(build("llama")) if nf4 else build("llama")
    want, plain = logits(model), logits(bare)
    assert (want - plain).abs().max() > 0.05
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), want)
        assert all(a.start_A is not b.start_A for a, b in zip(there(twin).values(), there(model).values(), strict=True))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs("llama")).logits, want, **CLOSE)
    pl.attach(model, pl.LoRA, TARGETS["llama"], name="b", r=2)
    shake(there(model)["model.layers.0.self_attn.q_proj"].peers["b"], 0.2)
    with pl.using(model, "b"):
        other = logits(model)
    with pl.using(model, rows=["a", None, "b"]):
        mixed = logits(model)
    torch.testing.assert_close(mixed, torch.stack([want[0], plain[1], other[2]]), rtol=1e-5, atol=2e-5)
    pl.activate(model, "a")
    pl.merge(model)
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=2e-5)
    pl.unmerge(model)
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", KEPT)
def test_its_file_is_a_plain_lora_that_fits_the_base_as_it_was(how, family, rslora, tmp_path):
    model = moved(how, family, rslora=rslora, rank_pattern={r".*\.1\..*": 3})
    want = logits(model, family)
    assert (want - logits(build(family), family)).abs().max() > 0.02
    pl.save_adapter(model, tmp_path, name="a")
    reference = peft.PeftModel.from_pretrained(build(family), tmp_path).eval()
    torch.testing.assert_close(logits(reference, family), want, **CLOSE)
    again = pl.load_adapter(build(family), tmp_path, name="a")
    torch.testing.assert_close(logits(again, family), want, **CLOSE)
    for path, adapter in there(again).items():
        assert adapter.start_A is None and len(adapter.lora_A) == 2 * len(there(model)[path].lora_A)
        assert adapter.scaling == pytest.approx(there(model)[path].scaling, rel=1e-12)


def test_the_file_has_no_more_rank_than_the_layer_has(tmp_path):
    model = moved("pissa", r=20, lora_bias=True)  # q_proj is 32×32
    pl.save_adapter(model, tmp_path, name="a")
    again = pl.load_adapter(build("llama"), tmp_path, name="a")
    assert {len(a.lora_A) for a in there(again).values()} == {32}
    torch.testing.assert_close(logits(again), logits(model), **CLOSE)


def test_half_precision_adapters_begin_at_the_base_too():
    model = attached()
    for adapter in there(model).values():
        adapter.to(torch.bfloat16)
    want = logits(model)
    assert torch.equal(logits(pissa(model, "a")), want), "BA − B₀A₀ is taken apart before it is rounded"


def test_dropout_begins_at_the_base_too():
    model = attached(dropout=0.5).train()
    want = logits(model)
    assert torch.equal(logits(pissa(model, "a")), want)


def test_a_start_is_never_lost_without_a_word(tmp_path):
    model = moved("pissa")
    with pytest.raises(RuntimeError, match="start_A"):
        attached().load_state_dict(model.state_dict())
    twin = pissa(attached(), "a")
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(twin), logits(model))
    pl.save_adapter(attached(), tmp_path, name="a")
    with pytest.raises(ValueError, match="start_A"):  # values for a LoRA that begins at nothing
        pl.load_adapter(model, tmp_path, name="a")
    with pytest.raises(ValueError, match="plain LoRA"):
        pl.remedies.rescale(model, "a", 0.5)
    low = pl.to_lora(model, "a", r=8, into="low")
    assert low.error < 1e-6
    torch.testing.assert_close(logits(model), logits(twin), **CLOSE)


def test_training_goes_on_from_a_checkpoint_and_not_without_the_start(tmp_path):
    rows = [{"input_ids": row.tolist()} for row in inputs("llama", rows=6)["input_ids"]]
    settings = dict(steps=6, batch_size=3, lr=1e-2, progress=False)
    whole = pissa(attached(), "a")
    losses = pl.train(whole, rows, **settings).losses
    again = pissa(attached(), "a")
    for log in pl.train_steps(again, rows, checkpoint=tmp_path, steps=6, batch_size=3, lr=1e-2):
        if len(log) == 3:
            break
    with pytest.raises(ValueError, match="another run"):
        pl.train(attached(), rows, checkpoint=tmp_path, **settings)
    again = pissa(attached(), "a")
    assert pl.train(again, rows, checkpoint=tmp_path, **settings).losses == losses
    assert torch.equal(logits(again), logits(whole))


# --- of the weights alone ---


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", [
    pytest.param(how, marks=pytest.mark.reference(how, f"peft.tuners.lora.layer.LoraLayer.{how}_init"))
    for how in ("pissa", "olora")
])  # fmt: skip
def test_the_reference_begins_and_goes_on_the_same(how, family, rslora):
    if (how, family) == ("olora", "gpt2"):
        pytest.skip("see test_the_reference_decomposes_transposed_weights_as_they_lie")
    config, base = theirs(family, how, use_rslora=rslora)
    reference = peft.get_peft_model(base, config).eval()
    model = begun(how, family, rslora=rslora)
    for path, adapter in there(model).items():
        layer = reference.base_model.model.get_submodule(path)
        left = weight_of(adapter.layer) - adapter.scaling * adapter.start_B @ adapter.start_A
        torch.testing.assert_close(left, weight_of(layer.base_layer), rtol=0, atol=1e-6)
    both_moved(model, reference)
    torch.testing.assert_close(logits(model, family), logits(reference, family), **CLOSE)
    batch = inputs(family)
    for one in (model, reference):
        one(**batch, labels=labels(family, batch)).loss.backward()
    for path, adapter in there(model).items():
        layer = reference.base_model.model.get_submodule(path)
        torch.testing.assert_close(adapter.lora_A.grad, layer.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(adapter.lora_B.grad, layer.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-5)


def test_a_converted_file_of_the_reference_is_read(tmp_path):
    """Of its PiSSA files only those fit the original base; the others are refused by name."""
    config, base = theirs("llama", "pissa")
    reference = peft.get_peft_model(base, config).eval()
    config.init_lora_weights = True  # it asks for that
    reference.save_pretrained(tmp_path / "start")
    config.init_lora_weights = "pissa"
    both_moved(pissa(attached(), "a"), reference)
    want = logits(reference)
    reference.save_pretrained(tmp_path / "raw")
    with pytest.raises(ValueError, match="changed the base weights when training began"):
        pl.load_adapter(build("llama"), tmp_path / "raw")
    reference.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    torch.testing.assert_close(logits(pl.load_adapter(build("llama"), tmp_path / "plain")), want, **CLOSE)


def test_the_reference_decomposes_transposed_weights_as_they_lie():
    """OLoRA on GPT-2: where the layer is no square the reference cannot run, where it is it begins elsewhere."""
    config, base = theirs("gpt2", "olora", targets="attn.c_proj")
    off = logits(peft.get_peft_model(base, config).eval(), "gpt2") - logits(build("gpt2"), "gpt2")
    assert off.abs().max() > 1
    config, base = theirs("gpt2", "olora", targets="c_attn")
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        logits(peft.get_peft_model(base, config), "gpt2")
    assert torch.equal(logits(begun("olora", "gpt2"), "gpt2"), logits(build("gpt2"), "gpt2"))


def start(adapter) -> torch.Tensor:
    return adapter.scaling * adapter.start_B @ adapter.start_A


@pytest.mark.parametrize("alpha", [8, -2])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_principal_minor_and_orthonormal_parts(family, alpha):
    models = {how: begun(how, family, alpha=alpha) for how in DATA_FREE}
    for path in there(models["pissa"]):
        first, last, columns = (there(models[how])[path] for how in ("pissa", "milora", "olora"))
        W = weight_of(first.layer)
        U, S, Vt = torch.linalg.svd(W)
        for adapter, own in ((first, slice(4)), (last, slice(min(W.shape) - 4, min(W.shape)))):
            torch.testing.assert_close(start(adapter), U[:, own] * S[own] @ Vt[own], rtol=0, atol=1e-5)
        torch.testing.assert_close(first.start_A.norm(), first.start_B.norm())
        assert (last.start_A @ Vt[:4].T).abs().max() < 1e-5, "MiLoRA is orthogonal to the principal directions"
        torch.testing.assert_close(columns.start_B.T @ columns.start_B, torch.eye(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(start(columns) @ torch.eye(W.shape[1])[:, :4] / columns.scaling, W[:, :4],
                                   rtol=0, atol=1e-5)  # fmt: skip


def test_fast_pissa_comes_near_to_the_exact_one():
    """Nearer than the reference's at the same number of turns: its projection draws the r directions that it needs."""
    exact = {path: a for path, a in there(begun("pissa")).items()}
    most = {path: start(a).norm() for path, a in exact.items()}
    kept = []
    for niter in (0, 1, 4, 16):
        fast = there(pissa(attached(), "a", niter=niter))
        kept.append(sum((start(a).norm() / most[path]).item() for path, a in fast.items()) / 4)
    assert kept[0] < kept[1] < kept[2] < kept[3] <= 1 + 1e-6 and kept[2] > 0.99
    config, base = theirs("llama", "pissa_niter_4")
    reference = peft.get_peft_model(base, config)
    products = {path: reference.base_model.model.get_submodule(path).get_delta_weight("default") for path in exact}
    assert sum((W.norm() / most[path]).item() for path, W in products.items()) / 4 < kept[2]


def test_fast_pissa_draws_from_its_seed_alone():
    state = torch.get_rng_state()
    found = []
    for seed, drawn in ((5, 0), (5, 1), (6, 0)):
        model = attached()
        torch.randn(drawn)
        before = torch.get_rng_state()
        pissa(model, "a", niter=2, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        found.append([a.lora_A.detach() for a in there(model).values()])
    torch.set_rng_state(state)
    assert all(map(torch.equal, found[0], found[1])) and not any(map(torch.equal, found[0], found[2]))


@pytest.mark.parametrize("how", ["pissa", "olora", "milora"])
def test_their_first_gradient_is_there_for_both_factors(how):
    """Where LoRA's A has none: its B is zero."""
    batch = inputs("llama")
    for model, some in ((attached(), False), (begun(how), True)):
        model(**batch, labels=labels("llama", batch)).loss.backward()
        assert all(bool(a.lora_A.grad.any()) is some and a.lora_B.grad.any() for a in there(model).values())


def decaying(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A matrix with a few large singular values, as trained weights have them."""
    draw = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=draw)
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    return 0.02 * (U * (S + 30 * torch.exp(-torch.arange(len(S)) / 2.0))) @ Vt


@pytest.mark.parametrize("scaling", [1.0, 0.25, -2.0])
def test_a_packed_residual_is_nearer_than_a_packed_weight(scaling):
    """The paper's reason for QPiSSA, and more turns never lose."""
    W = decaying(64, 128)
    plain = (W - unpack(pack(W))).norm().item()
    errors = []
    for turns in (1, 2, 5):
        Q, A, B = residual(W, 8, turns, scaling)
        errors.append((W - unpack(Q) - scaling * B @ A).norm().item())
    assert errors[0] < 0.7 * plain and errors[2] <= errors[1] <= errors[0]


def test_qpissa_packs_the_residual_and_holds_a_plain_lora(tmp_path):
    base = build("llama")
    model = qpissa(pl.attach(copy.deepcopy(base), pl.LoRA, TARGETS["llama"], name="a", r=8, alpha=16), "a")
    for path, adapter in there(model).items():
        W, exact = weight_of(base.get_submodule(path)), start(there(begun("pissa", r=8, alpha=16))[path])
        torch.testing.assert_close(adapter.scaling * adapter.lora_B @ adapter.lora_A, exact, rtol=0, atol=1e-5)
        left = W - adapter.scaling * adapter.lora_B @ adapter.lora_A
        assert torch.equal(adapter.layer.dequantize(), unpack(pack(left)))
        assert adapter.start_A is None
    plain = pl.quantize(copy.deepcopy(base))
    assert (logits(model) - logits(base)).norm() < (logits(plain) - logits(base)).norm()
    assert isinstance(model.model.layers[0].self_attn.k_proj, pl.NF4Linear), "layers without the adapter too"


# --- random numbers ---


@pytest.mark.reference("gaussian", "peft.tuners.lora.layer.LoraLayer.reset_lora_parameters")
@pytest.mark.reference("orthogonal", "peft.tuners.lora.layer.LoraLayer.orthogonal_init")
def test_draws():
    """Bounds and deviations, beside the reference's for the two that it has beside its own."""
    model = attached(r=16)
    before = [a.lora_A.clone() for a in there(model).values()]
    inits.kaiming(model, "a", seed=3)
    for old, adapter in zip(before, there(model).values(), strict=True):
        bound = adapter.lora_A.shape[1] ** -0.5
        assert not torch.equal(old, adapter.lora_A) and not adapter.lora_B.any()
        assert 0.9 * bound < adapter.lora_A.abs().max() <= bound
    for how, wanted in (("gaussian", 1 / 16), ("orthogonal", 0.1 / 2**0.5)):
        config, base = theirs("llama", how, r=16)
        reference = peft.get_peft_model(base, config)
        spread = torch.cat([p.detach().flatten() for n, p in reference.named_parameters() if "lora_A" in n]).std()
        ours = torch.cat([a.lora_A.detach().flatten() for a in there(begun(how, r=16)).values()]).std()
        assert spread == pytest.approx(wanted, rel=0.1) and ours == pytest.approx(wanted, rel=0.1)
    for adapter in there(begun("orthogonal", r=16)).values():
        assert adapter.lora_B.abs().max() > 0.1 and (adapter.lora_B @ adapter.lora_A).abs().max() < 1e-6
    with pytest.raises(ValueError, match="r=3 is odd"):
        begun("orthogonal", r=3)


# --- of data ---


def test_layers_are_seen_without_padding_and_once_where_they_share_an_input():
    model = attached(targets="q_proj|k_proj|o_proj|gate_proj|up_proj")
    layers = {path: a.layer for path, a in there(model).items()}
    batch = data(number=1)[0]
    padded = {**batch, "input_ids": nn.functional.pad(batch["input_ids"], (0, 4)),
              "labels": nn.functional.pad(batch["labels"], (0, 4), value=-100),
              "attention_mask": nn.functional.pad(torch.ones_like(batch["input_ids"]), (0, 4))}  # fmt: skip
    seen = [], []
    for one, into in zip((batch, padded), seen, strict=True):
        look(model, layers, [one], lambda paths, X, into=into: into.append((paths, X)))
    assert [[p.rpartition(".")[2] for p in paths] for paths, _ in seen[0]] == [
        ["q_proj", "k_proj"], ["o_proj"], ["gate_proj", "up_proj"]] * 2  # fmt: skip
    for (paths, X), (same, Y) in zip(*seen, strict=True):
        assert paths == same and len(X) == 27
        torch.testing.assert_close(X, Y, rtol=0, atol=1e-5)
    answered = {**batch, "labels": batch["labels"].masked_fill(torch.arange(9) < 5, -100)}
    look(model, layers, [answered], lambda paths, X: seen[0].append(len(X)), answers=True)
    assert seen[0][-1] == 3 * 4
    C = second_moments(model, layers, [batch])
    for path, X in ((path, X) for paths, X in seen[1] for path in paths):
        torch.testing.assert_close(C[path], X.T @ X / len(X), rtol=1e-4, atol=1e-5)


def test_rows_become_batches_and_batches_stay():
    model = build("llama")
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}, {"input_ids": [4, 4]}]
    found = batches(model, rows, None, 2, "EVA")
    assert [tuple(b["input_ids"].shape) for b in found] == [(2, 3), (1, 2)]
    assert found[0]["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    ready = data()
    assert [b["input_ids"] is r["input_ids"] for b, r in zip(batches(model, iter(ready), None, 2, "EVA"), ready,
                                                            strict=True)] == [True, True]  # fmt: skip
    assert len(batches(model, ready[0], None, 2, "EVA")) == 1


@pytest.mark.reference("eva", "peft.tuners.lora.eva.get_eva_state_dict")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_finds_what_the_reference_finds(family, rho, monkeypatch):
    """With exact decompositions in both: each projects at random in its own way, which shows where σ are as close as
    here."""
    from peft.tuners.lora import eva as its
    from peft.utils.incremental_pca import IncrementalPCA

    monkeypatch.setattr(its, "IncrementalPCA", lambda n_components, **_: IncrementalPCA(n_components))
    monkeypatch.setitem(inspect.unwrap(eva).__globals__, "svd", lambda W, r, niter: svd(W, r, None))
    found = data(family, number=3, rows=8)
    config, base = theirs(family, "eva", eva_config=peft.EvaConfig(rho=rho))
    wanted = its.get_eva_state_dict(base, found, config, show_progress_bar=False)
    model = eva(attached(family), found, name="a", rho=rho)
    ranks = ranks_of(model, "a")
    assert ranks == {path: len(A) for path, A in wanted.items() if len(A)} and sum(ranks.values()) == 4 * 4
    assert rho == 2 or set(ranks.values()) == {4}
    for path, adapter in there(model).items():
        torch.testing.assert_close(adapter.lora_A.detach(), wanted[path].float(), rtol=0, atol=1e-3)
        assert adapter.scaling == 2 and not adapter.lora_B.any()


def test_eva_directions_are_the_singular_vectors_of_all_batches():
    draw = torch.Generator().manual_seed(0)
    X = torch.randn(120, 12, generator=draw) * torch.linspace(3, 0.1, 12) + torch.linspace(-2, 2, 12)
    own = Directions(6)
    for part in X.split([30, 50, 40]):
        own.add(part)
    U, S, Vt = torch.linalg.svd(X - X.mean(0), full_matrices=False)
    torch.testing.assert_close(own.mean, X.mean(0))
    assert own.variance == pytest.approx(S.square().sum().item(), rel=1e-5)
    torch.testing.assert_close(own.S, S[:6], rtol=1e-2, atol=0)  # what was cut off after a batch is missing
    assert (own.V[:3] @ Vt[:3].T).diagonal().abs().min() > 0.999
    assert shared_out({"a": torch.tensor([0.5, 0.2]), "b": torch.tensor([0.4, 0.3]), "c": torch.tensor([0.1])}, 3) == {
        "a": 1, "b": 2, "c": 0}  # fmt: skip


def test_eva_takes_adapters_away_and_what_is_left_can_be_saved(tmp_path):
    model = attached(targets="q_proj|v_proj|o_proj|down_proj", r=1)
    before = set(there(model))
    pl.attach(model, pl.LoRA, "q_proj", name="other")
    pl.activate(model, "a")
    eva(model, data(rows=8), name="a", rho=2)
    ranks = ranks_of(model, "a")
    assert sum(ranks.values()) == 8 and set(ranks.values()) == {1, 2}
    gone = before - set(ranks) - set(pl.adapters(model)["other"])
    assert gone and all(type(model.get_submodule(path)) is nn.Linear for path in gone)
    for seed, adapter in enumerate(there(model).values()):
        shake(adapter, 0.1, seed=seed)
    pl.save_adapter(model, tmp_path, name="a")
    reference = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    torch.testing.assert_close(logits(reference), logits(model), **CLOSE)
    assert set(pl.adapters(model)["other"]) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}


def test_eva_whitens_and_refuses_too_few_tokens():
    plain, white = (there(eva(attached(), data(rows=8), name="a", rho=1, whiten=w)) for w in (False, True))
    for path, adapter in plain.items():
        torch.testing.assert_close(adapter.lora_A.norm(dim=1), torch.ones(4))
        cosine = nn.functional.cosine_similarity(adapter.lora_A, white[path].lora_A)
        torch.testing.assert_close(cosine, torch.ones(4)) and white[path].lora_A.norm(dim=1)[0] < 0.9
    with pytest.raises(ValueError, match="directions to find, and no batch has as many tokens"):
        eva(attached(r=8), data(rows=1, length=9, number=2), name="a")


@pytest.mark.reference("corda", "peft.tuners.lora.layer.LoraLayer.corda_init")
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_corda_begins_where_the_reference_begins(family, keep):
    from peft.tuners.lora.corda import preprocess_corda

    row = data(family, number=1, rows=1, length=40)  # it takes one row at a time
    config, base = theirs(family, "corda", corda_config=peft.tuners.lora.config.CordaConfig(
        corda_method="kpm" if keep else "ipm"))  # fmt: skip
    preprocess_corda(base, config, run_model=lambda: base(**row[0]))
    reference = peft.get_peft_model(base, config).eval()
    model = corda(attached(family), row, name="a", keep=keep)
    for path, adapter in there(model).items():
        layer = reference.base_model.model.get_submodule(path)
        left = weight_of(adapter.layer) - start(adapter)
        torch.testing.assert_close(left, weight_of(layer.base_layer), rtol=0, atol=2e-4)  # its C is inverted in float32
    both_moved(model, reference)
    torch.testing.assert_close(logits(model, family), logits(reference, family), rtol=0, atol=2e-3)


def test_corda_is_the_best_answer_to_its_data_and_its_opposite_the_least_part():
    batch = data()
    fits = {"corda": corda(attached(), batch, name="a"), "pissa": begun("pissa"),
            "least": corda(attached(), batch, name="a", keep=True)}  # fmt: skip
    layers = {path: a.layer for path, a in there(fits["corda"]).items()}
    C = second_moments(fits["corda"], layers, batch)
    for path, layer in layers.items():
        W, own = layer.weight, C[path] + 0.01 * C[path].diagonal().mean() * torch.eye(len(C[path]))
        missed = {how: ((W - start(there(model)[path])) @ own).norm() for how, model in fits.items()}
        assert missed["corda"] < missed["pissa"] < missed["least"]
        assert (start(there(fits["least"])[path]) @ own).norm() < 0.1 * (W @ own).norm()


def test_lora_null_answers_nothing_to_its_data():
    """27 tokens in 32 dimensions leave a null space of 5, and r = 4; down_proj has 64."""
    batch = data(number=1)
    model = lora_null(attached(), batch, name="a")
    layers = {path: a.layer for path, a in there(model).items()}

    def check(paths, X):
        for path in paths:
            adapter = there(model)[path]
            assert start(adapter).norm() > 0.1
            assert (X @ adapter.start_A.T).abs().max() < 1e-4 * X.norm()

    look(model, layers, batch, check)
    want = logits(model, **batch[0])
    for adapter in there(model).values():
        adapter.lora_A.requires_grad_(False)
        adapter.lora_B.data += torch.randn(adapter.lora_B.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(logits(model, **batch[0]), want, rtol=0, atol=1e-3)
    assert (logits(model) - logits(build("llama"))).abs().max() > 0.1, "other inputs are answered otherwise"


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_full_finetuning_and_packed_layers_have_them(family):
    model, base, batch = attached(family), build(family), data(family)
    layers = {path: a.layer for path, a in there(model).items()}
    found = gradients(model, layers, batch)
    for one in batch:
        (base(**one).loss / len(batch)).backward()
    for path, G in found.items():
        layer = base.get_submodule(path)
        wanted = layer.weight.grad.T if is_conv1d(layer) else layer.weight.grad
        torch.testing.assert_close(G, wanted, rtol=1e-4, atol=1e-6)
    assert not any(p.grad is not None for p in model.parameters())
    if family == "llama":
        packed = pl.attach(pl.quantize(build(family)), pl.LoRA, TARGETS[family], name="a", **HYPER)
        near = gradients(packed, {path: a.layer for path, a in there(packed).items()}, batch)
        cosines = [nn.functional.cosine_similarity(near[p].flatten(), G.flatten(), dim=0) for p, G in found.items()]
        assert min(cosines) > 0.8


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_lora_ga_takes_the_first_step_of_full_finetuning(direction):
    """A₀ and B₀ together move BA along the best rank-2r part of the gradient, exactly."""
    batch = data()
    model = lora_ga(attached(), batch, name="a", direction=direction, gamma=9)
    layers = {path: a.layer for path, a in there(model).items()}
    for path, G in gradients(model, layers, batch).items():
        adapter = there(model)[path]
        A, B = adapter.start_A, adapter.start_B
        U, S, Vt = torch.linalg.svd(G)
        best = U[:, :8] * S[:8] @ Vt[:8]
        c = len(G) ** 0.25 / 3
        torch.testing.assert_close((B @ B.T @ G + G @ A.T @ A) / c**2, best, rtol=1e-3, atol=1e-3 * best.abs().max())
        torch.testing.assert_close(A.norm(dim=1), torch.full((4,), c))


@pytest.mark.reference("lora_ga", "peft.tuners.lora.layer.LoraLayer.lora_ga_init")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_reference_lets_lora_ga_depend_on_the_size_of_the_loss(family):
    """The same gradient and the same A, but its B is multiplied by the singular values, and on GPT-2 by ⁴√in."""
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    batch = data(family, number=1)
    config, base = theirs(family, "lora_ga", lora_ga_config=LoraGAConfig())

    def step():
        base.eval()  # without GPT-2's dropout
        base(**batch[0]).loss.backward()

    preprocess_loraga(base, config, step)
    its = {n: m._peft_loraga_grad for n, m in base.named_modules() if hasattr(m, "_peft_loraga_grad")}
    model = lora_ga(attached(family), batch, name="a")
    found = gradients(model, {path: a.layer for path, a in there(model).items()}, batch)
    reference = peft.get_peft_model(base, config).eval()
    for path, adapter in there(model).items():
        G = its[path].T if family == "gpt2" else its[path]
        torch.testing.assert_close(found[path], G, rtol=1e-4, atol=1e-6)
        layer = reference.base_model.model.get_submodule(path)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        S = torch.linalg.svdvals(G)[4:8]
        its_out = layer.base_layer.weight.shape[0]
        torch.testing.assert_close(B.norm(dim=0), its_out**0.25 / 4 * S, rtol=1e-2, atol=0)
        torch.testing.assert_close(adapter.lora_B.norm(dim=0), torch.full((4,), len(G) ** 0.25 / 4))
        cosine = nn.functional.cosine_similarity(adapter.lora_B, B, dim=0).abs()
        assert cosine.min() > 0.99 and nn.functional.cosine_similarity(adapter.lora_A, A).abs().min() > 0.99


# --- targets, and what is left afterwards ---


@pytest.mark.reference("KappaTune", "peft.helpers.find_kappa_target_modules")
def test_kappatune_chooses_what_the_reference_chooses():
    from peft.helpers import find_kappa_target_modules

    model = build("llama")
    wanted = find_kappa_target_modules(model, top_p=0.3, show_progress=False)["target_modules"]
    linear = r".*_proj|lm_head"
    assert inits.kappatune(model, 0.3, linear) == wanted and len(wanted) == 4
    chosen = inits.kappatune(model, 0.3)
    assert set(pl.adapters(pl.attach(model, pl.LoRA, chosen))["default"]) == set(chosen)
    assert inits.kappatune(model, 0.01) == chosen[:1]
    assert find_kappa_target_modules(build("gpt2"), show_progress=False)["target_modules"] == ["lm_head"]
    assert len(inits.kappatune(build("gpt2"), 1.0)) == 8
    with pytest.raises(ValueError, match="share=0"):
        inits.kappatune(model, 0)


def test_a_condition_number_is_that_of_the_weight():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.data = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0]))
    model[1].weight.data = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert condition_numbers(model, ["0", "1"]) == {"0": pytest.approx(8.0), "1": float("inf")}


def with_intruders(family: str = "llama"):
    model = attached(family)
    for seed, adapter in enumerate(there(model).values()):
        shake(adapter, 0.4, seed=seed)
    return model


@pytest.mark.reference("intruder reduction", "peft.tuners.lora.intruders.reduce_intruder_dimension")
def test_intruders_are_reduced_as_the_reference_reduces_them(tmp_path):
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    model = with_intruders()
    pl.save_adapter(model, tmp_path, name="a")
    reference = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    said = []
    reduce_intruder_dimension(reference, "default", "mild", 6, 0.5, 0.6, said.append)
    table = reduce_intruders(model, "a", "mild", top=6, epsilon=0.5, factor=0.6)
    assert sum(int(line.rsplit(" ", 1)[1]) for line in said if "Intruders:" in line) == table.total > 0
    assert table == intruders(model, "a", 6) or table.found == intruders(model, "a", 6).found
    torch.testing.assert_close(logits(model), logits(reference), **CLOSE)
    with pl.using(model, "a"):
        assert (logits(model) - logits(reference)).abs().max() > 0.01
    assert len(intruders(model, "mild", 6).found) == 4 and "intruders among the first 6" in repr(table)


def test_the_reference_reduces_transposed_weights_as_they_lie(tmp_path):
    """Intruders on GPT-2: A and B change places, so the new adapter is another one, or cannot run at all."""
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    for targets, runs in (("attn.c_proj", True), ("c_attn", False)):
        model = attached("gpt2", targets)
        for seed, adapter in enumerate(there(model).values()):
            shake(adapter, 0.4, seed=seed)
        pl.save_adapter(model, tmp_path / targets, name="a")
        reference = peft.PeftModel.from_pretrained(build("gpt2"), tmp_path / targets).eval()
        reduce_intruder_dimension(reference, mitigation_lambda=0.99, logging_sink=None)  # as good as unchanged
        reduce_intruders(model, "a", "mild", factor=0.99)
        if not runs:
            with pytest.raises(RuntimeError, match="cannot be multiplied"):
                logits(reference, "gpt2")
            continue
        reduced, its = logits(model, "gpt2"), logits(reference, "gpt2")
        with pl.using(model, "a"):
            whole = logits(model, "gpt2")
        assert (reduced - whole).norm() < 0.1 * (its - whole).norm()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_intruder_is_a_direction_that_the_base_has_not(family):
    """A planted one is found, in its place, and is gone with factor=0; what turns W's own vectors is none."""
    model = attached(family, r=1)
    path, adapter = next(iter(there(model).items()))
    W = weight_of(adapter.layer)
    U, S, Vt = torch.linalg.svd(W)
    adapter.lora_B.data[:, 0] = U[:, 0] * S[0] / adapter.scaling
    adapter.lora_A.data[0] = Vt[0]
    assert intruders(model, "a").total == 0
    u = U[:, : min(W.shape)].sum(1, keepdim=True) / min(W.shape) ** 0.5  # a mean of all: its cosine with each is small
    adapter.lora_B.data = 20 * S[0] * u / adapter.scaling
    assert intruders(model, "a").found[path] == [0]
    reduce_intruders(model, "a", "none", factor=0.0)
    left = pl.adapters(model)["none"][path]
    change = left.scaling * left.lora_B @ left.lora_A
    assert change.norm() < 0.2 * (adapter.scaling * adapter.lora_B @ adapter.lora_A).norm()


# --- what is refused, with the model as it was ---


def trained(model):
    shake(next(iter(there(model).values())))


REFUSED = {
    "trained": (trained, "is trained .* overwritten"),
    "begun": (lambda m: pissa(m, "a"), "begun already .* overwritten"),
    "merged": (lambda m: pl.merge(m), "a is merged .* unmerge"),
    "meta": (lambda m: m.to("meta"), "meta device"),
    "not finite": (lambda m: there(m)["model.layers.1.mlp.down_proj"].layer.weight.data[0].fill_(torch.nan),
                   "layers.1.mlp.down_proj' holds NaN"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("how", inits.INITS)
def test_refusals(how, case):
    if case == "not finite" and how in ("kaiming", "gaussian", "orthogonal"):
        pytest.skip("does not read the weights")
    model = attached()
    spoil, words = REFUSED[case]
    spoil(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        begun(how, model=model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    if case != "meta":
        assert all(torch.equal(after[n].nan_to_num(7), t.nan_to_num(7)) for n, t in before.items())


@pytest.mark.parametrize("how", inits.INITS)
def test_other_methods_and_unknown_names(how):
    model = pl.attach(build("llama"), pl.IA3, name="a")
    with pytest.raises(ValueError, match="is IA3, and .* fills the A and B of LoRA"):
        begun(how, model=model)
    with pytest.raises(ValueError, match="no adapter|Attached: none"):
        begun(how, model=build("llama"))
    with pytest.raises(ValueError, match="alpha=0"):
        begun(how, alpha=0)


@pytest.mark.parametrize("how", [eva, corda, lora_null, lora_ga])
def test_missing_data(how):
    for nothing in (None, [], iter(())):
        with pytest.raises(ValueError, match="begins from calibration data and has none"):
            how(attached(), nothing, name="a")
    with pytest.raises(ValueError, match="pass the tokenizer"):
        how(attached(), [{"text": "words"}], name="a")
    with pytest.raises(ValueError, match="batch_size=0"):
        how(attached(), data(), name="a", batch_size=0)


def test_numbers_out_of_range():
    for call, words in {
        lambda: pissa(attached(), "a", niter=-1): "niter=-1",
        lambda: qpissa(attached(), "a", iterations=0): "iterations=0",
        lambda: eva(attached(), data(), name="a", rho=0.5): "rho=0.5",
        lambda: corda(attached(), data(), name="a", damp=0): "damp=0",
        lambda: lora_ga(attached(), data(), name="a", direction="up"): "direction='up'",
        lambda: lora_ga(attached(r=20), data(), name="a"): "r=20 singular vectors to A",
        lambda: lora_ga(attached(), [inputs("llama")], name="a"): "no labels",
        lambda: reduce_intruders(with_intruders(), "a", "b", factor=2): "factor=2",
        lambda: intruders(with_intruders(), "a", top=0): "top=0",
        lambda: intruders(pl.attach(build("llama"), pl.IA3), "default"): "no product",
    }.items():
        with pytest.raises(ValueError, match=words):
            call()


def test_split_shares_the_singular_values():
    U, S, Vt = torch.linalg.svd(decaying(12, 8), full_matrices=False)
    for scaling in (2.0, -0.5):
        A, B = split(U[:, :3], S[:3], Vt[:3], scaling)
        torch.testing.assert_close(scaling * B @ A, U[:, :3] * S[:3] @ Vt[:3])
        torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))

"""Methods around shared, frozen or random matrices: beside the reference, and what is their own."""

from __future__ import annotations

import json
from dataclasses import replace

import peft
import pytest
import torch
from families import build, check_refused, inputs, labels, shake
from parity import CLOSE, Pair, beside, check_reads_ours, check_reads_theirs, dense, logits
from safetensors.torch import load_file
from torch import nn

import peftlab as pl

# the reference warns at each use of a seed in place of the tensors, which is what is asked for here
pytestmark = pytest.mark.filterwarnings("ignore:Specified to not")
FROM_SEED = dict(seed=3, save_projection=False)
THEIR_SEED = dict(projection_prng_key=3, save_projection=False)

PAIRS = {
    "VeRA": Pair("VeRA", peft.VeraConfig, dict(r=16, save_projection=True), conv1d=True),
    "VeRA, from its seed": Pair("VeRA", peft.VeraConfig, dict(r=5, d_initial=0.3, dropout=0.2, **FROM_SEED),
                                dict(r=5, d_initial=0.3, vera_dropout=0.2, **THEIR_SEED)),
    "PVeRA": Pair("PVeRA", peft.PveraConfig, dict(r=16, save_projection=True), conv1d=True),
    "PVeRA, from its seed": Pair("PVeRA", peft.PveraConfig, dict(r=5, dropout=0.2, **FROM_SEED),
                                 dict(r=5, pvera_dropout=0.2, **THEIR_SEED)),
    "RandLoRA": Pair("RandLoRA", peft.RandLoraConfig, dict(r=8, alpha=4, save_projection=True),
                     dict(r=8, randlora_alpha=4), 0.1, conv1d=True),
    "RandLoRA, from its seed": Pair("RandLoRA", peft.RandLoraConfig, dict(r=5, alpha=2, dropout=0.2, **FROM_SEED),
                                    dict(r=5, randlora_alpha=2, randlora_dropout=0.2, **THEIR_SEED), 0.1),
    "RandLoRA, sparse": Pair("RandLoRA", peft.RandLoraConfig, dict(r=6, alpha=3, sparse=True, **FROM_SEED),
                             dict(r=6, randlora_alpha=3, sparse=True, **THEIR_SEED), 0.1),
    "RandLoRA, very sparse": Pair("RandLoRA", peft.RandLoraConfig, dict(r=5, alpha=2, very_sparse=True, **FROM_SEED),
                                  dict(r=5, randlora_alpha=2, very_sparse=True, **THEIR_SEED), 0.1),
    "VBLoRA": Pair("VBLoRA", peft.VBLoRAConfig, dict(r=3, num_vectors=7, vector_length=16), moved=0.4, conv1d=True),
    "VBLoRA, the topmost": Pair("VBLoRA", peft.VBLoRAConfig, dict(r=2, num_vectors=9, vector_length=8, topk=3,
                                                                  save_only_topk_weights=True), moved=0.4),
    "UniLoRA": Pair("UniLoRA", peft.UniLoraConfig, dict(r=4, d=50), dict(r=4, theta_d_length=50), 2.0, conv1d=True),
    "UniLoRA, with indices": Pair("UniLoRA", peft.UniLoraConfig, dict(r=2, d=64, seed=3, save_indices=True),
                                  dict(r=2, theta_d_length=64, proj_seed=3, save_indices=True), 2.0),
    "TinyLoRA": Pair("TinyLoRA", peft.TinyLoraConfig, dict(r=2, u=5, save_projection=True), dict(r=2, u=5),
                     0.5, conv1d=True),
    "TinyLoRA, from its seed": Pair("TinyLoRA", peft.TinyLoraConfig, dict(r=3, u=9, weight_tying=0.6, **FROM_SEED),
                                    dict(r=3, u=9, weight_tying=0.6, projection_seed=3, save_projection=False), 0.3),
    "FRoD": Pair("FRoD", peft.FrodConfig, dict(sparse_rate=0.05, save_projection=True),
                 dict(sparse_rate=0.05, progressbar=False), 0.2, conv1d=True),
    "FRoD, from its seed": Pair("FRoD", peft.FrodConfig, dict(sparse_rate=0.02, regularization_alpha=0.1, **FROM_SEED),
                                dict(sparse_rate=0.02, regularization_alpha=0.1, progressbar=False, **THEIR_SEED), 0.2),
}  # fmt: skip
CASES = [(pair, "llama") for pair in PAIRS] + [(p, f) for p in PAIRS if PAIRS[p].conv1d for f in ("gpt2", "bert")]
every = beside("name, family", CASES, PAIRS)
SHARED = ("vblora_vector_bank", "unilora_theta_d", "tinylora_v")


@every("writes")
def test_the_reference_reads_ours(name, family, tmp_path):
    check_reads_ours(family, PAIRS[name], tmp_path)


@every("reads", "gradients")
def test_ours_reads_the_reference_with_its_count_and_gradients(name, family, tmp_path):
    check_reads_theirs(family, replace(PAIRS[name], gradients=False), tmp_path)  # shared ones have other names there
    batch = inputs(family)
    model = pl.load_adapter(build(family), tmp_path, name="a")
    theirs = peft.PeftModel.from_pretrained(build(family), tmp_path, is_trainable=True).eval()
    for one in (theirs, model):
        one(**batch, labels=labels(family, batch)).loss.backward()
    ours = {}
    for path, adapter in pl.adapters(model)["a"].items():
        for n, p in adapter.named_parameters():
            ours[f"{n}.{adapter.group}" if n == "tinylora_v" else n if n in SHARED else f"{path}.{n}"] = p.grad
    for n, p in theirs.named_parameters():
        if p.requires_grad:
            path = n.removeprefix("base_model.model.").removeprefix("base_model.").replace(".default", "")
            shared = next((path[path.index(s) :] for s in SHARED if s in path), None)
            torch.testing.assert_close(ours.pop(shared or path), p.grad, rtol=1e-4, atol=1e-6)
    assert not ours, "a parameter here that the reference has not"
    assert pl.count(model).trainable == pl.count(model).expected["a"]


# ------------------------------------------------------------------------------------- where the reference is wrong


def theirs_moved(config, family="llama", moved=0.2):
    model = peft.get_peft_model(build(family), config).eval()
    for seed, p in enumerate(p for p in model.parameters() if p.requires_grad):
        p.data += moved * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    return model


def test_a_second_vera_of_the_reference_loses_its_meaning_without_saved_projections(tmp_path):
    """There it uses the first one's A and B, cut from wider ones; alone, it draws narrower ones: other numbers. With
    the projections in its file the reference cannot load it at all; we cut what the layers need."""
    for saved in (False, True):
        settings = dict(r=4, save_projection=saved)
        model = theirs_moved(peft.VeraConfig(target_modules=["down_proj", "q_proj"], **settings))
        model.add_adapter("b", peft.VeraConfig(target_modules=["q_proj"], **settings))
        model.set_adapter("b")
        for seed, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        want = logits(model, "llama")
        model.save_pretrained(tmp_path / str(saved), selected_adapters=["b"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(build("llama"), tmp_path / "True" / "b")
    again = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "False" / "b").eval()
    assert (logits(again, "llama") - want).abs().max() > 0.1, "mended there"
    ours = pl.load_adapter(build("llama"), tmp_path / "True" / "b")
    torch.testing.assert_close(logits(ours, "llama"), want, **CLOSE)


def test_randlora_of_the_reference_draws_other_bases_where_bfloat16_is_missing(monkeypatch):
    """Its bases come from a seed and from the machine: float16 where there is no bfloat16. Ours: always bfloat16."""
    config = dict(target_modules=["q_proj"], r=4, save_projection=False)
    one = peft.get_peft_model(build("llama"), peft.RandLoraConfig(**config)).base_model.randlora_B["default"]
    monkeypatch.setattr(peft.tuners.randlora.model, "is_bf16_available", lambda: False)
    other = peft.get_peft_model(build("llama"), peft.RandLoraConfig(**config)).base_model.randlora_B["default"]
    assert (one.float() - other.float()).abs().max() > 0.1, "mended there"


def test_randlora_of_the_reference_writes_its_bases_once_a_layer(tmp_path):
    """And once more for the model, though all are the same; ours once, and not at all with a seed."""
    theirs_moved(peft.RandLoraConfig(target_modules=["q_proj", "down_proj"], r=4)).save_pretrained(tmp_path / "theirs")
    for saved in (True, False):
        model = pl.attach(build("llama"), pl.RandLoRA, "q_proj|down_proj", r=4, save_projection=saved)
        pl.save_adapter(model, tmp_path / str(saved))
    numbers = {name: sum(t.numel() for t in load_file(tmp_path / name / "adapter_model.safetensors").values())
               for name in ("theirs", "True", "False")}  # fmt: skip
    bases = 4 * 32 + 64 * 32
    assert numbers["False"] == pl.count(model).trainable == 4 * 8 * (4 + 32)
    assert numbers["True"] == numbers["False"] + bases and numbers["theirs"] == numbers["False"] + 5 * bases


def test_the_topmost_weights_can_make_the_reference_say_nan(tmp_path):
    """It takes the last weight for 1 minus the sum of the others, and that one's logarithm. Where the last is less than
    rounding, the others can sum to 1.0000001: here in 6 of 100 pieces. One is enough."""
    model = pl.attach(build("llama"), pl.VBLoRA, "down_proj", topk=4, num_vectors=5, vector_length=4,
                      save_only_topk_weights=True)  # fmt: skip
    for seed, adapter in enumerate(pl.adapters(model)["default"].values()):
        adapter.vblora_vector_bank.data.mul_(20)
        for number, p in enumerate((adapter.vblora_logits_A, adapter.vblora_logits_B)):
            p.data.normal_(generator=torch.Generator().manual_seed(2 * seed + number))
            p.data[..., 3:] = torch.tensor([-20.0, -30.0])
    want = logits(model, "llama")
    pl.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    assert logits(theirs, "llama").isnan().any(), "mended there"
    torch.testing.assert_close(logits(pl.load_adapter(build("llama"), tmp_path), "llama"), want, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------ what is their own


def attached(method, targets="q_proj|v_proj|down_proj", moved=0.3, **hyper):
    model = pl.attach(build("llama"), method, targets, name="a", **hyper)
    for seed, adapter in enumerate(pl.adapters(model)["a"].values()):
        shake(adapter, moved, seed=seed)
    return model, pl.adapters(model)["a"]


SETTINGS = {
    "VeRA": dict(r=8), "PVeRA": dict(r=8), "RandLoRA": dict(r=8, alpha=4), "VBLoRA": dict(num_vectors=6),
    "UniLoRA": dict(d=40), "TinyLoRA": dict(u=4, weight_tying=0.5), "LoRAXS": dict(r=4), "SVFT": dict(off_diagonals=1),
    "TiedLoRA": dict(r=4), "NOLA": dict(k=5), "FRoD": dict(sparse_rate=0.05),
}  # fmt: skip
all_methods = pytest.mark.parametrize("method", SETTINGS)


@all_methods
def test_what_is_shared_moves_with_the_model_and_is_counted_without_weights(method):
    """model.double() reaches each tensor once, wherever it is held; a model on meta has the same count."""
    model, adapters = attached(method, **SETTINGS[method])
    want = logits(model, "llama")
    torch.testing.assert_close(logits(model.double(), "llama").float(), want, rtol=0, atol=1e-4)
    kept = [t for a in adapters.values() for t in (*a.parameters(), *a.buffers()) if t.is_floating_point()]
    assert {t.dtype for t in kept} == {torch.double}
    on_meta = pl.attach(build("llama").to("meta"), method, "q_proj|v_proj|down_proj", **SETTINGS[method])
    assert pl.count(on_meta).trainable == pl.count(model).trainable == pl.count(model).expected["a"]
    loose = [t for a in pl.adapters(on_meta)["default"].values() for t in (*a.parameters(), *a.buffers())]
    assert all(t.is_meta for t in loose)


@all_methods
def test_by_hand_on_one_layer_it_works_alone(method):
    torch.manual_seed(0)
    layer = nn.Linear(24, 16).requires_grad_(False)
    adapter = pl.METHODS[method](layer, **SETTINGS[method])
    x = torch.randn(3, 24)
    adapter(layer, x)  # those that share draw now what they would share
    shake(adapter, 0.2)
    y = adapter.eval()(layer, x)
    assert (y - layer(x)).abs().max() > 1e-3
    if (factors := adapter.factors()) is not None:
        A, B, s = factors
        torch.testing.assert_close(y, layer(x) + s * x @ A.T @ B.T, rtol=1e-4, atol=1e-5)
    y.sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_rows_that_are_kept_see_a_change_in_what_another_layer_holds():
    model, adapters = attached("UniLoRA", moved=1.0, **SETTINGS["UniLoRA"])
    batch = inputs("llama", rows=2)
    with torch.no_grad(), pl.using(model, rows=["a", None]):
        before = model(**batch).logits
        adapters[min(adapters)].unilora_theta_d.mul_(2)
        after = model(**batch).logits
    with torch.no_grad(), pl.using(model, "a"):
        alone = model(input_ids=batch["input_ids"][:1]).logits
    torch.testing.assert_close(after[:1], alone, rtol=0, atol=2e-5)
    assert (after - before)[0].abs().max() > 0.1


def test_vera_has_one_pair_for_all_layers_and_only_vectors_in_its_file(tmp_path):
    model, adapters = attached("VeRA", r=8, seed=5)
    pairs = [adapter.pair() for adapter in adapters.values()]
    assert len({A.data_ptr() for A, _ in pairs}) == len({B.data_ptr() for _, B in pairs}) == 1
    assert {tuple(A.shape) for A, _ in pairs} == {(8, 32), (8, 64)}
    pl.save_adapter(model, tmp_path, name="a")
    assert {key.rpartition(".")[2] for key in load_file(tmp_path / "adapter_model.safetensors")} == {
        "vera_lambda_b", "vera_lambda_d"}  # fmt: skip
    assert json.loads((tmp_path / "adapter_config.json").read_text())["projection_prng_key"] == 5
    with pytest.raises(ValueError, match="r must be one for all layers"):
        pl.attach(build("llama"), pl.VeRA, "q_proj|v_proj", r=8, rank_pattern={"v_proj": 4})


def test_pvera_draws_around_its_mean_with_the_deviation_that_it_learned():
    torch.manual_seed(0)
    layer = nn.Linear(12, 6).requires_grad_(False)
    adapter = pl.PVeRA(layer, r=3)
    x = torch.randn(1, 12)
    adapter.pair()
    shake(adapter, 0.5)
    A, B = adapter.pair()
    with torch.no_grad():
        deviation = (adapter.pvera_lambda_d * (x @ A.T))[:, 3:].div(2).exp()
        drawn = adapter.train().delta(x.expand(20_000, -1))
        mean = adapter.eval().delta(x)
        wanted = ((adapter.pvera_lambda_b[:, None] * B * deviation) ** 2).sum(1).sqrt()  # independent ε add up so
    error = 5 / 20_000**0.5  # five standard errors of a mean; of a deviation, five make 1/√2 of that
    assert ((drawn.mean(0) - mean).abs() < error * wanted).all()
    assert ((drawn.std(0) / wanted - 1).abs() < error).all()


def test_randlora_has_full_rank_and_a_smaller_r_trains_more():
    _, adapters = attached("RandLoRA", r=5, alpha=1)
    for path, adapter in adapters.items():
        A, B, s = adapter.factors()
        assert torch.linalg.matrix_rank((s * B @ A).double()) == min(A.shape[1], B.shape[0]), path
    assert [pl.RandLoRA.size(64, 32, r=r) for r in (1, 4, 8, 32)] == [1056, 288, 160, 64]


@pytest.mark.parametrize(("how", "share"), [("sparse", 1 / 3), ("very_sparse", 1 / 64**0.5)])
def test_randlora_can_have_ternary_bases(how, share):
    model = pl.attach(nn.Sequential(nn.Linear(64, 96)), "RandLoRA", "0", name="a", r=4, **{how: True})
    held = pl.adapters(model)["a"]["0"].shared
    B = held.randlora_B
    values = B.unique()
    assert len(values) == 3 and values[1] == 0 and values[0] == -values[2] and B.std().item() == pytest.approx(1)
    found = (B != 0).double().mean().item()
    assert abs(found - share) < 5 * (share * (1 - share) / B.numel()) ** 0.5
    assert held.randlora_A.unique().numel() == 3


def test_vb_lora_mixes_k_vectors_of_one_bank_and_can_go_on_from_the_topmost(tmp_path):
    hyper = dict(num_vectors=6, vector_length=8, topk=2, save_only_topk_weights=True)
    model, adapters = attached("VBLoRA", **hyper)
    banks = {adapter.vblora_vector_bank.data_ptr() for adapter in adapters.values()}
    assert len(banks) == 1
    adapter = adapters[max(adapters)]
    A, _ = adapter.matrices()
    for piece, logits_ in zip(A.view(-1, 8), adapter.vblora_logits_A.view(-1, 6), strict=True):
        two = logits_.topk(2).indices
        w = torch.linalg.lstsq(adapter.vblora_vector_bank[two].T, piece[:, None]).solution
        torch.testing.assert_close(adapter.vblora_vector_bank[two].T @ w, piece[:, None], rtol=0, atol=1e-5)
        assert (w > 0).all() and abs(w.sum() - 1) < 1e-4
    pl.save_adapter(model, tmp_path, name="a")
    again = pl.load_adapter(build("llama"), tmp_path).train()
    batch = inputs("llama")
    again(**batch, labels=labels("llama", batch)).loss.backward()
    for path, adapter in pl.adapters(again)["default"].items():
        gradient = adapter.vblora_logits_A.grad
        assert gradient.isfinite().all() and (gradient != 0).sum() <= 2 * gradient[..., 0].numel(), path
    pl.save_adapter(again, tmp_path)  # −∞ in the logits is not in the file


def test_uni_lora_keeps_lengths_and_angles_and_deals_evenly():
    """PᵀP = 1: Li et al. 2025, arXiv:2506.00799, the projection is an isometry."""
    _, adapters = attached("UniLoRA", d=37, r=3, moved=1.0)
    D, P = 0, []
    for adapter in adapters.values():
        for indices in (adapter.unilora_indices_A, adapter.unilora_indices_B):
            one = torch.zeros(indices.numel(), 37)
            one[torch.arange(indices.numel()), indices.flatten()] = adapter.shared.scale[indices.flatten()]
            D, P = D + indices.numel(), [*P, one]
    P = torch.cat(P)
    torch.testing.assert_close(P.T @ P, torch.eye(37), rtol=0, atol=1e-5)
    copies = (P != 0).sum(0)
    assert copies.sum() == D and copies.max() - copies.min() <= 1
    theta_D = torch.cat([t.flatten() for a in adapters.values() for t in a.factors()[:2]])
    torch.testing.assert_close(theta_D.norm(), adapter.unilora_theta_d.norm(), rtol=1e-5, atol=0)


def test_uni_lora_without_indices_needs_to_know_its_modules(tmp_path):
    model, _ = attached("UniLoRA", d=40)
    want = logits(model, "llama")
    pl.save_adapter(model, tmp_path, name="a")
    assert list(load_file(tmp_path / "adapter_model.safetensors")) == ["base_model.unilora_theta_d"]
    at = tmp_path / "adapter_config.json"
    config = json.loads(at.read_text())
    at.write_text(json.dumps(config | {"target_modules": r".*\.(q_proj|v_proj|down_proj)"}))
    assert torch.equal(logits(pl.load_adapter(build("llama"), tmp_path), "llama"), want)
    refused = {"save_indices=True": {"layers_to_transform": [0]}, "no linear": {"target_modules": ["x"]}}
    for said, changed in refused.items():
        at.write_text(json.dumps(config | changed))
        with pytest.raises(ValueError, match=said):
            pl.load_adapter(build("llama"), tmp_path)


def top(layer, r):
    U, S, Vt = torch.linalg.svd(layer.weight, full_matrices=False)
    return U[:, :r], S[:r], Vt[:r]


@pytest.mark.parametrize("method", ["LoRAXS", "TinyLoRA"])
def test_the_change_stays_within_the_first_singular_vectors(method):
    model, adapters = attached(method, r=3)
    for path, change in dense(model).items():
        U, _, Vt = top(adapters[path].layer, 3)
        torch.testing.assert_close(U @ (U.T @ change @ Vt.T) @ Vt, change, rtol=0, atol=1e-5)
        assert torch.linalg.matrix_rank(change, rtol=1e-4) == 3


def test_lora_xs_with_minus_one_takes_the_best_approximation_away():
    model, adapters = attached("LoRAXS", r=5)
    for adapter in adapters.values():
        adapter.R.data = -torch.eye(5)
    for path, change in dense(model).items():
        U, S, Vt = top(adapters[path].layer, 5)
        torch.testing.assert_close(change, -(U * S) @ Vt, rtol=0, atol=1e-5)
    # 24.6K in the paper for RoBERTa-large at rank 16: query, value and both output layers of 24 blocks
    targets = r"query|value|attention.output.dense|(?<!attention.)output.dense"
    assert pl.count("roberta-large", pl.LoRAXS, targets=targets, r=16).trainable == 24_576


@pytest.mark.parametrize(("weight_tying", "vectors"), [(0.0, 6), (0.5, 3), (0.6, 2), (1.0, 1)])
def test_tinylora_ties_neighbours(weight_tying, vectors):
    _, adapters = attached("TinyLoRA", u=2, weight_tying=weight_tying)
    found = [id(adapter.tinylora_v) for adapter in adapters.values()]
    assert len(set(found)) == vectors and found == sorted(found, key=found.index)
    assert len({adapter.tinylora_P.sum().item() for adapter in adapters.values()}) == 6, "each has its own P"


def test_svft_moves_singular_values_and_turns_only_between_neighbours():
    model, adapters = attached("SVFT")
    for path, change in dense(model).items():
        U, S, Vt = top(adapters[path].layer, 64)
        inside = U.T @ change @ Vt.T
        torch.testing.assert_close(inside, torch.diag(inside.diag()), rtol=0, atol=1e-5)
    model, adapters = attached("SVFT", off_diagonals=2)
    for path, change in dense(model).items():
        U, _, Vt = top(adapters[path].layer, 64)
        inside, n = U.T @ change @ Vt.T, min(change.shape)
        far = (torch.arange(n)[:, None] - torch.arange(n)).abs() > 2
        assert inside[far].abs().max() < 1e-5 and (inside[~far].abs() > 1e-4).sum() > 0.99 * (~far).sum()
        assert (~far).sum() == len(adapters[path].M) == n * 2 + (n - 2) * 3
        assert torch.linalg.matrix_rank(change) == n, "full rank from 5·n numbers"


def test_tied_lora_has_one_pair_a_shape_and_nola_one_basis():
    model, adapters = attached("TiedLoRA", r=4)
    shapes = {a.layer.weight.shape for a in adapters.values()}
    assert len({id(a.A) for a in adapters.values()}) == len({id(a.B) for a in adapters.values()}) == len(shapes) == 3
    for adapter in adapters.values():
        adapter.u.data.fill_(1), adapter.v.data.fill_(1)
    changes = dense(model)
    assert all(torch.equal(changes[p], changes[p.replace("layers.0", "layers.1")]) for p in changes if "layers.0" in p)
    model, adapters = attached("NOLA", r=3, k=5)
    assert len({id(a.shared) for a in adapters.values()}) == 3
    assert pl.NOLA.size(4096, 4096, r=64, k=5) == pl.NOLA.size(8, 8, r=1, k=5) == 10 < pl.LoRA.size(4096, 4096, r=1)
    for path, adapter in adapters.items():
        A = sum(a * part for a, part in zip(adapter.a, adapter.shared.A, strict=True))
        B = sum(b * part for b, part in zip(adapter.b, adapter.shared.B, strict=True))
        torch.testing.assert_close(dense(model)[path], adapter.scaling * B @ A, rtol=0, atol=1e-4)


def test_frod_writes_each_weight_in_the_basis_of_its_kind():
    _, adapters = attached("FRoD", "q_proj|v_proj|down_proj|up_proj", sparse_rate=0.1)
    for path, adapter in adapters.items():
        V = adapter.shared.V
        torch.testing.assert_close(adapter.U * adapter.start @ V.T, adapter.layer.weight, rtol=0, atol=1e-3)
        torch.testing.assert_close(adapter.U.norm(dim=0), torch.ones(len(V)), rtol=0, atol=1e-5)
        row, column = adapter.shared.where
        assert (row != column).all() and len(set(zip(row.tolist(), column.tolist(), strict=True))) == len(row)
        assert len(row) == int(0.1 * len(V) ** 2)
        assert adapter.shared is adapters[path.replace("layers.0", "layers.1")].shared
    assert len({id(adapter.shared) for adapter in adapters.values()}) == 4


@pytest.mark.parametrize(("method", "hyper", "said"), [
    ("VeRA", dict(r=0), "below 1"),
    ("PVeRA", dict(r=0), "below 1"),
    ("RandLoRA", dict(r=0), "below 1"),
    ("VBLoRA", dict(vector_length=5), "divisors of 32 do"),
    ("VBLoRA", dict(topk=300), "in 1…256"),
    ("UniLoRA", dict(d=0), "at least 1"),
    ("TinyLoRA", dict(r=33), "in 1…32"),
    ("TinyLoRA", dict(weight_tying=2), "in 0…1"),
    ("LoRAXS", dict(r=33), "take a smaller r"),
    ("SVFT", dict(off_diagonals=32), "in 0…31"),
    ("TiedLoRA", dict(r=33), "in 1…32"),
    ("NOLA", dict(k=0), "at least 1"),
    ("FRoD", dict(sparse_rate=1.5), "in 0…1"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_by_name_and_nothing_is_attached(method, hyper, said):
    check_refused(said, method, "q_proj", **hyper)

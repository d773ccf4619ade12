"""Sparse changes, edited representations, side networks and late bottlenecks: beside the reference, and what is their
own."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from families import FAMILIES, TARGETS, build, build_other, check_refused, inputs, labels, shake
from parity import Pair, adapted, beside, check_reads_ours, check_reads_theirs, dense, logits
from torch import nn

import peftlab as pl
from peftlab.layers import weight_of
from peftlab.sites import group

PAIRS = {
    "SHiRA": Pair("SHiRA", peft.ShiraConfig, dict(r=4, seed=3), dict(r=4, random_seed=3), moved=0.5),
    "SHiRA, no seed": Pair("SHiRA", peft.ShiraConfig, dict(r=1), moved=0.9),
    "SuperTuning": Pair("SuperTuning", peft.SupertuningConfig, dict(sparsity=0.8), moved=0.5),
    "SuperTuning, smallest": Pair("SuperTuning", peft.SupertuningConfig, dict(sparsity=0.9, select_top=False),
                                  moved=0.5),
    "SuperTuning, hybrid": Pair("SuperTuning", peft.SupertuningConfig, dict(sparsity=0.9, r=3, alpha=5),
                                dict(sparsity=0.9, r=3, lora_alpha=5)),
    "SuperTuning, places found again": Pair(
        "SuperTuning", peft.SupertuningConfig, dict(sparsity=0.9, r=2, save_places=False, dropout=0.1),
        dict(sparsity=0.9, r=2, save_precomputed_indices=False, lora_dropout=0.1)),
    "BEFT": Pair("BEFT", peft.BeftConfig, merges=False),
}  # fmt: skip
ON_BERT = ["SHiRA", "SuperTuning", "BEFT"]  # one setting of each there
every = beside("family, name", [("llama", name) for name in PAIRS] + [("bert", name) for name in ON_BERT], PAIRS)


@every("writes")
def test_the_reference_reads_ours(family, name, tmp_path):
    check_reads_ours(family, PAIRS[name], tmp_path)


@every("reads", "gradients")
def test_ours_reads_the_reference_with_its_count_and_gradients(family, name, tmp_path):
    check_reads_theirs(family, PAIRS[name], tmp_path)


@pytest.mark.parametrize("method, hyper", [
    ("SHiRA", dict(r=3)), ("SuperTuning", dict(sparsity=0.9, r=2)), ("BEFT", {}), ("RED", {}),
])  # fmt: skip
def test_they_merge_into_transposed_weights_too(method, hyper):
    """GPT-2's Conv1D, which the reference has none of these on."""
    model = pl.attach(build("gpt2"), method, TARGETS["gpt2"], name="a", **hyper)
    for adapter in pl.adapters(model)["a"].values():
        shake(adapter, 0.3)
    want = logits(model, "gpt2")
    assert (want - logits(build("gpt2"), "gpt2")).abs().max() > 0.05
    torch.testing.assert_close(logits(pl.merge(model), "gpt2"), want, rtol=1e-5, atol=2e-5)
    counted = pl.count(model)
    assert counted.expected["a"] == counted.per_adapter["a"]


# ------------------------------------------------------------------------------------------------- sparse changes


def test_shira_draws_the_references_places_and_its_change_is_of_full_rank():
    for seed in (None, 0, 11):
        model = pl.attach(build("llama"), pl.SHiRA, "q_proj|o_proj|down_proj", name="a", r=4, seed=seed)
        config = peft.ShiraConfig(r=4, random_seed=seed, target_modules=["q_proj", "o_proj", "down_proj"])
        theirs = dict(peft.get_peft_model(build("llama"), config).base_model.model.named_modules())
        for path, adapter in pl.adapters(model)["a"].items():
            assert torch.equal(adapter.shira_indices, theirs[path].shira_indices["default"])
            shake(adapter, 1.0)
    there = pl.adapters(model)["a"]
    for path, change in dense(model).items():
        assert change.count_nonzero() == 4 * sum(change.shape) == there[path].shira_weight.numel()
        assert torch.linalg.matrix_rank(change.double()) > 4 * 4
    # a trap of the reference, kept for its files: one seed gives all layers of one shape the same places
    q = [a.shira_indices for p, a in there.items() if p.endswith(("q_proj", "o_proj"))]
    assert all(torch.equal(q[0], other) for other in q)


def test_two_shiras_of_different_seeds_hardly_meet():
    """k places of N each meet in k²/N of them on average: 64 of 4,096 twice is one. The paper's reason for less
    interference when adapters are added."""
    layer = nn.Linear(64, 64, bias=False)
    masks = [dense_of(pl.SHiRA(layer, r=1, seed=s)) for s in range(12)]
    meet = [(a & b).sum().item() for i, a in enumerate(masks) for b in masks[:i]]
    assert abs(sum(meet) / len(meet) - 128**2 / 4096) < 0.8  # 66 pairs, deviation of the mean about 0.25


def dense_of(adapter) -> torch.Tensor:
    """Which entries of the weight a sparse adapter may change."""
    with torch.no_grad():
        for p in adapter.parameters():
            p.fill_(1.0)
        return adapter.delta(torch.eye(adapter.layer.weight.shape[1])).T != 0


def test_supertuning_takes_the_largest_weights_and_counts_them():
    model = pl.attach(build("llama"), pl.SuperTuning, "q_proj|down_proj", name="a", sparsity=0.9)
    for adapter in pl.adapters(model)["a"].values():
        W, free = weight_of(adapter.layer).abs(), dense_of(adapter)
        assert free.sum() == int(0.1 * W.numel() + 1e-6) == adapter.values.numel()
        assert W[free].min() >= W[~free].max()
    smallest = pl.SuperTuning(nn.Linear(8, 8), sparsity=0.5, select_top=False)
    W, free = weight_of(smallest.layer).abs(), dense_of(smallest)
    assert W[free].max() <= W[~free].min()


def test_supertuning_without_its_places_has_a_smaller_file(tmp_path):
    sizes = []
    for save in (True, False):
        model = pl.attach(build("llama"), pl.SuperTuning, "q_proj", name="a", sparsity=0.5, save_places=save)
        folder = pl.save_adapter(model, tmp_path / str(save), name="a")
        sizes.append((folder / "adapter_model.safetensors").stat().st_size)
    assert sizes[0] - sizes[1] > 0.45 * sizes[0]  # values and places have four bytes each; and a header


def test_beft_moves_what_attention_gives_by_a_constant_whatever_it_looks_at():
    model = pl.attach(build("bert"), pl.BEFT, name="a")
    assert all(path.endswith("value") for path in pl.hosts(model)) and len(pl.hosts(model)) == 2
    attention, x = model.bert.encoder.layer[0].attention.self, torch.randn(2, 5, 32)
    with torch.no_grad():
        before = attention(x)[0]
        shake(attention.value.adapters["a"], 1.0)
        moved = attention(x)[0] - before
    b = attention.value.adapters["a"].beft_bias.detach()
    torch.testing.assert_close(moved, b.expand_as(moved), rtol=0, atol=1e-5)


def test_beft_merges_where_there_was_no_bias_and_the_reference_refuses(tmp_path):
    model = adapted("llama", PAIRS["BEFT"])
    want = logits(model, "llama")
    pl.save_adapter(model, tmp_path, "a")
    torch.testing.assert_close(logits(pl.merge(model), "llama"), want, rtol=0, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    with pytest.raises(ValueError, match="no bias"):
        theirs.merge_and_unload()


# ------------------------------------------------------------------------------------------------- representations


@pytest.mark.parametrize("family", [*FAMILIES, "bloom", "deepseek", "distilbert", "mixtral", "modernbert", "mpt"])
def test_all_blocks_are_the_outermost_ones(family):
    model = build(family) if family in FAMILIES else build_other(family)
    found = group(model, "all-blocks")
    assert len(found) == (4 if family == "t5" else 2)
    assert all(sum(name.isdigit() for name in path.split(".")) == 1 for path in found)


def test_a_model_without_blocks_says_so():
    with pytest.raises(ValueError, match="no list of blocks that hold attention"):
        pl.attach(nn.Sequential(nn.Linear(3, 3)), pl.LoReFT)


def test_loreft_changes_nothing_outside_of_its_subspace():
    torch.manual_seed(0)
    adapter = pl.LoReFT(build("llama").model.layers[0], r=3)
    torch.testing.assert_close(adapter.rotation(), adapter.R, rtol=0, atol=1e-6)  # no row is turned about
    shake(adapter, 0.5)
    R, h = adapter.rotation().detach(), torch.randn(5, 32)
    torch.testing.assert_close(R @ R.T, torch.eye(3), rtol=0, atol=1e-5)
    with torch.no_grad():
        after = h + adapter.edit(h)
    torch.testing.assert_close(h - h @ R.T @ R, after - after @ R.T @ R, rtol=0, atol=1e-5)
    torch.testing.assert_close(after @ R.T, h @ adapter.W.T + adapter.b, rtol=0, atol=1e-5)  # replaced, not added to


def test_direft_is_a_low_rank_map_of_hidden_states_at_all_positions_if_asked():
    model = build("bert")  # its blocks give a tuple, or the states alone
    plain = model.bert.encoder.layer[1].register_forward_hook(lambda m, args, out: got.update(h=out))
    got: dict = {}
    logits(model, "bert")
    plain.remove()
    pl.attach(model, pl.DiReFT, "layer.1", name="a", r=3, first=None)
    a = pl.adapters(model)["a"]["bert.encoder.layer.1"]
    shake(a, 0.3)
    model.bert.encoder.layer[1].register_forward_hook(lambda m, args, out: got.update(y=out))
    logits(model, "bert")
    h, y = (out[0] if isinstance(out, tuple) else out for out in (got["h"], got["y"]))
    with torch.no_grad():
        torch.testing.assert_close(y, h + torch.einsum("rd,btr->btd", a.W2, torch.einsum("rd,btd->btr", a.W1, h) + a.b))


@pytest.mark.parametrize("method", ["LoReFT", "DiReFT"])
def test_the_published_share_of_reft(method):
    """Table 1 of arXiv:2404.03592: r = 8 in all blocks is 0.031 % of LLaMA-7B and 0.025 % of LLaMA-13B."""
    for size, printed in (("llama-7b", 0.031), ("llama-13b", 0.025)):
        counted = pl.count(size, method, r=8)
        assert round(100 * counted.trainable / (counted.total - counted.trainable), 3) == printed
        assert counted.expected["default"] == counted.trainable


def test_red_has_the_published_count():
    """0.26M in LLaMA-2 7B: 32 blocks, two vectors of 4,096."""
    assert pl.count("llama-2-7b", pl.RED).trainable == 262_144


def test_red_scales_and_then_shifts():
    layer, x = nn.Linear(4, 6), torch.randn(3, 4)
    adapter = pl.RED(layer)
    shake(adapter, 0.5)
    with torch.no_grad():
        torch.testing.assert_close(adapter(layer, x), adapter.l_scale * layer(x) + adapter.l_bias)


@pytest.mark.parametrize("method", ["LoReFT", "DiReFT"])
def test_reft_edits_only_the_first_positions_and_padding_does_not_count(method):
    model = pl.attach(build("llama"), method, "layers.1", name="a", r=3, first=2)
    shake(pl.adapters(model)["a"]["model.layers.1"], 0.3)
    ids = inputs("llama", rows=1)["input_ids"]
    with torch.no_grad():
        moved = model.model(ids).last_hidden_state
        with pl.using(model):
            plain = model.model(ids).last_hidden_state
        assert torch.equal(moved[:, 2:], plain[:, 2:]) and ((moved - plain).abs().amax(-1)[0, :2] > 0.01).all()
        for left in (True, False):  # padding on either side
            pad, mask = torch.zeros(1, 3, dtype=torch.long), torch.ones_like(ids)
            padded = torch.cat([pad, ids] if left else [ids, pad], 1)
            mask = torch.cat([pad, mask] if left else [mask, pad], 1)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            out = model.model(padded, attention_mask=mask, position_ids=positions).last_hidden_state
            torch.testing.assert_close(out[:, 3:] if left else out[:, :-3], moved, rtol=1e-5, atol=1e-5)
            with pl.using(model):
                bare = model.model(padded, attention_mask=mask, position_ids=positions).last_hidden_state
            assert torch.equal(out[mask == 0], bare[mask == 0]), "padding itself is left alone"


def test_reft_counts_last_positions_from_the_end_of_each_text():
    """BERT gets its mask by position, not by name; rows of different lengths are edited as each would be alone."""
    model = pl.attach(build("bert"), pl.DiReFT, name="a", r=3, first=0, last=2)
    for adapter in pl.adapters(model)["a"].values():
        shake(adapter, 0.3)
    ids = inputs("bert", rows=2, length=9)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    with torch.no_grad():
        states = model.bert(ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(states[1:, :6], model.bert(ids[1:, :6]).last_hidden_state, rtol=1e-5, atol=1e-5)
        with pl.using(model):
            plain = model.bert(ids, attention_mask=mask).last_hidden_state
    assert not torch.allclose(plain[1], states[1], atol=1e-2)


def test_reft_writes_the_same_with_and_without_a_cache():
    model = pl.attach(build("llama"), pl.LoReFT, name="a", r=3, first=3)
    for adapter in pl.adapters(model)["a"].values():
        shake(adapter, 0.3)
    ids = inputs("llama")["input_ids"]
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))
    assert torch.equal(model.generate(ids, use_cache=True, **settings),
                       model.generate(ids, use_cache=False, **settings))  # fmt: skip


def test_reft_edits_the_encoder_of_an_encoder_decoder():
    model = pl.attach(build("t5"), pl.DiReFT)
    assert list(pl.hosts(model)) == ["encoder.block.0", "encoder.block.1"]


# --------------------------------------------------------------------------- diff pruning, FISH mask, lottery, SAID


def rows(n: int = 6, length: int = 9) -> list[dict]:
    ids = inputs("llama", rows=n, length=length, seed=3)["input_ids"]
    return [{"input_ids": row, "labels": row} for row in ids.tolist()]


def test_gates_are_open_half_open_and_shut_as_often_as_the_formula_says():
    torch.manual_seed(0)
    adapter = pl.DiffPruning(nn.Linear(100, 100), alpha=-0.5)
    z = adapter.gate(adapter.alpha).detach()
    assert (z == 0).any() and (z == 1).any() and ((z > 0) & (z < 1)).any()
    often = adapter.expected_changes() / 10_000 / torch.sigmoid(adapter.alpha_group).item()  # the other gate's share
    assert abs((z > 0).float().mean() - often) < 0.02  # 10,000 draws: deviation 0.005
    torch.testing.assert_close(often, torch.sigmoid(torch.tensor([-0.5]))[0])  # −l/r is 1 here, and its log 0
    adapter.eval()
    assert torch.equal(adapter.gate(adapter.alpha), adapter.gate(adapter.alpha))


def test_the_penalty_shuts_gates_in_training():
    left = {}
    for weight in (0.0, 1e-3):
        torch.manual_seed(0)
        model = pl.attach(build("llama"), pl.DiffPruning, "q_proj", name="a", penalty_weight=weight, alpha=1.0)
        pl.train(model, rows(), steps=5, batch_size=2, lr=0.5, progress=False)
        left[weight] = sum(a.expected_changes().item() for a in pl.adapters(model)["a"].values())
    assert left[1e-3] < 0.5 * left[0.0]


def test_diff_pruning_trains_two_numbers_an_entry_and_one_more_if_structured():
    layer = nn.Linear(5, 7)
    for structured in (True, False):
        adapter = pl.DiffPruning(layer, structured=structured, alpha=0.3)
        assert sum(p.numel() for p in adapter.parameters()) == pl.DiffPruning.size(7, 5, structured=structured)
        shake(adapter, 0.1)
        (adapter.eval().delta(torch.randn(3, 5)).sum() + adapter.penalty()).backward()
        assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())


def test_projected_diff_pruning_keeps_the_largest_changes_with_their_values():
    torch.manual_seed(0)
    model = pl.attach(build("llama"), pl.DiffPruning, "q_proj|down_proj", name="diff", alpha=1.0)
    for seed, adapter in enumerate(pl.adapters(model)["diff"].values()):
        shake(adapter, 0.5, seed=seed)
    pl.inits.project(model.train(), "diff", density=0.1, name="small")
    model.eval()
    small, kept, dropped = pl.adapters(model)["small"], [], []
    for path, adapter in pl.adapters(model)["diff"].items():
        change = adapter.change_of_weight().detach()
        mine = torch.zeros_like(change)
        if path in small:  # a layer whose changes are all small has no part in it
            mine = small[path].delta(torch.eye(change.shape[1])).T.detach()
        assert torch.equal(mine[mine != 0], change[mine != 0])
        kept.append(change[mine != 0].abs())
        dropped.append(change[mine == 0].abs())
    entries = sum(map(len, kept + dropped))
    assert sum(map(len, kept)) == int(0.1 * entries) and torch.cat(kept).min() >= torch.cat(dropped).max()
    with pytest.raises(ValueError, match="is FishMask"):
        pl.inits.project(model, "small", name="again")


def test_fish_takes_the_entries_with_the_largest_mean_squared_gradient_of_all_layers(tmp_path):
    model, data = build("llama"), [*rows(2, 12), *rows(3, 4)]  # a long row says more than a short one
    pl.inits.fish(model, data, density=0.02, targets="q_proj|down_proj", name="a", samples=4)
    there = pl.adapters(model)["a"]
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".adapters." not in n)
    bare = build("llama")
    weights = {path: bare.get_parameter(f"{path}.weight") for path in pl.layer_shapes(bare, "q_proj|down_proj")}
    fisher = {path: torch.zeros_like(W) for path, W in weights.items()}
    for row in data[:4]:  # by hand: the sum over a row's predicted tokens, one row at a time
        ids = torch.tensor([row["input_ids"]])
        bare.zero_grad()
        logp = torch.log_softmax(bare(input_ids=ids).logits[0, :-1], -1)
        logp.gather(1, ids[0, 1:, None]).sum().backward()
        for path, W in weights.items():
            fisher[path] += W.grad**2
    flat = torch.cat([f.flatten() for f in fisher.values()])
    k = int(0.02 * flat.numel())
    least = flat.topk(k).values[-1]
    assert sum(a.values.numel() for a in there.values()) == k == pl.count(model).expected["a"]
    assert len({a.values.numel() for a in there.values()}) > 1, "layers have different shares"
    for path, adapter in there.items():
        assert fisher[path].flatten()[adapter.places.long()].min() >= 0.999 * least
    for seed, adapter in enumerate(there.values()):
        shake(adapter, 0.5, seed=seed)
    want = logits(model, "llama")
    pl.save_adapter(model, tmp_path, "a")  # with layers of different k
    assert torch.equal(logits(pl.load_adapter(build("llama"), tmp_path, "b"), "llama"), want)


def test_fish_leaves_the_model_alone_when_it_cannot_be():
    model = pl.quantize(build("llama"))
    with pytest.raises(ValueError, match="load the model dense"):
        pl.inits.fish(model, rows())
    model = build("llama")
    with pytest.raises(ValueError, match="leaves 0 to train"):
        pl.inits.fish(model, rows(2), density=1e-6, targets="q_proj")
    assert not pl.hosts(model) and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="pl.inits.fish"):
        pl.attach(model, pl.FishMask)


def test_fish_beside_other_adapters_asks_the_bare_base():
    plain = pl.inits.fish(build("llama"), rows(2), density=0.02, targets="q_proj", name="a")
    model = pl.attach(build("llama"), pl.LoRA, name="low")
    for adapter in pl.adapters(model)["low"].values():
        shake(adapter, 0.5)
    pl.inits.fish(model, rows(2), density=0.02, targets="q_proj", name="a")
    for path, adapter in pl.adapters(model)["a"].items():
        assert torch.equal(adapter.places, pl.adapters(plain)["a"][path].places)
    assert all(p.requires_grad for a in pl.adapters(model)["low"].values() for p in a.parameters())


def test_the_lottery_takes_what_full_fine_tuning_moved_most():
    model = build("llama")
    tuned = copy.deepcopy(model)
    W = tuned.model.layers[1].mlp.down_proj.weight.data
    W[3, 5] += 1.0
    W[7, 60] -= 2.0
    tuned.model.layers[0].self_attn.q_proj.weight.data[0, 1] += 0.01
    entries = sum(o * i for o, i in pl.layer_shapes(model).values())
    pl.inits.lottery(model, tuned, density=2.5 / entries, name="a")
    ((path, adapter),) = pl.adapters(model)["a"].items()
    assert path == "model.layers.1.mlp.down_proj" and sorted(adapter.places.tolist()) == [3 * 64 + 5, 7 * 64 + 60]
    assert not adapter.values.any(), "winners begin at the base again"
    with pytest.raises(ValueError, match="does not differ"):
        pl.inits.lottery(build("llama"), build("llama"))


def test_said_projects_by_hadamards_matrix_and_keeps_lengths():
    from peftlab.methods.said import hadamard

    H = torch.stack([hadamard(row) for row in torch.eye(16)])
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    by_hand = torch.kron(torch.kron(two, two), torch.kron(two, two))
    assert torch.equal(H.T, by_hand) and torch.equal(H @ H.T, 16 * torch.eye(16))
    model = pl.attach(build("llama"), pl.SAID, "q_proj|down_proj", name="a", d=40)
    there = pl.adapters(model)["a"]
    draw = torch.Generator().manual_seed(0)
    thetas = [torch.randn(40, generator=draw) for _ in range(20)]
    for adapter in there.values():
        lengths = torch.stack([adapter.projected(t).norm() / t.norm() for t in thetas])
        assert abs(lengths.mean() - 1) < 0.1  # deviation of one about 1/√40
        P = torch.stack([adapter.projected(t).flatten() for t in torch.eye(40)])
        assert torch.linalg.matrix_rank(P.double()) == 40
        torch.testing.assert_close(thetas[0] @ P, adapter.projected(thetas[0]).flatten(), rtol=0, atol=1e-5)
    first, second = list(there.values())[:2]
    assert not torch.equal(first.signs[:1024], second.signs[:1024]), "each layer has its own projection"


def test_said_trains_d_numbers_for_a_whole_model_and_one_a_layer(tmp_path):
    counted = pl.count("roberta-large", pl.SAID, targets="query|value")
    assert counted.trainable == counted.expected["default"] == 200 + 2 * 24
    model = pl.attach(build("llama"), pl.SAID, "q_proj", name="a", d=50)
    folder = pl.save_adapter(model, tmp_path, "a")
    assert (folder / "adapter_model.safetensors").stat().st_size < 4 * 52 + 1500  # 52 numbers, no projection


# ---------------------------------------------------------------------------------- side networks, late bottlenecks


def kept_for_backward(model: nn.Module) -> int:
    """Numbers that the graph of one loss keeps, besides parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = inputs("llama", rows=4, length=32)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = model.model(**batch).last_hidden_state
    hidden.sum().backward()
    return sum(sizes.values())


def test_the_ladder_keeps_little_for_backward_because_the_base_has_no_graph():
    memory = {}
    for method, hyper in (("LoRA", dict(r=1)), ("LadderSide", dict(bottleneck=2))):
        model = pl.attach(build("llama").train(), method, name="a", **hyper)
        memory[method] = kept_for_backward(model)
        assert all(p.grad is None for n, p in model.named_parameters() if ".adapters." not in n)
    assert memory["LadderSide"] < 0.35 * memory["LoRA"]
    pl.attach(model, pl.LoRA, name="low", r=1)
    pl.activate(model, "low", "a")
    assert kept_for_backward(model) == memory["LadderSide"], "nor does an adapter inside of the base get a gradient"
    assert all(p.grad is None for a in pl.adapters(model)["low"].values() for p in a.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ladder_stands_beside_any_family_and_learns(family):
    torch.manual_seed(0)
    model, batch = build(family), inputs(family)
    plain = logits(model, family)
    pl.attach(model, pl.LadderSide, name="a", bottleneck=4)
    assert torch.equal(logits(model, family), plain)
    optimizer, losses = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-2), []
    for _ in range(8):
        losses.append(model(**batch, labels=labels(family, batch)).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    assert pl.count(model).expected["a"] == pl.count(model).per_adapter["a"] > 0
    assert all(not a.seen for a in pl.adapters(model)["a"].values()), "what the taps saw is not kept"


def test_the_ladders_gates_begin_in_the_middle_and_mix():
    torch.manual_seed(0)
    model = pl.attach(build("llama"), pl.LadderSide, name="a", bottleneck=4)
    side = next(a for a in pl.adapters(model)["a"].values() if a.beside)
    h = [torch.randn(1, 2, 32) for _ in range(3)]
    with torch.no_grad():
        side.alpha[:] = 100.0  # shut: only what was embedded gets through
        assert torch.equal(side.side(h), side.side([h[0], h[1] * 3, h[2] - 1]))
        side.alpha[1] = -100.0  # the last rung listens to its block alone
        assert torch.equal(side.side(h), side.side([h[0] + 1, h[1] * 3, h[2]]))


def test_the_ladder_writes_the_same_with_and_without_a_cache():
    model = pl.attach(build("llama"), pl.LadderSide, name="a", bottleneck=4)
    for adapter in pl.adapters(model)["a"].values():
        shake(adapter, 0.5)
    ids = inputs("llama")["input_ids"]
    settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))
    assert torch.equal(model.generate(ids, use_cache=True, **settings),
                       model.generate(ids, use_cache=False, **settings))  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- shadow

DECODERS = ["llama", "mistral", "gpt2", "opt", "bloom", "gptj"]


def any_build(family: str) -> nn.Module:
    return build(family) if family in FAMILIES else build_other(family)


def shadowed(family: str, **hyper) -> nn.Module:
    torch.manual_seed(0)
    model = pl.attach(any_build(family), pl.Shadow, name="a", **hyper)
    for seed, adapter in enumerate(pl.adapters(model)["a"].values()):
        shake(adapter, 0.2, seed=seed)
    return model.eval()


SHADOWS = {"plain": dict(r=4, alpha=1.0), "deeper": dict(r=2, alpha=0.7, layers=2, update=5)}


@pytest.mark.reference("Shadow", "writes", "reads", "gradients")
@pytest.mark.parametrize("hyper", SHADOWS.values(), ids=SHADOWS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_reference_reads_our_shadow_and_we_its_own(family, hyper, tmp_path):
    model = shadowed(family, **hyper)
    ours = logits(model, family)
    assert (ours - logits(build(family), family)).abs().max() > 0.05
    pl.save_adapter(model, tmp_path / "ours", name="a")
    theirs = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours", is_trainable=True).eval()
    torch.testing.assert_close(logits(theirs, family), ours, rtol=0, atol=1e-5)

    theirs.peft_config["default"].auxiliary_loss_weight = 0.0  # ours has none: the loss is the model's own
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "shadow_" in n:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))))
    theirs.save_pretrained(tmp_path / "theirs")
    model = pl.load_adapter(build(family), tmp_path / "theirs", name="a")
    torch.testing.assert_close(logits(model, family), logits(theirs, family), rtol=0, atol=1e-5)
    batch = inputs(family)
    for one in (theirs, model):
        one(**batch, labels=labels(family, batch)).loss.backward()
    mine = {}
    for path, adapter in pl.adapters(model)["a"].items():
        for n, p in adapter.named_parameters():
            part, _, rest = n.partition(".")
            place = "" if part == "shadow_backbone" else f"model.{path}."
            mine[f"base_model.{place}{part}.default.{rest}"] = p
    dead = {n for n, p in theirs.named_parameters() if p.requires_grad} - set(mine)
    last = "1.shadow_update_"
    assert dead and all(last in n or n.endswith("wte.weight") for n in dead), "counted there, and never trained"
    there = dict(theirs.named_parameters())
    assert all(there[n].grad is None for n in dead)
    for n, p in mine.items():
        torch.testing.assert_close(p.grad, there[n].grad, rtol=1e-4, atol=1e-6)


def test_the_shadows_count_on_llama_is_one_block_and_thin_matrices():
    """One block of the base, its last norm, 2·D·r a block, and the update of all blocks but the last."""
    D, F, kv, r, u, L = 32, 64, 16, 4, 6, 2
    block = 2 * D * D + 2 * D * kv + 3 * D * F + 2 * D
    model = pl.attach(build("llama"), pl.Shadow, name="a", r=r, update=u)
    assert pl.count(model).trainable == block + D + L * 2 * D * r + (L - 1) * 2 * (2 * D * u + u + D)
    assert pl.count(model).expected["a"] == pl.count(model).trainable


@pytest.mark.parametrize("family", DECODERS)
def test_a_shadow_writes_the_same_with_and_without_a_cache_and_with_beams(family):
    model = shadowed(family, r=3, alpha=1.0, layers=2)
    ids = inputs(family)["input_ids"]
    settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))
    for more in ({}, {"num_beams": 3}):
        with_cache = model.generate(ids, use_cache=True, **settings, **more)
        assert torch.equal(with_cache, model.generate(ids, use_cache=False, **settings, **more))
    with pl.using(model):
        assert not torch.equal(with_cache, model.generate(ids, num_beams=3, **settings)), "it must show"


def test_a_shadow_refuses_encoders_and_caches_that_it_did_not_see():
    for family in ("bert", "t5"):
        with pytest.raises(ValueError, match="no decoder-only model"):
            pl.attach(build(family), pl.Shadow)
    model = shadowed("llama")
    ids = inputs("llama")["input_ids"]
    with torch.no_grad(), pl.using(model):
        cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="filled without the shadow"):
        model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_plus_reads_the_sum_that_leaves_the_block(family):
    model = pl.attach(build(family), pl.AdapterPlus, name="a", bottleneck=4)
    path, adapter = next(iter(pl.adapters(model)["a"].items()))
    shake(adapter, 0.3)
    got = {}
    model.get_submodule(path).register_forward_hook(lambda m, args, out: got.update(y=out))
    adapter.layer.register_forward_hook(lambda m, args, out: got.update(h=out))
    logits(model, family)
    h, y = (out[0] if isinstance(out, tuple) else out for out in (got["h"], got["y"]))
    with torch.no_grad():
        torch.testing.assert_close(y, h + adapter.s * adapter.up(nn.functional.gelu(adapter.down(h))))
    assert pl.count(model).expected["a"] == pl.count(model).per_adapter["a"]


@pytest.mark.parametrize("family", [*FAMILIES, "bloom", "gemma"])
def test_what_an_invertible_adapter_does_to_tokens_it_undoes_before_the_head(family):
    model = build(family) if family in FAMILIES else build_other(family)
    pl.attach(model, pl.Invertible, name="a")
    there = list(pl.adapters(model)["a"].values())
    ways = [isinstance(a.layer, nn.Embedding) for a in there]
    assert ways.count(True) == (3 if family == "t5" else 1) and ways.count(False) == (family != "bert")
    for adapter in there:
        shake(adapter, 0.3)
    e = torch.randn(4, 32)
    into, out = there[ways.index(True)], there[ways.index(False)] if False in ways else None
    with torch.no_grad():
        o = into(lambda e: e, e)
        assert (o - e).abs().max() > 0.1
        if out is not None:
            torch.testing.assert_close(out(lambda h: h, o), e, rtol=0, atol=1e-5)
    counted = pl.count(model)
    assert counted.expected["a"] == counted.per_adapter["a"] == 2 * (2 * 16 * 8 + 8 + 16)
    batch = inputs(family)
    model(**batch, labels=labels(family, batch)).loss.backward()
    assert all(p.grad.abs().sum() > 0 for a in there for p in a.parameters())


def test_adamix_draws_its_way_in_training_and_is_saved_as_one_adapter(tmp_path):
    torch.manual_seed(0)
    model = pl.attach(build("llama"), pl.AdaMix, name="a", M=3, bottleneck=4)
    for seed, adapter in enumerate(pl.adapters(model)["a"].values()):
        shake(adapter, 0.3, seed=seed)
    adapter, h = next(iter(pl.adapters(model)["a"].values())), torch.randn(2, 32)
    with torch.no_grad():
        drawn = {tuple(adapter.train().delta(h).flatten().tolist()) for _ in range(60)}
        assert len(drawn) == 9  # all pairs of three ways down and three up; one is missed once in 100 seeds
        mean = adapter.eval().delta(h)
        z = torch.relu(h @ adapter.down.mean(0).T + adapter.down_bias.mean(0))
        torch.testing.assert_close(mean, z @ adapter.up.mean(0).T + adapter.up_bias.mean(0))
    want = logits(model, "llama")
    pl.save_adapter(model, tmp_path, "a")
    again = pl.load_adapter(build("llama"), tmp_path, "b")
    assert {type(a) for a in pl.adapters(again)["b"].values()} == {pl.Pfeiffer}
    assert torch.equal(logits(again, "llama"), want)
    assert 3 * pl.count(again).trainable == pl.count(model).trainable


def test_one_network_writes_the_adapters_of_all_layers_and_tasks():
    torch.manual_seed(0)
    model = pl.attach(build("llama"), pl.HyperFormer, name="a", tasks=3, t=8, e=8, bottleneck=4)
    there = pl.adapters(model)["a"]
    with pytest.raises(ValueError, match="task=None"):
        logits(model, "llama")
    for adapter in there.values():
        shake(adapter, 0.3)
    answers = []
    for task in range(3):
        for adapter in there.values():
            adapter.task = task
        answers.append(logits(model, "llama"))
    assert all((answers[0] - other).abs().max() > 1e-3 for other in answers[1:])
    one, h = list(there.values())[1], torch.randn(3, 32)
    with torch.no_grad():  # by hand, for task 2 at the second site
        written = one.W2(torch.relu(one.W1(torch.cat([one.z[2], one.l]))))
        D, U = (torch.einsum("ne,e->n", W, written) for W in (one.W_D, one.W_U))
        by_hand = nn.functional.gelu(h @ D.view(4, 32).T) @ U.view(32, 4).T
        torch.testing.assert_close(one(lambda h: h, h), h + by_hand)
    assert len({id(a.W_U) for a in there.values()}) == 1 and len({id(a.l) for a in there.values()}) == 4
    sizes = [pl.count("roberta-large", pl.HyperFormer, tasks=n, t=64).trainable for n in (1, 2)]
    assert sizes[1] - sizes[0] == 64, "one more task costs one vector"


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("method", "hyper", "said"), [
    ("SHiRA", dict(r=0), "choose r in 1…16"),
    ("SHiRA", dict(r=17), "choose r in 1…16"),
    ("SuperTuning", dict(sparsity=0.9999), "leaves 0 of 1024"),
    ("SuperTuning", dict(sparsity=-0.1), "leaves 11"),
    ("SuperTuning", dict(alpha=4), "rank r of at least 1"),
    ("SuperTuning", dict(r=0), "r=0 must be at least 1"),
])  # fmt: skip
def test_what_does_not_fit_a_linear_layer_is_refused_by_name(method, hyper, said):
    check_refused(said, method, "q_proj", **hyper)


@pytest.mark.parametrize(("method", "hyper", "said"), [
    ("LoReFT", dict(r=33), "not in 1…32"),
    ("LoReFT", dict(first=0), "at least one position"),
    ("DiReFT", dict(first=1, last=-1), "last=-1 must be at least 0"),
    ("LoReFT", dict(last=1), "cannot tell where the prompt ends"),
])  # fmt: skip
def test_what_does_not_fit_a_model_is_refused_by_name(method, hyper, said):
    check_refused(said, method, **hyper)


@pytest.mark.parametrize(("method", "hyper", "said"), [
    ("SAID", dict(d=0), "not in 1…1024"),
    ("SAID", dict(d=1025), "not in 1…1024"),
    ("FishMask", dict(k=1025), "not in 1…1024"),
    ("DiffPruning", dict(penalty_weight=-1.0), "penalty_weight=-1.0 must be at least 0"),
    ("AdaMix", dict(M=0), "at least one adapter"),
    ("HyperFormer", dict(tasks=0), "must be at least 1"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(method, hyper, said):
    check_refused(said, method, "q_proj", **hyper)


def test_hyperformer_needs_sites_of_one_width():
    with pytest.raises(ValueError, match="adapters of one width"):
        pl.attach(build("llama"), pl.HyperFormer, "q_proj|v_proj", bottleneck=4)


def test_a_width_that_is_odd_has_no_halves():
    with pytest.raises(ValueError, match="odd number"):
        pl.Invertible(nn.Embedding(5, 3))

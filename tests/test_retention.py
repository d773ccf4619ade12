"""What a fine-tuned model still knows, and how far it has moved: laws of exams, of drift and of changed weights."""

import copy
import json
import math

import pandas as pd
import pytest
import torch
from families import TARGETS, build, shake

import peftlab as pl
from peftlab import retention
from peftlab.evaluate import Score
from peftlab.layers import weight_of
from peftlab.paths import DATA
from peftlab.retention import Exam


def random(*shape):
    """The same numbers each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)


def words(text):
    """A tokenizer for the tiny models: "5 6 7"."""
    return {"input_ids": [int(word) for word in text.split()]}


def drift(model, base, *texts, **more):
    return retention.hidden_drift(model, base, words, texts, **more)


# ----------------------------------------------------------------------------------------------------------- exams


def test_valid_and_test_share_nothing_and_are_always_the_same():
    valid, test = (Exam.of(split, facts=675, lists=40, texts=60) for split in ("valid", "test"))
    for part in ("facts", "lists"):
        asked = [{row["prompt"] for row in getattr(exam, part)} for exam in (valid, test)]
        assert not asked[0] & asked[1] and [len(some) for some in asked] == [len(getattr(valid, part))] * 2
    for part in ("docs", "code"):
        read = [getattr(exam, part) for exam in (valid, test)]
        assert not set(read[0]) & set(read[1]) and all(len(set(some)) == len(some) > 20 for some in read)
    assert len(valid.facts) == 675 and len(valid.lists) == 5 * 40 and len(valid.docs) == 60 and len(valid.code) == 30
    assert {row["kind"] for row in valid.lists} == {"repeat", "reverse", "first", "last", "sort"}
    assert Exam.of("test", facts=675, lists=40, texts=60) == test, "another exam the second time"
    assert Exam.of("test", facts=10).facts == test.facts[:10], "a short exam is the beginning of a long one"


@pytest.mark.parametrize("wrong, says", [({"split": "train"}, "'train'"), ({"facts": 10**5}, "facts for test")])
def test_an_exam_that_cannot_be_held_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        Exam.of(**{"split": "test", **wrong})


def test_the_bare_base_is_at_its_known_level():
    figures = json.loads((DATA / "base" / "figures.json").read_text(encoding="utf-8"))
    model, tokenizer = pl.load_base(DATA / "base", device="cpu")
    score = Exam.of("test", facts=60, lists=8, texts=10).take(model, tokenizer)
    assert list(score) == ["facts", "lists", "docs", "code"]
    for name, known in (("facts", "facts"), ("lists", "list skills")):
        value, low, high, _ = figures[known]["seen"]
        assert value > 0.99 and score[name].low <= high and low <= score[name].high, "not what the base is known for"
        assert score[name].value > 0.9
    for name in ("docs", "code"):  # cut shorter than those of the figures, and of the running Python
        assert abs(score[name].value - figures["loss"][f"held-out {name}"][0]) < 0.6
    assert retention.retained(score, score) == 1


def test_retained_is_the_mean_share_of_both():
    before = {"facts": 0.8, "lists": 0.5, "docs": 3.0, "code": 3.0}
    assert retention.retained(before, before) == 1
    assert retention.retained(before | {"facts": 0, "lists": 0.0}, before) == 0
    assert retention.retained(before | {"facts": 0.4}, before) == pytest.approx((0.5 + 1) / 2)
    assert retention.retained(before | {"docs": 9.9, "code": 9.9}, before) == 1, "losses are not among the two"
    scores = {"facts": Score(0.4, 0.3, 0.5, 10), "lists": Score(0.5, 0.4, 0.6, 10)}
    assert retention.retained(scores, before) == pytest.approx(0.75)


# ----------------------------------------------------------------------------------------------------------- drift


def test_no_drift_of_a_copy_and_of_what_starts_as_the_base():
    base = build("llama")
    assert drift(copy.deepcopy(base), base, "5 6 7 8", "9 5").tolist() == [0, 0, 0]
    model = pl.attach(copy.deepcopy(base), "LoRA")
    assert drift(model, base, "5 6 7 8").tolist() == [0, 0, 0]
    for adapter in pl.adapters(model)["default"].values():
        shake(adapter)
    found = drift(model, base, "5 6 7 8")
    assert found[0] == 0 < found[1] and found[2] > 0, "the embeddings are not touched, the blocks are"


def test_drift_is_the_length_of_the_change_beside_the_state():
    base = build("llama")
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    torch.testing.assert_close(drift(model, base, "5 6 7"), torch.tensor([0, 0, 0.5]))  # what enters the head: normed
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(-1)
    assert drift(model, base, "5 6 7")[0] == pytest.approx(2)


def test_drift_is_the_mean_over_all_tokens():
    base = build("llama")
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.model.embed_tokens.weight[5].mul_(2)  # this token's state moves by its own length
    assert drift(model, base, "5 6 7 8", "5")[0] == pytest.approx(2 / 5)
    assert drift(model, base, "6 7 8 5", tokens=3).tolist() == [0, 0, 0], "cut after three tokens"
    with pytest.raises(ValueError, match="no text"):
        drift(model, base)


def test_drift_is_that_of_a_loop_by_hand():
    base, model, ids = build("llama"), build("llama", seed=1), [5, 6, 7, 8, 5]
    with torch.no_grad():
        h0, h = (one(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states for one in (base, model))
    for layer, value in enumerate(drift(model, base, " ".join(map(str, ids)))):
        by_hand = [math.dist(h[layer][0, t], h0[layer][0, t]) / h0[layer][0, t].norm() for t in range(len(ids))]
        assert value == pytest.approx(float(sum(by_hand)) / len(ids), rel=1e-4)


def test_a_soft_prompt_is_left_out():
    base = build("llama")
    model, ids = pl.attach(copy.deepcopy(base), "PromptTuning", k=3), torch.tensor([[5, 6, 7, 8]])
    h0, h = (one(input_ids=ids, output_hidden_states=True).hidden_states for one in (base, model))
    assert h[0].shape[1] == 3 + 4
    both = zip(h0, h, strict=True)
    want = torch.stack([((h[0, 3:] - h0[0]).norm(dim=-1) / h0[0].norm(dim=-1)).mean() for h0, h in both])
    found = drift(model, base, "5 6 7 8")
    torch.testing.assert_close(found, want)
    assert found[0] == 0 < found[1], "the words are the same, what is read of them is not"


def test_drift_is_measured_in_eval_mode_and_leaves_modes_as_they_were():
    base = build("llama")
    model = pl.attach(copy.deepcopy(base), "LoRA", dropout=0.9)
    for adapter in pl.adapters(model)["default"].values():
        shake(adapter)
    quiet = drift(model, base, "5 6 7")
    model.train(), base.model.layers[0].train(), model.model.layers[1].eval()
    before = [[module.training for module in one.modules()] for one in (model, base)]
    assert torch.equal(drift(model, base, "5 6 7"), quiet)
    assert [[module.training for module in one.modules()] for one in (model, base)] == before
    with pytest.raises(ValueError):
        drift(model, base, "5 six")
    assert [[module.training for module in one.modules()] for one in (model, base)] == before, "after an error"


# --------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "t5"])
def test_merged_weights_are_those_of_the_base_and_the_adapter(family):
    model = build(family)
    start = retention.weights(model)
    assert set(start) >= set(pl.find_targets(model, TARGETS[family]))
    assert not any(word in path for path in start for word in ("head", "embed", "classifier", "shared", "wte"))
    pl.attach(model, "LoRA", TARGETS[family], r=2, alpha=6)
    adapters = pl.adapters(model)["default"]
    for adapter in adapters.values():
        shake(adapter)
    with pytest.raises(ValueError, match="'default' active and not merged.*merge"):
        retention.weights(model)
    with pl.using(model):
        assert all(torch.equal(W, start[path]) for path, W in retention.weights(model).items())
    end = retention.weights(pl.merge(model))
    assert list(end) == list(start)
    for path, W in end.items():
        assert W.dtype == torch.float32 and W.shape == start[path].shape
        if path in adapters:
            A, B, s = adapters[path].factors()
            torch.testing.assert_close(W, start[path] + s * B @ A, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(W, start[path])
    assert set(retention.weight_change(start, end)) == set(adapters), "matrices that did not change are left out"
    pl.unmerge(model)
    with pl.using(model):
        assert all(torch.equal(W, start[path]) for path, W in retention.weights(model).items())


def test_weights_are_out_by_in_for_a_layer_that_stores_them_transposed():
    model = build("gpt2")
    layer = model.transformer.h[0].attn.c_attn
    found = retention.weights(model)["transformer.h.0.attn.c_attn"]
    assert found.shape == (layer.nf, layer.weight.shape[0]) and torch.equal(found, layer.weight.T)
    found.zero_()
    assert layer.weight.any(), "what is given is a copy"


def test_weights_of_a_base_in_four_bits_are_what_its_codes_stand_for():
    model = pl.quantize(pl.attach(build("llama"), "LoRA", "all-linear", r=2))
    with pl.using(model):
        start = retention.weights(model)
    assert len(start) == 2 * 7
    for path, W in start.items():
        layer = pl.hosts(model)[path].layer
        assert isinstance(layer, pl.NF4Linear) and torch.equal(W, weight_of(layer))
    adapters = pl.adapters(model)["default"]
    for adapter in adapters.values():
        shake(adapter)
    for path, W in retention.weights(pl.merge(model)).items():
        A, B, s = adapters[path].factors()
        torch.testing.assert_close(W, start[path] + s * B @ A, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("outer", ["PromptTuning", "ParallelAdapter", "PrefixTuning"])
def test_paths_are_those_of_the_bare_model_whatever_stands_around_the_layers(outer):
    base = build("llama")
    start = retention.weights(base)
    model = pl.attach(copy.deepcopy(base), outer, name="outer")
    with pl.using(model):
        around = retention.weights(model)
    assert list(around) == list(start) and retention.relative_change(start, around) == 0
    pl.attach(model, "LoRA", "down_proj", name="inner")  # inside of what is adapted already
    pl.activate(model, "outer", "inner")
    with pytest.raises(ValueError, match="down_proj"):
        retention.weights(model)


def test_changes_are_those_of_the_formulas():
    W, V, D = random(6, 4), random(3, 3), 0.1 * random(6, 4).flip(0)
    before, after = {"a": W, "b": V, "only before": V}, {"a": W + D, "b": V, "only after": V}
    changes = retention.weight_change(before, after)
    assert list(changes) == ["a"]
    assert changes["a"].norm == pytest.approx(math.sqrt(float((D**2).sum() / (W**2).sum())))
    assert changes["a"].rank == pytest.approx(retention.effective_rank(D)) and changes["a"].intruders == 0
    del before["only before"], after["only after"]
    total = float((W**2).sum() + (V**2).sum())
    assert retention.relative_change(before, after) == pytest.approx(math.sqrt(float((D**2).sum()) / total))
    assert retention.relative_change(before, before) == 0
    doubled = {path: 2 * matrix for path, matrix in before.items()}
    assert retention.relative_change(before, doubled) == pytest.approx(1)


def test_effective_rank():
    rank = retention.effective_rank
    u, v = random(7, 1), random(5, 1).flip(0)
    assert rank(u @ v.T) == pytest.approx(1, abs=1e-9) and rank(torch.zeros(4, 3)) == 0
    for n in (1, 2, 9):
        assert rank(0.3 * torch.eye(n)) == pytest.approx(n)
        assert rank(torch.eye(n, 12)) == pytest.approx(n)
    W = random(8, 6)
    assert 1 < rank(W) < 6 and rank(W) == pytest.approx(rank(1e6 * W)) == pytest.approx(rank(-1e-6 * W))
    assert rank(W) == pytest.approx(rank(W.T)) and rank(W) == pytest.approx(rank(torch.linalg.qr(random(8, 8))[0] @ W))
    p = torch.tensor([0.5, 0.25, 0.25])  # entropy 1.5 bits
    assert rank(torch.diag(p)) == pytest.approx(2**1.5)
    q = torch.tensor([100.0, 1.0], dtype=torch.double) / 101
    assert rank(torch.diag(q)) == pytest.approx(math.exp(-float((q * q.log()).sum()))), "small ones count too"


@pytest.mark.parametrize("r", [1, 2, 5])
def test_effective_rank_of_what_lora_adds_is_at_most_r(r):
    model = build("llama")
    start = retention.weights(model)
    pl.attach(model, "LoRA", "all-linear", r=r, alpha=2 * r)
    for adapter in pl.adapters(model)["default"].values():
        shake(adapter, 1.0)
        A, B, s = adapter.factors()
        assert retention.effective_rank(s * B.double() @ A.double()) <= r + 1e-9
    changes = retention.weight_change(start, retention.weights(pl.merge(model))).values()
    assert len(changes) == 2 * 7
    assert all(1 <= change.rank < r + 0.01 for change in changes), "float32 rounding is spread over all directions"
    assert r == 1 or max(change.rank for change in changes) > r - 1


def test_no_intruders_in_what_is_turned_little():
    W = random(16, 12)
    for same in (W, 3.7 * W, -0.1 * W, W + 1e-4 * random(16, 12).flip(0), W @ torch.linalg.qr(random(12, 12))[0]):
        assert retention.intruders(W, same) == 0


@pytest.mark.parametrize("planted", [0, 1, 2, 4])
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_intruders_are_the_planted_directions(planted, inside):
    """New large directions: in the space of W's columns, even over 16 old ones (|cos| = 1/4), or at right angles."""
    rows = 16 if inside else 32
    U, V = torch.linalg.qr(random(rows, rows))[0], torch.linalg.qr(random(16, 16).flip(0))[0]
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.double)
    new = U @ torch.kron(torch.kron(two, two), torch.kron(two, two)) / 4 if inside else U[:, 16:]
    W = U[:, :16] * 2.0 ** -torch.arange(16) @ V.T

    def with_new(size):
        return W + new[:, :planted] * size * (1 + torch.arange(planted)) @ V[:, :planted].T

    assert retention.intruders(W, with_new(50), k=8) == planted
    assert retention.intruders(W, with_new(50), k=1) == min(planted, 1), "only the k largest are looked at"
    assert retention.intruders(W, with_new(1e-6), k=8) == 0, "a new direction that is not large is none"


def test_the_threshold_of_intruders_is_a_cosine():
    W = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.double))
    turned = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.double) / 2  # |cos| = 1/2 with each
    after = W + 1e6 * torch.outer(turned, turned)
    assert retention.intruders(W, after, k=1, similar=0.49) == 0
    assert retention.intruders(W, after, k=1, similar=0.51) == 1


# ------------------------------------------------------------------------------------------------- equal learning


def recorded(*points, method="m", seed=0):
    """A table of runs as (learning rate, learned, facts, lists), beside a base that knows four fifths of the facts."""
    rows = [("base", 0.0, 0, 0.0, 0.8, 1.0)] + [(method, rate, seed, *rest) for rate, *rest in points]
    columns = ["method", "learning_rate", "seed", "test_accuracy", "test_facts", "test_lists"]
    return pd.DataFrame(rows, columns=columns).assign(task="sql")


def test_retained_is_relative_to_the_base():
    found = retention.with_retained(recorded((0.1, 0.5, 0.4, 0.5), (0.2, 0.5, 0.0, 0.0)))
    assert found["retained"].tolist() == [1.0, 0.5, 0.0]
    with pytest.raises(ValueError, match="no run of the bare base on 'sql'"):
        retention.with_retained(recorded((0.1, 0.5, 0.4, 0.5)).iloc[1:])


@pytest.mark.parametrize("level, expected", [(0.2, 0.75), (0.4, 0.5), (0.5, 0.25), (0.6, 0.0), (0.7, None)])
def test_equal_learning_lies_on_the_path_from_the_base(level, expected):
    runs = recorded((0.2, 0.6, 0.0, 0.0), (0.1, 0.4, 0.4, 0.5), (0.4, 0.5, 0.8, 1.0))  # in any order
    assert retention.at_equal_learning(runs, level)["retained"].tolist() == pytest.approx(
        [] if expected is None else [expected]
    )


def test_equal_learning_is_the_first_place_of_each_seed():
    falling = recorded((0.1, 0.5, 0.8, 1.0), (0.2, 0.1, 0.4, 0.5), (0.3, 0.5, 0.0, 0.0))
    other = recorded((0.1, 0.4, 0.4, 0.5), seed=1).iloc[1:]
    found = retention.at_equal_learning(pd.concat([falling, other]), 0.3)
    assert found.to_dict("records") == [
        {"task": "sql", "method": "m", "seed": 0, "retained": 1.0},
        {"task": "sql", "method": "m", "seed": 1, "retained": pytest.approx(0.625)},
    ]


def test_curves_begin_at_the_base():
    runs = recorded((0.1, 0.4, 0.4, 0.5))
    for step, share in ((25, 0.5), (50, 0.25)):
        for name, whole in (("facts", 0.8), ("lists", 1.0), ("docs", 3.0), ("code", 2.0), ("target", 0.2)):
            runs[f"{name}@{step}"] = [whole, share * whole]
    found = retention.curves(runs).query("method == 'm'")
    assert found["step"].tolist() == [0, 25, 50] and found["retained"].tolist() == pytest.approx([1, 0.5, 0.25])
    assert found["facts"].tolist() == pytest.approx([0.8, 0.4, 0.2]) and found["docs"].tolist() == [3.0, 1.5, 0.75]

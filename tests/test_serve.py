"""Mixed batches and serving: each row is what it would be alone, whatever stands beside it, comes, goes or changes."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from families import build, inputs, labels, shake
from hypothesis import given, settings
from hypothesis import strategies as st

import peftlab as pl
from peftlab import mixed, serve
from peftlab.serve import Request

ROWS = ["a", None, "b", "b", "a"]


def with_loras(family="llama", model=None, targets=None, **hyper):
    """A model with the LoRA adapters "a", "b" and "c" of the ranks 2, 3 and 4, moved off their start."""
    model = build(family) if model is None else model
    for seed, name in enumerate("abc"):
        pl.attach(model, pl.LoRA, targets, name=name, r=2 + seed, alpha=5, **hyper)
        for adapter in pl.adapters(model)[name].values():
            shake(adapter, 0.2, seed=seed)
    return model.eval()


def logits(model, **batch):
    with torch.no_grad():
        return model(**batch).logits


def alone(model, name, batch, i):
    """The logits of row i by itself under its own adapter."""
    with pl.using(model, *([name] if name else [])):
        return logits(model, **{key: value[i : i + 1] for key, value in batch.items()})


def assert_each_row_is_itself(model, rows, batch, rtol=1e-4, atol=1e-4):
    with pl.using(model, rows=rows):
        together = logits(model, **batch)
    for i, name in enumerate(rows):
        torch.testing.assert_close(together[i : i + 1], alone(model, name, batch, i), rtol=rtol, atol=atol)
    return together


# ------------------------------------------------------------------------------------------------- one pass


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_ranks_and_targets_of_their_own(family):
    """Conv1D, cross-attention and a pooler without T included; one adapter sits on fewer layers than the others."""
    model = with_loras(family)
    last = list(pl.adapters(model)["c"])[-1]
    pl.attach(model, pl.LoRA, [last.rsplit(".", 1)[-1]], name="few", r=1)
    for adapter in pl.adapters(model)["few"].values():
        shake(adapter, 0.3, seed=9)
    assert_each_row_is_itself(model, ["a", None, "few", "b", "c"], inputs(family, rows=5))


def test_low_rank_terms_stand_beside_any_other_method():
    model = with_loras()
    for name, method in (("scale", pl.IA3), ("bottle", pl.Houlsby), ("bias", pl.BitFit)):
        targets = "q_proj|down_proj" if name != "bottle" else None
        pl.attach(model, method, targets, name=name)
        for adapter in pl.adapters(model)[name].values():
            shake(adapter, 0.2)
    model.eval()
    assert_each_row_is_itself(model, ["a", "scale", "bottle", "c", "bias", None, "a"], inputs("llama", rows=7))


def test_a_packed_base():
    packed = with_loras(model=pl.quantize(build("llama")))
    assert_each_row_is_itself(packed, ROWS, inputs("llama", rows=5))


@pytest.mark.parametrize("odd", [False, True])
def test_a_16_bit_base_with_float32_adapters(odd):
    """Layer by layer, where the rounding is known: two terms of 8 bits each and their sum, so three half-units at most.
    odd: one adapter is in 16 bits, too; beside float32 ones it is computed in float32."""
    model = with_loras(model=build("llama").bfloat16())
    for adapter in pl.adapters(model)["b"].values() if odd else ():
        adapter.bfloat16()
    for host in pl.hosts(model).values():
        assert host.adapters["a"].lora_A.dtype == torch.float32
        x = torch.randn(5, 4, host.layer.in_features).bfloat16()
        with torch.no_grad(), pl.using(model, rows=ROWS):
            together = host(x)
        assert together.dtype == torch.bfloat16
        for i, name in enumerate(ROWS):
            with torch.no_grad(), pl.using(model, *([name] if name else [])):
                own = host(x[i : i + 1])
            scale = max(own.abs().max(), host.layer(x[i : i + 1]).abs().max()).item()
            assert (together[i : i + 1] - own).abs().max() <= 3 * 2**-8 * scale


def test_a_row_of_the_bare_base_is_the_base_bit_for_bit():
    model = with_loras(targets="q_proj|down_proj")
    batch = inputs("llama", rows=3)
    with pl.using(model):
        base = logits(model, **batch)
    with pl.using(model, rows=["a", None, "b"]):
        together = logits(model, **batch)
    assert torch.equal(together[1], base[1]) and not torch.equal(together[0], base[0])


def test_one_adapter_for_all_rows_takes_the_plain_path():
    model, batch = with_loras(), inputs("llama", rows=3)
    with pl.using(model, "b"):
        plain = logits(model, **batch)
    with pl.using(model, rows=["b"] * 3):
        assert torch.equal(logits(model, **batch), plain)
        loss = model(**batch, labels=labels("llama", batch)).loss
        seen, names = [loss.grad_fn], set()
        while seen:  # the fused node of a plain LoRA is in the graph
            node = seen.pop()
            if node is not None and type(node).__name__ not in names:
                names.add(type(node).__name__)
            seen += [n for n, _ in node.next_functions if n is not None] if node and len(names) < 50 else []
            if "LowRankLinearBackward" in names:
                break
        assert "LowRankLinearBackward" in names
        with pytest.raises(ValueError, match="4 rows, but adapters were named for 3"):
            logits(model, **inputs("llama", rows=4))


@pytest.mark.parametrize("packed", [False, True])
def test_training_in_a_mixed_batch_gives_the_gradients_of_the_rows_alone(packed):
    model = with_loras(model=pl.quantize(build("llama")) if packed else None)
    batch = inputs("llama", rows=5)

    def gradients(rows, part):
        model.zero_grad(set_to_none=True)
        with pl.using(model, rows=rows):
            out = model(**{key: value[part] for key, value in batch.items()}).logits
        (out * torch.linspace(-1, 1, out[0].numel()).view(out.shape[1:])).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    together = gradients(ROWS, slice(None))
    total: dict[str, torch.Tensor] = {}
    for i, name in enumerate(ROWS):
        for key, grad in gradients([name], slice(i, i + 1)).items() if name else ():
            total[key] = total[key] + grad if key in total else grad
    assert together.keys() == total.keys() and not any(".c." in key for key in together)
    for key, grad in total.items():
        torch.testing.assert_close(together[key], grad, rtol=1e-3, atol=1e-4)


def test_dropout_takes_the_old_path_and_is_the_adapters_own():
    model = with_loras(dropout=0.5).train()
    batch = inputs("llama", rows=3)
    with pl.using(model, rows=["a", None, "b"]):
        one, two = logits(model, **batch), logits(model, **batch)
        assert torch.equal(one[1], two[1]) and not torch.equal(one[0], two[0])
        model.eval()
        still = logits(model, **batch)
        assert torch.equal(still, logits(model, **batch))
        model.train()
        assert not torch.equal(still, logits(model, **batch)), "factors that were kept in eval mode have no dropout"
        for p in (0.0, 0.5):
            for host in pl.hosts(model).values():
                for adapter in host.adapters.values():
                    adapter.dropout.p = p
            assert torch.equal(logits(model, **batch), logits(model, **batch)) == (p == 0)


def test_autocast():
    model, batch = with_loras(), inputs("llama", rows=5)
    with torch.autocast("cpu", torch.bfloat16):
        assert_each_row_is_itself(model, ROWS, batch, rtol=0.05, atol=0.15)
        with pl.using(model, rows=ROWS):
            model(**batch, labels=labels("llama", batch)).loss.backward()
    assert all(a.lora_B.grad.abs().sum() > 0 for n in "ab" for a in pl.adapters(model)[n].values())


def test_merged_adapters_and_unknown_ones_are_refused():
    model = with_loras()
    with pytest.raises(ValueError, match="no adapter named 'A' .* did you mean 'a'"), pl.using(model, rows=["A"]):
        pass
    pl.merge(model, "c")
    with pytest.raises(ValueError, match="unmerge"), pl.using(model, rows=["a"]):
        pass


# ----------------------------------------------------------------------------------------- what is kept


def counted(monkeypatch):
    """The list of calls of `mixed.stacked`, one for each time that a layer gathers factors."""
    calls, real = [], mixed.stacked
    monkeypatch.setattr(mixed, "stacked", lambda factors: calls.append(1) or real(factors))
    return calls


def test_factors_are_gathered_once_and_only_without_gradients(monkeypatch):
    model, batch, calls = with_loras(), inputs("llama", rows=5), counted(monkeypatch)
    hosts = len(pl.hosts(model))
    with pl.using(model, rows=ROWS):
        for _ in range(3):
            logits(model, **batch)
        assert len(calls) == hosts
        model(**batch)
        assert len(calls) == 2 * hosts
    with pl.using(model, rows=ROWS):
        logits(model, **batch)
    assert len(calls) == 3 * hosts, "nothing outlives its block"


def replace(lora):
    lora.lora_A = torch.nn.Parameter(lora.lora_A.detach() + 1)


def assign(lora):
    lora.lora_B.data = lora.lora_B.data + 1


def rescale(lora):
    lora.scaling *= 3


def add(lora):
    with torch.no_grad():
        lora.lora_B += 1


@pytest.mark.parametrize("change", [replace, assign, rescale, add])
def test_what_changes_inside_the_block_is_seen(change):
    model, batch = with_loras(), inputs("llama", rows=5)
    with pl.using(model, rows=ROWS):
        before = logits(model, **batch)
        for adapter in pl.adapters(model)["b"].values():
            change(adapter)
        after = logits(model, **batch)
    with pl.using(model, rows=ROWS):
        torch.testing.assert_close(after, logits(model, **batch), rtol=0, atol=0)
    changed = (before != after).flatten(1).any(1).tolist()
    assert changed == [name == "b" for name in ROWS]


def test_a_training_step_and_a_hot_swap_inside_the_block_are_seen(tmp_path):
    model, batch = with_loras(), inputs("llama", rows=5)
    pl.save_adapter(model, tmp_path / "b", name="b")
    with pl.using(model, rows=ROWS):
        before = logits(model, **batch)
        optimizer = torch.optim.SGD(pl.adapters(model)["b"][next(iter(pl.hosts(model)))].parameters(), lr=0.1)
        model(**batch, labels=labels("llama", batch)).loss.backward()
        optimizer.step()
        stepped = logits(model, **batch)
        assert not torch.equal(stepped[2], before[2]) and torch.equal(stepped[0], before[0])
        pl.load_adapter(model, tmp_path / "b", name="b")
        assert torch.equal(logits(model, **batch), before)


def test_a_copy_made_inside_the_block_has_its_own(tmp_path):
    model, batch = with_loras(), inputs("llama", rows=5)
    with pl.using(model, rows=ROWS):
        want = logits(model, **batch)
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for adapter in pl.adapters(model)["b"].values():
            add(adapter)
        for twin in twins:
            torch.testing.assert_close(logits(twin, **batch), want, rtol=0, atol=0)


def test_adapters_made_in_inference_mode_do_not_count_their_changes_and_are_gathered_each_time():
    with torch.inference_mode():
        model = with_loras()
        batch = inputs("llama", rows=5)
        with pl.using(model, rows=ROWS):
            before = model(**batch).logits
            for adapter in pl.adapters(model)["b"].values():
                adapter.lora_B += 1
            assert not torch.equal(before, model(**batch).logits)


def test_a_compiled_model_takes_another_order_of_rows_without_compiling_again():
    """The same set of adapters, as mere numbers; another set is another program."""
    from torch._dynamo.testing import CompileCounterWithBackend

    model, batch = with_loras(targets=r"layers\.0\..*\.(q_proj|down_proj)"), inputs("llama", rows=4)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for rows in (["a", "b", None, "b"], [None, "b", "a", "a"], ["b", "a", "a", "b"]):
        with pl.using(model, rows=rows):
            together = logits(compiled, **batch)
            torch.testing.assert_close(together, logits(model, **batch), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    with pl.using(model, rows=["a", "b", None, "b"]):  # no factors are frozen into the program
        for adapter in pl.adapters(model)["b"].values():
            add(adapter)
        torch.testing.assert_close(logits(compiled, **batch), logits(model, **batch), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------ transformers' generate()


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("more", [dict(num_beams=3), dict(num_beams=4, num_return_sequences=2), dict(do_sample=True,
                         num_return_sequences=2)], ids=["beams", "beams-return", "sampled"])  # fmt: skip
def test_generation_with_repeated_rows_and_padding_on_the_left(family, more):
    """k rows for each: T5's encoder sees n rows and its decoder k·n. Sampled answers are judged by their logits."""
    model, rows, new = with_loras(family), ["a", None, "b"], 5
    ids = inputs(family, rows=3)["input_ids"]
    mask = (torch.arange(ids.shape[1]) >= torch.tensor([3, 0, 2])[:, None]).long()
    same = dict(max_new_tokens=new, min_new_tokens=new, pad_token_id=0, eos_token_id=1, output_logits=True,
                return_dict_in_generate=True, **more)  # fmt: skip
    with pl.using(model, rows=rows):
        found = model.generate(ids * mask, attention_mask=mask, **same)
    k = more.get("num_return_sequences", 1)
    answers = found.sequences[:, -new:].view(3, k, new)
    for i, name in enumerate(rows):
        own = ids[i : i + 1, -int(mask[i].sum()) :]
        if not more.get("do_sample"):
            with pl.using(model, *([name] if name else [])):
                want = model.generate(own, attention_mask=torch.ones_like(own), **same).sequences[:, -new:]
            assert torch.equal(answers[i], want)
            continue
        for j in range(k):
            answer = answers[i, j][None]
            if family == "t5":
                batch = {"input_ids": own, "decoder_input_ids": torch.cat([torch.zeros_like(answer[:, :1]), answer], 1)}
            else:
                batch = {"input_ids": torch.cat([own, answer], 1)}
            want = alone(model, name, batch, 0)[0, -new - 1 : -1]
            got = torch.stack([step[i * k + j] for step in found.logits])
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_flattened_tokens_are_not_taken_for_repeated_rows():
    """OPT's feed-forward layers see (B·T, d), as experts do: refused with the reason."""
    model = with_loras("opt")
    with pytest.raises(ValueError, match="27 rows, .* for 3 .*tokens"), pl.using(model, rows=["a", None, "b"]):
        logits(model, **inputs("opt", rows=3))


# ------------------------------------------------------------------------------------------------- serving

PROMPTS = ["The list", "def first(items):\n    return", "import os\n\nThis module provides a way to use the", "Who is"]
ADAPTERS = ["a", None, "b", "c"]


@pytest.fixture(scope="module")
def served():
    """The base model with three adapters that change what it says."""
    model, tokenizer = pl.load_base(device="cpu")
    return with_loras(model=model), tokenizer


def encoded(tokenizer, text):
    return tokenizer(text)["input_ids"]


def said(model, tokenizer, prompt, name, new):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with pl.using(model, *([name] if name else [])):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_greedy_answers_are_those_of_generate_whatever_leaves_the_batch(served):
    model, tokenizer = served
    lengths = [3, 12, 7, 1]
    answers = serve.generate(model, tokenizer, PROMPTS, ADAPTERS, max_new_tokens=lengths)
    want = [said(model, tokenizer, *row) for row in zip(PROMPTS, ADAPTERS, lengths, strict=True)]
    assert answers == want and len(set(want)) == 4
    assert serve.generate(model, tokenizer, PROMPTS, ADAPTERS, max_new_tokens=lengths, batch_size=3) == want


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_other_families_keep_their_places_under_padding(family):
    model = with_loras(family, targets="c_attn|c_fc" if family == "gpt2" else "q_proj|v_proj")
    _, tokenizer = pl.load_base(device="cpu")
    model.generation_config.eos_token_id = None
    tokenizer = Plain(None)
    ids = inputs(family, rows=3, length=8)["input_ids"]
    requests = [Request(ids[i, i:].tolist(), name, 5) for i, name in enumerate(["a", None, "b"])]
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for token in serve.decode(model, tokenizer, requests):
        tokens[token.row].append(token.id)
    for i, name in enumerate(["a", None, "b"]):
        with pl.using(model, *([name] if name else [])):
            own = ids[i : i + 1, i:]
            out = model.generate(own, attention_mask=torch.ones_like(own), max_new_tokens=5, do_sample=False)
        assert out[0, own.shape[1] :].tolist() == tokens[i]


class Plain:
    """A tokenizer of ids as text, for models without words."""

    pad_token_id = 0

    def __init__(self, eos):
        self.eos_token_id = eos

    def decode(self, ids, **_):
        return "".join(f"<{i}>" for i in ids)


def test_sampled_answers_depend_on_their_seed_alone(served):
    model, tokenizer = served
    row = Request(encoded(tokenizer, PROMPTS[0]), "a", 10, temperature=0.9, top_p=0.95, top_k=50, seed=5)
    others = [Request(encoded(tokenizer, PROMPTS[i]), "bca"[i], 4, temperature=1.5, seed=7) for i in range(3)]

    def answer(requests, i):
        return [(t.id, t.finish) for t in serve.decode(model, tokenizer, requests) if t.row == i]

    want = answer([row], 0)
    torch.manual_seed(99)
    assert answer([*others, row], 3) == want == answer([row, others[0]], 0)
    torch.rand(5)
    assert answer([row, row], 1) == want
    assert answer([Request(row.prompt, "a", 10, 0.9, 0.95, 50, seed=6)], 0) != want
    torch.manual_seed(1)
    unseeded = Request(row.prompt, "a", 10, 0.9)
    first = answer([unseeded], 0)
    torch.manual_seed(1)
    assert answer([unseeded], 0) == first != answer([unseeded], 0)


def test_greedy_rows_leave_torchs_generator_alone(served):
    model, tokenizer = served
    before = torch.get_rng_state()
    serve.generate(model, tokenizer, PROMPTS[:2], ADAPTERS[:2], max_new_tokens=2)
    assert torch.equal(before, torch.get_rng_state())


def test_samples_follow_the_distribution():
    """χ² over 1500 draws; its 99.9 % point for 4 degrees of freedom is 18.5. What is cut off never comes."""
    scores = torch.tensor([2.0, 0.5, 1.0, -1.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    for more, left in ((dict(), [0, 1, 2, 3, 4]), (dict(top_k=4), [0, 1, 2, 4]), (dict(top_p=0.8), [0, 2]),
                       (dict(top_k=3, top_p=0.6), [0]), (dict(top_p=1e-9), [0])):  # fmt: skip
        request = Request([1], temperature=0.7, **more)
        drawn = torch.tensor([serve.sample(scores, request, generator) for _ in range(1500)])
        p = torch.zeros(5).double()
        p[left] = (scores[left].double() / 0.7).softmax(0)
        counts = torch.bincount(drawn, minlength=5).double()
        assert counts[p == 0].sum() == 0
        assert ((counts - 1500 * p)[left] ** 2 / (1500 * p[left])).sum() < 18.5
    assert serve.sample(scores, Request([1], temperature=1e-300), generator) == 0


def test_top_k_and_top_p_cut_as_transformers_does():
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    scores = torch.randn(40, generator=torch.Generator().manual_seed(3))
    for k, top_p in ((5, 0.7), (0, 0.5), (7, 1.0), (40, 0.9)):
        request = Request([1], temperature=1.0, top_k=k, top_p=top_p)
        kept = TopKLogitsWarper(k)(None, scores[None]) if k else scores[None]
        kept = TopPLogitsWarper(top_p)(None, kept)[0].isfinite().nonzero()[:, 0].tolist()
        draws = {serve.sample(scores, request, torch.Generator().manual_seed(s)) for s in range(1500)}
        assert draws <= set(kept) and len(draws) > 0.8 * len(kept)


def test_events_tell_the_whole_story(served):
    model, tokenizer = served
    requests = [Request(encoded(tokenizer, p), n, k) for p, n, k in zip(PROMPTS, ADAPTERS, (2, 5, 3, 1), strict=True)]
    events = list(serve.decode(model, tokenizer, requests))
    assert [e.row for e in events] == [0, 1, 2, 3, 0, 1, 2, 1, 2, 1, 1]
    assert {e.row: e.finish for e in events if e.finish} == dict.fromkeys(range(4), "length")
    for i, request in enumerate(requests):
        mine = [e for e in events if e.row == i]
        with pl.using(model, *([request.adapter] if request.adapter else [])):
            ids = [*request.prompt, *[e.id for e in mine]]
            table = logits(model, input_ids=torch.tensor([ids]))[0].log_softmax(-1)
        for place, event in enumerate(mine, len(request.prompt) - 1):
            assert math.isclose(event.logprob, table[place, event.id], abs_tol=1e-3)
        assert "".join(e.text for e in mine) == tokenizer.decode([e.id for e in mine])


def test_rows_that_are_done_leave_the_cache(served, monkeypatch):
    model, tokenizer = served
    sizes, real = [], serve.Batch.forward

    def forward(batch):
        out = real(batch)
        assert len(out) == len(batch.rows) == len(batch.cache.layers[0].keys)
        sizes.append(len(out))
        return out

    monkeypatch.setattr(serve.Batch, "forward", forward)
    requests = [Request(encoded(tokenizer, p), n, k) for p, n, k in zip(PROMPTS, ADAPTERS, (2, 4, 3, 1), strict=True)]
    calls = counted(monkeypatch)
    list(serve.decode(model, tokenizer, requests))
    assert sizes == [4, 3, 2, 1]
    assert len(calls) == len(pl.hosts(model)), "factors are selected, not gathered anew"


def test_the_end_token_and_stop_texts(served, monkeypatch):
    model, tokenizer = served
    whole = serve.generate(model, tokenizer, PROMPTS, ADAPTERS, max_new_tokens=12)
    stop = whole[1][5:9]
    answers = serve.generate(model, tokenizer, PROMPTS, ADAPTERS, max_new_tokens=12, stop=(stop,))
    assert answers == [text.split(stop)[0] for text in whole] and answers[1] != whole[1]
    ids = [t.id for t in serve.decode(model, tokenizer, [Request(encoded(tokenizer, PROMPTS[0]), "a", 6)])]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [4095, ids[3]])
    events = list(serve.decode(model, tokenizer, [Request(encoded(tokenizer, PROMPTS[0]), "a", 6)]))
    assert [e.id for e in events] == ids[: ids.index(ids[3]) + 1] and events[-1].finish == "stop"
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)  # then the tokenizer's
    assert serve._end_tokens(model, tokenizer) == {tokenizer.eos_token_id}


def test_a_stop_text_across_tokens_is_held_back_and_freed():
    text = serve.Text(Plain(None), ("<2><3>", "<9>"))
    assert text.add(1) == ("<1>", False) and text.add(2) == ("", False)  # "<2>" could become a stop
    assert text.add(2) == ("<2>", False) and text.add(3) == ("", True)
    text = serve.Text(Plain(None), ("<2><3>",))
    text.add(2)
    assert text.end() == "<2>"
    assert serve.Text(Plain(None), ("<2><3>",)).add(2, last=True) == ("<2>", False)


_, TOKENIZER = pl.load_base(device="cpu")
SOME = st.text(alphabet="añ€😀 \n\ufffdx", max_size=12).map(lambda text: TOKENIZER(text)["input_ids"])
ANY = st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=12)


@settings(max_examples=150)
@given(st.one_of(SOME, ANY), st.lists(st.sampled_from(["a", " ", "€x", "😀", "x\n"]), max_size=2))
def test_pieces_add_up_and_no_half_character_is_shown(ids, stop):
    whole = TOKENIZER.decode(ids, skip_special_tokens=True)
    pieces, text, stopped = [], serve.Text(TOKENIZER, stop), False
    for i, token in enumerate(ids):
        piece, stopped = text.add(token, last=i == len(ids) - 1)
        pieces.append(piece)
        if stopped:
            break
    places = [whole.find(s) for s in stop if s in whole]
    assert "".join(pieces) == (whole[: min(places)] if places else whole) and stopped == bool(places)
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_tokenizer_that_drops_a_texts_first_space_keeps_those_between_words():
    class Spaced(Plain):
        def decode(self, ids, **_):
            return "".join(f" w{i}" for i in ids).removeprefix(" ")

    text = serve.Text(Spaced(None), ())
    assert [text.add(i)[0] for i in (1, 2, 3)] == ["w1", " w2", " w3"]


def test_cancelled_rows_leave_and_the_others_go_on(served):
    model, tokenizer = served
    requests = [Request(encoded(tokenizer, p), n, 6) for p, n in zip(PROMPTS, ADAPTERS, strict=True)]
    gone, events = {3}, []
    for event in serve.decode(model, tokenizer, requests, cancelled=lambda row: row in gone):
        events.append(event)
        if event.row == 1 and len([e for e in events if e.row == 1]) == 2:
            gone.add(1)
    assert [(e.id, e.finish) for e in events if e.row == 3] == [(-1, "cancelled")]
    assert [e.finish for e in events if e.row == 1] == [None, None, "cancelled"]
    for i in (0, 2):
        want = said(model, tokenizer, PROMPTS[i], ADAPTERS[i], 6)
        assert "".join(e.text for e in events if e.row == i) == want
    assert list(serve.decode(model, tokenizer, requests[:1], cancelled=lambda row: True))[0].finish == "cancelled"


def test_the_model_is_its_owners_between_tokens_and_after(served):
    model, tokenizer = served
    pl.activate(model, "c")
    model.train()
    batch = inputs("llama", rows=2)
    switch = next(iter(pl.hosts(model).values())).switch
    want = logits(model, **batch)
    stream = serve.decode(model, tokenizer, [Request([5, 6], "a", 4), Request([7], None, 4)])
    for _ in range(3):
        next(stream)
        assert switch.active == ("c",) and switch.rows is None and not model.training
        assert torch.equal(logits(model, **batch), want)
    stream.close()
    assert model.training and all(m.training for m in model.modules())
    model.eval()

    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    model.model.layers[1].forward = fails
    with pytest.raises(RuntimeError, match="out of memory"):
        next(serve.decode(model, tokenizer, [Request([5, 6], "a", 4)]))
    del model.model.layers[1].forward
    assert switch.active == ("c",) and switch.rows is None


def test_a_model_without_adapters_and_an_empty_batch(served):
    _, tokenizer = served
    bare = build("llama")
    assert [t.finish for t in serve.decode(bare, tokenizer, [Request([3, 4], None, 2)])][-1] == "length"
    assert list(serve.decode(bare, tokenizer, [])) == [] == serve.generate(bare, tokenizer, [], [])


WRONG = [
    (dict(prompt=[]), ValueError, "prompt is empty"),
    (dict(prompt="words"), ValueError, "token ids"),
    (dict(prompt=[1, 4096]), ValueError, "0 to 4095"),
    (dict(max_new_tokens=0), ValueError, "at least 1"),
    (dict(prompt=[3] * 500), ValueError, "500 tokens; with max_new_tokens=16 .* context of 512"),
    (dict(temperature=-1.0), ValueError, "temperature=-1"),
    (dict(temperature=math.nan), ValueError, "temperature=nan"),
    (dict(top_p=0.0), ValueError, "top_p=0"),
    (dict(top_k=-1), ValueError, "top_k=-1"),
    (dict(seed=2**64), ValueError, "64 bits"),
    (dict(stop="end"), ValueError, "a tuple of texts"),
    (dict(stop=("",)), ValueError, "not empty"),
    (dict(adapter="A"), LookupError, "no adapter named 'A' .* did you mean 'a'"),
]


@pytest.mark.parametrize("wrong,kind,words", WRONG)
def test_wrong_requests_are_refused_before_anything_runs(served, monkeypatch, wrong, kind, words):
    model, tokenizer = served
    monkeypatch.setattr(model, "forward", None)
    bad = Request(**{"prompt": [3, 4], **wrong})
    with pytest.raises(kind, match=words):
        serve.check(model, tokenizer, bad)
    with pytest.raises(kind, match=f"request 1: .*{words}"):
        serve.decode(model, tokenizer, [Request([3]), bad])  # at once, not at the first token
    serve.check(model, tokenizer, Request([3, 4]))


def test_methods_that_cannot_be_mixed_merged_ones_and_other_models_are_refused():
    tokenizer = Plain(1)
    model = with_loras()
    pl.attach(model, pl.PromptTuning, name="soft", k=2)
    with pytest.raises(ValueError, match="soft.*cannot be in a mixed batch"):
        serve.check(model, tokenizer, Request([3], "soft"))
    serve.check(model, tokenizer, Request([3], "a"))
    pl.detach(model, "soft")
    pl.activate(model, "a")
    pl.merge(model)
    with pytest.raises(ValueError, match="a is merged .* unmerge"):
        serve.check(model, tokenizer, Request([3], None))
    with pytest.raises(ValueError, match="encoder"):
        serve.check(build("t5"), tokenizer, Request([3]))


def test_settings_of_another_length_are_refused(served):
    model, tokenizer = served
    with pytest.raises(ValueError, match="temperature has 1 values for 2 prompts"):
        serve.generate(model, tokenizer, ["a", "b"], ["a", None], temperature=[0.0])
    with pytest.raises(ValueError, match="adapters has 1 values for 2 prompts"):
        serve.generate(model, tokenizer, ["a", "b"], ["a"])
    with pytest.raises(ValueError, match="lists"):
        serve.generate(model, tokenizer, ["a", "b"], "ab")

"""Cards and their names, verdicts and the ways out of a refusal, plans, and `python -m peftlab vram`."""

import json
import re
from dataclasses import replace
from inspect import signature

import pytest
from transformers import LlamaConfig

import peftlab as pl
from peftlab.__main__ import main, parser
from peftlab.shapes import shapes
from peftlab.verbs.vram import OPTIONS
from peftlab.vram import CARDS, Card, card_named, cards, plan, planning, predict, this_card, verdict
from peftlab.vram.allocator import CachingAllocator
from peftlab.vram.cards import CUBLAS_HOPPER, FITS, MARGIN, TIGHT, TOO_LARGE, in_words, ladders
from peftlab.vram.memory import GIB, MIB, Memory, Peak, from_tape
from peftlab.vram.planning import STEP, Row, largest
from peftlab.vram.step import OPTIMIZERS
from peftlab.vram.tape import CUBLAS, Block, Tape

TINY = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                   num_key_value_heads=2, vocab_size=512, max_position_embeddings=2048,
                   architectures=["LlamaForCausalLM"])  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- card names


@pytest.mark.parametrize("name", CARDS)
def test_a_card_is_known_by_its_name_however_it_is_written(name):
    for written in (name, name.lower(), name.upper(), name.replace(" ", ""), name.replace(" ", "-"), name[:-2]):
        assert card_named(written) is CARDS[name], written
    sold = int(re.search(r"(\d+)GB$", name)[1])
    assert 0.9 * sold < CARDS[name].memory / GIB < sold, "less than it is sold with, but not by much"


@pytest.mark.parametrize(
    "written, name",
    [
        ("4090", "RTX 4090 24GB"),
        (4090, "RTX 4090 24GB"),
        ("a100-80", "A100 80GB"),
        ("1080", "GTX 1080 8GB"),
        ("1080ti", "GTX 1080 Ti 11GB"),
        ("3080", "RTX 3080 10GB"),
        ("l40s", "L40S 48GB"),
        # what torch.cuda.get_device_properties calls them
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti Super 16GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("Tesla V100-PCIE-16GB", "V100 16GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada 48GB"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000 Blackwell 96GB"),
        ("AMD Instinct MI300X", "MI300X 192GB"),
    ],
)
def test_short_names_and_those_that_torch_gives(written, name):
    assert card_named(written) is CARDS[name]


@pytest.mark.parametrize("written", ["24", "24GB", "24 gb", "24GiB", "24g", 24, 24.0])
def test_a_number_is_any_card_with_so_many_gib(written):
    assert card_named(written) == Card("a card of 24 GiB", 24 * GIB)
    assert card_named("22.5GB").memory == 22.5 * GIB


@pytest.mark.parametrize(
    "written, words",
    [
        ("4091", "did you mean 'RTX 4090 24GB'"),
        ("h10", "did you mean 'H100 80GB'"),
        ("a100", "say which, 'A100 40GB' or 'A100 80GB'"),
        ("radeon", "no card is known as 'radeon'. Known are GTX 1080 8GB"),
        ("2080", "no card is known as '2080'"),  # not the 2080 Ti
        ("", "no card is known as ''"),
        ("0GB", "no card"),
        ("-24", "no card"),
        ("nan", "no card"),
        (24 * GIB, "any other by its memory, such as '24GB'"),
        (True, "no card is known as 'True'"),
    ],
)
def test_a_card_that_is_not_known_is_refused(written, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        card_named(written)


def test_the_card_of_this_computer(monkeypatch):
    with pytest.raises(ValueError, match="no CUDA device here; name a card"):
        card_named(None)  # tests see no GPU
    found = type("Properties", (), {"name": "NVIDIA L4", "major": 8, "minor": 9})
    cuda = cards.torch.cuda
    for name, value in {"is_available": True, "current_device": 0, "memory_reserved": 3 * GIB,
                        "mem_get_info": (15 * GIB, 22 * GIB), "get_device_properties": found}.items():  # fmt: skip
        monkeypatch.setattr(cuda, name, lambda *args, value=value: value)
    # 7 GiB are in use: 3 by torch here, CONTEXT for its kernels, the rest by others
    assert this_card() == Card("NVIDIA L4", 22 * GIB, (8, 9), 4 * GIB - cards.CONTEXT)
    said = verdict(need(10 * GIB), others=GIB)
    assert said.others == 5 * GIB - said.context and said.usable == 17 * GIB and said.word == FITS


# ------------------------------------------------------------------------------------------------------------ verdicts


def tape_of(*events) -> Tape:
    """A tape from sizes in MiB; a negative one frees the first block of that size. "cuBLAS": one of its workspaces."""
    tape = Tape()
    tape.enter("forward")
    for event in events:
        if event == "cuBLAS":
            tape.alloc(Block(CUBLAS, "forward", "", "cuBLAS", kind="workspace"))
        elif event > 0:
            tape.alloc(Block(event * MIB, "forward", "", "mm", kind="activations"))
        else:
            tape.free(next(n for n, b in enumerate(tape.blocks) if b.size == -event * MIB and b.died is None))
    return tape


def on_tape(*events, **asked) -> Memory:
    tape = tape_of(*events)
    small = CachingAllocator(expandable=asked.get("expandable", False)).replay(tape)
    return from_tape("predicted", tape, small.peak_reserved, asked)


def need(n, again=None, weights=0, source="predicted", **asked) -> Memory:
    """Memory of which only the size is known."""
    peak = Peak("forward", "", "", 0)
    return Memory(source, asked, int(0.9 * n), int(n), {"weights": weights}, {}, peak, again=again)


def toy(memory, capability=None) -> Card:
    return Card("toy", memory, capability)


def test_fits_with_the_margin_and_is_tight_below_it():
    memory = on_tape(194)  # of 200 MiB, 6 are MARGIN
    assert MARGIN == 0.03
    said = verdict(memory, toy(200 * MIB), context=0)
    assert said and said.word == FITS and said.spare == 6 * MIB and said.retries == 0
    assert "fits, with 6.0 MiB to spare" in repr(said)
    for card in (200 * MIB - 1, 194 * MIB):
        said = verdict(memory, toy(card), context=0)
        assert said and said.word == TIGHT and "with less than 3% to spare" in repr(said)
    said = verdict(memory, toy(194 * MIB - 1), context=0)
    assert not said and said.word == TOO_LARGE and "it lacks" in repr(said)


def test_context_and_others_are_taken_off():
    memory = on_tape(194)
    said = verdict(memory, toy(GIB), context=500 * MIB, others=124 * MIB)
    assert said.usable == 400 * MIB and said.word == FITS
    assert "400.0 MiB usable (1.00 GiB − 500.0 MiB of context − 124.0 MiB of others)" in repr(said)
    assert verdict(memory, toy(GIB), others=400 * MIB).word == TOO_LARGE, "half a GiB for the context by default"
    for room in ({"context": -1}, {"others": float("nan")}):
        with pytest.raises(ValueError, match="are bytes, at least 0"):
            verdict(memory, toy(GIB), **room)
    with pytest.raises(ValueError, match=r"toy has 1.00 GiB, and context .* leave nothing of it"):
        verdict(memory, toy(GIB), others=2 * GIB)


@pytest.mark.parametrize(
    "events, usable, word, retries",
    [
        # 60 MiB find no place in the 40 that are free, and are reserved beside them: 100, until the 40 are given back
        ((40, -40, 60), 80, TIGHT, 1),
        ((40, -40, 60), 60, TIGHT, 1),
        ((40, -40, 60), 58, TOO_LARGE, 0),
        # twice: 40 for 60, and 60 for 80
        ((40, -40, 60, -60, 80), 80, TIGHT, 2),
        # a block in the middle keeps its segment: 12 + 12 + 12 + 40 are 76, of which nothing can be given back
        ((40, 12, -40, 60), 100, TIGHT, 1),
        ((40, 12, -40, 60), 70, TOO_LARGE, 0),
    ],
)
def test_tight_is_what_goes_through_when_unused_memory_is_given_back(events, usable, word, retries):
    memory = on_tape(*events)
    assert memory.reserved > usable * MIB
    said = verdict(memory, toy(usable * MIB), context=0)
    assert (said.word, said.retries) == (word, retries)
    if word == TIGHT:
        times = "once" if retries == 1 else "2 times"
        assert f"tight, if torch gives unused memory back {times} in the steps predicted" in repr(said)


def test_without_a_tape_only_the_numbers_count():
    memory = replace(on_tape(40, -40, 60), tape=None)
    assert memory.reserved == 100 * MIB
    assert verdict(memory, toy(80 * MIB), context=0).word == TOO_LARGE
    assert verdict(memory, toy(100 * MIB), context=0).word == TIGHT
    again = Memory.from_dict(json.loads(json.dumps(predict(TINY, "lora").to_dict())))
    assert verdict(again, "24GB").word == FITS, "read from a file"


def test_what_was_fragmented_may_not_fit_though_allocated_would():
    """Four pieces of 30 MiB, of which every other is freed: 60 free, in two segments of 60, each half in use."""
    memory = on_tape(120, -120, 30, 30, 31, 29, -30, -31, 58)
    assert memory.allocated == 120 * MIB
    said = verdict(memory, toy(130 * MIB), context=0)
    assert said.word == TOO_LARGE and memory.allocated < said.usable


@pytest.mark.parametrize("expandable", [False, True])
def test_from_hopper_on_the_workspaces_of_cublas_are_larger(expandable):
    memory = on_tape(12, "cuBLAS", 40, "cuBLAS", -12, 30, expandable=expandable)
    other = tape_of(12, "cuBLAS", 40, "cuBLAS", -12, 30)
    for block in other.blocks:
        block.size = 32 * MIB if block.op == "cuBLAS" else block.size
    there = CachingAllocator(expandable=expandable).replay(other).peak_reserved
    assert CUBLAS_HOPPER == 32 * MIB and there > memory.reserved
    for capability in ((9, 0), (10, 0), (12, 0)):
        assert verdict(memory, toy(GIB, capability)).reserved == there
    for capability in ((8, 0), (8, 9), None):
        assert verdict(memory, toy(GIB, capability)).reserved == memory.reserved
    assert [b.size for b in memory.tape.blocks if b.op == "cuBLAS"] == 2 * [CUBLAS], "the tape itself stays as it is"


def test_workspaces_without_a_tape():
    more = CUBLAS_HOPPER - CUBLAS
    assert verdict(need(GIB), "h100").reserved == GIB + 2 * more, "a backward pass has a thread of its own"
    assert verdict(need(GIB, train=False), "h100").reserved == GIB + more
    assert verdict(need(GIB, source="measured"), "h100").reserved == GIB, "measured is measured"


def test_cards_before_ampere_are_predicted_anew_without_flash_attention():
    asked = []

    def again(**changes):
        asked.append(changes)
        return need(3 * GIB, again, **({"attention": "auto", "dtype": "bfloat16"} | changes))

    memory = need(2 * GIB, again, attention="auto", dtype="bfloat16")
    said = verdict(memory, "t4")
    assert asked == [{"attention": "efficient"}] and said.reserved == 3 * GIB == said.memory.reserved
    assert "no flash attention before Ampere: predicted anew" in repr(said) and "no bfloat16" in repr(said)
    assert verdict(memory, "3090").reserved == 2 * GIB and len(asked) == 1
    assert verdict(memory, "24GB").notes == ()
    said = verdict(need(2 * GIB, again, attention="math", dtype="float32"), "t4")
    assert len(asked) == 1 and said.notes == (), "what was asked for is left alone"
    said = verdict(need(2 * GIB, attention="flash"), "t4")
    assert said.reserved == 2 * GIB and "predicted with flash attention, which torch does not have" in said.notes[0]
    assert "AMD" in verdict(memory, "mi300x").notes[0]


def test_memory_of_a_cpu_has_no_card():
    with pytest.raises(ValueError, match="predict with device='cuda'"):
        predict(TINY, "lora", device="cpu").verdict("4090")


def test_a_verdict_as_json():
    said = predict(TINY, "lora", batch=8).verdict(toy(700 * MIB), context=500 * MIB, others=170 * MIB)
    found = json.loads(json.dumps(said.to_dict()))
    assert found["word"] == said.word and found["usable"] == 30 * MIB and found["card"] == "toy"
    assert found["ways"][0]["changes"] == said.ways[0].changes


# ---------------------------------------------------------------------------------------------------------------- ways


class Program:
    """A stand-in for `predict`: its need is a formula of what was asked for. Counts how often it is asked."""

    DEFAULTS = dict(method="lora", targets=None, batch=4, micro_batches=1, tokens=1024, checkpointing=False,
                    quantize=None, optimizer="adamw", attention="auto", dtype="bfloat16", adapter_dtype="float32",
                    train=True)  # fmt: skip

    def __init__(self, refuses=(), **asked):
        self.asked, self.refuses, self.calls = self.DEFAULTS | asked, refuses, []

    def __call__(self, **changes):
        self.calls.append(changes)
        if changes.keys() & set(self.refuses):
            raise ValueError("not here")
        a = self.asked | changes
        weights = 2 if a["quantize"] else 8  # GiB, and so are all
        kept = a["batch"] * a["tokens"] / 1024 * (0.25 if a["checkpointing"] else 1) * (0.75 if a["targets"] else 1)
        kept *= 2 if a["quantize"] and a["adapter_dtype"] == "float32" else 1
        state = {"adamw": 16, "adamw8bit": 4, "adamw_foreach": 24}[a["optimizer"]] if a["method"] == "full" else 0
        return need((weights + kept + state) * GIB, self, int(weights * GIB), **a)

    def verdict(self, gib, **more):
        memory = self()
        self.calls.clear()
        return verdict(memory, toy(int(gib * GIB), **more), context=0)


def test_no_advice_where_it_fits_or_is_not_wanted():
    program = Program()
    assert program.verdict(13).ways == () and not program.calls
    assert verdict(program(), toy(9 * GIB), context=0, advise=False).ways == () and len(program.calls) == 1


def test_each_way_is_predicted_anew_and_is_the_mildest_of_its_kind():
    program = Program()
    said = program.verdict(11)  # 8 + 4 are too much
    assert said.word == TOO_LARGE and said.reserved == 12 * GIB and said.least is None
    assert [(way.changes, way.reserved / GIB, way.word) for way in said.ways] == [
        ({"checkpointing": True}, 9, FITS),
        ({"batch": 2, "micro_batches": 2}, 10, FITS),
        ({"quantize": "nf4"}, 10, FITS),
        ({"targets": cards.QUERY_VALUE}, 11, TIGHT),
    ]
    for way in said.ways:
        assert way.changes in program.calls, "not guessed"
        assert way.words == in_words(way.changes) and way.words in repr(said)
    assert len(program.calls) == 6, "each is seconds: the strongest of a kind first, then halving"
    assert program.verdict(11) == said, "deterministic"


def test_what_is_tight_gets_only_ways_that_fit():
    said = Program().verdict(12.2)
    assert said.word == TIGHT and len(said.ways) == 4 and {way.word for way in said.ways} == {FITS}
    said = verdict(need(12 * GIB, lambda **changes: need(11.9 * GIB), tokens=512), toy(12 * GIB), context=0)
    assert said.word == TIGHT and said.ways == () and said.least.word == TIGHT


def test_several_changes_where_no_single_one_is_enough():
    program = Program()
    said = program.verdict(5)
    (way,) = said.ways
    # batch 1, fewer tokens and 16-bit adapters would help too, and are not needed
    assert way.changes == {"checkpointing": True, "quantize": "nf4"} and way.reserved == 4 * GIB and way.word == FITS
    assert way.changes in program.calls and len(program.calls) == 7
    for left in way.changes:
        rest = {name: value for name, value in way.changes.items() if name != left}
        assert Program()(**rest).reserved > 5 * GIB, "none of them can be left out"


def test_where_only_a_dear_change_is_enough_several_cheaper_ones_are_told_too():
    program = Program(refuses=("checkpointing", "quantize", "targets"), batch=2, tokens=4096)  # 8 + 8
    said = program.verdict(10.5)
    assert [(way.words, way.reserved / GIB) for way in said.ways] == [
        ("1,024 tokens", 10), ("batch 1, 2 micro-batches a step, 2,048 tokens", 10)]  # fmt: skip


def test_the_smallest_need_where_nothing_is_enough():
    program = Program()
    said = program.verdict(1)
    assert said.word == TOO_LARGE and said.ways == () and said.least.reserved == min(
        Program()(**changes).reserved for changes in program.calls
    )
    assert said.least.changes.keys() >= {"checkpointing", "batch", "quantize", "adapter_dtype", "targets", "tokens"}
    assert "no way was found; the least is 2." in repr(said)
    assert len(program.calls) == 2, "8 GiB of weights do not fit: nothing that leaves them as they are is tried"


def test_no_least_need_where_no_change_matters():
    """A batch of one's own (`inputs`) is as long as it is, whatever `tokens` says."""
    said = verdict(need(2 * GIB, lambda **changes: need(2 * GIB), tokens=512, train=False), toy(GIB), context=0)
    assert said.word == TOO_LARGE and said.ways == () and said.least is None and "no way" not in repr(said)


def test_a_change_that_is_refused_is_left_out():
    program = Program(refuses=("targets", "quantize"))
    said = program.verdict(10.5)
    assert [way.words for way in said.ways] == [
        "gradient checkpointing", "batch 2, 2 micro-batches a step", "512 tokens"]  # fmt: skip
    (way,) = program.verdict(8.6).ways
    assert way.changes == {"checkpointing": True, "batch": 1, "micro_batches": 4}, "together without what was refused"


def test_full_fine_tuning_may_take_a_smaller_optimizer_or_a_method():
    program = Program(method="full", batch=1, optimizer="adamw_foreach")  # 8 + 24 + 1
    assert [(way.words, way.reserved / GIB) for way in program.verdict(27).ways][:1] == [("optimizer adamw", 25)]
    assert [(way.words, way.reserved / GIB) for way in program.verdict(14).ways] == [
        ("optimizer adamw8bit", 13), ("LoRA in place of full fine-tuning, r=16", 9)]  # fmt: skip
    (way,) = program.verdict(3).ways
    assert way.changes == {"method": "LoRA", "r": 16, "quantize": "nf4", "checkpointing": True}, "and nothing else"


def test_which_changes_apply():
    asked = Program.DEFAULTS

    def kinds(old=False, **changes):
        return [dict(pair for change in ladder for pair in change.items()) for ladder in ladders(asked | changes, old)]

    assert [list(kind) for kind in kinds()] == [["checkpointing"], ["batch", "micro_batches"],
                                                ["quantize", "adapter_dtype"], ["targets"], ["tokens"]]  # fmt: skip
    assert {"checkpointing": True} not in kinds(checkpointing=True)
    running = kinds(train=False, method=None)
    assert running == [{"batch": 1}, {"quantize": "nf4"}, {"tokens": 256}]
    assert kinds(method=None, batch=1) == [{"checkpointing": True}, {"tokens": 256}], "a model that has its adapters"
    assert {"dtype": "float16", "quantize": "nf4"} in kinds(dtype="float32", old=True)
    assert {"adapter_dtype": "bfloat16"} in kinds(quantize="nf4")
    assert {"quantize": "nf4"} in kinds(quantize="int8", adapter_dtype="bfloat16")
    assert {"attention": "auto"} in kinds(attention="eager")
    assert {"attention": "efficient"} in kinds(attention="math", old=True)
    parts = [tuple(change.values()) for change in ladders(asked | {"batch": 12, "micro_batches": 2})[1]]
    assert parts == [(6, 4), (3, 8), (1, 24)] and all(batch * micro == 24 for batch, micro in parts)
    assert [change["batch"] for change in ladders(asked | {"batch": 7})[1]] == [1]


@pytest.mark.parametrize("name, parts", [("gpt2", {"c_attn"}), ("bloomz-560m", {"query_key_value"}),
                                         ("opt-350m", {"q_proj", "v_proj"}), ("bert-base-uncased", {"query", "value"}),
                                         ("t5-small", {"q", "v"})])  # fmt: skip
def test_queries_and_values_are_found_in_each_family(name, parts):
    found = pl.find_targets(pl.shapes.meta_model(name), cards.QUERY_VALUE)
    assert {path.rpartition(".")[2] for path in found} == parts


def test_ways_of_a_real_prediction_hold_when_they_are_asked_for():
    asked = dict(method="lora", batch=16, tokens=512, r=4)
    memory = predict(TINY, **asked)
    card = toy(int(0.6 * memory.reserved))
    said = memory.verdict(card, context=0)
    assert said.word == TOO_LARGE and len(said.ways) >= 2
    for way in said.ways:
        there = predict(TINY, **(asked | way.changes))
        assert there.reserved == way.reserved and verdict(there, card, context=0, advise=False).word == way.word == FITS
        assert way.changes.get("micro_batches", 1) * way.changes.get("batch", 16) == 16, "the batch stays"


def test_a_real_tape_at_the_edges_of_a_card():
    memory = predict(TINY, "lora", batch=4, tokens=256)
    words = [memory.verdict(toy(n), context=0, advise=False).word
             for n in (int(memory.reserved / (1 - MARGIN)) + 1, memory.reserved, memory.allocated - 1)]  # fmt: skip
    assert words == [FITS, TIGHT, TOO_LARGE]


# --------------------------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize(
    "formula, few",
    [
        (lambda n: 1000 + 100 * n, 4),  # 1, 8, the edge and beyond
        (lambda n: 1000 + 3 * n**2, 8),
        (lambda n: 1000 + 2 * n**3, 10),
        (lambda n: 1000 + 500 * (n // 7), 9),  # in steps
        (lambda n: 5000, 9),  # whatever n is
        (lambda n: 1000 + 70 * n if n < 40 else None, 10),  # cannot exist
        (lambda n: None if n > 1 else 1000, 5),
        (lambda n: 10**6, 1),
    ],
)
def test_the_largest_is_found_by_few_looks(formula, few):
    usable, most, looks = 10_000, 97, []

    def at(n):
        looks.append(n)
        reserved = formula(n)
        word = FITS if reserved is not None and reserved <= (1 - MARGIN) * usable else TOO_LARGE
        return Row("model", n, 64, reserved, word)

    found = largest(at, most, usable)
    fitting = [n for n in range(1, most + 1) if at(n).word == FITS]
    del looks[-most:]
    assert found.batch == max(fitting, default=1) and (found.word == FITS) is bool(fitting)
    assert len(looks) <= few and len(set(looks)) == len(looks), "no look twice"


def test_a_plan_is_right_at_its_edges(monkeypatch):
    asked, seen = dict(method="lora", r=4), []

    def spy(*args, **how):
        seen.append((how["batch"], how["tokens"]))
        return predict(*args, **how)

    monkeypatch.setattr(planning, "predict", spy)
    card = toy(70 * MIB)
    found = plan(card, TINY, **asked, tokens=STEP, batch=2, context=0)
    assert len(seen) == len(set(seen)), "nothing is predicted twice"
    assert found.batch > 1 and found.tokens % STEP == 0 and 0 < found.tokens < TINY.max_position_embeddings

    def fits(batch, tokens):
        return verdict(predict(TINY, **asked, batch=batch, tokens=tokens), card, context=0, advise=False).word == FITS

    assert fits(found.batch, STEP) and not fits(found.batch + 1, STEP)
    assert fits(2, found.tokens) and not fits(2, found.tokens + STEP)
    most, long = found.rows
    assert (most.batch, most.tokens, long.batch, long.tokens) == (found.batch, STEP, 2, found.tokens)
    assert most.reserved == predict(TINY, **asked, batch=found.batch, tokens=STEP).reserved
    assert f"{found.batch} ×" in repr(found) and "70.0 MiB usable" in repr(found)
    assert list(found.to_pandas()["GiB"]) == [most.reserved / GIB, long.reserved / GIB]
    assert json.loads(json.dumps(found.to_dict()))["batch"] == found.batch
    larger = plan(toy(90 * MIB), TINY, **asked, tokens=STEP, batch=2, context=0)
    assert larger.batch > found.batch and larger.tokens > found.tokens, "a larger card takes more"


def test_sizes_that_cannot_exist_do_not_fit(monkeypatch):
    def answer(model, method, batch, tokens, **how):
        if batch > 20:
            raise ValueError("tensors of this size cannot exist")
        return need(GIB + batch * tokens, model="tiny")

    monkeypatch.setattr(planning, "predict", answer)
    assert plan("24GB", TINY).batch == 20
    with pytest.raises(ValueError, match="cannot exist"):
        plan("24GB", TINY, batch=21)  # what was asked for itself


def test_a_plan_goes_no_further_than_the_context_and_says_so():
    found = plan("24GB", TINY, r=4)
    assert found.tokens == TINY.max_position_embeddings and "no longer than its context, 2,048 tokens" in repr(found)


def test_a_plan_where_not_even_the_least_fits():
    found = plan(toy(20 * MIB), TINY, r=4, context=0)
    assert (found.batch, found.tokens) == (0, 0) and "does not fit" in repr(found)


def test_a_plan_for_an_old_card_has_no_flash_attention(monkeypatch):
    asked = []

    def spy(*args, **how):
        asked.append(how["attention"])
        return predict(*args, **how)

    monkeypatch.setattr(planning, "predict", spy)
    plan(Card("old", 20 * MIB, (7, 5)), TINY, context=0)
    assert set(asked) == {"efficient"}


@pytest.fixture
def catalogue(monkeypatch):
    """Models of a size only, under built-in names: the need grows with it, but not quite. gpt2 takes no method."""
    names = ["gpt2", "gemma-3-270m", "opt-350m", "gpt2-medium", "qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b",
             "qwen2.5-1.5b", "qwen3-1.7b", "llama-3.2-3b", "qwen3-4b", "llama-7b", "qwen2.5-7b",
             "llama-3-8b"]  # fmt: skip
    needs = {name: (i + 1) * GIB for i, name in enumerate(names)}
    needs |= {"qwen3-0.6b": 8 * GIB, "llama-3.2-1b": 6.5 * GIB, "qwen2.5-1.5b": 7 * GIB, "qwen3-1.7b": 12 * GIB,
              "llama-7b": 10.5 * GIB}  # fmt: skip
    asked = []

    def answer(name, method, **how):
        asked.append(name)
        if name.startswith("gpt2"):
            raise ValueError("no module path matches 'q_proj'")
        return need(needs[name], model=name, method=method, **how)

    monkeypatch.setattr(planning, "_language_models", lambda: {name: i * 10**8 for i, name in enumerate(names)})
    monkeypatch.setattr(planning, "predict", answer)
    return needs, asked


@pytest.mark.parametrize("gib", [0.5, 2.5, 6.8, 7.5, 8.5, 10.5, 11, 30])
def test_the_largest_model_for_a_card(catalogue, gib):
    needs, asked = catalogue
    found = plan(f"{gib}GB", tokens=1024, context=0, targets="q_proj")
    words = {row.model: row.word for row in found.rows}
    assert list(words) == [name for name in needs if not name.startswith("gpt2")], "in order of size"
    right = {name: FITS if needs[name] <= (1 - MARGIN) * gib * GIB else TOO_LARGE for name in words}
    assert {name: FITS if word == FITS else TOO_LARGE for name, word in words.items()} == right
    assert found.model == ([name for name in right if right[name] == FITS] or [""])[-1]
    assert asked.count("gpt2") == 1 and "gpt2-medium" not in asked and len(asked) == len(set(asked)), "no look twice"
    assert "without the models of gpt2: no module path matches 'q_proj'" in repr(found)
    assert all(row.reserved in (None, needs[row.model]) for row in found.rows)


def test_models_with_too_short_a_context_are_left_out(catalogue):
    found = plan("24GB", tokens=4096, context=0)
    assert "llama-7b" not in [row.model for row in found.rows]
    assert "4 built-in models have a context of less than 4,096 tokens" in repr(found)
    with pytest.raises(ValueError, match="no built-in model has a context of 1,000,000 tokens"):
        plan("24GB", tokens=10**6)


def test_weights_that_cannot_fit_are_not_predicted(catalogue, monkeypatch):
    needs, asked = catalogue
    sizes = planning._language_models()
    large = dict.fromkeys(("llama-7b", "qwen2.5-7b", "llama-3-8b"), 13 * 10**9)  # 26 GB in bfloat16
    monkeypatch.setattr(planning, "_language_models", lambda: sizes | large)
    assert plan("24GB").model == "qwen3-4b" and not large.keys() & set(asked)
    assert plan("24GB", quantize="nf4").model == "llama-3-8b", "in four bits they may"


def test_what_no_model_takes_is_refused(catalogue, monkeypatch):
    def refuse(name, *args, **how):
        raise ValueError("no method is named 'lorra'")

    monkeypatch.setattr(planning, "predict", refuse)
    with pytest.raises(ValueError, match="no method is named 'lorra'"):
        plan("24GB", method="lorra")
    with pytest.raises(ValueError, match="a plan is for a card"):
        plan("24GB", device="cpu")


def test_the_built_in_language_models(monkeypatch):
    monkeypatch.setattr(pl.shapes, "meta_model", lambda name: pl.shapes.torch.nn.Linear(7, 1, device="meta"))
    found = planning._language_models()
    assert found["llama-3.1-8b"] == shapes()["llama-3.1-8b"]["parameters"] and found["llama-65b"] == 8, "counted"
    for left_out in ("gpt3-175b", "t5-small", "bert-base-uncased", "roberta-base"):
        assert left_out in shapes() and left_out not in found


# -------------------------------------------------------------------------------------------------- python -m peftlab


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(TINY.to_json_string(use_diff=False))
    return str(path)


def test_vram_prints_the_table_and_the_verdicts(tiny, capsys):
    assert main(["vram", "--model", tiny, "--method", "lora", "--rank", "4", "--set", "alpha=3", "--batch", "4",
                 "--checkpointing", "--card", "4090", "--card", "24GB", "--context", "1"]) == 0  # fmt: skip
    text = capsys.readouterr().out
    memory = predict(tiny, "lora", alpha=3, r=4, batch=4, checkpointing=True)
    assert text.startswith(f"{memory}\n"), "what predict prints"
    assert re.search(r"\n  found in \d+\.\d s; resident memory here grew by \d+\.\d+ [MG]iB\n\n", text)
    told = [str(memory.verdict(card, context=GIB)) for card in ("4090", "24GB")]
    assert text.endswith("\n\n" + "\n\n".join(told) + "\n") and "1.00 GiB of context" in text


def test_vram_as_json(tiny, capsys):
    assert main(["vram", "--model", tiny, "--method", "full", "--optimizer", "sgd", "--tokens", "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    memory = predict(tiny, "full", optimizer="sgd", tokens=64)
    assert (found["allocated"], found["reserved"]) == (memory.allocated, memory.reserved)
    assert found["by_kind"] == memory.by_kind and sum(found["by_kind"].values()) == found["allocated"]
    assert found["peak"] == memory.peak._asdict() and found["phases"] == memory.phases and found["notes"] == []
    assert found["seconds"] > 0 and found["host"] >= 0 and "verdict" not in found
    assert main(["vram", "--model", tiny, "--new-tokens", "3", "--card", "8GB", "--card", "t4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["asked"]["method"] is None and found["asked"]["train"] is False and "cache" in found["by_kind"]
    assert found["verdict"]["word"] == FITS and [v["card"] for v in found["verdicts"]] == ["a card of 8 GiB", "T4 16GB"]


def test_vram_advises_unless_told_not_to(tiny, capsys):
    asked = ["vram", "--model", tiny, "--method", "lora", "--batch", "8", "--card", "0.56", "--context", "0.5"]
    assert main(asked) == 0
    with_advice = capsys.readouterr().out
    assert main([*asked, "--no-advice"]) == 0
    assert "each predicted anew" in with_advice and "each predicted anew" not in capsys.readouterr().out


def test_vram_plans(tiny, capsys):
    card = ["--card", "0.65", "--context", "0.5"]
    assert main(["vram", "--plan", *card, "--model", tiny, "--rank", "4", "--tokens", "128"]) == 0
    assert capsys.readouterr().out == f"{plan('0.65', tiny, r=4, tokens=128, context=GIB // 2)}\n", "LoRA by default"
    assert main(["vram", "--plan", *card, "--model", tiny, "--method", "none", "--tokens", "128", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"] == found["plans"][0] == plan("0.65", tiny, None, tokens=128, context=GIB // 2).to_dict()


def test_vram_list(capsys):
    assert main(["vram", "--list"]) == 0
    text = capsys.readouterr().out
    assert "RTX 4090 24GB" in text and "meta-llama/Llama-2-7b-hf" in text and "paged_adamw8bit" in text
    assert main(["vram", "--list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cards"]["L4 24GB"] == CARDS["L4 24GB"].memory and found["optimizers"] == list(OPTIMIZERS)
    assert "gpt2" in found["shapes"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "no model: --model NAME"),
        (["--plan"], "--plan needs a card"),
        (["--model", "meta-llama/Llama-3.1-9B"], "did you mean 'llama-3.1-8b'"),
        (["--model", "gpt2", "--method", "lorra"], "did you mean 'LoRA'"),
        (["--model", "gpt2", "--method", "lora", "--targets", "c_atn"], "did you mean 'c_attn'"),
        (["--model", "gpt2", "--method", "lora", "--set", "aplha=3"], "did you mean 'alpha'"),
        (["--model", "gpt2", "--set", "r"], "is not KEY=VALUE"),
        (["--model", "gpt2", "--set", "new_tokens=3"], "use --new-tokens"),
        (["--model", "gpt2", "--rank", "3"], "r given, but no method"),
        (["--model", "gpt2", "--method", "full", "--quantize", "nf4"], "full fine-tuning trains"),
        (["--model", "gpt2", "--dtype", "float8"], "'bfloat16'"),
        (["--model", "gpt2", "--optimizer", "adam"], "is none of adamw"),
        (["--model", "gpt2", "--attention", "fast"], "is not one of 'auto'"),
        (["--model", "gpt2", "--batch", "0"], "at least 1"),
        (["--model", "gpt2", "--card", "4091"], "did you mean 'RTX 4090 24GB'"),
        (["--model", "gpt2", "--card", "this"], "no CUDA device here"),
        (["--model", "gpt2", "--card", "8GB", "--others", "-1"], "at least 0"),
        (["--plan", "--card", "8GB", "--others", "8"], "leave nothing"),
    ],
)
def test_wrong_input_ends_with_one_line(arguments, words, capsys):
    assert main(["vram", *arguments]) == 2
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if not line.startswith("[transformers]")]
    assert len(lines) == 1 and lines[0].startswith("peftlab vram: ") and words in lines[0] and "count" not in lines[0]


def test_the_help_says_the_defaults_of_predict():
    (vram,) = [action.choices["vram"] for action in parser()._actions if action.choices and "vram" in action.choices]
    defaults = {name: p.default for name, p in signature(predict).parameters.items()}
    none = {"quantize": "as they are", "autocast": "off", "targets": "the method's own"}
    options = {option.dest: option.help for option in vram._actions}
    for name in OPTIONS:
        said = re.search(r"\(default: ([^;)]*)", options[name])
        if defaults[name] is False:
            assert said is None, f"{name} is a switch"
        else:
            assert said[1] == (none[name] if defaults[name] is None else str(defaults[name])), name
    assert f"(default: {cards.CONTEXT / GIB:g})" in options["context"]

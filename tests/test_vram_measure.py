"""Measuring: what really happens to memory agrees with the prediction, and is read rightly from what torch records."""

import os
import random
import subprocess
import sys
from collections import Counter
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from families import build
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

import peftlab as pl
from peftlab.vram import measure, measuring, predict
from peftlab.vram.allocator import MIB, CachingAllocator
from peftlab.vram.history import (
    Birth,
    Death,
    Moment,
    Returned,
    history_of_profile,
    history_of_snapshot,
    labelled,
    survivors,
    tape_of,
    with_moments,
)
from peftlab.vram.step import OPTIMIZERS, Generation, TrainingStep, batch_of
from peftlab.vram.tape import CUBLAS, Tape

ROWS, TOKENS = 2, 32
CLOSE = 1e-3  # what the CPU's prediction promises; scalars and a few bytes of masks are all that may be missing


def tuned(family="llama", method="LoRA", dtype=torch.float32, **hyper):
    model = build(family).to(dtype).train()
    if method == "full":
        return pl.full_finetuning(model)
    pl.attach(model, method, **hyper)
    return model


def training(model, optimizer="adamw", **how):
    trained = [p for p in model.parameters() if p.requires_grad]
    return TrainingStep(model, batch_of(model, ROWS, TOKENS, device="cpu"), OPTIMIZERS[optimizer](trained), **how)


def predicted(model, **how):
    return predict(model, batch=ROWS, tokens=TOKENS, device="cpu", **how)


def tensors_of(step):
    return {name: t.clone() for name, t in step.model.state_dict().items()}


# --- on the CPU, beside the prediction ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "method", "dtype", "checkpointing", "optimizer"),
    [
        ("llama", "full", torch.float32, True, "adamw"),
        ("llama", "LoRA", torch.bfloat16, False, "adamw_foreach"),
        ("gpt2", "Houlsby", torch.float32, False, "adamw"),
        ("t5", "IA3", torch.float32, False, "sgd_momentum"),
        ("bert", "BitFit", torch.float32, False, "adamw_loop"),
    ],
)
def test_measured_is_what_was_predicted(family, method, dtype, checkpointing, optimizer):
    model = tuned(family, method, dtype)
    expected = predicted(model, checkpointing=checkpointing, optimizer=optimizer)
    if checkpointing:
        model.activation_checkpointing_enable()
    found = measure(training(model, optimizer))
    assert found.source == "measured" and found.reserved == 0
    assert found.allocated == pytest.approx(expected.allocated, rel=CLOSE)
    assert sum(found.by_kind.values()) == found.allocated
    for kind in ("weights", "adapter", "optimizer", "gradients", "logits"):
        assert found.by_kind.get(kind, 0) == expected.by_kind.get(kind, 0), kind
    assert list(found.phases) == ["forward", "backward", "step"] == list(expected.phases)
    for phase, n in expected.phases.items():
        assert found.phases[phase] == pytest.approx(n, rel=CLOSE)
    assert (found.peak.phase, found.peak.module) == (expected.peak.phase, expected.peak.module)
    assert found.peak.op == expected.peak.op.rpartition(".")[0]
    asked = {"batch": ROWS, "tokens": TOKENS, "device": "cpu", "method": method, "checkpointing": checkpointing}
    assert asked.items() <= found.asked.items()


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_measured_is_the_sum_of_the_profiler_s_events(family):
    """Without addresses: bytes of all tensors that are there, and the running sum of what comes and goes."""
    step = training(tuned(family))
    step(lambda phase: None)
    states = [t for state in step.optimizer.state.values() for t in state.values()]
    tensors = [*step.model.parameters(), *step.model.buffers(), *step.batch.values(), *states]
    there = {s._cdata: s.nbytes() for t in tensors if isinstance(t, torch.Tensor) for s in [t.untyped_storage()]}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(lambda phase: None)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    levels = accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    assert measure(step).allocated == sum(there.values()) + max(levels)


def test_a_four_bit_model_and_several_batches_a_step():
    model = build("llama")
    pl.quantize(model)
    pl.attach(model.train(), "LoRA")
    found, expected = measure(training(model, micro_batches=2)), predicted(model, micro_batches=2)
    assert found.allocated == pytest.approx(expected.allocated, rel=CLOSE)
    assert found.by_kind["gradients"] == expected.by_kind["gradients"] > 0  # those of the first batch


def test_generation_names_its_cache_and_forgets_the_one_before():
    model = build("llama")
    rows, prompt, new = 2, 40, 8
    found = measure(Generation(model, batch_of(model, rows, prompt, device="cpu"), new))
    expected = predict(model, train=False, batch=rows, tokens=prompt, new_tokens=new, device="cpu")
    assert found.by_kind["cache"] == expected.by_kind["cache"] > 0
    assert list(found.phases) == ["prompt", "tokens"] and found.asked["new_tokens"] == new
    labels = 8 * rows * prompt  # the prediction's batch has labels that generation has no use for
    assert found.allocated == pytest.approx(expected.allocated, abs=labels)


def test_the_timeline_is_the_last_step_alone():
    model = tuned()
    found, expected = measure(training(model), warmup=2), predicted(model)
    assert Counter(phase for phase, _ in found.timeline).keys() == Counter(p for p, _ in expected.timeline).keys()
    one = [n for phase, n in found.timeline if phase == "backward"]
    other = [n for phase, n in expected.timeline if phase == "backward"]
    assert max(one) == pytest.approx(max(other), rel=CLOSE) and one[-1] == pytest.approx(other[-1], rel=CLOSE)


def test_a_measured_step_trains_as_an_unwatched_one():
    watched, plain = training(tuned()), training(tuned())
    measure(watched, warmup=1)
    for _ in range(2):
        plain(lambda phase: None)
    for name, tensor in tensors_of(plain).items():
        assert torch.equal(tensor, watched.model.state_dict()[name]), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in watched.model.modules())
    assert not torch.nn.modules.module._global_forward_hooks and not torch.autograd._profiler_enabled()


# --- steps of one's own ---------------------------------------------------------------------------------------------


@pytest.fixture
def loop():
    """(model, optimizer, a training step that knows nothing of measuring)."""
    model = tuned()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    batch = batch_of(model, ROWS, TOKENS, device="cpu")

    def step():
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step


def test_phases_of_a_plain_step_are_found(loop):
    model, _, step = loop
    found, expected = measure(step, model=model), predicted(model)
    assert list(found.phases) == ["forward", "backward", "step"] and found.peak.phase == expected.peak.phase
    assert found.allocated == pytest.approx(expected.allocated, rel=CLOSE)
    assert found.by_kind["optimizer"] == expected.by_kind["optimizer"]  # known from the optimizer's own step


def test_one_line_of_context(loop):
    model, _, step = loop
    with measuring(model) as m:
        with pytest.raises(RuntimeError, match="after the end of the `with`"):
            _ = m.memory
        step()
    first = m.memory
    with measuring(model, asked={"model": "mine", "note": 1}) as m:
        step()
    assert list(first.phases) == list(m.memory.phases) == ["forward", "backward", "step"]
    states = m.memory.by_kind["optimizer"]
    assert first.phases["forward"] == m.memory.phases["forward"] - states  # Adam's states appear in the first step
    assert m.memory.asked["model"] == "mine" and m.memory.asked["optimizer"] == "AdamW"


def test_own_marks_replace_those_that_are_found(loop):
    model, optimizer, step = loop

    def marked(mark):
        mark("all of it")
        step()
        mark("after")

    found = measure(marked, model=model, optimizer=optimizer)
    assert list(found.phases) == ["all of it", "after"] and found.peak.phase == "all of it"


def test_what_an_earlier_step_left_counts(loop):
    """The mistake of keeping the last output: its logits are there twice in the next step."""
    model, optimizer, step = loop
    kept, batch = {}, batch_of(model, ROWS, TOKENS, device="cpu")

    def leaky():
        kept["out"] = model(**batch, use_cache=False)
        kept["out"].loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    clean, found = measure(step, model=model), measure(leaky, model=model)
    logits = 4 * ROWS * TOKENS * model.config.vocab_size
    assert found.phases["forward"] - clean.phases["forward"] == pytest.approx(logits, rel=0.01)


def test_what_earlier_steps_hoard_counts():
    model, hoard = nn.Linear(10, 10, bias=False), []
    found = measure(lambda: hoard.append(torch.empty(1000)), model=model, warmup=3)
    assert found.allocated == 400 + 4 * 4000 and found.by_kind["weights"] == 400


def test_garbage_of_the_warming_up_does_not():
    model = nn.Linear(10, 10, bias=False)

    def step():
        ring = [torch.empty(1000)]
        ring.append(ring)

    assert measure(step, model=model, warmup=3).allocated == 400 + 4000


def test_gradients_that_were_there_are_seen_to_go(loop):
    """The CPU's profiler does not tell of the end of memory from before it was on."""
    model, optimizer, _ = loop
    batch = batch_of(model, ROWS, TOKENS, device="cpu")
    model(**batch, use_cache=False).loss.backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)

    def step(mark):
        mark("before")
        optimizer.zero_grad()
        mark("after")
        torch.ones(1)

    found = measure(step, model=model, optimizer=optimizer, warmup=0)
    assert found.allocated - found.phases["after"] == gradients - 4 > 0
    assert found.by_kind["gradients"] == gradients


def test_a_step_without_phases_is_one():
    model = nn.Linear(100, 50)
    size = 4 * (100 * 50 + 50)
    found = measure(lambda: torch.empty(1000), model=model)
    assert found.phases == {"step": size + 4000} and found.by_kind == {"weights": size, "temporaries": 4000}


# --- refusals -------------------------------------------------------------------------------------------------------


def test_refusals(loop):
    model, _, step = loop
    with pytest.raises(ValueError, match="no GPU here.*pass model="):
        measure(step)
    with pytest.raises(ValueError, match="pass model="):
        measure(step, device="cpu")
    with pytest.raises(ValueError, match="no CUDA GPU"):
        measure(step, model=model, device="cuda")
    with pytest.raises(ValueError, match="no Apple GPU"):
        measure(step, model=model, device="mps")
    with pytest.raises(ValueError, match="measured on cuda, cpu and mps"):
        measure(step, model=model, device="xpu")
    with pytest.raises(ValueError, match="no numbers"):
        measure(step, model=nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="nothing in LlamaForCausalLM trains"):
        optimizer = SimpleNamespace(state={}, param_groups=[])
        measure(TrainingStep(build("llama").requires_grad_(False), {}, optimizer))
    with pytest.raises(TypeError, match="not int"):
        measure(3, model=model)
    with pytest.raises(TypeError, match="wants 2 arguments \\(a, b\\)"):
        measure(lambda a, b: None, model=model)
    for warmup in (-1, True, 1.5):
        with pytest.raises(ValueError, match="warmup="):
            measure(step, model=model, warmup=warmup)
    with torch.profiler.profile(), pytest.raises(RuntimeError, match="a torch profiler is on"):
        measure(step, model=model)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_when_the_step_fails_nothing_stays_on(loop, after):
    model, _, step = loop
    calls = []

    def failing():
        step()
        calls.append(None)
        if len(calls) > after:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        measure(failing, model=model, warmup=2)
    assert not torch.autograd._profiler_enabled() and not model._forward_hooks and not model._forward_pre_hooks
    assert not torch.nn.modules.module._global_forward_hooks
    assert not _global_optimizer_pre_hooks
    assert measure(step, model=model).allocated > 0


# --- histories ------------------------------------------------------------------------------------------------------


def test_a_tape_of_a_history():
    history = [
        Moment("forward", {1: ("weights", 100)}),
        Birth(2, 30, 30, "aten.mm", "layer"),
        Birth(3, 40, 33, "aten.mm", "head"),
        Birth(4, 5),
        Death(4),
        Moment("backward", {}),
        Birth(4, 7),
        Death(2),
        Moment("step", {4: ("gradients", 7)}),
        Death(9, 11),
        Birth(3, 8),
    ]
    tape = tape_of({5: 1000}, history, vocabulary=50, logits={33})
    kinds = [(block.kind, block.size, block.phase) for block in tape.blocks]
    assert kinds == [
        ("temporaries", 1000, "setup"), ("weights", 100, "setup"), ("temporaries", 11, "setup"),
        ("activations", 30, "forward"), ("logits", 40, "forward"), ("temporaries", 5, "forward"),
        ("gradients", 7, "backward"), ("temporaries", 8, "step"),
    ]  # fmt: skip
    assert tape.allocated() == [1000, 1100, 1111, 1141, 1181, 1186, 1181, 1188, 1158, 1147, 1107, 1115]
    assert [phase for phase, _ in tape.phases()] == ["forward", "backward", "step"]
    assert survivors(history) == {4: 7, 3: 8}


def test_what_a_call_in_the_backward_pass_leaves_is_an_activation():
    inside = [Birth(1, 10, call=0), Birth(2, 20, call=0), Death(2), Returned(0)]
    tape = tape_of({}, [Moment("backward", {}), *inside, Birth(3, 5), Death(1), Death(3)])
    assert [block.kind for block in tape.blocks] == ["activations", "temporaries", "temporaries"]


def event(name, start, *children, end=None, node=-1, **memory):
    """As in torch's tree of events."""
    more = SimpleNamespace(sequence_number=node, **memory)
    return SimpleNamespace(name=name, start_time_ns=start, end_time_ns=end, extra_fields=more, children=children)


def block(start, address, n, device="cpu"):
    return event("[memory]", start, ptr=address, alloc_size=n, device=torch.device(device))


def test_a_history_of_a_profile():
    """Modules of a backward pass are those that made its nodes; a checkpointed call ends when it returns."""
    moments = [Moment("forward", {}), Moment("backward", {})]
    forward = event(
        "peftlab module head", 2,
        event("aten::linear", 3, event("aten::addmm", 4, event("aten::empty", 5, block(6, 77, 10)), node=5), node=5),
        end=7,
    )  # fmt: skip
    again = event("peftlab module body", 22, event("aten::mul", 23, block(24, 78, 3), block(25, 78, -3)), end=30)
    node = "autograd::engine::evaluate_function: AddmmBackward0"
    engine = event(node, 20, block(21, 79, 6), again, block(40, 77, -10), node=5)
    tree = [engine, event("peftlab moment 0", 1), forward, event("peftlab moment 1", 10), block(11, 80, 1, "cuda:0"),
            event("peftlab gone 123", 50)]  # fmt: skip
    assert history_of_profile(tree, torch.device("cpu"), moments) == [
        moments[0], Birth(77, 10, 10, "aten.addmm", "head"), moments[1], Birth(79, 6, 6, "", "head"),
        Birth(78, 3, 3, "aten.mul", "body", 0), Death(78, 3), Returned(0), Death(77, 10), Death(123),
    ]  # fmt: skip
    assert history_of_profile(tree, torch.device("cuda", 0), moments)[2] == Birth(80, 1, 1)


def test_moments_stand_after_so_many_births_and_deaths():
    a, b, c = (Moment(phase, {}) for phase in "abc")
    history = [Birth(1, 1), Returned(0), Death(1), Birth(2, 1)]
    assert with_moments(history, [a, b, c], [0, 2, 3]) == [a, Birth(1, 1), Returned(0), Death(1), b, Birth(2, 1), c]


def test_labels_of_a_profile_go_to_the_births_in_order():
    mm, mul = Birth(0, 8, 8, "aten.mm", "a"), Birth(0, 8, 8, "aten.mul", "b", 0)
    profile = [Moment("", {}), mul, Death(0), Returned(0), mm, Returned(1)]
    real = [Birth(512, 512, 8), Birth(1024, 512, 8), Death(512, 512)]
    assert labelled(real, profile) == [Birth(512, 512, 8, "aten.mul", "b", 0), Returned(0),
                                       Birth(1024, 512, 8, "aten.mm", "a"), Death(512, 512), Returned(1)]  # fmt: skip
    assert labelled(real, profile[:2]) == real


# --- a GPU's snapshot -----------------------------------------------------------------------------------------------


def test_a_snapshot_in_torch_s_format():
    """Blocks count with the rest that the allocator did not cut off, until their freeing is requested."""
    def block(address, size, asked, state):
        return {"address": address, "size": size, "requested_size": asked, "state": state, "frames": []}

    segments = [
        {"device": 0, "address": 10 * MIB, "total_size": 20 * MIB, "segment_type": "large", "blocks": [
            block(10 * MIB, 4 * MIB, 4 * MIB - 100, "active_allocated"),
            block(14 * MIB, 3 * MIB, 0, "inactive"),
            block(17 * MIB, 13 * MIB, 13 * MIB, "active_awaiting_free"),
        ]},
        {"device": 1, "address": 99 * MIB, "total_size": 2 * MIB, "segment_type": "small", "blocks": [
            block(99 * MIB, 2 * MIB, 9, "active_allocated"),
        ]},
    ]  # fmt: skip
    small = 70 * MIB
    trace = [
        {"action": "snapshot", "addr": 0, "size": 4 * MIB, "stream": 0, "time_us": 1, "frames": []},
        {"action": "alloc", "addr": 14 * MIB, "size": 2 * MIB + 1, "stream": 0, "time_us": 2},
        {"action": "segment_alloc", "addr": small, "size": 2 * MIB, "stream": 0, "time_us": 3},
        {"action": "alloc", "addr": small, "size": 700, "stream": 0, "time_us": 4},
        {"action": "free_requested", "addr": 14 * MIB, "size": 2 * MIB + 1, "stream": 0, "time_us": 5},
        {"action": "free_completed", "addr": 14 * MIB, "size": 2 * MIB + 1, "stream": 0, "time_us": 6},
        {"action": "alloc", "addr": 14 * MIB, "size": 2 * MIB - 512, "stream": 0, "time_us": 7},
        {"action": "alloc", "addr": small + 1024, "size": 1, "stream": 0, "time_us": 8},
        {"action": "oom", "size": 2**40, "stream": 0, "device_free": 5, "time_us": 9},
    ]  # fmt: skip
    alive, history = history_of_snapshot({"segments": segments}, trace, 0)
    assert alive == {10 * MIB: 4 * MIB}
    assert history == [
        Birth(14 * MIB, 3 * MIB, 2 * MIB + 1),  # the rest is less than 1 MiB
        Birth(small, 1024, 700),  # small blocks are cut to the 512 bytes
        Death(14 * MIB, 3 * MIB),
        Birth(14 * MIB, 2 * MIB - 512, 2 * MIB - 512),  # the rest is larger
        Birth(small + 1024, 512, 1),
    ]


class Gpu(CachingAllocator):
    """A GPU's memory in torch's place: our own allocator, which writes what torch would record of it."""

    def __init__(self):
        super().__init__()
        self.trace, self.recording, self.count, self.sizes, self.peak = [], False, 0, {}, (0, 0)

    def note(self, action, address, size):
        if self.recording:
            self.trace.append({"action": action, "addr": address, "size": size, "stream": 0, "frames": []})

    def _grow(self, size, small):
        piece = super()._grow(size, small)
        self.note("segment_alloc", piece.address, piece.size)
        return piece

    def alloc(self, size):
        self.count += 1
        self.malloc(self.count, size)
        self.sizes[self.count] = size
        self.note("alloc", self.used[self.count].address, size)
        self.peak = max(self.peak[0], self.allocated), max(self.peak[1], self.reserved)
        return self.count

    def release(self, number):
        address, size = self.used[number].address, self.sizes.pop(number)
        self.note("free_requested", address, size)
        self.free(number)
        self.note("free_completed", address, size)

    def snapshot(self):
        segments, numbers = [], {piece.address: n for n, piece in self.used.items()}
        for first in (p for p in self.pieces.values() if p.before is None):
            blocks, piece = [], first
            while piece is not None:
                state = "inactive" if piece.free else "active_allocated"
                asked = self.sizes.get(numbers.get(piece.address), 0)
                blocks.append({"address": piece.address, "size": piece.size, "requested_size": asked, "state": state})
                piece = piece.after
            segments.append({"device": 0, "address": first.address, "blocks": blocks})
        return {"segments": segments, "device_traces": [list(self.trace)]}

    def stats(self, device):
        freed = self.count - len(self.used)
        return {"allocation": {"all": {"allocated": self.count, "freed": freed}}}

    def reset(self, device):
        self.peak = self.allocated, self.reserved

    def history(self, enabled, **how):
        self.recording = enabled is not None
        if not self.recording:
            self.trace.clear()


@pytest.mark.parametrize("seed", range(4))
def test_a_trace_is_followed_to_the_byte(seed):
    """Random work of small and large blocks: at each event as many bytes as the allocator itself has counted."""
    draw, gpu, levels, live = random.Random(seed), Gpu(), [], []
    for event_number in range(3000):
        if event_number == 1000:
            gpu.recording, before = True, gpu.snapshot()
        if live and draw.random() < 0.48:
            gpu.release(live.pop(draw.randrange(len(live))))
        else:
            size = draw.choice((1, 700, 90_000, MIB, 3 * MIB, 9 * MIB, 11 * MIB))
            live.append(gpu.alloc(size + draw.randrange(5000)))
        levels.append(gpu.allocated)
    alive, history = history_of_snapshot(before, gpu.trace, 0)
    assert sum(alive.values()) == levels[999]
    assert tape_of(alive, history).allocated()[len(alive) :] == levels[1000:]


def test_a_predicted_program_on_the_gpu_that_is_not_there():
    """The events of a real model's two steps, through an allocator and its trace: kinds and peak come out again."""
    tape: Tape = predict("gpt2", "full", batch=1, tokens=64, dtype="float32").tape
    gpu, numbers, addresses = Gpu(), {}, []
    gpu.recording, before = True, gpu.snapshot()
    for n in tape.events:
        if n >= 0:
            numbers[n] = gpu.alloc(tape.blocks[n].size)
            addresses.append(gpu.used[numbers[n]].address)
        else:
            gpu.release(numbers.pop(~n))
    alive, history = history_of_snapshot(before, gpu.trace, 0)
    found = tape_of(alive, history)
    assert len(found.blocks) == len(tape.blocks) and max(found.allocated()) == gpu.peak_allocated
    assert all(0 <= got.size - block.size <= MIB for got, block in zip(found.blocks, tape.blocks, strict=True))
    assert gpu.peak_allocated > max(tape.allocated())  # so there are rests


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    fakes = {
        "is_available": lambda: True, "init": lambda: None,
        "current_device": lambda: 0, "get_device_name": lambda device: "Fake 24",
        "synchronize": lambda device: None, "reset_peak_memory_stats": gpu.reset,
        "memory_stats_as_nested_dict": gpu.stats, "max_memory_allocated": lambda device: gpu.peak[0],
        "max_memory_reserved": lambda device: gpu.peak[1],
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda.memory, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", gpu.history)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", gpu.snapshot)
    monkeypatch.setattr(torch._C, "_cuda_isHistoryEnabled", lambda: gpu.recording, raising=False)
    return gpu


def work(gpu):
    """Something that stays, and a step that takes memory in two phases."""
    gpu.alloc(CUBLAS)
    gpu.alloc(30 * MIB)

    def step(mark):
        mark("forward")
        kept, scratch = gpu.alloc(5 * MIB), gpu.alloc(7 * MIB)
        gpu.release(scratch)
        mark("backward")
        gpu.release(gpu.alloc(MIB))
        gpu.release(kept)

    return step


def test_on_a_gpu_counters_and_tape_agree(gpu):
    found = measure(work(gpu), device="cuda")
    assert found.asked["device"] == "Fake 24"
    there = CUBLAS + 30 * MIB
    assert found.allocated == there + 12 * MIB == max(found.phases.values())
    assert found.phases == {"forward": there + 12 * MIB, "backward": there + 6 * MIB}
    assert found.by_kind == {"activations": 5 * MIB, "temporaries": 37 * MIB, "workspace": CUBLAS}
    assert found.reserved == gpu.peak_reserved > found.allocated
    assert found.notes == ("30.0 MiB were there before and belong neither to the model nor to its optimizer",)
    assert not gpu.recording and not torch.autograd._profiler_enabled()


def test_a_counter_that_says_otherwise_is_told(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: gpu.peak[0] + 3)
    assert any(note.startswith("torch's own counter has") for note in measure(work(gpu), device="cuda").notes)


def test_without_a_history_the_counters_are_left(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda.memory, "get_allocator_backend", lambda: "cudaMallocAsync")
    found = measure(work(gpu), device="cuda:0")
    assert found.allocated == CUBLAS + 42 * MIB == sum(found.by_kind.values()) and found.tape is None
    assert found.phases["backward"] == CUBLAS + 36 * MIB and found.peak.phase == "forward"
    assert found.reserved == gpu.peak_reserved and "not told apart" in found.notes[0]


def test_on_a_gpu_recording_ends_too_when_the_step_fails(gpu):
    step = work(gpu)

    def failing(mark):
        step(mark)
        raise KeyError("mine")

    with pytest.raises(KeyError):
        measure(failing, device="cuda", warmup=0)
    assert not gpu.recording and not torch.autograd._profiler_enabled()
    gpu.recording = True
    with pytest.raises(RuntimeError, match="memory history is on"):
        measure(step, device="cuda")
    assert gpu.recording  # the one that was not ours


def test_on_apple_two_counters_are_read(monkeypatch):
    now = [100]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: None)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: now[0])
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 2 * now[0])

    def step(mark):
        mark("forward")
        now[0] = 300
        mark("backward")
        now[0] = 200

    found = measure(step, device="mps")
    assert (found.allocated, found.reserved, found.peak.phase) == (300, 600, "forward")
    assert found.phases == {"forward": 300, "backward": 200} and "no peak on MPS" in found.notes[1]


def test_nothing_is_printed():
    """Not by the profiler's library either; in a new process, since it is asked to be quiet before its first use."""
    code = """if True:
        import os, torch
        from peftlab.vram import measure
        model = torch.nn.Linear(3, 3)
        found = measure(lambda: model(torch.ones(1, 3)).sum().backward(), model=model)
        assert found.allocated and "KINETO_LOG_LEVEL" not in os.environ"""
    environment = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

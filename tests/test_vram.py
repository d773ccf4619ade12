"""What a prediction is made of: the tape and who writes it, models without numbers, closed formulas, refusals."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch
import torch.nn.functional as F
from cases import case_of
from families import build
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import peftlab as pl
from peftlab import nf4_fast, nf4_layer
from peftlab.vram import Memory, predict
from peftlab.vram.allocator import CachingAllocator
from peftlab.vram.ghost import ghost
from peftlab.vram.step import OPTIMIZERS, TrainingStep, batch_of
from peftlab.vram.tape import CUBLAS, KINDS, Block, Recorder, Tape

aten = torch.ops.aten


def rounded(size: int, grain: int = 512) -> int:
    """Bytes that CUDA's allocator gives out for `size` bytes."""
    return -(-size // grain) * grain


def taken(tensors) -> int:
    """What tensors take on a GPU, memory that some of them share counted once."""
    return sum({s._cdata: rounded(s.nbytes()) for t in tensors if (s := t.untyped_storage()).nbytes()}.values())


def last(memory: Memory, phase: str) -> int:
    """The event with which a phase began for the last time."""
    return [mark.event for mark in memory.tape.marks if mark.phase == phase][-1]


def facts(memory: Memory) -> dict:
    """All that it says but what finding it out took."""
    return {name: value for name, value in memory.to_dict().items() if name not in ("seconds", "host")}


# ------------------------------------------------------------------------------------------------------------ the tape

ASKED = {
    "checkpointing": ("llama", dict(method="lora", batch=2, tokens=32, checkpointing=True)),
    "micro-batches": ("gpt2", dict(method="full", tokens=32, micro_batches=2, optimizer="adamw_foreach")),
    "two texts": ("t5", dict(method="PromptTuning", k=4, tokens=32)),
    "writing": ("llama", dict(train=False, tokens=16, new_tokens=9)),
}


@pytest.fixture(scope="module")
def memories() -> dict[str, Memory]:
    return {name: predict(build(family), **asked) for name, (family, asked) in ASKED.items()}


@pytest.mark.parametrize("name", ASKED)
def test_the_books_balance(memories, name):
    """Each block is born once and dies once, at most; at each event what is alive adds up, by kind too."""
    tape, levels = memories[name].tape, memories[name].tape.allocated()
    alive: dict[int, Block] = {}
    for event, number in enumerate(tape.events):
        if number >= 0:
            assert number not in alive and tape.blocks[number].born == event
            alive[number] = tape.blocks[number]
        else:
            assert alive.pop(~number).died == event > tape.blocks[~number].born
        assert levels[event] == sum(block.size for block in alive.values()) >= 0
        if event % 16 == 0 or event == memories[name].peak.event:
            kinds = tape.by_kind(event)
            assert sum(kinds.values()) == levels[event] and set(kinds) <= set(KINDS)
            assert sorted(map(id, tape.at(event))) == sorted(map(id, alive.values()))
    assert sorted(n for n in tape.events if n >= 0) == list(range(len(tape.blocks)))
    assert all((block.died is None) == (number in alive) for number, block in enumerate(tape.blocks))
    assert all(block.size % 512 == 0 < block.size for block in tape.blocks)


@pytest.mark.parametrize("name, phases", {
    "checkpointing": ["forward", "backward", "step"] * 2,
    "micro-batches": ["forward", "backward", "forward", "backward", "step"] * 2,
    "two texts": ["forward", "backward", "step"] * 2,
    "writing": ["prompt", "tokens"],
}.items())  # fmt: skip
def test_phases_follow_each_other(memories, name, phases):
    memory, found = memories[name], list(memories[name].tape.phases())
    assert [phase for phase, _ in found] == phases
    events = [event for _, part in found for event in part]
    assert events == list(range(found[0][1].start, len(memory.tape.events))), "no event is in two of them or in none"
    levels = memory.tape.allocated()
    assert memory.phases == {phase: max(levels[i] for name, part in found if name == phase for i in part)
                             for phase in dict.fromkeys(phases)}  # fmt: skip
    assert memory.allocated == max(levels) == levels[memory.peak.event] == sum(memory.by_kind.values())
    assert memory.allocated == max(memory.phases.values()) == memory.phases[memory.peak.phase]
    assert memory.reserved >= memory.allocated


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_training_fills_no_cache(family):
    """Keys and values for generation would be kept beside those for the backward pass. A classifier knows no such."""
    model = build(family)
    step = TrainingStep(model, batch_of(model, 1, 8), OPTIMIZERS["sgd"](model.parameters()))
    assert step.batch.get("use_cache", "not asked") == {"bert": "not asked"}.get(family, False)


def test_what_stays_and_what_goes(memories):
    """After a step: weights, adapter, optimizer, workspaces and the batch; neither gradients nor activations."""
    tape = memories["checkpointing"].tape
    stays = tape.by_kind(len(tape.events) - 1)
    assert set(stays) == {"weights", "adapter", "optimizer", "workspace", "activations"}
    assert stays["activations"] == 2 * rounded(2 * 32 * 8), "ids and labels, of 8 bytes each"
    assert stays["workspace"] == 2 * CUBLAS


@pytest.mark.parametrize("asked", [{}, {"checkpointing": True}, {"checkpointing": True, "autocast": "bf16"}], ids=str)
def test_of_the_passes_gradients_alone_are_left(asked):
    """When the optimizer's step begins; 16-bit copies that autocast made in a block computed again are gone too."""
    found = predict(build("llama"), "full", batch=2, tokens=16, **asked)
    there = found.tape.by_kind(last(found, "step") - 1)
    assert set(there) == {"weights", "optimizer", "gradients", "workspace", "activations"}
    assert there["activations"] == 2 * rounded(2 * 16 * 8), "ids and labels"
    assert there["gradients"] == taken(build("llama").parameters())


def test_the_life_of_a_block_tells_what_it_is_for():
    tape, blocks = Tape(), {}

    def born(name: str, **more) -> None:
        blocks[name] = tape.alloc(Block(512, tape.phase, "", "", **more))

    tape.enter("forward")
    for name in ("kept", "used up", "words"):
        born(name, shape=(2, 96) if name == "words" else (2, 32))
    tape.free(blocks["used up"])
    tape.enter("backward")
    tape.calls.append(0)
    for name in ("again", "again, used up", "gradient of the words", "gradient"):
        born(name, call=0 if "again" in name else -1, shape=(2, 96) if "words" in name else ())
    tape.free(blocks["again, used up"])
    tape.calls[0] = len(tape.events)
    for name in ("kept", "words", "again", "gradient of the words"):
        tape.free(blocks[name])
    tape.name_the_rest(vocabulary=96)
    assert {name: tape.blocks[number].kind for name, number in blocks.items()} == {
        "kept": "activations", "used up": "temporaries", "words": "logits", "again": "activations",
        "again, used up": "temporaries", "gradient of the words": "logits", "gradient": "temporaries",
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------- who writes it


def recorded(model: nn.Module, run, **how) -> Tape:
    """The tape of run(), as on a CPU unless `how` says otherwise: every byte counts there."""
    recorder = Recorder(model, **{"like": "cpu", **how})
    with recorder.watching(), recorder:
        run(recorder.tape)
    recorder.live.clear()
    return recorder.tape


def meta(*shape: int, **more) -> torch.Tensor:
    return torch.empty(shape, device="meta", **more)


def test_modules_are_named_there_and_back():
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to("meta")

    def run(tape):
        tape.enter("forward")
        out = model(meta(2, 8)).sum()
        tape.enter("backward")
        out.backward()

    tape = recorded(model, run)
    made = {(block.phase, block.op.split(".")[1], block.shape): block.module for block in tape.blocks}
    assert made["forward", "addmm", (2, 16)] == "0" and made["forward", "tanh", (2, 16)] == "1"
    assert made["forward", "addmm", (2, 4)] == "2" and made["forward", "sum", ()] == ""
    assert made["backward", "mm", (4, 16)] == "2" and made["backward", "mm", (16, 8)] == "0"
    assert made["backward", "tanh_backward", (2, 16)] == "1"


def test_a_module_that_fails_is_left():
    """The next ones are not taken for its parts."""

    class Fails(nn.Module):
        def forward(self, x):
            raise ArithmeticError

    model = nn.Sequential(nn.Tanh(), Fails())

    def run(tape):
        with pytest.raises(ArithmeticError):
            model(meta(4))
        model[0](meta(4) + 1)

    made = [(b.op.split(".")[1], b.module) for b in recorded(model, run).blocks]
    assert made == [("empty", ""), ("tanh", "0"), ("empty", ""), ("add", ""), ("tanh", "0")]


def test_what_is_computed_again_is_activations():
    """With checkpointing, the blocks that the backward pass computes again and keeps until it has used them."""
    asked = dict(method="lora", batch=2, tokens=64, attention="eager")
    plain, again = (predict(build("llama"), checkpointing=on, **asked) for on in (False, True))
    kept = [b for b in again.tape.blocks if b.phase == "backward" and b.kind == "activations"]
    assert {b.module.split(".")[2] for b in kept} == {"0", "1"}, "both layers of this model"
    assert "aten._softmax.default" in {b.op for b in kept}
    assert not [b for b in plain.tape.blocks if b.phase == "backward" and b.kind == "activations"]
    assert again.by_kind["activations"] < plain.by_kind["activations"] and again.allocated < plain.allocated


class Keeps(torch.autograd.Function):
    """The identity, whose gradient somebody else holds on to."""

    held: list = []

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        Keeps.held.append(out := g * 1)
        return out


@pytest.mark.parametrize("kept", [False, True])
def test_two_gradients_of_one_tensor_are_added_in_place(kept):
    """As autograd does unless somebody else holds the first one: no third tensor."""
    Keeps.held.clear()
    model = nn.Linear(8, 8).to("meta")

    def run(tape):
        x = model(meta(4, 8))
        y = (x.sin() + (Keeps.apply(x) if kept else x.cos())).sum()
        tape.enter("backward")
        y.backward()

    sums = [b for b in recorded(model, run).blocks if b.phase == "backward" and b.op.startswith("aten.add")]
    assert len(sums) == kept


def test_workspaces_come_and_go_at_once():
    kernels = {aten.tanh.default: lambda args, kwargs, out: (out, 1000)}
    tape = recorded(nn.Tanh(), lambda tape: meta(4).tanh(), like="cuda", kernels=kernels)
    result, work = [b for b in tape.blocks if b.op == "aten.tanh.default"]
    assert (result.size, work.size, work.kind) == (512, 1024, "temporaries")
    assert result.born + 1 == work.born == work.died - 1 < result.died


def test_a_matrix_product_brings_a_workspace_once_for_each_direction():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to("meta")

    def run(tape):
        for _ in range(2):
            tape.enter("forward")
            out = model(meta(2, 8)).sum()
            tape.enter("backward")
            out.backward()

    work = [b for b in recorded(model, run, like="cuda").blocks if b.kind == "workspace"]
    assert [(b.phase, b.size, b.died) for b in work] == [("forward", CUBLAS, None), ("backward", CUBLAS, None)]


def test_a_tensor_of_another_size_is_another_block():
    def run(tape):
        x = meta(256)
        x.resize_(1024)
        del x
        x = meta(256)
        x.data = meta(512)
        x.add_(1)
        del x

    tape = recorded(nn.Tanh(), run)
    assert [b.size for b in tape.blocks] == [1024, 4096, 1024, 2048]
    assert tape.allocated() == [1024, 0, 4096, 0, 1024, 3072, 2048, 0]


def test_views_and_tensors_elsewhere_are_no_blocks():
    def run(tape):
        x = meta(8, 8)
        kept.extend([x, x.T, x[1:], x.view(-1), torch.ones(8), meta(0)])

    kept: list = []
    assert [b.shape for b in recorded(nn.Tanh(), run, like="cuda").blocks] == [(8, 8)]


# ----------------------------------------------------------------------------------------------- models without numbers


def looks(model: nn.Module) -> dict:
    """What a prediction must not change: objects, bytes, modes, hooks."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        "tensors": [(n, id(t), t.data_ptr(), t.requires_grad, t.detach().numpy().tobytes()) for n, t in tensors],
        "gradients": [(id(p.grad), p.grad.numpy().tobytes()) for p in model.parameters()],
        "modules": [(n, id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
                    for n, m in model.named_modules()],
        "config": model.config.to_dict(), "attention": model.config._attn_implementation,
    }  # fmt: skip


@pytest.mark.parametrize("asked", [
    dict(method="lora", checkpointing=True, attention="eager"), dict(method="full", autocast="bf16"),
    dict(method="lora", quantize="nf4"), dict(train=False, new_tokens=4),
    dict(method="PrefixTuning", k=4, padding=True),
], ids=lambda asked: asked.get("method", "writing"))  # fmt: skip
def test_the_model_is_left_as_it_is(asked):
    model = build("llama")
    model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    before = looks(model)
    predict(model, tokens=16, **asked)
    assert looks(model) == before


def test_a_ghost_has_all_but_the_numbers():
    model = build("llama").bfloat16()
    pl.attach(model, pl.LoRA, "q_proj", r=2)
    pl.attach(model, pl.IA3, "up_proj", name="second")
    model.register_buffer("mask", torch.ones(4, 4).T, persistent=False)
    model.note = {"table": torch.arange(5)}
    model.train()
    copied = ghost(model)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, new in (dict(copied.named_parameters()) | dict(copied.named_buffers())).items():
        old = tensors.pop(name)
        assert new.is_meta and (new.shape, new.stride(), new.dtype) == (old.shape, old.stride(), old.dtype)
        assert new.requires_grad == old.requires_grad and isinstance(new, nn.Parameter) == isinstance(old, nn.Parameter)
    assert not tensors and copied.training
    assert copied.note["table"].is_meta and copied.note["table"].shape == (5,), "neither parameter nor buffer"
    assert pl.adapters(copied).keys() == pl.adapters(model).keys() == {"default", "second"}
    for path, adapter in pl.adapters(copied)["default"].items():
        assert adapter.layer is copied.get_submodule(path).layer, "the ghost's layer, not the model's"
    assert copied.config == model.config and copied.config is not model.config


def test_a_ghost_shares_what_the_model_shares():
    model = build("llama", tie_word_embeddings=True)
    copied = ghost(model)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight is not None
    untied, tied = (predict(m, "lora").by_kind["weights"] for m in (build("llama"), model))
    assert untied - tied == rounded(model.lm_head.weight.nbytes)


def test_a_ghost_that_cannot_be_made_leaves_torch_as_it_was():
    model = nn.Linear(2, 2)
    model.lines = (line for line in ())
    before = torch.Tensor.__deepcopy__
    with pytest.raises(TypeError, match="generator"):
        ghost(model)
    assert torch.Tensor.__deepcopy__ is before


def split(model: nn.Module) -> tuple[list, list]:
    """(what is frozen, with buffers; what trains)"""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()], trained


def holds(memory: Memory, frozen: list, trained: list) -> None:
    """It has just the bytes that the real model has."""
    assert (memory.by_kind["weights"], memory.by_kind["adapter"]) == (taken(frozen), taken(trained))


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int4", "int8"])
def test_a_packed_model_has_its_bytes(kind):
    """Asked of a dense model, and of one that is packed already."""
    packed = pl.quantize(build("llama").requires_grad_(False), kind=kind)
    asked = predict(build("llama"), "lora", "q_proj", r=2, quantize=kind, tokens=16)
    pl.attach(packed, pl.LoRA, "q_proj", r=2)
    holds(asked, *split(packed))
    assert facts(predict(packed, tokens=16))["by_kind"] == asked.by_kind


def test_a_model_of_peft_has_its_bytes():
    import peft

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(build("llama"), config)
    holds(predict(model, tokens=16), *split(model))
    made = predict(build("llama"), lambda model: peft.get_peft_model(model, config), tokens=16)
    assert made.by_kind == predict(model, tokens=16).by_kind, "made by peft on a model without numbers"


def test_bitsandbytes_layers_have_their_bytes():
    """Their packed weights, and the scales, levels and offset that lie beside."""
    bnb = pytest.importorskip("bitsandbytes")
    model = build("llama").bfloat16().requires_grad_(False)
    scales = []
    for path, layer in [*model.named_modules()]:
        if isinstance(layer, nn.Linear) and path != "lm_head":
            packed = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16,
                                       quant_type="nf4", compress_statistics=True)  # fmt: skip
            packed.load_state_dict({"weight": layer.weight.data})
            model.set_submodule(path, packed.to("cpu"))
            state = packed.weight.quant_state
            assert packed.weight.dtype == torch.uint8 and state.nested
            scales += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    pl.attach(model, pl.LoRA, "q_proj", r=2)
    frozen, trained = split(model)
    holds(predict(model, tokens=16), [*frozen, *scales], trained)


# ------------------------------------------------------------------------------------------------------ closed formulas


def test_lora_by_hand():
    """r·(in + out) numbers a layer, twice that for Adam, once for the gradients, 4 bytes each; the base as it is."""
    model, r = build("llama").bfloat16(), 4
    layers = [m for path, m in model.named_modules() if isinstance(m, nn.Linear) and path != "lm_head"]
    parts = [4 * r * n for m in layers for n in (m.in_features, m.out_features)]
    adapter = sum(map(rounded, parts))
    found = predict(model, "lora", r=r, batch=2, tokens=32)
    assert found.by_kind["weights"] == taken([*model.parameters(), *model.buffers()])
    assert found.by_kind["adapter"] == adapter
    assert found.by_kind["optimizer"] == 2 * adapter + 512 * len(parts), "and a counter for each parameter"
    assert found.tape.by_kind(last(found, "step"))["gradients"] == adapter
    half = predict(model, "lora", r=r, batch=2, tokens=32, adapter_dtype="bfloat16")
    assert half.by_kind["adapter"] == sum(rounded(n // 2) for n in parts)


class Net(nn.Module):
    """Parameters of 120,000 (large enough to be paged), 6,000 (to be packed), 300 and 20 numbers."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(400, 300), nn.Linear(300, 20)

    def forward(self, signal):
        return self.last(torch.tanh(self.first(signal)))


def of_net(**asked) -> Memory:
    return predict(Net(), "full", inputs={"signal": torch.zeros(8, 400)}, loss=lambda out: out.square().mean(), **asked)


def full(n: int) -> int:
    return rounded(4 * n)


def packed(n: int) -> int:
    """One byte a number, and a float32 for each 256."""
    return rounded(n) + rounded(4 * math.ceil(n / 256)) if n >= 4096 else full(n)


@pytest.mark.parametrize("optimizer, state", {
    "adamw": lambda n: 2 * full(n) + 512,  # its counter of steps is on the card
    "adamw_foreach": lambda n: 2 * full(n),  # elsewhere it is on the CPU
    "adamw_loop": lambda n: 2 * full(n),
    "sgd": lambda n: 0,
    "sgd_momentum": full,
    "adamw8bit": lambda n: 2 * packed(n),
    "paged_adamw": lambda n: 0 if n >= 100_000 else 2 * full(n),
    "paged_adamw8bit": lambda n: 2 * rounded(4 * math.ceil(n / 256)) if n >= 100_000 else 2 * packed(n),
}.items())  # fmt: skip
def test_optimizers_by_hand(optimizer, state):
    assert set(OPTIMIZERS) >= {optimizer}
    found, sizes = of_net(optimizer=optimizer), [p.numel() for p in Net().parameters()]
    assert sorted(sizes) == [20, 300, 6000, 120_000]
    assert found.by_kind.get("optimizer", 0) == sum(map(state, sizes))
    assert found.by_kind["weights"] == found.tape.by_kind(last(found, "step"))["gradients"] == sum(map(full, sizes))
    bytes_paged = {"paged_adamw": 2 * 4 * 120_000, "paged_adamw8bit": 2 * 120_000}.get(optimizer, 0)
    assert [note for note in found.notes if "paged" in note] == (
        [f"{bytes_paged / 2**20:.1f} MiB of optimizer states are paged: in CPU memory, and on the card only while they "
         "are used"] if bytes_paged else [])  # fmt: skip


def test_what_the_allocator_does_not_cut_off_counts():
    """11 MiB get a piece of 12, of which 1 MiB is not worth cutting off; torch.cuda.memory_allocated() has it too."""
    model = nn.Linear(2**10, 11 * 2**8, bias=False)
    found = predict(model, train=False, inputs={"input": torch.zeros(1, 2**10)})
    assert (found.by_kind["weights"], found.by_kind["remainders"]) == (11 * 2**20, 2**20)
    assert found.allocated == sum(found.by_kind.values()) == CachingAllocator().replay(found.tape).peak_allocated
    on_cpu = found.again(device="cpu")
    assert "remainders" not in on_cpu.by_kind and on_cpu.reserved == 0


def test_foreach_needs_one_copy_of_the_parameters_more_than_fused():
    fused, foreach, loop = (of_net(optimizer=f"adamw{how}").phases["step"] for how in ("", "_foreach", "_loop"))
    weights = sum(full(p.numel()) for p in Net().parameters())
    assert foreach - fused == pytest.approx(weights, rel=0.02)  # a few counters and norms beside
    assert loop - fused == pytest.approx(2 * full(120_000), rel=0.02), "two of the largest parameter alone"


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 17])
def test_the_cache_by_hand(new_tokens):
    """Keys and values of each token but the last one written: 2 · layers · B · T · heads · width · bytes."""
    model = build("llama").bfloat16()
    found = predict(model, train=False, batch=8, tokens=32 - new_tokens, new_tokens=new_tokens)
    config, T = model.config, 31
    one = 8 * T * config.num_key_value_heads * config.head_dim * 2
    assert found.tape.by_kind(len(found.tape.events) - 1)["cache"] == 2 * config.num_hidden_layers * rounded(one)
    assert "gradients" not in found.by_kind and "optimizer" not in found.by_kind


def test_a_sliding_window_caps_the_cache():
    """Gemma 2: every other layer keeps the last tokens of its window only."""
    import transformers as t

    config = t.Gemma2Config(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=16,
                            num_attention_heads=2, num_key_value_heads=2, sliding_window=64)  # fmt: skip
    found = predict(config, batch=8, tokens=16, new_tokens=1009)
    one = 8 * 2 * 16 * 2  # bytes of one token's keys: B · heads · width · 2
    assert found.tape.by_kind(len(found.tape.events) - 1)["cache"] == pytest.approx(2 * one * (1024 + 64), rel=0.01)


def test_a_shape_is_what_a_model_of_it_is():
    model = build("llama")
    asked = dict(method="lora", targets="q_proj", r=2, tokens=16)
    by_config, by_model = predict(model.config, dtype="float32", **asked), predict(model, **asked)
    assert {**facts(by_config), "asked": 0} == {**facts(by_model), "asked": 0}
    half = predict(model.config, **asked).by_kind["weights"]
    assert half == taken(model.bfloat16().parameters()) + taken(build("llama").buffers()), "angles stay in float32"


def test_other_kinds_of_models():
    """An encoder–decoder reads and writes `tokens` each; a classifier's labels are one a row."""
    writes, classifies = (predict(build(family), "lora", batch=2, tokens=16) for family in ("t5", "bert"))
    assert {"encoder", "decoder"} <= {b.module.split(".")[0] for b in writes.tape.blocks}
    assert {b.shape for b in writes.tape.blocks if b.kind == "logits"} == {(2 * 16, 96)}
    assert not any(b.kind == "logits" for b in classifies.tape.blocks)
    there = classifies.tape.at(last(classifies, "step"))
    assert [b.kind for b in there if b.shape == (2,)] == ["activations"], "the labels"
    assert predict("t5-small", "lora", tokens=16).phases.keys() == {"forward", "backward", "step"}, "a shape too"
    masked = predict("bert-base-uncased", train=False, tokens=16)
    assert set(masked.phases) == {"prompt"} and "gradients" not in masked.by_kind


def test_more_needs_more():
    model = build("llama")
    for name, values in {"batch": (1, 2, 3, 5, 8), "tokens": (8, 9, 33, 64, 100), "r": (4, 8, 16)}.items():
        found = [predict(model, "lora", **{"batch": 2, "tokens": 16, name: value}).allocated for value in values]
        assert found == sorted(set(found)), name


def test_kinds_of_attention():
    """Flash attention needs neither scores nor a mask; with one, as for padding, it is the memory-efficient kernel,
    which reads the mask; the formula keeps scores, in float32."""
    model = build("llama").bfloat16()
    asked = dict(method="lora", targets="q_proj", r=2, tokens=2048)
    flash, padded = predict(model, **asked), predict(model, padding=True, **asked)
    formula = predict(model, attention="math", **asked)
    assert flash.allocated < padded.allocated < formula.allocated
    for memory, op in ((flash, "flash"), (padded, "efficient"), (formula, "_safe_softmax")):
        assert any(op in block.op for block in memory.tape.blocks)
    assert predict(model, attention="flash", **asked).by_kind == flash.by_kind, "asked for by name"
    assert predict(model, attention="efficient", padding=True, **asked).by_kind == padded.by_kind
    square, layers = 2048 * 2048, model.config.num_hidden_layers
    kept = [b for b in formula.tape.blocks if b.phase == "forward" and b.kind == "activations"]
    scores = [b for b in kept if b.size == 16 * square]
    assert len(scores) == 2 * layers, "4 bytes for each of 4 heads, kept once a layer, in each of two steps"
    large = [{b.op for b in m.tape.blocks if b.size >= 2 * square and b.op != "cuBLAS"} for m in (padded, flash)]
    assert large == [{"aten.where.self"}, set()], "the mask of all heads; nothing"


def test_a_kernel_is_used_where_one_is_asked_for():
    """Of a model that is there with an attention of its own ("eager"), too."""
    asked = dict(method="lora", targets="q_proj", r=2, tokens=512)
    with_kernels, own = build("llama").bfloat16(), build("llama").bfloat16()
    own.set_attn_implementation("eager")
    assert predict(own, **asked).by_kind == predict(with_kernels, attention="eager", **asked).by_kind
    for kernel in ("flash", "math"):
        assert predict(own, attention=kernel, **asked).by_kind == predict(
            with_kernels, attention=kernel, **asked).by_kind  # fmt: skip
    assert own.config._attn_implementation == "eager"


def test_dropout_keeps_a_byte_a_number_on_a_gpu():
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.1))
    asked = dict(method="full", inputs={"input": torch.zeros(32, 64)}, loss=lambda out: out.sum())
    on = {device: predict(model, device=device, **asked).tape.blocks for device in ("cuda", "cpu")}
    kept = {device: [b.size for b in blocks if (b.module, b.phase) == ("1", "forward") and b.kind == "activations"]
            for device, blocks in on.items()}  # fmt: skip
    assert kept == {"cuda": [32 * 64] * 2, "cpu": [4 * 32 * 64] * 2}, "once in each of two steps"


def test_autocast_casts_trained_weights_once_and_frozen_ones_each_time():
    """Twice through the same layer: a trained weight's 16-bit copy is kept to the end of the forward pass."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = nn.Linear(64, 64, bias=False), nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.layer(self.layer(x * self.scale))

    for trained, copies in ((True, 1), (False, 2)):
        model = Twice()
        model.layer.requires_grad_(trained)
        found = predict(model, inputs={"x": torch.zeros(8, 64)}, loss=lambda out: out.sum(), autocast="bf16")
        cast = [b for b in found.tape.blocks if b.shape == (64, 64) and b.size == 2 * 64 * 64 and b.phase == "forward"]
        assert len(cast) == 2 * copies, "in each of two steps"


# ----------------------------------------------------------------------------------------------------- ways to ask


def test_a_training_loop_of_your_own():
    """step=: it runs twice, as given; what it does not mark is setup."""
    calls = []

    def step(model, batch, optimizer, mark):
        calls.append({name: tuple(tensor.shape) for name, tensor in batch.items()})
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    found = predict(build("llama"), "lora", step=step, batch=2, tokens=16)
    assert calls == 2 * [{"input_ids": (2, 16), "labels": (2, 16)}]
    assert found.allocated == pytest.approx(predict(build("llama"), "lora", batch=2, tokens=16).allocated, rel=0.02)
    assert found.peak.phase == "" and found.phases == {}


def test_asked_again():
    memory = predict(build("llama"), "lora", "q_proj", batch=2, tokens=16, r=4)
    assert facts(memory.again()) == facts(memory), "the same twice"
    more = memory.again(batch=4, checkpointing=True, r=8)
    assert facts(more) == facts(predict(build("llama"), "lora", "q_proj", batch=4, tokens=16, r=8, checkpointing=True))


def test_a_memory_is_written_and_read():
    memory = predict(build("llama"), "lora", ["q_proj", "v_proj"], batch=2, tokens=16, r=4)
    entries = json.loads(json.dumps(memory.to_dict()))
    back = Memory.from_dict(entries)
    assert back == memory and back.to_dict() == memory.to_dict() and repr(back) == repr(memory)
    assert back.tape is None and back.timeline == []
    own = predict(build("llama"), "lora", tokens=16, optimizer=lambda params: torch.optim.Adagrad(params))
    assert json.dumps(own.to_dict()) and own.by_kind["optimizer"]


def test_a_memory_in_words(memories):
    memory = memories["checkpointing"]
    assert memory.seconds > 0 and isinstance(memory.host, int) and memory.host >= 0
    said = repr(memory)
    assert said.startswith("predicted: LlamaForCausalLM, lora, 2 × 32 tokens, base in float32, checkpointing, adamw")
    assert all(kind in said for kind in (*memory.by_kind, "allocated", "reserved")) and memory.where() in said
    timeline = memory.timeline
    assert [*dict.fromkeys(phase for phase, _ in timeline)] == ["forward", "backward", "step"]
    assert max(level for _, level in timeline) == memory.allocated, "the last of the two steps has the peak"


# -------------------------------------------------------------------------------------------- what it leaves behind


def state_of_torch() -> list:
    adam, sgd = (importlib.import_module(f"torch.optim.{name}") for name in ("adam", "sgd"))
    module = torch.nn.modules.module
    return [
        F.scaled_dot_product_attention, F.dropout, F.linear, F.layer_norm, F.softmax, F.cross_entropy, torch.matmul,
        torch.softmax, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.pow, torch.Tensor.__deepcopy__,
        torch.is_autocast_enabled, torch.get_autocast_dtype, torch.autocast, torch.get_rng_state, torch.random.fork_rng,
        torch.cuda.empty_cache, adam._device_dtype_check_for_fused, sgd._device_dtype_check_for_fused, nf4_fast.kernels,
        nf4_layer.kernels, torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(),
        list(module._global_forward_hooks), list(module._global_forward_pre_hooks), _get_current_dispatch_mode_stack(),
        torch.get_rng_state().tolist(),
    ]  # fmt: skip


@pytest.mark.parametrize("asked", [
    dict(), dict(autocast="bf16", checkpointing=True), dict(autocast="fp16", device="cpu", checkpointing=True),
    dict(attention="math", device="cpu"), dict(quantize="nf4"),
], ids=str)  # fmt: skip
def test_torch_is_left_as_it_was(asked):
    model = build("llama")
    before = state_of_torch()
    predict(model, "lora", tokens=16, **asked)
    predict("bert-base-uncased", train=False, tokens=16)
    assert state_of_torch() == before


@pytest.mark.parametrize("fails", ["model", "loss", "optimizer", "step"])
def test_torch_is_left_as_it_was_after_an_error(fails):
    class Boom(Exception):
        pass

    class Model(Net):
        def forward(self, signal):
            if fails == "model":
                raise Boom
            return super().forward(signal)

    def boom(*args):
        raise Boom

    asked = {"loss": {"loss": boom}, "optimizer": {"optimizer": boom}, "step": {"step": boom}}.get(fails, {})
    model = Model()
    before = state_of_torch()
    with pytest.raises(Boom):
        predict(model, "full", autocast="bf16", device="cpu", **{"inputs": {"signal": torch.zeros(2, 400)},
                                                                 "loss": lambda out: out.sum(), **asked})  # fmt: skip
    assert state_of_torch() == before


@pytest.mark.parametrize("name", pl.METHODS)
def test_random_numbers_are_not_drawn(name):
    """A prediction in the middle of an experiment does not change what comes after it."""
    model, case = build("llama"), case_of(pl.METHODS[name])
    if case.before:
        case.before(model)
    before = torch.get_rng_state()  # TrainableTokens has a hyper-parameter named as one of predict's, so by a function
    change = lambda model: pl.attach(model, name, case.targets, **case.hyper)  # noqa: E731
    assert predict(model, change, tokens=16, checkpointing=True).by_kind["adapter"]
    assert torch.equal(torch.get_rng_state(), before)


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("model, words", [
    ("llama-3.1-9b", "did you mean 'llama-3.1-8b'"),
    ("meta-llama/Llama-3-9B", "did you mean 'llama-3-8b'"),
    ("nothing-like-it", "Built in are: .*llama-3.1-8b"),
])  # fmt: skip
def test_an_unknown_model(model, words):
    with pytest.raises(ValueError, match=words):
        predict(model, "lora")


@pytest.mark.parametrize("asked, words", [
    (dict(dtype="fp8"), "dtype='fp8' is not one of .*'bfloat16'"),
    (dict(adapter_dtype="int8"), "adapter_dtype='int8' is not one of .*'float32'"),
    (dict(attention="sdpa"), "attention='sdpa' is not one of 'auto', 'flash'"),
    (dict(optimizer="adam"), "optimizer='adam' is none of adamw, .*nor a function from parameters to an optimizer"),
    (dict(quantize="int2"), "quantize='int2' is not one of .*'nf4'"),
    (dict(autocast="bfloat16"), "autocast='bfloat16' is not one of .*'bf16'"),
    (dict(device="mps"), "device='mps' is not one of 'cuda', 'cpu'"),
    (dict(batch=0), "batch=0: must be a whole number, at least 1"),
    (dict(batch=True), "batch=True: must be a whole number"),
    (dict(batch=2.0), "batch=2.0: must be a whole number"),
    (dict(batch=10**12), "batch=1000000000000: .* at most 1,000,000,000"),
    (dict(tokens=0), "tokens=0: must be a whole number, at least 1"),
    (dict(tokens="512"), "tokens='512': must be a whole number"),
    (dict(tokens=10**30), "at most 1,000,000,000"),
    (dict(batch=10**9, tokens=10**9), "tensors of this size cannot exist .*take fewer rows or tokens"),
    (dict(micro_batches=0), "micro_batches=0: must be a whole number, at least 1"),
    (dict(new_tokens=-1), "new_tokens=-1: must be a whole number, at least 0"),
    (dict(new_tokens=4), "it trains; train=False runs it"),
    (dict(method="full", quantize="nf4"), "quantize='nf4' freezes weights that full fine-tuning trains; take a method"),
    (dict(method="full", targets="q_proj"), "takes no targets"),
    (dict(method="full", r=8), "takes no r"),
    (dict(method=None, targets="q_proj"), "targets given, but no method; say which, such as method='lora'"),
    (dict(method=None, r=8), "r given, but no method"),
    (dict(method="loraa"), "unknown method 'loraa'; did you mean 'LoRA'"),
    (dict(targets="q_prj"), "no module path matches 'q_prj'; did you mean 'q_proj'"),
    (dict(targets="q_proj", r=64), "r=64 is not in 1…32"),
], ids=str)  # fmt: skip
def test_a_question_that_has_no_answer(asked, words):
    with pytest.raises(ValueError, match=words):
        predict(build("llama"), **{"method": "lora", "tokens": 16, **asked})


@pytest.mark.parametrize("asked, words", [
    (dict(rank=8), "LoRA has no hyper-parameter 'rank'.* It takes: r, alpha"),
    (dict(method=3), "method=3: give a name such as 'lora'"),
    (dict(model=3), "takes a model .*not int"),
    (dict(inputs=[1]), "inputs is a list; give a dictionary"),
], ids=str)  # fmt: skip
def test_a_question_of_the_wrong_kind(asked, words):
    with pytest.raises(TypeError, match=words):
        predict(**{"model": build("llama"), "method": "lora", "tokens": 16, **asked})


def test_nothing_to_train():
    frozen = build("llama").requires_grad_(False)
    for model in (frozen, "qwen2.5-0.5b"):
        with pytest.raises(ValueError, match='nothing to train: name a method .*or train=False'):
            predict(model, train=True)
    assert predict(frozen, tokens=16).phases.keys() == {"prompt"}, "by default it runs"


@pytest.mark.parametrize("family", ["gpt2", "opt", "bert"])
def test_longer_than_the_learned_positions(family):
    model = build(family)
    assert predict(model, "lora", tokens=64).allocated
    with pytest.raises(ValueError, match=f"65 tokens are longer than .* {type(model).__name__}, .* 64 positions"):
        predict(model, "lora", tokens=65)
    if family != "bert":
        with pytest.raises(ValueError, match="65 tokens are longer"):
            predict(model, train=False, tokens=60, new_tokens=5)


def test_longer_than_a_context_that_is_only_known():
    """Positions that are computed have no end; the model was not made for them, and the note says so."""
    assert predict(build("llama"), "lora", tokens=65).notes == (
        "65 tokens are longer than the context of 64 that the model was made for",)  # fmt: skip
    assert predict(build("llama"), "lora", tokens=64).notes == ()


@pytest.mark.parametrize("model, new_tokens", [("t5", 4), ("bert", 1)])
def test_models_that_do_not_write_on(model, new_tokens):
    with pytest.raises(ValueError, match="does not write one token after the other"):
        predict(build(model), train=False, tokens=16, new_tokens=new_tokens)


def decides(layer, x):
    y = layer(x)
    return y * 2 if y.sum() > 0 else y


ASKS = {
    "if": (decides, "decides by a number .* in 'part'"),
    "item": (lambda layer, x: layer(x) * x.sum().item(), "computes with a number .* in 'part'"),
    "int": (lambda layer, x: layer(x)[: int(x.sum())], "computes with a number"),
    "nonzero": (lambda layer, x: layer(x)[x[:, 0].nonzero()], "cannot run without numbers .*nonzero"),
    "mask": (lambda layer, x: layer(x)[x[:, 0] > 0], "cannot run without numbers"),
    "tolist": (lambda layer, x: layer(x) * x.tolist()[0][0], "cannot run without numbers"),
    "numpy": (lambda layer, x: layer(x) * x.numpy().sum(), "cannot run without numbers"),
    "unique": (lambda layer, x: layer(x.unique(dim=0)), "cannot run without numbers .*unique"),
}


@pytest.mark.parametrize("name", ASKS)
def test_a_model_that_looks_at_its_numbers(name):
    """And so what it does depends on them: it is measured, not predicted."""
    function, words = ASKS[name]

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return function(self.layer, x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Part()

        def forward(self, x):
            return self.part(x)

    with pytest.raises(ValueError, match=f"(?s){words}.*measure it instead"):
        predict(Model(), "full", inputs={"x": torch.ones(3, 4)}, loss=lambda out: out.sum())


def test_a_model_whose_arguments_are_unknown():
    with pytest.raises(ValueError, match="Net takes signal, and no input_ids: give inputs=.* and loss="):
        predict(Net(), "full")
    with pytest.raises(ValueError, match="gives out no loss; give loss=, a function from its output to the loss"):
        predict(Net(), "full", inputs={"signal": torch.zeros(2, 400)})
    with pytest.raises(ValueError, match=r"Net has no gradient_checkpointing_enable\(\)"):
        of_net(checkpointing=True)


def test_a_batch_of_your_own_is_not_held_to_the_default_length():
    ids = torch.ones(2, 8, dtype=torch.long)
    given = predict(build("gpt2"), "lora", inputs={"input_ids": ids, "labels": ids, "use_cache": False})
    assert given.by_kind == predict(build("gpt2"), "lora", batch=2, tokens=8).by_kind
